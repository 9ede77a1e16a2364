//! Several networks: made on one host, used on all; apart from each other but for services; full, and gone again.

use serde_json::{Value, json};
use weft_lab::{Container, Host, Lab};

fn networks(host: &Host) -> Vec<Value> {
    let rows = host.weft(&["network", "ls", "--json"]).json();
    rows.as_array().cloned().unwrap_or_default()
}

fn network(host: &Host, name: &str) -> Option<Value> {
    networks(host).into_iter().find(|row| row["name"] == name)
}

fn serve_in(host: &Host, network: &str, name: &str) -> Container {
    host.serve_with(name, &["--network", network])
}

fn known_by_all(lab: &Lab, hosts: &[Host], name: &str) {
    lab.wait(&format!("all know network {name}"), 20, || {
        hosts.iter().all(|host| network(host, name).is_some())
    });
}

fn inside(row: &Value, container: &Container) -> bool {
    let net: ipnet::Ipv4Net = row["net"].as_str().unwrap().parse().unwrap();
    net.contains(&container.ip())
}

fn resolves(from: &Container, name: &str) -> Vec<String> {
    let args = [
        "dig",
        "+short",
        "+tries=2",
        "+time=2",
        &format!("{name}.weft.internal"),
    ];
    from.run(&args).ok().lines().map(str::to_owned).collect()
}

#[test]
fn containers_of_a_network_reach_each_other_and_others_only_by_services() {
    let lab = Lab::new("networks");
    let hosts = lab.trio();
    let [h1, h2, h3] = &hosts;
    // h2 joined: it owns no space for networks, and gets some from the founder.
    let made = h2.weft(&["network", "create", "blue", "--json"]).json();
    assert_eq!(
        (made["size"].as_u64(), made["used"].as_u64()),
        (Some(4094), Some(0))
    );
    known_by_all(&lab, &hosts, "blue");
    let (b1, b3) = (serve_in(h1, "blue", "b1"), serve_in(h3, "blue", "b3"));
    let (d1, d2) = (h1.serve("d1", &[]), h2.serve("d2", &[]));
    assert!(inside(&made, &b1) && inside(&made, &b3) && !inside(&made, &d1));
    lab.wait("blue talks across hosts", 20, || {
        b1.pings(&b3.ip().to_string())
    });
    lab.wait("on IPv6 too", 20, || b3.pings(&b1.ip6().to_string()));
    lab.wait("default talks", 20, || d1.pings(&d2.ip().to_string()));
    for (from, to) in [(&d1, &b1), (&b1, &d1), (&d2, &b3), (&b3, &d1)] {
        assert!(
            !from.pings(&to.ip().to_string()),
            "{} reaches {}",
            from.name(),
            to.name()
        );
        assert!(
            !from.pings(&to.ip6().to_string()),
            "{} reaches {} on IPv6",
            from.name(),
            to.name()
        );
    }
    let refused = d1.ask("tcp", &format!("{}:80", b3.ip()));
    assert!(!refused.is_ok(), "{refused}");
    // Names follow: each sees its own network, a host sees all.
    lab.wait("b3 has its name in blue", 20, || {
        resolves(&b1, "b3") == [b3.ip().to_string()]
    });
    assert!(resolves(&d1, "b3").is_empty() && resolves(&b1, "d1").is_empty());
    assert!(
        h2.weft(&["dns", "lookup", "b3"])
            .ok()
            .contains(&b3.ip().to_string())
    );
    // The hosts themselves reach all, in both directions.
    for host in &hosts {
        for to in [&b1, &b3, &d1] {
            let ip = to.ip().to_string();
            lab.wait("a host reaches a container", 20, || {
                host.run(&["ping", "-c1", "-W2", &ip]).is_ok()
            });
        }
        let leg = host.overlay_ip().to_string();
        lab.wait("a container reaches a host", 20, || b1.pings(&leg));
    }
    // A service over the backends of one network is there for all.
    let create = [
        "service",
        "create",
        "b3",
        "--port",
        "80",
        "--publish",
        "8080:80",
        "--json",
    ];
    let vip = h1.weft(&create).json()["vip"].as_str().unwrap().to_owned();
    for from in [&d1, &d2, &b1] {
        lab.wait("the VIP answers in every network", 20, || {
            from.ask("tcp", &format!("{vip}:80"))
                .stdout
                .starts_with("b3 ")
        });
        lab.wait("and its name", 20, || resolves(from, "b3") == [vip.clone()]);
    }
    for host in &hosts {
        let to = format!("{}:8080", host.v4());
        lab.wait("the published port answers", 20, || {
            d1.ask("tcp", &to).stdout.starts_with("b3 ")
        });
    }
    assert!(!d1.pings(&b3.ip().to_string()), "still not straight");
    // A restart changes nothing of it.
    h1.kill9();
    assert!(!d1.pings(&b1.ip().to_string()), "nor without the daemon");
    h1.up(&[]);
    lab.wait_members(&hosts);
    known_by_all(&lab, &hosts, "blue");
    lab.wait("blue still talks", 20, || b1.pings(&b3.ip().to_string()));
    assert!(!d1.pings(&b1.ip().to_string()));
    let late = serve_in(h1, "blue", "late");
    assert!(inside(&made, &late));
}

#[test]
fn a_network_is_made_filled_warned_of_and_removed() {
    let lab = Lab::new("small-nets");
    let hosts = [("h1", lab.subnet("a")), ("h2", lab.subnet("b"))].map(|(n, s)| lab.host(n, &s));
    let [h1, h2] = &hosts;
    h1.up(&["--range", "10.9.0.0/22"]);
    h2.join(h1);
    lab.wait_members(&hosts);
    for (args, said) in [
        (["--size", "20"], "is a /26 to a /30, not a /20"),
        (
            ["--subnet", "192.168.7.0/26"],
            "not in this cluster's range, 10.9.0.0/22",
        ),
        (["--subnet", "10.9.1.7/28"], "did you mean 10.9.1.0/28?"),
        (["--subnet", "10.9.0.0/26"], "overlaps network \"default\""),
        (
            ["--subnet", "10.9.3.192/26"],
            "overlaps the services' virtual addresses",
        ),
    ] {
        let text = h2
            .weft(&[&["network", "create", "x"], &args[..]].concat())
            .fails_with(1);
        assert!(text.contains(said), "{text}");
    }
    h2.weft(&["network", "create", "tiny", "--subnet", "10.9.1.0/29"])
        .ok();
    let text = h2.weft(&["network", "create", "tiny"]).fails_with(1);
    assert!(
        text.contains("there is a network \"tiny\" already"),
        "{text}"
    );
    known_by_all(&lab, &hosts, "tiny");
    let mut boxes: Vec<Container> = (0..5)
        .map(|n| serve_in(&hosts[n % 2], "tiny", &format!("t{n}")))
        .collect();
    let full = |host: &Host| {
        host.weft(&["status"])
            .ok()
            .contains("network \"tiny\" (10.9.1.0/29) is nearly full")
    };
    lab.wait("people are warned", 20, || full(h1) && full(h2));
    assert!(h1.weft(&["network", "ls"]).ok().contains("5 of 6"));
    boxes.push(serve_in(h2, "tiny", "t5"));
    let text = h1
        .weft(&["run", "--network", "tiny", "--", "true"])
        .fails_with(1);
    assert!(
        text.contains(
            "network \"tiny\" (10.9.1.0/29) is full: all its 6 addresses are in use; detach"
        ),
        "{text}"
    );
    let text = h1.weft(&["network", "rm", "tiny"]).fails_with(1);
    assert!(
        text.contains("is in use by") && text.contains("1 more; detach"),
        "{text}"
    );
    let text = h1.weft(&["network", "rm", "default"]).fails_with(1);
    assert!(text.contains("can't be removed"), "{text}");
    drop(boxes);
    lab.wait("nothing is in it any more", 20, || {
        network(h1, "tiny").is_some_and(|row| row["used"] == 0)
    });
    lab.wait("the warning is over", 20, || !full(h1) && !full(h2));
    h1.weft(&["network", "rm", "tiny"]).ok();
    lab.wait("it is gone everywhere", 20, || {
        network(h2, "tiny").is_none()
    });
    let text = h2
        .weft(&["run", "--network", "tiny", "--", "true"])
        .fails_with(1);
    assert!(text.contains("there is no network \"tiny\""), "{text}");
    let text = h2.weft(&["network", "rm", "tiny"]).fails_with(1);
    assert!(text.contains("there is no network \"tiny\""), "{text}");
}

#[test]
fn a_runtime_attaches_to_a_network_by_its_configuration() {
    let lab = Lab::new("cni-nets");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let add = |network: &str, id: &str| {
        let netns = format!("{}-{id}", host.space().name());
        host.run(&["ip", "netns", "add", &netns]).ok();
        let config =
            json!({"cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "network": network});
        let path = format!("/run/netns/{netns}");
        let env = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", &path),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/nowhere"),
        ];
        let out = host.run_env(
            &env,
            &[&Host::binary("weft-cni")],
            config.to_string().as_bytes(),
        );
        (netns, out)
    };
    let (blue, out) = add("blue", "c1");
    assert!(
        !out.is_ok() && out.stdout.contains("there is no network"),
        "{out}"
    );
    host.run(&["ip", "netns", "del", &blue]).ok();
    host.weft(&["network", "create", "blue", "--size", "/16"])
        .ok();
    let (blue, out) = add("blue", "c2");
    let ip = out.json()["ips"][0]["address"].as_str().unwrap().to_owned();
    let row = network(&host, "blue").unwrap();
    let net: ipnet::Ipv4Net = row["net"].as_str().unwrap().parse().unwrap();
    assert!(
        net.contains(&ip.parse::<ipnet::Ipv4Net>().unwrap().addr()),
        "{ip} is not in {net}"
    );
    let (default, out) = add("default", "c3");
    out.ok();
    let ping = |from: &str| {
        host.run(&[
            "ip",
            "netns",
            "exec",
            from,
            "ping",
            "-c1",
            "-W1",
            ip.trim_end_matches("/32"),
        ])
    };
    assert!(!ping(&default).is_ok(), "from another network");
    for netns in [&blue, &default] {
        host.run(&["ip", "netns", "del", netns]).ok();
    }
}
