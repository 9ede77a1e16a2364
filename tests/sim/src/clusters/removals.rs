//! The people who remove nodes for good: those that are dead, those that came back with an empty disk as somebody else,
//! and those that they don't want any more.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_core::catalog::Catalog;
use weft_core::control::ErrorKind;
use weft_core::model::{NodeId, Now};
use weft_core::node::{Command, CommandError};
use weft_core::roster::{Roster, Standing};

use super::Cluster;
use super::people::Wish;
use crate::faults::Action;
use crate::nodes::{Shell, identity_of};

/// Who did not succeed tries again after this, on some host.
const TRY_AGAIN: Duration = Duration::from_secs(12);
/// Somebody notices an empty disk after up to this.
const NOTICED_MILLIS: u64 = 8_000;

/// A node that is to go.
pub(super) struct Removal {
    id: NodeId,
    at: Now,
    /// So many people do it at once.
    people: usize,
    force: bool,
    /// Hosts where it was tried in vain: the answer says to try others.
    tried: BTreeSet<usize>,
}

impl Removal {
    fn new(id: NodeId, at: Now, people: usize, force: bool) -> Self {
        Self {
            id,
            at,
            people,
            force,
            tried: BTreeSet::new(),
        }
    }
}

impl Cluster {
    /// A host has lost its disk: who it was never comes back, and people say so.
    pub(super) fn on_wiped(&mut self, host: usize) {
        self.ledger.forget(host, |_| false);
        self.ledger.evicted.remove(&host);
        self.ledger.lying.remove(&host);
        let (of, lost) = self.world.hosts[host].key();
        let id = identity_of(self.seed, (of, lost.saturating_sub(1))).id();
        let noticed = Duration::from_millis(self.random.range(NOTICED_MILLIS));
        let at = self.world.now.plus(noticed);
        match self.removals.iter_mut().find(|removal| removal.id == id) {
            Some(removal) => removal.force = true,
            None => self.removals.push(Removal::new(id, at, 1, true)),
        }
    }

    /// People remove who is on this host.
    pub(super) fn on_removal(&mut self, host: usize, people: usize, force: bool) {
        let id = identity_of(self.seed, self.world.hosts[host].key()).id();
        self.ledger.forget(host, |_| false);
        self.ledger.evicted.insert(host);
        self.removals
            .push(Removal::new(id, self.world.now, people, force));
    }

    /// People see that a node should go.
    pub(super) fn remove_soon(&mut self, id: NodeId) {
        let at = self.world.now.plus(TRY_AGAIN);
        self.removals.push(Removal::new(id, at, 1, true));
    }

    /// Of what this host has heard somebody may be no member any more.
    pub(super) fn look_whom_that_voids(&mut self, host: usize) {
        let shell = self.world.hosts[host].machine.as_ref();
        let roster = shell.and_then(|shell| shell.node().roster());
        let may_be_void = self.may_divide() || self.ledger.divided;
        let Some(digest) = roster.map(Roster::digest).filter(|_| may_be_void) else {
            return;
        };
        if self.rosters.insert(host, digest) != Some(digest) {
            (0..self.world.hosts.len()).for_each(|host| self.look_who_let_in(host));
        }
    }

    /// Who was let in by a removed node that had not heard of it yet is no member, and nothing that it says counts: what
    /// it was given, or gave, is its giver's again.
    pub(super) fn look_who_let_in(&mut self, host: usize) {
        self.leave_out_if_void(host, false);
    }

    pub(super) fn leave_out_if_void(&mut self, host: usize, for_any: bool) {
        if self.ledger.evicted.contains(&host) || !self.is_void(host, for_any) {
            return;
        }
        if let Some(id) = self.world.hosts[host].machine.as_ref().map(Shell::id) {
            let parts = self.space_of(&id);
            let gifts = self.gifts_of(&id);
            self.ledger.dispute(parts.into_iter().chain(gifts));
        }
        self.ledger.forget(host, |_| false);
        self.ledger.evicted.insert(host);
    }

    /// All that a node gave away according to anybody.
    fn gifts_of(&self, id: &NodeId) -> Vec<(u32, u32)> {
        let catalogs = self
            .world
            .running()
            .filter_map(|(_, shell)| shell.node().catalog());
        let grants = catalogs.flat_map(Catalog::grants);
        let gifts = grants.filter(|(by, _)| by == id);
        gifts.map(|(_, grant)| (grant.start, grant.last)).collect()
    }

    /// Is this host no member for others, be they removed themselves?
    fn is_void(&self, host: usize, for_any: bool) -> bool {
        let shell = self.world.hosts[host].machine.as_ref();
        let Some((shell, roster)) = shell.and_then(|shell| Some((shell, shell.node().roster()?)))
        else {
            return false;
        };
        // It may be the first to hear of it.
        let above = roster.removed_above(&shell.id());
        if !roster.is_member(&shell.id()) && (above.is_some() || !roster.forks().is_empty()) {
            return true;
        }
        let mut at = shell.id();
        while let Some(keys) = roster.member(&at).filter(|keys| keys.depth > 0) {
            let (issuer, index) = keys.admitted_by;
            let mut others = self
                .world
                .running()
                .filter(|(other, _)| for_any || !self.ledger.evicted.contains(other));
            let void = others.any(|(_, other)| {
                let roster = other.node().roster();
                let revoked =
                    roster.and_then(|roster| Some((roster, roster.revoked().get(&issuer)?)));
                // It may have been let in by the other branch of a forked chain; who has not heard of it says nothing.
                revoked.is_some_and(|(roster, revoked)| {
                    let mut held = roster.records_from(&issuer, index);
                    let is_other = roster.standing(&at) == Standing::Unknown;
                    revoked.valid_links <= index || (held.next().is_some() && is_other)
                })
            });
            if void {
                return true;
            }
            at = issuer;
        }
        false
    }

    /// A host says that it is no member because of who let it in: its people begin anew there.
    pub(super) fn is_told_to_begin_anew(&mut self, host: usize) -> bool {
        // Who told it so may be about to go.
        self.leave_out_if_void(host, true);
        let void = self.ledger.evicted.contains(&host);
        if void {
            let at = self.world.now.plus(TRY_AGAIN);
            self.world.schedule(at, Action::Wipe(host));
            self.world.schedule(at, Action::Boot(host));
        }
        void
    }

    /// In the end nobody waits for the majority any more.
    pub(super) fn remove_by_force(&mut self) {
        for removal in &mut self.removals {
            removal.force = true;
            removal.people = 1;
        }
    }

    /// Whoever has not succeeded tries again.
    pub(super) fn remove_again(&mut self) {
        self.see_what_blocks();
        let now = self.world.now;
        let due = self.removals.iter_mut().filter(|removal| removal.at <= now);
        let due: Vec<(NodeId, usize, bool)> = due
            .map(|removal| {
                removal.at = now.plus(TRY_AGAIN);
                (removal.id, removal.people, removal.force)
            })
            .collect();
        for (id, people, force) in due {
            for _ in 0..people {
                let Some(host) = self.untried(&id) else {
                    break;
                };
                if force {
                    let parts = self.space_of(&id);
                    self.ledger.dispute(parts);
                }
                let node = id.to_string();
                self.ask(host, Wish::Remove(id), Command::RemoveNode { node, force });
            }
        }
    }

    /// What a host took over is free no more when that host is removed by somebody who had not heard of it, or when it ran
    /// twice and its other copy is believed: whoever was removed blocks addresses again, and people see that.
    fn see_what_blocks(&mut self) {
        if !self.calm {
            return;
        }
        let at = self.world.now.plus(TRY_AGAIN);
        let views =
            (0..self.hosts).filter_map(|host| self.world.hosts[host].machine.as_mut()?.view());
        let blocked: BTreeSet<NodeId> = views.flat_map(|view| view.blocked).map(|b| b.id).collect();
        for id in blocked {
            if self.removals.iter().all(|removal| removal.id != id) {
                self.removals.push(Removal::new(id, at, 1, true));
            }
        }
    }

    /// A host where nobody tried to remove this node yet; any when all were tried.
    fn untried(&mut self, id: &NodeId) -> Option<usize> {
        let able = self.able();
        let at = self.removals.iter().position(|removal| removal.id == *id)?;
        let tried = &self.removals[at].tried;
        let mut fresh = able.clone();
        fresh.retain(|host| !tried.contains(host));
        if fresh.is_empty() {
            self.removals[at].tried.clear();
            fresh = able;
        }
        let host = self.one_of(&fresh)?;
        self.removals[at].tried.insert(host);
        Some(host)
    }

    /// There may be nobody to remove: who never was let in, or who is gone already.
    pub(super) fn on_not_removed(&mut self, id: &NodeId, error: &CommandError) {
        let rosters = || {
            self.world
                .running()
                .filter_map(|(_, shell)| shell.node().roster())
        };
        let nobody = !rosters().any(|roster| roster.is_member(id));
        if error.kind == ErrorKind::NotFound && nobody {
            self.on_removed(id);
        }
    }

    /// A node is removed, and all its space is somebody's.
    pub(super) fn on_removed(&mut self, id: &NodeId) {
        self.removals.retain(|removal| removal.id != *id);
    }
}
