//! Keeping a call connected: silence, closed relays, new addresses.

use std::time::Duration;

use antiphon_proto::v1::Heartbeat;
use antiphon_quic::{AudioReceived, datagram};

use super::{Call, CallError, micros};
use crate::{
    party::{Event, Party},
    path::{PathSelector, Switch},
    report::{Rebind, RelaySwitch},
    uplink::Word,
};

impl Call {
    /// Notices silence and acts on it: another relay, then another local address, in the end an error.
    pub(super) async fn watch_path(&mut self, party: &mut dyn Party, now: Duration) -> Result<(), CallError> {
        for relay in 0..self.dial.relays.len() {
            let Some(heard) = self.socket.last_heard(relay).filter(|heard| *heard > self.last_heard) else {
                continue;
            };
            self.note_gap(heard, relay);
            self.path.on_heard(relay, heard);
        }
        let acks = self.connection.stats().frame_rx.acks;
        if acks > self.acks {
            // QUIC acknowledges only what has come since the last time, and soon.
            self.acks = acks;
            self.path.on_confirmed(now.saturating_sub(self.connection.rtt() + LATE_ACK));
        }
        if let Some(sent_us) = self.confirmed_us.take() {
            self.path.on_confirmed(Duration::from_micros(sent_us));
        }
        let silent = now.saturating_sub(self.last_heard);
        if silent > GIVE_UP {
            return Err(CallError::WorkerSilent { place: self.dial.place.clone(), silent });
        }
        let rtt = self.connection.rtt();
        let pto = rtt + rtt / 2 + ACK_DELAY;
        if let Some(switch) = self.path.poll(now, pto) {
            self.switch(switch, now, party).await;
            self.rebind_after = self.rebind_after.saturating_sub(1);
            if self.rebind_after == 0 {
                self.rebind_after = self.dial.relays.len();
                self.rebind(party).await;
            }
        }
        Ok(())
    }

    /// What the worker says has reached it, and what therefore has not.
    pub(super) fn on_word(&mut self, beat: &Heartbeat, echoed_us: Option<u64>) {
        let word = Word {
            came: self.started.elapsed(),
            sent_us: beat.sent_us,
            echoed: echoed_us.map(Duration::from_micros),
            highest: beat.audio_highest.and_then(|highest| u16::try_from(highest).ok()),
        };
        let missing = self.uplink.on_word(word, self.connection.rtt(), self.path.since());
        self.path.on_missing(missing);
    }

    /// Something came at `heard`: how long had it been quiet, and what was it that ended?
    fn note_gap(&mut self, heard: Duration, relay: usize) {
        let gap = heard.saturating_sub(self.last_heard);
        self.report.longest_gap = self.report.longest_gap.max(gap);
        let pending = self.report.switches.last_mut().filter(|s| s.gap.is_none() && s.switch.to == relay);
        if let Some(switch) = pending {
            switch.gap = Some(gap);
        }
        if let Some(rebind) = self.report.rebinds.last_mut().filter(|r| r.gap.is_none() && heard > r.at) {
            rebind.gap = Some(gap);
        }
        self.last_heard = heard;
        self.rebind_after = self.dial.relays.len();
    }

    /// The system says that a relay's port is closed: no need to wait for silence.
    pub(super) async fn leave_closed_relay(&mut self, party: &mut dyn Party) {
        let (now, active) = (self.started.elapsed(), self.path.active());
        let closed = self.socket.last_refused(active).is_some();
        if closed && let Some(switch) = self.path.on_refused(active, now) {
            self.switch(switch, now, party).await;
        }
    }

    pub(super) async fn switch(&mut self, switch: Switch, now: Duration, party: &mut dyn Party) {
        if let Err(error) = self.socket.use_relay(switch.to) {
            // The relay before stays in use; the silence that follows brings the next try.
            tracing::warn!(session = %self.dial.session, %error, "relay");
            return;
        }
        tracing::debug!(session = %self.dial.session, ?switch, "relay");
        self.open_path(now).await;
        self.report.switches.push(RelaySwitch { at: now, switch, gap: None });
        party.on_event(&Event::Switched(switch));
    }

    /// Whether the worker should have confirmed more of what was said by now: it is asked more often then, so that a few
    /// lost packets are not taken for a dead way.
    pub(super) fn is_unconfirmed(&self, now: Duration) -> bool {
        self.path.unconfirmed(now) > UNCONFIRMED + self.connection.rtt()
    }

    /// In the middle of an answer something should have come by now. A packet sent at once makes the host of a relay
    /// that is gone say so, before the next heartbeat would.
    pub(super) fn is_overdue(&self, now: Duration) -> bool {
        let quiet = now.saturating_sub(self.last_heard);
        self.playout.is_playing() && (OVERDUE..PathSelector::SUSPICION).contains(&quiet)
    }

    /// What has come of the worker's audio.
    pub(super) fn audio_received(&self) -> AudioReceived {
        let jitter = self.receiver.stats().jitter;
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let highest = self.receiver.highest();
        AudioReceived { received: count(jitter.received), lost: count(jitter.lost), highest }
    }

    /// The worker learns of the new path by the first packet on it; twice, as one may be lost.
    async fn open_path(&mut self, now: Duration) {
        let audio = self.audio_received();
        for _ in 0..2 {
            let opener = self.beats.path_opener(micros(now), audio);
            self.send(datagram::heartbeat(&opener));
            tokio::task::yield_now().await;
        }
        // What was said since the newest that is known to have arrived may have gone where nobody listens. The worker
        // drops what it has.
        let heard = self.last_heard.min(self.uplink.arrived());
        let quiet = now.saturating_sub(heard) + self.connection.rtt();
        let frames = usize::try_from(quiet.as_millis() / 20).unwrap_or(usize::MAX).saturating_add(2);
        for frame in self.sender.newest(frames) {
            self.send(frame);
            tokio::task::yield_now().await;
        }
    }

    pub(super) async fn rebind(&mut self, party: &mut dyn Party) {
        let now = self.started.elapsed();
        match self.socket.rebind() {
            Ok(relay) => {
                let moved = self.path.on_moved(relay, now);
                self.open_path(now).await;
                if let Some(switch) = moved {
                    self.report.switches.push(RelaySwitch { at: now, switch, gap: None });
                    party.on_event(&Event::Switched(switch));
                }
                self.report.rebinds.push(Rebind { at: now, gap: None });
                party.on_event(&Event::Rebound);
            }
            // The old socket stays; the silence that follows brings the next try.
            Err(error) => tracing::warn!(session = %self.dial.session, %error, "new local address"),
        }
    }
}

/// RFC 9000's default. Silence is judged by heartbeats, which do not wait for acknowledgements.
const ACK_DELAY: Duration = Duration::from_millis(25);
/// A frame and a half.
const OVERDUE: Duration = Duration::from_millis(30);
/// What an acknowledgement may take beside the round trip: QUIC's own delay, and jitter.
const LATE_ACK: Duration = Duration::from_millis(100);
/// Both ends send a heartbeat every 200 ms at least: longer than that, and one of them was lost.
const UNCONFIRMED: Duration = Duration::from_millis(300);
/// Silence through every relay after which the worker counts as lost.
const GIVE_UP: Duration = Duration::from_secs(5);
