//! One peer's keys for ESP: which session's are wanted in the kernel, which stand there, and when new ones are needed.
//!
//! ```text
//!   session's keys ---> wanted inbound --stands--> told to the peer (its SPI) --> the peer seals with them
//!   the peer's SPI ---> wanted outbound --stands--> in use; the one before goes
//! ```
//!
//! INVARIANT: a key is wanted in the kernel in one run, between the same two addresses, and never again after that: its
//! counter would begin anew (threats row 1). Whoever lost a key, or moved, asks for a new session.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::model::Now;
use crate::session::transport::EspKeys;
use crate::view::{EspSa, PeerNumber};

/// Keys of this many sessions are kept: a new one may come before the peer has heard of the last.
const EPOCHS: usize = 3;
/// What was sealed with the former keys may still be under way.
const LINGER: Duration = Duration::from_secs(10);
/// Between two requests for new keys.
const RENEW_GAP: Duration = Duration::from_secs(5);

/// What this host can do about ESP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Esp {
    /// Nobody asked for it.
    #[default]
    Unasked,
    /// Asked for, but the kernel can't; why.
    Lacking(String),
    /// The kernel has it.
    Ready,
}

/// The keys of one session with a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionKeys {
    /// This host's index: the SPI of what comes.
    pub inbound: u32,
    /// The peer's: the SPI of what goes.
    pub outbound: u32,
    /// The keys.
    pub keys: EspKeys,
}

/// One security association: of whom, whether it seals what goes out, its SPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SaId {
    /// The peer.
    pub peer: PeerNumber,
    /// Outbound.
    pub seals: bool,
    /// Its SPI.
    pub spi: u32,
}

/// What the kernel has of what is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EspState {
    /// These stand, their policies with them.
    pub stands: BTreeSet<SaId>,
    /// These stood, and somebody removed them, or they are used up.
    pub lost: BTreeSet<SaId>,
    /// These have sealed so much that new keys are due.
    pub worn: BTreeSet<SaId>,
    /// Peers for which the kernel refused something, and what it said.
    pub trouble: Vec<(PeerNumber, String)>,
}

impl EspState {
    pub(super) fn trouble_with(&self, peer: PeerNumber) -> Option<&str> {
        let found = self.trouble.iter().find(|(number, _)| *number == peer);
        found.map(|(_, text)| text.as_str())
    }
}

#[derive(Debug)]
struct Epoch {
    session: SessionKeys,
    inbound_stands: bool,
    outbound_stands: bool,
}

/// A peer's keys.
#[derive(Debug, Default)]
pub(super) struct Keyring {
    /// Newest first.
    epochs: Vec<Epoch>,
    /// The session whose keys may not be used any more.
    spent: Option<u32>,
    /// The epoch, by its outbound SPI, that the peer asked to be sealed to.
    asked: Option<u32>,
    /// When all epochs but the newest go.
    tidy: Option<Now>,
    renewed: Option<Now>,
    wants_renewal: bool,
}

impl Keyring {
    /// The session's keys are these now.
    pub(super) fn offer(&mut self, session: &SessionKeys) {
        let known = self
            .epochs
            .iter()
            .any(|epoch| epoch.session.inbound == session.inbound);
        if known {
            return;
        }
        if self.spent == Some(session.inbound) {
            self.wants_renewal |= self.epochs.is_empty();
            return;
        }
        self.wants_renewal = false;
        self.tidy = None;
        let epoch = Epoch {
            session: session.clone(),
            inbound_stands: false,
            outbound_stands: false,
        };
        self.epochs.insert(0, epoch);
        self.epochs.truncate(EPOCHS);
    }

    /// The way between the hosts changed, or keys are gone from the kernel: none of them is used again.
    pub(super) fn retire(&mut self) {
        if let Some(newest) = self.epochs.first() {
            self.spent = Some(newest.session.inbound);
        }
        self.epochs.clear();
        self.asked = None;
        self.tidy = None;
        self.wants_renewal = false;
    }

    /// The peer takes what is sealed under this SPI.
    pub(super) fn seal_to(&mut self, spi: u32) {
        self.asked = Some(spi);
    }

    /// What the kernel has.
    pub(super) fn observe(&mut self, peer: PeerNumber, state: &EspState) {
        let id = |seals, spi| SaId { peer, seals, spi };
        let mut lost = false;
        for (at, epoch) in self.epochs.iter_mut().enumerate() {
            let inbound = id(false, epoch.session.inbound);
            let outbound = id(true, epoch.session.outbound);
            epoch.inbound_stands = state.stands.contains(&inbound);
            epoch.outbound_stands = state.stands.contains(&outbound);
            let is_gone = state.lost.contains(&inbound) || state.lost.contains(&outbound);
            // What was replaced already may go.
            lost |= is_gone && (at == 0 || self.asked == Some(epoch.session.outbound));
            self.wants_renewal |= at == 0 && state.worn.contains(&outbound);
        }
        if lost {
            self.retire();
            self.wants_renewal = true;
        }
    }

    /// The newest SPI under which this host takes packets: what the peer is to be told.
    pub(super) fn takes(&self) -> Option<u32> {
        let standing = self.epochs.iter().find(|epoch| epoch.inbound_stands);
        standing.map(|epoch| epoch.session.inbound)
    }

    /// Something seals what goes to the peer under an SPI that it takes.
    pub(super) fn seals(&self) -> bool {
        self.asked.is_some() && self.epochs.iter().any(|epoch| epoch.outbound_stands)
    }

    /// The peer knows which SPI this host takes: whatever is older lingers and goes.
    pub(super) fn on_confirmed(&mut self, now: Now, spi: u32) {
        let newest = self.epochs.first().map(|epoch| epoch.session.inbound);
        if newest == Some(spi) && self.epochs.len() > 1 && self.tidy.is_none() {
            self.tidy = Some(now.plus(LINGER));
        }
    }

    /// Whether new keys are to be asked for now.
    pub(super) fn step(&mut self, now: Now) -> bool {
        if self.tidy.is_some_and(|at| at <= now) {
            self.tidy = None;
            let asked = self.asked;
            let mut is_newest = true;
            self.epochs.retain(|epoch| {
                let used = asked == Some(epoch.session.outbound);
                std::mem::take(&mut is_newest) || used
            });
        }
        let due = self.wants_renewal && self.renewed.is_none_or(|at| now.since(at) >= RENEW_GAP);
        if due {
            self.renewed = Some(now);
        }
        due
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        let renewal = self.renewed.filter(|_| self.wants_renewal);
        let renewal = renewal.map(|at| at.plus(RENEW_GAP));
        self.tidy.into_iter().chain(renewal).min()
    }

    /// What is to take what comes, newest first.
    pub(super) fn inbound(&self) -> Vec<EspSa> {
        let each = self.epochs.iter().map(|epoch| EspSa {
            spi: epoch.session.inbound,
            key: epoch.session.keys.receive.clone(),
        });
        each.collect()
    }

    /// What is to seal what goes: what the peer asked for, and what does so until that stands.
    pub(super) fn outbound(&self) -> Vec<EspSa> {
        let Some(asked) = self.asked else {
            return Vec::new();
        };
        let is_asked = |epoch: &Epoch| epoch.session.outbound == asked;
        let stands = self.epochs.iter().any(|e| is_asked(e) && e.outbound_stands);
        let wanted = self
            .epochs
            .iter()
            .filter(|epoch| is_asked(epoch) || (epoch.outbound_stands && !stands));
        wanted
            .map(|epoch| EspSa {
                spi: epoch.session.outbound,
                key: epoch.session.keys.send.clone(),
            })
            .collect()
    }
}
