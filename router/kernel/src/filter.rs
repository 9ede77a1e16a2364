//! The base filter of both namespaces, as fragments of nft text to stand inside `table inet weft { ... }`.
//!
//! Only numbers, addresses and device names that weft made itself are ever written into a rule; names that people chose
//! never are. The balancer's fragment stands beside in the same table: its chains begin with `lb_`, these with `base_`,
//! and it declares the sets `published4` and `published6` (address . protocol . port of the backends of published
//! services) that the domain's filter refers to.
//!
//! | domain, chain | hook, priority | what |
//! |---|---|---|
//! | `base_raw` | prerouting, raw - 10 | a leg sends from its own addresses and MAC alone, and so does a peer over VXLAN; no ND from containers or carriers |
//! | `base_plain` | from `base_raw` | TCP between two of one network is not tracked, unless a virtual address was turned into one of them |
//! | `base_dns` | prerouting, dstnat - 10 | queries to the host's resolvers are turned to weft's DNS |
//! | `base_mss` | forward, mangle | TCP's segment size fits both ways' routes, and IPv6's the paths that have less than its least MTU |
//! | `base_input` | input, filter | DNS, echo, replies; nothing else |
//! | `base_forward` | forward, filter | no transit; from peers only what concerns this host; containers reach each other only within a network |
//!
//! An ICMP error may be about packets that took the fast path (`filter/fastpath.rs`), of which connection tracking knows
//! nothing: it passes where its sender's packets do. ICMP goes by its numbers, 1 and 58: not every host has a list of names.
//!
//! A container's own domain says whom it may reach; at the other end nobody can tell a packet that a VIP sent on from one
//! that was sent straight. So it holds as far as the hosts themselves are honest.
//!
//! | host, chain | hook, priority | what |
//! |---|---|---|
//! | `base_raw` | prerouting, raw | nothing foreign to or from the range |
//! | `base_mss` | forward, mangle | as above |
//! | `base_vxlan_in`, `_out`, `_sent`, `_through` | from `base_raw`; output, raw, and from there; forward | VXLAN from peers with whom it was agreed, and from nobody else (`filter/vxlan.rs`) |
//! | `base_input` | input, filter | the overlay reaches the host only by echo and replies |
//! | `base_forward` | forward, filter | towards the overlay only published ports and replies; the guard |
//! | `base_leak` | postrouting, filter | nothing for the range leaves by an uplink |
//! | `base_egress` | postrouting, srcnat | masquerade |

pub(crate) mod fastpath;
pub(crate) mod vxlan;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use weft_core::layout::{
    HOST_LEG, HOST_LEG_FAR, IPV6_MIN_MTU, LEG_PREFIX, UDP_CARRIER, VXLAN_CARRIERS, carriers_text,
    container_mac, mac_text,
};
use weft_core::model::Proto;
use weft_core::view::{EndpointKind, View};

use self::fastpath::{Backend, FastMemory};
use crate::plan::{LocalFacts, leg_name, path};

/// Octets of an IPv6 header and a TCP header without options, which a segment's size does not count (RFC 9293 §3.7.1).
const IPV6_AND_TCP_HEADER: u16 = 40 + 20;

/// Forwards that are not weft's are dropped, because nobody but weft wants this host to forward at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// The domain's part. `memory`: what virtual addresses were ever turned into, if that is known.
pub fn domain_filter(view: &View, local: &LocalFacts, memory: Option<&FastMemory>) -> String {
    let mut out = String::with_capacity(4096);
    domain_sets(&mut out, view, local);
    domain_plain(&mut out, view, memory);
    domain_raw(&mut out, view, local);
    domain_dns(&mut out, view, local);
    domain_mss(&mut out, view, local);
    domain_input(&mut out, view);
    domain_forward(&mut out, view, local);
    out
}

/// The host's part. What tells most packets apart comes first in a rule: an address is a comparison, a device's name a
/// text that is looked up.
pub fn host_filter(view: &View, local: &LocalFacts, guard: Guard) -> String {
    let mut out = String::with_capacity(2048);
    let (range, range6) = (view.plan.range, view.plan.range6());
    let near = format!("{{ \"{HOST_LEG}\", \"lo\" }}");
    // Chains that are gone to stand before those that go there.
    vxlan::host(&mut out, view);
    let first = vxlan::host_first(view);
    let _ = writeln!(
        out,
        "chain base_raw {{ type filter hook prerouting priority raw; policy accept;
{first}  ip daddr {range} iifname != {near} counter drop
  ip saddr {range} iifname != {near} counter drop
  ip6 daddr {range6} iifname != {near} counter drop
  ip6 saddr {range6} iifname != {near} counter drop
}}
chain base_leak {{ type filter hook postrouting priority filter; policy accept;
  ip daddr {range} oifname != {near} counter drop
  ip6 daddr {range6} oifname != {near} counter drop
}}
chain base_egress {{ type nat hook postrouting priority srcnat; policy accept;
  ip saddr {range} oifname != {near} masquerade
  ip6 saddr {range6} oifname != {near} masquerade
}}"
    );
    host_mss(&mut out);
    host_input(&mut out);
    host_forward(&mut out, local, guard);
    out
}

fn host_input(out: &mut String) {
    let _ = writeln!(
        out,
        "chain base_input {{ type filter hook input priority filter; policy accept;
  iifname \"{HOST_LEG}\" jump base_from_overlay
}}
chain base_from_overlay {{
  ct state established,related accept
  icmp type echo-request accept
  icmpv6 type echo-request accept
  meta l4proto tcp counter reject with tcp reset
  counter drop
}}"
    );
}

fn host_forward(out: &mut String, local: &LocalFacts, guard: Guard) {
    let _ = writeln!(
        out,
        "chain base_forward {{ type filter hook forward priority filter; policy accept;
  oifname \"{HOST_LEG}\" jump base_to_overlay
  iifname \"{HOST_LEG}\" accept"
    );
    if guard.v4 {
        let _ = writeln!(out, "  meta nfproto ipv4 counter drop");
    }
    if guard.v6 && local.ipv6 {
        let _ = writeln!(out, "  meta nfproto ipv6 counter drop");
    }
    let _ = writeln!(
        out,
        "}}
chain base_to_overlay {{
  ct state established,related accept
  ct status dnat accept
  counter drop
}}"
    );
}

/// On every SYN, to something less alone: the kernel raises no segment size.
const CLAMP: &str = "tcp flags syn tcp option maxseg size set";

/// Whichever way: the MTU of the route there and of the route back (the kernel takes the lesser).
fn host_mss(out: &mut String) {
    let _ = writeln!(
        out,
        "chain base_mss {{ type filter hook forward priority mangle; policy accept;
  iifname \"{HOST_LEG}\" {CLAMP} rt mtu
  oifname \"{HOST_LEG}\" {CLAMP} rt mtu
}}"
    );
}

/// The same of all that the domain forwards. No route of IPv6 has less than its least MTU; where a path has, its segments fit
/// it in one piece all the same.
fn domain_mss(out: &mut String, view: &View, local: &LocalFacts) {
    let narrow = match local.ipv6 {
        true => narrow(view),
        false => BTreeMap::new(),
    };
    let mut rules = String::new();
    for (mtu, nets) in &narrow {
        let name = format!("base_narrow_{mtu}");
        let nets: Vec<String> = nets.iter().map(Ipv6Net::to_string).collect();
        set(out, &name, "type ipv6_addr; flags interval", &nets);
        let segment = mtu.saturating_sub(IPV6_AND_TCP_HEADER);
        for end in ["daddr", "saddr"] {
            let _ = writeln!(rules, "  ip6 {end} @{name} {CLAMP} {segment}");
        }
    }
    let _ = writeln!(
        out,
        "chain base_mss {{ type filter hook forward priority mangle; policy accept;
  {CLAMP} rt mtu
{rules}}}"
    );
}

/// By the path's MTU those whose path is too narrow for IPv6.
fn narrow(view: &View) -> BTreeMap<u16, Vec<Ipv6Net>> {
    let mut narrow: BTreeMap<u16, Vec<Ipv6Net>> = BTreeMap::new();
    for member in &view.members {
        let (_, mtu) = path(member, view.vxlan_peer(&member.id));
        if let Some(mtu) = mtu.filter(|mtu| *mtu < IPV6_MIN_MTU) {
            let nets = member.prefixes.iter().map(|net| view.plan.v6_cover(*net));
            narrow.entry(mtu).or_default().extend(nets);
        }
    }
    // The kernel refuses elements that overlap.
    for nets in narrow.values_mut() {
        *nets = Ipv6Net::aggregate(nets);
    }
    narrow
}

fn domain_sets(out: &mut String, view: &View, local: &LocalFacts) {
    let mut legs4 = Vec::new();
    let mut legs6 = Vec::new();
    let mut local4 = Vec::new();
    let mut local6 = Vec::new();
    for leg in &local.legs {
        let (name, mac) = (leg_name(&leg.id), mac_text(container_mac(leg.ip)));
        let ip6 = view.plan.v6(leg.ip);
        legs4.push(format!("\"{name}\" . {} . {mac}", leg.ip));
        legs6.push(format!("\"{name}\" . {ip6} . {mac}"));
        local4.push(leg.ip.to_string());
        local6.push(ip6.to_string());
    }
    if let Some(ip) = local.host_ip {
        local4.push(ip.to_string());
        local6.push(view.plan.v6(ip).to_string());
    }
    set(
        out,
        "base_legs4",
        "type ifname . ipv4_addr . ether_addr",
        &legs4,
    );
    set(
        out,
        "base_legs6",
        "type ifname . ipv6_addr . ether_addr",
        &legs6,
    );
    set(out, "base_local4", "type ipv4_addr", &local4);
    set(out, "base_local6", "type ipv6_addr", &local6);
    vxlan::domain_sets(out, view);
    network_sets(out, view);
}

/// Who reaches whom: an element per network, and the hosts' own legs, which belong to all.
fn network_sets(out: &mut String, view: &View) {
    let (pairs4, pairs6) = network_pairs(view);
    let hosts = || {
        view.endpoints
            .iter()
            .filter(|e| e.kind == EndpointKind::Host)
    };
    let hosts4: Vec<String> = hosts().map(|e| e.ip.to_string()).collect();
    let hosts6: Vec<String> = hosts().map(|e| view.plan.v6(e.ip).to_string()).collect();
    set(out, "base_nets4", PAIRS4, &pairs4);
    set(out, "base_nets6", PAIRS6, &pairs6);
    set(out, "base_hosts4", "type ipv4_addr", &hosts4);
    set(out, "base_hosts6", "type ipv6_addr", &hosts6);
}

/// What holds the pairs of blocks between which containers reach each other.
const PAIRS4: &str = "type ipv4_addr . ipv4_addr; flags interval";
const PAIRS6: &str = "type ipv6_addr . ipv6_addr; flags interval";

/// Those pairs, of both families.
fn network_pairs(view: &View) -> (Vec<String>, Vec<String>) {
    let mut pairs4 = Vec::new();
    let mut pairs6 = Vec::new();
    for blocks in networks_apart(view) {
        for (from, to) in blocks
            .iter()
            .flat_map(|from| blocks.iter().map(move |to| (from, to)))
        {
            pairs4.push(format!("{from} . {to}"));
            let (from6, to6) = (view.plan.v6_cover(*from), view.plan.v6_cover(*to));
            pairs6.push(format!("{from6} . {to6}"));
        }
    }
    (pairs4, pairs6)
}

/// The blocks of each network, none of which has anything in common with another's.
fn networks_apart(view: &View) -> Vec<Vec<Ipv4Net>> {
    let mut seen: Vec<Ipv4Net> = Vec::new();
    let mut networks = Vec::new();
    for network in &view.networks {
        // The kernel refuses elements that overlap; no honest node makes such networks.
        let apart = |net: &Ipv4Net| !seen.iter().any(|n| n.contains(net) || net.contains(n));
        let blocks: Vec<Ipv4Net> = network.blocks().filter(apart).collect();
        seen.extend(&blocks);
        networks.push(blocks);
    }
    networks
}

fn set(out: &mut String, name: &str, kind: &str, elements: &[String]) {
    collection(out, "set", name, kind, elements);
}

/// A set or a map, as `block` says.
fn collection(out: &mut String, block: &str, name: &str, kind: &str, elements: &[String]) {
    let _ = write!(out, "{block} {name} {{ {kind};");
    if !elements.is_empty() {
        let _ = write!(out, " elements = {{ {} }};", elements.join(", "));
    }
    let _ = writeln!(out, " }}");
}

/// Neighbour discovery (RFC 4861 §4).
const ND: &str =
    "{ nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect }";

/// TCP between two of one network is not tracked, on the fast path or on the long way: the one does not see what the other
/// does, and an entry whose end nobody sees would stay for days. Nothing needs one, but what belongs to a virtual address:
/// that is tracked, in both directions.
fn domain_plain(out: &mut String, view: &View, memory: Option<&FastMemory>) {
    let backends = memory.into_iter().flat_map(|memory| &memory.translated);
    let tcp = backends.filter(|backend| backend.proto == Proto::Tcp);
    let (translated4, translated6) = tcp
        .map(|Backend { ip, port, .. }| {
            let ip6 = view.plan.v6(*ip);
            (format!("{ip} . {port}"), format!("{ip6} . {port}"))
        })
        .unzip::<_, _, Vec<_>, Vec<_>>();
    let kind = |address: &str| format!("type {address} . inet_service");
    set(out, "base_translated4", &kind("ipv4_addr"), &translated4);
    set(out, "base_translated6", &kind("ipv6_addr"), &translated6);
    let rules = match memory {
        None => "",
        Some(_) => {
            "  meta l4proto != tcp return
  ip saddr . tcp sport @base_translated4 return
  ip daddr . tcp dport @base_translated4 return
  ip6 saddr . tcp sport @base_translated6 return
  ip6 daddr . tcp dport @base_translated6 return
  ip saddr . ip daddr @base_nets4 notrack
  ip6 saddr . ip6 daddr @base_nets6 notrack
"
        }
    };
    let _ = writeln!(out, "chain base_plain {{\n{rules}}}");
}

/// Neighbours are permanent on both sides, so nobody needs ND: none is let in, and neither is anything else from an
/// address that is not the leg's own (RFC 4861 advertisements and redirects could steer others).
fn domain_raw(out: &mut String, view: &View, local: &LocalFacts) {
    let (range, range6) = (view.plan.range, view.plan.range6());
    vxlan::domain_chains(out, view);
    let vxlan = match view.vxlan {
        Some(_) => VXLAN_CARRIERS
            .map(|device| format!(", \"{device}\" : goto base_vxlan"))
            .concat(),
        None => String::new(),
    };
    let _ = writeln!(
        out,
        "chain base_raw {{ type filter hook prerouting priority -310; policy accept;
  iifname \"{LEG_PREFIX}*\" goto base_legs
  iifname vmap {{ \"{UDP_CARRIER}\" : goto base_carrier, \"{HOST_LEG_FAR}\" : goto base_host{vxlan} }}
}}
chain base_legs {{
  iifname . ip saddr . ether saddr @base_legs4 goto base_plain
  icmpv6 type {ND} drop
  iifname . ip6 saddr . ether saddr @base_legs6 goto base_plain
  counter drop
}}
chain base_carrier {{
  ip saddr {range} goto base_plain
  ip saddr {{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }} counter drop
  icmpv6 type {ND} drop
  ip6 saddr {{ ::, ::1, fe80::/10, ff00::/8 }} counter drop
  ip6 saddr {range6} goto base_plain
}}
chain base_host {{
  icmpv6 type {ND} drop"
    );
    if let Some(ip) = local.host_ip {
        let ip6 = view.plan.v6(ip);
        let _ = writeln!(
            out,
            "  ip saddr {ip} goto base_plain
  ip6 saddr {ip6} goto base_plain"
        );
    }
    let _ = writeln!(
        out,
        "  ip saddr {range} counter drop
  ip6 saddr {range6} counter drop
}}"
    );
}

fn domain_dns(out: &mut String, view: &View, local: &LocalFacts) {
    let (dns4, dns6) = (view.plan.dns4(), view.plan.dns6());
    let usable = |ip: &&IpAddr| !ip.is_loopback() && !ip.is_unspecified();
    let join = |v4: bool| {
        let mut texts: Vec<String> = local
            .resolvers
            .iter()
            .filter(usable)
            .filter(|ip| ip.is_ipv4() == v4)
            .map(IpAddr::to_string)
            .collect();
        texts.sort();
        texts.dedup();
        texts.join(", ")
    };
    let _ = writeln!(
        out,
        "chain base_dns {{ type nat hook prerouting priority dstnat - 10; policy accept;"
    );
    let (servers4, servers6) = (join(true), join(false));
    if !servers4.is_empty() {
        let _ = writeln!(
            out,
            "  iifname \"{LEG_PREFIX}*\" ip daddr {{ {servers4} }} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {dns4}"
        );
    }
    if !servers6.is_empty() {
        let _ = writeln!(
            out,
            "  iifname \"{LEG_PREFIX}*\" ip6 daddr {{ {servers6} }} meta l4proto {{ tcp, udp }} th dport 53 dnat ip6 to {dns6}"
        );
    }
    let _ = writeln!(out, "}}");
}

fn domain_input(out: &mut String, view: &View) {
    let (dns4, dns6) = (view.plan.dns4(), view.plan.dns6());
    let near = format!("{{ \"{LEG_PREFIX}*\", \"{HOST_LEG_FAR}\" }}");
    let _ = writeln!(
        out,
        "chain base_input {{ type filter hook input priority filter; policy drop;
  iifname \"lo\" accept
  ct state established,related accept
  ct state invalid drop
  iifname {near} ip daddr {dns4} meta l4proto {{ tcp, udp }} th dport 53 accept
  iifname {near} ip6 daddr {dns6} meta l4proto {{ tcp, udp }} th dport 53 accept
  iifname {near} icmp type echo-request accept
  iifname {near} icmpv6 type echo-request accept
  iifname \"{LEG_PREFIX}*\" meta l4proto tcp counter reject with tcp reset
  counter drop
}}"
    );
}

fn domain_forward(out: &mut String, view: &View, local: &LocalFacts) {
    let (range, range6) = (view.plan.range, view.plan.range6());
    let carriers = carriers_text(view.vxlan.is_some());
    let mut onward = format!("\"{LEG_PREFIX}*\", \"{UDP_CARRIER}\"");
    if view.vxlan.is_some() {
        onward.extend(VXLAN_CARRIERS.map(|device| format!(", \"{device}\"")));
    }
    let _ = writeln!(
        out,
        "chain base_forward {{ type filter hook forward priority filter; policy drop;
  ct state established,related accept
  ct state invalid meta l4proto != {{ 1, 58 }} counter drop
  iifname \"{LEG_PREFIX}*\" jump base_from_leg
  iifname {carriers} jump base_from_peer
  iifname \"{HOST_LEG_FAR}\" jump base_from_host
  counter drop
}}
chain base_within {{
  ct status dnat accept
  ip saddr . ip daddr @base_nets4 accept
  ip6 saddr . ip6 daddr @base_nets6 accept
  ip daddr @base_hosts4 accept
  ip6 daddr @base_hosts6 accept
  counter reject with icmpx admin-prohibited
}}
chain base_from_leg {{
  oifname {{ {onward} }} jump base_within"
    );
    if let Some(ip) = local.host_ip {
        let ip6 = view.plan.v6(ip);
        let _ = writeln!(out, "  ip daddr {ip} accept\n  ip6 daddr {ip6} accept");
    }
    let _ = writeln!(
        out,
        "  oifname \"{HOST_LEG_FAR}\" ip daddr != {range} accept
  oifname \"{HOST_LEG_FAR}\" ip6 daddr != {range6} accept
  counter drop
}}
chain base_from_peer {{
  oifname {carriers} counter drop
  ip saddr {range} ip daddr @base_local4 accept
  ip6 saddr {range6} ip6 daddr @base_local6 accept
  ip saddr != {range} ip daddr . meta l4proto . th dport @published4 accept
  ip6 saddr != {range6} ip6 daddr . meta l4proto . th dport @published6 accept
  counter drop
}}
chain base_from_host {{
  oifname \"{HOST_LEG_FAR}\" counter drop
  ct status dnat accept"
    );
    if let Some(ip) = local.host_ip {
        let ip6 = view.plan.v6(ip);
        let _ = writeln!(out, "  ip saddr {ip} accept\n  ip6 saddr {ip6} accept");
    }
    let _ = writeln!(out, "  counter drop\n}}");
}
