//! How fast membership is, and what it never does wrong.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use weft_core::model::{Generation, NodeId, Now};

use super::Scope;
use super::table::{Table, Times};
use crate::faults::{Action, Kind};
use crate::members::{self, Gossiper, node_of, start_all};
use crate::net::Weather;
use crate::world::World;

/// Cluster sizes of the tables.
const SIZES: [usize; 5] = [3, 10, 50, 100, 300];
/// Time is looked at in these steps.
const STEP: Duration = Duration::from_millis(10);
/// A trial that takes longer is given up.
const GIVE_UP: Duration = Duration::from_secs(60);
/// Deaths, pauses or splits that one world lives through.
const PER_WORLD: u64 = 10;
/// Links of one cluster in one place, one way.
pub const NEAR: Duration = Duration::from_micros(300);

/// A world without faults, all off.
pub fn field(seed: u64, hosts: usize, one_way: Duration) -> World<Gossiper> {
    let mut world = members::world(seed, hosts, false);
    world.take_no_notes();
    world.net.set_latency(one_way);
    world
}

/// A world in which all have known each other for a while.
pub fn settled(seed: u64, hosts: usize, one_way: Duration) -> World<Gossiper> {
    let mut world = field(seed, hosts, one_way);
    start_all(&mut world);
    world.run_until(Now(Duration::from_secs(4)));
    for host in 0..hosts {
        tell_rtt(&mut world, host, one_way);
    }
    run_until(&mut world, GIVE_UP, is_whole);
    world.run_for(Duration::from_secs(4));
    count_downs(&mut world);
    world
}

fn tell_rtt(world: &mut World<Gossiper>, host: usize, one_way: Duration) {
    world.with(host, |node, now, fx| node.set_rtt(now, one_way * 2, fx));
}

/// Lets time pass until it holds; how many seconds that took.
fn run_until(
    world: &mut World<Gossiper>,
    limit: Duration,
    holds: impl Fn(&World<Gossiper>) -> bool,
) -> Option<f64> {
    let start = world.now;
    while !holds(world) {
        if world.now.since(start) >= limit {
            return None;
        }
        world.run_for(STEP);
    }
    Some(world.now.since(start).as_secs_f64())
}

/// Does each see all the others, under their present starts, and nobody else?
pub fn is_whole(world: &World<Gossiper>) -> bool {
    let truth: BTreeMap<NodeId, Generation> = world
        .running()
        .map(|(host, node)| (node_of(host), node.generation()))
        .collect();
    let sees_all = |host: usize, node: &Gossiper| {
        let me = node_of(host);
        node.sees().len() + 1 == truth.len()
            && truth.iter().filter(|(id, _)| **id != me).eq(node.sees())
    };
    world.running().all(|(host, node)| sees_all(host, node))
}

/// How often anybody was taken for dead since the world was settled, or since the last call.
pub fn count_downs(world: &mut World<Gossiper>) -> usize {
    take_downs(world, |_| true)
}

/// The same, of hosts that `counts`.
fn take_downs(world: &mut World<Gossiper>, counts: impl FnMut(usize) -> bool) -> usize {
    let nodes = world
        .hosts
        .iter_mut()
        .filter_map(|host| host.machine.as_mut());
    let downs: Vec<usize> = nodes.flat_map(Gossiper::take_downs).collect();
    downs
        .into_iter()
        .map(counts)
        .filter(|counts| *counts)
        .count()
}

fn draw(world: &mut World<Gossiper>, below: u64) -> u64 {
    world.random().range(below)
}

/// Seconds from a crash to the moment when the last live node knew, and how often a live node was taken for dead
/// meanwhile.
pub fn deaths(hosts: usize, seeds: Range<u64>, one_way: Duration) -> (Times, usize) {
    let (mut times, mut wrong) = (Vec::new(), 0);
    for seed in seeds {
        let mut world = settled(seed, hosts, one_way);
        for _ in 0..PER_WORLD {
            let pause = draw(&mut world, 2_000);
            world.run_for(Duration::from_millis(pause));
            let victim = draw(&mut world, hosts as u64) as usize;
            world.act(Action::Crash(victim));
            let id = node_of(victim);
            times.push(run_until(&mut world, GIVE_UP, |world| {
                world
                    .running()
                    .all(|(_, node)| !node.sees().contains_key(&id))
            }));
            world.run_for(Duration::from_secs(2));
            wrong += take_downs(&mut world, |who| who != victim);
            world.act(Action::Boot(victim));
            tell_rtt(&mut world, victim, one_way);
            run_until(&mut world, GIVE_UP, is_whole);
            world.run_for(Duration::from_secs(3));
        }
    }
    (times.into_iter().collect(), wrong)
}

/// Seconds from the moment the first could start until all know all; all start within one second.
pub fn starts(hosts: usize, seeds: Range<u64>) -> Times {
    let start = |seed| {
        let mut world = field(seed, hosts, NEAR);
        start_all(&mut world);
        let all_on = |world: &World<Gossiper>| world.running().count() == hosts;
        run_until(&mut world, GIVE_UP, |world| {
            all_on(world) && is_whole(world)
        })
    };
    seeds.map(start).collect()
}

/// Seconds from the end of a split into two halves, drawn host by host, until all know all again.
pub fn splits(hosts: usize, seeds: Range<u64>, per_world: u64, lasting: Duration) -> Times {
    let mut times = Vec::new();
    for seed in seeds {
        let mut world = settled(seed, hosts, NEAR);
        for _ in 0..per_world {
            let sides = draw_sides(&mut world);
            set_split(&mut world, &sides, Action::Block);
            world.run_for(lasting);
            set_split(&mut world, &sides, Action::Unblock);
            times.push(run_until(&mut world, GIVE_UP, is_whole));
            world.run_for(Duration::from_secs(10));
        }
    }
    times.into_iter().collect()
}

/// Two sides, neither of them empty.
fn draw_sides(world: &mut World<Gossiper>) -> Vec<bool> {
    let hosts = world.hosts.len();
    let odd = draw(world, hosts as u64) as usize;
    let mut sides: Vec<bool> = (0..hosts).map(|_| draw(world, 2) == 0).collect();
    sides[odd] = !sides[(odd + 1) % hosts];
    sides
}

fn set_split(world: &mut World<Gossiper>, sides: &[bool], action: fn(usize, usize) -> Action) {
    for from in 0..sides.len() {
        for to in (0..sides.len()).filter(|to| sides[*to] != sides[from]) {
            world.act(action(from, to));
        }
    }
}

/// How often a live node that nothing but the weather keeps from answering was taken for dead, in so many hours.
pub fn false_downs(hosts: usize, seed: u64, loss: u64, one_way: Duration, hours: f64) -> usize {
    let mut world = settled(seed, hosts, one_way);
    world.net.weather = Weather {
        loss,
        ..Weather::default()
    };
    world.run_for(Duration::from_secs_f64(hours * 3600.0));
    count_downs(&mut world)
}

/// Octets a second and node at rest, with IPv4 and with IPv6.
pub fn rest(hosts: usize, time: Duration) -> [f64; 2] {
    let mut world = settled(0, hosts, NEAR);
    world.run_for(Duration::from_secs(60));
    let (octets, datagrams) = (world.octets, world.datagrams);
    world.run_for(time);
    let (octets, datagrams) = (world.octets - octets, world.datagrams - datagrams);
    // Each stands for one in a session, where the eight octets that name the start here are not.
    [65, 85].map(|around| {
        (octets + datagrams * (around - 8)) as f64 / time.as_secs_f64() / hosts as f64
    })
}

/// What hosts that stand still for a while do to the others.
#[derive(Debug, Default)]
pub struct Slow {
    /// How often a host that never stood still was taken for dead.
    pub healthy_hit: usize,
    /// How often one was that did.
    pub slow_hit: usize,
}

/// A tenth of all hosts, at least one, stands still now and then, each for 0.5 to 9 s.
pub fn slow(hosts: usize, seed: u64, rounds: u64) -> Slow {
    let mut world = settled(seed, hosts, NEAR);
    let slow_ones = (hosts / 10).max(1);
    let mut found = Slow::default();
    for _ in 0..rounds {
        for host in 0..slow_ones {
            let from = world
                .now
                .plus(Duration::from_millis(draw(&mut world, 4_000)));
            let long = Duration::from_millis(500 + draw(&mut world, 8_500));
            world.schedule(from, Action::Pause(host));
            world.schedule(from.plus(long), Action::Resume(host));
        }
        world.run_for(Duration::from_secs(20));
        let mut slow_hit = 0;
        found.healthy_hit += take_downs(&mut world, |who| {
            slow_hit += usize::from(who < slow_ones);
            who >= slow_ones
        });
        found.slow_hit += slow_hit;
    }
    found
}

/// One host stands still for 6 to 60 s and then answers again: seconds until all saw all.
pub fn returns(hosts: usize, seeds: Range<u64>) -> Times {
    let mut times = Vec::new();
    for seed in seeds {
        let mut world = settled(seed, hosts, NEAR);
        for _ in 0..PER_WORLD {
            let host = draw(&mut world, hosts as u64) as usize;
            let long = Duration::from_millis(6_000 + draw(&mut world, 54_000));
            world.act(Action::Pause(host));
            world.run_for(long);
            world.act(Action::Resume(host));
            times.push(run_until(&mut world, GIVE_UP, is_whole));
            world.run_for(Duration::from_secs(5));
        }
    }
    times.into_iter().collect()
}

/// Everything at once; the worlds that were not whole in the end.
pub fn chaos(seeds: Range<u64>) -> (u64, Times) {
    let kinds = [
        Kind::Weather,
        Kind::OneWay,
        Kind::Partition,
        Kind::Crash,
        Kind::Pause,
    ];
    let (mut broken, mut whole) = (0, Vec::new());
    for seed in seeds {
        let hosts = chaos_size(seed);
        let verdict = members::run(seed, hosts, &kinds, false);
        if !verdict.violations.is_empty() {
            broken += 1;
            super::progress(&format!(
                "chaos seed {seed}, {hosts} nodes: {}",
                verdict.violations.join("; ")
            ));
        }
        whole.push(verdict.whole_after.map(|time| time.as_secs_f64()));
    }
    (broken, whole.into_iter().collect())
}

/// 2 to 100 nodes, small clusters more often, for there the rare cases are.
fn chaos_size(seed: u64) -> usize {
    match seed % 10 {
        0..=5 => 2 + (seed / 10 % 9) as usize,
        6..=8 => 11 + (seed / 10 % 20) as usize,
        _ => 31 + (seed / 10 % 70) as usize,
    }
}

fn seeds_for(trials: u64, per_world: u64) -> Range<u64> {
    0..trials.div_ceil(per_world).max(1)
}

fn columns(first: &str) -> Vec<String> {
    let sizes = SIZES.iter().map(|hosts| format!("N = {hosts}"));
    std::iter::once(first.to_owned()).chain(sizes).collect()
}

pub(super) fn speed(scope: &Scope) -> Table {
    let mut table = Table::new(
        "Membership: how fast",
        "Seconds, median / 99 of 100, with the number of trials; links of 0.3 ms one way. Seeds from 0 on, ten deaths or \
         returns a world. *Death known*: from the crash until the last live node knows. *All known*: all start within the \
         first second. *Whole again*: from the end of a split, halves drawn host by host, until all see all. *Back*: a \
         host stood still for 6 to 60 s; from the moment when it goes on until all see all.",
        columns("seconds"),
    );
    let mut cells = |name: &str, measure: &dyn Fn(usize) -> Times| {
        if !scope.wants("speed", name) {
            return;
        }
        let of = |hosts: &usize| {
            let times = measure(*hosts);
            let trials = times.len() + times.never;
            format!("{} ({trials})", times.median_and_p99(2))
        };
        let row: Vec<String> = std::iter::once(name.to_owned())
            .chain(SIZES.iter().map(of))
            .collect();
        table.row(row);
    };
    let few =
        |hosts: usize, many: u64, few: u64| scope.trials(if hosts >= 100 { few } else { many });
    cells("death known by all", &|hosts| {
        deaths(hosts, seeds_for(few(hosts, 400, 100), PER_WORLD), NEAR).0
    });
    cells("all known after the start", &|hosts| {
        starts(hosts, 0..few(hosts, 200, 50))
    });
    cells("whole again after a split of 30 s", &|hosts| {
        splits(
            hosts,
            seeds_for(few(hosts, 200, 50), 10),
            10,
            Duration::from_secs(30),
        )
    });
    cells("whole again after a split of 10 min", &|hosts| {
        let trials = scope.trials(match hosts {
            300 => 10,
            100 => 30,
            _ => 100,
        });
        let (per_world, lasting) = (trials.min(5), Duration::from_secs(600));
        splits(hosts, seeds_for(trials, per_world), per_world, lasting)
    });
    cells("back after a silence", &|hosts| {
        returns(hosts, seeds_for(few(hosts, 200, 50), PER_WORLD))
    });
    cells("death known, round trip 300 ms", &|hosts| {
        let far = Duration::from_millis(150);
        deaths(hosts, seeds_for(few(hosts, 200, 50), PER_WORLD), far).0
    });
    table
}

pub(super) fn safety(scope: &Scope) -> Table {
    let mut table = Table::new(
        "Membership: what must not happen",
        "How often a live, answering node was taken for dead by another; must be 0.",
        ["", "N = 3", "N = 10", "N = 50", "N = 100"],
    );
    let sizes = [3, 10, 50, 100];
    let node_hours = scope.trials(300) as f64;
    let mut cells = |name: String, measure: &dyn Fn(usize) -> String| {
        if !scope.wants("safety", &name) {
            return;
        }
        let row: Vec<String> = std::iter::once(name)
            .chain(sizes.iter().map(|hosts| measure(*hosts)))
            .collect();
        table.row(row);
    };
    let far = Duration::from_millis(150);
    for (loss, one_way, share, what) in [
        (50, NEAR, 1.0, "5 % lost"),
        (200, NEAR, 1.0, "20 % lost"),
        (50, far, 0.3, "5 % lost, round trip 300 ms"),
    ] {
        let hours = node_hours * share;
        let name = format!("{what}, {hours:.0} node-hours");
        cells(name, &|hosts| {
            let runs = 2;
            let each = hours / hosts as f64 / runs as f64;
            let downs = (0..runs).map(|seed| false_downs(hosts, seed, loss, one_way, each));
            downs.sum::<usize>().to_string()
        });
    }
    cells(
        "healthy nodes, a tenth stands still 0.5 to 9 s".to_owned(),
        &|hosts| {
            let rounds = (node_hours * 3600.0 / 20.0 / hosts as f64 / 2.0) as u64;
            let runs = [0, 1].map(|seed| slow(hosts, seed, rounds));
            let healthy: usize = runs.iter().map(|run| run.healthy_hit).sum();
            let slow: usize = runs.iter().map(|run| run.slow_hit).sum();
            format!("{healthy} (slow ones: {slow})")
        },
    );
    table
}

pub(super) fn chaos_table(scope: &Scope) -> Table {
    let count = scope.trials(5_000);
    let mut table = Table::new(
        "Membership: chaos",
        format!(
            "Seeds 0..{count}, 2 to 100 nodes: crashes, pauses, splits, one-way cuts, loss, jitter within 40 s, then \
             nothing more. Whole means that each sees all the others and no one else, that it stays so, and that one more \
             death is seen by all and nothing else."
        ),
        [
            "worlds",
            "not whole in the end",
            "whole after, s, median / p99",
        ],
    );
    if !scope.wants("chaos", "chaos") {
        return table;
    }
    let (broken, times) = chaos(0..count);
    table.row([
        count.to_string(),
        broken.to_string(),
        times.median_and_p99(2),
    ]);
    table
}
