//! What a node of a later version says that this one doesn't know, and what a member may say that lies.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use weft_core::model::{EndpointId, Label, NodeId};
use weft_core::node::{Deviation, Node};
use weft_core::value::{Grant, NodeInfo, Object};
use weft_core::view::{Endpoint, EndpointKind, Service, View};
use weft_core::wire::Message;

use crate::world::Strange;

const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// Kinds of records from here on are of later versions.
const LATER_KINDS: u8 = 0x40;

/// What `node` says, chosen by a number and by what it knows.
pub fn deviations(node: &mut Node, what: Strange) -> Vec<Deviation> {
    match what {
        Strange::Newer(number) => vec![newer(number)],
        Strange::Lie(number) => node
            .view()
            .and_then(|view| lie(number, &view))
            .into_iter()
            .collect(),
        Strange::Fork => vec![Deviation::Fork],
    }
}

fn newer(number: u64) -> Deviation {
    let key = number.to_be_bytes()[4..].to_vec();
    let unknown = vec![number as u8; (number % 300) as usize];
    match number % 8 {
        0 | 1 => Deviation::Record {
            kind: LATER_KINDS + (number >> 8) as u8 % 8,
            key: vec![key[0] % 4],
            value: Some(unknown),
            ahead: Duration::ZERO,
        },
        // A kind that is known, in a version that is not.
        2 => Deviation::Record {
            kind: 2 + (number >> 8) as u8 % 6,
            key,
            value: Some([&[2], unknown.as_slice()].concat()),
            ahead: Duration::ZERO,
        },
        3 => Deviation::Say(Message::Sync([&[0x21], unknown.as_slice()].concat())),
        4 => Deviation::Say(Message::Membership([&[0x77], unknown.as_slice()].concat())),
        5 => Deviation::Say(Message::Ask {
            id: number,
            body: [&[0x55], unknown.as_slice()].concat(),
        }),
        6 => Deviation::Say(Message::Answer {
            id: number % 64,
            body: [&[0x55], unknown.as_slice()].concat(),
        }),
        _ => Deviation::Record {
            kind: LATER_KINDS,
            key: vec![key[0] % 4],
            value: None,
            ahead: Duration::ZERO,
        },
    }
}

fn lie(number: u64, view: &View) -> Option<Deviation> {
    let others: Vec<NodeId> = view
        .members
        .iter()
        .map(|member| member.id)
        .filter(|id| *id != view.me)
        .collect();
    let victim = *others.get(number as usize % others.len().max(1))?;
    let now = Duration::ZERO;
    Some(match (number >> 16) % 9 {
        0 => Deviation::Object(Box::new(Object::Grant(others_space(view, victim)?)), now),
        1 => Deviation::Object(
            Box::new(Object::Endpoint(others_address(view, number)?)),
            now,
        ),
        2 => Deviation::Object(Box::new(Object::NodeInfo(others_place(view, victim)?)), now),
        3 => Deviation::Object(Box::new(Object::Service(next_year(view)?)), YEAR),
        4 => Deviation::Say(Message::Sync(wrong_digest(number))),
        5 => Deviation::Say(Message::Sync(wrong_states(&victim, number))),
        6 => Deviation::Say(Message::Sync(empty_delta(&victim))),
        7 => Deviation::Twins,
        _ => Deviation::Say(Message::Sync(absurd_wants(&victim))),
    })
}

/// All that another owns, given to the liar.
fn others_space(view: &View, victim: NodeId) -> Option<Grant> {
    let net = *view.member(&victim)?.prefixes.first()?;
    Some(Grant {
        start: u32::from(net.network()),
        last: u32::from(net.broadcast()),
        to: view.me,
        version: 1_000_000,
        epoch: 0,
    })
}

/// An endpoint of the liar's with an address that another's endpoint has.
fn others_address(view: &View, number: u64) -> Option<Endpoint> {
    let taken = view.endpoints.iter().find(|e| e.node != view.me)?;
    Some(Endpoint {
        id: EndpointId(number.to_be_bytes()),
        node: view.me,
        kind: EndpointKind::Container,
        names: taken.names.clone(),
        network: taken.network.clone(),
        ip: taken.ip,
        labels: taken.labels.clone(),
    })
}

/// The liar is where others are.
fn others_place(view: &View, victim: NodeId) -> Option<NodeInfo> {
    let other = view.member(&victim)?;
    let underlay = other.host_addrs.iter();
    Some(NodeInfo {
        name: Label::parse("nobody").ok()?,
        host_addrs: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
        underlay: underlay.map(|ip| SocketAddr::new(*ip, 6783)).collect(),
        tcp_port: None,
        caps: u32::MAX,
    })
}

/// Somebody's service, changed in a year.
fn next_year(view: &View) -> Option<Service> {
    let service = view.services.first()?.clone();
    Some(Service {
        vip: view.plan.dns4(),
        ..service
    })
}

fn wrong_digest(number: u64) -> Vec<u8> {
    let mut bytes = vec![1];
    for part in [number, !number, u64::MAX] {
        bytes.extend_from_slice(&part.to_be_bytes());
    }
    bytes.push(1);
    bytes
}

/// The victim's log goes to the end of the world.
fn wrong_states(victim: &NodeId, number: u64) -> Vec<u8> {
    let mut bytes = vec![3];
    bytes.extend_from_slice(&[0; 32]);
    bytes.extend_from_slice(&[0xff; 32]);
    bytes.extend_from_slice(&victim.0);
    bytes.extend_from_slice(&(u64::MAX - number % 3).to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes
}

/// Nothing is missing of the victim's log, up to the end.
fn empty_delta(victim: &NodeId) -> Vec<u8> {
    let mut bytes = vec![6];
    bytes.extend_from_slice(&victim.0);
    bytes.extend_from_slice(&0_u64.to_be_bytes());
    bytes.extend_from_slice(&u64::MAX.to_be_bytes());
    bytes
}

fn absurd_wants(victim: &NodeId) -> Vec<u8> {
    let mut bytes = vec![4];
    for what in 0..3 {
        bytes.push(what);
        bytes.extend_from_slice(&victim.0);
        bytes.extend_from_slice(&u64::from(what).to_be_bytes());
    }
    bytes
}
