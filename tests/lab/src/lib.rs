//! The lab: hosts as network namespaces in which the real binaries run and real packets travel.
//!
//! ```text
//!            router namespace (forwards between subnets; no other way)
//!   br-a ──┬── p-h1 ── eth0 | h1      a host: namespace, addresses, default routes through the router,
//!          └── p-h2 ── eth0 | h2      its own run and state directory, its own resolv.conf
//!   br-b ───── p-h3 ── eth0 | h3
//! ```
//!
//! Everything is named after the process that made it, removed when the [`Lab`] is dropped (a failed test included),
//! and what a killed test left behind is swept by the next one. The library is part of the tests: what goes wrong in it
//! panics with the reason. It needs root and fails without; it never skips.

mod capture;
mod command;
mod container;
mod conversation;
mod faults;
mod forged;
mod host;
mod lab;
mod netns;
mod snapshot;

pub use capture::{Capture, Frame};
pub use command::{Out, Spawned, run_command, signal};
pub use container::Container;
pub use conversation::{MARKER, answers, converse, goes_on, has_marker, hold, overheard};
pub use forged::{Forged, TIMES, forged_file, vxlan_mac};
pub use host::Host;
pub use lab::{Lab, Subnet};
pub use netns::{Names, Netns};
pub use snapshot::Snapshot;

/// Words as owned strings: `words(["ping", "-c1", &ip])`.
pub fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}
