//! A worker without relays in front of it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use antiphon_client::{Call, CallReport, ClientKey, Dial, DialError, Event, Heard, Party, Step};
use antiphon_core::id::{Epoch, SessionId};
use antiphon_proto::v1::{
    Activated, ClientMessage, Codec, Heartbeat, RelayAddress, ServerMessage, Session,
    client_message::Message as FromClient, server_message::Message as ToClient,
};
use antiphon_quic::{
    AudioBudget, AudioReceived, ControlReader, ControlWriter, Flow, Heartbeats, Side, datagram, server_crypto,
    split_flow, transport,
};
use antiphon_runtime::{
    pki::{FleetCa, Identity, PeerName, Role},
    tls,
};
use prost::Message as _;
use quinn::{Connection, Endpoint, ServerConfig};
use tokio::{sync::watch, task::JoinSet};

/// Longest wait for anything that has to come.
const SOON: Duration = Duration::from_secs(20);

/// Accepts every activation and answers heartbeats with heartbeats.
pub(crate) struct Worker {
    identity: Identity,
    pub(crate) address: SocketAddr,
    tasks: JoinSet<()>,
    /// Where the last client was seen.
    pub(crate) client: watch::Receiver<Option<SocketAddr>>,
    /// Handshakes that were completed and that were activated.
    pub(crate) connections: watch::Receiver<(u32, u32)>,
}

impl Worker {
    pub(crate) fn start(bind: &str) -> Self {
        let ca = FleetCa::from_seed(&[7; 32]).unwrap();
        let peer = PeerName::new("w-0", Role::Worker, "north").unwrap();
        let identity = ca.issue(&peer, &[], SystemTime::now()).unwrap();
        let crypto = Arc::new(server_crypto(tls::provider(), identity.presenter()).unwrap());
        let mut config = ServerConfig::with_crypto(crypto);
        config.transport_config(Arc::new(transport(Side::Worker, AudioBudget { frame_bytes: 400 })));
        let endpoint = Endpoint::server(config, bind.parse().unwrap()).unwrap();
        let address = endpoint.local_addr().unwrap();
        let (seen, client) = watch::channel(None);
        let (counted, connections) = watch::channel((0, 0));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut calls = JoinSet::new();
            while let Some(incoming) = endpoint.accept().await {
                let (seen, counted) = (seen.clone(), counted.clone());
                calls.spawn(async move {
                    let Ok(connection) = incoming.await else { return };
                    counted.send_modify(|(completed, _)| *completed += 1);
                    serve(connection, &seen, &counted).await;
                });
            }
        });
        Self { identity, address, tasks, client, connections }
    }

    /// What a router would answer, with these relays.
    pub(crate) fn session(&self, relays: &[(u32, SocketAddr)]) -> Session {
        let relay = |(number, address): &(u32, SocketAddr)| RelayAddress {
            number: *number,
            address: address.to_string(),
            ..RelayAddress::default()
        };
        Session {
            session: SessionId::from_bytes(rand::random()).to_string(),
            epoch: Epoch::FIRST.value(),
            ticket: "as good as any here".into(),
            initial_connection_ids: (0..4).map(|_| rand::random::<[u8; 17]>().to_vec().into()).collect(),
            relays: relays.iter().map(relay).collect(),
            server_name: self.identity.peer().dns(),
            trust_anchor: self.identity.ca().to_vec().into(),
            codec: Codec::Opus.into(),
            region: "north".into(),
            worker: "w-0".into(),
            ..Session::default()
        }
    }

    pub(crate) async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn serve(connection: Connection, seen: &watch::Sender<Option<SocketAddr>>, counted: &watch::Sender<(u32, u32)>) {
    let Ok((send, receive)) = connection.accept_bi().await else { return };
    let (mut writer, mut reader) = (ControlWriter::new(send), ControlReader::<ClientMessage>::new(receive));
    let Ok(Some(ClientMessage { message: Some(FromClient::Activate(_)) })) = reader.read().await else { return };
    counted.send_modify(|(_, activated)| *activated += 1);
    let activated = ToClient::Activated(Activated { heartbeat_flow: 1, ..Activated::default() });
    writer.write(&ServerMessage { message: Some(activated) }).await.unwrap();
    let started = Instant::now();
    let now = || u64::try_from(started.elapsed().as_micros()).unwrap();
    let mut beats = Heartbeats::new(now(), Epoch::FIRST);
    let mut due = tokio::time::interval(Duration::from_millis(20));
    loop {
        seen.send_replace(Some(connection.remote_address()));
        tokio::select! {
            datagram = connection.read_datagram() => {
                let Ok(datagram) = datagram else { return };
                if let Some((Flow::Heartbeat, payload)) = split_flow(&datagram) {
                    beats.on_heartbeat(now(), &Heartbeat::decode(payload).unwrap());
                }
            }
            _ = due.tick() => {
                if let Some(beat) = beats.poll(now(), AudioReceived::default()) {
                    let _ = connection.send_datagram(datagram::heartbeat(&beat));
                }
            }
        }
    }
}

pub(crate) async fn dial(session: &Session) -> Result<Call, DialError> {
    Dial::new(session).unwrap().connect(&ClientKey::generate().unwrap()).await
}

/// Says nothing and stays until it is told to go.
pub(crate) struct Quiet(pub(crate) watch::Receiver<bool>);

impl Party for Quiet {
    fn step(&mut self, _heard: &Heard<'_>, _say: &mut [i16]) -> Step {
        if *self.0.borrow() { Step::HangUp } else { Step::Continue }
    }

    fn on_event(&mut self, _event: &Event) {}
}

/// Runs a call until `until` has come about; its report.
pub(crate) async fn run(call: Call, until: impl Future<Output = ()>) -> CallReport {
    let (hang_up, told) = watch::channel(false);
    let mut party = Quiet(told);
    let call = call.run(&mut party);
    let steer = async {
        tokio::time::timeout(SOON, until).await.unwrap();
        hang_up.send_replace(true);
    };
    let ((report, outcome), ()) = tokio::join!(call, steer);
    outcome.unwrap();
    report
}
