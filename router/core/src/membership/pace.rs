//! How fast things go. The constants were searched for by simulation at round trips below 150 ms: death is known to all
//! within some four seconds, and no live node is taken for dead at a fifth of all datagrams lost.

use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use foca::{Config, PeriodicParams};

/// Largest round trip for which the times hold as they are written; beyond it all of them are stretched.
const NEAR: Duration = Duration::from_millis(150);
/// The times are stretched by at most this. Even unstretched they take no live node for dead at a round trip of 900 ms
/// with a fifth lost, they only ask more often than is needed; and one peer that was paused shows round trips of seconds
/// for minutes, during which the deaths of others must not take a quarter of a minute to be noticed.
const SLOWEST: u32 = 2;

/// The times, each stretched by a small whole number that follows the round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    stretch: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { stretch: 1 }
    }
}

impl Pace {
    /// The pace that fits `rtt` when it isn't this one. It slows down at once, and speeds up only when the round trip
    /// is well below the limit, so it doesn't swing.
    pub(super) fn for_rtt(self, rtt: Duration) -> Option<Self> {
        let fits = |rtt: Duration| {
            let mut stretch = 1;
            while stretch < SLOWEST && rtt > NEAR * stretch {
                stretch *= 2;
            }
            stretch
        };
        let (needed, relaxed) = (fits(rtt), fits(rtt + rtt / 2));
        if needed > self.stretch {
            Some(Self { stretch: needed })
        } else if relaxed < self.stretch {
            Some(Self { stretch: relaxed })
        } else {
            None
        }
    }

    fn millis(self, millis: u64) -> Duration {
        Duration::from_millis(millis) * self.stretch
    }

    /// One member is probed in each.
    pub(super) fn probe_period(self) -> Duration {
        self.millis(500)
    }

    /// A probe or a check that heard nothing asks again after this.
    pub(super) fn ask_again(self) -> Duration {
        self.millis(200)
    }

    /// A watch in a large cluster asks again after this.
    pub(super) fn watch_again(self) -> Duration {
        self.millis(500)
    }

    /// How long a suspect must stay silent before it is declared dead. Larger clusters meet the unlikely more often.
    pub(super) fn silence(self, nodes: usize) -> Duration {
        self.millis(match nodes {
            0..=5 => 1_900,
            6..75 => 2_600,
            _ => 3_400,
        })
    }

    /// How long a node that another declared dead must stay silent towards us before we believe it.
    pub(super) fn charge(self) -> Duration {
        self.millis(1_000)
    }

    /// foca's own announcements stay off: they stop just when two nodes lost each other (foca 2.0 lib.rs:1336), and
    /// `super::hello` greets instead. Nor does it tell the dead that they are: a hello does, and it tells the name too.
    pub(super) fn config(self) -> Config {
        let four = NonZeroUsize::new(4).expect("not zero");
        let three = NonZeroUsize::new(3).expect("not zero");
        Config {
            probe_period: self.probe_period(),
            probe_rtt: self.millis(250),
            num_indirect_probes: four,
            // foca's own choice, 2 for three nodes, lets news die out on the way (p99 of death 45 s instead of 12).
            max_transmissions: NonZeroU8::new(15).expect("not zero"),
            // Never given to foca: the verdict falls in `super::checks`, which has its own time.
            suspect_to_down_after: self.millis(1),
            // Never: who is dead stays known until a younger life of it comes, and there are no more than the roster has.
            remove_down_after: None,
            max_packet_size: NonZeroUsize::new(super::MAX_DATAGRAM).expect("not zero"),
            notify_down_members: false,
            periodic_announce: None,
            periodic_announce_to_down_members: None,
            periodic_gossip: Some(PeriodicParams {
                frequency: self.millis(200),
                num_members: three,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_the_round_trip_and_does_not_swing() {
        let near = Pace::default();
        assert_eq!(near.for_rtt(Duration::from_millis(140)), None);
        let far = near.for_rtt(Duration::from_millis(200)).unwrap();
        assert_eq!(far.probe_period(), Duration::from_secs(1));
        assert_eq!(far.for_rtt(Duration::from_millis(140)), None);
        assert_eq!(far.for_rtt(Duration::from_millis(90)), Some(near));
        let farthest = near.for_rtt(Duration::from_secs(60)).unwrap();
        assert_eq!(farthest.stretch, SLOWEST);
        assert_eq!(farthest.for_rtt(Duration::from_secs(60)), None);
    }
}
