//! The threads: they wait, let [`Outbound`] or a [`Reception`] do the work, and say how long it took.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use weft_core::underlay::UnderlayAddr;

use crate::batch::{Run, Sent, Wire};
use crate::crew::Foreman;
use crate::outbound::Outbound;
use crate::reception::Reception;
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

/// The thread of one of the two sockets, as the sender knows it: it rests while the sender does its work.
pub(crate) struct Helper {
    pub(crate) family: Family,
    pub(crate) reception: Arc<Mutex<Reception>>,
    pub(crate) waker: Arc<Waker>,
}

impl Helper {
    fn socket<'a>(&self, underlay: &'a Underlay) -> Option<&'a UdpPort> {
        underlay.socket(self.family, 0)
    }
}

/// TAP to underlay; and both ways while there is little to do.
pub(crate) fn send_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    helpers: &[Helper],
    waker: &Waker,
) {
    let mut outbound = Outbound::new();
    let mut trials = Trials::new(Instant::now());
    let mut foreman = Foreman::new(Instant::now());
    let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
    wait_for_table(shared, tap, waker);
    while !shared.stop.load(Ordering::Relaxed) {
        let timeout = timeout(&outbound, &trials);
        let Ok(came) = wait(shared, tap, underlay, helpers, (waker, timeout)) else {
            break;
        };
        let woke = Instant::now();
        receive_round(shared, tap, underlay, came.iter().flatten());
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
        if let Some(alone) = foreman.look(&shared.crew, now - woke, now) {
            set_alone(shared, helpers, alone);
        }
    }
    set_alone(shared, helpers, false);
    if !shared.stop.load(Ordering::Relaxed) {
        shared.tell(CarrierEvent::TapLost);
    }
}

fn set_alone(shared: &Shared, helpers: &[Helper], alone: bool) {
    shared.crew.set_alone(alone);
    for helper in helpers {
        helper.waker.wake();
    }
}

/// Waits until there is something to do for the sender. Gives those whose work it does, and who have some.
fn wait<'a>(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    helpers: &'a [Helper],
    (waker, timeout): (&Waker, i32),
) -> io::Result<[Option<&'a Helper>; Family::ALL.len()]> {
    let alone = shared.crew.is_alone();
    let [v4, v6] = std::array::from_fn(|n| helpers.get(n).filter(|_| alone));
    let socket = |helper: Option<&Helper>| Some(helper?.socket(underlay)?.as_fd());
    let all = [
        Some(tap.as_fd()),
        Some(waker.as_fd()),
        socket(v4),
        socket(v6),
    ];
    let [_, woken, by_v4, by_v6] = sys::wait_any(all, timeout)?;
    if woken {
        waker.reset();
    }
    Ok([v4.filter(|_| by_v4), v6.filter(|_| by_v6)])
}

/// Takes one batch of each.
fn receive_round<'a>(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    helpers: impl Iterator<Item = &'a &'a Helper>,
) {
    for helper in helpers {
        let Some(socket) = helper.socket(underlay) else {
            continue;
        };
        take_batch(shared, tap, underlay, socket, &helper.reception);
    }
}

/// Takes what one call gives. Holds the lock for no longer: who comes after this thread must not wait for it.
fn take_batch(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    socket: &UdpPort,
    reception: &Mutex<Reception>,
) -> bool {
    let mut reception = reception.lock().unwrap_or_else(PoisonError::into_inner);
    reception.take_batch(shared, tap, underlay, socket)
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

/// Underlay to TAP: what comes for one of its sockets. What comes for those of the port itself is the sender's affair while
/// that is alone.
pub(crate) fn receive_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    (family, source): (Family, u8),
    reception: &Mutex<Reception>,
    waker: &Waker,
) {
    let Some(socket) = underlay.socket(family, source) else {
        return;
    };
    while !shared.stop.load(Ordering::Relaxed) {
        let rests = source == 0 && shared.crew.is_alone();
        let to_read = (!rests).then_some(socket.as_fd());
        match sys::wait_any([to_read, Some(waker.as_fd())], -1) {
            Ok([_, true]) => waker.reset(),
            Ok(_) => {}
            Err(_) => return,
        }
        if !rests {
            receive_all(shared, tap, underlay, socket, reception);
        }
    }
}

/// Takes what is there.
fn receive_all(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    socket: &UdpPort,
    reception: &Mutex<Reception>,
) {
    let mut since = Instant::now();
    while !shared.stop.load(Ordering::Relaxed)
        && take_batch(shared, tap, underlay, socket, reception)
    {
        let now = Instant::now();
        shared.crew.helped(now - since);
        since = now;
    }
}
