//! Who owns which part of the range.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::{Ipv4Net, Ipv4Subnets};

use crate::model::{AddressPlan, NodeId};
use crate::value::Grant;

/// The range, cut into parts that each have exactly one owner.
///
/// INVARIANT: it is a function of the founder, the range and the *set* of grants; the order in which they came means
/// nothing. The parts cover the whole range without overlap.
///
/// A grant counts when its writer owns all of what it gives, at lower versions. Each step on an address' way has a
/// higher version than the one before, so going through the grants by version meets them in the order in which they
/// were made. Of two that collide (their writer lost its memory, or lies) the first in that order counts, the other
/// not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    range: Ipv4Net,
    parts: BTreeMap<u32, Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    last: u32,
    owner: NodeId,
    version: u64,
}

impl Ring {
    /// The ring that these grants make. All belongs to the founder at birth.
    pub fn compute(founder: NodeId, range: Ipv4Net, grants: &[(NodeId, Grant)]) -> Self {
        let all = Part {
            last: u32::from(range.broadcast()),
            owner: founder,
            version: 0,
        };
        let mut ring = Self {
            range,
            parts: BTreeMap::from([(u32::from(range.network()), all)]),
        };
        let mut ordered: Vec<&(NodeId, Grant)> = grants.iter().collect();
        ordered.sort_by_key(|(writer, g)| (g.version, g.start, g.last, *writer, g.to));
        for (writer, grant) in ordered {
            ring.apply(writer, grant);
        }
        ring
    }

    /// Carries out one more grant; false if it doesn't count.
    pub(super) fn apply(&mut self, writer: &NodeId, grant: &Grant) -> bool {
        let (first, end) = (
            u32::from(self.range.network()),
            u32::from(self.range.broadcast()),
        );
        // An epoch above 0 is space taken back by force, which a later version knows.
        if grant.epoch != 0 || grant.start > grant.last || grant.start < first || grant.last > end {
            return false;
        }
        let given = self.overlapping(grant.start, grant.last);
        if !given
            .iter()
            .all(|(_, p)| p.owner == *writer && p.version < grant.version)
        {
            return false;
        }
        for (start, part) in given {
            self.parts.remove(&start);
            if start < grant.start {
                self.parts.insert(
                    start,
                    Part {
                        last: grant.start - 1,
                        ..part
                    },
                );
            }
            if part.last > grant.last {
                self.parts.insert(grant.last + 1, part);
            }
        }
        let part = Part {
            last: grant.last,
            owner: grant.to,
            version: grant.version,
        };
        self.parts.insert(grant.start, part);
        true
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

    /// All owners.
    pub fn owners(&self) -> std::collections::BTreeSet<NodeId> {
        self.parts.values().map(|p| p.owner).collect()
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
    pub(super) fn grant(&self, start: u32, last: u32, to: NodeId) -> Grant {
        let versions = self
            .overlapping(start, last)
            .into_iter()
            .map(|(_, p)| p.version);
        Grant {
            start,
            last,
            to,
            version: versions.max().unwrap_or(0) + 1,
            epoch: 0,
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
