//! Where a peer is, and whether it answers there.

use super::*;

#[test]
fn candidates_are_tried_in_turn() {
    let mut net = Net::new(2, 5);
    net.set_addresses(0, 1, vec![addr(100), addr(101), addr(1)]);
    net.say(0, 1, "x");
    net.run(secs(3));
    assert_eq!(net.nodes[1].messages(), [b"x"]);
    assert_eq!(net.nodes[0].info().unwrap().path, Some(addr(1).into()));
}

#[test]
fn silence_under_traffic_is_told_within_the_second_and_a_half_and_so_is_the_return() {
    let mut net = Net::pair(14);
    for _ in 0..20 {
        net.packet(0);
        net.run(millis(100));
    }
    net.nodes[0].events.clear();
    net.dead.push(addr(1));
    let cut = net.now;
    while net.nodes[0].count(is_silent) == 0 {
        net.run(millis(50));
        assert!(net.now.since(cut) < millis(1500), "still not told");
    }
    assert!(net.now.since(cut) > millis(500));
    assert!(net.nodes[0].info().unwrap().silent);
    net.dead.clear();
    net.run(secs(1));
    assert_eq!(net.nodes[0].count(is_answering), 1);
    assert!(net.agree());
}

#[test]
fn an_idle_pair_speaks_little_and_parts_after_ten_minutes() {
    let mut net = Net::pair(15);
    net.log.clear();
    net.run(secs(100));
    let spoken = net.log.len();
    assert!((6..=16).contains(&spoken), "{spoken} datagrams in 100 s");
    net.run(secs(600));
    assert!(net.nodes.iter().all(|n| n.info().is_none()));
    assert!(net.nodes.iter().all(|n| n.count(is_silent) == 0));
    assert!(net.nodes.iter().all(|n| n.sessions.deadline().is_none()));
}

#[test]
fn a_peer_that_moves_is_followed_after_a_sealed_echo() {
    let mut net = Net::pair(16);
    net.nodes[0].addr = addr(40);
    net.say(0, 1, "from elsewhere");
    net.run(secs(1));
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(40).into()));
    net.say(1, 0, "found");
    net.run(secs(1));
    assert_eq!(net.nodes[0].messages(), [b"found"]);
}

#[test]
fn a_spoofed_source_never_moves_the_path() {
    let mut net = Net::pair(17);
    net.air.clear();
    for _ in 0..50 {
        net.log.clear();
        net.say(0, 1, "x");
        // The neighbour catches it and sends it on under an address of his own, before the true one arrives.
        let (_, _, datagram) = net.log[0].clone();
        net.deliver(addr(88), addr(1), datagram);
        net.run(millis(500));
    }
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(0).into()));
    assert_eq!(net.nodes[1].count(is_path), 1);
    assert_eq!(net.nodes[1].messages().len(), 51);
}

#[test]
fn round_trips_are_measured_along_each_path() {
    let net = Net::pair(18);
    let rtt = net.nodes[0].info().unwrap().rtt.unwrap();
    assert!((millis(10)..millis(17)).contains(&rtt), "{rtt:?}");
    assert!(net.nodes[1].info().unwrap().rtt.is_some());
}

/// Packets both ways, so that somebody cares what the path takes.
pub(super) fn busy(net: &mut Net, rounds: usize) {
    for _ in 0..rounds {
        net.packet(0);
        net.packet(1);
        net.run(millis(250));
    }
}

fn kernel_says(net: &mut Net, from: usize, to: UnderlayAddr, mtu: u16) {
    let mut out = Vec::new();
    net.nodes[from]
        .sessions
        .set_ceiling(to.socket(), mtu, &mut out);
    net.collect(from, out);
}

#[test]
fn what_a_path_takes_is_found_under_traffic_and_told() {
    let mut net = Net::pair(19);
    net.takes = 1400;
    assert_eq!(net.nodes[0].info().unwrap().mtu, None);
    kernel_says(&mut net, 0, addr(1), 1500);
    assert_eq!(net.nodes[0].info().unwrap().mtu, Some(1500 - 28 - 33));
    net.run(secs(20));
    assert_eq!(net.nodes[0].info().unwrap().mtu, Some(1500 - 28 - 33));
    busy(&mut net, 40);
    assert_eq!(net.nodes[0].info().unwrap().mtu, Some(1400 - 28 - 33));
    assert!(net.nodes[0].count(|event| matches!(event, SessionEvent::Mtu { .. })) >= 2);
    net.takes = 1320;
    busy(&mut net, 80);
    assert_eq!(net.nodes[0].info().unwrap().mtu, Some(1320 - 28 - 33));
    let largest = net.log.iter().map(|(_, _, datagram)| datagram.len()).max();
    assert_eq!(largest, Some(1500 - 28), "as large as was asked for");
}
