//! A host of its own for each test: a namespace, a domain, containers, and their end whatever happens.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::sched::{CloneFlags, unshare};
use weft_core::control::Target;
use weft_core::model::{AddressPlan, ClusterId, EndpointId, Generation, Label, NodeId};
use weft_core::view::{Endpoint, EndpointKind, Liveness, Member, NetworkView, PeerNumber, View};
use weft_kernel::filter::{domain_filter, host_filter};
use weft_kernel::nft::{self, Where};
use weft_kernel::{
    AttachedLeg, Domain, FastMemory, Host, HostReport, HostState, KernelError, LegSpec, LocalFacts,
    LocalLeg, Report, inside, open_netns, plan_domain, plan_host,
};

/// What the balancer's fragment declares.
const SETS: &str = "set published4 { type ipv4_addr . inet_proto . inet_service; }
set published6 { type ipv6_addr . inet_proto . inet_service; }";

static NEXT: AtomicU32 = AtomicU32::new(0);

fn unique() -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}x{number}", std::process::id())
}

/// Runs a test on a thread that stands in a fresh namespace: the host.
pub(crate) fn on_a_host(test: impl FnOnce(&mut Lab) + Send) {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            sh("ip link set lo up");
            let mut lab = Lab::new();
            test(&mut lab);
        });
        if let Err(panic) = worker.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

pub(crate) struct Lab {
    pub(crate) host: Host,
    pub(crate) name: String,
    pub(crate) domain: Option<Domain>,
    pub(crate) view: View,
    pub(crate) local: LocalFacts,
    pub(crate) memory: FastMemory,
    pub(crate) state: HostState,
    pub(crate) saved: Vec<HostState>,
    namespaces: Vec<String>,
}

pub(crate) struct Container {
    pub(crate) id: EndpointId,
    pub(crate) ip: Ipv4Addr,
    pub(crate) fd: OwnedFd,
}

impl Lab {
    fn new() -> Self {
        let host = Host::current().unwrap();
        let name = format!("weft-t{}", unique());
        let (domain, _) = Domain::open_or_create(&name).unwrap();
        let view = view();
        let local = LocalFacts {
            host_ip: Some([10, 32, 0, 1].into()),
            ipv6: true,
            ..LocalFacts::default()
        };
        Lab {
            host,
            name,
            domain: Some(domain),
            view,
            local,
            memory: FastMemory::default(),
            state: HostState::default(),
            saved: vec![],
            namespaces: vec![],
        }
    }

    pub(crate) fn domain(&self) -> &Domain {
        self.domain.as_ref().unwrap()
    }

    /// As the daemon does it, in its order.
    pub(crate) fn bring_up(&mut self) -> (Report, HostReport) {
        self.domain().ensure_host_leg(&self.host).unwrap();
        let text = domain_filter(&self.view, &self.local, Some(&self.memory));
        nft::apply(Where::Domain(self.domain()), &[SETS, &text]).unwrap();
        let report = self
            .domain()
            .reconcile(&plan_domain(&self.view, &self.local))
            .unwrap();
        let plan = plan_host(&self.view, &self.local);
        let guard = self.host.guard(&plan, &self.state).unwrap();
        let text = host_filter(&self.view, &self.local, guard);
        nft::apply(Where::Host(&self.host), &[&text]).unwrap();
        let saved = &mut self.saved;
        let host = self
            .host
            .reconcile(&plan, &mut self.state, &mut |state| {
                saved.push(state.clone());
                Ok(())
            })
            .unwrap();
        assert!(report.failures.is_empty(), "{:?}", report.failures);
        assert!(host.report.failures.is_empty(), "{:?}", host.report);
        (report, host)
    }

    pub(crate) fn namespace(&mut self) -> String {
        let name = format!("wk{}", unique());
        sh(&format!("ip netns add {name}"));
        self.namespaces.push(name.clone());
        name
    }

    pub(crate) fn container(&mut self, ip: [u8; 4]) -> Container {
        let netns = self.namespace();
        let target = Target::Netns(format!("/run/netns/{netns}"));
        let fd = open_netns(&target).unwrap();
        let [_, b, c, d] = ip;
        Container {
            id: EndpointId([b, c, d, 4, 5, 6, 7, 8]),
            ip: ip.into(),
            fd,
        }
    }

    pub(crate) fn attach(&mut self, container: &Container) -> Result<AttachedLeg, KernelError> {
        let leg = LocalLeg {
            id: container.id,
            ip: container.ip,
        };
        self.local.legs.push(leg);
        self.bring_up();
        self.domain().attach(&self.spec(container))
    }

    pub(crate) fn spec<'a>(&'a self, container: &'a Container) -> LegSpec<'a> {
        LegSpec {
            id: container.id,
            ip: container.ip,
            target: container.fd.as_fd(),
            ifname: "eth0",
            addresses: &self.view.plan,
        }
    }

    /// Output of a command inside the domain.
    pub(crate) fn in_domain(&self, command: &str) -> String {
        self.domain().run(|| sh(command)).unwrap()
    }

    /// A neighbour of the host on a LAN: `up0` here with 192.0.2.1, there with 192.0.2.2.
    pub(crate) fn lan(&mut self) -> String {
        let netns = self.namespace();
        sh(&format!(
            "ip link add up0 type veth peer name up1 netns {netns}"
        ));
        sh("ip addr add 192.0.2.1/24 dev up0");
        sh("ip addr add 2001:db8::1/64 dev up0 nodad");
        sh("ip link set up0 up");
        sh(&format!("ip -n {netns} addr add 192.0.2.2/24 dev up1"));
        sh(&format!(
            "ip -n {netns} addr add 2001:db8::2/64 dev up1 nodad"
        ));
        sh(&format!("ip -n {netns} link set up1 up"));
        sh(&format!("ip -n {netns} link set lo up"));
        netns
    }

    pub(crate) fn teardown(&mut self) -> Vec<KernelError> {
        self.domain = None;
        self.host.teardown(&self.name, &mut self.state)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.teardown();
        for name in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

impl Container {
    pub(crate) fn run(&self, command: &str) -> Output {
        inside(self.fd.as_fd(), || run(command)).unwrap()
    }

    pub(crate) fn pings(&self, to: impl ToString) -> bool {
        let to = to.to_string();
        self.run(&format!("ping -n -c1 -W2 {to}")).status.success()
    }

    /// Not even one of three gets through.
    pub(crate) fn pings_in_vain(&self, options: &str) -> bool {
        let command = format!("ping -n -c3 -i0.05 -W1 {options}");
        !self.run(&command).status.success()
    }
}

pub(crate) fn run(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).output().unwrap()
}

/// Runs what must succeed.
pub(crate) fn sh(command: &str) -> String {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Everything a teardown has to put back, as text.
pub(crate) fn snapshot() -> BTreeMap<&'static str, String> {
    let mut found = BTreeMap::new();
    for (what, command) in [
        ("links", "ip -br link"),
        ("addresses", "ip -o addr | sed 's/valid_lft.*//'"),
        ("routes4", "ip -4 route show table all"),
        (
            "routes6",
            "ip -6 route show table all | sed 's/expires.*//'",
        ),
        ("rules4", "ip -4 rule"),
        ("rules6", "ip -6 rule"),
        ("next hops", "ip nexthop"),
        ("neighbours", "ip neigh show nud permanent"),
        ("nft", "nft list ruleset"),
    ] {
        found.insert(what, sh(command));
    }
    found.insert("switches", switches());
    found
}

fn switches() -> String {
    let mut text = String::new();
    for (family, names) in [
        ("ipv4", &["forwarding", "rp_filter", "accept_redirects"][..]),
        (
            "ipv6",
            &[
                "forwarding",
                "accept_ra",
                "disable_ipv6",
                "accept_redirects",
            ][..],
        ),
    ] {
        let folder = format!("/proc/sys/net/{family}/conf");
        let mut devices: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        devices.sort();
        for device in devices {
            for name in names {
                let value = read(&format!("{folder}/{device}/{name}")).unwrap_or_default();
                text.push_str(&format!("{family}.{device}.{name} = {value}"));
            }
        }
    }
    text + &read("/proc/sys/net/ipv4/ip_forward").unwrap()
}

pub(crate) fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(path)
}

pub(crate) fn member(id: u8, number: u16, prefixes: &[&str]) -> Member {
    Member {
        id: NodeId([id; 32]),
        name: Label::parse(&format!("n{id}")).unwrap(),
        generation: Generation(1),
        liveness: Liveness::Alive,
        number: PeerNumber(number),
        prefixes: prefixes.iter().map(|p| p.parse().unwrap()).collect(),
        host_addrs: vec![],
        mtu: (number != 0).then_some(1400),
    }
}

pub(crate) fn network(name: &str, net: Ipv4Net) -> NetworkView {
    NetworkView {
        name: Label::parse(name).unwrap(),
        net,
        also: vec![],
        size: 4094,
        used: 0,
        free_here: 0,
        low: false,
    }
}

fn view() -> View {
    let cluster = ClusterId([7; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    View {
        members: vec![
            member(1, 0, &["10.32.0.0/17"]),
            member(2, 1, &["10.32.128.0/17", "10.40.0.0/13"]),
        ],
        endpoints: vec![Endpoint {
            id: EndpointId([9; 8]),
            node: NodeId([1; 32]),
            kind: EndpointKind::Host,
            names: vec![],
            network: Label::parse("default").unwrap(),
            ip: [10, 32, 0, 1].into(),
            labels: BTreeMap::new(),
        }],
        networks: vec![network("default", plan.default_network())],
        ..View::empty(NodeId([1; 32]), cluster, plan)
    }
}
