//! Two hosts on one subnet, with a container on each.

use weft_lab::{Container, Frame, Host, Lab, Spawned};

/// Seconds that a conversation takes at most until it is seen on the wire: the processor is emulated.
const SEEN: u64 = 15;

/// Two hosts on one subnet in one cluster, each brought up with its flags.
pub(crate) fn hosts(lab: &Lab, flags: [&[&str]; 2]) -> [Host; 2] {
    lab.pair_with(&lab.subnet("a"), flags)
}

/// A container on each.
pub(crate) fn containers(lab: &Lab, [h1, h2]: &[Host; 2]) -> [Container; 2] {
    let pair = [h1.serve("a", &[]), h2.serve("b", &[])];
    lab.wait("containers talk", 30, || {
        pair[0].pings(&pair[1].ip().to_string())
    });
    pair
}

/// What a conversation of the two looks like on the host's wire.
pub(crate) fn overheard(
    lab: &Lab,
    host: &Host,
    pair: &[Container; 2],
    wanted: impl Fn(&Frame) -> bool,
) -> Vec<Frame> {
    weft_lab::overheard(lab, host, pair.each_ref(), SEEN, wanted)
}

/// A connection from the first to the second that asks and is answered for ever.
pub(crate) fn hold(host: &Host, [a, b]: &[Container; 2]) -> Spawned {
    weft_lab::hold(host, [a, b], 10, 30)
}
