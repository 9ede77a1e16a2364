//! The thread that accepts connections, reads them, writes what had to wait, and closes those whose time is over.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::TcpListener;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use weft_core::underlay::UnderlayAddr;
use weft_core::wire::{DatagramType, MAX_STREAMED, STREAM_HEAD};

use super::connection::Connection;
use super::frames::{self, NoLength};
use super::{FIRST_TOKEN, Streams};
use crate::coalesce::Span;
use crate::counters::Dropped;
use crate::ecn::NOT_ECT;
use crate::inbound::Inbound;
use crate::reception;
use crate::shared::{CarrierEvent, Shared};
use crate::table::Table;
use crate::tap::Tap;
use crate::threads::Waker;
use crate::underlay::Underlay;

/// The last of the tokens that are no listener's and no connection's.
const WAKER: Token = Token(FIRST_TOKEN);
/// Octets read at a time: some super-packets, so that the far end's come out joined as they went in.
const READ: usize = 256 << 10;
/// What may be left of a datagram from the time before.
const REST: usize = STREAM_HEAD + MAX_STREAMED;
/// How often is looked for connections whose time is over.
const SWEEP: Duration = Duration::from_millis(500);
/// Connections accepted at a time, and the pause when there are no descriptors left.
const ACCEPTED: usize = 64;
const BREATHER: Duration = Duration::from_millis(100);

/// How a connection is left after a look at it.
enum Left {
    /// There may be more to read.
    More,
    /// There is not.
    Empty,
    /// It ended, or must.
    Over,
}

struct Reader<'a> {
    shared: &'a Shared,
    tap: &'a Tap,
    underlay: &'a Underlay,
    streams: &'a Streams,
    listeners: Vec<TcpListener>,
    /// Those that have connections waiting, and when to go on.
    knocked: BTreeSet<usize>,
    accept_at: Instant,
    inbound: Inbound,
    octets: Box<[u8]>,
    /// What has come of a datagram that is not whole.
    rests: BTreeMap<usize, Vec<u8>>,
    /// With something to read, in turn.
    ready: VecDeque<usize>,
}

/// Connections to TAP. Everything of the calling thread's namespace.
pub(crate) fn stream_loop(
    shared: &Shared,
    tap: &Tap,
    underlay: &Underlay,
    mut poll: Poll,
    waker: &Waker,
) {
    let mut events = Events::with_capacity(256);
    let Ok(mut reader) = Reader::new(shared, tap, underlay, &poll, waker) else {
        return;
    };
    let mut sweep_at = Instant::now() + SWEEP;
    while !shared.stop.load(Ordering::Relaxed) {
        match poll.poll(&mut events, reader.timeout(sweep_at)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return,
            _ => {}
        }
        for event in &events {
            match event.token() {
                WAKER => waker.reset(),
                Token(n) if n < FIRST_TOKEN => drop(reader.knocked.insert(n)),
                Token(_) => reader.on_event(event),
            }
        }
        reader.accept();
        reader.read_round();
        if Instant::now() >= sweep_at {
            sweep_at = Instant::now() + SWEEP;
            reader.sweep();
        }
    }
}

impl<'a> Reader<'a> {
    fn new(
        shared: &'a Shared,
        tap: &'a Tap,
        underlay: &'a Underlay,
        poll: &Poll,
        waker: &Waker,
    ) -> io::Result<Self> {
        let streams = &underlay.streams;
        let registry = poll.registry();
        let waker = waker.as_fd().as_raw_fd();
        registry.register(&mut SourceFd(&waker), WAKER, Interest::READABLE)?;
        let mut listeners = Vec::new();
        for (n, listener) in streams.listeners()?.into_iter().enumerate() {
            let mut listener = TcpListener::from_std(listener.into());
            registry.register(&mut listener, Token(n), Interest::READABLE)?;
            listeners.push(listener);
        }
        Ok(Self {
            shared,
            tap,
            underlay,
            streams,
            // Who waited for a predecessor is not told of again.
            knocked: (0..listeners.len()).collect(),
            listeners,
            accept_at: Instant::now(),
            inbound: Inbound::new(shared.offloads.joins()),
            octets: vec![0; REST + READ].into_boxed_slice(),
            rests: BTreeMap::new(),
            ready: VecDeque::new(),
        })
    }

    fn timeout(&self, sweep_at: Instant) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let accept = (!self.knocked.is_empty()).then_some(self.accept_at);
        let sweep = (!self.streams.is_empty()).then_some(sweep_at);
        let next = accept.into_iter().chain(sweep).min();
        // Rounded up: poll counts whole milliseconds, and none is a busy loop.
        next.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1))
    }

    fn on_event(&mut self, event: &Event) {
        let Token(token) = event.token();
        let Some(connection) = self.streams.of(token) else {
            return;
        };
        if (event.is_writable() || event.is_error()) && connection.on_writable().is_err() {
            return self.close(&connection);
        }
        let is_ready = event.is_readable() || event.is_read_closed() || event.is_error();
        if is_ready && !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    fn accept(&mut self) {
        if Instant::now() < self.accept_at {
            return;
        }
        for n in std::mem::take(&mut self.knocked) {
            for left in (0..ACCEPTED).rev() {
                match self.listeners[n].accept() {
                    Ok((stream, far)) => drop(self.streams.accept(stream, far)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if is_of_one(&error) => {}
                    Err(_) => {
                        self.knocked.insert(n);
                        self.accept_at = Instant::now() + BREATHER;
                        break;
                    }
                }
                if left == 0 {
                    self.knocked.insert(n);
                }
            }
        }
    }

    /// One look at each that has something, so that none keeps the others waiting.
    fn read_round(&mut self) {
        for token in std::mem::take(&mut self.ready) {
            let Some(connection) = self.streams.of(token) else {
                self.rests.remove(&token);
                continue;
            };
            match self.read(&connection) {
                Left::More => self.ready.push_back(token),
                Left::Empty => {}
                Left::Over => self.close(&connection),
            }
        }
    }

    fn read(&mut self, connection: &Connection) -> Left {
        let rest = self.rests.remove(&connection.token).unwrap_or_default();
        self.octets[..rest.len()].copy_from_slice(&rest);
        // Of a stranger no more is held than one datagram.
        let room = match connection.stay.is_stranger() {
            true => REST,
            false => rest.len() + READ,
        };
        let end = match connection.receive(&mut self.octets[rest.len()..room]) {
            Ok(0) => return Left::Over,
            Ok(read) => rest.len() + read,
            Err(error) => {
                self.keep(connection.token, rest);
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Left::Empty,
                    io::ErrorKind::Interrupted => Left::More,
                    _ => Left::Over,
                };
            }
        };
        match self.handle(connection, end) {
            Ok(used) => {
                let rest = self.octets[used..end].to_vec();
                self.keep(connection.token, rest);
                Left::More
            }
            Err(NoLength) => {
                self.shared.drops.count(Dropped::UnknownDatagram);
                Left::Over
            }
        }
    }

    fn keep(&mut self, token: usize, rest: Vec<u8>) {
        if !rest.is_empty() {
            self.rests.insert(token, rest);
        }
    }

    /// Takes the whole datagrams among the first `end` octets, and says how many octets those were.
    fn handle(&mut self, connection: &Connection, end: usize) -> Result<usize, NoLength> {
        let table = self.shared.table.load();
        self.inbound.set_joins(self.shared.offloads.joins());
        let mut at = 0;
        let result = loop {
            match frames::first(&self.octets[at..end]) {
                Ok(None) => break Ok(at),
                Err(NoLength) => break Err(NoLength),
                Ok(Some(len)) => {
                    let start = at + STREAM_HEAD;
                    if !self.datagram(connection, &table, Span { start, len }) {
                        break Err(NoLength);
                    }
                    at = start + len;
                }
            }
        };
        self.inbound.pass_on(&table, self.shared, self.underlay);
        let (shared, tap) = (self.shared, self.tap);
        self.inbound.flush(&table, &self.octets, |frame| {
            reception::write(shared, tap, &table, &frame)
        });
        result
    }

    /// False when no peer would say such a thing.
    fn datagram(&mut self, connection: &Connection, table: &Table, span: Span) -> bool {
        let octets = &self.octets[span.start..span.start + span.len];
        if DatagramType::of(octets).is_none() || !connection.stay.takes_one() {
            return false;
        }
        let from = (UnderlayAddr::Tcp(connection.far), NOT_ECT);
        self.inbound.handle_datagram(
            table,
            self.shared,
            self.underlay,
            &mut self.octets,
            span,
            from,
        );
        let (authentic, _) = self.inbound.take_tally();
        if authentic > 0 {
            connection.stay.on_authentic(self.streams.now_ms());
        }
        true
    }

    fn close(&mut self, connection: &Connection) {
        self.rests.remove(&connection.token);
        let Some(closed) = self.streams.close(connection.token) else {
            return;
        };
        match closed.stay.is_proven() {
            true => self.shared.tell(CarrierEvent::ConnectionLost(closed.far)),
            false if closed.stay.is_stranger() => {
                self.shared.drops.count(Dropped::StrangersConnection)
            }
            false => {}
        }
    }

    fn sweep(&mut self) {
        let now = self.streams.now_ms();
        let over = |connection: &Arc<Connection>| connection.stay.is_over(now);
        let over: Vec<_> = self.streams.all().into_iter().filter(over).collect();
        if over.is_empty() {
            return;
        }
        let table = self.shared.table.load();
        let in_use: BTreeSet<SocketAddr> = table
            .peers
            .iter()
            .filter_map(|peer| peer.path?.tcp())
            .collect();
        for connection in over {
            if connection.stay.is_proven() && in_use.contains(&connection.far) {
                continue;
            }
            self.close(&connection);
        }
        let open: BTreeSet<usize> = self.streams.all().iter().map(|c| c.token).collect();
        self.rests.retain(|token, _| open.contains(token));
    }
}

/// Did only the one connection fail that would have been accepted (accept(2))?
fn is_of_one(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::Interrupted,
        io::ErrorKind::PermissionDenied,
    ];
    kinds.contains(&error.kind())
}
