//! What the filter needs for the `vxlan` carrier. VXLAN proves nothing of its sender: the host takes it only from the
//! address and inner MAC of a peer with which it was agreed, and the domain holds each such MAC to the peer's own
//! addresses. Where they agreed to seal it, both directions take nothing that ESP was not around, or will not be: whatever
//! became of the kernel's own policies. Nothing of this stands on a host without trusted subnets that does no ESP.
//!
//! An accept-list, and all else is dropped: a rule that drops what is *not* listed never matches a fragment that ends
//! before the inner header, and lets it in.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use weft_core::layout::{NFT_TABLE, VXLAN_CARRIER, VXLAN_CARRIER6, VXLAN_PORT, mac_text};
use weft_core::view::{Seal, View, VxlanPeer, VxlanView};

use super::set;

/// The host's chains, and how many rules stand in each while nobody has touched them.
pub(crate) const HOST_CHAINS: [(&str, usize); 5] = [
    ("base_raw", 5),
    ("base_vxlan_in", 5),
    ("base_vxlan_out", 1),
    ("base_vxlan_sent", 6),
    ("base_vxlan_through", 1),
];

/// The domain's set of the MACs that come over the carrier. It counts what comes from each.
pub(crate) const PEERS: &str = "base_vxlan_macs";

/// What was sent to each MAC over the carrier, and what came from it, in the table `netdev weft`.
pub(crate) const SENT: &str = "vxlan_sent";
pub(crate) const RECEIVED: &str = "vxlan_received";

/// What the kernel carried to and from one MAC on a carrier. A super-packet is one packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CarrierTraffic {
    /// Packets sent.
    pub tx_packets: u64,
    /// Their octets, without the Ethernet header.
    pub tx_octets: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Their octets.
    pub rx_octets: u64,
}

/// Commands, not a table: what is there stays and goes on counting, for these and for those of before. Only at the device's
/// own hooks has a packet that it sends its MACs already.
pub(crate) fn counting(devices: &BTreeSet<&str>, macs: &[[u8; 6]]) -> String {
    let mut out = format!("add table netdev {NFT_TABLE}\n");
    let macs: Vec<String> = macs.iter().map(|mac| mac_text(*mac)).collect();
    for (set, direction, hook, end) in [
        (SENT, "out", "egress", "daddr"),
        (RECEIVED, "in", "ingress", "saddr"),
    ] {
        let _ = writeln!(
            out,
            "add set netdev {NFT_TABLE} {set} {{ type ether_addr; counter; }}"
        );
        for device in devices {
            // A chain has one device for as long as it is there.
            let chain = match *device {
                VXLAN_CARRIER => format!("vxlan_{direction}"),
                other => format!("{other}_{direction}"),
            };
            let _ = writeln!(
                out,
                "add chain netdev {NFT_TABLE} {chain} {{ type filter hook {hook} device \"{device}\" priority 0; policy accept; }}
flush chain netdev {NFT_TABLE} {chain}
add rule netdev {NFT_TABLE} {chain} ether {end} @{set}"
            );
        }
        if !macs.is_empty() {
            let _ = writeln!(
                out,
                "add element netdev {NFT_TABLE} {set} {{ {} }}",
                macs.join(", ")
            );
        }
    }
    out
}

/// The first rule of the host's chain for all that comes: no other rule there costs VXLAN anything.
pub(super) fn host_first(view: &View) -> String {
    match view.vxlan {
        Some(_) => format!("  udp dport {VXLAN_PORT} goto base_vxlan_in\n"),
        None => String::new(),
    }
}

/// The host's part. Packets of the carrier itself come from the domain: no user of the host has a socket for them. They
/// need no connection tracking either, which would cost more than the carrier.
pub(super) fn host(out: &mut String, view: &View) {
    let Some(vxlan) = &view.vxlan else { return };
    for (seal, senders, addresses) in [
        (Seal::Plain, "base_vxlan_peers", "base_vxlan_to"),
        (Seal::Esp, "base_vxlan_sealed", "base_vxlan_sealed_to"),
    ] {
        for (is_v4, version, ip, address) in [
            (true, "", "ip", "ipv4_addr"),
            (false, "6", "ip6", "ipv6_addr"),
        ] {
            let is_among = |peer: &&VxlanPeer| peer.seal == seal && peer.addr.is_ipv4() == is_v4;
            let peers = || vxlan.peers.iter().filter(is_among);
            let pairs = peers().map(|peer| {
                let mac: String = peer.mac.map(|octet| format!("{octet:02x}")).concat();
                format!("{} . 0x{mac}", peer.addr)
            });
            // Behind the UDP header (64 bits), VXLAN's (64) and the inner destination (48).
            let kind = format!("typeof {ip} saddr . @th,176,48");
            let pairs = pairs.collect::<Vec<_>>();
            set(out, &format!("{senders}{version}"), &kind, &pairs);
            let to: BTreeSet<String> = peers().map(|peer| peer.addr.to_string()).collect();
            let kind = format!("type {address}");
            set(
                out,
                &format!("{addresses}{version}"),
                &kind,
                &Vec::from_iter(to),
            );
        }
    }
    let _ = writeln!(
        out,
        "chain base_vxlan_in {{
  ip saddr . @th,176,48 @base_vxlan_peers notrack accept
  meta secpath exists ip saddr . @th,176,48 @base_vxlan_sealed notrack accept
  ip6 saddr . @th,176,48 @base_vxlan_peers6 notrack accept
  meta secpath exists ip6 saddr . @th,176,48 @base_vxlan_sealed6 notrack accept
  counter drop
}}
chain base_vxlan_out {{ type filter hook output priority raw; policy accept;
  udp dport {VXLAN_PORT} goto base_vxlan_sent
}}
chain base_vxlan_sent {{
  meta skuid >= 0 counter drop
  ip daddr @base_vxlan_to notrack accept
  ip daddr @base_vxlan_sealed_to rt ipsec exists notrack accept
  ip6 daddr @base_vxlan_to6 notrack accept
  ip6 daddr @base_vxlan_sealed_to6 rt ipsec exists notrack accept
  counter drop
}}
chain base_vxlan_through {{ type filter hook forward priority filter - 10; policy accept;
  udp dport {VXLAN_PORT} counter drop
}}"
    );
}

/// The domain's sets: who may come over the carrier, and with which addresses of the overlay.
pub(super) fn domain_sets(out: &mut String, view: &View) {
    let Some(vxlan) = &view.vxlan else { return };
    let macs: Vec<String> = vxlan.peers.iter().map(|peer| mac_text(peer.mac)).collect();
    set(out, PEERS, "type ether_addr; counter", &macs);
    let (sources4, sources6) = sources(view, vxlan);
    set(out, "base_vxlan_sources4", SOURCES4, &sources4);
    set(out, "base_vxlan_sources6", SOURCES6, &sources6);
}

/// What holds a peer's MAC and the addresses it may send from.
const SOURCES4: &str = "type ether_addr . ipv4_addr; flags interval";
const SOURCES6: &str = "type ether_addr . ipv6_addr; flags interval";

/// Those, of both families.
fn sources(view: &View, vxlan: &VxlanView) -> (Vec<String>, Vec<String>) {
    let owned = vxlan.peers.iter().flat_map(|peer| {
        let prefixes = view.member(&peer.id).map(|member| &member.prefixes);
        let mac = mac_text(peer.mac);
        let each = prefixes.into_iter().flatten();
        each.map(move |net| (mac.clone(), *net))
    });
    owned
        .map(|(mac, net)| {
            let net6 = view.plan.v6_cover(net);
            (format!("{mac} . {net}"), format!("{mac} . {net6}"))
        })
        .unzip()
}

/// The domain's chains: what userspace does for `wu0` before the TAP. The mark of a packet says in the domain which peer it
/// belongs to; outside, where its outer packet is routed, it would say something else.
pub(super) fn domain_chains(out: &mut String, view: &View) {
    if view.vxlan.is_none() {
        return;
    }
    let (range, range6) = (view.plan.range, view.plan.range6());
    let _ = writeln!(
        out,
        "chain base_vxlan {{
  ether saddr @{PEERS} goto base_vxlan_peer
  counter drop
}}
chain base_vxlan_peer {{
  ip saddr {range} ether saddr . ip saddr != @base_vxlan_sources4 counter drop
  ip6 saddr {range6} ether saddr . ip6 saddr != @base_vxlan_sources6 counter drop
  goto base_carrier
}}
chain base_unmark {{ type filter hook postrouting priority mangle; policy accept;
  meta mark != 0 oifname {{ \"{VXLAN_CARRIER}\", \"{VXLAN_CARRIER6}\" }} meta mark set 0
}}"
    );
}
