//! What routers of the underlay say by marks, and what they are shown of the packets' class.

use std::net::IpAddr;

use weft_lab::{Capture, Container, Frame, Host, Lab};

const WEFT: u16 = 6783;
const NOT_ECT: u8 = 0;
const ECT_0: u8 = 2;
const CE: u8 = 3;

/// Routers that are congested: of all datagrams with `ecn` in their field, one in ten gets the mark.
fn congest(lab: &Lab, ecn: &str) {
    let rule = |ip: &str| {
        format!("udp dport {WEFT} {ip} ecn {ecn} numgen random mod 10 == 0 {ip} ecn set ce\n")
    };
    lab.router().nft(&format!(
        "table inet congested {{
            chain forward {{
                type filter hook forward priority 0;
                {}{}
            }}
        }}
        ",
        rule("ip"),
        rule("ip6")
    ));
}

/// The second octet of the outer header, or the traffic class.
fn tos(frame: &Frame) -> u8 {
    let packet = frame.packet();
    match packet[0] >> 4 {
        4 => packet[1],
        _ => packet[0] << 4 | packet[1] >> 4,
    }
}

fn outer(capture: Capture, from: &Host) -> Vec<u8> {
    let frames = capture.stop();
    let sent = |f: &&Frame| f.is_udp(WEFT) && f.src.is_some_and(|ip| from.addrs().contains(&ip));
    frames.iter().filter(sent).map(tos).collect()
}

/// A counter of the container's kernel.
fn counter(container: &Container, name: &str) -> u64 {
    let table = container.run(&["cat", "/proc/net/netstat"]).ok();
    let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split(' ').collect()).collect();
    let place = |pair: &[Vec<&str>]| {
        let at = pair[0].iter().position(|n| *n == name)?;
        pair[1][at].parse().ok()
    };
    lines
        .chunks(2)
        .find_map(place)
        .unwrap_or_else(|| panic!("no counter {name}"))
}

/// IPv6's are elsewhere.
fn counter6(container: &Container, name: &str) -> u64 {
    let table = container.run(&["cat", "/proc/net/snmp6"]).ok();
    let line = table.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|rest| rest.trim().parse().ok())
        .unwrap_or_else(|| panic!("no counter {name}"))
}

fn pair(lab: &Lab, up: &[&str]) -> ([Host; 2], Container, Container) {
    let [h1, h2] = lab.two();
    h1.up(up);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let a = h1.serve("a", &[]);
    let b = Container::drain(&h2, "b", &[]);
    ([h1, h2], a, b)
}

fn pour(from: &Container, to: IpAddr) {
    from.pours(to, 8);
}

/// How many packets `host` dropped for `reason`, of all its peers'.
fn dropped(host: &Host, reason: &str) -> u64 {
    host.peers()
        .iter()
        .filter_map(|row| row["drops"][reason].as_u64())
        .sum()
}

#[test]
fn congestion_marks_go_through_the_tunnel_and_back_to_the_sender() {
    let lab = Lab::new("marks");
    let ([h1, h2], a, b) = pair(&lab, &[]);
    for container in [&a, &b] {
        let on = ["sysctl", "-qw", "net.ipv4.tcp_ecn=1"];
        container.run(&on).ok();
    }
    congest(&lab, "ect0");
    let capture = h1.capture("outer");
    let delivered = counter(&a, "TCPDeliveredCE");
    pour(&a, b.ip().into());
    let marked = counter(&b, "InCEPkts");
    assert!(marked > 0, "no mark arrived within the tunnel");
    let told = counter(&a, "TCPDeliveredCE");
    assert!(told > delivered, "the sender heard of no mark");
    pour(&a, b.ip6().into());
    assert!(counter6(&b, "Ip6InCEPkts") > 0);
    assert!(counter(&a, "TCPDeliveredCE") > told);

    let outer = outer(capture, &h1);
    let count = |ecn| outer.iter().filter(|tos| **tos == ecn).count();
    assert!(count(ECT_0) > 100, "data goes as its sender marked it");
    assert!(count(NOT_ECT) > 0, "what can't bear a mark goes without");
    assert_eq!(count(CE), 0, "nothing was marked before the router");
    assert_eq!(dropped(&h2, "ce-on-not-ect"), 0);
}

#[test]
fn a_mark_that_nobody_would_understand_is_a_loss() {
    let lab = Lab::new("unmarked");
    let ([_h1, h2], a, b) = pair(&lab, &[]);
    congest(&lab, "not-ect");
    pour(&a, b.ip().into());
    assert_eq!(counter(&b, "InCEPkts"), 0);
    let dropped = dropped(&h2, "ce-on-not-ect");
    let in_all = h2.status()["drops"]["ce-on-not-ect"].as_u64();
    assert!(dropped > 0 && in_all >= Some(dropped));
}

#[test]
fn the_underlay_sees_the_class_of_service_only_where_it_was_asked_to() {
    let lab = Lab::new("class");
    let ([h1, h2], a, b) = pair(&lab, &["--dscp", "copy"]);
    let captures = [h1.capture("outer"), h2.capture("outer")];
    // Expedited forwarding (RFC 3246), which the answers carry as well.
    for to in [b.ip().to_string(), b.ip6().to_string()] {
        a.run(&["ping", "-c3", "-i0.2", "-w5", "-Q", "0xb8", &to])
            .ok();
    }
    let [copied, cleared] = captures;
    let copied = outer(copied, &h1).into_iter().filter(|t| *t == 0xb8);
    assert_eq!(copied.count(), 6);
    let cleared = outer(cleared, &h2);
    assert!(
        cleared.len() >= 6 && cleared.iter().all(|t| *t == 0),
        "{cleared:?}"
    );
}
