//! Two containers on two hosts, with something between them that carries their packets.

use std::any::Any;
use std::time::Duration;

use weft_lab::{Host, Lab, Netns, Out, Spawned, run_command};

/// No command takes longer.
const LIMIT: Duration = Duration::from_secs(120);
/// The port of those who open connections one after the other.
pub(crate) const VISITED: &str = "80";
/// The port of those who count datagrams.
pub(crate) const COUNTED: &str = "81";
/// The containers' networks, where the tunnel is not weft's.
const NEAR: &str = "10.99.1";
const FAR: &str = "10.99.2";

/// A container: where commands run.
pub(crate) struct End {
    enter: Vec<String>,
}

impl End {
    /// What runs in the namespaces of this process.
    pub(crate) fn of_process(pid: u32) -> Self {
        let enter = vec![
            "nsenter".to_owned(),
            format!("--target={pid}"),
            "--net".to_owned(),
        ];
        Self { enter }
    }

    fn of_space(space: &Netns) -> Self {
        let enter = vec!["nsenter".to_owned(), format!("--net={}", space.path())];
        Self { enter }
    }

    fn argv(&self, args: &[&str]) -> Vec<String> {
        let args = args.iter().map(|arg| (*arg).to_owned());
        self.enter.iter().cloned().chain(args).collect()
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Out {
        run_command(&self.argv(args), &[], &[], LIMIT)
    }
}

/// All that one candidate needs. Dropping it takes everything away.
pub(crate) struct Pair {
    pub(crate) near: End,
    /// The far one's address.
    pub(crate) address: String,
    /// What waits at the far end: iperf3 and, on [`VISITED`], an end to each connection; on [`COUNTED`] datagrams are counted.
    _servers: [Spawned; 3],
    /// Processes and devices, dropped before the lab.
    _parts: Vec<Box<dyn Any + Send + Sync>>,
    pub(crate) hosts: [Host; 2],
    pub(crate) lab: Lab,
}

impl Pair {
    /// Two ends that reach each other; servers wait at the far one.
    pub(crate) fn new(
        lab: Lab,
        hosts: [Host; 2],
        ends: [End; 2],
        address: String,
        parts: Vec<Box<dyn Any + Send + Sync>>,
    ) -> Self {
        let [near, far] = ends;
        let serve = |name: &str, argv: &[&str], ready: &str| {
            let mut server = Spawned::start(&far.argv(argv), &[], &lab.dir().join(name));
            server.wait_for(ready, Duration::from_secs(10));
            server
        };
        let tool = Host::binary("lab-tool");
        let servers = [
            serve(
                "iperf3",
                &["iperf3", "--server", "--forceflush"],
                "Server listening",
            ),
            serve("visited", &[&tool, "host", VISITED], "ready"),
            serve("counted", &[&tool, "take-runs", COUNTED], "ready"),
        ];
        lab.wait("the containers reach each other", 30, || {
            near.run(&["ping", "-c1", "-W1", &address]).is_ok()
        });
        Self {
            near,
            address,
            _servers: servers,
            _parts: parts,
            hosts,
            lab,
        }
    }
}

/// Two hosts on one wire, each with a container behind a veth pair that the host routes to: what Docker and the like do,
/// without their address translation.
pub(crate) struct Ground {
    pub(crate) lab: Lab,
    pub(crate) hosts: [Host; 2],
    ends: [End; 2],
}

impl Ground {
    pub(crate) fn new(name: &str) -> Self {
        let lab = Lab::new(name);
        let wire = lab.subnet("a");
        let hosts = ["h1", "h2"].map(|name| lab.host(name, &wire));
        let ends = [(&hosts[0], NEAR), (&hosts[1], FAR)]
            .map(|(host, network)| container(&lab, host, network));
        Self { lab, hosts, ends }
    }

    /// Each host with the other one, and with that one's containers as an address prefix.
    pub(crate) fn sides(&self) -> [(&Host, &Host, String); 2] {
        let [one, other] = &self.hosts;
        [
            (one, other, format!("{FAR}.0/24")),
            (other, one, format!("{NEAR}.0/24")),
        ]
    }

    /// Done: what carries the packets is there, and `parts` keep it going.
    pub(crate) fn finish(self, parts: Vec<Box<dyn Any + Send + Sync>>) -> Pair {
        Pair::new(self.lab, self.hosts, self.ends, format!("{FAR}.2"), parts)
    }
}

fn container(lab: &Lab, host: &Host, network: &str) -> End {
    let space = lab.space(&format!("c-{}", host.name()));
    let (here, inside) = (format!("{network}.1/24"), format!("{network}.2/24"));
    let peer = ["peer", "name", "eth0", "netns", space.name()];
    let add = ["link", "add", "c0", "type", "veth"];
    host.space().ip(&[&add[..], &peer[..]].concat()).ok();
    host.space().ip(&["addr", "add", &here, "dev", "c0"]).ok();
    host.space().ip(&["link", "set", "c0", "up"]).ok();
    host.space().sysctl("net.ipv4.ip_forward", "1");
    space.ip(&["addr", "add", &inside, "dev", "eth0"]).ok();
    space.ip(&["link", "set", "eth0", "up"]).ok();
    let gateway = format!("{network}.1");
    space.ip(&["route", "add", "default", "via", &gateway]).ok();
    End::of_space(&space)
}
