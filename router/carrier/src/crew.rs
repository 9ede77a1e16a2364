//! Which thread does what. While there is little to do, one thread reads the TAP and the sockets: the answer to a packet it
//! finds by itself, and nobody has to be woken for it, which takes longer than all that is done with the packet. When there
//! is much to do, each socket has a thread of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often the one thread asks itself whether it can still do it all.
const ALONE: Duration = Duration::from_millis(10);
/// How often it asks whether it could do without the others.
const TOGETHER: Duration = Duration::from_millis(250);
/// How many times in a row it must find so, so that nothing goes back and forth with every pause of a sender.
const PATIENCE: u32 = 4;

/// What the threads know of each other.
#[derive(Debug, Default)]
pub(crate) struct Crew {
    alone: AtomicBool,
    /// Nanoseconds that the receivers were at work.
    helped: AtomicU64,
}

impl Crew {
    /// Does the sender receive, too?
    pub(crate) fn is_alone(&self) -> bool {
        self.alone.load(Ordering::Acquire)
    }

    pub(crate) fn set_alone(&self, alone: bool) {
        self.alone.store(alone, Ordering::Release);
    }

    /// A receiver was at work for so long.
    pub(crate) fn helped(&self, worked: Duration) {
        let nanos = u64::try_from(worked.as_nanos()).unwrap_or(u64::MAX);
        self.helped.fetch_add(nanos, Ordering::Relaxed);
    }

    /// How long the receivers were at work since the last time, all together.
    pub(crate) fn take_helped(&self) -> Duration {
        Duration::from_nanos(self.helped.swap(0, Ordering::Relaxed))
    }
}

/// Decides how many are needed: a decision from how long they were at work.
#[derive(Debug)]
pub(crate) struct Foreman {
    since: Instant,
    worked: Duration,
    calm: u32,
}

impl Foreman {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            since: now,
            worked: Duration::ZERO,
            calm: 0,
        }
    }

    /// The sender was at work for so long, up to `now`. Says so when it is to be alone from now on, or no longer.
    pub(crate) fn look(&mut self, crew: &Crew, worked: Duration, now: Instant) -> Option<bool> {
        self.worked += worked;
        let alone = crew.is_alone();
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < if alone { ALONE } else { TOGETHER } {
            return None;
        }
        let worked = std::mem::take(&mut self.worked) + crew.take_helped();
        self.since = now;
        if alone {
            // Half of a processor: twice as much may come at any moment.
            return (worked * 2 > elapsed).then_some(false);
        }
        let is_calm = worked * 5 < elapsed;
        self.calm = if is_calm { self.calm + 1 } else { 0 };
        if self.calm < PATIENCE {
            return None;
        }
        self.calm = 0;
        Some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `times` looks in a row, each after `each`, of which the sender worked `percent`.
    fn looks(
        foreman: &mut Foreman,
        crew: &Crew,
        now: &mut Instant,
        (times, each, percent): (u32, Duration, u32),
    ) -> Vec<bool> {
        let one = |_| {
            *now += each;
            let order = foreman.look(crew, each * percent / 100, *now)?;
            crew.set_alone(order);
            Some(order)
        };
        (0..times).filter_map(one).collect()
    }

    const ROUND: Duration = Duration::from_millis(1);

    #[test]
    fn a_calm_second_leaves_one_alone_and_ten_busy_milliseconds_bring_the_others_back() {
        let (mut now, crew) = (Instant::now(), Crew::default());
        let mut foreman = Foreman::new(now);
        let mut looks = |what| looks(&mut foreman, &crew, &mut now, what);
        assert_eq!(looks((999, ROUND, 10)), []);
        assert_eq!(looks((1, ROUND, 10)), [true]);
        assert_eq!(looks((1000, ROUND, 45)), []);
        assert_eq!(looks((10, ROUND, 90)), [false]);
        assert_eq!(looks((2000, ROUND, 30)), []);
    }

    #[test]
    fn the_work_of_all_counts() {
        let (mut now, crew) = (Instant::now(), Crew::default());
        let mut foreman = Foreman::new(now);
        for _ in 0..20 {
            crew.helped(TOGETHER / 4);
            assert_eq!(looks(&mut foreman, &crew, &mut now, (1, TOGETHER, 1)), []);
        }
        assert_eq!(
            looks(&mut foreman, &crew, &mut now, (4, TOGETHER, 1)),
            [true]
        );
    }

    #[test]
    fn pauses_do_not_count_as_calm_while_a_sender_comes_back() {
        let (mut now, crew) = (Instant::now(), Crew::default());
        let mut foreman = Foreman::new(now);
        for _ in 0..10 {
            assert_eq!(looks(&mut foreman, &crew, &mut now, (3, TOGETHER, 0)), []);
            assert_eq!(looks(&mut foreman, &crew, &mut now, (1, TOGETHER, 80)), []);
        }
    }
}
