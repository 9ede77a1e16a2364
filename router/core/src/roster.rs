//! Who belongs to the cluster: a hash chain of signed records per issuer, rooted in the founding record.
//!
//! INVARIANT: what holds is a function of the set of records alone (`verdict.rs`); two rosters with the same records
//! agree. Nothing is ever removed.
//!
//! INVARIANT: a chain is contiguous and each record names the hash of the one before. Of a forked chain (two records of
//! one issuer under one index) the branch that came first stays, the other is void and reported: only the issuer can
//! make one. Its revocation names the branch that holds (`branch.rs`).
//!
//! INVARIANT: a node's keys never change. A record that admits a known node with another noise key is refused, and with
//! it all that its issuer says later.
//!
//! Unknown kinds fail closed: they are kept and passed on, and no admission behind them in that chain counts.

mod ballot;
mod branch;
mod intake;
mod link;
mod trust;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::crypto::{self, Random};
use crate::identity::Identity;
use crate::model::{ClusterId, NodeId, NodeName, WallMicros};
use crate::store::{Batch, Stored, Table};

pub use branch::Fork;
pub(crate) use link::reencode;
use link::{Admission, Approval, Body, Link, Revocation};
pub use link::{MAX_LINK, Tip};
pub use trust::Removal;
use verdict::{Links, Verdict};
pub use verdict::{MemberKeys, Revoked};

/// Longest chain shown in a handshake.
pub const MAX_CHAIN: usize = 3;

/// What a member may do; an issuer can give only what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rights(pub u16);

impl Rights {
    /// Admit others.
    pub const INVITE: Rights = Rights(1);
    /// Revoke others.
    pub const REVOKE: Rights = Rights(2);
    /// Count in majorities.
    pub const VOTE: Rights = Rights(4);
    /// Write cluster-wide objects.
    pub const PUBLISH: Rights = Rights(8);
    /// Forward for others.
    pub const RELAY: Rights = Rights(16);
    /// All that there are.
    pub const ALL: Rights = Rights(31);

    /// Are all of `wanted` among these?
    pub fn has(self, wanted: Rights) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// Why a roster record was not taken. Nothing was changed, except that a fork is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// Not a roster record, or its signature is wrong.
    #[error("not a roster record, or its signature is wrong")]
    Bad,
    /// Not the founding record of this cluster.
    #[error("not the founding record of this cluster")]
    NotFounding,
    /// The issuer's records before it, or the issuer's own admission, are not known yet.
    #[error("the roster records before it are not known yet")]
    Gap,
    /// The issuer made two different records with one index.
    #[error(
        "{issuer} made two different roster records with number {index}: its key is in two places"
    )]
    Forked {
        /// Who.
        issuer: NodeId,
        /// Where.
        index: u32,
    },
    /// It admits a known node with other keys.
    #[error("{issuer} admits {subject} with other keys than it has")]
    OtherKeys {
        /// Who.
        issuer: NodeId,
        /// Whom.
        subject: NodeId,
    },
    /// The issuer admitted too many nodes within an hour, or wrote too many records; later.
    #[error("{0} admits too many nodes at once")]
    TooMany(NodeId),
    /// This node lacks the right, or the subject is no member.
    #[error("this node has no right to do so")]
    NoRight,
    /// No such member.
    #[error("{0} is no member")]
    NoMember(NodeId),
}

/// What taking a record changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inserted {
    /// Was it known before?
    pub known: bool,
    /// To be written.
    pub batch: Batch,
    /// Members now that were not before.
    pub admitted: Vec<NodeId>,
    /// Members before that are no longer.
    pub revoked: Vec<NodeId>,
}

/// A record of ours, taken already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The record, to be sent once `change.batch` is on disk.
    pub bytes: Vec<u8>,
    /// What it changed.
    pub change: Inserted,
}

/// A revocation that waits for a majority to approve its issuer's revocation before ([`Roster::approve`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRevocation {
    /// Who revokes.
    pub issuer: NodeId,
    /// Whom.
    pub subject: NodeId,
    /// The hash of the revocation that lacks its majority.
    pub waits_for: [u8; 32],
}

/// How far an issuer's chain is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of records.
    pub length: u32,
    /// First octets of the last one's hash.
    pub hash: u64,
}

/// What a node is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Never heard of.
    Unknown,
    /// A member with these rights.
    Member(Rights),
    /// No longer; its records up to this sequence still count, under the rights it had.
    Revoked(u64, Rights),
}

/// How many more new nodes are taken of one issuer within the hour that began then.
#[derive(Clone, Copy, Debug)]
struct Intake {
    since: WallMicros,
    left: usize,
}

/// The roster of one cluster.
#[derive(Clone, Debug)]
pub struct Roster {
    cluster: ClusterId,
    founder: NodeId,
    chains: BTreeMap<NodeId, Vec<Link>>,
    loose: BTreeMap<(NodeId, u32), Link>,
    forks: Vec<Fork>,
    /// By their hashes: of removed nodes' forked chains what continues a branch that is not held here.
    astray: BTreeMap<[u8; 32], Link>,
    verdict: Verdict,
    digest: u64,
    intake: BTreeMap<NodeId, Intake>,
    /// A chain that a handshake showed has changed who is a member, and nobody was told of it yet.
    is_news: bool,
    /// This node's records from here on are not on disk yet. Nobody may hear of them: after a crash others would stand in
    /// their places, and the chain were forked.
    unsynced: Option<(NodeId, u32)>,
}

impl Roster {
    /// Founds a cluster with `identity` as its first member.
    pub fn found(identity: &Identity, name: NodeName, random: &mut Random) -> (Self, Batch) {
        let admission = Admission {
            id: identity.id(),
            noise: identity.noise_public(),
            rights: Rights::ALL,
            name,
        };
        let body = Body::Found(admission, random.bytes());
        let founding = Link::sign(&ClusterId([0; 16]), identity, 0, [0; 32], &body);
        let cluster = link::cluster_of(&founding);
        let mut roster = Self::empty(cluster, identity.id());
        let batch = roster.append(founding);
        roster.judge();
        (roster, batch)
    }

    /// Takes over a whole roster as [`Self::records`] gave it: of the member that let this node in, which is trusted as
    /// far as the cluster id goes: every record must lead back to the founding one.
    pub fn join<'a>(
        cluster: ClusterId,
        records: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(Self, Batch), RosterError> {
        let mut roster: Option<Self> = None;
        let mut batch = Batch::new();
        for bytes in records {
            let link = Link::parse(bytes).ok_or(RosterError::Bad)?;
            let Some(roster) = roster.as_mut() else {
                roster = Some(Self::rooted(cluster, link, &mut batch)?);
                continue;
            };
            match roster.check(&link) {
                // The other half of what proves a fork.
                Err(RosterError::Forked { .. }) => continue,
                checked => checked?,
            }
            batch.append(roster.append(link));
            roster.judge();
        }
        let roster = roster.ok_or(RosterError::NotFounding)?;
        batch.append(roster.fork_rows(0));
        Ok((roster, batch))
    }

    /// The roster as it was on disk. One with a gap is refused: this node would write its next record under an index
    /// that it used before.
    pub fn restore(cluster: ClusterId, stored: &Stored) -> Result<Self, RosterError> {
        let links: Vec<Link> = stored
            .rows(Table::Roster)
            .filter(|(key, _)| !branch::is_void(key))
            .map(|(_, bytes)| Link::parse(bytes).ok_or(RosterError::Bad))
            .collect::<Result<_, _>>()?;
        let founding = links
            .iter()
            .find(|l| l.is_founding(&cluster))
            .ok_or(RosterError::NotFounding)?;
        let mut roster = Self::empty(cluster, founding.issuer);
        for link in links {
            if !roster.is_next(&link) || !link.verify(&roster.signed_for(&link)) {
                return Err(RosterError::Bad);
            }
            roster.append(link);
        }
        roster.forget_hanging();
        roster.judge();
        roster.restore_forks(stored);
        Ok(roster)
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The first member.
    pub fn founder(&self) -> NodeId {
        self.founder
    }

    /// Takes a record that came from a peer.
    pub fn insert(&mut self, bytes: &[u8], wall: WallMicros) -> Result<Inserted, RosterError> {
        let link = Link::parse(bytes).ok_or(RosterError::Bad)?;
        let chained = self
            .chains
            .get(&link.issuer)
            .and_then(|c| c.get(link.index as usize));
        if chained.is_some_and(|l| l.hash == link.hash) {
            return Ok(Inserted {
                known: true,
                ..Inserted::default()
            });
        }
        let before = self.member_ids();
        let checked = self.check(&link);
        match checked.and_then(|()| self.check_intake(&link, wall)) {
            Ok(()) => Ok(self.take(link, &before)),
            // It may be what shows that the other branch of a fork is the right one.
            Err(_) if self.is_astray() || self.member_ids() != before => {
                let batch = self.follow_removers();
                Ok(self.changed_since(&before, batch))
            }
            Err(error) => Err(error),
        }
    }

    /// Admits a node, or issues a known one's admission anew, one link away from this node.
    pub fn admit(
        &mut self,
        identity: &Identity,
        id: NodeId,
        noise: [u8; 32],
        name: NodeName,
        rights: Rights,
    ) -> Result<Issued, RosterError> {
        let mine = self.rights_of(&identity.id());
        if !mine.has(Rights::INVITE) || !mine.has(rights) || self.verdict.revoked.contains_key(&id)
        {
            return Err(RosterError::NoRight);
        }
        if !crypto::is_sound_noise_key(&noise) {
            return Err(RosterError::Bad);
        }
        self.issue(
            identity,
            Body::Admit(Admission {
                id,
                noise,
                rights,
                name,
            }),
        )
    }

    /// Revokes a node: its records up to `last_sequence`, and its roster records known here, still count. At once, unless
    /// this node's revocation before still waits for its majority.
    pub fn revoke(
        &mut self,
        identity: &Identity,
        id: NodeId,
        last_sequence: u64,
    ) -> Result<Issued, RosterError> {
        if !self.is_member(&id) {
            return Err(RosterError::NoMember(id));
        }
        if !self.rights_of(&identity.id()).has(Rights::REVOKE) && id != identity.id() {
            return Err(RosterError::NoRight);
        }
        let chain = self.chains.get(&id);
        let revocation = Revocation {
            id,
            last_sequence,
            tip: Tip {
                length: chain.map_or(0, |c| c.len() as u32),
                hash: chain.and_then(|c| c.last()).map_or([0; 32], |l| l.hash),
            },
            voters: self.voters_besides(&id),
        };
        self.issue(identity, Body::Revoke(revocation))
    }

    /// Approves another's revocation ([`PendingRevocation::waits_for`]).
    pub fn approve(
        &mut self,
        identity: &Identity,
        revocation: [u8; 32],
    ) -> Result<Issued, RosterError> {
        self.check_voter(identity)?;
        let subject = self.subject_of(&revocation).ok_or(RosterError::Bad)?;
        let voters = self.voters_besides(&subject);
        self.issue(identity, Body::Approve(Approval { revocation, voters }))
    }

    fn voters_besides(&self, subject: &NodeId) -> u32 {
        let others = self.members().filter(|m| m.id != *subject);
        others.filter(|m| m.rights.has(Rights::VOTE)).count() as u32
    }

    /// Is it a member that counts in majorities?
    pub fn may_vote(&self, id: &NodeId) -> bool {
        self.rights_of(id).has(Rights::VOTE)
    }

    /// Has `by` approved this revocation?
    pub fn has_approved(&self, by: &NodeId, revocation: &[u8; 32]) -> bool {
        let mut chain = self.chains.get(by).into_iter().flatten();
        chain.any(|link| matches!(&link.body, Body::Approve(a) if a.revocation == *revocation))
    }

    /// Says that another's revocation counted when this node heard of it: it holds from then on, also if its issuer is
    /// removed by somebody who had not heard of it.
    pub fn witness(
        &mut self,
        identity: &Identity,
        revocation: [u8; 32],
    ) -> Result<Issued, RosterError> {
        self.check_voter(identity)?;
        self.issue(identity, Body::Witness(revocation))
    }

    fn check_voter(&self, identity: &Identity) -> Result<(), RosterError> {
        match self.may_vote(&identity.id()) {
            true => Ok(()),
            false => Err(RosterError::NoRight),
        }
    }

    /// Voters besides its issuer that witness or approve a revocation.
    pub fn witnesses(&self, revocation: &[u8; 32]) -> BTreeSet<NodeId> {
        let links = self.chains.values().flatten();
        let said = links.filter(|link| link.witnessed() == Some(revocation));
        said.map(|link| link.issuer)
            .filter(|id| self.may_vote(id))
            .collect()
    }

    /// Is it admitted and not revoked?
    pub fn is_member(&self, id: &NodeId) -> bool {
        self.member(id).is_some()
    }

    /// Keys and rights of a member.
    pub fn member(&self, id: &NodeId) -> Option<&MemberKeys> {
        let keys = self.verdict.admitted.get(id)?;
        (!self.verdict.revoked.contains_key(id)).then_some(keys)
    }

    /// All members in the order of their ids.
    pub fn members(&self) -> impl Iterator<Item = &MemberKeys> {
        self.verdict
            .admitted
            .values()
            .filter(|m| !self.verdict.revoked.contains_key(&m.id))
    }

    /// What `id` is to the cluster, for judging its records.
    pub fn standing(&self, id: &NodeId) -> Standing {
        match (self.verdict.admitted.get(id), self.verdict.revoked.get(id)) {
            (None, None) => Standing::Unknown,
            (None, Some(r)) => Standing::Revoked(r.last_sequence, Rights(0)),
            (Some(m), None) => Standing::Member(m.rights),
            (Some(m), Some(r)) => Standing::Revoked(r.last_sequence, m.rights),
        }
    }

    /// Those that were revoked.
    pub fn revoked(&self) -> &BTreeMap<NodeId, Revoked> {
        &self.verdict.revoked
    }

    /// Did this node revoke that one, whether it counts or not?
    pub fn has_revoked(&self, issuer: &NodeId, subject: &NodeId) -> bool {
        let chain = self.chains.get(issuer).into_iter().flatten();
        let mut bodies = chain.map(|link| &link.body);
        bodies.any(|body| matches!(body, Body::Revoke(r) if r.id == *subject))
    }

    /// Of a revoked node: are all its records here that count?
    pub fn knows_whom_it_let_in(&self, revoked: &NodeId) -> bool {
        let Some(end) = self.verdict.revoked.get(revoked) else {
            return true;
        };
        // Where none of them counts it does not matter which branch is held.
        let is_right = end.valid_links == 0
            || self.fork_of(revoked).is_none()
            || self.leads_to(revoked, end.tip);
        is_right && self.chain_len(revoked) >= end.valid_links
    }

    /// The record that revokes a node; of several the one that leaves least of its chain: whom the node let in afterwards
    /// can see by that one record that it is no member.
    pub fn revocation(&self, id: &NodeId) -> Option<&[u8]> {
        let revoked = self.verdict.revoked.get(id)?;
        let records = self.chains.values().flatten();
        let leaving = records.filter_map(|link| match &link.body {
            Body::Revoke(r) if r.id == *id && r.tip.length >= revoked.valid_links => {
                Some((r.tip.length, link.bytes.as_slice()))
            }
            _ => None,
        });
        let least = leaving.min_by_key(|(length, _)| *length);
        least.map(|(_, record)| record)
    }

    /// Whom the revocation with this hash names.
    pub fn subject_of(&self, revocation: &[u8; 32]) -> Option<NodeId> {
        let mut links = self.chains.values().flatten();
        let link = links.find(|link| link.hash == *revocation)?;
        link.revoked()
    }

    /// Revocations that wait for a majority.
    pub fn pending(&self) -> &[PendingRevocation] {
        &self.verdict.pending
    }

    /// Members whose admission is more links away than a handshake shows: somebody nearer to the founder, with the right
    /// to invite, should [`Self::admit`] them anew.
    pub fn too_deep(&self) -> Vec<&MemberKeys> {
        self.members()
            .filter(|m| m.depth > MAX_CHAIN as u32)
            .collect()
    }

    /// A roll-up of all records, of forks both: equal where the same is known.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// How far each chain is known.
    pub fn heads(&self) -> BTreeMap<NodeId, Head> {
        self.chains
            .iter()
            .filter_map(|(issuer, chain)| {
                let length = chain.len() as u32;
                let hash = chain.last()?.short_hash();
                Some((*issuer, Head { length, hash }))
            })
            .collect()
    }

    /// An issuer's records from an index on.
    pub fn records_from(&self, issuer: &NodeId, index: u32) -> impl Iterator<Item = &[u8]> {
        let chain = self.chains.get(issuer).map_or(&[][..], Vec::as_slice);
        chain
            .iter()
            .skip(index as usize)
            .map(|l| l.bytes.as_slice())
    }

    /// The same, of those that others may hear of.
    pub(crate) fn records_to_tell(
        &self,
        issuer: &NodeId,
        index: u32,
    ) -> impl Iterator<Item = &[u8]> {
        let told = self.told_of(issuer).saturating_sub(index as usize);
        self.records_from(issuer, index).take(told)
    }

    /// So many records of a chain others may hear of.
    fn told_of(&self, issuer: &NodeId) -> usize {
        let unsynced = self.unsynced.filter(|(own, _)| own == issuer);
        unsynced.map_or(usize::MAX, |(_, first)| first as usize)
    }

    /// A record that this node issued is not on disk yet: nobody may hear of it.
    pub(crate) fn hold_back(&mut self, record: &[u8]) {
        if let Some(link) = Link::parse(record) {
            self.unsynced.get_or_insert((link.issuer, link.index));
        }
    }

    /// A record that this node issued is on disk, and so are those before it.
    pub(crate) fn on_synced(&mut self, record: &[u8]) {
        let Some(link) = Link::parse(record) else {
            return;
        };
        let length = self.chain_len(&link.issuer);
        self.unsynced = self
            .unsynced
            .map(|(own, first)| (own, first.max(link.index + 1)))
            .filter(|(_, first)| *first < length);
    }

    /// All records that one with these `heads` lacks, in an order in which each can be taken when it comes.
    pub fn records_after(&self, heads: &BTreeMap<NodeId, Head>) -> Vec<&[u8]> {
        let mut left: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut done: BTreeSet<[u8; 32]> = BTreeSet::from([[0; 32]]);
        let mut all = Vec::new();
        let total: usize = self.chains.values().map(Vec::len).sum();
        while all.len() < total {
            let before = all.len();
            for (issuer, chain) in &self.chains {
                let at = left.entry(*issuer).or_default();
                while let Some(link) = chain.get(*at).filter(|l| done.contains(&l.previous)) {
                    done.insert(link.hash);
                    all.push(link);
                    *at += 1;
                }
            }
            if all.len() == before {
                break;
            }
        }
        all.into_iter()
            .filter(|l| heads.get(&l.issuer).is_none_or(|h| h.length <= l.index))
            .filter(|l| (l.index as usize) < self.told_of(&l.issuer))
            .map(|l| l.bytes.as_slice())
            .collect()
    }

    /// All records that others may hear of, the founding one first, at last those that are void by forks: for one who
    /// joins.
    pub fn records(&self) -> Vec<&[u8]> {
        let mut all = self.records_after(&BTreeMap::new());
        let told: BTreeSet<&[u8]> = all.iter().copied().collect();
        // Of a chain that joins on to what a handshake showed nobody else can take anything.
        let is_told = |fork: &&Fork| self.proof_of(fork).take(1).all(|held| told.contains(held));
        all.extend(self.forks.iter().filter(is_told).map(Fork::void));
        all
    }

    fn empty(cluster: ClusterId, founder: NodeId) -> Self {
        Self {
            cluster,
            founder,
            chains: BTreeMap::new(),
            loose: BTreeMap::new(),
            forks: Vec::new(),
            astray: BTreeMap::new(),
            is_news: false,
            verdict: Verdict::default(),
            digest: 0,
            intake: BTreeMap::new(),
            unsynced: None,
        }
    }

    fn rooted(cluster: ClusterId, founding: Link, batch: &mut Batch) -> Result<Self, RosterError> {
        if !founding.is_founding(&cluster) {
            return Err(RosterError::NotFounding);
        }
        if !founding.verify(&ClusterId([0; 16])) {
            return Err(RosterError::Bad);
        }
        let mut roster = Self::empty(cluster, founding.issuer);
        batch.append(roster.append(founding));
        roster.judge();
        Ok(roster)
    }

    fn link(&self, issuer: &NodeId, index: u32) -> Option<&Link> {
        let chained = self.chains.get(issuer).and_then(|c| c.get(index as usize));
        chained.or_else(|| self.loose.get(&(*issuer, index)))
    }

    fn rights_of(&self, id: &NodeId) -> Rights {
        self.member(id).map_or(Rights(0), |m| m.rights)
    }

    /// Does it join on to what is known of its issuer's chain?
    fn is_next(&self, link: &Link) -> bool {
        let last = self.chains.get(&link.issuer).and_then(|c| c.last());
        link.index == self.chain_len(&link.issuer)
            && last.is_none_or(|last| last.hash == link.previous)
    }

    fn chain_len(&self, issuer: &NodeId) -> u32 {
        self.chains.get(issuer).map_or(0, |c| c.len() as u32)
    }

    fn issue(&mut self, identity: &Identity, body: Body) -> Result<Issued, RosterError> {
        let me = identity.id();
        let last = self.chains.get(&me).and_then(|c| c.last()).map(|l| l.hash);
        let previous = last.or_else(|| {
            let (issuer, index) = self.verdict.admitted.get(&me)?.admitted_by;
            self.link(&issuer, index).map(|l| l.hash)
        });
        let previous = previous.ok_or(RosterError::NoRight)?;
        let link = Link::sign(
            &self.cluster,
            identity,
            self.chain_len(&me),
            previous,
            &body,
        );
        self.check(&link)?;
        let bytes = link.bytes.clone();
        let before = self.member_ids();
        Ok(Issued {
            bytes,
            change: self.take(link, &before),
        })
    }

    fn take(&mut self, link: Link, before: &BTreeSet<NodeId>) -> Inserted {
        let mut batch = self.append(link);
        self.judge();
        batch.append(self.follow_removers());
        self.changed_since(before, batch)
    }

    fn member_ids(&self) -> BTreeSet<NodeId> {
        self.members().map(|m| m.id).collect()
    }

    fn changed_since(&self, before: &BTreeSet<NodeId>, batch: Batch) -> Inserted {
        let after = self.member_ids();
        Inserted {
            known: false,
            batch,
            admitted: after.difference(before).copied().collect(),
            revoked: before.difference(&after).copied().collect(),
        }
    }

    fn append(&mut self, link: Link) -> Batch {
        let mut batch = Batch::new();
        batch.put(branch::row_of(&link), link.bytes.clone());
        self.digest ^= link.short_hash();
        let shown = self.loose.remove(&(link.issuer, link.index));
        let other = shown.filter(|shown| shown.hash != link.hash);
        self.chains.entry(link.issuer).or_default().push(link);
        if let Some(other) = other {
            batch.append(self.forget_branch(&other));
        }
        batch
    }

    fn judge(&mut self) {
        let chained = self.chains.values().flatten();
        let links: Links<'_> = chained
            .chain(self.loose_that_count())
            .map(|l| ((l.issuer, l.index), l))
            .collect();
        self.verdict = verdict::judge(&self.founder, &links, &self.forked());
    }
}

#[cfg(test)]
mod tests;
