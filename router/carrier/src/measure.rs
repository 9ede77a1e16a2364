//! The packet path without a kernel: what one host's TAP gives goes through both halves and comes out as what the other
//! host's TAP gets. For the bench and for tests; not an interface.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use weft_core::crypto::{Cipher, Secret};
use weft_core::layout;
use weft_core::model::{AddressPlan, NodeId};
use weft_core::session::transport::{Transport, TransportKeys};
use weft_core::underlay::{Dscp, UnderlayAddr};
use weft_core::view::PeerNumber;
use weft_core::wire::FrameKind;

use crate::batch::{Run, Sent, Wire};
use crate::checksum::pseudo_header;
use crate::coalesce::Span;
use crate::ecn::NOT_ECT;
use crate::halves::MAX_WHOLE;
use crate::inbound::Inbound;
use crate::inner::TCP;
use crate::offload::{Joins, Offloads};
use crate::outbound::Outbound;
use crate::segment::{addresses, fill_v4_checksum};
use crate::shared::Shared;
use crate::source_ports::Lane;
use crate::table::{PeerEntry, PeerTable, States, Table};
use crate::vnet::{ETHERNET_LEN, GSO_NONE, GSO_TCPV4, NEEDS_CSUM, VnetHeader};

const NEAR: UnderlayAddr = at(1);
const FAR: UnderlayAddr = at(2);

const fn at(host: u8) -> UnderlayAddr {
    let ip = IpAddr::V4(Ipv4Addr::new(192, 0, 2, host));
    UnderlayAddr::Udp(SocketAddr::new(ip, 6783))
}
/// The other host's number for this one, and this one's for it.
const NUMBER: PeerNumber = PeerNumber(9);
const MAX_RUN: usize = 64;

/// Keeps the octets of runs until they are received.
#[derive(Default)]
struct Memory {
    octets: RefCell<Vec<u8>>,
    spans: RefCell<Vec<Span>>,
}

impl Wire for Memory {
    fn max_run(&self, _: UnderlayAddr) -> usize {
        MAX_RUN
    }

    fn take_congestion(&self, _: Lane) -> bool {
        false
    }

    fn send(&self, _: Lane, run: Run<'_>) -> io::Result<Sent> {
        let mut octets = self.octets.borrow_mut();
        for datagram in run.octets.chunks(run.stride) {
            self.spans.borrow_mut().push(Span {
                start: octets.len(),
                len: datagram.len(),
            });
            octets.extend_from_slice(datagram);
        }
        Ok(Sent::Whole)
    }
}

/// One direction between two hosts.
pub struct Path {
    near: (Shared, Table, Outbound),
    far: (Shared, Table, Inbound),
    wire: Memory,
    ours: Arc<Transport>,
    /// Packets may come in halves.
    cuts: bool,
}

/// What a round brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Datagrams on the wire.
    pub datagrams: usize,
    /// Frames for the receiving TAP.
    pub frames: usize,
    /// Their octets.
    pub bytes: usize,
}

impl Path {
    /// Two hosts with a session and a path of `mtu` octets for inner packets.
    pub fn new(cipher: Cipher, mtu: u16) -> Self {
        let keys = |send, receive| TransportKeys {
            esp: None,
            cipher,
            send: Secret::new([send; 32]),
            receive: Secret::new([receive; 32]),
        };
        let ours = Transport::new(NodeId([2; 32]), 1, 2, &keys(1, 2));
        let theirs = Transport::new(NodeId([1; 32]), 2, 1, &keys(2, 1));
        let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
        let side = |transport: Arc<Transport>, path: UnderlayAddr| {
            let table = PeerTable {
                me: NodeId([9; 32]),
                relays: false,
                plan: AddressPlan {
                    range: AddressPlan::DEFAULT_RANGE,
                    ula: [0xfd; 6],
                },
                peers: vec![PeerEntry {
                    number: NUMBER,
                    id: transport.peer(),
                    transport: Some(transport.clone()),
                    path: Some(path.into()),
                    prefixes: vec![AddressPlan::DEFAULT_RANGE],
                    mtu: Some(mtu),
                }],
                receivers: vec![transport],
                guests: Vec::new(),
                guard: None,
            };
            let shared = Shared::new(Box::new(drop), Dscp::default(), Offloads::default());
            (shared, Table::new(table, &mut States::new()))
        };
        let (near, near_table) = side(ours.clone(), FAR);
        let (far, far_table) = side(theirs, NEAR);
        Self {
            near: (near, near_table, Outbound::new()),
            far: (far, far_table, Inbound::new(Joins::ALL)),
            wire: Memory::default(),
            ours,
            cuts: usize::from(mtu) < MAX_WHOLE,
        }
    }

    /// What the far TAP gets of one sealed frame with any body, each frame whole.
    pub fn receive(&mut self, kind: FrameKind, body: &[u8]) -> Vec<Vec<u8>> {
        let mut octets = Vec::new();
        let mut frames = Vec::new();
        if self.ours.seal(kind, body, &mut octets).is_err() {
            return frames;
        }
        let span = Span {
            start: 0,
            len: octets.len(),
        };
        let (shared, table, inbound) = &mut self.far;
        let from = (NEAR, NOT_ECT);
        inbound.set_room(octets.len());
        octets.resize(octets.len() + MAX_WHOLE, 0);
        inbound.handle_datagram(table, shared, &Memory::default(), &mut octets, span, from);
        inbound.flush(table, &octets, |frame| {
            frames.push(whole(frame.pieces));
            true
        });
        frames
    }

    /// What the far TAP gets of frames from the near one, each whole.
    pub fn pass_whole<'a>(&mut self, frames: impl Iterator<Item = &'a mut [u8]>) -> Vec<Vec<u8>> {
        let mut passed = Vec::new();
        self.pass_into(frames, |pieces| passed.push(whole(pieces)));
        passed
    }

    /// Sends frames as the TAP would give them, and sums up what the other TAP would get.
    pub fn pass<'a>(&mut self, frames: impl Iterator<Item = &'a mut [u8]>) -> Round {
        let mut round = Round::default();
        self.pass_into(frames, |pieces| {
            round.frames += 1;
            round.bytes += pieces.iter().map(|piece| piece.len()).sum::<usize>();
        });
        round.datagrams = self.wire.spans.borrow().len();
        round
    }

    /// The same, with every frame handed to `write` in pieces.
    pub(crate) fn pass_into<'a>(
        &mut self,
        frames: impl Iterator<Item = &'a mut [u8]>,
        mut write: impl FnMut(&[IoSlice<'_>]),
    ) {
        self.wire.octets.borrow_mut().clear();
        self.wire.spans.borrow_mut().clear();
        let (shared, table, outbound) = &mut self.near;
        for frame in frames {
            outbound.handle_frame(table, shared, &self.wire, frame);
        }
        outbound.flush(table, shared, &self.wire);
        let (shared, table, inbound) = &mut self.far;
        let mut octets = self.wire.octets.borrow_mut();
        if self.cuts {
            let received = octets.len();
            inbound.set_room(received);
            octets.resize(received + self.wire.spans.borrow().len() * MAX_WHOLE, 0);
        }
        for span in self.wire.spans.borrow().iter() {
            let from = (NEAR, NOT_ECT);
            inbound.handle_datagram(table, shared, &Memory::default(), &mut octets, *span, from);
        }
        inbound.flush(table, &octets, |frame| {
            write(frame.pieces);
            true
        });
    }

    /// Drops at both ends.
    pub fn drops(&self) -> u64 {
        let of = |shared: &Shared| shared.drops.read().iter().map(|(_, n)| n).sum::<u64>();
        of(&self.near.0) + of(&self.far.0)
    }
}

fn whole(pieces: &[IoSlice<'_>]) -> Vec<u8> {
    pieces
        .iter()
        .flat_map(|piece| piece.iter().copied())
        .collect()
}

/// A TCP frame with `payload` octets as the TAP gives it, to be cut to `size` octets of payload each (0: not at all).
pub fn tcp_frame(payload: usize, size: u16, sequence: u32) -> Vec<u8> {
    let vnet = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: if size > 0 { GSO_TCPV4 } else { GSO_NONE },
        hdr_len: 0,
        gso_size: size,
        csum_start: (ETHERNET_LEN + 20) as u16,
        csum_offset: 16,
    };
    let mut frame = vnet.to_bytes().to_vec();
    frame.extend_from_slice(&layout::peer_mac(NUMBER));
    frame.extend_from_slice(&layout::UDP_CARRIER_MAC);
    frame.extend_from_slice(&[8, 0]);
    let start = frame.len();
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&((40 + payload) as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 1, 0x40, 0, 64, TCP, 0, 0, 10, 32, 0, 1, 10, 33, 0, 1]);
    frame.extend_from_slice(&[0x1f, 0x90, 0xc0, 0x01]);
    frame.extend_from_slice(&sequence.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0, 9, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    fill_v4_checksum(&mut frame[start..start + 20]);
    let sum = pseudo_header(addresses(&frame[start..]), TCP, 20 + payload).partial();
    frame[start + 36..start + 38].copy_from_slice(&sum);
    frame.extend((0..payload).map(|n| (n * 31) as u8));
    frame
}
