//! The underlay: one UDP socket per IP version on one port, in the host's namespace.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::error::CarrierError;
use crate::sys;

/// Room for what comes while the threads are busy: at 10 Gbit/s some 6 ms.
const SOCKET_BUFFER: libc::c_int = 8 << 20;
/// How long a full socket is waited for: longer than any queue should be, shorter than anybody's patience.
const SEND_PATIENCE_MS: i32 = 100;

/// One socket and what it can do.
#[derive(Debug)]
pub(crate) struct UdpPort {
    socket: Socket,
    /// Replaced when segmentation was given up for no good reason.
    state: ArcSwap<UdpSocketState>,
}

impl UdpPort {
    fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&SockAddr::from(addr))?;
        grow(&socket, libc::SO_RCVBUFFORCE, Socket::set_recv_buffer_size);
        grow(&socket, libc::SO_SNDBUFFORCE, Socket::set_send_buffer_size);
        let state = ArcSwap::from_pointee(UdpSocketState::new((&socket).into())?);
        Ok(Self { socket, state })
    }

    /// How many datagrams one send may carry.
    pub(crate) fn max_run(&self) -> usize {
        self.state.load().max_gso_segments().max(1)
    }

    /// Sends `run`: datagrams of `stride` octets, the last perhaps shorter. Waits for room.
    pub(crate) fn send(&self, to: SocketAddr, run: &[u8], stride: usize) -> io::Result<()> {
        for part in run.chunks(stride * self.max_run()) {
            let result = self.send_part(to, part, stride);
            if result.is_err() && part.len() > stride && self.max_run() == 1 {
                self.send_one_by_one(to, part, stride)?;
            } else {
                result?;
            }
        }
        Ok(())
    }

    /// The kernel refused to cut, and quinn-udp won't ask it again.
    fn send_one_by_one(&self, to: SocketAddr, part: &[u8], stride: usize) -> io::Result<()> {
        let result = part
            .chunks(stride)
            .try_for_each(|one| self.send_part(to, one, stride));
        // Linux before 6.13 says EINVAL to a run of datagrams that are too large: nothing is wrong with segmentation then.
        let too_large = |err: &io::Error| err.raw_os_error() == Some(libc::EMSGSIZE);
        if result.as_ref().is_err_and(too_large) {
            let state = UdpSocketState::new((&self.socket).into())?;
            self.state.store(Arc::new(state));
        }
        result
    }

    fn send_part(&self, to: SocketAddr, part: &[u8], stride: usize) -> io::Result<()> {
        let transmit = transmit(to, part, stride);
        loop {
            match self.state.load().try_send((&self.socket).into(), &transmit) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    if !sys::wait_writable(self.socket.as_fd(), SEND_PATIENCE_MS)? {
                        return Err(err);
                    }
                }
                other => return other,
            }
        }
    }

    /// Sends one datagram or fails at once: for the core, which does not wait.
    pub(crate) fn send_now(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        self.state.load().try_send(
            (&self.socket).into(),
            &transmit(to, datagram, datagram.len()),
        )
    }

    /// Receives what is there.
    pub(crate) fn receive(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.state.load().recv((&self.socket).into(), buffers, meta)
    }
}

impl AsFd for UdpPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn transmit(to: SocketAddr, contents: &[u8], stride: usize) -> Transmit<'_> {
    Transmit {
        destination: to,
        ecn: None,
        contents,
        segment_size: Some(stride),
        src_ip: None,
    }
}

/// Beyond the system's limit if we may (CAP_NET_ADMIN), else up to it.
fn grow(socket: &Socket, force: libc::c_int, polite: fn(&Socket, usize) -> io::Result<()>) {
    if sys::set_option(socket.as_fd(), libc::SOL_SOCKET, force, SOCKET_BUFFER).is_err() {
        // A smaller buffer loses more in bursts, and that is all it does.
        let _ = polite(socket, SOCKET_BUFFER as usize);
    }
}

/// Both sockets, and what asks the kernel for the MTU of a path.
#[derive(Debug)]
pub(crate) struct Underlay {
    pub(crate) v4: UdpPort,
    /// `None` where the host has no IPv6.
    pub(crate) v6: Option<UdpPort>,
    port: u16,
    probes: Mutex<(Socket, Option<Socket>)>,
}

impl Underlay {
    /// Opens `port` on both IP versions in the calling thread's namespace.
    pub(crate) fn bind(port: u16, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Self, CarrierError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => CarrierError::PortTaken { port },
            _ => CarrierError::Bind { port, source },
        };
        let v4 = UdpPort::bind((v4, port).into()).map_err(failed)?;
        // Port 0 means any, but the same for both.
        let port = local_port(&v4.socket).map_err(failed)?;
        let v6 = match UdpPort::bind((v6, port).into()) {
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
            probes: Mutex::new(probes),
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The socket that reaches `to`.
    pub(crate) fn towards(&self, to: SocketAddr) -> io::Result<&UdpPort> {
        match to {
            SocketAddr::V4(_) => Ok(&self.v4),
            SocketAddr::V6(_) => self
                .v6
                .as_ref()
                .ok_or_else(|| io::Error::from(io::ErrorKind::AddrNotAvailable)),
        }
    }

    /// MTU of the kernel's route to `to`, learnt "packet too big" messages included.
    pub(crate) fn path_mtu(&self, to: SocketAddr) -> Option<u16> {
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
        Some(u16::try_from(mtu).unwrap_or(u16::MAX))
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

    fn any() -> Result<Underlay, CarrierError> {
        Underlay::bind(0, Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)
    }

    #[test]
    fn a_taken_port_is_said_to_be_taken() {
        let first = any().unwrap();
        let again = Underlay::bind(first.port(), Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
        assert!(matches!(again, Err(CarrierError::PortTaken { port }) if port == first.port()));
    }

    #[test]
    fn the_route_tells_its_mtu() {
        let underlay = any().unwrap();
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        // 65,536 does not fit; more than any datagram is as good.
        assert_eq!(underlay.path_mtu(local), Some(u16::MAX));
    }

    #[test]
    fn a_run_arrives_as_single_datagrams() {
        let (a, b) = (any().unwrap(), any().unwrap());
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let run: Vec<u8> = (0..5).flat_map(|n| [n; 1000]).chain([9; 10]).collect();
        a.v4.send(to, &run, 1000).unwrap();
        let mut got = Vec::new();
        while got.len() < run.len() {
            let mut buffer = vec![0; 65536];
            let mut meta = [RecvMeta::default()];
            assert_eq!(sys::wait_readable([b.v4.as_fd()], 2000).unwrap(), [true]);
            let count =
                b.v4.receive(&mut [IoSliceMut::new(&mut buffer)], &mut meta)
                    .unwrap();
            assert_eq!(count, 1);
            assert!(meta[0].stride == 1000 || meta[0].len == 10);
            got.extend_from_slice(&buffer[..meta[0].len]);
        }
        assert_eq!(got, run);
    }

    #[test]
    fn a_run_too_large_for_the_path_does_not_end_segmentation() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
            let narrow = ["link", "set", "lo", "up", "mtu", "1300"];
            let status = std::process::Command::new("ip").args(narrow).status();
            assert!(status.unwrap().success());
            let underlay = any().unwrap();
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, underlay.port()));
            let before = underlay.v4.max_run();
            let refused = underlay.v4.send(to, &[7; 14_000], 1400).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EMSGSIZE));
            assert_eq!(underlay.v4.max_run(), before);
            underlay.v4.send(to, &[7; 10_000], 1000).unwrap();
        })
        .join()
        .unwrap();
    }
}
