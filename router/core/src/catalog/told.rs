//! What others may hear of: their own records, and of this node's those that are on disk.

use crate::model::NodeId;
use crate::record::Record;

use super::Catalog;

impl Catalog {
    /// The next few of [`Self::records_after`], of those that others may hear of.
    pub(crate) fn next_records(&self, writer: &NodeId, sequence: u64, limit: usize) -> Vec<Record> {
        let log = self.logs.get(writer).into_iter();
        log.flat_map(|log| log.after(sequence))
            .take_while(|record| self.may_be_told(record))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Is it on disk, or another's?
    pub(crate) fn may_be_told(&self, record: &Record) -> bool {
        record.writer() != self.me
            || record.generation() != self.generation
            || self.unsynced.is_none_or(|first| record.sequence() < first)
    }

    /// How far a log is known that others may hear of.
    pub(crate) fn complete_to_tell(&self, writer: &NodeId) -> u64 {
        let complete = self.state_of(writer).complete;
        match self.unsynced.filter(|_| *writer == self.me) {
            Some(first) => complete.min(first.saturating_sub(1)),
            None => complete,
        }
    }

    /// These own records are not on disk yet: nobody may hear of them.
    pub(crate) fn hold_back(&mut self, records: &[Record]) {
        if let Some(first) = records.first() {
            self.unsynced.get_or_insert(first.sequence());
        }
    }

    /// Own records up to this one are on disk.
    pub(crate) fn on_synced(&mut self, record: &Record) {
        let next = record.sequence().saturating_add(1);
        self.unsynced = self
            .unsynced
            .map(|first| first.max(next))
            .filter(|first| *first <= self.last_sequence(&self.me));
    }
}
