//! How long keys live: renewal, restarts, snapshots and copies.

use super::*;

#[test]
fn a_session_that_carries_only_gossip_keeps_its_keys_until_the_first_packet() {
    let mut net = Net::pair(19);
    let first = net.keys(0);
    for number in 0..600 {
        net.say(number % 2, 1 - number % 2, "gossip");
        net.run(secs(1));
    }
    assert_eq!(net.keys(0), first);
    net.packet(0);
    net.run(secs(2));
    assert_ne!(net.keys(0), first);
    assert!(net.agree());
}

#[test]
fn keys_are_renewed_while_traffic_flows_and_nothing_is_lost() {
    let mut net = Net::pair(12);
    let first = net.keys(0);
    for number in 0..300 {
        net.packet(number % 2);
        net.say(number % 2, 1 - number % 2, "tick");
        net.run(secs(1));
    }
    assert!(net.agree());
    assert_ne!(net.keys(0), first);
    let established = net.nodes[0].count(is_established);
    assert!(
        (3..=4).contains(&established),
        "{established} sessions in 300 s"
    );
    let messages: usize = net.nodes.iter().map(|n| n.messages().len()).sum();
    assert_eq!(messages, 301);
    let retired = net.nodes[0].count(|e| matches!(e, SessionEvent::Retired { .. }));
    assert_eq!(retired, established - 1);
}

#[test]
fn a_restarted_peer_is_found_again_from_either_side() {
    for speaker in [0, 1] {
        let mut net = Net::pair(13);
        net.restart(1, 2);
        for _ in 0..10 {
            net.say(speaker, 1 - speaker, "news");
            net.run(secs(1));
        }
        assert!(net.agree());
        assert_eq!(net.nodes[0].info().unwrap().generation, Generation(2));
        let heard = net.nodes[1 - speaker].messages();
        assert!(heard.iter().filter(|m| *m == b"news").count() >= 3);
    }
}

#[test]
fn a_resumed_snapshot_drops_every_key_before_the_next_packet() {
    let mut net = Net::pair(22);
    let old = net.keys(0);
    let (now, mut out) = (net.now, Vec::new());
    let node = &mut net.nodes[0];
    let fresh = Random::from_seed([99; 32]);
    node.sessions.rekey_all(now, fresh, &node.roster, &mut out);
    net.collect(0, out);
    assert!(net.nodes[0].info().is_none());
    net.say(0, 1, "anew");
    net.run(secs(1));
    assert_eq!(net.nodes[1].messages().len(), 2);
    assert_ne!(net.keys(0), old);
}

#[test]
fn two_copies_of_one_start_are_noticed() {
    let mut net = Net::new(2, 23);
    let identity = net.nodes[0].identity.clone();
    let fork = net.random.fork();
    let mut copy = Sessions::new(identity, config(1), fork, net.now);
    for word in ["x", "y", "z"] {
        assert_eq!(net.nodes[1].count(is_clone), 0);
        net.set_addresses(0, 1, vec![addr(1)]);
        net.say(0, 1, word);
        net.run(secs(40));
        // The other one calls, too, as it would when its session broke.
        let mut out = Vec::new();
        let id = net.nodes[1].id;
        net.nodes[0].sessions.drop_peer(&id, &mut out);
        std::mem::swap(&mut net.nodes[0].sessions, &mut copy);
    }
    assert!(net.nodes[1].count(is_clone) > 0);
}

#[test]
fn a_call_that_was_on_its_way_when_the_keys_were_renewed_is_no_copy() {
    let mut net = Net::pair(24);
    let id = net.nodes[1].id;
    net.nodes[0].sessions.drop_peer(&id, &mut Vec::new());
    net.dead.push(addr(1));
    net.say(0, 1, "called");
    net.run(secs(1));
    net.dead.clear();
    let (_, _, late) = net.log.last().unwrap().clone();
    let (now, mut out) = (net.now, Vec::new());
    let node = &mut net.nodes[0];
    let fresh = Random::from_seed([99; 32]);
    node.sessions.rekey_all(now, fresh, &node.roster, &mut out);
    net.collect(0, out);
    net.set_addresses(0, 1, vec![addr(1)]);
    net.say(0, 1, "anew");
    net.run(secs(1));
    assert!(net.agree());
    net.fly(addr(0), addr(1), late);
    net.run(secs(1));
    assert_eq!(net.nodes[1].count(is_clone), 0);
}
