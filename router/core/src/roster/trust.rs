//! What sessions ask of the roster: who is a member, and the chains that handshakes show.

use super::link::{Body, Link};
use super::{MAX_CHAIN, Rights, Roster, Standing};
use crate::model::NodeId;
use crate::session::Trust;

/// What a record says that removes a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Who goes.
    pub subject: NodeId,
    /// Who says so.
    pub by: NodeId,
    /// So many of the subject's roster records count.
    pub valid_links: u32,
}

/// Admissions known from handshakes only.
const MAX_LOOSE: usize = 64;

impl Roster {
    /// Was `id`, to whom `giver` gave something, never let in by a record that counts, and never will be? It may be known from
    /// handshakes only, and after a start from nothing: so not without a sign. Its admission is here and does not count;
    /// or its giver was removed, and whom that one let in is known.
    pub fn never_came_in(&self, id: &NodeId, giver: &NodeId) -> bool {
        let is_gone = || self.verdict.revoked.contains_key(giver);
        self.standing(id) == Standing::Unknown
            && (self.admitter_of(id).is_some() || is_gone() && self.knows_whom_it_let_in(giver))
    }

    /// What a record says that removes a node, if it is a member's word, whether or not it can be taken now: the records
    /// of its issuer before it may not be known.
    pub fn removal_in(&self, record: &[u8]) -> Option<Removal> {
        let link = Link::parse(record)?;
        let Body::Revoke(revocation) = &link.body else {
            return None;
        };
        let (subject, by) = (revocation.id, link.issuer);
        let may = self.rights_of(&by).has(Rights::REVOKE) || subject == by;
        (may && link.verify(&self.cluster)).then_some(Removal {
            subject,
            by,
            valid_links: revocation.valid_links,
        })
    }

    /// Is a node no member once this counts: is it the one that goes, or was it, or who let it in, let in by that one
    /// without the others' knowledge?
    pub fn is_void_by(&self, removal: &Removal, id: &NodeId) -> bool {
        let mut at = *id;
        while let Some(member) = self.verdict.admitted.get(&at).filter(|m| m.depth > 0) {
            let (by, index) = member.admitted_by;
            if by == removal.subject && index >= removal.valid_links {
                return true;
            }
            at = by;
        }
        *id == removal.subject
    }

    /// Who let a node in, who let that one in, and so on, whether or not that counts.
    pub(super) fn admitters_of(&self, id: &NodeId) -> Vec<NodeId> {
        let mut admitters = Vec::new();
        let mut at = *id;
        while let Some(admitter) = self.admitter_of(&at).filter(|a| !admitters.contains(a)) {
            admitters.push(admitter);
            at = admitter;
        }
        admitters
    }

    /// Whose removal made a node no member that is none: its own, or that of the nearest of those who let it in.
    pub fn removed_above(&self, id: &NodeId) -> Option<NodeId> {
        let mut all = std::iter::once(*id).chain(self.admitters_of(id));
        all.find(|id| self.verdict.revoked.contains_key(id))
    }

    fn admitter_of(&self, id: &NodeId) -> Option<NodeId> {
        let mut links = self.chains.values().flatten();
        let admits = |link: &&Link| link.admission().is_some_and(|a| a.id == *id);
        links.find(admits).map(|link| link.issuer)
    }

    /// The admissions that lead from the founder to `id`, nearest to the founder first; empty for the founder, and where
    /// there are more than [`MAX_CHAIN`].
    pub fn chain_of(&self, id: &NodeId) -> Vec<&[u8]> {
        let mut chain = Vec::new();
        let mut at = *id;
        // Whom a removed node let in before is a member all the same.
        while let Some(member) = self.verdict.admitted.get(&at).filter(|m| m.depth > 0) {
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

    /// Is it a chain of signed admissions that begins with one by somebody known, be it a removed one?
    fn leads_here(&self, links: &[Link]) -> bool {
        let mut issuer = links[0].issuer;
        self.verdict.admitted.contains_key(&issuer)
            && links.iter().all(|link| {
                let Body::Admit(admission) = &link.body else {
                    return false;
                };
                let follows = link.issuer == std::mem::replace(&mut issuer, admission.id);
                follows && link.verify(&self.cluster) && !self.has_other_keys(admission)
            })
    }

    /// Has a chain that a handshake showed changed who is a member, since this was asked last? It may let in others on its
    /// way, whose removals count then.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.is_news)
    }

    /// The record that stands here where another chain has this one.
    fn branch_off(&self, link: &Link) -> Option<&Link> {
        let chain = self.chains.get(&link.issuer)?;
        let held = chain.get(link.index as usize)?;
        (held.hash != link.hash).then_some(held)
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
        if !self.leads_here(&links) {
            return None;
        }
        let forked: Vec<&Link> = links
            .iter()
            .filter(|l| self.branch_off(l).is_some())
            .collect();
        if !forked.is_empty() {
            for link in forked {
                self.check_fork(link);
            }
            return None;
        }
        let before = (self.loose.clone(), self.verdict.clone());
        self.remember(links);
        if self.is_member(&subject) {
            self.is_news |= self.verdict != before.1;
            return Some(subject);
        }
        (self.loose, self.verdict) = before;
        None
    }

    fn why_no_member(
        &self,
        (caller, noise): (&NodeId, &[u8; 32]),
        chain: &[u8],
    ) -> Option<Vec<u8>> {
        let known = self.verdict.admitted.get(caller);
        if known.is_some_and(|keys| keys.noise == *noise) {
            return self.revocation(caller).map(<[u8]>::to_vec);
        }
        let links = split_chain(chain)?;
        let subject = links.last()?.admission()?;
        if subject.id != *caller || subject.noise != *noise || !self.leads_here(&links) {
            return None;
        }
        // Of those who let it in several may have been removed, most of them after that.
        let is_void = |link: &&Link| {
            let removed = self.verdict.revoked.get(&link.issuer);
            removed.is_some_and(|r| r.valid_links <= link.index)
        };
        if let Some(void) = links.iter().find(is_void) {
            return self.revocation(&void.issuer).map(<[u8]>::to_vec);
        }
        let other = links.iter().find_map(|link| self.branch_off(link));
        other.map(|link| link.bytes.clone())
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
