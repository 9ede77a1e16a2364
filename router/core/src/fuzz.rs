//! Doors for the fuzz targets in `tests/fuzz`, and for nothing else: decoders that no public function leads to alone,
//! and handshakes whose sealed octets the caller chooses, so that what stands behind a seal is reached too.
//!
//! Each of the functions here decodes octets and gives the encoding of what was read, or `None` where nothing was.

pub use crate::node::io::{Answer, Ask};
pub use crate::session::half::{Between, Half, Through};
pub use crate::session::join::JoinMessage;

use crate::model::NodeId;
use crate::node;
use crate::session::{handshake, join};
use crate::store::Stored;
use crate::value::{Kind, Object};
use crate::wire;

/// A body of `Message::Sync`.
pub fn sync_frame(bytes: &[u8]) -> Option<Vec<u8>> {
    crate::sync::reencode(bytes)
}

/// A body of `Message::Membership`.
pub fn membership_frame(bytes: &[u8]) -> Option<Vec<u8>> {
    crate::membership::reencode(bytes)
}

/// A record of the roster, signature included. One whose body means nothing to this version comes back as it was.
pub fn roster_record(bytes: &[u8]) -> Option<Vec<u8>> {
    crate::roster::reencode(bytes)
}

/// A record's value, with what stands in its envelope.
pub fn value(kind: Kind, writer: &NodeId, key: &[u8], value: &[u8]) -> Option<Vec<u8>> {
    let (object, lineage) = Object::decode(kind, writer, key, value)?;
    Some(object.encode(lineage))
}

/// What is sealed in handshakes, control frames and rows, and has a type of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plain {
    /// In a member's first message.
    Init,
    /// In the answer to it.
    Response,
    /// In a joiner's first message.
    JoinInit,
    /// In the answer to it.
    JoinResponse,
    /// In a control frame of a joiner's session.
    Join,
    /// In `Message::Ask`.
    Ask,
    /// In `Message::Answer`.
    Answer,
    /// What a newcomer is given.
    Welcome,
    /// The cluster's row on disk.
    Cluster,
    /// A used invitation's row on disk.
    Uses,
}

impl Plain {
    /// All of them.
    pub const ALL: [Plain; 10] = [
        Plain::Init,
        Plain::Response,
        Plain::JoinInit,
        Plain::JoinResponse,
        Plain::Join,
        Plain::Ask,
        Plain::Answer,
        Plain::Welcome,
        Plain::Cluster,
        Plain::Uses,
    ];

    /// Decodes octets as this.
    pub fn reencode(self, bytes: &[u8]) -> Option<Vec<u8>> {
        match self {
            Plain::Init => again::<handshake::InitPayload>(wire::decode(bytes)),
            Plain::Response => again::<handshake::ResponsePayload>(wire::decode(bytes)),
            Plain::JoinInit => again::<join::JoinPayload>(wire::decode(bytes)),
            Plain::JoinResponse => again::<join::JoinAnswer>(wire::decode(bytes)),
            Plain::Join => again::<join::JoinMessage>(wire::decode(bytes)),
            Plain::Ask => again::<node::Ask>(wire::decode(bytes)),
            Plain::Answer => again::<node::Answer>(wire::decode(bytes)),
            Plain::Welcome => again::<node::Welcome>(wire::decode_long(bytes)),
            Plain::Cluster => again::<node::Row>(wire::decode_long(bytes)),
            Plain::Uses => again::<node::Uses>(wire::decode(bytes)),
        }
    }
}

fn again<T: serde::Serialize>(read: Result<T, wire::WireError>) -> Option<Vec<u8>> {
    Some(wire::encode(&read.ok()?))
}

/// Makes of a welcome what a newcomer makes of it: the rows that it writes. `None` where it refuses.
pub fn welcome(bytes: &[u8], me: &NodeId) -> Option<Stored> {
    let meta = node::Meta::welcomed(wire::decode_long(bytes).ok()?, me).ok()?;
    let mut stored = Stored::default();
    stored.apply(&meta.batch());
    Some(stored)
}
