//! More than one source port for what goes to a peer: clouds cap what two addresses and ports may carry between them, and
//! switches and cards spread such flows over links and queues. An inner flow keeps to one port, so that nothing in it is
//! overtaken. This host is found at the port itself alone: the others send, where the peer has answered what came from them
//! (`trial.rs`), as a NAT or a firewall before it may not know them, and hear no more than those answers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};

use weft_core::underlay::UnderlayAddr;

use crate::udp::UdpPort;

/// As many as are of use: the port itself and three more.
pub const MAX_SOURCE_PORTS: u8 = 4;

/// Where a run goes, and which source port it leaves by: 0 is the port itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lane {
    pub(crate) to: UnderlayAddr,
    pub(crate) source: u8,
}

impl Lane {
    /// From the port itself.
    pub(crate) fn main(to: UnderlayAddr) -> Self {
        Self { to, source: 0 }
    }
}

/// Which of the further ports reach a peer: bit n for port n + 1.
#[derive(Debug, Default)]
pub(crate) struct Proven(AtomicU8);

impl Proven {
    pub(crate) fn set(&self, ports: u8) {
        self.0.store(ports, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }

    /// How many ports are in use, the port itself among them.
    pub(crate) fn count(&self) -> u8 {
        1 + self.get().count_ones() as u8
    }

    /// The port of the flow that `hash` gives; it is asked for only where there is a choice.
    pub(crate) fn pick(&self, hash: impl FnOnce() -> u32) -> u8 {
        let proven = self.get();
        if proven == 0 {
            return 0;
        }
        let choices = u64::from(self.count());
        let nth = ((u64::from(hash()) * choices) >> 32) as usize;
        let mut further = (0..8).filter(|bit| proven >> bit & 1 == 1);
        // The port itself is the first choice.
        let bit = nth.checked_sub(1).and_then(|nth| further.nth(nth));
        bit.map_or(0, |bit| bit + 1)
    }
}

/// One of the further ports: a socket of each IP version that the host has.
#[derive(Debug)]
pub(crate) struct SourcePort {
    pub(crate) v4: UdpPort,
    pub(crate) v6: Option<UdpPort>,
}

impl SourcePort {
    /// Takes any port on these addresses.
    pub(crate) fn open((v4, v6): (Ipv4Addr, Option<Ipv6Addr>)) -> io::Result<Self> {
        let open = |address: SocketAddr| UdpPort::bind(address, None);
        Ok(Self {
            v4: open((v4, 0).into())?,
            v6: v6.map(|v6| open((v6, 0).into())).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_spread_over_what_is_proven_and_nothing_else() {
        let proven = Proven::default();
        assert_eq!(proven.count(), 1);
        assert_eq!(proven.pick(|| panic!("there is no choice")), 0);
        proven.set(0b101);
        assert_eq!(proven.count(), 3);
        let third = u32::MAX / 3;
        let picked = [0, third / 2, third + 2, 2 * third + 2, u32::MAX].map(|h| proven.pick(|| h));
        assert_eq!(picked, [0, 0, 1, 3, 3]);
    }
}
