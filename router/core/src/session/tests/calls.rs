//! How a session comes about, and what is lost on the way.

use super::*;

#[test]
fn a_message_makes_a_session_and_arrives() {
    let mut net = Net::pair(1);
    net.say(1, 0, "and back");
    net.run(secs(1));
    assert_eq!(net.nodes[0].messages(), [b"and back"]);
    assert!(net.agree());
    for node in &net.nodes {
        assert_eq!(node.count(is_established), 1);
        assert_eq!(node.count(is_path), 1);
        assert!(node.info().unwrap().rtt.unwrap() < millis(20));
        assert_eq!(node.info().unwrap().generation, Generation(1));
    }
    assert!(
        !net.log
            .iter()
            .any(|(_, _, d)| d.windows(5).any(|w| w == b"hello"))
    );
}

#[test]
fn the_called_one_sends_nothing_before_the_first_sealed_datagram() {
    let mut net = Net::new(2, 2);
    net.say(0, 1, "x");
    net.say(1, 0, "y");
    let init = net.log[0].2.clone();
    net.nodes[1].sessions = {
        let fork = net.random.fork();
        Sessions::new(net.nodes[1].identity.clone(), config(1), fork, net.now)
    };
    net.air.clear();
    net.log.clear();
    net.deliver(addr(0), addr(1), init);
    assert_eq!(net.log.len(), 1, "the answer alone");
    assert_eq!(
        DatagramType::of(&net.log[0].2),
        Some(DatagramType::Response)
    );
    assert_eq!(net.nodes[1].count(is_established), 0);
}

#[test]
fn both_calling_at_once_end_with_one_session_and_lose_nothing() {
    for seed in 0..20 {
        let mut net = Net::new(2, seed);
        net.say(0, 1, "from low");
        net.run(millis(u64::from(seed)));
        net.say(1, 0, "from high");
        net.run(secs(30));
        assert_eq!(net.nodes[0].messages(), [b"from high"], "{seed}");
        assert_eq!(net.nodes[1].messages(), [b"from low"], "{seed}");
        assert!(net.agree(), "{seed}");
        net.say(1, 0, "later");
        net.run(secs(1));
        assert_eq!(net.nodes[0].messages().len(), 2, "{seed}");
    }
}

#[test]
fn loss_and_duplication_delay_but_do_not_stop() {
    for seed in 0..20 {
        let mut net = Net::new(2, seed);
        net.loss_percent = 30;
        net.duplicate_percent = 30;
        net.say(0, 1, "x");
        net.say(1, 0, "y");
        net.run(secs(10));
        assert!(net.nodes.iter().all(|n| n.info().is_some()), "{seed}");
        net.loss_percent = 0;
        net.run(secs(20));
        assert!(net.agree(), "{seed}");
        for (from, to) in [(0, 1), (1, 0)] {
            let before = net.nodes[to].messages().len();
            net.say(from, to, "z");
            net.run(secs(1));
            assert_eq!(net.nodes[to].messages().len(), before + 1, "{seed}");
        }
    }
}

#[test]
fn a_long_round_trip_does_not_keep_a_session_from_coming() {
    let mut net = Net::new(2, 3);
    net.latency = millis(400);
    net.say(0, 1, "x");
    net.run(secs(3));
    assert_eq!(net.nodes[1].messages(), [b"x"]);
    net.run(secs(60));
    assert_eq!(net.nodes[0].count(is_silent), 0);
}

#[test]
fn the_queue_is_bounded_and_drops_the_oldest() {
    let mut net = Net::new(2, 4);
    net.dead.push(addr(1));
    for number in 0..100 {
        net.say(0, 1, &number.to_string());
    }
    net.dead.clear();
    net.run(secs(2));
    let messages = net.nodes[1].messages();
    let expected: BTreeSet<_> = (36..100).map(|n: u32| n.to_string().into_bytes()).collect();
    assert_eq!(messages.into_iter().collect::<BTreeSet<_>>(), expected);
    let drops = net.nodes[0].sessions.drops();
    assert_eq!(drops.of(DropReason::Unsendable), 36);
}

#[test]
fn a_message_too_long_is_not_sent() {
    let mut net = Net::pair(4);
    net.say(0, 1, &"x".repeat(MAX_CONTROL));
    net.run(secs(1));
    assert_eq!(net.nodes[1].messages().len(), 1);
    assert_eq!(net.nodes[0].sessions.drops().of(DropReason::Oversized), 1);
}

#[test]
fn a_peer_that_never_answers_is_given_up_and_tried_again_on_demand() {
    let mut net = Net::new(2, 6);
    net.dead.push(addr(1));
    net.say(0, 1, "x");
    net.run(secs(35));
    assert_eq!(net.nodes[0].count(is_lost), 1);
    let tries = net.log.len();
    assert!((6..=12).contains(&tries), "{tries} tries");
    assert_eq!(net.nodes[0].sessions.deadline(), None);
    net.dead.clear();
    net.say(0, 1, "y");
    net.run(secs(1));
    assert_eq!(net.nodes[1].messages(), [b"y"]);
}

#[test]
fn goodbye_ends_the_session_on_the_other_side() {
    let mut net = Net::pair(21);
    let (now, id, mut out) = (net.now, net.nodes[1].id, Vec::new());
    let node = &mut net.nodes[0];
    node.sessions
        .send(now, &id, &Message::Bye, &node.roster, &mut out);
    net.collect(0, out);
    net.run(millis(50));
    assert!(net.nodes[1].info().is_none());
    assert_eq!(net.nodes[1].count(is_lost), 1);
    let mut out = Vec::new();
    let id = net.nodes[0].id;
    net.nodes[1].sessions.drop_peer(&id, &mut out);
    assert!(out.is_empty(), "nothing left to drop");
    net.say(1, 0, "are you back?");
    net.run(secs(1));
    assert_eq!(net.nodes[0].messages(), [b"are you back?"]);
}

#[test]
fn the_carriers_way_in_is_the_same_as_ours() {
    let mut net = Net::new(2, 25);
    net.say(0, 1, "x");
    net.run(secs(1));
    // A packet that the carrier opened shows only in the counters, and keeps the pair from idling.
    let transport = net.nodes[1].info().unwrap().transport;
    let (to, _) = net.keys(0);
    let mut datagram = Vec::new();
    let body = wire::encode(&Message::Sync(b"via carrier".to_vec()));
    transport
        .seal(FrameKind::Control, &body, &mut datagram)
        .unwrap();
    let opener = net.nodes[0].info().unwrap().transport;
    let (kind, body) = opener.open(&mut datagram).unwrap();
    let (now, mut out) = (net.now, Vec::new());
    let Node {
        sessions, roster, ..
    } = &mut net.nodes[0];
    let from = |node| Path::Direct(addr(node));
    sessions.handle_opened(now, to, from(1), (kind, body), roster, &mut out);
    sessions.handle_moved(now, to, from(44), &Roster::default(), &mut out);
    sessions.handle_moved(now, to, from(45), &Roster::default(), &mut out);
    sessions.handle_opened(now, 5, from(1), (200, b""), roster, &mut out);
    let challenged: Vec<_> = out
        .iter()
        .filter_map(|e| match e {
            SessionEvent::Send { to, .. } => Some(*to),
            _ => None,
        })
        .collect();
    // One challenge at a time, and the question whether the peer is still where it was.
    assert_eq!(challenged, [addr(44), addr(1)]);
    net.collect(0, out);
    assert_eq!(net.nodes[0].messages(), [b"via carrier"]);
}

#[test]
fn equal_seeds_shake_hands_alike() {
    let traces: Vec<_> = (0..2)
        .map(|_| {
            let mut net = Net::new(3, 26);
            net.loss_percent = 20;
            net.say(0, 1, "a");
            net.say(2, 0, "b");
            net.run(secs(200));
            net.log
        })
        .collect();
    assert!(traces[0] == traces[1]);
}
