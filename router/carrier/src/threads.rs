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
use crate::readiness::{Came, Readiness, Source};
use crate::reception::Reception;
use crate::shared::{CarrierEvent, Shared};
use crate::source_ports::Lane;
use crate::sys;
use crate::table::Table;
use crate::tap::Tap;
use crate::trial::Trials;
use crate::udp::{MAX_RUN, UdpPort};
use crate::underlay::{Family, SocketId, Underlay};

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
            UnderlayAddr::Udp(to) => self.send_run(to, source, run),
            UnderlayAddr::Tcp(to) => self.streams.send(to, run),
        }
    }

    fn take_congestion(&self, Lane { to, source }: Lane) -> bool {
        match to {
            UnderlayAddr::Udp(to) => self.was_congested(to, source),
            UnderlayAddr::Tcp(to) => self.streams.take_congestion(to),
        }
    }
}

/// The thread of one IP version's sockets, as the sender knows it: it rests while the sender does its work.
pub(crate) struct Helper {
    pub(crate) family: Family,
    pub(crate) reception: Arc<Mutex<Reception>>,
    pub(crate) waker: Arc<Waker>,
}

/// TAP to underlay; and both ways while there is little to do.
pub(crate) fn send_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    helpers: &[Helper],
    (readiness, waker): (&Readiness, &Waker),
) {
    let mut outbound = Outbound::new();
    let mut trials = Trials::new(Instant::now());
    let mut foreman = Foreman::new(Instant::now());
    let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
    wait_for_table(shared, tap, waker);
    while !shared.stop.load(Ordering::Relaxed) {
        let timeout = timeout(&outbound, &trials);
        let Ok(came) = wait(shared, tap, (readiness, waker), timeout) else {
            break;
        };
        let woke = Instant::now();
        receive_round(shared, tap, underlay, helpers, came.sockets());
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

/// Waits until there is something to do for the sender: while it is alone, for the sockets, too.
fn wait(
    shared: &Shared,
    tap: &Tap,
    (readiness, waker): (&Readiness, &Waker),
    timeout: i32,
) -> io::Result<Came> {
    let (came, woken) = if shared.crew.is_alone() {
        let came = readiness.wait(timeout)?;
        let woken = came.has(Source::Waker);
        (came, woken)
    } else {
        let [_, woken] = sys::wait_readable([tap.as_fd(), waker.as_fd()], timeout)?;
        (Came::nothing(), woken)
    };
    if woken {
        waker.reset();
    }
    Ok(came)
}

/// Takes one batch of each, for those whose work it is otherwise.
fn receive_round(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    helpers: &[Helper],
    sockets: impl Iterator<Item = SocketId>,
) {
    for id in sockets {
        let helper = helpers.iter().find(|helper| helper.family == id.family);
        // Without one it has been closed a moment ago.
        if let (Some(helper), Some(socket)) = (helper, underlay.held(id)) {
            take_batch(shared, tap, underlay, &socket, &helper.reception);
        }
    }
}

/// Takes what one call gives. Holds the lock for no longer: who comes after this thread must not wait for it.
fn take_batch(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    socket: &UdpPort,
    reception: &Mutex<Reception>,
) {
    let mut reception = reception.lock().unwrap_or_else(PoisonError::into_inner);
    reception.take_batch(shared, tap, underlay, socket);
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

/// Underlay to TAP: what comes for one IP version's sockets on the port itself. It rests while the sender is alone.
pub(crate) fn receive_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    reception: &Mutex<Reception>,
    (readiness, waker): (&Readiness, &Waker),
) {
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.crew.is_alone() {
            if sys::wait_readable([waker.as_fd()], -1).is_err() {
                return;
            }
            waker.reset();
            continue;
        }
        let Ok(came) = readiness.wait(-1) else {
            return;
        };
        if came.has(Source::Waker) {
            waker.reset();
        }
        let woke = Instant::now();
        for id in came.sockets() {
            // One that was closed a moment ago is no longer there.
            if let Some(socket) = underlay.held(id) {
                take_batch(shared, tap, underlay, &socket, reception);
            }
        }
        shared.crew.helped(woke.elapsed());
    }
}

/// The same for one of the further source ports, to which little comes.
pub(crate) fn receive_further(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    socket: &UdpPort,
    reception: &Mutex<Reception>,
    waker: &Waker,
) {
    while !shared.stop.load(Ordering::Relaxed) {
        match sys::wait_readable([socket.as_fd(), waker.as_fd()], -1) {
            Ok([readable, woken]) => {
                if woken {
                    waker.reset();
                }
                if readable {
                    take_batch(shared, tap, underlay, socket, reception);
                }
            }
            Err(_) => return,
        }
    }
}
