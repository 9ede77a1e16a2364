//! Membership alone, under every kind of fault.

use std::time::Duration;

use weft_sim::faults::Kind;
use weft_sim::members::{self, Trial};

#[test]
fn a_hundred_clusters_become_whole_after_every_kind_of_fault() {
    let mut violations = Vec::new();
    for seed in 0..100 {
        let hosts = 3 + seed as usize % 8;
        let verdict = members::run(seed, hosts, &Kind::ALL, false);
        let lines = verdict.violations.into_iter();
        violations.extend(lines.map(|line| format!("seed {seed}, {hosts} nodes: {line}")));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn equal_seeds_give_equal_traces_byte_for_byte() {
    let [once, again, other] = [7, 7, 8].map(|seed| members::run(seed, 5, &Kind::ALL, true));
    assert!(!once.trace.is_empty());
    assert!(once.trace == again.trace);
    assert_eq!(once.fingerprint, again.fingerprint);
    assert_ne!(once.fingerprint, other.fingerprint);
}

#[test]
fn a_death_is_known_to_all_within_seconds() {
    for hosts in [3, 10] {
        let deaths = members::deaths(hosts, 0..40);
        assert_eq!(deaths.len(), 40);
        assert!(
            deaths[20] < 4.5,
            "median {} s with {hosts} nodes",
            deaths[20]
        );
        assert!(
            deaths[39] < 8.0,
            "worst {} s with {hosts} nodes",
            deaths[39]
        );
    }
}

const MINUTES: Trial = Trial {
    hosts: 3,
    loss: 0,
    latency: Duration::from_micros(300),
    cut: false,
    time: Duration::from_secs(300),
};

#[test]
fn a_fifth_of_all_datagrams_lost_kills_nobody() {
    for hosts in [3, 10] {
        let trial = Trial {
            hosts,
            loss: 200,
            ..MINUTES
        };
        assert_eq!(trial.run(1).0, 0, "{hosts} nodes");
    }
}

#[test]
fn a_link_that_is_cut_for_ever_kills_nobody() {
    for hosts in [3, 10] {
        let trial = Trial {
            hosts,
            cut: true,
            ..MINUTES
        };
        assert_eq!(trial.run(1).0, 0, "{hosts} nodes");
    }
}

#[test]
fn a_third_of_a_second_around_the_world_kills_nobody() {
    let trial = Trial {
        loss: 50,
        latency: Duration::from_millis(150),
        ..MINUTES
    };
    assert_eq!(trial.run(1).0, 0);
}
