//! What has something to read, for a thread that reads many descriptors: epoll, which costs the same however many there are.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::underlay::SocketId;

/// As many are heard of at a time; the others are the first of the next time.
const AT_A_TIME: usize = 32;

/// One of what a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Somebody wants the thread to look around.
    Waker,
    Tap,
    Socket(SocketId),
}

impl Source {
    const WAKER: u64 = 0;
    const TAP: u64 = 1;
    const SOCKETS: u64 = 2;

    fn to_token(self) -> u64 {
        match self {
            Source::Waker => Self::WAKER,
            Source::Tap => Self::TAP,
            Source::Socket(id) => Self::SOCKETS + id.to_number(),
        }
    }

    fn from_token(token: u64) -> Self {
        match token {
            Self::WAKER => Source::Waker,
            Self::TAP => Source::Tap,
            token => Source::Socket(SocketId::from_number(token - Self::SOCKETS)),
        }
    }
}

/// The descriptors that one thread waits for.
#[derive(Debug)]
pub(crate) struct Readiness(Epoll);

impl Readiness {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// From now on waits for `fd`, too: for something to read, or for its end.
    pub(crate) fn add(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, source.to_token());
        Ok(self.0.add(fd, event)?)
    }

    /// No longer waits for it.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // It fails only where `fd` was never added, and then nothing is to be done.
        let _ = self.0.delete(fd);
    }

    /// Waits until something can be read, or `timeout` milliseconds are over (-1: for ever).
    pub(crate) fn wait(&self, timeout: i32) -> io::Result<Came> {
        let mut came = Came::nothing();
        let timeout = EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::NONE);
        match self.0.wait(&mut came.events, timeout) {
            Ok(count) => came.count = count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(came)
    }
}

/// What can be read.
#[derive(Debug)]
pub(crate) struct Came {
    events: [EpollEvent; AT_A_TIME],
    count: usize,
}

impl Came {
    pub(crate) fn nothing() -> Self {
        Self {
            events: [EpollEvent::empty(); AT_A_TIME],
            count: 0,
        }
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = Source> {
        let events = self.events[..self.count].iter();
        events.map(|event| Source::from_token(event.data()))
    }

    /// Those of them that are sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = SocketId> {
        self.sources().filter_map(|source| match source {
            Source::Socket(id) => Some(id),
            Source::Waker | Source::Tap => None,
        })
    }

    pub(crate) fn has(&self, source: Source) -> bool {
        self.sources().any(|came| came == source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::Waker;
    use crate::underlay::Family;

    #[test]
    fn who_has_something_to_read_is_named_until_it_is_read() {
        let readiness = Readiness::new().unwrap();
        let (waker, socket) = (Waker::new().unwrap(), Waker::new().unwrap());
        let id = SocketId {
            family: Family::V6,
            place: 7,
        };
        readiness.add(&waker, Source::Waker).unwrap();
        readiness.add(&socket, Source::Socket(id)).unwrap();
        let came = |timeout| {
            let came = readiness.wait(timeout).unwrap();
            came.sources().collect::<Vec<_>>()
        };
        assert_eq!(came(0), []);
        socket.wake();
        assert_eq!(came(-1), [Source::Socket(id)]);
        waker.wake();
        assert_eq!(came(-1).len(), 2);
        socket.reset();
        assert_eq!(came(-1), [Source::Waker]);
        readiness.remove(&waker);
        assert_eq!(came(0), []);
    }
}
