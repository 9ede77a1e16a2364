//! One connection: what waits to go into it, and how it goes.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mio::Registry;
use mio::net::TcpStream;
use mio::unix::SourceFd;
use socket2::SockRef;

use super::frames;
use super::stay::Stay;
use crate::backlog::Backlog;
use crate::batch::Run;
use crate::sys;

/// Octets that wait because the kernel takes no more: several of the largest runs. Who fills it has been told by marks and
/// losses for a while to slow down ([`Backlog`]), or the far end takes nothing any more.
const MAX_WAITING: usize = 512 << 10;

/// Who made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The far end.
    Accepted,
    /// This host.
    Dialled,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) token: usize,
    pub(super) far: SocketAddr,
    pub(super) stay: Stay,
    stream: TcpStream,
    out: Mutex<Out>,
    is_connected: AtomicBool,
    congested: AtomicBool,
}

#[derive(Debug)]
struct Out {
    waiting: VecDeque<u8>,
    backlog: Backlog,
}

impl Connection {
    pub(super) fn new(token: usize, far: SocketAddr, stream: TcpStream, stay: Stay) -> Self {
        Self {
            token,
            far,
            is_connected: (stay.origin == Origin::Accepted).into(),
            stay,
            stream,
            out: Mutex::new(Out {
                waiting: VecDeque::new(),
                backlog: Backlog::new(Instant::now()),
            }),
            congested: false.into(),
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.is_connected.load(Ordering::Relaxed)
    }

    /// Is one packet to be marked or dropped? Says so once.
    pub(super) fn take_congestion(&self) -> bool {
        self.congested.load(Ordering::Relaxed) && self.congested.swap(false, Ordering::Relaxed)
    }

    /// Puts a run behind what waits, all of it or nothing.
    pub(super) fn send(&self, run: Run<'_>) -> io::Result<()> {
        let framed =
            frames::with_heads(run).ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        let octets = frames::length(run);
        let mut out = self.out();
        if out.waiting.len() + octets > MAX_WAITING {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (head, datagram) in framed {
            out.waiting.extend(&head);
            out.waiting.extend(datagram);
        }
        if !self.is_connected() {
            return Ok(());
        }
        // What is broken the reader finds out.
        let result = out.flush(&self.stream);
        let waiting = out.waiting.len() as u64;
        let unsent = || waiting + sys::not_sent(self.stream.as_fd()).unwrap_or(0);
        if out.backlog.on_sent(Instant::now(), octets, unsent) {
            self.congested.store(true, Ordering::Relaxed);
        }
        result
    }

    /// The kernel takes more, or has something to say.
    pub(super) fn on_writable(&self) -> io::Result<()> {
        if !self.is_connected() {
            if let Some(error) = self.stream.take_error()? {
                return Err(error);
            }
            match self.stream.peer_addr() {
                Ok(_) => self.is_connected.store(true, Ordering::Relaxed),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.out().flush(&self.stream)
    }

    /// Reads what has come. Zero: nobody will send any more.
    pub(super) fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(into)
    }

    /// Ends it for both sides. What waits in it is lost; a stranger leaves nothing behind.
    pub(super) fn close(&self, registry: &Registry) {
        match self.stay.is_stranger() {
            true => drop(SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))),
            false => drop(self.stream.shutdown(Shutdown::Both)),
        }
        let _ = registry.deregister(&mut SourceFd(&self.stream.as_raw_fd()));
        self.out().waiting = VecDeque::new();
    }
}

impl Out {
    fn flush(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.waiting.is_empty() {
            match stream.write(self.waiting.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.waiting.drain(..written)),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}
