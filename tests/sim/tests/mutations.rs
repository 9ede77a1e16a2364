//! The simulator sees: each way to be wrong on purpose is caught by some seed. Run with
//! `cargo test --release -p weft-sim --features mutations --test mutations -- --nocapture`.

#![cfg(feature = "mutations")]

use weft_core::mutation::{self, Mutation};
use weft_sim::clusters::{self, Options};
use weft_sim::faults::Kind;

/// A mutation must be caught within so many seeds.
const SEEDS: u64 = 400;

/// The faults under which it shows.
fn kinds(mutation: Mutation) -> Vec<Kind> {
    use Kind::{
        Crash, Evict, Force, Late, Liar, OneWay, Partition, Pause, Remove, Restore, Weather, Wipe,
    };
    match mutation {
        Mutation::ActBeforePersisted | Mutation::TellBeforeSynced => vec![Crash, Partition],
        Mutation::ForgetGrants => vec![Crash, Partition, Late],
        Mutation::ReuseGeneration => vec![Crash, Restore],
        Mutation::IgnoreOwnLog => vec![Restore],
        Mutation::EraseDown => vec![Crash, Pause, Partition],
        Mutation::GrantsOfNonOwners | Mutation::BelieveTheFuture => vec![Liar],
        Mutation::AcceptRevoked | Mutation::KeepSessions => vec![Evict, Partition],
        Mutation::NoAntiEntropy => vec![Weather, OneWay, Partition],
        Mutation::ForgetTokenUses => vec![Late, Crash],
        Mutation::SkipMajority | Mutation::NewcomersVote => {
            vec![Evict, Remove, Partition, Late, Wipe]
        }
        Mutation::LastComerWins => vec![Partition, Weather, Force],
        Mutation::AcceptStaleSequence | Mutation::SkipRest | Mutation::ForgetUsed => {
            vec![Weather, Crash, Partition]
        }
    }
}

/// The first seed that catches it, and what it says.
fn caught(mutation: Mutation) -> Option<(u64, String)> {
    (0..SEEDS).find_map(|seed| {
        let options = Options {
            kinds: kinds(mutation),
            ..Options::new(3 + seed as usize % 4)
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
    let results: Vec<(Mutation, Option<(u64, String)>)> = std::thread::scope(|scope| {
        let halves = Mutation::ALL.chunks(Mutation::ALL.len().div_ceil(2));
        let threads: Vec<_> = halves
            .map(|half| scope.spawn(|| half.iter().map(|m| (*m, caught(*m))).collect::<Vec<_>>()))
            .collect();
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
