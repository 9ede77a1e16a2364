//! All records of the cluster, and how they merge.
//!
//! INVARIANT: the catalog is the join of all records it was given, whatever order they came in and however often:
//! - a writer's slot (kind, key) holds its record with the highest (generation, sequence);
//! - what a writer's checkpoint voids (owner-written kinds below its floor) is not held;
//! - of two different records with one writer, generation and sequence, which only a clone of the writer can make, the
//!   one with the lower hash stays, and an alarm is raised.
//!
//! INVARIANT: what is applied is a function of what is held (and, for stamps from the future, of the wall clock): of
//! owner-written kinds each writer's own record; of cluster-wide kinds the one with the highest (stamp, writer,
//! generation, sequence, hash) over all writers.
//!
//! INVARIANT: `complete` of a writer never passes a record of it that still counts and is not held. It only steers what
//! is fetched: a record is taken whether it lies below or above.
//!
//! INVARIANT: this node's own sequence never begins anew, in no start: [`Catalog::restore`] takes it from disk, and
//! [`crate::sync`] fetches from the peers what a restored disk has lost before anything is written.
//!
//! Removing: owner-written tombstones go when their writer, from time to time, writes anew what still holds and then a
//! checkpoint; cluster-wide ones when all members are known to have them and they are an hour old.

mod changes;
mod graves;
mod log;
mod read;
mod told;
mod write;

use std::collections::{BTreeMap, BTreeSet};

use crate::crypto::sha256_parts;
use crate::hlc::{Clock, Stamp};
use crate::model::{AddressPlan, ClusterId, Generation, NodeId, WallMicros};
use crate::mutation::{self, Mutation};
use crate::record::{RESERVED_KINDS, Record, be_u64};
use crate::roster::{Rights, Roster, Standing};
use crate::store::{Batch, Key, Stored, Table};
use crate::value::{Kind, Scope, read_checkpoint};

pub(crate) use changes::Changes;
use changes::{Account, Tracker};
use log::{Log, Slot, slot_of};
pub use read::Duplicate;

/// Stands in the writers' states for the cluster-wide objects of all writers together.
pub const SHARED: NodeId = NodeId([0; 32]);

/// The store's notes on a log stand where no record's kind can.
const NOTE: u8 = RESERVED_KINDS;

/// Why a record was not taken. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// It is held already.
    #[error("known")]
    Known,
    /// A later one of its writer is held, or a checkpoint voids it.
    #[error("superseded")]
    Superseded,
    /// The roster doesn't know the writer (yet).
    #[error("unknown writer")]
    UnknownWriter,
    /// The writer was revoked before it.
    #[error("revoked writer")]
    Revoked,
    /// The writer has no right to write this kind.
    #[error("no right to write this")]
    NoRight,
    /// The signature is wrong.
    #[error("bad signature")]
    BadSignature,
    /// The writer has too many records.
    #[error("the writer has too many records")]
    Limit,
    /// Another record of the same writer, generation and sequence is held: the writer runs twice.
    #[error("{0} runs twice: somebody else writes with its key")]
    Clone(NodeId),
}

/// A record was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// It is held now. A superseded one is not, it only told how far the log goes.
    pub held: bool,
    /// To be written.
    pub batch: Batch,
    /// Something a person must know.
    pub alarm: Option<String>,
}

/// Why nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The object is larger than a record.
    #[error("names, labels and ports together are too long for one record (about 700 characters)")]
    TooLarge,
    /// This node has too many records.
    #[error("this node has too many objects (10,000 records, 4 MiB)")]
    Full,
    /// Grants can't be taken back.
    #[error("a part of the range that was given away can't be taken back")]
    Permanent,
}

/// What was written: records to send once the batch is on disk. Empty when all was so already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// For [`crate::sync::Sync::on_local`].
    pub records: Vec<Record>,
    /// To be written first.
    pub batch: Batch,
}

/// How far one writer's log is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriterState {
    /// All that counts up to this sequence is held.
    pub complete: u64,
    /// XOR over what is held.
    pub sum: u64,
}

/// All records.
#[derive(Clone, Debug)]
pub struct Catalog {
    me: NodeId,
    cluster: ClusterId,
    plan: AddressPlan,
    generation: Generation,
    clock: Clock,
    logs: BTreeMap<NodeId, Log>,
    /// Who holds a record in a cluster-wide slot.
    shared: BTreeMap<Slot, BTreeSet<NodeId>>,
    shared_sum: u64,
    /// What is gone since before this adds nothing to the roll-up: some may have forgotten it.
    forgettable: Stamp,
    revision: u64,
    /// The revision at which anything about the range changed.
    space_revision: u64,
    /// The revisions at which a grant came or went, a vote of this node's own, one by force, and a set of voters.
    grants_revision: u64,
    own_votes_revision: u64,
    forced_votes_revision: u64,
    sets_revision: u64,
    /// The first sequence written in this start.
    first_own: Option<u64>,
    /// Own records of this start from here on are not on disk yet: nobody may hear of them.
    unsynced: Option<u64>,
    collided: bool,
    /// Own records that had to give their places to a copy's, to be written once more; no more than the log holds.
    overwritten: Vec<Record>,
    tracker: Tracker,
}

impl Catalog {
    /// An empty one.
    pub fn new(me: NodeId, cluster: ClusterId, plan: AddressPlan, generation: Generation) -> Self {
        Self {
            me,
            cluster,
            plan,
            generation,
            clock: Clock::default(),
            logs: BTreeMap::new(),
            shared: BTreeMap::new(),
            shared_sum: 0,
            forgettable: Stamp::default(),
            revision: 0,
            space_revision: 0,
            grants_revision: 0,
            own_votes_revision: 0,
            forced_votes_revision: 0,
            sets_revision: 0,
            first_own: None,
            unsynced: None,
            collided: false,
            overwritten: Vec::new(),
            tracker: Tracker::default(),
        }
    }

    /// Takes in what was on disk. Rows that can't be read are left out: peers still have them.
    pub fn restore(&mut self, stored: &Stored, wall: WallMicros) {
        let mut notes = Vec::new();
        for (key, bytes) in stored.rows(Table::OwnRecords) {
            match key.first() {
                Some(&NOTE) => notes.push((self.me, bytes)),
                _ => self.restore_record(bytes, wall),
            }
        }
        for (key, bytes) in stored.rows(Table::Records) {
            match key.split_first_chunk::<32>() {
                Some((writer, [NOTE, ..])) => notes.push((NodeId(*writer), bytes)),
                _ => self.restore_record(bytes, wall),
            }
        }
        for (writer, note) in notes {
            if let Some((complete, top)) = note.split_first_chunk::<8>() {
                let log = self.logs.entry(writer).or_default();
                log.top = log.top.max(be_u64(top));
                log.complete = log.complete.max(be_u64(complete));
            }
        }
        self.move_on(wall);
    }

    /// Grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// [`Self::revision`] as it was when a grant, a set of voters or a vote last changed.
    pub fn space_revision(&self) -> u64 {
        self.space_revision
    }

    /// [`Self::revision`] as it was when a grant last came or went: until then [`Self::grants`] is what it was.
    pub(crate) fn grants_revision(&self) -> u64 {
        self.grants_revision
    }

    /// The same of this node's own votes.
    pub(crate) fn own_votes_revision(&self) -> u64 {
        self.own_votes_revision
    }

    /// The same of [`Self::destroyed`].
    pub(crate) fn forced_votes_revision(&self) -> u64 {
        self.forced_votes_revision
    }

    /// The same of sets of voters.
    pub(crate) fn sets_revision(&self) -> u64 {
        self.sets_revision
    }

    /// An 8-byte roll-up: equal for equal catalogs, different (but for chance) for others.
    pub fn digest(&self) -> u64 {
        self.roll_ups(1).iter().fold(0, |all, one| all ^ one)
    }

    /// The same in `count` parts, a power of two: part n is of the writers whose ids begin with n. The cluster-wide
    /// objects of all are in the first.
    pub(crate) fn roll_ups(&self, count: usize) -> Vec<u64> {
        let mut parts = vec![0; count.max(1)];
        parts[0] = self.shared_sum;
        for (writer, log) in &self.logs {
            if log.complete > 0 || log.sum > 0 {
                let fields = [
                    &writer.0[..],
                    &log.complete.to_be_bytes(),
                    &log.sum.to_be_bytes(),
                ];
                let first = usize::from(writer.0[0]) * count / 256;
                parts[first] ^= be_u64(&sha256_parts(&fields)[..8]);
            }
        }
        parts
    }

    /// How far each log is known; under [`SHARED`] the roll-up of the cluster-wide objects.
    pub fn writer_state(&self) -> BTreeMap<NodeId, WriterState> {
        let logs = self.logs.iter();
        let mut states: BTreeMap<NodeId, WriterState> = logs
            .map(|(writer, log)| {
                (
                    *writer,
                    WriterState {
                        complete: log.complete,
                        sum: log.sum,
                    },
                )
            })
            .collect();
        states.insert(
            SHARED,
            WriterState {
                complete: 0,
                sum: self.shared_sum,
            },
        );
        states
    }

    /// All whose logs are known.
    pub fn writers(&self) -> impl Iterator<Item = &NodeId> {
        self.logs.keys()
    }

    /// The state of one log.
    pub fn state_of(&self, writer: &NodeId) -> WriterState {
        if *writer == SHARED {
            return WriterState {
                complete: 0,
                sum: self.shared_sum,
            };
        }
        self.logs
            .get(writer)
            .map_or(WriterState::default(), |log| WriterState {
                complete: log.complete,
                sum: log.sum,
            })
    }

    /// Records held of a writer above a sequence, in order.
    pub fn records_after(&self, writer: &NodeId, sequence: u64) -> Vec<Record> {
        let log = self.logs.get(writer).into_iter();
        log.flat_map(|log| log.after(sequence)).cloned().collect()
    }

    /// The highest place among the records held of a writer above a sequence.
    pub fn highest_after(&self, writer: &NodeId, sequence: u64) -> Option<(Generation, u64)> {
        self.logs.get(writer)?.highest_after(sequence)
    }

    /// All that counts in a writer's roll-up; under [`SHARED`] all cluster-wide objects.
    pub fn records_that_count(&self, writer: &NodeId) -> Vec<Record> {
        if *writer == SHARED {
            let slots = self.shared.keys();
            return slots.flat_map(|slot| self.all_in(slot)).cloned().collect();
        }
        let mut records = self.records_after(writer, 0);
        records.retain(|r| r.kind().scope() != Scope::Shared);
        records
    }

    /// The last sequence of a writer that was seen: what a revocation names.
    pub fn last_sequence(&self, writer: &NodeId) -> u64 {
        self.logs.get(writer).map_or(0, |log| log.top)
    }

    /// Takes a record of any writer. It needn't be in order.
    pub fn insert(
        &mut self,
        record: &Record,
        roster: &Roster,
        wall: WallMicros,
    ) -> Result<Applied, DropReason> {
        let writer = record.writer();
        self.check_place(record)?;
        check_writer(record, roster)?;
        if !record.verify(&self.cluster) {
            return Err(DropReason::BadSignature);
        }
        if self.is_superseded(record) {
            return self.saw(record);
        }
        let mut applied = Applied {
            held: true,
            ..Applied::default()
        };
        if let Some(other) = self.twin(record) {
            let alarm = DropReason::Clone(writer);
            if other.hash() < record.hash() {
                return Err(alarm);
            }
            applied.alarm = Some(alarm.to_string());
            let slot = slot_of(other);
            let erased = self.erase(&writer, &slot, &mut applied.batch);
            if writer == self.me {
                self.collided = true;
                self.overwritten.extend(erased);
            }
        }
        if self
            .logs
            .get(&writer)
            .is_some_and(|log| log.is_full_for(record))
        {
            return Err(DropReason::Limit);
        }
        let unexpected = writer == self.me
            && record.generation() != self.generation
            && self
                .first_own
                .is_some_and(|first| record.sequence() >= first);
        self.collided |= unexpected;
        if writer == self.me && record.generation() > self.generation {
            applied.alarm = Some(DropReason::Clone(writer).to_string());
        }
        self.hold(record.clone(), wall, &mut applied.batch);
        Ok(applied)
    }

    /// A superseded record came: its place in the log is no gap any more.
    fn saw(&mut self, record: &Record) -> Result<Applied, DropReason> {
        let batch = self.learn_extent(&record.writer(), |log| log.saw(record.sequence()));
        if batch.is_empty() {
            return Err(DropReason::Superseded);
        }
        Ok(Applied {
            batch,
            ..Applied::default()
        })
    }

    /// Somebody sent all that counts of a writer from one sequence up to another.
    pub fn extend(&mut self, writer: &NodeId, from: u64, upto: u64, roster: &Roster) -> Batch {
        let end = match roster.standing(writer) {
            Standing::Revoked(last, _) => Some(last),
            Standing::Unknown | Standing::Member(_) => None,
        };
        if end.is_some() {
            // Of all that it wrote nothing may be left.
            self.logs.entry(*writer).or_default();
        }
        self.learn_extent(writer, |log| log.extend(from, upto, end))
    }

    /// Notes durably how far a log goes if `learn` changed that; nothing else may change.
    fn learn_extent(&mut self, writer: &NodeId, learn: impl FnOnce(&mut Log)) -> Batch {
        let mut batch = Batch::new();
        if let Some(log) = self.logs.get_mut(writer) {
            let before = (log.complete, log.top);
            learn(log);
            if (log.complete, log.top) != before {
                self.revision += 1;
                // Votes count once nothing is missing before them.
                self.space_revision = self.revision;
                self.note(writer, &mut batch);
            }
        }
        batch
    }

    /// Forgets all that a node wrote: what must not be done to one that is down.
    #[cfg(feature = "mutations")]
    pub(crate) fn erase_all_of(&mut self, writer: &NodeId) {
        for record in self.records_after(writer, 0) {
            self.erase(writer, &slot_of(&record), &mut Batch::new());
        }
        self.logs.remove(writer);
        self.revision += 1;
    }

    /// Drops what a change of the roster made void. Call it after every one.
    pub fn prune(&mut self, roster: &Roster) -> Batch {
        let mut batch = Batch::new();
        let writers: Vec<NodeId> = self
            .logs
            .keys()
            .copied()
            .filter(|w| *w != self.me)
            .collect();
        for writer in writers {
            let (last, rights) = match roster.standing(&writer) {
                Standing::Member(_) => {
                    self.forget_unproved(&writer, &mut batch);
                    continue;
                }
                Standing::Revoked(..) if mutation::is_on(Mutation::AcceptRevoked) => continue,
                Standing::Revoked(last, rights) => (last, rights),
                Standing::Unknown => (0, Rights(0)),
            };
            // What let it in may be void by now, and its rights with it.
            let is_void = |record: &Record| record.sequence() > last || !may_write(record, rights);
            let held = self.records_after(&writer, 0).into_iter();
            for record in held.filter(is_void) {
                self.erase(&writer, &slot_of(&record), &mut batch);
            }
            if let Some(log) = self.logs.get_mut(&writer) {
                log.cut(last);
            }
            self.revision += 1;
            self.note(&writer, &mut batch);
        }
        batch
    }

    /// A removal had cut this log where nothing is held any more, since what stood there had been superseded by what was
    /// void then; and it turned out not to count. Who comes now could never agree on how far the log goes.
    fn forget_unproved(&mut self, writer: &NodeId, batch: &mut Batch) {
        let Some(log) = self.logs.get_mut(writer) else {
            return;
        };
        if log.cut_to_held() {
            self.revision += 1;
            self.space_revision = self.revision;
            self.note(writer, batch);
        }
    }

    fn check_place(&self, record: &Record) -> Result<(), DropReason> {
        let Some(log) = self.logs.get(&record.writer()) else {
            return Ok(());
        };
        if log
            .at(record.place())
            .is_some_and(|r| r.hash() == record.hash())
        {
            return Err(DropReason::Known);
        }
        // Not worth a check of its signature.
        if record.sequence() <= log.complete && self.is_superseded(record) {
            return Err(DropReason::Superseded);
        }
        Ok(())
    }

    fn is_superseded(&self, record: &Record) -> bool {
        let Some(log) = self.logs.get(&record.writer()) else {
            return false;
        };
        if mutation::is_on(Mutation::AcceptStaleSequence) {
            return false;
        }
        let void = record.kind().scope() == Scope::Own && record.sequence() < log.floor;
        void || log
            .record(&slot_of(record))
            .is_some_and(|r| r.place() > record.place())
    }

    fn twin(&self, record: &Record) -> Option<&Record> {
        self.logs.get(&record.writer())?.at(record.place())
    }

    /// Puts a record that was checked into its slot.
    fn hold(&mut self, record: Record, wall: WallMicros, batch: &mut Batch) {
        let writer = record.writer();
        let slot = slot_of(&record);
        self.clock.observe(record.stamp(), wall);
        self.revision += 1;
        self.note_space(&record);
        batch.put(self.row(&writer, &slot), record.bytes());
        let floor = match record.kind() {
            Kind::CHECKPOINT => read_checkpoint(record.value()).filter(|f| *f <= record.sequence()),
            _ => None,
        };
        let before = self.mark(&slot);
        if slot.0.scope() == Scope::Shared {
            self.shared.entry(slot.clone()).or_default().insert(writer);
        }
        self.tracker.note(&record, Account::In);
        let revision = self.revision;
        let replaced = self.logs.entry(writer).or_default().put(record, revision);
        if let Some(replaced) = replaced {
            self.note_space(&replaced);
            self.tracker.note(&replaced, Account::Out);
        }
        self.shared_sum ^= before ^ self.mark(&slot);
        if let Some(floor) = floor {
            self.raise_floor(&writer, floor, batch);
        }
        self.note(&writer, batch);
    }

    fn raise_floor(&mut self, writer: &NodeId, floor: u64, batch: &mut Batch) {
        let Some(log) = self.logs.get_mut(writer) else {
            return;
        };
        log.floor = log.floor.max(floor);
        for slot in log.below_floor() {
            self.erase(writer, &slot, batch);
        }
    }

    fn erase(&mut self, writer: &NodeId, slot: &Slot, batch: &mut Batch) -> Option<Record> {
        let before = self.mark(slot);
        let removed = self.logs.get_mut(writer)?.remove(slot)?;
        self.tracker.note(&removed, Account::Out);
        if let Some(writers) = self.shared.get_mut(slot) {
            writers.remove(writer);
            if writers.is_empty() {
                self.shared.remove(slot);
            }
        }
        self.shared_sum ^= before ^ self.mark(slot);
        self.revision += 1;
        self.note_space(&removed);
        batch.delete(self.row(writer, slot));
        Some(removed)
    }

    /// A record came or went: does anything about the range follow from it?
    fn note_space(&mut self, record: &Record) {
        match record.kind() {
            Kind::GRANT => self.grants_revision = self.revision,
            Kind::VOTERS => self.sets_revision = self.revision,
            Kind::VOTE => {
                if record.writer() == self.me {
                    self.own_votes_revision = self.revision;
                }
                if read::decode(record).is_some_and(|(vote, _)| read::forced(vote).is_some()) {
                    self.forced_votes_revision = self.revision;
                }
            }
            _ => return,
        }
        self.space_revision = self.revision;
    }

    /// What a cluster-wide slot adds to the roll-up: all that is held there, also what another record outranks, for
    /// that one may not be due yet. It does not depend on whether a tombstone was collected already.
    fn mark(&self, slot: &Slot) -> u64 {
        if slot.0.scope() != Scope::Shared || self.is_long_gone(slot) {
            return 0;
        }
        let all = self.all_in(slot);
        all.fold(0, |sum, record| sum ^ record.short_hash())
    }

    /// What all writers wrote under one cluster-wide key.
    fn all_in(&self, slot: &Slot) -> impl Iterator<Item = &Record> {
        let writers = self.shared.get(slot).into_iter().flatten();
        writers.filter_map(|writer| self.held(writer, slot))
    }

    fn restore_record(&mut self, bytes: &[u8], wall: WallMicros) {
        let Ok(record) = Record::parse(bytes) else {
            return;
        };
        if !self.is_superseded(&record) {
            self.hold(record, wall, &mut Batch::new());
        }
    }

    fn row(&self, writer: &NodeId, slot: &Slot) -> Key {
        self.key(writer, slot.0.0, &slot.1)
    }

    fn key(&self, writer: &NodeId, kind: u8, key: &[u8]) -> Key {
        if *writer == self.me {
            Table::OwnRecords.key(&[&[kind], key])
        } else {
            Table::Records.key(&[&writer.0, &[kind], key])
        }
    }

    /// Notes how far a log is known.
    fn note(&self, writer: &NodeId, batch: &mut Batch) {
        let Some(log) = self.logs.get(writer) else {
            return;
        };
        let note = [log.complete.to_be_bytes(), log.top.to_be_bytes()].concat();
        batch.put(self.key(writer, NOTE, &[]), note);
    }
}

/// Enough of a writer's id to tell it from others in a lineage.
fn short(id: &NodeId) -> [u8; 8] {
    let mut short = [0; 8];
    short.copy_from_slice(&id.0[..8]);
    short
}

/// The order in which cluster-wide records win.
fn rank(record: &Record) -> (Stamp, NodeId, (Generation, u64), [u8; 32]) {
    (
        record.stamp(),
        record.writer(),
        record.place(),
        *record.hash(),
    )
}

fn check_writer(record: &Record, roster: &Roster) -> Result<(), DropReason> {
    let rights = match roster.standing(&record.writer()) {
        Standing::Revoked(_, rights) if mutation::is_on(Mutation::AcceptRevoked) => rights,
        Standing::Unknown => return Err(DropReason::UnknownWriter),
        Standing::Revoked(last, _) if record.sequence() > last => return Err(DropReason::Revoked),
        Standing::Revoked(_, rights) | Standing::Member(rights) => rights,
    };
    match may_write(record, rights) {
        true => Ok(()),
        false => Err(DropReason::NoRight),
    }
}

fn may_write(record: &Record, rights: Rights) -> bool {
    record.kind().scope() != Scope::Shared || rights.has(Rights::PUBLISH)
}

#[cfg(test)]
pub(crate) mod tests;
