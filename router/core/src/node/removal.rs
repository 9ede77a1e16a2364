//! Nodes that go for good: removed by a person on another node, or leaving by themselves. The key is void at once; the
//! part of the range follows when its voters have taken note ([`super::space`]), or at once where a person says that the
//! node is destroyed.

use std::collections::BTreeSet;
use std::time::Duration;

use super::asks::{Purpose, fail};
use super::cluster::Cluster;
use super::durable::Then;
use super::io::{Ask, Output, Reply};
use crate::control::ErrorKind;
use crate::model::{NodeId, Now};
use crate::mutation::{self, Mutation};
use crate::roster::{Issued, RosterError};
use crate::store::Batch;
use crate::sync::{Stores, roster_frame};
use crate::value::{Object, Vote};
use crate::wire::Message;

/// A person waits so long for the voters.
const PATIENCE: Duration = Duration::from_secs(10);
/// So many members say of each removal that they heard of it.
const WITNESSES: usize = 2;
/// Removals that wait at the same time.
const MAX_WAITING: usize = 64;

/// A removal that somebody waits for.
#[derive(Debug)]
pub(super) struct Removing {
    command: u64,
    subject: NodeId,
    name: String,
    deadline: Now,
}

impl Cluster {
    /// `weft node rm`.
    pub(super) fn remove_node(
        &mut self,
        now: Now,
        command: u64,
        node: &str,
        force: bool,
        out: &mut Vec<Output>,
    ) {
        let (subject, name) = match self.find_node(node) {
            Ok(found) => found,
            Err((kind, text)) => return fail(command, kind, text, out),
        };
        if self.removing.len() >= MAX_WAITING {
            let text = "too many removals wait already; try again in a moment";
            return fail(command, ErrorKind::Unavailable, text.to_owned(), out);
        }
        if self.roster().is_member(&subject)
            && let Err(error) = self.revoke(now, &subject, out)
        {
            let text = format!("{name} can't be removed from here: {error}");
            return fail(command, ErrorKind::Conflict, text, out);
        }
        if self.roster().is_member(&subject) {
            return fail(command, ErrorKind::Conflict, self.pending_text(&name), out);
        }
        self.confirm(now, &subject, out);
        if force {
            self.declare_destroyed(now, &subject, out);
        }
        self.removing.push(Removing {
            command,
            subject,
            name,
            deadline: now.plus(PATIENCE),
        });
        self.after_removal(now, out);
    }

    /// This node leaves for good: it says so, and somebody must have heard it.
    pub(super) fn leave_for_good(&mut self, now: Now, command: u64, out: &mut Vec<Output>) {
        let peers = self.alive_peers();
        let me = self.me;
        let last = self.catalog.last_sequence(&me);
        let issued = match self.meta.roster.revoke(&self.identity, me, last) {
            Ok(issued) => issued,
            Err(error) => return fail(command, ErrorKind::Internal, error.to_string(), out),
        };
        self.leaving = true;
        self.persist(now, issued.change.batch, Vec::new(), out);
        if self.roster().members().next().is_none() {
            return self.persist(
                now,
                Batch::new(),
                vec![Then::Reply(command, Reply::Done)],
                out,
            );
        }
        let farewell = Ask::Farewell(issued.bytes);
        if self
            .ask(now, peers, &farewell, Purpose::Farewell { command })
            .is_err()
        {
            self.unheard_farewell(command, out);
        }
    }

    /// A member says that it leaves.
    pub(super) fn on_farewell(&mut self, now: Now, from: NodeId, id: u64, record: &[u8]) {
        // Nothing passes between the two afterwards.
        self.answer(now, &from, id, &super::io::Answer::Granted);
        self.hear_roster(now, from, record);
    }

    /// A roster record that came otherwise than by anti-entropy.
    pub(super) fn hear_roster(&mut self, now: Now, from: NodeId, record: &[u8]) {
        let wall = self.wall.micros(now);
        let mut stores = Stores {
            catalog: &mut self.catalog,
            roster: &mut self.meta.roster,
            wall,
        };
        self.sync
            .hear_roster(from, record, &mut stores, &mut self.buffers.sync);
    }

    /// Nobody heard the farewell.
    pub(super) fn unheard_farewell(&self, command: u64, out: &mut Vec<Output>) {
        let text = format!(
            "no other node heard that this one leaves; remove it there with: weft node rm {}",
            self.config.name
        );
        fail(command, ErrorKind::Unavailable, text, out);
    }

    /// Removals that are done are answered, and those that took too long.
    pub(super) fn answer_removals(&mut self, now: Now, out: &mut Vec<Output>) {
        let waiting = std::mem::take(&mut self.removing);
        for removing in waiting {
            let left = self.ring.parts(&removing.subject);
            if left.is_empty() {
                let reply = Reply::Removed {
                    node: removing.subject,
                    name: removing.name,
                };
                self.persist(
                    now,
                    Batch::new(),
                    vec![Then::Reply(removing.command, reply)],
                    out,
                );
            } else if removing.deadline <= now {
                let text = self.blocked_text(&removing);
                fail(removing.command, ErrorKind::Unavailable, text, out);
            } else {
                self.removing.push(removing);
            }
        }
    }

    /// When to look at them again.
    pub(super) fn removals_deadline(&self) -> Option<Now> {
        self.removing.iter().map(|removing| removing.deadline).min()
    }

    /// Approves somebody's removal of a node, so that its issuer may remove another one.
    pub(super) fn approve_removal(&mut self, now: Now, record: [u8; 32], out: &mut Vec<Output>) {
        if self.roster().has_approved(&self.me, &record) {
            return;
        }
        if let Ok(issued) = self.meta.roster.approve(&self.identity, record) {
            self.publish_removal(now, issued, out);
            // It may have been the approval that was missing.
            self.on_roster(now, out);
        }
    }

    /// Those that are no members any more: the removed, and whom they let in at last. Nothing is said to them, and nothing
    /// heard of them.
    pub(super) fn cut_off_strangers(&mut self, now: Now, out: &mut Vec<Output>) {
        let linked = self.sessions.linked().chain(self.membership.known());
        let strangers: BTreeSet<NodeId> = linked
            .filter(|id| *id != self.me && !self.roster().is_member(id))
            .collect();
        self.tell_removed(now, &strangers, out);
        for id in strangers {
            self.membership
                .remove(now, id, &mut self.buffers.membership);
            self.sync.on_peer_down(&id);
            if !mutation::is_on(Mutation::KeepSessions) {
                self.sessions.forget_peer(&id, &mut self.buffers.sessions);
            }
        }
    }

    /// Tells those that were just removed, over the session that ends now, and this host's people if it is this node.
    fn tell_removed(&mut self, now: Now, removed: &BTreeSet<NodeId>, out: &mut Vec<Output>) {
        for id in removed {
            if !self.sessions.peers().any(|session| session.peer == *id) {
                continue;
            }
            let above = self.roster().removed_above(id);
            let record = above.and_then(|above| self.roster().revocation(&above));
            let record = record.map(<[u8]>::to_vec);
            if let Some(bytes) = record.map(|record| roster_frame(&record)) {
                self.sessions.send(
                    now,
                    id,
                    &Message::Sync(bytes),
                    &self.meta.roster,
                    &mut self.buffers.sessions,
                );
            }
        }
        if !self.is_member() && !self.leaving && self.told.insert("removed".to_owned()) {
            let above = self.roster().removed_above(&self.me);
            let removed = above.and_then(|id| Some((id, self.roster().revoked().get(&id)?.by)));
            let text = match removed {
                Some((above, by)) => self.removed_text(above, by),
                None => Self::left_out_text(),
            };
            out.push(Output::Alarm(text));
            let peers: Vec<NodeId> = self.sessions.peers().map(|session| session.peer).collect();
            for peer in peers {
                self.sessions.drop_peer(&peer, &mut self.buffers.sessions);
            }
            self.membership.leave(&mut self.buffers.membership);
            self.view_changed = true;
            self.tunnels_changed = true;
        }
    }

    fn revoke(
        &mut self,
        now: Now,
        subject: &NodeId,
        out: &mut Vec<Output>,
    ) -> Result<(), RosterError> {
        // What this node can show to others, so that all can know that they know all of it.
        let last = self.catalog.state_of(subject).complete;
        let issued = self.meta.roster.revoke(&self.identity, *subject, last)?;
        self.publish_removal(now, issued, out);
        Ok(())
    }

    fn publish_removal(&mut self, now: Now, mut issued: Issued, out: &mut Vec<Output>) {
        let pruned = self.catalog.prune(&self.meta.roster);
        issued.change.batch.append(pruned);
        let change = &issued.change;
        let is_news = !change.admitted.is_empty() || !change.revoked.is_empty();
        self.publish_roster(now, issued, Vec::new(), out);
        // A word of this node may make another's count.
        if is_news {
            self.members_follow(now, out);
        }
    }

    /// Says of removals by others that they were heard of here, unless enough said so or others are to: a removal must
    /// outlive its issuer.
    pub(super) fn witness_removals(&mut self, now: Now, out: &mut Vec<Output>) {
        let digest = self.roster().digest();
        if self.space.witnessed == Some(digest) || self.roster().revoked().is_empty() {
            return;
        }
        let mut present = self.alive_peers();
        present.insert(self.me);
        let revoked = self.roster().revoked().iter();
        let unseen: Vec<[u8; 32]> = revoked
            .filter(|(id, revoked)| revoked.by != self.me && revoked.by != **id)
            .filter(|(_, revoked)| {
                let seen = self.roster().witnesses(&revoked.record);
                let others = present.iter().filter(|id| **id != revoked.by);
                let unheard = others.filter(|id| !seen.contains(*id));
                let mut next = unheard.take(WITNESSES.saturating_sub(seen.len()));
                next.any(|id| *id == self.me)
            })
            .map(|(_, revoked)| revoked.record)
            .collect();
        for record in unseen {
            if let Ok(issued) = self.meta.roster.witness(&self.identity, record) {
                self.publish_removal(now, issued, out);
            }
        }
        self.space.witnessed = Some(self.roster().digest());
    }

    /// Who was removed stays so. The removal may have been on a branch of a forked chain that this node has left. To say it
    /// twice would change nothing.
    pub(super) fn keep_removed(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready || !self.is_member() || mutation::is_on(Mutation::ForgetWitnesses) {
            return;
        }
        let waits = |id: &NodeId| self.roster().pending().iter().any(|p| p.subject == *id);
        let seen = self.space.seen_removed.iter();
        let back: Vec<NodeId> = seen
            .filter(|id| **id != self.me && self.roster().is_member(id) && !waits(id))
            .filter(|id| !self.roster().has_revoked(&self.me, id))
            .copied()
            .collect();
        for id in back {
            // Who may not remove leaves it to those who may.
            let _ = self.revoke(now, &id, out);
        }
    }

    /// A person here says so too: the removal has one approval more.
    fn confirm(&mut self, now: Now, subject: &NodeId, out: &mut Vec<Output>) {
        let record = self
            .roster()
            .revoked()
            .get(subject)
            .filter(|revoked| revoked.by != self.me)
            .map(|revoked| revoked.record);
        if let Some(record) = record {
            self.approve_removal(now, record, out);
        }
    }

    fn declare_destroyed(&mut self, now: Now, subject: &NodeId, out: &mut Vec<Output>) {
        let vote = Vote {
            gone: Some(Vote::BY_FORCE),
            ..self.own_vote(subject)
        };
        let _ = self.put(now, &Object::Vote(vote), Vec::new(), out);
        self.take_by_force(now, subject, out);
    }

    fn after_removal(&mut self, now: Now, out: &mut Vec<Output>) {
        self.on_roster(now, out);
        self.on_catalog(now, out);
        self.answer_removals(now, out);
    }

    /// A member by its name or its id, or a removed node that still blocks addresses.
    fn find_node(&self, text: &str) -> Result<(NodeId, String), (ErrorKind, String)> {
        let blocking = self.removed().into_iter();
        let blocking = blocking.filter(|id| !self.ring.parts(id).is_empty());
        let members = self.roster().members().map(|member| member.id);
        let known: BTreeSet<NodeId> = members.chain(blocking).collect();
        let is_meant =
            |id: &NodeId| self.name_of(id) == text || id.to_string() == text || id.short() == text;
        let meant: Vec<NodeId> = known.into_iter().filter(is_meant).collect();
        match meant.as_slice() {
            [] => Err((
                ErrorKind::NotFound,
                format!("there is no node \"{text}\"; see: weft node ls"),
            )),
            [id] if *id == self.me => Err((
                ErrorKind::Invalid,
                "this is the node itself: to leave for good run `weft reset` here".to_owned(),
            )),
            [id] => Ok((*id, self.name_of(id))),
            several => {
                let ids: Vec<String> = several.iter().map(NodeId::short).collect();
                let text = format!(
                    "{} nodes are called \"{text}\"; say which: {}",
                    several.len(),
                    ids.join(", ")
                );
                Err((ErrorKind::Conflict, text))
            }
        }
    }

    fn pending_text(&self, name: &str) -> String {
        let own = self.roster().pending().iter();
        let mut own = own.filter(|pending| pending.issuer == self.me);
        let before = own.find_map(|pending| self.roster().subject_of(&pending.waits_for));
        let before = before.map_or_else(|| "another node".to_owned(), |id| self.name_of(&id));
        format!(
            "{name} is not removed yet: this node removed {before} before, and its next removal counts only once a \
             majority agrees with that one; run on other nodes: weft node rm {before}"
        )
    }

    fn blocked_text(&self, removing: &Removing) -> String {
        let (missing, more) = self.missing_votes(&removing.subject);
        let names_of =
            |ids: Vec<NodeId>| -> Vec<String> { ids.iter().map(|id| self.name_of(id)).collect() };
        let name = &removing.name;
        if more == 0 {
            let unheard = names_of(self.without_note_of(&removing.subject)).join(", ");
            return format!(
                "{name} is removed and most of its addresses are back; the rest follow once all nodes have heard of it, \
                 not yet: {unheard} (or now, if it is destroyed: weft node rm {name} --force)"
            );
        }
        let names = names_of(missing);
        let whom = match names.is_empty() {
            true => "no other node can tell what it gave away".to_owned(),
            false => format!(
                "{more} of {} must agree and did not answer",
                names.join(", ")
            ),
        };
        format!(
            "{name} is removed, its key is void; but its addresses stay blocked: {whom}. They come back by themselves when \
             these nodes do; if {name} is destroyed and can't come back: weft node rm {name} --force"
        )
    }
}
