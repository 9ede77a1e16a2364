//! Scenarios: the real binaries in the lab, one file per theme. As root: `cargo test -p weft-lab`.

mod abuse;
mod addresses;
mod attach;
mod cni;
mod death;
mod demo;
mod down;
mod itself;
mod join;
mod names;
mod restart;
mod services;
mod wire;
