//! What of this node's own part it may give to others: all but what its voters guard ([`crate::voters`]).

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Allocator, largest_block};
use crate::model::AddressPlan;

/// An interval of addresses, both ends included.
type Interval = (u32, u32);

impl Allocator {
    /// These parts are guarded from now on. `thrifty`: new guards can't be set at present, because too many voters are
    /// away, so what is left is given in smaller pieces.
    pub fn set_locked(&mut self, locked: Vec<Interval>, thrifty: bool) {
        self.locked = locked;
        self.thrifty = thrifty;
    }

    /// What the next node that asks should get, in each network: the upper half of the largest free block. That is what
    /// voters should not guard.
    pub fn reserves(&self, networks: &[Ipv4Net]) -> Vec<Interval> {
        let mut reserves = Vec::new();
        for net in self.regions(networks) {
            if let Some((start, size)) = self.largest_free(&net) {
                reserves.push(upper_half(start, size));
            }
        }
        reserves
    }

    /// What somebody who asks for space in `net` waits for, when all that is free there is guarded.
    pub fn wanted(&self, net: &Ipv4Net) -> Option<Interval> {
        self.largest_free(net)
            .map(|(start, size)| upper_half(start, size))
    }

    /// What is given to a node that asks: the upper half of the largest free block; where voters guard that, or no guard
    /// could be set anew afterwards, the upper half of the largest block that they don't guard.
    pub(super) fn gift(&self, net: &Ipv4Net) -> Option<Interval> {
        let (start, size) = self.largest_free(net)?;
        let best = upper_half(start, size);
        if !self.thrifty && !self.is_locked(best) {
            return Some(best);
        }
        let open = self.open_intervals(net).into_iter();
        let block = open
            .map(|(start, last)| largest_block(start, last))
            .max_by_key(|(start, size)| (*size, *start))?;
        Some(upper_half(block.0, block.1))
    }

    /// Does any voter guard any of it?
    pub(super) fn is_locked(&self, (start, last): Interval) -> bool {
        self.locked
            .iter()
            .any(|(first, end)| *first <= last && *end >= start)
    }

    /// Free and not guarded.
    fn open_intervals(&self, net: &Ipv4Net) -> Vec<Interval> {
        let mut open = self.free_intervals(net);
        for (first, end) in &self.locked {
            open = open
                .into_iter()
                .flat_map(|interval| without(interval, (*first, *end)))
                .collect();
        }
        open
    }

    /// The networks there are, and the blocks that are none yet.
    fn regions(&self, networks: &[Ipv4Net]) -> Vec<Ipv4Net> {
        let fixed = [self.plan.default_network(), self.plan.vips()];
        let taken: Vec<Ipv4Net> = fixed.into_iter().chain(networks.iter().copied()).collect();
        let mut regions = taken.clone();
        regions.extend(unassigned(&self.plan, &taken));
        regions
    }
}

/// What of the range belongs to no network, as few blocks as can be.
fn unassigned(plan: &AddressPlan, taken: &[Ipv4Net]) -> Vec<Ipv4Net> {
    let mut left = vec![(
        u32::from(plan.range.network()),
        u32::from(plan.range.broadcast()),
    )];
    for net in taken {
        let cut = (u32::from(net.network()), u32::from(net.broadcast()));
        left = left
            .into_iter()
            .flat_map(|interval| without(interval, cut))
            .collect();
    }
    left.into_iter()
        .flat_map(|(start, last)| {
            ipnet::Ipv4Subnets::new(Ipv4Addr::from(start), Ipv4Addr::from(last), 0)
        })
        .collect()
}

/// The upper half of a block, or all of one address.
fn upper_half(start: u32, size: u64) -> Interval {
    let last = start + (size - 1) as u32;
    (start + (size / 2) as u32, last)
}

/// What is left of an interval without another one.
fn without((start, last): Interval, (first, end): Interval) -> Vec<Interval> {
    if end < start || first > last {
        return vec![(start, last)];
    }
    let mut left = Vec::new();
    if let Some(before) = first.checked_sub(1).filter(|before| *before >= start) {
        left.push((start, before));
    }
    if let Some(after) = end.checked_add(1).filter(|after| *after <= last) {
        left.push((after, last));
    }
    left
}
