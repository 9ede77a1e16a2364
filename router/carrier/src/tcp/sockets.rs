//! TCP sockets as they are needed here: none waits, none gathers, and each finds out by itself that its far end is gone.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::descriptors::lives_in;
use crate::error::CarrierError;
use crate::sys::{self, NamespaceOf};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// What is sent and not acknowledged for so long breaks it (RFC 5482): by then another path should be found.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);
/// A NAT or firewall between forgets silent connections: 25 seconds are little enough for any.
const KEEPALIVE: Duration = Duration::from_secs(25);
/// Octets that the kernel takes and does not send at once: what waits shall wait where it can be counted and dropped.
const NOT_SENT: i32 = 128 << 10;

/// A connection in the making.
pub(super) fn dial(to: SocketAddr) -> io::Result<mio::net::TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    let stream = mio::net::TcpStream::from_std(socket.into());
    tune(&stream)?;
    Ok(stream)
}

/// Sets one up.
pub(super) fn tune(stream: &mio::net::TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(Duration::from_secs(5))
        .with_retries(2);
    socket.set_tcp_keepalive(&keepalive)?;
    sys::set_option(
        stream.as_fd(),
        libc::IPPROTO_TCP,
        libc::TCP_NOTSENT_LOWAT,
        NOT_SENT,
    )
}

/// Listeners on these addresses: those of `given` that are just these, or new ones. Fewer where the host has no IPv6.
pub(super) fn listen(
    port: u16,
    addresses: [IpAddr; 2],
    given: Vec<OwnedFd>,
) -> Result<Vec<Socket>, CarrierError> {
    let mut given: Vec<Socket> = given.into_iter().map(Socket::from).collect();
    let mut listeners = Vec::new();
    for ip in addresses {
        let addr = SocketAddr::new(ip, port);
        let place = given.iter().position(|socket| listens_at(socket, addr));
        let listener = match place {
            Some(place) => Ok(given.swap_remove(place)),
            None => listen_at(addr),
        };
        match listener {
            Ok(listener) => listeners.push(listener),
            Err(error) if ip.is_ipv6() && has_no_ipv6(&error) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(CarrierError::TcpPortTaken { port });
            }
            Err(source) => return Err(CarrierError::Listen { port, source }),
        }
    }
    Ok(listeners)
}

fn listen_at(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Connections of a former daemon in TIME_WAIT don't matter; a present listener still refuses.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(addr))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Is it a listener of this thread's namespace on just this address and port?
fn listens_at(socket: &Socket, addr: SocketAddr) -> bool {
    let here = std::fs::File::open("/proc/thread-self/ns/net");
    socket.r#type().is_ok_and(|kind| kind == Type::STREAM)
        && socket.is_listener().unwrap_or(false)
        && socket
            .local_addr()
            .is_ok_and(|bound| bound.as_socket() == Some(addr))
        && here.is_ok_and(|here| lives_in(socket.as_fd(), NamespaceOf::Socket, here.as_fd()))
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    errno == Some(libc::EAFNOSUPPORT) || errno == Some(libc::EADDRNOTAVAIL)
}
