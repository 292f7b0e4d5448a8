//! A session's life on its connection: handshake, activation, conversation, end.

pub(crate) mod history;
mod live;
mod watch;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use antiphon_core::{
    cid::SessionNonce,
    id::{Epoch, SessionId},
    lease::ActivateError,
};
use antiphon_proto::{
    ticket::{self, TicketError},
    v1::{
        Activate, ClientMessage, Refused, RefusedCode, ServerMessage, client_message::Message as FromClient,
        server_message::Message as ToClient,
    },
};
use antiphon_quic::{ControlError, ControlReader, ControlWriter, activation_message, verify_activation};
use quinn::{Connection, ConnectionError, Incoming};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    capacity::Terms,
    metrics::ActivationOutcome,
    shard::{ShardContext, audio_format},
};
use live::Live;
use watch::PathWatch;

/// Serves one connection attempt to its end. Never fails: whatever a client does concerns its session only.
pub(crate) async fn serve(
    context: Arc<ShardContext>,
    incoming: Incoming,
    stopping: CancellationToken,
) -> anyhow::Result<()> {
    let found = context.gate.lock().attempt(&incoming.orig_dst_cid());
    let found = found.and_then(|(nonce, attempt)| Some((nonce, context.capacity.terms(attempt)?)));
    let Some((nonce, terms)) = found else {
        // The lease ended between the gate and here.
        incoming.ignore();
        return Ok(());
    };
    if let Err(reason) = attend(&context, &terms, incoming, stopping).await {
        tracing::debug!(session = %terms.session, "connection: {reason}");
    }
    // One attempt, one connection: what is replayed after this stops at the gate.
    context.gate.lock().forget([nonce] as [SessionNonce; 1]);
    Ok(())
}

/// Why a connection ended before its session began.
#[derive(Debug, thiserror::Error)]
enum AttendError {
    #[error("handshake: {0}")]
    Handshake(#[from] ConnectionError),
    #[error("no handshake or activation within {0:?}")]
    TooSlow(Duration),
    #[error("control stream: {0}")]
    Control(#[from] ControlError),
    #[error("control stream ended before an activation")]
    NoActivation,
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    #[error("setting up: {0}")]
    Setup(String),
}

async fn attend(
    context: &Arc<ShardContext>,
    terms: &Arc<Terms>,
    incoming: Incoming,
    stopping: CancellationToken,
) -> Result<(), AttendError> {
    let format = audio_format(terms.codec).ok_or_else(|| AttendError::Setup("codec".into()))?;
    let generation = context.rotation.minting();
    let qlog = context.qlog.as_ref().and_then(|dir| dir.stream(terms.session, terms.epoch));
    let config = match qlog {
        None => context.server_configs.of(format),
        Some(qlog) => context.server_configs.with_qlog(format, qlog),
    };
    let connecting = incoming.accept_with(config)?;
    let too_slow = |_| AttendError::TooSlow(SET_UP);
    let connection = timeout(SET_UP, connecting).await.map_err(too_slow)??;
    let (writer, reader) = timeout(SET_UP, connection.accept_bi()).await.map_err(too_slow)??;
    let (mut writer, mut reader) = (ControlWriter::new(writer), ControlReader::new(reader));
    let first = timeout(SET_UP, reader.read()).await.map_err(too_slow)?;
    let owner = match first.map(|message: Option<ClientMessage>| message.and_then(|m| m.message)) {
        Ok(Some(FromClient::Activate(activate))) => admit(context, terms, &connection, &activate),
        Ok(Some(_)) => Err(Refusal::Malformed("the first message has to be Activate")),
        Ok(None) => {
            context.metrics.activation(ActivationOutcome::NoActivate);
            return Err(AttendError::NoActivation);
        }
        Err(ControlError::Malformed(_) | ControlError::TooLong(_) | ControlError::Truncated) => {
            Err(Refusal::Malformed("the first message cannot be read"))
        }
        Err(error) => return Err(error.into()),
    };
    let owner = match owner {
        Ok(owner) => owner,
        Err(refusal) => {
            context.metrics.activation(ActivationOutcome::Refused(refusal.code()));
            let refused = Refused { code: refusal.code().into(), detail: refusal.to_string() };
            farewell(&connection, &mut writer, ToClient::Refused(refused)).await;
            return Err(refusal.into());
        }
    };
    context.metrics.activation(ActivationOutcome::Activated);
    let watch = PathWatch::begin(context.clone(), terms.clone(), &connection, generation);
    let live = Live::begin(watch, context.clone(), terms.clone(), connection, writer, owner);
    match live {
        Ok(live) => live.run(reader, stopping).await,
        Err(reason) => {
            context.capacity.ended(terms);
            return Err(AttendError::Setup(reason));
        }
    }
    Ok(())
}

/// Why a client may not own the session.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Ticket(TicketError),
    #[error("{error} ({ticket_says}; this worker's clock says {clock_says})")]
    Untimely { error: TicketError, ticket_says: String, clock_says: String },
    #[error("the ticket belongs to another client key than the one that signed")]
    WrongClient,
    #[error("the ticket is for another worker")]
    WrongWorker,
    #[error(transparent)]
    Lease(#[from] ActivateError),
}

impl Refusal {
    /// A ticket that is out of its time may be so because a clock is wrong, so both times are said.
    fn ticket(error: TicketError, now_s: u64) -> Self {
        let at = |unix_s: u64| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(unix_s)).to_string();
        let ticket_says = match error {
            TicketError::Expired { by } => format!("it was good until {}", at(now_s.saturating_sub(by))),
            TicketError::NotYet { by } => format!("it says it was issued at {}", at(now_s.saturating_add(by))),
            _ => return Self::Ticket(error),
        };
        Self::Untimely { error, ticket_says, clock_says: at(now_s) }
    }

    const fn code(&self) -> RefusedCode {
        match self {
            Self::Malformed(_) => RefusedCode::Malformed,
            Self::Untimely { error: TicketError::Expired { .. }, .. } => RefusedCode::TicketExpired,
            Self::Ticket(_) | Self::Untimely { .. } => RefusedCode::TicketInvalid,
            Self::WrongClient => RefusedCode::WrongClient,
            Self::WrongWorker => RefusedCode::WrongWorker,
            Self::Lease(ActivateError::Gone) => RefusedCode::LeaseGone,
            Self::Lease(ActivateError::Stale { .. }) => RefusedCode::StaleEpoch,
        }
    }
}

/// Checks ticket, possession of the client's key and lease, in that order; makes this connection the owner.
fn admit(
    context: &ShardContext,
    terms: &Terms,
    connection: &Connection,
    activate: &Activate,
) -> Result<CancellationToken, Refusal> {
    let session = <[u8; 16]>::try_from(activate.session.as_ref()).map(SessionId::from_bytes);
    let session = session.map_err(|_| Refusal::Malformed("session: 16 bytes expected"))?;
    let epoch = Epoch::new(activate.epoch).map_err(|_| Refusal::Malformed("epoch"))?;
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let claims = ticket::verify(&activate.ticket, &context.ticket_keys.load(), now_s);
    let claims = claims.map_err(|error| Refusal::ticket(error, now_s))?;
    if (claims.session, claims.epoch) != (session, epoch) {
        return Err(Refusal::Malformed("session or epoch differs from the ticket's"));
    }
    let promised = (terms.session, terms.epoch, terms.lease.0);
    if claims.server_id != context.server_id || (session, epoch, claims.lease) != promised {
        return Err(Refusal::WrongWorker);
    }
    let message = activation_message(connection, session, epoch).map_err(|_| Refusal::Malformed("no TLS exporter"))?;
    let proven = verify_activation(&claims.client_key, &message, &activate.signature);
    if proven.is_err() || claims.client_key != terms.client_key {
        return Err(Refusal::WrongClient);
    }
    context.capacity.activate(terms)?;
    Ok(terms.take_over())
}

/// Sends a last message and closes once it has arrived, or soon.
async fn farewell(connection: &Connection, writer: &mut ControlWriter<ServerMessage>, last: ToClient) {
    let message = ServerMessage { message: Some(last) };
    let goodbye = async {
        if writer.write(&message).await.is_ok() {
            writer.finish();
            writer.delivered().await;
        }
    };
    // A client that does not acknowledge is gone; its connection is closed all the same.
    let _ = timeout(FAREWELL, goodbye).await;
    connection.close(0_u32.into(), b"");
}

/// Longest handshake, and longest wait for the activation after it.
const SET_UP: Duration = Duration::from_secs(10);
/// Longest wait for a last message to arrive.
const FAREWELL: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_out_of_its_time_is_refused_with_both_times() {
        let refused = |error| Refusal::ticket(error, 1_800_000_000);
        let expired = refused(TicketError::Expired { by: 150 });
        let times = "(it was good until 2027-01-15T07:57:30Z; this worker's clock says 2027-01-15T08:00:00Z)";
        assert!(expired.to_string().ends_with(times), "{expired}");
        assert_eq!(expired.code(), RefusedCode::TicketExpired);
        let early = refused(TicketError::NotYet { by: 90 }).to_string();
        assert!(early.contains("issued at 2027-01-15T08:01:30Z"), "{early}");
        assert_eq!(refused(TicketError::Signature).to_string(), TicketError::Signature.to_string());
    }
}
