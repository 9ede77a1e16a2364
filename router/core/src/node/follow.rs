//! What follows when the roster or the catalog may have changed: who is greeted and who cut off, who owns which part of the
//! range, which addresses are in use, and what people must be told.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::cluster::Cluster;
use super::io::Output;
use super::meta::Meta;
use crate::catalog::{Catalog, Changes};
use crate::ipam::Ring;
use crate::model::{NodeId, Now};
use crate::roster::Standing;
use crate::value::Kind;

impl Cluster {
    /// The roster may have changed: newcomers are greeted, the revoked are cut off.
    pub(super) fn on_roster(&mut self, now: Now, out: &mut Vec<Output>) {
        let members: Vec<NodeId> = self.meta.roster.members().map(|member| member.id).collect();
        let me = self.me;
        for id in members.iter().filter(|id| **id != me) {
            self.membership.add_seed(*id);
            match self.numbers.assign(*id) {
                Some((_, Some(batch))) => {
                    self.persist(now, batch, Vec::new(), out);
                    self.tunnels_changed = true;
                    self.view_changed = true;
                }
                Some((_, None)) => {}
                None => out.push(Output::Alarm(
                    "this host has no number left for more than 4,094 peers".to_owned(),
                )),
            }
        }
        self.look_at_removals();
        self.cut_off_strangers(now, out);
    }

    /// The roster has changed by what others said: tunnels and picture follow, too.
    pub(super) fn on_members_changed(&mut self, now: Now, out: &mut Vec<Output>) {
        self.keep_removed(now, out);
        self.members_follow(now, out);
    }

    /// All that follows from who is a member.
    pub(super) fn members_follow(&mut self, now: Now, out: &mut Vec<Output>) {
        self.on_roster(now, out);
        self.view_changed = true;
        self.tunnels_changed = true;
    }

    /// The catalog may have changed: addresses, ring and picture follow.
    pub(super) fn on_catalog(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.seen_revision == Some(self.catalog.revision()) {
            return;
        }
        if self.ready {
            let closed = self.catalog.close_own_log();
            self.persist(now, closed, Vec::new(), out);
        }
        self.seen_revision = Some(self.catalog.revision());
        let changes = self.catalog.take_changes();
        for peer in &changes.nodes {
            // What a removed node said of itself still counts; nobody calls it.
            let is_peer = *peer != self.me && self.roster().is_member(peer);
            if is_peer && self.catalog.node(peer).is_some() {
                self.tell_addresses(now, *peer);
            }
        }
        let mine = changes.endpoints.iter().filter(|(of, _)| *of == self.me);
        self.to_house.extend(mine.map(|(_, key)| key.clone()));
        let removed = self.removed();
        let space_changed = self.update_ring();
        let vips = self.plan.vips();
        let services_changed = changes.touch(Kind::SERVICE);
        if self.counted_without.as_ref() != Some(&removed)
            || services_changed
            || changes.touch(Kind::NETWORK)
            || changes.addresses.iter().any(|ip| vips.contains(ip))
        {
            self.count_addresses(now, &removed, out);
        } else {
            if space_changed {
                let networks = self.network_blocks();
                self.allocator.set_ring(&self.ring, &networks);
            }
            let used = |ip: &Ipv4Addr| (*ip, self.catalog.is_held(*ip, &removed));
            let resting = self.allocator.mark(now, changes.addresses.iter().map(used));
            self.persist(now, resting, Vec::new(), out);
        }
        debug_assert!(
            self.allocator
                .in_use()
                .eq(self.catalog.used_addresses(&removed)),
            "one by one or all at once, the same addresses are in use"
        );
        self.tunnels_changed |= space_changed;
        self.follow_shared(now, &changes, out);
        self.view_changed = true;
        self.look_again_soon(now);
        self.retry_waiting(now, out);
        if space_changed {
            self.tend_space(now, out);
            self.answer_removals(now, out);
        }
        if services_changed || space_changed && !self.are_services_apart(now) {
            self.part_services(now, out);
        }
    }

    /// Members were removed, or networks or services changed: which addresses are in use is looked at as a whole.
    fn count_addresses(&mut self, now: Now, removed: &BTreeSet<NodeId>, out: &mut Vec<Output>) {
        let used = self.catalog.used_addresses(removed);
        let networks = self.network_blocks();
        let resting = self.allocator.update(now, &self.ring, &used, &networks);
        self.persist(now, resting, Vec::new(), out);
        self.counted_without = Some(removed.clone());
    }

    /// Cluster-wide objects changed: some may be due later, some may have been created twice.
    fn follow_shared(&mut self, now: Now, changes: &Changes, out: &mut Vec<Output>) {
        let wall = self.wall.micros(now);
        if changes.due || self.next_due.is_some_and(|due| wall >= due) {
            self.next_due = self.catalog.next_due(wall);
            self.services_apart = false;
            let duplicates = self.catalog.duplicates(wall);
            self.tell_duplicates(duplicates, out);
            return;
        }
        let next = self.catalog.next_due_under(&changes.shared, wall);
        self.next_due = self.next_due.into_iter().chain(next).min();
        let duplicates = self.catalog.duplicates_under(&changes.shared, wall);
        self.tell_duplicates(duplicates, out);
    }

    /// Computes the ring anew if anything that it depends on changed. True if anything about the range did, also if that
    /// is only how much is known.
    fn update_ring(&mut self) -> bool {
        let seen = (self.catalog.space_revision(), self.meta.roster.digest());
        if self.seen_space == Some(seen) {
            return false;
        }
        self.seen_space = Some(seen);
        let forced = self.catalog.forced_votes_revision();
        if self.seen_forced_votes.replace(forced) != Some(forced) {
            self.space.destroyed = self.catalog.destroyed();
        }
        debug_assert!(
            self.space.destroyed == self.catalog.destroyed(),
            "who is destroyed follows from votes by force alone"
        );
        let grants = self.catalog.grants_revision();
        let made_of = (grants, self.meta.roster.digest());
        if self.seen_grants.replace(made_of) != Some(made_of) {
            self.ring = ring_of(&self.meta, &self.catalog);
        }
        true
    }
}

/// Who owns what, by all grants but those to nodes that never came in: whom a removed node let in at last owns nothing,
/// and what it was given is still its giver's.
pub(super) fn ring_of(meta: &Meta, catalog: &Catalog) -> Ring {
    let mut grants = catalog.grants();
    grants.retain(|(giver, grant)| !meta.roster.never_came_in(&grant.to, giver));
    let mut removed: BTreeSet<NodeId> = meta.roster.revoked().keys().copied().collect();
    // What went to somebody whom nobody knows any more its giver takes back.
    let strangers = grants.iter().map(|(_, grant)| grant.to);
    removed.extend(strangers.filter(|id| meta.roster.standing(id) == Standing::Unknown));
    Ring::compute(meta.roster.founder(), meta.range, &grants, &removed)
}
