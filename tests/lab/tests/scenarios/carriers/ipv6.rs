//! Hosts that reach each other by IPv6: a device of their own, guarded as the other one is.

use weft_lab::{Container, Host, Lab, goes_on, has_marker, hold, overheard};

use super::{VXLAN, is_plain, wait_carrier, why};

/// Trusts what all of the lab's IPv6 subnets are in.
const TRUSTED: [&str; 2] = ["--trusted-subnet", "2001:db8::/32"];

/// Two without IPv4 on one subnet, once each reaches the other by VXLAN.
pub(super) fn trusting(lab: &Lab) -> [Host; 2] {
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &subnet));
    hosts.iter().for_each(Host::use_ipv6_alone);
    lab.cluster_with(&hosts, [&TRUSTED, &TRUSTED]);
    wait_carrier(lab, &hosts, "vxlan");
    hosts
}

fn has_device(host: &Host) -> bool {
    let links = host.weft(&["exec", "--", "ip", "-br", "link"]).ok();
    links.contains("wx6")
}

#[test]
fn hosts_that_both_trust_their_ipv6_network_use_vxlan() {
    let lab = Lab::new("vxlan6");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let drain = Container::drain(h2, "drain", &[]);
    let frames = overheard(&lab, h1, [&a, &b], 5, |frame| {
        is_plain(frame) && frame.packet()[0] >> 4 == 6
    });
    let sealed = frames.iter().find(|f| has_marker(f) && !f.is_udp(VXLAN));
    assert!(sealed.is_none(), "{sealed:?}");
    for host in &hosts {
        let row = host.only_peer();
        assert_eq!(row["mtu"], 1430, "{row}");
        assert!(why(host).contains("trusted"), "{row}");
        assert!(has_device(host));
    }
    // As large as they come, in both families of the overlay.
    for (to, payload) in [(b.ip().to_string(), 1402), (b.ip6().to_string(), 1382)] {
        let size = format!("-s{payload}");
        let big = ["ping", "-c3", "-w5", "-Mdo", &size, &to];
        assert!(a.run(&big).is_ok(), "{}", a.run(&big));
    }
    let count = |host: &Host, which: &str| host.only_peer()[which].as_u64().unwrap();
    let before = count(h2, "rx_bytes");
    lab.wait("the fast path is laid", 20, || {
        hosts
            .iter()
            .all(|host| host.fast_path("tx_packets").is_some())
    });
    a.pours(drain.ip(), 32);
    for (host, way) in [(h1, "tx_packets"), (h2, "rx_packets")] {
        let took = host.fast_path(way).unwrap_or(0);
        assert!(took > 50, "{took} took the fast path");
    }
    let came = count(h2, "rx_bytes") - before;
    assert!(came > 32 << 20, "{came} octets are counted");
}

/// One host with both versions, one with each: the first has a device for each, and the other two speak through it.
#[test]
fn peers_of_either_version_stand_side_by_side() {
    let lab = Lab::new("vxboth");
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2", "h3"].map(|name| lab.host(name, &subnet));
    let [h1, h2, h3] = &hosts;
    h2.use_ipv4_alone();
    h3.use_ipv6_alone();
    let trusted = [&super::TRUSTED[..], &TRUSTED[..]].concat();
    h1.up(&trusted);
    let join = [&["--join", "-"], &trusted[..]].concat();
    for host in [h2, h3] {
        host.up_with(&join, h1.token(&[]).as_bytes()).ok();
    }
    lab.wait_members(&hosts);
    let carriers = || {
        let mut rows = h1.peers().into_iter();
        rows.all(|row| row["carrier"] == "vxlan")
    };
    lab.wait("the first uses vxlan to both", 30, carriers);
    assert!(has_device(h1) && has_device(h3) && !has_device(h2));
    let [a, b, c] = [(h1, "a"), (h2, "b"), (h3, "c")].map(|(host, name)| host.serve(name, &[]));
    for (one, other) in [(&a, &b), (&a, &c), (&b, &c)] {
        assert!(one.fetches(other, 3_000_000));
    }
    let held = hold(h1, [&a, &b], 10, 15);
    h3.weft(&["down"]).ok();
    h3.weft(&["reset"]).ok();
    h1.weft(&["node", "rm", h3.name(), "--force"]);
    lab.wait("the device goes with the last who wants it", 30, || {
        !has_device(h1)
    });
    goes_on(&lab, &held);
    assert!(carriers());
}

/// An address that comes and one that goes: packets change the version, and no connection ends.
#[test]
fn a_connection_goes_on_where_its_hosts_change_to_ipv6() {
    let lab = Lab::new("vxchange");
    let subnet = lab.subnet("a");
    let trusted = [&super::TRUSTED[..], &TRUSTED[..]].concat();
    let hosts = lab.pair_with(&subnet, [&trusted, &trusted]);
    let [h1, h2] = &hosts;
    wait_carrier(&lab, &hosts, "vxlan");
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let held = hold(h1, [&a, &b], 40, 15);
    h2.use_ipv6_alone();
    lab.wait("both reach each other by IPv6", 60, || {
        let by_v6 = |host: &Host| {
            host.only_peer()["path"]
                .as_str()
                .unwrap_or("")
                .starts_with('[')
        };
        hosts.iter().all(by_v6)
    });
    wait_carrier(&lab, &hosts, "vxlan");
    assert!(hosts.iter().all(has_device));
    goes_on(&lab, &held);
    overheard(&lab, h1, [&a, &b], 5, |frame| {
        is_plain(frame) && frame.packet()[0] >> 4 == 6
    });
}
