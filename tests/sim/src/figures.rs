//! What is measured, as tables: how fast membership and the store are, what they never do wrong, and what they cost.
//!
//! Everything is virtual time from fixed seeds, so the same program prints the same figures; only the lines on the time
//! that a change costs the processor differ from one run to the next.

pub mod cluster;
pub mod membership;
pub mod store;
mod table;

use std::time::Instant;

use table::Table;
pub use table::Times;

/// What is to be measured, and how often.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// A tenth of the trials: minutes instead of a quarter of an hour.
    pub quick: bool,
    /// Only tables or rows whose names contain this.
    pub only: Option<String>,
}

impl Scope {
    /// So many trials of `full`.
    fn trials(&self, full: u64) -> u64 {
        match self.quick {
            false => full,
            true => full.div_ceil(10),
        }
    }

    fn wants(&self, table: &str, row: &str) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|only| table.contains(only) || row.contains(only))
    }
}

/// Measures and prints, one table after another.
pub fn print(scope: &Scope) {
    let begun = Instant::now();
    let quick = if scope.quick { " --quick" } else { "" };
    println!("# weft in figures\n");
    println!(
        "Made by `cargo run --release -p weft-sim -- --figures{quick}`: one thread, virtual time, every world from its seed, \
         seeds from 0 on."
    );
    let parts: [fn(&Scope) -> Table; 6] = [
        membership::speed,
        membership::safety,
        membership::chaos_table,
        store::rest,
        store::speed,
        store::size,
    ];
    for part in parts {
        let from = Instant::now();
        let table = part(scope);
        if table.is_empty() {
            continue;
        }
        println!("\n{table}");
        let took = from.elapsed().as_secs_f64();
        progress(&format!("{}: {took:.0} s", table.title));
    }
    progress(&format!("all: {:.0} s", begun.elapsed().as_secs_f64()));
}

/// Tells whoever waits how far it is.
fn progress(line: &str) {
    eprintln!("{line}");
}
