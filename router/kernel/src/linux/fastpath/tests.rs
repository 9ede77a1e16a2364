//! The programs, in the kernel itself: which packets they take, what becomes of those, and that they leave all others alone.

use std::net::IpAddr;

use weft_core::layout::{GATEWAY_MAC, UDP_CARRIER, UDP_CARRIER_MAC, VXLAN_CARRIER, container_mac};
use weft_core::model::{AddressPlan, ClusterId};

use super::*;
use crate::filter::fastpath::program::Place;
use crate::filter::fastpath::{Segment, Way};

/// linux/pkt_cls.h.
const REDIRECT: i32 = 7;
const GO_ON: i32 = -1;
const UNSPECIFIED: [u8; 6] = [0; 6];
const PEER: [u8; 6] = [2, 9, 9, 9, 9, 9];
const CARRIER: [u8; 6] = [2, 8, 8, 8, 8, 8];
const OWN: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 2);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 32, 128, 7);
/// By the other carrier.
const WIDE_FAR: Ipv4Addr = Ipv4Addr::new(10, 32, 64, 7);
const NETWORK: Place = Place {
    network: 1,
    block: 0,
};
/// `lo`, which test runs come in by.
const LEG: u32 = 1;

fn plan() -> AddressPlan {
    AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap()
}

/// Wide ways lead by the one carrier, narrow ones by the other.
const WIDE: u16 = 3000;
const NARROW: u16 = 1450;

fn ground(translated: &[Backend]) -> Ground {
    let other = Place {
        network: 2,
        block: 16,
    };
    let owner = |net: &str, place| (net.parse().unwrap(), Owner { mac: PEER, place });
    let owners = vec![
        owner("10.32.128.0/17", NETWORK),
        owner("10.32.64.0/18", NETWORK),
        owner("10.33.0.0/20", other),
    ];
    let way = |n: usize, carrier, mtu| {
        let (net, owner) = owners[n];
        let way = Way {
            carrier,
            owner,
            mtu,
        };
        (net, way)
    };
    let ways = vec![
        way(0, VXLAN_CARRIER, NARROW),
        way(1, UDP_CARRIER, WIDE),
        way(2, VXLAN_CARRIER, NARROW),
    ];
    let segment = |mac| Segment {
        mac,
        owners: owners.clone(),
    };
    let plan = FastPath {
        legs: BTreeMap::from([(
            "leg".to_owned(),
            LegValue {
                mac: container_mac(OWN),
                ip: OWN,
                place: NETWORK,
            },
        )]),
        carriers: BTreeMap::from([
            (VXLAN_CARRIER, segment(CARRIER)),
            (UDP_CARRIER, segment(UDP_CARRIER_MAC)),
        ]),
        ways,
        memory: FastMemory {
            translated: translated.iter().copied().collect(),
        },
        ula: Some(plan().ula),
    };
    let devices = [("leg", LEG), (VXLAN_CARRIER, 77), (UDP_CARRIER, 78)];
    let devices = devices.map(|(name, index)| (name.to_owned(), index));
    Ground {
        plan,
        devices: devices.into(),
    }
}

struct Laid {
    programs: Programs,
    counters: FastCounters,
}

fn laid(translated: &[Backend]) -> Laid {
    let counters = FastCounters::default();
    let programs = Programs::load(&ground(translated), &counters).unwrap();
    Laid { programs, counters }
}

/// A packet in the making. Test runs take what is not for `lo`'s MAC, zeroes, as another host's.
#[derive(Clone, Copy)]
struct Packet {
    from: [u8; 6],
    ends: (Ipv4Addr, Ipv4Addr),
    v6: bool,
    proto: u8,
    /// The first octets of TCP, UDP or ICMP.
    ports: (u16, u16),
    tcp_flags: u8,
    hops: u8,
    payload: usize,
}

const OUT: Packet = Packet {
    from: [2, 0x78, 10, 32, 0, 2],
    ends: (OWN, FAR),
    v6: false,
    proto: 6,
    ports: (4000, 80),
    tcp_flags: 0x10,
    hops: 64,
    payload: 100,
};

const IN: Packet = Packet {
    from: PEER,
    ends: (FAR, OWN),
    ports: (80, 4000),
    ..OUT
};

impl Packet {
    fn to(self, ip: Ipv4Addr) -> Self {
        Self {
            ends: (self.ends.0, ip),
            ..self
        }
    }

    fn v6(self) -> Self {
        Self { v6: true, ..self }
    }

    fn addresses(&self) -> [IpAddr; 2] {
        let of = |ip: Ipv4Addr| match self.v6 {
            true => plan().v6(ip).into(),
            false => IpAddr::from(ip),
        };
        [of(self.ends.0), of(self.ends.1)]
    }

    fn octets(&self) -> Vec<u8> {
        let mut transport = self.ports.0.to_be_bytes().to_vec();
        transport.extend(self.ports.1.to_be_bytes());
        transport.resize(20 + self.payload, 0x55);
        if self.proto == 6 {
            transport[12..14].copy_from_slice(&[0x50, self.tcp_flags]);
        }
        let mut out = [UNSPECIFIED, self.from].concat();
        let [source, destination] = self.addresses();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                out.extend([8, 0]);
                let len = (20 + transport.len()) as u16;
                let mut head = vec![
                    0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, self.hops, self.proto, 0, 0,
                ];
                head[2..4].copy_from_slice(&len.to_be_bytes());
                head.extend(source.octets());
                head.extend(destination.octets());
                let sum = checksum(&head);
                head[10..12].copy_from_slice(&sum.to_be_bytes());
                out.extend(head);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                out.extend((transport.len() as u16).to_be_bytes());
                let proto = if self.proto == 1 { 58 } else { self.proto };
                out.extend([proto, self.hops]);
                out.extend(source.octets());
                out.extend(destination.octets());
            }
            _ => unreachable!(),
        }
        out.extend(transport);
        out
    }
}

/// RFC 1071.
fn checksum(head: &[u8]) -> u16 {
    let words = head
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
fn what_it_takes_comes_out_with_other_macs_and_one_hop_less() {
    let Laid { programs, counters } = laid(&[]);
    let mut sent = 0;
    for packet in [OUT, OUT.v6()] {
        for (proto, ports) in [(6, (4000, 80)), (17, (4000, 53)), (1, echo(packet))] {
            // Every value that a checksum may carry over from.
            for hops in 2..=255 {
                let packet = Packet {
                    proto,
                    ports,
                    hops,
                    ..packet
                };
                let (verdict, out) = programs.from_legs.try_on(&packet.octets());
                assert_eq!(verdict, REDIRECT, "{proto} {ports:?}");
                let mut wanted = Packet {
                    hops: hops - 1,
                    ..packet
                }
                .octets();
                wanted[..6].copy_from_slice(&PEER);
                wanted[6..12].copy_from_slice(&CARRIER);
                assert_eq!(out, wanted);
                sent += 1;
            }
        }
    }
    for packet in [IN, IN.v6()] {
        for program in programs.from_peers.values() {
            let (verdict, out) = program.try_on(&packet.octets());
            assert_eq!(verdict, REDIRECT);
            let mut wanted = Packet { hops: 63, ..packet }.octets();
            wanted[..6].copy_from_slice(&container_mac(OWN));
            wanted[6..12].copy_from_slice(&GATEWAY_MAC);
            assert_eq!(out, wanted);
        }
    }
    let traffic = counters.read()[&PEER];
    assert_eq!((traffic.tx_packets, traffic.rx_packets), (sent, 4));
    assert_eq!(traffic.rx_octets, 2 * (20 + 40 + 2 * 120));
}

#[test]
fn each_carrier_has_its_own_mac() {
    let programs = laid(&[]).programs;
    for (ip, mac) in [(FAR, CARRIER), (WIDE_FAR, UDP_CARRIER_MAC)] {
        let (verdict, out) = programs.from_legs.try_on(&OUT.to(ip).octets());
        assert_eq!(
            (verdict, &out[..6], &out[6..12]),
            (REDIRECT, &PEER[..], &mac[..])
        );
    }
}

fn echo(packet: Packet) -> (u16, u16) {
    (if packet.v6 { 128 << 8 } else { 8 << 8 }, 0)
}

#[test]
fn everything_else_goes_the_long_way_unchanged() {
    let programs = laid(&[]).programs;
    let goes_on = |program: &Classifier, octets: &[u8], what: &str| {
        let (verdict, out) = program.try_on(octets);
        assert_eq!((verdict, &out[..]), (GO_ON, octets), "{what}");
    };
    let (other, stranger) = (Ipv4Addr::new(10, 33, 0, 9), Ipv4Addr::new(10, 32, 0, 3));
    for v6 in [false, true] {
        for (program, packet) in [
            (&programs.from_legs, OUT),
            (&programs.from_peers[VXLAN_CARRIER], IN),
        ] {
            let packet = Packet { v6, ..packet };
            let (own, far) = packet.ends;
            let with = |ends| Packet { ends, ..packet };
            let cases = [
                (
                    "another's MAC",
                    Packet {
                        from: [2, 1, 1, 1, 1, 1],
                        ..packet
                    },
                ),
                ("no hop left", Packet { hops: 1, ..packet }),
                (
                    "GRE",
                    Packet {
                        proto: 47,
                        ..packet
                    },
                ),
                (
                    "an ICMP error",
                    Packet {
                        proto: 1,
                        ports: (3 << 8, 0),
                        ..packet
                    },
                ),
                ("from another network", with((other, far))),
                ("to another network", with((own, other))),
                ("from an address of somebody else's", with((stranger, far))),
                ("to an address of nobody's", with((own, stranger))),
            ];
            for (what, case) in cases {
                goes_on(program, &case.octets(), what);
            }
            // A test run's packet has an IP header at least.
            let header = if v6 { 54 } else { 34 };
            for more in [0, 7, 8, 19] {
                goes_on(program, &packet.octets()[..header + more], "cut off");
            }
        }
    }
    let mut octets = OUT.octets();
    octets[14] = 0x46;
    goes_on(&programs.from_legs, &octets, "options");
    for (at, value) in [(20, 0x20), (21, 1)] {
        let mut octets = OUT.octets();
        octets[at] = value;
        goes_on(&programs.from_legs, &octets, "a fragment");
    }
    let nowhere = OUT.to(Ipv4Addr::new(10, 32, 32, 1));
    goes_on(
        &programs.from_legs,
        &nowhere.octets(),
        "to whom nothing is led",
    );
    let mut octets = OUT.octets();
    octets[12..14].copy_from_slice(&[8, 6]);
    goes_on(&programs.from_legs, &octets, "no IP");
    let mut octets = OUT.octets();
    octets[..6].copy_from_slice(&PEER);
    goes_on(&programs.from_legs, &octets, "another host's");
}

/// With a TCP header of so many words, in which these options stand.
fn beginning(packet: Packet, flags: u8, words: u8, options: &[u8]) -> Vec<u8> {
    let mut octets = packet.octets();
    let at = if packet.v6 { 54 } else { 34 };
    octets[at + 12..at + 14].copy_from_slice(&[words << 4, flags]);
    octets[at + 20..at + 20 + options.len()].copy_from_slice(options);
    octets
}

#[test]
fn connections_begin_and_end_on_it_with_segments_that_fit_the_path() {
    let programs = laid(&[]).programs;
    for packet in [OUT, OUT.v6()] {
        let (at, fits) = if packet.v6 {
            (54, NARROW - 60)
        } else {
            (34, NARROW - 40)
        };
        for (said, wanted) in [
            (8960, fits),
            (fits + 1, fits),
            (fits, fits),
            (fits - 1, fits - 1),
            (536, 536),
        ] {
            for flags in [0x02, 0x12, 0xc2] {
                let [high, low] = u16::to_be_bytes(said);
                let options = [
                    2, 4, high, low, 4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 3, 7,
                ];
                let octets = beginning(packet, flags, 10, &options);
                let (verdict, out) = programs.from_legs.try_on(&octets);
                assert_eq!(verdict, REDIRECT, "{said}");
                assert_eq!(out[at + 22..at + 24], wanted.to_be_bytes(), "{said}");
                // With its own checksum a header sums up to what it did.
                assert_eq!(checksum(&out[at..]), checksum(&octets[at..]), "{said}");
                assert_eq!(out[at + 24..], octets[at + 24..]);
                assert_eq!(out[at..at + 16], octets[at..at + 16]);
            }
        }
        // Of any other option it knows nothing, nor of one that is cut off.
        for (words, options) in [
            (5, [2, 4, 35, 0]),
            (10, [1, 2, 4, 35]),
            (10, [4, 2, 2, 4]),
            (10, [2, 5, 35, 0]),
        ] {
            let octets = beginning(packet, 0x02, words, &options);
            let (verdict, out) = programs.from_legs.try_on(&octets);
            assert_eq!((verdict, out), (GO_ON, octets), "{words} {options:?}");
        }
        for flags in [0x11, 0x04, 0x14] {
            let packet = Packet {
                tcp_flags: flags,
                ..packet
            };
            assert_eq!(programs.from_legs.try_on(&packet.octets()).0, REDIRECT);
        }
    }
    for packet in [IN, IN.v6()] {
        for flags in [0x02, 0x12, 0x11, 0x04] {
            let octets = beginning(packet, flags, 6, &[2, 4, 35, 0]);
            for program in programs.from_peers.values() {
                let (verdict, out) = program.try_on(&octets);
                assert_eq!(verdict, REDIRECT);
                let header = if packet.v6 { 54 } else { 34 };
                assert_eq!(out[header..], octets[header..]);
            }
        }
    }
}

/// The last four octets of an address say where it is, and the others must be what they are for it.
#[test]
fn every_octet_of_an_ipv6_address_counts() {
    let programs = laid(&[]).programs;
    let ways = [
        (&programs.from_legs, OUT.v6(), 53),
        (&programs.from_peers[VXLAN_CARRIER], IN.v6(), 37),
    ];
    for (program, packet, neighbour) in ways {
        assert_eq!(program.try_on(&packet.octets()).0, REDIRECT);
        for at in 22..54 {
            let mut octets = packet.octets();
            octets[at] ^= 0x80;
            let (verdict, _) = program.try_on(&octets);
            // That is another container of the far host.
            assert_eq!(verdict == REDIRECT, at == neighbour, "{at}");
        }
    }
}

#[test]
fn what_does_not_fit_the_path_is_left_to_the_domain() {
    let programs = laid(&[]).programs;
    for packet in [OUT, OUT.v6()] {
        let header = if packet.v6 { 60 } else { 40 };
        for (proto, ip, mtu) in [
            (6, FAR, NARROW),
            (17, FAR, NARROW),
            (6, WIDE_FAR, WIDE),
            (17, WIDE_FAR, WIDE),
        ] {
            let is_taken = |len: u16| {
                let payload = usize::from(len) - header;
                let packet = Packet {
                    payload,
                    proto,
                    ..packet
                };
                programs.from_legs.try_on(&packet.to(ip).octets()).0 == REDIRECT
            };
            assert!(is_taken(mtu) && !is_taken(mtu + 1), "{proto} {mtu}");
        }
    }
}

/// A test run's packet is one page at most.
#[test]
fn a_super_packet_is_taken_if_its_segments_fit() {
    let programs = laid(&[]).programs;
    for packet in [OUT, OUT.v6()] {
        let ip_header: u32 = if packet.v6 { 40 } else { 20 };
        let packet = Packet {
            payload: 3000,
            ..packet
        };
        for (proto, header, words) in [(6, 20, 5), (6, 32, 8), (6, 60, 15), (17, 8, 0)] {
            let mut octets = Packet { proto, ..packet }.octets();
            if proto == 6 {
                octets[14 + ip_header as usize + 12] = words << 4 | 0x0f;
            }
            let is_taken = |segment| {
                let (verdict, _) = programs.from_legs.try_on_super(&octets, segment);
                verdict == REDIRECT
            };
            let longest = u32::from(NARROW) - ip_header - header;
            assert!(is_taken(longest) && !is_taken(longest + 1), "{header}");
        }
    }
}

#[test]
fn what_a_virtual_address_was_turned_into_goes_the_long_way_in_both_directions() {
    for proto in [Proto::Tcp, Proto::Udp] {
        let number = match proto {
            Proto::Tcp => 6,
            Proto::Udp => 17,
        };
        let backend = |ip, port| Backend { ip, proto, port };
        for backends in [[backend(FAR, 80)], [backend(OWN, 4000)]] {
            let programs = laid(&backends).programs;
            for (program, packet) in [
                (&programs.from_legs, OUT),
                (&programs.from_peers[VXLAN_CARRIER], IN),
            ] {
                for v6 in [false, true] {
                    let packet = Packet {
                        v6,
                        proto: number,
                        ..packet
                    };
                    assert_eq!(program.try_on(&packet.octets()).0, GO_ON);
                    let (from, to) = packet.ports;
                    let beside = Packet {
                        ports: (from + 1, to + 1),
                        ..packet
                    };
                    assert_eq!(program.try_on(&beside.octets()).0, REDIRECT);
                    let other = if number == 6 { 17 } else { 6 };
                    let other = Packet {
                        proto: other,
                        ..packet
                    };
                    assert_eq!(program.try_on(&other.octets()).0, REDIRECT);
                }
            }
        }
    }
}
