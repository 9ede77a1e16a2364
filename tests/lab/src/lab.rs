//! One lab: a router namespace, subnets, hosts; the waiting and the failure report of a scenario.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use crate::command::Spawned;
use crate::host::Host;
use crate::netns::{self, DIR_PREFIX, Netns};

static SWEPT: Once = Once::new();
static LABS: AtomicUsize = AtomicUsize::new(0);

/// A network of its own. Dropping it removes all of it.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: PathBuf,
    number: usize,
    router: Netns,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    hosts: Vec<Host>,
    spaces: Vec<Netns>,
    subnets: u8,
}

/// A bridge with hosts on it.
#[derive(Debug, Clone)]
pub struct Subnet {
    /// Where the bridge is.
    pub(crate) space: Netns,
    pub(crate) bridge: String,
    /// First three octets.
    prefix4: [u8; 3],
    /// Absent behind a NAT router.
    prefix6: Option<u16>,
    taken: std::sync::Arc<AtomicUsize>,
}

/// Documentation networks (RFC 5737), and one more where a lab needs four.
const PREFIXES: [[u8; 3]; 4] = [[192, 0, 2], [198, 51, 100], [203, 0, 113], [198, 18, 7]];

impl Subnet {
    /// The router's address here.
    pub fn gateway4(&self) -> Ipv4Addr {
        self.v4(1)
    }

    /// The router's IPv6 address here.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.v6(1)
    }

    /// Its NAT router forgets which of its ports stands for whom, as if it began anew.
    pub fn forget_mappings(&self) {
        self.space.run(&["conntrack", "-F"]).ok();
    }

    fn v4(&self, host: u8) -> Ipv4Addr {
        let [a, b, c] = self.prefix4;
        Ipv4Addr::new(a, b, c, host)
    }

    fn v6(&self, host: u8) -> Option<Ipv6Addr> {
        let subnet = self.prefix6?;
        Some(Ipv6Addr::new(
            0x2001,
            0xdb8,
            subnet,
            0,
            0,
            0,
            0,
            u16::from(host),
        ))
    }

    /// The next free addresses, from .11 on.
    pub(crate) fn next(&self) -> (Ipv4Addr, Option<Ipv6Addr>) {
        let host = 11
            + u8::try_from(self.taken.fetch_add(1, Ordering::Relaxed))
                .expect("a lab's subnet is small");
        (self.v4(host), self.v6(host))
    }
}

impl Lab {
    /// An empty lab: a router and nothing else.
    pub fn new(name: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces: run these tests as root"
        );
        SWEPT.call_once(netns::sweep);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!(
            "{DIR_PREFIX}{}-{number}-{name}",
            std::process::id()
        ));
        std::fs::create_dir_all(&dir)
            .unwrap_or_else(|e| panic!("can't make {}: {e}", dir.display()));
        let router = Netns::create(number, "rt");
        make_router(&router);
        let inner = Mutex::new(Inner {
            spaces: vec![router.clone()],
            ..Inner::default()
        });
        Self {
            name: name.to_owned(),
            dir,
            number,
            router,
            inner,
        }
    }

    /// The lab's directory, gone with the lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace that forwards between subnets.
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// Starts a process on the router.
    pub fn spawn_on_router(&self, name: &str, args: &[&str]) -> Spawned {
        Spawned::start(
            &self.router.enter(args),
            &[],
            &self.dir.join(format!("router-{name}")),
        )
    }

    /// A bridge on the router with an IPv4 /24 and an IPv6 /64.
    pub fn subnet(&self, name: &str) -> Subnet {
        let index = self.next_subnet();
        let subnet = Subnet {
            space: self.router.clone(),
            bridge: format!("br-{name}"),
            prefix4: PREFIXES[usize::from(index)],
            prefix6: Some(u16::from(index) + 1),
            taken: std::sync::Arc::default(),
        };
        make_bridge(&subnet);
        subnet
    }

    /// A subnet behind a NAT router (masquerading, no way in, no IPv6) whose outer leg is on `outer`. It keeps a sender's
    /// port where that is free, whoever the packets are for.
    pub fn nat(&self, name: &str, outer: &Subnet) -> Subnet {
        self.nat_that(name, outer, "masquerade")
    }

    /// The same, but each receiver sees another port.
    pub fn random_nat(&self, name: &str, outer: &Subnet) -> Subnet {
        self.nat_that(name, outer, "masquerade fully-random")
    }

    fn nat_that(&self, name: &str, outer: &Subnet, maps: &str) -> Subnet {
        let space = self.space(&format!("nat-{name}"));
        make_router(&space);
        let (uplink, _) = outer.next();
        join(&space, "up0", outer, &format!("p-{name}"));
        space
            .ip(&["addr", "add", &format!("{uplink}/24"), "dev", "up0"])
            .ok();
        space
            .ip(&[
                "route",
                "add",
                "default",
                "via",
                &outer.gateway4().to_string(),
            ])
            .ok();
        // What comes uninvited is dropped before it is tracked, as routers at home do: else it would take the port.
        space.nft(&format!(
            "table ip lab {{
                chain post {{
                    type nat hook postrouting priority 100;
                    oifname \"up0\" {maps}
                }}
                chain in {{
                    type filter hook input priority 0;
                    iifname \"up0\" ct state established,related accept
                    iifname \"up0\" meta l4proto udp drop
                }}
                chain forward {{
                    type filter hook forward priority 0;
                    iifname \"up0\" ct state established,related accept
                    iifname \"up0\" drop
                }}
            }}
            "
        ));
        let subnet = Subnet {
            space,
            bridge: format!("br-{name}"),
            prefix4: [192, 168, 90 + self.next_subnet()],
            prefix6: None,
            taken: std::sync::Arc::default(),
        };
        make_bridge(&subnet);
        subnet
    }

    /// A namespace of its own, connected to nothing.
    pub fn space(&self, name: &str) -> Netns {
        let space = Netns::create(self.number, name);
        self.inner().spaces.push(space.clone());
        space
    }

    /// A host on `subnet`: addresses, default routes through the router, forwarding off, its own directories.
    pub fn host(&self, name: &str, subnet: &Subnet) -> Host {
        let space = self.space(name);
        let (v4, v6) = subnet.next();
        let port = format!("p-{name}");
        space.sysctl("net.ipv4.ip_forward", "0");
        join(&space, "eth0", subnet, &port);
        space
            .ip(&["addr", "add", &format!("{v4}/24"), "dev", "eth0"])
            .ok();
        space
            .ip(&[
                "route",
                "add",
                "default",
                "via",
                &subnet.gateway4().to_string(),
            ])
            .ok();
        if let (Some(v6), Some(gateway)) = (v6, subnet.gateway6()) {
            space
                .ip(&["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])
                .ok();
            space
                .ip(&["-6", "route", "add", "default", "via", &gateway.to_string()])
                .ok();
        }
        let host = Host::new(name, space, subnet.clone(), v4, v6, &self.dir);
        self.inner().hosts.push(host.clone());
        host
    }

    /// Three hosts `h1`, `h2`, `h3`, each on a subnet of its own, in one cluster that all of them see whole.
    pub fn trio(&self) -> [Host; 3] {
        let hosts = ["a", "b", "c"].map(|s| self.subnet(s));
        let hosts =
            [("h1", &hosts[0]), ("h2", &hosts[1]), ("h3", &hosts[2])].map(|(n, s)| self.host(n, s));
        self.cluster(&hosts);
        hosts
    }

    /// Two hosts `h1` and `h2`, each on a subnet of its own.
    pub fn two(&self) -> [Host; 2] {
        [("h1", "a"), ("h2", "b")].map(|(name, subnet)| self.host(name, &self.subnet(subnet)))
    }

    /// [`Self::two`] in one cluster.
    pub fn pair(&self) -> [Host; 2] {
        let hosts = self.two();
        self.cluster(&hosts);
        hosts
    }

    /// Two hosts on one subnet, `h1` and `h2`, in one cluster, each brought up with its flags.
    pub fn pair_with(&self, subnet: &Subnet, flags: [&[&str]; 2]) -> [Host; 2] {
        let hosts = ["h1", "h2"].map(|name| self.host(name, subnet));
        self.cluster_with(&hosts, flags);
        hosts
    }

    /// Brings up the first with its flags, joins the second to it with its own, and waits until both see both.
    pub fn cluster_with(&self, hosts: &[Host; 2], flags: [&[&str]; 2]) {
        hosts[0].up(flags[0]);
        let token = hosts[0].token(&[]);
        let join = [&["--join", "-"], flags[1]].concat();
        hosts[1].up_with(&join, token.as_bytes()).ok();
        self.wait_members(hosts);
    }

    /// Brings up the first host, joins the others to it, and waits until all see all.
    pub fn cluster(&self, hosts: &[Host]) {
        let (first, rest) = hosts.split_first().expect("a cluster has a first host");
        first.up(&[]);
        rest.iter().for_each(|h| h.join(first));
        self.wait_members(hosts);
    }

    /// Waits until each of `hosts` sees exactly these alive.
    pub fn wait_members(&self, hosts: &[Host]) {
        for host in hosts {
            let what = format!("{} sees {} nodes alive", host.name(), hosts.len());
            self.wait(&what, 30, || host.alive() == hosts.len());
        }
    }

    /// Polls `condition` for at most `secs` seconds; fails with what every host has to say.
    #[track_caller]
    pub fn wait(&self, what: &str, secs: u64, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(secs);
        while !condition() {
            assert!(Instant::now() < end, "not within {secs} s: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What every host has to say: status, peers, the end of the log.
    pub fn report(&self) -> String {
        let hosts = self.inner().hosts.clone();
        hosts.iter().map(Host::report).collect()
    }

    fn next_subnet(&self) -> u8 {
        let mut inner = self.inner();
        let index = inner.subnets;
        inner.subnets += 1;
        index
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("==== lab {}\n{}", self.name, self.report());
        }
        let inner = std::mem::take(&mut *self.inner());
        for host in &inner.hosts {
            host.domains().iter().for_each(|d| netns::remove(d));
        }
        inner.spaces.iter().rev().for_each(Netns::delete);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn make_router(space: &Netns) {
    space.sysctl("net.ipv4.ip_forward", "1");
    space.sysctl("net.ipv6.conf.all.forwarding", "1");
    // A router asks for neighbours from its link-local address: usable at once, not after duplicate detection.
    space.sysctl("net.ipv6.conf.default.accept_dad", "0");
}

fn make_bridge(subnet: &Subnet) {
    let (space, bridge) = (&subnet.space, subnet.bridge.as_str());
    space
        .ip(&[
            "link",
            "add",
            bridge,
            "type",
            "bridge",
            "mcast_snooping",
            "0",
        ])
        .ok();
    space
        .ip(&[
            "addr",
            "add",
            &format!("{}/24", subnet.gateway4()),
            "dev",
            bridge,
        ])
        .ok();
    if let Some(gateway) = subnet.gateway6() {
        space
            .ip(&[
                "addr",
                "add",
                &format!("{gateway}/64"),
                "dev",
                bridge,
                "nodad",
            ])
            .ok();
    }
    space.ip(&["link", "set", bridge, "up"]).ok();
}

/// A veth pair made inside the lab: the machine's own namespace never sees it.
fn join(space: &Netns, ifname: &str, subnet: &Subnet, port: &str) {
    let args = [
        "link",
        "add",
        port,
        "type",
        "veth",
        "peer",
        "name",
        ifname,
        "netns",
        space.name(),
    ];
    subnet.space.ip(&args).ok();
    subnet
        .space
        .ip(&["link", "set", port, "master", &subnet.bridge, "up"])
        .ok();
    space.ip(&["link", "set", ifname, "up"]).ok();
}
