//! How fast a node hands out addresses: `cargo bench -p weft-core --bench addresses`. The target is 10,000 a second, also
//! from a network that is nearly full.

#![expect(
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock; the core itself never does"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use weft_core::crypto::{Cipher, Random};
use weft_core::identity::Identity;
use weft_core::ipam::{Allocator, Ring};
use weft_core::model::{AddressPlan, ClusterId, Label, NodeId, Now, WallMicros};
use weft_core::node::{Command, Input, Node, NodeConfig, Output, Reply, Start};
use weft_core::store::Stored;
use weft_core::view::EndpointKind;

/// Commands on their way to the disk at the same time: what the daemon's disk writes in one transaction.
const BURST: usize = 256;

fn main() {
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16]))
        .expect("the default range is one");
    let mut allocator = founder(plan);
    let net = plan.default_network();
    let begun = Instant::now();
    let mut count = 0;
    while allocator.allocate(&net).is_ok() {
        count += 1;
    }
    tell("addresses, until the /16 is full", count, begun.elapsed());
    tell(
        "addresses, with 14 of 65,534 free",
        100_000,
        nearly_full(plan),
    );
    attach("attachments, many at a time", 9_000, BURST);
    attach("attachments, one after the other", 9_000, 1);
}

fn tell(what: &str, count: usize, took: Duration) {
    println!(
        "{what:<45} {count:>7} in {:>6.1} ms, {:>9.0} a second",
        took.as_secs_f64() * 1000.0,
        count as f64 / took.as_secs_f64()
    );
}

fn founder(plan: AddressPlan) -> Allocator {
    let me = NodeId([1; 32]);
    let ring = Ring::compute(me, plan.range, &[], &BTreeSet::new());
    Allocator::new(me, plan, ring, &Stored::default(), Now::default())
}

/// The lowest is freed and, a minute later, handed out again, while another one high up is as well: the worst for whoever
/// looks at one address after the other.
fn nearly_full(plan: AddressPlan) -> Duration {
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let mut all = Vec::new();
    while let Ok(ip) = allocator.allocate(&net) {
        all.push(ip);
    }
    let mut now = Now::default();
    let mut free = |allocator: &mut Allocator, ips: &[_]| {
        for ip in ips {
            allocator.release(*ip, now);
        }
        now = now.plus(Duration::from_secs(61));
        allocator.expire(now);
    };
    let mut held: Vec<_> = all[..7]
        .iter()
        .chain(&all[all.len() - 7..])
        .copied()
        .collect();
    let begun = Instant::now();
    for _ in 0..100_000 / held.len() {
        free(&mut allocator, &held);
        for ip in &mut held {
            *ip = allocator.allocate(&net).expect("as many are free");
        }
    }
    begun.elapsed()
}

/// Whole attachments as the node does them: found, signed, written, acknowledged by a disk that takes no time, answered.
fn attach(what: &str, count: usize, burst: usize) {
    let mut node = member();
    let mut out = Vec::new();
    let begun = Instant::now();
    let mut done = 0;
    for first in (0..count).step_by(burst) {
        for id in first..(first + burst).min(count) {
            let command = Command::Attach {
                kind: EndpointKind::Container,
                names: vec![label("web")],
                network: label("default"),
                ip: None,
                labels: BTreeMap::new(),
            };
            node.handle(Now::default(), Input::Command(id as u64, command), &mut out);
        }
        done += settle(&mut node, &mut out);
    }
    assert_eq!(done, count, "all are attached");
    tell(what, count, begun.elapsed());
}

/// The disk has everything; how many attachments were answered.
fn settle(node: &mut Node, out: &mut Vec<Output>) -> usize {
    let mut attached = 0;
    while !out.is_empty() {
        for output in std::mem::take(out) {
            match output {
                Output::Persist(id, _) => node.handle(Now::default(), Input::Persisted(id), out),
                Output::Reply(_, Ok(Reply::Attached(_))) => attached += 1,
                _ => {}
            }
        }
    }
    attached
}

fn member() -> Node {
    let mut random = Random::from_seed([3; 32]);
    let config = NodeConfig {
        name: label("alpha"),
        rename: true,
        cipher: Cipher::ChaCha20Poly1305,
        host_addrs: Vec::new(),
        underlay: Vec::new(),
        tcp_port: None,
        relay: true,
        trusted_subnets: Vec::new(),
        esp: weft_core::carriers::Esp::Unasked,
    };
    let start = Start::Found {
        range: AddressPlan::DEFAULT_RANGE,
    };
    let identity = Identity::generate(&mut random);
    let mut node = Node::new(identity, config, start, Stored::default(), random.bytes());
    let mut out = Vec::new();
    node.start(Now::default(), WallMicros(1_790_000_000_000_000), &mut out);
    settle(&mut node, &mut out);
    node
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("a label")
}
