//! Who decides what becomes of a removed node's part of the range, and what they decided: pure functions of records.
//!
//! Nobody needs a vote in daily life: each node allocates from its own part. Only the part of a node that is gone for good
//! comes back by a majority, so that the two sides of a split never both take it. The majority is one of the *voters
//! that the owner itself recorded*, and what it may take is what the owner promised to give to nobody meanwhile
//! (*locked*): a part that the owner gave to a third node shortly before it died may be known to that third node alone.
//!
//! The owner is the only writer of its sets, so they form a line: `1, 2, 3 ...`. A set holds once a majority of the set
//! before it has promised to honour it ([`Vote::seen`]), and who has promised that will not vote under an older one; who
//! has voted ([`Vote::gone`]) promises nothing more. So of two sets at most one can ever reach a majority, and since the
//! newcomers of one side of a split count only once the old majority took them in, no side can grow a majority of its own.
//! (The idea of a configuration that the previous one must ratify: Lamport, Malkhi, Zhou, "Reconfiguring a State
//! Machine", 2010; here without consensus, since each line has one writer.)

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::model::NodeId;
use crate::mutation::{self, Mutation};
use crate::value::{Vote, Voters};

/// The newest sets of one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Electorate<'a> {
    owner: NodeId,
    /// It holds: it is the first, or the owner went on from it.
    base: Cow<'a, Voters>,
    /// It follows `base`; it holds once a majority of `base` honours it.
    next: Option<Cow<'a, Voters>>,
}

impl<'a> Electorate<'a> {
    /// From the one or two sets that are held of an owner; `None` when there is none, or when the one before the newest is
    /// not known yet. A person said of `destroyed` nodes that they will never come back: they are no voters any more,
    /// or nobody could ever go on where a majority is lost.
    pub fn new(
        owner: NodeId,
        sets: impl IntoIterator<Item = &'a Voters>,
        destroyed: &BTreeSet<NodeId>,
    ) -> Option<Self> {
        let is_gone = |voter: &NodeId| *voter != owner && destroyed.contains(voter);
        let sets = sets.into_iter().map(|set| {
            if !set.voters.iter().any(is_gone) {
                return Cow::Borrowed(set);
            }
            let mut left = set.clone();
            left.voters.retain(|voter| !is_gone(voter));
            Cow::Owned(left)
        });
        let mut sets: Vec<Cow<'a, Voters>> = sets.collect();
        sets.sort_by_key(|set| set.version);
        let newest = sets.pop()?;
        match sets.pop() {
            None if newest.base == 0 => Some(Self {
                owner,
                base: newest,
                next: None,
            }),
            Some(before) if before.version == newest.base => Some(Self {
                owner,
                base: before,
                next: Some(newest),
            }),
            _ => None,
        }
    }

    /// The newest set, whether it holds already or not.
    pub fn newest(&self) -> &Voters {
        self.next.as_ref().unwrap_or(&self.base)
    }

    /// What `voter` should promise, if it is asked: the version of a set that waits for the one before.
    pub fn wants_promise_of(&self, voter: &NodeId) -> Option<u32> {
        let next = self.next.as_ref()?;
        let asked = *voter != self.owner && self.base.voters.contains(voter);
        asked.then_some(next.version)
    }

    /// Does the newest set hold?
    pub fn is_settled(&self, vote: impl Fn(&NodeId) -> Option<Vote>) -> bool {
        self.next
            .as_ref()
            .is_none_or(|next| self.is_ratified(next, vote))
    }

    /// The newest set that holds.
    pub fn current(&self, vote: impl Fn(&NodeId) -> Option<Vote>) -> &Voters {
        match &self.next {
            Some(next) if self.is_ratified(next, vote) => next,
            Some(next) if mutation::is_on(Mutation::NewcomersVote) => next,
            _ => &self.base,
        }
    }

    /// What the owner must give to nobody: as long as the newest set does not hold, that of both.
    pub fn locked(&self, vote: impl Fn(&NodeId) -> Option<Vote>) -> Vec<(u32, u32)> {
        match &self.next {
            None => self.base.locked.clone(),
            Some(next) if self.is_ratified(next, vote) => next.locked.clone(),
            Some(next) => [self.base.locked.clone(), next.locked.clone()].concat(),
        }
    }

    /// The set whose majority has taken note that the owner is gone. `by_itself`: the owner said so, which counts as its
    /// own vote.
    pub fn decided(
        &self,
        vote: impl Fn(&NodeId) -> Option<Vote>,
        by_itself: bool,
    ) -> Option<&Voters> {
        let set = self.current(&vote);
        let (have, need) = self.tally(set, vote, by_itself);
        (have >= need).then_some(set)
    }

    /// Votes under the set that holds now, and how many it takes.
    pub fn tally(
        &self,
        set: &Voters,
        vote: impl Fn(&NodeId) -> Option<Vote>,
        by_itself: bool,
    ) -> (usize, usize) {
        let noted = set
            .voters
            .iter()
            .filter(|voter| match **voter == self.owner {
                true => by_itself,
                false => vote(voter).is_some_and(|vote| vote.gone == Some(set.version)),
            });
        (noted.count(), majority(set))
    }

    /// Those who inherit, in this order, of a set.
    pub fn heirs<'s>(&'s self, set: &'s Voters) -> impl Iterator<Item = NodeId> + use<'s, 'a> {
        let others = set.voters.iter().filter(|voter| **voter != self.owner);
        others.copied()
    }

    fn is_ratified(&self, next: &Voters, vote: impl Fn(&NodeId) -> Option<Vote>) -> bool {
        let honours = |voter: &NodeId| {
            *voter == self.owner || vote(voter).is_some_and(|vote| vote.seen >= next.version)
        };
        let yes = self.base.voters.iter().filter(|voter| honours(voter));
        yes.count() >= majority(&self.base)
    }
}

/// More than half of all voters, the owner among them: so two nodes can't remove each other, and one of two nobody.
fn majority(set: &Voters) -> usize {
    // They are thirteen at most.
    let voters = set.voters.iter().enumerate();
    let all = voters.filter(|(at, voter)| !set.voters[..*at].contains(voter));
    match mutation::is_on(Mutation::SkipMajority) {
        true => 1,
        false => all.count() / 2 + 1,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn nobody() -> BTreeSet<NodeId> {
        BTreeSet::new()
    }

    fn set(version: u32, voters: &[u8]) -> Voters {
        Voters {
            version,
            base: version - 1,
            voters: voters.iter().map(|n| node(*n)).collect(),
            locked: vec![(u32::from(voters[0]), 100 + version)],
        }
    }

    fn says(seen: u32, gone: Option<u32>) -> Option<Vote> {
        Some(Vote {
            subject: node(1),
            seen,
            gone,
            upto: 0,
        })
    }

    #[test]
    fn a_first_set_holds_at_once_and_later_ones_when_a_majority_honours_them() {
        let sets = [set(2, &[1, 4]), set(1, &[1, 2, 3])];
        let two = Electorate::new(node(1), &sets[1..], &nobody()).unwrap();
        assert!(two.is_settled(|_| None));
        let three = Electorate::new(node(1), &sets, &nobody()).unwrap();
        assert!(!three.is_settled(|_| None));
        assert_eq!(three.locked(|_| None).len(), 2);
        let one_promised = |voter: &NodeId| (*voter == node(3)).then(|| says(2, None)).flatten();
        assert!(three.is_settled(one_promised), "the owner and one of three");
        assert_eq!(three.locked(one_promised), [(1, 102)]);
        // Newcomers' promises don't count.
        let newcomer = |voter: &NodeId| (*voter == node(4)).then(|| says(2, None)).flatten();
        assert!(!three.is_settled(newcomer));
    }

    #[test]
    fn a_set_whose_predecessor_is_not_known_says_nothing() {
        assert!(Electorate::new(node(1), &[set(3, &[1, 2])], &nobody()).is_none());
        assert!(Electorate::new(node(1), &[set(3, &[1, 2]), set(1, &[1])], &nobody()).is_none());
        assert!(Electorate::new(node(1), &[], &nobody()).is_none());
    }

    #[test]
    fn of_two_nodes_neither_removes_the_other_and_either_may_leave() {
        let sets = [set(1, &[1, 2])];
        let pair = Electorate::new(node(1), &sets, &nobody()).unwrap();
        let other = |voter: &NodeId| (*voter == node(2)).then(|| says(0, Some(1))).flatten();
        assert!(pair.decided(other, false).is_none());
        assert!(pair.decided(other, true).is_some());
    }

    #[test]
    fn who_is_said_to_be_destroyed_is_not_waited_for() {
        let gone = BTreeSet::from([node(2), node(3)]);
        let sets = [set(2, &[1]), set(1, &[1, 2, 3])];
        let alone = Electorate::new(node(1), &sets, &gone).unwrap();
        assert!(alone.is_settled(|_| None));
    }

    proptest! {
        /// Whatever the voters heard when, no two sets of one owner are both decided, in any two views of the votes of
        /// which one is the other's future.
        #[test]
        fn at_most_one_set_is_ever_decided(
            sets in proptest::collection::vec(proptest::collection::btree_set(2u8..9, 1..6), 2..4),
            steps in proptest::collection::vec((2u8..9, any::<bool>()), 0..40),
        ) {
            let line: Vec<Voters> = sets
                .iter()
                .enumerate()
                .map(|(at, voters)| {
                    let mut all = vec![1];
                    all.extend(voters);
                    set(at as u32 + 1, &all)
                })
                .collect();
            let mut votes: BTreeMap<NodeId, Vote> = BTreeMap::new();
            let mut published = 1usize;
            let mut decided: BTreeSet<u32> = BTreeSet::new();
            for (who, removes) in steps {
                let known = &line[published.saturating_sub(2)..published];
                let electorate = Electorate::new(node(1), known, &nobody()).unwrap();
                let vote = |voter: &NodeId| votes.get(voter).copied();
                decided.extend(electorate.decided(vote, false).map(|set| set.version));
                let settled = electorate.is_settled(vote);
                let under = electorate.current(vote).version;
                let asked = electorate.wants_promise_of(&node(who));
                let vote = votes.entry(node(who)).or_insert(Vote { subject: node(1), seen: 0, gone: None, upto: 0 });
                if vote.gone.is_some() {
                    continue;
                }
                if removes {
                    vote.gone = Some(vote.seen.max(under));
                } else if let Some(version) = asked {
                    vote.seen = vote.seen.max(version);
                }
                // The owner goes on as long as it lives, once its newest set holds.
                if settled && published < line.len() && !removes {
                    published += 1;
                }
            }
            prop_assert!(decided.len() <= 1, "{decided:?}");
        }
    }
}
