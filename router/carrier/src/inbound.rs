//! From the wire to the TAP: type, session, seal, and whether the peer may send such a packet. Without I/O of its own.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use weft_core::layout::UDP_CARRIER_MAC;
use weft_core::session::drops::DropReason;
use weft_core::session::join::is_join_index;
use weft_core::wire::{DATA_HEADER, DataHeader, DatagramType, FrameKind, MAX_DATAGRAM};

use crate::bundle::{Items, Torn};
use crate::coalesce::{Coalescer, Span};
use crate::counters::Dropped;
use crate::inner;
use crate::limit::HandshakeGate;
use crate::shared::{CarrierEvent, Shared};
use crate::table::{Receiver, Table};

const PACKET: u8 = FrameKind::Packet as u8;
const BUNDLE: u8 = FrameKind::Bundle as u8;
const PARTIAL: u8 = FrameKind::Partial as u8;
/// From here on, kinds are not packets.
const CONTROL: u8 = FrameKind::Control as u8;

/// Shorter than any handshake or cookie datagram is.
const MIN_HANDSHAKE: usize = 48;

/// One reader of the underlay.
pub(crate) struct Inbound {
    gate: HandshakeGate,
    coalescer: Coalescer,
}

impl Inbound {
    /// For a TAP that takes several datagrams at a time (`joins_datagrams`), or does not.
    pub(crate) fn new(joins_datagrams: bool) -> Self {
        Self {
            gate: HandshakeGate::new(Instant::now()),
            coalescer: Coalescer::new(joins_datagrams),
        }
    }

    /// Takes the datagram at `span` of `octets`. Its packets go out with [`Self::flush`], before `octets` changes.
    pub(crate) fn handle_datagram(
        &mut self,
        table: &Table,
        shared: &Shared,
        octets: &mut [u8],
        span: Span,
        from: SocketAddr,
    ) {
        let datagram = &mut octets[span.start..span.start + span.len];
        let result = match DatagramType::of(datagram) {
            Some(DatagramType::Data) => self.data(table, shared, octets, span, from),
            Some(_) => self.handshake(shared, datagram, from),
            None => Err(Dropped::UnknownDatagram),
        };
        if let Err(reason) = result {
            shared.drops.count(reason);
        }
    }

    fn handshake(
        &mut self,
        shared: &Shared,
        datagram: &[u8],
        from: SocketAddr,
    ) -> Result<(), Dropped> {
        if !(MIN_HANDSHAKE..=MAX_DATAGRAM).contains(&datagram.len()) {
            return Err(Dropped::UnknownDatagram);
        }
        if !self.gate.admits(from.ip(), Instant::now()) {
            return Err(Dropped::HandshakeFlood);
        }
        shared.tell(CarrierEvent::Handshake {
            from,
            bytes: datagram.to_vec(),
        });
        Ok(())
    }

    /// Sessions of newcomers on their way in are the core's alone: few datagrams, opened there.
    fn joining(
        &mut self,
        shared: &Shared,
        datagram: &[u8],
        index: u32,
        from: SocketAddr,
    ) -> Result<(), Dropped> {
        if !is_join_index(index) || datagram.len() > MAX_DATAGRAM {
            return Err(Dropped::UnknownSession);
        }
        if !self.gate.admits(from.ip(), Instant::now()) {
            return Err(Dropped::HandshakeFlood);
        }
        shared.tell(CarrierEvent::Handshake {
            from,
            bytes: datagram.to_vec(),
        });
        Ok(())
    }

    fn data(
        &mut self,
        table: &Table,
        shared: &Shared,
        octets: &mut [u8],
        span: Span,
        from: SocketAddr,
    ) -> Result<(), Dropped> {
        let datagram = &mut octets[span.start..span.start + span.len];
        let header = DataHeader::parse(datagram).ok_or(Dropped::UnknownDatagram)?;
        let Some(receiver) = table.receiver(header.receiver) else {
            return self.joining(shared, datagram, header.receiver, from);
        };
        let (kind, body) = receiver.transport.open(datagram).map_err(reason)?;
        // INVARIANT: from here on the datagram is authentic and new.
        tell_if_moved(table, shared, receiver, from);
        let place = Span {
            start: span.start + DATA_HEADER + 1,
            len: body.len(),
        };
        match kind {
            PACKET => self.packet(table, octets, place, receiver, false),
            PARTIAL => self.packet(table, octets, place, receiver, true),
            BUNDLE => self.bundle(table, shared, octets, place, receiver),
            // What is not packets the core knows better.
            CONTROL.. => {
                shared.tell(CarrierEvent::Frame {
                    local_index: header.receiver,
                    from,
                    kind,
                    body: body.to_vec(),
                });
                Ok(())
            }
            _ => Err(Dropped::UnknownFrame),
        }
    }

    fn bundle(
        &mut self,
        table: &Table,
        shared: &Shared,
        octets: &[u8],
        body: Span,
        receiver: &Receiver,
    ) -> Result<(), Dropped> {
        for item in Items::new(&octets[body.start..body.start + body.len]) {
            let item = item.map_err(|Torn| Dropped::Malformed)?;
            let span = Span {
                start: body.start + item.range.start,
                len: item.range.len(),
            };
            // One bad packet does not spoil the others.
            if let Err(reason) = self.packet(table, octets, span, receiver, item.partial) {
                shared.drops.count(reason);
            }
        }
        Ok(())
    }

    fn packet(
        &mut self,
        table: &Table,
        octets: &[u8],
        span: Span,
        receiver: &Receiver,
        partial: bool,
    ) -> Result<(), Dropped> {
        let place = receiver.peer.ok_or(Dropped::UnknownPeer)?;
        let peer = &table.peers[place];
        let packet = &octets[span.start..span.start + span.len];
        let inner = inner::police(packet, &table.plan, &peer.sources)?;
        self.coalescer.push(octets, span, place, &inner, partial)?;
        peer.state.traffic.received(span.len);
        Ok(())
    }

    /// Hands out the frames of all packets since the last time, in pieces.
    pub(crate) fn flush(
        &mut self,
        table: &Table,
        octets: &[u8],
        write: impl FnMut(&[IoSlice<'_>]),
    ) {
        let mac_of = |place: usize| table.peers[place].mac;
        self.coalescer.drain(octets, UDP_CARRIER_MAC, mac_of, write);
    }
}

fn reason(reason: DropReason) -> Dropped {
    match reason {
        DropReason::Forged => Dropped::Forged,
        DropReason::Replayed => Dropped::Replayed,
        DropReason::UnknownSession => Dropped::UnknownSession,
        _ => Dropped::UnknownDatagram,
    }
}

fn tell_if_moved(table: &Table, shared: &Shared, receiver: &Receiver, from: SocketAddr) {
    let Some(peer) = receiver.peer.map(|place| &table.peers[place]) else {
        return;
    };
    let moved = peer.path.is_some_and(|path| path != from);
    if moved && peer.state.moved.is_due(shared.now_ms()) {
        shared.tell(CarrierEvent::Moved {
            local_index: receiver.transport.local_index(),
            from,
        });
    }
}

#[cfg(test)]
mod tests;
