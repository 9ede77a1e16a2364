//! Membership alone, under every kind of fault.

use std::time::Duration;

use weft_sim::faults::Kind;
use weft_sim::figures::membership;
use weft_sim::members;

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

/// Median and worst; nobody else was missed meanwhile.
fn deaths(hosts: usize, worlds: u64, one_way: Duration) -> (f64, f64) {
    let (times, wrong) = membership::deaths(hosts, 0..worlds, one_way);
    assert_eq!(wrong, 0, "live nodes taken for dead among {hosts}");
    (times.within(0.5), times.within(1.0))
}

#[test]
fn a_death_is_known_to_all_within_seconds() {
    for (hosts, worlds, median, worst) in [(3, 4, 3.0, 4.5), (10, 3, 4.0, 6.5), (50, 1, 4.6, 7.0)] {
        let (half, all) = deaths(hosts, worlds, membership::NEAR);
        assert!(half <= median, "median {half} s with {hosts} nodes");
        assert!(all <= worst, "worst {all} s with {hosts} nodes");
    }
}

#[test]
fn a_death_is_known_around_the_world_too() {
    let (half, all) = deaths(5, 2, Duration::from_millis(150));
    assert!(half <= 8.0 && all <= 11.0, "{half} s, {all} s");
}

#[test]
fn all_who_start_together_know_each_other_at_once() {
    for (hosts, median) in [(3, 1.2), (10, 1.2), (50, 1.3)] {
        let half = membership::starts(hosts, 0..5).within(0.5);
        assert!(half <= median, "{half} s with {hosts} nodes");
    }
}

#[test]
fn halves_are_whole_again_half_a_second_after_a_split() {
    for hosts in [3, 10] {
        let times = membership::splits(hosts, 0..2, 5, Duration::from_secs(30));
        let (half, all) = (times.within(0.5), times.within(1.0));
        assert!(
            half <= 0.5 && all <= 2.0,
            "{half} s, {all} s with {hosts} nodes"
        );
    }
}

#[test]
fn who_was_silent_is_back_within_a_second() {
    for hosts in [3, 10] {
        let all = membership::returns(hosts, 0..1).within(1.0);
        assert!(all <= 1.0, "{all} s with {hosts} nodes");
    }
}

#[test]
fn a_fifth_of_all_datagrams_lost_kills_nobody() {
    for hosts in [3, 10, 50] {
        let hours = 2.0 / hosts as f64;
        let downs = membership::false_downs(hosts, 1, 200, membership::NEAR, hours);
        assert_eq!(downs, 0, "{hosts} nodes");
    }
}

#[test]
fn a_third_of_a_second_around_the_world_kills_nobody() {
    let downs = membership::false_downs(5, 1, 50, Duration::from_millis(150), 0.2);
    assert_eq!(downs, 0);
}

#[test]
fn a_link_that_is_cut_for_ever_kills_nobody() {
    for hosts in [3, 10] {
        let mut world = membership::settled(1, hosts, membership::NEAR);
        world.net.block(0, 1);
        world.net.block(1, 0);
        world.run_for(Duration::from_secs(300));
        assert_eq!(membership::count_downs(&mut world), 0, "{hosts} nodes");
    }
}

#[test]
fn the_slow_never_harm_the_healthy() {
    for hosts in [3, 10, 30] {
        let found = membership::slow(hosts, 1, 10);
        assert_eq!(found.healthy_hit, 0, "{hosts} nodes");
    }
}

#[test]
fn at_rest_membership_speaks_little_in_any_size() {
    for hosts in [3, 10, 50] {
        let [_, v6] = membership::rest(hosts, Duration::from_secs(60));
        assert!(v6 <= 600.0, "{v6} octets/s a node with {hosts} nodes");
    }
}
