//! The fast path between containers, over either carrier: taken where it may be, and by nothing else.

use std::net::IpAddr;

use weft_lab::{Container, Host, Lab, goes_on, hold};

use super::{TRUSTED, trusting, wait_carrier};

const OTHER_NETWORK: [&str; 2] = ["--trusted-subnet", "198.51.100.0/24"];

/// A carrier, and its device.
type Carrier = (&'static str, &'static str);
const VXLAN: Carrier = ("vxlan", "wx0");
const UDP: Carrier = ("udp", "wu0");

/// Two hosts that reach each other by a carrier.
fn pair(lab: &Lab, (carrier, _): Carrier) -> [Host; 2] {
    if carrier == VXLAN.0 {
        return trusting(lab);
    }
    let hosts = lab.two();
    lab.cluster(&hosts);
    hosts
}

fn stands(host: &Host, device: &str) -> bool {
    let show = [
        "exec", "--", "tc", "filter", "show", "dev", device, "ingress",
    ];
    host.weft(&show).stdout.contains("from_peers")
}

fn wait_laid(lab: &Lab, hosts: &[Host; 2], (_, device): Carrier) {
    lab.wait("the fast path is laid", 20, || {
        let laid = |host: &Host| host.fast_path("tx_packets").is_some() && stands(host, device);
        hosts.iter().all(laid)
    });
}

/// How many packets take it meanwhile.
fn taken(host: &Host, which: &str, meanwhile: impl FnOnce()) -> u64 {
    let count = || host.fast_path(which).unwrap_or(0);
    let before = count();
    meanwhile();
    count().saturating_sub(before)
}

#[test]
fn connections_between_containers_take_it_over_vxlan() {
    connections_take_it("fastvxlan", VXLAN);
}

#[test]
fn connections_between_containers_take_it_over_the_sealed_carrier() {
    connections_take_it("fastudp", UDP);
}

/// In both families.
fn connections_take_it(name: &str, carrier: Carrier) {
    let lab = Lab::new(name);
    let hosts = pair(&lab, carrier);
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), Container::drain(h2, "b", &[]));
    wait_laid(&lab, &hosts, carrier);
    for (version, at) in [(4, IpAddr::from(b.ip())), (6, b.ip6().into())] {
        let ways = [
            (h1, "tx_packets"),
            (h2, "rx_packets"),
            (h2, "tx_packets"),
            (h1, "rx_packets"),
        ];
        let counts = || {
            ways.iter()
                .map(|(host, which)| host.fast_path(which).unwrap_or(0))
        };
        let before: Vec<u64> = counts().collect();
        a.pours(at, 32);
        let rose = counts()
            .zip(before)
            .map(|(now, before)| now.saturating_sub(before));
        // Some 64 KiB a packet, and as good as all of them.
        let rose: Vec<u64> = rose.collect();
        assert!(
            rose.iter().all(|packets| *packets > 50),
            "{version}: {rose:?}"
        );
    }
    assert!(a.pings(&b.ip().to_string()) && a.pings(&b.ip6().to_string()));
    // What is too long for the path is refused to its sender, not lost.
    lab.wait("who sends too long a packet is told so", 20, || {
        let mtu = h1.only_peer()["mtu"].as_u64().unwrap_or(0);
        let size = format!("-s{}", mtu.saturating_sub(27));
        let long = ["ping", "-c2", "-w5", "-Mdo", &size, &b.ip().to_string()];
        let told = a.run(&long).stdout;
        told.contains(&format!("mtu = {mtu}")) || told.contains(&format!("mtu={mtu}"))
    });
}

#[test]
fn connections_begin_and_end_on_it_over_vxlan() {
    connections_begin_and_end_on_it("fastsyn", VXLAN);
}

#[test]
fn connections_begin_and_end_on_it_over_the_sealed_carrier() {
    connections_begin_and_end_on_it("fastsynudp", UDP);
}

/// And nothing remembers one that belongs to no virtual address, whichever way it went.
fn connections_begin_and_end_on_it(name: &str, carrier: Carrier) {
    let lab = Lab::new(name);
    let hosts = pair(&lab, carrier);
    let [h1, h2] = &hosts;
    let (a, near) = (h1.serve("a", &[]), h1.serve("near", &[]));
    let b = h2.serve_with("b", &["--label", "role=b"]);
    wait_laid(&lab, &hosts, carrier);
    const VISITS: u64 = 10;
    let visit = |to: &str| (0..VISITS).for_each(|_| drop(a.ask("tcp", to).ok()));
    for at in [format!("{}:80", b.ip()), format!("[{}]:80", b.ip6())] {
        let sent = taken(h1, "tx_packets", || visit(&at));
        // SYN, what acknowledges its answer, the question, and the end.
        assert!(sent >= VISITS * 4, "{sent} of {VISITS} visits");
    }
    visit(&format!("{}:80", near.ip()));
    let tracked = |host: &Host| {
        let list = [
            "exec",
            "--",
            "conntrack",
            "-L",
            "-p",
            "tcp",
            "--dport",
            "80",
        ];
        [&[][..], &["-f", "ipv6"]]
            .map(|family| host.weft(&[&list[..], family].concat()).stdout)
            .concat()
    };
    for host in &hosts {
        assert_eq!(tracked(host), "");
    }
    let create = [
        "service", "create", "s", "--port", "80", "--select", "role=b",
    ];
    h1.weft(&create).ok();
    let rows = h1.weft(&["service", "ls", "--json"]).json();
    let vip = rows[0]["vip"].as_str().unwrap().to_owned();
    lab.wait("the service answers", 20, || {
        a.ask("tcp", &format!("{vip}:80")).is_ok()
    });
    let entries = tracked(h1);
    assert!(entries.contains(&format!("dst={vip}")), "{entries}");
    assert!(entries.contains("[ASSURED]"), "{entries}");
}

#[test]
fn what_a_virtual_address_stands_for_goes_the_long_way_over_vxlan() {
    what_a_virtual_address_stands_for_goes_the_long_way("fastvip", VXLAN);
}

#[test]
fn what_a_virtual_address_stands_for_goes_the_long_way_over_the_sealed_carrier() {
    what_a_virtual_address_stands_for_goes_the_long_way("fastvipudp", UDP);
}

/// Even once it no longer does. Its packets wear the addresses of one container and belong to a connection of a virtual one.
fn what_a_virtual_address_stands_for_goes_the_long_way(name: &str, carrier: Carrier) {
    let lab = Lab::new(name);
    let hosts = pair(&lab, carrier);
    let [h1, h2] = &hosts;
    let a = h1.serve("a", &[]);
    let b = Container::drain(h2, "b", &["--label", "role=drain"]);
    let other = h2.serve("c", &[]);
    let create = [
        "service",
        "create",
        "drain",
        "--port",
        "80",
        "--select",
        "role=drain",
    ];
    h1.weft(&create).ok();
    let rows = h1.weft(&["service", "ls", "--json"]).json();
    let vip: IpAddr = rows[0]["vip"].as_str().unwrap().parse().unwrap();
    wait_laid(&lab, &hosts, carrier);
    lab.wait("the service answers", 20, || {
        a.tool(&["pour", &format!("{vip}:80"), "1"]).is_ok()
    });
    for at in [vip, b.ip().into()] {
        let back = taken(h1, "rx_packets", || a.pours(at, 16));
        assert!(
            back < 20,
            "{back} of the answers from {at} took the fast path"
        );
    }
    let back = taken(h1, "rx_packets", || assert!(a.fetches(&other, 10_000_000)));
    assert!(back > 50, "nothing took it");
    h1.weft(&["service", "rm", "drain"]).ok();
    wait_laid(&lab, &hosts, carrier);
    let back = taken(h1, "rx_packets", || a.pours(b.ip(), 16));
    assert!(
        back < 20,
        "{back} answers of what a service stood for took the fast path"
    );
}

#[test]
fn it_leads_to_no_other_network_over_vxlan() {
    it_leads_to_no_other_network("fastnets", VXLAN);
}

#[test]
fn it_leads_to_no_other_network_over_the_sealed_carrier() {
    it_leads_to_no_other_network("fastnetsudp", UDP);
}

fn it_leads_to_no_other_network(name: &str, carrier: Carrier) {
    let lab = Lab::new(name);
    let hosts = pair(&lab, carrier);
    let [h1, h2] = &hosts;
    h1.weft(&["network", "create", "blue"]).ok();
    let a = h1.serve("a", &[]);
    let near = h2.serve("near", &[]);
    lab.wait("both know the network", 20, || {
        h2.weft(&["network", "ls"]).ok().contains("blue")
    });
    let far = h2.serve_with("far", &["--network", "blue"]);
    wait_laid(&lab, &hosts, carrier);
    assert!(a.pings(&near.ip().to_string()));
    for to in [far.ip().to_string(), far.ip6().to_string()] {
        assert!(!a.pings(&to), "{to}");
    }
}

#[test]
fn a_connection_goes_on_where_its_path_shrinks() {
    let lab = Lab::new("fastmtu");
    let hosts = lab.two();
    let flags = [&TRUSTED[..], &OTHER_NETWORK[..]].concat();
    for host in &hosts {
        host.use_ipv4_alone();
    }
    lab.cluster_with(&hosts, [&flags, &flags]);
    wait_carrier(&lab, &hosts, "vxlan");
    goes_on_where_its_path_shrinks(&lab, &hosts, VXLAN);
}

#[test]
fn a_connection_goes_on_where_its_sealed_path_shrinks() {
    let lab = Lab::new("fastmtuudp");
    goes_on_where_its_path_shrinks(&lab, &pair(&lab, UDP), UDP);
}

/// Segments of a connection that began before are too long from then on: the long way says so to their sender, and what it
/// sends then takes the fast path again, by whichever carrier.
fn goes_on_where_its_path_shrinks(lab: &Lab, hosts: &[Host; 2], carrier: Carrier) {
    let [h1, h2] = hosts;
    let (a, b) = (h1.serve("a", &[]), Container::drain(h2, "b", &[]));
    wait_laid(lab, hosts, carrier);
    let (at, mib) = (format!("{}:80", b.ip()), 1024_u64);
    let mut pouring = a.spawn_tool(h1, "pouring", &["pour", &at, &mib.to_string()]);
    lab.wait("it flows", 20, || {
        h1.fast_path("tx_packets").unwrap_or(0) > 500
    });
    hosts.iter().for_each(|host| host.swallow(1400));
    pouring.wait_for(
        &format!("{} octets, whole", mib << 20),
        std::time::Duration::from_secs(180),
    );
    wait_laid(lab, hosts, UDP);
    let sent = taken(h1, "tx_packets", || a.pours(b.ip(), 16));
    assert!(sent > 50, "{sent}: what fits takes it");
}

#[test]
fn a_daemon_that_starts_again_remembers_and_lays_it_anew() {
    let lab = Lab::new("fastkill");
    let hosts = trusting(&lab);
    let [h1, h2] = &hosts;
    let (a, b) = (
        h1.serve("a", &[]),
        h2.serve_with("b", &["--label", "role=b"]),
    );
    h1.weft(&[
        "service", "create", "s", "--port", "80", "--select", "role=b",
    ])
    .ok();
    wait_laid(&lab, &hosts, VXLAN);
    let held = hold(h1, [&a, &b], 10, 15);
    let translated = || {
        let list = [
            "exec",
            "--",
            "nft",
            "list",
            "set",
            "netdev",
            "weft_fast",
            "translated4",
        ];
        h1.weft(&list).stdout
    };
    let element = format!("{} . tcp . 80", b.ip());
    lab.wait("it knows what the service stands for", 20, || {
        translated().contains(&element)
    });
    h1.weft(&["service", "rm", "s"]).ok();
    // Once the fast path was rules in the table of the memory: what a daemon of then left is taken away.
    let of_old = "add chain netdev weft_fast old { type filter hook ingress device wx0 priority 0; }; add rule netdev weft_fast old counter";
    h1.weft(&["exec", "--", "nft", of_old]).ok();
    h1.kill9();
    goes_on(&lab, &held);
    h1.up(&TRUSTED);
    wait_carrier(&lab, &hosts, "vxlan");
    wait_laid(&lab, &hosts, VXLAN);
    assert!(translated().contains(&element), "{}", translated());
    let rules = h1.weft(&["exec", "--", "nft", "list", "table", "netdev", "weft_fast"]);
    assert!(!rules.stdout.contains("chain"), "{}", rules.stdout);
    goes_on(&lab, &held);
    // Somebody takes it away, and what is remembered: both come again.
    let taken = ["exec", "--", "tc", "qdisc", "del", "dev", "wx0", "clsact"];
    h1.weft(&taken).ok();
    let forgotten = [
        "exec",
        "--",
        "nft",
        "delete",
        "table",
        "netdev",
        "weft_fast",
    ];
    h1.weft(&forgotten).ok();
    lab.wait("it is laid again", 20, || {
        stands(h1, "wx0") && translated().contains(&element)
    });
    goes_on(&lab, &held);
}
