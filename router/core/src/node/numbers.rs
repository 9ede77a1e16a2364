//! The numbers this host gives to its peers. They stay for good: established connections carry them in their marks.

use std::collections::BTreeMap;

use crate::model::NodeId;
use crate::store::{Batch, Stored, Table};
use crate::view::PeerNumber;

/// Largest number: twelve bits of mark, 0 is the host itself, 4095 stays free.
const MAX: u16 = 4094;

/// Peer to number.
#[derive(Debug, Default)]
pub(super) struct Numbers(BTreeMap<NodeId, PeerNumber>);

impl Numbers {
    pub(super) fn restore(stored: &Stored) -> Self {
        let rows = stored.rows(Table::PeerNumbers).filter_map(|(key, value)| {
            let id = NodeId(key.try_into().ok()?);
            Some((id, PeerNumber(u16::from_be_bytes(value.try_into().ok()?))))
        });
        Self(rows.collect())
    }

    /// The number of `peer`; a new one comes with the batch that keeps it. `None` when 4,094 peers have one.
    pub(super) fn assign(&mut self, peer: NodeId) -> Option<(PeerNumber, Option<Batch>)> {
        if let Some(number) = self.0.get(&peer) {
            return Some((*number, None));
        }
        let free = (1..=MAX)
            .map(PeerNumber)
            .find(|number| !self.0.values().any(|taken| taken == number))?;
        self.0.insert(peer, free);
        let row = (
            Table::PeerNumbers.key(&[&peer.0]),
            Some(free.0.to_be_bytes().to_vec()),
        );
        Some((free, Some(Batch(vec![row]))))
    }

    pub(super) fn of(&self, peer: &NodeId) -> Option<PeerNumber> {
        self.0.get(peer).copied()
    }

    pub(super) fn peer(&self, number: PeerNumber) -> Option<NodeId> {
        self.0
            .iter()
            .find(|(_, n)| **n == number)
            .map(|(id, _)| *id)
    }
}
