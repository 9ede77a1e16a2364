//! The simulator sees: each way to be wrong on purpose is caught by some seed. Run with
//! `cargo test --release -p weft-sim --features mutations --test mutations -- --nocapture`.

#![cfg(feature = "mutations")]

use std::sync::atomic::{AtomicUsize, Ordering};

use weft_core::mutation::{self, Mutation};
use weft_sim::clusters::{self, Options};
use weft_sim::faults::Kind;

/// A mutation must be caught within so many seeds. Most are within ten; which seed it is may change with every change of
/// the core.
const SEEDS: u64 = 400;

/// The faults under which it shows soonest, those that matter most several times, and among how many hosts.
fn world(mutation: Mutation) -> (Vec<Kind>, usize) {
    use Kind::{
        Crash, Evict, Force, Fork, Late, Liar, OneWay, Partition, Pause, Restore, Weather, Wipe,
    };
    match mutation {
        Mutation::ActBeforePersisted | Mutation::ReuseGeneration => (vec![Crash], 3),
        Mutation::TellBeforeSynced => (vec![Crash, Partition], 4),
        Mutation::ForgetGrants => (vec![Crash, Partition, Late], 3),
        Mutation::IgnoreOwnLog => (vec![Restore], 4),
        Mutation::EraseDown => (vec![Crash, Pause, Partition], 3),
        Mutation::GrantsOfNonOwners | Mutation::BelieveTheFuture => (vec![Liar], 3),
        Mutation::AcceptRevoked => (vec![Evict, Partition], 5),
        Mutation::KeepSessions => (vec![Evict], 3),
        Mutation::NoAntiEntropy => (vec![Weather, OneWay, Partition], 3),
        Mutation::ForgetTokenUses => (vec![Late, Late, Crash], 6),
        Mutation::SkipMajority => (vec![Evict, Wipe], 3),
        Mutation::NewcomersVote => (vec![Evict, Partition, Late, Late], 5),
        Mutation::LastComerWins => (vec![Partition, Weather, Force], 4),
        Mutation::AcceptStaleSequence => (vec![Weather], 4),
        Mutation::ForgetWitnesses => (vec![Wipe, Wipe, Evict, Evict, Partition, Partition], 6),
        Mutation::KeepBranch => (vec![Fork, Late], 4),
        Mutation::CountThePresent => (vec![Evict, Evict, Wipe, Wipe, Partition, Late, Late], 6),
        Mutation::SkipRest | Mutation::ForgetUsed => (vec![Weather], 3),
    }
}

/// The first seed that catches it, and what it says.
fn caught(mutation: Mutation) -> Option<(u64, String)> {
    (0..SEEDS).find_map(|seed| {
        let (kinds, hosts) = world(mutation);
        let options = Options {
            kinds,
            ..Options::new(hosts)
        };
        let run = || {
            mutation::select(Some(mutation));
            clusters::run_with(seed, &options).0.violations
        };
        mutation::select(None);
        let violations = match std::panic::catch_unwind(run) {
            Ok(violations) => violations,
            Err(_) => vec!["a node panicked".to_owned()],
        };
        mutation::select(None);
        let line = violations.into_iter().next()?;
        // What is wrong by itself shows nothing.
        let right = clusters::run_with(seed, &options).0.violations;
        right.is_empty().then_some((seed, line))
    })
}

#[test]
fn every_way_to_be_wrong_is_caught() {
    // The two threads take one mutation after the other: some are found at once, some after many seeds.
    let next = AtomicUsize::new(0);
    let search = || {
        let one = || {
            Mutation::ALL
                .get(next.fetch_add(1, Ordering::Relaxed))
                .copied()
        };
        let found = |mutation| (mutation, caught(mutation));
        std::iter::from_fn(one).map(found).collect::<Vec<_>>()
    };
    let results: Vec<(Mutation, Option<(u64, String)>)> = std::thread::scope(|scope| {
        let threads = [scope.spawn(search), scope.spawn(search)];
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("panics of nodes are caught"))
            .collect()
    });
    for (mutation, found) in &results {
        match found {
            Some((seed, line)) => println!("{mutation:?}: seed {seed}: {line}"),
            None => println!("{mutation:?}: NOT CAUGHT in {SEEDS} seeds"),
        }
    }
    let blind: Vec<Mutation> = results
        .iter()
        .filter(|(_, found)| found.is_none())
        .map(|(mutation, _)| *mutation)
        .collect();
    assert!(blind.is_empty(), "nobody sees {blind:?}");
}
