//! What is measured, as tables: how fast membership and the store are, what they never do wrong, and what they cost.
//!
//! Everything is virtual time from fixed seeds, so the same program prints the same figures; only the lines on the time
//! that a change costs the processor differ from one run to the next.

pub mod membership;
mod table;

use std::time::Instant;

use table::Table;
pub use table::Times;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Few trials: some minutes.
    Quick,
    /// As many as `docs/figures.md` shows.
    Full,
}

impl Effort {
    /// `full`, or a tenth of it.
    fn of(self, full: u64) -> u64 {
        match self {
            Effort::Full => full,
            Effort::Quick => full.div_ceil(10),
        }
    }
}

/// Measures and prints, one table after another: all, or those whose name contains `only`.
pub fn print(effort: Effort, only: Option<&str>) {
    let begun = Instant::now();
    println!("# weft in figures\n");
    println!(
        "Made by `cargo run --release -p weft-sim -- --figures{}`: one thread, virtual time, every world from its seed.",
        match effort {
            Effort::Full => "",
            Effort::Quick => " --quick",
        }
    );
    let parts: [(&str, fn(Effort) -> Table); 3] = [
        ("speed", membership::speed),
        ("safety", membership::safety),
        ("chaos", membership::chaos_table),
    ];
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    for (_, part) in parts.into_iter().filter(|(name, _)| wanted(name)) {
        let from = Instant::now();
        let table = part(effort);
        println!("\n{table}");
        progress(&format!(
            "{}: {:.0} s",
            table.title,
            from.elapsed().as_secs_f64()
        ));
    }
    progress(&format!("all: {:.0} s", begun.elapsed().as_secs_f64()));
}

/// Tells whoever waits how far it is.
fn progress(line: &str) {
    eprintln!("{line}");
}
