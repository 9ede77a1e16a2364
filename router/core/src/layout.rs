//! Fixed names and numbers of the domain and the host, in one place because the kernel, balancer and carrier rooms
//! must agree on them and never see each other.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::view::PeerNumber;

/// The host's own leg, in the host's namespace.
pub const HOST_LEG: &str = "weft0";
/// Its far end, in the domain.
pub const HOST_LEG_FAR: &str = "wh0";
/// The `udp` carrier's TAP, in the domain.
pub const UDP_CARRIER: &str = "wu0";
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
