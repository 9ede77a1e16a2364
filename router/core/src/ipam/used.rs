//! Addresses in use, so that counting those of a network does not look at each of them.

use std::collections::{BTreeMap, BTreeSet};

/// Addresses are counted in blocks of 256.
const BLOCK_BITS: u32 = 8;

/// A set of addresses.
///
/// INVARIANT: `blocks` says how many of them are in each block where there are any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    all: BTreeSet<u32>,
    blocks: BTreeMap<u32, u32>,
}

impl Used {
    pub(super) fn insert(&mut self, ip: u32) {
        if self.all.insert(ip) {
            *self.blocks.entry(ip >> BLOCK_BITS).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, ip: u32) -> bool {
        let was_there = self.all.remove(&ip);
        let block = ip >> BLOCK_BITS;
        if was_there && let Some(count) = self.blocks.get_mut(&block) {
            *count -= 1;
            if *count == 0 {
                self.blocks.remove(&block);
            }
        }
        was_there
    }

    pub(super) fn contains(&self, ip: u32) -> bool {
        self.all.contains(&ip)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.all.iter().copied()
    }

    /// Those within `first..=last`.
    pub(super) fn within(&self, first: u32, last: u32) -> impl Iterator<Item = u32> + '_ {
        let some = (first <= last).then(|| self.all.range(first..=last));
        some.into_iter().flatten().copied()
    }

    /// How many are within `first..=last`.
    pub(super) fn count(&self, first: u32, last: u32) -> u64 {
        let (low, high) = (first >> BLOCK_BITS, last >> BLOCK_BITS);
        if high.saturating_sub(low) < 2 {
            return self.within(first, last).count() as u64;
        }
        let end_of_low = ((low + 1) << BLOCK_BITS) - 1;
        let edges =
            self.within(first, end_of_low).count() + self.within(high << BLOCK_BITS, last).count();
        let between = self.blocks.range(low + 1..high);
        edges as u64 + between.map(|(_, count)| u64::from(*count)).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_counts_as_a_plain_set_does(
            ops in proptest::collection::vec((any::<bool>(), 0u32..2000), 0..300),
            windows in proptest::collection::vec((0u32..2100, 0u32..2100), 1..20),
            offset in prop_oneof![Just(0u32), Just(u32::MAX - 2100)],
        ) {
            let (mut used, mut model) = (Used::default(), BTreeSet::new());
            for (add, ip) in ops {
                let ip = ip + offset;
                match add {
                    true => {
                        used.insert(ip);
                        model.insert(ip);
                    }
                    false => prop_assert_eq!(used.remove(ip), model.remove(&ip)),
                }
            }
            prop_assert!(used.iter().eq(model.iter().copied()));
            for (first, last) in windows {
                let (first, last) = (first + offset, last + offset);
                let wanted = model.iter().filter(|ip| (first..=last).contains(*ip)).count();
                prop_assert_eq!(used.count(first, last), wanted as u64);
            }
            prop_assert_eq!(used.count(0, u32::MAX), model.len() as u64);
        }
    }
}
