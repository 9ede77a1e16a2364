//! Scenarios: the real binaries in the lab, one file per theme. As root: `cargo test -p weft-lab`.

// All of this is a test; the lint only knows functions that are marked as one.
#![allow(clippy::unwrap_used)]

mod abuse;
mod addresses;
mod attach;
mod carriers;
mod cni;
mod death;
mod demo;
mod down;
mod flood;
mod itself;
mod join;
mod lacking;
mod marks;
mod mtu;
mod names;
mod networks;
mod offloads;
mod paths;
mod queues;
mod removal;
mod restart;
mod services;
mod sizes;
mod source_ports;
mod tcp;
mod upgrade;
mod wire;
