//! The placeholder listener of each published port. It does two things that rules alone can't: binding finds out that
//! somebody else listens there, and it serves the host's own processes (127.0.0.1, ::1 and the host's own addresses)
//! by proxying to the service's VIP. Traffic from outside never reaches it: the host's table translates that before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::debug;
use weft_core::model::Proto;
use weft_core::view::View;
use weft_lb::Published;

use super::relays::Relays;

/// Connections of the host's own processes that are proxied at the same time, per published port.
const MAX_PROXIED: usize = 512;
/// How long the proxy tries to reach the VIP.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Ports that are never published: losing one locks people or weft itself out.
const NEVER: &[u16] = &[22, 6783, 6784, 6785];

/// A place to listen: protocol, address (all when absent), port.
pub(crate) type Place = (Proto, Option<IpAddr>, u16);

enum Held {
    Tcp {
        target: SocketAddr,
        task: JoinHandle<()>,
        /// The same that the task has, for a successor.
        listener: Socket,
    },
    /// Bound and never read: it only keeps the port.
    Udp { socket: Socket },
}

/// All placeholders of this host.
#[derive(Default)]
pub(crate) struct Placeholders {
    held: BTreeMap<Place, Held>,
    conflicts: BTreeMap<Place, String>,
    /// Of the daemon before this one, until the first look at what is published.
    given: BTreeMap<Place, OwnedFd>,
    relays: Relays,
}

impl Placeholders {
    /// Begins with the listeners of a predecessor: who comes meanwhile waits at them. `relays` counts what they carry.
    pub(super) fn with(given: BTreeMap<Place, OwnedFd>, relays: Relays) -> Self {
        Self {
            given,
            relays,
            ..Self::default()
        }
    }

    /// Counts the connections that are carried.
    pub(super) fn relays(&self) -> Relays {
        self.relays.clone()
    }

    /// All listeners once more, for a successor.
    pub(crate) fn descriptors(&self) -> io::Result<BTreeMap<Place, OwnedFd>> {
        let again = |held: &Held| match held {
            Held::Tcp { listener, .. } => listener.as_fd().try_clone_to_owned(),
            Held::Udp { socket } => socket.as_fd().try_clone_to_owned(),
        };
        let held = self.held.iter();
        held.map(|(place, held)| Ok((*place, again(held)?)))
            .collect()
    }

    /// Binds what `view` publishes and lets go of the rest. Conflicts are tried again at every call.
    pub(crate) fn follow(&mut self, view: &View) {
        let wanted = wanted(view);
        self.held
            .retain(|place, held| wanted.contains_key(place) && held.serves(wanted.get(place)));
        self.conflicts.clear();
        for (place, target) in wanted {
            if self.held.contains_key(&place) {
                continue;
            }
            match hold(place, target, self.given.remove(&place), &self.relays) {
                Ok(held) => drop(self.held.insert(place, held)),
                Err(owner) => drop(self.conflicts.insert(place, owner)),
            }
        }
        self.given.clear();
    }

    /// The places that this host really serves.
    pub(crate) fn published(&self) -> BTreeSet<Published> {
        let held = self.held.keys();
        held.map(|(proto, addr, port)| Published {
            proto: *proto,
            addr: *addr,
            port: *port,
        })
        .collect()
    }

    /// The places that somebody else holds, and who.
    pub(crate) fn conflicts(&self) -> Vec<(Proto, u16, String)> {
        self.conflicts
            .iter()
            .map(|((proto, _, port), owner)| (*proto, *port, owner.clone()))
            .collect()
    }

    /// Who else than weft holds one of these places? `None` when all are free or already ours.
    pub(crate) fn owner_of(&self, places: &[Place]) -> Option<String> {
        places
            .iter()
            .filter(|place| !self.held.contains_key(place))
            .find_map(|place| match bind(*place) {
                Ok(_) => None,
                Err(error) => Some(conflict_text(*place, &error)),
            })
    }
}

impl Held {
    fn serves(&self, wanted: Option<&SocketAddr>) -> bool {
        match self {
            Held::Tcp { target, .. } => wanted == Some(target),
            Held::Udp { .. } => wanted.is_some(),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Held::Tcp { task, .. } = self {
            task.abort();
        }
    }
}

/// Ports that may not be published, with the reason.
pub(crate) fn refuse_reserved(
    places: &[Place],
    own_port: u16,
    own_tcp: Option<u16>,
) -> Result<(), String> {
    let is_own = |(proto, _, port): &&Place| {
        let by_tcp = *proto == Proto::Tcp && own_tcp == Some(*port);
        NEVER.contains(port) || *port == own_port || by_tcp
    };
    match places.iter().find(is_own) {
        Some((_, _, 22)) => {
            Err("port 22 can't be published: it would lock you out of every host's ssh".to_owned())
        }
        Some((_, _, port)) => Err(format!("port {port} is weft's own and can't be published")),
        None => Ok(()),
    }
}

fn wanted(view: &View) -> BTreeMap<Place, SocketAddr> {
    let mut places = BTreeMap::new();
    for service in &view.services {
        for port in &service.ports {
            for publish in &port.publish {
                let target = SocketAddr::new(IpAddr::V4(service.vip), port.port);
                places
                    .entry((port.proto, publish.addr, publish.port))
                    .or_insert(target);
            }
        }
    }
    places
}

fn hold(
    place: Place,
    target: SocketAddr,
    given: Option<OwnedFd>,
    relays: &Relays,
) -> Result<Held, String> {
    let failed = |error: io::Error| conflict_text(place, &error);
    let socket = given
        .map(Socket::from)
        .map_or_else(|| bind(place), Ok)
        .map_err(failed)?;
    match place.0 {
        Proto::Udp => Ok(Held::Udp { socket }),
        Proto::Tcp => {
            socket.listen(128).map_err(failed)?;
            let listener = socket.try_clone().map_err(failed)?;
            let served = TcpListener::from_std(socket.into()).map_err(failed)?;
            Ok(Held::Tcp {
                target,
                task: tokio::spawn(proxy(served, target, relays.clone())),
                listener,
            })
        }
    }
}

fn bind((proto, addr, port): Place) -> io::Result<Socket> {
    let any6 = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    match addr {
        Some(addr) => bind_one(proto, addr, port),
        // One socket for both families; without IPv6 in the kernel, IPv4 alone.
        None => match bind_one(proto, any6, port) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                bind_one(proto, IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
            }
            other => other,
        },
    }
}

fn bind_one(proto: Proto, addr: IpAddr, port: u16) -> io::Result<Socket> {
    let (kind, protocol) = match proto {
        Proto::Tcp => (Type::STREAM, Protocol::TCP),
        Proto::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(
        Domain::for_address(SocketAddr::new(addr, port)),
        kind,
        Some(protocol),
    )?;
    if addr == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    } else if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    match proto {
        // Connections of a former listener in TIME_WAIT don't matter; a present listener still refuses.
        Proto::Tcp => socket.set_reuse_address(true)?,
        // Nobody reads it: keep what strays in small.
        Proto::Udp => socket.set_recv_buffer_size(1)?,
    }
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(SocketAddr::new(addr, port)))?;
    Ok(socket)
}

async fn proxy(listener: TcpListener, target: SocketAddr, relays: Relays) {
    let places = Arc::new(Semaphore::new(MAX_PROXIED));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                debug!(%error, "placeholder can't accept");
                // Out of descriptors: the next accept would fail at once as well.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let relayed = relays.begin();
        tokio::spawn(async move {
            if let Err(error) = relay(client, target).await {
                debug!(%error, %target, "placeholder could not relay");
            }
            drop((place, relayed));
        });
    }
}

async fn relay(mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let mut server = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await??;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

fn conflict_text(place: Place, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse {
        return owner(place.0, place.2)
            .unwrap_or_else(|| "a process that can't be seen from here".to_owned());
    }
    format!("nobody, but the kernel refuses it ({error})")
}

/// Who listens on this port, as `name (pid N)`.
fn owner(proto: Proto, port: u16) -> Option<String> {
    let inodes: Vec<String> = ["", "6"]
        .iter()
        .flat_map(|family| listening_inodes(proto, family, port))
        .collect();
    let processes = fs::read_dir("/proc").ok()?;
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find_map(|pid| {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
            let holds = descriptors.flatten().any(|fd| {
                fs::read_link(fd.path()).is_ok_and(|link| {
                    inodes
                        .iter()
                        .any(|inode| link.as_os_str() == inode.as_str())
                })
            });
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            holds.then(|| format!("{} (pid {pid})", name.trim_end()))
        })
}

/// Rows of `/proc/net/{tcp,udp}[6]` (proc_net_tcp.txt): local address, state and inode are columns 1, 3 and 9.
fn listening_inodes(proto: Proto, family: &str, port: u16) -> Vec<String> {
    let table =
        fs::read_to_string(format!("/proc/thread-self/net/{proto}{family}")).unwrap_or_default();
    let suffix = format!(":{port:04X}");
    let listening = if proto == Proto::Tcp { "0A" } else { "07" };
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            let here = columns.get(1)?.ends_with(&suffix) && *columns.get(3)? == listening;
            here.then(|| format!("socket:[{}]", columns.get(9).unwrap_or(&"")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_somebody_else_holds_is_reported_with_its_owner() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let owner = Placeholders::default()
            .owner_of(&[(Proto::Tcp, None, port)])
            .unwrap();
        assert!(
            owner.contains(&format!("(pid {})", std::process::id())),
            "{owner}"
        );
        drop(taken);
        // A child that another test has just forked holds it for a moment longer.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let owner = || Placeholders::default().owner_of(&[(Proto::Tcp, None, port)]);
        while owner().is_some() {
            assert!(std::time::Instant::now() < end, "{:?}", owner());
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn ports_that_lock_people_out_are_never_published() {
        assert!(refuse_reserved(&[(Proto::Tcp, None, 22)], 6783, None).is_err());
        assert!(refuse_reserved(&[(Proto::Udp, None, 7000)], 7000, None).is_err());
        assert!(refuse_reserved(&[(Proto::Tcp, None, 8080)], 6783, None).is_ok());
        assert!(refuse_reserved(&[(Proto::Tcp, None, 443)], 6783, Some(443)).is_err());
        assert!(refuse_reserved(&[(Proto::Udp, None, 443)], 6783, Some(443)).is_ok());
    }
}
