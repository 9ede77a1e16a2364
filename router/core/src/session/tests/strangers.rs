//! Who gets in, and what everybody else hears: nothing.

use super::*;

#[test]
fn garbage_and_other_clusters_get_no_byte() {
    let mut net = Net::pair(7);
    let mut other = Net::new(2, 8);
    for node in &mut other.nodes {
        let fork = other.random.fork();
        let mut config = config(1);
        config.cluster_secret = Secret::new([78; 32]);
        node.sessions = Sessions::new(node.identity.clone(), config, fork, other.now);
    }
    let victim = net.nodes[1].id;
    let key = net.nodes[1].identity.noise_public();
    other.nodes[0].roster.keys.insert(victim, key);
    let (now, mut out) = (other.now, Vec::new());
    let stranger = &mut other.nodes[0];
    stranger.sessions.set_addresses(now, victim, &[addr(1)]);
    stranger
        .sessions
        .send(now, &victim, &Message::Bye, &stranger.roster, &mut out);
    let mut datagrams: Vec<Vec<u8>> = out
        .into_iter()
        .filter_map(|event| match event {
            SessionEvent::Send { datagram, .. } => Some(datagram),
            _ => None,
        })
        .collect();
    assert_eq!(datagrams.len(), 1);
    for round in 0..10_000usize {
        let mut bytes = vec![0; net.random.range(300) as usize];
        net.random.fill(&mut bytes);
        if round % 2 == 0 && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&[(round % 7) as u8, 1, 0, 0]);
        }
        datagrams.push(bytes);
    }
    net.air.clear();
    net.log.clear();
    let before: Vec<u32> = vec![net.keys(1).0];
    for datagram in datagrams {
        net.deliver(addr(50), addr(1), datagram);
    }
    assert_eq!(net.log.len(), 0, "no byte back");
    assert_eq!(vec![net.keys(1).0], before);
}

#[test]
fn handshakes_cut_short_or_altered_get_no_byte_and_do_no_harm() {
    let mut net = Net::new(2, 9);
    net.say(0, 1, "x");
    let init = net.log[0].2.clone();
    net.air.clear();
    net.log.clear();
    for len in 0..init.len() {
        net.deliver(addr(0), addr(1), init[..len].to_vec());
    }
    for at in 0..init.len() - 16 {
        let mut altered = init.clone();
        altered[at] ^= 1;
        net.deliver(addr(0), addr(1), altered);
    }
    assert_eq!(net.log.len(), 0);
    net.deliver(addr(0), addr(1), init);
    net.run(secs(1));
    assert_eq!(net.nodes[1].messages(), [b"x"]);
}

#[test]
fn a_holder_of_the_secret_that_sends_garbage_gets_no_byte() {
    let mut net = Net::pair(27);
    let macs = MacKeys::new(&Secret::new(SECRET));
    let (own, _) = net.keys(1);
    net.log.clear();
    for round in 0..5_000u32 {
        let kind = [
            DatagramType::Init,
            DatagramType::Response,
            DatagramType::Cookie,
        ];
        let mut datagram = kind[round as usize % 3].head().to_vec();
        let mut rest = vec![0; net.random.range(400) as usize];
        net.random.fill(&mut rest);
        if let Some(index) = rest.get_mut(4..8) {
            index.copy_from_slice(&own.to_le_bytes());
        }
        datagram.extend_from_slice(&rest);
        macs.finish(&mut datagram, None);
        // Slowly, or a cookie would be asked for.
        net.now = net.now.plus(millis(60));
        net.deliver(addr(50), addr(1), datagram);
    }
    assert_eq!(net.log.len(), 0);
    assert_eq!(net.nodes[1].sessions.drops().of(DropReason::NoSecret), 0);
    assert!(net.nodes[1].sessions.drops().of(DropReason::BadHandshake) > 1000);
}

#[test]
fn a_replayed_first_message_is_stale_and_never_displaces_a_session() {
    let mut net = Net::pair(10);
    let init = net.log[0].2.clone();
    let keys = net.keys(1);
    net.log.clear();
    for _ in 0..3 {
        net.deliver(addr(60), addr(1), init.clone());
    }
    assert_eq!(net.log.len(), 0);
    assert_eq!(net.nodes[1].sessions.drops().of(DropReason::Stale), 3);
    assert_eq!(net.keys(1), keys);
    // Even one that forgot everything only answers; the session in use of the other stays.
    net.restart(1, 2);
    net.deliver(addr(60), addr(1), init);
    assert_eq!(net.nodes[1].count(is_established), 0);
    net.run(secs(11));
    assert_eq!(
        net.nodes[1].count(|e| matches!(e, SessionEvent::Retired { .. })),
        1
    );
}

#[test]
fn replayed_data_changes_nothing_and_moves_no_path() {
    let mut net = Net::pair(11);
    net.say(0, 1, "once");
    net.run(secs(1));
    let flights = net.log.clone();
    let before = net.nodes[1].messages().len();
    net.log.clear();
    for (_, to, datagram) in flights {
        net.deliver(addr(66), to, datagram);
    }
    assert_eq!(net.nodes[1].messages().len(), before);
    assert!(!net.log.iter().any(|(_, to, _)| *to == addr(66)));
    net.run(secs(2));
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(0).into()));
}

#[test]
fn a_stranger_with_a_chain_is_learnt_and_one_without_is_not() {
    let mut net = Net::new(2, 18);
    let (id, key) = (net.nodes[0].id, net.nodes[0].identity.noise_public());
    net.nodes[1].roster.keys.remove(&id);
    net.say(0, 1, "x");
    net.run(secs(1));
    assert!(net.nodes[1].messages().is_empty());
    assert!(net.nodes[1].sessions.drops().of(DropReason::Stranger) > 0);
    assert!(!net.log.iter().any(|(from, _, _)| *from == addr(1)));
    net.nodes[1].roster.hidden.insert(id, key);
    net.run(secs(5));
    assert_eq!(net.nodes[1].messages(), [b"x"]);
}

#[test]
fn a_borrowed_id_is_refused() {
    let mut net = Net::new(3, 19);
    let (id, key) = (net.nodes[2].id, net.nodes[0].identity.noise_public());
    // Node 1 believes that node 2's key is another one than node 0 calls with.
    assert_ne!(net.nodes[1].roster.keys.insert(id, [9; 32]), Some(key));
    net.say(2, 1, "x");
    net.run(secs(1));
    assert!(net.nodes[1].messages().is_empty());
}

#[test]
fn a_revoked_peer_is_off_at_once() {
    let mut net = Net::pair(20);
    let id = net.nodes[0].id;
    let mut out = Vec::new();
    net.nodes[1].roster.keys.remove(&id);
    net.nodes[1].sessions.drop_peer(&id, &mut out);
    net.collect(1, out);
    assert_eq!(net.nodes[1].count(is_lost), 1);
    assert_eq!(
        net.nodes[1].count(|e| matches!(e, SessionEvent::Retired { .. })),
        1
    );
    net.log.clear();
    for _ in 0..20 {
        net.say(0, 1, "still here?");
        net.run(secs(1));
    }
    assert!(!net.log.iter().any(|(from, _, _)| *from == addr(1)));
    assert_eq!(net.nodes[1].messages().len(), 1);
}

#[test]
fn under_a_flood_of_true_handshakes_cookies_are_asked_for_and_honest_ones_get_in() {
    let mut net = Net::new(2, 24);
    // A member gone mad, from many addresses.
    for number in 0..400u32 {
        let (now, mut out) = (net.now, Vec::new());
        let id = net.nodes[1].id;
        let node = &mut net.nodes[0];
        node.sessions.drop_peer(&id, &mut Vec::new());
        node.sessions.set_addresses(now, id, &[addr(1)]);
        node.sessions.want(now, &id, &node.roster, &mut out);
        for event in out {
            if let SessionEvent::Send { datagram, .. } = event {
                let from =
                    UnderlayAddr::Udp(([100, 64, (number >> 8) as u8, number as u8], 1).into());
                net.deliver(from, addr(1), datagram);
            }
        }
    }
    let asked = net.nodes[1].sessions.drops().of(DropReason::CookieAsked);
    assert_eq!(asked, 200);
    net.air.clear();
    net.restart(0, 2);
    net.say(0, 1, "honest");
    net.run(millis(900));
    assert!(net.nodes[1].sessions.drops().of(DropReason::CookieAsked) > asked);
    assert_eq!(net.nodes[1].messages(), [b"honest"]);
}
