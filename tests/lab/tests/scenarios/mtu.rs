//! What a path takes in one piece: found where nobody tells, followed where it changes.

use std::net::SocketAddr;
use std::time::Duration;

use weft_lab::{Container, Host, Lab, goes_on};

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

/// Twenty of the longest packets that IPv6 sends without asking, there and back.
fn passes_ipv6(a: &Container, b: &Container) -> bool {
    let to = b.ip6().to_string();
    let out = a.run(&["ping", "-c20", "-i0.05", "-W3", "-Mdo", "-s1232", &to]);
    out.is_ok() && out.stdout.contains(" 20 received")
}

/// What one segment of each of its connections may hold, as its kernel has it.
fn segment_sizes(a: &Container, to: &str) -> Vec<u64> {
    let said = a.run(&["ss", "-tinH", "dst", to]).ok();
    let sizes = said
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("mss:"));
    sizes.filter_map(|size| size.parse().ok()).collect()
}

#[test]
fn ipv6_passes_a_path_that_is_too_small_for_it() {
    let lab = Lab::new("small");
    let (hosts, a, b) = pair(&lab, |host| host.swallow(1280));
    let [h1, h2] = &hosts;
    let c = Container::drain(h2, "c", &[]);
    lab.wait("both know the path", 60, || {
        a.fetches(&b, 1_000_000) && mtu(h1) == inner(1280) && mtu(h2) == inner(1280)
    });
    assert!(passes_ipv6(&a, &b) && passes_ipv6(&b, &a));
    // The segments of a connection go in one piece: headers of 60 octets are around what each holds.
    let to = SocketAddr::new(b.ip6().into(), 80).to_string();
    let mut held = a.spawn_tool(h1, "hold", &["hold", &to]);
    held.wait_for("ok 5 ", Duration::from_secs(15));
    lab.wait("a connection's segments fit the path", 20, || {
        let sizes = segment_sizes(&a, &to);
        !sizes.is_empty() && sizes.iter().all(|size| *size <= inner(1280) - 60)
    });
    goes_on(&lab, &held);
    a.pours(c.ip6(), 32);
    let torn = |host: &Host| host.only_peer()["drops"]["malformed"].clone();
    assert!(torn(h1).is_null() && torn(h2).is_null());
    // What is longer is refused to the sender, who then cuts it himself.
    let to = b.ip6().to_string();
    let longer = |how: &str| a.run(&["ping", "-c1", "-W3", how, "-s4000", &to]);
    assert!(!longer("-Mdo").is_ok());
    lab.wait("a longer one, cut by its sender", 10, || {
        longer("-Mdont").is_ok()
    });
}

#[test]
fn ipv6_passes_such_paths_to_and_from_a_member_between() {
    let lab = Lab::new("smallvia");
    let hosts = lab.trio();
    for host in &hosts {
        host.swallow(1280);
    }
    let [h1, h2, _] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    h1.cut(h2);
    lab.wait("around the cut", 20, || {
        a.pings(&b.ip().to_string()) && h1.peer(h2.name())["relay"].is_string()
    });
    lab.wait("in halves", 30, || {
        passes_ipv6(&a, &b) && passes_ipv6(&b, &a)
    });
}

#[test]
fn the_kernel_s_tunnel_is_left_where_too_little_for_ipv6_would_be_left_in_it() {
    let lab = Lab::new("smallplain");
    let trusted = ["--trusted-subnet", "192.0.2.0/24,198.51.100.0/24"];
    let hosts = lab.two();
    lab.cluster_with(&hosts, [&trusted, &trusted]);
    let (a, b) = (hosts[0].serve("a", &[]), hosts[1].serve("b", &[]));
    let carrier = |host: &Host, carrier: &str| host.only_peer()["carrier"] == carrier;
    lab.wait("plain", 20, || {
        a.pings(&b.ip().to_string()) && hosts.iter().all(|host| carrier(host, "vxlan"))
    });
    hosts.iter().for_each(|host| host.swallow(1300));
    lab.wait("userspace", 60, || {
        a.fetches(&b, 1_000_000) && hosts.iter().all(|host| carrier(host, "udp"))
    });
    let why = hosts[0].only_peer()["carrier_why"].to_string();
    assert!(
        why.contains("octets would be left, and IPv6 needs 1280"),
        "{why}"
    );
    assert!(passes_ipv6(&a, &b));
}
