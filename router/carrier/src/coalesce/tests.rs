use weft_core::underlay::Offload;

use super::*;
use crate::inner;
use crate::segment::tests::{checksums_are_right, cut_all, cut_tcp, cut_udp, tcp, udp};
use crate::segment::{checksum_offset, fill_v4_checksum};
use crate::vnet::{ETHERNET_LEN, FRAME_HEAD, GSO_NONE, NEEDS_CSUM, VnetHeader};
use proptest::prelude::*;

const TO: [u8; 6] = [2; 6];
/// Linux before 6.2.
const TCP_ONLY: Joins = Joins {
    udp: false,
    ..Joins::ALL
};

/// Runs one batch; `packets` come with who sent them, and with their checksums. Gives the frames written.
fn run(coalescer: &mut Coalescer, packets: &[(usize, Vec<u8>)]) -> Vec<Vec<u8>> {
    let complete = packets.iter().map(|(from, p)| (*from, p.clone(), false));
    run_mixed(coalescer, &complete.collect::<Vec<_>>())
}

/// The same; some may lack their checksums.
fn run_mixed(coalescer: &mut Coalescer, packets: &[(usize, Vec<u8>, bool)]) -> Vec<Vec<u8>> {
    let mut octets = Vec::new();
    let mut spans = Vec::new();
    for (from, packet, partial) in packets {
        // As in the receive buffer, something else lies between.
        octets.extend_from_slice(&[0xee; 17]);
        spans.push((
            *from,
            Span {
                start: octets.len(),
                len: packet.len(),
            },
            *partial,
        ));
        octets.extend_from_slice(packet);
    }
    for (from, span, partial) in spans {
        let inner = inner::parse(span.of(&octets)).unwrap();
        let _ = coalescer.push(&octets, span, from, &inner, partial);
    }
    let mut frames = Vec::new();
    coalescer.drain(
        &octets,
        TO,
        |from| [from as u8; 6],
        |frame| {
            let octets = frame.pieces.iter().flat_map(|p| p.iter().copied());
            frames.push(octets.collect());
            true
        },
    );
    frames
}

fn of_one(packets: Vec<Vec<u8>>) -> Vec<(usize, Vec<u8>)> {
    packets.into_iter().map(|p| (1, p)).collect()
}

/// What the kernel would make of a frame: the packets of it.
fn recut(frame: &[u8]) -> Vec<Vec<u8>> {
    let vnet = VnetHeader::parse(frame).unwrap();
    cut_all(&vnet, &mut frame[FRAME_HEAD..].to_vec()).unwrap()
}

fn stream(is_v6: bool, payload: usize, size: u16) -> Vec<Vec<u8>> {
    let payload: Vec<u8> = (0..payload).map(|n| (n * 7) as u8).collect();
    cut_tcp(&mut tcp(is_v6, 1000, 0x18, &[1; 12], &payload), size)
}

#[test]
fn a_stream_becomes_one_frame_with_rebuilt_headers() {
    for is_v6 in [false, true] {
        let frames = run(
            &mut Coalescer::new(TCP_ONLY),
            &of_one(stream(is_v6, 30_000, 1400)),
        );
        assert_eq!(frames.len(), 1);
        let frame = &frames[0];
        let vnet = VnetHeader::parse(frame).unwrap();
        let ip_len = if is_v6 { 40 } else { 20 };
        assert_eq!(usize::from(vnet.hdr_len), ETHERNET_LEN + ip_len + 32);
        assert_eq!(usize::from(vnet.csum_start), ETHERNET_LEN + ip_len);
        assert_eq!((vnet.gso_size, vnet.csum_offset), (1400, 16));
        assert_eq!(frame[10..16], TO);
        assert_eq!(frame[16..22], [1; 6]);
        assert_eq!(recut(frame), stream(is_v6, 30_000, 1400));
    }
}

#[test]
fn the_echo_of_a_mark_joins_and_a_mark_stays_with_its_segment() {
    let payload = vec![5; 5600];
    let echoing = cut_tcp(&mut tcp(false, 1000, 0x58, &[1; 12], &payload), 1400);
    let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(echoing.clone()));
    assert_eq!(frames.len(), 1);
    assert_eq!(recut(&frames[0]), echoing);

    let mut marked = stream(false, 5600, 1400);
    for packet in &mut marked[1..3] {
        packet[1] = 3;
        fill_v4_checksum(&mut packet[..20]);
    }
    let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(marked.clone()));
    let out: Vec<_> = frames.iter().flat_map(|f| recut(f)).collect();
    assert_eq!((frames.len(), out), (3, marked));
}

#[test]
fn without_offloads_every_packet_comes_alone_and_complete() {
    let none = Joins {
        tcp: false,
        udp: false,
        checksums: false,
    };
    for is_v6 in [false, true] {
        let datagrams = cut_udp(&udp(is_v6, &vec![9; 5000]), 1000);
        for packets in [stream(is_v6, 7000, 1400), datagrams] {
            let partial: Vec<_> = packets
                .iter()
                .map(|packet| (1, without_checksum(packet), true))
                .collect();
            let frames = run_mixed(&mut Coalescer::new(none), &partial);
            let plain = VnetHeader::default();
            assert!(frames.iter().all(|f| VnetHeader::parse(f) == Some(plain)));
            let out: Vec<_> = frames.iter().map(|f| f[FRAME_HEAD..].to_vec()).collect();
            assert_eq!(out, packets);
        }
    }
}

#[test]
fn a_super_packet_that_is_refused_comes_again_in_its_parts() {
    let packets = stream(false, 7000, 1400);
    let mut octets = Vec::new();
    let mut coalescer = Coalescer::new(Joins::ALL);
    let spans: Vec<_> = packets
        .iter()
        .enumerate()
        .map(|(n, packet)| {
            let start = octets.len();
            let (packet, partial) = match n % 2 {
                0 => (packet.clone(), false),
                _ => (without_checksum(packet), true),
            };
            octets.extend_from_slice(&packet);
            let len = packet.len();
            (Span { start, len }, partial)
        })
        .collect();
    for (span, partial) in spans {
        let inner = inner::parse(span.of(&octets)).unwrap();
        coalescer.push(&octets, span, 1, &inner, partial).unwrap();
    }
    let mut out = Vec::new();
    let mut refused = Vec::new();
    coalescer.drain(
        &octets,
        TO,
        |_| [1; 6],
        |frame| {
            let octets = frame.pieces.iter().flat_map(|p| p.iter().copied());
            let octets: Vec<u8> = octets.collect();
            if frame.offload.is_some() {
                refused.push(frame.offload);
                return false;
            }
            out.extend(recut(&octets));
            true
        },
    );
    assert_eq!(refused, [Some(Offload::Tso)]);
    assert_eq!(out, packets);
}

#[test]
fn a_damaged_segment_is_not_laundered() {
    for damaged in [0, 1, 3] {
        let mut packets = stream(false, 5600, 1400);
        *packets[damaged].last_mut().unwrap() ^= 1;
        let bad = packets[damaged].clone();
        let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(packets));
        let alone = frames.iter().find(|f| f[FRAME_HEAD..] == bad).unwrap();
        assert_eq!(VnetHeader::parse(alone), Some(VnetHeader::default()));
        let kept: usize = frames.iter().map(|f| recut(f).len()).sum();
        assert_eq!(kept, 4);
    }
}

#[test]
fn a_damaged_ip_header_is_not_laundered() {
    let mut packets = stream(false, 2800, 1400);
    packets[1][10] ^= 1;
    assert_eq!(
        run(&mut Coalescer::new(TCP_ONLY), &of_one(packets)).len(),
        2
    );
}

#[test]
fn gaps_repeats_and_disorder_are_not_joined() {
    let packets = stream(false, 5600, 1400);
    for order in [vec![0, 2], vec![0, 0], vec![1, 0], vec![0, 1, 1]] {
        let chosen: Vec<_> = order.iter().map(|n| packets[*n].clone()).collect();
        let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(chosen.clone()));
        let out: Vec<_> = frames.iter().flat_map(|f| recut(f)).collect();
        assert_eq!(out, chosen, "{order:?}");
        assert!(frames.len() >= 2);
    }
}

#[test]
fn a_pure_acknowledgement_of_the_flow_keeps_its_place() {
    let mut packets = stream(false, 4200, 1400);
    packets.insert(1, tcp(false, 2400, 0x10, &[1; 12], &[]));
    let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(packets.clone()));
    let out: Vec<_> = frames.iter().flat_map(|f| recut(f)).collect();
    assert_eq!(out, packets);
    assert_eq!(frames.len(), 3);
}

#[test]
fn flows_of_different_peers_stay_apart() {
    let packets = stream(false, 2800, 1400);
    let frames = run(
        &mut Coalescer::new(TCP_ONLY),
        &[(1, packets[0].clone()), (2, packets[1].clone())],
    );
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[1][16..22], [2; 6]);
}

#[test]
fn interleaved_streams_are_joined_each() {
    let (a, b) = (stream(false, 14_000, 1400), stream(true, 14_000, 1400));
    let mixed = a.iter().zip(&b).flat_map(|(a, b)| [a.clone(), b.clone()]);
    let mut coalescer = Coalescer::new(TCP_ONLY);
    let mixed = of_one(mixed.collect());
    for _ in 0..3 {
        let frames = run(&mut coalescer, &mixed);
        assert_eq!(frames.len(), 2);
        assert_eq!(recut(&frames[0]), a);
        assert_eq!(recut(&frames[1]), b);
    }
}

#[test]
fn more_than_an_ip_packet_holds_is_two_frames() {
    let mut packets = stream(false, 60_000, 1000);
    let mut more = cut_tcp(&mut tcp(false, 61_000, 0x18, &[1; 12], &[3; 9000]), 1000);
    for packet in packets.iter_mut() {
        // The first stream's last segment carried PSH: not here, it goes on.
        packet[33] &= !PSH;
        packet[36..38].fill(0);
        let sum = pseudo_header(addresses(packet), TCP, packet.len() - 20).add(&packet[20..]);
        packet[36..38].copy_from_slice(&sum.finish());
    }
    packets.append(&mut more);
    let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(packets.clone()));
    assert_eq!(frames.len(), 2);
    let out: Vec<_> = frames.iter().flat_map(|f| recut(f)).collect();
    assert_eq!(out.len(), packets.len());
    assert!(out.iter().all(|p| checksums_are_right(p)));
}

/// Takes the transport checksum out of a packet.
fn without_checksum(packet: &[u8]) -> Vec<u8> {
    let inner = inner::parse(packet).unwrap();
    let field = inner.transport + checksum_offset(inner.protocol).unwrap();
    let mut packet = packet.to_vec();
    packet[field..field + 2].copy_from_slice(&[0xab, 0xcd]);
    packet
}

#[test]
fn what_has_no_checksum_is_joined_and_left_to_the_kernel() {
    let streams = [
        stream(false, 30_000, 1400),
        stream(true, 30_000, 1400),
        cut_udp(&udp(false, &[7; 30_000]), 1000),
        cut_udp(&udp(true, &[7; 30_500]), 1000),
    ];
    for whole in streams {
        let partial: Vec<_> = whole
            .iter()
            .map(|p| (1, without_checksum(p), true))
            .collect();
        let frames = run_mixed(&mut Coalescer::new(Joins::ALL), &partial);
        assert_eq!(frames.len(), 1);
        assert_eq!(recut(&frames[0]), whole);
    }
}

#[test]
fn a_lone_packet_without_a_checksum_gets_one_from_the_kernel() {
    let packets = [
        tcp(false, 9, 0x02, &[2; 40], &[]),
        tcp(true, 9, 0x11, &[], b"and farewell"),
        tcp(false, 9, 0x18, &[1; 12], b"pushed"),
        udp(false, &[]),
        udp(true, &[3; 1]),
    ];
    for packet in packets {
        for joins in [false, true] {
            let partial = [(1, without_checksum(&packet), true)];
            let frames = run_mixed(
                &mut Coalescer::new(Joins {
                    udp: joins,
                    ..Joins::ALL
                }),
                &partial,
            );
            let vnet = VnetHeader::parse(&frames[0]).unwrap();
            assert_eq!((vnet.flags, vnet.gso_type), (NEEDS_CSUM, GSO_NONE));
            assert_eq!(recut(&frames[0]), std::slice::from_ref(&packet));
        }
    }
}

#[test]
fn with_and_without_a_checksum_is_one_stream() {
    let whole = stream(false, 8400, 1400);
    let mixed: Vec<_> = whole
        .iter()
        .enumerate()
        .map(|(n, p)| match n % 2 {
            0 => (1, p.clone(), false),
            _ => (1, without_checksum(p), true),
        })
        .collect();
    let frames = run_mixed(&mut Coalescer::new(TCP_ONLY), &mixed);
    assert_eq!(frames.len(), 1);
    assert_eq!(recut(&frames[0]), whole);
}

#[test]
fn nothing_stands_for_a_checksum_that_has_no_place() {
    let icmp = inner::tests::ip(
        "10.32.0.1".parse().unwrap(),
        "10.33.0.1".parse().unwrap(),
        1,
        &[0; 40],
    );
    let mut fragment = tcp(false, 1, 0x10, &[], &[1; 100]);
    fragment[6] = 0x20;
    let mut long_header = tcp(false, 1, 0x10, &[], &[]);
    long_header[32] = 0xf0;
    let mut short_datagram = udp(false, &[1; 10]);
    short_datagram[25] = 17;
    for packet in [icmp, fragment, long_header, short_datagram] {
        let inner = inner::parse(&packet).unwrap();
        let span = Span {
            start: 0,
            len: packet.len(),
        };
        let refused = Coalescer::new(TCP_ONLY).push(&packet, span, 1, &inner, true);
        assert_eq!(refused, Err(Dropped::Malformed));
        assert_eq!(run(&mut Coalescer::new(TCP_ONLY), &[(1, packet)]).len(), 1);
    }
}

#[test]
fn datagrams_of_one_length_are_joined_where_the_kernel_parts_them_again() {
    let mut packets = cut_udp(&udp(false, &[5; 10_300]), 1000);
    assert_eq!(packets.len(), 11);
    // Nothing goes behind a shorter one.
    packets.extend(cut_udp(&udp(false, &[6; 2000]), 1000));
    let frames = run(&mut Coalescer::new(Joins::ALL), &of_one(packets.clone()));
    assert_eq!(frames.len(), 2);
    let out: Vec<_> = frames.iter().flat_map(|f| recut(f)).collect();
    assert_eq!(out, packets);
}

#[test]
fn a_datagram_that_was_sent_without_a_checksum_keeps_having_none() {
    let mut packets = cut_udp(&udp(false, &[5; 4000]), 1000);
    packets.iter_mut().for_each(|p| p[26..28].fill(0));
    let frames = run(&mut Coalescer::new(Joins::ALL), &of_one(packets.clone()));
    let out: Vec<_> = frames.iter().map(|f| f[FRAME_HEAD..].to_vec()).collect();
    assert_eq!(out, packets);
}

#[test]
fn datagrams_pass_untouched() {
    let packets = vec![
        udp(false, &[1; 100]),
        udp(true, &[2; 100]),
        udp(false, &[1; 100]),
    ];
    let frames = run(&mut Coalescer::new(TCP_ONLY), &of_one(packets.clone()));
    let out: Vec<_> = frames.iter().map(|f| f[FRAME_HEAD..].to_vec()).collect();
    assert_eq!(out, packets);
}

proptest! {
    #[test]
    fn whatever_comes_in_comes_out_in_order(
        picks in proptest::collection::vec((0usize..2, 0usize..24, any::<bool>()), 0..60)
    ) {
        let pool: Vec<_> = stream(false, 12_000, 1000).into_iter().chain(stream(true, 12_000, 1000)).collect();
        let packets: Vec<_> = picks
            .iter()
            .map(|(from, n, damage)| {
                let mut packet = pool[*n].clone();
                if *damage {
                    packet[70] ^= 0x55;
                }
                (*from, packet)
            })
            .collect();
        let frames = run(&mut Coalescer::new(TCP_ONLY), &packets);
        for from in 0..2 {
            for version in [4, 6] {
                let sent = packets.iter().filter(|(f, p)| *f == from && p[0] >> 4 == version).map(|(_, p)| p.clone());
                let got = frames
                    .iter()
                    .filter(|f| f[16] == from as u8 && f[FRAME_HEAD] >> 4 == version)
                    .flat_map(|f| recut(f));
                prop_assert_eq!(got.collect::<Vec<_>>(), sent.collect::<Vec<_>>());
            }
        }
    }
}
