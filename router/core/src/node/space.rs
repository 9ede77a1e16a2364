//! The long life of parts of the range: this node records who decides about its own part, promises to honour what others
//! recorded, takes note of removals, and takes over what a removed node left. The rules are in [`crate::voters`]; here
//! is who does what when. Everything said here is a record, so it is on disk before anybody hears of it, and whoever was
//! away hears it later.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use super::cluster::Cluster;
use super::follow::ring_of;
use super::gifts::Wish;
use super::io::Output;
use crate::ipam::{Ring, subtract};
use crate::model::{EndpointId, NetworkName, NodeId, Now};
use crate::roster::Standing;
use crate::value::{Kind, MAX_LOCKED, MAX_VOTERS, Object, Vote, Voters};
use crate::view::{Endpoint, Liveness};
use crate::voters::Electorate;

/// Sets of voters follow the roster at most so often: ten hosts that join together need one new set, not ten.
const SETTLE: Duration = Duration::from_secs(2);
/// An address that lies in another's part is given up when that has lasted so long: where it was taken by force or another
/// node knows just the same,
const LOST_FOR_SURE: Duration = Duration::from_secs(2);
/// and where nobody confirmed it.
const LOST: Duration = Duration::from_secs(60);
/// Pieces that a node claims at a time.
const CLAIMS: usize = 64;

/// An interval of addresses, both ends included.
pub(super) type Interval = (u32, u32);

/// What this node has to remember between two calls.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// The set of voters is not looked at before.
    pub(super) next_set: Now,
    /// Everything is to be looked at again then.
    pub(super) due: Option<Now>,
    /// Since when this node has waited for a first part of the default network.
    pub(super) waits_since: Option<Now>,
    /// Members that refused one, and when the next may be asked.
    pub(super) refused_by: BTreeSet<NodeId>,
    pub(super) ask_again: Now,
    /// Addresses that somebody waits for and that voters guard.
    pub(super) wanted: BTreeSet<Interval>,
    /// Members that wait for space which voters guard.
    pub(super) wishes: Vec<Wish>,
    /// Nodes that a member's vote says are destroyed: read from the catalog once for every change of such votes.
    pub(super) destroyed: BTreeSet<NodeId>,
    /// Nodes that were Down here when their removal was heard of.
    pub(super) found_down: BTreeSet<NodeId>,
    /// Endpoints of this node whose addresses lie in another's part, and since when.
    pub(super) lost: BTreeMap<EndpointId, Now>,
    /// Revisions of votes by force, when the destroyed nodes were read, of own votes and of sets of voters, and the roster's
    /// digest, for which nothing was left to promise.
    promised: Option<(Option<u64>, u64, u64, u64)>,
    /// The roster's digest for which enough was said to have been heard of.
    pub(super) witnessed: Option<u64>,
    /// Removals that were looked at.
    pub(super) seen_removed: BTreeSet<NodeId>,
}

impl Space {
    /// Everything is to be looked at again by then.
    pub(super) fn wake(&mut self, at: Now) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

impl Cluster {
    /// All of it, after every change of roster or catalog.
    pub(super) fn tend_space(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready || self.leaving || !self.is_member() {
            return;
        }
        self.look_at_removals();
        self.witness_removals(now, out);
        self.keep_what_was_mine(now, out);
        self.take_back(now, out);
        self.promise(now, out);
        self.take_note(now, out);
        self.take_over(now, out);
        self.readdress(now, out);
        self.approve(now, out);
        self.record_voters(now, out);
        self.apply_locks();
        self.give_what_waited(now, out);
    }

    /// Time passed.
    pub(super) fn tend_space_when_due(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.space.due.is_some_and(|due| due <= now) {
            self.space.due = None;
            self.tend_space(now, out);
        }
    }

    pub(super) fn is_member(&self) -> bool {
        self.roster().is_member(&self.me)
    }

    /// Those whose parts nobody may use any more.
    pub(super) fn removed(&self) -> BTreeSet<NodeId> {
        self.roster().revoked().keys().copied().collect()
    }

    /// What an owner's voters think, as far as it is known here.
    pub(super) fn electorate(&self, owner: &NodeId) -> Option<Electorate<'_>> {
        self.catalog.electorate(owner, &self.destroyed())
    }

    fn destroyed(&self) -> BTreeSet<NodeId> {
        let mut destroyed = self.space.destroyed.clone();
        destroyed.retain(|id| self.roster().revoked().contains_key(id));
        destroyed
    }

    pub(super) fn vote_on(&self, owner: NodeId) -> impl Fn(&NodeId) -> Option<Vote> {
        move |voter| self.catalog.vote(voter, &owner)
    }

    /// Did the owner remove itself?
    pub(super) fn left_by_itself(&self, owner: &NodeId) -> bool {
        let revoked = self.roster().revoked().get(owner);
        revoked.is_some_and(|revoked| revoked.by == *owner)
    }

    pub(super) fn look_at_removals(&mut self) {
        let new: Vec<NodeId> = self
            .removed()
            .difference(&self.space.seen_removed)
            .copied()
            .collect();
        for id in new {
            self.space.seen_removed.insert(id);
            if self.liveness(&id) == Liveness::Down {
                self.space.found_down.insert(id);
            }
        }
    }

    /// A removal names the last record of the removed node that counts, as far as the remover knew. What the removed node
    /// gave to this one after that is this one's by its own word now: it is in use here, its giver's voters never had it.
    fn keep_what_was_mine(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.kept_ring == self.ring {
            return;
        }
        let before = std::mem::replace(&mut self.kept_ring, self.ring.clone());
        let removed = self.removed();
        if removed.is_empty() {
            return;
        }
        let mut lost = Vec::new();
        for (start, last) in before.parts(&self.me) {
            for (owner, first, end) in self.ring.owners_of(start, last) {
                if removed.contains(&owner) {
                    lost.push((first, end));
                }
            }
        }
        lost.retain(|part| !self.gave_away_since(*part, &before));
        self.claim(now, lost.into_iter().take(CLAIMS), out);
    }

    /// Writes that these parts are this node's.
    fn claim(
        &mut self,
        now: Now,
        parts: impl IntoIterator<Item = Interval>,
        out: &mut Vec<Output>,
    ) {
        for (start, last) in parts {
            let grant = self.ring.takeover(start, last, self.me, false);
            let _ = self.put(now, &Object::Grant(grant), Vec::new(), out);
        }
    }

    /// Has this node given away any of what was its own before? A disk that was a backup did not know it.
    fn gave_away_since(&self, (start, last): Interval, before: &Ring) -> bool {
        let next = before.takeover(start, last, self.me, false);
        let grants = self.catalog.grants();
        let mut own = grants.iter().filter(|(by, _)| *by == self.me);
        own.any(|(_, grant)| {
            let overlaps = grant.start <= last && start <= grant.last;
            overlaps && grant.to != self.me && grant.version >= next.version
        })
    }

    /// Whom the branch of a forked chain let in that nobody holds any more is known to nobody: what this node gave it is
    /// this node's again. Once it agrees with others: a restored disk may not know yet who came since.
    fn take_back(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.roster().forks().is_empty() {
            return;
        }
        let me = self.me;
        let gifts = self.catalog.grants();
        let gifts = gifts.iter().filter(|(by, grant)| {
            *by == me && self.roster().standing(&grant.to) == Standing::Unknown
        });
        let parts = gifts.flat_map(|(_, grant)| {
            let held = self.ring.parts(&grant.to);
            intersect(&held, &[(grant.start, grant.last)])
        });
        let parts: Vec<Interval> = parts.take(CLAIMS).collect();
        if parts.is_empty() {
            return;
        }
        if self.sync.agreed().is_none() {
            return self.space.wake(now.plus(SETTLE));
        }
        self.claim(now, parts, out);
    }

    /// Honours the sets of voters that other nodes recorded.
    fn promise(&mut self, now: Now, out: &mut Vec<Output>) {
        let me = self.me;
        let known = (
            self.seen_forced_votes,
            self.catalog.own_votes_revision(),
            self.catalog.sets_revision(),
            self.roster().digest(),
        );
        if self.space.promised == Some(known) {
            return;
        }
        self.space.promised = Some(known);
        let owners: Vec<NodeId> = self.roster().members().map(|member| member.id).collect();
        for owner in owners.into_iter().filter(|owner| *owner != me) {
            let asked = self
                .electorate(&owner)
                .and_then(|electorate| electorate.wants_promise_of(&me));
            let Some(version) = asked else { continue };
            let said = self.own_vote(&owner);
            if said.gone.is_none() && said.seen < version {
                self.space.promised = None;
                let vote = Vote {
                    seen: version,
                    ..said
                };
                let _ = self.put(now, &Object::Vote(vote), Vec::new(), out);
            }
        }
    }

    /// Takes note of removals: says so once all that the removed node wrote and that counts is known here, and all that
    /// it gave to this node is written down.
    fn take_note(&mut self, now: Now, out: &mut Vec<Output>) {
        let removals = self.removals();
        if removals.is_empty() {
            return;
        }
        let voters = self.voters_among(&removals);
        for (subject, last_sequence) in removals {
            let said = self.own_vote(&subject);
            if !self.ring.has_parts(&subject) && !voters.contains(&subject) {
                if said.gone.is_some_and(|version| version != Vote::BY_FORCE) {
                    let key = Object::Vote(said).key();
                    let _ = self.remove(now, Kind::VOTE, &key, Vec::new(), out);
                }
                continue;
            }
            if said.notes(last_sequence) || !self.knows_all_of(&subject, last_sequence) {
                continue;
            }
            let version = self.electorate(&subject).map_or(0, |electorate| {
                electorate.current(self.vote_on(subject)).version
            });
            let vote = Vote {
                gone: said.gone.or(Some(version.max(said.seen))),
                upto: last_sequence,
                ..said
            };
            let _ = self.put(now, &Object::Vote(vote), Vec::new(), out);
        }
    }

    /// All that a removed node wrote and that counts, its roster records too?
    fn knows_all_of(&self, subject: &NodeId, last_sequence: u64) -> bool {
        self.catalog.state_of(subject).complete >= last_sequence
            && self.roster().knows_whom_it_let_in(subject)
    }

    /// Those of them who decide about anybody's space. As long as a removed node does its word may be waited for.
    fn voters_among(&self, removals: &[(NodeId, u64)]) -> BTreeSet<NodeId> {
        let decides = |id: &NodeId| {
            let mut sets = self.catalog.sets_of_voters();
            sets.any(|(owner, set)| {
                owner != *id && set.voters.contains(id) && self.ring.has_parts(&owner)
            })
        };
        let removed = removals.iter().map(|(id, _)| *id);
        removed.filter(decides).collect()
    }

    /// Takes over what removed nodes left, where this node is the heir.
    fn take_over(&mut self, now: Now, out: &mut Vec<Output>) {
        for (subject, last_sequence) in self.removals() {
            // A vote from before this disk was a backup doesn't say what is known now.
            if !self.ring.has_parts(&subject) || !self.knows_all_of(&subject, last_sequence) {
                continue;
            }
            // Somebody may have given it something that was not known when it was said to be destroyed.
            if self.own_vote(&subject).gone == Some(Vote::BY_FORCE) {
                self.take_by_force(now, &subject, out);
                continue;
            }
            // Having taken note, it knows all that the subject gave away.
            if !self.own_vote(&subject).notes(last_sequence) || !self.is_heir_of(&subject) {
                continue;
            }
            let Some(allowed) = self.free_of(&subject) else {
                continue;
            };
            self.claim(now, allowed, out);
        }
    }

    /// Takes all that a removed node left, by force. Its removal may just have made earlier takeovers count.
    pub(super) fn take_by_force(&mut self, now: Now, subject: &NodeId, out: &mut Vec<Output>) {
        let ring = ring_of(&self.meta, &self.catalog);
        for (start, last) in ring.parts(subject) {
            let grant = ring.takeover(start, last, self.me, true);
            let _ = self.put(now, &Object::Grant(grant), Vec::new(), out);
        }
    }

    fn is_heir_of(&self, subject: &NodeId) -> bool {
        let Some(electorate) = self.electorate(subject) else {
            return false;
        };
        let vote = self.vote_on(*subject);
        let Some(set) = electorate.decided(vote, self.left_by_itself(subject)) else {
            return false;
        };
        let removed = self.removed();
        // Whoever comes before this node in the list inherits, unless it is itself gone by its own voters' word.
        let first = electorate
            .heirs(set)
            .find(|heir| !(removed.contains(heir) && self.is_decided(heir)));
        first == Some(self.me)
    }

    /// Has the majority taken note that it is gone, or everybody?
    pub(super) fn is_decided(&self, subject: &NodeId) -> bool {
        let by_itself = self.left_by_itself(subject);
        let by_majority = self.electorate(subject).is_some_and(|electorate| {
            electorate
                .decided(self.vote_on(*subject), by_itself)
                .is_some()
        });
        by_majority || self.without_note_of(subject).is_empty()
    }

    /// What of a removed node's parts may be used by now: what its voters guarded, as soon as their majority has taken
    /// note; the rest, which it could have given to anybody, when everybody has.
    fn free_of(&self, subject: &NodeId) -> Option<Vec<Interval>> {
        let electorate = self.electorate(subject)?;
        let vote = self.vote_on(*subject);
        let set = electorate.decided(&vote, self.left_by_itself(subject))?;
        let parts = self.ring.parts(subject);
        match self.without_note_of(subject).is_empty() {
            true => Some(parts),
            false => Some(intersect(&parts, &set.locked)),
        }
    }

    /// Members that have not said yet that they know all that a removed node wrote and that counts. Of two removals the
    /// one counts that knew more: who only heard of the other may not know yet what it must keep.
    pub(super) fn without_note_of(&self, subject: &NodeId) -> Vec<NodeId> {
        let Some(last_sequence) = self
            .roster()
            .revoked()
            .get(subject)
            .map(|r| r.last_sequence)
        else {
            return Vec::new();
        };
        let vote = self.vote_on(*subject);
        let members = self.roster().members().map(|member| member.id);
        members
            .filter(|member| vote(member).is_none_or(|vote| !vote.notes(last_sequence)))
            .collect()
    }

    /// The voters whose word on a removed node's space is missing, and how many it still takes.
    pub(super) fn missing_votes(&self, subject: &NodeId) -> (Vec<NodeId>, usize) {
        let Some(electorate) = self.electorate(subject) else {
            return (Vec::new(), 1);
        };
        let vote = self.vote_on(*subject);
        let set = electorate.current(&vote);
        let (have, need) = electorate.tally(set, &vote, self.left_by_itself(subject));
        let missing = electorate
            .heirs(set)
            .filter(|voter| vote(voter).is_none_or(|vote| vote.gone.is_none()));
        (missing.collect(), need.saturating_sub(have))
    }

    /// Removed nodes that still own something, or that this node voted on, with the last of their records that counts.
    fn removals(&self) -> Vec<(NodeId, u64)> {
        let revoked = self.roster().revoked().iter();
        revoked
            .filter(|(id, _)| **id != self.me)
            .map(|(id, revoked)| (*id, revoked.last_sequence))
            .collect()
    }

    pub(super) fn own_vote(&self, subject: &NodeId) -> Vote {
        let key = subject.0;
        match self.catalog.own_object(&self.me, Kind::VOTE, &key) {
            Some(Object::Vote(vote)) => vote,
            _ => Vote {
                subject: *subject,
                seen: 0,
                gone: None,
                upto: 0,
            },
        }
    }

    /// A first removal by somebody waits for nobody, the next for a majority's approval of the first: what this node saw
    /// dead by itself it approves by itself.
    fn approve(&mut self, now: Now, out: &mut Vec<Output>) {
        let waits: Vec<[u8; 32]> = self
            .roster()
            .pending()
            .iter()
            .map(|pending| pending.waits_for)
            .collect();
        for record in waits {
            let seen_dead = self.roster().revoked().iter().any(|(id, revoked)| {
                revoked.record == record && self.space.found_down.contains(id)
            });
            if seen_dead {
                self.approve_removal(now, record, out);
            }
        }
    }

    /// The ring gives addresses that are in use here to somebody else: both sides of a split took a removed node's part by
    /// force, and the other side's word holds. The containers keep running, under other addresses.
    ///
    /// A node that just came out of a backup knows its own endpoints again before it knows who gave it their addresses:
    /// so the loss must last, or be news that others agree with.
    fn readdress(&mut self, now: Now, out: &mut Vec<Output>) {
        let before = std::mem::take(&mut self.space.lost);
        for (owner, endpoint) in self.own_endpoints_elsewhere() {
            let since = before.get(&endpoint.id).copied().unwrap_or(now);
            let agreed = self.sync.agreed().is_some_and(|at| at > since);
            let patience = match agreed || self.ring.was_forced(endpoint.ip) {
                true => LOST_FOR_SURE,
                false => LOST,
            };
            if now.since(since) < patience {
                self.space.lost.insert(endpoint.id, since);
                self.space.due = Some(now.plus(LOST_FOR_SURE));
                continue;
            }
            let old = endpoint.ip;
            let Some(ip) = self.another_address(&endpoint.network) else {
                self.space.lost.insert(endpoint.id, since);
                self.ask_for_first_space(now);
                self.space.wake(now.plus(SETTLE));
                continue;
            };
            let names: Vec<String> = endpoint.names.iter().map(ToString::to_string).collect();
            out.push(Output::Alarm(format!(
                "{old} of {} belongs to node {} now, which took it while the nodes did not hear each other: it is {ip} \
                 from now on",
                if names.is_empty() { endpoint.id.to_string() } else { names.join(", ") },
                self.name_of(&owner)
            )));
            let moved = Endpoint { ip, ..endpoint };
            let _ = self.put(now, &Object::Endpoint(moved), Vec::new(), out);
        }
    }

    /// Own endpoints with addresses that are others' now, and whose.
    fn own_endpoints_elsewhere(&self) -> Vec<(NodeId, Endpoint)> {
        let others = |ip| self.ring.owner(ip).filter(|owner| *owner != self.me);
        let mine = self.catalog.endpoints_of(&self.me);
        mine.filter_map(|endpoint| Some((others(endpoint.ip)?, endpoint.clone())))
            .collect()
    }

    fn another_address(&mut self, network: &NetworkName) -> Option<Ipv4Addr> {
        let net = self.network(network)?;
        self.allocator.allocate(&net).ok()
    }

    /// What may be given away follows from what the voters guard.
    fn apply_locks(&mut self) {
        let me = self.me;
        let own = self.electorate(&me);
        let Some(own) = own else {
            return self.allocator.set_locked(Vec::new(), false);
        };
        let vote = self.vote_on(me);
        let set = own.current(&vote);
        let up = set
            .voters
            .iter()
            .filter(|voter| **voter == me || self.liveness(voter) != Liveness::Down);
        let thrifty = up.count() * 2 <= set.voters.len();
        let locked = own.locked(&vote);
        drop(vote);
        self.allocator.set_locked(locked, thrifty);
    }

    /// Records who decides about this node's part, when that changed.
    fn record_voters(&mut self, now: Now, out: &mut Vec<Output>) {
        let me = self.me;
        let own = self.electorate(&me);
        let settled = own
            .as_ref()
            .is_none_or(|own| own.is_settled(self.vote_on(me)));
        let urgent = !self.space.wanted.is_empty();
        if !settled {
            return;
        }
        if now < self.space.next_set && !urgent {
            self.space.wake(self.space.next_set);
            return;
        }
        let before = own.as_ref().map(Electorate::newest).cloned();
        let voters = self.choose_voters(before.as_ref());
        if voters.len() < 2 {
            return;
        }
        let keeps_voters = before
            .as_ref()
            .is_some_and(|before| before.voters == voters);
        let keeps_locks = before
            .as_ref()
            .is_some_and(|before| self.locks_do(&before.locked));
        if keeps_voters && keeps_locks && !urgent {
            return;
        }
        self.space.next_set = now.plus(SETTLE);
        let locked = self.choose_locks();
        let set = Voters {
            version: before.as_ref().map_or(0, |before| before.version) + 1,
            base: before.as_ref().map_or(0, |before| before.version),
            voters,
            locked,
        };
        if before.is_some_and(|before| before.voters == set.voters && before.locked == set.locked) {
            return;
        }
        let _ = self.put(now, &Object::Voters(set), Vec::new(), out);
    }

    /// This node, those who are voters already, then other members that are up, then the rest.
    fn choose_voters(&self, before: Option<&Voters>) -> Vec<NodeId> {
        let may = |id: &NodeId| self.roster().may_vote(id);
        let mut voters = vec![self.me];
        let old = before
            .into_iter()
            .flat_map(|before| &before.voters)
            .copied();
        let mut others: Vec<(bool, u32, NodeId)> = self
            .roster()
            .members()
            .map(|member| {
                let down = self.liveness(&member.id) == Liveness::Down;
                (down, member.depth, member.id)
            })
            .collect();
        others.sort_unstable();
        for id in old.chain(others.into_iter().map(|(_, _, id)| id)) {
            if voters.len() < MAX_VOTERS && !voters.contains(&id) && may(&id) {
                voters.push(id);
            }
        }
        voters
    }

    /// All but what the next node that asks would get, and what somebody waits for.
    fn choose_locks(&self) -> Vec<Interval> {
        let mut open: Vec<Interval> = self.space.wanted.iter().copied().collect();
        open.extend(self.allocator.reserves(&self.network_blocks()));
        let mut locked = subtract(&self.ring.parts(&self.me), &open);
        if locked.len() > MAX_LOCKED {
            locked.sort_by_key(|(start, last)| std::cmp::Reverse(last - start));
            locked.truncate(MAX_LOCKED);
            locked.sort_unstable();
        }
        locked
    }

    /// Are these locks still good: do they leave something to give where there is something, and most of the rest not?
    fn locks_do(&self, locked: &[Interval]) -> bool {
        let parts = self.ring.parts(&self.me);
        let all: u64 = parts.iter().map(size).sum();
        let open: u64 = subtract(&parts, locked).iter().map(size).sum();
        let gives = self
            .allocator
            .reserves(&self.network_blocks())
            .iter()
            .all(|reserve| !subtract(&[*reserve], locked).is_empty());
        // A half is what a fresh set leaves open.
        gives && open * 8 <= all * 5
    }
}

fn size((start, last): &Interval) -> u64 {
    u64::from(last - start) + 1
}

/// What of `parts` lies in `of`.
pub(super) fn intersect(parts: &[Interval], of: &[Interval]) -> Vec<Interval> {
    let mut both = Vec::new();
    for (start, last) in parts {
        for (from, to) in of {
            let (first, end) = (*start.max(from), *last.min(to));
            if first <= end {
                both.push((first, end));
            }
        }
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_cut_where_they_should_be() {
        let parts = [(10, 20), (30, 40)];
        assert_eq!(
            subtract(&parts, &[(12, 13), (18, 32)]),
            [(10, 11), (14, 17), (33, 40)]
        );
        assert_eq!(subtract(&parts, &[(0, 50)]), []);
        assert_eq!(subtract(&parts, &[]), parts);
        assert_eq!(subtract(&[(0, u32::MAX)], &[(5, u32::MAX)]), [(0, 4)]);
        assert_eq!(intersect(&parts, &[(15, 35)]), [(15, 20), (30, 35)]);
    }
}
