//! What of a carrier outlives it: its descriptors, for the next process that runs one on the same device and port.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::stat::fstat;

use crate::sys::{self, NamespaceOf};

/// The queue of the TAP and the sockets of the underlay. While somebody holds the queue the device keeps its carrier, and
/// with it the kernel the next hops that lead to it; what arrives meanwhile waits in the queue and in the sockets' buffers.
/// One reader at a time: whoever begins makes sure that the one before has stopped.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// The TAP's one queue.
    pub tap: Option<OwnedFd>,
    /// The IPv4 socket.
    pub v4: Option<OwnedFd>,
    /// The IPv6 socket; `None` where the host has no IPv6.
    pub v6: Option<OwnedFd>,
    /// The listeners for TCP, one of each IP version; none without a port for it.
    pub tcp: Vec<OwnedFd>,
}

/// Is what `fd` leads to in `namespace`?
pub(crate) fn lives_in(fd: BorrowedFd<'_>, of: NamespaceOf, namespace: BorrowedFd<'_>) -> bool {
    let Ok(home) = sys::namespace_of(fd, of) else {
        return false;
    };
    match (fstat(home.as_fd()), fstat(namespace)) {
        (Ok(home), Ok(wanted)) => (home.st_dev, home.st_ino) == (wanted.st_dev, wanted.st_ino),
        _ => false,
    }
}
