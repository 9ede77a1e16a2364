//! Fixed names and numbers of the domain and the host, in one place because the kernel, balancer and carrier rooms
//! must agree on them and never see each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::crypto::sha256_parts;
use crate::model::NodeId;
use crate::view::PeerNumber;

/// The host's own leg, in the host's namespace.
pub const HOST_LEG: &str = "weft0";
/// Its far end, in the domain.
pub const HOST_LEG_FAR: &str = "wh0";
/// The `udp` carrier's TAP, in the domain.
pub const UDP_CARRIER: &str = "wu0";
/// The `vxlan` carrier between IPv4 addresses of hosts, in the domain; its outer side stays in the host's namespace.
pub const VXLAN_CARRIER: &str = "wx0";
/// The same between IPv6 addresses: a VXLAN device knows one version alone.
pub const VXLAN_CARRIER6: &str = "wx6";
/// Both.
pub const VXLAN_CARRIERS: [&str; 2] = [VXLAN_CARRIER, VXLAN_CARRIER6];
/// Its UDP port on the hosts.
pub const VXLAN_PORT: u16 = 6784;
/// Its network identifier.
pub const VXLAN_VNI: u32 = 6783;
/// What it puts around an inner packet behind the outer IP header: UDP's, its own, the inner Ethernet header (RFC 7348 §5).
pub const VXLAN_OVERHEAD: u16 = 8 + 8 + 14;
/// The UDP port on the hosts for ESP that has to pass a NAT (RFC 3948); not IKE's 4500, which another program may have.
pub const ESP_UDP_PORT: u16 = 6785;
/// What that adds.
pub const UDP_HEADER: u16 = 8;
/// ESP's header and the part of the nonce that is sent (RFC 4303 §2, RFC 4106 §3).
pub const ESP_HEADERS: u16 = 8 + 8;
/// Length of the padding and kind of what is inside.
pub const ESP_TRAILER: u16 = 2;
/// Its integrity check.
pub const ESP_TAG: u16 = 16;
/// EtherType of the frames by which a host finds out whether `vxlan` reaches a peer (IEEE 802, local experimental 1).
pub const VXLAN_PROBE: u16 = 0x88b5;
/// Containers' legs in the domain begin so; the rest is the endpoint id's first ten hex digits.
pub const LEG_PREFIX: &str = "wv";
/// The nft table of both namespaces.
pub const NFT_TABLE: &str = "weft";
/// The host's routing table, its ip rule's priority and the default underlay port.
pub const HOST_TABLE: u32 = 6783;
/// Default gateway of every container, on its leg in the domain (RFC 3927 link-local).
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// What any link carries in one piece under IPv6, which sends so much without asking (RFC 8200 §5).
pub const IPV6_MIN_MTU: u16 = 1280;
/// MTU of TAP, legs and `weft0`: large and fixed; the true one is the route's.
pub const DEVICE_MTU: u32 = 9000;
/// Bits of packet and connection marks inside the domain that hold the [`PeerNumber`] a connection came through.
pub const PEER_MARK_MASK: u32 = 0xfff;
/// Locally administered MAC of the domain's end of every leg and of `wh0`.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x77, 0xfe, 0, 0, 1];
/// MAC of the host's end, `weft0`.
pub const HOST_LEG_MAC: [u8; 6] = [0x02, 0x77, 0xfe, 0, 0, 2];
/// MAC of `wu0` itself.
pub const UDP_CARRIER_MAC: [u8; 6] = [0x02, 0x77, 0, 0, 0, 0];

/// The device of the `vxlan` carrier that leads to a host at this address.
pub fn vxlan_carrier(host: IpAddr) -> &'static str {
    match host {
        IpAddr::V4(_) => VXLAN_CARRIER,
        IpAddr::V6(_) => VXLAN_CARRIER6,
    }
}

/// Octets of the header before what goes to this address: without options, as VXLAN's are.
pub fn ip_header(to: IpAddr) -> u16 {
    match to {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

/// The MAC that stands for a peer on the `udp` carrier.
pub fn peer_mac(number: PeerNumber) -> [u8; 6] {
    let [high, low] = number.0.to_be_bytes();
    [0x02, 0x77, 0x01, 0, high, low]
}

/// The peer that a MAC on the `udp` carrier stands for.
pub fn peer_of_mac(mac: [u8; 6]) -> Option<PeerNumber> {
    let number = PeerNumber(u16::from_be_bytes([mac[4], mac[5]]));
    (mac == peer_mac(number) && number.0 != 0).then_some(number)
}

/// The MAC of a node on the `vxlan` carrier, the same for every host: 46 bits of a hash of its key, locally administered.
/// Two nodes may share one, and somebody may have looked for a key that does: see [`crate::carriers`].
pub fn vxlan_mac(id: &NodeId) -> [u8; 6] {
    let hash = sha256_parts(&[b"weft vxlan mac", &id.0]);
    let mut mac = [0; 6];
    mac.copy_from_slice(&hash[..6]);
    mac[0] = mac[0] & 0xfc | 0x02;
    // What begins as weft's other MACs do would be mistaken for one of them.
    if mac[0] == 0x02 && matches!(mac[1], 0x77 | 0x78) {
        mac[0] |= 0x40;
    }
    mac
}

/// The link-local address that stands for a peer: the gateway of the next-hop object that leads to it.
pub fn peer_link_local(number: PeerNumber) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x77, number.0)
}

/// Id of the kernel's next-hop object (IPv6 gateway) that leads to a peer.
pub fn peer_nexthop(number: PeerNumber) -> u32 {
    0x7700_0000 | u32::from(number.0)
}

/// The domain's routing table whose default route leads back through a peer: for replies to connections that came in
/// through that peer's published ports.
pub fn peer_table(number: PeerNumber) -> u32 {
    10_000 + u32::from(number.0)
}

/// MAC of a container's own interface: from its IPv4 address, so it is the same on every attach of that address.
pub fn container_mac(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x02, 0x78, a, b, c, d]
}

/// `aa:bb:cc:dd:ee:ff`.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The devices that lead to peers, on a host with the `vxlan` carrier or one without, as nft's `iifname` and `oifname` take
/// them.
pub fn carriers_text(with_vxlan: bool) -> String {
    match with_vxlan {
        true => {
            format!("{{ \"{UDP_CARRIER}\", \"{VXLAN_CARRIER}\", \"{VXLAN_CARRIER6}\" }}")
        }
        false => format!("\"{UDP_CARRIER}\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_vxlan_mac_is_a_unicast_one_that_nothing_else_of_weft_has(key in any::<[u8; 32]>()) {
            let mac = vxlan_mac(&NodeId(key));
            prop_assert_eq!(mac[0] & 0b11, 0b10, "locally administered, not a group");
            prop_assert!(!(mac[0] == 2 && matches!(mac[1], 0x77 | 0x78)));
            prop_assert_eq!(peer_of_mac(mac), None);
        }
    }
}
