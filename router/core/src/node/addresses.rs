//! Where this node is and where its peers are: what peers see of it, and what has worked before.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::cluster::Cluster;
use super::io::Output;
use crate::model::{NodeId, Now};
use crate::path::Path;
use crate::underlay::UnderlayAddr;
use crate::value::NodeInfo;

/// Addresses that others see this node at and that it tells everybody of.
const MAX_REFLEXIVE: usize = 2;
/// Addresses remembered of one peer that its record does not name.
const MAX_REMEMBERED: usize = 2;

/// Where this node is seen to be, by whom.
#[derive(Clone, Debug, Default)]
pub(super) struct Reflexive {
    seen: BTreeMap<NodeId, SocketAddr>,
    told: Vec<SocketAddr>,
}

impl Reflexive {
    /// What everybody is told: addresses on which peers agree, since a NAT that shows each peer another one lets nobody
    /// else in there; or what the only peer says that sees any.
    fn agreed(&self) -> Vec<SocketAddr> {
        let mut counts: BTreeMap<SocketAddr, usize> = BTreeMap::new();
        for addr in self.seen.values() {
            *counts.entry(*addr).or_default() += 1;
        }
        let enough = self.seen.len().min(2);
        let mut agreed: Vec<(usize, SocketAddr)> = counts
            .into_iter()
            .filter(|(_, count)| *count >= enough)
            .map(|(addr, count)| (count, addr))
            .collect();
        agreed.sort_by_key(|(count, addr)| (std::cmp::Reverse(*count), *addr));
        agreed.truncate(MAX_REFLEXIVE);
        agreed.into_iter().map(|(_, addr)| addr).collect()
    }

    /// True when that changed.
    fn settle(&mut self) -> bool {
        let agreed = self.agreed();
        let changed = agreed != self.told;
        self.told = agreed;
        changed
    }
}

impl Cluster {
    /// Where others may reach this node: what it has, then what others see of it.
    pub(super) fn own_addresses(&self) -> Vec<SocketAddr> {
        let own = self.config.underlay.iter();
        let mut addresses: Vec<SocketAddr> = own.copied().take(8).collect();
        for addr in &self.reflexive.told {
            if !addresses.contains(addr) {
                addresses.push(*addr);
            }
        }
        addresses
    }

    /// A peer sees this node at `addr`.
    pub(super) fn on_seen_at(
        &mut self,
        now: Now,
        peer: NodeId,
        addr: SocketAddr,
        out: &mut Vec<Output>,
    ) {
        let is_own = self.config.underlay.contains(&addr) || !is_usable(addr);
        self.sessions.set_behind_nat(&peer, !is_own);
        match is_own {
            true => drop(self.reflexive.seen.remove(&peer)),
            false => drop(self.reflexive.seen.insert(peer, addr)),
        }
        if self.reflexive.settle() {
            self.write_node_info(now, out);
        }
    }

    /// What was seen along a session that is over says nothing any more.
    pub(super) fn forget_seen(&mut self, peer: &NodeId) {
        self.reflexive.seen.remove(peer);
    }

    /// The peer answers along `path`. An address that its record does not name is remembered for the next start: it may be
    /// all there is, where the record is wrong.
    pub(super) fn on_path(&mut self, now: Now, peer: NodeId, path: Path, out: &mut Vec<Output>) {
        // A connection may have come from there: it leads back as long as it is open.
        let Some(addr) = path.udp() else {
            return;
        };
        let named = self.catalog.node(&peer).map(|info| &info.underlay);
        let is_named = named.is_some_and(|underlay| underlay.contains(&addr));
        let addr = UnderlayAddr::Udp(addr);
        let remembered = self.meta.remembered(&peer);
        if is_named || remembered.first() == Some(&addr) {
            return;
        }
        let others = remembered.iter().copied().filter(|other| *other != addr);
        let addresses = std::iter::once(addr)
            .chain(others)
            .take(MAX_REMEMBERED)
            .collect();
        let batch = self.meta.remember(peer, addresses);
        self.persist(now, batch, Vec::new(), out);
        self.tell_addresses(now, peer);
    }

    /// Tells the sessions where `peer` may be.
    pub(super) fn tell_addresses(&mut self, now: Now, peer: NodeId) {
        let named = self.catalog.node(&peer).map(NodeInfo::reached_at);
        let mut addresses = named.unwrap_or_default();
        addresses.extend_from_slice(self.meta.remembered(&peer));
        // In the order in which they are called.
        addresses.sort_by_key(|addr| addr.tcp().is_some());
        self.sessions.set_addresses(now, peer, &addresses);
    }
}

/// Could anybody else reach this?
fn is_usable(addr: SocketAddr) -> bool {
    let ip = addr.ip();
    addr.port() != 0 && !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(port: u16) -> SocketAddr {
        ([192, 0, 2, 1], port).into()
    }

    #[test]
    fn everybody_hears_what_two_agree_on() {
        let mut reflexive = Reflexive::default();
        assert!(!reflexive.settle());
        reflexive.seen.insert(NodeId([1; 32]), addr(7));
        assert!(reflexive.settle());
        assert_eq!(reflexive.told, [addr(7)]);
        reflexive.seen.insert(NodeId([2; 32]), addr(8));
        assert!(reflexive.settle(), "they do not agree");
        assert_eq!(reflexive.told, []);
        reflexive.seen.insert(NodeId([3; 32]), addr(8));
        assert!(reflexive.settle());
        assert_eq!(reflexive.told, [addr(8)]);
        reflexive.seen.insert(NodeId([1; 32]), addr(8));
        assert!(!reflexive.settle());
    }

    #[test]
    fn nobody_is_told_of_an_address_that_is_none() {
        for text in [
            "127.0.0.1:1",
            "0.0.0.0:1",
            "224.0.0.1:1",
            "192.0.2.1:0",
            "[::1]:1",
        ] {
            assert!(!is_usable(text.parse().unwrap()), "{text}");
        }
        assert!(is_usable(addr(1)));
    }
}
