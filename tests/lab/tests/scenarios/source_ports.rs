//! Flows that are spread over several source ports: for networks that cap what two addresses and ports may carry.

use std::time::{Duration, Instant};

use weft_lab::{Container, Host, Lab};

/// Connections at a time.
const FLOWS: usize = 24;

fn pair(lab: &Lab, ports: &str) -> [Host; 2] {
    let subnet = lab.subnet("a");
    // One datagram at a time, or the policer takes or drops whole runs.
    let flags = ["--source-ports", ports, "--no-offload", "gso"];
    lab.pair_with(&subnet, [&flags, &flags])
}

/// So many megabytes on each of [`FLOWS`] connections at once; how long it took.
fn pour(from: &Container, to: &Container, megabytes: &str) -> Duration {
    let at = format!("{}:80", to.ip());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..FLOWS {
            scope.spawn(|| {
                let said = from.tool(&["pour", &at, megabytes]).ok();
                assert!(said.ends_with("whole"), "{said}");
            });
        }
    });
    begun.elapsed()
}

/// Packets that came in from `host` by the source ports of its tunnel.
fn count_ports(lab: &Lab, host: &Host) {
    lab.router().nft(&format!(
        "table netdev spread {{
            set seen {{ type inet_service; flags dynamic; counter; }}
            chain in {{
                type filter hook ingress device \"{}\" priority 0;
                udp dport 6783 update @seen {{ udp sport }}
            }}
        }}",
        host.port()
    ));
}

fn packets_by_port(lab: &Lab) -> Vec<(u16, u64)> {
    let list = ["nft", "list", "set", "netdev", "spread", "seen"];
    let listed = lab.router().run(&list).ok();
    let elements = listed.split_once("elements = {").map_or("", |(_, e)| e);
    let read = |element: &str| {
        let words: Vec<&str> = element.split_whitespace().collect();
        let packets = words.iter().position(|word| *word == "packets")?;
        Some((
            words[0].parse().ok()?,
            words.get(packets + 1)?.parse().ok()?,
        ))
    };
    elements.split(',').filter_map(read).collect()
}

fn wait_for_ports(lab: &Lab, from: &Host, a: &Container, b: &Container, count: u64) {
    // They are tried once there is something to send.
    lab.wait("the source ports were tried", 20, || {
        a.pings(&b.ip().to_string());
        from.peer("h2")["source_ports"] == count
    });
}

#[test]
fn flows_leave_by_as_many_source_ports_as_were_asked_for_and_nothing_is_taken_for_a_move() {
    let lab = Lab::new("sports");
    let [h1, h2] = pair(&lab, "4");
    let (a, b) = (h1.serve("a", &[]), Container::drain(&h2, "drain", &[]));
    wait_for_ports(&lab, &h1, &a, &b, 4);
    count_ports(&lab, &h1);
    let path = h2.peer("h1")["path"].clone();
    pour(&a, &b, "1");
    let seen = packets_by_port(&lab);
    let busy = seen.iter().filter(|(_, packets)| *packets > 500);
    assert_eq!(busy.count(), 4, "{seen:?}");
    assert!(seen.iter().any(|(port, _)| *port == 6783), "{seen:?}");
    assert_eq!(h2.peer("h1")["path"], path);
    let shown = h1.weft(&["peers"]).ok();
    assert!(shown.contains("4 source ports"), "{shown}");
}

#[test]
fn a_firewall_that_knows_the_port_alone_loses_nothing() {
    let lab = Lab::new("sportsfw");
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &subnet));
    let [h1, h2] = &hosts;
    lab.router().nft(&format!(
        "table netdev strict {{
            chain in {{
                type filter hook ingress device \"{}\" priority 0;
                udp dport 6783 udp sport != 6783 drop
            }}
        }}",
        h1.port()
    ));
    h1.up(&["--source-ports", "3"]);
    let token = h1.token(&[]);
    h2.up(&["--join", &token, "--source-ports", "3"]);
    lab.wait_members(&hosts);
    let (a, b) = (h1.serve("a", &[]), Container::drain(h2, "drain", &[]));
    let back = h2.serve("back", &[]);
    pour(&a, &b, "1");
    assert_eq!(h1.peer("h2")["source_ports"], 1);
    // The other way nobody is in the way.
    lab.wait("h2's ports were tried", 20, || {
        back.pings(&a.ip().to_string());
        h2.peer("h1")["source_ports"] == 3
    });
    assert_eq!(h1.peer("h2")["source_ports"], 1);
}

/// A cloud's cap of one flow, thousandfold lower.
#[test]
fn where_a_network_caps_each_flow_more_source_ports_carry_more() {
    let took = ["1", "4"].map(|ports| {
        let lab = Lab::new(&format!("capped{ports}"));
        let [h1, h2] = pair(&lab, ports);
        let (a, b) = (h1.serve("a", &[]), Container::drain(&h2, "drain", &[]));
        wait_for_ports(&lab, &h1, &a, &b, ports.parse().unwrap());
        lab.router().nft(&format!(
            "table netdev cap {{
                set rates {{ type ipv4_addr . inet_service; flags dynamic; size 64; }}
                chain in {{
                    type filter hook ingress device \"{}\" priority 0;
                    udp dport 6783 update @rates {{ ip saddr . udp sport limit rate over 5 mbytes/second burst 500 kbytes }} drop
                }}
            }}",
            h1.port()
        ));
        pour(&a, &b, "1")
    });
    eprintln!("one source port {:?}, four {:?}", took[0], took[1]);
    assert!(took[0] > took[1].mul_f64(1.7), "{took:?}");
}
