//! Free addresses, so that the lowest one is found without looking at those that are taken.

use std::collections::BTreeMap;
use std::ops::Bound;

/// Free addresses as intervals: first address -> last address.
///
/// INVARIANT: intervals neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Free(BTreeMap<u32, u32>);

impl Free {
    /// Takes an address out; false if it was not free.
    pub(super) fn take(&mut self, ip: u32) -> bool {
        let Some((start, last)) = self.around(ip) else {
            return false;
        };
        if start < ip {
            self.0.insert(start, ip - 1);
        } else {
            self.0.remove(&start);
        }
        if ip < last {
            self.0.insert(ip + 1, last);
        }
        true
    }

    /// Puts an address in.
    pub(super) fn give(&mut self, ip: u32) {
        if !self.contains(ip) {
            self.add(ip, ip);
        }
    }

    /// Puts all of `first..=end` in.
    pub(super) fn add(&mut self, first: u32, end: u32) {
        self.cut(first, end);
        let below = first.checked_sub(1).and_then(|below| self.around(below));
        let above = end.checked_add(1).and_then(|above| self.around(above));
        let start = below.map_or(first, |(start, _)| start);
        let last = above.map_or(end, |(_, last)| last);
        if let Some((above, _)) = above {
            self.0.remove(&above);
        }
        self.0.insert(start, last);
    }

    /// Takes out all of `first..=last`.
    pub(super) fn cut(&mut self, first: u32, last: u32) {
        let pieces: Vec<(u32, u32)> = self.within(first, last).collect();
        for (start, end) in pieces {
            let Some((before, after)) = self.around(start) else {
                continue;
            };
            self.0.remove(&before);
            if before < start {
                self.0.insert(before, start - 1);
            }
            if after > end {
                self.0.insert(end + 1, after);
            }
        }
    }

    pub(super) fn contains(&self, ip: u32) -> bool {
        self.around(ip).is_some()
    }

    /// The intervals within `first..=last`, cut to it, in ascending order.
    pub(super) fn within(&self, first: u32, last: u32) -> impl Iterator<Item = (u32, u32)> {
        let reaching = self.around(first).filter(|_| first <= last);
        let range = (Bound::Excluded(first), Bound::Included(last.max(first)));
        let inside = self.0.range(range).map(|(start, end)| (*start, *end));
        reaching
            .into_iter()
            .map(move |(_, end)| (first, end))
            .chain(inside)
            .map(move |(start, end)| (start, end.min(last)))
    }

    /// The interval that holds an address.
    fn around(&self, ip: u32) -> Option<(u32, u32)> {
        let (start, last) = self.0.range(..=ip).next_back()?;
        (ip <= *last).then_some((*start, *last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_the_set_of_free_addresses_however_it_came_about(
            ops in proptest::collection::vec((0u8..10, 0u32..64), 0..200),
            window in (0u32..64, 0u32..64),
        ) {
            let mut free = Free::default();
            free.add(3, 20);
            free.add(40, 50);
            prop_assert!([5, 6, 41].into_iter().all(|ip| free.take(ip)));
            let mut model: BTreeSet<u32> = (3..=20).chain(40..=50).filter(|ip| ![5, 6, 41].contains(ip)).collect();
            for (what, ip) in ops {
                match what {
                    0..4 => {
                        free.give(ip);
                        model.insert(ip);
                    }
                    4..8 => prop_assert_eq!(free.take(ip), model.remove(&ip)),
                    8 => {
                        free.add(ip, ip + 5);
                        model.extend(ip..=ip + 5);
                    }
                    _ => {
                        free.cut(ip, ip + 5);
                        model.retain(|had| !(ip..=ip + 5).contains(had));
                    }
                }
            }
            let (first, last) = window;
            let seen: Vec<u32> = free.within(first, last).flat_map(|(a, b)| a..=b).collect();
            let wanted: Vec<u32> = model.iter().copied().filter(|ip| (first..=last).contains(ip)).collect();
            prop_assert_eq!(seen, wanted);
            let whole: Vec<(u32, u32)> = free.within(0, u32::MAX).collect();
            for pair in whole.windows(2) {
                prop_assert!(pair[0].1 + 1 < pair[1].0, "{:?} touch", pair);
            }
        }
    }

    #[test]
    fn the_ends_of_the_address_space_are_addresses_like_others() {
        let mut free = Free::default();
        free.add(0, u32::MAX);
        assert!(free.take(0) && free.take(u32::MAX) && !free.take(0));
        free.give(u32::MAX);
        free.give(0);
        assert_eq!(
            free.within(0, u32::MAX).collect::<Vec<_>>(),
            [(0, u32::MAX)]
        );
        assert_eq!(free.within(7, 3).count(), 0);
    }
}
