//! The simulator: hosts, links, disks and faults in virtual time, all from one seed. Equal seeds give equal traces byte
//! for byte, so a failing seed is a bug report.
//!
//! [`world`] knows nothing of weft but the three verbs of a sans-IO machine; [`members`] puts membership in it.

#![forbid(unsafe_code)]

pub mod disk;
pub mod faults;
pub mod members;
pub mod net;
pub mod world;
