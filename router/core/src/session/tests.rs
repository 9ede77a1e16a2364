//! Nodes on a virtual wire: loss, duplication, address changes, forged and replayed datagrams, virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::handshake::Refusal;
use super::*;
use crate::crypto::{Cipher, Secret};
use crate::model::{ClusterId, Generation};
use crate::wire::MAX_DATAGRAM;

mod calls;
mod keys;
mod paths;
mod relays;
mod strangers;
mod tcp;

const SECRET: [u8; 32] = [77; 32];

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Where a node listens for connections, and where its own come from.
const LISTENS: u16 = 443;
const DIALS: u16 = 50_000;

fn addr(node: usize) -> UnderlayAddr {
    UnderlayAddr::Udp(([10, 0, 0, node as u8 + 1], 6783).into())
}

#[derive(Clone, Default)]
struct Roster {
    keys: BTreeMap<NodeId, [u8; 32]>,
    /// Keys that only a shown chain teaches.
    hidden: BTreeMap<NodeId, [u8; 32]>,
    /// Keys of members that were removed.
    removed: BTreeMap<NodeId, [u8; 32]>,
    /// Members without the right to stand between others.
    aside: BTreeSet<NodeId>,
}

impl Trust for Roster {
    fn noise_key(&self, id: &NodeId) -> Option<[u8; 32]> {
        self.keys.get(id).copied()
    }
    fn is_member(&self, id: &NodeId) -> bool {
        self.keys.contains_key(id)
    }
    fn may_relay(&self, id: &NodeId) -> bool {
        self.is_member(id) && !self.aside.contains(id)
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
    fn why_no_member(&self, (caller, noise): (&NodeId, &[u8; 32]), _: &[u8]) -> Option<Vec<u8>> {
        let removed = self.removed.get(caller);
        removed
            .filter(|key| *key == noise)
            .map(|_| b"removed".to_vec())
    }
}

struct Node {
    id: NodeId,
    identity: Identity,
    sessions: Sessions,
    roster: Roster,
    addr: UnderlayAddr,
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

fn is_clone(event: &SessionEvent) -> bool {
    matches!(event, SessionEvent::CloneSuspected { .. })
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

type Flight = (UnderlayAddr, UnderlayAddr, Vec<u8>);

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
    dead: Vec<UnderlayAddr>,
    /// Nothing gets from the one to the other.
    cut: Vec<(UnderlayAddr, UnderlayAddr)>,
    /// What comes from or goes to these takes twenty times as long.
    far: Vec<UnderlayAddr>,
    /// IP packets larger than this vanish.
    takes: usize,
    /// Everything that was ever sent.
    log: Vec<Flight>,
}

fn config(generation: u64) -> SessionConfig {
    SessionConfig {
        cluster: ClusterId([1; 16]),
        cluster_secret: Secret::new(SECRET),
        cipher: Cipher::Aes256Gcm,
        generation: Generation(generation),
        relay: true,
        esp: false,
        trusted_subnets: Vec::new(),
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
            ..Roster::default()
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
            cut: Vec::new(),
            far: Vec::new(),
            takes: usize::MAX,
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

    fn set_addresses(&mut self, me: usize, other: usize, candidates: Vec<UnderlayAddr>) {
        let (now, id) = (self.now, self.nodes[other].id);
        self.nodes[me].sessions.set_addresses(now, id, &candidates);
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
                    assert!(datagram.len() <= MAX_DATAGRAM || self.takes < usize::MAX);
                    self.post(self.source(from, to), to, datagram);
                }
                SessionEvent::Relay { by, to, datagram } => {
                    let (now, mut out) = (self.now, Vec::new());
                    let sessions = &mut self.nodes[from].sessions;
                    sessions.relay(now, &by, &to, &datagram, &mut out);
                    self.collect(from, out);
                }
                other => self.nodes[from].events.push(other),
            }
        }
    }

    /// Where a datagram of this node's for `to` comes from: in a connection that it made, or in the one that was made from
    /// there.
    fn source(&self, from: usize, to: UnderlayAddr) -> UnderlayAddr {
        let own = self.nodes[from].addr;
        match to.tcp().map(|to| to.port()) {
            None => own,
            Some(LISTENS) => UnderlayAddr::Tcp((own.ip(), DIALS).into()),
            Some(_) => UnderlayAddr::Tcp((own.ip(), LISTENS).into()),
        }
    }

    fn post(&mut self, from: UnderlayAddr, to: UnderlayAddr, datagram: Vec<u8>) {
        self.log.push((from, to, datagram.clone()));
        let is_large = to.udp().is_some() && datagram.len() + 28 > self.takes;
        if self.random.range(100) < self.loss_percent || is_large {
            return;
        }
        if self.random.range(100) < self.duplicate_percent {
            self.fly(from, to, datagram.clone());
        }
        self.fly(from, to, datagram);
    }

    fn fly(&mut self, from: UnderlayAddr, to: UnderlayAddr, datagram: Vec<u8>) {
        let jitter = Duration::from_micros(self.random.range(3000));
        self.serial += 1;
        let is_far = self.far.contains(&from) || self.far.contains(&to);
        let latency = self.latency * if is_far { 20 } else { 1 };
        let at = self.now.plus(latency + jitter);
        self.air.insert((at, self.serial), (from, to, datagram));
    }

    fn deliver(&mut self, from: UnderlayAddr, to: UnderlayAddr, mut datagram: Vec<u8>) {
        let is_at = |node: &Node| match to {
            UnderlayAddr::Udp(_) => node.addr == to,
            UnderlayAddr::Tcp(_) => node.addr.ip() == to.ip(),
        };
        let Some(number) = self.nodes.iter().position(is_at) else {
            return;
        };
        let is_cut = self.cut.contains(&(from, to));
        if self.dead.contains(&to) || self.dead.contains(&from) || is_cut {
            return;
        }
        let (now, mut out) = (self.now, Vec::new());
        let node = &mut self.nodes[number];
        node.sessions
            .handle_datagram(now, from.into(), &mut datagram, &mut node.roster, &mut out);
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
        let to = info.path.unwrap().direct().unwrap();
        self.post(self.source(from, to), to, datagram);
    }

    fn pair(seed: u8) -> Self {
        let mut net = Self::new(2, seed);
        net.say(0, 1, "hello");
        net.run(secs(1));
        assert_eq!(net.nodes[1].messages(), [b"hello"]);
        net
    }

    /// Nothing gets from one to the other any more, either way.
    fn cut(&mut self, one: usize, other: usize) {
        let (one, other) = (self.nodes[one].addr, self.nodes[other].addr);
        self.cut.extend([(one, other), (other, one)]);
    }

    /// The session of `from` with `to`.
    fn between(&self, from: usize, to: usize) -> Option<SessionInfo> {
        let to = self.nodes[to].id;
        self.nodes[from]
            .sessions
            .peers()
            .find(|info| info.peer == to)
    }

    fn path(&self, from: usize, to: usize) -> Option<Path> {
        self.between(from, to)?.path
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

fn refusals(node: &Node) -> Vec<Refusal> {
    let events = node.events.iter();
    let refusals = events.filter_map(|event| match event {
        SessionEvent::Refused { refusal, .. } => Some(refusal.clone()),
        _ => None,
    });
    refusals.collect()
}

#[test]
fn a_start_that_is_not_the_last_is_told_which_was_and_no_more_often_than_it_can_use() {
    let mut net = Net::new(2, 61);
    net.restart(0, 7);
    net.restart(1, 7);
    net.say(0, 1, "hello");
    net.run(secs(1));
    net.restart(0, 3);
    net.say(0, 1, "again");
    net.run(secs(9));
    assert_eq!(refusals(&net.nodes[0]), [Refusal::Outdated(Generation(7))]);
    assert!(net.nodes[0].info().is_none());
    let (node, now) = (&mut net.nodes[0], net.now);
    let mut out = Vec::new();
    node.sessions
        .set_generation(now, Generation(8), &node.roster, &mut out);
    net.collect(0, out);
    net.say(0, 1, "now");
    net.run(secs(2));
    assert!(net.nodes[0].info().is_some());
    assert!(net.nodes[1].messages().contains(&b"now".to_vec()));
}

#[test]
fn who_was_removed_while_it_was_off_hears_it_and_strangers_hear_nothing() {
    let mut net = Net::new(3, 62);
    let (gone, stranger) = (net.nodes[1].id, net.nodes[2].id);
    let roster = &mut net.nodes[0].roster;
    let key = roster.keys.remove(&gone).unwrap();
    roster.removed.insert(gone, key);
    roster.keys.remove(&stranger);
    net.say(1, 0, "hello");
    net.say(2, 0, "hello");
    net.run(secs(5));
    let record = Refusal::NoMember(b"removed".to_vec());
    assert_eq!(refusals(&net.nodes[1]), [record]);
    assert_eq!(refusals(&net.nodes[2]), []);
    assert!(net.nodes[1].info().is_none() && net.nodes[2].info().is_none());
}
