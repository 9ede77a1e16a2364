//! The fast path for what passes between containers of one network over the `vxlan` carrier: a program at the ingress of their
//! legs sends it on to `wx0` at once, and one at the ingress of `wx0` into the container. It is spared the domain's stack, which
//! costs a stream a quarter of its speed (`docs/performance.md`). They say nothing that the domain's filter does not say, and
//! take only what that lets through:
//!
//! * a leg's own addresses and MAC, a peer's own MAC and addresses, and two addresses of one network;
//! * nothing that a VIP may have been turned into, in either direction: translation needs connection tracking;
//! * the segments in the middle of a TCP connection: connection tracking sees the others, SYNs are clamped, and a
//!   connection that takes the long way again is known or picked up (`nf_conntrack_tcp_be_liberal`);
//! * nothing that is too long for the way. A super-packet's segments are as long as its connection's SYNs allowed; over a
//!   path that once was wider (`widest`) nothing takes the fast path.
//!
//! What they do not take goes on as if they were not there, so that they may be taken away at any moment.

pub(crate) mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use weft_core::layout::{VXLAN_CARRIER, container_mac, mac_text};
use weft_core::model::{AddressPlan, Proto};
use weft_core::view::{Liveness, View, VxlanPeer, VxlanView};

use self::program::{LegValue, OwnerValue, Place};
use super::{collection, networks_apart};
use crate::plan::{LocalFacts, leg_name};

/// The table in which the next daemon finds what this one knew: family netdev, no rules.
pub(crate) const TABLE: &str = "weft_fast";
/// Its set of what VIPs were turned into.
pub(crate) const TRANSLATED: &str = "translated4";
/// Its set of the widest path that each peer had.
pub(crate) const WIDEST: &str = "widest";

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
    /// By a peer's MAC the largest packet that ever fitted its path, octets.
    pub(crate) widest: BTreeMap<[u8; 6], u16>,
}

impl FastMemory {
    /// Takes in what is the case now.
    pub fn note(&mut self, view: &View, backends: impl Iterator<Item = Backend>) {
        let known: BTreeSet<Ipv4Addr> = view.endpoints.iter().map(|e| e.ip).collect();
        self.translated
            .retain(|backend| known.contains(&backend.ip));
        self.translated.extend(backends);
        let peers = || view.vxlan.iter().flat_map(|vxlan| &vxlan.peers);
        let macs: BTreeSet<[u8; 6]> = peers().map(|peer| peer.mac).collect();
        self.widest.retain(|mac, _| macs.contains(mac));
        for peer in peers().filter(|peer| peer.carries) {
            let widest = self.widest.entry(peer.mac).or_default();
            *widest = peer.mtu.max(*widest);
        }
    }

    /// What stands in the table.
    pub(crate) fn table(&self) -> String {
        let translated = self.translated.iter();
        let translated =
            translated.map(|Backend { ip, proto, port }| format!("{ip} . {proto} . {port}"));
        let widest = self.widest.iter();
        let widest = widest.map(|(mac, mtu)| format!("{} . {mtu}", mac_text(*mac)));
        let backends = "type ipv4_addr . inet_proto . inet_service";
        let paths = "type ether_addr . inet_service";
        let mut out = String::new();
        collection(
            &mut out,
            "set",
            TRANSLATED,
            backends,
            &Vec::from_iter(translated),
        );
        collection(&mut out, "set", WIDEST, paths, &Vec::from_iter(widest));
        out
    }

    fn is_as_wide_as_ever(&self, peer: &VxlanPeer) -> bool {
        self.widest
            .get(&peer.mac)
            .is_none_or(|widest| peer.mtu >= *widest)
    }
}

/// What may take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FastPath {
    /// By its name each leg of this host that has a network, whether or not it is there.
    pub(crate) legs: BTreeMap<String, LegValue>,
    /// Whose each part of a network is.
    pub(crate) owners: Vec<(Ipv4Net, OwnerValue)>,
    pub(crate) memory: FastMemory,
    /// What is no longer than this fits every path, octets.
    pub(crate) mtu: u16,
    /// The first octets of all IPv6 addresses, where this host has them.
    pub(crate) ula: Option<[u8; 6]>,
    /// MAC of `wx0`.
    pub(crate) mac: [u8; 6],
}

/// `None` where nothing could take it.
pub fn plan_fast_path(view: &View, local: &LocalFacts, memory: &FastMemory) -> Option<FastPath> {
    let vxlan = view.vxlan.as_ref()?;
    let wide: Vec<&VxlanPeer> = vxlan
        .peers
        .iter()
        .filter(|peer| peer.carries && is_alive(view, peer))
        .filter(|peer| peer.number.0 != 0 && memory.is_as_wide_as_ever(peer))
        .collect();
    let mtu = wide.iter().map(|peer| peer.mtu).min()?;
    if local.legs.is_empty() {
        return None;
    }
    let blocks = blocks(view);
    Some(FastPath {
        legs: legs(local, &blocks),
        owners: owners(view, vxlan, &wide, &blocks),
        memory: memory.clone(),
        mtu,
        ula: local.ipv6.then_some(view.plan.ula),
        mac: vxlan.mac,
    })
}

fn is_alive(view: &View, peer: &VxlanPeer) -> bool {
    let member = view.member(&peer.id);
    member.is_some_and(|member| member.liveness != Liveness::Down)
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

/// All peers' prefixes as far as they are in networks: an address that is no network's is nobody's to send from.
fn owners(
    view: &View,
    vxlan: &VxlanView,
    wide: &[&VxlanPeer],
    blocks: &[(Ipv4Net, Place)],
) -> Vec<(Ipv4Net, OwnerValue)> {
    let mut owners = Vec::new();
    for peer in &vxlan.peers {
        let is_led_to = wide.iter().any(|wide| wide.id == peer.id);
        let prefixes = view.member(&peer.id).map(|member| &member.prefixes);
        for prefix in prefixes.into_iter().flatten() {
            owners.extend(blocks.iter().filter_map(|(block, place)| {
                let owner = OwnerValue {
                    mac: peer.mac,
                    place: *place,
                    is_led_to,
                };
                Some((both(*prefix, *block)?, owner))
            }));
        }
    }
    owners
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
        name == VXLAN_CARRIER || self.legs.contains_key(name)
    }
}

#[cfg(test)]
mod tests;
