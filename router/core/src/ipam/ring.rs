//! Who owns which part of the range.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv4Subnets};

use crate::model::{AddressPlan, NodeId};
use crate::mutation::{self, Mutation};
use crate::value::Grant;

/// The range, cut into parts that each have exactly one owner.
///
/// INVARIANT: it is a function of the founder, the range, the *set* of grants and the set of removed nodes; the order in
/// which they came means nothing. The parts cover the whole range without overlap.
///
/// Each step on an address' way has a higher (epoch, version) than the one before, so going through the grants in that
/// order meets them as they were made. A grant does one of two things to each part that it covers, or nothing:
/// - *handing on* what its writer owns. Where two collide (their writer lost its memory, or lies) the first in that order
///   counts.
/// - *taking over* what a removed node owned. That the writer may do so is settled before it writes ([`crate::voters`]), or
///   it was told to by force, which raises the epoch. Of a part that was ever taken by force, the higher epoch holds,
///   whoever owns it: both sides of a split may have taken it. Who came too late does not get it either when the one that
///   was faster is removed in turn: its grant has no higher version than that one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    range: Ipv4Net,
    parts: BTreeMap<u32, Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    last: u32,
    owner: NodeId,
    epoch: u32,
    version: u64,
}

impl Part {
    fn place(&self) -> (u32, u64) {
        (self.epoch, self.version)
    }
}

impl Ring {
    /// The ring that these grants make. All belongs to the founder at birth.
    pub fn compute(
        founder: NodeId,
        range: Ipv4Net,
        grants: &[(NodeId, Grant)],
        removed: &BTreeSet<NodeId>,
    ) -> Self {
        let all = Part {
            last: u32::from(range.broadcast()),
            owner: founder,
            epoch: 0,
            version: 0,
        };
        let mut ring = Self {
            range,
            parts: BTreeMap::from([(u32::from(range.network()), all)]),
        };
        let mut ordered: Vec<&(NodeId, Grant)> = grants.iter().collect();
        ordered.sort_by_key(|(writer, g)| (g.epoch, g.version, g.start, g.last, *writer, g.to));
        for (writer, grant) in ordered {
            ring.apply(writer, grant, removed);
        }
        ring
    }

    /// Carries out one more grant; false if it changes nothing.
    pub(super) fn apply(
        &mut self,
        writer: &NodeId,
        grant: &Grant,
        removed: &BTreeSet<NodeId>,
    ) -> bool {
        let (first, end) = (
            u32::from(self.range.network()),
            u32::from(self.range.broadcast()),
        );
        if grant.start > grant.last || grant.start < first || grant.last > end {
            return false;
        }
        let mut covered = self.overlapping(grant.start, grant.last);
        let place = (grant.epoch, grant.version);
        if !mutation::is_on(Mutation::GrantsOfNonOwners) {
            covered.retain(|(_, p)| {
                let by_force = p.epoch > 0 && grant.epoch > p.epoch;
                let is_left = removed.contains(&p.owner) && p.version < grant.version;
                let is_free = p.owner == *writer || is_left || by_force;
                p.place() < place && is_free
            });
        }
        for (start, part) in &covered {
            self.cut(grant, *start, *part);
        }
        !covered.is_empty()
    }

    /// Gives what `grant` covers of the part at `start` away.
    fn cut(&mut self, grant: &Grant, start: u32, part: Part) {
        let (first, last) = (start.max(grant.start), part.last.min(grant.last));
        self.parts.remove(&start);
        if start < first {
            let before = Part {
                last: first - 1,
                ..part
            };
            self.parts.insert(start, before);
        }
        if part.last > last {
            self.parts.insert(last + 1, part);
        }
        let given = Part {
            last,
            owner: grant.to,
            epoch: grant.epoch,
            version: grant.version,
        };
        self.parts.insert(first, given);
    }

    /// The range.
    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// Who owns an address; `None` outside the range.
    pub fn owner(&self, ip: Ipv4Addr) -> Option<NodeId> {
        let ip = u32::from(ip);
        let (_, part) = self.parts.range(..=ip).next_back()?;
        (ip <= part.last).then_some(part.owner)
    }

    /// Who owns which pieces of `start..=last`.
    pub(crate) fn owners_of(&self, start: u32, last: u32) -> Vec<(NodeId, u32, u32)> {
        let pieces = self.overlapping(start, last).into_iter();
        pieces
            .map(|(from, part)| (part.owner, from.max(start), part.last.min(last)))
            .collect()
    }

    /// Was the part that holds this address ever taken by force?
    pub fn was_forced(&self, ip: Ipv4Addr) -> bool {
        let part = self.parts.range(..=u32::from(ip)).next_back();
        part.is_some_and(|(_, part)| part.epoch > 0)
    }

    /// All owners.
    pub fn owners(&self) -> BTreeSet<NodeId> {
        self.parts.values().map(|p| p.owner).collect()
    }

    /// Does it own anything?
    pub fn has_parts(&self, node: &NodeId) -> bool {
        self.parts.values().any(|part| part.owner == *node)
    }

    /// A node's parts in ascending order, neighbours joined.
    pub fn parts(&self, node: &NodeId) -> Vec<(u32, u32)> {
        let mut parts: Vec<(u32, u32)> = Vec::new();
        for (start, part) in self.parts.iter().filter(|(_, p)| p.owner == *node) {
            match parts.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(*start) => *last = part.last,
                _ => parts.push((*start, part.last)),
            }
        }
        parts
    }

    /// A node's parts within `net`.
    pub(crate) fn parts_in(&self, node: &NodeId, net: &Ipv4Net) -> Vec<(u32, u32)> {
        let (first, end) = (u32::from(net.network()), u32::from(net.broadcast()));
        let parts = self.parts(node).into_iter();
        parts
            .map(|(start, last)| (start.max(first), last.min(end)))
            .filter(|(start, last)| start <= last)
            .collect()
    }

    /// Where packets for a node are sent: its parts outside the VIPs, which every node balances by itself, as few
    /// prefixes as can be, in ascending order.
    pub fn prefixes(&self, node: &NodeId, plan: &AddressPlan) -> Vec<Ipv4Net> {
        let vips = plan.vips();
        // The VIPs are the range's end.
        let Some(end) = u32::from(vips.network()).checked_sub(1) else {
            return Vec::new();
        };
        let parts = self.parts(node).into_iter();
        parts
            .map(|(start, last)| (start, last.min(end)))
            .filter(|(start, last)| start <= last)
            .flat_map(|(start, last)| Ipv4Subnets::new(start.into(), last.into(), 0))
            .collect()
    }

    /// A grant of `start..=last`, to be written by its owner.
    pub(crate) fn grant(&self, start: u32, last: u32, to: NodeId) -> Grant {
        let covered = self.overlapping(start, last);
        let version = covered.iter().map(|(_, p)| p.version).max().unwrap_or(0);
        Grant {
            start,
            last,
            to,
            version: version + 1,
            epoch: covered.iter().map(|(_, p)| p.epoch).max().unwrap_or(0),
        }
    }

    /// What `to` writes to take `start..=last` over from its removed owner; by force, whatever others do.
    pub(crate) fn takeover(&self, start: u32, last: u32, to: NodeId, force: bool) -> Grant {
        let grant = self.grant(start, last, to);
        Grant {
            epoch: grant.epoch + u32::from(force),
            ..grant
        }
    }

    fn overlapping(&self, start: u32, last: u32) -> Vec<(u32, Part)> {
        let before = self
            .parts
            .range(..=start)
            .next_back()
            .map(|(s, _)| *s)
            .unwrap_or(start);
        self.parts
            .range(before..=last)
            .filter(|(_, p)| p.last >= start)
            .map(|(s, p)| (*s, *p))
            .collect()
    }
}
