//! How fast weft is beside what a user would take instead: every candidate joins two hosts of one lab, and all are
//! measured in turn, round by round, so that a machine whose speed drifts does so for all of them.

mod measure;
mod pair;
mod report;
mod tunnels;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};

use measure::METRICS;
use report::Results;
use tunnels::TUNNELS;

/// Measures weft and its peers between containers on two hosts, in turn, and prints medians.
#[derive(Parser)]
#[command(name = "weft-bench", version)]
struct Args {
    /// Rounds; each measures everything once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Only these candidates, by comma; all when absent
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these measurements, by comma; all when absent
    #[arg(long, value_delimiter = ',')]
    metrics: Vec<String>,
    /// Where boringtun-cli is, if not in the PATH
    #[arg(long, value_name = "DIR")]
    tools: Option<PathBuf>,
    /// Keeps the result in this file, as Markdown
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

fn main() {
    let args = Args::parse();
    let metrics = chosen(&METRICS, &args.metrics, |metric| metric.name);
    let tunnels = chosen(&TUNNELS, &args.only, |tunnel| tunnel.name);
    let interrupted = interrupted();
    let pairs: Vec<_> = tunnels
        .iter()
        .map(|tunnel| {
            eprintln!("bringing up {}", tunnel.name);
            (tunnel.make)(args.tools.as_deref())
        })
        .collect();
    let mut results = Results::new(
        tunnels.iter().map(|tunnel| tunnel.name).collect(),
        metrics.clone(),
    );
    for round in 1..=args.rounds {
        for (place, metric) in metrics.iter().enumerate() {
            for (candidate, pair) in pairs.iter().enumerate() {
                if interrupted.load(Ordering::Relaxed) {
                    eprintln!("interrupted: taking all down");
                    drop(pairs);
                    std::process::exit(130);
                }
                let value = (metric.take)(pair, Duration::from_secs(args.seconds.into()));
                let name = tunnels[candidate].name;
                eprintln!("round {round}: {name:12} {:16} {value}", metric.name);
                results.add(candidate, place, value);
            }
        }
    }
    let text = results.to_markdown();
    print!("{text}");
    let Some(path) = args.write else {
        return;
    };
    let page = report::page(&text, args.rounds, args.seconds);
    if let Err(error) = std::fs::write(&path, page) {
        eprintln!("can't write {}: {error}", path.display());
        std::process::exit(1);
    }
}

/// Set by Ctrl-C: then the hosts and what runs on them go before this process does. A second one ends it at once.
fn interrupted() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let registered =
            signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())
                .and_then(|_| signal_hook::flag::register(signal, flag.clone()));
        if let Err(error) = registered {
            eprintln!("interrupting leaves hosts behind: {error}");
        }
    }
    flag
}

/// Those of `all` that are named, or all.
fn chosen<T: Clone>(all: &[T], names: &[String], name: impl Fn(&T) -> &'static str) -> Vec<T> {
    for wanted in names {
        if !all.iter().any(|one| name(one) == wanted) {
            let known: Vec<_> = all.iter().map(&name).collect();
            eprintln!("there is no {wanted}; there are: {}", known.join(", "));
            std::process::exit(2);
        }
    }
    let is_wanted = |one: &&T| names.is_empty() || names.iter().any(|n| n == name(one));
    all.iter().filter(is_wanted).cloned().collect()
}
