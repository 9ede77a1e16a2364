//! What stands inside records: the kinds, their keys, and their values, each with a version octet before its bincode.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::Ipv4Net;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hlc::Stamp;
use crate::model::{AddressPlan, EndpointId, Label, NetworkName, NodeId, NodeName, Proto};
use crate::underlay::{self, UnderlayAddr};
use crate::view::{Endpoint, ManualName, PublishConflict, Service};
use crate::wire;

/// Version of every value below.
const VERSION: u8 = 1;

/// The kind of a record. Kinds this version doesn't know are kept and passed on, and mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(pub u8);

impl Kind {
    /// [`NodeInfo`].
    pub const NODE_INFO: Kind = Kind(1);
    /// [`Endpoint`].
    pub const ENDPOINT: Kind = Kind(2);
    /// [`Grant`].
    pub const GRANT: Kind = Kind(3);
    /// [`Service`].
    pub const SERVICE: Kind = Kind(4);
    /// [`ManualName`].
    pub const NAME: Kind = Kind(5);
    /// [`Network`].
    pub const NETWORK: Kind = Kind(6);
    /// [`PublishConflict`].
    pub const PUBLISH_CONFLICT: Kind = Kind(7);
    /// The writer's own word that its records of owner-written kinds below a sequence are void: it wrote anew what
    /// still holds.
    pub const CHECKPOINT: Kind = Kind(8);
    /// [`Voters`].
    pub const VOTERS: Kind = Kind(9);
    /// [`Vote`].
    pub const VOTE: Kind = Kind(10);

    /// Who decides about records of this kind?
    pub fn scope(self) -> Scope {
        match self {
            Kind::NODE_INFO
            | Kind::ENDPOINT
            | Kind::GRANT
            | Kind::PUBLISH_CONFLICT
            | Kind::CHECKPOINT
            | Kind::VOTERS
            | Kind::VOTE => Scope::Own,
            Kind::SERVICE | Kind::NAME | Kind::NETWORK => Scope::Shared,
            _ => Scope::Unknown,
        }
    }
}

/// Who decides about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Its writer alone.
    Own,
    /// Everybody with the right to publish; the last writer wins.
    Shared,
    /// A later version knows.
    Unknown,
}

/// Addresses of one node that are called by TCP.
const MAX_LISTENING: usize = 8;

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its name for people.
    pub name: NodeName,
    /// The host's addresses, for published ports.
    pub host_addrs: Vec<IpAddr>,
    /// Where peers may reach it, best first.
    pub underlay: Vec<SocketAddr>,
    /// The port at those addresses where it listens for TCP connections.
    pub tcp_port: Option<NonZeroU16>,
    /// Capability bits, as in the handshake.
    pub caps: u32,
}

impl NodeInfo {
    /// All of the places where peers may reach it; those for connections last.
    pub(crate) fn reached_at(&self) -> Vec<UnderlayAddr> {
        reached_at(&self.underlay, self.tcp_port)
    }
}

/// Addresses for UDP, then the first few of them with the port for TCP.
pub(crate) fn reached_at(
    addresses: &[SocketAddr],
    tcp_port: Option<NonZeroU16>,
) -> Vec<UnderlayAddr> {
    let udp = addresses.iter().copied().map(UnderlayAddr::Udp);
    let tcp = underlay::listening(addresses, tcp_port);
    udp.chain(tcp.into_iter().take(MAX_LISTENING)).collect()
}

/// A part of the range handed on: by its owner, who is the record's writer, or, of a removed owner, by who takes it over
/// ([`crate::ipam::Ring`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Grant {
    /// First address.
    pub start: u32,
    /// Last address.
    pub last: u32,
    /// The new owner.
    pub to: NodeId,
    /// Above the version of all that it covers.
    pub version: u64,
    /// 0; space taken back by force has a higher one.
    pub epoch: u32,
}

/// Most voters of one node's space.
pub const MAX_VOTERS: usize = 13;
/// Most parts of a range that one node's voters guard.
pub const MAX_LOCKED: usize = 48;

/// Who decides what becomes of the writer's part of the range, should it be removed ([`crate::voters`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voters {
    /// Counts the writer's sets, from 1.
    pub version: u32,
    /// The set before, a majority of which must have promised to honour this one; 0 for the first.
    pub base: u32,
    /// The writer among them. Those nearer to the front inherit first.
    pub voters: Vec<NodeId>,
    /// First and last addresses of what the writer gives to nobody as long as this set holds.
    pub locked: Vec<(u32, u32)>,
}

/// What the writer has promised and decided about one other node's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// Whose space.
    pub subject: NodeId,
    /// The highest version of the subject's voters that the writer honours: it will not vote under a lower one.
    pub seen: u32,
    /// The version under which the writer takes note of the subject's removal; it never changes again, but to
    /// [`Self::BY_FORCE`].
    pub gone: Option<u32>,
    /// The last of the subject's records that counted when the writer took note: it knew all up to there, and had written
    /// down what it got of the subject after that. 0 before.
    pub upto: u64,
}

impl Vote {
    /// Has the writer taken note of a removal after which the subject's records up to this one count?
    pub fn notes(&self, last_sequence: u64) -> bool {
        self.gone.is_some() && self.upto == last_sequence
    }

    /// Stands for the version where a person said that the subject is destroyed: it is no voter of anybody's any more.
    pub const BY_FORCE: u32 = u32::MAX;
}

/// A network besides `default`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: NetworkName,
    /// Its addresses, an aligned block of the range.
    pub net: Ipv4Net,
}

/// The value of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// Of a node.
    NodeInfo(NodeInfo),
    /// Of an attachment.
    Endpoint(Endpoint),
    /// Of a part of the range.
    Grant(Grant),
    /// Of a service.
    Service(Service),
    /// Of a manual name.
    Name(ManualName),
    /// Of a network.
    Network(Network),
    /// Of a published port that a node can't serve.
    PublishConflict(PublishConflict),
    /// Of those who decide about a node's space.
    Voters(Voters),
    /// Of one of their words.
    Vote(Vote),
}

/// What one knew when one wrote a shared object: tells an edit from a second creation under the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lineage {
    /// When the object was created, and the first octets of who created it; edits keep both.
    pub(crate) born: (Stamp, [u8; 8]),
    /// The records of other writers under this key that the writer knew: first octets of the writer, sequence.
    pub(crate) covers: Vec<([u8; 8], u64)>,
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::NodeInfo(_) => Kind::NODE_INFO,
            Object::Endpoint(_) => Kind::ENDPOINT,
            Object::Grant(_) => Kind::GRANT,
            Object::Service(_) => Kind::SERVICE,
            Object::Name(_) => Kind::NAME,
            Object::Network(_) => Kind::NETWORK,
            Object::PublishConflict(_) => Kind::PUBLISH_CONFLICT,
            Object::Voters(_) => Kind::VOTERS,
            Object::Vote(_) => Kind::VOTE,
        }
    }

    /// Its key among the records of its kind.
    pub fn key(&self) -> Vec<u8> {
        match self {
            Object::NodeInfo(_) => Vec::new(),
            Object::Endpoint(e) => endpoint_key(&e.id),
            Object::Grant(g) => grant_key(g),
            Object::Service(s) => label_key(&s.name),
            Object::Name(n) => label_key(&n.name),
            Object::Network(n) => label_key(&n.name),
            Object::PublishConflict(c) => conflict_key(c.proto, c.port),
            // A set and the one before it: no more are ever needed.
            Object::Voters(v) => vec![(v.version % 2) as u8],
            Object::Vote(v) => v.subject.0.to_vec(),
        }
    }

    /// The network that it concerns, for the record's envelope.
    pub(crate) fn network_number(&self, plan: &AddressPlan) -> u16 {
        match self {
            Object::Endpoint(e) => plan.network_number(e.ip),
            Object::Service(s) => plan.network_number(s.vip),
            Object::Network(n) => plan.network_number(n.net.network()),
            _ => 0,
        }
    }

    pub(crate) fn encode(&self, lineage: Lineage) -> Vec<u8> {
        match self {
            Object::NodeInfo(v) => versioned(v),
            Object::Endpoint(v) => versioned(v),
            Object::Grant(v) => versioned(v),
            Object::PublishConflict(v) => versioned(v),
            Object::Voters(v) => versioned(v),
            Object::Vote(v) => versioned(v),
            Object::Service(v) => versioned(&(lineage, v)),
            Object::Name(v) => versioned(&(lineage, v)),
            Object::Network(v) => versioned(&(lineage, v)),
        }
    }

    /// Decodes a value and checks that it is what its envelope says; `None` for what this version can't read.
    pub(crate) fn decode(
        kind: Kind,
        writer: &NodeId,
        key: &[u8],
        value: &[u8],
    ) -> Option<(Object, Lineage)> {
        let own = |object| Some((object, Lineage::default()));
        let (object, lineage) = match kind {
            Kind::NODE_INFO => own(Object::NodeInfo(read(value)?)),
            Kind::ENDPOINT => own(Object::Endpoint(read(value)?)),
            Kind::GRANT => own(Object::Grant(read(value)?)),
            Kind::PUBLISH_CONFLICT => own(Object::PublishConflict(read(value)?)),
            Kind::VOTERS => own(Object::Voters(read(value)?)),
            Kind::VOTE => own(Object::Vote(read(value)?)),
            Kind::SERVICE => read(value).map(|(l, v)| (Object::Service(v), l)),
            Kind::NAME => read(value).map(|(l, v)| (Object::Name(v), l)),
            Kind::NETWORK => read(value).map(|(l, v)| (Object::Network(v), l)),
            _ => None,
        }?;
        let of_writer = match &object {
            Object::Endpoint(e) => e.node == *writer,
            Object::PublishConflict(c) => c.node == *writer,
            Object::Grant(g) => g.start <= g.last,
            Object::Voters(v) => v.is_sound(),
            Object::Vote(v) => v.subject != *writer,
            _ => true,
        };
        (of_writer && object.key() == key).then_some((object, lineage))
    }
}

/// The key of an endpoint's record.
pub fn endpoint_key(id: &EndpointId) -> Vec<u8> {
    id.0.to_vec()
}

/// The key of a service's, manual name's or network's record.
pub fn label_key(name: &Label) -> Vec<u8> {
    name.as_str().as_bytes().to_vec()
}

/// The key of a publish conflict's record.
pub fn conflict_key(proto: Proto, port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    let proto = match proto {
        Proto::Tcp => 6,
        Proto::Udp => 17,
    };
    vec![proto, high, low]
}

fn grant_key(grant: &Grant) -> Vec<u8> {
    let mut key = grant.start.to_be_bytes().to_vec();
    key.extend_from_slice(&grant.last.to_be_bytes());
    key.extend_from_slice(&grant.version.to_be_bytes());
    key
}

/// The value of a checkpoint.
pub(crate) fn checkpoint(floor: u64) -> Vec<u8> {
    versioned(&floor)
}

/// What a checkpoint says.
pub(crate) fn read_checkpoint(value: &[u8]) -> Option<u64> {
    read(value)
}

fn versioned<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&wire::encode(value));
    bytes
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (version, rest) = bytes.split_first()?;
    if *version != VERSION {
        return None;
    }
    wire::decode(rest).ok()
}

impl Voters {
    fn is_sound(&self) -> bool {
        self.base < self.version
            && self.voters.len() <= MAX_VOTERS
            && self.locked.len() <= MAX_LOCKED
            && self.locked.iter().all(|(start, last)| start <= last)
    }
}

impl Grant {
    /// The first and last address.
    pub fn addresses(&self) -> (Ipv4Addr, Ipv4Addr) {
        (Ipv4Addr::from(self.start), Ipv4Addr::from(self.last))
    }
}
