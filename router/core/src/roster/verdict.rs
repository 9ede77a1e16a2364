//! What the roster's records add up to: a pure function of the set of records, whatever order they came in.
//!
//! 1. An admission counts when its issuer is admitted, has the right to invite, gives no right it lacks, and was not
//!    revoked before that record. Behind a record of an unknown kind no admission of that issuer counts.
//! 2. Revocations are judged in the order of their issuers' depth, id and index. One counts when its issuer is admitted,
//!    has the right, and was not itself revoked before it, or when another voter approved it all the same: whoever takes
//!    over what a removed node left does, lest somebody who had not heard of it brings that node back by removing the
//!    remover. Two that revoke each other both count: nobody can prove who was first, and closed is the safe side.
//!    What the removed node wrote counts as far as any of those who revoked it knew it: what a side of a split has seen
//!    gone must not come back. Of its roster records only those count that all of them knew: whom it let in at last may
//!    be anybody.
//! 3. An issuer's second revocation waits until a majority of the voters approved its first or revoked the same node, so
//!    that one rogue can't evict all. (Leaving, that is revoking oneself, is free.)

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{NodeId, NodeName};

use super::link::{Body, Link, Revocation};
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
    /// How many of its roster records count.
    pub valid_links: u32,
    /// Who revoked it.
    pub by: NodeId,
    /// The hash of the record that says so: what others approve.
    pub record: [u8; 32],
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// All that were ever admitted by a record that counts, the revoked ones included.
    pub(super) admitted: BTreeMap<NodeId, MemberKeys>,
    pub(super) revoked: BTreeMap<NodeId, Revoked>,
    pub(super) pending: Vec<PendingRevocation>,
}

/// All records by issuer and index.
pub(super) type Links<'a> = BTreeMap<(NodeId, u32), &'a Link>;

struct Candidate<'a> {
    link: &'a Link,
    revocation: &'a Revocation,
}

pub(super) fn judge(founder: &NodeId, links: &Links<'_>) -> Verdict {
    let everybody = admit(founder, links, &BTreeMap::new());
    let mut candidates = candidates(links, &everybody);
    loop {
        let (revoked, pending) = revoke(&candidates, links, &everybody);
        let admitted = admit(founder, links, &revoked);
        let before = candidates.len();
        candidates.retain(|c| admitted.contains_key(&c.link.issuer));
        // Each further round drops a revocation whose issuer was itself admitted by a record that is void.
        if candidates.len() == before {
            return Verdict {
                admitted,
                revoked,
                pending,
            };
        }
    }
}

fn admit(
    founder: &NodeId,
    links: &Links<'_>,
    revoked: &BTreeMap<NodeId, Revoked>,
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
            for member in admitted_by(issuer, links, revoked.get(&issuer.id)) {
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
    revoked: Option<&'a Revoked>,
) -> impl Iterator<Item = MemberKeys> + 'a {
    let end = revoked.map_or(u32::MAX, |r| r.valid_links);
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
) -> Vec<Candidate<'a>> {
    let mut found: Vec<(u32, Candidate<'a>)> = links
        .values()
        .filter_map(|link| {
            let Body::Revoke(revocation) = &link.body else {
                return None;
            };
            let issuer = everybody.get(&link.issuer)?;
            let may = issuer.rights.has(Rights::REVOKE) || revocation.id == link.issuer;
            may.then_some((issuer.depth, Candidate { link, revocation }))
        })
        .collect();
    found.sort_by_key(|(depth, c)| (*depth, c.link.issuer, c.link.index));
    found.into_iter().map(|(_, c)| c).collect()
}

type Revocations = (BTreeMap<NodeId, Revoked>, Vec<PendingRevocation>);

fn revoke(
    candidates: &[Candidate<'_>],
    links: &Links<'_>,
    everybody: &BTreeMap<NodeId, MemberKeys>,
) -> Revocations {
    let mut counting: Vec<&Candidate<'_>> = Vec::new();
    let mut revoked: BTreeMap<NodeId, Revoked> = BTreeMap::new();
    let mut pending = Vec::new();
    for candidate in candidates {
        let Candidate { link, revocation } = candidate;
        let late = counting.iter().any(|c| {
            c.revocation.id == link.issuer
                && c.revocation.valid_links <= link.index
                && c.link.issuer != revocation.id
        });
        if late && !is_witnessed(link, links, everybody) {
            continue;
        }
        if let Some(first) = unapproved(candidate, &counting, links, everybody, &revoked) {
            pending.push(PendingRevocation {
                issuer: link.issuer,
                subject: revocation.id,
                waits_for: first,
            });
            continue;
        }
        counting.push(candidate);
        let end = Revoked {
            last_sequence: revocation.last_sequence,
            valid_links: revocation.valid_links,
            by: link.issuer,
            record: link.hash,
        };
        revoked
            .entry(revocation.id)
            .and_modify(|r| {
                r.last_sequence = r.last_sequence.max(end.last_sequence);
                r.valid_links = r.valid_links.min(end.valid_links);
            })
            .or_insert(end);
    }
    (revoked, pending)
}

/// Has another voter acted upon this revocation? Its issuer may have been removed by somebody who had not heard of it.
fn is_witnessed(link: &Link, links: &Links<'_>, everybody: &BTreeMap<NodeId, MemberKeys>) -> bool {
    let approvals = links
        .values()
        .filter(|l| l.body == Body::Approve(link.hash));
    let mut others = approvals.filter(|l| l.issuer != link.issuer);
    others.any(|l| {
        let voter = everybody.get(&l.issuer);
        voter.is_some_and(|voter| voter.rights.has(Rights::VOTE))
    })
}

/// The hash of the issuer's revocation before this one, if that lacks its majority.
fn unapproved(
    candidate: &Candidate<'_>,
    counting: &[&Candidate<'_>],
    links: &Links<'_>,
    everybody: &BTreeMap<NodeId, MemberKeys>,
    revoked: &BTreeMap<NodeId, Revoked>,
) -> Option<[u8; 32]> {
    let issuer = candidate.link.issuer;
    if candidate.revocation.id == issuer {
        return None;
    }
    let before = counting
        .iter()
        .rfind(|c| c.link.issuer == issuer && c.revocation.id != issuer)?;
    // Who revoked the same node approves, too.
    let approvals = links.values().filter(|l| match &l.body {
        Body::Approve(hash) => *hash == before.link.hash,
        Body::Revoke(revocation) => revocation.id == before.revocation.id,
        _ => false,
    });
    let mut said: BTreeMap<NodeId, u32> = BTreeMap::from([(issuer, before.link.index)]);
    for approval in approvals {
        let first = said.entry(approval.issuer).or_insert(approval.index);
        *first = approval.index.min(*first);
    }
    // Whom somebody lets in who has approved already, or the issuer after it revoked, has no vote on it: a newcomer must
    // not undo what was agreed.
    let came_later = |m: &MemberKeys| {
        let (by, index) = m.admitted_by;
        said.get(&by).is_some_and(|approved| index > *approved)
    };
    let voters: BTreeSet<NodeId> = everybody
        .values()
        .filter(|m| m.rights.has(Rights::VOTE) && m.id != before.revocation.id)
        .filter(|m| !revoked.contains_key(&m.id) || m.id == issuer)
        .filter(|m| !came_later(m))
        .map(|m| m.id)
        .collect();
    let mut yes: BTreeSet<NodeId> = said
        .into_keys()
        .filter(|id| *id != issuer && voters.contains(id))
        .collect();
    if voters.contains(&issuer) {
        yes.insert(issuer);
    }
    (yes.len() * 2 <= voters.len()).then_some(before.link.hash)
}
