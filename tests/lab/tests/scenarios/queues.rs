//! Slow uplinks with deep queues: what shares them does not wait behind a stream.

use std::time::Duration;

use weft_lab::{Container, Host, Lab};

/// A slow uplink whose queue nobody watches: at this rate it could hold eleven seconds.
const UPLINK: &str = "rate 50mbit burst 64kb limit 70mb";

/// What ought to be enough for anybody: the stream's first rush takes ten times as long.
const ENOUGH_MS: f64 = 60.0;

/// Mean round trip of five pings, in milliseconds.
fn round_trip(from: &Container, to: &Container) -> f64 {
    let to = to.ip().to_string();
    let ping = ["ping", "-q", "-c5", "-i0.2", "-w9", &to];
    let out = from.run(&ping).ok();
    let line = out
        .lines()
        .find_map(|l| l.strip_prefix("rtt min/avg/max/mdev = "));
    let mean = line.and_then(|l| l.split('/').nth(1)?.parse().ok());
    mean.unwrap_or_else(|| panic!("{out}"))
}

fn sysctl(container: &Container, setting: &str) {
    container.run(&["sysctl", "-qw", setting]).ok();
}

fn congested(host: &Host) -> u64 {
    let drops = host.only_peer()["drops"].clone();
    drops["congested"].as_u64().unwrap_or_default()
}

/// One stream from `h1`, whose sender looks for losses and marks and at no clock; how many packets were dropped for it, once
/// the round trip beside it was short.
fn dropped_beside_a_stream(name: &str, marks: bool) -> u64 {
    let lab = Lab::new(name);
    let [h1, h2] = lab.pair();
    let a = h1.serve("a", &[]);
    let b = Container::drain(&h2, "b", &[]);
    let words = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf"];
    let words: Vec<&str> = words.into_iter().chain(UPLINK.split(' ')).collect();
    h1.run(&words).ok();
    sysctl(&a, "net.ipv4.tcp_congestion_control=reno");
    if marks {
        sysctl(&a, "net.ipv4.tcp_ecn=1");
    }
    let to = format!("{}:80", b.ip());
    let mut stream = a.spawn_tool(&h1, "pour", &["pour", &to, "48"]);
    let mut seen = Vec::new();
    lab.wait("the round trip beside it is short", 8, || {
        seen.push(round_trip(&a, &b));
        assert!(
            !stream.stdout().contains("whole"),
            "until it ended: {seen:?}"
        );
        seen.last().is_some_and(|ms| (3.0..ENOUGH_MS).contains(ms))
    });
    stream.wait_for("octets, whole", Duration::from_secs(60));
    congested(&h1)
}

#[test]
fn a_stream_over_a_slow_uplink_leaves_room_for_others() {
    assert!(dropped_beside_a_stream("uplink", false) > 0);
    assert_eq!(dropped_beside_a_stream("marked", true), 0, "marks do");
}
