//! Two hosts with a cable between them, each with a domain, all of them network namespaces without a name: they are gone
//! when the last descriptor is, however the test ends.

#![allow(dead_code, unreachable_pub)]

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use weft_carrier::{
    Carrier, CarrierConfig, CarrierError, CarrierEvent, Descriptors, PeerEntry, PeerTable,
};
use weft_core::crypto::{Cipher, Secret};
use weft_core::layout;
use weft_core::model::{AddressPlan, ClusterId, NodeId};
use weft_core::session::transport::{Transport, TransportKeys};
use weft_core::underlay::Offload;
use weft_core::view::PeerNumber;

pub const PORT: u16 = 6783;
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace.
pub struct Netns(OwnedFd);

impl Netns {
    pub fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            Self(File::open("/proc/thread-self/ns/net").unwrap().into())
        })
        .join()
        .unwrap()
    }

    pub fn fd(&self) -> OwnedFd {
        self.0.try_clone().unwrap()
    }

    /// Runs `work` on a thread inside. Sockets that it makes stay inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
                .unwrap()
        })
    }

    /// Runs one `ip` command line inside.
    pub fn ip(&self, line: &str) -> String {
        let output = self.run(|| Command::new("ip").args(line.split_whitespace()).output());
        let output = output.expect("these tests need iproute2");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {line}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(path, value)).unwrap();
    }

    pub fn udp(&self, addr: &str) -> UdpSocket {
        let socket = self.run(|| UdpSocket::bind(addr)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// One host.
pub struct Side {
    pub host: Netns,
    pub domain: Netns,
    pub carrier: Option<Carrier>,
    pub events: Receiver<CarrierEvent>,
    pub me: NodeId,
    pub underlay4: Ipv4Addr,
    pub underlay6: Ipv6Addr,
    pub overlay: Ipv4Addr,
    /// What it calls the other.
    pub number: PeerNumber,
    /// Offloads that it does without from its next start on.
    pub no_offload: Vec<Offload>,
    /// Its end of the present session.
    pub transport: Option<Arc<Transport>>,
}

/// Which IP version the underlay is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Under {
    V4,
    V6,
}

pub struct Pair {
    pub a: Side,
    pub b: Side,
    pub plan: AddressPlan,
    pub under: Under,
    sessions: u8,
}

impl Side {
    fn new(id: u8, overlay: Ipv4Addr, number: u16) -> Self {
        let mut side = Self {
            host: Netns::new(),
            domain: Netns::new(),
            carrier: None,
            events: mpsc::channel().1,
            me: NodeId([id; 32]),
            underlay4: Ipv4Addr::new(192, 0, 2, id),
            underlay6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, id.into()),
            overlay,
            number: PeerNumber(number),
            no_offload: Vec::new(),
            transport: None,
        };
        side.start();
        side
    }

    /// Starts the carrier, the first time or again.
    pub fn start(&mut self) {
        self.start_with(Descriptors::default());
    }

    /// The same with what one before it had open.
    pub fn start_with(&mut self, mut given: Descriptors) {
        self.carrier = None;
        let (sender, events) = mpsc::channel();
        let mut start = || {
            let sender = sender.clone();
            let config = CarrierConfig {
                no_offload: self.no_offload.clone(),
                given: std::mem::take(&mut given),
                ..CarrierConfig::new(self.domain.fd(), PORT)
            };
            Carrier::start(config, Box::new(move |event| drop(sender.send(event))))
        };
        let end = Instant::now() + PATIENCE;
        let carrier = loop {
            match self.host.run(&mut start) {
                // For an instant the programs that other tests start hold copies of all descriptors.
                Err(CarrierError::PortTaken { .. }) if Instant::now() < end => {}
                started => break started.unwrap(),
            }
        };
        self.carrier = Some(carrier);
        self.events = events;
    }

    /// As the core does, in the host's namespace.
    pub fn set_table(&self, table: PeerTable) {
        let carrier = self.carrier();
        self.host.run(|| carrier.set_table(table));
    }

    pub fn carrier(&self) -> &Carrier {
        self.carrier.as_ref().unwrap()
    }

    pub fn addr(&self, under: Under) -> SocketAddr {
        match under {
            Under::V4 => (self.underlay4, PORT).into(),
            Under::V6 => (self.underlay6, PORT).into(),
        }
    }

    /// Waits for an event that `wanted` says yes to.
    pub fn event(&self, wanted: impl Fn(&CarrierEvent) -> bool) -> CarrierEvent {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect("no such event");
            if wanted(&event) {
                return event;
            }
        }
    }

    fn plug(&self, device: &str) {
        self.host.ip("link set lo up");
        self.host
            .ip(&format!("addr add {}/24 dev {device}", self.underlay4));
        self.host.ip(&format!(
            "addr add {}/64 dev {device} nodad",
            self.underlay6
        ));
        self.host.ip(&format!("link set {device} up"));
    }

    /// Routes to the other's overlay addresses, as the kernel room makes them.
    pub fn route_to(&self, other: Ipv4Addr, plan: &AddressPlan, mtu: u16) {
        let domain = &self.domain;
        let gateway = layout::peer_link_local(self.number);
        let mac = layout::mac_text(layout::peer_mac(self.number));
        let (me, me6, other6) = (self.overlay, plan.v6(self.overlay), plan.v6(other));
        domain.ip("link set lo up");
        domain.ip(&format!("addr replace {me}/32 dev lo"));
        domain.ip(&format!("addr replace {me6}/128 dev lo nodad"));
        domain.ip(&format!(
            "neigh replace {gateway} lladdr {mac} dev wu0 nud permanent"
        ));
        domain.ip(&format!(
            "route replace {other}/32 via inet6 {gateway} dev wu0 src {me} mtu {mtu}"
        ));
        domain.ip(&format!(
            "route replace {other6}/128 via {gateway} dev wu0 src {me6} mtu {mtu}"
        ));
    }
}

impl Pair {
    /// Two hosts that reach each other; no session yet.
    pub fn new(under: Under) -> Self {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap();
        let a = Side::new(1, Ipv4Addr::new(10, 32, 0, 1), 5);
        let b = Side::new(2, Ipv4Addr::new(10, 33, 0, 1), 9);
        a.host.ip(&format!(
            "link add cable type veth peer name cable netns {}",
            b.host.path()
        ));
        for (side, other) in [(&a, &b), (&b, &a)] {
            side.plug("cable");
            side.domain.sysctl("ipv4/conf/all/rp_filter", "0");
            side.domain.sysctl("ipv4/conf/wu0/rp_filter", "0");
            side.route_to(other.overlay, &plan, 1380);
        }
        // A's prefix is its own /16 and nothing else; B's the next.
        Self {
            a,
            b,
            plan,
            under,
            sessions: 0,
        }
    }

    /// Both tables, before there is a session.
    pub fn know(&self) {
        self.a.set_table(self.table(&self.a, &self.b));
        self.b.set_table(self.table(&self.b, &self.a));
    }

    /// A new session between the two, under new keys and indices, known to both.
    pub fn connect(&mut self) {
        self.sessions += 1;
        let n = self.sessions;
        let keys = |send: u8, receive: u8| TransportKeys {
            esp: None,
            cipher: Cipher::Aes256Gcm,
            send: Secret::new([send; 32]),
            receive: Secret::new([receive; 32]),
        };
        let (at_a, at_b) = (u32::from(n) * 100, u32::from(n) * 100 + 1);
        let ours = Transport::new(self.b.me, at_a, at_b, &keys(2 * n, 2 * n + 1));
        let theirs = Transport::new(self.a.me, at_b, at_a, &keys(2 * n + 1, 2 * n));
        self.a.transport = Some(Arc::new(ours));
        self.b.transport = Some(Arc::new(theirs));
        let b_table = self.table(&self.b, &self.a);
        self.b.set_table(b_table);
        let a_table = self.table(&self.a, &self.b);
        self.a.set_table(a_table);
    }

    fn table(&self, of: &Side, other: &Side) -> PeerTable {
        let transport = of.transport.clone();
        let prefix = format!("{}/16", other.overlay).parse::<ipnet::Ipv4Net>();
        PeerTable {
            me: of.me,
            relays: false,
            plan: self.plan,
            peers: vec![PeerEntry {
                number: of.number,
                id: other.me,
                transport: transport.clone(),
                path: Some(other.addr(self.under).into()),
                prefixes: vec![prefix.unwrap().trunc()],
                mtu: Some(1380),
            }],
            receivers: transport.into_iter().collect(),
            guests: Vec::new(),
            guard: None,
        }
    }
}
