//! Every byte that goes on a wire, versioned, and the only module that names bincode.
//!
//! All numbers are little-endian. A datagram is at most [`MAX_DATAGRAM`] octets when it is ours to choose (handshakes and
//! control frames), so that it fits any path that IPv6 fits; packets follow the path's MTU.
//!
//! # Datagrams
//! | octets | init 1, join-init 5 | response 2, join-response 6 | cookie 3 | data 4 |
//! |---|---|---|---|---|
//! | 0 | type | type | type | type |
//! | 1 | version | version | version | version |
//! | 2-3 | zero | zero | zero | zero |
//! | 4-7 | sender index | sender index | receiver index | receiver index |
//! | 8-11 | Noise message … | receiver index | nonce (12) … | counter (8) … |
//! | 12- | … | Noise message … | … sealed cookie (16 + 16) | … frame, sealed; the header of 16 octets is its AAD |
//! | last 32 | mac1 (16), mac2 (16) | mac1 (16), mac2 (16) | last 16: mac1 | tag (16) |
//!
//! A join-init carries, between its index and the Noise message, a u16 length and that many octets: the invitation's
//! signed body, in clear. mac1 is keyed by the cluster secret (or the invitation's) and covers all that precedes it; mac2
//! is keyed by the cookie, covers mac1 too, and is zero when there is none.
//!
//! # Frames, inside the seal of a data datagram
//! | first octet | kind | body |
//! |---|---|---|
//! | 1 | packet | one inner IP packet, to the end |
//! | 2 | bundle | repeated: u16, of which the low 15 bits are a length and the highest says "partial"; inner IP packet |
//! | 3 | partial | one inner IP packet, to the end, whose TCP or UDP checksum is not filled in |
//! | 16 | control | a bincode [`Message`]; in a joiner's session a `JoinMessage` |
//! | 17 | probe | flag 0 (echo request), nonce u64, padding; flag 1 (echo reply), nonce u64, where the request came from: u16 port, 4 or 16 octets of address, or nothing |
//! | 18 | relay | members between so far u8, first 8 octets of the receiver's id, a whole datagram for it |
//!
//! A receiver counts and drops kinds it doesn't know, so what comes later breaks no wire.

mod frugal;
mod octets;

use bincode::config::{self, Config};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::NodeId;

/// Version of everything here.
pub const VERSION: u8 = 1;
/// Longest datagram that is not packets.
pub const MAX_DATAGRAM: usize = 1200;
/// Octets that say in a TCP connection how long the datagram behind them is, network order.
pub const STREAM_HEAD: usize = 2;
/// Longest datagram in a TCP connection: one with the largest inner packet that the devices take. The stream is cut by
/// nobody but the two kernels, so fewer and larger ones cost less; and who says one is longer is none of ours.
pub const MAX_STREAMED: usize = crate::layout::DEVICE_MTU as usize + OVERHEAD;
/// First octet of a probe that asks for an echo.
pub const ECHO_REQUEST: u8 = 0;
/// First octet of the echo.
pub const ECHO_REPLY: u8 = 1;
/// Header of a data datagram, the AAD of its seal.
pub const DATA_HEADER: usize = 16;
/// What a data datagram adds to one inner packet: header, tag, kind.
pub const OVERHEAD: usize = DATA_HEADER + 16 + 1;
/// Longest body of a control frame.
pub const MAX_CONTROL: usize = 1120;
/// What a member between adds to a datagram.
pub const RELAY_OVERHEAD: usize = OVERHEAD + RelayHead::LEN;
/// Longest datagram of a handshake or a control frame that goes through somebody.
pub const MAX_RELAYED: usize = MAX_DATAGRAM - RELAY_OVERHEAD;
/// Longest octets inside any [`Message`]: what is left beside its variant, id and length.
pub const MAX_BODY: usize = MAX_CONTROL - 13;
/// Longest thing [`decode`] looks at, and the most that the numbers and texts in it may come to.
pub const MAX_DECODE: usize = 64 * 1024;
/// Longest thing [`decode_long`] looks at: more than the roster and the addresses of 4,094 members.
pub const MAX_LONG: usize = 1 << 20;
/// The most that numbers and texts in it may come to: a small number counts as the largest of its type.
const MAX_LONG_SUM: usize = 4 * MAX_LONG;

/// What a datagram is: its first octet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DatagramType {
    /// First message of a handshake between members.
    Init = 1,
    /// Its answer.
    Response = 2,
    /// "I am under load: prove your address."
    Cookie = 3,
    /// A sealed frame.
    Data = 4,
    /// First message of a joiner's handshake.
    JoinInit = 5,
    /// Its answer.
    JoinResponse = 6,
}

impl DatagramType {
    /// The type of a datagram of this version; `None` for anything else, however short.
    pub fn of(datagram: &[u8]) -> Option<Self> {
        match datagram {
            [kind, VERSION, 0, 0, ..] => match kind {
                1 => Some(Self::Init),
                2 => Some(Self::Response),
                3 => Some(Self::Cookie),
                4 => Some(Self::Data),
                5 => Some(Self::JoinInit),
                6 => Some(Self::JoinResponse),
                _ => None,
            },
            _ => None,
        }
    }

    /// The first four octets of such a datagram.
    pub fn head(self) -> [u8; 4] {
        [self as u8, VERSION, 0, 0]
    }
}

/// What is inside a sealed datagram: the first octet under the seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// One inner IP packet.
    Packet = 1,
    /// Several, complete or partial.
    Bundle = 2,
    /// One inner TCP or UDP packet whose transport checksum is not filled in: the seal stands for it on the way, and the
    /// kernel at the far end fills it in where anybody still needs it.
    Partial = 3,
    /// Half of an inner packet that the path does not take in one piece, though IPv6 sends it without asking (RFC 8200 §5).
    Half = 4,
    /// A [`Message`].
    Control = 16,
    /// An echo request or reply.
    Probe = 17,
    /// A datagram for this node or for another, which is to get it.
    Relay = 18,
}

impl FrameKind {
    /// The kind, if it is one this version knows.
    pub fn of(kind: u8) -> Option<Self> {
        match kind {
            1 => Some(Self::Packet),
            2 => Some(Self::Bundle),
            3 => Some(Self::Partial),
            4 => Some(Self::Half),
            16 => Some(Self::Control),
            17 => Some(Self::Probe),
            18 => Some(Self::Relay),
            _ => None,
        }
    }
}

/// The header of a data datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    /// The receiver's number for the session.
    pub receiver: u32,
    /// The sender's packet counter.
    pub counter: u64,
}

impl DataHeader {
    /// Reads the header; `None` if this is no whole data datagram of this version.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        if DatagramType::of(datagram)? != DatagramType::Data || datagram.len() < OVERHEAD {
            return None;
        }
        Some(Self {
            receiver: u32::from_le_bytes(datagram[4..8].try_into().ok()?),
            counter: u64::from_le_bytes(datagram[8..16].try_into().ok()?),
        })
    }

    /// The header's octets.
    pub fn to_bytes(self) -> [u8; DATA_HEADER] {
        let mut bytes = [0; DATA_HEADER];
        bytes[..4].copy_from_slice(&DatagramType::Data.head());
        bytes[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        bytes[8..].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }
}

/// What stands before a datagram that a member passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayHead {
    hops: u8,
    to: [u8; 8],
}

impl RelayHead {
    /// Octets of it.
    pub const LEN: usize = 9;

    /// For who is the first to pass it on, to `to`.
    pub fn first(to: &NodeId) -> Self {
        Self {
            hops: 0,
            to: to.prefix(),
        }
    }

    /// The same for the next one.
    pub fn next(self) -> Self {
        Self {
            hops: self.hops.saturating_add(1),
            ..self
        }
    }

    /// Has nobody passed it on yet?
    pub fn is_first(self) -> bool {
        self.hops == 0
    }

    /// Is it for this node? Of two nodes with one beginning of a key, which takes 2^64 tries to make, one hears what it
    /// can't open.
    pub fn is_for(self, node: &NodeId) -> bool {
        self.to == node.prefix()
    }

    /// The octets to find the node by.
    pub fn to(self) -> [u8; 8] {
        self.to
    }

    /// The head's octets.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [self.hops; Self::LEN];
        bytes[1..].copy_from_slice(&self.to);
        bytes
    }

    /// The frame's body.
    pub fn with(self, datagram: &[u8]) -> Vec<u8> {
        let mut body = self.to_bytes().to_vec();
        body.extend_from_slice(datagram);
        body
    }

    /// Head and datagram of a frame's body.
    pub fn split(body: &[u8]) -> Option<(Self, &[u8])> {
        let (head, datagram) = body.split_first_chunk::<{ Self::LEN }>()?;
        let (hops, to) = (head[0], head[1..].try_into().ok()?);
        Some((Self { hops, to }, datagram))
    }
}

/// What members say to each other in control frames. The bytes inside belong to others: each decodes its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Gossip about who lives.
    Membership(#[serde(with = "octets")] Vec<u8>),
    /// Deltas, digests and summaries of the store.
    Sync(#[serde(with = "octets")] Vec<u8>),
    /// A question to this node; answered under the same id.
    Ask {
        /// Chosen by who asks.
        id: u64,
        /// The question.
        #[serde(with = "octets")]
        body: Vec<u8>,
    },
    /// The answer to an [`Message::Ask`].
    Answer {
        /// The question's id.
        id: u64,
        /// The answer.
        #[serde(with = "octets")]
        body: Vec<u8>,
    },
    /// "I am going": drop the session, send no more.
    Bye,
    /// Which carrier takes packets between the two. Only to who consents to plain VXLAN.
    Carrier(#[serde(with = "octets")] Vec<u8>),
}

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// More than a message may have.
    #[error("{0} octets are more than a message may have")]
    TooLong(usize),
    /// Not an encoding of the type, or one that claims to be longer than it is.
    #[error("not a message of this kind")]
    Garbled,
    /// The message ends before the bytes do.
    #[error("{0} octets too many behind a message")]
    Trailing(usize),
}

/// Encodes `value`.
///
/// # Panics
/// Only for a type that can't be encoded at all (a map of unknown length, say), or a value beyond any bound.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, config::standard())
        .expect("our own types encode, and writing to memory does not fail")
}

/// Decodes a value that fills `bytes` to the last octet. Allocates for what came, never for a length that the bytes
/// only claim.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    decode_within(
        bytes,
        MAX_DECODE,
        config::standard().with_limit::<MAX_DECODE>(),
    )
}

/// As [`decode`], for what grows with the cluster and comes from a proven member in many datagrams, or from the own disk.
pub fn decode_long<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    decode_within(
        bytes,
        MAX_LONG,
        config::standard().with_limit::<MAX_LONG_SUM>(),
    )
}

fn decode_within<T: DeserializeOwned>(
    bytes: &[u8],
    longest: usize,
    format: impl Config,
) -> Result<T, WireError> {
    if bytes.len() > longest {
        return Err(WireError::TooLong(bytes.len()));
    }
    let (value, used) = frugal::decode(bytes, format).map_err(|_| WireError::Garbled)?;
    match bytes.len() - used {
        0 => Ok(value),
        rest => Err(WireError::Trailing(rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_wire() {
        for message in [
            Message::Membership(vec![1, 2, 3]),
            Message::Ask {
                id: u64::MAX,
                body: vec![9; 1000],
            },
            Message::Bye,
            Message::Carrier(vec![0; 11]),
        ] {
            assert_eq!(decode::<Message>(&encode(&message)), Ok(message));
        }
    }

    #[test]
    fn the_longest_body_fits_a_control_frame() {
        let body = vec![0; MAX_BODY];
        let id = u64::MAX;
        assert_eq!(encode(&Message::Ask { id, body }).len(), MAX_CONTROL);
    }

    #[test]
    fn a_hostile_length_is_an_error_and_not_an_allocation() {
        // Variant 0, then the length 2^63-1 as an eight-octet integer, then nothing.
        let mut bytes = vec![0, 253];
        bytes.extend_from_slice(&(u64::MAX >> 1).to_le_bytes());
        bytes.extend_from_slice(&[0; 17]);
        assert_eq!(decode::<Message>(&bytes), Err(WireError::Garbled));
        assert_eq!(decode::<Vec<String>>(&bytes[1..]), Err(WireError::Garbled));
        assert_eq!(
            decode::<Vec<u8>>(&vec![0; MAX_DECODE + 1]),
            Err(WireError::TooLong(MAX_DECODE + 1))
        );
    }

    #[test]
    fn what_is_passed_on_keeps_its_octets_and_counts_who_passed_it() {
        let (to, other) = (NodeId([7; 32]), NodeId([8; 32]));
        let head = RelayHead::first(&to);
        let body = head.next().with(b"datagram");
        assert_eq!(body.len(), RelayHead::LEN + 8);
        let (read, datagram) = RelayHead::split(&body).unwrap();
        assert_eq!((read, datagram), (head.next(), &b"datagram"[..]));
        assert!(head.is_first() && !read.is_first());
        assert!(read.is_for(&to) && !read.is_for(&other));
        assert_eq!(RelayHead::split(&body[..RelayHead::LEN - 1]), None);
    }

    #[test]
    fn trailing_octets_are_refused() {
        let mut bytes = encode(&Message::Bye);
        bytes.push(0);
        assert_eq!(decode::<Message>(&bytes), Err(WireError::Trailing(1)));
    }

    #[test]
    fn the_data_header_is_sixteen_octets_in_the_documented_places() {
        let header = DataHeader {
            receiver: 0x0403_0201,
            counter: 0x0c0b_0a09_0807_0605,
        };
        let mut datagram = header.to_bytes().to_vec();
        assert_eq!(
            datagram,
            [4, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        );
        assert_eq!(DataHeader::parse(&datagram), None);
        datagram.resize(OVERHEAD, 0);
        assert_eq!(DataHeader::parse(&datagram), Some(header));
        datagram[1] = 2;
        assert_eq!(DataHeader::parse(&datagram), None);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Message>(&bytes);
            let _ = decode::<Vec<(u32, String, Option<Vec<u8>>)>>(&bytes);
            let _ = DataHeader::parse(&bytes);
            let _ = DatagramType::of(&bytes);
        }
    }
}
