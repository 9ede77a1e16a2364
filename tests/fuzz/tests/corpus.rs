//! Every target over its seeds, over the kept corpus, and over bent inputs from a fixed seed: on any toolchain.

// Helpers of tests may fail like tests do; clippy's own exception sees only `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use weft_core::crypto::Random;
use weft_fuzz::{Seen, TARGETS, Target, bend};

/// Bent inputs per target, and the time they may take: what is slow gets through fewer.
const BENT: usize = 20_000;
const PATIENCE: Duration = Duration::from_secs(4);

fn corpus_of(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
    files.into_iter().map(read).collect()
}

/// Runs an input, and leaves it in a file when it fails.
fn run(target: &Target, what: &str, data: &[u8]) -> Seen {
    let result = catch_unwind(|| target.run(data));
    result.unwrap_or_else(|_| {
        let file = std::env::temp_dir().join(format!("weft-fuzz-{}", target.name));
        fs::write(&file, data).unwrap();
        let (name, file) = (target.name, file.display());
        panic!("{name}: {what} fails; once more: tests/fuzz/run {name} {file}")
    })
}

fn holds(name: &str) {
    let target = Target::named(name).unwrap();
    let mut corpus = (target.seeds)();
    for (number, seed) in corpus.iter().enumerate() {
        let seen = run(target, &format!("seed {number}"), seed);
        assert_eq!(seen, Seen::Taken, "seed {number} does not get deep");
    }
    for (path, data) in corpus_of(target) {
        run(target, &path.display().to_string(), &data);
        corpus.push(data);
    }
    let mut random = Random::from_seed([1; 32]);
    let begun = Instant::now();
    let bent = (0..BENT)
        .take_while(|_| begun.elapsed() < PATIENCE)
        .map(|number| {
            let data = bend::bent(&corpus, &mut random);
            run(target, &format!("bent input {number}"), &data)
        });
    let count = bent.count();
    println!("{name}: {count} bent inputs in {:?}", begun.elapsed());
    assert!(
        count > 20,
        "{count} inputs in {PATIENCE:?}: too slow to find anything"
    );
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            holds(stringify!($name));
        })*

        #[test]
        fn every_target_has_its_test() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), tested);
        }
    };
}

targets! {
    plain sync membership frames record roster handshake join joiner token api cni text disk dns packets
}

#[test]
fn every_part_of_the_corpus_has_its_target() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(Target::named(&name).is_some(), "{name}");
    }
}
