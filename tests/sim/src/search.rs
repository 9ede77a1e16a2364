//! Many seeds on all processors, in the order of the seeds; and what fails, made smaller.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crate::clusters::{self, Options};
use crate::faults::Kind;

/// A seed is tried so often with less before what is left is good enough.
const TRIES: usize = 60;

/// How one seed ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What it was run with.
    pub options: Options,
    /// What was promised and not kept.
    pub violations: Vec<String>,
    /// From the last fault until all agreed.
    pub whole_after: Option<Duration>,
}

/// Runs seeds on `jobs` threads and hands their outcomes over in the order of the seeds, until `take` has had enough.
pub fn run(
    seeds: impl Iterator<Item = u64> + Send,
    jobs: usize,
    options: impl Fn(u64) -> Options + Sync,
    mut take: impl FnMut(Outcome) -> Go,
) {
    // Every thread takes the next number; the seeds are made here, so that they may come from anywhere.
    let seeds = std::sync::Mutex::new(seeds.enumerate());
    let stopped = AtomicBool::new(false);
    let (send, receive) = mpsc::sync_channel::<(u64, Outcome)>(jobs * 4);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            let (send, seeds, options, stopped) = (send.clone(), &seeds, &options, &stopped);
            scope.spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    let next = seeds.lock().ok().and_then(|mut seeds| seeds.next());
                    let Some((number, seed)) = next else {
                        return;
                    };
                    let outcome = run_one(seed, options(seed));
                    if send.send((number as u64, outcome)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        let (mut waiting, mut next) = (BTreeMap::new(), 0);
        for (number, outcome) in receive {
            waiting.insert(number, outcome);
            while let Some(outcome) = waiting.remove(&next) {
                next += 1;
                if take(outcome) == Go::Stop {
                    stopped.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
    });
}

/// Is there to be another seed?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// Yes.
    On,
    /// No.
    Stop,
}

fn run_one(seed: u64, options: Options) -> Outcome {
    // A panic is the worst of all violations, and no reason to end the search.
    let run = std::panic::AssertUnwindSafe(|| clusters::run_with(seed, &options).0);
    let (violations, whole_after) = match std::panic::catch_unwind(run) {
        Ok(verdict) => (verdict.violations, verdict.whole_after),
        Err(_) => (vec!["a node panicked".to_owned()], None),
    };
    Outcome {
        seed,
        options,
        violations,
        whole_after,
    }
}

/// The command that runs a seed again.
pub fn replay_command(seed: u64, options: &Options) -> String {
    let mut command = format!("weft-sim --replay {seed} --nodes {}", options.hosts);
    if options.kinds != Kind::ALL {
        let kinds: Vec<String> = options.kinds.iter().map(Kind::to_string).collect();
        command.push_str(&format!(" --faults {}", kinds.join(",")));
    }
    if !options.without.is_empty() {
        let numbers: Vec<String> = options.without.iter().map(usize::to_string).collect();
        command.push_str(&format!(" --without {}", numbers.join(",")));
    }
    command
}

/// Looks for fewer hosts and fewer faults under which the seed still fails.
pub fn shrink(failed: &Outcome) -> Outcome {
    let mut tries = 0;
    let mut still_fails = |options: &Options| {
        tries += 1;
        (tries <= TRIES)
            .then(|| run_one(failed.seed, options.clone()))
            .filter(|outcome| !outcome.violations.is_empty())
    };
    let mut best = failed.clone();
    for hosts in 3..failed.options.hosts {
        let fewer = Options {
            hosts,
            ..failed.options.clone()
        };
        if let Some(outcome) = still_fails(&fewer) {
            best = outcome;
            break;
        }
    }
    let plan = clusters::plan_of(failed.seed, &best.options);
    let kinds: BTreeSet<Kind> = plan.faults.iter().map(|fault| fault.kind).collect();
    let of_kind = |kind: &Kind| -> BTreeSet<usize> {
        let faults = plan.faults.iter().filter(|fault| fault.kind == *kind);
        faults.map(|fault| fault.number).collect()
    };
    let single = plan.faults.iter().map(|f| BTreeSet::from([f.number]));
    for numbers in kinds.iter().map(of_kind).chain(single) {
        if numbers.is_subset(&best.options.without) {
            continue;
        }
        let mut less = best.options.clone();
        less.without.extend(numbers);
        if let Some(outcome) = still_fails(&less) {
            best = outcome;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_come_in_the_order_of_the_seeds_whoever_ran_them() {
        let mut seen = Vec::new();
        let options = |_| Options {
            kinds: vec![Kind::Pause],
            ..Options::new(3)
        };
        run(10..18, 2, options, |outcome| {
            seen.push(outcome.seed);
            Go::On
        });
        assert!(seen.into_iter().eq(10..18));
    }

    #[test]
    fn the_command_names_what_differs_from_the_rule() {
        let mut options = Options::new(4);
        assert_eq!(replay_command(7, &options), "weft-sim --replay 7 --nodes 4");
        options.kinds = vec![Kind::Crash, Kind::OneWay];
        options.without = BTreeSet::from([1, 3]);
        assert_eq!(
            replay_command(7, &options),
            "weft-sim --replay 7 --nodes 4 --faults crash,one-way --without 1,3"
        );
    }
}
