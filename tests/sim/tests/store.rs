//! The store of whole nodes: how fast, and what at rest it costs.

use std::time::Duration;

use weft_sim::figures::cluster::Cluster;
use weft_sim::figures::store::{per_node_at_rest, spread};

#[test]
fn a_change_is_known_everywhere_at_once_and_at_rest_little_is_said() {
    let mut cluster = Cluster::settled(1, 20).expect("twenty nodes join and agree");
    let rest = per_node_at_rest(&mut cluster, Duration::from_secs(60));
    assert!(rest <= 1_000.0, "{rest} octets/s a node");
    for (loss, median, worst) in [(0, 0.25, 0.5), (200, 0.5, 3.0)] {
        let found = spread(&mut cluster, 30, Duration::from_millis(300), loss);
        assert_eq!(found.times.never, 0);
        assert!(found.agreed);
        let (half, all) = (found.times.within(0.5), found.times.within(1.0));
        assert!(
            half <= median && all <= worst,
            "{half} s, {all} s at {loss} of 1000 lost"
        );
    }
}

#[test]
fn what_a_change_costs_does_not_grow_with_what_exists() {
    let mut cluster = Cluster::settled(2, 10).expect("ten nodes join and agree");
    let gap = Duration::from_millis(500);
    let few = spread(&mut cluster, 20, gap, 0).octets;
    cluster.fill(1_500).expect("all agree");
    let many = spread(&mut cluster, 20, gap, 0).octets;
    assert!(
        many < few * 1.5 + 5_000.0,
        "{few} octets a change, then {many}"
    );
}
