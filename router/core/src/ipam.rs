//! Addresses: the [`Ring`] of parts, each owned by exactly one node, and the [`Allocator`] that hands out this node's
//! own.
//!
//! No node ever hands out an address from another's part, so nobody has to be asked, in any partition. An address is
//! in use from the moment it is handed out; what hands it out writes the record to disk before anybody sees it.

mod block;
mod free;
mod locks;
mod ring;
mod used;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::model::{AddressPlan, NodeId, Now};
use crate::mutation::{self, Mutation};
use crate::store::{Batch, Stored, Table};
use crate::value::Grant;
use crate::view::ADDRESS_REST;

pub use block::{Block, BlockError};
use free::Free;
pub use ring::Ring;
use used::Used;

/// Why an address that was asked for can't be had here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExactError {
    /// Somebody has it.
    #[error("{0} is in use")]
    InUse(Ipv4Addr),
    /// It was freed a moment ago.
    #[error("{0} was freed a moment ago and rests for a minute")]
    Resting(Ipv4Addr),
    /// It lies in another node's part, which must be asked.
    #[error("{ip} belongs to node {owner}")]
    NotOurs {
        /// The address.
        ip: Ipv4Addr,
        /// Who owns it.
        owner: NodeId,
    },
    /// Not in that network, or its first or last address, or DNS.
    #[error("{ip} is no address for an endpoint of {net}")]
    Unusable {
        /// The address.
        ip: Ipv4Addr,
        /// The network.
        net: Ipv4Net,
    },
}

/// Why nothing is given away now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGift {
    /// There is nothing free.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// The very address that was asked for can't be had.
    #[error(transparent)]
    Exact(#[from] ExactError),
    /// The block that was asked for can't become a network.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Voters guard it: they must agree to new guards first.
    #[error("the voters of this node's space must agree first")]
    Guarded(u32, u32),
}

/// This node owns no free address in a network, or too few to give some away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this node has no free addresses left in {0}")]
pub struct Exhausted(pub Ipv4Net);

/// Hands out addresses of this node's own parts.
#[derive(Clone, Debug)]
pub struct Allocator {
    me: NodeId,
    plan: AddressPlan,
    ring: Ring,
    /// By a record in the catalog.
    used: Used,
    /// Handed out, not in the catalog yet.
    reserved: BTreeSet<u32>,
    resting: BTreeMap<u32, Now>,
    /// The same in the order in which they have rested enough.
    rested: BTreeSet<(Now, u32)>,
    /// INVARIANT: own addresses that are none of the above.
    free: Free,
    networks: Vec<Ipv4Net>,
    locked: Vec<(u32, u32)>,
    thrifty: bool,
}

impl Allocator {
    /// Starts with what was on disk. Addresses that rested then rest anew: nobody knows for how long this node was away.
    pub fn new(me: NodeId, plan: AddressPlan, ring: Ring, stored: &Stored, now: Now) -> Self {
        let rows = stored.rows(Table::Resting);
        let until = now.plus(ADDRESS_REST);
        let resting: BTreeMap<u32, Now> = rows
            .filter_map(|(key, _)| Some((u32::from_be_bytes(key.try_into().ok()?), until)))
            .collect();
        let mut allocator = Self {
            me,
            plan,
            ring,
            used: Used::default(),
            reserved: BTreeSet::new(),
            rested: resting.iter().map(|(ip, until)| (*until, *ip)).collect(),
            resting,
            free: Free::default(),
            networks: Vec::new(),
            locked: Vec::new(),
            thrifty: false,
        };
        for (start, last) in allocator.ring.parts(&me) {
            allocator.count_within(start, last);
        }
        allocator
    }

    /// The ring in use.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The catalog changed: this is the ring now, and these addresses are in use by any endpoint or service
    /// ([`crate::catalog::Catalog::used_addresses`]). What is used no longer rests.
    pub fn update(
        &mut self,
        now: Now,
        ring: &Ring,
        used: &BTreeSet<Ipv4Addr>,
        networks: &[Ipv4Net],
    ) -> Batch {
        self.set_ring(ring, networks);
        let gone = |ip: &u32| !used.contains(&Ipv4Addr::from(*ip));
        let freed: Vec<u32> = self.used.iter().filter(gone).collect();
        let used = used.iter().map(|ip| u32::from(*ip));
        let taken: Vec<u32> = used.filter(|ip| !self.used.contains(*ip)).collect();
        let freed = freed.into_iter().map(|ip| (ip.into(), false));
        let taken = taken.into_iter().map(|ip| (ip.into(), true));
        self.mark(now, freed.chain(taken))
    }

    /// Grants changed, and nothing else: this is the ring now.
    pub fn set_ring(&mut self, ring: &Ring, networks: &[Ipv4Net]) {
        self.networks = networks.to_vec();
        if self.ring == *ring {
            return;
        }
        let before = self.ring.parts(&self.me);
        self.ring = ring.clone();
        let after = self.ring.parts(&self.me);
        for (start, last) in subtract(&before, &after) {
            self.free.cut(start, last);
        }
        for (start, last) in subtract(&after, &before) {
            self.count_within(start, last);
        }
    }

    /// Only these addresses came into use, or are no longer used; the ring and the networks are what they were.
    pub fn mark(&mut self, now: Now, changed: impl IntoIterator<Item = (Ipv4Addr, bool)>) -> Batch {
        let mut batch = Batch::new();
        for (ip, is_used) in changed {
            let ip = u32::from(ip);
            if is_used {
                self.reserved.remove(&ip);
                if !mutation::is_on(Mutation::ForgetUsed) {
                    self.used.insert(ip);
                }
            } else if self.used.remove(ip) {
                self.rest(ip, now, &mut batch);
            }
            self.count(ip);
        }
        batch
    }

    /// Addresses in use by any endpoint or service.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.used.iter().map(Ipv4Addr::from)
    }

    /// The lowest free address of `net` in this node's parts. It is taken until [`Self::release`], or until it was seen
    /// in the catalog and is no longer.
    pub fn allocate(&mut self, net: &Ipv4Net) -> Result<Ipv4Addr, Exhausted> {
        let ip = self
            .free_intervals(net)
            .find_map(|(start, last)| self.usable_in(start, last, net))
            .ok_or(Exhausted(*net))?;
        self.reserve(ip);
        Ok(ip.into())
    }

    /// The address for a new service, from this node's part of the VIPs.
    pub fn allocate_vip(&mut self) -> Result<Ipv4Addr, Exhausted> {
        let vips = self.plan.vips();
        self.allocate(&vips)
    }

    /// Takes this very address of `net`.
    pub fn allocate_exact(&mut self, ip: Ipv4Addr, net: &Ipv4Net) -> Result<(), ExactError> {
        if !net.contains(&ip) || !self.is_usable(ip.into(), net) {
            return Err(ExactError::Unusable { ip, net: *net });
        }
        self.check_ours(ip)?;
        self.reserve(ip.into());
        Ok(())
    }

    /// An address that was handed out is no longer needed. It rests before it is handed out again.
    pub fn release(&mut self, ip: Ipv4Addr, now: Now) -> Batch {
        let mut batch = Batch::new();
        let ip = u32::from(ip);
        let was_reserved = self.reserved.remove(&ip);
        if self.used.remove(ip) || was_reserved {
            self.rest(ip, now, &mut batch);
        }
        batch
    }

    /// Lets go of addresses that rested long enough.
    pub fn expire(&mut self, now: Now) -> Batch {
        let mut batch = Batch::new();
        while let Some((until, ip)) = self
            .rested
            .first()
            .copied()
            .filter(|(until, _)| *until <= now)
        {
            self.rested.remove(&(until, ip));
            self.resting.remove(&ip);
            batch.delete(rest_key(ip));
            self.count(ip);
        }
        batch
    }

    /// When to call [`Self::expire`].
    pub fn deadline(&self) -> Option<Now> {
        self.rested.first().map(|(until, _)| *until)
    }

    /// Free addresses of this node in `net`, those that no endpoint can have included.
    pub fn free(&self, net: &Ipv4Net) -> u64 {
        self.free_intervals(net)
            .map(|(start, last)| u64::from(last - start) + 1)
            .sum()
    }

    /// Addresses of `net` that anybody's endpoint or service holds, as far as this node knows.
    pub fn used(&self, net: &Ipv4Net) -> u64 {
        let (first, last) = addresses(net).into_inner();
        self.used.count(first, last)
    }

    /// Addresses of `net` that a node owns and, as far as is known here, nobody uses.
    pub fn free_of(&self, node: &NodeId, net: &Ipv4Net) -> u64 {
        let parts = self.ring.parts_in(node, net).into_iter();
        parts
            .map(|(start, last)| u64::from(last - start) + 1 - self.used.count(start, last))
            .sum()
    }

    /// What a newcomer gets of this node: half of its largest free block of the default network, and of the VIPs. The
    /// grants are to be written at once ([`crate::catalog::Catalog::put`]); here they count already.
    pub fn donation_for_newcomer(&mut self, to: NodeId) -> Vec<Grant> {
        let nets = [self.plan.default_network(), self.plan.vips()];
        nets.iter()
            .filter_map(|net| self.donate(net, to).ok())
            .collect()
    }

    /// What a node gets that has run out of addresses in `net`: half of the largest free block here; of equal ones the
    /// one beside what it owns, so that parts stay few. The last address goes too: who asks needs it now.
    pub fn donate(&mut self, net: &Ipv4Net, to: NodeId) -> Result<Grant, NoGift> {
        let (start, last) = self.wanted(net).ok_or(Exhausted(*net))?;
        match self.gift(net, &to) {
            Some((start, last)) => Ok(self.give(start, last, to)),
            None => Err(NoGift::Guarded(start, last)),
        }
    }

    /// One address that another node asks for by `--ip`.
    pub fn donate_exact(&mut self, ip: Ipv4Addr, to: NodeId) -> Result<Grant, NoGift> {
        self.check_ours(ip)?;
        let ip = u32::from(ip);
        match self.is_locked((ip, ip)) {
            true => Err(NoGift::Guarded(ip, ip)),
            false => Ok(self.give(ip, ip, to)),
        }
    }

    fn give(&mut self, start: u32, last: u32, to: NodeId) -> Grant {
        let grant = self.ring.grant(start, last, to);
        let counts = self.ring.apply(&self.me, &grant, &BTreeSet::new());
        debug_assert!(counts, "only own parts are given");
        self.free.cut(start, last);
        grant
    }

    fn check_ours(&self, ip: Ipv4Addr) -> Result<(), ExactError> {
        match self.ring.owner(ip) {
            None => Err(ExactError::Unusable {
                ip,
                net: self.plan.range,
            }),
            Some(owner) if owner != self.me => Err(ExactError::NotOurs { ip, owner }),
            Some(_) if self.resting.contains_key(&ip.into()) => Err(ExactError::Resting(ip)),
            Some(_) if !self.is_free(ip.into()) => Err(ExactError::InUse(ip)),
            Some(_) => Ok(()),
        }
    }

    fn is_free(&self, ip: u32) -> bool {
        !self.used.contains(ip) && !self.reserved.contains(&ip) && !self.resting.contains_key(&ip)
    }

    fn is_usable(&self, ip: u32, net: &Ipv4Net) -> bool {
        self.plan.is_usable(ip.into(), net)
    }

    /// The first address that an endpoint may have: at most three are none.
    fn usable_in(&self, start: u32, last: u32, net: &Ipv4Net) -> Option<u32> {
        (start..=last).find(|ip| self.is_usable(*ip, net))
    }

    fn reserve(&mut self, ip: u32) {
        self.reserved.insert(ip);
        self.count(ip);
    }

    fn rest(&mut self, ip: u32, now: Now, batch: &mut Batch) {
        if mutation::is_on(Mutation::SkipRest) {
            return;
        }
        if self.ring.owner(ip.into()) == Some(self.me) {
            let until = now.plus(ADDRESS_REST);
            if let Some(before) = self.resting.insert(ip, until) {
                self.rested.remove(&(before, ip));
            }
            self.rested.insert((until, ip));
            batch.put(rest_key(ip), Vec::new());
        }
        self.count(ip);
    }

    /// One address has come or gone: is it free now?
    fn count(&mut self, ip: u32) {
        if self.is_free(ip) && self.ring.owner(ip.into()) == Some(self.me) {
            self.free.give(ip);
        } else {
            self.free.take(ip);
        }
    }

    /// These addresses have become this node's: which of them are free?
    fn count_within(&mut self, start: u32, last: u32) {
        self.free.add(start, last);
        let reserved = self.reserved.range(start..=last);
        let resting = self.resting.range(start..=last).map(|(ip, _)| ip);
        let held = reserved.chain(resting).copied();
        for ip in held.chain(self.used.within(start, last)) {
            self.free.take(ip);
        }
    }

    /// Own addresses of `net` that nobody has, as intervals.
    fn free_intervals(&self, net: &Ipv4Net) -> impl Iterator<Item = (u32, u32)> {
        let (first, last) = addresses(net).into_inner();
        self.free.within(first, last)
    }
}

/// All addresses of a network, first and last included.
fn addresses(net: &Ipv4Net) -> std::ops::RangeInclusive<u32> {
    u32::from(net.network())..=u32::from(net.broadcast())
}

/// The largest aligned block within `start..=last`, of several the highest. Start and size.
fn largest_block(start: u32, last: u32) -> (u32, u64) {
    let (first, end) = (u64::from(start), u64::from(last) + 1);
    let mut size = 1u64 << 32;
    while size > 1 {
        let at = (end & !(size - 1)).checked_sub(size);
        if let Some(at) = at.filter(|at| *at >= first) {
            return (at as u32, size);
        }
        size /= 2;
    }
    (last, 1)
}

/// What of `parts` does not lie in `of`.
pub(crate) fn subtract(parts: &[(u32, u32)], of: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let mut of = of.to_vec();
    of.sort_unstable();
    let mut left = Vec::new();
    for (start, last) in parts {
        let mut from = Some(*start);
        for (first, end) in of
            .iter()
            .filter(|(first, end)| first <= last && end >= start)
        {
            if let Some(at) = from.filter(|at| at < first) {
                left.push((at, first - 1));
            }
            from = from.and_then(|at| end.checked_add(1).map(|next| at.max(next)));
        }
        if let Some(at) = from.filter(|at| at <= last) {
            left.push((at, *last));
        }
    }
    left
}

fn rest_key(ip: u32) -> Vec<u8> {
    Table::Resting.key(&[&ip.to_be_bytes()])
}

#[cfg(test)]
mod tests;
