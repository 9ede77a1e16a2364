//! A hybrid logical clock (Kulkarni et al., 2014): stamps that follow the wall clock, never repeat, and are later than
//! all that was seen. A stamp far ahead of the wall clock never moves it, so one host with a wrong clock can't drag the
//! others along.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::WallMicros;
use crate::mutation::{self, Mutation};

/// How far ahead of the wall clock a stamp may be and still be believed.
pub const MAX_AHEAD: Duration = Duration::from_secs(60);

const COUNTER_BITS: u32 = 16;

/// A point in hybrid time: 48 bits of milliseconds since the Unix epoch, then 16 bits of a counter.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Stamp(pub u64);

impl Stamp {
    /// The earliest stamp of this moment.
    pub fn at(wall: WallMicros) -> Self {
        Self((wall.0 / 1000) << COUNTER_BITS)
    }

    /// The moment this stamp stands for.
    pub fn wall(self) -> WallMicros {
        WallMicros((self.0 >> COUNTER_BITS) * 1000)
    }

    /// Is it to be applied by a node whose clock says `wall`?
    pub fn is_due(self, wall: WallMicros) -> bool {
        if mutation::is_on(Mutation::BelieveTheFuture) {
            return true;
        }
        self.wall().0 <= wall.0.saturating_add(MAX_AHEAD.as_micros() as u64)
    }

    /// When it becomes due.
    pub fn due_at(self) -> WallMicros {
        WallMicros(self.wall().0.saturating_sub(MAX_AHEAD.as_micros() as u64))
    }
}

/// One node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    last: Stamp,
}

impl Clock {
    /// A stamp later than all that were given and seen. When our own wall clock had been far ahead and was set right,
    /// it starts again from the wall clock: nobody applied the stamps from the future.
    pub fn tick(&mut self, wall: WallMicros) -> Stamp {
        let floor = if self.last.is_due(wall) {
            Stamp(self.last.0 + 1)
        } else {
            Stamp::default()
        };
        self.last = floor.max(Stamp::at(wall));
        self.last
    }

    /// Another's stamp was seen: later ones of ours will be above it, unless it is far ahead.
    pub fn observe(&mut self, stamp: Stamp, wall: WallMicros) {
        if stamp.is_due(wall) {
            self.last = self.last.max(stamp);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: WallMicros = WallMicros(1_800_000_000_000_000);
    const YEAR: u64 = 365 * 86_400 * 1_000_000;

    #[test]
    fn stamps_never_repeat_even_when_the_wall_clock_stands_or_goes_back() {
        let mut clock = Clock::default();
        let a = clock.tick(NOON);
        let b = clock.tick(NOON);
        let c = clock.tick(WallMicros(NOON.0 - 5_000_000));
        assert!(a < b && b < c);
    }

    #[test]
    fn a_stamp_seen_is_passed_but_one_from_far_ahead_is_not_followed() {
        let mut clock = Clock::default();
        let soon = Stamp::at(WallMicros(NOON.0 + 30_000_000));
        clock.observe(soon, NOON);
        assert!(clock.tick(NOON) > soon);
        let far = Stamp::at(WallMicros(NOON.0 + YEAR));
        clock.observe(far, NOON);
        assert!(clock.tick(NOON) < far);
        assert!(!far.is_due(NOON) && far.is_due(far.due_at()));
    }

    #[test]
    fn a_clock_that_was_a_year_ahead_and_is_set_right_counts_from_now() {
        let mut clock = Clock::default();
        clock.tick(WallMicros(NOON.0 + YEAR));
        assert!(clock.tick(NOON).is_due(NOON));
    }
}
