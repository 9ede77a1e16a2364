//! What of this node's own part it may give to others: all but what its voters guard ([`crate::voters`]).

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Allocator, largest_block};
use crate::model::{AddressPlan, NodeId};

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
        let regions = self.regions(networks).into_iter();
        regions.filter_map(|net| self.wanted(&net)).collect()
    }

    /// What somebody who asks for space in `net` waits for, when all that is free there is guarded.
    pub fn wanted(&self, net: &Ipv4Net) -> Option<Interval> {
        let halves = self.halves(net, self.free_intervals(net));
        halves.max_by_key(|(start, last)| (last - start, *start))
    }

    /// What is given to a node that asks: half of the largest free block, of equal halves one beside what it owns, else
    /// the upper; where voters guard that, or no guard could be set anew afterwards, half of the largest block that they
    /// don't guard.
    pub(super) fn gift(&self, net: &Ipv4Net, to: &NodeId) -> Option<Interval> {
        let owned = |ip: Option<u32>| ip.and_then(|ip| self.ring.owner(ip.into())) == Some(*to);
        let beside =
            |start: u32, last: u32| owned(start.checked_sub(1)) || owned(last.checked_add(1));
        let best = |(start, last): &Interval| (last - start, beside(*start, *last), *start);
        let (start, last) = self.wanted(net)?;
        let whole = self
            .halves(net, self.free_intervals(net))
            .filter(|half| half.1 - half.0 == last - start)
            .filter(|half| !self.thrifty && !self.is_locked(*half))
            .max_by_key(best);
        whole.or_else(|| {
            let open = self.open_intervals(net).into_iter();
            self.halves(net, open).max_by_key(best)
        })
    }

    /// The halves of the largest block in each interval, of a single address that one; without those that hold nothing
    /// for an endpoint.
    fn halves(
        &self,
        net: &Ipv4Net,
        intervals: impl Iterator<Item = Interval>,
    ) -> impl Iterator<Item = Interval> {
        intervals
            .map(|(start, last)| largest_block(start, last))
            .flat_map(|(start, size)| halves(start, size))
            .filter(|(start, last)| self.usable_in(*start, *last, net).is_some())
    }

    /// Does any voter guard any of it?
    pub(super) fn is_locked(&self, (start, last): Interval) -> bool {
        self.locked
            .iter()
            .any(|(first, end)| *first <= last && *end >= start)
    }

    /// Free and not guarded.
    fn open_intervals(&self, net: &Ipv4Net) -> Vec<Interval> {
        let mut open: Vec<Interval> = self.free_intervals(net).collect();
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

/// Both halves of a block, or the one address that it is.
fn halves(start: u32, size: u64) -> Vec<Interval> {
    let last = start + (size - 1) as u32;
    match (size / 2) as u32 {
        0 => vec![(start, last)],
        half => vec![(start, start + (half - 1)), (start + half, last)],
    }
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
