//! One writer's log: its latest record under each key, and how far the log is known.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::Generation;
use crate::record::Record;
use crate::value::{Kind, Scope};

/// Where a record stands: its kind and key.
pub(super) type Slot = (Kind, Vec<u8>);

/// Most records of one writer.
pub(super) const MAX_RECORDS: usize = 10_000;
/// Most octets of one writer's records.
pub(super) const MAX_OCTETS: usize = 4 << 20;
/// Most octets of one writer's records of unknown kinds.
pub(super) const MAX_UNKNOWN_OCTETS: usize = 64 << 10;

#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) record: Record,
    /// The catalog's revision when it came.
    pub(super) since: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    pub(super) slots: BTreeMap<Slot, Held>,
    by_place: BTreeMap<(u64, Generation), Slot>,
    /// All that still counts up to here is known.
    pub(super) complete: u64,
    /// The highest sequence seen under the writer's signature.
    pub(super) top: u64,
    /// Records of owner-written kinds below this are void: the writer's checkpoint says so.
    pub(super) floor: u64,
    /// XOR over the hashes of all held records that are not cluster-wide.
    pub(super) sum: u64,
    octets: usize,
    unknown_octets: usize,
    /// Tombstones of owner-written kinds.
    pub(super) graves: usize,
}

impl Log {
    pub(super) fn record(&self, slot: &Slot) -> Option<&Record> {
        self.slots.get(slot).map(|h| &h.record)
    }

    /// All records of a kind.
    pub(super) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Record> {
        let range = (kind, Vec::new())..(Kind(kind.0 + 1), Vec::new());
        self.slots.range(range).map(|(_, held)| &held.record)
    }

    /// The record held with this generation and sequence.
    pub(super) fn at(&self, place: (Generation, u64)) -> Option<&Record> {
        self.record(self.by_place.get(&(place.1, place.0))?)
    }

    /// Would `record` break a limit?
    pub(super) fn is_full_for(&self, record: &Record) -> bool {
        let replaced = self.record(&slot_of(record)).map_or(0, |r| r.bytes().len());
        let more = record.bytes().len();
        let unknown = record.kind().scope() == Scope::Unknown;
        (replaced == 0 && self.slots.len() >= MAX_RECORDS)
            || self.octets + more - replaced > MAX_OCTETS
            || (unknown && self.unknown_octets + more - replaced > MAX_UNKNOWN_OCTETS)
    }

    /// Puts `record` in its slot; what was there.
    pub(super) fn put(&mut self, record: Record, since: u64) -> Option<Record> {
        let slot = slot_of(&record);
        let replaced = self.remove(&slot);
        self.account(&record, Account::In);
        self.top = self.top.max(record.sequence());
        self.by_place
            .insert((record.sequence(), record.generation()), slot.clone());
        self.slots.insert(slot, Held { record, since });
        self.walk();
        replaced
    }

    /// Empties a slot.
    pub(super) fn remove(&mut self, slot: &Slot) -> Option<Record> {
        let held = self.slots.remove(slot)?;
        let (generation, sequence) = held.record.place();
        self.by_place.remove(&(sequence, generation));
        self.account(&held.record, Account::Out);
        Some(held.record)
    }

    /// Somebody who has all up to `upto` said that nothing is missing between `from` and there. Of a writer that was
    /// revoked nothing beyond `end` counts; what stood there may be void itself, so that no record shows how far the log
    /// goes.
    pub(super) fn extend(&mut self, from: u64, upto: u64, end: Option<u64>) {
        if self.complete >= from {
            // Nobody can claim more than the writer signed, or than who revoked it lets count.
            let end = self.top.max(end.unwrap_or_default());
            self.complete = self.complete.max(upto.min(end));
            self.walk();
        }
    }

    /// A record with this sequence was seen, though it may be superseded.
    pub(super) fn saw(&mut self, sequence: u64) {
        self.top = self.top.max(sequence);
        if self.complete.checked_add(1) == Some(sequence) {
            self.complete = sequence;
            self.walk();
        }
    }

    /// Nothing after `last` counts.
    pub(super) fn cut(&mut self, last: u64) {
        self.complete = self.complete.min(last);
        self.top = self.top.min(last);
    }

    /// Nothing after the last record that is held can be proved to anybody; was more believed?
    pub(super) fn cut_to_held(&mut self) -> bool {
        let held = self
            .by_place
            .last_key_value()
            .map_or(0, |((sequence, _), _)| *sequence);
        let more = self.top > held;
        self.cut(held);
        more
    }

    /// Records above a sequence, in order.
    pub(super) fn after(&self, sequence: u64) -> impl Iterator<Item = &Record> {
        let from = sequence.saturating_add(1);
        let range = if from > sequence {
            self.by_place.range((from, Generation(0))..)
        } else {
            Default::default()
        };
        range.filter_map(|(_, slot)| self.record(slot))
    }

    /// The highest place of those.
    pub(super) fn highest_after(&self, sequence: u64) -> Option<(Generation, u64)> {
        let from = sequence.checked_add(1)?;
        let places = self.by_place.range((from, Generation(0))..);
        places.map(|(place, _)| (place.1, place.0)).max()
    }

    /// Slots of owner-written kinds that the checkpoint voids.
    pub(super) fn below_floor(&self) -> BTreeSet<Slot> {
        self.by_place
            .range(..(self.floor, Generation(0)))
            .map(|(_, slot)| slot)
            .filter(|slot| slot.0.scope() == Scope::Own)
            .cloned()
            .collect()
    }

    fn walk(&mut self) {
        while let Some(next) = self.complete.checked_add(1) {
            if self
                .by_place
                .range((next, Generation(0))..=(next, Generation(u64::MAX)))
                .next()
                .is_none()
            {
                break;
            }
            self.complete = next;
        }
    }

    fn account(&mut self, record: &Record, account: Account) {
        let scope = record.kind().scope();
        let octets = record.bytes().len();
        let unknown = if scope == Scope::Unknown { octets } else { 0 };
        let grave = usize::from(scope == Scope::Own && record.is_tombstone());
        if scope != Scope::Shared {
            self.sum ^= record.short_hash();
        }
        match account {
            Account::In => {
                self.octets += octets;
                self.unknown_octets += unknown;
                self.graves += grave;
            }
            Account::Out => {
                self.octets -= octets;
                self.unknown_octets -= unknown;
                self.graves -= grave;
            }
        }
    }
}

enum Account {
    In,
    Out,
}

pub(super) fn slot_of(record: &Record) -> Slot {
    (record.kind(), record.key().to_vec())
}
