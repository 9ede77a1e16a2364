//! All a host's kernel shows of its network, to compare before and after.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use crate::host::Host;

/// What the kernel shows, by command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, Vec<String>>);

const COMMANDS: &[&str] = &[
    "ip -o link",
    "ip -o addr",
    "ip route show table all",
    "ip -6 route show table all",
    "ip rule",
    "ip -6 rule",
    "ip nexthop",
    "ip -6 addrlabel",
    "nft -s list ruleset",
    "iptables-save",
    "ip6tables-save",
    "sysctl -a -r ^net\\.",
    "ss -Hlnptu",
    "cat /proc/self/mountinfo",
];

/// Counters and the like: they differ between any two looks.
const VOLATILE: &[&str] = &[
    "nf_conntrack_count",
    "ipv4.tcp_mem",
    "fs.",
    "net.core.netdev_rss_key",
    "net.netfilter.nf_conntrack_max",
    "net.ipv4.route.flush",
    "net.ipv6.route.flush",
    "stable_secret",
];

impl Snapshot {
    /// Looks at `host` now.
    ///
    /// Duplicate address detection of the lab's own links must be over by then: it is the kernel's change, nobody's fault.
    pub fn take(host: &Host) -> Self {
        let end = Instant::now() + Duration::from_secs(10);
        while !host
            .run(&["ip", "-6", "-o", "addr", "show", "tentative"])
            .stdout
            .is_empty()
        {
            assert!(Instant::now() < end, "addresses stay tentative");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut all = BTreeMap::new();
        for command in COMMANDS {
            let args: Vec<&str> = command.split(' ').collect();
            let out = host.run(&args);
            let mut lines: Vec<String> = out
                .stdout
                .lines()
                .filter_map(|l| steady(command, l))
                .collect();
            lines.sort();
            all.insert((*command).to_owned(), lines);
        }
        Self(all)
    }

    /// What is in one and not in the other, one line each; empty when they are equal.
    pub fn difference(&self, later: &Snapshot) -> String {
        let mut text = String::new();
        let mut note = |command: &str, what: &str, line: &str| {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{command}: {what}: {line}");
        };
        for (command, before) in &self.0 {
            let after = later.0.get(command).cloned().unwrap_or_default();
            for line in before.iter().filter(|l| !after.contains(l)) {
                note(command, "gone", line);
            }
            for line in after.iter().filter(|l| !before.contains(l)) {
                note(command, "new", line);
            }
        }
        text
    }
}

fn steady(command: &str, line: &str) -> Option<String> {
    if command.ends_with("-save") && line.starts_with('#') {
        return None;
    }
    // Other tests mount at the same time: only what lies in the lab's own directories counts.
    if command.contains("mountinfo") {
        return line.contains("/weft-lab-").then(|| mount_point(line));
    }
    let volatile = VOLATILE.iter().any(|v| line.contains(v));
    (!volatile).then(|| line.to_owned())
}

fn mount_point(line: &str) -> String {
    line.split(' ').nth(4).unwrap_or_default().to_owned()
}
