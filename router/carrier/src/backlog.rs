//! How long what is sent waits in the socket and the devices behind it, and whom that is to be told: CoDel (RFC 8289), with
//! the waiting time reckoned from what the kernel says still waits and how fast that goes. The queue of a slow uplink can
//! be deep; a stream would fill it to the brim, and all that shares it would wait behind.

use std::time::{Duration, Instant};

/// Waiting that is harmless (RFC 8289 §3.2).
const TARGET: Duration = Duration::from_millis(5);
/// For how long more of it is (RFC 8289 §3.2).
const INTERVAL: Duration = Duration::from_millis(100);
/// How often the kernel is asked.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How long the rate is measured for.
const WINDOW: Duration = Duration::from_millis(20);
/// As little as one run always waits: RFC 8289 §4.2 has a packet there.
const LEAST: u64 = 64 << 10;
/// What the kernel needs around the octets of one send, about.
const AROUND: u64 = 1 << 10;

/// The queue behind one socket.
#[derive(Debug)]
pub(crate) struct Backlog {
    next_look: Instant,
    /// What can be there at most: what was there at the last look, and all that was sent since.
    most: u64,
    window: Window,
    /// Octets per second that leave; 0 before it is known.
    rate: u64,
    /// When the waiting will have been too long for an [`INTERVAL`].
    too_long_at: Option<Instant>,
    /// The next packet to be sacrificed, while the queue is too long.
    next_drop: Option<Instant>,
    /// How many were since it is.
    count: u32,
    last_drop: Option<Instant>,
}

/// What happened since `start`.
#[derive(Debug)]
struct Window {
    start: Instant,
    waiting: u64,
    sent: u64,
}

impl Backlog {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            next_look: now,
            most: 0,
            window: Window {
                start: now,
                waiting: 0,
                sent: 0,
            },
            rate: 0,
            too_long_at: None,
            next_drop: None,
            count: 0,
            last_drop: None,
        }
    }

    /// So many octets were given to the socket; `waiting` says how many are there now. True when one packet is to be marked
    /// or dropped, so that its sender slows down.
    pub(crate) fn on_sent(
        &mut self,
        now: Instant,
        octets: usize,
        waiting: impl FnOnce() -> u64,
    ) -> bool {
        self.window.sent += octets as u64;
        self.most += octets as u64 + AROUND;
        // So little is never too much: who sends now and then asks now and then.
        if now < self.next_look || self.most <= LEAST {
            return false;
        }
        self.next_look = now + LOOK_EVERY;
        let waiting = waiting();
        self.most = waiting;
        self.measure(now, waiting);
        let delay = match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_micros(waiting.saturating_mul(1_000_000) / rate),
        };
        if waiting <= LEAST || delay < TARGET {
            self.too_long_at = None;
            self.next_drop = None;
            return false;
        }
        let too_long_at = *self.too_long_at.get_or_insert(now + INTERVAL);
        now >= too_long_at && self.is_drop_due(now)
    }

    fn measure(&mut self, now: Instant, waiting: u64) {
        let Window {
            start,
            waiting: before,
            sent,
        } = self.window;
        let elapsed = now.saturating_duration_since(start);
        if elapsed < WINDOW {
            return;
        }
        // After a pause nobody knows how long it took.
        let left = (before + sent).saturating_sub(waiting);
        let known = elapsed < WINDOW * 4 && waiting > 0;
        self.rate = match known {
            true => left * 1_000_000 / (elapsed.as_micros() as u64).max(1),
            false => 0,
        };
        self.window = Window {
            start: now,
            waiting,
            sent: 0,
        };
    }

    /// RFC 8289 §4.3: ever sooner, by the square root, until the queue is short; and if it was a moment ago, not from the
    /// beginning.
    fn is_drop_due(&mut self, now: Instant) -> bool {
        match self.next_drop {
            Some(at) if now < at => return false,
            Some(_) => self.count += 1,
            None => {
                let lately = self.last_drop.is_some_and(|at| now < at + INTERVAL * 16);
                self.count = match lately {
                    true => self.count.saturating_sub(2).max(1),
                    false => 1,
                };
            }
        }
        self.last_drop = Some(now);
        self.next_drop = Some(now + INTERVAL.div_f64(f64::from(self.count).sqrt()));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link with a deep queue, and a sender that halves what it keeps under way for each packet it loses.
    struct Link {
        now: Instant,
        rate: u64,
        waiting: u64,
        backlog: Backlog,
        drops: u32,
    }

    impl Link {
        fn new(megabits: u64) -> Self {
            let now = Instant::now();
            Self {
                now,
                rate: megabits * 125_000,
                waiting: 0,
                backlog: Backlog::new(now),
                drops: 0,
            }
        }

        /// A millisecond in which `octets` are sent.
        fn tick(&mut self, octets: u64) -> bool {
            self.now += Duration::from_millis(1);
            self.waiting = (self.waiting + octets).saturating_sub(self.rate / 1000);
            let waiting = self.waiting;
            let dropped = self.backlog.on_sent(self.now, octets as usize, || waiting);
            self.drops += u32::from(dropped);
            dropped
        }

        fn delay(&self) -> Duration {
            Duration::from_micros(self.waiting * 1_000_000 / self.rate)
        }
    }

    #[test]
    fn a_link_that_keeps_up_loses_nothing() {
        let mut link = Link::new(1000);
        for _ in 0..5000 {
            link.tick(120_000);
        }
        assert_eq!(link.drops, 0);
    }

    #[test]
    fn who_sends_little_seldom_asks() {
        let (mut now, mut asked) = (Instant::now(), 0);
        let mut backlog = Backlog::new(now);
        for _ in 0..1000 {
            now += Duration::from_millis(2);
            let ask = || {
                asked += 1;
                0
            };
            assert!(!backlog.on_sent(now, 100, ask));
        }
        assert!((10..20).contains(&asked), "{asked}");
    }

    #[test]
    fn a_burst_that_is_gone_within_the_interval_loses_nothing() {
        let mut link = Link::new(100);
        for round in 0..5000 {
            // 0.9 MB at once take 72 ms.
            link.tick(if round % 250 == 0 { 900_000 } else { 1000 });
        }
        assert_eq!(link.drops, 0);
    }

    #[test]
    fn a_sender_that_heeds_losses_ends_with_a_short_queue() {
        for megabits in [100, 1000, 5000] {
            let mut link = Link::new(megabits);
            // A round trip of 10 ms beside the queue; a segment more in each, three tenths less after a loss.
            let pipe = link.rate as f64 / 100.0;
            let (mut window, mut heeded) = (pipe * 4.0, 0.0);
            let mut late = Vec::new();
            for millis in 0..30_000 {
                let trip = 10.0 + link.delay().as_secs_f64() * 1000.0;
                window += 1448.0 / trip;
                if link.tick((window / trip) as u64) && f64::from(millis) > heeded + trip {
                    window *= 0.7;
                    heeded = f64::from(millis);
                }
                if millis > 10_000 {
                    late.push(link.delay());
                }
            }
            late.sort();
            let median = late[late.len() / 2];
            assert!(link.drops > 0);
            assert!(median < Duration::from_millis(25), "{megabits}: {median:?}");
        }
    }

    #[test]
    fn who_does_not_heed_it_loses_ever_more() {
        let mut link = Link::new(100);
        let mut lost = |millis: u32| {
            let before = link.drops;
            for _ in 0..millis {
                link.tick(25_000);
            }
            link.drops - before
        };
        let (first, second, later) = (lost(1000), lost(1000), lost(1000));
        assert!(first < second && second < later, "{first} {second} {later}");
    }
}
