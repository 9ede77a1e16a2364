//! `weft down` leaves the host as it found it, and so does a start that does not get through; other firewalls beside
//! weft.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use weft_lab::{Host, Lab, Names, Snapshot, Spawned};

/// A busy host: attached containers, a service with published ports, egress.
fn be_busy(lab: &Lab, h1: &Host, h2: &Host) {
    let (a, b) = (h1.serve("a", &["web"]), h2.serve("b", &["web"]));
    h1.weft(&[
        "service",
        "create",
        "web",
        "--port",
        "80",
        "--publish",
        "8080:80",
        "--publish",
        "8443:80",
    ])
    .ok();
    lab.wait("containers talk", 20, || {
        a.ask("tcp", &format!("{}:80", b.ip())).is_ok()
    });
    let to = format!("{}:8080", h1.v4());
    lab.wait("the published port answers", 20, || {
        h2.tool(&["ask", "tcp", &to, "--wait", "2"]).is_ok()
    });
}

fn assert_clean(host: &Host, before: &Snapshot, domain: &str, what: &str) {
    let difference = before.difference(&Snapshot::take(host));
    assert!(difference.is_empty(), "{what}:\n{difference}");
    assert!(
        !Path::new("/run/netns").join(domain).exists(),
        "{what}: the domain {domain} is still there"
    );
    assert!(!host.socket().exists(), "{what}: the socket is still there");
}

#[test]
fn down_leaves_the_host_as_it_was() {
    let lab = Lab::new("down");
    let [h1, h2] = lab.two();
    let before = Snapshot::take(&h1);
    lab.cluster(&[h1.clone(), h2.clone()]);
    be_busy(&lab, &h1, &h2);
    let domain = h1.status()["netns"].as_str().unwrap().to_owned();
    assert!(
        Path::new("/run/netns").join(&domain).exists(),
        "the domain should be /run/netns/{domain}"
    );
    h1.weft(&["down"]).ok();
    assert_clean(&h1, &before, &domain, "after down");
    h1.weft(&["down"]).ok();
    assert!(h1.state_dir().exists(), "the state is kept");
    h1.up(&[]);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    h1.weft(&["down"]).ok();
    assert_clean(&h1, &before, &domain, "after a second round");
}

#[test]
fn down_takes_what_is_still_attached_along() {
    let lab = Lab::new("downbusy");
    let host = lab.host("h1", &lab.subnet("a"));
    let before = Snapshot::take(&host);
    host.up(&[]);
    let a = host.serve("a", &["web"]);
    let domain = host.status()["netns"].as_str().unwrap().to_owned();
    host.weft(&["down"]).ok();
    assert_clean(
        &host,
        &before,
        &domain,
        "after down with a container attached",
    );
    assert!(
        !a.run(&["ip", "link", "show", "eth0"]).is_ok(),
        "the container still has its interface"
    );
}

#[test]
fn down_after_kill_9_and_up_leaves_the_host_as_it_was() {
    let lab = Lab::new("downkill");
    let [h1, h2] = lab.two();
    let before = Snapshot::take(&h1);
    lab.cluster(&[h1.clone(), h2.clone()]);
    be_busy(&lab, &h1, &h2);
    let domain = h1.status()["netns"].as_str().unwrap().to_owned();
    h1.kill9();
    h1.up(&[]);
    h1.weft(&["down"]).ok();
    assert_clean(&h1, &before, &domain, "after kill -9, up, down");
}

#[test]
fn down_without_a_daemon_clears_what_a_killed_one_left() {
    let lab = Lab::new("downdead");
    let host = lab.host("h1", &lab.subnet("a"));
    let before = Snapshot::take(&host);
    host.up(&[]);
    let domain = host.status()["netns"].as_str().unwrap().to_owned();
    host.kill9();
    host.weft(&["down"]).ok();
    assert_clean(&host, &before, &domain, "after kill -9 and down");
}

#[test]
fn reset_forgets_the_cluster() {
    let lab = Lab::new("reset");
    let host = lab.host("h1", &lab.subnet("a"));
    let before = Snapshot::take(&host);
    host.up(&[]);
    let status = host.status();
    let domain = status["netns"].as_str().unwrap().to_owned();
    host.weft(&["reset"]).ok();
    assert_clean(&host, &before, &domain, "after reset");
    host.up(&[]);
    assert_ne!(host.status()["node"], status["node"], "a new identity");
}

/// A start in the foreground whose domain is seen in `names`.
fn start_in(names: &Names, host: &Host, flags: &[&str]) -> Spawned {
    let weft = Host::binary("weft");
    let up = [&weft, "up", "--foreground", "--name", host.name()];
    let argv = names.with(&[&up[..], flags].concat());
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    host.spawn("start", &argv)
}

fn assert_taken_back(mut start: Spawned, names: &Names, host: &Host, before: &Snapshot) {
    let code = start.wait(Duration::from_secs(20));
    assert_eq!(code, 1, "{}", start.stderr());
    assert_eq!(names.list(), Vec::<String>::new(), "a domain is left");
    let difference = before.difference(&Snapshot::take(host));
    assert!(difference.is_empty(), "{difference}");
}

#[test]
fn a_start_that_is_interrupted_leaves_the_host_as_it_was() {
    let lab = Lab::new("interrupted");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    let token = h1.token(&[]);
    h1.isolate();
    let before = Snapshot::take(&h2);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let names = Names::new();
        let mut start = start_in(&names, &h2, &["--join", &token]);
        start.wait_for("let this host in", Duration::from_secs(20));
        assert_eq!(names.list().len(), 1, "the domain is made before that");
        start.signal(signal);
        assert_taken_back(start, &names, &h2, &before);
    }
    h1.reconnect();
    h2.join(&h1);
    lab.wait_members(&[h1, h2]);
}

#[test]
fn a_start_that_fails_at_its_end_leaves_the_host_as_it_was() {
    let lab = Lab::new("late");
    let host = lab.host("h1", &lab.subnet("a"));
    let before = Snapshot::take(&host);
    // All of the kernel is set up when the door turns out to be blocked.
    std::fs::create_dir_all(host.socket().join("in-the-way")).unwrap();
    let names = Names::new();
    let start = start_in(&names, &host, &[]);
    assert_taken_back(start, &names, &host, &before);
    std::fs::remove_dir_all(host.socket()).unwrap();
    host.up(&[]);
}

/// Docker's chains as it lays them out, with its policy.
const DOCKER: &[&[&str]] = &[
    &["-P", "FORWARD", "DROP"],
    &["-N", "DOCKER-USER"],
    &["-N", "DOCKER"],
    &["-A", "FORWARD", "-j", "DOCKER-USER"],
    &["-A", "FORWARD", "-o", "docker0", "-j", "DOCKER"],
    &["-A", "DOCKER-USER", "-j", "RETURN"],
];

fn be_docker(host: &Host) {
    for tool in ["iptables", "ip6tables"] {
        for rule in DOCKER {
            let args: Vec<&str> = std::iter::once(tool).chain(rule.iter().copied()).collect();
            host.run(&args).ok();
        }
    }
    host.space().sysctl("net.ipv4.ip_forward", "1");
}

#[test]
fn beside_docker_s_forward_drop_everything_works_and_down_takes_its_rule_back() {
    let lab = Lab::new("docker");
    let [h1, h2] = lab.two();
    let outside = lab.host("outside", &lab.subnet("o"));
    be_docker(&h1);
    let before = Snapshot::take(&h1);
    lab.cluster(&[h1.clone(), h2.clone()]);
    let (a, b) = (h1.serve("a", &[]), h2.serve("web", &[]));
    lab.wait("containers talk", 20, || {
        a.ask("tcp", &format!("{}:80", b.ip())).is_ok()
    });
    h1.publish_web();
    for to in [format!("{}:8080", h1.v4()), format!("[{}]:8080", h1.v6())] {
        lab.wait(&format!("{to} answers from outside"), 20, || {
            outside.tool(&["ask", "tcp", &to, "--wait", "2"]).is_ok()
        });
    }
    let mut server = outside.spawn_tool("server", &["serve", "--name", "outside", "--port", "80"]);
    server.wait_for("ready", std::time::Duration::from_secs(5));
    let answer = a.ask("tcp", &format!("{}:80", outside.v4())).ok();
    assert!(
        answer.contains(&h1.v4().to_string()),
        "egress is masqueraded as the host: {answer}"
    );
    let said = h1.status()["host_changes"].to_string();
    assert!(
        said.contains("DOCKER-USER"),
        "status should say what was added: {said}"
    );
    let domain = h1.status()["netns"].as_str().unwrap().to_owned();
    drop(a);
    h1.weft(&["down"]).ok();
    assert_clean(&h1, &before, &domain, "after down beside docker");
}

#[test]
fn docker_that_comes_later_is_noticed() {
    let lab = Lab::new("dockerlate");
    let [h1, h2] = lab.two();
    lab.cluster(&[h1.clone(), h2.clone()]);
    let (a, b) = (h1.serve("a", &["web"]), h2.serve("b", &[]));
    h1.publish_web();
    lab.wait("containers talk", 20, || a.pings(&b.ip().to_string()));
    be_docker(&h1);
    assert!(
        a.pings(&b.ip().to_string()),
        "traffic between containers never notices"
    );
    let to = format!("{}:8080", h1.v4());
    lab.wait("the published port answers again", 20, || {
        h2.tool(&["ask", "tcp", &to, "--wait", "2"]).is_ok()
    });
}

#[test]
fn a_forwarding_switch_that_somebody_else_needs_stays_up() {
    let lab = Lab::new("forward");
    let host = lab.host("h1", &lab.subnet("a"));
    host.space().sysctl("net.ipv4.ip_forward", "1");
    host.up(&[]);
    host.publish_web();
    host.weft(&["down"]).ok();
    assert_eq!(host.run(&["sysctl", "-n", "net.ipv4.ip_forward"]).ok(), "1");
}

#[test]
fn containers_reach_the_outside_through_their_host() {
    let lab = Lab::new("egress");
    let host = lab.host("h1", &lab.subnet("a"));
    let outside = lab.host("outside", &lab.subnet("o"));
    let mut server = outside.spawn_tool("server", &["serve", "--name", "outside", "--port", "80"]);
    server.wait_for("ready", std::time::Duration::from_secs(5));
    host.up(&[]);
    let a = host.serve("a", &[]);
    for (to, seen) in [
        (format!("{}:80", outside.v4()), host.v4().to_string()),
        (format!("[{}]:80", outside.v6()), host.v6().to_string()),
    ] {
        lab.wait(&format!("{to} answers"), 20, || {
            a.tool(&["ask", "tcp", &to, "--wait", "2"]).is_ok()
        });
        let answer = a.ask("udp", &to).ok();
        assert_eq!(answer.split(' ').nth(1), Some(seen.as_str()), "{answer}");
    }
}
