//! What two containers say to each other, and what of it is seen on the wire.

use std::time::Duration;

use crate::capture::{Capture, Frame};
use crate::command::Spawned;
use crate::container::Container;
use crate::host::Host;
use crate::lab::Lab;

/// Words that stand in every conversation.
pub const MARKER: &str = "words-of-the-containers";

/// Each asks the other, over TCP and UDP, IPv4 and IPv6.
pub fn converse([a, b]: [&Container; 2]) {
    for (from, to) in [(a, b), (b, a)] {
        for target in [format!("{}:80", to.ip()), format!("[{}]:80", to.ip6())] {
            for proto in ["tcp", "udp"] {
                let answer = from.tool(&["ask", proto, &target, "--text", MARKER]).ok();
                assert!(answer.ends_with(MARKER), "{proto} {target}: {answer}");
            }
        }
    }
}

/// Does it hold what containers said, in the clear?
pub fn has_marker(frame: &Frame) -> bool {
    frame.contains(MARKER.as_bytes())
}

/// What the conversation of two containers looks like on `host`'s wire, once enough packets that `wanted` knows are there,
/// within so many seconds: the questions and answers are sixteen; a busy machine's capture misses some.
pub fn overheard(
    lab: &Lab,
    host: &Host,
    pair: [&Container; 2],
    within: u64,
    wanted: impl Fn(&Frame) -> bool,
) -> Vec<Frame> {
    let capture: Capture = host.capture("wire");
    converse(pair);
    lab.wait("the conversation was on this wire", within, || {
        capture.frames().iter().filter(|f| wanted(f)).count() >= 8
    });
    capture.stop()
}

/// A connection from one to the other that asks and is answered for ever; it has been so often, within so many seconds.
pub fn hold(host: &Host, [from, to]: [&Container; 2], answers: u64, within: u64) -> Spawned {
    let to = format!("{}:80", to.ip());
    let mut hold = from.spawn_tool(host, "hold", &["hold", &to]);
    hold.wait_for(&format!("ok {answers} "), Duration::from_secs(within));
    hold
}

/// How often the connection of a `lab-tool hold` was answered.
pub fn answers(hold: &Spawned) -> u64 {
    let said = hold.stdout();
    let last = said.lines().rfind(|line| line.starts_with("ok "));
    last.and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// That connection goes on: ten more answers.
pub fn goes_on(lab: &Lab, hold: &Spawned) {
    let before = answers(hold);
    lab.wait("the connection goes on", 30, || {
        answers(hold) >= before + 10
    });
}
