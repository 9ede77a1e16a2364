//! Sockets of their own for the addresses of peers, on the same port as the one that hears everybody. A connected socket
//! keeps the route to its peer, where any other has it looked up for each datagram, and the kernel knows whose a datagram is
//! before it has looked up where that goes. Nothing else depends on them: what comes by the one or the other is read alike,
//! and what can't leave by such a socket leaves by the one for everybody.
//!
//! A connected socket also keeps the host's own address of the time when it was connected. So who has one is gone through
//! when the paths change, and when the host's routes may have: then those are asked whether it still is the right one.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use crate::readiness::{Readiness, Source};
use crate::udp::UdpPort;
use crate::underlay::{Family, SocketId};

/// As many have one. Before Linux 6.13 the kernel goes through all of a port's for each datagram that comes.
const MOST: usize = 32;

/// The socket of one peer's address.
#[derive(Debug)]
pub(crate) struct PeerSocket {
    id: SocketId,
    to: SocketAddr,
    /// The host's own address on the way there, as the route said when it was opened.
    source: Option<IpAddr>,
    port: UdpPort,
}

impl Deref for PeerSocket {
    type Target = UdpPort;

    fn deref(&self) -> &UdpPort {
        &self.port
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct PeerSockets {
    sockets: ArcSwap<Vec<Arc<PeerSocket>>>,
    keeper: Mutex<Keeper>,
    /// Datagrams that come in a row are not to be joined.
    parts: AtomicBool,
}

#[derive(Debug, Default)]
struct Keeper {
    /// The place of the last one that was opened.
    last: u32,
    /// Those who read them.
    readers: Vec<(Family, Arc<Readiness>)>,
}

impl Keeper {
    fn readers(&self, id: SocketId) -> impl Iterator<Item = &Readiness> {
        let of_family = move |(family, _): &&(Family, _)| *family == id.family;
        let readers = self.readers.iter().filter(of_family);
        readers.map(|(_, readiness)| &**readiness)
    }

    /// A name that no other has. After four thousand million of them they come again, long after the first are gone.
    fn next(&mut self, family: Family) -> SocketId {
        self.last = self.last.checked_add(1).unwrap_or(1);
        SocketId {
            family,
            place: self.last,
        }
    }

    /// Has it read from now on.
    fn present(&self, socket: &PeerSocket) -> io::Result<()> {
        self.readers(socket.id)
            .try_for_each(|reader| reader.add(socket.as_fd(), Source::Socket(socket.id)))
    }

    fn forget(&self, socket: &PeerSocket) {
        for reader in self.readers(socket.id) {
            reader.remove(socket.as_fd());
        }
    }
}

impl PeerSockets {
    /// Has those of one IP version read by whoever waits for `readiness`. Before the first is opened.
    pub(crate) fn add_reader(&self, family: Family, readiness: Arc<Readiness>) {
        self.keeper().readers.push((family, readiness));
    }

    /// The socket of an address.
    pub(crate) fn towards(&self, to: SocketAddr) -> Option<Arc<PeerSocket>> {
        self.find(|socket| socket.to == to)
    }

    pub(crate) fn get(&self, id: SocketId) -> Option<Arc<PeerSocket>> {
        self.find(|socket| socket.id == id)
    }

    fn find(&self, is_it: impl Fn(&PeerSocket) -> bool) -> Option<Arc<PeerSocket>> {
        let sockets = self.sockets.load();
        sockets.iter().find(|socket| is_it(socket)).cloned()
    }

    /// Joins datagrams that come in a row, or does not.
    pub(crate) fn join_received(&self, joins: bool) -> io::Result<()> {
        // Whoever is opened later asks under the lock.
        let _keeper = self.keeper();
        self.parts.store(!joins, Ordering::Relaxed);
        let sockets = self.sockets.load();
        sockets.iter().try_for_each(|s| s.join_received(joins))
    }

    /// Has sockets for just these addresses, the first [`MOST`] of them. `everybody` is the socket that hears all others.
    /// With `ask_routes` those are opened anew whose route has another source by now, as `source` says.
    pub(crate) fn keep<'a>(
        &self,
        wanted: &[SocketAddr],
        everybody: impl Fn(SocketAddr) -> Option<&'a UdpPort>,
        source: impl Fn(SocketAddr) -> Option<IpAddr>,
        ask_routes: bool,
    ) {
        let wanted = &wanted[..wanted.len().min(MOST)];
        let is_right = |socket: &PeerSocket| !ask_routes || source(socket.to) == socket.source;
        let stays = |socket: &PeerSocket| wanted.contains(&socket.to) && is_right(socket);
        let mut keeper = self.keeper();
        let before = self.sockets.load_full();
        let (mut sockets, gone): (Vec<_>, Vec<_>) = before.iter().cloned().partition(|s| stays(s));
        for &to in wanted {
            let has_one = sockets.iter().any(|socket| socket.to == to);
            if let Some(everybody) = everybody(to).filter(|_| !has_one) {
                // Where there is none to be had the one for everybody does.
                sockets.extend(self.open(&mut keeper, everybody, (to, source(to))));
            }
        }
        self.sockets.store(Arc::new(sockets));
        for socket in gone {
            keeper.forget(&socket);
        }
    }

    fn open(
        &self,
        keeper: &mut Keeper,
        everybody: &UdpPort,
        (to, source): (SocketAddr, Option<IpAddr>),
    ) -> io::Result<Arc<PeerSocket>> {
        let port = everybody.connected_to(to)?;
        port.join_received(!self.parts.load(Ordering::Relaxed))?;
        let socket = PeerSocket {
            id: keeper.next(Family::of(to)),
            to,
            source,
            port,
        };
        keeper.present(&socket)?;
        Ok(Arc::new(socket))
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use crate::underlay::Underlay;
    use crate::underlay::tests::{any, any_on, received, run_of};

    /// Waits for what a thread of that underlay would: its own, and the peers' sockets.
    fn reader(underlay: &Underlay) -> Arc<Readiness> {
        let readiness = Arc::new(Readiness::new().unwrap());
        for family in Family::ALL {
            let socket = underlay.socket(family, 0).unwrap();
            let main = Source::Socket(SocketId::main(family));
            readiness.add(socket, main).unwrap();
            underlay.peers.add_reader(family, readiness.clone());
        }
        readiness
    }

    /// The place of the one socket that something has come to, and what.
    fn came(underlay: &Underlay, readiness: &Readiness) -> (u32, Vec<u8>) {
        let came = readiness.wait(2000).unwrap();
        let ids: Vec<_> = came.sockets().collect();
        let [id] = ids[..] else {
            panic!("{ids:?}");
        };
        (id.place, received(&underlay.held(id).unwrap()).0)
    }

    fn address(of: &Underlay, family: Family) -> SocketAddr {
        let ip: IpAddr = match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        (ip, of.port()).into()
    }

    #[test]
    fn a_peer_is_heard_and_sent_to_by_its_own_socket_on_the_same_port() {
        for family in Family::ALL {
            let (me, peer, stranger) = (any().unwrap(), any().unwrap(), any().unwrap());
            let readiness = reader(&me);
            let [mine, its] = [&me, &peer].map(|of| address(of, family));
            me.keep_peer_sockets(&[its], false);
            peer.send_run(mine, 0, run_of(b"peer", 4)).unwrap();
            assert_eq!(came(&me, &readiness), (1, b"peer".to_vec()));
            stranger.send_run(mine, 0, run_of(b"other", 5)).unwrap();
            assert_eq!(came(&me, &readiness), (0, b"other".to_vec()));
            // The peer, too, knows it by the address it had.
            let back = reader(&peer);
            peer.keep_peer_sockets(&[mine], false);
            me.send_run(its, 0, run_of(&[7; 300], 100)).unwrap();
            assert_eq!(came(&peer, &back), (1, vec![7; 300]));
            // And for who is a peer no longer the one for everybody is there again.
            me.keep_peer_sockets(&[], false);
            peer.send_run(mine, 0, run_of(b"again", 5)).unwrap();
            assert_eq!(came(&me, &readiness), (0, b"again".to_vec()));
        }
    }

    #[test]
    fn one_socket_stays_as_long_as_its_peer_does_and_only_so_many_have_one() {
        let me = any().unwrap();
        let peers: Vec<SocketAddr> = (1..=60)
            .map(|port| (Ipv4Addr::LOCALHOST, port).into())
            .collect();
        let places = || -> Vec<Option<u32>> {
            let socket = |to: &SocketAddr| Some(me.peers.towards(*to)?.id.place);
            peers.iter().map(socket).collect()
        };
        me.keep_peer_sockets(&peers, false);
        let before = places();
        assert!(before[..MOST].iter().all(Option::is_some));
        assert!(before[MOST..].iter().all(Option::is_none));
        me.keep_peer_sockets(&peers[1..], true);
        let after = places();
        assert_eq!(after[1..MOST], before[1..MOST]);
        assert_eq!((after[0], after[MOST].is_some()), (None, true));
    }

    #[test]
    fn datagrams_are_joined_on_those_that_were_there_and_those_that_come() {
        let (me, peer) = (any().unwrap(), any().unwrap());
        let [mine, its] = [&me, &peer].map(|of| address(of, Family::V4));
        let joined = || {
            peer.send_run(mine, 0, run_of(&[7; 3000], 1000)).unwrap();
            let own = me.peers.towards(its).unwrap();
            let (octets, _, _) = received(&own);
            let is_whole = octets.len() == 3000;
            for _ in 0..if is_whole { 0 } else { 2 } {
                received(&own);
            }
            is_whole
        };
        me.keep_peer_sockets(&[its], false);
        assert!(joined());
        me.peers.join_received(false).unwrap();
        assert!(!joined());
        me.keep_peer_sockets(&[], false);
        me.keep_peer_sockets(&[its], false);
        assert!(!joined());
    }

    #[test]
    fn who_calls_from_another_namespace_gets_none() {
        let (me, peer) = (any().unwrap(), any().unwrap());
        let its = address(&peer, Family::V4);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
                me.keep_peer_sockets(&[its], false);
            });
        });
        assert!(me.peers.towards(its).is_none());
    }

    fn ip(line: &str) {
        let status = Command::new("ip").args(line.split_whitespace()).status();
        assert!(status.unwrap().success(), "ip {line}");
    }

    #[test]
    fn when_the_hosts_own_address_changes_the_new_one_is_sent_from() {
        let scene = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            ip("link set lo up");
            ip("addr add 192.0.2.1/32 dev lo");
            ip("addr add 192.0.2.2/32 dev lo");
            ip("route add local 192.0.2.9 dev lo src 192.0.2.1");
            let everywhere = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
            let (me, peer) = (any_on(everywhere).unwrap(), any_on(everywhere).unwrap());
            let its = SocketAddr::from(([192, 0, 2, 9], peer.port()));
            let seen_from = || {
                me.send_run(its, 0, run_of(b"hello", 5)).unwrap();
                let mut buffer = [0; 10];
                let mut meta = [quinn_udp::RecvMeta::default()];
                let mut buffers = [io::IoSliceMut::new(&mut buffer)];
                crate::sys::wait_readable([peer.v4.as_fd()], 2000).unwrap();
                assert_eq!(peer.v4.receive(&mut buffers, &mut meta).unwrap(), 1);
                meta[0].addr.ip()
            };
            let [first, second] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
            me.keep_peer_sockets(&[its], false);
            assert_eq!(seen_from(), first);
            // Both are there still, so nothing tells but the route.
            ip("route replace local 192.0.2.9 dev lo src 192.0.2.2");
            let place = me.peers.towards(its).unwrap().id.place;
            me.keep_peer_sockets(&[its], true);
            assert_eq!(seen_from(), second);
            let anew = me.peers.towards(its).unwrap().id.place;
            assert_ne!(anew, place);
            me.keep_peer_sockets(&[its], true);
            assert_eq!(me.peers.towards(its).unwrap().id.place, anew);
            // Gone: what its socket can't send, the other does, before anybody has asked.
            ip("route replace local 192.0.2.9 dev lo src 192.0.2.1");
            ip("addr del 192.0.2.2/32 dev lo");
            assert_eq!(seen_from(), first);
        };
        std::thread::spawn(scene).join().unwrap();
    }

    #[test]
    fn an_icmp_message_of_before_costs_no_datagram() {
        let (me, peer) = (any().unwrap(), any().unwrap());
        let its = address(&peer, Family::V4);
        me.keep_peer_sockets(&[its], false);
        drop(peer);
        // Nobody is there: the kernel says so to the socket, and that to the next call.
        let own = me.peers.towards(its).unwrap();
        me.send_run(its, 0, run_of(b"nobody", 6)).unwrap();
        crate::sys::wait_readable([own.as_fd()], 2000).unwrap();
        let (peer, _) = (
            std::net::UdpSocket::bind(its).unwrap(),
            me.send_run(its, 0, run_of(b"hello", 5)).unwrap(),
        );
        let mut buffer = [0; 10];
        assert_eq!(peer.recv(&mut buffer).unwrap(), 5);
    }
}
