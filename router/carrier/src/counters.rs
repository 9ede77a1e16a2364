//! What is counted: drops by their reason, in all and of each peer, and what went to and came from each peer. Nothing on the packet path is ever
//! logged; an attacker could fill a disk with it.

use std::sync::atomic::{AtomicU64, Ordering};

use weft_core::underlay::{Offload, OffloadState};
use weft_core::view::PeerNumber;

/// Why something was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Dropped {
    /// On the TAP: neither IPv4 nor IPv6 (ARP, say; neighbours are permanent).
    NotIp,
    /// On the TAP: the destination MAC is no peer's (multicast, neighbour discovery).
    NotAPeer,
    /// An inner packet whose lengths or headers don't fit together.
    Malformed,
    /// An inner address that may not leave its link or host: link-local, multicast, loopback, unspecified.
    NotRoutable,
    /// From a peer, with a source address of the overlay that is not the peer's.
    ForeignSource,
    /// For a peer without a session: it waited a second in vain.
    NoSession,
    /// For a peer without a session: too many wait already.
    QueueFull,
    /// The session will seal no more under its key.
    SealRefused,
    /// Larger than the path to the peer takes.
    TooBig,
    /// The kernel refused to send.
    SendFailed,
    /// A datagram of no known type, version or length.
    UnknownDatagram,
    /// A data datagram for a session that this node does not have (any more).
    UnknownSession,
    /// A data datagram whose seal is broken.
    Forged,
    /// A data datagram that came before, or too late to tell.
    Replayed,
    /// A frame of a kind that this version does not know.
    UnknownFrame,
    /// Packets in a session of somebody who is no peer (yet).
    UnknownPeer,
    /// More handshakes than are looked at.
    HandshakeFlood,
    /// A handshake of somebody who does not hold the cluster's secret, nor an invitation.
    Stranger,
    /// The TAP took it not.
    TapRefused,
    /// To be passed on to somebody whom this node does not reach, or though it passes nothing on.
    NotRelayed,
    /// Marked by a congested router on the underlay, and the inner sender would not understand a mark (RFC 6040 §4.2).
    CeOnNotEct,
    /// What waits to leave the host had become too long a queue: its sender is to slow down (RFC 8289).
    Congested,
    /// To go by TCP, and too much waits there already.
    StreamFull,
    /// Not a packet: a TCP connection that was closed because nothing authentic had come along it.
    StrangersConnection,
}

impl Dropped {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Dropped; 24] = [
        Dropped::NotIp,
        Dropped::NotAPeer,
        Dropped::Malformed,
        Dropped::NotRoutable,
        Dropped::ForeignSource,
        Dropped::NoSession,
        Dropped::QueueFull,
        Dropped::SealRefused,
        Dropped::TooBig,
        Dropped::SendFailed,
        Dropped::UnknownDatagram,
        Dropped::UnknownSession,
        Dropped::Forged,
        Dropped::Replayed,
        Dropped::UnknownFrame,
        Dropped::UnknownPeer,
        Dropped::HandshakeFlood,
        Dropped::Stranger,
        Dropped::TapRefused,
        Dropped::NotRelayed,
        Dropped::CeOnNotEct,
        Dropped::Congested,
        Dropped::StreamFull,
        Dropped::StrangersConnection,
    ];

    /// The name it is shown under.
    pub fn name(self) -> &'static str {
        match self {
            Dropped::NotIp => "not-ip",
            Dropped::NotAPeer => "not-a-peer",
            Dropped::Malformed => "malformed",
            Dropped::NotRoutable => "not-routable",
            Dropped::ForeignSource => "foreign-source",
            Dropped::NoSession => "no-session",
            Dropped::QueueFull => "queue-full",
            Dropped::SealRefused => "seal-refused",
            Dropped::TooBig => "too-big",
            Dropped::SendFailed => "send-failed",
            Dropped::UnknownDatagram => "unknown-datagram",
            Dropped::UnknownSession => "unknown-session",
            Dropped::Forged => "forged",
            Dropped::Replayed => "replayed",
            Dropped::UnknownFrame => "unknown-frame",
            Dropped::UnknownPeer => "unknown-peer",
            Dropped::HandshakeFlood => "handshake-flood",
            Dropped::Stranger => "stranger",
            Dropped::TapRefused => "tap-refused",
            Dropped::NotRelayed => "not-relayed",
            Dropped::CeOnNotEct => "ce-on-not-ect",
            Dropped::Congested => "congested",
            Dropped::StreamFull => "stream-full",
            Dropped::StrangersConnection => "strangers-connection",
        }
    }
}

/// Drops so far, shared by all threads.
#[derive(Debug, Default)]
pub(crate) struct Drops([AtomicU64; Dropped::ALL.len()]);

impl Drops {
    pub(crate) fn count(&self, reason: Dropped) {
        self.count_many(reason, 1);
    }

    pub(crate) fn count_many(&self, reason: Dropped, packets: u64) {
        self.0[reason as usize].fetch_add(packets, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Vec<(Dropped, u64)> {
        Dropped::ALL
            .into_iter()
            .map(|reason| (reason, self.0[reason as usize].load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// Traffic with one peer, as the threads count it.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) tx_packets: AtomicU64,
    pub(crate) tx_bytes: AtomicU64,
    pub(crate) rx_packets: AtomicU64,
    pub(crate) rx_bytes: AtomicU64,
    pub(crate) drops: Drops,
}

impl Traffic {
    pub(crate) fn sent(&self, packets: u64, bytes: u64) {
        self.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.rx_packets.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, number: PeerNumber) -> PeerTraffic {
        PeerTraffic {
            drops: self.drops.read(),
            gso: OffloadState::On,
            source_ports: 1,
            number,
            tx_packets: self.tx_packets.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            rx_packets: self.rx_packets.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
        }
    }
}

/// Inner packets and octets to and from one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerTraffic {
    /// The peer.
    pub number: PeerNumber,
    /// Packets sealed and handed to the socket.
    pub tx_packets: u64,
    /// Their octets.
    pub tx_bytes: u64,
    /// Packets opened and found to be the peer's own.
    pub rx_packets: u64,
    /// Their octets.
    pub rx_bytes: u64,
    /// What was to go to it or came in its sessions and was dropped, by reason.
    pub drops: Vec<(Dropped, u64)>,
    /// Are runs sent to it, and if not, why? What the whole host does without is in [`Counters`].
    pub gso: OffloadState,
    /// Source ports that its packets leave by, the port itself among them.
    pub source_ports: u8,
}

/// All counters at one moment, and what else there is to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Drops that happened, by reason, those of peers included.
    pub drops: Vec<(Dropped, u64)>,
    /// Which offloads are in use.
    pub offloads: Vec<(Offload, OffloadState)>,
    /// Traffic of each peer of the present table.
    pub peers: Vec<PeerTraffic>,
}

impl Counters {
    /// How often something was dropped for `reason`.
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.drops
            .iter()
            .find(|(r, _)| *r == reason)
            .map_or(0, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_counts_under_its_own_number() {
        let drops = Drops::default();
        for (place, reason) in Dropped::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place, "{}", reason.name());
            drops.count_many(reason, place as u64 + 1);
        }
        for (reason, count) in drops.read() {
            assert_eq!(count, reason as u64 + 1);
        }
    }
}
