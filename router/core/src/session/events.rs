//! What goes into [`super::Sessions`] besides datagrams, and what comes out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::handshake::{Capabilities, Refusal};
use super::transport::Transport;
use crate::crypto::{Cipher, Secret};
use crate::model::{ClusterId, Generation, NodeId, Now};
use crate::wire::Message;

/// What a node's sessions are made with.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// The cluster: a datagram of another one is none of ours.
    pub cluster: ClusterId,
    /// Keys mac1. It gives silence towards strangers, not membership: that is the roster's.
    pub cluster_secret: Secret<32>,
    /// The AEAD this host is fast with.
    pub cipher: Cipher,
    /// Of this start.
    pub generation: Generation,
    /// Consent to plain VXLAN.
    pub plain_vxlan: bool,
    /// Readiness to relay.
    pub relay: bool,
}

/// What the roster knows, and sessions need to.
pub trait Trust {
    /// The X25519 key that was admitted with a node.
    fn noise_key(&self, id: &NodeId) -> Option<[u8; 32]>;
    /// Admitted and not revoked?
    fn is_member(&self, id: &NodeId) -> bool;
    /// The records that show a stranger how `me` was admitted.
    fn admit_chain(&self, me: &NodeId) -> Vec<u8>;
    /// Reads such records. The node at their end, if they are sound and it is a member now.
    fn learn_chain(&mut self, chain: &[u8]) -> Option<NodeId>;
    /// Why a caller, who holds this noise key and shows this chain, is no member: the record that removed it, or who let
    /// it in. `None` for strangers.
    fn why_no_member(&self, caller: (&NodeId, &[u8; 32]), chain: &[u8]) -> Option<Vec<u8>>;
}

/// What [`super::Sessions`] wants done, or tells.
#[derive(Debug)]
pub enum SessionEvent {
    /// Send this datagram.
    Send {
        /// To there.
        to: SocketAddr,
        /// At most [`MAX_DATAGRAM`](crate::wire::MAX_DATAGRAM) octets.
        datagram: Vec<u8>,
    },
    /// We answered a handshake: datagrams for this transport's index may come. Open them, but send nothing through it.
    Accepting {
        /// With whom.
        peer: NodeId,
        /// What opens them.
        transport: Arc<Transport>,
    },
    /// Packets to this peer go through this transport from now on. Follows each renewal of keys too.
    Established {
        /// With whom.
        peer: NodeId,
        /// What seals and opens.
        transport: Arc<Transport>,
        /// The peer's generation, as proven in the handshake.
        generation: Generation,
    },
    /// Nothing comes for this index any more: forget its transport.
    Retired {
        /// Our index.
        local_index: u32,
    },
    /// Send packets for this peer there from now on.
    Path {
        /// Which peer.
        peer: NodeId,
        /// Where it was shown to be.
        addr: SocketAddr,
    },
    /// A control message came.
    Frame {
        /// From whom.
        peer: NodeId,
        /// What.
        message: Message,
    },
    /// A frame with inner packets was opened here, because it came before the carrier knew its session.
    Packet {
        /// From whom.
        peer: NodeId,
        /// [`FrameKind`](crate::wire::FrameKind).
        kind: u8,
        /// Its body.
        body: Vec<u8>,
    },
    /// Something authenticated came: evidence of life.
    Heard {
        /// From whom.
        peer: NodeId,
    },
    /// A round trip was measured.
    Rtt {
        /// With whom.
        peer: NodeId,
        /// Smoothed.
        rtt: Duration,
    },
    /// Keepalives go unanswered for more than a second.
    Silent {
        /// By whom.
        peer: NodeId,
    },
    /// It was silent and is back.
    Answering {
        /// Who.
        peer: NodeId,
    },
    /// The session is given up, or there never was one. The next message or packet tries again.
    Lost {
        /// With whom.
        peer: NodeId,
    },
    /// A peer tells why it makes no session with us.
    Refused {
        /// Who.
        peer: NodeId,
        /// Why.
        refusal: Refusal,
    },
    /// Two processes claim to be one start of one node: a disk or a memory image was copied.
    CloneSuspected {
        /// Which node.
        peer: NodeId,
    },
}

/// What there is to tell about one link with a session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// With whom.
    pub peer: NodeId,
    /// Where it is.
    pub path: Option<SocketAddr>,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// When the keys in use were agreed.
    pub established: Now,
    /// Its generation.
    pub generation: Generation,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Keys and counters.
    pub transport: Arc<Transport>,
    /// Does it owe us an answer?
    pub silent: bool,
}

impl SessionInfo {
    /// Age of the keys.
    pub fn handshake_age(&self, now: Now) -> Duration {
        now.since(self.established)
    }
}

/// An echo, inside the seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    Request(u64),
    Reply(u64),
}

impl Probe {
    pub(super) fn to_bytes(self) -> [u8; 9] {
        let (flag, nonce) = match self {
            Probe::Request(nonce) => (0, nonce),
            Probe::Reply(nonce) => (1, nonce),
        };
        let mut bytes = [flag; 9];
        bytes[1..].copy_from_slice(&nonce.to_le_bytes());
        bytes
    }

    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let (flag, rest) = body.split_first()?;
        let nonce = u64::from_le_bytes(*rest.first_chunk()?);
        match flag {
            0 => Some(Probe::Request(nonce)),
            1 => Some(Probe::Reply(nonce)),
            _ => None,
        }
    }
}
