//! Medians, and ratios that were taken round by round.

use std::fmt::Write;

use crate::measure::{Metric, Value};
use crate::tunnels::TUNNELS;

/// The candidate that is compared with the others.
const OURS: &str = "weft";

/// All figures.
pub(crate) struct Results {
    candidates: Vec<&'static str>,
    metrics: Vec<Metric>,
    /// By metric and candidate, a figure for each round.
    figures: Vec<Vec<Vec<Value>>>,
}

impl Results {
    pub(crate) fn new(candidates: Vec<&'static str>, metrics: Vec<Metric>) -> Self {
        let figures = vec![vec![Vec::new(); candidates.len()]; metrics.len()];
        Self {
            candidates,
            metrics,
            figures,
        }
    }

    /// The next round's figure.
    pub(crate) fn add(&mut self, candidate: usize, metric: usize, value: Value) {
        self.figures[metric][candidate].push(value);
    }

    /// A table: measurements down, candidates across, and how weft stands beside the best of those that can be had.
    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!("| | {} |", self.candidates.join(" | "));
        let has_ratio = self.peers().next().is_some() && self.ours().is_some();
        if has_ratio {
            text.push_str(" weft / best peer |");
        }
        let columns = self.candidates.len() + usize::from(has_ratio);
        let _ = writeln!(text, "\n|---|{}", "---:|".repeat(columns));
        for (place, metric) in self.metrics.iter().enumerate() {
            let medians = self.figures[place]
                .iter()
                .map(|rounds| median(rounds).to_string());
            let _ = write!(
                text,
                "| {} | {} |",
                metric.title,
                medians.collect::<Vec<_>>().join(" | ")
            );
            if has_ratio {
                let _ = write!(text, " {} |", self.ratio(place));
            }
            text.push('\n');
        }
        text
    }

    fn ours(&self) -> Option<usize> {
        self.candidates.iter().position(|name| *name == OURS)
    }

    fn peers(&self) -> impl Iterator<Item = usize> + '_ {
        let is_peer = |name: &str| TUNNELS.iter().any(|t| t.name == name && t.is_peer);
        (0..self.candidates.len()).filter(move |place| is_peer(self.candidates[*place]))
    }

    /// The median over the rounds of our figure over the best peer's in the same round.
    fn ratio(&self, metric: usize) -> Value {
        let figures = &self.figures[metric];
        let Some(ours) = self.ours() else {
            return Value(None);
        };
        let best = |round: usize| {
            let all = self.peers().filter_map(|peer| figures[peer][round].0);
            let best = match self.metrics[metric].more_is_better {
                true => all.reduce(f64::max),
                false => all.reduce(f64::min),
            };
            // Nothing can be so many times nothing.
            best.filter(|best| *best > 0.0)
        };
        let rounds = figures[ours].iter().enumerate();
        let ratios =
            rounds.map(|(round, own)| Value(own.0.zip(best(round)).map(|(own, best)| own / best)));
        median(&ratios.collect::<Vec<_>>())
    }
}

/// Of the figures that there are.
fn median(values: &[Value]) -> Value {
    let mut there: Vec<f64> = values.iter().filter_map(|value| value.0).collect();
    there.sort_by(f64::total_cmp);
    Value(there.get(there.len() / 2).copied())
}

/// The file that keeps it.
pub(crate) fn page(table: &str, rounds: u32, seconds: u32) -> String {
    format!(
        "# Benchmarks

weft beside what a user would take instead, between containers on two hosts; all hosts are network namespaces of one
machine, so its processors do the work of both ends and of the programs that measure. Made by

```
tests/bench/run [--rounds N] [--seconds N] [--only LIST] [--metrics LIST]
```

which builds weft, installs the peers (wireguard-go and nebula from Debian, boringtun-cli from crates.io), measures all in
turn and writes this file. Medians of {rounds} rounds of {seconds} s for each figure; the last column is the median of the
ratios that were taken round by round. `weft-vxlan` is weft between hosts that trust the network between them,
`weft-services` the same with 1,000 published services; `vxlan` and `routed` are the kernel alone. These four do not encrypt.

Machine: {}

{table}
* Streams and datagrams are iperf3's; UDP is sent as fast as its sender can, and what arrives counts.
* Datagrams in runs are sent many a call, which the kernel cuts (`UDP_SEGMENT`), as QUIC implementations do, and received
  joined (`UDP_GRO`) by a program of the lab.
* CPU is that of the whole machine: both hosts, and iperf3 at both ends.
* Round trips are the mean of one ping every 2 ms.
* Loss: each datagram between the hosts is dropped with a chance of 1 in 100, both ways, after all segmentation.
",
        machine()
    )
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let models: Vec<&str> = cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map(|(_, model)| model)
        .collect();
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = models.first().copied().unwrap_or("unknown");
    format!(
        "{} processors ({model}), Linux {}",
        models.len(),
        kernel.trim()
    )
}
