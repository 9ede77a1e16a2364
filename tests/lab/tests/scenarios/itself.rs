//! The lab's own promises, without any weft: what it shows elsewhere would be worth nothing if these did not hold.

use weft_lab::{Host, Lab};

fn pings(from: &Host, to: std::net::IpAddr) -> bool {
    from.run(&["ping", "-c1", "-W1", &to.to_string()]).is_ok()
}

#[test]
fn hosts_of_different_subnets_reach_each_other_only_through_the_router() {
    let lab = Lab::new("route");
    let (a, b) = (lab.subnet("a"), lab.subnet("b"));
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &b));
    assert!(pings(&h1, h2.v4().into()), "IPv4");
    assert!(pings(&h1, h2.v6().into()), "IPv6");
    lab.router().ip(&["link", "set", "br-b", "down"]).ok();
    assert!(!pings(&h1, h2.v4().into()), "there is another way");
}

#[test]
fn a_cut_holds_inside_a_subnet_and_heals() {
    let lab = Lab::new("cut");
    let a = lab.subnet("a");
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|n| lab.host(n, &a));
    h1.cut(&h2);
    assert!(
        !pings(&h1, h2.v4().into()) && !pings(&h2, h1.v6().into()),
        "the cut leaks"
    );
    assert!(
        pings(&h1, h3.v4().into()) && pings(&h3, h2.v4().into()),
        "the cut is too wide"
    );
    h1.heal(&h2);
    assert!(
        pings(&h1, h2.v4().into()) && pings(&h2, h1.v6().into()),
        "not healed"
    );
    h3.isolate();
    assert!(!pings(&h1, h3.v4().into()), "not isolated");
    h3.reconnect();
    lab.wait("the cable works again", 5, || pings(&h1, h3.v4().into()));
}

#[test]
fn loss_takes_some_packets_and_not_all() {
    let lab = Lab::new("loss");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.lose(50);
    let out = h1
        .run(&["ping", "-c60", "-i0.01", "-W1", &h2.v4().to_string()])
        .stdout;
    let lost = out
        .split_once("% packet loss")
        .and_then(|(head, _)| head.rsplit(' ').next()?.parse::<f64>().ok());
    let lost = lost.unwrap_or_else(|| panic!("no loss in {out}"));
    assert!(
        (15.0..=85.0).contains(&lost),
        "{lost} % lost instead of about 50"
    );
}

#[test]
fn behind_nat_hosts_reach_out_and_are_not_reached() {
    let lab = Lab::new("nat");
    let a = lab.subnet("a");
    let home = lab.nat("home", &a);
    let (open, hidden) = (lab.host("open", &a), lab.host("hidden", &home));
    let mut server = open.spawn_tool("server", &["serve", "--name", "open", "--port", "80"]);
    server.wait_for("ready", std::time::Duration::from_secs(5));
    let answer = hidden
        .tool(&["ask", "tcp", &format!("{}:80", open.v4())])
        .ok();
    assert!(
        answer.starts_with("open 192.0.2."),
        "the NAT router's address should be seen: {answer}"
    );
    assert!(!pings(&open, hidden.v4().into()), "there is a way in");
}

#[test]
fn a_capture_shows_what_passes() {
    let lab = Lab::new("capture");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    let mut server = h2.spawn_tool("server", &["serve", "--name", "two", "--port", "7000"]);
    server.wait_for("ready", std::time::Duration::from_secs(5));
    let capture = h1.capture("wire");
    h1.tool(&[
        "ask",
        "udp",
        &format!("{}:7000", h2.v4()),
        "--text",
        "marker-of-the-test",
    ])
    .ok();
    h1.tool(&[
        "ask",
        "udp",
        &format!("[{}]:7000", h2.v6()),
        "--text",
        "marker-of-the-test",
    ])
    .ok();
    lab.wait("both ways of both families are recorded", 5, || {
        capture
            .frames()
            .iter()
            .filter(|f| f.is_udp(7000) && f.contains(b"marker-of-the-test"))
            .count()
            >= 4
    });
    let frames = capture.stop();
    assert!(
        frames
            .iter()
            .any(|f| f.src == Some(h1.v6().into()) && f.dst == Some(h2.v6().into()))
    );
}

#[test]
fn a_lab_leaves_nothing_behind() {
    let lab = Lab::new("gone");
    let a = lab.subnet("a");
    let host = lab.host("h1", &a);
    let sleeper = host.spawn("sleep", &["sleep", "1000"]);
    let (space, dir, pid) = (host.space().path(), lab.dir().to_owned(), sleeper.pid());
    assert!(std::path::Path::new(&space).exists());
    drop(lab);
    assert!(
        !std::path::Path::new(&space).exists(),
        "the namespace is still there"
    );
    assert!(!dir.exists(), "the directory is still there");
    drop(sleeper);
    assert!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "the process is still there"
    );
}

#[test]
fn a_namespace_named_by_a_host_is_seen_outside_of_it() {
    let lab = Lab::new("named");
    let host = lab.host("h1", &lab.subnet("a"));
    let name = format!("{}-inner", host.space().name());
    host.run(&["ip", "netns", "add", &name]).ok();
    lab.router()
        .run(&["ip", "netns", "exec", &name, "true"])
        .ok();
    let resolv = host.run(&["cat", "/etc/resolv.conf"]).ok();
    assert_eq!(
        resolv,
        format!("nameserver {}", host.subnet_gateway()),
        "each host has its own resolv.conf"
    );
    assert_ne!(
        std::fs::read_to_string("/etc/resolv.conf").unwrap().trim(),
        resolv,
        "and nobody else has it"
    );
    host.run(&["ip", "netns", "del", &name]).ok();
}
