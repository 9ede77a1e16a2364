//! One record of the roster: laid out by hand, signed by its issuer over `"weft roster 1"`, the cluster id (zeros in
//! the founding record, whose hash the id is) and all octets before the signature.
//!
//! | at | octets | what |
//! |---|---|---|
//! | 0 | 32 | issuer |
//! | 32 | 4 | index in the issuer's chain, big endian |
//! | 36 | 32 | SHA-256 of the issuer's record before; at the chain's start, of the record that admitted the issuer |
//! | 68 | 1 | kind |
//! | 69 | | body |
//! | end | 64 | signature |
//!
//! | kind | body |
//! |---|---|
//! | 1 found | as admit, of the issuer itself, then 16 random octets |
//! | 2 admit | node id 32, noise key 32, rights 2, length of the name 1, name |
//! | 3 revoke | node id 32, last valid sequence of its records 8, number of its valid roster records 4, hash of the last of them 32, voters 4 |
//! | 4 approve | hash of the revocation 32, voters 4 |
//! | 5 witness | hash of the revocation 32 |
//!
//! Who revokes and who approves says how many voters it knew besides the node that is revoked.

use crate::crypto::{self, sha256};
use crate::identity::Identity;
use crate::model::{ClusterId, Label, NodeId, NodeName};
use crate::record::be_u64;

use super::Rights;

/// Longest roster record, octets.
pub const MAX_LINK: usize = 300;

const TAG: &[u8] = b"weft roster 1";
const HEADER: usize = 69;
const SIGNATURE: usize = 64;

/// What a roster record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Found(Admission, [u8; 16]),
    Admit(Admission),
    Revoke(Revocation),
    Approve(Approval),
    Witness([u8; 32]),
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) id: NodeId,
    pub(crate) noise: [u8; 32],
    pub(crate) rights: Rights,
    pub(crate) name: NodeName,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revocation {
    pub(crate) id: NodeId,
    pub(crate) last_sequence: u64,
    pub(crate) tip: Tip,
    pub(crate) voters: u32,
}

/// The end of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tip {
    /// So many records.
    pub length: u32,
    /// The hash of the last of them; zeros if there is none.
    pub hash: [u8; 32],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Approval {
    pub(crate) revocation: [u8; 32],
    pub(crate) voters: u32,
}

/// A parsed roster record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) bytes: Vec<u8>,
    pub(crate) hash: [u8; 32],
    pub(crate) issuer: NodeId,
    pub(crate) index: u32,
    pub(crate) previous: [u8; 32],
    pub(crate) body: Body,
}

impl Link {
    /// Reads a record; the signature is not checked yet. `None` for what is no record at all. A body that this version
    /// can't read is [`Body::Unknown`].
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEADER + SIGNATURE || bytes.len() > MAX_LINK {
            return None;
        }
        let mut rest = bytes;
        let issuer = NodeId(take(&mut rest)?);
        let index = u32::from_be_bytes(take(&mut rest)?);
        let previous = take(&mut rest)?;
        let [kind] = take(&mut rest)?;
        let body = &rest[..rest.len() - SIGNATURE];
        Some(Self {
            bytes: bytes.to_vec(),
            hash: sha256(bytes),
            issuer,
            index,
            previous,
            body: Body::parse(kind, body).unwrap_or(Body::Unknown),
        })
    }

    /// Lays out and signs a record.
    pub(crate) fn sign(
        cluster: &ClusterId,
        identity: &Identity,
        index: u32,
        previous: [u8; 32],
        body: &Body,
    ) -> Self {
        let mut bytes = identity.id().0.to_vec();
        bytes.extend_from_slice(&index.to_be_bytes());
        bytes.extend_from_slice(&previous);
        body.write(&mut bytes);
        let signature = identity.sign(&signed_part(cluster, &bytes));
        bytes.extend_from_slice(&signature);
        let hash = sha256(&bytes);
        Self {
            bytes,
            hash,
            issuer: identity.id(),
            index,
            previous,
            body: body.clone(),
        }
    }

    pub(crate) fn verify(&self, cluster: &ClusterId) -> bool {
        let (body, signature) = self.bytes.split_at(self.bytes.len() - SIGNATURE);
        crypto::verify(&self.issuer, &signed_part(cluster, body), signature)
    }

    /// Is it the founding record of this cluster?
    pub(crate) fn is_founding(&self, cluster: &ClusterId) -> bool {
        self.index == 0 && matches!(self.body, Body::Found(..)) && self.hash[..16] == cluster.0
    }

    /// Enough of its hash to tell it from others.
    pub(crate) fn short_hash(&self) -> u64 {
        be_u64(&self.hash[..8])
    }

    /// The admission inside, if it is one.
    pub(crate) fn admission(&self) -> Option<&Admission> {
        match &self.body {
            Body::Found(admission, _) | Body::Admit(admission) => Some(admission),
            _ => None,
        }
    }

    /// The revocation that it approves, or says to have heard of while it counted, if it does.
    pub(crate) fn witnessed(&self) -> Option<&[u8; 32]> {
        match &self.body {
            Body::Approve(approval) => Some(&approval.revocation),
            Body::Witness(revocation) => Some(revocation),
            _ => None,
        }
    }

    /// Whom it revokes, if it does.
    pub(crate) fn revoked(&self) -> Option<NodeId> {
        match &self.body {
            Body::Revoke(revocation) => Some(revocation.id),
            _ => None,
        }
    }
}

impl Body {
    fn parse(kind: u8, mut rest: &[u8]) -> Option<Self> {
        let rest = &mut rest;
        let body = match kind {
            1 => Body::Found(Admission::read(rest)?, take(rest)?),
            2 => Body::Admit(Admission::read(rest)?),
            3 => Body::Revoke(Revocation {
                id: NodeId(take(rest)?),
                last_sequence: be_u64(&take::<8>(rest)?),
                tip: Tip {
                    length: u32::from_be_bytes(take(rest)?),
                    hash: take(rest)?,
                },
                voters: u32::from_be_bytes(take(rest)?),
            }),
            4 => Body::Approve(Approval {
                revocation: take(rest)?,
                voters: u32::from_be_bytes(take(rest)?),
            }),
            5 => Body::Witness(take(rest)?),
            _ => return None,
        };
        rest.is_empty().then_some(body)
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Body::Found(admission, nonce) => {
                out.push(1);
                admission.write(out);
                out.extend_from_slice(nonce);
            }
            Body::Admit(admission) => {
                out.push(2);
                admission.write(out);
            }
            Body::Revoke(revocation) => {
                out.push(3);
                out.extend_from_slice(&revocation.id.0);
                out.extend_from_slice(&revocation.last_sequence.to_be_bytes());
                out.extend_from_slice(&revocation.tip.length.to_be_bytes());
                out.extend_from_slice(&revocation.tip.hash);
                out.extend_from_slice(&revocation.voters.to_be_bytes());
            }
            Body::Approve(approval) => {
                out.push(4);
                out.extend_from_slice(&approval.revocation);
                out.extend_from_slice(&approval.voters.to_be_bytes());
            }
            Body::Witness(hash) => {
                out.push(5);
                out.extend_from_slice(hash);
            }
            // Only read, never written.
            Body::Unknown => out.push(0),
        }
    }
}

impl Admission {
    fn read(rest: &mut &[u8]) -> Option<Self> {
        let id = NodeId(take(rest)?);
        let noise = take(rest)?;
        let rights = Rights(u16::from_be_bytes(take(rest)?));
        let [len] = take(rest)?;
        let (name, after) = rest.split_at_checked(usize::from(len))?;
        *rest = after;
        let name = Label::parse(std::str::from_utf8(name).ok()?).ok()?;
        crypto::is_sound_noise_key(&noise).then_some(Self {
            id,
            noise,
            rights,
            name,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.noise);
        out.extend_from_slice(&self.rights.0.to_be_bytes());
        out.push(self.name.as_str().len() as u8);
        out.extend_from_slice(self.name.as_str().as_bytes());
    }
}

/// Parses a record and lays out what it said.
pub(crate) fn reencode(bytes: &[u8]) -> Option<Vec<u8>> {
    let link = Link::parse(bytes)?;
    if link.body == Body::Unknown {
        return Some(link.bytes);
    }
    let mut again = link.issuer.0.to_vec();
    again.extend_from_slice(&link.index.to_be_bytes());
    again.extend_from_slice(&link.previous);
    link.body.write(&mut again);
    again.extend_from_slice(&link.bytes[link.bytes.len() - SIGNATURE..]);
    Some(again)
}

/// The cluster id of a founding record.
pub(crate) fn cluster_of(founding: &Link) -> ClusterId {
    let mut id = [0; 16];
    id.copy_from_slice(&founding.hash[..16]);
    ClusterId(id)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn signed_part(cluster: &ClusterId, body: &[u8]) -> Vec<u8> {
    [TAG, cluster.0.as_slice(), body].concat()
}
