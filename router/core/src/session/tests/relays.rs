//! Members that stand between others.

use super::*;

/// Three nodes, of which the first two can't reach each other; both have a session with the third.
fn bent(seed: u8) -> Net {
    let mut net = Net::new(3, seed);
    net.cut(0, 1);
    net.say(0, 2, "hello");
    net.say(1, 2, "hello");
    net.run(secs(1));
    net
}

fn through(net: &Net, node: usize) -> Option<Path> {
    Some(Path::Relayed(net.nodes[node].id))
}

#[test]
fn who_can_not_be_reached_is_reached_through_another_and_directly_as_soon_as_that_goes() {
    let mut net = bent(71);
    net.say(0, 1, "around the corner");
    net.run(secs(3));
    assert_eq!(net.nodes[1].messages(), [b"around the corner"]);
    assert_eq!(net.path(0, 1), through(&net, 2));
    assert_eq!(net.path(1, 0), through(&net, 2));
    net.say(1, 0, "and back");
    net.run(millis(200));
    assert_eq!(net.nodes[0].messages(), [b"and back"]);
    let seen = net.log.iter().map(|(from, to, _)| (*from, *to));
    let crossed = seen.filter(|way| net.cut.contains(way)).count();
    assert!(crossed < 40, "{crossed} datagrams into the void");
    net.cut.clear();
    net.run(secs(70));
    assert_eq!(net.path(0, 1), Some(addr(1).into()));
    assert_eq!(net.path(1, 0), Some(addr(0).into()));
}

#[test]
fn a_member_without_the_right_to_stands_between_nobody() {
    // Whoever of the three knows that it has none keeps it out: who calls, who is called, and the member itself.
    for knows in 0..3 {
        let mut net = bent(74 + knows as u8);
        let aside = net.nodes[2].id;
        net.nodes[knows].roster.aside.insert(aside);
        net.say(0, 1, "around the corner");
        net.run(secs(5));
        assert!(net.nodes[1].messages().is_empty(), "{knows}");
        assert_ne!(net.path(0, 1), through(&net, 2));
        assert_ne!(net.path(1, 0), through(&net, 2));
    }
}

#[test]
fn a_pair_whose_link_is_cut_goes_on_through_another_within_seconds() {
    let mut net = Net::new(3, 72);
    for (from, to) in [(0, 1), (0, 2), (1, 2)] {
        net.say(from, to, "x");
    }
    net.run(secs(1));
    net.cut(0, 1);
    let transport = net.between(0, 1).unwrap().transport;
    for _ in 0..40 {
        let mut datagram = Vec::new();
        transport
            .seal(FrameKind::Packet, b"inner", &mut datagram)
            .unwrap();
        net.post(addr(0), addr(1), datagram);
        net.run(millis(100));
        if net.path(0, 1) == through(&net, 2) {
            break;
        }
    }
    assert_eq!(net.path(0, 1), through(&net, 2));
    net.say(0, 1, "still there?");
    net.run(millis(500));
    assert!(net.nodes[1].messages().contains(&b"still there?".to_vec()));
    assert!(net.nodes[0].count(is_lost) == 0);
}

#[test]
fn two_stand_between_where_no_single_one_does() {
    let mut net = Net::new(4, 73);
    for pair in [(0, 1), (0, 3), (1, 2)] {
        net.cut(pair.0, pair.1);
    }
    // 0 - 2 - 3 - 1
    for (from, to) in [(0, 2), (2, 3), (3, 1)] {
        net.say(from, to, "x");
    }
    net.run(secs(1));
    net.say(2, 1, "so that they know a way");
    net.run(secs(4));
    assert_eq!(net.path(2, 1), through(&net, 3));
    net.say(0, 1, "the long way");
    net.run(secs(12));
    assert!(net.nodes[1].messages().contains(&b"the long way".to_vec()));
    assert_eq!(net.path(0, 1), through(&net, 2));
}

#[test]
fn who_does_not_relay_passes_nothing_on() {
    let mut net = Net::new(3, 74);
    let mut silent = config(1);
    silent.relay = false;
    let fork = net.random.fork();
    let node = &mut net.nodes[2];
    node.sessions = Sessions::new(node.identity.clone(), silent, fork, net.now);
    net.set_addresses(2, 0, vec![addr(0)]);
    net.set_addresses(2, 1, vec![addr(1)]);
    net.cut(0, 1);
    net.say(0, 2, "hello");
    net.say(1, 2, "hello");
    net.run(secs(1));
    net.say(0, 1, "around the corner");
    net.run(secs(10));
    assert_eq!(net.nodes[1].messages(), Vec::<Vec<u8>>::new());
    // Asked all the same, it does not.
    let (now, by, to) = (net.now, net.nodes[2].id, net.nodes[1].id);
    let mut out = Vec::new();
    let sessions = &mut net.nodes[0].sessions;
    sessions.relay(now, &by, &to, b"anything", &mut out);
    net.collect(0, out);
    net.run(secs(1));
    assert_eq!(net.nodes[2].sessions.drops().of(DropReason::NotRelayed), 1);
}

#[test]
fn a_relay_that_goes_is_replaced() {
    let mut net = Net::new(4, 75);
    net.cut(0, 1);
    for (from, to) in [(0, 2), (1, 2), (0, 3), (1, 3)] {
        net.say(from, to, "x");
    }
    net.run(secs(1));
    net.say(0, 1, "first");
    net.run(secs(4));
    let relay = net.path(0, 1).and_then(Path::relay).unwrap();
    let gone = net.nodes.iter().position(|node| node.id == relay).unwrap();
    let other = 5 - gone;
    net.dead.push(addr(gone));
    for _ in 0..50 {
        net.say(0, 1, "second");
        net.run(millis(200));
    }
    assert_eq!(net.path(0, 1), through(&net, other));
    assert!(net.nodes[1].messages().contains(&b"second".to_vec()));
}

#[test]
fn what_is_passed_on_is_passed_on_once_more_at_most() {
    let mut net = Net::new(3, 76);
    for (from, to) in [(0, 1), (0, 2), (1, 2)] {
        net.say(from, to, "x");
    }
    net.run(secs(1));
    // Sealed for node 2, inside something sealed for node 2 again.
    let inner = {
        let mut datagram = Vec::new();
        let head = crate::wire::RelayHead::first(&net.nodes[1].id);
        let transport = net.between(0, 2).unwrap().transport;
        transport
            .seal(FrameKind::Relay, &head.with(b"x"), &mut datagram)
            .unwrap();
        datagram
    };
    let (now, by, to) = (net.now, net.nodes[1].id, net.nodes[2].id);
    let mut out = Vec::new();
    net.nodes[0].sessions.relay(now, &by, &to, &inner, &mut out);
    net.collect(0, out);
    net.run(secs(1));
    assert_eq!(net.nodes[2].sessions.drops().of(DropReason::BadFrame), 1);
}

#[test]
fn what_goes_through_another_is_shorter_by_what_that_adds() {
    let mut net = bent(77);
    net.takes = 1500;
    for (from, to) in [(0, 2), (1, 2), (2, 0), (2, 1)] {
        let (to, mut out) = (net.nodes[to].addr, Vec::new());
        net.nodes[from]
            .sessions
            .set_ceiling(to.socket(), 1500, &mut out);
        net.collect(from, out);
    }
    net.say(0, 1, "x");
    net.run(secs(3));
    let direct = net.between(0, 2).unwrap().mtu.unwrap();
    let around = net.between(0, 1).unwrap().mtu.unwrap();
    assert_eq!(usize::from(direct - around), crate::wire::RELAY_OVERHEAD);
}

#[test]
fn of_several_the_nearest_passes_on() {
    for far in [2, 3] {
        let mut net = Net::new(4, 78);
        net.cut(0, 1);
        net.far.push(addr(far));
        for (from, to) in [(0, 2), (1, 2), (0, 3), (1, 3)] {
            net.say(from, to, "x");
        }
        net.run(secs(1));
        net.say(0, 1, "around the corner");
        net.run(secs(10));
        assert_eq!(net.path(0, 1), through(&net, 5 - far));
    }
}
