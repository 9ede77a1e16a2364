//! The demo's network: namespaces and veth pairs, by iproute2.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// All namespaces of the demo begin so; the owner's process id follows.
const PREFIX: &str = "wdemo-";
const NAMES: &str = "/run/netns";
/// Networks for documentation (RFC 5737) and benchmarks (RFC 2544): in no use anywhere, and inside namespaces anyway.
const SUBNETS: [&str; 4] = ["192.0.2", "198.51.100", "203.0.113", "198.18.7"];

/// One namespace of the demo that is a host: its name there and in the story.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) name: &'static str,
    pub(crate) netns: String,
    pub(crate) addr: String,
    /// The router's end of its cable.
    cable: String,
}

/// The router and all sites.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    pub(crate) router: String,
    pub(crate) sites: Vec<Site>,
}

impl Net {
    /// What will be made for these sites, in this order.
    pub(crate) fn plan(names: [&'static str; 4]) -> Self {
        let pid = std::process::id();
        let sites = names.iter().zip(SUBNETS).map(|(name, subnet)| Site {
            name,
            netns: format!("{PREFIX}{pid}-{name}"),
            addr: format!("{subnet}.10"),
            cable: format!("to-{name}"),
        });
        Self {
            router: format!("{PREFIX}{pid}-router"),
            sites: sites.collect(),
        }
    }

    /// Makes it.
    pub(crate) fn build(&self) -> anyhow::Result<()> {
        ip(&["netns", "add", &self.router])?;
        ip(&["-n", &self.router, "link", "set", "lo", "up"])?;
        ip(&[
            "netns",
            "exec",
            &self.router,
            "sh",
            "-c",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
        ])?;
        self.sites.iter().try_for_each(|site| self.build_site(site))
    }

    fn build_site(&self, site: &Site) -> anyhow::Result<()> {
        let gateway = site.gateway();
        let inside = |args: &[&str]| ip(&[&["-n", &site.netns], args].concat());
        let outside = |args: &[&str]| ip(&[&["-n", &self.router], args].concat());
        ip(&["netns", "add", &site.netns])?;
        inside(&["link", "set", "lo", "up"])?;
        outside(&[
            "link",
            "add",
            &site.cable,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &site.netns,
        ])?;
        outside(&["addr", "add", &format!("{gateway}/24"), "dev", &site.cable])?;
        outside(&["link", "set", &site.cable, "up"])?;
        inside(&["addr", "add", &format!("{}/24", site.addr), "dev", "eth0"])?;
        inside(&["link", "set", "eth0", "up"])?;
        inside(&["route", "add", "default", "via", &gateway])
    }

    /// Cuts a site's cable at the router.
    pub(crate) fn cut(&self, site: &Site) -> anyhow::Result<()> {
        ip(&["-n", &self.router, "link", "set", &site.cable, "down"])
    }

    /// Removes all of it, with every process inside and every domain attached to it; says what would not go.
    pub(crate) fn remove(&self) -> Vec<String> {
        let mut all: Vec<&str> = self.sites.iter().map(|s| s.netns.as_str()).collect();
        all.push(&self.router);
        all.into_iter()
            .filter(|name| !remove_with_domain(name))
            .map(str::to_owned)
            .collect()
    }
}

impl Site {
    fn gateway(&self) -> String {
        let (subnet, _) = self
            .addr
            .rsplit_once('.')
            .expect("planned addresses have dots");
        format!("{subnet}.1")
    }
}

/// Removes what demos left behind whose process is gone.
pub(crate) fn sweep() {
    for entry in std::fs::read_dir(NAMES).into_iter().flatten().flatten() {
        if let Some(name) = entry.file_name().to_str().filter(|n| is_orphan(n, PREFIX)) {
            remove_with_domain(name);
        }
    }
}

/// Is it of a demo whose process is gone? Names of the demo are `prefix`, the process id, and maybe more after a dash.
pub(super) fn is_orphan(name: &str, prefix: &str) -> bool {
    let owner = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
    owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

fn remove_with_domain(netns: &str) -> bool {
    let domain = domain_of(netns);
    kill_inside(netns);
    let domain_gone = domain.is_none_or(|domain| remove(&domain));
    remove(netns) && domain_gone
}

/// Removes a namespace with every process in it; false when it would not go.
pub(super) fn remove(netns: &str) -> bool {
    let path = Path::new(NAMES).join(netns);
    if path.exists() {
        kill_inside(netns);
        // What can't be removed is reported by the caller.
        let _ = ip(&["netns", "del", netns]);
    }
    !path.exists()
}

/// The namespace at the other end of `weft0`: found without the daemon, which may be dead.
fn domain_of(netns: &str) -> Option<String> {
    let link = output(&["-n", netns, "-j", "link", "show", "weft0"]).ok()?;
    let link: serde_json::Value = serde_json::from_str(&link).ok()?;
    let id = link.get(0)?.get("link_netnsid")?.as_u64()?;
    let ids = output(&["-n", netns, "netns", "list-id"]).ok()?;
    let wanted = format!("nsid {id} (iproute2 netns name: ");
    let name = ids
        .lines()
        .find_map(|line| line.strip_prefix(&wanted))?
        .trim_end_matches([')', ' ']);
    name.starts_with("weft-").then(|| name.to_owned())
}

fn kill_inside(netns: &str) {
    use nix::sys::signal::{Signal, kill};
    let pids = output(&["netns", "pids", netns]).unwrap_or_default();
    for pid in pids.split_whitespace().filter_map(|p| p.parse().ok()) {
        // Gone by itself is as good.
        let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    output(args).map(drop)
}

fn output(args: &[&str]) -> anyhow::Result<String> {
    let out = Command::new("ip").args(args).stdin(Stdio::null()).output();
    let out = out.context("can't run `ip`: install the package iproute2")?;
    if !out.status.success() {
        bail!(
            "`ip {}`: {}",
            args.join(" "),
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_of_dead_demos_are_swept() {
        let is_orphan = |name: &str| is_orphan(name, PREFIX);
        assert!(!is_orphan(&format!("{PREFIX}{}-alpha", std::process::id())));
        assert!(
            is_orphan(&format!("{PREFIX}4194305-alpha")),
            "no process has a number beyond the kernel's limit"
        );
        assert!(!is_orphan("weft-abcdefgh") && !is_orphan("blue") && !is_orphan(PREFIX));
    }

    #[test]
    fn every_site_has_a_subnet_of_its_own() {
        let net = Net::plan(["a", "b", "c", "d"]);
        assert_eq!(net.sites[1].addr, "198.51.100.10");
        assert_eq!(net.sites[1].gateway(), "198.51.100.1");
    }
}
