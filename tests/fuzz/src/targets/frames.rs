//! Control frames: what stands in them by itself, and what a member makes of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use weft_core::crypto::Random;
use weft_core::fuzz::{self, Answer, Ask, JoinMessage, Plain};
use weft_core::membership::{self, Membership, MembershipEvent};
use weft_core::model::{AddressPlan, Generation, Now, Proto};
use weft_core::roster::Roster;
use weft_core::session::handshake::{Capabilities, Refusal};
use weft_core::session::join::Verdict;
use weft_core::store::Table;
use weft_core::sync::{self, Stores, Sync, SyncEvent};
use weft_core::token::TokenBody;
use weft_core::underlay::UnderlayAddr;
use weft_core::wire::{self, DataHeader, DatagramType, Message};

use super::Seen;
use super::records::{reseal, stores};
use crate::pieces::{cut, join, marked};
use crate::scene::{Host, NOON, Peer, SCENE, identity, second};

/// Types of the wire: the first octet says which, the rest is one.
pub(super) fn plain(data: &[u8]) -> Seen {
    let Some((which, bytes)) = data.split_first() else {
        return Seen::Refused;
    };
    let kinds = Plain::ALL.len();
    let read: &dyn Fn(&[u8]) -> Option<Vec<u8>> = match usize::from(*which) % (kinds + 4) {
        plain if plain < kinds => &move |bytes: &[u8]| Plain::ALL[plain].reencode(bytes),
        0 => unreachable!("a plain kind"),
        message if message == kinds => &again::<Message>,
        token if token == kinds + 1 => &again::<TokenBody>,
        welcome if welcome == kinds + 2 => &|bytes: &[u8]| {
            // What a newcomer took must be all that it needs after a restart.
            let stored = fuzz::welcome(bytes, &second())?;
            let cluster = weft_core::node::cluster_of(&stored).expect("it was taken");
            Roster::restore(cluster, &stored).expect("it was taken");
            Some(bytes.to_vec())
        },
        _ => {
            header(bytes);
            &|_: &[u8]| None
        }
    };
    let Some(once) = read(bytes) else {
        return Seen::Refused;
    };
    assert!(once.len() <= bytes.len(), "an encoding is the shortest one");
    assert_eq!(read(&once).as_ref(), Some(&once), "read as it was written");
    Seen::Taken
}

fn again<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<Vec<u8>> {
    let read: T = wire::decode(bytes).ok()?;
    Some(wire::encode(&read))
}

fn header(bytes: &[u8]) {
    if let Some(kind) = DatagramType::of(bytes) {
        assert_eq!(kind.head(), bytes[..4]);
    }
    if let Some(header) = DataHeader::parse(bytes) {
        assert_eq!(header.to_bytes(), bytes[..16]);
    }
}

fn asks() -> Vec<Vec<u8>> {
    let block = "10.40.0.0/20".parse().expect("a block of the range");
    let everywhere = |port| (Proto::Tcp, None, port);
    let one = (Proto::Udp, Some(IpAddr::from([192, 0, 2, 1])), 53);
    [
        Ask::Address(Ipv4Addr::new(10, 32, 0, 9)),
        Ask::Space { vips: true },
        Ask::Space { vips: false },
        Ask::CountUse {
            token: SCENE.token.body().id,
            expiry: SCENE.token.body().expires_at,
            joiner: second(),
            uses: 1,
        },
        Ask::Publish(vec![everywhere(80), everywhere(443), one]),
        Ask::Farewell(vec![7; 200]),
        Ask::SpaceIn(block),
        Ask::Block(block),
    ]
    .iter()
    .map(wire::encode)
    .collect()
}

fn answers() -> Vec<Vec<u8>> {
    [
        Answer::Granted,
        Answer::No("it is used".to_owned()),
        Answer::Held("nginx (pid 812)".to_owned()),
    ]
    .iter()
    .map(wire::encode)
    .collect()
}

/// What members say of themselves when they answer a call, or why they don't take it.
pub(super) fn response(refusal: Option<Refusal>) -> Vec<u8> {
    let capabilities = Capabilities::new(weft_core::crypto::Cipher::ChaCha20Poly1305);
    let extra = Vec::<u8>::new();
    wire::encode(&(SCENE.generation, 3u64, capabilities, refusal, extra))
}

/// A refusal with a record of the roster, though of nobody's removal.
pub(super) fn removed() -> Refusal {
    let (roster, _) = stores();
    let record = roster.records().last().map(|record| record.to_vec());
    Refusal::NoMember(record.expect("it has a founder"))
}

/// What a member answers a joiner.
pub(super) fn verdict(verdict: Verdict) -> Vec<u8> {
    let capabilities = Capabilities::new(weft_core::crypto::Cipher::ChaCha20Poly1305);
    wire::encode(&(verdict, capabilities, Vec::<u8>::new()))
}

/// What host 2 would be given by host 1.
pub(super) fn welcome() -> Vec<u8> {
    let (roster, _) = stores();
    let records: Vec<Vec<u8>> = roster.records().into_iter().map(<[u8]>::to_vec).collect();
    let seeds = vec![(
        identity(1).id(),
        vec![UnderlayAddr::Udp(crate::scene::address(1))],
    )];
    let secret = *SCENE.secret.expose();
    let range = AddressPlan::DEFAULT_RANGE;
    wire::encode(&(SCENE.cluster, secret, range, records, seeds))
}

pub(super) fn plain_seeds() -> Vec<Vec<u8>> {
    let kinds = Plain::ALL.len() as u8;
    let join_init = super::doors::join_payload();
    let messages = [
        JoinMessage::Ready {
            signature: vec![3; 64],
        },
        JoinMessage::Chunk {
            index: 1,
            total: 300,
            bytes: vec![5; 20],
        },
        JoinMessage::Missing {
            indices: vec![0, 1, 700],
        },
        JoinMessage::Done,
    ];
    let row = SCENE.disk.get(Table::Cluster, &[b"cluster"]);
    let uses = (1_800_000_000u64, BTreeSet::from([second()]));
    let mut seeds = vec![
        marked(0, &SCENE.init()),
        marked(1, &response(None)),
        marked(1, &response(Some(Refusal::Outdated(Generation(9))))),
        marked(1, &response(Some(removed()))),
        marked(2, &join_init),
        marked(3, &verdict(Verdict::Refused("not today".to_owned()))),
        marked(7, &welcome()),
        marked(8, row.expect("a member's disk has it")),
        marked(9, &wire::encode(&uses)),
        marked(kinds + 1, &wire::encode(SCENE.token.body())),
        marked(kinds + 2, &welcome()),
    ];
    seeds.extend(messages.iter().map(|m| marked(4, &wire::encode(m))));
    seeds.extend(asks().iter().map(|ask| marked(5, ask)));
    seeds.extend(answers().iter().map(|answer| marked(6, answer)));
    let bodies = SCENE.heard.frames.iter().filter(|(_, kind, _)| *kind == 16);
    seeds.extend(bodies.take(12).map(|(_, _, body)| marked(kinds, body)));
    seeds
}

fn said(wanted: fn(Message) -> Option<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut seen = BTreeSet::new();
    let frames = SCENE.heard.frames.iter();
    let bodies = frames
        .filter(|(to, kind, _)| (*to, *kind) == (1, 16))
        .filter_map(|(_, _, body)| wanted(wire::decode(body).ok()?));
    // Of those that look alike one is enough: the same kind and length.
    bodies
        .filter(|body| seen.insert((body.first().copied(), body.len())))
        .collect()
}

fn sync_bodies() -> Vec<Vec<u8>> {
    said(|message| match message {
        Message::Sync(body) => Some(body),
        _ => None,
    })
}

fn membership_bodies() -> Vec<Vec<u8>> {
    said(|message| match message {
        Message::Membership(body) => Some(body),
        _ => None,
    })
}

/// Bodies of sync, one after the other, for the machine with host 1's stores; records in them are signed anew where the
/// mark says so.
pub(super) fn sync(data: &[u8]) -> Seen {
    let mut random = Random::from_seed([2; 32]);
    let (mut roster, mut catalog) = stores();
    let mut machine = Sync::new(identity(1).id(), random.fork(), Now::default());
    let mut now = Now::default();
    let mut taken = false;
    for piece in cut(data, 12) {
        let Some((mark, body)) = piece.split_first() else {
            continue;
        };
        let body = match mark & 1 {
            0 => body.to_vec(),
            _ => resealed(body),
        };
        if let Some(once) = fuzz::sync_frame(&body) {
            assert_eq!(
                once.len(),
                body.len(),
                "laid out by hand: nothing is left out"
            );
            assert_eq!(fuzz::sync_frame(&once).as_ref(), Some(&once));
            taken = true;
        }
        now = now.plus(Duration::from_millis(u64::from(mark >> 1) * 20));
        let mut stores = Stores {
            catalog: &mut catalog,
            roster: &mut roster,
            wall: NOON,
        };
        let mut out = Vec::new();
        machine.handle(now, second(), &body, &mut stores, &mut out);
        machine.expire(now, &stores, &mut out);
        for event in &out {
            if let SyncEvent::Send { bytes, .. } = event {
                assert!(bytes.len() <= sync::MAX_BODY);
                assert!(
                    fuzz::sync_frame(bytes).is_some(),
                    "what is sent can be read"
                );
            }
        }
    }
    Seen::when(taken)
}

/// A body of sync with the records in it signed by host 2, as far as there are any.
fn resealed(body: &[u8]) -> Vec<u8> {
    let header = match body.first() {
        Some(6) => 1 + 32 + 8 + 8,
        Some(7) => 1,
        _ => return body.to_vec(),
    };
    let Some((header, records)) = body.split_at_checked(header) else {
        return body.to_vec();
    };
    let records = cut(records, 8).into_iter().map(reseal);
    [header, &join(records)].concat()
}

pub(super) fn sync_seeds() -> Vec<Vec<u8>> {
    let bodies = sync_bodies();
    let mut seeds: Vec<Vec<u8>> = bodies.iter().map(|body| join([marked(2, body)])).collect();
    seeds.extend(bodies.iter().map(|body| join([marked(3, body)])));
    seeds.push(join(bodies.iter().map(|body| marked(4, body))));
    seeds
}

/// Datagrams of membership for the machine of host 1; the first octet says who sent each, how much later, and whether
/// its start is made the one that was proven.
pub(super) fn membership(data: &[u8]) -> Seen {
    let mut machine = Membership::new(
        identity(1).id(),
        Generation(5),
        Random::from_seed([2; 32]),
        Now::default(),
    );
    let mut out = Vec::new();
    for other in [2, 3] {
        machine.add_seed(identity(other).id());
        let proven = SCENE.generation;
        machine.on_proven(Now::default(), identity(other).id(), proven, &mut out);
    }
    let mut now = Now::default();
    let mut taken = false;
    for piece in cut(data, 12) {
        let Some((mark, body)) = piece.split_first() else {
            continue;
        };
        let mut body = body.to_vec();
        if mark & 1 == 0 && body.len() >= 17 {
            body[9..17].copy_from_slice(&SCENE.generation.0.to_be_bytes());
        }
        if let Some(once) = fuzz::membership_frame(&body) {
            assert_eq!(
                once.len(),
                body.len(),
                "laid out by hand: nothing is left out"
            );
            assert_eq!(fuzz::membership_frame(&once).as_ref(), Some(&once));
            taken = true;
        }
        let from = identity(2 + (mark >> 1 & 1)).id();
        machine.handle(now, from, &body, &mut out);
        now = now.plus(Duration::from_millis(u64::from(mark >> 2) * 40));
        while machine.deadline().is_some_and(|due| due <= now) {
            machine.expire(now, &mut out);
        }
        for event in out.drain(..) {
            if let MembershipEvent::Send { bytes, .. } = event {
                assert!(bytes.len() <= membership::MAX_DATAGRAM);
                assert!(fuzz::membership_frame(&bytes).is_some());
            }
        }
    }
    let members = machine.alive().count();
    assert!(members <= 2, "{members} members, and nobody proved more");
    Seen::when(taken)
}

pub(super) fn membership_seeds() -> Vec<Vec<u8>> {
    let bodies = membership_bodies();
    let mut seeds: Vec<Vec<u8>> = bodies.iter().map(|body| join([marked(0, body)])).collect();
    seeds.push(join(bodies.iter().map(|body| marked(40, body))));
    seeds
}

/// What a member hears of another in their session: each piece is a message of some kind, a raw frame, or time.
pub(super) fn frames(data: &[u8]) -> Seen {
    let mut host = Host::resumed();
    let Some(peer) = Peer::calls(&mut host) else {
        panic!("host 2 is a member and calls with its own key");
    };
    let mut taken = false;
    for piece in cut(data, 12) {
        let Some((mark, body)) = piece.split_first() else {
            continue;
        };
        let body = body.to_vec();
        taken |= *mark < 8;
        match mark % 9 {
            0 => peer.message(&mut host, &Message::Membership(body)),
            1 => peer.message(&mut host, &Message::Sync(body)),
            2 => peer.message(&mut host, &Message::Ask { id: 1, body }),
            3 => peer.message(&mut host, &Message::Answer { id: 1, body }),
            4 => peer.message(&mut host, &Message::Bye),
            5 => peer.frame(&mut host, 16, &body),
            6 => peer.frame(
                &mut host,
                body.first().copied().unwrap_or_default(),
                body.get(1..).unwrap_or_default(),
            ),
            7 => peer.message(&mut host, &Message::Sync(resealed(&body))),
            _ => {
                let time = body.first().copied().unwrap_or_default();
                host.pass(Duration::from_millis(u64::from(time) * 10));
            }
        }
    }
    host.look();
    host.pass(Duration::from_millis(600));
    host.look();
    restarts(&host);
    Seen::when(taken)
}

/// Whatever a peer said, the host comes up again from what it wrote.
pub(super) fn restarts(host: &Host) {
    let mut again = Host::begin(
        1,
        weft_core::node::Start::Resume,
        host.disk.clone(),
        Now::default(),
    );
    assert!(!again.failed, "what was written can't be read");
    again.look();
}

pub(super) fn frames_seeds() -> Vec<Vec<u8>> {
    let of_one = SCENE.heard.frames.iter().filter(|(to, _, _)| *to == 1);
    let mut seen = BTreeSet::new();
    let alike = of_one.filter(|(_, kind, body)| seen.insert((*kind, body.len())));
    let raw: Vec<Vec<u8>> = alike
        .map(|(_, kind, body)| marked(6, &marked(*kind, body)))
        .collect();
    let mut seeds: Vec<Vec<u8>> = raw.iter().map(|piece| join([piece])).collect();
    seeds.extend(raw.chunks(12).map(join));
    let wrap = |mark, bodies: Vec<Vec<u8>>| -> Vec<Vec<u8>> {
        let wait = marked(8, &[50]);
        let one = |body: &Vec<u8>| join([&marked(mark, body), &wait]);
        bodies.iter().map(one).collect()
    };
    seeds.extend(wrap(0, membership_bodies()));
    seeds.extend(wrap(1, sync_bodies()));
    seeds.extend(wrap(2, asks()));
    seeds.extend(wrap(3, answers()));
    seeds.extend(wrap(4, vec![Vec::new()]));
    seeds.extend(wrap(7, sync_bodies()));
    seeds
}
