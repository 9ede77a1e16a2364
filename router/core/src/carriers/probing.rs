//! Whether packets over VXLAN reach one peer: sends probes, asks after those that were not answered, and counts.
//!
//! ```text
//!   nothing known --came--> reaches --3 missed in a row--> does not reach
//!        ^ probes 0.3 s to 5 s   ^ probes 2 s              | probes 2 s to 30 s
//!                                +---------3 came in a row-+
//! ```

use std::time::Duration;

use crate::crypto::Random;
use crate::model::Now;

/// Between probes of a way that works.
const EVERY: Duration = Duration::from_secs(2);
/// With more than some forty peers each gets so much more time, or probes would cost more than gossip.
const SHARE: Duration = Duration::from_millis(50);
/// An answer takes less on any network that somebody trusts; then the peer is asked whether the probe came.
const ASK_AFTER: Duration = Duration::from_millis(250);
/// A peer that says nothing to that is busy or gone: the session finds out. The probe counts neither way.
const FORGET_AFTER: Duration = Duration::from_secs(1);
/// Without any answer for this long (or three probes) the way is given up all the same: the peer may have lost the session
/// that this host still has, and then takes nothing from it.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);
/// After a lost one, the next.
const SOON: Duration = Duration::from_millis(100);
/// Lost in a row until the way is given up; came in a row until it is used again.
const IN_A_ROW: u32 = 3;
/// Between probes of a way that does not work: from the first to the last of these.
const RETRY: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(5));
const RETRY_FALLEN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flight {
    /// No probe is under way.
    None,
    /// One is.
    Sent { nonce: u64, at: Now },
    /// It was asked after.
    Asked { nonce: u64, at: Now },
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Send a probe over VXLAN; `whole`: as large as the path allows.
    Probe { nonce: u64, whole: bool },
    /// Ask, inside the session, whether this one came.
    Ask(u64),
}

/// The state for one peer.
#[derive(Debug)]
pub(super) struct Probing {
    reaches: Option<bool>,
    flight: Flight,
    next: Option<Now>,
    heard: Option<Now>,
    came: u32,
    missed: u32,
}

impl Default for Probing {
    fn default() -> Self {
        Self {
            reaches: None,
            flight: Flight::None,
            next: None,
            heard: None,
            came: 0,
            missed: 0,
        }
    }
}

impl Probing {
    /// Do probes arrive? `None` before the first has.
    pub(super) fn reaches(&self) -> Option<bool> {
        self.reaches
    }

    /// When [`Self::step`] has something to do next; `None` before its first call.
    pub(super) fn due(&self) -> Option<Now> {
        match self.flight {
            Flight::None => self.next,
            Flight::Sent { at, .. } => Some(at.plus(ASK_AFTER)),
            Flight::Asked { at, .. } => Some(at.plus(FORGET_AFTER)),
        }
    }

    /// What is due now, with so many peers in all.
    pub(super) fn step(&mut self, now: Now, crowd: usize, random: &mut Random) -> Option<Step> {
        if self.due().is_some_and(|due| due > now) {
            return None;
        }
        let share = SHARE * u32::try_from(crowd).unwrap_or(u32::MAX);
        let every = EVERY.max(share);
        if let Flight::Sent { nonce, .. } = self.flight {
            self.flight = Flight::Asked { nonce, at: now };
            return Some(Step::Ask(nonce));
        }
        self.flight = Flight::None;
        let patience = GIVE_UP_AFTER.max(every * IN_A_ROW);
        if self.reaches == Some(true) && self.heard.is_some_and(|at| now.since(at) > patience) {
            self.reaches = Some(false);
            self.came = 0;
        }
        if self.next.is_some_and(|next| next > now) {
            return None;
        }
        let nonce = random.u64();
        self.flight = Flight::Sent { nonce, at: now };
        self.next = Some(now.plus(every));
        let whole = self.reaches != Some(true);
        Some(Step::Probe { nonce, whole })
    }

    /// The peer says that this probe came.
    pub(super) fn on_came(&mut self, now: Now, nonce: u64) {
        if !self.is_mine(nonce) {
            return;
        }
        self.flight = Flight::None;
        self.heard = Some(now);
        self.missed = 0;
        self.came = self.came.saturating_add(1);
        if self.reaches != Some(false) || self.came >= IN_A_ROW {
            self.reaches = Some(true);
        } else {
            self.next = Some(now.plus(SOON));
        }
    }

    /// The peer says that this probe did not come.
    pub(super) fn on_missed(&mut self, now: Now, nonce: u64) {
        if !self.is_mine(nonce) {
            return;
        }
        self.flight = Flight::None;
        self.came = 0;
        self.missed = self.missed.saturating_add(1);
        let wait = match self.reaches {
            Some(true) if self.missed < IN_A_ROW => SOON,
            Some(true) => {
                self.missed = 0;
                self.reaches = Some(false);
                RETRY_FALLEN.0
            }
            None if self.missed >= IN_A_ROW => {
                self.reaches = Some(false);
                back_off(RETRY, self.missed)
            }
            None => back_off(RETRY, self.missed),
            Some(false) => back_off(RETRY_FALLEN, self.missed),
        };
        self.next = Some(now.plus(wait));
    }

    fn is_mine(&self, asked: u64) -> bool {
        match self.flight {
            Flight::Sent { nonce, .. } | Flight::Asked { nonce, .. } => nonce == asked,
            Flight::None => false,
        }
    }
}

/// The first wait, doubled with each more that was missed, up to the last.
fn back_off((first, last): (Duration, Duration), missed: u32) -> Duration {
    first
        .saturating_mul(1 << missed.saturating_sub(1).min(8))
        .min(last)
}
