//! The underlay: one UDP socket per IP version on one port, in the host's namespace, and further ones for peers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use weft_core::underlay::{Offload, OffloadState};

use crate::batch::{Run, Sent};
use crate::error::CarrierError;
use crate::offload::Offloads;
use crate::peer_sockets::{PeerSocket, PeerSockets};
use crate::source_ports::SourcePort;
use crate::sys;
use crate::tcp::Streams;
use crate::udp::UdpPort;

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Family; 2] = [Family::V4, Family::V6];

    pub(crate) fn of(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        }
    }
}

/// The name of one of the sockets that are bound to the port itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketId {
    pub(crate) family: Family,
    /// 0 for the one that hears everybody.
    pub(crate) place: u32,
}

impl SocketId {
    /// The socket for everybody.
    pub(crate) fn main(family: Family) -> Self {
        Self { family, place: 0 }
    }

    pub(crate) fn to_number(self) -> u64 {
        u64::from(self.place) << 1 | u64::from(self.family == Family::V6)
    }

    /// Of what [`SocketId::to_number`] gave.
    pub(crate) fn from_number(number: u64) -> Self {
        let family = match number & 1 {
            0 => Family::V4,
            _ => Family::V6,
        };
        Self {
            family,
            place: (number >> 1) as u32,
        }
    }
}

/// One of them, while it is used.
#[derive(Debug)]
pub(crate) enum Held<'a> {
    Main(&'a UdpPort),
    Peer(Arc<PeerSocket>),
}

impl Deref for Held<'_> {
    type Target = UdpPort;

    fn deref(&self) -> &UdpPort {
        match self {
            Held::Main(port) => port,
            Held::Peer(socket) => socket,
        }
    }
}

/// The sockets, and what asks the kernel for the MTU of a path.
#[derive(Debug)]
pub(crate) struct Underlay {
    pub(crate) v4: UdpPort,
    /// `None` where the host has no IPv6.
    pub(crate) v6: Option<UdpPort>,
    /// Further ones on the same port.
    pub(crate) peers: PeerSockets,
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
        let port = v4.local_addr().map(|addr| addr.port()).map_err(failed)?;
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
            peers: PeerSockets::default(),
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
        let refused = self.ports().any(|port| port.join_received(joins).is_err())
            || self.peers.join_received(joins).is_err();
        if joins && refused {
            offloads.step_down(Offload::Gro, OffloadState::Absent);
        }
    }

    /// Both sockets once more.
    pub(crate) fn sockets(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let again = |port: &UdpPort| port.as_fd().try_clone_to_owned();
        Ok((again(&self.v4)?, self.v6.as_ref().map(again).transpose()?))
    }

    /// Sends a run from this source port. Waits for room.
    pub(crate) fn send_run(&self, to: SocketAddr, source: u8, run: Run<'_>) -> io::Result<Sent> {
        match self.peers_own(to, source).map(|own| own.send(to, run)) {
            Some(Ok(sent)) => Ok(sent),
            // It has waited long enough already.
            Some(Err(full)) if full.kind() == io::ErrorKind::WouldBlock => Err(full),
            // Whatever it is, from an ICMP message of before to an address that the host has no longer: it may be this
            // socket's trouble alone.
            Some(Err(_)) | None => self.leaving(to, source)?.send(to, run),
        }
    }

    /// Was too much waiting behind what sends there? Says so once.
    pub(crate) fn was_congested(&self, to: SocketAddr, source: u8) -> bool {
        let own = self.peers_own(to, source);
        own.is_some_and(|own| own.take_congestion())
            || self.leaving(to, source).is_ok_and(UdpPort::take_congestion)
    }

    /// The peer's own socket is on the port itself.
    fn peers_own(&self, to: SocketAddr, source: u8) -> Option<Arc<PeerSocket>> {
        (source == 0).then(|| self.peers.towards(to)).flatten()
    }

    /// Sockets of their own for these addresses, and for no other; with `ask_routes` none that sends from an address that
    /// the host does not send from any more.
    pub(crate) fn keep_peer_sockets(&self, wanted: &[SocketAddr], ask_routes: bool) {
        let everybody = |to| self.socket(Family::of(to), 0);
        let source = |to| self.path_source(to);
        self.peers.keep(wanted, everybody, source, ask_routes);
    }

    /// One of the port's own, if it is there still.
    pub(crate) fn held(&self, id: SocketId) -> Option<Held<'_>> {
        match id.place {
            0 => self.socket(id.family, 0).map(Held::Main),
            _ => self.peers.get(id).map(Held::Peer),
        }
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

fn has_no_ipv6(err: &io::Error) -> bool {
    let errno = err.raw_os_error();
    errno == Some(libc::EAFNOSUPPORT) || errno == Some(libc::EADDRNOTAVAIL)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::IoSliceMut;

    use quinn_udp::RecvMeta;

    use crate::unused_port::{unused_port, wait_until_unused};

    const LOOPBACK: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);

    fn streams() -> Streams {
        Streams::open(None, LOOPBACK, Vec::new()).unwrap().0
    }

    pub(crate) fn any() -> Result<Underlay, CarrierError> {
        any_on(LOOPBACK)
    }

    pub(crate) fn any_on(addresses: (Ipv4Addr, Ipv6Addr)) -> Result<Underlay, CarrierError> {
        Underlay::bind(unused_port(), addresses, (None, None), streams())
    }

    pub(crate) fn run_of(octets: &[u8], stride: usize) -> Run<'_> {
        Run {
            octets,
            stride,
            tos: 0,
        }
    }

    /// What comes next, as the kernel hands it out: its octets, the length of each datagram in it, and their mark.
    pub(crate) fn received(port: &UdpPort) -> (Vec<u8>, usize, u8) {
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
        let bound = next.v4.local_addr().unwrap();
        assert_eq!(bound, (Ipv4Addr::LOCALHOST, port).into());
    }

    #[test]
    fn the_route_tells_its_mtu() {
        let underlay = any().unwrap();
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        // 65,536 does not fit; more than any datagram is as good.
        assert_eq!(underlay.path_mtu(local), Some(u16::MAX));
        assert_eq!(underlay.path_source(local), Some(local.ip()));
    }
}
