//! What is to be balanced on this host, as data that can be compared: the kernel is told only when it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use weft_core::model::{AddressPlan, Proto};
use weft_core::view::{EndpointKind, PeerNumber, Service, ServicePort, View};

use crate::maglev;

/// What the view doesn't tell: facts of this host alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFacts {
    /// The host's own addresses, where its containers may ask for published ports.
    pub host_addrs: Vec<IpAddr>,
    /// The published ports that this node really serves: [`wanted`] less those that somebody else holds.
    pub published_here: BTreeSet<Published>,
    /// The host's own resolvers. Queries of containers to them are turned to weft's DNS, because some runtimes add them
    /// beside it and musl believes the first NXDOMAIN.
    pub resolvers: Vec<IpAddr>,
    /// Has the domain IPv6?
    pub ipv6: bool,
}

/// Where hosts listen for a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    /// Protocol.
    pub proto: Proto,
    /// Only this address of the host; any when absent.
    pub addr: Option<IpAddr>,
    /// Port on the host.
    pub port: u16,
}

/// One port of one VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    /// Virtual address; the IPv6 one is derived.
    pub vip: Ipv4Addr,
    /// Protocol.
    pub proto: Proto,
    /// Port on the VIP.
    pub port: u16,
}

/// Where the connections to one [`Frontend`] go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balance {
    /// Port on the backends.
    pub target: u16,
    /// The maglev table: slot -> backend. Never empty.
    pub table: Vec<Ipv4Addr>,
}

/// A port of a container on this host that packets of outside clients may be sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The container.
    pub ip: Ipv4Addr,
    /// Protocol.
    pub proto: Proto,
    /// Its port.
    pub port: u16,
}

/// All that the two fragments are rendered from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LbPlan {
    /// Layout of addresses.
    pub plan: AddressPlan,
    /// Is IPv6 rendered too?
    pub ipv6: bool,
    /// Peers that connections can come through.
    pub peers: BTreeSet<PeerNumber>,
    /// The MACs under which some of them come over the `vxlan` carrier, too; `None` where the host has no such carrier.
    pub vxlan: Option<BTreeMap<[u8; 6], PeerNumber>>,
    /// Ports of VIPs that have a live backend.
    pub services: BTreeMap<Frontend, Balance>,
    /// Published ports served here, and what they stand for.
    pub published: BTreeMap<Published, Frontend>,
    /// The host's addresses.
    pub host_addrs: BTreeSet<IpAddr>,
    /// The host's resolvers.
    pub resolvers: BTreeSet<IpAddr>,
    /// Containers of this host.
    pub local: BTreeSet<Ipv4Addr>,
    /// Published targets on this host, whichever node the client came to.
    pub targets: BTreeSet<Target>,
}

/// Ports that no service may take from a host: remote administration and weft's own.
pub fn is_reserved(proto: Proto, port: u16) -> bool {
    matches!((proto, port), (Proto::Tcp, 22) | (Proto::Udp, 6783..=6785))
}

/// The published ports that this node should serve: all, less reserved ones and those that stand as conflicts of its own.
pub fn wanted(view: &View) -> BTreeSet<Published> {
    publications(view)
        .map(|(published, _)| published)
        .filter(|p| !is_reserved(p.proto, p.port))
        .filter(|p| {
            !view
                .conflicts
                .iter()
                .any(|c| c.node == view.me && c.proto == p.proto && c.port == p.port)
        })
        .collect()
}

/// Decides what this host balances.
pub fn plan(view: &View, local: &LocalFacts) -> LbPlan {
    LbPlan {
        plan: view.plan,
        ipv6: local.ipv6,
        peers: peers(view),
        vxlan: vxlan(view),
        services: services(view),
        published: published(view, local),
        host_addrs: local.host_addrs.iter().copied().collect(),
        resolvers: resolvers(view, local),
        local: containers_here(view),
        targets: targets(view),
    }
}

fn peers(view: &View) -> BTreeSet<PeerNumber> {
    let others = view.members.iter().filter(|m| m.id != view.me);
    others.map(|m| m.number).filter(|n| n.0 != 0).collect()
}

fn vxlan(view: &View) -> Option<BTreeMap<[u8; 6], PeerNumber>> {
    let vxlan = view.vxlan.as_ref()?;
    let numbered = vxlan.peers.iter().filter(|peer| peer.number.0 != 0);
    Some(numbered.map(|peer| (peer.mac, peer.number)).collect())
}

fn ports(view: &View) -> impl Iterator<Item = (&Service, &ServicePort)> {
    let services = view.services.iter();
    services.flat_map(|s| s.ports.iter().map(move |p| (s, p)))
}

fn frontend(service: &Service, port: &ServicePort) -> Frontend {
    Frontend {
        vip: service.vip,
        proto: port.proto,
        port: port.port,
    }
}

/// After a split two services may claim one VIP or published port: the first in the order of names has it, everywhere
/// alike, because a key that stands twice in a map would void the whole transaction.
fn services(view: &View) -> BTreeMap<Frontend, Balance> {
    let mut found = BTreeMap::new();
    for (service, port) in ports(view) {
        let backends: BTreeSet<Ipv4Addr> = view.backends(service).iter().map(|e| e.ip).collect();
        if backends.is_empty() {
            continue;
        }
        let at = frontend(service, port);
        found.entry(at).or_insert_with(|| Balance {
            target: port.target,
            table: maglev::table(&backends.into_iter().collect::<Vec<_>>(), identity(at)),
        });
    }
    found
}

/// Tells the tables of different services apart; the same on every node.
fn identity(at: Frontend) -> u64 {
    let proto = match at.proto {
        Proto::Tcp => 0,
        Proto::Udp => 1 << 16,
    };
    u64::from(u32::from(at.vip)) << 32 | proto | u64::from(at.port)
}

fn publications(view: &View) -> impl Iterator<Item = (Published, Frontend)> {
    ports(view).flat_map(|(service, port)| {
        port.publish.iter().map(move |publish| {
            let published = Published {
                proto: port.proto,
                addr: publish.addr,
                port: publish.port,
            };
            (published, frontend(service, port))
        })
    })
}

fn published(view: &View, local: &LocalFacts) -> BTreeMap<Published, Frontend> {
    let mut found = BTreeMap::new();
    for (published, at) in publications(view) {
        if local.published_here.contains(&published) {
            found.entry(published).or_insert(at);
        }
    }
    found
}

/// Resolvers on loopback can't be asked from a container, and the overlay's own addresses need no turning.
fn resolvers(view: &View, local: &LocalFacts) -> BTreeSet<IpAddr> {
    let outside = local.resolvers.iter().copied().filter(|ip| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !view.plan.range.contains(v4),
        IpAddr::V6(v6) => !v6.is_loopback() && !view.plan.range6().contains(v6),
    });
    outside.collect()
}

fn containers_here(view: &View) -> BTreeSet<Ipv4Addr> {
    let here = view
        .endpoints
        .iter()
        .filter(|e| e.node == view.me && e.kind == EndpointKind::Container);
    here.map(|e| e.ip).collect()
}

fn targets(view: &View) -> BTreeSet<Target> {
    let mut found = BTreeSet::new();
    for (service, port) in ports(view).filter(|(_, p)| !p.publish.is_empty()) {
        let here = view
            .endpoints
            .iter()
            .filter(|e| e.node == view.me && service.selects(e));
        found.extend(here.map(|e| Target {
            ip: e.ip,
            proto: port.proto,
            port: port.target,
        }));
    }
    found
}

#[cfg(test)]
mod tests;
