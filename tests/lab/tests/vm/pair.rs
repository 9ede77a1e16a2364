//! Two hosts on one subnet, and what they say to each other.

use std::time::Duration;

use weft_lab::{Capture, Container, Frame, Host, Lab, Spawned};

/// Words that stand in the conversations below.
pub(crate) const MARKER: &str = "words-of-the-containers";

/// Two hosts on one subnet in one cluster, each brought up with its flags.
pub(crate) fn hosts(lab: &Lab, flags: [&[&str]; 2]) -> [Host; 2] {
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &subnet));
    hosts[0].up(flags[0]);
    let token = hosts[0].token(&[]);
    let join = [&["--join", "-"], flags[1]].concat();
    hosts[1].up_with(&join, token.as_bytes()).ok();
    lab.wait_members(&hosts);
    hosts
}

/// A container on each.
pub(crate) fn containers(lab: &Lab, [h1, h2]: &[Host; 2]) -> [Container; 2] {
    let pair = [h1.serve("a", &[]), h2.serve("b", &[])];
    lab.wait("containers talk", 30, || {
        pair[0].pings(&pair[1].ip().to_string())
    });
    pair
}

/// Each asks the other, over TCP and UDP, IPv4 and IPv6.
pub(crate) fn converse([a, b]: &[Container; 2]) {
    for (from, to) in [(a, b), (b, a)] {
        for target in [format!("{}:80", to.ip()), format!("[{}]:80", to.ip6())] {
            for proto in ["tcp", "udp"] {
                let answer = from.tool(&["ask", proto, &target, "--text", MARKER]).ok();
                assert!(answer.ends_with(MARKER), "{proto} {target}: {answer}");
            }
        }
    }
}

/// What the conversation of two containers looks like on the wire, once enough packets that `wanted` knows are there: the
/// questions and answers are sixteen; a busy machine's capture misses some.
pub(crate) fn overheard(
    lab: &Lab,
    host: &Host,
    pair: &[Container; 2],
    wanted: impl Fn(&Frame) -> bool,
) -> Vec<Frame> {
    let capture: Capture = host.capture("wire");
    converse(pair);
    lab.wait("the conversation was on this wire", 15, || {
        capture.frames().iter().filter(|f| wanted(f)).count() >= 8
    });
    capture.stop()
}

/// Does it hold what the containers said, in the clear?
pub(crate) fn has_marker(frame: &Frame) -> bool {
    frame.contains(MARKER.as_bytes())
}

/// A connection from the first to the second that asks and is answered for ever.
pub(crate) fn hold(host: &Host, [a, b]: &[Container; 2]) -> Spawned {
    let mut hold = a.spawn_tool(host, "hold", &["hold", &format!("{}:80", b.ip())]);
    hold.wait_for("ok 10 ", Duration::from_secs(30));
    hold
}

/// How often it was answered.
pub(crate) fn progress(hold: &Spawned) -> u64 {
    let said = hold.stdout();
    let last = said.lines().rfind(|line| line.starts_with("ok "));
    last.and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// The connection goes on: ten more answers.
pub(crate) fn goes_on(lab: &Lab, hold: &Spawned) {
    let before = progress(hold);
    lab.wait("the connection goes on", 30, || {
        progress(hold) >= before + 10
    });
}
