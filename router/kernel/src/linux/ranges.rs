//! The host's own addresses and routes, and what of them a cluster's range would cover.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::route::RouteType;
use weft_core::layout::{HOST_LEG, HOST_TABLE};

use super::host::Host;
use super::rtnl::{KernelRoute, Link, Rtnl};
use super::sysctl::ipv6_available;
use crate::error::{Doing, Result};
use crate::state::Family;

/// The kernel's table of local addresses.
const LOCAL_TABLE: u32 = 255;

/// Something on this host that the range covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// What is covered.
    pub net: Ipv4Net,
    /// Where it is reached: a device, or `resolver`, `peer`.
    pub via: String,
    /// The cluster can't use the range here; else containers only don't reach `net`.
    pub fatal: bool,
    /// One line for people.
    pub why: String,
}

impl Host {
    /// What the range covers on this host: fatal for the addresses that peers use, known peers, resolvers and default
    /// gateways; a warning for other networks this host has routes to.
    pub fn range_conflicts(&self, range: Ipv4Net, peers: &[IpAddr]) -> Result<Vec<Overlap>> {
        self.run(|| conflicts(range, peers))?
            .doing(|| "read the host's addresses and routes".into())
    }

    /// The addresses of the host by which others reach it, IPv4 first: no loopback, link-local, temporary, or those of
    /// weft, bridges of containers, tunnels and other overlays.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        self.run(|| usable_addresses(&Rtnl::open()?))?
            .doing(|| "read the host's addresses".into())
    }
}

fn usable_addresses(rtnl: &Rtnl) -> io::Result<Vec<IpAddr>> {
    let links = rtnl.links()?;
    let uplinks = uplinks(rtnl)?;
    let passing = AddressFlags::Tentative | AddressFlags::Deprecated | AddressFlags::Dadfailed;
    let mut found: Vec<IpAddr> = rtnl
        .addresses()?
        .into_iter()
        .filter(|a| !a.flags.intersects(passing) && !is_temporary(a.net, a.flags))
        .filter(|a| {
            links
                .iter()
                .any(|l| l.index == a.device && faces_others(l, &uplinks))
        })
        .map(|a| a.net.addr())
        .filter(is_usable)
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// RFC 8981 addresses share the flag of IPv4's secondary ones.
fn is_temporary(net: IpNet, flags: AddressFlags) -> bool {
    matches!(net, IpNet::V6(_)) && flags.contains(AddressFlags::Secondary)
}

fn is_usable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    }
}

/// A bridge or a tunnel counts only where the host's own default route goes over it.
fn faces_others(link: &Link, uplinks: &BTreeSet<u32>) -> bool {
    let inward = matches!(
        link.kind,
        Some(
            InfoKind::Bridge
                | InfoKind::Tun
                | InfoKind::Vxlan
                | InfoKind::Geneve
                | InfoKind::Wireguard
                | InfoKind::IpIp
                | InfoKind::Dummy
        )
    );
    let ours = link.name == HOST_LEG;
    !ours
        && !link.loopback
        && link.up
        && !link.enslaved
        && (!inward || uplinks.contains(&link.index))
}

fn uplinks(rtnl: &Rtnl) -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 && !ipv6_available() {
            continue;
        }
        let routes = rtnl.routes(family)?;
        let defaults = routes.iter().filter(|r| r.to.prefix_len() == 0);
        found.extend(
            defaults
                .filter(|r| r.kind == RouteType::Unicast)
                .filter_map(|r| r.device),
        );
    }
    Ok(found)
}

fn conflicts(range: Ipv4Net, peers: &[IpAddr]) -> io::Result<Vec<Overlap>> {
    let rtnl = Rtnl::open()?;
    let links = rtnl.links()?;
    let name = |index: Option<u32>| {
        let link = links.iter().find(|l| Some(l.index) == index);
        link.map_or_else(|| "?".to_owned(), |l| l.name.clone())
    };
    let mut found = Vec::new();
    let mut fatal = |ip: Ipv4Addr, via: String, what: &str| {
        if range.contains(&ip) {
            found.push(Overlap {
                net: ip.into(),
                via,
                fatal: true,
                why: format!("{range} covers {what} {ip}; choose another --range"),
            });
        }
    };
    for ip in v4(usable_addresses(&rtnl)?) {
        fatal(ip, "this host".into(), "this host's own address");
    }
    for ip in v4(peers.to_vec()) {
        fatal(ip, "peer".into(), "the address of a peer,");
    }
    for ip in v4(resolvers()) {
        fatal(ip, "resolver".into(), "the name server");
    }
    let routes = rtnl.routes(Family::V4)?;
    for route in routes.iter().filter(|r| r.to.prefix_len() == 0) {
        if let Some(IpAddr::V4(ip)) = route.gateway {
            fatal(ip, name(route.device), "the default gateway");
        }
    }
    for route in &routes {
        let device = name(route.device);
        if let Some(net) = hidden(route, range).filter(|_| device != HOST_LEG) {
            found.push(Overlap {
                net,
                fatal: false,
                why: format!(
                    "containers and this host will not reach {net} ({device}): {range} covers it"
                ),
                via: device,
            });
        }
    }
    found.dedup();
    Ok(found)
}

/// The part of the network that a route leads to and the range would take.
fn hidden(route: &KernelRoute, range: Ipv4Net) -> Option<Ipv4Net> {
    let elsewhere = route.table != LOCAL_TABLE && route.table != HOST_TABLE;
    let IpNet::V4(net) = route.to else {
        return None;
    };
    let covers = net.contains(&range) || range.contains(&net);
    let leads = route.kind == RouteType::Unicast && net.prefix_len() > 0;
    (elsewhere && covers && leads).then_some(net)
}

fn v4(ips: Vec<IpAddr>) -> impl Iterator<Item = Ipv4Addr> {
    ips.into_iter().filter_map(|ip| match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

fn resolvers() -> Vec<IpAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse().ok())
        .collect()
}
