//! The adapters on the real kernel. Every test makes a host of its own, a fresh network namespace with a domain and
//! containers, and removes it whatever happens. Needs root, and fails without.

// The lint knows test functions, but not their helpers.
#![allow(clippy::unwrap_used)]

mod domain;
mod host;
mod lab;
mod rules;
mod vxlan;
