//! A joiner and members on a virtual wire, with a caller that decides as a node would.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::crypto::{Cipher, Random, Secret};
use crate::identity::Identity;
use crate::model::Now;
use crate::session::cookie::MACS;
use crate::session::drops::DropReason;
use crate::token::{Token, TokenBody, TokenMember};
use crate::underlay::UnderlayAddr;
use crate::wire::{DatagramType, MAX_DATAGRAM};

const WALL: u64 = 1_800_000_000;
const JOINER: u8 = 200;

/// Where members listen for connections.
const LISTENS: u16 = 443;

/// Where a datagram of this host's for `to` comes from.
fn source(own: UnderlayAddr, to: UnderlayAddr) -> UnderlayAddr {
    match to.tcp().map(|to| to.port()) {
        None => own,
        Some(LISTENS) => UnderlayAddr::Tcp((own.ip(), 50_000).into()),
        Some(_) => UnderlayAddr::Tcp((own.ip(), LISTENS).into()),
    }
}

fn addr(last: u8) -> UnderlayAddr {
    UnderlayAddr::Udp(([10, 0, 0, last], 6783).into())
}

struct Member {
    identity: Identity,
    responder: JoinResponder,
    requests: Vec<JoinRequest>,
    confirmed: Vec<JoinRequest>,
    done: usize,
    accepting: usize,
    retired: usize,
}

struct Net {
    now: Now,
    wall: u64,
    random: Random,
    cluster_secret: Secret<32>,
    members: Vec<Member>,
    joiner: Joiner,
    verdict: Option<Verdict>,
    welcome: Vec<u8>,
    /// Who may not come in twice: uses by key, as an issuer counts.
    admitted: BTreeSet<NodeId>,
    air: BTreeMap<(Now, u64), (UnderlayAddr, UnderlayAddr, Vec<u8>)>,
    serial: u64,
    loss_percent: u64,
    dead: Vec<UnderlayAddr>,
    log: Vec<(UnderlayAddr, UnderlayAddr, Vec<u8>)>,
    events: Vec<JoinerEvent>,
}

fn token_for(members: &[Identity], secret: &Secret<32>, cluster: u8) -> Token {
    let body = TokenBody {
        cluster: ClusterId([cluster; 16]),
        id: [4; 16],
        issuer: members[0].id(),
        issued_at: WALL,
        expires_at: WALL + 3600,
        uses: 1,
        members: members
            .iter()
            .enumerate()
            .map(|(number, identity)| TokenMember {
                id: identity.id(),
                noise_key: identity.noise_public(),
                addresses: [1, 101].map(|n| addr(number as u8 + n).socket()).to_vec(),
                tcp_port: None,
            })
            .collect(),
    };
    Token::issue(&members[0], secret, body).unwrap()
}

fn join_config() -> JoinConfig {
    JoinConfig {
        name: NodeName::parse("new-host").unwrap(),
        generation: Generation(7),
        cipher: Cipher::ChaCha20Poly1305,
    }
}

impl Net {
    fn new(count: usize, seed: u8) -> Self {
        let mut random = Random::from_seed([seed; 32]);
        let cluster_secret = Secret::generate(&mut random);
        let identities: Vec<_> = (0..count)
            .map(|_| Identity::generate(&mut random))
            .collect();
        let token = token_for(&identities, &cluster_secret, 1);
        let now = Now(Duration::from_secs(50));
        let members = identities.into_iter().map(|identity| Member {
            responder: JoinResponder::new(
                identity.clone(),
                ClusterId([1; 16]),
                Cipher::Aes256Gcm,
                random.fork(),
                now,
            ),
            identity,
            requests: Vec::new(),
            confirmed: Vec::new(),
            done: 0,
            accepting: 0,
            retired: 0,
        });
        let members = members.collect();
        let joiner = Identity::generate(&mut random);
        Self {
            joiner: Joiner::new(joiner, token, join_config(), random.fork(), now),
            now,
            wall: WALL + 10,
            random,
            cluster_secret,
            members,
            verdict: Some(Verdict::Accepted),
            welcome: vec![5; 100],
            admitted: BTreeSet::new(),
            air: BTreeMap::new(),
            serial: 0,
            loss_percent: 0,
            dead: Vec::new(),
            log: Vec::new(),
            events: Vec::new(),
        }
    }

    fn identities(&self) -> Vec<Identity> {
        self.members.iter().map(|m| m.identity.clone()).collect()
    }

    fn use_token(&mut self, token: Token) {
        let identity = Identity::generate(&mut self.random);
        let random = self.random.fork();
        self.joiner = Joiner::new(identity, token, join_config(), random, self.now);
        self.events.clear();
    }

    fn post(&mut self, from: UnderlayAddr, to: UnderlayAddr, datagram: Vec<u8>) {
        assert!(datagram.len() <= MAX_DATAGRAM);
        self.log.push((from, to, datagram.clone()));
        if self.random.range(100) < self.loss_percent || self.dead.contains(&to) {
            return;
        }
        self.serial += 1;
        let at = self
            .now
            .plus(Duration::from_micros(2000 + self.random.range(3000)));
        self.air.insert((at, self.serial), (from, to, datagram));
    }

    fn deliver(&mut self, from: UnderlayAddr, to: UnderlayAddr, mut datagram: Vec<u8>) {
        if to.ip() == addr(JOINER).ip() {
            let mut out = Vec::new();
            self.joiner.handle(self.now, from, &mut datagram, &mut out);
            return self.on_joiner(out);
        }
        let Some(number) = (0..self.members.len()).find(|n| addr(*n as u8 + 1).ip() == to.ip())
        else {
            return;
        };
        let mut out = Vec::new();
        let (now, wall, secret) = (self.now, self.wall, self.cluster_secret.clone());
        let responder = &mut self.members[number].responder;
        responder.handle(now, wall, from, &mut datagram, &secret, &mut out);
        self.on_member(number, out);
    }

    fn on_joiner(&mut self, out: Vec<JoinerEvent>) {
        for event in out {
            match event {
                JoinerEvent::Send { to, datagram } => {
                    self.post(source(addr(JOINER), to), to, datagram);
                }
                other => self.events.push(other),
            }
        }
    }

    fn on_member(&mut self, number: usize, out: Vec<JoinEvent>) {
        for event in out {
            let mut more = Vec::new();
            let member = &mut self.members[number];
            match event {
                JoinEvent::Send { to, datagram } => {
                    self.post(source(addr(number as u8 + 1), to), to, datagram);
                }
                JoinEvent::Request(request) => {
                    if let Some(verdict) = self.verdict.clone() {
                        member.responder.answer(request.handle, verdict, &mut more);
                    }
                    member.requests.push(request);
                }
                JoinEvent::Confirmed(request) => {
                    self.admitted.insert(request.id);
                    let sent = member
                        .responder
                        .welcome(request.handle, &self.welcome, &mut more);
                    assert_eq!(sent, Some(()));
                    member.confirmed.push(request);
                }
                JoinEvent::Accepting { transport } => {
                    assert!(is_join_index(transport.local_index()));
                    member.accepting += 1;
                }
                JoinEvent::Done { .. } => member.done += 1,
                JoinEvent::Retired { .. } => member.retired += 1,
            }
            self.on_member(number, more);
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now.plus(time);
        loop {
            let flight = self.air.keys().next().map(|(at, _)| *at);
            let timers = self.members.iter().map(|m| m.responder.deadline());
            let timer = timers.chain([self.joiner.deadline()]).flatten().min();
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
            let mut out = Vec::new();
            self.joiner.expire(self.now, &mut out);
            self.on_joiner(out);
            for number in 0..self.members.len() {
                let mut out = Vec::new();
                self.members[number].responder.expire(self.now, &mut out);
                self.on_member(number, out);
            }
        }
        self.now = end;
    }

    fn welcomed(&self) -> bool {
        matches!(&self.events[..], [JoinerEvent::Welcome { bytes, .. }] if *bytes == self.welcome)
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn a_joiner_gets_its_welcome() {
    let mut net = Net::new(1, 1);
    net.run(Duration::from_millis(100));
    assert!(net.welcomed(), "at the first attempt");
    let member = &net.members[0];
    assert_eq!(
        (member.requests.len(), member.confirmed.len(), member.done),
        (1, 1, 1)
    );
    assert_eq!(member.requests[0].name.as_str(), "new-host");
    assert_eq!(member.requests[0].generation, Generation(7));
    assert_eq!(net.joiner.deadline(), None);
}

#[test]
fn a_large_welcome_comes_whole_in_spite_of_loss() {
    for seed in 0..10 {
        let mut net = Net::new(2, seed);
        net.loss_percent = 25;
        net.welcome = (0..150_000u32).map(|n| n as u8).collect();
        net.run(secs(60));
        assert!(net.welcomed(), "{seed}");
        assert_eq!(net.admitted.len(), 1);
    }
}

#[test]
fn a_large_welcome_without_loss_takes_no_timers() {
    let mut net = Net::new(1, 3);
    net.welcome = vec![1; 300_000];
    net.run(secs(1));
    assert!(net.welcomed());
}

#[test]
fn members_that_are_away_are_passed_over() {
    let mut net = Net::new(4, 4);
    net.dead = vec![addr(1), addr(101), addr(2)];
    net.run(secs(3));
    assert!(net.welcomed());
}

#[test]
fn each_refusal_is_told_as_it_is() {
    let reason = "the name is taken".to_owned();
    for (verdict, refusal) in [
        (Verdict::Expired, JoinRefusal::Expired),
        (Verdict::UsedUp, JoinRefusal::UsedUp),
        (
            Verdict::Refused(reason.clone()),
            JoinRefusal::Refused(reason),
        ),
    ] {
        let mut net = Net::new(2, 5);
        net.verdict = Some(verdict);
        net.run(secs(16));
        assert_eq!(net.events, [JoinerEvent::Refused(refusal)]);
        assert!(net.members.iter().all(|m| m.confirmed.is_empty()));
    }
}

#[test]
fn an_invitation_expires_by_the_members_clock() {
    let mut net = Net::new(1, 6);
    net.wall = WALL + 3600;
    net.run(secs(2));
    assert_eq!(net.events, [JoinerEvent::Refused(JoinRefusal::Expired)]);
    assert!(net.members[0].requests.is_empty());
    net.wall -= 1;
    let token = token_for(&net.identities(), &net.cluster_secret, 1);
    net.use_token(token);
    net.run(secs(2));
    assert!(net.welcomed());
}

#[test]
fn a_wrong_secret_hears_nothing_and_times_out() {
    let mut net = Net::new(2, 7);
    let token = token_for(&net.identities(), &Secret::new([1; 32]), 1);
    net.use_token(token);
    net.run(secs(20));
    let tried = vec![addr(1), addr(2), addr(101), addr(102)];
    assert_eq!(net.events, [JoinerEvent::TimedOut { tried }]);
    assert!(net.log.iter().all(|(from, _, _)| *from == addr(JOINER)));
    assert!(net.members[0].responder.drops().of(DropReason::NoSecret) > 3);
}

#[test]
fn garbage_and_altered_first_messages_get_no_byte() {
    let mut net = Net::new(1, 8);
    net.verdict = None;
    let mut out = Vec::new();
    net.joiner.expire(net.now, &mut out);
    let JoinerEvent::Send { datagram, .. } = out.remove(0) else {
        panic!("no first message");
    };
    for len in 0..datagram.len() {
        net.deliver(addr(9), addr(1), datagram[..len].to_vec());
    }
    for at in 0..datagram.len() - 16 {
        let mut altered = datagram.clone();
        altered[at] ^= 0x80;
        net.deliver(addr(9), addr(1), altered);
    }
    for _ in 0..10_000 {
        let mut bytes = vec![0; net.random.range(600) as usize];
        net.random.fill(&mut bytes);
        if bytes.len() > 4 {
            bytes[..4].copy_from_slice(&DatagramType::JoinInit.head());
        }
        net.deliver(addr(9), addr(1), bytes);
    }
    assert!(net.log.is_empty());
    assert!(net.members[0].requests.is_empty());
    net.deliver(addr(9), addr(1), datagram);
    assert_eq!(net.members[0].requests.len(), 1);
}

#[test]
fn a_late_verdict_still_lets_in_and_is_asked_for_once() {
    let mut net = Net::new(1, 9);
    net.verdict = None;
    net.run(secs(5));
    assert_eq!(
        net.members[0].requests.len(),
        1,
        "told once, however often it calls"
    );
    let (handle, mut out) = (net.members[0].requests[0].handle, Vec::new());
    net.members[0]
        .responder
        .answer(handle, Verdict::Accepted, &mut out);
    net.on_member(0, out);
    net.run(secs(1));
    assert!(net.welcomed());
}

#[test]
fn a_replayed_first_message_admits_nobody_and_disturbs_nobody() {
    let mut net = Net::new(1, 10);
    net.run(secs(1));
    assert!(net.welcomed());
    let first = net.log[0].2.clone();
    assert_eq!(DatagramType::of(&first), Some(DatagramType::JoinInit));
    for _ in 0..10 {
        net.deliver(addr(66), addr(1), first.clone());
        net.run(Duration::from_millis(100));
    }
    net.run(secs(2));
    assert_eq!(net.members[0].confirmed.len(), 1);
    assert_eq!(net.members[0].requests.len(), 1);
    net.run(secs(61));
    let member = &net.members[0];
    assert_eq!(
        (member.accepting, member.retired),
        (11, 11),
        "all that was opened is closed"
    );
}

#[test]
fn a_member_of_another_cluster_says_nothing() {
    let mut net = Net::new(1, 11);
    let token = token_for(&net.identities(), &net.cluster_secret, 2);
    net.use_token(token);
    net.run(secs(20));
    assert!(matches!(net.events[..], [JoinerEvent::TimedOut { .. }]));
    assert!(net.log.iter().all(|(from, _, _)| *from == addr(JOINER)));
}

#[test]
fn the_longest_invitation_fits_the_first_datagram() {
    let mut random = Random::from_seed([12; 32]);
    let mut net = Net::new(1, 12);
    let identities: Vec<_> = (0..5).map(|_| Identity::generate(&mut random)).collect();
    let mut body = token_for(&identities, &net.cluster_secret, 1)
        .body()
        .clone();
    for member in &mut body.members {
        member.tcp_port = std::num::NonZeroU16::MAX.into();
        member.addresses = (1..5)
            .map(|n| format!("[2001:db8:1:2:3:4:5:{n}]:6783").parse().unwrap())
            .collect();
    }
    let token = Token::issue(&identities[0], &net.cluster_secret, body).unwrap();
    let config = JoinConfig {
        name: NodeName::parse(&"n".repeat(63)).unwrap(),
        generation: Generation(u64::MAX),
        cipher: Cipher::Aes256Gcm,
    };
    let identity = Identity::generate(&mut random);
    net.joiner = Joiner::new(identity, token, config, random, net.now);
    let mut out = Vec::new();
    net.joiner.expire(net.now, &mut out);
    let [JoinerEvent::Send { datagram, .. }] = &out[..] else {
        panic!("no first message");
    };
    assert!(datagram.len() <= MAX_DATAGRAM, "{}", datagram.len());
    assert!(datagram.len() > 1000 + MACS);
}

#[test]
fn an_accepted_joiner_whose_member_dies_times_out() {
    let mut net = Net::new(1, 13);
    net.dead = vec![addr(JOINER)];
    net.run(secs(1));
    net.dead.clear();
    net.members[0]
        .responder
        .expire(net.now.plus(secs(100)), &mut Vec::new());
    net.verdict = None;
    net.run(secs(20));
    assert!(matches!(net.events[..], [JoinerEvent::TimedOut { .. }]));
}

#[test]
fn more_joiners_than_there_is_room_for_are_dropped_silently() {
    let mut net = Net::new(1, 14);
    net.verdict = None;
    for number in 0..80u8 {
        let token = token_for(&net.identities(), &net.cluster_secret, 1);
        net.use_token(token);
        let mut out = Vec::new();
        net.joiner.expire(net.now, &mut out);
        for event in out {
            if let JoinerEvent::Send { datagram, .. } = event {
                let from = UnderlayAddr::Udp(([100, 64, 0, number], 1).into());
                net.deliver(from, addr(1), datagram);
            }
        }
    }
    assert_eq!(net.members[0].requests.len(), 64);
    assert_eq!(net.members[0].responder.drops().of(DropReason::Full), 16);
}

#[test]
fn who_hears_nothing_by_udp_asks_by_tcp_and_nobody_else_does() {
    for no_udp in [false, true] {
        let mut net = Net::new(2, 41);
        let mut body = token_for(&net.identities(), &net.cluster_secret, 1)
            .body()
            .clone();
        for member in &mut body.members {
            member.tcp_port = std::num::NonZeroU16::new(LISTENS);
        }
        let token = Token::issue(&net.members[0].identity, &net.cluster_secret, body).unwrap();
        net.use_token(token);
        net.welcome = vec![7; 50_000];
        if no_udp {
            net.dead = [1, 2, 101, 102, JOINER].map(addr).to_vec();
        }
        net.run(secs(5));
        assert!(net.welcomed());
        let by_tcp = net.log.iter().filter(|(_, to, _)| to.tcp().is_some());
        assert_eq!(by_tcp.count() > 0, no_udp);
    }
}
