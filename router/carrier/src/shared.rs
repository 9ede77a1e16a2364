//! What the threads and the handle share, and what they tell the core.

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use arc_swap::ArcSwap;
use weft_core::path::Path;
use weft_core::underlay::Dscp;
use weft_core::view::PeerNumber;

use crate::counters::{Dropped, Drops};
use crate::crew::Crew;
use crate::offload::Offloads;
use crate::table::{Peer, Table};

/// Something the core has to know. Called from the packet threads: the callee must not block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CarrierEvent {
    /// A handshake or cookie datagram, or a data datagram of a newcomer's session (the core opens those): of right version and
    /// length, and nothing more is known. Rate-limited.
    Handshake {
        /// How it came.
        from: Path,
        /// All of it.
        bytes: Vec<u8>,
    },
    /// A frame for the core, opened and fresh.
    Frame {
        /// The session it came in.
        local_index: u32,
        /// How it came.
        from: Path,
        /// A [`weft_core::wire::FrameKind`] that is not packets.
        kind: u8,
        /// What is behind the kind.
        body: Vec<u8>,
    },
    /// Packets wait for a peer without a session, or its session will seal no more. At most ten times a second per peer.
    Wanted(PeerNumber),
    /// Authentic datagrams come by another way than the peer's path. At most ten times a second per peer.
    Moved {
        /// The session.
        local_index: u32,
        /// How they came.
        from: Path,
    },
    /// Datagrams to a peer are larger than the path takes: ask [`crate::Carrier::path_mtu`] anew and shrink the route. At
    /// most ten times a second per peer.
    TooBig {
        /// The peer.
        number: PeerNumber,
        /// Its path.
        to: SocketAddr,
    },
    /// A connection along which something authentic had come is gone.
    ConnectionLost(SocketAddr),
    /// The TAP is gone (the domain was removed): nothing is sent any more. Start anew.
    TapLost,
}

pub(crate) type Events = Box<dyn Fn(CarrierEvent) + Send + Sync>;

pub(crate) struct Shared {
    pub(crate) table: ArcSwap<Table>,
    pub(crate) drops: Drops,
    pub(crate) dscp: Dscp,
    pub(crate) offloads: Offloads,
    pub(crate) crew: Crew,
    /// Source ports besides the port itself.
    pub(crate) further_ports: u8,
    /// The core has said who the peers are.
    pub(crate) has_table: AtomicBool,
    pub(crate) stop: AtomicBool,
    pub(crate) events: Events,
    start: Instant,
}

impl Shared {
    pub(crate) fn new(events: Events, dscp: Dscp, offloads: Offloads) -> Self {
        Self {
            table: ArcSwap::from_pointee(Table::empty()),
            drops: Drops::default(),
            dscp,
            offloads,
            crew: Crew::default(),
            further_ports: 0,
            has_table: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            events,
            start: Instant::now(),
        }
    }

    /// The same with so many source ports besides the port itself.
    pub(crate) fn with_further_ports(self, further_ports: u8) -> Self {
        Self {
            further_ports,
            ..self
        }
    }

    /// Milliseconds since the start.
    pub(crate) fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Counts `packets` to or from `peer` as dropped.
    pub(crate) fn drop_of(&self, peer: &Peer, reason: Dropped, packets: u64) {
        self.drops.count_many(reason, packets);
        peer.state.traffic.drops.count_many(reason, packets);
    }

    pub(crate) fn tell(&self, event: CarrierEvent) {
        (self.events)(event);
    }
}
