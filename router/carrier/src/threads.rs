//! The threads: they wait, read, let [`Outbound`] or [`Inbound`] do the work, and write.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use quinn_udp::{BATCH_SIZE, RecvMeta};
use weft_core::underlay::{Offload, OffloadState, UnderlayAddr};

use crate::batch::{Run, Sent, Wire};
use crate::coalesce::{Frame, Span};
use crate::counters::Dropped;
use crate::ecn::NOT_ECT;
use crate::inbound::Inbound;
use crate::offload::JoinWatch;
use crate::outbound::Outbound;
use crate::shared::{CarrierEvent, Shared};
use crate::source_ports::Lane;
use crate::sys;
use crate::table::Table;
use crate::tap::Tap;
use crate::trial::Trials;
use crate::udp::{Family, MAX_RUN, UdpPort, Underlay};

/// The largest frame of a TAP: headers and an IPv6 packet.
const MAX_FRAME: usize = 24 + 40 + 65_535;
/// Frames read before what is gathered goes out, however many more there are: a small packet must not wait for ever.
const FRAMES_PER_ROUND: usize = 64;
/// What one receive buffer must hold: a run of datagrams that the kernel has joined.
const RECEIVE_BUFFER: usize = 65_536;
/// Octets of one batch.
const RECEIVED: usize = BATCH_SIZE * RECEIVE_BUFFER;
/// Behind them, for packets that came in halves: at least one half of each is in the batch. Memory is used for it only
/// where such packets come.
const PUT_TOGETHER: usize = 2 * RECEIVED;
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

    pub(crate) fn reset(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wire for Underlay {
    fn max_run(&self, _: UnderlayAddr) -> usize {
        MAX_RUN
    }

    fn send(&self, Lane { to, source }: Lane, run: Run<'_>) -> io::Result<Sent> {
        match to {
            UnderlayAddr::Udp(to) => self.leaving(to, source)?.send(to, run),
            UnderlayAddr::Tcp(to) => self.streams.send(to, run),
        }
    }

    fn take_congestion(&self, Lane { to, source }: Lane) -> bool {
        match to {
            UnderlayAddr::Udp(to) => self.leaving(to, source).is_ok_and(UdpPort::take_congestion),
            UnderlayAddr::Tcp(to) => self.streams.take_congestion(to),
        }
    }
}

/// TAP to underlay.
pub(crate) fn send_loop(shared: &Shared, tap: &Tap, underlay: &Underlay, waker: &Waker) {
    let mut outbound = Outbound::new();
    let mut trials = Trials::new(Instant::now());
    let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
    wait_for_table(shared, tap, waker);
    while !shared.stop.load(Ordering::Relaxed) {
        let timeout = timeout(&outbound, &trials);
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
        let now = Instant::now();
        if trials.is_worth_a_look(now) {
            trials.go_on(now, &table, shared, underlay);
        }
        if round.is_err() {
            break;
        }
    }
    if !shared.stop.load(Ordering::Relaxed) {
        shared.tell(CarrierEvent::TapLost);
    }
}

/// Milliseconds after which there is something to do though nothing came; -1 for never.
fn timeout(outbound: &Outbound, trials: &Trials) -> i32 {
    let waiting = outbound.has_waiting().then_some(WAITING_TICK);
    let trial = trials.deadline().map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        // Not a moment too early, or it would be waited for with no pause at all.
        i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
    });
    waiting.into_iter().chain(trial).min().unwrap_or(-1)
}

/// Before it nobody knows whose a frame is: what a predecessor has not read waits in the TAP's queue.
fn wait_for_table(shared: &Shared, tap: &Tap, waker: &Waker) {
    let over = || shared.has_table.load(Ordering::Acquire) || shared.stop.load(Ordering::Relaxed);
    while !over() {
        match sys::wait_woken(waker.as_fd(), tap.as_fd()) {
            Ok([_, false]) => waker.reset(),
            // Gone: reading it will say so.
            _ => return,
        }
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

/// Underlay to TAP: what comes for one of its sockets.
pub(crate) fn receive_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Arc<Underlay>,
    (family, source): (Family, u8),
    waker: &Waker,
) {
    let Some(socket) = underlay.socket(family, source) else {
        return;
    };
    let mut inbound = Inbound::new(shared.offloads.joins());
    let mut watch = JoinWatch::default();
    let mut octets = vec![0; RECEIVED + PUT_TOGETHER].into_boxed_slice();
    let mut meta = [RecvMeta::default(); BATCH_SIZE];
    while !shared.stop.load(Ordering::Relaxed) {
        if let Ok(count) = receive(socket, &mut octets, &mut meta) {
            let received = &meta[..count];
            let joined = handle_batch(shared, tap, underlay, &mut inbound, &mut octets, received);
            if watch.is_broken(joined.0, joined.1) {
                let why = OffloadState::Failing;
                shared.offloads.step_down(Offload::Gro, why);
                underlay.join_received(&shared.offloads);
                watch.rest(Instant::now());
            } else if watch.is_rested(Instant::now) {
                shared.offloads.step_up(Offload::Gro);
                underlay.join_received(&shared.offloads);
            }
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

/// Takes what was received. Gives how many of the datagrams that came joined were authentic, and how many not.
fn handle_batch(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    inbound: &mut Inbound,
    octets: &mut [u8],
    meta: &[RecvMeta],
) -> (u32, u32) {
    let table = shared.table.load();
    let mut joined = (0, 0);
    inbound.set_joins(shared.offloads.joins());
    inbound.set_room(RECEIVED);
    for (buffer, meta) in meta.iter().enumerate() {
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
