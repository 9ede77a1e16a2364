//! Which carrier packets take: plain VXLAN between hosts that both trust the network between them, sealed everywhere else.

mod fast;
mod forged;
mod ipv6;

use std::time::Duration;

use serde_json::Value;
use weft_lab::{Frame, Host, Lab, MARKER, Spawned, converse, goes_on, has_marker, hold, overheard};

const SEALED: u16 = 6783;
const VXLAN: u16 = 6784;
const TRUSTED: [&str; 2] = ["--trusted-subnet", "192.0.2.0/24"];

/// Two that trust their subnet, once each reaches the other by VXLAN.
fn trusting(lab: &Lab) -> [Host; 2] {
    let subnet = lab.subnet("a");
    let hosts = lab.pair_with(&subnet, [&TRUSTED, &TRUSTED]);
    wait_carrier(lab, &hosts, "vxlan");
    hosts
}

fn wait_carrier(lab: &Lab, hosts: &[Host; 2], carrier: &str) {
    lab.wait(&format!("both hosts use {carrier}"), 30, || {
        hosts
            .iter()
            .all(|host| host.only_peer()["carrier"] == carrier)
    });
}

fn why(host: &Host) -> String {
    host.only_peer()["carrier_why"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn is_plain(frame: &Frame) -> bool {
    frame.is_udp(VXLAN) && has_marker(frame)
}

#[test]
fn hosts_that_both_trust_their_network_use_vxlan() {
    let lab = Lab::new("vxlan");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let frames = overheard(&lab, h1, [&a, &b], 5, is_plain);
    let sealed = frames.iter().find(|f| has_marker(f) && !f.is_udp(VXLAN));
    assert!(sealed.is_none(), "{sealed:?}");
    for host in &hosts {
        let row = host.only_peer();
        assert_eq!(row["mtu"], 1450, "{row}");
        assert!(why(host).contains("trusted"), "{row}");
        let text = host.weft(&["peers"]).ok();
        assert!(text.contains("vxlan"), "{text}");
    }
    // As large as they come: the routes carry the underlay's MTU less 50.
    let big = ["ping", "-c3", "-w5", "-Mdo", "-s1422", &b.ip().to_string()];
    assert!(a.run(&big).is_ok(), "{}", a.run(&big));
    assert!(a.fetches(&b, 20_000_000));
}

#[test]
fn what_the_kernel_carries_is_counted_by_peer() {
    let lab = Lab::new("vxcount");
    let hosts = trusting(&lab);
    let (a, b) = (hosts[0].serve("a", &[]), hosts[1].serve("b", &[]));
    wait_carrier(&lab, &hosts, "vxlan");
    let count = |host: &Host, which: &str| host.only_peer()[which].as_u64().unwrap();
    let ways = || [count(&hosts[0], "rx_bytes"), count(&hosts[1], "tx_bytes")];
    let before = ways();
    assert!(a.fetches(&b, 5_000_000));
    let after = ways();
    for (before, after) in before.into_iter().zip(after) {
        let came = after - before;
        assert!((5_000_000..5_600_000).contains(&came), "{came}");
    }
    // Rules that are replaced take nothing of it away.
    hosts[1].serve("c", &[]);
    assert!(count(&hosts[1], "tx_bytes") >= after[1]);
}

#[test]
fn published_ports_keep_the_client_s_address_over_vxlan() {
    let lab = Lab::new("vxpublish");
    let outside = lab.host("outside", &lab.subnet("o"));
    let subnet = lab.subnet("a");
    let trusted = ["--trusted-subnet", "198.51.100.0/24"];
    let hosts = lab.pair_with(&subnet, [&trusted, &trusted]);
    wait_carrier(&lab, &hosts, "vxlan");
    let [h1, h2] = &hosts;
    let _web = h2.serve("web", &[]);
    h1.publish_web();
    let capture = h1.capture("wire");
    for (host, client) in [(h1, &outside), (h2, &outside)] {
        for (to, ip) in [
            (format!("{}:8080", host.v4()), client.v4().to_string()),
            (format!("[{}]:8080", host.v6()), client.v6().to_string()),
        ] {
            lab.wait(&format!("{to} answers"), 20, || {
                let out = client.tool(&["ask", "tcp", &to, "--text", MARKER, "--wait", "2"]);
                out.is_ok() && out.ok().split(' ').nth(1) == Some(ip.as_str())
            });
        }
    }
    let frames = capture.stop();
    let plain = frames.iter().filter(|f| f.is_udp(VXLAN) && has_marker(f));
    assert!(plain.count() >= 2, "it went another way");
    // Through both hosts from one port at once: a zone each.
    let from = format!("{}:40404", outside.v4());
    let mut held: Vec<Spawned> = hosts
        .iter()
        .map(|host| {
            let to = format!("{}:8080", host.v4());
            let name = format!("hold-{}", host.name());
            outside.spawn_tool(&name, &["hold", &to, "--from", &from])
        })
        .collect();
    for one in &mut held {
        one.wait_for("ok 10 ", Duration::from_secs(15));
    }
}

#[test]
fn where_one_host_alone_trusts_the_network_all_stays_sealed() {
    let lab = Lab::new("vxone");
    let subnet = lab.subnet("a");
    let hosts = lab.pair_with(&subnet, [&TRUSTED, &[]]);
    stays_sealed(&lab, &hosts);
    assert!(
        why(&hosts[0]).contains("peer lists no"),
        "{}",
        why(&hosts[0])
    );
    assert!(
        why(&hosts[1]).contains("this host lists no"),
        "{}",
        why(&hosts[1])
    );
    // Nothing of it is on a host that did not ask for it.
    let rules = hosts[1].run(&["nft", "list", "ruleset"]).ok();
    assert!(!rules.contains("6784"), "{rules}");
    let links = hosts[1].weft(&["exec", "--", "ip", "-br", "link"]).ok();
    assert!(!links.contains("wx0"), "{links}");
}

#[test]
fn where_the_hosts_trust_different_networks_all_stays_sealed() {
    let lab = Lab::new("vxother");
    let subnet = lab.subnet("a");
    let other = ["--trusted-subnet", "192.0.2.12/32"];
    let hosts = lab.pair_with(&subnet, [&TRUSTED, &other]);
    stays_sealed(&lab, &hosts);
    assert!(
        why(&hosts[0]).contains("does not take"),
        "{}",
        why(&hosts[0])
    );
    assert!(
        why(&hosts[1]).contains("192.0.2.11 is in no trusted"),
        "{}",
        why(&hosts[1])
    );
}

fn stays_sealed(lab: &Lab, hosts: &[Host; 2]) {
    let [h1, h2] = hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("containers talk", 20, || a.pings(&b.ip().to_string()));
    let frames = overheard(lab, h1, [&a, &b], 5, |f| f.is_udp(SEALED));
    let plain = frames.iter().find(|f| f.is_udp(VXLAN) || has_marker(f));
    assert!(plain.is_none(), "in the clear: {plain:?}");
    assert!(
        hosts
            .iter()
            .all(|host| host.only_peer()["carrier"] == "udp")
    );
}

#[test]
fn a_blocked_vxlan_port_sends_all_back_to_the_sealed_carrier_until_it_is_open() {
    let lab = Lab::new("vxblock");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let hold = hold(h1, [&a, &b], 10, 15);
    lab.router().nft(&format!(
        "table netdev block {{
            chain one {{ type filter hook ingress device \"{}\" priority -10; udp dport {VXLAN} drop; }}
            chain two {{ type filter hook ingress device \"{}\" priority -10; udp dport {VXLAN} drop; }}
        }}
        ",
        h1.port(),
        h2.port()
    ));
    let blocked = std::time::Instant::now();
    wait_carrier(&lab, &hosts, "udp");
    eprintln!("back on udp after {:?}", blocked.elapsed());
    for host in &hosts {
        assert!(why(host).contains("6784"), "{}", why(host));
        let text = host.weft(&["peers"]).ok();
        assert!(text.contains("6784"), "{text}");
    }
    goes_on(&lab, &hold);
    converse([&a, &b]);
    lab.router().nft("delete table netdev block\n");
    let opened = std::time::Instant::now();
    wait_carrier(&lab, &hosts, "vxlan");
    eprintln!("back on vxlan after {:?}", opened.elapsed());
    goes_on(&lab, &hold);
    overheard(&lab, h1, [&a, &b], 5, is_plain);
}

#[test]
fn a_daemon_that_was_killed_takes_the_device_over_and_one_without_the_flag_removes_it() {
    let lab = Lab::new("vxkill");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let hold = hold(h1, [&a, &b], 10, 15);
    let device = index(h2);
    h2.kill9();
    // The kernel carries on by itself.
    goes_on(&lab, &hold);
    h2.up(&TRUSTED);
    wait_carrier(&lab, &hosts, "vxlan");
    assert_eq!(index(h2), device, "the device was made anew");
    goes_on(&lab, &hold);
    // Without the flag nothing of it is left, and the other end hears of it.
    h2.kill9();
    h2.up(&[]);
    wait_carrier(&lab, &hosts, "udp");
    assert_eq!(index(h2), Value::Null);
    assert!(!h2.run(&["nft", "list", "ruleset"]).ok().contains("6784"));
    goes_on(&lab, &hold);
    let frames = overheard(&lab, h1, [&a, &b], 5, |f| f.is_udp(SEALED));
    assert!(!frames.iter().any(has_marker));
}

/// The number of `wx0` in the host's domain.
fn index(host: &Host) -> Value {
    let links = host.weft(&["exec", "--", "ip", "-j", "link"]).json();
    let links = links.as_array().cloned().unwrap_or_default();
    let found = links.into_iter().find(|link| link["ifname"] == "wx0");
    found.map_or(Value::Null, |link| link["ifindex"].clone())
}

#[test]
fn down_removes_the_device_and_another_domain_can_have_it() {
    let lab = Lab::new("vxdown");
    let hosts = trusting(&lab);
    hosts[0].weft(&["down"]).ok();
    // The network identifier is free again: another node on this host gets it.
    hosts[0].weft(&["reset"]).ok();
    let token = hosts[1].token(&[]);
    let join = [&["--join", "-"], &TRUSTED[..]].concat();
    hosts[0].up_with(&join, token.as_bytes()).ok();
    lab.wait("the newcomer uses vxlan", 30, || {
        peer_on(&hosts[0], "vxlan")
    });
}

/// Is any peer on this carrier?
fn peer_on(host: &Host, carrier: &str) -> bool {
    let mut rows = host.peers().into_iter();
    rows.any(|row| row["carrier"] == carrier)
}

#[test]
fn a_port_that_another_program_has_leaves_all_sealed_and_is_told() {
    let lab = Lab::new("vxtaken");
    let subnet = lab.subnet("a");
    let squatted = lab.host("h0", &subnet);
    let mut other = squatted.spawn_tool("other", &["serve", "--name", "other", "--port", "6784"]);
    other.wait_for("ready", Duration::from_secs(5));
    squatted.up(&TRUSTED);
    lab.wait("weft status names the trouble", 20, || {
        squatted.status()["warnings"].to_string().contains("6784")
    });
    drop(other);
    lab.wait("the carrier comes up by itself", 20, || {
        !squatted.status()["warnings"].to_string().contains("6784")
    });
}

/// Packets over VXLAN go past the daemon; a peer that dies is noticed by them all the same, before gossip agrees.
#[test]
fn a_peer_that_dies_amid_traffic_over_vxlan_is_silent_within_two_seconds() {
    let lab = Lab::new("vxsilent");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let _hold = hold(h1, [&a, &b], 40, 15);
    h2.isolate();
    let begun = std::time::Instant::now();
    lab.wait("h1 notices", 10, || h1.only_peer()["liveness"] != "alive");
    let (took, state) = (begun.elapsed(), h1.only_peer()["liveness"].clone());
    eprintln!("{state} after {took:?}");
    assert!(
        state == "silent" && took < Duration::from_millis(2500),
        "{state} {took:?}"
    );
}

#[test]
fn a_device_that_somebody_takes_down_or_away_comes_back() {
    let lab = Lab::new("vxgone");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let hold = hold(h1, [&a, &b], 10, 15);
    for (host, damage) in [
        (h1, "ip link set wx0 down"),
        (h1, "ip link del wx0"),
        (h2, "ip link del wx0"),
        (h1, "bridge fdb flush dev wx0"),
    ] {
        let args: Vec<&str> = ["exec", "--"]
            .into_iter()
            .chain(damage.split(' '))
            .collect();
        let done = host.weft(&args);
        if damage.contains("flush") {
            // Older programs can't, and older kernels don't.
            eprintln!("{damage}: {}", done.code);
        } else {
            done.ok();
        }
        goes_on(&lab, &hold);
        wait_carrier(&lab, &hosts, "vxlan");
    }
    overheard(&lab, h1, [&a, &b], 5, is_plain);
}
