//! One host: a namespace with a daemon in it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::capture::Capture;
use crate::command::{Out, Spawned, run_command, signal};
use crate::container::Container;
use crate::faults::Faults;
use crate::lab::Subnet;
use crate::netns::Netns;

/// No single command of a scenario takes longer.
const LIMIT: Duration = Duration::from_secs(90);

/// Gives the command the host's own resolv.conf and then becomes it, so the process id stays. Mounts stay shared
/// except the one that holds resolv.conf: the domain's name under `/run/netns` must be seen outside, resolv.conf not.
const ENTER: &str = r#"
mount --make-private "$(findmnt -n -o TARGET -T /etc/resolv.conf)" && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"
"#;

/// A host of the lab; clones are the same host.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    space: Netns,
    subnet: Subnet,
    v4: Ipv4Addr,
    v6: Option<Ipv6Addr>,
    dir: PathBuf,
    faults: Mutex<Faults>,
    domains: Mutex<Vec<String>>,
}

impl Host {
    pub(crate) fn new(
        name: &str,
        space: Netns,
        subnet: Subnet,
        v4: Ipv4Addr,
        v6: Option<Ipv6Addr>,
        lab: &Path,
    ) -> Self {
        let dir = lab.join(name);
        std::fs::create_dir_all(&dir)
            .unwrap_or_else(|e| panic!("can't make {}: {e}", dir.display()));
        let inner = Inner {
            name: name.to_owned(),
            space,
            subnet,
            v4,
            v6,
            dir,
            faults: Mutex::default(),
            domains: Mutex::default(),
        };
        let host = Self(Arc::new(inner));
        host.resolver(host.0.subnet.gateway4().into());
        host
    }

    /// Its name, also the node's.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its namespace.
    pub fn space(&self) -> &Netns {
        &self.0.space
    }

    /// Its underlay address.
    pub fn v4(&self) -> Ipv4Addr {
        self.0.v4
    }

    /// Its IPv6 underlay address; panics behind NAT, where there is none.
    pub fn v6(&self) -> Ipv6Addr {
        self.0.v6.expect("a host behind NAT has no IPv6 address")
    }

    /// All its underlay addresses.
    pub fn addrs(&self) -> Vec<IpAddr> {
        let v4 = IpAddr::V4(self.0.v4);
        std::iter::once(v4)
            .chain(self.0.v6.map(IpAddr::V6))
            .collect()
    }

    /// The router's address on its subnet: its default gateway and, unless told otherwise, its resolver.
    pub fn subnet_gateway(&self) -> Ipv4Addr {
        self.0.subnet.gateway4()
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The daemon's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.0.dir.join("run")
    }

    /// The daemon's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.0.dir.join("state")
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("weft.sock")
    }

    /// The router's end of its cable.
    pub fn port(&self) -> String {
        format!("p-{}", self.0.name)
    }

    /// Puts `addr` into its resolv.conf.
    pub fn resolver(&self, addr: IpAddr) {
        std::fs::write(self.resolv_conf(), format!("nameserver {addr}\n"))
            .expect("writing a host's resolv.conf");
    }

    /// Runs a command on the host.
    pub fn run(&self, args: &[&str]) -> Out {
        self.run_with(args, &[])
    }

    /// Runs a command on the host with `input` on its standard input.
    pub fn run_with(&self, args: &[&str], input: &[u8]) -> Out {
        run_command(&self.enter(args), &self.env(), input, LIMIT)
    }

    /// Runs a command with more environment.
    pub fn run_env(&self, env: &[(&str, &str)], args: &[&str], input: &[u8]) -> Out {
        let mut all = self.env();
        all.extend(env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        run_command(&self.enter(args), &all, input, LIMIT)
    }

    /// Starts a process on the host; `name` is its log's.
    pub fn spawn(&self, name: &str, args: &[&str]) -> Spawned {
        Spawned::start(&self.enter(args), &self.env(), &self.0.dir.join(name))
    }

    /// `lab-tool …` on the host.
    pub fn tool(&self, args: &[&str]) -> Out {
        let tool = binary("lab-tool");
        let all: Vec<&str> = std::iter::once(tool.as_str())
            .chain(args.iter().copied())
            .collect();
        self.run(&all)
    }

    /// `lab-tool …` in the background.
    pub fn spawn_tool(&self, name: &str, args: &[&str]) -> Spawned {
        let tool = binary("lab-tool");
        let all: Vec<&str> = std::iter::once(tool.as_str())
            .chain(args.iter().copied())
            .collect();
        self.spawn(name, &all)
    }

    /// `weft …` with this host's directories.
    pub fn weft(&self, args: &[&str]) -> Out {
        self.weft_with(args, &[])
    }

    /// `weft …` with `input` on its standard input.
    pub fn weft_with(&self, args: &[&str], input: &[u8]) -> Out {
        let weft = binary("weft");
        let all: Vec<&str> = std::iter::once(weft.as_str())
            .chain(args.iter().copied())
            .collect();
        self.run_with(&all, input)
    }

    /// `weft up` in the background, as users do; panics unless it comes up.
    pub fn up(&self, flags: &[&str]) {
        self.up_with(flags, &[]).ok();
    }

    /// `weft up` however it ends. Whether the kernel seals is said by the test, or not: kernels differ, and their speeds.
    pub fn up_with(&self, flags: &[&str], input: &[u8]) -> Out {
        let mut args = vec!["up", "--name", self.name()];
        args.extend(flags);
        if !flags.contains(&"--esp") {
            args.extend(["--esp", "never"]);
        }
        let out = self.weft_with(&args, input);
        if let Some(domain) = out.is_ok().then(|| self.space().domain()).flatten() {
            self.lock_domains().push(domain);
        }
        out
    }

    /// Joins the cluster of `other` with a fresh invitation.
    pub fn join(&self, other: &Host) {
        let token = other.token(&[]);
        self.join_with(&token).ok();
    }

    /// `weft up --join -` with this token on the standard input.
    pub fn join_with(&self, token: &str) -> Out {
        self.up_with(&["--join", "-"], token.as_bytes())
    }

    /// `weft token`.
    pub fn token(&self, flags: &[&str]) -> String {
        let args: Vec<&str> = std::iter::once("token")
            .chain(flags.iter().copied())
            .collect();
        self.weft(&args).ok()
    }

    /// `weft status --json`.
    pub fn status(&self) -> Value {
        self.weft(&["status", "--json"]).json()
    }

    /// The rows of `weft peers --json`; none while the daemon does not answer.
    pub fn peers(&self) -> Vec<Value> {
        let out = self.weft(&["peers", "--json"]);
        let rows = out.is_ok().then(|| out.json());
        let rows = rows.as_ref().and_then(Value::as_array);
        rows.cloned().unwrap_or_default()
    }

    /// The row about the peer of this name; null while there is none.
    pub fn peer(&self, name: &str) -> Value {
        let mut rows = self.peers().into_iter();
        rows.find(|row| row["name"] == name).unwrap_or_default()
    }

    /// The row about the only peer; null while there is none.
    pub fn only_peer(&self) -> Value {
        self.peers().into_iter().next().unwrap_or_default()
    }

    /// Packets that took the fast path, `tx_packets` or `rx_packets`; `None` where it leads to nobody.
    pub fn fast_path(&self, which: &str) -> Option<u64> {
        let rows = self.peers();
        let laid = rows
            .iter()
            .filter_map(|row| row["fast_path"][which].as_u64());
        laid.reduce(|one, other| one + other)
    }

    /// How many nodes it sees alive; 0 while the daemon does not answer.
    pub fn alive(&self) -> usize {
        let out = self.weft(&["status", "--json"]);
        if !out.is_ok() {
            return 0;
        }
        out.json()["nodes_alive"]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0)
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> u32 {
        let pid = self.status()["pid"]
            .as_u64()
            .expect("status names the daemon's process");
        u32::try_from(pid).expect("a process id")
    }

    /// The host's own overlay address.
    pub fn overlay_ip(&self) -> Ipv4Addr {
        let status = self.status();
        let ip = status["host_ip"]
            .as_str()
            .unwrap_or_else(|| panic!("no host address in {status}"));
        ip.parse().expect("status prints an address")
    }

    /// Kills the daemon the hard way and waits until it is gone.
    pub fn kill9(&self) {
        let pid = self.daemon_pid();
        signal(pid, Signal::SIGKILL);
        let process = PathBuf::from(format!("/proc/{pid}"));
        let end = std::time::Instant::now() + Duration::from_secs(10);
        while process.exists() && !is_zombie(&process) {
            assert!(
                std::time::Instant::now() < end,
                "the daemon survived SIGKILL"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A container by `weft run` that serves port 80 with `lab-tool serve`; it answers to `name` and to `also`.
    pub fn serve(&self, name: &str, also: &[&str]) -> Container {
        let mut flags = Vec::new();
        also.iter().for_each(|n| flags.extend(["--name", n]));
        Container::serve(self, name, &flags)
    }

    /// The same with further flags for `weft run`.
    pub fn serve_with(&self, name: &str, flags: &[&str]) -> Container {
        Container::serve(self, name, flags)
    }

    /// Records what passes the router's end of its cable.
    pub fn capture(&self, name: &str) -> Capture {
        Capture::start(
            &self.0.subnet.space,
            &self.port(),
            &self.0.dir.join(format!("{name}.pcap")),
        )
    }

    /// Its log, as far as it is written.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.run_dir().join("weft.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What it has to say for a failed scenario.
    pub fn report(&self) -> String {
        let say = |args: &[&str]| {
            let out = self.weft(args);
            format!("$ weft {}\n{}{}", args.join(" "), out.stdout, out.stderr)
        };
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        let parts = [
            &["status"] as &[&str],
            &["peers"],
            &["node", "ls"],
            &["ps"],
            &["service", "ls"],
        ]
        .map(say);
        format!(
            "-- host {} ({:?})\n{}-- log\n{tail}\n",
            self.name(),
            self.addrs(),
            parts.concat()
        )
    }

    pub(crate) fn enter(&self, args: &[&str]) -> Vec<String> {
        let resolv = self.resolv_conf();
        let resolv = resolv.to_str().expect("the lab's paths are text");
        let mut all = vec![
            "unshare",
            "--mount",
            "--propagation",
            "unchanged",
            "sh",
            "-c",
            ENTER.trim(),
            "sh",
            resolv,
        ];
        all.extend(args);
        self.0.space.enter(&all)
    }

    pub(crate) fn env(&self) -> Vec<(String, String)> {
        let text = |p: PathBuf| {
            p.into_os_string()
                .into_string()
                .expect("the lab's paths are text")
        };
        vec![
            ("WEFT_RUN_DIR".to_owned(), text(self.run_dir())),
            ("WEFT_STATE_DIR".to_owned(), text(self.state_dir())),
        ]
    }

    /// The subnet it is on.
    pub fn network(&self) -> &Subnet {
        &self.0.subnet
    }

    pub(crate) fn faults(&self) -> MutexGuard<'_, Faults> {
        self.0
            .faults
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes service `web`: port 80 of the containers of that name, published on port 8080 of every host.
    pub fn publish_web(&self) {
        let create = ["service", "create", "web", "--port", "80"];
        self.weft(&[&create[..], &["--publish", "8080:80"]].concat())
            .ok();
    }

    /// Every domain a daemon of this host ever had.
    pub(crate) fn domains(&self) -> Vec<String> {
        let mut domains = self.lock_domains().clone();
        domains.extend(self.space().domain());
        domains
    }

    fn lock_domains(&self) -> MutexGuard<'_, Vec<String>> {
        self.0
            .domains
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn resolv_conf(&self) -> PathBuf {
        self.0.dir.join("resolv.conf")
    }
}

/// Dead with all its threads, and only not waited for: a leader alone can be a zombie while others still hold sockets.
fn is_zombie(process: &Path) -> bool {
    let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
    let threads = std::fs::read_dir(process.join("task")).map_or(0, Iterator::count);
    threads <= 1
        && stat
            .rsplit_once(')')
            .is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// A binary of this project: `WEFT_BIN_DIR`, or where cargo put it (two levels above the running test).
pub(crate) fn binary(name: &str) -> String {
    let dir = std::env::var_os("WEFT_BIN_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let exe = std::env::current_exe().expect("a running test has a path");
            exe.ancestors()
                .nth(2)
                .expect("cargo runs tests in target/<profile>/deps")
                .to_owned()
        });
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not built: run tests/run, or cargo build --workspace",
        path.display()
    );
    path.into_os_string()
        .into_string()
        .expect("the build directory's path is text")
}

impl Host {
    /// Path of a binary of this project, for command lines.
    pub fn binary(name: &str) -> String {
        binary(name)
    }
}
