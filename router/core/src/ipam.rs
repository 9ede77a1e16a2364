//! Addresses: the [`Ring`] of parts, each owned by exactly one node, and the [`Allocator`] that hands out this node's
//! own.
//!
//! No node ever hands out an address from another's part, so nobody has to be asked, in any partition. An address is
//! in use from the moment it is handed out; what hands it out writes the record to disk before anybody sees it.

mod locks;
mod ring;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::model::{AddressPlan, NodeId, Now};
use crate::mutation::{self, Mutation};
use crate::store::{Batch, Stored, Table};
use crate::value::Grant;
use crate::view::ADDRESS_REST;

pub use ring::Ring;

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
    /// There is nothing free, or only one address.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// The very address that was asked for can't be had.
    #[error(transparent)]
    Exact(#[from] ExactError),
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
    used: BTreeSet<u32>,
    /// Handed out, not in the catalog yet.
    reserved: BTreeSet<u32>,
    resting: BTreeMap<u32, Now>,
    networks: Vec<Ipv4Net>,
    locked: Vec<(u32, u32)>,
    thrifty: bool,
}

impl Allocator {
    /// Starts with what was on disk. Addresses that rested then rest anew: nobody knows for how long this node was away.
    pub fn new(me: NodeId, plan: AddressPlan, ring: Ring, stored: &Stored, now: Now) -> Self {
        let rows = stored.rows(Table::Resting);
        let resting = rows
            .filter_map(|(key, _)| {
                Some((
                    u32::from_be_bytes(key.try_into().ok()?),
                    now.plus(ADDRESS_REST),
                ))
            })
            .collect();
        Self {
            me,
            plan,
            ring,
            used: BTreeSet::new(),
            reserved: BTreeSet::new(),
            resting,
            networks: Vec::new(),
            locked: Vec::new(),
            thrifty: false,
        }
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
        ring: Ring,
        used: &BTreeSet<Ipv4Addr>,
        networks: &[Ipv4Net],
    ) -> Batch {
        let used: BTreeSet<u32> = used.iter().map(|ip| u32::from(*ip)).collect();
        let freed: Vec<u32> = self.used.difference(&used).copied().collect();
        self.reserved.retain(|ip| !used.contains(ip));
        self.ring = ring;
        self.used = match mutation::is_on(Mutation::ForgetUsed) {
            true => BTreeSet::new(),
            false => used,
        };
        self.networks = networks.to_vec();
        let mut batch = Batch::new();
        for ip in freed {
            self.rest(ip, now, &mut batch);
        }
        batch
    }

    /// The lowest free address of `net` in this node's parts. It is taken until [`Self::release`], or until it was seen
    /// in the catalog and is no longer.
    pub fn allocate(&mut self, net: &Ipv4Net) -> Result<Ipv4Addr, Exhausted> {
        let parts = self.ring.parts_in(&self.me, net);
        let free = parts
            .into_iter()
            .flat_map(|(start, last)| start..=last)
            .find(|ip| self.is_free(*ip) && self.is_usable(*ip, net));
        let ip = free.ok_or(Exhausted(*net))?;
        self.reserved.insert(ip);
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
        self.reserved.insert(ip.into());
        Ok(())
    }

    /// An address that was handed out is no longer needed. It rests before it is handed out again.
    pub fn release(&mut self, ip: Ipv4Addr, now: Now) -> Batch {
        let mut batch = Batch::new();
        let ip = u32::from(ip);
        let was_reserved = self.reserved.remove(&ip);
        if self.used.remove(&ip) || was_reserved {
            self.rest(ip, now, &mut batch);
        }
        batch
    }

    /// Lets go of addresses that rested long enough.
    pub fn expire(&mut self, now: Now) -> Batch {
        let mut batch = Batch::new();
        self.resting.retain(|ip, until| {
            if *until > now {
                return true;
            }
            batch.delete(rest_key(*ip));
            false
        });
        batch
    }

    /// When to call [`Self::expire`].
    pub fn deadline(&self) -> Option<Now> {
        self.resting.values().min().copied()
    }

    /// Free addresses of this node in `net`.
    pub fn free(&self, net: &Ipv4Net) -> u64 {
        let intervals = self.free_intervals(net).into_iter();
        intervals
            .map(|(start, last)| u64::from(last - start) + 1)
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

    /// What a node gets that has run out of addresses in `net`: half of the largest free block here.
    pub fn donate(&mut self, net: &Ipv4Net, to: NodeId) -> Result<Grant, NoGift> {
        if self.free(net) < 2 {
            return Err(Exhausted(*net).into());
        }
        match self.gift(net) {
            Some((start, last)) => Ok(self.give(start, last, to)),
            None => {
                let (start, last) = self.wanted(net).ok_or(Exhausted(*net))?;
                Err(NoGift::Guarded(start, last))
            }
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

    /// An aligned block for a new network, from this node's own free space outside the default network and the VIPs.
    /// `None` when there is none, or when it were smaller than what a network number stands for.
    pub fn block_for_network(&self, prefix_len: u8) -> Option<Ipv4Net> {
        let range = self.plan.range;
        if prefix_len > range.prefix_len() + 8 || prefix_len < range.prefix_len() + 4 {
            return None;
        }
        let taken = |net: &Ipv4Net| {
            let fixed = [self.plan.default_network(), self.plan.vips()];
            fixed
                .iter()
                .chain(&self.networks)
                .any(|n| n.contains(net) || net.contains(n))
        };
        let mut nets = range.subnets(prefix_len).ok()?;
        nets.find(|net| !taken(net) && self.free(net) == 1 << (32 - prefix_len))
    }

    fn give(&mut self, start: u32, last: u32, to: NodeId) -> Grant {
        let grant = self.ring.grant(start, last, to);
        let counts = self.ring.apply(&self.me, &grant, &BTreeSet::new());
        debug_assert!(counts, "only own parts are given");
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
        !self.used.contains(&ip) && !self.reserved.contains(&ip) && !self.resting.contains_key(&ip)
    }

    fn is_usable(&self, ip: u32, net: &Ipv4Net) -> bool {
        let ip = Ipv4Addr::from(ip);
        ip != net.network() && ip != net.broadcast() && ip != self.plan.dns4()
    }

    fn rest(&mut self, ip: u32, now: Now, batch: &mut Batch) {
        if mutation::is_on(Mutation::SkipRest) {
            return;
        }
        if self.ring.owner(ip.into()) == Some(self.me) {
            self.resting.insert(ip, now.plus(ADDRESS_REST));
            batch.put(rest_key(ip), Vec::new());
        }
    }

    /// Own addresses of `net` that nobody has, as intervals.
    fn free_intervals(&self, net: &Ipv4Net) -> Vec<(u32, u32)> {
        let mut free = Vec::new();
        for (start, last) in self.ring.parts_in(&self.me, net) {
            let resting = self.resting.range(start..=last).map(|(ip, _)| *ip);
            let used = self
                .used
                .range(start..=last)
                .chain(self.reserved.range(start..=last));
            let taken: BTreeSet<u32> = used.copied().chain(resting).collect();
            let mut from = Some(start);
            for ip in taken {
                if let Some(from) = from.filter(|from| *from < ip) {
                    free.push((from, ip - 1));
                }
                from = ip.checked_add(1);
            }
            if let Some(from) = from.filter(|from| *from <= last) {
                free.push((from, last));
            }
        }
        free
    }

    /// The largest free aligned block, of several the highest: addresses are handed out from below. Start and size.
    fn largest_free(&self, net: &Ipv4Net) -> Option<(u32, u64)> {
        let intervals = self.free_intervals(net).into_iter();
        intervals
            .map(|(start, last)| largest_block(start, last))
            .max_by_key(|(start, size)| (*size, *start))
    }
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

fn rest_key(ip: u32) -> Vec<u8> {
    Table::Resting.key(&[&ip.to_be_bytes()])
}

#[cfg(test)]
mod tests;
