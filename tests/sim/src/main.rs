//! Runs seeds through the simulator.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use weft_sim::clusters;
use weft_sim::faults::Kind;
use weft_sim::figures::{self, Scope};
use weft_sim::members;

/// Searches for seeds under which what weft promises does not hold.
#[derive(Parser)]
#[command(name = "weft-sim", version)]
struct Args {
    /// Seeds to run, A..B.
    #[arg(long, value_parser = parse_range, default_value = "0..100")]
    seeds: Range<u64>,
    /// Hosts in each world; 3 to 10 by the seed when absent.
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=300))]
    nodes: Option<u64>,
    /// Kinds of faults, by comma: weather, one-way, partition, crash, pause.
    #[arg(long, value_delimiter = ',')]
    faults: Option<Vec<Kind>>,
    /// Prints all that happens under one seed.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// Runs membership alone instead of whole nodes.
    #[arg(long)]
    members: bool,
    /// Measures how fast membership and the store are and what they cost; prints tables.
    #[arg(long)]
    figures: bool,
    /// With --figures: a tenth of the trials.
    #[arg(long, requires = "figures")]
    quick: bool,
    /// With --figures: only tables or rows whose names contain this.
    #[arg(long, requires = "figures", value_name = "TEXT")]
    only: Option<String>,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let wrong = || format!("\"{text}\" is no range of seeds such as 0..100");
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let start: u64 = start.parse().map_err(|_| wrong())?;
    let end: u64 = end.parse().map_err(|_| wrong())?;
    if start < end {
        Ok(start..end)
    } else {
        Err(wrong())
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.figures {
        figures::print(&Scope {
            quick: args.quick,
            only: args.only,
        });
        return ExitCode::SUCCESS;
    }
    let kinds = args.faults.clone().unwrap_or_else(|| Kind::ALL.to_vec());
    let run = if args.members {
        members::run
    } else {
        clusters::run
    };
    let hosts = |seed: u64| args.nodes.unwrap_or(3 + seed % 8) as usize;
    if let Some(seed) = args.replay {
        let verdict = run(seed, hosts(seed), &kinds, true);
        print!("{}", verdict.trace);
        verdict
            .violations
            .iter()
            .for_each(|line| println!("VIOLATION {line}"));
        return exit(verdict.violations.is_empty());
    }
    let (mut violations, count) = (0, args.seeds.end - args.seeds.start);
    let mut whole: Vec<Duration> = Vec::new();
    for seed in args.seeds {
        let verdict = run(seed, hosts(seed), &kinds, false);
        for line in &verdict.violations {
            println!("seed {seed} ({} nodes): {line}", hosts(seed));
        }
        violations += verdict.violations.len();
        whole.extend(verdict.whole_after);
    }
    whole.sort();
    if let Some(last) = whole.last() {
        let median = whole[whole.len() / 2];
        println!("as promised after the last fault: median {median:?}, worst {last:?}");
    }
    println!("{count} seeds, {violations} violations");
    exit(violations == 0)
}

fn exit(holds: bool) -> ExitCode {
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
