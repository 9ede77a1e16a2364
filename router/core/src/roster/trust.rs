//! What sessions ask of the roster: who is a member, and the chains that handshakes show.

use super::link::{Body, Link};
use super::{MAX_CHAIN, Roster};
use crate::model::NodeId;
use crate::session::Trust;

/// Admissions known from handshakes only.
const MAX_LOOSE: usize = 64;

impl Roster {
    /// The admissions that lead from the founder to `id`, nearest to the founder first; empty for the founder, and where
    /// there are more than [`MAX_CHAIN`].
    pub fn chain_of(&self, id: &NodeId) -> Vec<&[u8]> {
        let mut chain = Vec::new();
        let mut at = *id;
        while let Some(member) = self.member(&at).filter(|m| m.depth > 0) {
            let (issuer, index) = member.admitted_by;
            let Some(link) = self.link(&issuer, index) else {
                return Vec::new();
            };
            chain.push(link.bytes.as_slice());
            at = issuer;
        }
        chain.reverse();
        if chain.len() > MAX_CHAIN {
            Vec::new()
        } else {
            chain
        }
    }

    pub(super) fn remember(&mut self, links: Vec<Link>) {
        for link in links {
            let place = (link.issuer, link.index);
            if self.link(&place.0, place.1).is_none() && self.loose.len() < MAX_LOOSE {
                self.loose.insert(place, link);
            }
        }
        self.judge();
    }
}

impl Trust for Roster {
    fn is_member(&self, id: &NodeId) -> bool {
        self.member(id).is_some()
    }

    fn admit_chain(&self, id: &NodeId) -> Vec<u8> {
        let mut bytes = Vec::new();
        for link in self.chain_of(id) {
            bytes.extend_from_slice(&(link.len() as u16).to_be_bytes());
            bytes.extend_from_slice(link);
        }
        bytes
    }

    fn noise_key(&self, id: &NodeId) -> Option<[u8; 32]> {
        self.member(id).map(|m| m.noise)
    }

    /// Remembers the records until they come in their order.
    fn learn_chain(&mut self, bytes: &[u8]) -> Option<NodeId> {
        let links = split_chain(bytes)?;
        let subject = links.last()?.admission()?.id;
        if self.is_member(&subject) {
            return Some(subject);
        }
        let mut issuer = self.member(&links[0].issuer)?.id;
        for link in &links {
            let Body::Admit(admission) = &link.body else {
                return None;
            };
            if link.issuer != issuer
                || !link.verify(&self.cluster)
                || self.has_other_keys(admission)
            {
                return None;
            }
            issuer = admission.id;
        }
        let before = self.loose.clone();
        self.remember(links);
        if self.is_member(&subject) {
            return Some(subject);
        }
        self.loose = before;
        self.judge();
        None
    }
}

fn split_chain(mut bytes: &[u8]) -> Option<Vec<Link>> {
    let mut links = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (link, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        if links.len() == MAX_CHAIN {
            return None;
        }
        links.push(Link::parse(link)?);
        bytes = rest;
    }
    (bytes.is_empty() && !links.is_empty()).then_some(links)
}
