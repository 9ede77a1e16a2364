//! From the wire to the TAP: type, session, seal, and whether the peer may send such a packet. Without I/O of its own.

use std::sync::atomic::Ordering;
use std::time::Instant;

use weft_core::layout::UDP_CARRIER_MAC;
use weft_core::path::Path;
use weft_core::session::drops::DropReason;
use weft_core::underlay::UnderlayAddr;
use weft_core::wire::{DATA_HEADER, DataHeader, DatagramType, FrameKind, MAX_DATAGRAM, RelayHead};

use crate::batch::Wire;
use crate::bundle::{Items, Torn};
use crate::coalesce::{Coalescer, Frame, Span};
use crate::counters::Dropped;
use crate::ecn;
use crate::halves::{self, Halves, MAX_WHOLE};
use crate::inner;
use crate::limit::{HANDSHAKES, HandshakeGate, JOINS};
use crate::offload::Joins;
use crate::relay::{Passing, Relayed};
use crate::shared::{CarrierEvent, Shared};
use crate::table::{Receiver, Table};

const PACKET: u8 = FrameKind::Packet as u8;
const BUNDLE: u8 = FrameKind::Bundle as u8;
const PARTIAL: u8 = FrameKind::Partial as u8;
const HALF: u8 = FrameKind::Half as u8;
const RELAY: u8 = FrameKind::Relay as u8;
const PROBE: u8 = FrameKind::Probe as u8;
/// From here on, kinds are not packets.
const CONTROL: u8 = FrameKind::Control as u8;

/// Shorter than any handshake or cookie datagram is.
const MIN_HANDSHAKE: usize = 48;

/// What is known of a datagram besides its octets.
#[derive(Clone, Copy, Debug)]
struct Outer {
    /// Whose socket sent it to ours.
    addr: UnderlayAddr,
    /// The way it came.
    path: Path,
    /// Its congestion field.
    ecn: u8,
}

/// An inner packet in the receive buffer.
#[derive(Clone, Copy, Debug)]
struct Packet {
    span: Span,
    /// Whose: a place in the table.
    place: usize,
    /// Is its transport checksum yet to be filled in?
    partial: bool,
    /// Congestion field of the datagram that it came in.
    ecn: u8,
}

/// One reader of the underlay.
pub(crate) struct Inbound {
    gate: HandshakeGate,
    /// For join-inits, before it is known who sent them: what tells that costs more than with others.
    joins: HandshakeGate,
    coalescer: Coalescer,
    halves: Halves,
    /// Where in the octets there is room for a packet of two halves.
    room: usize,
    passing: Passing,
    authentic: u32,
    forged: u32,
}

impl Inbound {
    pub(crate) fn new(joins: Joins) -> Self {
        Self {
            gate: HandshakeGate::new(HANDSHAKES, Instant::now()),
            joins: HandshakeGate::new(JOINS, Instant::now()),
            coalescer: Coalescer::new(joins),
            halves: Halves::default(),
            room: usize::MAX,
            passing: Passing::default(),
            authentic: 0,
            forged: 0,
        }
    }

    /// What may be left to the domain's kernel from now on. Only after [`Self::flush`].
    pub(crate) fn set_joins(&mut self, joins: Joins) {
        self.coalescer.set_joins(joins);
    }

    /// From here on the octets are free for packets of two halves. Only after [`Self::flush`].
    pub(crate) fn set_room(&mut self, room: usize) {
        self.room = room;
    }

    /// Datagrams of sessions since the last time: authentic ones, and others.
    pub(crate) fn take_tally(&mut self) -> (u32, u32) {
        (
            std::mem::take(&mut self.authentic),
            std::mem::take(&mut self.forged),
        )
    }

    /// Takes the datagram at `span` of `octets`, which came with `ecn` in its outer header's congestion field. Its packets
    /// go out with [`Self::flush`], before `octets` changes.
    pub(crate) fn handle_datagram(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        octets: &mut [u8],
        span: Span,
        (from, ecn): (UnderlayAddr, u8),
    ) {
        let outer = Outer {
            addr: from,
            path: Path::Direct(from),
            ecn,
        };
        if let Err(reason) = self.try_datagram(table, shared, wire, octets, span, outer) {
            shared.drops.count(reason);
        }
    }

    fn try_datagram(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        octets: &mut [u8],
        span: Span,
        outer: Outer,
    ) -> Result<(), Dropped> {
        let datagram = &mut octets[span.start..span.start + span.len];
        match DatagramType::of(datagram) {
            Some(DatagramType::Data) => self.data(table, shared, wire, octets, span, outer),
            Some(kind) => self.handshake(table, shared, kind, datagram, outer),
            None => Err(Dropped::UnknownDatagram),
        }
    }

    /// INVARIANT: what strangers send is counted for nobody: whoever writes another's address on a flood must not use up
    /// what that one may send.
    fn handshake(
        &mut self,
        table: &Table,
        shared: &Shared,
        kind: DatagramType,
        datagram: &[u8],
        outer: Outer,
    ) -> Result<(), Dropped> {
        if !(MIN_HANDSHAKE..=MAX_DATAGRAM).contains(&datagram.len()) {
            return Err(Dropped::UnknownDatagram);
        }
        let is_join = kind == DatagramType::JoinInit;
        if is_join && !self.joins.admits(outer.addr.ip(), Instant::now()) {
            return Err(Dropped::HandshakeFlood);
        }
        if !table.is_known(datagram) {
            return Err(Dropped::Stranger);
        }
        self.hand_over(shared, datagram, outer)
    }

    /// Sessions of newcomers on their way in are the core's alone: few datagrams, opened there.
    fn joining(
        &mut self,
        table: &Table,
        shared: &Shared,
        datagram: &[u8],
        index: u32,
        outer: Outer,
    ) -> Result<(), Dropped> {
        if !table.is_guest(index) || datagram.len() > MAX_DATAGRAM {
            return Err(Dropped::UnknownSession);
        }
        self.hand_over(shared, datagram, outer)
    }

    /// To the core, unless there are too many.
    fn hand_over(&mut self, shared: &Shared, datagram: &[u8], outer: Outer) -> Result<(), Dropped> {
        if !self.gate.admits(outer.addr.ip(), Instant::now()) {
            return Err(Dropped::HandshakeFlood);
        }
        shared.tell(CarrierEvent::Handshake {
            from: outer.path,
            bytes: datagram.to_vec(),
        });
        Ok(())
    }

    fn data(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        octets: &mut [u8],
        span: Span,
        outer: Outer,
    ) -> Result<(), Dropped> {
        let datagram = &mut octets[span.start..span.start + span.len];
        let header = DataHeader::parse(datagram).ok_or(Dropped::UnknownDatagram)?;
        let Some(receiver) = table.receiver(header.receiver) else {
            return self.joining(table, shared, datagram, header.receiver, outer);
        };
        let session = (receiver, outer);
        if let Err(reason) = self.opened(table, shared, wire, octets, span, session) {
            match receiver.peer {
                Some(place) => shared.drop_of(&table.peers[place], reason, 1),
                None => shared.drops.count(reason),
            }
        }
        Ok(())
    }

    /// A datagram of a session that there is.
    fn opened(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        octets: &mut [u8],
        span: Span,
        (receiver, outer): (&Receiver, Outer),
    ) -> Result<(), Dropped> {
        let datagram = &mut octets[span.start..span.start + span.len];
        let (kind, body) = receiver.transport.open(datagram).map_err(|why| {
            self.forged += u32::from(why == DropReason::Forged);
            reason(why)
        })?;
        self.authentic += 1;
        // INVARIANT: from here on the datagram is authentic and new.
        tell_if_moved(table, shared, receiver, outer.path);
        let body_span = Span {
            start: span.start + DATA_HEADER + 1,
            len: body.len(),
        };
        let packet = |partial| {
            Ok(Packet {
                span: body_span,
                place: receiver.peer.ok_or(Dropped::UnknownPeer)?,
                partial,
                ecn: outer.ecn,
            })
        };
        match kind {
            PACKET => self.packet(table, octets, packet(false)?),
            PARTIAL => self.packet(table, octets, packet(true)?),
            BUNDLE => self.bundle(table, shared, octets, packet(false)?),
            HALF => self.half(
                table,
                octets,
                packet(false)?,
                receiver.transport.local_index(),
            ),
            RELAY => self.relayed(table, shared, wire, octets, (packet(false)?, outer)),
            PROBE if is_answer(table, receiver, body) => Ok(()),
            // What is not packets the core knows better.
            CONTROL.. => {
                shared.tell(CarrierEvent::Frame {
                    local_index: receiver.transport.local_index(),
                    from: outer.path,
                    kind,
                    body: body.to_vec(),
                });
                Ok(())
            }
            _ => Err(Dropped::UnknownFrame),
        }
    }

    /// Something that a member passed on to us, or that we are to pass on. Never one within the other.
    fn relayed(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        octets: &mut [u8],
        (body, outer): (Packet, Outer),
    ) -> Result<(), Dropped> {
        let Span { start, len } = body.span;
        let frame = &octets[start..start + len];
        let (head, datagram) = RelayHead::split(frame).ok_or(Dropped::Malformed)?;
        let via = &table.peers[body.place];
        if outer.path.relay().is_some() {
            return Err(Dropped::NotRelayed);
        }
        if !head.is_for(&table.me) {
            let relayed = Relayed {
                head,
                datagram,
                tos: outer.ecn,
            };
            return self.passing.pass(table, shared, wire, via, relayed);
        }
        let span = Span {
            start: start + RelayHead::LEN,
            len: datagram.len(),
        };
        let inner = Outer {
            path: Path::Relayed(via.id),
            ..outer
        };
        self.try_datagram(table, shared, wire, octets, span, inner)
    }

    /// Takes the packets of a bundle, whose body is `whole`.
    fn bundle(
        &mut self,
        table: &Table,
        shared: &Shared,
        octets: &mut [u8],
        whole: Packet,
    ) -> Result<(), Dropped> {
        let Span { start, len } = whole.span;
        let mut items = Items::default();
        while let Some(item) = items.next_in(&octets[start..start + len]) {
            let item = item.map_err(|Torn| Dropped::Malformed)?;
            let packet = Packet {
                span: Span {
                    start: start + item.range.start,
                    len: item.range.len(),
                },
                partial: item.partial,
                ..whole
            };
            // One bad packet does not spoil the others.
            if let Err(reason) = self.packet(table, octets, packet) {
                shared.drop_of(&table.peers[whole.place], reason, 1);
            }
        }
        Ok(())
    }

    /// Takes half a packet, which came in the session `session`. Both together are a packet like any other, and stand
    /// behind what was received.
    fn half(
        &mut self,
        table: &Table,
        octets: &mut [u8],
        half: Packet,
        session: u32,
    ) -> Result<(), Dropped> {
        let (received, room) = octets
            .split_at_mut_checked(self.room)
            .filter(|(_, room)| room.len() >= MAX_WHOLE)
            .ok_or(Dropped::UnknownFrame)?;
        let Span { start, len } = half.span;
        let body = &received[start..start + len];
        let whole = self.halves.take(session, body, room);
        let Some(whole) = whole.map_err(|halves::Torn| Dropped::Malformed)? else {
            return Ok(());
        };
        let span = Span {
            start: self.room,
            len: whole.len,
        };
        self.room += whole.len;
        let partial = whole.partial;
        self.packet(
            table,
            octets,
            Packet {
                span,
                partial,
                ..half
            },
        )
    }

    fn packet(&mut self, table: &Table, octets: &mut [u8], packet: Packet) -> Result<(), Dropped> {
        let Packet { span, place, .. } = packet;
        let peer = &table.peers[place];
        let bytes = &mut octets[span.start..span.start + span.len];
        let inner = inner::police(bytes, &table.plan, &peer.sources)?;
        ecn::decapsulate(packet.ecn, bytes, &inner)?;
        self.coalescer
            .push(octets, span, place, &inner, packet.partial)?;
        peer.state.traffic.received(span.len);
        Ok(())
    }

    /// Sends on what is not for this node.
    pub(crate) fn pass_on(&mut self, table: &Table, shared: &Shared, wire: &impl Wire) {
        self.passing.flush(table, shared, wire);
    }

    /// Hands out the frames of all packets since the last time. A super-packet that `write` says no to comes again in its
    /// parts.
    pub(crate) fn flush(
        &mut self,
        table: &Table,
        octets: &[u8],
        write: impl FnMut(Frame<'_>) -> bool,
    ) {
        let mac_of = |place: usize| table.peers[place].mac;
        self.coalescer.drain(octets, UDP_CARRIER_MAC, mac_of, write);
    }
}

/// Is it the echo of a trial of this carrier's?
fn is_answer(table: &Table, receiver: &Receiver, body: &[u8]) -> bool {
    let peer = receiver.peer.map(|place| &table.peers[place]);
    peer.is_some_and(|peer| peer.state.echoes.take(body))
}

fn reason(reason: DropReason) -> Dropped {
    match reason {
        DropReason::Forged => Dropped::Forged,
        DropReason::Replayed => Dropped::Replayed,
        DropReason::UnknownSession => Dropped::UnknownSession,
        _ => Dropped::UnknownDatagram,
    }
}

fn tell_if_moved(table: &Table, shared: &Shared, receiver: &Receiver, from: Path) {
    let Some(peer) = receiver.peer.map(|place| &table.peers[place]) else {
        return;
    };
    let Some(path) = peer.path else {
        return;
    };
    if path == from {
        // Asked first: to write what others read costs them more than to read it.
        if !peer.state.on_path.load(Ordering::Relaxed) {
            peer.state.on_path.store(true, Ordering::Relaxed);
        }
        return;
    }
    if !peer.state.moved.is_due(shared.now_ms()) {
        return;
    }
    // A peer may send from several ports; then something comes from the one that it is known by all the same.
    let is_beside = is_same_host(path, from) && peer.state.on_path.swap(false, Ordering::Relaxed);
    if !is_beside {
        shared.tell(CarrierEvent::Moved {
            local_index: receiver.transport.local_index(),
            from,
        });
    }
}

fn is_same_host(one: Path, other: Path) -> bool {
    let udp = |path| match path {
        Path::Direct(addr) => addr.udp(),
        Path::Relayed(..) => None,
    };
    matches!((udp(one), udp(other)), (Some(one), Some(other)) if one.ip() == other.ip())
}

#[cfg(test)]
mod tests;
