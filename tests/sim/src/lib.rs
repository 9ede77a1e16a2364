//! The simulator: hosts, links, disks and faults in virtual time, all from one seed. Equal seeds give equal traces byte
//! for byte, so a failing seed is a bug report.
//!
//! [`world`] knows nothing of weft but the three verbs of a sans-IO machine. [`members`] puts membership alone in it,
//! [`nodes`] whole nodes; [`clusters`] makes them found, join, attach and serve while the [`faults`] of a plan befall them.
//! [`watch`] looks at each node after each of its steps, and [`promises`] compares in the end what each of them shows with
//! what it promised. [`search`] runs many seeds and shrinks what fails.

#![forbid(unsafe_code)]

pub mod clusters;
pub mod disk;
pub mod faults;
pub mod figures;
pub mod members;
pub mod net;
pub mod nodes;
pub mod promises;
pub mod search;
pub mod strange;
pub mod watch;
pub mod world;
