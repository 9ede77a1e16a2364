//! Chains that their issuer forked: two different records under one index.
//!
//! The branch that was heard first holds, so one cluster may hold both. Once the issuer is removed the branch holds that
//! its remover knew: the removal names its last record. Who has another one leaves it, and all agree again. A branch may
//! fork again: of the forks along the chain that is held here the last is tried first.
//!
//! INVARIANT: for one remover's word no branch is taken again that was left. One that is only too short is left only where
//! the records are here that lead from another to the end that the removal names.

use std::collections::{BTreeMap, BTreeSet};

use super::link::{Body, Link, Tip};
use super::verdict::{Ends, common_with};
use super::{Roster, RosterError};
use crate::model::NodeId;
use crate::mutation::{self, Mutation};
use crate::store::{Batch, Stored, Table};

const MAX_FORKS: usize = 64;
/// Of one issuer the first ones.
const MAX_FORKS_OF_ONE: usize = 4;
/// Records kept that continue branches which are not held here: as many as a chain may have.
const MAX_ASTRAY: usize = 4096;
/// Stands for the index in the keys of void records.
const VOID: [u8; 4] = u32::MAX.to_be_bytes();

/// Two different records of one issuer under one index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// Who.
    pub issuer: NodeId,
    /// Where.
    pub index: u32,
    /// With the one in the chain it proves the fork.
    void: Link,
    /// The ends of the branches for which this node left the one that it held.
    left_for: BTreeSet<Tip>,
}

impl Fork {
    /// The record that is void here.
    pub fn void(&self) -> &[u8] {
        &self.void.bytes
    }
}

impl Roster {
    /// Forked chains that were found.
    pub fn forks(&self) -> &[Fork] {
        &self.forks
    }

    /// What proves the forks beyond the first `told`, to be written.
    pub(crate) fn fork_rows(&self, told: usize) -> Batch {
        let mut batch = Batch::new();
        for fork in self.forks.iter().skip(told) {
            batch.put(void_row(fork), fork.void());
        }
        batch
    }

    /// The first fork of an issuer's chain.
    pub(super) fn fork_of(&self, issuer: &NodeId) -> Option<&Fork> {
        let of_it = self.forks.iter().filter(|fork| fork.issuer == *issuer);
        of_it.min_by_key(|fork| fork.index)
    }

    /// Forks as they were on disk.
    pub(super) fn restore_forks(&mut self, stored: &Stored) {
        let rows = stored.rows(Table::Roster);
        for (_, bytes) in rows.filter(|(key, _)| is_void(key)) {
            if let Some(link) = Link::parse(bytes).filter(|l| self.branch_off(l).is_some()) {
                self.check_fork(&link);
            }
        }
    }

    /// Both records of a fork, the one that holds here first.
    pub(crate) fn proof_of<'a>(&'a self, fork: &'a Fork) -> impl Iterator<Item = &'a [u8]> {
        let holds = self.records_from(&fork.issuer, fork.index).take(1);
        holds.chain(std::iter::once(fork.void()))
    }

    /// Another record stands in this one's place: is it a fork?
    pub(super) fn check_fork(&mut self, link: &Link) -> RosterError {
        if self
            .link(&link.issuer, link.index)
            .is_some_and(|l| l.hash == link.hash)
        {
            return RosterError::Bad;
        }
        if !link.verify(&self.signed_for(link)) {
            return RosterError::Bad;
        }
        self.note_fork(link);
        RosterError::Forked {
            issuer: link.issuer,
            index: link.index,
        }
    }

    /// Keeps those along the chain that is held here, of each issuer the first ones. What else there is begins behind them, on
    /// another branch.
    pub(super) fn note_fork(&mut self, link: &Link) {
        let mut of_it = self.forks.iter().filter(|f| f.issuer == link.issuer);
        let is_full = self.forks.len() >= MAX_FORKS && of_it.clone().next().is_none();
        if is_full || of_it.any(|fork| fork.void.hash == link.hash) {
            return;
        }
        self.forks.push(Fork {
            issuer: link.issuer,
            index: link.index,
            void: link.clone(),
            left_for: BTreeSet::new(),
        });
        self.digest ^= link.short_hash();
        self.prune_forks(&link.issuer);
        self.judge();
    }

    /// Forgets those of an issuer that are not along its chain, but for the first if nothing better is known, and those that
    /// are too many.
    fn prune_forks(&mut self, issuer: &NodeId) {
        let of_it = self.forks.iter().filter(|fork| fork.issuer == *issuer);
        let all: BTreeMap<(u32, [u8; 32]), bool> = of_it
            .map(|fork| ((fork.index, fork.void.hash), self.is_along(fork)))
            .collect();
        let first = all.keys().next().copied();
        let kept: BTreeSet<[u8; 32]> = all
            .into_iter()
            .filter(|(place, is_along)| *is_along || Some(*place) == first)
            .map(|((_, hash), _)| hash)
            .take(MAX_FORKS_OF_ONE)
            .collect();
        let is_gone = |fork: &mut Fork| fork.issuer == *issuer && !kept.contains(&fork.void.hash);
        for fork in self.forks.extract_if(.., is_gone) {
            self.digest ^= fork.void.short_hash();
        }
    }

    /// Does its void record follow the one before the one that is held?
    fn is_along(&self, fork: &Fork) -> bool {
        let held = self.branch_off(&fork.void);
        held.is_some_and(|held| held.previous == fork.void.previous)
    }

    /// The record that stands here where another chain has this one.
    pub(super) fn branch_off(&self, link: &Link) -> Option<&Link> {
        let chain = self.chains.get(&link.issuer)?;
        let held = chain.get(link.index as usize)?;
        (held.hash != link.hash).then_some(held)
    }

    /// Does it begin a branch that is void here?
    pub(super) fn is_void_branch(&self, link: &Link) -> bool {
        let mut forks = self.forks.iter();
        forks.any(|fork| fork.void.hash == link.hash)
    }

    /// A record does not join on to the chain that is held here: of one that was forked it may continue another branch, which
    /// may be the one that its issuer's remover knew.
    pub(super) fn note_astray(&mut self, link: &Link) {
        let has_room = self.astray.len() < MAX_ASTRAY;
        if has_room && self.may_lead(link) && link.verify(&self.cluster) {
            self.astray.insert(link.hash, link.clone());
        }
    }

    /// Can it be of the branch that its issuer's remover knew, while another is held here?
    fn may_lead(&self, link: &Link) -> bool {
        let revoked = self.verdict.revoked.get(&link.issuer);
        let is_before = |tip: Tip| link.index < tip.length && !self.leads_to(&link.issuer, tip);
        revoked.is_some_and(|end| is_before(end.tip)) && self.fork_of(&link.issuer).is_some()
    }

    /// Whose right branch is held here, of that nothing more is looked for: there is room for what others forked.
    fn forget_astray(&mut self) {
        let mut astray = std::mem::take(&mut self.astray);
        astray.retain(|_, link| self.may_lead(link));
        self.astray = astray;
    }

    /// Do records that came lead to this end from another branch than the one held here, which is too short for it?
    fn is_outgrown(&self, issuer: &NodeId, tip: Tip) -> bool {
        let length = self.chain_len(issuer);
        let mut next = tip.hash;
        while let Some(link) = self.astray.get(&next).filter(|l| l.issuer == *issuer) {
            if link.index <= length {
                let before = link.index.checked_sub(1);
                let held = before.and_then(|before| self.link(issuer, before));
                return held.is_none_or(|held| held.hash != link.previous);
            }
            next = link.previous;
        }
        false
    }

    /// Where chains were forked first.
    pub(super) fn forked(&self) -> Ends {
        let mut first = Ends::new();
        for fork in &self.forks {
            let index = first.entry(fork.issuer).or_insert(fork.index);
            *index = (*index).min(fork.index);
        }
        first
    }

    /// Is there a branch to be left?
    pub(super) fn is_astray(&self) -> bool {
        self.forks.iter().any(|fork| self.is_wrong(fork))
    }

    /// So many records of a chain that ends so are in the one held here, or may be.
    pub(super) fn common_with(&self, issuer: &NodeId, tip: Tip) -> u32 {
        let held = |index: u32| self.chains.get(issuer)?.get(index as usize);
        common_with(tip, held, self.fork_of(issuer).map(|fork| fork.index))
    }

    /// Leaves the branches that the removers of their issuers did not know. To be written.
    pub(super) fn follow_removers(&mut self) -> Batch {
        let mut batch = Batch::new();
        while let Some(at) = self.last_wrong() {
            let gone = self.change_branch(at, &mut batch);
            self.drop_heirs(gone, &mut batch);
            self.judge();
        }
        let void = self.drop_void_loose();
        if !void.is_empty() {
            self.drop_heirs(void, &mut batch);
            self.judge();
        }
        self.forget_astray();
        batch
    }

    /// The place of the fork that is farthest along among those at which the wrong branch is held.
    fn last_wrong(&self) -> Option<usize> {
        let forks = self.forks.iter().enumerate();
        let wrong = forks.filter(|(_, fork)| self.is_wrong(fork));
        let last = wrong.max_by_key(|(_, fork)| fork.index);
        last.map(|(place, _)| place)
    }

    /// What handshakes showed of removed nodes, and is not in their chains, which are known to their ends: whom it let in
    /// nobody knows.
    fn drop_void_loose(&mut self) -> BTreeSet<[u8; 32]> {
        let revoked: Vec<NodeId> = self.verdict.revoked.keys().copied().collect();
        let known: BTreeSet<NodeId> = revoked
            .into_iter()
            .filter(|id| self.knows_whom_it_let_in(id))
            .collect();
        let void: Vec<(NodeId, u32)> = self
            .loose
            .keys()
            .filter(|(issuer, _)| known.contains(issuer))
            .copied()
            .collect();
        let links = void.iter().filter_map(|place| self.loose.remove(place));
        links.map(|link| link.hash).collect()
    }

    /// Is the branch that is held here from that fork on not the one that the issuer's remover knew, as far as can be said?
    fn is_wrong(&self, fork: &Fork) -> bool {
        let revoked = self.verdict.revoked.get(&fork.issuer);
        let (Some(revoked), Some(held)) = (revoked, self.branch_off(&fork.void)) else {
            return false;
        };
        let stays = fork.left_for.contains(&revoked.tip) || mutation::is_on(Mutation::KeepBranch);
        if stays || held.previous != fork.void.previous {
            return false;
        }
        // Both are void; all have the same one all the same.
        if revoked.tip.length <= fork.index {
            return fork.void.hash < held.hash;
        }
        let is_short = self.chain_len(&fork.issuer) < revoked.tip.length;
        match is_short {
            true => self.is_outgrown(&fork.issuer, revoked.tip),
            false => !self.leads_to(&fork.issuer, revoked.tip),
        }
    }

    /// Does the chain that is held here come to this end?
    pub(super) fn leads_to(&self, issuer: &NodeId, tip: Tip) -> bool {
        let Some(last) = tip.length.checked_sub(1) else {
            return true;
        };
        let chain = self.chains.get(issuer);
        let last = chain.and_then(|chain| chain.get(last as usize));
        last.is_some_and(|link| link.hash == tip.hash)
    }

    /// The void record of a fork comes into the chain, for all from there on. The hashes of what left it. The chain is that
    /// long: both records were looked at ([`Self::is_wrong`]).
    fn change_branch(&mut self, at: usize, batch: &mut Batch) -> BTreeSet<[u8; 32]> {
        let fork = &mut self.forks[at];
        let tip = self.verdict.revoked.get(&fork.issuer).map(|end| end.tip);
        let chain = self.chains.entry(fork.issuer).or_default();
        let left = chain.split_off(fork.index as usize);
        for link in &left {
            batch.delete(row_of(link));
            self.digest ^= link.short_hash();
        }
        // Of the two records that prove the fork both count in the digest, as before.
        self.digest ^= left[0].short_hash();
        batch.delete(void_row(fork));
        let holds = std::mem::replace(&mut fork.void, left[0].clone());
        fork.left_for.extend(tip);
        let (issuer, index) = (fork.issuer, fork.index);
        batch.put(row_of(&holds), holds.bytes.clone());
        batch.put(void_row(fork), fork.void());
        chain.push(holds);
        let is_behind = |fork: &mut Fork| fork.issuer == issuer && fork.index > index;
        for fork in self.forks.extract_if(.., is_behind) {
            self.digest ^= fork.void.short_hash();
            batch.delete(void_row(&fork));
        }
        self.astray.retain(|_, link| link.issuer != issuer);
        left.iter().map(|link| link.hash).collect()
    }

    /// A handshake showed another record than the one that stands in its place now.
    pub(super) fn forget_branch(&mut self, other: &Link) -> Batch {
        let mut batch = Batch::new();
        self.note_fork(other);
        self.drop_heirs(BTreeSet::from([other.hash]), &mut batch);
        batch
    }

    /// A start knows nothing of what handshakes showed: chains that join on to that alone come again with it.
    pub(super) fn forget_hanging(&mut self) {
        loop {
            let known: BTreeSet<[u8; 32]> =
                self.chains.values().flatten().map(|l| l.hash).collect();
            let hanging = self.chains.iter().find_map(|(issuer, chain)| {
                let first = chain.first()?;
                let is_root = first.is_founding(&self.cluster);
                (!is_root && !known.contains(&first.previous)).then_some(*issuer)
            });
            let Some(issuer) = hanging else {
                return;
            };
            self.drop_chain(&issuer);
        }
    }

    /// Whoever was let in by a record that is gone has no chain here: it would join on to nothing.
    fn drop_heirs(&mut self, mut gone: BTreeSet<[u8; 32]>, batch: &mut Batch) {
        loop {
            let heir = self.chains.iter().find_map(|(issuer, chain)| {
                let first = chain.first()?;
                gone.contains(&first.previous).then_some(*issuer)
            });
            let Some(heir) = heir else {
                return;
            };
            for fork in self.forks.iter().filter(|fork| fork.issuer == heir) {
                batch.delete(void_row(fork));
            }
            for link in self.drop_chain(&heir) {
                batch.delete(row_of(&link));
                gone.insert(link.hash);
            }
        }
    }

    fn drop_chain(&mut self, issuer: &NodeId) -> Vec<Link> {
        let chain = self.chains.remove(issuer).unwrap_or_default();
        for link in &chain {
            self.digest ^= link.short_hash();
        }
        let of_it = |fork: &mut Fork| fork.issuer == *issuer;
        for fork in self.forks.extract_if(.., of_it) {
            self.digest ^= fork.void.short_hash();
        }
        chain
    }

    /// Admissions from handshakes that may count. Of an issuer that somebody says is removed only the one that the removal
    /// names: what else it signed may be younger than that.
    pub(super) fn loose_that_count(&self) -> impl Iterator<Item = &Link> {
        let mut tips: BTreeMap<NodeId, BTreeSet<Tip>> = BTreeMap::new();
        for link in self.chains.values().flatten() {
            if let Body::Revoke(revocation) = &link.body {
                let named = tips.entry(revocation.id).or_default();
                named.insert(revocation.tip);
            }
        }
        self.loose.values().filter(move |link| {
            let tip = Tip {
                length: link.index.saturating_add(1),
                hash: link.hash,
            };
            let named = tips.get(&link.issuer);
            named.is_none_or(|named| named.contains(&tip))
        })
    }
}

/// Where a record of a chain stands on disk.
pub(super) fn row_of(link: &Link) -> Vec<u8> {
    Table::Roster.key(&[&link.issuer.0, &link.index.to_be_bytes()])
}

/// Where the void record of a fork does: behind its issuer's chain, which never gets that long.
fn void_row(fork: &Fork) -> Vec<u8> {
    let Fork {
        issuer,
        index,
        void,
        ..
    } = fork;
    Table::Roster.key(&[&issuer.0, &VOID, &index.to_be_bytes(), &void.hash[..8]])
}

/// Is it the key of a void record, without the table's octet? Earlier versions kept one for each issuer, and no more in its
/// key.
pub(super) fn is_void(key: &[u8]) -> bool {
    key.get(size_of::<NodeId>()..)
        .is_some_and(|rest| rest.starts_with(&VOID))
}
