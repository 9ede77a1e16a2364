//! Kernels and cards with broken offloads: everything works without them, and what vanishes by one is noticed.

use std::net::IpAddr;

use weft_lab::{Container, Host, Lab};

/// Datagrams of all lengths, per direction and version.
const COUNT: &str = "300";

/// TCP, and datagrams small and large, from `from` to containers on `to`.
fn exchange(lab: &Lab, from: &Container, drain: &Container, to: &Host) {
    for (family, ip) in [
        ("v4", IpAddr::from(drain.ip())),
        ("v6", IpAddr::from(drain.ip6())),
    ] {
        from.pours(ip, 4);
        let tool = Host::binary("lab-tool");
        let name = format!("{}-to-{}-{family}", from.name(), to.name());
        let catcher = Container::start(to, &name, &[], &[&tool, "catch", "4000", COUNT]);
        let at = match ip {
            IpAddr::V4(_) => format!("{}:4000", catcher.ip()),
            IpAddr::V6(_) => format!("[{}]:4000", catcher.ip6()),
        };
        from.tool(&["throw", &at, COUNT]).ok();
        lab.wait("all datagrams are there", 20, || {
            catcher.heard().contains("whole")
        });
        let all = format!("{COUNT} whole, 0 broken, late: [], lost: []");
        assert!(catcher.heard().contains(&all), "{}", catcher.heard());
    }
}

/// One host for each, and one without any, all beside a host that has them all.
#[test]
fn every_offload_can_be_done_without() {
    let rungs = ["gso", "gro", "tso", "uso", "csum", "gso,gro,csum"];
    let lab = Lab::new("rungs");
    let subnet = lab.subnet("a");
    // By IPv4 alone: a path by IPv6 takes less, and who moves to it refuses a datagram or two to their sender.
    let host = |name: &str| {
        let host = lab.host(name, &subnet);
        host.use_ipv4_alone();
        host
    };
    let hub = host("hub");
    hub.up(&[]);
    let centre = Container::drain(&hub, "centre", &[]);
    let mut hosts = vec![hub.clone()];
    for (number, without) in rungs.iter().enumerate() {
        let host = host(&format!("r{number}"));
        let token = hub.token(&[]);
        let flags = ["--join", &token, "--no-offload", without];
        host.up(&flags);
        hosts.push(host);
    }
    lab.wait_members(&hosts);
    for (host, without) in hosts[1..].iter().zip(rungs) {
        let end = Container::drain(host, &format!("end-{}", host.name()), &[]);
        exchange(&lab, &end, &centre, &hub);
        exchange(&lab, &centre, &end, host);
        let offloads = &host.peer("hub")["offloads"];
        for name in without.split(',') {
            assert_eq!(offloads[name], "switched-off", "{offloads}");
        }
        let super_packets = !without.contains("csum") && !without.contains("tso");
        assert_eq!(offloads["tso"] == "on", super_packets, "{offloads}");
        let drops = &hub.peer(host.name())["drops"];
        assert!(
            drops["forged"].is_null() && drops["tap-refused"].is_null(),
            "{drops}"
        );
    }
}

/// What a card does that takes a run and sends nothing of it.
#[test]
fn where_runs_vanish_datagrams_go_one_by_one_and_peers_says_so() {
    let lab = Lab::new("vanish");
    let [h1, h2] = lab.two();
    lab.router().nft(&format!(
        "table netdev broken {{
            chain in {{
                type filter hook ingress device \"{}\" priority 0;
                meta length > 2000 drop
            }}
        }}
        ",
        h1.port()
    ));
    lab.cluster(&[h1.clone(), h2.clone()]);
    let a = h1.serve("a", &[]);
    let b = Container::drain(&h2, "b", &[]);
    // They are tried once there is something to send.
    lab.wait("h1 knows that its runs vanish", 20, || {
        a.pings(&b.ip().to_string());
        h1.peer("h2")["offloads"]["gso"] == "failing"
    });
    a.pours(b.ip(), 4);
    let shown = h1.weft(&["peers"]).ok();
    assert!(shown.contains("no gso (failing)"), "{shown}");
    assert_eq!(h2.peer("h1")["offloads"]["gso"], "on");
}
