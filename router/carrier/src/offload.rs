//! Which offloads are in use, on this host and towards each peer, and why others are not. They are stepped down at run time
//! where they turn out to be broken: every one can be done without.

use std::sync::atomic::{AtomicU8, Ordering};

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

/// Do datagrams that the kernel has joined still authenticate? Where most of them do not, the joining is suspected: doing
/// without costs speed and nothing else.
#[derive(Debug, Default)]
pub(crate) struct JoinWatch {
    authentic: u32,
    forged: u32,
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
        *self = Self::default();
        broken
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
    fn a_few_forgeries_are_no_broken_joining() {
        let mut watch = JoinWatch::default();
        assert!(!(0..1000).any(|_| watch.is_broken(10, 3)));
        assert!((0..100).any(|_| watch.is_broken(1, 7)));
    }
}
