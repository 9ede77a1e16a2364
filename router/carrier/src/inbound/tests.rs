use std::sync::Arc;
use std::sync::mpsc::{self, Receiver as Events};

use proptest::prelude::*;
use weft_core::crypto::{Secret, hkdf_sha256, mac16};
use weft_core::session::guard::Guard;
use weft_core::session::transport::Transport;
use weft_core::underlay::Dscp;
use weft_core::view::PeerNumber;

use super::*;
use crate::batch::tests::Kept;
use crate::bundle::{ITEM_HEAD, write_head};
use crate::ecn::{CE, NOT_ECT};
use crate::halves::tests::halves;
use crate::inner::tests::ip;
use crate::offload::{Joins, Offloads};
use crate::segment::fill_v4_checksum;
use crate::table::tests::{entry, session, table};
use crate::table::{PeerTable, States};
use crate::vnet::FRAME_HEAD;

struct Rig {
    shared: Shared,
    table: Table,
    inbound: Inbound,
    events: Events<CarrierEvent>,
    /// The peer's end of the session.
    far: Arc<Transport>,
}

fn home() -> UnderlayAddr {
    UnderlayAddr::Udp("192.0.2.2:6783".parse().unwrap())
}

fn rig(known: bool) -> Rig {
    rig_with(known, |_| ())
}

fn rig_with(known: bool, change: impl FnOnce(&mut PeerTable)) -> Rig {
    let (near, far) = session();
    let mut peer = entry(7, if known { 2 } else { 99 });
    peer.path = Some(home().into());
    peer.transport = Some(near.clone());
    peer.prefixes = vec!["10.33.0.0/16".parse().unwrap()];
    let (sender, events) = mpsc::channel();
    let mut table = table(vec![peer], vec![near]);
    change(&mut table);
    Rig {
        shared: Shared::new(
            Box::new(move |event| drop(sender.send(event))),
            Dscp::Clear,
            Offloads::default(),
        ),
        table: Table::new(table, &mut States::new()),
        inbound: Inbound::new(Joins::ALL),
        events,
        far,
    }
}

fn packet(src: &str) -> Vec<u8> {
    let dst = "10.32.0.1".parse().unwrap();
    ip(src.parse().unwrap(), dst, 1, &[5; 40])
}

fn bundle(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut body = Vec::new();
    for packet in packets {
        let mut head = [0; ITEM_HEAD];
        write_head(&mut head, packet.len(), false);
        body.extend_from_slice(&head);
        body.extend_from_slice(packet);
    }
    body
}

impl Rig {
    fn sealed(&self, kind: FrameKind, body: &[u8]) -> Vec<u8> {
        let mut datagram = Vec::new();
        self.far.seal(kind, body, &mut datagram).unwrap();
        datagram
    }

    /// Takes one datagram; gives the frames it made.
    fn take(&mut self, datagram: &[u8], from: UnderlayAddr) -> Vec<Vec<u8>> {
        self.take_marked(datagram, from, NOT_ECT)
    }

    fn take_marked(&mut self, datagram: &[u8], from: UnderlayAddr, ecn: u8) -> Vec<Vec<u8>> {
        let mut octets = datagram.to_vec();
        let span = Span {
            start: 0,
            len: octets.len(),
        };
        self.inbound.set_room(octets.len());
        octets.resize(octets.len() + MAX_WHOLE, 0);
        self.inbound.handle_datagram(
            &self.table,
            &self.shared,
            &Kept::default(),
            &mut octets,
            span,
            (from, ecn),
        );
        let mut frames = Vec::new();
        self.inbound.flush(&self.table, &octets, |frame| {
            let octets = frame.pieces.iter().flat_map(|p| p.iter().copied());
            frames.push(octets.collect());
            true
        });
        frames
    }

    fn take_frame(&mut self, kind: FrameKind, body: &[u8]) -> Vec<Vec<u8>> {
        let datagram = self.sealed(kind, body);
        self.take(&datagram, home())
    }

    fn drops(&self) -> Vec<(Dropped, u64)> {
        self.shared.drops.read()
    }
}

#[test]
fn a_packet_comes_out_as_a_frame_of_its_peer() {
    let mut rig = rig(true);
    let frames = rig.take_frame(FrameKind::Packet, &packet("10.33.0.9"));
    let [frame] = &frames[..] else {
        panic!("{frames:?}");
    };
    assert_eq!(frame[..10], [0; 10], "nothing is left to the kernel");
    assert_eq!(frame[10..16], UDP_CARRIER_MAC);
    assert_eq!(frame[16..22], weft_core::layout::peer_mac(PeerNumber(7)));
    assert_eq!(frame[22..24], [8, 0]);
    assert_eq!(frame[FRAME_HEAD..], packet("10.33.0.9"));
    assert!(rig.drops().is_empty());
    assert_eq!(rig.events.try_iter().count(), 0);
}

#[test]
fn one_spoofed_packet_does_not_spoil_its_bundle() {
    let mut rig = rig(true);
    let packets = ["10.33.0.9", "10.34.0.9", "10.33.0.10", "127.0.0.1"].map(packet);
    let mut body = bundle(&packets);
    body.extend_from_slice(&[200, 0, 1]);
    let frames = rig.take_frame(FrameKind::Bundle, &body);
    let inner: Vec<_> = frames.iter().map(|f| f[FRAME_HEAD..].to_vec()).collect();
    assert_eq!(inner, [packets[0].clone(), packets[2].clone()]);
    let expected = [
        (Dropped::Malformed, 1),
        (Dropped::NotRoutable, 1),
        (Dropped::ForeignSource, 1),
    ];
    assert_eq!(rig.drops(), expected);
}

#[test]
fn a_packet_in_halves_is_looked_at_like_any_other() {
    let mut rig = rig(true);
    let (honest, spoofed) = (packet("10.33.0.9"), packet("10.34.0.9"));
    let [first, second] = halves(&honest, 1, false);
    assert!(rig.take_frame(FrameKind::Half, &second).is_empty());
    let frames = rig.take_frame(FrameKind::Half, &first);
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0][FRAME_HEAD..], honest);
    for half in halves(&spoofed, 2, false) {
        assert!(rig.take_frame(FrameKind::Half, &half).is_empty());
    }
    assert!(rig.take_frame(FrameKind::Half, &first[..4]).is_empty());
    let expected = [(Dropped::Malformed, 1), (Dropped::ForeignSource, 1)];
    assert_eq!(rig.drops(), expected);
    let received = rig.table.peers[0].state.traffic.read(PeerNumber(7));
    assert_eq!(received.rx_packets, 1);
}

#[test]
fn who_is_no_peer_yet_can_talk_but_not_send_packets() {
    let mut rig = rig(false);
    assert!(
        rig.take_frame(FrameKind::Packet, &packet("10.33.0.9"))
            .is_empty()
    );
    assert_eq!(rig.drops(), [(Dropped::UnknownPeer, 1)]);
    rig.take_frame(FrameKind::Control, b"hello");
    let event = rig.events.try_recv().unwrap();
    let CarrierEvent::Frame {
        local_index,
        from,
        kind,
        body,
    } = event
    else {
        panic!("{event:?}");
    };
    assert_eq!(
        (local_index, from, kind, &body[..]),
        (11, home().into(), 16, &b"hello"[..])
    );
}

#[test]
fn kinds_of_a_later_version_are_counted() {
    let mut rig = rig(true);
    let mut datagram = rig.sealed(FrameKind::Packet, &[]);
    datagram.truncate(DATA_HEADER);
    let body = packet("10.33.0.9");
    datagram.push(15);
    datagram.extend_from_slice(&body);
    datagram.resize(datagram.len() + weft_core::crypto::TAG_LEN, 0);
    rig.far
        .seal_in_place(&mut datagram, 1 + body.len())
        .unwrap();
    assert!(rig.take(&datagram, home()).is_empty());
    assert_eq!(rig.drops(), [(Dropped::UnknownFrame, 1)]);
}

#[test]
fn a_packet_without_a_place_for_its_checksum_is_dropped() {
    let mut rig = rig(true);
    // ICMP.
    let body = packet("10.33.0.9");
    assert!(rig.take_frame(FrameKind::Partial, &body).is_empty());
    assert_eq!(rig.drops(), [(Dropped::Malformed, 1)]);
}

#[test]
fn a_second_port_of_the_same_host_is_no_move_while_the_first_is_heard() {
    let mut rig = rig(true);
    let beside = UnderlayAddr::Udp("192.0.2.2:40000".parse().unwrap());
    let mut take = |from| {
        // Each time as if the last event were long ago.
        rig.table.peers[0].state = Default::default();
        let datagram = rig.sealed(FrameKind::Packet, &packet("10.33.0.9"));
        let path = rig.sealed(FrameKind::Packet, &packet("10.33.0.9"));
        if from == beside {
            assert_eq!(rig.take(&path, home()).len(), 1);
        }
        assert_eq!(rig.take(&datagram, from).len(), 1);
        rig.events.try_iter().count()
    };
    assert_eq!(take(beside), 0, "it sends from both");
    let elsewhere = UnderlayAddr::Udp("198.51.100.1:6783".parse().unwrap());
    assert_eq!(take(elsewhere), 1);
    rig.table.peers[0].state = Default::default();
    let datagram = rig.sealed(FrameKind::Packet, &packet("10.33.0.9"));
    rig.take(&datagram, beside);
    assert_eq!(
        rig.events.try_iter().count(),
        1,
        "a NAT gave it another port"
    );
}

#[test]
fn another_address_is_told_only_when_the_datagram_is_authentic() {
    let mut rig = rig(true);
    let elsewhere = UnderlayAddr::Udp("198.51.100.1:1".parse().unwrap());
    let datagram = rig.sealed(FrameKind::Packet, &packet("10.33.0.9"));
    let mut forged = datagram.clone();
    forged[20] ^= 1;
    rig.take(&forged, elsewhere);
    assert_eq!(rig.events.try_iter().count(), 0);
    assert_eq!(rig.take(&datagram, elsewhere).len(), 1);
    let moved = CarrierEvent::Moved {
        local_index: 11,
        from: elsewhere.into(),
    };
    assert_eq!(rig.events.try_iter().collect::<Vec<_>>(), [moved]);
    // A replay from a third place tells nothing, and nothing of it gets through.
    assert!(
        rig.take(
            &datagram,
            UnderlayAddr::Udp("203.0.113.1:1".parse().unwrap())
        )
        .is_empty()
    );
    assert_eq!(rig.events.try_iter().count(), 0);
    assert_eq!(rig.drops(), [(Dropped::Forged, 1), (Dropped::Replayed, 1)]);
}

#[test]
fn what_belongs_to_a_newcomer_goes_to_the_core_unopened() {
    let index = 1 << 31;
    let mut rig = rig_with(true, |table| {
        table.guests = vec![index];
        table.guard = Some(Arc::new(Guard::new(&Secret::new([1; 32]))));
    });
    let header = DataHeader {
        receiver: index,
        counter: 1,
    };
    let mut datagram = header.to_bytes().to_vec();
    datagram.resize(100, 3);
    assert!(rig.take(&datagram, home()).is_empty());
    let expected = CarrierEvent::Handshake {
        from: home().into(),
        bytes: datagram.clone(),
    };
    assert_eq!(rig.events.try_recv(), Ok(expected));
    datagram.resize(MAX_DATAGRAM + 1, 3);
    rig.take(&datagram, home());
    // Nobody's, though it might be a newcomer's.
    datagram.truncate(100);
    datagram[4] ^= 1;
    rig.take(&datagram, home());
    assert_eq!(rig.drops(), [(Dropped::UnknownSession, 2)]);
    assert_eq!(rig.events.try_iter().count(), 0);
}

#[test]
fn of_strangers_the_core_hears_nothing_and_they_use_up_nobody_s_share() {
    let secret = Secret::new([1; 32]);
    let guard = Some(Arc::new(Guard::new(&secret)));
    let mut rig = rig_with(true, |table| table.guard = guard);
    let hello = |kind: u8, len: usize| -> Vec<u8> {
        let body = (4..len).map(|n| n as u8);
        [kind, 1, 0, 0].into_iter().chain(body).collect()
    };
    for kind in [1, 2, 3, 5, 6] {
        for len in [MIN_HANDSHAKE, 200, 600, MAX_DATAGRAM] {
            (0..100).for_each(|_| drop(rig.take(&hello(kind, len), home())));
        }
    }
    assert_eq!(rig.events.try_iter().count(), 0);
    // Of join-inits, which cost more, no more are looked at than one source may send.
    let drops = rig.drops();
    let of = |reason| {
        drops
            .iter()
            .find(|(r, _)| *r == reason)
            .map_or(0, |(_, n)| *n)
    };
    assert!((1600..1700).contains(&of(Dropped::Stranger)), "{drops:?}");
    assert_eq!(of(Dropped::Stranger) + of(Dropped::HandshakeFlood), 2000);
    // Whoever holds the secret is heard from the very address that the flood pretended to come from.
    let mut call = hello(1, 200);
    let key = hkdf_sha256(secret.expose(), b"weft handshake 1", &[b"mac1"]);
    call.extend(mac16(key.expose(), &[&call]));
    call.extend([0; 16]);
    rig.take(&call, home());
    let expected = CarrierEvent::Handshake {
        from: home().into(),
        bytes: call,
    };
    assert_eq!(rig.events.try_recv(), Ok(expected));
}

#[test]
fn handshakes_are_bounded_in_length_and_number() {
    let mut rig = rig(true);
    let hello =
        |len: usize| -> Vec<u8> { [1, 1, 0, 0].into_iter().chain(vec![0; len - 4]).collect() };
    for len in [4, MIN_HANDSHAKE - 1, MAX_DATAGRAM + 1] {
        rig.take(&hello(len), home());
    }
    assert_eq!(rig.drops(), [(Dropped::UnknownDatagram, 3)]);
    for _ in 0..1000 {
        rig.take(&hello(200), home());
    }
    let heard = rig.events.try_iter().count();
    assert!((40..100).contains(&heard), "{heard}");
    let flood = rig
        .drops()
        .iter()
        .find(|(r, _)| *r == Dropped::HandshakeFlood)
        .map(|(_, n)| *n);
    assert_eq!(flood, Some(1000 - heard as u64));
}

#[test]
fn a_mark_reaches_every_packet_of_a_bundle_that_can_bear_it() {
    let mut rig = rig(true);
    let with = |tos: u8| {
        let mut packet = packet("10.33.0.9");
        packet[1] = tos;
        fill_v4_checksum(&mut packet[..20]);
        packet
    };
    let body = bundle(&[0xb8 | 2, 0, 1, 3].map(with));
    let datagram = rig.sealed(FrameKind::Bundle, &body);
    let frames = rig.take_marked(&datagram, home(), CE);
    let inner: Vec<_> = frames.iter().map(|f| f[FRAME_HEAD..].to_vec()).collect();
    assert_eq!(inner, [0xb8 | 3, 3, 3].map(with));
    assert_eq!(rig.drops(), [(Dropped::CeOnNotEct, 1)]);
    let received = rig.table.peers[0].state.traffic.read(PeerNumber(7));
    assert_eq!(received.rx_packets, 3);
}

proptest! {
    #[test]
    fn no_datagram_makes_it_panic_or_write(mut datagram in proptest::collection::vec(any::<u8>(), 0..300), ours: bool) {
        let mut rig = rig(true);
        if ours && datagram.len() > 8 {
            datagram[..8].copy_from_slice(&[4, 1, 0, 0, 11, 0, 0, 0]);
        }
        prop_assert!(rig.take(&datagram, home()).is_empty());
    }

    #[test]
    fn no_body_of_a_peer_makes_it_panic(kind in 0usize..4, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut rig = rig(true);
        let kind = [FrameKind::Packet, FrameKind::Bundle, FrameKind::Partial, FrameKind::Half][kind];
        rig.take_frame(kind, &body);
    }
}
