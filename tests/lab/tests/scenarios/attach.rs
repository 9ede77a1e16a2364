//! Attaching namespaces and processes by hand, and `weft run` itself.

use std::time::Duration;

use nix::sys::signal::Signal;
use weft_lab::{Host, Lab};

/// A bare namespace named by the host.
fn bare(host: &Host, name: &str) -> String {
    let netns = format!("{}-{name}", host.space().name());
    host.run(&["ip", "netns", "add", &netns]).ok();
    host.run(&["ip", "-n", &netns, "link", "set", "lo", "up"])
        .ok();
    netns
}

#[test]
fn a_namespace_is_attached_by_path_and_detached() {
    let lab = Lab::new("netns");
    let [h1, h2] = lab.pair();
    let b = h2.serve("b", &[]);
    let netns = bare(&h1, "blue");
    let path = format!("/run/netns/{netns}");
    let got = h1
        .weft(&[
            "attach", "--netns", &path, "--name", "blue", "--ifname", "mesh0", "--json",
        ])
        .json();
    let ip = got["ip"].as_str().unwrap().to_owned();
    // It returned, so all is in place: no waiting.
    let inside = |args: &[&str]| h1.run(&[&["ip", "netns", "exec", &netns], args].concat());
    inside(&[
        "dig",
        "+short",
        "+time=2",
        "@10.47.0.1",
        "blue.weft.internal",
    ])
    .ok();
    assert!(
        inside(&["ip", "-o", "addr", "show", "mesh0"])
            .ok()
            .contains(&ip)
    );
    lab.wait("it is reached from the other host", 20, || b.pings(&ip));
    assert!(inside(&["ping", "-c1", "-W2", &b.ip().to_string()]).is_ok());
    let again = h1
        .weft(&["attach", "--netns", &path, "--ifname", "mesh0"])
        .fails_with(1);
    assert!(
        again.contains("mesh0") || again.contains("already"),
        "{again}"
    );
    h1.weft(&["detach", "--netns", &path, "--ifname", "mesh0"])
        .ok();
    assert!(
        !inside(&["ip", "link", "show", "mesh0"]).is_ok(),
        "the interface is still there"
    );
    h1.weft(&["detach", "--netns", &path, "--ifname", "mesh0"])
        .ok();
    lab.wait("nobody knows it any more", 20, || {
        !h2.weft(&["ps", "--json"]).json().to_string().contains(&ip) && !b.pings(&ip)
    });
    h1.run(&["ip", "netns", "del", &netns]).ok();
}

#[test]
fn a_process_is_attached_by_its_pid_and_forgotten_when_its_namespace_dies() {
    let lab = Lab::new("pid");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let sleeper = host.spawn("sleeper", &["unshare", "--net", "sleep", "1000"]);
    let own = std::fs::read_link(format!("/proc/{}/ns/net", host.daemon_pid())).unwrap();
    lab.wait("it has a namespace of its own", 5, || {
        std::fs::read_link(format!("/proc/{}/ns/net", sleeper.pid())).is_ok_and(|net| net != own)
            && std::fs::read_to_string(format!("/proc/{}/comm", sleeper.pid()))
                .is_ok_and(|c| c.trim() == "sleep")
    });
    let got = host
        .weft(&[
            "attach",
            "--pid",
            &sleeper.pid().to_string(),
            "--name",
            "sleeper",
            "--json",
        ])
        .json();
    let ip = got["ip"].as_str().unwrap().to_owned();
    assert!(
        host.run(&["ping", "-c1", "-W2", &ip]).is_ok(),
        "the host reaches it"
    );
    drop(sleeper);
    lab.wait("the endpoint is gone", 20, || {
        !host
            .weft(&["ps", "--json"])
            .json()
            .to_string()
            .contains(&ip)
    });
}

#[test]
fn foolish_targets_are_refused() {
    let lab = Lab::new("targets");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let link = lab.dir().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    let link = link.to_string_lossy().into_owned();
    let own = host.space().path();
    let domain = format!("/run/netns/{}", host.status()["netns"].as_str().unwrap());
    let pid = host.daemon_pid().to_string();
    for target in [
        ["--netns", "/etc/passwd"],
        ["--netns", &link],
        ["--netns", "/run/netns/../../etc/passwd"],
        ["--netns", "/run/netns/nobody"],
        ["--netns", "/proc/self/ns/mnt"],
        ["--netns", &own],
        ["--netns", &domain],
        ["--pid", "4194304"],
        ["--pid", &pid],
    ] {
        let out = host.weft(&[&["attach"], &target[..]].concat());
        assert!(matches!(out.code, 1 | 2), "{out}");
        assert_eq!(
            out.stderr.trim().lines().count(),
            1,
            "one clear line: {out}"
        );
    }
    assert_eq!(host.status()["endpoints_local"], host.status()["endpoints"]);
    assert_eq!(host.alive(), 1);
}

#[test]
fn run_passes_signals_environment_and_exit_status_through() {
    let lab = Lab::new("run");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    assert_eq!(host.weft(&["run", "--", "sh", "-c", "exit 7"]).code, 7);
    assert_eq!(
        host.weft(&["run", "--", "sh", "-c", "kill -KILL $$"]).code,
        128 + 9
    );
    assert_eq!(host.weft(&["run", "--", "/nonexistent"]).code, 127);
    assert_eq!(
        host.weft(&["run", "-e", "COLOUR=blue", "--", "sh", "-c", "echo $COLOUR"])
            .ok(),
        "blue"
    );
    let resolv = host.weft(&["run", "--", "cat", "/etc/resolv.conf"]).ok();
    assert!(
        resolv.contains("nameserver 10.47.0.1") && resolv.contains("search weft.internal"),
        "{resolv}"
    );
    assert_eq!(
        resolv.matches("nameserver").count(),
        1,
        "the only name server: {resolv}"
    );
    let weft = Host::binary("weft");
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut run = host.spawn("trap", &[&weft, "run", "--", "sh", "-c", script]);
    run.wait_for("ready", Duration::from_secs(20));
    run.signal(Signal::SIGTERM);
    assert_eq!(run.wait(Duration::from_secs(10)), 3);
    assert!(run.stdout().contains("caught"));
    lab.wait("all of them are detached", 10, || {
        host.status()["endpoints_local"]
            .as_u64()
            .is_some_and(|n| n <= 1)
    });
}

#[test]
fn a_killed_run_takes_its_command_and_its_endpoint_along() {
    let lab = Lab::new("runkill");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let mut a = host.serve("a", &[]);
    let (pid, ip) = (a.pid(), a.ip().to_string());
    a.weft_run().signal(Signal::SIGKILL);
    a.weft_run().wait(Duration::from_secs(5));
    lab.wait("the command is dead", 10, || {
        !std::path::Path::new(&format!("/proc/{pid}/ns/net")).exists() || is_dead(pid)
    });
    lab.wait("the endpoint is gone", 20, || {
        !host
            .weft(&["ps", "--json"])
            .json()
            .to_string()
            .contains(&ip)
    });
}

fn is_dead(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |s| s.contains(") Z "))
}

#[test]
fn exec_runs_inside_the_domain() {
    let lab = Lab::new("exec");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let links = host.weft(&["exec", "--", "ip", "-o", "link"]).ok();
    assert!(links.contains("wu0") && links.contains("wh0"), "{links}");
    assert_eq!(host.weft(&["exec", "--", "sh", "-c", "exit 5"]).code, 5);
    let outside = host.run(&["ip", "-o", "link"]).ok();
    assert!(
        outside.contains("weft0") && !outside.contains("wu0"),
        "{outside}"
    );
}
