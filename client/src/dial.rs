//! From a ticket to an active call.

use std::{
    fmt,
    io::Write,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use antiphon_core::id::{Epoch, SessionId};
use antiphon_media::format::AudioFormat;
use antiphon_proto::v1::{
    Activate, ClientMessage, Codec, RefusedCode, ServerMessage, Session, client_message::Message as ToWorker,
};
use antiphon_quic::{
    AudioBudget, ClientKey, ControlError, ControlReader, ControlWriter, Side, activation_message, client_crypto,
    transport,
};
use antiphon_runtime::tls;
use futures::{StreamExt as _, stream::FuturesUnordered};
use quinn::{
    ClientConfig, Connection, ConnectionError, ConnectionId, Endpoint, EndpointConfig, QlogConfig, TokioRuntime,
    crypto::rustls::QuicClientConfig,
};
use rustls_pki_types::CertificateDer;

use crate::{
    call::Call,
    clock::ClockSkew,
    qlog::Milliseconds,
    race::{Attempt, Race},
    socket::{RelaySocket, VIRTUAL},
};

/// What is wrong with a ticket before anything is sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// A field is missing or malformed.
    #[error("ticket: {0}")]
    Malformed(String),
}

/// Why no call came about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The ticket cannot be used.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// The system refuses a socket.
    #[error("socket: {0}")]
    Socket(#[from] std::io::Error),
    /// No attempt led to a handshake.
    #[error("no answer through {tried}{}", hint(.expired, .clock))]
    NoAnswer {
        /// The relays tried, with their addresses.
        tried: String,
        /// How long the ticket has been expired, by the router's clock, if it has.
        expired: Option<Duration>,
        /// How far this machine's clock is from the router's, if that is notable.
        clock: Option<ClockSkew>,
    },
    /// The worker's certificate or the TLS handshake is wrong.
    #[error("handshake: {0}")]
    Handshake(ConnectionError),
    /// The worker refused the activation.
    #[error("refused by the worker: {detail} ({code:?})")]
    Refused {
        /// Why, as a closed set.
        code: RefusedCode,
        /// Why, for people.
        detail: String,
    },
    /// The control stream broke before the worker answered.
    #[error("activation: {0}")]
    Control(#[from] ControlError),
    /// The worker did not answer the activation in time.
    #[error("the worker did not answer the activation within {0:?}")]
    NoActivation(Duration),
    /// The client could not set up its side.
    #[error("setting up the call: {0}")]
    SetUp(String),
}

fn hint(expired: &Option<Duration>, clock: &Option<ClockSkew>) -> String {
    let clock = clock.map_or_else(String::new, |clock| format!(" ({clock})"));
    match expired {
        Some(by) => format!(": the ticket expired {:.0} s ago, ask for a new one{clock}", by.as_secs_f64()),
        None => format!(": check that the relays' UDP ports are reachable from here{clock}"),
    }
}

/// A checked ticket, ready to connect.
pub struct Dial {
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    ticket: String,
    initial_ids: Vec<ConnectionId>,
    pub(crate) relays: Vec<SocketAddr>,
    pub(crate) relay_numbers: Vec<u32>,
    server_name: String,
    crypto: Arc<QuicClientConfig>,
    expires_at: Option<SystemTime>,
    clock: Option<ClockSkew>,
    qlog: Option<Arc<QlogTo>>,
    pub(crate) format: AudioFormat,
    /// `region/worker`, for error messages.
    pub(crate) place: String,
}

/// The ticket is a secret until it is used up.
impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dial").field("session", &self.session).field("place", &self.place).finish_non_exhaustive()
    }
}

impl Dial {
    /// Checks what a router answered.
    ///
    /// # Errors
    /// [`TicketError`]: which field and what is wrong with it.
    pub fn new(session: &Session) -> Result<Self, TicketError> {
        let malformed = |what: &str| TicketError::Malformed(what.to_owned());
        let id = session.session.parse().map_err(|e| TicketError::Malformed(format!("session: {e}")))?;
        let legal = |id: &bytes::Bytes| (8..=20).contains(&id.len());
        if session.initial_connection_ids.is_empty() || !session.initial_connection_ids.iter().all(legal) {
            return Err(malformed("initial_connection_ids: at least one of 8 to 20 bytes expected"));
        }
        // Longer ones would panic.
        let initial_ids: Vec<_> = session.initial_connection_ids.iter().map(|id| ConnectionId::new(id)).collect();
        let address = |relay: &antiphon_proto::v1::RelayAddress| {
            relay.address.parse().map_err(|_| TicketError::Malformed(format!("relay address {:?}", relay.address)))
        };
        let relays = session.relays.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        if relays.is_empty() {
            return Err(malformed("relays: none given"));
        }
        let anchor = CertificateDer::from(session.trust_anchor.to_vec());
        let crypto =
            client_crypto(tls::provider(), anchor).map_err(|e| TicketError::Malformed(format!("trust_anchor: {e}")))?;
        let format = match Codec::try_from(session.codec) {
            Ok(Codec::Opus) => AudioFormat::Opus,
            Ok(Codec::L1616k) => AudioFormat::L16At16k,
            Ok(Codec::L1624k) => AudioFormat::L16At24k,
            Ok(Codec::Unspecified) | Err(_) => {
                return Err(malformed("codec: not one that this client knows"));
            }
        };
        Ok(Self {
            session: id,
            epoch: Epoch::new(session.epoch).map_err(|e| TicketError::Malformed(e.to_string()))?,
            ticket: session.ticket.clone(),
            initial_ids,
            relay_numbers: session.relays.iter().map(|relay| relay.number).collect(),
            relays,
            server_name: session.server_name.clone(),
            crypto: Arc::new(crypto),
            expires_at: session.expires_at.and_then(|at| SystemTime::try_from(at).ok()),
            clock: None,
            qlog: None,
            format,
            place: format!("{}/{}", session.region, session.worker),
        })
    }

    /// Takes the ticket's times as those of a router whose clock differs from this machine's; see
    /// [`crate::Router::clock_skew`].
    #[must_use]
    pub fn by_clock_of_router(self, clock: Option<ClockSkew>) -> Self {
        Self { clock: clock.filter(|clock| clock.is_notable()), ..self }
    }

    /// Writes what QUIC does as qlog (draft-ietf-quic-qlog-main-schema), one trace for each attempt to connect. `open`
    /// is asked for a place to write to by the number of the attempt, from 0; without one the attempt goes on without.
    #[must_use]
    pub fn with_qlog(
        self,
        open: impl Fn(usize) -> Option<Box<dyn Write + Send + Sync>> + Send + Sync + 'static,
    ) -> Self {
        Self { qlog: Some(Arc::new(open)), ..self }
    }

    /// Connects, activates the session and waits for the worker's confirmation.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn connect(self, key: &ClientKey) -> Result<Call, DialError> {
        let mut call = self.begin(key).await?;
        call.confirmed().await?;
        Ok(call)
    }

    /// Connects through the relay that answers first, asks the worker to activate the session, and gives the call as
    /// soon as its party may speak: one round trip after the beginning. [`Call::run`] ends with an error if the worker
    /// does not confirm.
    ///
    /// Attempts begin in the ticket's order, 250 ms after each other or as soon as one fails (RFC 8305), each with a
    /// connection ID of its own. The first handshake wins; the others are given up.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn begin(self, key: &ClientKey) -> Result<Call, DialError> {
        let started = Instant::now();
        let (won, attempts) = self.race(started).await?;
        let handshake = started.elapsed();
        let (writer, reader) = self.activate(&won.connection, key).await?;
        let Won { endpoint, socket, connection, relay } = won;
        let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
        let opened = Opened { endpoint, socket, connection, writer, reader, relay, attempts };
        Call::new(self, opened, started, handshake).map_err(DialError::SetUp)
    }

    /// The first connection, and how many attempts it took.
    async fn race(&self, started: Instant) -> Result<(Won, usize), DialError> {
        let relays: Vec<_> = self.relay_numbers.iter().copied().zip(self.relays.iter().copied()).collect();
        let mut race = Race::new(&relays, self.initial_ids.len());
        // Those that are left when one has won are dropped, which closes their connections.
        let mut running = FuturesUnordered::new();
        let mut no_socket = None;
        loop {
            while let Some(attempt) = race.poll(started.elapsed()) {
                running.push(self.attempt(attempt, started));
            }
            let (next, deadline) = (race.next_timeout(), race.deadline());
            if deadline.is_some_and(|deadline| deadline <= started.elapsed()) {
                return Err(no_socket.map_or_else(|| self.no_answer(race.tried()), DialError::Socket));
            }
            let due = next.or(deadline).map_or(started, |due| started + due);
            tokio::select! {
                Some((attempt, outcome)) = running.next() => match outcome {
                    Ok(won) => return Ok((won, race.started())),
                    Err(Lost::Here(error)) => {
                        // No route for this family, say; another address may have one.
                        tracing::debug!(session = %self.session, address = %self.relays[attempt.address], %error, "dial");
                        no_socket = Some(error);
                        race.on_failed(attempt);
                    }
                    Err(Lost::There) => {
                        no_socket = None;
                        race.on_failed(attempt);
                    }
                    Err(Lost::For(error)) => return Err(error),
                },
                () = tokio::time::sleep_until(due.into()) => {}
            }
        }
    }

    /// One handshake through one relay, on a socket of its own.
    async fn attempt(&self, attempt: Attempt, started: Instant) -> (Attempt, Result<Won, Lost>) {
        (attempt, self.handshake(attempt, started).await)
    }

    async fn handshake(&self, attempt: Attempt, started: Instant) -> Result<Won, Lost> {
        let relay = attempt.address;
        let socket = Arc::new(RelaySocket::new(&self.relays, relay, started).map_err(Lost::Here)?);
        let runtime = Arc::new(TokioRuntime);
        let endpoint = Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, socket.clone(), runtime);
        let endpoint = endpoint.map_err(Lost::Here)?;
        let config = self.client_config(attempt.id);
        let connecting = endpoint.connect_with(config, VIRTUAL, &self.server_name);
        let connecting = connecting.map_err(|e| Lost::For(DialError::SetUp(e.to_string())))?;
        tokio::select! {
            connected = connecting => match connected {
                Ok(connection) => Ok(Won { endpoint, socket, connection, relay }),
                Err(ConnectionError::TimedOut | ConnectionError::Reset) => Err(Lost::There),
                Err(error) => Err(Lost::For(DialError::Handshake(error))),
            },
            // Nobody listens there.
            () = socket.refused() => Err(Lost::There),
        }
    }

    fn client_config(&self, attempt: usize) -> ClientConfig {
        let initial = self.initial_ids[attempt];
        let budget = AudioBudget { frame_bytes: self.format.max_packet_bytes() + 1 };
        let mut transport = transport(Side::Client, budget);
        if let Some(writer) = self.qlog.as_ref().and_then(|open| open(attempt)) {
            let mut qlog = QlogConfig::default();
            let writer = Box::new(Milliseconds::new(writer));
            qlog.writer(writer).title(Some(format!("session {} attempt {attempt}", self.session)));
            transport.qlog_stream(qlog.into_stream());
        }
        let mut config = ClientConfig::new(self.crypto.clone());
        config.transport_config(Arc::new(transport)).initial_dst_cid_provider(Arc::new(move || initial));
        config
    }

    async fn activate(
        &self,
        connection: &Connection,
        key: &ClientKey,
    ) -> Result<(ControlWriter<ClientMessage>, ControlReader<ServerMessage>), DialError> {
        let (send, receive) = connection.open_bi().await.map_err(DialError::Handshake)?;
        let (mut writer, reader) = (ControlWriter::new(send), ControlReader::new(receive));
        let message = activation_message(connection, self.session, self.epoch);
        let message = message.map_err(|e| DialError::SetUp(e.to_string()))?;
        let activate = Activate {
            session: self.session.as_bytes().to_vec().into(),
            epoch: self.epoch.value(),
            ticket: self.ticket.clone(),
            signature: key.sign(&message).into(),
        };
        writer.write(&ClientMessage { message: Some(ToWorker::Activate(activate)) }).await?;
        Ok((writer, reader))
    }

    fn no_answer(&self, tried: &[usize]) -> DialError {
        let name = |relay: &usize| format!("relay {} ({})", self.relay_numbers[*relay], self.relays[*relay]);
        let tried: Vec<_> = tried.iter().map(name).collect();
        let (local, clock) = (SystemTime::now(), self.clock);
        let now = clock.map_or(local, |clock| clock.router_time(local));
        let expired = self.expires_at.and_then(|at| now.duration_since(at).ok());
        DialError::NoAnswer { tried: tried.join(", "), expired, clock }
    }
}

/// Opens a place to write an attempt's qlog to.
type QlogTo = dyn Fn(usize) -> Option<Box<dyn Write + Send + Sync>> + Send + Sync;

/// A handshake that is complete.
struct Won {
    endpoint: Endpoint,
    socket: Arc<RelaySocket>,
    connection: Connection,
    relay: usize,
}

/// Why an attempt led to nothing.
enum Lost {
    /// This machine cannot send there.
    Here(std::io::Error),
    /// Nobody answered; another attempt may do better.
    There,
    /// What every other attempt would meet as well.
    For(DialError),
}

/// What an activated connection consists of.
pub(crate) struct Opened {
    pub(crate) endpoint: Endpoint,
    pub(crate) socket: Arc<RelaySocket>,
    pub(crate) connection: Connection,
    pub(crate) writer: ControlWriter<ClientMessage>,
    pub(crate) reader: ControlReader<ServerMessage>,
    pub(crate) relay: usize,
    pub(crate) attempts: u32,
}
