//! What all links of a node share: the generator, the session indices and the counts of what was dropped.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::SessionEvent;
use super::drops::Drops;
use super::link::Live;
use crate::crypto::Random;
use crate::model::NodeId;

/// Indices with this bit belong to joiners' sessions, the others to members'.
pub(super) const JOIN_BIT: u32 = 1 << 31;

/// An index is the session's SPI for ESP as well, and those up to this are reserved (RFC 4303 §2.1).
const RESERVED: u32 = 255;

pub(super) struct Desk {
    pub(super) me: NodeId,
    pub(super) random: Random,
    pub(super) drops: Drops,
    /// Networks that this host trusts.
    pub(super) trusted: Arc<[IpNet]>,
    indices: BTreeMap<u32, NodeId>,
}

impl Desk {
    pub(super) fn new(me: NodeId, random: Random, trusted: Arc<[IpNet]>) -> Self {
        Self {
            me,
            random,
            drops: Drops::default(),
            trusted,
            indices: BTreeMap::new(),
        }
    }

    /// A fresh index for a session with `peer`; not to be guessed from earlier ones.
    pub(super) fn draw(&mut self, peer: NodeId) -> u32 {
        loop {
            let index = self.random.u64() as u32 & !JOIN_BIT;
            if index > RESERVED && !self.indices.contains_key(&index) {
                self.indices.insert(index, peer);
                return index;
            }
        }
    }

    pub(super) fn peer(&self, index: u32) -> Option<NodeId> {
        self.indices.get(&index).copied()
    }

    pub(super) fn release(&mut self, index: u32) {
        self.indices.remove(&index);
    }

    pub(super) fn retire(&mut self, live: &Live, out: &mut Vec<SessionEvent>) {
        let local_index = live.transport.local_index();
        self.release(local_index);
        out.push(SessionEvent::Retired { local_index });
    }
}
