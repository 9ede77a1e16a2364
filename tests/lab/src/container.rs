//! A container as `weft run` makes it: a process in a network namespace of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::command::{Out, Spawned, run_command};
use crate::host::{Host, binary};

const LIMIT: Duration = Duration::from_secs(90);

/// A process under `weft run`; it ends when this is dropped.
#[derive(Debug)]
pub struct Container {
    name: String,
    weft: Spawned,
    pid: u32,
    ip: Ipv4Addr,
    ip6: Ipv6Addr,
}

impl Container {
    pub(crate) fn serve(host: &Host, name: &str, flags: &[&str]) -> Self {
        let tool = binary("lab-tool");
        Self::start(
            host,
            name,
            flags,
            &[&tool, "serve", "--name", name, "--port", "80"],
        )
    }

    /// Takes what is poured into it ([`Self::pours`]); `flags` are `weft run`'s.
    pub fn drain(host: &Host, name: &str, flags: &[&str]) -> Self {
        Self::start(host, name, flags, &[&binary("lab-tool"), "drain", "80"])
    }

    /// `weft run --name NAME FLAGS -- COMMAND`; the command must print `ready`.
    pub fn start(host: &Host, name: &str, flags: &[&str], command: &[&str]) -> Self {
        let weft = binary("weft");
        let mut args = vec![weft.as_str(), "run", "--name", name];
        args.extend(flags);
        args.push("--");
        args.extend(command);
        let mut weft = host.spawn(&format!("run-{name}"), &args);
        weft.wait_for("ready", Duration::from_secs(30));
        let pid = inner_process(weft.pid());
        let addrs = in_namespace(pid, &["ip", "-j", "addr", "show", "dev", "eth0"], &[]).json();
        let (ip, ip6) = (address(&addrs, "inet"), address(&addrs, "inet6"));
        Self {
            name: name.to_owned(),
            weft,
            pid,
            ip: ip.parse().expect("an IPv4 address"),
            ip6: ip6.parse().expect("an IPv6 address"),
        }
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its overlay address.
    pub fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    /// Its overlay IPv6 address.
    pub fn ip6(&self) -> Ipv6Addr {
        self.ip6
    }

    /// The process inside.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// `weft run` itself.
    pub fn weft_run(&mut self) -> &mut Spawned {
        &mut self.weft
    }

    /// Runs a command inside.
    pub fn run(&self, args: &[&str]) -> Out {
        in_namespace(self.pid, args, &[])
    }

    /// `lab-tool …` inside.
    pub fn tool(&self, args: &[&str]) -> Out {
        let tool = binary("lab-tool");
        let all: Vec<&str> = std::iter::once(tool.as_str())
            .chain(args.iter().copied())
            .collect();
        self.run(&all)
    }

    /// Asks `to` (address and port) one question; the answer is `NAME CLIENT PORT text`.
    pub fn ask(&self, proto: &str, to: &str) -> Out {
        self.tool(&["ask", proto, to])
    }

    /// Starts `lab-tool …` inside; its log lies in `host`'s directory.
    pub fn spawn_tool(&self, host: &Host, name: &str, args: &[&str]) -> Spawned {
        let tool = binary("lab-tool");
        let mut argv = enter(self.pid);
        argv.push(tool);
        argv.extend(args.iter().map(|a| (*a).to_owned()));
        Spawned::start(&argv, &[], &host.dir().join(name))
    }

    /// Starts a command inside; its log lies in `host`'s directory.
    pub fn spawn(&self, host: &Host, name: &str, args: &[&str]) -> Spawned {
        let mut argv = enter(self.pid);
        argv.extend(args.iter().map(|a| (*a).to_owned()));
        Spawned::start(&argv, &[], &host.dir().join(name))
    }

    /// Does `ping` reach `target` within a few seconds?
    pub fn pings(&self, target: &str) -> bool {
        self.run(&["ping", "-c1", "-w3", target]).is_ok()
    }

    /// Does it get so many octets, whole, from the web server of `other` within a minute?
    pub fn fetches(&self, other: &Container, octets: u64) -> bool {
        let url = format!("http://{}/bytes/{octets}", other.ip());
        let out = self.run(&[
            "curl",
            "-sS",
            "--max-time",
            "60",
            "-o",
            "/dev/null",
            "-w",
            "%{size_download}",
            &url,
        ]);
        out.is_ok() && out.stdout.trim() == octets.to_string()
    }

    /// Pours so many MiB into the [`Self::drain`] at an address; panics unless they come out there whole.
    #[track_caller]
    pub fn pours(&self, to: impl Into<IpAddr>, mib: u64) {
        let to = SocketAddr::new(to.into(), 80).to_string();
        let said = self.tool(&["pour", &to, &mib.to_string()]).ok();
        assert_eq!(said, format!("{} octets, whole", mib << 20), "{to}");
    }

    /// Everything the server inside was told so far.
    pub fn heard(&self) -> String {
        self.weft.stdout()
    }

    /// Ends it as Ctrl-C would, and waits for the end of `weft run`.
    pub fn stop(mut self) -> i32 {
        self.weft.signal(Signal::SIGTERM);
        self.weft.wait(Duration::from_secs(15))
    }
}

fn in_namespace(pid: u32, args: &[&str], input: &[u8]) -> Out {
    let mut argv = enter(pid);
    argv.extend(args.iter().map(|a| (*a).to_owned()));
    run_command(&argv, &[], input, LIMIT)
}

fn enter(pid: u32) -> Vec<String> {
    let target = format!("--target={pid}");
    ["nsenter", &target, "--net", "--mount"]
        .map(str::to_owned)
        .to_vec()
}

/// The descendant of `weft run` that lives in another network namespace.
fn inner_process(weft_run: u32) -> u32 {
    let outer = net_of(weft_run);
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(pid) = descendants(weft_run)
            .into_iter()
            .find(|p| net_of(*p).is_some() && net_of(*p) != outer)
        {
            return pid;
        }
        assert!(
            Instant::now() < end,
            "`weft run` has no process in a namespace of its own"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn net_of(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut all = Vec::new();
    let mut open = vec![pid];
    while let Some(parent) = open.pop() {
        let children = children(parent);
        all.extend(&children);
        open.extend(children);
    }
    all
}

fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let texts = threads.filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    texts
        .flat_map(|t| {
            t.split_whitespace()
                .filter_map(|p| p.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

fn address(links: &Value, family: &str) -> String {
    let infos = links
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|l| l["addr_info"].as_array())
        .flatten();
    let mut global = infos.filter(|i| i["family"] == family && i["scope"] == "global");
    let found = global.next().and_then(|i| i["local"].as_str());
    found
        .unwrap_or_else(|| panic!("no global {family} address in {links}"))
        .to_owned()
}
