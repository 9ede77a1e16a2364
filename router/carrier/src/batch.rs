//! Packets on their way to one peer: bundled, sealed, and gathered into runs of equal datagrams that one system call
//! sends.
//!
//! ```text
//! | sealed | sealed | sealed | header, kind, packets of the open bundle ...        |
//! |<------- the run ------->|end                                                    |
//! ```

use std::io;
use std::net::SocketAddr;

use weft_core::crypto::TAG_LEN;
use weft_core::session::transport::Transport;
use weft_core::wire::{DATA_HEADER, FrameKind, OVERHEAD};

use crate::bundle::{ITEM_HEAD, MAX_ITEM, write_head};
use crate::counters::Dropped;
use crate::shared::{CarrierEvent, Shared};
use crate::table::Peer;

/// Most octets of one run: what UDP takes, less a little.
const MAX_RUN_BYTES: usize = 65_000;
/// A run, and one more datagram with the largest packet that there is.
const ROOM: usize = MAX_RUN_BYTES + DATA_HEADER + 1 + 40 + 65_535 + TAG_LEN;

/// Where runs go.
pub(crate) trait Wire {
    /// Datagrams that one run may have.
    fn max_run(&self, to: SocketAddr) -> usize;
    /// Sends a run of datagrams of `stride` octets, the last perhaps shorter.
    fn send(&self, to: SocketAddr, run: &[u8], stride: usize) -> io::Result<()>;
}

/// How packets get to a peer at this moment.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) transport: &'a Transport,
    pub(crate) to: SocketAddr,
}

impl<'a> Way<'a> {
    pub(crate) fn to(peer: &'a Peer) -> Option<Self> {
        let (transport, to) = peer.way()?;
        Some(Self {
            peer,
            transport,
            to,
        })
    }
}

/// Inner packets and their octets.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    packets: u64,
    bytes: u64,
}

impl Load {
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
        // Two of them must fit, or a bundle only costs.
        if (len + ITEM_HEAD) * 2 <= way.peer.mtu && len <= MAX_ITEM {
            self.add_to_bundle(way, shared, wire, packet, write);
        } else {
            self.close_bundle(way, shared, wire);
            let frame = self.end + DATA_HEADER;
            self.buffer[frame] = packet.kind() as u8;
            write(&mut self.buffer[frame + 1..frame + 1 + len]);
            let load = Load {
                packets: 1,
                bytes: len as u64,
            };
            self.seal(way, shared, wire, 1 + len, load);
        }
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
        let item = self.end + DATA_HEADER + bundle.frame;
        write_head(&mut self.buffer[item..], len, packet.partial);
        let start = item + ITEM_HEAD;
        write(&mut self.buffer[start..start + len]);
        bundle.frame += ITEM_HEAD + len;
        bundle.load.add(Load {
            packets: 1,
            bytes: len as u64,
        });
    }

    fn close_bundle(&mut self, way: Way<'_>, shared: &Shared, wire: &impl Wire) {
        let Some(bundle) = self.bundle.take() else {
            return;
        };
        let frame = self.end + DATA_HEADER;
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
        match way.transport.seal_in_place(room, frame) {
            Ok(len) => self.join_run(way, shared, wire, len, load),
            Err(_) => {
                shared.drops.count_many(Dropped::SealRefused, load.packets);
                if way.peer.state.wanted.is_due(shared.now_ms()) {
                    shared.tell(CarrierEvent::Wanted(way.peer.number));
                }
            }
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
        let is_large = len > way.peer.mtu + OVERHEAD;
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
        if len < self.stride || is_large || self.count >= wire.max_run(way.to) {
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
        let result = wire.send(way.to, &self.buffer[..self.end], self.stride);
        let load = std::mem::take(&mut self.load);
        self.end = 0;
        self.count = 0;
        match result {
            Ok(()) => way.peer.state.traffic.sent(load.packets, load.bytes),
            Err(err) if err.raw_os_error() == Some(libc::EMSGSIZE) => {
                shared.drops.count_many(Dropped::TooBig, load.packets);
                if way.peer.state.too_big.is_due(shared.now_ms()) {
                    shared.tell(CarrierEvent::TooBig {
                        number: way.peer.number,
                        to: way.to,
                    });
                }
            }
            Err(_) => shared.drops.count_many(Dropped::SendFailed, load.packets),
        }
    }
}
