//! What goes into [`super::Sessions`] besides datagrams, and what comes out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::handshake::{Capabilities, Refusal};
use super::transport::Transport;
use crate::crypto::{Cipher, Secret};
use crate::model::{ClusterId, Generation, NodeId, Now};
use crate::path::Path;
use crate::underlay::UnderlayAddr;
use crate::wire::{ECHO_REPLY, ECHO_REQUEST, Message};

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
    /// Readiness to relay.
    pub relay: bool,
    /// Networks of the underlay that this host trusts: paths in them go before all others, and plain VXLAN may go there.
    pub trusted_subnets: Vec<IpNet>,
    /// Readiness for ESP.
    pub esp: bool,
}

/// What the roster knows, and sessions need to.
pub trait Trust {
    /// The X25519 key that was admitted with a node.
    fn noise_key(&self, id: &NodeId) -> Option<[u8; 32]>;
    /// Admitted and not revoked?
    fn is_member(&self, id: &NodeId) -> bool;
    /// A member that may stand between others?
    fn may_relay(&self, id: &NodeId) -> bool;
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
        to: UnderlayAddr,
        /// At most [`MAX_DATAGRAM`](crate::wire::MAX_DATAGRAM) octets.
        datagram: Vec<u8>,
    },
    /// Give this datagram to a member that is to pass it on: hand it to [`super::Sessions::relay`].
    Relay {
        /// Which member.
        by: NodeId,
        /// Whom it is for.
        to: NodeId,
        /// As long as the path takes it; at most [`MAX_RELAYED`](crate::wire::MAX_RELAYED) octets but for echoes that are to
        /// find that out.
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
        path: Path,
    },
    /// The path to a peer takes other packets than before: see [`SessionInfo::mtu`].
    Mtu {
        /// Which peer.
        peer: NodeId,
    },
    /// A peer sees this host there.
    SeenAt {
        /// Which peer.
        peer: NodeId,
        /// This host's address as it arrives: a NAT's, where there is one.
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

impl SessionEvent {
    /// The effect that carries `datagram` to `peer` along `path`.
    pub(super) fn send(path: Path, peer: NodeId, datagram: Vec<u8>) -> Self {
        match path {
            Path::Direct(to) => SessionEvent::Send { to, datagram },
            Path::Relayed(by) => SessionEvent::Relay {
                by,
                to: peer,
                datagram,
            },
        }
    }
}

/// What there is to tell about one link with a session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// With whom.
    pub peer: NodeId,
    /// How it is reached.
    pub path: Option<Path>,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// The largest inner packet that the path takes, octets; `None` before the kernel has said what it sends there.
    pub mtu: Option<u16>,
    /// The largest IP packet that it takes.
    pub path_mtu: Option<u16>,
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
    /// With where the request came from by UDP, unless somebody was between.
    Reply(u64, Option<SocketAddr>),
}

impl Probe {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let (flag, nonce, seen) = match self {
            Probe::Request(nonce) => (ECHO_REQUEST, nonce, None),
            Probe::Reply(nonce, seen) => (ECHO_REPLY, nonce, seen),
        };
        let mut bytes = vec![flag];
        bytes.extend_from_slice(&nonce.to_le_bytes());
        if let Some(addr) = seen {
            bytes.extend_from_slice(&addr.port().to_le_bytes());
            match addr.ip() {
                IpAddr::V4(ip) => bytes.extend_from_slice(&ip.octets()),
                IpAddr::V6(ip) => bytes.extend_from_slice(&ip.octets()),
            }
        }
        bytes
    }

    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let (flag, rest) = body.split_first()?;
        let (nonce, rest) = rest.split_first_chunk()?;
        let nonce = u64::from_le_bytes(*nonce);
        match *flag {
            ECHO_REQUEST => Some(Probe::Request(nonce)),
            ECHO_REPLY => Some(Probe::Reply(nonce, seen(rest))),
            _ => None,
        }
    }
}

/// Port and address: 6 octets for IPv4, 18 for IPv6. Anything else says nothing.
fn seen(bytes: &[u8]) -> Option<SocketAddr> {
    let (port, ip) = bytes.split_first_chunk()?;
    let ip = match ip.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(ip).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_le_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echoes_survive_the_wire_and_padding_means_nothing() {
        let addr = |text: &str| Some(text.parse().unwrap());
        for probe in [
            Probe::Request(7),
            Probe::Reply(u64::MAX, None),
            Probe::Reply(1, addr("192.0.2.1:6783")),
            Probe::Reply(1, addr("[2001:db8::1]:1")),
        ] {
            assert_eq!(Probe::parse(&probe.to_bytes()), Some(probe));
        }
        let mut padded = Probe::Request(7).to_bytes();
        padded.resize(1400, 0);
        assert_eq!(Probe::parse(&padded), Some(Probe::Request(7)));
        assert_eq!(Probe::parse(&[]), None);
        assert_eq!(Probe::parse(&[2; 9]), None);
    }
}
