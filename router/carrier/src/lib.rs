//! The `udp` carrier: the packet path between the domain's TAP and the other hosts, on threads of its own.
//!
//! ```text
//! domain          │ TAP wu0 ─> cut super-packets ─> bundle small ones ─> seal ─> runs of datagrams ─> UDP │  host
//! (namespace)     │ TAP wu0 <─ join TCP segments <─ whose source? <─ open <─ datagrams of a run    <─ UDP │ (namespace)
//! ```
//!
//! Where no UDP gets through, the same datagrams go one behind the other in TCP connections.
//!
//! Peers are MAC addresses on the TAP ([`weft_core::layout::peer_mac`]); which session and which address they stand for
//! says the [`PeerTable`] that the core sets. Handshakes, rekeying, and who may be a peer are the core's affair: what is
//! not packets is handed to it as [`CarrierEvent`]s.
//!
//! It never answers anything by itself, never looks at more of an unauthenticated datagram than its first sixteen octets
//! and its length, never logs per packet (it counts, see [`Dropped`]), and never lets a header that came over the wire
//! tell the kernel what to do: the virtio header before each frame is rebuilt from what was checked.

mod backlog;
mod batch;
mod bundle;
mod carrier;
mod checksum;
mod coalesce;
mod control;
mod counters;
mod crew;
mod descriptors;
mod ecn;
mod error;
mod halves;
mod inbound;
mod inner;
mod limit;
#[doc(hidden)]
pub mod measure;
mod offload;
mod outbound;
mod peer_sockets;
mod probe;
mod readiness;
mod reception;
mod relay;
mod segment;
mod shared;
mod source_ports;
mod sys;
mod table;
mod tap;
mod tcp;
mod threads;
mod trial;
mod udp;
mod underlay;
#[cfg(test)]
mod unused_port;
mod vnet;
mod waiting;

pub use carrier::{Carrier, CarrierConfig};
pub use counters::{Counters, Dropped, PeerTraffic};
pub use descriptors::Descriptors;
pub use error::CarrierError;
pub use probe::VxlanProbes;
pub use shared::CarrierEvent;
pub use source_ports::MAX_SOURCE_PORTS;
pub use table::{PeerEntry, PeerTable};
