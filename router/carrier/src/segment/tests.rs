use super::*;
use crate::checksum::tests::naive;
use crate::inner::{self, tests::ip};
use proptest::prelude::*;
use std::net::IpAddr;

fn ends(is_v6: bool) -> (IpAddr, IpAddr) {
    if is_v6 {
        (
            "fd07::a20:1".parse().unwrap(),
            "fd07::a21:2".parse().unwrap(),
        )
    } else {
        ("10.32.0.1".parse().unwrap(), "10.33.0.2".parse().unwrap())
    }
}

/// A TCP packet as a socket would send it, with whole checksums.
pub(crate) fn tcp(
    is_v6: bool,
    sequence: u32,
    flags: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = vec![0x1f, 0x90, 0xc0, 0x01];
    segment.extend_from_slice(&sequence.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 9]);
    segment.extend_from_slice(&[((20 + options.len()) << 2) as u8, flags, 1, 0, 0, 0, 0, 0]);
    segment.extend_from_slice(options);
    segment.extend_from_slice(payload);
    with_checksums(is_v6, TCP, 16, segment)
}

pub(crate) fn udp(is_v6: bool, payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0x1f, 0x90, 0xc0, 0x01];
    datagram.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    datagram.extend_from_slice(&[0, 0]);
    datagram.extend_from_slice(payload);
    with_checksums(is_v6, UDP, 6, datagram)
}

fn with_checksums(is_v6: bool, protocol: u8, field: usize, rest: Vec<u8>) -> Vec<u8> {
    let (src, dst) = ends(is_v6);
    let mut packet = ip(src, dst, protocol, &rest);
    let at = packet.len() - rest.len();
    let sum = !naive(&pseudo(&packet, protocol));
    packet[at + field..at + field + 2].copy_from_slice(&sum.to_be_bytes());
    if !is_v6 {
        let sum = !naive(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// Pseudo-header and transport of a packet without options or extension headers, laid side by side.
fn pseudo(packet: &[u8], protocol: u8) -> Vec<u8> {
    let header = if packet[0] >> 4 == 6 { 40 } else { 20 };
    let mut bytes = addresses(packet).to_vec();
    bytes.extend_from_slice(&((packet.len() - header) as u32).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, protocol]);
    bytes.extend_from_slice(&packet[header..]);
    bytes
}

/// The naive model's verdict on a whole packet.
pub(crate) fn checksums_are_right(packet: &[u8]) -> bool {
    let is_v6 = packet[0] >> 4 == 6;
    let protocol = if is_v6 { packet[6] } else { packet[9] };
    (is_v6 || naive(&packet[..20]) == 0xffff) && naive(&pseudo(packet, protocol)) == 0xffff
}

/// The vnet header of a super-packet of `size`.
fn super_header(is_v6: bool, gso_type: u8, size: u16) -> VnetHeader {
    let transport = if is_v6 { 40 } else { 20 };
    VnetHeader {
        flags: NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: size,
        csum_start: ETHERNET_LEN as u16 + transport,
        csum_offset: if gso_type == GSO_UDP_L4 { 6 } else { 16 },
    }
}

/// Fills in the transport checksum, as the far end's kernel will.
fn filled(mut packet: Vec<u8>) -> Vec<u8> {
    let is_v6 = packet[0] >> 4 == 6;
    let (at, protocol) = if is_v6 {
        (40, packet[6])
    } else {
        (20, packet[9])
    };
    let field = at + checksum_offset(protocol).unwrap();
    packet[field..field + 2].fill(0);
    let mut sum = !naive(&pseudo(&packet, protocol));
    if sum == 0 && protocol == UDP {
        sum = 0xffff;
    }
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The packets that a frame stands for, with their checksums.
pub(crate) fn cut_all(vnet: &VnetHeader, packet: &mut [u8]) -> Result<Vec<Vec<u8>>, Dropped> {
    let inner = inner::parse(packet)?;
    let finish = |packet: Vec<u8>, partial| match partial {
        true => filled(packet),
        false => packet,
    };
    let cut = match prepare(vnet, packet, &inner)? {
        Prepared::Single { partial } => return Ok(vec![finish(packet.to_vec(), partial)]),
        Prepared::Super(cut) => cut,
    };
    Ok((0..cut.count())
        .map(|n| {
            let mut out = vec![0; cut.length(n)];
            cut.write(packet, n, &mut out);
            finish(out, cut.is_partial())
        })
        .collect())
}

pub(crate) fn cut_udp(packet: &[u8], size: u16) -> Vec<Vec<u8>> {
    let is_v6 = packet[0] >> 4 == 6;
    cut_all(&super_header(is_v6, GSO_UDP_L4, size), &mut packet.to_vec()).unwrap()
}

pub(crate) fn cut_tcp(packet: &mut [u8], size: u16) -> Vec<Vec<u8>> {
    let is_v6 = packet[0] >> 4 == 6;
    let gso_type = if is_v6 { GSO_TCPV6 } else { GSO_TCPV4 };
    cut_all(&super_header(is_v6, gso_type, size), packet).unwrap()
}

#[test]
fn flags_stand_only_where_they_belong() {
    let mut whole = tcp(false, 100, 0x10 | FIN | PSH | CWR, &[], &[5; 2500]);
    let flags: Vec<u8> = cut_tcp(&mut whole, 1000).iter().map(|p| p[33]).collect();
    assert_eq!(flags, [0x10 | CWR, 0x10, 0x10 | FIN | PSH]);
}

#[test]
fn ids_and_sequence_numbers_wrap() {
    let mut whole = tcp(false, u32::MAX - 10, 0x10, &[], &[5; 300]);
    whole[4..6].copy_from_slice(&[0xff, 0xff]);
    let cut = cut_tcp(&mut whole, 100);
    let ids: Vec<_> = cut
        .iter()
        .map(|p| u16::from_be_bytes([p[4], p[5]]))
        .collect();
    assert_eq!(ids, [0xffff, 0, 1]);
    assert_eq!(cut[1][24..28], 89u32.to_be_bytes());
}

#[test]
fn an_empty_super_packet_is_one_packet() {
    let mut whole = tcp(true, 1, 0x10, &[], &[]);
    assert_eq!(cut_tcp(&mut whole, 100).len(), 1);
}

/// An IPv6 packet with an extension header before its UDP, as from a socket with `IPV6_DSTOPTS`.
fn behind_options(payload: &[u8]) -> Vec<u8> {
    let (src, dst) = ends(true);
    let mut rest = vec![UDP, 0, 1, 4, 0, 0, 0, 0];
    rest.extend_from_slice(&udp(true, payload)[40..]);
    ip(src, dst, 60, &rest)
}

#[test]
fn where_the_far_end_would_not_look_for_it_a_checksum_is_completed_here() {
    let good = behind_options(b"some payload!");
    let mut partial = good.clone();
    let sum = pseudo_header(addresses(&good), UDP, good.len() - 48).partial();
    partial[54..56].copy_from_slice(&sum);
    let mut vnet = super_header(true, GSO_UDP_L4, 0);
    (vnet.gso_type, vnet.csum_start) = (GSO_NONE, ETHERNET_LEN as u16 + 48);
    let inner = inner::parse(&partial).unwrap();
    let prepared = prepare(&vnet, &mut partial, &inner).unwrap();
    assert!(matches!(prepared, Prepared::Single { partial: false }));
    assert_eq!(partial, good);
    let mut whole = behind_options(&[1; 3000]);
    (vnet.gso_type, vnet.gso_size) = (GSO_UDP_L4, 1000);
    let inner = inner::parse(&whole).unwrap();
    let Prepared::Super(cut) = prepare(&vnet, &mut whole, &inner).unwrap() else {
        panic!("it is one");
    };
    assert!(!cut.is_partial());
    let mut out = vec![0; cut.length(1)];
    cut.write(&whole, 1, &mut out);
    let alone = [&out[..6], &[UDP], &out[7..40], &out[48..]].concat();
    assert_eq!(naive(&pseudo(&alone, UDP)), 0xffff);
}

#[test]
fn a_partial_checksum_is_completed() {
    for is_v6 in [false, true] {
        let good = udp(is_v6, b"some payload!");
        let at = if is_v6 { 40 } else { 20 };
        let mut partial = good.clone();
        let sum = pseudo_header(addresses(&good), UDP, good.len() - at).partial();
        partial[at + 6..at + 8].copy_from_slice(&sum);
        let mut vnet = super_header(is_v6, GSO_UDP_L4, 0);
        vnet.gso_type = GSO_NONE;
        assert_eq!(cut_all(&vnet, &mut partial).unwrap(), [good]);
    }
}

#[test]
fn headers_that_lie_are_malformed() {
    let whole = tcp(false, 1, 0x10, &[], &[1; 300]);
    let good = super_header(false, GSO_TCPV4, 100);
    let bad = [
        VnetHeader {
            gso_size: 0,
            ..good
        },
        VnetHeader {
            gso_type: 3,
            ..good
        },
        VnetHeader {
            gso_type: GSO_TCPV6,
            ..good
        },
        VnetHeader {
            gso_type: GSO_UDP_L4,
            ..good
        },
        VnetHeader {
            gso_type: GSO_NONE,
            csum_start: 400,
            ..good
        },
        VnetHeader {
            gso_type: GSO_NONE,
            csum_start: 5,
            ..good
        },
        VnetHeader {
            gso_type: GSO_NONE,
            csum_offset: 320,
            ..good
        },
    ];
    for vnet in bad {
        let mut packet = whole.clone();
        assert_eq!(
            cut_all(&vnet, &mut packet),
            Err(Dropped::Malformed),
            "{vnet:?}"
        );
    }
    let mut long_header = whole.clone();
    long_header[32] = 0xf0;
    long_header.truncate(60);
    long_header[2..4].copy_from_slice(&[0, 60]);
    assert_eq!(cut_all(&good, &mut long_header), Err(Dropped::Malformed));
}

proptest! {
    #[test]
    fn cutting_keeps_every_octet_and_makes_right_packets(
        is_v6: bool, is_tcp: bool, sequence: u32, size in 1u16..2000, options in 0usize..=10,
        payload in proptest::collection::vec(any::<u8>(), 1..6000),
    ) {
        let size = size.max(payload.len().div_ceil(200) as u16);
        let options = vec![1; options * 4];
        let (mut whole, gso) = match (is_tcp, is_v6) {
            (true, false) => (tcp(false, sequence, 0x18, &options, &payload), GSO_TCPV4),
            (true, true) => (tcp(true, sequence, 0x18, &options, &payload), GSO_TCPV6),
            (false, _) => (udp(is_v6, &payload), GSO_UDP_L4),
        };
        let headers = whole.len() - payload.len();
        let cut = cut_all(&super_header(is_v6, gso, size), &mut whole).unwrap();
        prop_assert_eq!(cut.len(), payload.len().div_ceil(usize::from(size)));
        let mut joined = Vec::new();
        for packet in &cut {
            prop_assert!(checksums_are_right(packet));
            let inner = inner::parse(packet).unwrap();
            prop_assert_eq!(inner.len, packet.len());
            if is_tcp {
                let at = sequence.wrapping_add(joined.len() as u32);
                prop_assert_eq!(&packet[inner.transport + 4..inner.transport + 8], &at.to_be_bytes());
            } else {
                let len = (packet.len() - inner.transport) as u16;
                prop_assert_eq!(&packet[inner.transport + 4..inner.transport + 6], &len.to_be_bytes());
            }
            joined.extend_from_slice(&packet[headers..]);
        }
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn no_header_makes_it_panic(
        vnet in proptest::collection::vec(any::<u8>(), 10),
        packet in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut packet = packet;
        if let Some(first) = packet.first_mut() {
            *first = if *first & 1 == 0 { 0x45 } else { 0x60 };
        }
        if packet.len() >= 10 {
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[4..6].copy_from_slice(&len.saturating_sub(40).to_be_bytes());
            packet[9] = TCP;
            packet[6] = TCP;
        }
        let mut vnet = VnetHeader::parse(&vnet).unwrap();
        vnet.gso_type &= 0x87;
        vnet.csum_start %= 100;
        let _ = cut_all(&vnet, &mut packet);
    }
}
