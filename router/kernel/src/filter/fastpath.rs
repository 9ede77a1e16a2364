//! The fast path for what passes between containers of one network over the `vxlan` carrier: at the ingress hook of their
//! legs and of `wx0` it is sent on to the other device at once, and spared the rest of the domain's stack, which costs a
//! stream a seventh of its speed (`docs/performance.md`). It says nothing that the domain's filter does not say, and takes
//! only what that lets through:
//!
//! * a leg's own addresses and MAC, a peer's own MAC and addresses, and two addresses of one network;
//! * nothing that a VIP may have been turned into, in either direction: translation needs connection tracking;
//! * the segments in the middle of a TCP connection: connection tracking sees the others, SYNs are clamped, and a
//!   connection that takes the long way again is known or picked up (`nf_conntrack_tcp_be_liberal`);
//! * nothing that is too long for the way. A super-packet's segments are as long as its connection's SYNs allowed; over a
//!   path that once was wider (`widest`) nothing takes the fast path.
//!
//! What it does not take goes on as if it were not there, so that it may be taken away at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use weft_core::layout::{DEVICE_MTU, VXLAN_CARRIER, container_mac, mac_text, peer_link_local};
use weft_core::model::{AddressPlan, Proto};
use weft_core::view::{Liveness, View, VxlanPeer, VxlanView};

use super::vxlan::{self, SOURCES4, SOURCES6};
use super::{PAIRS4, PAIRS6, collection, network_pairs};
use crate::plan::{LocalFacts, leg_name, peer_link_local4};

/// The table, of family netdev.
pub(crate) const TABLE: &str = "weft_fast";
/// Its set of what VIPs were turned into, IPv4.
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

    fn is_as_wide_as_ever(&self, peer: &VxlanPeer) -> bool {
        self.widest
            .get(&peer.mac)
            .is_none_or(|widest| peer.mtu >= *widest)
    }
}

/// What may take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FastPath {
    /// By its name each leg of this host, whether or not it is there.
    legs: BTreeMap<String, Leg>,
    /// The elements of the sets and maps but those of legs, by name; see [`KINDS`].
    elements: BTreeMap<&'static str, Vec<String>>,
    /// What is no longer than this fits every path, octets.
    mtu: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Leg {
    addresses: Vec<IpAddr>,
    mac: [u8; 6],
}

/// Sets and maps, and what they hold.
const KINDS: [(&str, &str, &str); 13] = [
    ("set", "legs4", "type ifname . ipv4_addr . ether_addr"),
    ("set", "legs6", "type ifname . ipv6_addr . ether_addr"),
    ("map", "homes4", "type ipv4_addr : iface_index"),
    ("map", "homes6", "type ipv6_addr : iface_index"),
    ("set", "nets4", PAIRS4),
    ("set", "nets6", PAIRS6),
    ("set", "sources4", SOURCES4),
    ("set", "sources6", SOURCES6),
    (
        "set",
        TRANSLATED,
        "type ipv4_addr . inet_proto . inet_service",
    ),
    (
        "set",
        "translated6",
        "type ipv6_addr . inet_proto . inet_service",
    ),
    (
        "map",
        "peers4",
        "type ipv4_addr : ipv4_addr; flags interval",
    ),
    (
        "map",
        "peers6",
        "type ipv6_addr : ipv6_addr; flags interval",
    ),
    ("set", WIDEST, "type ether_addr . inet_service"),
];

/// `None` where nothing could take it.
pub fn plan_fast_path(view: &View, local: &LocalFacts, memory: &FastMemory) -> Option<FastPath> {
    let vxlan = view.vxlan.as_ref()?;
    let alive = |peer: &&VxlanPeer| {
        let member = view.member(&peer.id);
        peer.carries && member.is_some_and(|member| member.liveness != Liveness::Down)
    };
    let wide: Vec<&VxlanPeer> = vxlan
        .peers
        .iter()
        .filter(alive)
        .filter(|peer| peer.number.0 != 0 && memory.is_as_wide_as_ever(peer))
        .collect();
    let mtu = wide.iter().map(|peer| peer.mtu).min()?;
    if local.legs.is_empty() {
        return None;
    }
    Some(FastPath {
        legs: legs(&view.plan, local),
        elements: elements(view, vxlan, &wide, memory),
        mtu,
    })
}

fn legs(plan: &AddressPlan, local: &LocalFacts) -> BTreeMap<String, Leg> {
    let leg = |ip: Ipv4Addr| {
        let ip6 = local.ipv6.then(|| IpAddr::from(plan.v6(ip)));
        Leg {
            addresses: std::iter::once(ip.into()).chain(ip6).collect(),
            mac: container_mac(ip),
        }
    };
    let legs = local.legs.iter();
    legs.map(|l| (leg_name(&l.id), leg(l.ip))).collect()
}

fn elements(
    view: &View,
    vxlan: &VxlanView,
    wide: &[&VxlanPeer],
    memory: &FastMemory,
) -> BTreeMap<&'static str, Vec<String>> {
    let (nets4, nets6) = network_pairs(view);
    let (sources4, sources6) = vxlan::sources(view, vxlan);
    let led = wide.iter().flat_map(|peer| {
        let prefixes = view.member(&peer.id).map(|member| &member.prefixes);
        let each = prefixes.into_iter().flatten();
        each.map(|net| {
            let net6 = view.plan.v6_cover(*net);
            let (by4, by6) = (peer_link_local4(peer.number), peer_link_local(peer.number));
            (format!("{net} : {by4}"), format!("{net6} : {by6}"))
        })
    });
    let (peers4, peers6) = led.unzip();
    let turned = memory.translated.iter().map(|Backend { ip, proto, port }| {
        let ip6 = view.plan.v6(*ip);
        (
            format!("{ip} . {proto} . {port}"),
            format!("{ip6} . {proto} . {port}"),
        )
    });
    let (translated4, translated6) = turned.unzip();
    let widest = memory.widest.iter();
    let widest = widest.map(|(mac, mtu)| format!("{} . {mtu}", mac_text(*mac)));
    BTreeMap::from([
        ("nets4", nets4),
        ("nets6", nets6),
        ("sources4", sources4),
        ("sources6", sources6),
        ("peers4", peers4),
        ("peers6", peers6),
        (TRANSLATED, translated4),
        ("translated6", translated6),
        (WIDEST, widest.collect()),
    ])
}

impl FastPath {
    /// Is it a device of this?
    pub(crate) fn has_device(&self, name: &str) -> bool {
        name == VXLAN_CARRIER || self.legs.contains_key(name)
    }

    /// What stands in the table where these devices are there, `wx0` among them; `None` without a leg.
    pub(crate) fn table(&self, present: &BTreeSet<&str>) -> Option<String> {
        let here = || {
            self.legs
                .iter()
                .filter(|(name, _)| present.contains(name.as_str()))
        };
        let names: Vec<String> = here().map(|(name, _)| format!("\"{name}\"")).collect();
        if names.is_empty() || !present.contains(VXLAN_CARRIER) {
            return None;
        }
        let mut elements = self.elements.clone();
        for (name, leg) in here() {
            let mac = mac_text(leg.mac);
            for ip in &leg.addresses {
                let (legs, homes) = match ip {
                    IpAddr::V4(_) => ("legs4", "homes4"),
                    IpAddr::V6(_) => ("legs6", "homes6"),
                };
                let add = |elements: &mut BTreeMap<_, Vec<_>>, to, what| {
                    elements.entry(to).or_default().push(what);
                };
                add(&mut elements, legs, format!("\"{name}\" . {ip} . {mac}"));
                add(&mut elements, homes, format!("{ip} : \"{name}\""));
            }
        }
        let mut out = String::new();
        for (block, name, kind) in KINDS {
            let of_it = elements.get(name).map_or(&[][..], Vec::as_slice);
            collection(&mut out, block, name, kind, of_it);
        }
        self.chains(&mut out, &names.join(", "));
        Some(out)
    }

    fn chains(&self, out: &mut String, legs: &str) {
        let _ = writeln!(
            out,
            "chain from_legs {{ type filter hook ingress devices = {{ {legs} }} priority 10; policy accept;
  meta pkttype != host return
  iifname . ip saddr . ether saddr @legs4 goto out4
  iifname . ip6 saddr . ether saddr @legs6 goto out6
}}
chain from_peers {{ type filter hook ingress device \"{VXLAN_CARRIER}\" priority 10; policy accept;
  meta pkttype != host return
  ether saddr . ip saddr @sources4 goto in4
  ether saddr . ip6 saddr @sources6 goto in6
}}"
        );
        for family in [&V4, &V6] {
            let (word, version, checks) = (family.word, family.version, family.checks());
            let mtu = self.mtu;
            let _ = writeln!(
                out,
                "chain out{version} {{
  meta length > {mtu} meta length <= {DEVICE_MTU} return
  meta length > {DEVICE_MTU} {protocol} != tcp return
{checks}  counter fwd {word} to {word} daddr map @peers{version} device \"{VXLAN_CARRIER}\"
}}
chain in{version} {{
{checks}  counter fwd {word} to {word} daddr device {word} daddr map @homes{version}
}}",
                protocol = family.protocol,
            );
        }
    }
}

/// A family in nft's words.
struct Words {
    word: &'static str,
    version: u8,
    protocol: &'static str,
    /// What else than a plain header returns.
    header: &'static str,
    icmp: &'static str,
    /// Its number.
    icmp_proto: u8,
}

const V4: Words = Words {
    word: "ip",
    version: 4,
    protocol: "ip protocol",
    header: "  ip hdrlength != 5 return
  ip frag-off & 0x3fff != 0 return
  ip ttl < 2 return
",
    icmp: "icmp",
    icmp_proto: 1,
};

const V6: Words = Words {
    word: "ip6",
    version: 6,
    protocol: "ip6 nexthdr",
    header: "  ip6 hoplimit < 2 return
",
    icmp: "icmpv6",
    icmp_proto: 58,
};

impl Words {
    /// What goes the long way. Extension headers do: of those the protocol is none of the three.
    fn checks(&self) -> String {
        let Self {
            word,
            version,
            protocol,
            header,
            icmp,
            icmp_proto,
        } = self;
        format!(
            "{header}  {protocol} != {{ tcp, udp, {icmp_proto} }} return
  {icmp} type != {{ echo-request, echo-reply }} return
  tcp flags & (fin | syn | rst) != 0 return
  {word} saddr . {word} daddr != @nets{version} return
  {word} saddr . {protocol} . th sport @translated{version} return
  {word} daddr . {protocol} . th dport @translated{version} return
"
        )
    }
}

#[cfg(test)]
mod tests;
