//! The dialer of voice sessions, used by applications, the command line and the tests.
//!
//! ```text
//! Router::create ─► Dial::connect ─► Call::run(party)
//!    ticket           handshake,        20 ms steps: the party hears a frame and says one
//!                     activation
//! ```
//!
//! A call has its own socket, which shows QUIC one constant address and maps it to the relay in use: only so can a
//! live connection change relays. Everything audible happens on one 20 ms playout clock.
#![forbid(unsafe_code)]

mod call;
mod clock;
mod dial;
mod party;
mod path;
mod playout;
mod qlog;
mod race;
mod report;
mod router;
mod scripted;
mod socket;
mod uplink;

pub use antiphon_media::stream::{FrameKind, Heard};
pub use antiphon_quic::ClientKey;
pub use call::{Call, CallError, CallHandle};
pub use clock::ClockSkew;
pub use dial::{Dial, DialError, TicketError};
pub use party::{Event, Party, Step};
pub use path::{PathSelector, Switch, SwitchReason};
pub use report::{CallReport, Rebind, RelaySwitch, TurnTiming};
pub use router::{Listing, Router, RouterError, SessionRequest};
pub use scripted::{ScriptedCaller, ScriptedOutcome};
pub use uplink::{Missing, Uplink, Word};
