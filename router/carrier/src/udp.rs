//! One UDP socket of the underlay.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, MsgHdr, Protocol, SockAddr, Socket, Type};

use crate::backlog::Backlog;
use crate::batch::{Run, Sent};
use crate::control::Control;
use crate::descriptors::lives_in;
use crate::sys::{self, NamespaceOf};

/// Room for what comes while the threads are busy: at 10 Gbit/s some 6 ms.
const SOCKET_BUFFER: libc::c_int = 8 << 20;
/// How long a full socket is waited for: longer than any queue should be, shorter than anybody's patience.
const SEND_PATIENCE_MS: i32 = 100;

/// Datagrams that Linux cuts from one send (`UDP_MAX_SEGMENTS` before 6.9).
pub(crate) const MAX_RUN: usize = 64;

/// One socket and what it can do.
#[derive(Debug)]
pub(crate) struct UdpPort {
    socket: Socket,
    /// Is there one address only that it sends to and hears?
    connected: bool,
    state: UdpSocketState,
    backlog: Mutex<Backlog>,
    /// Is a packet to be marked or dropped, because too much waits?
    congested: AtomicBool,
}

impl UdpPort {
    /// A socket of its own, or `given` if that is bound to `addr`.
    pub(crate) fn bind(addr: SocketAddr, given: Option<OwnedFd>) -> io::Result<Self> {
        let given = given.map(Socket::from).filter(|s| is_bound_to(s, addr));
        let socket = given.map_or_else(|| bound_to(addr), Ok)?;
        // After the port was taken: before, any other that shares it would do.
        socket.set_reuse_port(true)?;
        Self::set_up(socket, addr)
    }

    /// One more socket on this one's port, for one peer's address alone. Only in the namespace where this one was bound.
    pub(crate) fn connected_to(&self, to: SocketAddr) -> io::Result<Self> {
        let bound = self.local_addr()?;
        let socket = unbound(bound)?;
        if !is_beside(&socket, &self.socket) {
            return Err(io::Error::from(io::ErrorKind::AddrNotAvailable));
        }
        // Allowed to the same user, and only by who holds the port.
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(bound))?;
        let mut port = Self::set_up(socket, bound)?;
        port.socket.connect(&SockAddr::from(to))?;
        port.connected = true;
        Ok(port)
    }

    fn set_up(socket: Socket, addr: SocketAddr) -> io::Result<Self> {
        grow(&socket, libc::SO_RCVBUFFORCE, Socket::set_recv_buffer_size);
        grow(&socket, libc::SO_SNDBUFFORCE, Socket::set_send_buffer_size);
        // Forbids fragments, asks for marks and for several datagrams at a time.
        let state = UdpSocketState::new((&socket).into())?;
        ask_for_less(&socket, addr);
        Ok(Self {
            socket,
            connected: false,
            state,
            backlog: Mutex::new(Backlog::new(Instant::now())),
            congested: AtomicBool::new(false),
        })
    }

    /// What it is bound to.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = self.socket.local_addr()?.as_socket();
        address.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
    }

    /// Can the kernel cut one send into many datagrams?
    pub(crate) fn can_cut(&self) -> bool {
        sys::set_option(self.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
    }

    /// Joins datagrams that come in a row, or does not. What had been joined is parted again.
    pub(crate) fn join_received(&self, joins: bool) -> io::Result<()> {
        sys::set_option(self.as_fd(), libc::SOL_UDP, libc::UDP_GRO, joins.into())
    }

    /// Sends a run. Waits for room.
    pub(crate) fn send(&self, to: SocketAddr, run: Run<'_>) -> io::Result<Sent> {
        let address = SockAddr::from(to);
        let result = match self.send_part(&address, to, run) {
            Err(refused) if run.is_many() && is_refusal(&refused) => {
                for octets in run.octets.chunks(run.stride) {
                    self.send_part(&address, to, Run { octets, ..run })?;
                }
                Ok(Sent::OneByOne)
            }
            result => result.map(|()| Sent::Whole),
        };
        self.watch_backlog(run.octets.len());
        result
    }

    fn watch_backlog(&self, octets: usize) {
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = || sys::unsent(self.as_fd()).unwrap_or(0);
        if backlog.on_sent(Instant::now(), octets, waiting) {
            self.congested.store(true, Ordering::Relaxed);
        }
    }

    /// Is one packet to be marked or dropped? Says so once.
    pub(crate) fn take_congestion(&self) -> bool {
        self.congested.load(Ordering::Relaxed) && self.congested.swap(false, Ordering::Relaxed)
    }

    fn send_part(&self, address: &SockAddr, to: SocketAddr, run: Run<'_>) -> io::Result<()> {
        loop {
            match self.try_send(address, to, run) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    if !sys::wait_writable(self.socket.as_fd(), SEND_PATIENCE_MS)? {
                        return Err(err);
                    }
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn try_send(&self, address: &SockAddr, to: SocketAddr, run: Run<'_>) -> io::Result<()> {
        let segment = run.is_many().then_some(run.stride as u16);
        let control = Control::new(to, run.tos, segment);
        let octets = [IoSlice::new(run.octets)];
        let message = MsgHdr::new().with_buffers(&octets);
        let message = match self.connected {
            // Asked for an address the kernel would look the route up, though it has it.
            true => message,
            false => message.with_addr(address),
        };
        let message = match control.octets() {
            [] => message,
            octets => message.with_control(octets),
        };
        self.socket.sendmsg(&message, 0).map(drop)
    }

    /// Sends one datagram or fails at once: for the core, which does not wait.
    pub(crate) fn send_now(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let run = Run {
            octets: datagram,
            stride: datagram.len(),
            tos: 0,
        };
        self.try_send(&SockAddr::from(to), to, run)
    }

    /// Receives what is there.
    pub(crate) fn receive(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.state.recv((&self.socket).into(), buffers, meta)
    }
}

/// Does the kernel, or the device on this path, decline to cut? `EINVAL` is also what Linux before 6.13 says to a run of
/// datagrams that are too large: then each alone is refused, too.
fn is_refusal(err: &io::Error) -> bool {
    let codes = [libc::EIO, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOPROTOOPT];
    err.raw_os_error().is_some_and(|code| codes.contains(&code))
}

impl AsFd for UdpPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn bound_to(addr: SocketAddr) -> io::Result<Socket> {
    let socket = unbound(addr)?;
    socket.bind(&SockAddr::from(addr))?;
    Ok(socket)
}

fn unbound(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Are both in the same network namespace?
fn is_beside(one: &Socket, other: &Socket) -> bool {
    let home = sys::namespace_of(other.as_fd(), NamespaceOf::Socket);
    home.is_ok_and(|home| lives_in(one.as_fd(), NamespaceOf::Socket, home.as_fd()))
}

/// Is it a UDP socket of this thread's namespace on just this address and port? A predecessor may have had another one.
fn is_bound_to(socket: &Socket, addr: SocketAddr) -> bool {
    let here = std::fs::File::open("/proc/thread-self/ns/net");
    socket.r#type().is_ok_and(|kind| kind == Type::DGRAM)
        && socket
            .protocol()
            .is_ok_and(|protocol| protocol == Some(Protocol::UDP))
        && socket
            .local_addr()
            .is_ok_and(|bound| bound.as_socket() == Some(addr))
        && here.is_ok_and(|here| lives_in(socket.as_fd(), NamespaceOf::Socket, here.as_fd()))
}

/// quinn-udp asks for times and local addresses, too, and has no room for what the kernel says then of a joined datagram:
/// its mark comes last, and would be cut off.
fn ask_for_less(socket: &Socket, addr: SocketAddr) {
    let address = match addr {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    };
    for (level, option) in [address, (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS)] {
        // Both were set a moment ago, or the kernel has none.
        let _ = sys::set_option(socket.as_fd(), level, option, 0);
    }
}

/// Beyond the system's limit if we may (CAP_NET_ADMIN), else up to it.
fn grow(socket: &Socket, force: libc::c_int, polite: fn(&Socket, usize) -> io::Result<()>) {
    if sys::set_option(socket.as_fd(), libc::SOL_SOCKET, force, SOCKET_BUFFER).is_err() {
        // A smaller buffer loses more in bursts, and that is all it does.
        let _ = polite(socket, SOCKET_BUFFER as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr};
    use weft_core::underlay::Offload;

    use crate::offload::Offloads;
    use crate::underlay::tests::{any, received, run_of};

    #[test]
    fn a_run_arrives_as_single_datagrams() {
        let (a, b) = (any().unwrap(), any().unwrap());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let run: Vec<u8> = (0..5).flat_map(|n| [n; 1000]).chain([9; 10]).collect();
        let sent = a.v4.send(to, run_of(&run, 1000)).unwrap();
        assert!(matches!(sent, Sent::Whole));
        let mut got = Vec::new();
        while got.len() < run.len() {
            let (octets, stride, _) = received(&b.v4);
            assert!(stride == 1000 || octets.len() == 10);
            got.extend_from_slice(&octets);
        }
        assert_eq!(got, run);
    }

    #[test]
    fn marks_arrive_on_both_versions_and_are_not_mixed() {
        let (a, b) = (any().unwrap(), any().unwrap());
        let v6 = |underlay: &'static str| underlay.parse::<IpAddr>().unwrap();
        for (from, to) in [
            (&a.v4, (&b.v4, v6("127.0.0.1"))),
            (a.v6.as_ref().unwrap(), (b.v6.as_ref().unwrap(), v6("::1"))),
        ] {
            let (port, ip) = to;
            let to = SocketAddr::from((ip, b.port()));
            for tos in [0, 1, 2, 3, 0xb8 | 2] {
                let run = Run {
                    octets: &[tos; 3000],
                    stride: 1000,
                    tos,
                };
                from.send(to, run).unwrap();
            }
            for tos in [0, 1, 2, 3, 2] {
                let (octets, _, ecn) = received(port);
                assert_eq!((octets.len(), ecn), (3000, tos));
            }
        }
    }

    #[test]
    fn what_the_kernel_will_not_cut_goes_one_by_one() {
        let (a, b) = (any().unwrap(), any().unwrap());
        // Without checksums the kernel cuts nothing.
        sys::set_option(a.v4.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, 1).unwrap();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let run: Vec<u8> = (0..5).flat_map(|n| [n; 1000]).collect();
        let sent = a.v4.send(to, run_of(&run, 1000)).unwrap();
        assert!(matches!(sent, Sent::OneByOne));
        let got: Vec<u8> = (0..5).flat_map(|_| received(&b.v4).0).collect();
        assert_eq!(got, run);
    }

    #[test]
    fn without_joining_datagrams_come_one_by_one() {
        let (a, b) = (any().unwrap(), any().unwrap());
        b.use_offloads(&Offloads::new(&[Offload::Gro]));
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        a.v4.send(to, run_of(&[7; 3000], 1000)).unwrap();
        for _ in 0..3 {
            assert_eq!(received(&b.v4).0, [7; 1000]);
        }
    }

    #[test]
    fn a_run_too_large_for_the_path_is_not_taken_for_a_refusal_to_cut() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
            let narrow = ["link", "set", "lo", "up", "mtu", "1300"];
            let status = std::process::Command::new("ip").args(narrow).status();
            assert!(status.unwrap().success());
            let underlay = any().unwrap();
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, underlay.port()));
            let refused = underlay.v4.send(to, run_of(&[7; 14_000], 1400));
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
            let sent = underlay.v4.send(to, run_of(&[7; 10_000], 1000)).unwrap();
            assert!(matches!(sent, Sent::Whole));
        })
        .join()
        .unwrap();
    }
}
