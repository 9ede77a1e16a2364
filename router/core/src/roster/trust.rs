//! What sessions ask of the roster: who is a member, and the chains that handshakes show.

use super::link::{Body, Link};
use super::{MAX_CHAIN, Rights, Roster, Standing, Tip};
use crate::model::NodeId;
use crate::session::Trust;
use crate::store::Batch;

/// What a record says that removes a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Who goes.
    pub subject: NodeId,
    /// Who says so.
    pub by: NodeId,
    /// The end of the subject's chain of roster records, as far as it counts.
    pub tip: Tip,
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

    /// Reads what a refusal shows ([`Trust::why_no_member`]): the record, whose issuer may be known from now on.
    pub fn read_refusal(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let record = split_records(bytes, MAX_CHAIN + 1)?.pop()?;
        let before = bytes.len().checked_sub(record.len() + 2)?;
        self.learn_chain(&bytes[..before]);
        Some(record.to_vec())
    }

    /// A record, behind the chain of its issuer: whoever is shown it may not know that one.
    fn shown(&self, record: &[u8]) -> Vec<u8> {
        let issuer = Link::parse(record).map(|link| link.issuer);
        let mut bytes = issuer.map_or_else(Vec::new, |issuer| self.admit_chain(&issuer));
        put_record(&mut bytes, record);
        bytes
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
            tip: revocation.tip,
        })
    }

    /// Is a node no member once this counts: is it the one that goes, or was it, or who let it in, let in by that one
    /// without the others' knowledge?
    pub fn is_void_by(&self, removal: &Removal, id: &NodeId) -> bool {
        let end = self.common_with(&removal.subject, removal.tip);
        let mut at = *id;
        while let Some(member) = self.verdict.admitted.get(&at).filter(|m| m.depth > 0) {
            let (by, index) = member.admitted_by;
            if by == removal.subject && index >= end {
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

    /// The admissions that lead from the founder to `id`, nearest to the founder first; the last [`MAX_CHAIN`] where there are
    /// more: whoever knows the first one's issuer can see why `id` is a member, or is none any more. Empty for the founder.
    pub fn chain_of(&self, id: &NodeId) -> Vec<&[u8]> {
        let mut chain = Vec::new();
        let mut at = *id;
        while chain.len() < MAX_CHAIN {
            // Whom a removed node let in before is a member all the same.
            let Some(member) = self.verdict.admitted.get(&at).filter(|m| m.depth > 0) else {
                break;
            };
            let (issuer, index) = member.admitted_by;
            let Some(link) = self.link(&issuer, index) else {
                return Vec::new();
            };
            chain.push(link.bytes.as_slice());
            at = issuer;
        }
        chain.reverse();
        chain
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

    pub(super) fn remember(&mut self, links: Vec<Link>) {
        for link in links {
            let place = (link.issuer, link.index);
            if self.link(&place.0, place.1).is_none() && self.loose.len() < MAX_LOOSE {
                self.loose.insert(place, link);
            }
        }
        self.judge();
    }

    /// Has a chain that a handshake showed changed something, since this was asked last? It may let in others on its way,
    /// whose removals count then; or show that the other branch of a fork is the right one. What is to be written.
    pub fn take_news(&mut self) -> Option<Batch> {
        let is_news = std::mem::take(&mut self.is_news) || self.is_astray();
        is_news.then(|| self.follow_removers())
    }
}

impl Trust for Roster {
    fn is_member(&self, id: &NodeId) -> bool {
        self.member(id).is_some()
    }

    fn may_relay(&self, id: &NodeId) -> bool {
        self.rights_of(id).has(Rights::RELAY)
    }

    fn admit_chain(&self, id: &NodeId) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.chain_of(id)
            .into_iter()
            .for_each(|link| put_record(&mut bytes, link));
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
        let before = (self.loose.clone(), self.verdict.clone());
        if !forked.is_empty() {
            for link in forked {
                self.check_fork(link);
            }
            self.is_news |= self.verdict != before.1;
            return None;
        }
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
            return Some(self.shown(self.revocation(caller)?));
        }
        let links = split_chain(chain)?;
        let subject = links.last()?.admission()?;
        if subject.id != *caller || subject.noise != *noise || !self.leads_here(&links) {
            return None;
        }
        // Of those who let it in several may have been removed, most of them after that.
        let is_void = |link: &&Link| {
            let removed = self.verdict.revoked.get(&link.issuer);
            removed.is_some_and(|r| r.valid_links <= link.index || self.branch_off(link).is_some())
        };
        if let Some(void) = links.iter().find(is_void) {
            return Some(self.shown(self.revocation(&void.issuer)?));
        }
        let other = links.iter().find_map(|link| self.branch_off(link));
        other.map(|link| self.shown(&link.bytes))
    }
}

fn put_record(bytes: &mut Vec<u8>, record: &[u8]) {
    bytes.extend_from_slice(&(record.len() as u16).to_be_bytes());
    bytes.extend_from_slice(record);
}

fn split_chain(bytes: &[u8]) -> Option<Vec<Link>> {
    split_records(bytes, MAX_CHAIN)?
        .into_iter()
        .map(Link::parse)
        .collect()
}

fn split_records(mut bytes: &[u8], most: usize) -> Option<Vec<&[u8]>> {
    let mut records = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (record, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        if records.len() == most {
            return None;
        }
        records.push(record);
        bytes = rest;
    }
    (bytes.is_empty() && !records.is_empty()).then_some(records)
}
