//! What clients, workers and routers tell each other.

use antiphon_client::Dial;
use antiphon_core::{
    id::{Epoch, ServerId, SessionId},
    varint,
};
use antiphon_proto::{
    api_key::{self, ApiKey},
    refusal, ticket as tickets,
    v1::{
        Activate, Activated, ClientMessage, Codec, Ended, Flush, Goodbye, Heartbeat, PlayoutReport, Refusal,
        RelayAddress, ServerMessage, Session, SpeechStarted, client_message, server_message,
    },
};
use antiphon_quic::{AudioReceived, Flow, Heartbeats, datagram, split_flow, verify_activation};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use pasetors::{
    keys::AsymmetricSecretKey,
    version4::{PublicToken, V4},
};
use prost::Message;
use tonic::{Code, Status};

use super::packets::NOW;
use crate::input::Input;

/// Messages one after the other, each behind its length; whether one at least was whole.
fn stream<M: Message + Default + PartialEq>(data: &[u8]) -> bool {
    let (mut rest, mut understood) = (data, false);
    while let Some((length, prefix)) = varint::read(rest) {
        let Some(message) = usize::try_from(length).ok().and_then(|length| rest.get(prefix..)?.get(..length)) else {
            break;
        };
        let Ok(decoded) = M::decode(message) else { break };
        assert!(M::decode(&*decoded.encode_to_vec()).is_ok_and(|again| again == decoded || holds_nan(&again)));
        understood |= !message.is_empty();
        rest = &rest[prefix + message.len()..];
    }
    understood
}

/// Not equal to itself.
fn holds_nan<M: PartialEq>(message: &M) -> bool {
    #[expect(clippy::eq_op, reason = "a message with a number that is none differs from itself")]
    let differs = message != message;
    differs
}

fn framed(messages: &[impl Message]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        varint::write(message.encoded_len() as u64, &mut out);
        message.encode(&mut out).expect("a Vec grows as needed");
    }
    out
}

pub(super) fn to_worker(data: &[u8]) -> bool {
    stream::<ClientMessage>(data)
}

pub(super) fn to_worker_seeds() -> Vec<Vec<u8>> {
    use client_message::Message::{Activate as A, Goodbye as G, PlayoutReport as P};
    let activate =
        Activate { session: vec![1; 16].into(), epoch: 1, ticket: "v4.public.x".into(), signature: vec![2; 64].into() };
    let report = PlayoutReport { generation: 1, heard_samples: 48_000, complete: true };
    let messages = [A(activate), P(report), G(Goodbye { reason: "done".into() })];
    vec![framed(&messages.map(|message| ClientMessage { message: Some(message) }))]
}

pub(super) fn to_client(data: &[u8]) -> bool {
    stream::<ServerMessage>(data)
}

pub(super) fn to_client_seeds() -> Vec<Vec<u8>> {
    use server_message::Message::{Activated as A, Ended as E, Flush as F, SpeechStarted as S};
    let activated = Activated { codec: 1, heartbeat_flow: 1, heartbeat_interval_ms: 100, ..Activated::default() };
    let messages = [
        A(activated),
        S(SpeechStarted { at: 4_800, turn: 1 }),
        F(Flush { generation: 1 }),
        E(Ended { code: 1, detail: String::new() }),
    ];
    vec![framed(&messages.map(|message| ServerMessage { message: Some(message) }))]
}

/// The body of `POST /v1/sessions`. What is wrong is said with a place of its own or of the whole, in a few words.
pub(super) fn request(data: &[u8]) -> bool {
    match antiphon_router::check_session_request(data) {
        Ok(agent) => {
            let (namespace, name) = agent.split_once('/').expect("NAMESPACE/NAME");
            assert!(!namespace.is_empty() && !name.is_empty() && agent.is_ascii());
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 2_000 + 8 * data.len(), "{error}");
            false
        }
    }
}

pub(super) fn request_seeds() -> Vec<Vec<u8>> {
    let key = URL_SAFE_NO_PAD.encode(tickets::public_key(&[5; 32]));
    let whole = format!(
        r#"{{"agent":"default/frontdesk","clientKey":"{key}","location":{{"latitude":52.5,"longitude":13.4}},
        "constraints":{{"regions":["frankfurt"],"residency":["eu"],"maxRttMs":80}},"codec":"opus","epoch":1,"waitedMs":20}}"#
    );
    let least = format!(r#"{{"agent":"default/frontdesk","clientKey":"{key}"}}"#);
    vec![whole.into_bytes(), least.into_bytes()]
}

/// Datagrams behind their lengths (two bytes), each 10 ms after the one before, into the machine that answers them.
pub(super) fn heartbeat(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let (mut beats, mut understood, mut now_us) = (Heartbeats::new(0, Epoch::FIRST), false, 1);
    while !input.is_empty() {
        let length = usize::from(input.u16());
        now_us += 10_000;
        match split_flow(input.bytes(length)) {
            Some((Flow::Heartbeat, payload)) => {
                if let Ok(beat) = Heartbeat::decode(payload) {
                    beats.on_heartbeat(now_us, &beat);
                    understood |= !payload.is_empty();
                }
            }
            Some((Flow::Audio, _)) | None => beats.on_heard(now_us),
        }
        let _ = (beats.silence(now_us), beats.epoch_acknowledged(now_us), beats.rtt());
        if let Some(beat) = beats.poll(now_us, AudioReceived { received: 1, lost: 0, highest: Some(7) }) {
            assert!(split_flow(&datagram::heartbeat(&beat)).is_some(), "ours can be read");
        }
    }
    understood
}

pub(super) fn heartbeat_seeds() -> Vec<Vec<u8>> {
    let audio = AudioReceived { received: 3, lost: 1, highest: Some(9) };
    let mut beats = Heartbeats::new(0, Epoch::FIRST);
    let mut seed = Vec::new();
    for beat in
        [beats.beat(5, audio), beats.path_opener(10, audio), Heartbeat { echoed_us: 1, ..beats.beat(20, audio) }]
    {
        let datagram = datagram::heartbeat(&Heartbeat { padding: vec![0; 8].into(), ..beat });
        seed.extend_from_slice(&(datagram.len() as u16).to_be_bytes());
        seed.extend_from_slice(&datagram);
    }
    vec![seed]
}

const SEED: [u8; 32] = [6; 32];

/// A token as it is; behind an odd first byte, claims that the fleet's own key signs.
pub(super) fn ticket(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let choices = input.byte();
    let Ok(text) = std::str::from_utf8(input.rest()) else { return false };
    let key = tickets::public_key(&SEED);
    let token = if choices & 1 == 1 {
        let pair = [SEED, key].concat();
        let secret = AsymmetricSecretKey::<V4>::from(&pair).expect("seed and public key");
        match PublicToken::sign(&secret, text.as_bytes(), None, Some(b"antiphon/1 ticket")) {
            Ok(token) => token,
            Err(_) => return false,
        }
    } else {
        text.to_owned()
    };
    match tickets::verify(&token, &[[1; 32], key], NOW) {
        Ok(claims) => {
            assert!(claims.exp > NOW && tickets::codec_label(claims.codec).is_some());
            if let Ok(again) = tickets::sign(&claims, &SEED) {
                assert_eq!(tickets::verify(&again, &[key], NOW), Ok(claims));
            }
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

pub(super) fn ticket_seeds() -> Vec<Vec<u8>> {
    let claims = tickets::TicketClaims {
        v: tickets::VERSION,
        session: SessionId::from_bytes([3; 16]),
        epoch: Epoch::FIRST,
        agent: "default/echo".into(),
        region: "north".into(),
        server_id: ServerId::from_u64(0x0040_0001_dead_beef),
        client_key: [4; 32],
        codec: Codec::Opus,
        tenant: "test".into(),
        iat: NOW - 1,
        exp: NOW + 30,
        lease: 77,
    };
    let token = tickets::sign(&claims, &SEED).expect("they are in order");
    let json = r#"{"v":1,"session":"SESSION","epoch":1,"agent":"default/echo","region":"north","server_id":"00400001deadbeef","client_key":"BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ","codec":"opus","tenant":"test","iat":1799999999,"exp":1800000030,"lease":"000000000000004d"}"#;
    let json = json.replace("SESSION", &claims.session.to_string());
    vec![[b"\0", token.as_bytes()].concat(), [b"\x01", json.as_bytes()].concat()]
}

/// What an application shows, by the first byte: an API key, a session's name, or a signature.
pub(super) fn credentials(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let choice = input.byte();
    if choice & 3 == 3 {
        let signature = input.bytes(64);
        let genuine = tickets::public_key(&SEED);
        assert!(verify_activation(&genuine, input.rest(), signature).is_err(), "nobody has signed");
        // A key of small order takes signatures of nobody: whoever shows one has given away its own session.
        let key = input.array();
        return verify_activation(&key, input.rest(), signature).is_ok();
    }
    let Ok(text) = std::str::from_utf8(input.rest()) else { return false };
    if choice & 1 == 0 {
        let parsed = ApiKey::parse(text);
        if let Ok(key) = &parsed {
            assert_eq!(key.text(), text);
            assert!(api_key::is_id(key.id()));
        }
        return parsed.is_ok();
    }
    let parsed = text.parse::<SessionId>();
    if let Ok(session) = &parsed {
        assert!(session.to_string().eq_ignore_ascii_case(text), "a name names one session");
    }
    parsed.is_ok()
}

pub(super) fn credentials_seeds() -> Vec<Vec<u8>> {
    let key = ApiKey::from_random(&[7; ApiKey::RANDOM]);
    let session = SessionId::from_bytes([0x5a; 16]).to_string();
    vec![[b"\0", key.text().as_bytes()].concat(), [b"\x01", session.as_bytes()].concat()]
}

/// A session, or, behind an odd first byte, an error's details.
pub(super) fn router_answer(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    if input.byte() & 1 == 1 {
        let status = Status::with_details(Code::ResourceExhausted, "", input.rest().to_vec().into());
        return refusal::of_status(&status).is_some();
    }
    let Ok(session) = Session::decode(input.rest()) else { return false };
    match Dial::new(&session) {
        Ok(dial) => !format!("{dial:?}").is_empty(),
        // A certificate authority is beyond a fuzzer's reach; all fields before it are not.
        Err(error) => error.to_string().contains("trust_anchor"),
    }
}

pub(super) fn router_answer_seeds() -> Vec<Vec<u8>> {
    let relay = RelayAddress { number: 65, address: "127.0.0.1:4433".into(), ..RelayAddress::default() };
    let session = Session {
        session: SessionId::from_bytes([3; 16]).to_string(),
        epoch: 1,
        ticket: "v4.public.x".into(),
        initial_connection_ids: vec![vec![0x10; 17].into()],
        relays: vec![relay],
        server_name: "worker.north".into(),
        trust_anchor: vec![0x30, 0x03, 0x02, 0x01, 0x01].into(),
        codec: Codec::Opus.into(),
        ..Session::default()
    };
    let refused = Refusal { reason: "no_capacity".into(), retry_after_ms: 500, ..Refusal::default() };
    let status = refusal::to_status(Code::ResourceExhausted, &refused);
    vec![[&[0][..], &session.encode_to_vec()].concat(), [&[1][..], status.details()].concat()]
}
