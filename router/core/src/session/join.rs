//! How a host that holds an invitation becomes a member: both sides of the exchange.
//!
//! ```text
//! joiner                                              member
//! | join-init: signed body of the invitation in clear,   |  length, mac1 (keyed by the invitation's secret), rate and
//! |   Noise IKpsk1 {id, name, signature}                 |  cookie, Diffie-Hellman, signature, expiry
//! |----------------------------------------------------->|  Request: the caller asks its issuer, and decides
//! |                                 join-response: status|
//! |<-----------------------------------------------------|
//! | Ready {signature over the handshake's hash}          |
//! |----------------------------------------------------->|  Confirmed: only now the caller admits
//! |                            Chunk, Chunk, Chunk, …    |
//! |<-----------------------------------------------------|
//! | Missing {…}, until whole; Done                       |
//! |----------------------------------------------------->|
//! ```
//!
//! IKpsk1 and not psk2: with psk2 a member would answer before it could tell a wrong secret. Who has no secret gets no
//! byte; who has a spent or expired one is told so under it. A joiner repeats everything until it is answered, and every
//! step is the same when repeated: one key is one use.

mod joiner;
mod responder;

#[cfg(test)]
mod tests;

pub use joiner::{JoinConfig, Joiner, JoinerEvent};
pub use responder::{JoinEvent, JoinHandle, JoinRequest, JoinResponder};

pub(super) use responder::split_init;
use serde::{Deserialize, Serialize};

use super::desk::JOIN_BIT;
use super::handshake::Capabilities;
use crate::model::{ClusterId, Generation, NodeId, NodeName};
use crate::wire::{MAX_LONG, VERSION};

/// Octets of a welcome in one datagram.
pub const CHUNK: usize = 1000;
/// Longest welcome.
pub const MAX_WELCOME: usize = MAX_LONG;
/// Chunks asked for, and sent, at a time.
const BURST: usize = 32;
/// Longest reason of a refusal, octets.
const MAX_REASON: usize = 300;

/// Does a data datagram's receiver index belong to a joiner's session? Then it goes to [`JoinResponder`].
pub fn is_join_index(index: u32) -> bool {
    index & JOIN_BIT != 0
}

/// What a member says to a joiner whose secret is right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Come in.
    Accepted,
    /// The invitation's time is over, by the asked member's clock.
    Expired,
    /// As many nodes joined with it as may.
    UsedUp,
    /// Anything else, for people.
    Refused(String),
}

/// Why a joiner was not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// See [`Verdict::Expired`].
    #[error("this invitation has expired: make a new one with `weft token`")]
    Expired,
    /// See [`Verdict::UsedUp`].
    #[error(
        "this invitation is used up: make a new one with `weft token`, or one for several hosts with `--uses`"
    )]
    UsedUp,
    /// See [`Verdict::Refused`].
    #[error("the cluster refused: {0}")]
    Refused(String),
}

/// What a joiner says of itself in its first message, under the invitation's secret and the member's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JoinPayload {
    node: NodeId,
    /// Over [`claim`], by `node`.
    signature: Vec<u8>,
    name: NodeName,
    generation: Generation,
    capabilities: Capabilities,
    extra: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JoinAnswer {
    verdict: Verdict,
    capabilities: Capabilities,
    extra: Vec<u8>,
}

/// What passes in a joiner's session, in control frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinMessage {
    /// The third message: a signature over the handshake's hash, so that nobody joins under a borrowed identity.
    Ready {
        /// By the joiner.
        signature: Vec<u8>,
    },
    /// A part of the welcome.
    Chunk {
        /// Which, from 0.
        index: u16,
        /// Of how many.
        total: u16,
        /// What stands in it.
        bytes: Vec<u8>,
    },
    /// These parts have not come.
    Missing {
        /// Which.
        indices: Vec<u16>,
    },
    /// All have.
    Done,
}

pub(super) fn prologue(cluster: &ClusterId) -> Vec<u8> {
    let mut prologue = b"weft join ".to_vec();
    prologue.push(VERSION);
    prologue.extend_from_slice(&cluster.0);
    prologue
}

/// What a joiner signs at first: that this X25519 key, calling this member with this invitation, is its own.
fn claim(cluster: &ClusterId, token: &[u8; 16], joiner: &[u8; 32], member: &[u8; 32]) -> Vec<u8> {
    [b"weft join claim 1", &cluster.0[..], token, joiner, member].concat()
}

/// What it signs at last: all that was said between the two.
fn ready(hash: &[u8]) -> Vec<u8> {
    [b"weft join ready 1", hash].concat()
}
