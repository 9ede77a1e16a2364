//! A client, a host, its domain, three containers and two peers, each a network namespace; gone when dropped.
//!
//! ```text
//! c 192.0.2.9 --- h 192.0.2.1 --(weft0|wh0)-- d --(wv0..2|eth0)-- b0 b1 b2  10.32.0.10 .11 .12
//!                                             wu0 --- bridge s --- p5, p6: both hold the client 203.0.113.9
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, SockAddr, Socket, Type};
use weft_core::layout::{UDP_CARRIER_MAC, mac_text, peer_link_local, peer_mac, peer_table};
use weft_core::model::{AddressPlan, ClusterId};
use weft_core::view::PeerNumber;

const PATIENCE: Duration = Duration::from_secs(3);
pub(crate) const PEERS: [PeerNumber; 2] = [PeerNumber(5), PeerNumber(6)];
pub(crate) const CLIENT4: &str = "192.0.2.9";
pub(crate) const CLIENT6: &str = "2001:db8::9";
pub(crate) const HOST4: &str = "192.0.2.1";
pub(crate) const HOST6: &str = "2001:db8::1";
/// The client behind both peers.
pub(crate) const FAR4: &str = "203.0.113.9";
pub(crate) const FAR6: &str = "2001:db8:77::9";
/// The host's resolver, which isn't there.
pub(crate) const RESOLVER: &str = "198.51.100.53";

/// One namespace, deleted when dropped.
pub(crate) struct Ns(String);

pub(crate) struct Lab {
    pub(crate) client: Ns,
    pub(crate) host: Ns,
    pub(crate) domain: Ns,
    pub(crate) containers: Vec<Ns>,
    pub(crate) peers: Vec<Ns>,
    _segment: Ns,
    pub(crate) plan: AddressPlan,
}

impl Ns {
    fn new(role: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let ns = Self(format!("weftlb-{}-{n}-{role}", std::process::id()));
        command("ip", &["netns", "add", &ns.0], "");
        let quiet = "net.ipv6.conf.all.accept_dad=0\nnet.ipv6.conf.default.accept_dad=0\n";
        ns.exec("sysctl", &["-q", "-p", "-"], quiet);
        ns.ip("link set lo up\n");
        ns
    }

    /// Lines for `ip`. One that begins with `-4` or `-6` is of that family; `ip` itself takes that only per batch.
    fn ip(&self, lines: &str) {
        let rest = |prefix: &str| -> String {
            let found = lines.lines().filter_map(|l| l.strip_prefix(prefix));
            found.map(|l| format!("{l}\n")).collect()
        };
        let plain: String = lines
            .lines()
            .filter(|l| !l.starts_with('-'))
            .map(|l| format!("{l}\n"))
            .collect();
        command("ip", &["-n", &self.0, "-batch", "-"], &plain);
        for family in ["-4", "-6"] {
            let lines = rest(&format!("{family} "));
            if !lines.is_empty() {
                command("ip", &["-n", &self.0, family, "-batch", "-"], &lines);
            }
        }
    }

    fn exec(&self, program: &str, args: &[&str], stdin: &str) {
        let all = [&["netns", "exec", &self.0, program], args].concat();
        command("ip", &all, stdin);
    }

    /// The table as the daemon applies it: whole, in one transaction.
    pub(crate) fn nft(&self, fragment: &str) {
        let text =
            format!("table inet weft\ndelete table inet weft\ntable inet weft {{\n{fragment}}}\n");
        self.exec("nft", &["-f", "-"], &text);
    }

    /// Runs on a thread of its own inside; sockets made there stay there.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/run/netns/{}", self.0);
        let inside = move || {
            let file = File::open(path).expect("the namespace exists");
            setns(file, CloneFlags::CLONE_NEWNET).expect("tests run as root");
            job()
        };
        thread::spawn(inside).join().expect("the job doesn't panic")
    }

    /// Asks over TCP, from a given address if need be, and returns what the server said.
    pub(crate) fn tcp(&self, from: Option<SocketAddr>, to: SocketAddr) -> io::Result<String> {
        self.run(move || {
            let mut socket = open(from, to, Type::STREAM)?;
            read_line(&mut socket)
        })
    }

    /// Asks over UDP.
    pub(crate) fn udp(&self, from: Option<SocketAddr>, to: SocketAddr) -> io::Result<String> {
        self.run(move || {
            let mut socket = open(from, to, Type::DGRAM)?;
            socket.write_all(b"?")?;
            read_line(&mut socket)
        })
    }

    /// A connected socket to go on with.
    pub(crate) fn connect(&self, from: Option<SocketAddr>, to: SocketAddr, kind: Type) -> Socket {
        self.run(move || open(from, to, kind))
            .expect("a connection")
    }

    /// Says `name` and the client's address to all who come to `port`, over UDP and TCP, for as long as the test lasts.
    pub(crate) fn serve(&self, name: &'static str, port: u16) {
        let (tcp, udp) = self.run(move || {
            let any = SocketAddr::from(([0u16; 8], port));
            (TcpListener::bind(any), UdpSocket::bind(any))
        });
        let (tcp, udp) = (tcp.expect("tcp"), udp.expect("udp"));
        thread::spawn(move || {
            for stream in tcp.incoming() {
                let mut stream = stream.expect("accepted");
                let from = canonical(stream.peer_addr().expect("a peer"));
                // Echoes go on for those who write more.
                thread::spawn(move || {
                    let _ = stream.write_all(format!("{name} {from}\n").as_bytes());
                    let mut more = [0; 64];
                    while let Ok(n @ 1..) = stream.read(&mut more) {
                        let _ = stream.write_all(&more[..n]);
                    }
                });
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let text = format!("{name} {}\n", canonical(from));
                let _ = udp.send_to(text.as_bytes(), from);
            }
        });
    }

    /// Answers UDP on exactly this address.
    pub(crate) fn serve_udp_at(&self, name: &'static str, at: SocketAddr) {
        let udp = self.run(move || UdpSocket::bind(at)).expect("udp");
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(format!("{name} {from}\n").as_bytes(), from);
            }
        });
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        // Nothing to be done about a failure here; the name tells whose it was.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub(crate) fn read_line(socket: &mut Socket) -> io::Result<String> {
    let mut buffer = [0; 256];
    let n = socket.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..n]).trim().to_owned())
}

fn open(from: Option<SocketAddr>, to: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, None)?;
    socket.set_reuse_address(true)?;
    if let Some(from) = from {
        socket.bind(&SockAddr::from(from))?;
    }
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect_timeout(&SockAddr::from(to), PATIENCE)?;
    Ok(socket)
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn command(program: &str, args: &[&str], stdin: &str) {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut input = child.stdin.take().expect("piped");
    input.write_all(stdin.as_bytes()).expect("written");
    drop(input);
    let output = child.wait_with_output().expect("it ends");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {error}\n{stdin}"
    );
}

impl Lab {
    pub(crate) fn new() -> Self {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0xab; 16]))
            .expect("the default range is good");
        let lab = Self {
            client: Ns::new("c"),
            host: Ns::new("h"),
            domain: Ns::new("d"),
            containers: (0..3).map(|_| Ns::new("b")).collect(),
            peers: PEERS.iter().map(|_| Ns::new("p")).collect(),
            _segment: Ns::new("s"),
            plan,
        };
        lab.forwarding();
        lab.outside();
        lab.host_leg();
        for n in 0..lab.containers.len() {
            lab.leg(n);
        }
        lab.carrier();
        lab
    }

    /// The address of container `n`.
    pub(crate) fn ip(n: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 32, 0, 10 + n as u8)
    }

    /// Its address in either family.
    pub(crate) fn ip_of(&self, n: usize, v6: bool) -> IpAddr {
        self.either(Self::ip(n), v6)
    }

    pub(crate) fn either(&self, ip: Ipv4Addr, v6: bool) -> IpAddr {
        if v6 {
            self.plan.v6(ip).into()
        } else {
            ip.into()
        }
    }

    fn forwarding(&self) {
        let switches = "net.ipv4.ip_forward=1\nnet.ipv6.conf.all.forwarding=1\n\
                        net.ipv4.conf.all.rp_filter=0\nnet.ipv4.conf.default.rp_filter=0\n";
        for ns in [&self.host, &self.domain] {
            ns.exec("sysctl", &["-q", "-p", "-"], switches);
        }
    }

    fn outside(&self) {
        let (h, c) = (&self.host.0, &self.client);
        c.ip(&format!(
            "link add eth0 type veth peer name up0 netns {h}\naddr add {CLIENT4}/24 dev eth0\n\
             addr add {CLIENT6}/64 dev eth0 nodad\nlink set eth0 up\n"
        ));
        self.host.ip(&format!(
            "addr add {HOST4}/24 dev up0\naddr add {HOST6}/64 dev up0 nodad\nlink set up0 up\n"
        ));
    }

    fn host_leg(&self) {
        let (range, range6) = (self.plan.range, self.plan.range6());
        let own = Ipv4Addr::new(10, 32, 0, 1);
        let (own6, dns4, dns6) = (self.plan.v6(own), self.plan.dns4(), self.plan.dns6());
        self.host.ip(&format!(
            "link add weft0 type veth peer name wh0 netns {d}\naddr add {own}/32 dev weft0\n\
             addr add {own6}/128 dev weft0 nodad\naddr add fe80::2/64 dev weft0 nodad\nlink set weft0 up\n",
            d = self.domain.0
        ));
        self.domain.ip(&format!(
            "addr add 169.254.1.1/32 dev wh0\naddr add fe80::1/64 dev wh0 nodad\nlink set wh0 up\n\
             route add {own}/32 dev wh0\nroute add {own6}/128 dev wh0\n\
             route add default via {own} dev wh0 onlink\n-6 route add default via fe80::2 dev wh0\n\
             route add unreachable {range}\n-6 route add unreachable {range6}\n\
             addr add {dns4}/32 dev lo\naddr add {dns6}/128 dev lo nodad\n"
        ));
        self.host.ip(&format!(
            "route add {range} via 169.254.1.1 dev weft0 onlink src {own}\n\
             -6 route add {range6} via fe80::1 dev weft0 src {own6}\n"
        ));
    }

    fn leg(&self, n: usize) {
        let (ip, ip6) = (self.ip_of(n, false), self.ip_of(n, true));
        self.containers[n].ip(&format!(
            "link add eth0 type veth peer name wv{n} netns {d}\naddr add {ip}/32 dev eth0\n\
             addr add {ip6}/128 dev eth0 nodad\nlink set eth0 up\n",
            d = self.domain.0
        ));
        self.domain.ip(&format!(
            "addr add 169.254.1.1/32 dev wv{n}\naddr add fe80::1/64 dev wv{n} nodad\nlink set wv{n} up\n\
             route add {ip}/32 dev wv{n}\nroute add {ip6}/128 dev wv{n}\n"
        ));
        self.containers[n].ip(&format!(
            "route add default via 169.254.1.1 dev eth0 onlink src {ip}\n\
             -6 route add default via fe80::1 dev eth0 src {ip6}\n"
        ));
    }

    /// The ingress peers, made by hand on one segment behind `wu0`, and the domain's way back to each.
    fn carrier(&self) {
        let (d, s) = (&self.domain, &self._segment);
        let own = mac_text(UDP_CARRIER_MAC);
        s.ip("link add br0 type bridge\nlink set br0 up\n");
        s.ip(&format!(
            "link add su type veth peer name wu0 address {own} netns {}\nlink set su master br0 up\n",
            d.0
        ));
        d.ip("link set wu0 up\n");
        for (peer, ns) in PEERS.iter().zip(&self.peers) {
            self.peer(*peer, ns, &own);
        }
    }

    fn peer(&self, peer: PeerNumber, ns: &Ns, own: &str) {
        let (n, mac, table) = (peer.0, mac_text(peer_mac(peer)), peer_table(peer));
        let (range, range6, via) = (self.plan.range, self.plan.range6(), peer_link_local(peer));
        self._segment.ip(&format!(
            "link add s{n} type veth peer name eth0 address {mac} netns {}\nlink set s{n} master br0 up\n",
            ns.0
        ));
        ns.ip(&format!(
            "addr add {FAR4}/32 dev lo\naddr add {FAR6}/128 dev lo nodad\nlink set eth0 up\n\
             neigh add 169.254.9.9 lladdr {own} dev eth0\nneigh add fe80::99 lladdr {own} dev eth0\n\
             route add {range} via 169.254.9.9 dev eth0 onlink src {FAR4}\n\
             -6 route add {range6} via fe80::99 dev eth0 src {FAR6}\n"
        ));
        self.domain.ip(&format!(
            "neigh add {via} lladdr {mac} dev wu0\n\
             -4 route add default via inet6 {via} dev wu0 table {table}\n\
             -6 route add default via {via} dev wu0 table {table}\n\
             -4 rule add fwmark {n}/0xfff lookup {table} pref 100\n\
             -6 rule add fwmark {n}/0xfff lookup {table} pref 100\n"
        ));
    }
}
