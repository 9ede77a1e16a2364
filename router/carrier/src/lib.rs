//! The packet path.
mod bundle;
mod checksum;
mod coalesce;
mod counters;
mod inner;
mod segment;
mod vnet;
pub use counters::{Counters, Dropped, PeerTraffic};
