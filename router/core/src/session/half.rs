//! Half a handshake whose sealed octets the caller chooses. Behind [`crate::fuzz`], which alone may use it.

use super::cookie::{MacKeys, index_at};
use super::handshake::Context;
use super::join;
use super::noise::{Noise, Terms};
use super::transport::Transport;
use crate::crypto::{Cipher, Random, Secret};
use crate::identity::Identity;
use crate::model::{ClusterId, NodeId};
use crate::token::{Token, secret_of};
use crate::wire::DatagramType;

/// What the two ends must agree on.
pub enum Between<'a> {
    /// Members of this cluster, who hold this secret.
    Members(ClusterId, &'a Secret<32>),
    /// A joiner with this invitation, and a member of its cluster.
    Joiner(&'a Token),
    /// The same, with any octets in place of the signed invitation; the cluster's secret makes them the right ones.
    Forged(ClusterId, &'a Secret<32>, &'a [u8]),
}

/// One side of it.
pub struct Half {
    noise: Noise,
    macs: MacKeys,
    types: [DatagramType; 2],
    theirs: u32,
}

/// How it ended.
pub struct Through {
    /// What the other side had sealed.
    pub inside: Vec<u8>,
    /// The session.
    pub transport: Transport,
    /// The hash over both messages.
    pub hash: Vec<u8>,
}

struct Deal<'a> {
    prologue: Vec<u8>,
    psk: Option<Secret<32>>,
    macs: MacKeys,
    clear: Option<&'a [u8]>,
    types: [DatagramType; 2],
}

impl<'a> Between<'a> {
    fn deal(&self, identity: &Identity) -> Deal<'a> {
        let members = [DatagramType::Init, DatagramType::Response];
        let joining = [DatagramType::JoinInit, DatagramType::JoinResponse];
        let with_secret = |cluster: &ClusterId, secret: Secret<32>, signed| Deal {
            prologue: join::prologue(cluster),
            macs: MacKeys::new(&secret),
            psk: Some(secret),
            clear: Some(signed),
            types: joining,
        };
        match self {
            Between::Members(cluster, secret) => Deal {
                prologue: Context::new(identity.clone(), cluster, MacKeys::new(secret)).prologue,
                psk: None,
                macs: MacKeys::new(secret),
                clear: None,
                types: members,
            },
            Between::Joiner(token) => with_secret(
                &token.body().cluster,
                token.secret().clone(),
                token.signed(),
            ),
            Between::Forged(cluster, secret, signed) => {
                with_secret(cluster, secret_of(secret, signed), signed)
            }
        }
    }
}

impl Half {
    /// Calls the holder of `to`: the datagram with `inside` under its seal. `None` for more than a message can hold.
    pub fn call(
        between: &Between<'_>,
        identity: &Identity,
        to: &[u8; 32],
        index: u32,
        inside: &[u8],
        random: &mut Random,
    ) -> Option<(Self, Vec<u8>)> {
        let deal = between.deal(identity);
        let terms = Terms {
            identity,
            prologue: &deal.prologue,
            psk: deal.psk.as_ref(),
        };
        let mut noise = Noise::initiator(&terms, to, random).ok()?;
        let mut datagram = deal.types[0].head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        if let Some(clear) = deal.clear {
            datagram.extend_from_slice(&u16::try_from(clear.len()).ok()?.to_le_bytes());
            datagram.extend_from_slice(clear);
        }
        datagram.extend_from_slice(&noise.write(inside).ok()?);
        deal.macs.finish(&mut datagram, None);
        let half = Self {
            noise,
            macs: deal.macs,
            types: deal.types,
            theirs: 0,
        };
        Some((half, datagram))
    }

    /// Hears such a call: what was sealed in it.
    pub fn hear(
        between: &Between<'_>,
        identity: &Identity,
        datagram: &[u8],
        random: &mut Random,
    ) -> Option<(Self, Vec<u8>)> {
        let deal = between.deal(identity);
        let checked = deal.macs.check(datagram).ok()?;
        let clear = deal.clear.map_or(0, |clear| 2 + clear.len());
        let terms = Terms {
            identity,
            prologue: &deal.prologue,
            psk: deal.psk.as_ref(),
        };
        let mut noise = Noise::responder(&terms, random).ok()?;
        let inside = noise.read(checked.body.get(8 + clear..)?).ok()?;
        let half = Self {
            noise,
            theirs: index_at(datagram, 4)?,
            macs: deal.macs,
            types: deal.types,
        };
        Some((half, inside))
    }

    /// Answers it: the datagram, and the session that `peer` has if it takes it.
    pub fn answer(
        mut self,
        peer: NodeId,
        index: u32,
        inside: &[u8],
        cipher: Cipher,
    ) -> Option<(Vec<u8>, Through)> {
        let mut datagram = self.types[1].head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        datagram.extend_from_slice(&self.theirs.to_le_bytes());
        datagram.extend_from_slice(&self.noise.write(inside).ok()?);
        self.macs.finish(&mut datagram, None);
        let remote = self.theirs;
        Some((
            datagram,
            self.through(Vec::new(), (peer, index, remote), cipher),
        ))
    }

    /// Takes the answer to its call.
    pub fn finish(mut self, peer: NodeId, datagram: &[u8], cipher: Cipher) -> Option<Through> {
        let checked = self.macs.check(datagram).ok()?;
        let inside = self.noise.read(checked.body.get(12..)?).ok()?;
        let (remote, index) = (index_at(datagram, 4)?, index_at(datagram, 8)?);
        Some(self.through(inside, (peer, index, remote), cipher))
    }

    fn through(self, inside: Vec<u8>, ends: (NodeId, u32, u32), cipher: Cipher) -> Through {
        let hash = self.noise.hash();
        let keys = self.noise.into_keys(cipher);
        Through {
            inside,
            transport: Transport::new(ends.0, ends.1, ends.2, &keys),
            hash,
        }
    }
}
