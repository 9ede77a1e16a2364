//! Inner packets: read as far as forwarding them takes, and whether a peer may have sent them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use weft_core::model::AddressPlan;

use crate::counters::Dropped;

/// Protocol number of TCP.
pub(crate) const TCP: u8 = 6;
/// Protocol number of UDP.
pub(crate) const UDP: u8 = 17;

/// Source and destination, both of one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Addresses {
    V4 { src: Ipv4Addr, dst: Ipv4Addr },
    V6 { src: Ipv6Addr, dst: Ipv6Addr },
}

/// What an IP header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inner {
    pub(crate) addresses: Addresses,
    /// Protocol behind the IP header; on IPv6 that may be an extension header.
    pub(crate) protocol: u8,
    /// Where the next header begins.
    pub(crate) transport: usize,
    /// Is it a part of a fragmented packet? Never true on IPv6, where that is an extension header.
    pub(crate) fragment: bool,
    /// Class of service and congestion field: IPv4's second octet, IPv6's traffic class.
    pub(crate) tos: u8,
    /// Length of the whole packet.
    pub(crate) len: usize,
}

impl Inner {
    /// A hash of the flow that `packet`, whose header this is, belongs to: all of a connection, and all parts of a fragmented
    /// packet, have one. It spreads flows evenly, and protects nothing.
    pub(crate) fn flow(&self, packet: &[u8]) -> u32 {
        let mut hasher = DefaultHasher::new();
        match self.addresses {
            Addresses::V4 { src, dst } => (src, dst).hash(&mut hasher),
            Addresses::V6 { src, dst } => (src, dst).hash(&mut hasher),
        }
        self.protocol.hash(&mut hasher);
        if matches!(self.protocol, TCP | UDP) && !self.fragment {
            packet
                .get(self.transport..self.transport + 4)
                .hash(&mut hasher);
        }
        hasher.finish() as u32
    }
}

/// Reads the IP header of `packet`, which may be followed by padding.
pub(crate) fn parse(packet: &[u8]) -> Result<Inner, Dropped> {
    let inner = match packet.first().map(|b| b >> 4) {
        Some(4) => parse_v4(packet),
        Some(6) => parse_v6(packet),
        _ => return Err(Dropped::NotIp),
    };
    inner
        .filter(|inner| inner.transport <= inner.len && inner.len <= packet.len())
        .ok_or(Dropped::Malformed)
}

fn parse_v4(packet: &[u8]) -> Option<Inner> {
    let b = packet.first_chunk::<20>()?;
    let header = usize::from(b[0] & 0xf) * 4;
    if header < 20 {
        return None;
    }
    // More fragments, or an offset.
    let fragment = u16::from_be_bytes([b[6], b[7]]) & 0x3fff != 0;
    Some(Inner {
        addresses: Addresses::V4 {
            src: Ipv4Addr::new(b[12], b[13], b[14], b[15]),
            dst: Ipv4Addr::new(b[16], b[17], b[18], b[19]),
        },
        protocol: b[9],
        transport: header,
        fragment,
        tos: b[1],
        len: usize::from(u16::from_be_bytes([b[2], b[3]])),
    })
}

fn parse_v6(packet: &[u8]) -> Option<Inner> {
    let b = packet.first_chunk::<40>()?;
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&b[at..at + 16]);
        Ipv6Addr::from(octets)
    };
    Some(Inner {
        addresses: Addresses::V6 {
            src: address(8),
            dst: address(24),
        },
        protocol: b[6],
        transport: 40,
        fragment: false,
        tos: b[0] << 4 | b[1] >> 4,
        len: 40 + usize::from(u16::from_be_bytes([b[4], b[5]])),
    })
}

impl Addresses {
    /// May a packet with these addresses go from host to host at all?
    pub(crate) fn are_routable(self) -> bool {
        match self {
            Addresses::V4 { src, dst } => is_routable4(src) && is_routable4(dst),
            Addresses::V6 { src, dst } => is_routable6(src) && is_routable6(dst),
        }
    }
}

fn is_routable4(ip: Ipv4Addr) -> bool {
    // 0/8 (RFC 1122 §3.2.1.3), loopback, link-local, and all from multicast up to broadcast.
    let first = ip.octets()[0];
    first != 0 && first != 127 && first < 224 && !ip.is_link_local()
}

fn is_routable6(ip: Ipv6Addr) -> bool {
    let bound = ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local();
    !(bound || ip.is_multicast() || ip.to_ipv4_mapped().is_some())
}

/// The addresses of the overlay that one peer owns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sources {
    /// First and last of each range, in ascending order.
    ranges: Vec<(u32, u32)>,
}

impl Sources {
    pub(crate) fn new(prefixes: &[Ipv4Net]) -> Self {
        let mut ranges: Vec<_> = prefixes
            .iter()
            .map(|net| (u32::from(net.network()), u32::from(net.broadcast())))
            .collect();
        ranges.sort_unstable();
        Self { ranges }
    }

    fn hold(&self, ip: Ipv4Addr) -> bool {
        let ip = u32::from(ip);
        let after = self.ranges.partition_point(|(first, _)| *first <= ip);
        after > 0 && ip <= self.ranges[after - 1].1
    }
}

/// Checks a packet that came from the peer which owns `sources`, and must fill `packet`. Addresses of the overlay are
/// accepted only from their owner. Others pass: they are those of clients of published ports, and the domain's rules
/// let them nowhere else.
pub(crate) fn police(
    packet: &[u8],
    plan: &AddressPlan,
    sources: &Sources,
) -> Result<Inner, Dropped> {
    let inner = parse(packet)?;
    if inner.len != packet.len() {
        return Err(Dropped::Malformed);
    }
    if !inner.addresses.are_routable() {
        return Err(Dropped::NotRoutable);
    }
    let own = match inner.addresses {
        Addresses::V4 { src, .. } => !plan.range.contains(&src) || sources.hold(src),
        Addresses::V6 { src, .. } => {
            !src.octets().starts_with(&plan.ula)
                || plan.v4_of(src).is_some_and(|ip| sources.hold(ip))
        }
    };
    if own {
        Ok(inner)
    } else {
        Err(Dropped::ForeignSource)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::IpAddr;
    use weft_core::model::ClusterId;

    pub(crate) fn plan() -> AddressPlan {
        AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap()
    }

    /// An IP header before `rest`; the header's checksum is left zero.
    pub(crate) fn ip(src: IpAddr, dst: IpAddr, protocol: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let len = (20 + rest.len()) as u16;
                packet.extend_from_slice(&[0x45, 0]);
                packet.extend_from_slice(&len.to_be_bytes());
                packet.extend_from_slice(&[0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
                packet.extend_from_slice(&src.octets());
                packet.extend_from_slice(&dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0]);
                packet.extend_from_slice(&(rest.len() as u16).to_be_bytes());
                packet.extend_from_slice(&[protocol, 64]);
                packet.extend_from_slice(&src.octets());
                packet.extend_from_slice(&dst.octets());
            }
            _ => panic!("both of one version"),
        }
        packet.extend_from_slice(rest);
        packet
    }

    fn check(src: &str, dst: &str) -> Result<(), Dropped> {
        let plan = plan();
        let sources = Sources::new(&[
            "10.40.0.0/20".parse().unwrap(),
            "10.32.4.0/22".parse().unwrap(),
        ]);
        let v6 = |text: &str| match text.strip_prefix("twin:") {
            Some(v4) => IpAddr::V6(plan.v6(v4.parse().unwrap())),
            None => text.parse().unwrap(),
        };
        police(&ip(v6(src), v6(dst), 1, &[0; 8]), &plan, &sources).map(|_| ())
    }

    #[test]
    fn overlay_sources_pass_only_from_their_owner() {
        for own in ["10.32.4.0", "10.32.7.255", "10.40.15.255"] {
            assert_eq!(check(own, "10.32.0.1"), Ok(()), "{own}");
            assert_eq!(check(&format!("twin:{own}"), "twin:10.32.0.1"), Ok(()));
        }
        for foreign in ["10.32.3.255", "10.32.8.0", "10.47.0.1", "10.40.16.0"] {
            assert_eq!(check(foreign, "10.32.0.1"), Err(Dropped::ForeignSource));
            assert_eq!(
                check(&format!("twin:{foreign}"), "twin:10.32.0.1"),
                Err(Dropped::ForeignSource)
            );
        }
    }

    #[test]
    fn addresses_of_the_ula_that_are_nobodys_twin_are_foreign() {
        let mut octets = plan().v6("10.32.4.1".parse().unwrap()).octets();
        octets[9] = 1;
        let odd = Ipv6Addr::from(octets).to_string();
        assert_eq!(check(&odd, "twin:10.32.0.1"), Err(Dropped::ForeignSource));
    }

    #[test]
    fn clients_from_outside_pass() {
        assert_eq!(check("192.0.2.7", "10.32.0.1"), Ok(()));
        assert_eq!(check("10.48.0.1", "10.32.0.1"), Ok(()));
        assert_eq!(check("2001:db8::7", "twin:10.32.0.1"), Ok(()));
    }

    #[test]
    fn what_may_not_leave_its_link_or_host_is_dropped() {
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert_eq!(check(bad, "10.32.0.1"), Err(Dropped::NotRoutable), "{bad}");
            assert_eq!(check("192.0.2.1", bad), Err(Dropped::NotRoutable), "{bad}");
        }
        for bad in ["::", "::1", "fe80::1", "ff02::1", "::ffff:10.32.4.1"] {
            assert_eq!(check(bad, "2001:db8::1"), Err(Dropped::NotRoutable));
            assert_eq!(check("2001:db8::1", bad), Err(Dropped::NotRoutable));
        }
    }

    #[test]
    fn lengths_must_fit_to_the_octet() {
        let plan = plan();
        let sources = Sources::new(&[]);
        let good = ip(
            "192.0.2.1".parse().unwrap(),
            "10.32.0.1".parse().unwrap(),
            17,
            &[0; 30],
        );
        assert!(police(&good, &plan, &sources).is_ok());
        let mut long = good.clone();
        long.push(0);
        for bad in [&good[..good.len() - 1], &long[..], &good[..19]] {
            assert_eq!(police(bad, &plan, &sources), Err(Dropped::Malformed));
        }
        let mut short_header = good.clone();
        short_header[0] = 0x44;
        assert_eq!(
            police(&short_header, &plan, &sources),
            Err(Dropped::Malformed)
        );
        assert_eq!(police(&[], &plan, &sources), Err(Dropped::NotIp));
        assert_eq!(police(&[0x50; 40], &plan, &sources), Err(Dropped::NotIp));
    }

    proptest! {
        #[test]
        fn no_octets_make_it_panic(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = police(&packet, &plan(), &Sources::default());
        }

        #[test]
        fn sources_agree_with_a_plain_search(
            nets in proptest::collection::vec((any::<u32>(), 8u8..=32), 0..20), probes in proptest::collection::vec(any::<u32>(), 20)
        ) {
            // Prefixes of one owner never overlap.
            let mut apart: Vec<Ipv4Net> = Vec::new();
            for (ip, len) in nets {
                let net = Ipv4Net::new_assert(Ipv4Addr::from(ip), len).trunc();
                if !apart.iter().any(|o| o.contains(&net) || net.contains(o)) {
                    apart.push(net);
                }
            }
            let sources = Sources::new(&apart);
            for ip in probes.into_iter().map(Ipv4Addr::from).chain(apart.iter().map(|n| n.broadcast())) {
                prop_assert_eq!(sources.hold(ip), apart.iter().any(|n| n.contains(&ip)));
            }
        }
    }
}
