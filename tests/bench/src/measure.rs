//! What is measured, and how.

use std::fmt;
use std::time::Duration;

use serde_json::Value as Json;

use weft_lab::Host;

use crate::pair::{COUNTED, Pair, VISITED};

/// A figure, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Value(pub(crate) Option<f64>);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("-"),
            Some(value) if value >= 100.0 => write!(f, "{value:.0}"),
            Some(value) if value >= 1.0 => write!(f, "{value:.2}"),
            Some(value) => write!(f, "{value:.3}"),
        }
    }
}

/// Something that is measured.
#[derive(Clone, Copy)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) more_is_better: bool,
    pub(crate) take: fn(&Pair, Duration) -> Value,
}

/// All that is measured.
pub(crate) const METRICS: [Metric; 12] = [
    Metric {
        name: "tcp",
        title: "one TCP stream, Gbit/s",
        more_is_better: true,
        take: |pair, time| tcp(pair, time, 1).rate,
    },
    Metric {
        name: "tcp-4",
        title: "four TCP streams, Gbit/s",
        more_is_better: true,
        take: |pair, time| tcp(pair, time, 4).rate,
    },
    Metric {
        name: "cpu",
        title: "CPU seconds per GB, one TCP stream",
        more_is_better: false,
        take: |pair, time| tcp(pair, time, 1).cpu,
    },
    Metric {
        name: "udp-64",
        title: "UDP of 64 octets, thousand packets/s",
        more_is_better: true,
        take: |pair, time| udp(pair, time, 64).map_or(Value(None), |udp| udp.rate),
    },
    Metric {
        name: "udp-1400",
        title: "UDP of 1,400 octets, thousand packets/s",
        more_is_better: true,
        take: |pair, time| udp(pair, time, 1400).map_or(Value(None), |udp| udp.rate),
    },
    Metric {
        name: "udp-1400-lost",
        title: "UDP of 1,400 octets, lost of 100",
        more_is_better: false,
        take: |pair, time| udp(pair, time, 1400).map_or(Value(None), |udp| udp.lost),
    },
    Metric {
        name: "udp-runs",
        title: "UDP of 1,200 octets in runs, thousand packets/s",
        more_is_better: true,
        take: |pair, time| udp_runs(pair, time).map_or(Value(None), |udp| udp.rate),
    },
    Metric {
        name: "udp-runs-lost",
        title: "UDP of 1,200 octets in runs, lost of 100",
        more_is_better: false,
        take: |pair, time| udp_runs(pair, time).map_or(Value(None), |udp| udp.lost),
    },
    Metric {
        name: "rtt",
        title: "round trip, ms",
        more_is_better: false,
        take: |pair, time| ping(pair, time),
    },
    Metric {
        name: "connections",
        title: "TCP connections opened and ended, one after the other, a second",
        more_is_better: true,
        take: connections,
    },
    Metric {
        name: "rtt-load",
        title: "round trip beside one TCP stream, ms",
        more_is_better: false,
        take: ping_under_load,
    },
    Metric {
        name: "tcp-loss",
        title: "one TCP stream, 1 % of datagrams lost, Gbit/s",
        more_is_better: true,
        take: tcp_under_loss,
    },
];

struct Tcp {
    rate: Value,
    cpu: Value,
}

fn tcp(pair: &Pair, time: Duration, streams: u32) -> Tcp {
    let before = busy_seconds();
    let said = iperf(pair, time, &["--parallel", &streams.to_string()]);
    let busy = busy_seconds() - before;
    let bits = said
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Json::as_f64);
    let bytes = said
        .pointer("/end/sum_received/bytes")
        .and_then(Json::as_f64);
    let bytes = bytes.filter(|bytes| *bytes > 0.0);
    Tcp {
        rate: Value(bits.map(|bits| bits / 1e9)),
        cpu: Value(bytes.map(|bytes| busy / (bytes / 1e9))),
    }
}

struct Udp {
    /// Thousand packets a second that arrived.
    rate: Value,
    /// Of a hundred that were sent.
    lost: Value,
}

/// As fast as the sender can.
fn udp(pair: &Pair, time: Duration, length: u32) -> Option<Udp> {
    let said = iperf(
        pair,
        time,
        &["--udp", "--bitrate", "0", "--length", &length.to_string()],
    );
    let number = |name: &str| said.pointer(&format!("/end/sum/{name}"))?.as_f64();
    let (packets, lost, seconds) = (
        number("packets")?,
        number("lost_packets")?,
        number("seconds")?,
    );
    Some(Udp {
        rate: Value(Some((packets - lost) / seconds / 1e3)),
        lost: Value(Some(100.0 * lost / packets)),
    })
}

/// As fast as a sender can that leaves the cutting to the kernel, as QUIC's do. Of the size that QUIC's are at least, which
/// fits every tunnel here.
fn udp_runs(pair: &Pair, time: Duration) -> Option<Udp> {
    let tool = Host::binary("lab-tool");
    let to = format!("{}:{COUNTED}", pair.address);
    let millis = time.as_millis().to_string();
    let said = pair.near.run(&[&tool, "runs", &to, "1200", &millis]);
    if !said.is_ok() {
        eprintln!("{said}");
    }
    let number = |name: &str| -> Option<f64> {
        let mut words = said.stdout.split_whitespace();
        words.find(|word| *word == name)?;
        words.next()?.parse().ok()
    };
    let (sent, came, millis) = (number("sent")?, number("came")?, number("millis")?);
    Some(Udp {
        rate: Value(Some(came / millis)),
        lost: Value(Some(100.0 * (sent - came) / sent)),
    })
}

fn iperf(pair: &Pair, time: Duration, flags: &[&str]) -> Json {
    let seconds = time.as_secs().to_string();
    let common = [
        "iperf3",
        "--client",
        &pair.address,
        "--time",
        &seconds,
        "--json",
    ];
    let out = pair.near.run(&[&common[..], flags].concat());
    // A candidate that does not get through has no figure; what it said stands in the log.
    if !out.is_ok() {
        eprintln!("{out}");
    }
    serde_json::from_str(&out.stdout).unwrap_or_default()
}

/// The mean round trip, milliseconds.
fn ping(pair: &Pair, time: Duration) -> Value {
    let deadline = time.as_secs().to_string();
    let args = ["ping", "-q", "-i", "0.002", "-w", &deadline, &pair.address];
    let said = pair.near.run(&args).stdout;
    let line = said.lines().find(|line| line.starts_with("rtt "));
    let mean = line.and_then(|line| line.split('/').nth(4)?.parse().ok());
    Value(mean)
}

fn connections(pair: &Pair, time: Duration) -> Value {
    let tool = Host::binary("lab-tool");
    let to = format!("{}:{VISITED}", pair.address);
    let millis = time.as_millis().to_string();
    let out = pair.near.run(&[&tool, "visit", &to, &millis]);
    let visits: Option<f64> = out.stdout.trim().parse().ok();
    Value(visits.map(|visits| visits / time.as_secs_f64()))
}

fn ping_under_load(pair: &Pair, time: Duration) -> Value {
    std::thread::scope(|scope| {
        // The stream begins before the first question and ends after the last.
        let load = scope.spawn(|| iperf(pair, time + Duration::from_secs(2), &[]));
        std::thread::sleep(Duration::from_secs(1));
        let value = ping(pair, time);
        let _ = load.join();
        value
    })
}

/// Each datagram is lost by itself: nobody's segmentation or joining lasts until after the loss.
fn tcp_under_loss(pair: &Pair, time: Duration) -> Value {
    for host in &pair.hosts {
        segment_on_the_wire(host, "off");
        host.lose(1);
    }
    let rate = tcp(pair, time, 1).rate;
    for host in &pair.hosts {
        host.lose(0);
        segment_on_the_wire(host, "on");
    }
    rate
}

fn segment_on_the_wire(host: &Host, value: &str) {
    let flags = ["gso", value, "tso", value, "tx-udp-segmentation", value];
    host.run(&[&["ethtool", "-K", "eth0"][..], &flags[..]].concat())
        .ok();
}

/// What all processors together have worked since the machine's start, interrupts included.
fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|n| n.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq: proc(5); a tick is 10 ms.
    let busy = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|place| ticks.get(*place))
        .sum::<f64>();
    busy / 100.0
}
