//! Chains that their issuer forked: two different records under one index.
//!
//! The branch that was heard first holds, so one cluster may hold both. Once the issuer is removed the branch holds that
//! its remover knew: the removal names its last record. Who has the other one leaves it, and all agree again.
//!
//! INVARIANT: for one remover's word no branch is taken again that was left.

use std::collections::{BTreeMap, BTreeSet};

use super::link::{Body, Link, Tip};
use super::verdict::{Ends, common_with};
use super::{Roster, RosterError};
use crate::model::NodeId;
use crate::mutation::{self, Mutation};
use crate::store::{Batch, Stored, Table};

const MAX_FORKS: usize = 64;
/// Stands for the index in the keys of void records.
const VOID: [u8; 4] = u32::MAX.to_be_bytes();

/// Two different records of one issuer under one index, the first that there are.
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
    /// A record came that continues another branch than the one held here.
    outgrown: bool,
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
            batch.put(void_row(&fork.issuer), fork.void());
        }
        batch
    }

    pub(super) fn fork_of(&self, issuer: &NodeId) -> Option<&Fork> {
        self.forks.iter().find(|fork| fork.issuer == *issuer)
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

    /// Of each issuer the first is kept: what comes behind it is on one branch or the other.
    pub(super) fn note_fork(&mut self, link: &Link) {
        let is_full = self.forks.len() >= MAX_FORKS;
        let mut forks = self.forks.iter_mut();
        let fork = Fork {
            issuer: link.issuer,
            index: link.index,
            void: link.clone(),
            left_for: BTreeSet::new(),
            outgrown: false,
        };
        match forks.find(|known| known.issuer == link.issuer) {
            Some(known) if known.index <= link.index => return,
            Some(known) => {
                let later = std::mem::replace(known, fork);
                self.digest ^= later.void.short_hash();
            }
            None if is_full => return,
            None => self.forks.push(fork),
        }
        self.digest ^= link.short_hash();
        self.judge();
    }

    /// The record that stands here where another chain has this one.
    pub(super) fn branch_off(&self, link: &Link) -> Option<&Link> {
        let chain = self.chains.get(&link.issuer)?;
        let held = chain.get(link.index as usize)?;
        (held.hash != link.hash).then_some(held)
    }

    /// Does it begin a branch that is void here?
    pub(super) fn is_void_branch(&self, link: &Link) -> bool {
        let fork = self.fork_of(&link.issuer);
        fork.is_some_and(|fork| fork.void.hash == link.hash)
    }

    /// A record does not join on to the chain that is held here: of a forked one it continues the other branch.
    pub(super) fn note_outgrown(&mut self, link: &Link) {
        let is_next = link.index == self.chain_len(&link.issuer);
        let mut forks = self.forks.iter_mut();
        let fork = forks.find(|fork| fork.issuer == link.issuer && is_next);
        if let Some(fork) = fork.filter(|_| link.verify(&self.cluster)) {
            fork.outgrown = true;
        }
    }

    /// Where chains were forked.
    pub(super) fn forked(&self) -> Ends {
        let forks = self.forks.iter();
        forks.map(|fork| (fork.issuer, fork.index)).collect()
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
        while let Some(at) = self.forks.iter().position(|fork| self.is_wrong(fork)) {
            let gone = self.change_branch(at, &mut batch);
            self.drop_heirs(gone, &mut batch);
            self.judge();
        }
        let void = self.drop_void_loose();
        if !void.is_empty() {
            self.drop_heirs(void, &mut batch);
            self.judge();
        }
        batch
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

    /// Is the branch that is held here not the one that the issuer's remover knew?
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
            true => fork.outgrown,
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
        let holds = std::mem::replace(&mut fork.void, left[0].clone());
        fork.left_for.extend(tip);
        // What came before continued the branch that is held now.
        fork.outgrown = false;
        batch.put(row_of(&holds), holds.bytes.clone());
        batch.put(void_row(&fork.issuer), fork.void());
        chain.push(holds);
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
            for link in self.drop_chain(&heir) {
                batch.delete(row_of(&link));
                gone.insert(link.hash);
            }
            batch.delete(void_row(&heir));
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

/// Where the void record of an issuer's fork does: behind its chain, which never gets that long.
fn void_row(issuer: &NodeId) -> Vec<u8> {
    Table::Roster.key(&[&issuer.0, &VOID])
}

/// Is it the key of a void record?
pub(super) fn is_void(key: &[u8]) -> bool {
    key.ends_with(&VOID)
}
