use std::io;
use std::sync::mpsc::{self, Receiver};

use proptest::prelude::*;
use weft_core::underlay::{Dscp, UnderlayAddr};
use weft_core::view::PeerNumber;
use weft_core::wire::{DATA_HEADER, FrameKind, OVERHEAD};

use super::*;
use crate::batch::tests::Kept;
use crate::bundle::tests::items;
use crate::counters::Dropped;
use crate::inner::tests::ip;
use crate::measure::{Path, tcp_frame};
use crate::offload::Offloads;
use crate::table::tests::{entry, session, table};
use crate::table::{PeerTable, States};

const MTU: u16 = 1400;

struct Rig {
    shared: Shared,
    table: Table,
    outbound: Outbound,
    wire: Kept,
    events: Receiver<CarrierEvent>,
    far: std::sync::Arc<weft_core::session::transport::Transport>,
}

fn path(number: u16) -> UnderlayAddr {
    UnderlayAddr::Udp(([192, 0, 2, 1], number).into())
}

fn peers(
    numbers: &[u16],
    connected: bool,
) -> (
    PeerTable,
    std::sync::Arc<weft_core::session::transport::Transport>,
) {
    let (near, far) = session();
    let peers = numbers
        .iter()
        .map(|number| {
            let mut peer = entry(*number, *number as u8);
            peer.mtu = Some(MTU);
            peer.path = Some(path(*number).into());
            peer.transport = connected.then(|| near.clone());
            peer
        })
        .collect();
    (table(peers, vec![]), far)
}

fn rig(numbers: &[u16], connected: bool) -> Rig {
    let (table, far) = peers(numbers, connected);
    let (sender, events) = mpsc::channel();
    Rig {
        shared: Shared::new(
            Box::new(move |event| drop(sender.send(event))),
            Dscp::Clear,
            Offloads::default(),
        ),
        table: Table::new(table, &mut States::new()),
        outbound: Outbound::new(),
        wire: Kept::default(),
        events,
        far,
    }
}

/// A frame for `peer` around an inner packet with `payload` octets behind its header.
fn frame(peer: u16, payload: &[u8]) -> Vec<u8> {
    let packet = ip(
        "10.32.0.1".parse().unwrap(),
        "10.33.0.1".parse().unwrap(),
        1,
        payload,
    );
    let mut frame = VnetHeader::default().to_bytes().to_vec();
    frame.extend_from_slice(&layout::peer_mac(PeerNumber(peer)));
    frame.extend_from_slice(&layout::UDP_CARRIER_MAC);
    frame.extend_from_slice(&ether_type(packet[0]));
    frame.extend_from_slice(&packet);
    frame
}

impl Rig {
    fn push(&mut self, frame: &[u8]) {
        let mut frame = frame.to_vec();
        self.outbound
            .handle_frame(&self.table, &self.shared, &self.wire, &mut frame);
    }

    fn flush(&mut self) {
        self.outbound.flush(&self.table, &self.shared, &self.wire);
    }

    /// All inner packets sent so far, in order, with whom they went to.
    fn opened(&self) -> Vec<(u16, FrameKind, Vec<u8>)> {
        let mut packets = Vec::new();
        for (to, run) in self.wire.runs.borrow().iter() {
            for datagram in run {
                let mut datagram = datagram.clone();
                let (kind, body) = self.far.open(&mut datagram).unwrap();
                if kind == FrameKind::Bundle as u8 {
                    for item in items(body) {
                        let item = item.unwrap();
                        packets.push((
                            to.socket().port(),
                            FrameKind::Bundle,
                            body[item.range].to_vec(),
                        ));
                    }
                } else {
                    packets.push((to.socket().port(), FrameKind::Packet, body.to_vec()));
                }
            }
        }
        packets
    }

    fn dropped(&self, reason: Dropped) -> u64 {
        let drops = self.shared.drops.read();
        drops
            .iter()
            .find(|(r, _)| *r == reason)
            .map_or(0, |(_, n)| *n)
    }
}

#[test]
fn a_flow_keeps_to_one_source_port_and_flows_are_spread_over_all_that_are_proven() {
    let mut rig = rig(&[7], true);
    rig.table.peers[0].state.source_ports.set(0b11);
    let flow = |n: u8| {
        let src = format!("10.32.0.{n}").parse().unwrap();
        let packet = ip(src, "10.33.0.1".parse().unwrap(), 1, &[n; 900]);
        let mut frame = frame(7, &[]);
        frame.truncate(FRAME_HEAD);
        frame.extend_from_slice(&packet);
        frame
    };
    let mut used = [0; 3];
    for n in 1..=60 {
        for _ in 0..2 {
            rig.push(&flow(n));
        }
        rig.flush();
        let sources: Vec<u8> = rig.wire.sources.take();
        assert!(sources.iter().all(|s| *s == sources[0]), "{n}: {sources:?}");
        used[usize::from(sources[0])] += 1;
    }
    assert!(used.iter().all(|n| *n > 5), "{used:?}");
    for n in 1..=4 {
        rig.push(&flow(n));
    }
    rig.flush();
    rig.wire.sources.take();
    assert_eq!(rig.opened().len(), 124, "nothing is lost between the ports");
}

#[test]
fn what_differs_in_its_mark_shares_no_outer_header() {
    for (dscp, runs) in [
        (Dscp::Clear, vec![(2, 2), (0, 1), (2, 1)]),
        (Dscp::Copy, vec![(2, 1), (0xba, 1), (0, 1), (2, 1)]),
    ] {
        let mut rig = rig(&[7], true);
        rig.shared.dscp = dscp;
        let all: Vec<_> = [2, 0xba, 0, 2].into();
        for tos in &all {
            let mut frame = frame(7, &[*tos; 30]);
            frame[FRAME_HEAD + 1] = *tos;
            rig.push(&frame);
        }
        rig.flush();
        let sent: Vec<_> = rig
            .opened()
            .iter()
            .map(|(_, _, packet)| packet[1])
            .collect();
        assert_eq!(sent, all, "the inner ones stay, and so does their order");
        let counted: Vec<_> = rig
            .wire
            .runs
            .borrow()
            .iter()
            .zip(&*rig.wire.tos.borrow())
            .map(|((_, run), tos)| {
                let len = run[0].len() - OVERHEAD;
                (*tos, if len == 50 { 1 } else { 2 })
            })
            .collect();
        assert_eq!(counted, runs);
    }
}

#[test]
fn congestion_marks_a_packet_or_costs_one_and_spares_the_small() {
    let mut rig = rig(&[7], true);
    let mut marked = frame(7, &[1; 1000]);
    marked[FRAME_HEAD + 1] = 2;
    rig.wire.congested.set(true);
    rig.push(&frame(7, &[1; 30]));
    assert!(rig.wire.congested.get());
    rig.push(&marked);
    rig.wire.congested.set(true);
    rig.push(&frame(7, &[2; 1000]));
    rig.push(&frame(7, &[3; 1000]));
    // Of a super-packet the first segment.
    rig.wire.congested.set(true);
    let mut whole = tcp_frame(4000, 1000, 100);
    whole[VNET_LEN..VNET_LEN + 6].copy_from_slice(&layout::peer_mac(PeerNumber(7)));
    rig.push(&whole);
    rig.flush();
    let sent = rig.opened();
    let first: Vec<_> = sent[..3].iter().map(|(_, _, p)| (p[1], p[20])).collect();
    assert_eq!(first, [(0, 1), (3, 1), (0, 3)]);
    let sequence = |p: &[u8]| u32::from_be_bytes(p[24..28].try_into().unwrap());
    let rest: Vec<_> = sent[3..].iter().map(|(_, _, p)| sequence(p)).collect();
    assert_eq!(rest, [1100, 2100, 3100]);
    assert_eq!(rig.dropped(Dropped::Congested), 2);
    assert!(!rig.wire.congested.get());
}

#[test]
fn small_packets_share_a_datagram_and_a_lone_one_is_plain() {
    let mut rig = rig(&[7], true);
    for n in 0..3 {
        rig.push(&frame(7, &[n; 30]));
    }
    rig.flush();
    rig.push(&frame(7, &[3; 30]));
    rig.flush();
    let kinds: Vec<_> = rig
        .opened()
        .iter()
        .map(|(_, kind, p)| (*kind, p[20]))
        .collect();
    use FrameKind::{Bundle, Packet};
    assert_eq!(kinds, [(Bundle, 0), (Bundle, 1), (Bundle, 2), (Packet, 3)]);
    assert_eq!(rig.wire.runs.borrow().len(), 2);
    let traffic = rig.table.peers[0].state.traffic.read(PeerNumber(7));
    assert_eq!((traffic.tx_packets, traffic.tx_bytes), (4, 200));
}

#[test]
fn a_bundle_is_never_longer_than_the_largest_packet() {
    let mut rig = rig(&[7], true);
    for _ in 0..100 {
        rig.push(&frame(7, &[1; 100]));
    }
    rig.flush();
    let runs = rig.wire.runs.borrow();
    let longest = runs.iter().flat_map(|(_, run)| run).map(Vec::len).max();
    assert!(longest.unwrap() <= usize::from(MTU) + OVERHEAD);
    // Eleven packets of 122 octets each; nine such datagrams are one run, and the last packet is its end.
    assert_eq!(runs.len(), 1);
    assert_eq!(runs[0].1.len(), 10);
}

#[test]
fn frames_that_are_nobodys_are_dropped_by_name() {
    let mut rig = rig(&[7], true);
    let good = frame(7, &[1; 30]);
    let mut arp = good.clone();
    arp[23] = 6;
    let mut broadcast = good.clone();
    broadcast[10..16].fill(0xff);
    let mut cut = good.clone();
    cut.truncate(50);
    let mut link_local = good.clone();
    link_local[40..44].copy_from_slice(&[169, 254, 1, 1]);
    for (bad, reason) in [
        (&arp[..], Dropped::NotIp),
        (&broadcast, Dropped::NotAPeer),
        (&frame(8, &[1]), Dropped::NotAPeer),
        (&cut, Dropped::Malformed),
        (&link_local, Dropped::NotRoutable),
    ] {
        let before = rig.dropped(reason);
        rig.push(bad);
        assert_eq!(rig.dropped(reason), before + 1, "{}", reason.name());
    }
    for len in 0..FRAME_HEAD + 1 {
        rig.push(&good[..len]);
    }
    rig.flush();
    assert!(rig.wire.runs.borrow().is_empty());
}

#[test]
fn more_peers_than_batches_get_their_packets_all_the_same() {
    let numbers: Vec<u16> = (1..=20).collect();
    let mut rig = rig(&numbers, true);
    for n in 0..200u16 {
        rig.push(&frame(1 + n % 20, &n.to_be_bytes()));
    }
    rig.flush();
    let opened = rig.opened();
    assert_eq!(opened.len(), 200);
    for peer in numbers {
        let order: Vec<_> = opened
            .iter()
            .filter(|(to, _, _)| *to == peer)
            .map(|(_, _, p)| u16::from_be_bytes([p[20], p[21]]))
            .collect();
        assert!(order.len() == 10 && order.is_sorted(), "{order:?}");
    }
}

#[test]
fn packets_wait_for_a_session_and_ask_for_it_once_in_a_while() {
    let mut rig = rig(&[7], false);
    for n in 0..10 {
        rig.push(&frame(7, &[n; 30]));
    }
    rig.flush();
    let wanted = CarrierEvent::Wanted(PeerNumber(7));
    assert_eq!(rig.events.try_iter().collect::<Vec<_>>(), [wanted]);
    assert!(rig.outbound.has_waiting() && rig.wire.runs.borrow().is_empty());
    let (table, far) = peers(&[7], true);
    rig.table = Table::new(table, &mut States::new());
    rig.far = far;
    rig.outbound
        .release_waiting(&rig.table, &rig.shared, &rig.wire);
    rig.flush();
    let order: Vec<_> = rig.opened().iter().map(|(_, _, p)| p[20]).collect();
    assert_eq!(order, (0..10).collect::<Vec<_>>());
    assert!(!rig.outbound.has_waiting());
}

#[test]
fn a_refusal_for_size_is_told_once_in_a_while() {
    let mut rig = rig(&[7], true);
    rig.wire.refuse = Some(libc::EMSGSIZE);
    for _ in 0..5 {
        rig.push(&frame(7, &[1; 1300]));
        rig.flush();
    }
    assert_eq!(rig.dropped(Dropped::TooBig), 5);
    assert_eq!(rig.events.try_iter().count(), 1);
    rig.wire.refuse = Some(libc::ENOBUFS);
    rig.push(&frame(7, &[1; 1300]));
    rig.flush();
    assert_eq!(rig.dropped(Dropped::SendFailed), 1);
}

#[test]
fn a_packet_larger_than_the_path_goes_alone() {
    let mut rig = rig(&[7], true);
    for len in [1200, 1200, 3000, 3000, 1200] {
        rig.push(&frame(7, &vec![1; len]));
    }
    rig.flush();
    let runs = rig.wire.runs.borrow();
    let sizes: Vec<Vec<usize>> = runs
        .iter()
        .map(|(_, run)| run.iter().map(|d| d.len() - DATA_HEADER - 37).collect())
        .collect();
    assert_eq!(
        sizes,
        [vec![1200, 1200], vec![3000], vec![3000], vec![1200]]
    );
}

#[test]
fn a_super_packet_crosses_as_runs_and_comes_out_whole() {
    let mut path = Path::new(weft_core::crypto::Cipher::Aes256Gcm, 1439);
    let mut frame = tcp_frame(62_000, 1387, 5);
    let mut got = Vec::new();
    path.pass_into([frame.as_mut_slice()].into_iter(), |pieces| {
        got.push(pieces.concat_all());
    });
    assert_eq!(path.drops(), 0);
    assert_eq!(got.len(), 1);
    assert_eq!(
        got[0][FRAME_HEAD + 40..],
        tcp_frame(62_000, 1387, 5)[FRAME_HEAD + 40..]
    );
}

#[test]
fn what_a_path_is_too_small_for_crosses_in_halves_and_comes_out_whole() {
    let mut path = Path::new(weft_core::crypto::Cipher::Aes256Gcm, 1199);
    let sent = |sequence| tcp_frame(12_400, 1240, sequence);
    let mut frames = [sent(5), sent(12_405), tcp_frame(100, 0, 24_805)];
    let round = path.pass(frames.iter_mut().map(Vec::as_mut_slice));
    assert_eq!(round.datagrams, 2 * 20 + 1);
    assert_eq!(round.frames, 1, "in order, and so in one super-packet");
    assert_eq!(path.drops(), 0);
    let passed = path.pass_whole([sent(30_000).as_mut_slice()].into_iter());
    let expected = sent(30_000);
    assert_eq!(passed.len(), 1);
    assert_eq!(passed[0][FRAME_HEAD + 40..], expected[FRAME_HEAD + 40..]);
}

trait ConcatAll {
    fn concat_all(&self) -> Vec<u8>;
}

impl ConcatAll for [io::IoSlice<'_>] {
    fn concat_all(&self) -> Vec<u8> {
        self.iter()
            .flat_map(|piece| piece.iter().copied())
            .collect()
    }
}

proptest! {
    #[test]
    fn every_packet_arrives_once_and_in_order(
        sizes in proptest::collection::vec((1u16..=12, 0usize..2000), 1..150), rounds in 1usize..40
    ) {
        let mut rig = rig(&(1..=12).collect::<Vec<_>>(), true);
        let frames: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(n, (peer, size))| (*peer, frame(*peer, &vec![n as u8; *size])))
            .collect();
        for round in frames.chunks(rounds) {
            for (_, frame) in round {
                rig.push(frame);
            }
            rig.flush();
        }
        for (_, run) in rig.wire.runs.borrow().iter() {
            prop_assert!(run.len() <= 64 && run.iter().map(Vec::len).sum::<usize>() <= 65_000);
        }
        let opened = rig.opened();
        for peer in 1..=12 {
            let got = opened.iter().filter(|(to, _, _)| *to == peer).map(|(_, _, p)| p.clone());
            let sent = frames.iter().filter(|(p, _)| *p == peer).map(|(_, f)| f[FRAME_HEAD..].to_vec());
            prop_assert_eq!(got.collect::<Vec<_>>(), sent.collect::<Vec<_>>());
        }
    }
}
