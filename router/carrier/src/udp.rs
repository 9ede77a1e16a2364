//! The underlay: one UDP socket per IP version on one port, in the host's namespace.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, MsgHdr, Protocol, SockAddr, Socket, Type};

use weft_core::underlay::{Offload, OffloadState};

use crate::backlog::Backlog;
use crate::batch::{Run, Sent};
use crate::control::Control;
use crate::descriptors::lives_in;
use crate::error::CarrierError;
use crate::offload::Offloads;
use crate::source_ports::SourcePort;
use crate::sys::{self, NamespaceOf};
use crate::tcp::Streams;

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
        grow(&socket, libc::SO_RCVBUFFORCE, Socket::set_recv_buffer_size);
        grow(&socket, libc::SO_SNDBUFFORCE, Socket::set_send_buffer_size);
        // Forbids fragments, asks for marks and for several datagrams at a time.
        let state = UdpSocketState::new((&socket).into())?;
        ask_for_less(&socket, addr);
        Ok(Self {
            socket,
            state,
            backlog: Mutex::new(Backlog::new(Instant::now())),
            congested: AtomicBool::new(false),
        })
    }

    /// Can the kernel cut one send into many datagrams?
    fn can_cut(&self) -> bool {
        sys::set_option(self.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
    }

    /// Joins datagrams that come in a row, or does not. What had been joined is parted again.
    fn join_received(&self, joins: bool) -> io::Result<()> {
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
        let message = MsgHdr::new().with_addr(address).with_buffers(&octets);
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
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&SockAddr::from(addr))?;
    Ok(socket)
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

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Family; 2] = [Family::V4, Family::V6];

    fn of(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        }
    }
}

/// Both sockets, and what asks the kernel for the MTU of a path.
#[derive(Debug)]
pub(crate) struct Underlay {
    pub(crate) v4: UdpPort,
    /// `None` where the host has no IPv6.
    pub(crate) v6: Option<UdpPort>,
    port: u16,
    /// What packets may leave by, too.
    further: Vec<SourcePort>,
    /// For those that are reached by TCP alone.
    pub(crate) streams: Streams,
    probes: Mutex<(Socket, Option<Socket>)>,
}

impl Underlay {
    /// Opens `port` on both IP versions in the calling thread's namespace, or takes the sockets given if they are just these.
    pub(crate) fn bind(
        port: u16,
        (v4, v6): (Ipv4Addr, Ipv6Addr),
        given: (Option<OwnedFd>, Option<OwnedFd>),
        streams: Streams,
    ) -> Result<Self, CarrierError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => CarrierError::PortTaken { port },
            _ => CarrierError::Bind { port, source },
        };
        let v4 = UdpPort::bind((v4, port).into(), given.0).map_err(failed)?;
        // Port 0 means any, but the same for both.
        let port = local_port(&v4.socket).map_err(failed)?;
        let v6 = match UdpPort::bind((v6, port).into(), given.1) {
            Ok(v6) => Some(v6),
            Err(err) if has_no_ipv6(&err) => None,
            Err(err) => return Err(failed(err)),
        };
        let probes = (
            probe(Domain::IPV4).map_err(failed)?,
            v6.as_ref().and_then(|_| probe(Domain::IPV6).ok()),
        );
        Ok(Self {
            v4,
            v6,
            port,
            further: Vec::new(),
            streams,
            probes: Mutex::new(probes),
        })
    }

    /// Opens further source ports on these addresses until there are `count` with the port itself.
    pub(crate) fn open_source_ports(
        &mut self,
        count: u8,
        (v4, v6): (Ipv4Addr, Ipv6Addr),
    ) -> Result<(), CarrierError> {
        let addresses = (v4, self.v6.is_some().then_some(v6));
        let further = (1..count).map(|_| SourcePort::open(addresses));
        let further: io::Result<Vec<_>> = further.collect();
        self.further = further.map_err(|source| CarrierError::Bind { port: 0, source })?;
        Ok(())
    }

    /// Source ports besides the port itself.
    pub(crate) fn further_source_ports(&self) -> u8 {
        self.further.len() as u8
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    fn ports(&self) -> impl Iterator<Item = &UdpPort> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    /// Uses those offloads that are on, and takes note of those that the kernel has not.
    pub(crate) fn use_offloads(&self, offloads: &Offloads) {
        if !self.ports().all(UdpPort::can_cut) {
            offloads.step_down(Offload::Gso, OffloadState::Absent);
        }
        self.join_received(offloads);
    }

    /// Joins what comes in a row as far as that is on.
    pub(crate) fn join_received(&self, offloads: &Offloads) {
        let joins = offloads.is_on(Offload::Gro);
        let refused = self.ports().any(|port| port.join_received(joins).is_err());
        if joins && refused {
            offloads.step_down(Offload::Gro, OffloadState::Absent);
        }
    }

    /// Both sockets once more.
    pub(crate) fn sockets(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let again = |port: &UdpPort| port.as_fd().try_clone_to_owned();
        Ok((again(&self.v4)?, self.v6.as_ref().map(again).transpose()?))
    }

    /// The socket that reaches `to`.
    pub(crate) fn towards(&self, to: SocketAddr) -> io::Result<&UdpPort> {
        self.leaving(to, 0)
    }

    /// The socket by which what goes to `to` leaves from this source port.
    pub(crate) fn leaving(&self, to: SocketAddr, source: u8) -> io::Result<&UdpPort> {
        self.socket(Family::of(to), source)
            .ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable))
    }

    /// The socket of an IP version and source port, if there is one.
    pub(crate) fn socket(&self, family: Family, source: u8) -> Option<&UdpPort> {
        let (v4, v6) = match usize::from(source).checked_sub(1) {
            None => (&self.v4, &self.v6),
            Some(place) => {
                let further = self.further.get(place)?;
                (&further.v4, &further.v6)
            }
        };
        match family {
            Family::V4 => Some(v4),
            Family::V6 => v6.as_ref(),
        }
    }

    /// MTU of the kernel's route to `to`, learnt "packet too big" messages included.
    pub(crate) fn path_mtu(&self, to: SocketAddr) -> Option<u16> {
        self.look_up(to).map(|(mtu, _)| mtu)
    }

    pub(crate) fn path_source(&self, to: SocketAddr) -> Option<IpAddr> {
        self.look_up(to)?.1
    }

    /// The route's MTU, and the address from which the host sends there.
    fn look_up(&self, to: SocketAddr) -> Option<(u16, Option<IpAddr>)> {
        let probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, level, option) = match to.ip() {
            IpAddr::V4(_) => (&probes.0, libc::IPPROTO_IP, libc::IP_MTU),
            IpAddr::V6(_) => (probes.1.as_ref()?, libc::IPPROTO_IPV6, libc::IPV6_MTU),
        };
        // Connecting a datagram socket sends nothing; it looks the route up. It also keeps the source address of the first
        // time, which may be gone by now, unless it is let go first.
        sys::disconnect(socket.as_fd()).ok()?;
        socket.connect(&SockAddr::from(to)).ok()?;
        let mtu = sys::option(socket.as_fd(), level, option).ok()?;
        let source = socket.local_addr().ok().and_then(|addr| addr.as_socket());
        Some((
            u16::try_from(mtu).unwrap_or(u16::MAX),
            source.map(|addr| addr.ip()),
        ))
    }
}

fn probe(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))
}

fn local_port(socket: &Socket) -> io::Result<u16> {
    let addr = socket.local_addr()?.as_socket();
    addr.map(|a| a.port())
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

fn has_no_ipv6(err: &io::Error) -> bool {
    let errno = err.raw_os_error();
    errno == Some(libc::EAFNOSUPPORT) || errno == Some(libc::EADDRNOTAVAIL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unused_port::{unused_port, wait_until_unused};

    const LOOPBACK: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);

    fn streams() -> Streams {
        Streams::open(None, LOOPBACK, Vec::new()).unwrap().0
    }

    fn any() -> Result<Underlay, CarrierError> {
        Underlay::bind(unused_port(), LOOPBACK, (None, None), streams())
    }

    fn run_of(octets: &[u8], stride: usize) -> Run<'_> {
        Run {
            octets,
            stride,
            tos: 0,
        }
    }

    /// What comes next, as the kernel hands it out: its octets, the length of each datagram in it, and their mark.
    fn received(port: &UdpPort) -> (Vec<u8>, usize, u8) {
        let mut buffer = vec![0; 65536];
        let mut meta = [RecvMeta::default()];
        assert_eq!(sys::wait_readable([port.as_fd()], 2000).unwrap(), [true]);
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        assert_eq!(port.receive(&mut buffers, &mut meta).unwrap(), 1);
        buffer.truncate(meta[0].len);
        (buffer, meta[0].stride, meta[0].ecn.map_or(0, |e| e as u8))
    }

    #[test]
    fn a_taken_port_is_said_to_be_taken() {
        let first = any().unwrap();
        let again = Underlay::bind(first.port(), LOOPBACK, (None, None), streams());
        assert!(matches!(again, Err(CarrierError::PortTaken { port }) if port == first.port()));
    }

    #[test]
    fn sockets_of_a_predecessor_go_on_with_what_waits_in_them() {
        let (first, sender) = (any().unwrap(), any().unwrap());
        let port = first.port();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        sender.v4.send_now(to, b"waits").unwrap();
        let (v4, v6) = first.sockets().unwrap();
        drop(first);
        let next = Underlay::bind(port, LOOPBACK, (Some(v4), v6), streams()).unwrap();
        assert_eq!(next.port(), port);
        let (mut buffer, mut meta) = (vec![0; 100], [RecvMeta::default()]);
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        assert_eq!(next.v4.receive(&mut buffers, &mut meta).unwrap(), 1);
        assert_eq!(&buffer[..meta[0].len], b"waits");
    }

    #[test]
    fn a_socket_of_another_port_is_let_go() {
        let first = any().unwrap();
        let (v4, v6) = first.sockets().unwrap();
        let port = first.port();
        drop(first);
        let other = any().unwrap();
        assert_ne!(other.port(), port);
        let (own4, _) = other.sockets().unwrap();
        drop(other);
        // Two of the wrong kind: another port, and one that is not even a socket.
        let null = std::fs::File::open("/dev/null").unwrap();
        drop((v4, v6));
        wait_until_unused(port);
        let next =
            Underlay::bind(port, LOOPBACK, (Some(own4), Some(null.into())), streams()).unwrap();
        assert_eq!(next.port(), port);
        let bound = next.v4.socket.local_addr().unwrap().as_socket();
        assert_eq!(bound, Some((Ipv4Addr::LOCALHOST, port).into()));
    }

    #[test]
    fn the_route_tells_its_mtu() {
        let underlay = any().unwrap();
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        // 65,536 does not fit; more than any datagram is as good.
        assert_eq!(underlay.path_mtu(local), Some(u16::MAX));
        assert_eq!(underlay.path_source(local), Some(local.ip()));
    }

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
