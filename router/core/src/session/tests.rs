//! Nodes on a virtual wire: loss, duplication, address changes, forged and replayed datagrams, virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use super::*;
use crate::crypto::{Cipher, Secret};
use crate::model::{ClusterId, Generation};

const SECRET: [u8; 32] = [77; 32];

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn addr(node: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, node as u8 + 1], 6783))
}

#[derive(Clone, Default)]
struct Roster {
    keys: BTreeMap<NodeId, [u8; 32]>,
    /// Keys that only a shown chain teaches.
    hidden: BTreeMap<NodeId, [u8; 32]>,
}

impl Trust for Roster {
    fn noise_key(&self, id: &NodeId) -> Option<[u8; 32]> {
        self.keys.get(id).copied()
    }
    fn is_member(&self, id: &NodeId) -> bool {
        self.keys.contains_key(id)
    }
    fn admit_chain(&self, me: &NodeId) -> Vec<u8> {
        me.0.to_vec()
    }
    fn learn_chain(&mut self, chain: &[u8]) -> Option<NodeId> {
        let id = NodeId(chain.try_into().ok()?);
        let key = self.hidden.remove(&id)?;
        self.keys.insert(id, key);
        Some(id)
    }
}

struct Node {
    id: NodeId,
    identity: Identity,
    sessions: Sessions,
    roster: Roster,
    addr: SocketAddr,
    events: Vec<SessionEvent>,
}

impl Node {
    fn messages(&self) -> Vec<Vec<u8>> {
        let frames = self.events.iter().filter_map(|event| match event {
            SessionEvent::Frame {
                message: Message::Sync(bytes),
                ..
            } => Some(bytes.clone()),
            _ => None,
        });
        frames.collect()
    }

    fn count(&self, wanted: fn(&SessionEvent) -> bool) -> usize {
        self.events.iter().filter(|event| wanted(event)).count()
    }

    fn info(&self) -> Option<SessionInfo> {
        self.sessions.peers().next()
    }
}

fn is_established(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::Established { .. })
}

fn is_silent(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::Silent { .. })
}

fn is_answering(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::Answering { .. })
}

fn is_lost(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::Lost { .. })
}

fn is_path(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::Path { .. })
}

type Flight = (SocketAddr, SocketAddr, Vec<u8>);

struct Net {
    now: Now,
    nodes: Vec<Node>,
    air: BTreeMap<(Now, u64), Flight>,
    serial: u64,
    random: Random,
    latency: Duration,
    loss_percent: u64,
    duplicate_percent: u64,
    /// Datagrams to these addresses vanish.
    dead: Vec<SocketAddr>,
    /// Everything that was ever sent.
    log: Vec<Flight>,
}

fn config(generation: u64) -> SessionConfig {
    SessionConfig {
        cluster: ClusterId([1; 16]),
        cluster_secret: Secret::new(SECRET),
        cipher: Cipher::Aes256Gcm,
        generation: Generation(generation),
        plain_vxlan: false,
        relay: false,
    }
}

impl Net {
    /// Nodes in the order of their ids, all of whom know each other.
    fn new(count: usize, seed: u8) -> Self {
        let mut random = Random::from_seed([seed; 32]);
        let mut identities: Vec<_> = (0..count)
            .map(|_| Identity::generate(&mut random))
            .collect();
        identities.sort_by_key(Identity::id);
        let keys = identities.iter().map(|i| (i.id(), i.noise_public()));
        let roster = Roster {
            keys: keys.collect(),
            hidden: BTreeMap::new(),
        };
        let mut net = Self {
            now: Now(secs(1000)),
            nodes: Vec::new(),
            air: BTreeMap::new(),
            serial: 0,
            random,
            latency: millis(5),
            loss_percent: 0,
            duplicate_percent: 0,
            dead: Vec::new(),
            log: Vec::new(),
        };
        for (number, identity) in identities.into_iter().enumerate() {
            let fork = net.random.fork();
            net.nodes.push(Node {
                id: identity.id(),
                sessions: Sessions::new(identity.clone(), config(1), fork, net.now),
                identity,
                roster: roster.clone(),
                addr: addr(number),
                events: Vec::new(),
            });
        }
        for (me, other) in (0..count).flat_map(|a| (0..count).map(move |b| (a, b))) {
            if me != other {
                net.set_addresses(me, other, vec![addr(other)]);
            }
        }
        net
    }

    fn set_addresses(&mut self, me: usize, other: usize, candidates: Vec<SocketAddr>) {
        let (now, id) = (self.now, self.nodes[other].id);
        self.nodes[me].sessions.set_addresses(now, id, candidates);
    }

    fn restart(&mut self, number: usize, generation: u64) {
        let fork = self.random.fork();
        let node = &mut self.nodes[number];
        node.sessions = Sessions::new(node.identity.clone(), config(generation), fork, self.now);
        node.events.clear();
        for other in (0..self.nodes.len()).filter(|other| *other != number) {
            self.set_addresses(number, other, vec![addr(other)]);
        }
    }

    fn say(&mut self, from: usize, to: usize, text: &str) {
        let to = self.nodes[to].id;
        let message = Message::Sync(text.as_bytes().to_vec());
        let (now, mut out) = (self.now, Vec::new());
        let node = &mut self.nodes[from];
        node.sessions
            .send(now, &to, &message, &node.roster, &mut out);
        self.collect(from, out);
    }

    fn collect(&mut self, from: usize, out: Vec<SessionEvent>) {
        for event in out {
            match event {
                SessionEvent::Send { to, datagram } => {
                    assert!(datagram.len() <= MAX_DATAGRAM);
                    let source = self.nodes[from].addr;
                    self.post(source, to, datagram);
                }
                other => self.nodes[from].events.push(other),
            }
        }
    }

    fn post(&mut self, from: SocketAddr, to: SocketAddr, datagram: Vec<u8>) {
        self.log.push((from, to, datagram.clone()));
        if self.random.range(100) < self.loss_percent {
            return;
        }
        if self.random.range(100) < self.duplicate_percent {
            self.fly(from, to, datagram.clone());
        }
        self.fly(from, to, datagram);
    }

    fn fly(&mut self, from: SocketAddr, to: SocketAddr, datagram: Vec<u8>) {
        let jitter = Duration::from_micros(self.random.range(3000));
        self.serial += 1;
        let at = self.now.plus(self.latency + jitter);
        self.air.insert((at, self.serial), (from, to, datagram));
    }

    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, mut datagram: Vec<u8>) {
        let Some(number) = self.nodes.iter().position(|node| node.addr == to) else {
            return;
        };
        if self.dead.contains(&to) || self.dead.contains(&from) {
            return;
        }
        let (now, mut out) = (self.now, Vec::new());
        let node = &mut self.nodes[number];
        node.sessions
            .handle_datagram(now, from, &mut datagram, &mut node.roster, &mut out);
        self.collect(number, out);
    }

    /// Lets `time` pass, event by event.
    fn run(&mut self, time: Duration) {
        let end = self.now.plus(time);
        loop {
            let flight = self.air.keys().next().map(|(at, _)| *at);
            let timer = self
                .nodes
                .iter()
                .filter_map(|n| n.sessions.deadline())
                .min();
            let Some(next) = flight
                .into_iter()
                .chain(timer)
                .min()
                .filter(|at| *at <= end)
            else {
                break;
            };
            self.now = self.now.max(next);
            if flight == Some(next) {
                let (_, (from, to, datagram)) = self.air.pop_first().unwrap();
                self.deliver(from, to, datagram);
                continue;
            }
            for number in 0..self.nodes.len() {
                self.tick(number);
            }
        }
        self.now = end;
    }

    fn tick(&mut self, number: usize) {
        let (now, mut out) = (self.now, Vec::new());
        let node = &mut self.nodes[number];
        if node.sessions.deadline().is_some_and(|at| at <= now) {
            node.sessions.expire(now, &node.roster, &mut out);
            assert!(
                node.sessions.deadline().is_none_or(|at| at > now),
                "a hot timer"
            );
        }
        self.collect(number, out);
    }

    /// Inner packets from one to the other, as the carrier would seal them.
    fn packet(&mut self, from: usize) {
        let info = self.nodes[from].info().unwrap();
        let mut datagram = Vec::new();
        info.transport
            .seal(FrameKind::Packet, b"inner", &mut datagram)
            .unwrap();
        let source = self.nodes[from].addr;
        self.post(source, info.path.unwrap(), datagram);
    }

    fn pair(seed: u8) -> Self {
        let mut net = Self::new(2, seed);
        net.say(0, 1, "hello");
        net.run(secs(1));
        assert_eq!(net.nodes[1].messages(), [b"hello"]);
        net
    }

    fn keys(&self, number: usize) -> (u32, u32) {
        let transport = self.nodes[number].info().unwrap().transport;
        (transport.local_index(), transport.remote_index())
    }

    fn agree(&self) -> bool {
        let ((a, b), (c, d)) = (self.keys(0), self.keys(1));
        (a, b) == (d, c)
    }
}

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
fn candidates_are_tried_in_turn() {
    let mut net = Net::new(2, 5);
    net.set_addresses(0, 1, vec![addr(100), addr(101), addr(1)]);
    net.say(0, 1, "x");
    net.run(secs(3));
    assert_eq!(net.nodes[1].messages(), [b"x"]);
    assert_eq!(net.nodes[0].info().unwrap().path, Some(addr(1)));
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
    stranger.sessions.set_addresses(now, victim, vec![addr(1)]);
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
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(0)));
}

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
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(40)));
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
    assert_eq!(net.nodes[1].info().unwrap().path, Some(addr(0)));
    assert_eq!(net.nodes[1].count(is_path), 1);
    assert_eq!(net.nodes[1].messages().len(), 51);
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
    let is_clone = |e: &SessionEvent| matches!(e, SessionEvent::CloneSuspected { .. });
    let fork = net.random.fork();
    let mut copy = Sessions::new(identity, config(1), fork, net.now);
    for _ in 0..2 {
        net.say(0, 1, "x");
        net.run(secs(1));
        std::mem::swap(&mut net.nodes[0].sessions, &mut copy);
        net.set_addresses(0, 1, vec![addr(1)]);
        net.say(0, 1, "y");
        net.run(secs(5));
        std::mem::swap(&mut net.nodes[0].sessions, &mut copy);
        // The first one calls again, as it would when its session broke.
        let (now, mut out) = (net.now, Vec::new());
        let id = net.nodes[1].id;
        net.nodes[0].sessions.drop_peer(&id, &mut out);
        net.set_addresses(0, 1, vec![addr(1)]);
        net.run(Duration::ZERO);
        assert!(net.now >= now);
    }
    assert!(net.nodes[1].count(is_clone) > 0);
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
        node.sessions.set_addresses(now, id, vec![addr(1)]);
        node.sessions.want(now, &id, &node.roster, &mut out);
        for event in out {
            if let SessionEvent::Send { datagram, .. } = event {
                let from = SocketAddr::from(([100, 64, (number >> 8) as u8, number as u8], 1));
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
    let sessions = &mut net.nodes[0].sessions;
    sessions.handle_opened(now, to, addr(1), (kind, body), &mut out);
    sessions.handle_moved(now, to, addr(44), &mut out);
    sessions.handle_moved(now, to, addr(45), &mut out);
    sessions.handle_opened(now, 5, addr(1), (200, b""), &mut out);
    let challenged: Vec<_> = out
        .iter()
        .filter_map(|e| match e {
            SessionEvent::Send { to, .. } => Some(*to),
            _ => None,
        })
        .collect();
    assert_eq!(challenged, [addr(44)], "one challenge at a time");
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
