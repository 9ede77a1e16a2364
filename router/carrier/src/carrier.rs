//! The handle: starts the threads, gives them their table, and stops them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use weft_core::layout;
use weft_core::underlay::{Dscp, Offload, UnderlayAddr};

use crate::batch::Run;
use crate::counters::{Counters, PeerTraffic};
use crate::descriptors::Descriptors;
use crate::error::CarrierError;
use crate::offload::Offloads;
use crate::readiness::{Readiness, Source};
use crate::reception::Reception;
use crate::shared::{CarrierEvent, Shared};
use crate::source_ports::MAX_SOURCE_PORTS;
use crate::table::{PeerTable, States, Table};
use crate::tap::Tap;
use crate::tcp::{Streams, stream_loop};
use crate::threads::{Helper, Waker, receive_further, receive_loop, send_loop};
use crate::underlay::{Family, SocketId, Underlay};

/// What the carrier is started with.
#[derive(Debug)]
pub struct CarrierConfig {
    /// The domain's network namespace.
    pub domain: OwnedFd,
    /// Name of the TAP there.
    pub tap_name: String,
    /// MTU of the TAP.
    pub mtu: u32,
    /// UDP port; 0 takes any.
    pub port: u16,
    /// Listen for TCP connections on this port.
    pub tcp_port: Option<u16>,
    /// Local IPv4 address; unspecified takes all.
    pub bind_v4: Ipv4Addr,
    /// Local IPv6 address; unspecified takes all.
    pub bind_v6: Ipv6Addr,
    /// What the underlay sees of the inner packets' classes of service.
    pub dscp: Dscp,
    /// Offloads that are not to be used.
    pub no_offload: Vec<Offload>,
    /// Source ports that flows are spread over, the port itself among them: 1 to [`MAX_SOURCE_PORTS`].
    pub source_ports: u8,
    /// Of a carrier that has stopped. What of it does not fit the above is closed, and opened anew.
    pub given: Descriptors,
}

impl CarrierConfig {
    /// As hosts are usually set up: `wu0` in `domain`, `port` on all addresses.
    pub fn new(domain: OwnedFd, port: u16) -> Self {
        Self {
            domain,
            tap_name: layout::UDP_CARRIER.to_owned(),
            mtu: layout::DEVICE_MTU,
            port,
            tcp_port: None,
            bind_v4: Ipv4Addr::UNSPECIFIED,
            bind_v6: Ipv6Addr::UNSPECIFIED,
            dscp: Dscp::default(),
            no_offload: Vec::new(),
            source_ports: 1,
            given: Descriptors::default(),
        }
    }
}

struct Worker {
    thread: JoinHandle<()>,
    waker: Arc<Waker>,
}

/// The running carrier. Dropping it stops the threads and closes the sockets and the TAP; the device stays.
pub struct Carrier {
    shared: Arc<Shared>,
    underlay: Arc<Underlay>,
    tap: Arc<Tap>,
    states: Mutex<States>,
    workers: Vec<Worker>,
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier")
            .field("port", &self.port())
            .finish_non_exhaustive()
    }
}

impl Carrier {
    /// Opens the sockets in the namespace of the calling thread and the TAP in the domain's, and starts the threads.
    /// `events` is called from them: it hands on and returns.
    pub fn start(
        config: CarrierConfig,
        events: Box<dyn Fn(CarrierEvent) + Send + Sync>,
    ) -> Result<Self, CarrierError> {
        let Descriptors { tap, v4, v6, tcp } = config.given;
        let addresses = (config.bind_v4, config.bind_v6);
        let (streams, poll) = Streams::open(config.tcp_port, addresses, tcp)?;
        let mut underlay = Underlay::bind(config.port, addresses, (v4, v6), streams)?;
        underlay.open_source_ports(config.source_ports.min(MAX_SOURCE_PORTS), addresses)?;
        let tap = Tap::open(&config.domain, &config.tap_name, config.mtu, tap)?;
        let offloads = Offloads::new(&config.no_offload);
        underlay.use_offloads(&offloads);
        tap.use_offloads(&offloads)?;
        let shared = Shared::new(events, config.dscp, offloads)
            .with_further_ports(underlay.further_source_ports());
        let mut carrier = Self {
            shared: Arc::new(shared),
            underlay: Arc::new(underlay),
            tap: Arc::new(tap),
            states: Mutex::default(),
            workers: Vec::new(),
        };
        carrier.spawn_threads(poll)?;
        Ok(carrier)
    }

    /// What the next one can be given, once this one has stopped.
    pub fn descriptors(&self) -> io::Result<Descriptors> {
        let (v4, v6) = self.underlay.sockets()?;
        Ok(Descriptors {
            tap: Some(self.tap.queue()?),
            v4: Some(v4),
            v6,
            tcp: self.underlay.streams.listeners()?,
        })
    }

    fn spawn_threads(&mut self, poll: mio::Poll) -> Result<(), CarrierError> {
        let (tap, underlay) = (self.tap.clone(), self.underlay.clone());
        self.spawn("weft-tcp", move |shared, waker| {
            stream_loop(shared, &tap, &underlay, poll, waker);
        })?;
        for source in 1..=self.underlay.further_source_ports() {
            for family in Family::ALL {
                self.spawn_further(family, source)?;
            }
        }
        // All that the sender waits for while it is alone.
        let all = Arc::new(Readiness::new().map_err(CarrierError::Threads)?);
        all.add(&*self.tap, Source::Tap)
            .map_err(CarrierError::Threads)?;
        let mut helpers = Vec::new();
        for family in Family::ALL {
            helpers.extend(self.spawn_receiver(family, &all)?);
        }
        let (tap, underlay) = (self.tap.clone(), self.underlay.clone());
        self.spawn_reader("weft-send", all, move |shared, reader| {
            send_loop(shared, &tap, &underlay, &helpers, reader);
        })?;
        Ok(())
    }

    /// Reads the sockets of an IP version. `None` where the host has no such sockets.
    fn spawn_receiver(
        &mut self,
        family: Family,
        all: &Arc<Readiness>,
    ) -> Result<Option<Helper>, CarrierError> {
        let Some(socket) = self.underlay.socket(family, 0) else {
            return Ok(None);
        };
        let own = Arc::new(Readiness::new().map_err(CarrierError::Threads)?);
        for readiness in [all, &own] {
            readiness
                .add(socket, Source::Socket(SocketId::main(family)))
                .map_err(CarrierError::Threads)?;
            self.underlay.peers.add_reader(family, readiness.clone());
        }
        let (tap, underlay) = (self.tap.clone(), self.underlay.clone());
        let reception = Arc::new(Mutex::new(Reception::new(&self.shared)));
        let shared_with_sender = reception.clone();
        let waker = self.spawn_reader(receiver_name(family), own, move |shared, reader| {
            receive_loop(shared, &tap, &underlay, &reception, reader);
        })?;
        Ok(Some(Helper {
            family,
            reception: shared_with_sender,
            waker,
        }))
    }

    /// Reads one of the further source ports, if the host has it.
    fn spawn_further(&mut self, family: Family, source: u8) -> Result<(), CarrierError> {
        if self.underlay.socket(family, source).is_none() {
            return Ok(());
        }
        let (tap, underlay) = (self.tap.clone(), self.underlay.clone());
        let reception = Mutex::new(Reception::new(&self.shared));
        self.spawn(receiver_name(family), move |shared, waker| {
            if let Some(socket) = underlay.socket(family, source) {
                receive_further(shared, &tap, &underlay, socket, &reception, waker);
            }
        })?;
        Ok(())
    }

    /// A thread that waits for its waker and for what else `readiness` has.
    fn spawn_reader(
        &mut self,
        name: &str,
        readiness: Arc<Readiness>,
        work: impl FnOnce(&Shared, (&Readiness, &Waker)) + Send + 'static,
    ) -> Result<Arc<Waker>, CarrierError> {
        let own = readiness.clone();
        let waker = self.spawn(name, move |shared, waker| work(shared, (&own, waker)))?;
        readiness
            .add(&*waker, Source::Waker)
            .map_err(CarrierError::Threads)?;
        Ok(waker)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce(&Shared, &Waker) + Send + 'static,
    ) -> Result<Arc<Waker>, CarrierError> {
        let waker = Arc::new(Waker::new().map_err(CarrierError::Threads)?);
        let (shared, own_waker) = (self.shared.clone(), waker.clone());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&shared, &own_waker))
            .map_err(CarrierError::Threads)?;
        let worker = Worker {
            thread,
            waker: waker.clone(),
        };
        self.workers.push(worker);
        Ok(waker)
    }

    /// Replaces the whole table; from the next packet on the new one holds.
    pub fn set_table(&self, table: PeerTable) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let table = Table::new(table, &mut states);
        // Still under the lock, so that the last to lay out is the last to be stored.
        self.shared.table.store(Arc::new(table));
        drop(states);
        self.shared.has_table.store(true, Ordering::Release);
        self.wake();
        self.keep_peer_sockets(false);
    }

    /// To be called every few seconds, as the host's addresses and routes may have changed: what is sent from an address
    /// that was the right one before is sent from the right one again.
    pub fn follow_routes(&self) {
        self.keep_peer_sockets(true);
    }

    fn keep_peer_sockets(&self, ask_routes: bool) {
        let addresses: Vec<_> = self.shared.table.load().udp_addresses().collect();
        self.underlay.keep_peer_sockets(&addresses, ask_routes);
    }

    /// Sends one datagram as it is: handshakes and what the core has sealed.
    /// Where it goes by TCP and there is no connection yet, one is made, and it waits for that.
    pub fn send(&self, to: UnderlayAddr, datagram: &[u8]) -> io::Result<()> {
        match to {
            UnderlayAddr::Udp(to) => self.underlay.towards(to)?.send_now(to, datagram),
            UnderlayAddr::Tcp(to) => {
                let run = Run::of_one(datagram);
                self.underlay.streams.send_or_dial(to, run)
            }
        }
    }

    /// MTU of the underlay's route to `to`, outer IP header included; "packet too big" messages count.
    pub fn path_mtu(&self, to: SocketAddr) -> Option<u16> {
        self.underlay.path_mtu(to)
    }

    /// The host's own address from which it sends to `to`, as far as the route says.
    pub fn path_source(&self, to: SocketAddr) -> Option<IpAddr> {
        self.underlay.path_source(to)
    }

    /// The UDP port in use.
    pub fn port(&self) -> u16 {
        self.underlay.port()
    }

    /// Does the underlay have IPv6?
    pub fn has_v6(&self) -> bool {
        self.underlay.v6.is_some()
    }

    /// Drops, and traffic of the peers in the present table.
    pub fn counters(&self) -> Counters {
        let table = self.shared.table.load();
        Counters {
            drops: self.shared.drops.read(),
            offloads: self.shared.offloads.read(),
            peers: table
                .peers
                .iter()
                .map(|peer| PeerTraffic {
                    gso: peer.state.gso.state(),
                    source_ports: peer.state.source_ports.count(),
                    ..peer.state.traffic.read(peer.number)
                })
                .collect(),
        }
    }

    /// Stops the threads and waits for them. What they had not sent is lost.
    pub fn stop(self) {
        drop(self);
    }

    fn wake(&self) {
        for worker in &self.workers {
            worker.waker.wake();
        }
    }
}

fn receiver_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "weft-receive4",
        Family::V6 => "weft-receive6",
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wake();
        for worker in self.workers.drain(..) {
            // A thread that panicked has nothing more to stop.
            let _ = worker.thread.join();
        }
    }
}
