//! Network namespaces of the lab, and sweeping those that a killed test left behind.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::command::{Out, run_command, signal};

/// All namespaces of the lab begin so; the owner's process id follows.
const PREFIX: &str = "wl-";
/// Directories of the lab under the temporary directory.
pub(crate) const DIR_PREFIX: &str = "weft-lab-";
const NAMES: &str = "/run/netns";

/// A named network namespace; [`Netns::delete`] removes it with all that runs in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes `wl-<pid>-<lab>-<name>`.
    pub(crate) fn create(lab: usize, name: &str) -> Self {
        let netns = Self {
            name: format!("{PREFIX}{}-{lab}-{name}", std::process::id()),
        };
        sh(&["ip", "netns", "add", &netns.name]).ok();
        netns.ip(&["link", "set", "lo", "up"]).ok();
        netns
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> String {
        format!("{NAMES}/{}", self.name)
    }

    /// `ip -n <name> …`.
    pub fn ip(&self, args: &[&str]) -> Out {
        let mut all = vec!["ip", "-n", &self.name];
        all.extend(args);
        sh(&all)
    }

    /// A command with this namespace's network, nothing else changed.
    pub fn run(&self, args: &[&str]) -> Out {
        sh(&self
            .enter(args)
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>())
    }

    /// Loads `rules` in one nft transaction.
    pub fn nft(&self, rules: &str) {
        let argv = self.enter(&["nft", "-f", "-"]);
        run_command(&argv, &[], rules.as_bytes(), LIMIT).ok();
    }

    /// Sets one sysctl of this namespace.
    pub fn sysctl(&self, key: &str, value: &str) {
        self.run(&["sysctl", "-qw", &format!("{key}={value}")]).ok();
    }

    pub(crate) fn enter(&self, args: &[&str]) -> Vec<String> {
        let net = format!("--net={}", self.path());
        ["nsenter", &net]
            .iter()
            .chain(args)
            .map(|w| (*w).to_owned())
            .collect()
    }

    /// Kills what runs in it, removes the domain attached to it by `weft0`, and the namespace itself.
    pub fn delete(&self) {
        let domain = self.domain();
        kill_inside(&self.name);
        if let Some(domain) = domain {
            remove(&domain);
        }
        remove(&self.name);
    }

    /// The namespace at the other end of `weft0`, by name: found without the daemon's help, which may be dead.
    pub(crate) fn domain(&self) -> Option<String> {
        let links = self.ip(&["-j", "link", "show", "weft0"]);
        let link: serde_json::Value = serde_json::from_str(&links.stdout).ok()?;
        let wanted = link.get(0)?.get("link_netnsid")?.as_u64()?;
        let ids = self.ip(&["netns", "list-id"]).stdout;
        ids.lines().find_map(|line| {
            let (id, name) = line
                .strip_prefix("nsid ")?
                .split_once(" (iproute2 netns name: ")?;
            let name = name.trim_end_matches([')', ' ']);
            (id.trim().parse() == Ok(wanted) && name.starts_with("weft-")).then(|| name.to_owned())
        })
    }
}

/// A directory in which namespaces get their names instead of `/run/netns`, so that all that one command names, and
/// nothing else, is seen in it.
#[derive(Debug)]
pub struct Names(tempfile::TempDir);

impl Names {
    /// An empty one.
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a scratch directory for names"))
    }

    /// `argv` with these names; it becomes that process, so signals reach it.
    pub fn with(&self, argv: &[&str]) -> Vec<String> {
        let script = format!("mkdir -p {NAMES} && mount --bind \"$0\" {NAMES} && exec \"$@\"");
        let dir = self.0.path().to_str().expect("the lab's paths are text");
        ["unshare", "--mount", "sh", "-c", &script, dir]
            .iter()
            .chain(argv)
            .map(|w| (*w).to_owned())
            .collect()
    }

    /// The names there now.
    pub fn list(&self) -> Vec<String> {
        names(self.0.path())
    }
}

impl Default for Names {
    fn default() -> Self {
        Self::new()
    }
}

const LIMIT: Duration = Duration::from_secs(30);

fn sh(args: &[&str]) -> Out {
    let argv: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    run_command(&argv, &[], &[], LIMIT)
}

fn kill_inside(name: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let pids = sh(&["ip", "netns", "pids", name]).stdout;
        let mut pids = pids
            .split_whitespace()
            .filter_map(|p| p.parse().ok())
            .peekable();
        if pids.peek().is_none() || Instant::now() > end {
            return;
        }
        pids.for_each(|pid| signal(pid, Signal::SIGKILL));
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn remove(name: &str) {
    if Path::new(NAMES).join(name).exists() {
        kill_inside(name);
        let _ = sh(&["ip", "netns", "del", name]);
    }
}

/// Removes namespaces and directories of labs whose process is gone.
pub(crate) fn sweep() {
    for name in names(Path::new(NAMES)) {
        if is_orphan(&name, PREFIX) {
            Netns { name }.delete();
        }
    }
    let temp = std::env::temp_dir();
    for name in names(&temp) {
        if is_orphan(&name, DIR_PREFIX) {
            let _ = std::fs::remove_dir_all(temp.join(name));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

fn is_orphan(name: &str, prefix: &str) -> bool {
    let owner = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
    owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}
