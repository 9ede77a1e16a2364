//! Runs seeds through the simulator.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use weft_sim::clusters::{self, Options};
use weft_sim::faults::Kind;
use weft_sim::figures::{self, Scope};
use weft_sim::members;
use weft_sim::search::{self, Go, Outcome};

/// Failing seeds that are made smaller; of the others only the command is told.
const SHRUNK: usize = 5;
/// So many violations of one seed are printed.
const SHOWN: usize = 4;

/// Searches for seeds under which what weft promises does not hold: those of a range, so many fresh ones, or without end.
#[derive(Parser)]
#[command(name = "weft-sim", version, after_help = format!("Kinds of faults:\n{}", Kind::help()))]
struct Args {
    /// Seeds to run, A..B.
    #[arg(long, value_parser = parse_range)]
    seeds: Option<Range<u64>>,
    /// Runs so many seeds that nobody ran before; the first is printed, and the others follow it.
    #[arg(long, value_name = "COUNT")]
    fresh: Option<u64>,
    /// Hosts in each world; 3 to 10 by the seed when absent.
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=300))]
    nodes: Option<u64>,
    /// Kinds of faults, by comma; all of them when absent.
    #[arg(long, value_delimiter = ',')]
    faults: Option<Vec<Kind>>,
    /// Numbers of faults to leave out of the plan, by comma.
    #[arg(long, value_delimiter = ',', value_name = "NUMBERS")]
    without: Vec<usize>,
    /// Prints all that happens under one seed.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// Threads; as many as there are processors when absent.
    #[arg(long)]
    jobs: Option<usize>,
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

impl Args {
    fn options(&self, seed: u64) -> Options {
        Options {
            hosts: self.nodes.unwrap_or(3 + seed % 8) as usize,
            kinds: self.faults.clone().unwrap_or_else(|| Kind::ALL.to_vec()),
            without: self.without.iter().copied().collect::<BTreeSet<_>>(),
            keep_trace: false,
        }
    }

    fn jobs(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.jobs.unwrap_or_else(all).max(1)
    }
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
    if let Some(seed) = args.replay {
        return replay(&args, seed);
    }
    if args.members {
        return search_members(&args);
    }
    let mut report = Report::default();
    let mut fixed = args.seeds.clone();
    let mut fresh = args.fresh;
    if fixed.is_none() && fresh.is_none() {
        fresh = Some(u64::MAX);
    }
    if let Some(seeds) = fixed.take() {
        report.run(&args, seeds);
    }
    if let Some(count) = fresh {
        let first = fresh_seed();
        println!("fresh seeds from {first} on");
        report.run(&args, first..first.saturating_add(count));
    }
    report.finish()
}

/// A number that the operating system makes, small enough to read out.
fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 16
}

fn replay(args: &Args, seed: u64) -> ExitCode {
    let options = Options {
        keep_trace: true,
        ..args.options(seed)
    };
    let verdict = if args.members {
        members::run(seed, options.hosts, &options.kinds, true)
    } else {
        clusters::run_with(seed, &options).0
    };
    print!("{}", verdict.trace);
    for line in &verdict.violations {
        println!("VIOLATION {line}");
    }
    exit(verdict.violations.is_empty())
}

/// What a search found.
#[derive(Default)]
struct Report {
    seeds: u64,
    violations: usize,
    failed: usize,
    whole: Vec<Duration>,
}

impl Report {
    fn run(&mut self, args: &Args, seeds: Range<u64>) {
        search::run(
            seeds,
            args.jobs(),
            |seed| args.options(seed),
            |outcome| {
                self.take(&outcome);
                Go::On
            },
        );
    }

    fn take(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.violations += outcome.violations.len();
        self.whole.extend(outcome.whole_after);
        if self.seeds.is_multiple_of(1_000) {
            println!(
                "{} seeds, {} violations so far",
                self.seeds, self.violations
            );
        }
        if outcome.violations.is_empty() {
            return;
        }
        self.failed += 1;
        let Outcome { seed, options, .. } = outcome;
        let more = outcome.violations.len().saturating_sub(SHOWN);
        for line in outcome.violations.iter().take(SHOWN) {
            println!("seed {seed} ({} nodes): {line}", options.hosts);
        }
        if more > 0 {
            println!("  and {more} more");
        }
        println!("  replay: {}", search::replay_command(*seed, options));
        if self.failed <= SHRUNK {
            let least = search::shrink(outcome);
            println!(
                "  least:  {}",
                search::replay_command(*seed, &least.options)
            );
            for line in least.violations.iter().take(SHOWN) {
                println!("          {line}");
            }
        }
    }

    fn finish(mut self) -> ExitCode {
        self.whole.sort();
        if let Some(last) = self.whole.last() {
            let median = self.whole[self.whole.len() / 2];
            println!("as promised after the last fault: median {median:?}, worst {last:?}");
        }
        println!("{} seeds, {} violations", self.seeds, self.violations);
        exit(self.violations == 0)
    }
}

fn search_members(args: &Args) -> ExitCode {
    let mut report = Report::default();
    for seed in args.seeds.clone().unwrap_or(0..100) {
        let options = args.options(seed);
        let verdict = members::run(seed, options.hosts, &options.kinds, false);
        for line in &verdict.violations {
            println!("seed {seed} ({} nodes): {line}", options.hosts);
        }
        report.seeds += 1;
        report.violations += verdict.violations.len();
        report.whole.extend(verdict.whole_after);
    }
    report.finish()
}

fn exit(holds: bool) -> ExitCode {
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
