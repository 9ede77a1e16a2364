//! What a path takes in one piece: found where nobody tells, followed where it changes.

use weft_lab::{Container, Host, Lab};

/// What `weft peers` says that the only peer takes.
fn mtu(host: &Host) -> u64 {
    host.only_peer()["mtu"].as_u64().unwrap_or_default()
}

/// Two hosts that reach each other by IPv4 alone, over links that `change` has its way with, and a container on each.
fn pair(lab: &Lab, change: impl Fn(&Host)) -> ([Host; 2], Container, Container) {
    let hosts = lab.two();
    for host in &hosts {
        host.use_ipv4_alone();
        change(host);
    }
    lab.cluster(&hosts);
    let (a, b) = (hosts[0].serve("a", &[]), hosts[1].serve("b", &[]));
    (hosts, a, b)
}

/// Does an inner packet of so many octets, which may not be cut, get there and back?
fn passes(a: &Container, b: &Container, octets: u64) -> bool {
    let (size, to) = ((octets - 28).to_string(), b.ip().to_string());
    a.run(&["ping", "-c1", "-w3", "-Mdo", "-s", &size, &to])
        .is_ok()
}

/// An inner packet's share of an IPv4 packet.
fn inner(outer: u64) -> u64 {
    outer - 20 - 8 - 33
}

#[test]
fn a_black_hole_swallows_nothing_for_long_and_one_that_appears_is_noticed() {
    let lab = Lab::new("hole");
    let (hosts, a, b) = pair(&lab, |host| host.swallow(1400));
    let [h1, h2] = &hosts;
    lab.wait("20 MB over a path of 1400 octets", 60, || {
        a.fetches(&b, 20_000_000)
    });
    lab.wait("both know", 20, || {
        a.pings(&b.ip().to_string()) && mtu(h1) == inner(1400) && mtu(h2) == inner(1400)
    });
    hosts.iter().for_each(|host| host.swallow(1320));
    lab.wait("20 MB over a path that shrank", 60, || {
        a.fetches(&b, 20_000_000)
    });
    lab.wait("both know that, too", 30, || {
        a.pings(&b.ip().to_string()) && mtu(h1) == inner(1320) && mtu(h2) == inner(1320)
    });
    // The largest packets fit, larger ones are refused to the sender.
    assert!(passes(&a, &b, inner(1320)));
    assert!(!passes(&a, &b, inner(1320) + 1));
}

#[test]
fn long_frames_are_used_where_they_work() {
    let lab = Lab::new("jumbo");
    let (hosts, a, b) = pair(&lab, |host| host.widen(9000));
    let [h1, h2] = &hosts;
    lab.wait("frames of 9,000 octets", 30, || {
        a.pings(&b.ip().to_string()) && mtu(h1) == inner(9000) && mtu(h2) == inner(9000)
    });
    assert!(passes(&a, &b, inner(9000)));
    assert!(a.fetches(&b, 20_000_000));
}

#[test]
fn long_frames_are_not_used_where_they_only_seem_to_work() {
    let lab = Lab::new("nojumbo");
    let (hosts, a, b) = pair(&lab, |host| {
        host.widen(9000);
        host.swallow(1500);
    });
    let [h1, h2] = &hosts;
    lab.wait("20 MB", 60, || a.fetches(&b, 20_000_000));
    lab.wait("ordinary frames", 30, || {
        a.pings(&b.ip().to_string()) && mtu(h1) == inner(1500) && mtu(h2) == inner(1500)
    });
}
