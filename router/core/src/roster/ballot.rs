//! Who approves a revocation.
//!
//! INVARIANT: what has its majority keeps it, whatever admissions and approvals are heard of later. So nobody counts the
//! voters that there are now: each who approves says how many it knew, and of those who knew at most `n` more than `n / 2`
//! must agree. Else the newcomers of one side of a split would bring back whom the other side removed.

use std::collections::BTreeMap;

use crate::model::NodeId;
use crate::mutation::{self, Mutation};

use super::Rights;
use super::link::{Body, Link, Revocation};
use super::verdict::{Ends, Links, MemberKeys, Revocations, admit, ends_of};

/// What others say about revocations.
pub(super) struct Ballot<'a> {
    founder: &'a NodeId,
    links: &'a Links<'a>,
    /// Where the chains of removed nodes end.
    ends: Ends,
    /// Members, and those that were some before they were removed.
    voters: BTreeMap<NodeId, MemberKeys>,
    can_witness: bool,
}

/// One voter's word: where it stands in the voter's chain, and how many voters it knew besides the node that goes.
struct Word {
    index: u32,
    voters: u32,
}

impl<'a> Ballot<'a> {
    /// What those said who are `gone` counts as far as their chains do. As long as that is not known nobody witnesses.
    pub(super) fn new(
        founder: &'a NodeId,
        links: &'a Links<'a>,
        gone: Option<&Revocations>,
    ) -> Self {
        let mut voters = admit(founder, links, &gone.map(ends_of).unwrap_or_default());
        voters.retain(|_, member| member.rights.has(Rights::VOTE));
        Self {
            founder,
            links,
            ends: gone.map(words_of).unwrap_or_default(),
            voters,
            can_witness: gone.is_some() && !mutation::is_on(Mutation::ForgetWitnesses),
        }
    }

    /// Has another voter heard of this revocation while it counted? Its issuer may have been removed since by somebody who
    /// had not.
    pub(super) fn is_witnessed(&self, link: &Link) -> bool {
        let others = self.links.values().filter(|l| l.issuer != link.issuer);
        let mut witnesses = others.filter(|l| l.witnessed() == Some(&link.hash));
        self.can_witness && witnesses.any(|l| self.counts(l))
    }

    /// Does a revocation have its majority? It does, too, where nobody but its issuer could approve it; those who are
    /// `revoked` can't.
    pub(super) fn is_approved(
        &self,
        (link, revocation): (&Link, &Revocation),
        revoked: &Revocations,
    ) -> bool {
        let issuer = link.issuer;
        let mut words = self.words_on((link, revocation));
        // Whom one of them let in afterwards has no word in it: a newcomer decides nothing about what went before.
        let ends: Ends = words.iter().map(|(id, word)| (*id, word.index)).collect();
        let old = admit(self.founder, self.links, &ends);
        words.retain(|id, _| old.contains_key(id));
        if mutation::is_on(Mutation::CountThePresent) {
            return words.len() * 2 > self.voters.len();
        }
        let mut able = self.able(&ends, revoked);
        able.retain(|id, _| *id != issuer && *id != revocation.id);
        // A stolen key can let its own voters in: they agree to nothing that it does.
        let mut outside = ends;
        outside.insert(issuer, 0);
        let outsiders = admit(self.founder, self.links, &outside);
        if able.keys().any(|id| outsiders.contains_key(id)) {
            words.retain(|id, _| *id == issuer || outsiders.contains_key(id));
            return has_majority(&words, 0);
        }
        // All were let in by the issuer or by others whom it let in. Those whom it let in itself it knew.
        let children = able.values().filter(|m| m.admitted_by.0 == issuer);
        able.is_empty() || has_majority(&words, children.count() + 1)
    }

    /// Voters that can still say something, where chains end at `ends` and where the `revoked` ones' do.
    fn able(&self, ends: &Ends, revoked: &Revocations) -> BTreeMap<NodeId, MemberKeys> {
        let mut ends = ends.clone();
        for (id, end) in ends_of(revoked) {
            let before = ends.entry(id).or_insert(end);
            *before = end.min(*before);
        }
        let mut able = admit(self.founder, self.links, &ends);
        able.retain(|id, member| member.rights.has(Rights::VOTE) && !revoked.contains_key(id));
        able
    }

    /// Who approves: the issuer, those who say so, and those who revoked the same node.
    fn words_on(&self, (link, revocation): (&Link, &Revocation)) -> BTreeMap<NodeId, Word> {
        let mut words = BTreeMap::new();
        for said in self.links.values().filter(|said| self.counts(said)) {
            let voters = match &said.body {
                Body::Approve(a) if a.revocation == link.hash => a.voters,
                Body::Revoke(r) if r.id == revocation.id => r.voters,
                _ => continue,
            };
            let index = said.index;
            // In the order of their chains: the first is the earliest.
            words.entry(said.issuer).or_insert(Word { index, voters });
        }
        words
    }

    /// Did a voter say this before it was removed, if it was?
    fn counts(&self, link: &Link) -> bool {
        let end = self.ends.get(&link.issuer);
        self.voters.contains_key(&link.issuer) && end.is_none_or(|end| link.index < *end)
    }
}

/// How much of their chains approves and witnesses.
fn words_of(gone: &Revocations) -> Ends {
    let ends = gone.iter().map(|(id, end)| (*id, end.known_links));
    ends.collect()
}

/// Are there at least two who agree, and more than half of as many as each of them knew, and of `least`? A lonely word is
/// none: its signer may say that it knew nobody.
fn has_majority(words: &BTreeMap<NodeId, Word>, least: usize) -> bool {
    let mut known: Vec<usize> = words.values().map(|word| word.voters as usize).collect();
    known.sort_unstable();
    let mut enough = known.iter().enumerate().skip(1);
    enough.any(|(before, voters)| (before + 1) * 2 > least.max(*voters))
}
