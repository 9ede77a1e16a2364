//! Three hosts in a row: the first seals for the last, the one between passes on, the last opens.

use std::sync::Arc;

use weft_core::crypto::{Cipher, Secret};
use weft_core::model::NodeId;
use weft_core::path::Path;
use weft_core::session::transport::{Transport, TransportKeys};
use weft_core::underlay::{Dscp, UnderlayAddr};
use weft_core::view::PeerNumber;
use weft_core::wire::{FrameKind, OVERHEAD, RELAY_OVERHEAD};

use super::*;
use crate::batch::tests::Kept;
use crate::coalesce::Span;
use crate::ecn::NOT_ECT;
use crate::inbound::Inbound;
use crate::measure::tcp_frame;
use crate::offload::{Joins, Offloads};
use crate::outbound::Outbound;
use crate::table::{PeerEntry, PeerTable, States};
use crate::vnet::FRAME_HEAD;

const MTU: u16 = 1300;
/// As `tcp_frame` has it.
const NUMBER: PeerNumber = PeerNumber(9);

fn id(node: u8) -> NodeId {
    NodeId([node; 32])
}

fn addr(node: u8) -> UnderlayAddr {
    UnderlayAddr::Udp(([192, 0, 2, node], 6783).into())
}

/// Both ends of a session; each is received under the number of the other end and ten times its own.
fn session(one: u8, other: u8) -> [Arc<Transport>; 2] {
    let keys = |send, receive| TransportKeys {
        esp: None,
        cipher: Cipher::ChaCha20Poly1305,
        send: Secret::new([send; 32]),
        receive: Secret::new([receive; 32]),
    };
    let index = |own: u8, of: u8| u32::from(own) * 10 + u32::from(of);
    let (a, b) = (index(one, other), index(other, one));
    let (up, down) = (one * 10 + other, other * 10 + one);
    [
        Arc::new(Transport::new(id(other), a, b, &keys(up, down))),
        Arc::new(Transport::new(id(one), b, a, &keys(down, up))),
    ]
}

fn entry(number: PeerNumber, transport: &Arc<Transport>, path: Path) -> PeerEntry {
    PeerEntry {
        number,
        id: transport.peer(),
        transport: Some(transport.clone()),
        path: Some(path),
        prefixes: vec!["10.32.0.0/12".parse().unwrap()],
        mtu: Some(MTU),
    }
}

fn table(me: u8, relays: bool, peers: Vec<PeerEntry>) -> Table {
    let receivers = peers.iter().filter_map(|p| p.transport.clone()).collect();
    let table = PeerTable {
        me: id(me),
        relays,
        plan: crate::inner::tests::plan(),
        peers,
        receivers,
        guests: Vec::new(),
        guard: None,
    };
    Table::new(table, &mut States::new())
}

struct Row {
    shared: Shared,
    /// Of hosts 1, 2 and 3.
    tables: [Table; 3],
}

fn row(relays: bool) -> Row {
    let ([a2, b1], [b3, c2], [a3, c1]) = (session(1, 2), session(2, 3), session(1, 3));
    let direct = |node| Path::Direct(addr(node));
    let between = Path::Relayed(id(2));
    Row {
        shared: Shared::new(Box::new(drop), Dscp::default(), Offloads::default()),
        tables: [
            table(
                1,
                false,
                vec![
                    entry(PeerNumber(2), &a2, direct(2)),
                    entry(NUMBER, &a3, between),
                ],
            ),
            table(
                2,
                relays,
                vec![
                    entry(PeerNumber(1), &b1, direct(1)),
                    entry(PeerNumber(3), &b3, direct(3)),
                ],
            ),
            table(
                3,
                false,
                vec![
                    entry(PeerNumber(2), &c2, direct(2)),
                    entry(PeerNumber(1), &c1, between),
                ],
            ),
        ],
    }
}

impl Row {
    /// What host 1 sends of these frames.
    fn send(&self, frames: &mut [Vec<u8>]) -> Kept {
        let sent = Kept::default();
        let mut outbound = Outbound::new();
        for frame in frames {
            outbound.handle_frame(&self.tables[0], &self.shared, &sent, frame);
        }
        outbound.flush(&self.tables[0], &self.shared, &sent);
        sent
    }

    /// What `host` sends on and hands to its TAP of runs that came from `from`.
    fn receive(&self, host: usize, from: u8, runs: &Kept) -> (Kept, Vec<Vec<u8>>) {
        let (sent, mut frames) = (Kept::default(), Vec::new());
        let mut inbound = Inbound::new(Joins::ALL);
        let table = &self.tables[host];
        let mut octets = Vec::new();
        for (_, run) in runs.runs.borrow().iter() {
            for datagram in run {
                let span = Span {
                    start: octets.len(),
                    len: datagram.len(),
                };
                octets.extend_from_slice(datagram);
                let outer = (addr(from), NOT_ECT);
                inbound.handle_datagram(table, &self.shared, &sent, &mut octets, span, outer);
            }
        }
        inbound.pass_on(table, &self.shared, &sent);
        inbound.flush(table, &octets, |frame| {
            let pieces = frame.pieces.iter();
            frames.push(pieces.flat_map(|p| p.iter().copied()).collect());
            true
        });
        (sent, frames)
    }
}

fn lengths(sent: &Kept) -> Vec<(UnderlayAddr, Vec<usize>)> {
    let runs = sent.runs.borrow();
    runs.iter()
        .map(|(to, run)| (*to, run.iter().map(Vec::len).collect()))
        .collect()
}

#[test]
fn a_super_packet_goes_through_whole_in_one_run_each_way() {
    let row = row(true);
    let mut frames = [tcp_frame(6000, 1000, 1)];
    let inner = frames[0][FRAME_HEAD..].to_vec();
    let sent = row.send(&mut frames);
    let each = 1040 + OVERHEAD + RELAY_OVERHEAD;
    assert_eq!(lengths(&sent), [(addr(2), vec![each; 6])]);
    let (passed, frames) = row.receive(1, 1, &sent);
    assert_eq!(lengths(&passed), [(addr(3), vec![each; 6])]);
    assert!(frames.is_empty());
    let (nothing, frames) = row.receive(2, 2, &passed);
    assert!(lengths(&nothing).is_empty());
    let [frame] = &frames[..] else {
        panic!("{} frames", frames.len());
    };
    assert_eq!(frame[FRAME_HEAD + 40..], inner[40..]);
    assert_eq!(row.shared.drops.read(), []);
}

#[test]
fn who_passes_on_sees_no_octet_of_it() {
    let row = row(true);
    let mut frames = [tcp_frame(900, 0, 1)];
    let inner = frames[0][FRAME_HEAD + 100..FRAME_HEAD + 116].to_vec();
    let sent = row.send(&mut frames);
    let (_, run) = sent.runs.borrow()[0].clone();
    let mut datagram = run[0].clone();
    let [_, ours] = session(1, 2);
    let (kind, body) = ours.open(&mut datagram).unwrap();
    assert_eq!(kind, FrameKind::Relay as u8);
    assert!(!body.windows(16).any(|window| window == inner));
}

#[test]
fn who_does_not_relay_drops_what_is_not_for_it() {
    let row = row(false);
    let sent = row.send(&mut [tcp_frame(100, 0, 1)]);
    let (passed, _) = row.receive(1, 1, &sent);
    assert!(lengths(&passed).is_empty());
    assert_eq!(row.shared.drops.read(), [(Dropped::NotRelayed, 1)]);
}

#[test]
fn what_two_have_passed_on_goes_no_further() {
    let mut row = row(true);
    let [b3, _] = session(2, 3);
    let [b1, _] = session(2, 1);
    // Host 2 says that it reaches host 3 through host 1.
    row.tables[1] = table(
        2,
        true,
        vec![
            entry(PeerNumber(1), &b1, Path::Direct(addr(1))),
            entry(PeerNumber(3), &b3, Path::Relayed(id(1))),
        ],
    );
    let [_, a2] = session(2, 1);
    let sent = |head: RelayHead| {
        let mut datagram = Vec::new();
        a2.seal(FrameKind::Relay, &head.with(&[7; 100]), &mut datagram)
            .unwrap();
        let sent = Kept::default();
        sent.runs.borrow_mut().push((addr(2), vec![datagram]));
        sent
    };
    // Not back to where it came from, and not further once somebody has passed it on.
    for head in [
        RelayHead::first(&id(3)),
        RelayHead::first(&id(3)).next(),
        RelayHead::first(&id(77)),
    ] {
        let (passed, frames) = row.receive(1, 1, &sent(head));
        assert!(lengths(&passed).is_empty() && frames.is_empty());
    }
    assert_eq!(row.shared.drops.read(), [(Dropped::NotRelayed, 3)]);
}
