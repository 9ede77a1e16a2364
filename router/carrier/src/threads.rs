//! The threads: they wait, read, let [`Outbound`] or [`Inbound`] do the work, and write.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quinn_udp::{BATCH_SIZE, RecvMeta};

use crate::batch::Wire;
use crate::coalesce::Span;
use crate::counters::Dropped;
use crate::inbound::Inbound;
use crate::outbound::Outbound;
use crate::shared::{CarrierEvent, Shared};
use crate::sys;
use crate::table::Table;
use crate::tap::Tap;
use crate::udp::{UdpPort, Underlay};

/// The largest frame of a TAP: headers and an IPv6 packet.
const MAX_FRAME: usize = 24 + 40 + 65_535;
/// Frames read before what is gathered goes out, however many more there are: a small packet must not wait for ever.
const FRAMES_PER_ROUND: usize = 64;
/// What one receive buffer must hold: a run of datagrams that the kernel has joined.
const RECEIVE_BUFFER: usize = 65_536;
/// How often waiting packets are looked after, in milliseconds.
const WAITING_TICK: i32 = 100;

/// Wakes a thread that waits.
#[derive(Debug)]
pub(crate) struct Waker(File);

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        sys::event_counter().map(|fd| Self(File::from(fd)))
    }

    pub(crate) fn wake(&self) {
        // It fails only when the counter is full, and then the thread has been woken.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    fn reset(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wire for Underlay {
    fn max_run(&self, to: SocketAddr) -> usize {
        self.towards(to).map_or(1, UdpPort::max_run)
    }

    fn send(&self, to: SocketAddr, run: &[u8], stride: usize) -> io::Result<()> {
        self.towards(to)?.send(to, run, stride)
    }
}

/// TAP to underlay.
pub(crate) fn send_loop(shared: &Shared, tap: &Tap, underlay: &Underlay, waker: &Waker) {
    let mut outbound = Outbound::new();
    let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
    while !shared.stop.load(Ordering::Relaxed) {
        let timeout = if outbound.has_waiting() {
            WAITING_TICK
        } else {
            -1
        };
        let Ok([_, woken]) = sys::wait_readable([tap.as_fd(), waker.as_fd()], timeout) else {
            break;
        };
        if woken {
            waker.reset();
        }
        let table = shared.table.load();
        if outbound.has_waiting() {
            outbound.release_waiting(&table, shared, underlay);
        }
        let round = read_round(shared, tap, underlay, &table, &mut outbound, &mut frame);
        outbound.flush(&table, shared, underlay);
        if round.is_err() {
            break;
        }
    }
    if !shared.stop.load(Ordering::Relaxed) {
        shared.tell(CarrierEvent::TapLost);
    }
}

fn read_round(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    table: &Table,
    outbound: &mut Outbound,
    frame: &mut [u8],
) -> io::Result<()> {
    for _ in 0..FRAMES_PER_ROUND {
        match tap.read(frame) {
            Ok(len) => outbound.handle_frame(table, shared, underlay, &mut frame[..len]),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// Which of the two sockets a thread reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Underlay to TAP.
pub(crate) fn receive_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Arc<Underlay>,
    family: Family,
    waker: &Waker,
) {
    let socket = match (family, &underlay.v6) {
        (Family::V4, _) => &underlay.v4,
        (Family::V6, Some(socket)) => socket,
        (Family::V6, None) => return,
    };
    let mut inbound = Inbound::new(tap.takes_datagrams());
    let mut octets = vec![0; BATCH_SIZE * RECEIVE_BUFFER].into_boxed_slice();
    let mut meta = [RecvMeta::default(); BATCH_SIZE];
    while !shared.stop.load(Ordering::Relaxed) {
        if let Ok(count) = receive(socket, &mut octets, &mut meta) {
            handle_batch(shared, tap, &mut inbound, &mut octets, &meta[..count]);
            continue;
        }
        // Nothing there, or an error that an ICMP message has left on the socket and reading has cleared.
        match sys::wait_readable([socket.as_fd(), waker.as_fd()], -1) {
            Ok([_, true]) => waker.reset(),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

fn receive(socket: &UdpPort, octets: &mut [u8], meta: &mut [RecvMeta]) -> io::Result<usize> {
    let mut chunks = octets.chunks_exact_mut(RECEIVE_BUFFER);
    let mut buffers: [IoSliceMut<'_>; BATCH_SIZE] =
        std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
    socket.receive(&mut buffers, meta)
}

fn handle_batch(
    shared: &Shared,
    tap: &Tap,
    inbound: &mut Inbound,
    octets: &mut [u8],
    meta: &[RecvMeta],
) {
    let table = shared.table.load();
    for (buffer, meta) in meta.iter().enumerate() {
        let start = buffer * RECEIVE_BUFFER;
        let end = start + meta.len.min(RECEIVE_BUFFER);
        for at in (start..end).step_by(meta.stride.max(1)) {
            let span = Span {
                start: at,
                len: meta.stride.min(end - at),
            };
            inbound.handle_datagram(&table, shared, octets, span, meta.addr);
        }
    }
    inbound.flush(&table, octets, |pieces| {
        if tap.write(pieces).is_err() {
            shared.drops.count(Dropped::TapRefused);
        }
    });
}
