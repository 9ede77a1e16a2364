//! The two datagrams of a handshake between members: Noise IK under the roster's keys, wrapped in macs.
//!
//! ```text
//! A                                                  B
//! | init: index, {id, generation, counter, caps, chain} |
//! |---------------------------------------------------->| length, mac1, cookie under load, DH, roster, (generation, counter)
//! |             response: both indices, {caps, generation}|
//! |<----------------------------------------------------| may open now, sends nothing yet
//! |                        or: why not (`Refusal`)      | there is no session
//! | data: a probe                                       |
//! |---------------------------------------------------->| sends from now on
//! ```
//!
//! A first message can be replayed (Noise §7.7, payload security property 1 to 2), hence the pair (generation, counter),
//! which must rise, and the session that counts only once its first datagram came. There is no clock in it: a host whose
//! clock was set back is not locked out.

use serde::{Deserialize, Serialize};

use super::cookie::{Cookie, MACS, MacKeys, index_at};
use super::drops::DropReason;
use super::noise::{FIRST_OVERHEAD, Noise, Terms};
use super::transport::TransportKeys;
use crate::crypto::{Cipher, Random};
use crate::identity::Identity;
use crate::model::{ClusterId, Generation, NodeId};
use crate::wire::{self, DatagramType, VERSION};

/// What a node can do, told in both directions. Bits that a version does not know it ignores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Highest protocol version.
    pub version: u8,
    /// The AEAD it would rather use.
    pub cipher: Cipher,
    /// Kinds of frame it understands: bit n is kind n + 1.
    pub framing: u16,
    /// Its own configuration lists trusted subnets: between which addresses it takes plain VXLAN it says in the session.
    pub plain_vxlan: bool,
    /// Its kernel has ESP and it was told to use it.
    pub esp: bool,
    /// It relays for others.
    pub relay: bool,
}

impl Capabilities {
    /// Packets and bundles, nothing beyond.
    pub fn new(cipher: Cipher) -> Self {
        Self {
            version: VERSION,
            cipher,
            framing: 0b11,
            plain_vxlan: false,
            esp: false,
            relay: false,
        }
    }

    /// The AEAD of a session between two: AES only where both sides are fast with it.
    pub fn agree(&self, other: &Self) -> Cipher {
        match (self.cipher, other.cipher) {
            (Cipher::Aes256Gcm, Cipher::Aes256Gcm) => Cipher::Aes256Gcm,
            _ => Cipher::ChaCha20Poly1305,
        }
    }
}

/// What the caller says of itself, under the seal of the first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InitPayload {
    pub(super) node: NodeId,
    pub(super) generation: Generation,
    /// Rises with every first message of a generation.
    pub(super) counter: u64,
    /// Drawn at each start: two of them under one generation are two copies of one disk.
    pub(super) instance: u64,
    pub(super) capabilities: Capabilities,
    /// How it came to be a member, for who has not heard yet.
    pub(super) chain: Vec<u8>,
    /// For later versions.
    pub(super) extra: Vec<u8>,
}

/// Why there is no session. Only who called can read it, and only who was called can have said it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The caller was heard in a later start than the one it calls in: it came out of a backup and its clock is behind, or
    /// it runs twice.
    Outdated(Generation),
    /// A roster record that shows why the caller is no member: the one that removed it, or who let it in; or the one that
    /// stands here in place of one that the caller showed. As a handshake shows a chain: each record behind its length of
    /// two octets, the admissions that lead to its issuer first.
    NoMember(Vec<u8>),
}

/// What the called one says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResponsePayload {
    pub(super) generation: Generation,
    pub(super) instance: u64,
    pub(super) capabilities: Capabilities,
    pub(super) refusal: Option<Refusal>,
    /// For later versions.
    pub(super) extra: Vec<u8>,
}

/// What all handshakes of a node have in common.
pub(super) struct Context {
    pub(super) identity: Identity,
    pub(super) macs: MacKeys,
    pub(super) prologue: Vec<u8>,
}

/// A first message on its way.
pub(super) struct Called {
    pub(super) noise: Noise,
    pub(super) datagram: Vec<u8>,
    pub(super) mac1: [u8; 16],
}

/// A first message that arrived and decrypted; nothing in it is checked yet but the hold on its static key.
pub(super) struct Arrived {
    pub(super) index: u32,
    pub(super) noise_key: [u8; 32],
    pub(super) payload: InitPayload,
    noise: Noise,
}

impl Context {
    pub(super) fn new(identity: Identity, cluster: &ClusterId, macs: MacKeys) -> Self {
        let mut prologue = b"weft session ".to_vec();
        prologue.push(VERSION);
        prologue.extend_from_slice(&cluster.0);
        Self {
            identity,
            macs,
            prologue,
        }
    }

    fn terms(&self) -> Terms<'_> {
        Terms {
            identity: &self.identity,
            prologue: &self.prologue,
            psk: None,
        }
    }

    /// Makes a first message with this index, of at most so many octets. A chain too long for that is left out: the other
    /// side may know us already.
    pub(super) fn call(
        &self,
        noise_key: &[u8; 32],
        (index, most): (u32, usize),
        payload: &mut InitPayload,
        cookie: Option<&Cookie>,
        random: &mut Random,
    ) -> Option<Called> {
        let mut noise = Noise::initiator(&self.terms(), noise_key, random).ok()?;
        let mut inside = wire::encode(payload);
        if 8 + FIRST_OVERHEAD + inside.len() + MACS > most {
            payload.chain.clear();
            inside = wire::encode(payload);
        }
        let mut datagram = DatagramType::Init.head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        datagram.extend_from_slice(&noise.write(&inside).ok()?);
        let mac1 = self.macs.finish(&mut datagram, cookie);
        Some(Called {
            noise,
            datagram,
            mac1,
        })
    }

    /// Reads a first message behind its macs.
    pub(super) fn read_call(
        &self,
        body: &[u8],
        random: &mut Random,
    ) -> Result<Arrived, DropReason> {
        let index = index_at(body, 4).ok_or(DropReason::Malformed)?;
        let mut noise =
            Noise::responder(&self.terms(), random).map_err(|_| DropReason::BadHandshake)?;
        let inside = noise
            .read(&body[8..])
            .map_err(|_| DropReason::BadHandshake)?;
        let payload = wire::decode(&inside).map_err(|_| DropReason::BadHandshake)?;
        let noise_key = noise.remote_static().ok_or(DropReason::BadHandshake)?;
        Ok(Arrived {
            index,
            noise_key,
            payload,
            noise,
        })
    }

    /// Answers it.
    pub(super) fn answer(
        &self,
        arrived: Arrived,
        index: u32,
        payload: &ResponsePayload,
    ) -> Option<(Vec<u8>, TransportKeys)> {
        let mut noise = arrived.noise;
        let mut datagram = DatagramType::Response.head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        datagram.extend_from_slice(&arrived.index.to_le_bytes());
        datagram.extend_from_slice(&noise.write(&wire::encode(payload)).ok()?);
        self.macs.finish(&mut datagram, None);
        let cipher = payload.capabilities.agree(&arrived.payload.capabilities);
        Some((datagram, noise.into_keys(cipher)))
    }
}

/// Reads an answer behind its macs: their index and what they say.
pub(super) fn read_answer(
    noise: &mut Noise,
    body: &[u8],
) -> Result<(u32, ResponsePayload), DropReason> {
    let index = index_at(body, 4).ok_or(DropReason::Malformed)?;
    let message = body.get(12..).ok_or(DropReason::Malformed)?;
    let inside = noise.read(message).map_err(|_| DropReason::BadHandshake)?;
    let payload = wire::decode(&inside).map_err(|_| DropReason::BadHandshake)?;
    Ok((index, payload))
}
