//! Writing this node's own log, and cluster-wide objects in its name.

use super::log::{Slot, slot_of};
use super::read::decode;
use super::{Catalog, WriteError, Written, rank, short};
use crate::identity::Identity;
use crate::model::{Generation, WallMicros};
use crate::record::{Draft, Record, RecordError};
use crate::store::Batch;
use crate::value::{Kind, Lineage, Object, Scope, checkpoint};

/// Records of other writers that a cluster-wide record names as known.
const MAX_COVERS: usize = 8;
/// Tombstones that a node keeps in its own log before it writes what holds anew, with a checkpoint.
const MAX_GRAVES: usize = 512;

impl Catalog {
    /// Writes an object of this node, or a cluster-wide one in its name. Nothing happens when it is so already.
    pub fn put(
        &mut self,
        object: &Object,
        identity: &Identity,
        wall: WallMicros,
    ) -> Result<Written, WriteError> {
        let slot = (object.kind(), object.key());
        let value = match object.kind().scope() {
            Scope::Shared => {
                if self.shared_object(slot.0, &slot.1, wall).as_ref() == Some(object)
                    && self.is_settled(&slot)
                {
                    return Ok(Written::default());
                }
                object.encode(self.lineage(&slot, wall))
            }
            _ => object.encode(Lineage::default()),
        };
        if self
            .held(&self.me, &slot)
            .is_some_and(|r| !r.is_tombstone() && r.value() == value)
        {
            return Ok(Written::default());
        }
        let network = object.network_number(&self.plan);
        self.write(&slot, Some(&value), network, identity, wall)
    }

    /// Says that an object is gone: one of this node's own, or a cluster-wide one whoever wrote it.
    pub fn remove(
        &mut self,
        kind: Kind,
        key: &[u8],
        identity: &Identity,
        wall: WallMicros,
    ) -> Result<Written, WriteError> {
        let slot = (kind, key.to_vec());
        if kind == Kind::GRANT {
            return Err(WriteError::Permanent);
        }
        let present = match kind.scope() {
            Scope::Shared => self.winner(&slot, Some(wall)),
            _ => self.held(&self.me, &slot),
        };
        match present.filter(|r| !r.is_tombstone()).map(Record::network) {
            Some(network) => self.write(&slot, None, network, identity, wall),
            None => Ok(Written::default()),
        }
    }

    /// This node learnt own records that it had lost, after it had written new ones under their sequences (it waited for
    /// its peers in vain), or that a copy of it wrote. Writes what this start wrote once more, above all of them.
    pub fn repair(&mut self, identity: &Identity, wall: WallMicros) -> Result<Written, WriteError> {
        let mut written = Written::default();
        if !std::mem::take(&mut self.collided) {
            return Ok(written);
        }
        self.write_start_anew(self.generation, identity, wall, &mut written)?;
        Ok(written)
    }

    /// This start counts as a later one from here on; what it wrote it writes once more.
    pub fn become_later(
        &mut self,
        later: Generation,
        identity: &Identity,
        wall: WallMicros,
    ) -> Result<Written, WriteError> {
        let mut written = Written::default();
        let former = std::mem::replace(&mut self.generation, later);
        self.write_start_anew(former, identity, wall, &mut written)?;
        Ok(written)
    }

    /// Writes what this start wrote in `generation` once more.
    fn write_start_anew(
        &mut self,
        generation: Generation,
        identity: &Identity,
        wall: WallMicros,
        written: &mut Written,
    ) -> Result<(), WriteError> {
        let mut mine = match self.first_own.take() {
            Some(first) => self.records_after(&self.me, first.saturating_sub(1)),
            None => Vec::new(),
        };
        let overwritten = std::mem::take(&mut self.overwritten).into_iter();
        mine.extend(overwritten.filter(|record| {
            let held = self.held(&self.me, &slot_of(record));
            held.is_none_or(|held| held.place() <= record.place())
        }));
        mine.retain(|record| record.generation() == generation);
        for record in mine {
            self.rewrite(&record, identity, wall, written)?;
        }
        Ok(())
    }

    /// This start's number is not above the last in this node's own log, and nothing is written in it yet: that number. What
    /// it wrote would count as written before what others hold.
    pub fn outdated_by(&self) -> Option<Generation> {
        let (last, _) = self.highest_after(&self.me, 0)?;
        (self.first_own.is_none() && last >= self.generation).then_some(last)
    }

    /// This node is ready: of its own log nothing more is to come. What is missing there another with its key wrote and
    /// nobody kept.
    pub fn close_own_log(&mut self) -> Batch {
        let me = self.me;
        self.learn_extent(&me, |log| log.complete = log.top)
    }

    /// Has this node written under sequences that its own lost log holds too, or a copy's? Then [`Self::repair`].
    pub fn needs_repair(&self) -> bool {
        self.collided
    }

    pub(super) fn is_settled(&self, slot: &Slot) -> bool {
        let live = self.all_in(slot).filter(|record| !record.is_tombstone());
        live.count() <= 1
    }

    pub(super) fn lineage(&self, slot: &Slot, wall: WallMicros) -> Lineage {
        let born = self
            .winner(slot, Some(wall))
            .and_then(decode)
            .map(|(_, lineage)| lineage.born);
        let others = self.all_in(slot).filter(|r| r.writer() != self.me);
        let mut known: Vec<&Record> = others.collect();
        known.sort_by_key(|r| std::cmp::Reverse(rank(r)));
        let covers = known
            .iter()
            .take(MAX_COVERS)
            .map(|r| (short(&r.writer()), r.sequence()));
        Lineage {
            // A new object is born a moment before its record is stamped, on the same clock.
            born: born.unwrap_or_else(|| (self.clock.clone().tick(wall), short(&self.me))),
            covers: covers.collect(),
        }
    }

    /// Writes whatever it is told to, under the next sequence.
    #[cfg(feature = "deviations")]
    pub(crate) fn write_as_is(
        &mut self,
        slot: &Slot,
        value: Option<&[u8]>,
        identity: &Identity,
        wall: WallMicros,
    ) -> Result<Written, WriteError> {
        self.write(slot, value, 0, identity, wall)
    }

    #[cfg(feature = "deviations")]
    pub(crate) fn lineage_of(&self, slot: &Slot, wall: WallMicros) -> Lineage {
        self.lineage(slot, wall)
    }

    pub(super) fn write(
        &mut self,
        slot: &Slot,
        value: Option<&[u8]>,
        network: u16,
        identity: &Identity,
        wall: WallMicros,
    ) -> Result<Written, WriteError> {
        let mut written = Written::default();
        self.append(slot, value, network, identity, wall, &mut written)?;
        if self
            .logs
            .get(&self.me)
            .is_some_and(|log| log.graves > MAX_GRAVES)
        {
            self.compact(identity, wall, &mut written)?;
        }
        Ok(written)
    }

    /// Writes the next record of the own log.
    pub(super) fn append(
        &mut self,
        slot: &Slot,
        value: Option<&[u8]>,
        network: u16,
        identity: &Identity,
        wall: WallMicros,
        written: &mut Written,
    ) -> Result<(), WriteError> {
        debug_assert_eq!(identity.id(), self.me);
        let mut clock = self.clock;
        let sequence = self
            .last_sequence(&self.me)
            .checked_add(1)
            .ok_or(WriteError::Full)?;
        let draft = Draft {
            generation: self.generation,
            sequence,
            stamp: clock.tick(wall),
            network,
            kind: slot.0,
            key: &slot.1,
            value,
        };
        let record = Record::sign(&self.cluster, identity, &draft).map_err(|e| match e {
            RecordError::Length | RecordError::Header => WriteError::TooLarge,
        })?;
        let full = self
            .logs
            .get(&self.me)
            .is_some_and(|log| log.is_full_for(&record));
        if full && value.is_some() {
            return Err(WriteError::Full);
        }
        self.clock = clock;
        self.first_own.get_or_insert(sequence);
        self.hold(record.clone(), wall, &mut written.batch);
        let log = self.logs.entry(self.me).or_default();
        log.complete = log.top;
        self.note(&self.me.clone(), &mut written.batch);
        written.records.push(record);
        Ok(())
    }

    /// Writes all own records of owner-written kinds that still hold anew, then a checkpoint that voids the older ones.
    pub(super) fn compact(
        &mut self,
        identity: &Identity,
        wall: WallMicros,
        written: &mut Written,
    ) -> Result<(), WriteError> {
        let floor = self.last_sequence(&self.me).saturating_add(1);
        let mut mine = self.records_that_count(&self.me);
        mine.retain(|r| {
            r.kind().scope() == Scope::Own && r.kind() != Kind::CHECKPOINT && !r.is_tombstone()
        });
        for record in mine {
            self.rewrite(&record, identity, wall, written)?;
        }
        let slot = (Kind::CHECKPOINT, Vec::new());
        self.append(&slot, Some(&checkpoint(floor)), 0, identity, wall, written)
    }

    pub(super) fn rewrite(
        &mut self,
        record: &Record,
        identity: &Identity,
        wall: WallMicros,
        written: &mut Written,
    ) -> Result<(), WriteError> {
        let value = (!record.is_tombstone()).then(|| record.value());
        self.append(
            &slot_of(record),
            value,
            record.network(),
            identity,
            wall,
            written,
        )
    }
}
