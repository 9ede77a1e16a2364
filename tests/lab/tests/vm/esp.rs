//! VXLAN that the kernel seals (`--esp always`, or `auto` where that is faster): what is seen on the wire, what gets in, what
//! comes of lost keys, and of a way that lets no ESP through.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_lab::{
    Forged, Frame, Host, Lab, TIMES, converse, forged_file, goes_on, has_marker, vxlan_mac,
};

use crate::pair::{containers, hold, hosts, overheard};

const VXLAN: u16 = 6784;
/// ESP inside UDP.
const NAT_TRAVERSAL: u16 = 6785;
const ESP: [&str; 2] = ["--esp", "always"];

/// Two hosts that seal, once both do: by IPv4, because with both versions either may be the faster.
fn sealing(lab: &Lab) -> [Host; 2] {
    sealing_by(lab, Host::use_ipv4_alone)
}

fn sealing_by(lab: &Lab, version: impl Fn(&Host)) -> [Host; 2] {
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &subnet));
    hosts.iter().for_each(version);
    lab.cluster_with(&hosts, [&ESP, &ESP]);
    wait_carrier(lab, &hosts, "esp");
    hosts
}

fn wait_carrier(lab: &Lab, hosts: &[Host; 2], carrier: &str) {
    lab.wait(&format!("both hosts use {carrier}"), 90, || {
        hosts
            .iter()
            .all(|host| host.only_peer()["carrier"] == carrier)
    });
}

fn is_esp(frame: &Frame) -> bool {
    let packet = frame.packet();
    packet.first() == Some(&0x45) && packet.get(9) == Some(&50)
}

fn is_esp6(frame: &Frame) -> bool {
    let packet = frame.packet();
    packet.first().is_some_and(|first| first >> 4 == 6) && packet.get(6) == Some(&50)
}

/// Nothing that a container said, and no VXLAN at all, is seen outside ESP.
fn nothing_in_the_clear(frames: &[Frame]) {
    let clear = frames.iter().find(|f| f.is_udp(VXLAN) || has_marker(f));
    assert!(clear.is_none(), "in the clear: {clear:?}");
}

/// The numbers of the keys in the host's kernel.
fn keys(host: &Host) -> BTreeSet<String> {
    let states = host.run(&["ip", "xfrm", "state", "list", "nokeys"]).ok();
    let numbers = states
        .lines()
        .filter_map(|line| line.trim().strip_prefix("proto esp spi "));
    numbers
        .filter_map(|rest| rest.split(' ').next())
        .map(str::to_owned)
        .collect()
}

fn policies(host: &Host) -> String {
    host.run(&["ip", "xfrm", "policy"]).ok()
}

#[test]
fn hosts_that_both_ask_for_it_are_sealed_by_the_kernel_and_forged_vxlan_gets_nothing_in() {
    let lab = Lab::new("esp");
    let hosts = sealing(&lab);
    let pair = containers(&lab, &hosts);
    let frames = overheard(&lab, &hosts[0], &pair, is_esp);
    nothing_in_the_clear(&frames);
    for host in &hosts {
        let row = host.only_peer();
        assert_eq!(row["mtu"], 1416, "{row}");
        let why = row["carrier_why"].as_str().unwrap();
        assert!(why.contains("ESP"), "{why}");
        let text = host.weft(&["peers"]).ok();
        assert!(text.contains("esp"), "{text}");
        // As the kernel understood it.
        let policies = policies(host);
        let asked = policies.matches("proto esp reqid").count();
        assert!(asked == 2 && !policies.contains("level use"), "{policies}");
        let states = host.run(&["ip", "xfrm", "state", "list", "nokeys"]).ok();
        assert!(
            states.contains("rfc4106(gcm(aes))") && states.contains("esn"),
            "{states}"
        );
    }
    // As large as they come, and a stream.
    let to = pair[1].ip().to_string();
    let big = ["ping", "-c3", "-w15", "-Mdo", "-s1388", &to];
    assert!(pair[0].run(&big).is_ok(), "{}", pair[0].run(&big));
    lab.wait("the fast path is laid", 60, || {
        hosts
            .iter()
            .all(|host| host.fast_path("tx_packets").is_some())
    });
    assert!(pair[0].fetches(&pair[1], 3_000_000));
    for (host, chain) in hosts.iter().zip(["rx_packets", "tx_packets"]) {
        assert!(host.fast_path(chain).unwrap_or(0) > 20, "nothing took it");
    }
    // The perfect forgery: the peer's own address and MAC, from within the subnet.
    let perfect = Forged {
        from: hosts[0].v4().into(),
        to: hosts[1].v4().into(),
        macs: (vxlan_mac(&hosts[0]), vxlan_mac(&hosts[1])),
        inner: (pair[0].ip(), pair[1].ip()),
        text: "forged",
    };
    let tool = Host::binary("lab-tool");
    let mut packets = vec![perfect.packet()];
    packets.extend(perfect.fragments(24));
    let file = forged_file(&lab, "perfect", &packets);
    let sent = lab.router().run(&[&tool, "replay", &file, "--exact"]).ok();
    assert_eq!(sent, (TIMES * packets.len()).to_string());
    // What was sent before this has been dealt with.
    converse(pair.each_ref());
    let heard = pair[1].heard();
    assert!(!heard.contains("forged"), "{heard}");
    let dropped = hosts[1].run(&["nft", "list", "chain", "inet", "weft", "base_vxlan_in"]);
    assert!(!dropped.ok().contains("counter packets 0 "));
}

#[test]
fn keys_and_policies_that_somebody_removes_let_nothing_out_in_the_clear_and_come_back_new() {
    let lab = Lab::new("espflush");
    let hosts = sealing(&lab);
    let pair = containers(&lab, &hosts);
    let hold = hold(&hosts[0], &pair);
    let capture = hosts[0].capture("flush");
    let before = keys(&hosts[0]);
    hosts[0].run(&["ip", "xfrm", "state", "flush"]).ok();
    goes_on(&lab, &hold);
    lab.wait("there are other keys", 60, || {
        let now = keys(&hosts[0]);
        now.len() >= 2 && now.is_disjoint(&before)
    });
    wait_carrier(&lab, &hosts, "esp");
    // Without a policy the kernel would send in the clear: the filter does not let it.
    for host in &hosts {
        host.run(&["ip", "xfrm", "policy", "flush"]).ok();
        goes_on(&lab, &hold);
        lab.wait("the policies are back", 30, || {
            policies(host).matches("proto esp reqid").count() == 2
        });
    }
    wait_carrier(&lab, &hosts, "esp");
    goes_on(&lab, &hold);
    nothing_in_the_clear(&capture.stop());
    overheard(&lab, &hosts[0], &pair, is_esp);
}

/// Two minutes after they were agreed the keys of a session with traffic are replaced.
#[test]
fn new_keys_lose_no_packet() {
    let lab = Lab::new("esprekey");
    let hosts = sealing(&lab);
    let pair = containers(&lab, &hosts);
    let before = keys(&hosts[0]);
    let count = "700";
    let to = pair[1].ip().to_string();
    let ping = ["ping", "-q", "-i", "0.2", "-c", count, "-W", "10", &to];
    let wait = Duration::from_secs(240);
    let mut process = pair[0].spawn(&hosts[0], "ping", &ping);
    lab.wait("there are other keys alone", 200, || {
        let now = keys(&hosts[0]);
        now.len() == 2 && now.is_disjoint(&before)
    });
    let code = process.wait(wait);
    let said = process.stdout();
    assert!(code == 0 && said.contains(" 0% packet loss"), "{said}");
    assert_eq!(hosts[0].only_peer()["carrier"], "esp");
}

#[test]
fn a_killed_daemon_s_keys_are_gone_after_the_next_start_and_one_end_alone_does_not_seal() {
    let lab = Lab::new("espkill");
    let hosts = sealing(&lab);
    let [h1, h2] = &hosts;
    let pair = containers(&lab, &hosts);
    let hold = hold(h1, &pair);
    let before = keys(h2);
    assert!(before.len() >= 2, "{before:?}");
    h2.kill9();
    // The kernel carries on by itself.
    goes_on(&lab, &hold);
    h2.up(&ESP);
    lab.wait("new keys alone", 60, || {
        let now = keys(h2);
        now.len() == 2 && now.is_disjoint(&before)
    });
    wait_carrier(&lab, &hosts, "esp");
    goes_on(&lab, &hold);
    h2.kill9();
    h2.up(&[]);
    wait_carrier(&lab, &hosts, "udp");
    goes_on(&lab, &hold);
    let why = h1.only_peer()["carrier_why"].to_string();
    assert!(why.contains("the peer does not use"), "{why}");
    lab.wait("nothing of it is left on either", 30, || {
        hosts
            .iter()
            .all(|host| keys(host).is_empty() && policies(host).is_empty())
    });
    assert!(!h2.run(&["nft", "list", "ruleset"]).ok().contains("6784"));
    h1.weft(&["down"]).ok();
    assert!(keys(h1).is_empty() && policies(h1).is_empty());
}

#[test]
fn where_no_esp_gets_through_packets_go_through_the_tunnel_until_it_does() {
    let lab = Lab::new("espblock");
    let hosts = sealing(&lab);
    let pair = containers(&lab, &hosts);
    let hold = hold(&hosts[0], &pair);
    let block = "table inet lab { chain block { type filter hook prerouting priority -500; meta l4proto esp drop; }; }\n";
    // One way first: each end decides for what it sends.
    hosts[1].space().nft(block);
    lab.wait("what goes that way goes through the tunnel", 60, || {
        hosts[0].only_peer()["carrier"] == "udp"
    });
    let why = hosts[0].only_peer()["carrier_why"].to_string();
    assert!(why.contains("does not get through"), "{why}");
    assert_eq!(hosts[1].only_peer()["carrier"], "esp");
    goes_on(&lab, &hold);
    hosts[0].space().nft(block);
    wait_carrier(&lab, &hosts, "udp");
    goes_on(&lab, &hold);
    for host in &hosts {
        host.space().nft("delete table inet lab\n");
    }
    wait_carrier(&lab, &hosts, "esp");
    goes_on(&lab, &hold);
}

/// The ports by which the host's kernel reaches its peer through a NAT.
fn ports_in_use(host: &Host) -> BTreeSet<String> {
    let states = host.run(&["ip", "xfrm", "state", "list", "nokeys"]).ok();
    let outbound = format!("sport {NAT_TRAVERSAL} dport ");
    let ports = states.lines().filter_map(|line| line.split_once(&outbound));
    let ports = ports.filter_map(|(_, rest)| rest.split(' ').next());
    ports.map(str::to_owned).collect()
}

#[test]
fn through_a_nat_the_kernel_seals_inside_udp_and_follows_the_port_that_the_nat_picks() {
    let lab = Lab::new("espnat");
    let public = lab.subnet("public");
    let home = lab.random_nat("home", &public);
    let hosts = [lab.host("h1", &public), lab.host("h2", &home)];
    hosts[0].up(&ESP);
    let join = [&["--join", "-"], &ESP[..]].concat();
    hosts[1].up_with(&join, hosts[0].token(&[]).as_bytes()).ok();
    lab.wait_members(&hosts);
    wait_carrier(&lab, &hosts, "esp");
    let pair = containers(&lab, &hosts);
    let frames = overheard(&lab, &hosts[0], &pair, |f| f.is_udp(NAT_TRAVERSAL));
    nothing_in_the_clear(&frames);
    assert!(!frames.iter().any(is_esp), "no NAT knows whose that is");
    for host in &hosts {
        let row = host.only_peer();
        assert_eq!(row["mtu"], 1408, "{row}");
        let why = row["carrier_why"].as_str().unwrap();
        assert!(why.contains("ESP, inside UDP"), "{why}");
    }
    let to = pair[0].ip().to_string();
    let big = ["ping", "-c3", "-w15", "-Mdo", "-s1380", &to];
    assert!(pair[1].run(&big).is_ok(), "{}", pair[1].run(&big));
    assert!(pair[1].fetches(&pair[0], 3_000_000));
    assert!(pair[0].fetches(&pair[1], 3_000_000));
    let hold = hold(&hosts[0], &pair);
    let before = ports_in_use(&hosts[0]);
    assert!(!before.contains(&NAT_TRAVERSAL.to_string()), "{before:?}");
    home.forget_mappings();
    lab.wait("the kernel sends to another port", 60, || {
        let now = ports_in_use(&hosts[0]);
        !now.is_empty() && now.is_disjoint(&before)
    });
    goes_on(&lab, &hold);
    wait_carrier(&lab, &hosts, "esp");
    // Nobody's ESP is to come that way any more.
    hosts[1].kill9();
    hosts[1].up(&[]);
    wait_carrier(&lab, &hosts, "udp");
    goes_on(&lab, &hold);
    lab.wait("the port is closed, and nothing is left", 30, || {
        hosts.iter().all(|host| {
            let open = host.run(&["ss", "-Hlnu"]).ok();
            let is_open = open.contains(&format!(":{NAT_TRAVERSAL}"));
            !is_open && keys(host).is_empty() && policies(host).is_empty()
        })
    });
}

#[test]
fn hosts_without_ipv4_are_sealed_by_the_kernel_as_well() {
    let lab = Lab::new("esp6");
    let hosts = sealing_by(&lab, Host::use_ipv6_alone);
    let pair = containers(&lab, &hosts);
    let frames = overheard(&lab, &hosts[0], &pair, is_esp6);
    nothing_in_the_clear(&frames);
    assert_eq!(hosts[0].only_peer()["mtu"], 1396);
    let to = pair[1].ip().to_string();
    let big = ["ping", "-c3", "-w15", "-Mdo", "-s1368", &to];
    assert!(pair[0].run(&big).is_ok(), "{}", pair[0].run(&big));
    assert!(pair[0].fetches(&pair[1], 3_000_000));
    let hold = hold(&hosts[0], &pair);
    let perfect = Forged {
        from: hosts[0].v6().into(),
        to: hosts[1].v6().into(),
        macs: (vxlan_mac(&hosts[0]), vxlan_mac(&hosts[1])),
        inner: (pair[0].ip(), pair[1].ip()),
        text: "forged",
    };
    let mut packets = vec![perfect.packet()];
    packets.extend(perfect.fragments(24));
    packets.extend(perfect.behind_options());
    let file = forged_file(&lab, "perfect", &packets);
    let tool = Host::binary("lab-tool");
    let sent = lab.router().run(&[&tool, "replay", &file, "--exact"]).ok();
    assert_eq!(sent, (TIMES * packets.len()).to_string());
    // Neither lost keys nor lost policies send anything in the clear.
    let capture = hosts[0].capture("flush");
    let before = keys(&hosts[0]);
    hosts[0].run(&["ip", "xfrm", "state", "flush"]).ok();
    hosts[0].run(&["ip", "xfrm", "policy", "flush"]).ok();
    goes_on(&lab, &hold);
    lab.wait("there are other keys", 60, || {
        let now = keys(&hosts[0]);
        now.len() >= 2 && now.is_disjoint(&before)
    });
    wait_carrier(&lab, &hosts, "esp");
    goes_on(&lab, &hold);
    assert!(!pair[1].heard().contains("forged"));
    nothing_in_the_clear(&capture.stop());
    hosts[1].kill9();
    hosts[1].up(&[]);
    wait_carrier(&lab, &hosts, "udp");
    lab.wait("nothing of it is left on either", 30, || {
        hosts
            .iter()
            .all(|host| keys(host).is_empty() && policies(host).is_empty())
    });
}

/// Networks that translate IPv6 are rare, and exist.
#[test]
fn through_a_nat_of_ipv6_the_kernel_seals_inside_udp_as_well() {
    let lab = Lab::new("esp6nat");
    let hosts = lab.two();
    hosts.iter().for_each(Host::use_ipv6_alone);
    lab.router().nft(
        "table ip6 lab {
            chain post { type nat hook postrouting priority srcnat; oifname br-a masquerade random; }
            chain in { type filter hook forward priority 0; iifname br-a ct state new drop; }
        }
        ",
    );
    lab.cluster_with(&hosts, [&ESP, &ESP]);
    wait_carrier(&lab, &hosts, "esp");
    let pair = containers(&lab, &hosts);
    let frames = overheard(&lab, &hosts[0], &pair, |f| f.is_udp(NAT_TRAVERSAL));
    nothing_in_the_clear(&frames);
    assert!(!frames.iter().any(is_esp6), "no NAT knows whose that is");
    assert_eq!(hosts[0].only_peer()["mtu"], 1388);
    let to = pair[0].ip().to_string();
    let big = ["ping", "-c3", "-w15", "-Mdo", "-s1360", &to];
    assert!(pair[1].run(&big).is_ok(), "{}", pair[1].run(&big));
    assert!(pair[0].fetches(&pair[1], 3_000_000));
}

/// What was measured; `kernel` octets a second instead, if that is given.
fn measured(host: &Host, kernel: Option<u64>) -> [u64; 2] {
    let path = host.state_dir().join("esp.json");
    let bytes = std::fs::read(&path).unwrap();
    let mut measured: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    if let Some(kernel) = kernel {
        measured["speeds"]["kernel"] = kernel.into();
        std::fs::write(&path, measured.to_string()).unwrap();
    }
    ["kernel", "own"].map(|of| measured["speeds"][of].as_u64().unwrap())
}

#[test]
fn auto_measures_once_and_takes_what_is_faster() {
    let lab = Lab::new("espauto");
    let auto = ["--esp", "auto"];
    let hosts = hosts(&lab, [&auto, &auto]);
    let seals = |[kernel, own]: [u64; 2]| {
        assert!(kernel > 0 && own > 0);
        kernel * 10 > own * 11
    };
    let both = hosts.iter().all(|host| {
        let [kernel, own] = measured(host, None);
        eprintln!("{kernel} octets/s by the kernel, {own} by weft");
        seals([kernel, own])
    });
    wait_carrier(&lab, &hosts, if both { "esp" } else { "udp" });
    // On another machine it would have come out otherwise.
    for (kernel, carrier) in [(u64::MAX / 1000, "esp"), (1, "udp")] {
        for host in &hosts {
            let before = measured(host, Some(kernel));
            host.kill9();
            host.up(&auto);
            assert_eq!(measured(host, None)[1], before[1], "measured again");
        }
        lab.wait_members(&hosts);
        wait_carrier(&lab, &hosts, carrier);
    }
}
