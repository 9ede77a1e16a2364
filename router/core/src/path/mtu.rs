//! What a path takes in one piece: datagram packetization layer path MTU discovery (RFC 8899), with sealed echoes as the
//! probes. ICMP messages are hints, no more: they may be filtered, and who forges one must not be believed.
//!
//! ```text
//!            ceiling known             answered                    10 s of traffic
//!   unknown --------------> probing <------------------> settled ------------------+
//!                            |  ^                          ^                       |
//!                 4 in vain  |  | next rung                |   answered            v
//!                            +--+                          +------------------ confirming
//!                              ^                                                   |
//!                              +------------------ 4 in vain: a black hole --------+
//! ```
//!
//! All sizes are of IP packets, header included. Each end measures its own direction.

use std::collections::VecDeque;
use std::time::Duration;

use crate::layout::IPV6_MIN_MTU;
use crate::model::Now;

/// Taken for granted where nobody is between.
pub(crate) const BASE: u16 = IPV6_MIN_MTU;
/// Taken for granted until shown otherwise where the kernel allows so much: nearly everywhere it is so.
const USUAL: u16 = 1500;
/// Sizes that links and tunnels have: searched instead of all numbers, to be done in a few round trips.
const RUNGS: [u16; 18] = [
    1300, 1320, 1340, 1360, 1380, 1400, 1420, 1440, 1450, 1460, 1472, 1480, 1492, USUAL, 2000,
    4352, 8000, 9000,
];
/// Probes of one size in vain before it is too large.
const TRIES: u32 = 4;
/// Between them, beside the round trip.
const WAIT: Duration = Duration::from_millis(250);
/// Probes whose answers still count when they come late, as on a host that is busy.
const REMEMBERED: usize = 16;
/// Between confirmations that the size still holds, while packets pass.
const CONFIRM_EVERY: Duration = Duration::from_secs(10);
/// Between attempts to find more (RFC 8899 §5.1.1, PMTU_RAISE_TIMER).
const RAISE_EVERY: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Asked {
    size: u16,
    at: Now,
    tries: u32,
}

/// The search along one path.
#[derive(Clone, Debug)]
pub(crate) struct Mtu {
    /// What it takes for sure.
    base: u16,
    /// What the kernel says that it sends there in one piece.
    ceiling: Option<u16>,
    /// The largest that was answered.
    good: Option<u16>,
    /// The smallest that was not.
    bad: Option<u16>,
    asked: Option<Asked>,
    /// Sizes and numbers of the last probes.
    sent: VecDeque<(u16, u64)>,
    /// When the size was last confirmed, and when more was last tried.
    settled: Option<Now>,
    raised: Option<Now>,
}

impl Mtu {
    /// Nothing is known of a path but that it takes `base` octets.
    pub(crate) fn new(base: u16) -> Self {
        Self {
            base,
            ceiling: None,
            good: None,
            bad: None,
            asked: None,
            sent: VecDeque::new(),
            settled: None,
            raised: None,
        }
    }

    /// It takes just `size` octets, whatever becomes of them on the way: nothing to search for.
    pub(crate) fn fixed(size: u16) -> Self {
        Self {
            ceiling: Some(size),
            good: Some(size),
            ..Self::new(size)
        }
    }

    /// The kernel sends so much there in one piece.
    pub(crate) fn set_ceiling(&mut self, ceiling: u16) {
        if self.ceiling == Some(ceiling) {
            return;
        }
        // More may fit now, or less; what is smaller than both was answered and stays so.
        self.good = self.good.filter(|good| *good <= ceiling);
        self.bad = None;
        self.asked = None;
        self.sent.clear();
        self.settled = None;
        self.ceiling = Some(ceiling);
    }

    /// What packets may have; `None` before anything is known.
    pub(crate) fn size(&self) -> Option<u16> {
        let ceiling = self.ceiling?;
        let hoped = ceiling.min(USUAL);
        let is_too_much = self.bad.is_some_and(|bad| hoped >= bad);
        let good = self.good.unwrap_or(self.base.min(ceiling));
        Some(match is_too_much {
            true => good,
            false => good.max(hoped),
        })
    }

    /// The size of which an echo should be asked for now. Call while packets pass and the peer answers.
    pub(crate) fn due(&mut self, now: Now, slack: Duration) -> Option<u16> {
        let ceiling = self.ceiling.filter(|ceiling| *ceiling > self.base)?;
        if let Some(asked) = self.asked {
            if now.since(asked.at) < WAIT + slack {
                return None;
            }
            if asked.tries < TRIES {
                return Some(asked.size);
            }
            self.on_too_large(asked.size);
        }
        if let Some(at) = self.settled {
            if now.since(at) < CONFIRM_EVERY {
                return None;
            }
            let raise = self.raised.is_none_or(|at| now.since(at) >= RAISE_EVERY);
            if raise && self.good.is_some_and(|good| good < ceiling) {
                self.bad = None;
                self.settled = None;
                self.raised = Some(now);
            } else {
                return self.good;
            }
        }
        let next = self.next(ceiling);
        if next.is_none() {
            self.good.get_or_insert(self.base);
            self.settled = Some(now);
            self.raised.get_or_insert(now);
        }
        next
    }

    /// The largest first; then what is usual; then the middle of what is left.
    fn next(&mut self, ceiling: u16) -> Option<u16> {
        let good = self.good.unwrap_or(self.base);
        let Some(bad) = self.bad else {
            return (good < ceiling).then_some(ceiling);
        };
        let is_open = |size: &u16| *size > good && *size < bad;
        if is_open(&USUAL) {
            return Some(USUAL);
        }
        let open: Vec<u16> = RUNGS.into_iter().filter(is_open).collect();
        open.get(open.len() / 2).copied()
    }

    /// It was asked for.
    pub(crate) fn on_asked(&mut self, now: Now, size: u16, nonce: u64) {
        let before = self.asked.filter(|asked| asked.size == size);
        if self.sent.len() >= REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back((size, nonce));
        self.asked = Some(Asked {
            size,
            at: now,
            tries: before.map_or(1, |asked| asked.tries + 1),
        });
    }

    fn on_too_large(&mut self, size: u16) {
        self.asked = None;
        self.settled = None;
        self.bad = Some(self.bad.map_or(size, |bad| bad.min(size)));
        // What fitted fits no more: all that is known is that the least does.
        self.good = self.good.filter(|good| *good < size);
    }

    /// An echo came. True if it was one of ours.
    pub(crate) fn on_echo(&mut self, now: Now, nonce: u64) -> bool {
        let Some(place) = self.sent.iter().position(|(_, sent)| *sent == nonce) else {
            return false;
        };
        let (size, _) = self.sent[place];
        self.sent.remove(place);
        self.asked = self.asked.filter(|asked| asked.size > size);
        self.good = Some(self.good.map_or(size, |good| good.max(size)));
        if self.bad.is_some_and(|bad| bad <= size) {
            // It was only late.
            self.bad = None;
        }
        if self.good == self.ceiling || self.settled.is_some() {
            self.settled = Some(now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that takes `takes` octets, for so long; gives the sizes that were asked for.
    fn walk(mtu: &mut Mtu, now: &mut Now, takes: u16, time: Duration) -> Vec<u16> {
        let end = now.plus(time);
        let mut asked = Vec::new();
        while *now < end {
            if let Some(size) = mtu.due(*now, Duration::ZERO) {
                let nonce = now.0.as_millis() as u64;
                mtu.on_asked(*now, size, nonce);
                asked.push(size);
                if size <= takes {
                    assert!(mtu.on_echo(*now, nonce));
                }
            }
            *now = now.plus(Duration::from_millis(50));
        }
        asked
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn what_the_kernel_says_is_used_at_once_and_confirmed_by_one_echo() {
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        assert_eq!(mtu.size(), None);
        mtu.set_ceiling(1500);
        assert_eq!(mtu.size(), Some(1500));
        assert_eq!(walk(&mut mtu, &mut now, 1500, secs(9)), [1500]);
        assert_eq!(walk(&mut mtu, &mut now, 1500, secs(20)), [1500, 1500]);
    }

    #[test]
    fn a_jumbo_frame_is_believed_once_it_was_answered() {
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        mtu.set_ceiling(9000);
        assert_eq!(mtu.size(), Some(1500));
        walk(&mut mtu, &mut now, 9000, secs(1));
        assert_eq!(mtu.size(), Some(9000));
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        mtu.set_ceiling(9000);
        walk(&mut mtu, &mut now, 1500, secs(8));
        assert_eq!(mtu.size(), Some(1500));
    }

    #[test]
    fn every_black_hole_is_found_within_seconds_and_never_overestimated() {
        for takes in 1280..=1500 {
            let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
            mtu.set_ceiling(1500);
            let asked = walk(&mut mtu, &mut now, takes, secs(8));
            let size = mtu.size().unwrap();
            assert!(size <= takes, "{size} where {takes} fit");
            assert!(takes - size < 20, "{size} where {takes} fit");
            assert!(asked.len() <= 5 * TRIES as usize, "{asked:?}");
        }
    }

    #[test]
    fn a_path_that_shrinks_is_noticed_and_one_that_grows_is_tried_again() {
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        mtu.set_ceiling(1500);
        walk(&mut mtu, &mut now, 1500, secs(5));
        walk(&mut mtu, &mut now, 1400, secs(15));
        assert_eq!(mtu.size(), Some(1400));
        walk(&mut mtu, &mut now, 1500, secs(500));
        assert_eq!(mtu.size(), Some(1400));
        walk(&mut mtu, &mut now, 1500, secs(200));
        assert_eq!(mtu.size(), Some(1500));
    }

    #[test]
    fn the_kernels_word_lowers_it_at_once() {
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        mtu.set_ceiling(1500);
        walk(&mut mtu, &mut now, 1500, secs(1));
        mtu.set_ceiling(1350);
        assert_eq!(mtu.size(), Some(1350));
        mtu.set_ceiling(1000);
        assert_eq!(mtu.size(), Some(1000));
        assert_eq!(mtu.due(now, Duration::ZERO), None);
    }

    #[test]
    fn an_answer_that_comes_late_comes_all_the_same() {
        let (mut mtu, mut now) = (Mtu::new(BASE), Now::default());
        mtu.set_ceiling(1500);
        let mut late = Vec::new();
        for nonce in 0..=u64::from(TRIES) {
            let size = mtu.due(now, Duration::ZERO).unwrap();
            mtu.on_asked(now, size, nonce);
            late.push(nonce);
            now = now.plus(Duration::from_secs(1));
        }
        assert_eq!(mtu.size(), Some(1280));
        assert!(mtu.on_echo(now, late[0]));
        assert_eq!(mtu.size(), Some(1500));
    }

    #[test]
    fn what_is_fixed_is_never_searched() {
        let (mut mtu, mut now) = (Mtu::fixed(9033), Now::default());
        assert_eq!(mtu.size(), Some(9033));
        assert_eq!(walk(&mut mtu, &mut now, 1500, secs(30)), []);
        assert_eq!(mtu.size(), Some(9033));
    }

    #[test]
    fn a_stranger_to_the_search_changes_nothing() {
        let mut mtu = Mtu::new(BASE);
        mtu.set_ceiling(1500);
        mtu.on_asked(Now::default(), 1500, 7);
        assert!(!mtu.on_echo(Now::default(), 8));
        assert!(mtu.on_echo(Now::default(), 7));
    }
}
