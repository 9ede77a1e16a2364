//! The domain's side: VIPs and published ports of this host's containers, and what keeps clients' own addresses.
//!
//! | chain | hook and priority | job |
//! |---|---|---|
//! | `lb_zone` | prerouting raw (-300): before connection tracking | a zone per ingress peer, so that one client's address and port may come through two of them to one backend |
//! | `lb_mark` | prerouting mangle (-150): tracked, not yet routed | the peer a connection came through, onto the connection and from there onto its replies |
//! | `lb_nat` | prerouting dstnat (-100) | VIP and port -> backend |
//! | `lb_unserved` | prerouting dstnat + 1 | what is still for a VIP now has no backend: say so at once; later it would meet the range's unreachable route |
//! | `lb_hairpin` | postrouting srcnat (100) | a backend that reached itself must see another address than its own. The chain stands even when empty: at this hook the kernel also gives a colliding connection another source port |

use std::net::{IpAddr, Ipv4Addr};

use weft_core::layout::{
    HOST_LEG_FAR, LEG_PREFIX, PEER_MARK_MASK, carriers_text, mac_text, peer_mac,
};
use weft_core::model::Proto;
use weft_core::view::PeerNumber;

use super::{base_chain, chain, collection};
use crate::plan::{Balance, Frontend, LbPlan};

/// Set of `address . protocol . port` that packets from outside the overlay may go to on this host, IPv4.
pub const PUBLISHED4: &str = "published4";
/// The same for IPv6.
pub const PUBLISHED6: &str = "published6";

/// Seed of the kernel's hash over a client's address and port ("weft"): all nodes must use the same.
const HASH_SEED: u32 = 0x7765_6674;

/// Renders what stands in the domain's table, beside the base filter.
pub fn domain_fragment(plan: &LbPlan) -> String {
    let mut out = String::new();
    published_sets(plan, &mut out);
    peers(plan, &mut out);
    frontends(plan, &mut out);
    nat(plan, &mut out);
    unserved(plan, &mut out);
    hairpin(plan, &mut out);
    out
}

fn published_sets(plan: &LbPlan, out: &mut String) {
    let four: Vec<String> = plan
        .targets
        .iter()
        .map(|t| format!("{} . {} . {}", t.ip, t.proto, t.port))
        .collect();
    let six: Vec<String> = plan
        .targets
        .iter()
        .filter(|_| plan.ipv6)
        .map(|t| format!("{} . {} . {}", plan.plan.v6(t.ip), t.proto, t.port))
        .collect();
    let set = |name| format!("set {name}");
    collection(
        out,
        &set(PUBLISHED4),
        "type ipv4_addr . inet_proto . inet_service",
        &four,
    );
    collection(
        out,
        &set(PUBLISHED6),
        "type ipv6_addr . inet_proto . inet_service",
        &six,
    );
}

/// Zones and marks. The mark is set on *every* packet of the original direction, not on the first alone: a connection
/// whose packets begin to come another way must be answered that way. Other bits of the mark are kept, which a plain
/// map can't do with a value from a register: hence a chain per peer.
fn peers(plan: &LbPlan, out: &mut String) {
    let keep = !PEER_MARK_MASK;
    let mut zones = Vec::new();
    let mut marks = Vec::new();
    for PeerNumber(number) in &plan.peers {
        let rule = format!("ct mark set ct mark and {keep:#x} or {number:#x}");
        chain(out, &format!("lb_from_{number}"), &[rule]);
    }
    for (mac, number) in macs(plan) {
        zones.push(format!("{mac} : {number}"));
        marks.push(format!("{mac} : goto lb_from_{number}"));
    }
    collection(out, "map lb_zones", "typeof ether saddr : ct zone", &zones);
    collection(out, "map lb_peers", "type ether_addr : verdict", &marks);

    let foreign: Vec<String> = foreign_sources(plan)
        .iter()
        .map(|source| format!("{source} iifname {}", carriers_text(plan.vxlan.is_some())))
        .collect();
    let zone: Vec<String> = foreign
        .iter()
        .map(|f| format!("{f} ct original zone set ether saddr map @lb_zones"))
        .collect();
    base_chain(out, "lb_zone", "filter hook prerouting priority raw", &zone);
    let mut mark: Vec<String> = foreign
        .iter()
        .map(|f| format!("{f} ct direction original ether saddr vmap @lb_peers"))
        .collect();
    mark.push(format!(
        "ct mark and {PEER_MARK_MASK:#x} != 0 ct direction reply iifname \"{LEG_PREFIX}*\" meta mark set ct mark and {PEER_MARK_MASK:#x}"
    ));
    base_chain(
        out,
        "lb_mark",
        "filter hook prerouting priority mangle",
        &mark,
    );
}

/// The MACs that peers come under, on whichever carrier.
fn macs(plan: &LbPlan) -> impl Iterator<Item = (String, u16)> + '_ {
    let sealed = plan.peers.iter().map(|peer| (peer_mac(*peer), *peer));
    let plain = plan.vxlan.iter().flatten();
    let plain = plain.map(|(mac, peer)| (*mac, *peer));
    let known = sealed.chain(plain.filter(|(_, peer)| plan.peers.contains(peer)));
    known.map(|(mac, peer)| (mac_text(mac), peer.0))
}

fn foreign_sources(plan: &LbPlan) -> Vec<String> {
    let mut sources = vec![format!("ip saddr != {}", plan.plan.range)];
    if plan.ipv6 {
        sources.push(format!("ip6 saddr != {}", plan.plan.range6()));
    }
    sources
}

/// The chain of one frontend; its name is made of numbers alone.
fn name(at: &Frontend) -> String {
    let [a, b, c, d] = at.vip.octets();
    format!("lb_{a}_{b}_{c}_{d}_{}_{}", at.proto, at.port)
}

/// One chain per port of a VIP, with a table as large as its own backends need, and the maps that lead there.
fn frontends(plan: &LbPlan, out: &mut String) {
    let mut vip4 = Vec::new();
    let mut vip6 = Vec::new();
    for (at, balance) in &plan.services {
        balance_chain(plan, at, balance, out);
        let (proto, port, chain) = (at.proto, at.port, name(at));
        vip4.push(format!("{} . {proto} . {port} : goto {chain}", at.vip));
        let vip = plan.plan.v6(at.vip);
        vip6.push(format!("{vip} . {proto} . {port} : goto {chain}"));
    }
    let (mut pub4, mut pub6) = (Vec::new(), Vec::new());
    for (addr, proto, port, at) in published_at(plan) {
        let element = format!("{addr} . {proto} . {port} : goto {}", name(&at));
        match addr {
            IpAddr::V4(_) => pub4.push(element),
            IpAddr::V6(_) => pub6.push(element),
        }
    }
    let kind4 = "type ipv4_addr . inet_proto . inet_service : verdict";
    let kind6 = "type ipv6_addr . inet_proto . inet_service : verdict";
    collection(out, "map lb_vip4", kind4, &vip4);
    collection(out, "map lb_pub4", kind4, &pub4);
    if plan.ipv6 {
        collection(out, "map lb_vip6", kind6, &vip6);
        collection(out, "map lb_pub6", kind6, &pub6);
    }
}

fn balance_chain(plan: &LbPlan, at: &Frontend, balance: &Balance, out: &mut String) {
    let (size, target, proto) = (balance.table.len(), balance.target, at.proto);
    let rule = |family: &str, slot_of: &dyn Fn(Ipv4Addr) -> String| {
        let slots: Vec<String> = balance
            .table
            .iter()
            .enumerate()
            .map(|(slot, ip)| format!("{slot} : {}", slot_of(*ip)))
            .collect();
        format!(
            "dnat {family} to jhash {family} saddr . {proto} sport mod {size} seed {HASH_SEED:#x} map {{ {} }} : {target}",
            slots.join(", ")
        )
    };
    let mut rules = vec![rule("ip", &|ip| ip.to_string())];
    if plan.ipv6 {
        rules.push(rule("ip6", &|ip| plan.plan.v6(ip).to_string()));
    }
    chain(out, &name(at), &rules);
}

/// Published ports by each address of the host. A publication for one address alone comes before those for any.
fn published_at(plan: &LbPlan) -> Vec<(IpAddr, Proto, u16, Frontend)> {
    let mut found = std::collections::BTreeMap::new();
    let (any, exact): (Vec<_>, Vec<_>) = plan.published.iter().partition(|(p, _)| p.addr.is_none());
    for (published, at) in exact.into_iter().chain(any) {
        if !plan.services.contains_key(at) {
            continue;
        }
        for addr in &plan.host_addrs {
            if published.addr.is_none_or(|only| only == *addr) {
                let key = (*addr, published.proto, published.port);
                found.entry(key).or_insert(*at);
            }
        }
    }
    found
        .into_iter()
        .map(|((addr, proto, port), at)| (addr, proto, port, at))
        .collect()
}

/// `th dport` reads whatever stands there, so the protocol is asked first. From the carrier nothing is translated: the
/// host where a connection begins does that.
fn nat(plan: &LbPlan, out: &mut String) {
    let look_up = |family: &str, map: &str| {
        format!("meta l4proto {{ tcp, udp }} {family} daddr . meta l4proto . th dport vmap @{map}")
    };
    let mut vips = vec![look_up("ip", "lb_vip4")];
    let mut from_leg = dns_rules(plan);
    from_leg.push(look_up("ip", "lb_pub4"));
    if plan.ipv6 {
        vips.push(look_up("ip6", "lb_vip6"));
        from_leg.push(look_up("ip6", "lb_pub6"));
    }
    from_leg.push("goto lb_vips".to_owned());
    chain(out, "lb_vips", &vips);
    chain(out, "lb_legs", &from_leg);
    let entry = [
        format!("iifname \"{LEG_PREFIX}*\" goto lb_legs"),
        format!("iifname \"{HOST_LEG_FAR}\" goto lb_vips"),
    ];
    base_chain(out, "lb_nat", "nat hook prerouting priority dstnat", &entry);
}

fn dns_rules(plan: &LbPlan) -> Vec<String> {
    let resolvers = plan.resolvers.iter().filter(|ip| plan.ipv6 || ip.is_ipv4());
    let to = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => format!(
            "ip daddr {v4} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {}",
            plan.plan.dns4()
        ),
        IpAddr::V6(v6) => format!(
            "ip6 daddr {v6} meta l4proto {{ tcp, udp }} th dport 53 dnat ip6 to {}",
            plan.plan.dns6()
        ),
    };
    resolvers.map(to).collect()
}

/// A packet that connection tracking takes for invalid passes no translation either: to answer it with a reset would
/// end the living connection it strayed from.
fn unserved(plan: &LbPlan, out: &mut String) {
    let refuse = [
        "ct state invalid drop".to_owned(),
        format!("iifname {} drop", carriers_text(plan.vxlan.is_some())),
        "meta l4proto tcp reject with tcp reset".to_owned(),
        "reject with icmpx port-unreachable".to_owned(),
    ];
    chain(out, "lb_refuse", &refuse);
    let vips = plan.plan.vips();
    let mut rules = vec![format!(
        "ip daddr {vips} ip daddr != {} goto lb_refuse",
        plan.plan.dns4()
    )];
    if plan.ipv6 {
        let (vips, dns) = (plan.plan.v6_net(vips), plan.plan.dns6());
        rules.push(format!(
            "ip6 daddr {vips} ip6 daddr != {dns} goto lb_refuse"
        ));
    }
    base_chain(
        out,
        "lb_unserved",
        "filter hook prerouting priority dstnat + 1",
        &rules,
    );
}

fn hairpin(plan: &LbPlan, out: &mut String) {
    let pairs = |text: &dyn Fn(Ipv4Addr) -> String| -> Vec<String> {
        let twice = plan.local.iter().map(|ip| text(*ip));
        twice.map(|ip| format!("{ip} . {ip}")).collect()
    };
    collection(
        out,
        "set lb_self4",
        "type ipv4_addr . ipv4_addr",
        &pairs(&|ip| ip.to_string()),
    );
    let mut rules = vec![format!(
        "ip saddr . ip daddr @lb_self4 snat ip to {}",
        plan.plan.dns4()
    )];
    if plan.ipv6 {
        collection(
            out,
            "set lb_self6",
            "type ipv6_addr . ipv6_addr",
            &pairs(&|ip| plan.plan.v6(ip).to_string()),
        );
        rules.push(format!(
            "ip6 saddr . ip6 daddr @lb_self6 snat ip6 to {}",
            plan.plan.dns6()
        ));
    }
    base_chain(
        out,
        "lb_hairpin",
        "nat hook postrouting priority srcnat",
        &rules,
    );
}
