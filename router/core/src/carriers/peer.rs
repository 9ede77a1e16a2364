//! One peer: what is known and was said of the way to it, and how the way is.

use std::time::Duration;

use super::probing::Probing;
use super::{Ends, Facts, Why, Word, choose};
use crate::layout::{DEVICE_MTU, VXLAN_OVERHEAD, vxlan_mac};
use crate::model::Now;
use crate::view::Carrier;

/// An opening that the peer has not confirmed is told again after this long, then twice as long, up to [`TELL_LAST`]: the
/// peer may not be ready for it yet, or list no such subnet.
const TELL_FIRST: Duration = Duration::from_secs(2);
const TELL_LAST: Duration = Duration::from_secs(60);
/// A peer's probes are answered at most this often: whoever can send on a trusted network can forge them.
const ANSWER_GAP: Duration = Duration::from_millis(20);
/// Probes remembered of a peer, for when it asks after one.
const REMEMBERED: usize = 4;

/// One peer with a session.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) facts: Facts,
    pub(super) mac: [u8; 6],
    pub(super) ends: Result<Ends, Why>,
    /// What it told of itself.
    pub(super) told: Option<Ends>,
    /// It knows what was told to it.
    pub(super) confirmed: bool,
    /// What was told to it last, and whether with a confirmation.
    pub(super) said: Option<(Ends, bool)>,
    /// When to tell it once more, and after how long a wait that is.
    pub(super) tell_again: Option<(Now, Duration)>,
    pub(super) probing: Probing,
    /// Its last probes, newest last, and when one was answered.
    pub(super) came: Vec<u64>,
    answered: Option<Now>,
}

impl Peer {
    pub(super) fn new(facts: Facts) -> Self {
        Self {
            mac: vxlan_mac(&facts.peer),
            ends: Err(Why::NoPath),
            told: None,
            confirmed: false,
            said: None,
            tell_again: None,
            probing: Probing::default(),
            came: Vec::new(),
            answered: None,
            facts,
        }
    }

    pub(super) fn mtu(&self) -> u16 {
        let outer = self.facts.path_mtu.unwrap_or(0);
        outer
            .saturating_sub(VXLAN_OVERHEAD)
            .min(u16::try_from(DEVICE_MTU).unwrap_or(u16::MAX))
    }

    /// Both ends are open for the same two addresses.
    pub(super) fn is_agreed(&self, device: &Result<(), String>) -> bool {
        device.is_ok() && self.ends.is_ok() && self.told == self.ends.clone().ok()
    }

    pub(super) fn choice(&self, device: &Result<(), String>) -> (Carrier, Why) {
        choose(device, &self.ends, self.told, self.probing.reaches())
    }

    /// A probe came from it. True if it is to be told.
    pub(super) fn remember(&mut self, now: Now, nonce: u64) -> bool {
        if self.came.len() >= REMEMBERED {
            self.came.remove(0);
        }
        self.came.push(nonce);
        let is_flood = self.answered.is_some_and(|at| now.since(at) < ANSWER_GAP);
        if !is_flood {
            self.answered = Some(now);
        }
        !is_flood
    }

    /// What to tell it of what this host takes from it, when that is another thing than was told, or was not confirmed.
    pub(super) fn tell(&mut self, now: Now, device: &Result<(), String>) -> Option<Word> {
        let open = self.ends.as_ref().ok().filter(|_| device.is_ok()).copied();
        let Some(open) = open else {
            self.tell_again = None;
            return self.said.take().map(|_| Word::Shut);
        };
        if self.confirmed {
            self.tell_again = None;
        }
        let confirmed = self.told.is_some();
        let is_news = self.said != Some((open, confirmed));
        let again = self.tell_again.filter(|(at, _)| *at <= now);
        let wait = match (is_news, again) {
            (true, _) => TELL_FIRST,
            (false, Some((_, wait))) => (wait * 2).min(TELL_LAST),
            (false, None) => return None,
        };
        self.said = Some((open, confirmed));
        self.tell_again = (!self.confirmed).then(|| (now.plus(wait), wait));
        Some(Word::Open {
            yours: open.theirs,
            mine: open.mine,
            confirmed,
        })
    }
}
