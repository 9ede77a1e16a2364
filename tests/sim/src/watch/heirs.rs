//! What a removed node leaves goes to whom a majority of its voters lets have it. Here that is counted once more, in the
//! plainest way and from the records alone, whenever a node takes something over.

use std::collections::BTreeSet;

use weft_core::catalog::Catalog;
use weft_core::ipam::Ring;
use weft_core::model::NodeId;
use weft_core::roster::Roster;
use weft_core::value::{Grant, Kind, Object, Vote, Voters};

use super::{Known, history};
use crate::promises::Ledger;

/// Looks at what a node has written since it last did, up to the sequence `seen`.
pub(super) fn inherits_by_right(
    known: Known<'_>,
    ledger: &Ledger,
    had: [&[(u32, u32)]; 2],
    seen: &mut Option<u64>,
    lines: &mut Vec<String>,
) {
    let Known {
        host,
        me,
        node,
        catalog,
        roster,
        ..
    } = known;
    let last = catalog.last_sequence(&me);
    let Some(before) = seen.replace(last).filter(|before| *before < last) else {
        return;
    };
    // A lie may give a removed node's space to whoever it names, who then keeps it.
    if !ledger.liars.is_empty() || ledger.cloned.contains(&me) {
        return;
    }
    let written = catalog.records_after(&me, before).into_iter();
    let written =
        written.filter(|r| r.kind() == Kind::GRANT && r.generation() == node.generation());
    for record in written {
        let Some(Object::Grant(grant)) = catalog.own_object(&me, Kind::GRANT, record.key()) else {
            continue;
        };
        let kept = |(start, last): &(u32, u32)| *start <= grant.start && grant.last <= *last;
        if grant.to != me || had.into_iter().flatten().any(kept) {
            continue;
        }
        let Some(owner) = owner_before(known, &grant) else {
            continue;
        };
        // What a living one owns by now it got by another's word, which came after this one was written.
        let was_removed = roster.revoked().contains_key(&owner);
        if was_removed && !may_inherit(&me, &owner, catalog, roster) {
            let (first, last) = grant.addresses();
            let grants = history(catalog, grant.start);
            lines.push(format!(
                "{host} took {first}-{last} of {owner}, and no majority let it: {grants}"
            ));
        }
    }
}

/// Whose it would be without this grant.
fn owner_before(known: Known<'_>, grant: &Grant) -> Option<NodeId> {
    let Known { ring, roster, .. } = known;
    let mut grants = known.catalog.grants();
    grants.retain(|(by, other)| *by != known.me || other != grant);
    // Whom a removed node let in at last owns nothing.
    grants.retain(|(giver, other)| !roster.never_came_in(&other.to, giver));
    let removed = roster.revoked().keys().copied().collect();
    let before = Ring::compute(roster.founder(), ring.range(), &grants, &removed);
    before.owner(grant.start.into())
}

fn may_inherit(me: &NodeId, owner: &NodeId, catalog: &Catalog, roster: &Roster) -> bool {
    let vote = |voter: &NodeId| catalog.vote(voter, owner);
    let by_force = vote(me).is_some_and(|vote| vote.gone == Some(Vote::BY_FORCE));
    let left = roster
        .revoked()
        .get(owner)
        .is_some_and(|revoked| revoked.by == *owner);
    let agree = |set: &Voters| {
        is_majority(set, |voter| match voter {
            voter if voter == owner => left,
            // It takes its vote back once nothing is left to take, and that may be by now.
            voter if voter == me => true,
            voter => vote(voter).is_some_and(|vote| vote.gone == Some(set.version)),
        })
    };
    let mut destroyed: BTreeSet<NodeId> = catalog.destroyed();
    destroyed.retain(|id| id != owner && roster.revoked().contains_key(id));
    // A host that slept hears at once what came one after the other: that a voter is no more it may have heard after it
    // took what is left.
    let sets = [&destroyed, &BTreeSet::new()].map(|gone| set_that_holds(owner, catalog, gone));
    by_force || sets.iter().flatten().any(agree)
}

/// The newest set of voters that a majority of the one before honours, where nobody asks those that are `destroyed`.
fn set_that_holds(
    owner: &NodeId,
    catalog: &Catalog,
    destroyed: &BTreeSet<NodeId>,
) -> Option<Voters> {
    let set = |key: u8| match catalog.own_object(owner, Kind::VOTERS, &[key]) {
        Some(Object::Voters(mut set)) => {
            set.voters.retain(|voter| !destroyed.contains(voter));
            Some(set)
        }
        _ => None,
    };
    let (even, odd) = (set(0), set(1));
    let version = |set: &Option<Voters>| set.as_ref().map(|set| set.version);
    let (newest, before) = match version(&even) > version(&odd) {
        true => (even?, odd),
        false => (odd?, even),
    };
    let Some(before) = before.filter(|before| before.version == newest.base) else {
        return (newest.base == 0).then_some(newest);
    };
    let honours = |voter: &NodeId| {
        let said = || catalog.vote(voter, owner);
        voter == owner || said().is_some_and(|vote| vote.seen >= newest.version)
    };
    match is_majority(&before, honours) {
        true => Some(newest),
        false => Some(before),
    }
}

fn is_majority(set: &Voters, said: impl Fn(&NodeId) -> bool) -> bool {
    let voters: BTreeSet<&NodeId> = set.voters.iter().collect();
    voters.iter().filter(|voter| said(voter)).count() * 2 > voters.len()
}
