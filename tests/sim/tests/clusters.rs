//! Whole nodes, under every kind of fault.

use weft_sim::clusters;
use weft_sim::faults::Kind;

fn seeds(range: std::ops::Range<u64>) {
    let mut violations = Vec::new();
    for seed in range {
        let hosts = 3 + seed as usize % 8;
        let verdict = clusters::run(seed, hosts, &Kind::ALL, false);
        let lines = verdict.violations.into_iter();
        violations.extend(lines.map(|line| format!("seed {seed}, {hosts} nodes: {line}")));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

// In parts, so that they run side by side.

#[test]
fn seeds_0_to_24_keep_every_promise() {
    seeds(0..25);
}

#[test]
fn seeds_25_to_49_keep_every_promise() {
    seeds(25..50);
}

#[test]
fn seeds_50_to_74_keep_every_promise() {
    seeds(50..75);
}

#[test]
fn seeds_75_to_99_keep_every_promise() {
    seeds(75..100);
}

#[test]
fn equal_seeds_give_equal_traces_byte_for_byte() {
    let [once, again, other] = [5, 5, 6].map(|seed| clusters::run(seed, 4, &Kind::ALL, true));
    assert!(!once.trace.is_empty());
    assert!(once.trace == again.trace);
    assert_eq!(once.fingerprint, again.fingerprint);
    assert_ne!(once.fingerprint, other.fingerprint);
}
