//! Pairs that no UDP gets through between.

use super::paths::busy;
use super::*;

/// Two nodes, of which the second listens for connections.
fn listening(seed: u8) -> Net {
    let mut net = Net::new(2, seed);
    net.set_addresses(0, 1, vec![addr(1), tcp(1)]);
    net
}

fn tcp(node: usize) -> UnderlayAddr {
    UnderlayAddr::Tcp((addr(node).ip(), LISTENS).into())
}

/// What the second answers along.
fn back() -> Option<Path> {
    Some(Path::Direct(UnderlayAddr::Tcp(
        (addr(0).ip(), DIALS).into(),
    )))
}

#[test]
fn no_connection_is_tried_where_udp_answers() {
    let mut net = listening(91);
    net.say(0, 1, "hello");
    net.run(secs(1));
    busy(&mut net, 400);
    net.run(secs(400));
    assert_eq!(net.path(0, 1), Some(addr(1).into()));
    assert!(net.log.iter().all(|(_, to, _)| to.tcp().is_none()));
}

#[test]
fn where_no_udp_answers_a_connection_is_taken_and_left_as_soon_as_it_does() {
    let mut net = listening(92);
    net.cut(0, 1);
    net.say(0, 1, "out of a hotel");
    net.run(secs(3));
    assert_eq!(net.nodes[1].messages(), [b"out of a hotel"]);
    assert_eq!(net.path(0, 1), Some(tcp(1).into()));
    assert_eq!(net.path(1, 0), back());
    net.say(1, 0, "and back");
    net.run(millis(200));
    assert_eq!(net.nodes[0].messages(), [b"and back"]);
    let mtu = net.nodes[0].info().unwrap().mtu;
    assert_eq!(mtu.map(u32::from), Some(crate::layout::DEVICE_MTU));
    // Nobody takes the far end of a connection for an address of this host's.
    assert_eq!(
        net.nodes[0].count(|event| matches!(event, SessionEvent::SeenAt { .. })),
        0
    );
    net.cut.clear();
    busy(&mut net, 20);
    assert_eq!(net.path(0, 1), Some(addr(1).into()));
    assert_eq!(net.path(1, 0), Some(addr(0).into()));
}

#[test]
fn a_pair_whose_udp_is_blocked_goes_on_in_a_connection_within_seconds() {
    let mut net = listening(93);
    net.say(0, 1, "hello");
    net.run(secs(1));
    busy(&mut net, 8);
    assert_eq!(net.path(0, 1), Some(addr(1).into()));
    net.cut(0, 1);
    busy(&mut net, 16);
    assert_eq!(net.path(0, 1), Some(tcp(1).into()));
    assert_eq!(net.path(1, 0), back());
    net.say(0, 1, "still there?");
    net.run(millis(500));
    assert!(net.nodes[1].messages().contains(&b"still there?".to_vec()));
    assert_eq!(net.nodes[0].count(is_lost) + net.nodes[1].count(is_lost), 0);
}

#[test]
fn a_connection_that_is_gone_is_made_anew_at_once() {
    let mut net = listening(94);
    net.cut(0, 1);
    net.say(0, 1, "hello");
    net.run(secs(3));
    let (now, mut out) = (net.now, Vec::new());
    let sessions = &mut net.nodes[0].sessions;
    sessions.lose_connection(now, tcp(7).socket(), &mut out);
    assert!(out.is_empty(), "it was nobody's");
    sessions.lose_connection(now, tcp(1).socket(), &mut out);
    let is_call =
        |event: &SessionEvent| matches!(event, SessionEvent::Send { to, .. } if *to == tcp(1));
    assert!(out.iter().any(is_call));
    net.collect(0, out);
    net.restart(1, 2);
    net.run(millis(500));
    let is_made = |event: &SessionEvent| matches!(event, SessionEvent::Established { .. });
    assert_eq!(
        net.nodes[0].count(is_made),
        2,
        "without waiting for silence"
    );
}
