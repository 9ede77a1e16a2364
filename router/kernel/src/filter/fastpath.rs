//! The fast path for what passes between containers of one network on different hosts: a program at the ingress of their legs
//! sends it on to the carrier's device at once, and one at the ingress of each carrier into the container. It is spared the
//! domain's stack, which costs a stream over VXLAN a quarter of its speed, and a round trip over the sealed carrier a seventh
//! of its time (`docs/performance.md`). They say nothing that the domain's filter does not say, and take only what that lets
//! through:
//!
//! * a leg's own addresses and MAC, a peer's own MAC and addresses, and two addresses of one network;
//! * nothing that a VIP may have been turned into, in either direction: translation needs connection tracking;
//! * a TCP connection from its first segment to its last: who begins one is told which segments fit the path, as the domain's
//!   filter tells it, and the long way does not track it either (`base_plain`), so that any part of it may go there;
//! * nothing that is too long for the path, nor a super-packet whose segments would be: the long way tells its sender.
//!
//! What they do not take goes on as if they were not there, so that they may be taken away at any moment.

pub(crate) mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use weft_core::layout::{UDP_CARRIER, UDP_CARRIER_MAC, container_mac, peer_mac, vxlan_carrier};
use weft_core::model::{AddressPlan, Proto};
use weft_core::view::{Liveness, Member, View};

use self::program::{LegValue, Place};
use super::{collection, networks_apart};
use crate::plan::{LocalFacts, leg_name, path};

/// The table in which the next daemon finds what this one knew: family netdev, no rules.
pub(crate) const TABLE: &str = "weft_fast";
/// Its set of what VIPs were turned into.
pub(crate) const TRANSLATED: &str = "translated4";

/// What connections to a VIP are turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Protocol.
    pub proto: Proto,
    /// Port.
    pub port: u16,
}

/// What outlives a change of the view, and a daemon: connections do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastMemory {
    /// All that some VIP stood for while its address was somebody's.
    pub(crate) translated: BTreeSet<Backend>,
}

impl FastMemory {
    /// Takes in what is the case now.
    pub fn note(&mut self, view: &View, backends: impl Iterator<Item = Backend>) {
        let known: BTreeSet<Ipv4Addr> = view.endpoints.iter().map(|e| e.ip).collect();
        self.translated
            .retain(|backend| known.contains(&backend.ip));
        self.translated.extend(backends);
    }

    /// What stands in the table.
    pub(crate) fn table(&self) -> String {
        let translated = self.translated.iter();
        let translated =
            translated.map(|Backend { ip, proto, port }| format!("{ip} . {proto} . {port}"));
        let backends = "type ipv4_addr . inet_proto . inet_service";
        let mut out = String::new();
        collection(
            &mut out,
            "set",
            TRANSLATED,
            backends,
            &Vec::from_iter(translated),
        );
        out
    }
}

/// Whose a part of a network is, and its MAC on a carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) mac: [u8; 6],
    pub(crate) place: Place,
}

/// How packets get to a part of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// By which carrier.
    pub(crate) carrier: &'static str,
    /// To whom.
    pub(crate) owner: Owner,
    /// What is no longer than this fits the path, octets.
    pub(crate) mtu: u16,
}

/// One carrier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// This host's MAC on it.
    pub(crate) mac: [u8; 6],
    /// From whom packets come by it, whether or not any are sent there.
    pub(crate) owners: Vec<(Ipv4Net, Owner)>,
}

/// What may take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FastPath {
    /// By its name each leg of this host that has a network, whether or not it is there.
    pub(crate) legs: BTreeMap<String, LegValue>,
    /// By their devices, whether or not they are there.
    pub(crate) carriers: BTreeMap<&'static str, Segment>,
    /// Where what the containers send may go.
    pub(crate) ways: Vec<(Ipv4Net, Way)>,
    pub(crate) memory: FastMemory,
    /// The first octets of all IPv6 addresses, where this host has them.
    pub(crate) ula: Option<[u8; 6]>,
}

/// `None` where nothing could take it. `by_vxlan`: those devices of the `vxlan` carrier by which it may lead.
pub fn plan_fast_path(
    view: &View,
    local: &LocalFacts,
    memory: &FastMemory,
    by_vxlan: &BTreeSet<&'static str>,
) -> Option<FastPath> {
    let blocks = blocks(view);
    let carriers = carriers(view, by_vxlan, &blocks);
    let ways = ways(view, &carriers, &blocks);
    if ways.is_empty() || local.legs.is_empty() {
        return None;
    }
    Some(FastPath {
        legs: legs(local, &blocks),
        carriers,
        ways,
        memory: memory.clone(),
        ula: local.ipv6.then_some(view.plan.ula),
    })
}

fn carriers(
    view: &View,
    by_vxlan: &BTreeSet<&'static str>,
    blocks: &[(Ipv4Net, Place)],
) -> BTreeMap<&'static str, Segment> {
    let segment = |carrier, mac| {
        let owners = peers(view).flat_map(|peer| {
            let mac = mac_of(view, peer, carrier);
            mac.into_iter().flat_map(|mac| parts(peer, mac, blocks))
        });
        let owners = owners.collect();
        (carrier, Segment { mac, owners })
    };
    let vxlan = view.vxlan.iter().flat_map(|vxlan| {
        let devices = by_vxlan.iter();
        devices.map(|device| segment(*device, vxlan.mac))
    });
    let sealed = segment(UDP_CARRIER, UDP_CARRIER_MAC);
    [sealed].into_iter().chain(vxlan).collect()
}

/// All prefixes of peers that are alive.
fn ways(
    view: &View,
    carriers: &BTreeMap<&'static str, Segment>,
    blocks: &[(Ipv4Net, Place)],
) -> Vec<(Ipv4Net, Way)> {
    let way = |peer| {
        let (carrier, mtu) = path(peer, view.vxlan_peer(&peer.id));
        let mac = mac_of(view, peer, carrier)?;
        let is_there = carriers.contains_key(carrier);
        mtu.filter(|_| is_there)
            .map(|mtu| (peer, carrier, mac, mtu))
    };
    let alive = peers(view).filter(|peer| peer.liveness != Liveness::Down);
    let ways = alive.filter_map(way).flat_map(|(peer, carrier, mac, mtu)| {
        let way = move |owner| Way {
            carrier,
            owner,
            mtu,
        };
        parts(peer, mac, blocks).map(move |(net, owner)| (net, way(owner)))
    });
    ways.collect()
}

/// All members but this host.
fn peers(view: &View) -> impl Iterator<Item = &Member> {
    view.members.iter().filter(|member| member.number.0 != 0)
}

fn mac_of(view: &View, peer: &Member, carrier: &str) -> Option<[u8; 6]> {
    match carrier {
        UDP_CARRIER => Some(peer_mac(peer.number)),
        _ => {
            let open = view.vxlan_peer(&peer.id);
            let open = open.filter(|open| vxlan_carrier(open.addr) == carrier);
            open.map(|open| open.mac)
        }
    }
}

/// A peer's prefixes as far as they are in networks: an address that is no network's is nobody's to send from.
fn parts(
    peer: &Member,
    mac: [u8; 6],
    blocks: &[(Ipv4Net, Place)],
) -> impl Iterator<Item = (Ipv4Net, Owner)> {
    peer.prefixes.iter().flat_map(move |prefix| {
        blocks.iter().filter_map(move |(block, place)| {
            let owner = Owner { mac, place: *place };
            Some((both(*prefix, *block)?, owner))
        })
    })
}

/// All networks, in parts whose IPv6 addresses name one block.
fn blocks(view: &View) -> Vec<(Ipv4Net, Place)> {
    let mut blocks = Vec::new();
    for (network, nets) in (1..).zip(networks_apart(view)) {
        for net in nets {
            add_blocks(&view.plan, net, network, &mut blocks);
        }
    }
    blocks
}

fn add_blocks(plan: &AddressPlan, net: Ipv4Net, network: u32, out: &mut Vec<(Ipv4Net, Place)>) {
    let block = plan.network_number(net.network());
    if block == plan.network_number(net.broadcast()) {
        return out.push((net, Place { network, block }));
    }
    // Never fails: one address has one number.
    for half in net.subnets(net.prefix_len() + 1).into_iter().flatten() {
        add_blocks(plan, half, network, out);
    }
}

fn legs(local: &LocalFacts, blocks: &[(Ipv4Net, Place)]) -> BTreeMap<String, LegValue> {
    let place = |ip: Ipv4Addr| blocks.iter().find(|(net, _)| net.contains(&ip));
    let leg = |ip: Ipv4Addr| {
        let (_, place) = place(ip)?;
        Some(LegValue {
            mac: container_mac(ip),
            ip,
            place: *place,
        })
    };
    let legs = local.legs.iter();
    legs.filter_map(|l| Some((leg_name(&l.id), leg(l.ip)?)))
        .collect()
}

/// What two nets have in common: one of them, or nothing.
fn both(one: Ipv4Net, other: Ipv4Net) -> Option<Ipv4Net> {
    match (one.contains(&other), other.contains(&one)) {
        (true, _) => Some(other),
        (_, true) => Some(one),
        _ => None,
    }
}

impl FastPath {
    /// Is it a device of this?
    pub(crate) fn has_device(&self, name: &str) -> bool {
        self.carriers.contains_key(name) || self.legs.contains_key(name)
    }
}

#[cfg(test)]
mod tests;
