//! Which offloads are in use, on this host and towards each peer, and why others are not. They are stepped down at run time
//! where they turn out to be broken: every one can be done without.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use weft_core::underlay::{Offload, OffloadState};

const STATES: [OffloadState; 5] = [
    OffloadState::On,
    OffloadState::SwitchedOff,
    OffloadState::Absent,
    OffloadState::Refused,
    OffloadState::Failing,
];

/// One offload, switched by any thread. It begins as used.
#[derive(Debug, Default)]
pub(crate) struct Switch(AtomicU8);

impl Switch {
    pub(crate) fn is_on(&self) -> bool {
        self.state() == OffloadState::On
    }

    pub(crate) fn state(&self) -> OffloadState {
        STATES[usize::from(self.0.load(Ordering::Relaxed)) % STATES.len()]
    }

    pub(crate) fn set(&self, state: OffloadState) {
        self.0.store(state as u8, Ordering::Relaxed);
    }
}

/// What the receiving side may leave to the domain's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joins {
    /// TCP segments of one flow as one frame.
    pub(crate) tcp: bool,
    /// Datagrams of one flow as one frame.
    pub(crate) udp: bool,
    /// Checksums that are not filled in.
    pub(crate) checksums: bool,
}

impl Joins {
    /// All that a kernel of today takes.
    pub(crate) const ALL: Joins = Joins {
        tcp: true,
        udp: true,
        checksums: true,
    };
}

/// Those of the whole host.
#[derive(Debug, Default)]
pub(crate) struct Offloads([Switch; Offload::ALL.len()]);

impl Offloads {
    /// All but those in `without`.
    pub(crate) fn new(without: &[Offload]) -> Self {
        let offloads = Self::default();
        for offload in without {
            offloads.step_down(*offload, OffloadState::SwitchedOff);
        }
        offloads
    }

    pub(crate) fn is_on(&self, offload: Offload) -> bool {
        self.0[offload as usize].is_on()
    }

    pub(crate) fn state(&self, offload: Offload) -> OffloadState {
        self.0[offload as usize].state()
    }

    /// From now on without `offload`, because of `why`; what was off before stays so for its own reason.
    pub(crate) fn step_down(&self, offload: Offload, why: OffloadState) {
        if self.is_on(offload) {
            self.0[offload as usize].set(why);
        }
        // No super-packet without it: the kernel leaves the checksums of those open.
        if offload == Offload::Csum {
            self.step_down(Offload::Tso, why);
            self.step_down(Offload::Uso, why);
        }
    }

    /// With `offload` again, if it was only found to be failing.
    pub(crate) fn step_up(&self, offload: Offload) {
        if self.state(offload) == OffloadState::Failing {
            self.0[offload as usize].set(OffloadState::On);
        }
    }

    pub(crate) fn read(&self) -> Vec<(Offload, OffloadState)> {
        let all = Offload::ALL.into_iter();
        all.map(|offload| (offload, self.state(offload))).collect()
    }

    pub(crate) fn joins(&self) -> Joins {
        Joins {
            tcp: self.is_on(Offload::Tso),
            udp: self.is_on(Offload::Uso),
            checksums: self.is_on(Offload::Csum),
        }
    }
}

/// Joined datagrams after which there is a verdict.
const ENOUGH: u32 = 256;

/// It is tried again after so long; after twice as long each time that it fails at once, up to a limit.
const PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// Do datagrams that the kernel has joined still authenticate? Where most of them do not, the joining is suspected: doing
/// without costs speed and nothing else. It is tried again later: what was broken may have been another card's way, or
/// somebody who forged them.
#[derive(Debug)]
pub(crate) struct JoinWatch {
    authentic: u32,
    forged: u32,
    /// How long to do without the next time.
    pause: Duration,
    /// When to join again, if this watch has ended it.
    again: Option<Instant>,
}

impl Default for JoinWatch {
    fn default() -> Self {
        Self {
            authentic: 0,
            forged: 0,
            pause: PAUSE,
            again: None,
        }
    }
}

impl JoinWatch {
    /// So many more of either kind came joined. True when joining should end.
    pub(crate) fn is_broken(&mut self, authentic: u32, forged: u32) -> bool {
        self.authentic += authentic;
        self.forged += forged;
        if self.authentic + self.forged < ENOUGH {
            return false;
        }
        let broken = self.forged > self.authentic;
        if !broken {
            self.pause = PAUSE;
        }
        (self.authentic, self.forged) = (0, 0);
        broken
    }

    /// Joining was ended.
    pub(crate) fn rest(&mut self, now: Instant) {
        self.again = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Is it time to join again? Says so once. The clock is looked at only where it may be.
    pub(crate) fn is_rested(&mut self, now: impl FnOnce() -> Instant) -> bool {
        let is_due = self.again.is_some_and(|again| again <= now());
        if is_due {
            self.again = None;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_what_they_were_set_to() {
        let switch = Switch::default();
        for state in STATES {
            switch.set(state);
            assert_eq!(switch.state(), state);
        }
    }

    #[test]
    fn without_checksums_there_are_no_super_packets() {
        let offloads = Offloads::new(&[Offload::Uso]);
        let joins = offloads.joins();
        assert_eq!((joins.tcp, joins.udp, joins.checksums), (true, false, true));
        offloads.step_down(Offload::Csum, OffloadState::Absent);
        assert_eq!(offloads.state(Offload::Tso), OffloadState::Absent);
        assert_eq!(offloads.state(Offload::Uso), OffloadState::SwitchedOff);
        assert!(offloads.is_on(Offload::Gso) && offloads.is_on(Offload::Gro));
    }

    #[test]
    fn joining_that_failed_is_tried_again_less_and_less_often_until_it_works() {
        let (mut watch, start) = (JoinWatch::default(), Instant::now());
        assert!(!watch.is_rested(|| panic!("nobody asked")));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(watch.is_broken(0, ENOUGH));
            watch.rest(start);
            let pause = (1..).find(|s| watch.is_rested(|| start + Duration::from_secs(*s)));
            assert!(!watch.is_rested(|| panic!("it is under way")));
            pauses.push(pause.unwrap());
        }
        assert_eq!(pauses, [60, 120, 240, 480, 960, 1920, 3600, 3600]);
        assert!(!watch.is_broken(ENOUGH, 0));
        watch.rest(start);
        assert!(watch.is_rested(|| start + PAUSE));
    }

    #[test]
    fn only_what_failed_is_stepped_up_again() {
        let offloads = Offloads::new(&[Offload::Uso]);
        offloads.step_down(Offload::Gro, OffloadState::Failing);
        offloads.step_up(Offload::Gro);
        offloads.step_up(Offload::Uso);
        assert!(offloads.is_on(Offload::Gro) && !offloads.is_on(Offload::Uso));
    }

    #[test]
    fn a_few_forgeries_are_no_broken_joining() {
        let mut watch = JoinWatch::default();
        assert!(!(0..1000).any(|_| watch.is_broken(10, 3)));
        assert!((0..100).any(|_| watch.is_broken(1, 7)));
    }
}
