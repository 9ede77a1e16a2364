//! Peers that make no session with this node say why: what it does about it, and what its people must know.

use super::cluster::Cluster;
use super::durable::Then;
use super::io::Output;
use super::meta::generation_batch;
use crate::membership::Membership;
use crate::model::{Generation, NodeId, Now};
use crate::roster::Removal;
use crate::session::handshake::Refusal;

/// A generation is believed to be at most so far ahead: it counts seconds since 1970, or starts. Whoever lies can't make
/// this node use them up.
const LEAP: u64 = 1 << 32;

impl Cluster {
    pub(super) fn on_refused(
        &mut self,
        now: Now,
        peer: NodeId,
        refusal: &Refusal,
        out: &mut Vec<Output>,
    ) {
        match refusal {
            Refusal::Outdated(seen) => self.on_outdated(now, *seen, out),
            Refusal::NoMember(shown) => {
                let Some(record) = self.meta.roster.read_refusal(shown) else {
                    return;
                };
                match self.roster().removal_in(&record) {
                    Some(removal) => self.on_removed(now, removal, &record, out),
                    // Who let this node in did it twice, under one number; here that is seen, and told.
                    None => self.hear_roster(now, peer, &record),
                }
            }
        }
    }

    /// This node was heard in a later start than this one. Where nobody has taken this start for the latest, or it has
    /// written nothing yet, its disk is an old one and its clock is behind: it goes on as a later start. Else another
    /// process has its key.
    fn on_outdated(&mut self, now: Now, seen: Generation, out: &mut Vec<Output>) {
        if seen < self.generation || !self.is_believed(seen) {
            return;
        }
        let is_twin = self.heard && self.ready;
        if is_twin {
            self.tell_once(
                format!(
                    "node {} runs twice (a copied disk or virtual machine): the others hear the one that started last; \
                     stop one of them and run `weft reset` there",
                    self.config.name
                ),
                out,
            );
        }
        self.count_on(now, seen, !is_twin, out);
    }

    /// Before it writes anything: its own log, which the peers kept, may go on in later starts than this one. A peer that has
    /// just begun doesn't know better and has taken this one for the latest. True if it must become a later one first.
    pub(super) fn overtakes_own_log(&mut self, now: Now, out: &mut Vec<Output>) -> bool {
        let last = self.catalog.outdated_by();
        let Some(last) = last.filter(|last| self.is_believed(*last)) else {
            return false;
        };
        if self.overtaking.replace(last) != Some(last) {
            self.count_on(now, last, true, out);
        }
        true
    }

    fn is_believed(&self, seen: Generation) -> bool {
        seen.0.saturating_sub(self.generation.0) <= LEAP
    }

    /// The next start will be later than the one that was `seen`, and so is this one if it `becomes` that.
    fn count_on(&mut self, now: Now, seen: Generation, becomes: bool, out: &mut Vec<Output>) {
        let later = Generation(seen.0.saturating_add(1));
        let then = match becomes {
            true => vec![Then::BecomeLater(later)],
            false => Vec::new(),
        };
        self.persist(now, generation_batch(later), then, out);
    }

    /// The number of the later start is on disk. Whoever took the start before for the latest meanwhile hears of this one.
    pub(super) fn become_later(&mut self, now: Now, later: Generation, out: &mut Vec<Output>) {
        if later <= self.generation {
            return;
        }
        self.generation = later;
        let wall = self.wall.micros(now);
        match self.catalog.become_later(later, &self.identity, wall) {
            Ok(written) => self.publish(now, written, Vec::new(), out),
            Err(error) => out.push(Output::Alarm(format!(
                "own records could not be written again: {error}"
            ))),
        }
        self.membership = Membership::new(self.me, later, self.random.fork(), now);
        self.sessions
            .set_generation(now, later, &self.meta.roster, &mut self.buffers.sessions);
        self.on_roster(now, out);
        self.view_changed = true;
    }

    /// This node was removed while it was off, or whoever let it in was before it did.
    fn on_removed(&mut self, now: Now, removal: Removal, record: &[u8], out: &mut Vec<Output>) {
        self.hear_roster(now, removal.by, record);
        // It may be a removal of somebody else, shown because it stands in place of the record that let this node in.
        // Records before that one may be missing here, and nobody tells them to a removed node.
        if self.is_member() && self.roster().is_void_by(&removal, &self.me) {
            self.tell_once(self.removed_text(removal.subject, removal.by), out);
        }
    }

    /// What people read on a host that is no member any more, since `subject` was removed by `by`.
    pub(super) fn removed_text(&self, subject: NodeId, by: NodeId) -> String {
        match subject == self.me {
            true => format!(
                "this node was removed from the cluster by {}: nobody there talks to it any more; to come back, run \
                 `weft reset` and join with a new token",
                self.name_of(&by)
            ),
            false => format!(
                "this node was let in by {}, which had been removed from the cluster: nobody there knows this node; to \
                 come in, run `weft reset` and join with a new token",
                self.name_of(&subject)
            ),
        }
    }

    /// What they read where the record that let it in is on a branch of a forked chain that nobody holds any more.
    pub(super) fn left_out_text() -> String {
        "this node was let in by a member whose key was in two places, and which has been removed: nobody there knows this \
         node; to come in, run `weft reset` and join with a new token"
            .to_owned()
    }
}
