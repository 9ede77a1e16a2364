//! What one peer's handshakes tell of its starts: which is its latest, which of its calls was the last, and whether two run at
//! once with its key (a copied disk or virtual machine).

use std::time::Duration;

use crate::model::{Generation, Now};

/// A call of a node's earlier start, or instance, may come so long after its present one was first seen; one that comes
/// later was made by a copy that still runs.
const OVERLAP: Duration = Duration::from_secs(30);
/// Instance numbers remembered of one generation.
const INSTANCES: usize = 8;

/// The place of a call: of the later start the higher counter.
pub(super) type Place = (Generation, u64);

pub(super) struct Starts {
    /// The highest place of a call.
    seen: Place,
    /// When the present generation was first seen, and the highest place of a call of the one before.
    began: Now,
    before: Place,
    /// Instance numbers shown in the present generation, the latest last, and when that one was first seen.
    instances: Vec<u64>,
    since: Now,
}

impl Starts {
    pub(super) fn new(now: Now) -> Self {
        Self {
            seen: (Generation(0), 0),
            began: now,
            before: (Generation(0), 0),
            instances: Vec::new(),
            since: now,
        }
    }

    pub(super) fn latest(&self) -> Generation {
        self.seen.0
    }

    /// Was this call seen before, or one that was made after it?
    pub(super) fn is_old(&self, call: Place) -> bool {
        call <= self.seen
    }

    /// An old call came: was it made by a copy? When it comes so long after the later start was first seen, it can't have
    /// been on its way since before: the earlier one still runs. A call that came before, or that somebody recorded and
    /// that came already, says nothing.
    pub(super) fn note_old(&mut self, now: Now, old: Place) -> bool {
        let lives_on = old.0 < self.seen.0 && old > self.before;
        let is_copy = lives_on && now.since(self.began) >= OVERLAP;
        if is_copy {
            self.before = old;
        }
        is_copy
    }

    /// A call came that nobody has seen before, or an answer (which counts as the first call of its start): was it made by
    /// a copy? Each start draws an instance number, and so does a resumed snapshot. One that comes back so long after another
    /// was first seen belongs to a second copy that is still running.
    pub(super) fn note(&mut self, now: Now, fresh: Place, instance: u64) -> bool {
        if fresh.0 > self.seen.0 {
            self.before = self.seen;
            self.began = now;
            self.instances.clear();
        }
        self.seen = self.seen.max(fresh);
        if self.instances.last() == Some(&instance) {
            return false;
        }
        let known = self.instances.iter().position(|i| *i == instance);
        match known {
            Some(_) if now.since(self.since) < OVERLAP => return false,
            Some(position) => drop(self.instances.remove(position)),
            None if self.instances.len() >= INSTANCES => drop(self.instances.remove(0)),
            None => {}
        }
        self.instances.push(instance);
        self.since = now;
        known.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u64 = 7;
    const B: u64 = 8;

    fn at(seconds: u64) -> Now {
        Now(Duration::from_secs(seconds))
    }

    fn call(generation: u64, counter: u64) -> Place {
        (Generation(generation), counter)
    }

    #[test]
    fn an_earlier_start_that_calls_long_after_is_a_copy() {
        let mut starts = Starts::new(at(0));
        assert!(!starts.note(at(1), call(1, 5), A));
        assert!(!starts.note(at(2), call(2, 1), B));
        assert!(starts.is_old(call(1, 6)) && starts.is_old(call(2, 1)));
        assert!(!starts.note_old(at(31), call(1, 6)), "it was on its way");
        assert!(!starts.note_old(at(40), call(1, 5)), "it came before");
        assert!(starts.note_old(at(40), call(1, 6)));
        assert!(!starts.note_old(at(50), call(1, 6)), "it was counted");
        assert!(!starts.note_old(at(50), call(2, 0)), "the same start");
        assert_eq!(starts.latest(), Generation(2));
    }

    #[test]
    fn an_instance_that_comes_back_long_after_is_a_copy() {
        let mut starts = Starts::new(at(0));
        let said = [(1, A), (2, B), (3, A), (40, A), (50, A), (80, B), (120, B)]
            .map(|(second, instance)| starts.note(at(second), call(1, second), instance));
        assert_eq!(said, [false, false, false, true, false, true, false]);
        // A later start begins anew.
        assert!(!starts.note(at(200), call(2, 1), A));
    }

    #[test]
    fn so_many_instances_are_remembered() {
        let mut starts = Starts::new(at(0));
        for instance in 0..1000 {
            assert!(!starts.note(at(60 * instance), call(1, instance), instance));
        }
        assert_eq!(starts.instances.len(), INSTANCES);
    }
}
