//! Networks that let no UDP out: hosts join, and everything goes, through TCP to a port of choice.

use std::time::Duration;

use serde_json::Value;
use weft_lab::{Container, Host, Lab, Spawned};

const PORT: &str = "443";
/// Words that stand in the conversations below.
const MARKER: &str = "a-secret-of-the-containers";

fn row(host: &Host, peer: &Host) -> Value {
    host.peer(peer.name())
}

fn by_tcp(host: &Host, peer: &Host) -> bool {
    let row = row(host, peer);
    row["path"].is_string() && row["tcp"] == true
}

fn by_udp(host: &Host, peer: &Host) -> bool {
    let row = row(host, peer);
    row["path"].is_string() && row["tcp"].is_null()
}

/// Two hosts of one cluster, of which the first takes connections.
fn listening(lab: &Lab) -> [Host; 2] {
    let [h1, h2] = lab.two();
    h1.up(&["--tcp-port", PORT]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    [h1, h2]
}

/// Connections to the port that are open on the host.
fn connections(host: &Host) -> usize {
    let out = host.run(&["ss", "-Htn", "state", "established", "sport", "=", PORT]);
    out.ok().lines().filter(|line| !line.is_empty()).count()
}

#[test]
fn a_host_whose_network_lets_out_only_tcp_to_443_joins_and_runs_everything_through_it() {
    let lab = Lab::new("tcponly");
    let [h1, h2] = lab.two();
    h2.only_tcp_to(443);
    h1.block_udp(true);
    h1.up(&["--tcp-port", PORT]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let capture = h2.capture("wire");
    let (a, b) = (h2.serve("a", &[]), h1.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    lab.wait("both say how", 5, || by_tcp(&h2, &h1) && by_tcp(&h1, &h2));
    let names = a.run(&["ping", "-c1", "-w5", "b.weft.internal"]);
    names.ok();
    for proto in ["tcp", "udp"] {
        for to in [format!("{}:80", b.ip()), format!("[{}]:80", b.ip6())] {
            let answer = a.tool(&["ask", proto, &to, "--text", MARKER]).ok();
            assert!(answer.ends_with(MARKER), "{answer}");
        }
    }
    assert!(a.fetches(&b, 8 << 20) && b.fetches(&a, 8 << 20));
    let text = h2.weft(&["peers"]).ok();
    let way = format!("tcp {}:{PORT}", h1.v4());
    assert!(text.contains(&way), "{text}");
    let why = format!(
        "h1 is reached by TCP: UDP does not answer; also tried: {}:6783",
        h1.v4()
    );
    assert!(text.contains(&why), "{text}");
    assert!(h1.weft(&["status"]).ok().contains("6783/udp, 443/tcp"));

    let frames = capture.stop();
    let sealed = |frame: &&weft_lab::Frame| {
        frame.proto == Some(6)
            && frame
                .ports
                .is_some_and(|(from, to)| from == 443 || to == 443)
    };
    // The kernel has joined many of them.
    let octets: usize = frames.iter().filter(sealed).map(|f| f.bytes.len()).sum();
    assert!(octets > 4 << 20, "{octets}");
    for frame in &frames {
        assert!(!frame.contains(MARKER.as_bytes()), "readable: {frame:?}");
        assert!(!frame.contains(b"weft.internal"), "readable: {frame:?}");
    }

    // A daemon that takes over has the connection made anew.
    for host in [&h1, &h2] {
        host.weft(&["restart"]).ok();
        lab.wait("they talk after a restart", 5, || {
            a.pings(&b.ip().to_string())
        });
    }
}

/// Octets that flow from a container of the second host to one of the first for as long as this lives.
struct Stream {
    from: Spawned,
    to: Spawned,
    /// Where they run: a namespace that goes before a program has entered it takes that along.
    _ends: [Container; 2],
}

impl Stream {
    fn begin(lab: &Lab, [h1, h2]: [&Host; 2]) -> Self {
        let (a, b) = (h2.serve("a", &[]), h1.serve("b", &[]));
        lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
        let mut to = b.spawn_tool(h1, "follow", &["follow", "7002"]);
        to.wait_for("ready", Duration::from_secs(10));
        let from = a.spawn_tool(h2, "flow", &["flow", &format!("{}:7002", b.ip())]);
        let _ends = [a, b];
        Self { from, to, _ends }
    }

    fn gets_on(&self, lab: &Lab, secs: u64, when: &str) {
        let before = octets(&self.to.stdout());
        lab.wait(&format!("the stream gets on {when}"), secs, || {
            octets(&self.to.stdout()) > before + 1_000_000
        });
        let said = format!("{}{}", self.from.stderr(), self.to.stderr());
        assert_eq!(said, "", "{when}");
    }
}

#[test]
fn streams_outlive_a_block_of_udp_and_go_back_to_it() {
    let lab = Lab::new("tcpturn");
    let [h1, h2] = listening(&lab);
    let stream = Stream::begin(&lab, [&h1, &h2]);
    stream.gets_on(&lab, 20, "by UDP");
    assert!(by_udp(&h2, &h1) && by_udp(&h1, &h2));
    assert_eq!(connections(&h1), 0, "nobody needs one");
    for round in 1..=2 {
        h1.block_udp(true);
        h2.block_udp(true);
        stream.gets_on(&lab, 8, &format!("by TCP, round {round}"));
        lab.wait("both say so", 10, || by_tcp(&h2, &h1) && by_tcp(&h1, &h2));
        h1.block_udp(false);
        h2.block_udp(false);
        lab.wait("back", 20, || by_udp(&h2, &h1) && by_udp(&h1, &h2));
        stream.gets_on(&lab, 8, &format!("by UDP again, round {round}"));
    }
    assert_eq!((h1.alive(), h2.alive()), (2, 2));
    lab.wait("no connection is kept", 60, || connections(&h1) == 0);
}

#[test]
fn udp_that_passes_one_way_only_stops_nobody() {
    let lab = Lab::new("tcphalf");
    let [h1, h2] = lab.two();
    h2.block_udp(true);
    h1.up(&["--tcp-port", PORT]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let stream = Stream::begin(&lab, [&h1, &h2]);
    stream.gets_on(&lab, 20, "of one that joined so");
    h2.block_udp(false);
    lab.wait("both use UDP", 40, || by_udp(&h2, &h1) && by_udp(&h1, &h2));
    for (mute, hears) in [(&h1, &h2), (&h2, &h1)] {
        mute.block_udp(true);
        let when = format!("while {} is mute", mute.name());
        stream.gets_on(&lab, 8, &when);
        lab.wait("it sends by TCP", 10, || by_tcp(mute, hears));
        stream.gets_on(&lab, 8, &when);
        assert_eq!((h1.alive(), h2.alive()), (2, 2), "{when}");
        mute.block_udp(false);
        lab.wait("back", 20, || by_udp(&h2, &h1) && by_udp(&h1, &h2));
    }
}

/// The last count of octets in what `lab-tool follow` said.
fn octets(said: &str) -> u64 {
    let mut words = said.lines().last().unwrap_or_default().split_whitespace();
    let count = words
        .find(|word| *word == "octets")
        .and_then(|_| words.next());
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

#[test]
fn strangers_at_the_port_are_sent_away_and_what_runs_does_not_notice() {
    let lab = Lab::new("tcpnoise");
    let public = lab.subnet("net");
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|name| lab.host(name, &public));
    h2.only_tcp_to(443);
    h1.block_udp(true);
    h1.up(&["--tcp-port", PORT]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let (a, b) = (h2.serve("a", &[]), h1.serve("b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    lab.wait("by one connection", 10, || connections(&h1) == 1);
    let mut pinger = a.spawn(
        &h2,
        "pinger",
        &["ping", "-i0.1", "-c100", &b.ip().to_string()],
    );
    let to = format!("{}:{PORT}", h1.v4());
    // Each says that it was closed once it was.
    let mut idle = h3.spawn_tool("idle", &["strangers", &to, "300", "idle"]);
    idle.wait_for("300 connected", Duration::from_secs(20));
    lab.wait("few of one source are held", 3, || connections(&h1) <= 17);
    let mut junk = h3.spawn_tool("junk", &["strangers", &to, "300", "junk"]);
    let mut slow = h3.spawn_tool("slow", &["strangers", &to, "300", "slow"]);
    for strangers in [&mut idle, &mut junk, &mut slow] {
        strangers.wait_for("300 closed", Duration::from_secs(30));
    }
    pinger.wait(Duration::from_secs(30));
    let answered = pinger.stdout().matches("bytes from").count();
    assert!(answered >= 99, "{answered} of 100");
    assert!(by_tcp(&h2, &h1));
    assert_eq!(connections(&h1), 1, "the member's is open");
    // The port is still good for newcomers, while strangers hold what they can.
    let mut again = h3.spawn_tool("again", &["strangers", &to, "300", "idle"]);
    again.wait_for("300 connected", Duration::from_secs(20));
    let h4 = lab.host("h4", &public);
    h4.only_tcp_to(443);
    h4.join(&h1);
    lab.wait_members(&[h1, h2, h4]);
}

#[test]
#[ignore = "a measurement: cargo test -p weft-lab what_a_stream_gets -- --ignored --nocapture"]
fn what_a_stream_gets_by_tcp_and_by_udp() {
    let lab = Lab::new("tcprate");
    let [h1, h2] = listening(&lab);
    let (a, b) = (h2.serve("a", &[]), Container::drain(&h1, "b", &[]));
    lab.wait("they talk", 20, || a.pings(&b.ip().to_string()));
    let pour = |what: &str| {
        let begun = std::time::Instant::now();
        a.pours(b.ip(), 256);
        let mbits = 256.0 * 8.388_608 / begun.elapsed().as_secs_f64();
        println!("{what}: {mbits:.0} Mbit/s");
    };
    assert!(by_udp(&h2, &h1));
    pour("by UDP");
    h2.only_tcp_to(443);
    h1.block_udp(true);
    lab.wait("by TCP", 20, || {
        a.pings(&b.ip().to_string()) && by_tcp(&h2, &h1)
    });
    pour("by TCP");
    println!("{}", h2.only_peer()["drops"]);
}
