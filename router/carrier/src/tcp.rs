//! Datagrams in TCP connections, for networks that let no UDP out: the listener, the connections, and who of them may stay.
//!
//! ```text
//! | length, 2 octets | datagram, as it would be by UDP | length | datagram | ...
//! ```
//!
//! Nothing else is different: the same handshakes, cookies, seals and replay windows. What arrives more than once, late or
//! never is the sessions' affair as ever, so a connection that breaks is simply made anew, by whoever has something to
//! send; and where there is no room in one, what was to go into it is dropped, as in any other queue. Nobody ever waits.
//!
//! A connection gives a stranger nothing that a datagram does not. One along which nothing authentic has come is closed after
//! seconds, as is one that says what no peer would; there are few of them, in all and from one source, and the oldest makes
//! room for the next, so that holding many keeps nobody out. The others belong to members and stay as long as they are
//! somebody's path, or something comes along them.

mod connection;
mod frames;
mod reader;
mod sockets;
mod stay;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mio::{Interest, Poll, Registry, Token};
use socket2::Socket;

pub(crate) use self::reader::stream_loop;

use self::connection::{Connection, Origin};
use self::stay::{MAX_CONNECTIONS, Stay};
use crate::batch::{Run, Sent};
use crate::error::CarrierError;

/// Connections that are being made.
const MAX_DIALLED: usize = 64;
/// After one that could not be made, the same is not tried again for so long.
const DIAL_AGAIN: Duration = Duration::from_secs(1);
/// Addresses remembered for that.
const MAX_FAILED: usize = 256;
/// The listeners and the waker; connections have the tokens above.
const FIRST_TOKEN: usize = 16;

/// All connections, and how to make one.
#[derive(Debug)]
pub(crate) struct Streams {
    start: Instant,
    registry: Registry,
    listeners: Vec<Socket>,
    open: RwLock<Open>,
}

#[derive(Debug, Default)]
struct Open {
    by_far: BTreeMap<SocketAddr, Arc<Connection>>,
    by_token: BTreeMap<usize, Arc<Connection>>,
    last_token: usize,
    /// What could not be dialled, and when.
    failed: BTreeMap<SocketAddr, Instant>,
}

impl Streams {
    /// Listens on `port`, if any, on both IP versions in the calling thread's namespace, or takes the listeners given if they
    /// are just these. What reads them all is [`stream_loop`], with the second half.
    pub(crate) fn open(
        port: Option<u16>,
        (v4, v6): (Ipv4Addr, Ipv6Addr),
        given: Vec<OwnedFd>,
    ) -> Result<(Self, Poll), CarrierError> {
        let poll = Poll::new().map_err(CarrierError::Threads)?;
        let registry = poll.registry().try_clone().map_err(CarrierError::Threads)?;
        let listeners = match port {
            Some(port) => sockets::listen(port, [IpAddr::V4(v4), IpAddr::V6(v6)], given)?,
            None => Vec::new(),
        };
        let streams = Self {
            start: Instant::now(),
            registry,
            listeners,
            open: RwLock::default(),
        };
        Ok((streams, poll))
    }

    /// The listeners once more.
    pub(crate) fn listeners(&self) -> io::Result<Vec<OwnedFd>> {
        let again = |listener: &Socket| listener.as_fd().try_clone_to_owned();
        self.listeners.iter().map(again).collect()
    }

    /// Milliseconds since the start.
    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Puts a run into the connection with `to`. Where there is none, or no room in it, it is lost.
    pub(crate) fn send(&self, to: SocketAddr, run: Run<'_>) -> io::Result<Sent> {
        let connection = self.with(to).ok_or(io::ErrorKind::NotConnected)?;
        connection.send(run).map(|()| Sent::Whole)
    }

    /// The same for a datagram of the core's, which makes the connection where there is none: it has reasons to believe that
    /// somebody listens there.
    pub(crate) fn send_or_dial(&self, to: SocketAddr, run: Run<'_>) -> io::Result<()> {
        let connection = match self.with(to) {
            Some(connection) => connection,
            None => self.dial(to)?,
        };
        // Nobody is answered who has shown nothing.
        connection.stay.on_answered(self.now_ms());
        connection.send(run)
    }

    /// Does too much wait to go there? Says so once for each packet that is to be marked or dropped for it.
    pub(crate) fn take_congestion(&self, to: SocketAddr) -> bool {
        self.with(to)
            .is_some_and(|connection| connection.take_congestion())
    }

    fn is_empty(&self) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.by_token.is_empty()
    }

    fn with(&self, far: SocketAddr) -> Option<Arc<Connection>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.by_far.get(&far).cloned()
    }

    fn of(&self, token: usize) -> Option<Arc<Connection>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.by_token.get(&token).cloned()
    }

    fn all(&self) -> Vec<Arc<Connection>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.by_token.values().cloned().collect()
    }

    fn dial(&self, to: SocketAddr) -> io::Result<Arc<Connection>> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = open.by_far.get(&to) {
            return Ok(there.clone());
        }
        let made = |c: &&Arc<Connection>| c.stay.origin == Origin::Dialled && !c.is_connected();
        let is_full = open.by_far.len() >= MAX_CONNECTIONS
            || open.by_far.values().filter(made).count() >= MAX_DIALLED;
        let failed = open.failed.get(&to);
        if is_full || failed.is_some_and(|at| at.elapsed() < DIAL_AGAIN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match sockets::dial(to) {
            Ok(stream) => open.add(&self.registry, stream, to, Stay::dialled(self.now_ms())),
            Err(error) => {
                open.note_failed(to);
                Err(error)
            }
        }
    }

    /// Takes a connection that somebody made. Whoever has waited longest and shown nothing makes room for it.
    fn accept(&self, stream: mio::net::TcpStream, far: SocketAddr) -> io::Result<()> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let strangers = open.by_token.values().filter(|c| c.stay.is_stranger());
        let strangers: Vec<_> = strangers.map(|c| (c.token, c.far.ip())).collect();
        if let Some(token) = stay::makes_room(&strangers, far.ip()) {
            open.remove(&self.registry, token);
        }
        if open.by_far.len() >= MAX_CONNECTIONS || open.by_far.contains_key(&far) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        sockets::tune(&stream)?;
        let stay = Stay::accepted(self.now_ms());
        open.add(&self.registry, stream, far, stay).map(drop)
    }

    /// Closes it. True if it was there.
    fn close(&self, token: usize) -> Option<Arc<Connection>> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let connection = open.remove(&self.registry, token)?;
        if connection.stay.origin == Origin::Dialled && !connection.stay.is_proven() {
            open.note_failed(connection.far);
        }
        Some(connection)
    }
}

impl Open {
    fn add(
        &mut self,
        registry: &Registry,
        mut stream: mio::net::TcpStream,
        far: SocketAddr,
        stay: Stay,
    ) -> io::Result<Arc<Connection>> {
        let token = self.last_token.max(FIRST_TOKEN) + 1;
        self.last_token = token;
        // Whoever hears of it waits for the lock, and then it is there.
        let both = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut stream, Token(token), both)?;
        let connection = Arc::new(Connection::new(token, far, stream, stay));
        self.by_far.insert(far, connection.clone());
        self.by_token.insert(token, connection.clone());
        Ok(connection)
    }

    fn remove(&mut self, registry: &Registry, token: usize) -> Option<Arc<Connection>> {
        let connection = self.by_token.remove(&token)?;
        self.by_far.remove(&connection.far);
        connection.close(registry);
        Some(connection)
    }

    fn note_failed(&mut self, to: SocketAddr) {
        self.failed.retain(|_, at| at.elapsed() < DIAL_AGAIN);
        if self.failed.len() < MAX_FAILED {
            self.failed.insert(to, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests;
