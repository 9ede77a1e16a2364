//! Which counters were received: the sliding window of RFC 6479, in words that are cleared as it moves on.

/// How far behind the highest counter a datagram may come.
pub const WINDOW: u64 = 8192;
const WORDS: u64 = WINDOW / 64 + 1;

/// The counters received in one direction of a session. Ask only after the seal was found good.
pub struct ReplayWindow {
    last: u64,
    words: [u64; WORDS as usize],
}

impl ReplayWindow {
    /// Nothing received yet.
    pub fn new() -> Self {
        Self {
            last: 0,
            words: [0; WORDS as usize],
        }
    }

    /// Notes `counter`; false when it was noted before, or lies so far back that nobody knows.
    pub fn accept(&mut self, counter: u64) -> bool {
        if counter > self.last {
            self.advance(counter);
        } else if self.last - counter >= WINDOW {
            return false;
        }
        let word = &mut self.words[((counter / 64) % WORDS) as usize];
        let bit = 1 << (counter % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    fn advance(&mut self, counter: u64) {
        let (from, to) = (self.last / 64, counter / 64);
        // One word more than the window: the one that holds its oldest part is not yet cleared.
        for step in 1..=(to - from).min(WORDS) {
            self.words[((from + step) % WORDS) as usize] = 0;
        }
        self.last = counter;
    }
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Slow and obvious: all counters ever seen.
    #[derive(Default)]
    struct Model {
        seen: BTreeSet<u64>,
        last: u64,
    }

    impl Model {
        fn accept(&mut self, counter: u64) -> bool {
            self.last = self.last.max(counter);
            self.last - counter < WINDOW && self.seen.insert(counter)
        }
    }

    #[test]
    fn first_counters_are_accepted_once() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(0));
        assert!(!window.accept(0));
        assert!(window.accept(8192));
        assert!(window.accept(1));
        assert!(!window.accept(1));
        assert!(window.accept(u64::MAX));
        assert!(!window.accept(8193));
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_slow_model(steps in proptest::collection::vec((0u8..4, 0u64..20_000), 1..400)) {
            let (mut window, mut model) = (ReplayWindow::new(), Model::default());
            for (how, by) in steps {
                let counter = match how {
                    0 => model.last + by % 3,
                    1 => model.last.saturating_sub(by % 64),
                    2 => model.last.saturating_sub(by),
                    _ => model.last + by,
                };
                prop_assert_eq!(window.accept(counter), model.accept(counter));
            }
        }
    }
}
