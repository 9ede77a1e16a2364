//! What the roster's records add up to: a pure function of the set of records, whatever order they came in.
//!
//! 1. An admission counts when its issuer is admitted, has the right to invite, gives no right it lacks, and was not
//!    revoked before that record. Behind a record of an unknown kind no admission of that issuer counts.
//! 2. Revocations are judged in the order of their issuers' depth, id and index. One counts when its issuer is admitted,
//!    has the right, and was not itself revoked before it. It counts, too, when another voter, not revoked itself, says that
//!    it heard of it while it did: else somebody who had not heard of it brings a removed node back by removing the remover.
//!    Two that revoke each other both count: nobody can prove who was first, and closed is the safe side.
//!    What the removed node wrote, approved and witnessed counts as far as any of those who revoked it knew it: what a
//!    side of a split has seen gone must not come back. Of those whom it let in only they count of whom all of them knew:
//!    whom it let in at last may be anybody.
//!    A removal names the last record of the removed node's chain that its issuer knew. Where another stands in its place the
//!    chain was forked (`branch.rs`), and nothing behind the fork counts. What the removed node approved and witnessed behind
//!    a fork never does: which of its removers counts must not depend on the branch.
//! 3. An issuer's second revocation waits until a majority of the voters approved its first or revoked the same node, so
//!    that one rogue can't evict all ([`super::ballot`]). Leaving, that is revoking oneself, is free.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::model::{NodeId, NodeName};

use super::ballot::Ballot;
use super::link::{Body, Link, Revocation, Tip};
use super::{PendingRevocation, Rights};

/// Keys and rights of an admitted node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberKeys {
    /// Who.
    pub id: NodeId,
    /// Its X25519 key for sessions.
    pub noise: [u8; 32],
    /// What it may do.
    pub rights: Rights,
    /// Its name when it was admitted.
    pub name: NodeName,
    /// Links from the founder, who has 0.
    pub depth: u32,
    /// Who admitted it, and under which index of that chain.
    pub admitted_by: (NodeId, u32),
}

/// The end of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// The last sequence of its records that counts.
    pub last_sequence: u64,
    /// How many of its roster records let others in.
    pub valid_links: u32,
    /// How many of them say what it approved and heard of.
    pub known_links: u32,
    /// Who revoked it.
    pub by: NodeId,
    /// The hash of the record that says so: what others approve.
    pub record: [u8; 32],
    /// Its chain as who revoked it knew it.
    pub tip: Tip,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// All that were ever admitted by a record that counts, the revoked ones included.
    pub(super) admitted: BTreeMap<NodeId, MemberKeys>,
    pub(super) revoked: Revocations,
    pub(super) pending: Vec<PendingRevocation>,
}

/// All records by issuer and index.
pub(super) type Links<'a> = BTreeMap<(NodeId, u32), &'a Link>;
/// The revoked.
pub(super) type Revocations = BTreeMap<NodeId, Revoked>;
/// How many records of a chain count, or where it was forked.
pub(super) type Ends = BTreeMap<NodeId, u32>;

/// How much of their chains lets others in.
pub(super) fn ends_of(revoked: &Revocations) -> Ends {
    let ends = revoked.iter().map(|(id, end)| (*id, end.valid_links));
    ends.collect()
}

struct Candidate<'a> {
    link: &'a Link,
    revocation: &'a Revocation,
    /// So many of the revoked node's records let others in.
    end: u32,
    /// So many of them say what it approved and heard of: those that all have, whichever branch of its chain they hold.
    known: u32,
}

/// What candidates add up to.
struct Outcome<'a> {
    counting: Vec<&'a Candidate<'a>>,
    revoked: Revocations,
    pending: Vec<PendingRevocation>,
}

impl Outcome<'_> {
    /// Which branch of a forked chain holds somebody says who is a member whatever branch it is, if there is such a one:
    /// others may not even know who else says so.
    fn revoked_as_seen_by(&self, admitted: &BTreeMap<NodeId, MemberKeys>) -> Revocations {
        let mut revoked = self.revoked.clone();
        for (id, end) in &mut revoked {
            let by_member = |c: &&&Candidate<'_>| {
                c.revocation.id == *id && admitted.contains_key(&c.link.issuer)
            };
            if let Some(candidate) = self.counting.iter().find(by_member) {
                end.tip = candidate.revocation.tip;
            }
        }
        revoked
    }
}

impl Candidate<'_> {
    /// Does its issuer revoke itself?
    fn is_leave(&self) -> bool {
        self.revocation.id == self.link.issuer
    }
}

pub(super) fn judge(founder: &NodeId, links: &Links<'_>, forked: &Ends) -> Verdict {
    let everybody = admit(founder, links, &Ends::new());
    let mut candidates = candidates(links, &everybody, forked);
    // Mostly nobody was ever removed.
    if candidates.is_empty() {
        return Verdict {
            admitted: everybody,
            ..Verdict::default()
        };
    }
    let mut approved = BTreeSet::new();
    loop {
        let sure = revoke(&candidates, founder, links, None, &approved);
        let outcome = revoke(&candidates, founder, links, Some(&sure.revoked), &approved);
        let admitted = admit(founder, links, &ends_of(&outcome.revoked));
        let revoked = outcome.revoked_as_seen_by(&admitted);
        let pending = outcome.pending;
        // One that has its majority only where a void one counts as well keeps it: dropping that one would
        // take the majority away, and its issuer would be admitted again.
        approved.extend(outcome.counting.iter().map(|c| c.link.hash));
        let before = candidates.len();
        let ballot = LazyCell::new(|| Ballot::new(founder, links, Some(&revoked)));
        candidates.retain(|c| admitted.contains_key(&c.link.issuer) || ballot.is_witnessed(c.link));
        // Each further round drops a revocation whose issuer was itself admitted by a record that is void, and of which no
        // member has heard before that was known.
        if candidates.len() == before {
            return Verdict {
                admitted,
                revoked,
                pending,
            };
        }
    }
}

/// Whom these records let in, where chains end here: the records from that index on don't count.
pub(super) fn admit(
    founder: &NodeId,
    links: &Links<'_>,
    ends: &Ends,
) -> BTreeMap<NodeId, MemberKeys> {
    let mut admitted = BTreeMap::new();
    let Some(founding) = links.get(&(*founder, 0)).and_then(|l| l.admission()) else {
        return admitted;
    };
    let root = MemberKeys {
        id: *founder,
        noise: founding.noise,
        rights: founding.rights,
        name: founding.name.clone(),
        depth: 0,
        admitted_by: (*founder, 0),
    };
    admitted.insert(*founder, root.clone());
    let mut level = vec![root];
    while !level.is_empty() {
        let mut next = BTreeMap::new();
        for issuer in level.iter().filter(|m| m.rights.has(Rights::INVITE)) {
            for member in admitted_by(issuer, links, ends.get(&issuer.id)) {
                if !admitted.contains_key(&member.id) {
                    next.entry(member.id).or_insert(member);
                }
            }
        }
        level = next.values().cloned().collect();
        admitted.append(&mut next);
    }
    admitted
}

fn admitted_by<'a>(
    issuer: &'a MemberKeys,
    links: &'a Links<'_>,
    end: Option<&u32>,
) -> impl Iterator<Item = MemberKeys> + 'a {
    let end = end.copied().unwrap_or(u32::MAX);
    links
        .range((issuer.id, 0)..=(issuer.id, u32::MAX))
        .map(|(_, link)| *link)
        .take_while(move |link| link.index < end && link.body != Body::Unknown)
        .filter_map(move |link| match &link.body {
            Body::Admit(a) if issuer.rights.has(a.rights) => Some(MemberKeys {
                id: a.id,
                noise: a.noise,
                rights: a.rights,
                name: a.name.clone(),
                depth: issuer.depth + 1,
                admitted_by: (issuer.id, link.index),
            }),
            _ => None,
        })
}

fn candidates<'a>(
    links: &Links<'a>,
    everybody: &BTreeMap<NodeId, MemberKeys>,
    forked: &Ends,
) -> Vec<Candidate<'a>> {
    let mut found: Vec<(u32, Candidate<'a>)> = links
        .values()
        .filter_map(|link| {
            let Body::Revoke(revocation) = &link.body else {
                return None;
            };
            let issuer = everybody.get(&link.issuer)?;
            let may = issuer.rights.has(Rights::REVOKE) || revocation.id == link.issuer;
            let end = end_by(revocation, links, forked);
            let known = forked
                .get(&revocation.id)
                .map_or(end, |fork| end.min(*fork));
            may.then_some((
                issuer.depth,
                Candidate {
                    link,
                    revocation,
                    end,
                    known,
                },
            ))
        })
        .collect();
    found.sort_by_key(|(depth, c)| (*depth, c.link.issuer, c.link.index));
    found.into_iter().map(|(_, c)| c).collect()
}

/// So many of a revoked node's records count by this word. Of a chain that was forked, or must have been, those behind the
/// fork only where it is the branch that the word's issuer knew.
fn end_by(revocation: &Revocation, links: &Links<'_>, forked: &Ends) -> u32 {
    let Revocation { id, tip, .. } = revocation;
    let held = |index| links.get(&(*id, index)).copied();
    common_with(*tip, held, forked.get(id).copied())
}

/// So many records of a chain that ends so are in the one that is `held`, or may be, if it was forked at `fork`.
pub(super) fn common_with<'a>(
    tip: Tip,
    held: impl FnOnce(u32) -> Option<&'a Link>,
    fork: Option<u32>,
) -> u32 {
    let Some(last) = tip.length.checked_sub(1) else {
        return 0;
    };
    let most = match held(last) {
        Some(link) if link.hash == tip.hash => return tip.length,
        Some(_) => last,
        None => tip.length,
    };
    fork.map_or(most, |at| most.min(at))
}

/// What the candidates in their order add up to. Who is `gone` witnesses and approves nothing afterwards; before that is
/// known nobody witnesses. The `approved` have their majorities.
fn revoke<'a>(
    candidates: &'a [Candidate<'a>],
    founder: &NodeId,
    links: &Links<'_>,
    gone: Option<&Revocations>,
    approved: &BTreeSet<[u8; 32]>,
) -> Outcome<'a> {
    let mut counting: Vec<&Candidate<'_>> = Vec::new();
    let mut revoked = Revocations::new();
    let mut pending = Vec::new();
    let ballot = Ballot::new(founder, links, gone);
    for candidate in candidates {
        let Candidate {
            link,
            revocation,
            end,
            known,
        } = candidate;
        let late = counting.iter().any(|c| {
            c.revocation.id == link.issuer && c.end <= link.index && c.link.issuer != revocation.id
        });
        if late && !ballot.is_witnessed(link) {
            continue;
        }
        let before = counting
            .iter()
            .rfind(|c| c.link.issuer == link.issuer && !c.is_leave());
        let waits = before.filter(|before| {
            !candidate.is_leave()
                && !approved.contains(&link.hash)
                && !ballot.is_approved((before.link, before.revocation), &revoked)
        });
        if let Some(first) = waits {
            pending.push(PendingRevocation {
                issuer: link.issuer,
                subject: revocation.id,
                waits_for: first.link.hash,
            });
            continue;
        }
        counting.push(candidate);
        let end = Revoked {
            last_sequence: revocation.last_sequence,
            valid_links: *end,
            known_links: *known,
            by: link.issuer,
            record: link.hash,
            tip: revocation.tip,
        };
        revoked
            .entry(revocation.id)
            .and_modify(|r| {
                r.last_sequence = r.last_sequence.max(end.last_sequence);
                r.valid_links = r.valid_links.min(end.valid_links);
                r.known_links = r.known_links.max(end.known_links);
            })
            .or_insert(end);
    }
    Outcome {
        counting,
        revoked,
        pending,
    }
}
