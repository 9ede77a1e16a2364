//! Which way packets go between two hosts: directly where that can be, through a third where it can't.

use std::time::Duration;

use serde_json::Value;
use weft_lab::{Host, Lab, Spawned, Subnet};

fn row(host: &Host, peer: &Host) -> Value {
    host.peer(peer.name())
}

fn is_direct(host: &Host, peer: &Host) -> bool {
    row(host, peer)["path"].is_string()
}

fn goes_through(host: &Host, peer: &Host, relay: &Host) -> bool {
    row(host, peer)["relay"] == relay.name()
}

/// A public host, and two more, each in a subnet that `behind` makes.
fn homes(lab: &Lab, behind: fn(&Lab, &str, &Subnet) -> Subnet) -> [Host; 3] {
    let public = lab.subnet("net");
    let (left, right) = (behind(lab, "l", &public), behind(lab, "r", &public));
    let hosts = [
        lab.host("hub", &public),
        lab.host("left", &left),
        lab.host("right", &right),
    ];
    lab.cluster(&hosts);
    hosts
}

#[test]
fn two_behind_routers_that_keep_ports_reach_each_other_directly() {
    let lab = Lab::new("punch");
    let [_, left, right] = homes(&lab, Lab::nat);
    let (a, b) = (left.serve("a", &[]), right.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    lab.wait("without anybody between", 30, || {
        is_direct(&left, &right) && is_direct(&right, &left)
    });
    a.run(&["ping", "-c3", "-W2", &b.ip().to_string()]).ok();
}

#[test]
fn two_behind_routers_that_draw_ports_reach_each_other_through_a_third_that_sees_nothing() {
    let lab = Lab::new("symmetric");
    let [hub, left, right] = homes(&lab, Lab::random_nat);
    let (a, b) = (left.serve("a", &[]), right.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    assert!(goes_through(&left, &right, &hub) && goes_through(&right, &left, &hub));
    let text = left.weft(&["peers"]).ok();
    assert!(
        text.contains("right is reached through hub; also tried: "),
        "{text}"
    );
    let tried = row(&left, &right)["paths"].clone();
    let inside = format!("{}:6783", right.v4());
    let refused = tried.as_array().into_iter().flatten().any(|path| {
        path["path"] == inside && path["answered"] == false && path["unanswered"].as_u64() > Some(0)
    });
    assert!(refused, "{tried}");

    let capture = hub.capture("between");
    let word = b"a word that nobody between may read";
    let answer = a.ask("tcp", &format!("{}:80", b.ip())).ok();
    assert!(answer.starts_with("b "), "{answer}");
    let sent = a.run(&[
        "ping",
        "-c3",
        "-i0.2",
        "-p",
        &hex(&word[..16]),
        &b.ip().to_string(),
    ]);
    sent.ok();
    let frames = capture.stop();
    assert!(frames.iter().any(|frame| frame.is_udp(6783)));
    assert!(!frames.iter().any(|frame| frame.contains(&word[..16])));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_public_host_and_one_behind_a_router_need_nobody() {
    let lab = Lab::new("halfnat");
    let public = lab.subnet("net");
    let (first, second) = (lab.nat("l", &public), lab.random_nat("r", &public));
    let hosts = [
        lab.host("hub", &public),
        lab.host("left", &first),
        lab.host("right", &second),
    ];
    lab.cluster(&hosts);
    let [hub, left, right] = &hosts;
    lab.wait("the public one is reached directly", 20, || {
        is_direct(left, hub) && is_direct(right, hub) && is_direct(hub, left)
    });
}

#[test]
fn two_behind_one_router_meet_inside() {
    let lab = Lab::new("inside");
    let public = lab.subnet("net");
    let home = lab.nat("home", &public);
    let hosts = [
        lab.host("hub", &public),
        lab.host("left", &home),
        lab.host("right", &home),
    ];
    lab.cluster(&hosts);
    let [_, left, right] = &hosts;
    let (a, b) = (left.serve("a", &[]), right.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    lab.wait("over the private network", 20, || {
        row(left, right)["path"] == format!("{}:6783", right.v4())
            && row(right, left)["path"] == format!("{}:6783", left.v4())
    });
}

#[test]
fn a_cut_link_is_gone_around_and_gone_back_to() {
    let lab = Lab::new("around");
    let [h1, h2, h3] = lab.trio();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let b_ip = b.ip().to_string();
    lab.wait("they talk", 20, || a.pings(&b_ip));
    assert!(is_direct(&h1, &h2));
    h1.cut(&h2);
    lab.wait("around the cut", 20, || a.pings(&b_ip));
    lab.wait("both say so", 10, || {
        goes_through(&h1, &h2, &h3) && goes_through(&h2, &h1, &h3)
    });
    assert_eq!((h1.alive(), h2.alive(), h3.alive()), (3, 3, 3));
    // A large transfer goes that way whole.
    let answer = a.ask("tcp", &format!("{b_ip}:80")).ok();
    assert!(answer.starts_with("b "), "{answer}");
    h1.heal(&h2);
    lab.wait("directly again", 90, || {
        a.pings(&b_ip) && is_direct(&h1, &h2) && is_direct(&h2, &h1)
    });
}

#[test]
fn who_does_not_want_to_relay_does_not() {
    let lab = Lab::new("norelay");
    let public = ["a", "b", "c"].map(|name| lab.subnet(name));
    let [h1, h2, h3] =
        [("h1", 0), ("h2", 1), ("h3", 2)].map(|(name, n)| lab.host(name, &public[n]));
    h3.up(&["--no-relay"]);
    h1.join(&h3);
    h2.join(&h3);
    lab.wait_members(&[h1.clone(), h2.clone(), h3.clone()]);
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    h1.cut(&h2);
    lab.wait("the way is gone", 20, || {
        row(&h1, &h2)["liveness"] == "silent"
    });
    assert!(!a.pings(&b.ip().to_string()));
    assert!(!goes_through(&h1, &h2, &h3));
}

/// Of a hundred pings, ten a second, so many were answered.
fn answered(pinger: &mut Spawned) -> usize {
    pinger.wait(Duration::from_secs(30));
    pinger.stdout().matches("bytes from").count()
}

#[test]
fn a_host_that_gets_another_address_is_followed_at_once() {
    let lab = Lab::new("roam");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let b_ip = b.ip().to_string();
    lab.wait("they talk", 20, || a.pings(&b_ip));
    let target = format!("--target={}", a.pid());
    let mut pinger = h1.spawn(
        "pinger",
        &["nsenter", &target, "--net", "ping", "-i0.1", "-c100", &b_ip],
    );
    pinger.wait_for("icmp_seq=20 ", Duration::from_secs(10));
    let (old, gateway) = (h1.v4().to_string(), h1.subnet_gateway().to_string());
    let new = old
        .rsplit_once('.')
        .map(|(net, _)| format!("{net}.77"))
        .unwrap();
    // All at once, as a DHCP client does it: with an address its routes go.
    let batch = lab.dir().join("move");
    let lines = format!(
        "addr del {old}/24 dev eth0\naddr add {new}/24 dev eth0\nroute replace default via {gateway}\n"
    );
    std::fs::write(&batch, lines).unwrap();
    h1.space()
        .ip(&["-batch", &batch.display().to_string()])
        .ok();
    h1.space()
        .ip(&["-6", "addr", "flush", "dev", "eth0", "scope", "global"])
        .ok();
    // Waiting until the session has died would cost fifty and more.
    let answered = answered(&mut pinger);
    assert!(answered >= 75, "{answered} of 100 answered");
    lab.wait("the other one says where it is now", 10, || {
        row(&h2, &h1)["path"] == format!("{new}:6783")
    });
}

/// As from Wi-Fi to a cable: both addresses are there, but what comes from the old one gets nowhere any more.
#[test]
fn a_host_whose_route_turns_to_another_of_its_addresses_is_followed_at_once() {
    let lab = Lab::new("turn");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let b_ip = b.ip().to_string();
    lab.wait("they talk", 20, || a.pings(&b_ip));
    let (old, gateway) = (h1.v4().to_string(), h1.subnet_gateway().to_string());
    let new = old
        .rsplit_once('.')
        .map(|(net, _)| format!("{net}.77"))
        .unwrap();
    for host in [&h1, &h2] {
        host.space()
            .ip(&["-6", "addr", "flush", "dev", "eth0", "scope", "global"])
            .ok();
    }
    h1.space()
        .ip(&["addr", "add", &format!("{new}/24"), "dev", "eth0"])
        .ok();
    lab.wait("they talk by IPv4", 20, || {
        row(&h2, &h1)["path"] == format!("{old}:6783") && a.pings(&b_ip)
    });
    let local = || {
        h1.run(&["ss", "-Hun", "state", "established", "sport = :6783"])
            .stdout
    };
    assert!(local().contains(&old), "{}", local());
    let target = format!("--target={}", a.pid());
    let mut pinger = h1.spawn(
        "pinger",
        &[
            "nsenter", &target, "--net", "ping", "-i0.05", "-c100", &b_ip,
        ],
    );
    pinger.wait_for("icmp_seq=20 ", Duration::from_secs(10));
    let rules = format!(
        "table inet gone {{ chain i {{ type filter hook input priority 0; ip daddr {old} udp dport 6783 drop; }}
         chain o {{ type filter hook output priority 0; ip saddr {old} udp sport 6783 drop; }}; }}"
    );
    h1.run(&["nft", &rules]).ok();
    let default = ["route", "replace", "default", "via", &gateway, "src", &new];
    h1.space().ip(&default).ok();
    // Two seconds until the routes are asked anyway would cost forty.
    let answered = answered(&mut pinger);
    assert!(answered >= 85, "{answered} of 100 answered");
    assert!(local().contains(&new), "{}", local());
    assert_eq!(row(&h2, &h1)["path"], format!("{new}:6783"));
}
