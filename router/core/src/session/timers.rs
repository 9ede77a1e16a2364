//! The times of a session, and the two small machines that keep time: the round trip's estimator and the back-off.

use std::time::Duration;

use crate::crypto::Random;
use crate::model::Now;

/// How often sessions are looked at: counters compared, keepalives and silence considered.
pub(super) const POLL: Duration = Duration::from_millis(250);
/// Between keepalives while there is traffic, and until an unanswered one is answered.
pub(super) const KEEPALIVE_BUSY: Duration = Duration::from_millis(500);
/// Silence that calls for a keepalive otherwise: below the 30 s that common NATs keep a UDP mapping.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(25);
/// With more sessions than some seventy each gets so much more silence, or keepalives alone would cost a large cluster
/// more than all else. Gossip goes through each of them anyway, and who is behind a NAT keeps its 25 s.
const KEEPALIVE_SHARE: Duration = Duration::from_millis(350);
/// Packets either way make a session busy for this long.
pub(super) const BUSY_FOR: Duration = Duration::from_secs(15);
/// Silence under keepalives that is worth telling: two of them unanswered.
pub(super) const SILENT_AFTER: Duration = Duration::from_secs(1);
/// Silence after which the peer has most likely lost its keys: a new handshake, beside the old session.
pub(super) const CALL_AFTER: Duration = Duration::from_secs(3);
/// A handshake that leads nowhere is given up, and the session with it.
pub(super) const GIVE_UP_AFTER: Duration = Duration::from_secs(30);
/// Age of a session that carries packets when its initiator makes a new one.
pub(super) const REKEY_AFTER: Duration = Duration::from_secs(120);
/// The same where nothing but gossip passes: with hundreds of peers new keys every two minutes would cost more than all
/// the gossip does. The first packet makes them due at once.
pub(super) const REKEY_QUIET: Duration = Duration::from_secs(1800);
/// The other side steps in so much later, should the initiator not.
pub(super) const REKEY_GRACE: Duration = Duration::from_secs(10);
/// A replaced session still opens what is in flight.
pub(super) const LINGER: Duration = Duration::from_secs(10);
/// Half-open handshakes are forgotten.
pub(super) const HALF_OPEN: Duration = Duration::from_secs(10);
/// No frames but probes for this long: the session is dropped.
pub(super) const IDLE_AFTER: Duration = Duration::from_secs(600);
/// Time for the other side's handshake to come through before our own goes on.
pub(super) const YIELD_FOR: Duration = Duration::from_secs(1);
/// How long the lower node id insists that its own handshake goes first.
pub(super) const INSIST_FOR: Duration = Duration::from_secs(3);
/// Two sessions made within this time of each other were made by both sides at once.
pub(super) const AT_ONCE: Duration = Duration::from_secs(5);
/// A cookie is used for this long; its maker takes it for at least that.
pub(super) const COOKIE_USE: Duration = Duration::from_secs(50);

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// After how much silence a node with so many sessions asks whether a peer is still there.
pub(super) fn keepalive_idle(sessions: usize) -> Duration {
    let share = KEEPALIVE_SHARE * u32::try_from(sessions).unwrap_or(u32::MAX);
    share.clamp(KEEPALIVE_IDLE, KEEPALIVE_IDLE * 12)
}

/// The same for a peer whose path a NAT seems to hold open.
pub(super) fn keepalive_nat() -> Duration {
    KEEPALIVE_IDLE
}

/// Back-off with jitter: 250 ms, doubling to 5 s, each drawn from three quarters to five quarters.
pub(super) fn retry_after(tries: u32, random: &mut Random) -> Duration {
    let step = RETRY_FIRST
        .saturating_mul(1 << tries.min(5))
        .min(RETRY_LAST);
    let micros = step.as_micros() as u64;
    Duration::from_micros(micros * 3 / 4 + random.range(micros / 2))
}

/// RFC 6298 §2, without its minimum: this one times no retransmission.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rtt {
    smoothed: Option<(Duration, Duration)>,
}

impl Rtt {
    pub(crate) fn sample(&mut self, rtt: Duration) {
        self.smoothed = Some(match self.smoothed {
            None => (rtt, rtt / 2),
            Some((srtt, var)) => ((srtt * 7 + rtt) / 8, (var * 3 + srtt.abs_diff(rtt)) / 4),
        });
    }

    pub(crate) fn smoothed(&self) -> Option<Duration> {
        self.smoothed.map(|(srtt, _)| srtt)
    }

    /// By now an answer should have come.
    pub(crate) fn slack(&self) -> Duration {
        self.smoothed
            .map_or(Duration::ZERO, |(srtt, var)| srtt + var * 4)
            .min(Duration::from_secs(2))
    }
}

/// Our own attempts to reach a peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dial {
    pub(super) since: Now,
    pub(super) next: Now,
    pub(super) tries: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimator_follows_rfc_6298() {
        let mut rtt = Rtt::default();
        assert_eq!(rtt.slack(), Duration::ZERO);
        rtt.sample(Duration::from_millis(80));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(80)));
        assert_eq!(rtt.slack(), Duration::from_millis(240));
        rtt.sample(Duration::from_millis(160));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(90)));
        assert_eq!(rtt.slack(), Duration::from_millis(90 + 4 * 50));
    }

    #[test]
    fn retries_slow_down_to_five_seconds() {
        let mut random = Random::from_seed([1; 32]);
        for (tries, millis) in [(0, 250), (1, 500), (4, 4000), (5, 5000), (60, 5000)] {
            let after = retry_after(tries, &mut random).as_millis();
            assert!(
                (millis * 3 / 4..=millis * 5 / 4).contains(&after),
                "{after}"
            );
        }
    }
}
