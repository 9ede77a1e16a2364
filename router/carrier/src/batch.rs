//! Packets on their way to one peer: bundled, sealed, and gathered into runs of equal datagrams that one system call
//! sends.
//!
//! ```text
//! | sealed | sealed | sealed | header, kind, packets of the open bundle ...        |
//! |<------- the run ------->|end                                                    |
//! ```
//!
//! What goes through a member between is sealed twice in place: room for the outer header, kind and relay head is left
//! before it.

use std::io;

use weft_core::crypto::TAG_LEN;
use weft_core::session::transport::{SealError, Transport};
use weft_core::underlay::{Offload, OffloadState, UnderlayAddr};
use weft_core::wire::{DATA_HEADER, FrameKind, OVERHEAD, RELAY_OVERHEAD, RelayHead};

use crate::bundle::{ITEM_HEAD, MAX_ITEM, write_head};
use crate::counters::Dropped;
use crate::halves::{self, Cut, MAX_WHOLE};
use crate::relay::Relayed;
use crate::shared::{CarrierEvent, Shared};
use crate::source_ports::Lane;
use crate::table::{Peer, Route};

/// Most octets of one run: what UDP takes, less a little.
const MAX_RUN_BYTES: usize = 65_000;
/// A run, and one more datagram with the largest packet that there is.
const ROOM: usize = MAX_RUN_BYTES + DATA_HEADER + 1 + 40 + 65_535 + TAG_LEN + RELAY_OVERHEAD;
/// What stands before a datagram that is passed on.
const RELAY_LEAD: usize = DATA_HEADER + 1 + RelayHead::LEN;

/// Datagrams that one system call sends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    /// One behind the other.
    pub(crate) octets: &'a [u8],
    /// Length of each; the last may be shorter.
    pub(crate) stride: usize,
    /// Class of service and congestion field of their outer headers.
    pub(crate) tos: u8,
}

impl<'a> Run<'a> {
    /// A single datagram of no class.
    pub(crate) fn of_one(datagram: &'a [u8]) -> Self {
        Run {
            octets: datagram,
            stride: datagram.len(),
            tos: 0,
        }
    }

    /// Is it more than one datagram?
    pub(crate) fn is_many(&self) -> bool {
        self.octets.len() > self.stride
    }
}

/// How a run went out.
#[derive(Debug)]
pub(crate) enum Sent {
    /// At once.
    Whole,
    /// The kernel declined to cut it, and took it in single datagrams.
    OneByOne,
}

/// Where runs go.
pub(crate) trait Wire {
    /// Datagrams that one run may have.
    fn max_run(&self, to: UnderlayAddr) -> usize;
    /// Sends a run.
    fn send(&self, lane: Lane, run: Run<'_>) -> io::Result<Sent>;
    /// Does too much wait on the way there? Says so once for each packet that is to be marked or dropped for it.
    fn take_congestion(&self, lane: Lane) -> bool;
}

/// How packets get to a peer at this moment.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) transport: &'a Transport,
    pub(crate) lane: Lane,
    relay: Option<(&'a Transport, RelayHead)>,
}

impl<'a> Way<'a> {
    pub(crate) fn to(peer: &'a Peer) -> Option<Self> {
        let Route {
            transport,
            to,
            relay,
        } = peer.route()?;
        Some(Self {
            peer,
            transport,
            lane: Lane::main(to),
            relay,
        })
    }

    /// The same from another of this host's ports.
    pub(crate) fn leaving_by(self, source: u8) -> Self {
        let lane = Lane {
            source,
            ..self.lane
        };
        Self { lane, ..self }
    }

    /// Do datagrams go straight to the peer, each on its own?
    pub(crate) fn is_direct_udp(&self) -> bool {
        self.is_direct() && self.lane.to.udp().is_some()
    }

    /// Is nobody between?
    pub(crate) fn is_direct(&self) -> bool {
        self.relay.is_none()
    }

    /// Octets before the datagram for the peer itself.
    fn lead(&self) -> usize {
        self.relay.map_or(0, |_| RELAY_LEAD)
    }

    /// Octets around an inner packet.
    fn overhead(&self) -> usize {
        OVERHEAD + self.relay.map_or(0, |_| RELAY_OVERHEAD)
    }

    /// Seals the frame that stands in `room` behind the lead and a header. Gives the datagram's length.
    fn seal(&self, room: &mut [u8], frame: usize) -> Result<usize, SealError> {
        let lead = self.lead();
        let len = self.transport.seal_in_place(&mut room[lead..], frame)?;
        match self.relay {
            None => Ok(len),
            Some((relay, head)) => seal_relayed(relay, head, room, len),
        }
    }
}

/// Seals the datagram of `len` octets that stands behind the lead for the member that passes it on.
fn seal_relayed(
    relay: &Transport,
    head: RelayHead,
    room: &mut [u8],
    len: usize,
) -> Result<usize, SealError> {
    room[DATA_HEADER] = FrameKind::Relay as u8;
    room[DATA_HEADER + 1..RELAY_LEAD].copy_from_slice(&head.to_bytes());
    relay.seal_in_place(room, RELAY_LEAD - DATA_HEADER + len)
}

/// How many datagrams may go to the peer at once.
fn max_run(way: Way<'_>, shared: &Shared, wire: &impl Wire) -> usize {
    let may_be_cut = || shared.offloads.is_on(Offload::Gso) && way.peer.state.gso.is_on();
    if way.lane.to.tcp().is_some() || may_be_cut() {
        wire.max_run(way.lane.to)
    } else {
        1
    }
}

/// Inner packets and their octets.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    packets: u64,
    bytes: u64,
}

impl Load {
    fn of_one(len: usize) -> Self {
        Load {
            packets: 1,
            bytes: len as u64,
        }
    }

    fn add(&mut self, other: Load) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// A packet that is to be written behind what is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    /// Its length.
    pub(crate) len: usize,
    /// Is its transport checksum yet to be filled in?
    pub(crate) partial: bool,
    /// What the outer header says for it. Packets that differ here share neither a datagram nor a run, each of which has
    /// one outer header, or one for all.
    pub(crate) tos: u8,
}

impl Packet {
    fn kind(self) -> FrameKind {
        match self.partial {
            true => FrameKind::Partial,
            false => FrameKind::Packet,
        }
    }
}

/// A frame that more packets may be added to.
#[derive(Clone, Copy, Debug)]
struct Bundle {
    /// Kind and body so far.
    frame: usize,
    first: Packet,
    load: Load,
}

pub(crate) struct Batch {
    buffer: Box<[u8]>,
    end: usize,
    stride: usize,
    /// Of all that is in it.
    tos: u8,
    count: usize,
    load: Load,
    bundle: Option<Bundle>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            buffer: vec![0; ROOM].into_boxed_slice(),
            end: 0,
            stride: 0,
            tos: 0,
            count: 0,
            load: Load::default(),
            bundle: None,
        }
    }

    /// Adds a packet, which `write` puts where it is told to.
    pub(crate) fn add(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        packet: Packet,
        write: impl FnOnce(&mut [u8]),
    ) {
        let len = packet.len;
        if packet.tos != self.tos {
            self.flush(way, shared, wire);
            self.tos = packet.tos;
        }
        // Two of them must fit, or a bundle only costs.
        if (len + ITEM_HEAD) * 2 <= way.peer.mtu && len <= MAX_ITEM {
            self.add_to_bundle(way, shared, wire, packet, write);
        } else if halves::is_cut(len, way.peer.mtu) {
            self.add_in_halves(way, shared, wire, packet, write);
        } else {
            self.close_bundle(way, shared, wire);
            let frame = (packet.kind(), Load::of_one(len));
            self.add_frame(way, shared, wire, frame, |out| {
                write(&mut out[..len]);
                len
            });
        }
    }

    /// Seals a frame of its own. `write` puts its body at the beginning of what it is given, and says how long that is.
    fn add_frame(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        (kind, load): (FrameKind, Load),
        write: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let frame = self.end + way.lead() + DATA_HEADER;
        self.buffer[frame] = kind as u8;
        let len = write(&mut self.buffer[frame + 1..]);
        self.seal(way, shared, wire, 1 + len, load);
    }

    fn add_to_bundle(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        packet: Packet,
        write: impl FnOnce(&mut [u8]),
    ) {
        let len = packet.len;
        let full = |bundle: &Bundle| bundle.frame + ITEM_HEAD + len > 1 + way.peer.mtu;
        if self.bundle.as_ref().is_some_and(full) {
            self.close_bundle(way, shared, wire);
        }
        let bundle = self.bundle.get_or_insert(Bundle {
            frame: 1,
            first: packet,
            load: Load::default(),
        });
        let item = self.end + way.lead() + DATA_HEADER + bundle.frame;
        write_head(&mut self.buffer[item..], len, packet.partial);
        let start = item + ITEM_HEAD;
        write(&mut self.buffer[start..start + len]);
        bundle.frame += ITEM_HEAD + len;
        bundle.load.add(Load::of_one(len));
    }

    fn add_in_halves(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        packet: Packet,
        write: impl FnOnce(&mut [u8]),
    ) {
        self.close_bundle(way, shared, wire);
        let mut whole = [0; MAX_WHOLE];
        let whole = &mut whole[..packet.len];
        write(whole);
        let cut = Cut {
            packet: whole,
            number: way.peer.state.numbers.next(),
            partial: packet.partial,
        };
        for (second, load) in [(false, Load::default()), (true, Load::of_one(packet.len))] {
            let frame = (FrameKind::Half, load);
            self.add_frame(way, shared, wire, frame, |out| cut.write(second, out));
        }
    }

    fn close_bundle(&mut self, way: Way<'_>, shared: &Shared, wire: &impl Wire) {
        let Some(bundle) = self.bundle.take() else {
            return;
        };
        let frame = self.end + way.lead() + DATA_HEADER;
        let mut len = bundle.frame;
        if bundle.load.packets == 1 {
            // Alone it needs no length.
            self.buffer[frame] = bundle.first.kind() as u8;
            let item = frame + 1 + ITEM_HEAD..frame + len;
            self.buffer.copy_within(item, frame + 1);
            len -= ITEM_HEAD;
        } else {
            self.buffer[frame] = FrameKind::Bundle as u8;
        }
        self.seal(way, shared, wire, len, bundle.load);
    }

    fn seal(&mut self, way: Way<'_>, shared: &Shared, wire: &impl Wire, frame: usize, load: Load) {
        let room = &mut self.buffer[self.end..];
        match way.seal(room, frame) {
            Ok(len) => self.join_run(way, shared, wire, len, load),
            Err(_) => {
                shared.drop_of(way.peer, Dropped::SealRefused, load.packets);
                if way.peer.state.wanted.is_due(shared.now_ms()) {
                    shared.tell(CarrierEvent::Wanted(way.peer.number));
                }
            }
        }
    }

    /// Adds a datagram that is to be passed on by, or to, the peer at the end of `way`.
    pub(crate) fn pass_on(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        Relayed {
            head,
            datagram,
            tos,
        }: Relayed<'_>,
    ) {
        if tos != self.tos {
            self.flush(way, shared, wire);
            self.tos = tos;
        }
        let start = self.end + RELAY_LEAD;
        let Some(room) = self.buffer.get_mut(start..start + datagram.len()) else {
            return shared.drops.count(Dropped::TooBig);
        };
        room.copy_from_slice(datagram);
        let room = &mut self.buffer[self.end..];
        match seal_relayed(way.transport, head, room, datagram.len()) {
            Ok(len) => self.join_run(way, shared, wire, len, Load::default()),
            Err(_) => shared.drops.count(Dropped::SealRefused),
        }
    }

    /// Makes the datagram that stands behind the run a part of it, or of a new one.
    fn join_run(
        &mut self,
        way: Way<'_>,
        shared: &Shared,
        wire: &impl Wire,
        len: usize,
        load: Load,
    ) {
        // What is larger than the path is said to take goes alone: the kernel shall refuse it, and nothing else with it.
        let is_large = len > way.peer.mtu + way.overhead();
        let joins = len <= self.stride && self.end + len <= MAX_RUN_BYTES && !is_large;
        if self.count > 0 && !joins {
            let start = self.end;
            self.send_run(way, shared, wire);
            self.buffer.copy_within(start..start + len, 0);
        }
        if self.count == 0 {
            self.stride = len;
        }
        self.end += len;
        self.count += 1;
        self.load.add(load);
        // The last of a run is the only one that may be shorter.
        if len < self.stride || is_large || self.count >= max_run(way, shared, wire) {
            self.send_run(way, shared, wire);
        }
    }

    /// Sends everything.
    pub(crate) fn flush(&mut self, way: Way<'_>, shared: &Shared, wire: &impl Wire) {
        self.close_bundle(way, shared, wire);
        self.send_run(way, shared, wire);
    }

    fn send_run(&mut self, way: Way<'_>, shared: &Shared, wire: &impl Wire) {
        if self.count == 0 {
            return;
        }
        let run = Run {
            octets: &self.buffer[..self.end],
            stride: self.stride,
            tos: self.tos,
        };
        let result = wire.send(way.lane, run);
        let load = std::mem::take(&mut self.load);
        self.end = 0;
        self.count = 0;
        match result {
            Ok(sent) => {
                way.peer.state.traffic.sent(load.packets, load.bytes);
                if let Sent::OneByOne = sent {
                    way.peer.state.gso.set(OffloadState::Refused);
                }
            }
            Err(err) if err.raw_os_error() == Some(libc::EMSGSIZE) => {
                shared.drop_of(way.peer, Dropped::TooBig, load.packets);
                if let Some(to) = way.lane.to.udp()
                    && way.peer.state.too_big.is_due(shared.now_ms())
                {
                    let number = way.peer.number;
                    shared.tell(CarrierEvent::TooBig { number, to });
                }
            }
            Err(err) if way.lane.to.tcp().is_some() && err.kind() == io::ErrorKind::WouldBlock => {
                shared.drop_of(way.peer, Dropped::StreamFull, load.packets);
            }
            Err(_) => shared.drop_of(way.peer, Dropped::SendFailed, load.packets),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// Keeps what is sent, or refuses it.
    #[derive(Default)]
    pub(crate) struct Kept {
        pub(crate) runs: RefCell<Vec<(UnderlayAddr, Vec<Vec<u8>>)>>,
        /// Of each run.
        pub(crate) tos: RefCell<Vec<u8>>,
        /// The port that each left by.
        pub(crate) sources: RefCell<Vec<u8>>,
        pub(crate) refuse: Option<i32>,
        pub(crate) congested: Cell<bool>,
    }

    impl Wire for Kept {
        fn max_run(&self, _: UnderlayAddr) -> usize {
            64
        }

        fn take_congestion(&self, _: Lane) -> bool {
            self.congested.take()
        }

        fn send(&self, lane: Lane, run: Run<'_>) -> io::Result<Sent> {
            if let Some(errno) = self.refuse {
                return Err(io::Error::from_raw_os_error(errno));
            }
            let datagrams = run.octets.chunks(run.stride).map(<[u8]>::to_vec).collect();
            self.runs.borrow_mut().push((lane.to, datagrams));
            self.sources.borrow_mut().push(lane.source);
            self.tos.borrow_mut().push(run.tos);
            Ok(Sent::Whole)
        }
    }
}
