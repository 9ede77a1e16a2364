//! Scenarios: the real binaries in the lab, one file per theme. As root: `cargo test -p weft-lab`.

mod itself;
mod join;
mod names;
