//! How fast a change is known everywhere, and what it costs.

use std::collections::VecDeque;
use std::time::Duration;

use super::Scope;
use super::cluster::{Change, Cluster, IPV4, IPV6};
use super::table::{Table, Times};

/// Nodes where speed is measured.
const NODES: usize = 50;
/// Nodes where size is measured: each holds everything, however many there are.
const FEW: usize = 10;
/// A change that takes longer is missed.
const GIVE_UP: Duration = Duration::from_secs(30);

/// What became of a number of changes.
pub struct Spread {
    /// Seconds until the last node knew.
    pub times: Times,
    /// Octets that one change cost all nodes together, beside what they send at rest.
    pub octets: f64,
    /// Did all know the same in the end?
    pub agreed: bool,
}

/// So many changes, one after another every `gap`, while `loss` of a thousand datagrams are lost.
pub fn spread(cluster: &mut Cluster, changes: usize, gap: Duration, loss: u64) -> Spread {
    cluster.lose(loss);
    cluster.world.run_for(Duration::from_secs(12));
    let rest = rest_rate(cluster, Duration::from_secs(10), IPV4);
    let (from, before) = (cluster.world.now, cluster.octets(IPV4));
    let mut waiting: VecDeque<Change> = VecDeque::new();
    let mut times: Vec<Option<f64>> = Vec::new();
    let (mut made, mut next) = (0, cluster.world.now);
    while made < changes || !waiting.is_empty() {
        if made < changes && cluster.world.now >= next {
            let host = cluster.any_host();
            match cluster.change(host) {
                Some(change) => waiting.push_back(change),
                None => times.push(None),
            }
            made += 1;
            next = next.plus(gap);
        }
        cluster.world.run_for(Duration::from_millis(5));
        waiting.retain(|change| {
            let known = cluster.is_known(change);
            let age = cluster.age(change);
            if known {
                times.push(Some(age.as_secs_f64()));
            } else if age >= GIVE_UP {
                times.push(None);
            }
            !known && age < GIVE_UP
        });
    }
    // What follows a change is over some seconds later.
    cluster.world.run_for(Duration::from_secs(12));
    let passed = cluster.world.now.since(from).as_secs_f64();
    let more = (cluster.octets(IPV4) - before) as f64 - rest * passed;
    cluster.lose(0);
    let agreed = cluster
        .until(Duration::from_secs(30), |cluster| cluster.agrees())
        .is_some();
    Spread {
        times: times.into_iter().collect(),
        octets: more / changes as f64,
        agreed,
    }
}

/// Octets per second that all nodes together send at rest.
fn rest_rate(cluster: &mut Cluster, time: Duration, header: u64) -> f64 {
    let before = cluster.octets(header);
    cluster.world.run_for(time);
    (cluster.octets(header) - before) as f64 / time.as_secs_f64()
}

/// Octets a second that a node sends at rest, with IPv6 and UDP headers.
pub fn per_node_at_rest(cluster: &mut Cluster, time: Duration) -> f64 {
    // Keepalives and digests slow down when nothing happens any more.
    cluster.world.run_for(Duration::from_secs(60));
    rest_rate(cluster, time, IPV6) / cluster.world.hosts.len() as f64
}

pub(super) fn speed(scope: &Scope) -> Table {
    let mut table = Table::new(
        "The store: one change known everywhere",
        format!(
            "{NODES} whole nodes, links of 0.3 ms one way, half of the changes attach an endpoint, half bind a name, each on \
             some node; from the command to the moment the last node knows, the writer's fsync of 0.2 to 5.2 ms included. \
             *Octets*: all nodes together, IPv4 and UDP headers included, beyond what they send at rest."
        ),
        [
            "changes",
            "lost",
            "trials",
            "known everywhere, ms, median / p99",
            "never known",
            "all equal in the end",
            "octets a change",
        ],
    );
    for (name, gap, loss, trials) in [
        ("single", Duration::from_secs(1), 0, 300),
        ("single", Duration::from_secs(1), 200, 300),
        ("10 a second", Duration::from_millis(100), 0, 1_000),
        ("10 a second", Duration::from_millis(100), 200, 1_000),
    ] {
        if !scope.wants("store", "change") {
            continue;
        }
        let Some(mut cluster) = Cluster::settled(loss, NODES) else {
            table.row([name, "the cluster never settled"]);
            continue;
        };
        let trials = scope.trials(trials) as usize;
        let found = spread(&mut cluster, trials, gap, loss);
        table.row([
            name.to_owned(),
            format!("{} %", loss / 10),
            trials.to_string(),
            format!(
                "{:.0} / {:.0}",
                found.times.within(0.5) * 1e3,
                found.times.within(0.99) * 1e3
            ),
            found.times.never.to_string(),
            if found.agreed { "yes" } else { "NO" }.to_owned(),
            format!("{:.0}", found.octets),
        ]);
    }
    table
}

pub(super) fn size(scope: &Scope) -> Table {
    let mut table = Table::new(
        "The store: what exists costs memory, what changes costs traffic",
        format!(
            "{FEW} whole nodes. *Memory*: by how much the process grew with the endpoints (resident set, Linux), a node's share; \
             the simulated disk is in it. *Processor*: all work that a change makes on a node, datagrams sealed and opened \
             included, signatures not (each is checked once a world); it differs from run to run."
        ),
        [
            "endpoints",
            "at rest, octets/s a node",
            "octets a change, all nodes",
            "memory a node, MiB",
            "processor a change and node, µs",
        ],
    );
    if !scope.wants("size", "endpoints") {
        return table;
    }
    let Some(mut cluster) = Cluster::settled(7, FEW) else {
        table.row(["the cluster never settled"]);
        return table;
    };
    let empty = resident();
    let mut there = 0;
    for endpoints in [100, 1_000, 10_000] {
        if cluster.fill(endpoints - there).is_none() {
            table.row([endpoints.to_string(), "never equal".to_owned()]);
            return table;
        }
        there = endpoints;
        let memory = resident().saturating_sub(empty) as f64 / FEW as f64 / f64::from(1 << 20);
        let rest = rest_rate(&mut cluster, Duration::from_secs(60), IPV4) / FEW as f64;
        let at_rest = processor_seconds();
        cluster.world.run_for(Duration::from_secs(200));
        let idle = (processor_seconds() - at_rest) / 200.0;
        let (begun, from) = (processor_seconds(), cluster.world.now);
        let found = spread(&mut cluster, 200, Duration::from_secs(1), 0);
        let passed = cluster.world.now.since(from).as_secs_f64();
        let busy = processor_seconds() - begun - idle * passed;
        table.row([
            endpoints.to_string(),
            format!("{rest:.0}"),
            format!("{:.0}", found.octets),
            format!("{memory:.1}"),
            format!("{:.0}", busy * 1e6 / 200.0 / FEW as f64),
        ]);
    }
    table
}

/// Octets of memory that this process holds.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let resident = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    resident.unwrap_or(0) * 4096
}

/// Seconds that this process computed, in hundredths.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().nth(11);
    ticks.and_then(|ticks| ticks.parse().ok()).unwrap_or(0.0) / 100.0
}

pub(super) fn rest(scope: &Scope) -> Table {
    let mut table = Table::new(
        "Traffic at rest",
        "Octets a second and node, all headers included, from two minutes after the start on; of whole nodes for 40 minutes, \
         in which every session has new keys made once, with 100 and 300 nodes for 4 minutes. *Membership alone*: 65 octets around each datagram with IPv4 (IP 20, UDP 8, weft's header 16, tag 16, frame and \
         message 5), 85 with IPv6. *Everything*: whole nodes with membership, store, keepalives, echoes and handshakes.",
        ["", "N = 3", "N = 10", "N = 50", "N = 100", "N = 300"],
    );
    let sizes = [3, 10, 50, 100, 300];
    if scope.wants("rest", "membership alone") {
        let row = sizes.map(|hosts| {
            let [v4, v6] = super::membership::rest(hosts, Duration::from_secs(300));
            format!("{v4:.0} / {v6:.0}")
        });
        table.row(std::iter::once("membership alone, IPv4 / IPv6".to_owned()).chain(row));
    }
    let wanted = |hosts: usize| scope.wants("rest", &format!("everything {hosts}"));
    if sizes.into_iter().any(wanted) {
        let row = sizes.map(|hosts| {
            if !wanted(hosts) {
                return String::new();
            }
            let Some(mut cluster) = Cluster::settled(3, hosts) else {
                return "never settled".to_owned();
            };
            let seconds = if hosts <= 50 { 2_400 } else { 240 };
            let time = Duration::from_secs(scope.trials(seconds).max(120));
            cluster.world.run_for(Duration::from_secs(120));
            let (v4, v6) = (cluster.octets(IPV4), cluster.octets(IPV6));
            cluster.world.run_for(time);
            let rate = |octets: u64| octets as f64 / time.as_secs_f64() / hosts as f64;
            let cell = format!(
                "{:.0} / {:.0}",
                rate(cluster.octets(IPV4) - v4),
                rate(cluster.octets(IPV6) - v6)
            );
            super::progress(&format!("  everything, {hosts} nodes: {cell}"));
            cell
        });
        table.row(std::iter::once("everything, IPv4 / IPv6".to_owned()).chain(row));
    }
    table
}
