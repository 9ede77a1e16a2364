//! What one socket's datagrams are received with: it reads, lets [`Inbound`] do the work, and writes to the TAP.

use std::io::{self, IoSliceMut};
use std::time::Instant;

use quinn_udp::{BATCH_SIZE, RecvMeta};
use weft_core::underlay::{Offload, OffloadState};

use crate::coalesce::{Frame, Span};
use crate::counters::Dropped;
use crate::ecn::NOT_ECT;
use crate::inbound::Inbound;
use crate::offload::JoinWatch;
use crate::shared::Shared;
use crate::table::Table;
use crate::tap::Tap;
use crate::udp::UdpPort;
use crate::underlay::Underlay;

/// What one receive buffer must hold: a run of datagrams that the kernel has joined.
const RECEIVE_BUFFER: usize = 65_536;
/// Octets of one batch.
const RECEIVED: usize = BATCH_SIZE * RECEIVE_BUFFER;
/// Behind them, for packets that came in halves: at least one half of each is in the batch. Memory is used for it only
/// where such packets come.
const PUT_TOGETHER: usize = 2 * RECEIVED;

/// The state of one socket's receiver, whichever thread that is.
pub(crate) struct Reception {
    inbound: Inbound,
    watch: JoinWatch,
    octets: Box<[u8]>,
    meta: [RecvMeta; BATCH_SIZE],
}

impl Reception {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self {
            inbound: Inbound::new(shared.offloads.joins()),
            watch: JoinWatch::default(),
            octets: vec![0; RECEIVED + PUT_TOGETHER].into_boxed_slice(),
            meta: [RecvMeta::default(); BATCH_SIZE],
        }
    }

    /// Takes what one call gives, and writes what comes of it. Nothing may be there, or an error that an ICMP message had
    /// left on the socket and reading has cleared.
    pub(crate) fn take_batch(
        &mut self,
        shared: &Shared,
        tap: &Tap,
        underlay: &Underlay,
        socket: &UdpPort,
    ) {
        if let Ok(count) = receive(socket, &mut self.octets, &mut self.meta) {
            let joined = self.handle(shared, tap, underlay, count);
            self.watch_joining(shared, underlay, joined);
        }
    }

    fn watch_joining(&mut self, shared: &Shared, underlay: &Underlay, joined: (u32, u32)) {
        if self.watch.is_broken(joined.0, joined.1) {
            let why = OffloadState::Failing;
            shared.offloads.step_down(Offload::Gro, why);
            underlay.join_received(&shared.offloads);
            self.watch.rest(Instant::now());
        } else if self.watch.is_rested(Instant::now) {
            shared.offloads.step_up(Offload::Gro);
            underlay.join_received(&shared.offloads);
        }
    }

    /// Takes the first `count` of what was received. Gives how many of the datagrams that came joined were authentic, and
    /// how many not.
    fn handle(
        &mut self,
        shared: &Shared,
        tap: &Tap,
        underlay: &Underlay,
        count: usize,
    ) -> (u32, u32) {
        let (inbound, octets) = (&mut self.inbound, &mut self.octets);
        let table = shared.table.load();
        let mut joined = (0, 0);
        inbound.set_joins(shared.offloads.joins());
        inbound.set_room(RECEIVED);
        for (buffer, meta) in self.meta[..count].iter().enumerate() {
            let start = buffer * RECEIVE_BUFFER;
            let end = start + meta.len.min(RECEIVE_BUFFER);
            for at in (start..end).step_by(meta.stride.max(1)) {
                let span = Span {
                    start: at,
                    len: meta.stride.min(end - at),
                };
                // The kernel joins only datagrams whose marks are the same.
                let ecn = meta.ecn.map_or(NOT_ECT, |ecn| ecn as u8);
                let outer = (meta.addr.into(), ecn);
                inbound.handle_datagram(&table, shared, underlay, octets, span, outer);
            }
            let (authentic, forged) = inbound.take_tally();
            if meta.stride < meta.len {
                joined = (joined.0 + authentic, joined.1 + forged);
            }
        }
        inbound.pass_on(&table, shared, underlay);
        inbound.flush(&table, octets, |frame| write(shared, tap, &table, &frame));
        joined
    }
}

fn receive(socket: &UdpPort, octets: &mut [u8], meta: &mut [RecvMeta]) -> io::Result<usize> {
    let mut chunks = octets.chunks_exact_mut(RECEIVE_BUFFER);
    let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
        std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
    socket.receive(&mut buffers, meta)
}

/// False for a super-packet that the kernel does not know: it gets no more of that kind.
pub(crate) fn write(shared: &Shared, tap: &Tap, table: &Table, frame: &Frame<'_>) -> bool {
    match (tap.write(frame.pieces), frame.offload) {
        (Ok(_), _) => {}
        (Err(err), Some(offload)) if err.raw_os_error() == Some(libc::EINVAL) => {
            shared.offloads.step_down(offload, OffloadState::Refused);
            return false;
        }
        (Err(_), _) => shared.drop_of(&table.peers[frame.from], Dropped::TapRefused, 1),
    }
    true
}
