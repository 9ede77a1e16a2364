//! Whether a NAT lies between this host and a peer, as their words show, and by which port of the peer's address ESP comes
//! through it.
//!
//! ESP itself has no ports, so a NAT can't tell whose it is: there it goes inside UDP (RFC 3948). Both ends find that out
//! from the same words, each sees that the other one sees other addresses.

use std::time::Duration;

use crate::layout::ESP_UDP_PORT;
use crate::model::Now;

/// The two ends must disagree for this long: while one of them moves, what they say crosses what they see.
const SETTLES: Duration = Duration::from_secs(2);

/// What is known of it, for one peer.
#[derive(Debug)]
pub(super) struct Nat {
    /// Since when the ends see other addresses than each other.
    differs: Option<Now>,
    between: bool,
    port: u16,
}

impl Default for Nat {
    fn default() -> Self {
        Self {
            differs: None,
            between: false,
            port: ESP_UDP_PORT,
        }
    }
}

impl Nat {
    /// The peer said which addresses it sees; `same`: this host sees those, too. Two that agree can't be mistaken: true if
    /// the NAT that was between them is gone.
    pub(super) fn compare(&mut self, now: Now, same: bool) -> bool {
        if !same {
            self.differs.get_or_insert(now);
            return false;
        }
        self.differs = None;
        std::mem::take(&mut self.between)
    }

    /// The peer took back what it said.
    pub(super) fn doubt(&mut self) {
        self.differs = None;
    }

    /// Time passed. True if a NAT was found just now.
    pub(super) fn settle(&mut self, now: Now) -> bool {
        let found = !self.between && self.due().is_some_and(|due| due <= now);
        self.between |= found;
        found
    }

    /// Is there one?
    pub(super) fn is_between(&self) -> bool {
        self.between
    }

    /// When [`Self::settle`] finds one.
    pub(super) fn due(&self) -> Option<Now> {
        let differs = self.differs.filter(|_| !self.between);
        differs.map(|since| since.plus(SETTLES))
    }

    /// The peer's port for ESP, as this host sees it: its own until something came from another one.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Something that the peer sealed came from this one. True if that is another one than before.
    pub(super) fn set_port(&mut self, port: u16) -> bool {
        std::mem::replace(&mut self.port, port) != port
    }

    /// The peer is elsewhere now.
    pub(super) fn forget_port(&mut self) {
        self.port = ESP_UDP_PORT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Now = Now(Duration::from_secs(100));

    #[test]
    fn words_that_cross_while_a_host_moves_are_no_nat() {
        let mut nat = Nat::default();
        nat.compare(START, false);
        assert!(!nat.settle(START.plus(SETTLES / 2)));
        nat.compare(START.plus(SETTLES / 2), true);
        assert!(!nat.settle(START.plus(SETTLES * 2)) && nat.due().is_none());
    }

    #[test]
    fn ends_that_go_on_to_differ_have_one_between_them_until_they_agree() {
        let mut nat = Nat::default();
        nat.compare(START, false);
        nat.compare(START.plus(SETTLES / 2), false);
        assert_eq!(nat.due(), Some(START.plus(SETTLES)));
        assert!(nat.settle(START.plus(SETTLES)) && nat.is_between());
        assert!(!nat.settle(START.plus(SETTLES * 2)), "found once");
        assert!(nat.compare(START.plus(SETTLES * 3), true));
        assert!(!nat.is_between());
    }
}
