//! A disk that keeps whole batches in order, and forgets what it had not synced when the power goes.

use std::collections::VecDeque;

use weft_core::crypto::Random;

/// One host's disk.
#[derive(Clone)]
pub struct Disk<B> {
    durable: Vec<B>,
    written: VecDeque<(u64, B)>,
}

impl<B> Default for Disk<B> {
    fn default() -> Self {
        Self {
            durable: Vec::new(),
            written: VecDeque::new(),
        }
    }
}

impl<B> Disk<B> {
    /// What a start would find.
    pub fn durable(&self) -> &[B] {
        &self.durable
    }

    /// How much there is now: for [`Self::turn_back`].
    pub fn mark(&self) -> usize {
        self.durable.len()
    }

    /// It is again what it was then.
    pub fn turn_back(&mut self, mark: usize) {
        self.written.clear();
        self.durable.truncate(mark);
    }

    /// Takes a batch, not yet for good.
    pub fn write(&mut self, id: u64, batch: B) {
        self.written.push_back((id, batch));
    }

    /// Keeps for good all batches up to `id`, in order, and says which these were: each is to be acknowledged.
    pub fn sync(&mut self, id: u64) -> Vec<u64> {
        let Some(last) = self.written.iter().position(|(written, _)| *written == id) else {
            return Vec::new();
        };
        let kept = self.written.drain(..=last);
        let mut ids = Vec::new();
        for (id, batch) in kept {
            ids.push(id);
            self.durable.push(batch);
        }
        ids
    }

    /// The power goes. Of what was not synced some first part may have reached the disk, nobody knows how much; each
    /// batch is there as a whole or not at all, as an ACID store promises.
    pub fn lose_power(&mut self, random: &mut Random) {
        let kept = random.range(self.written.len() as u64 + 1) as usize;
        let kept = self.written.drain(..kept).map(|(_, batch)| batch);
        self.durable.extend(kept);
        self.written.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synced_batch_survives_and_the_rest_is_a_prefix() {
        for seed in 0..50 {
            let mut random = Random::from_seed([seed; 32]);
            let mut disk = Disk::default();
            (0..6).for_each(|id| disk.write(id, id));
            assert_eq!(disk.sync(2), [0, 1, 2]);
            disk.lose_power(&mut random);
            let found = disk.durable();
            assert!(found.len() >= 3);
            assert!(found.iter().copied().eq(0..found.len() as u64));
            assert!(disk.sync(5).is_empty());
        }
    }
}
