//! What is gone for good: cluster-wide tombstones are forgotten when all members have them and they are old enough.

use std::time::Duration;

use crate::hlc::Stamp;
use crate::model::WallMicros;
use crate::store::Batch;

use super::Catalog;
use super::log::Slot;

/// A cluster-wide tombstone is kept at least so long, to the minute.
const GRAVE_AGE: Duration = Duration::from_secs(3600);
const MINUTE: u64 = 60_000_000;

impl Catalog {
    /// Forgets cluster-wide objects that are gone, where all members are known to have held what this catalog held at
    /// revision `settled`.
    pub fn collect(&mut self, wall: WallMicros, settled: u64) -> Batch {
        let mut batch = Batch::new();
        self.move_on(wall);
        let mut slots: Vec<Slot> = self.shared.keys().cloned().collect();
        slots.retain(|slot| self.is_forgettable(slot, settled));
        for slot in slots {
            for writer in self.shared.get(&slot).cloned().unwrap_or_default() {
                self.erase(&writer, &slot, &mut batch);
            }
        }
        batch
    }

    /// From here on what is gone for so long that some may have forgotten it adds nothing to the roll-up. All clocks
    /// but wrong ones come to that at nearly the same moment when this is called often.
    pub(crate) fn move_on(&mut self, wall: WallMicros) {
        let old = wall.0.saturating_sub(GRAVE_AGE.as_micros() as u64);
        let forgettable = Stamp::at(WallMicros(old - old % MINUTE));
        if self.forgettable == forgettable {
            return;
        }
        self.forgettable = forgettable;
        self.shared_sum = self
            .shared
            .keys()
            .fold(0, |sum, slot| sum ^ self.mark(slot));
    }

    fn is_forgettable(&self, slot: &Slot, settled: u64) -> bool {
        let writers = self.shared.get(slot).into_iter().flatten();
        let mut logs = writers.filter_map(|writer| self.logs.get(writer));
        self.is_long_gone(slot)
            && logs.all(|log| {
                log.slots
                    .get(slot)
                    // The last record of a log stays: it proves how far the log goes.
                    .is_none_or(|held| held.since <= settled && held.record.sequence() < log.top)
            })
    }

    pub(super) fn is_long_gone(&self, slot: &Slot) -> bool {
        let winner = self.winner(slot, None);
        winner.is_some_and(|record| record.is_tombstone() && record.stamp() < self.forgettable)
    }
}
