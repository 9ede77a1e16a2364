//! Which invitations of this node were used, and by whom: counted by their issuer alone, written down before anybody is
//! admitted. The same key using a token twice is one use, so a newcomer may ask again when an answer got lost.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::model::NodeId;
use crate::store::{Batch, Stored, Table};
use crate::wire;

/// Tokens remembered; the ones that expired longest ago go first.
const MAX: usize = 4096;

/// What is kept of one token.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Uses {
    /// Unix seconds.
    expiry: u64,
    by: BTreeSet<NodeId>,
}

/// Uses of this node's own tokens.
#[derive(Debug, Default)]
pub(super) struct Tokens(BTreeMap<[u8; 16], Uses>);

/// What became of a use.
#[derive(Debug)]
pub(super) enum Count {
    /// It counts; write this down first. `None`: it was counted before.
    Counted(Option<Batch>),
    /// Others had it.
    UsedUp,
}

impl Tokens {
    pub(super) fn restore(stored: &Stored) -> Self {
        let rows = stored
            .rows(Table::SpentTokens)
            .filter_map(|(key, value)| Some((key.try_into().ok()?, wire::decode(value).ok()?)));
        Self(rows.collect())
    }

    /// Counts one use of a token good for `uses` (at least one) that expires at `expiry`.
    pub(super) fn count(
        &mut self,
        token: [u8; 16],
        expiry: u64,
        uses: u32,
        joiner: NodeId,
    ) -> Count {
        let entry = self.0.entry(token).or_insert_with(|| Uses {
            expiry,
            by: BTreeSet::new(),
        });
        if entry.by.contains(&joiner) {
            return Count::Counted(None);
        }
        if entry.by.len() >= uses as usize {
            return Count::UsedUp;
        }
        entry.by.insert(joiner);
        let mut rows = vec![(Table::SpentTokens.key(&[&token]), Some(wire::encode(entry)))];
        rows.extend(
            self.forget_oldest(&token)
                .map(|old| (Table::SpentTokens.key(&[&old]), None)),
        );
        Count::Counted(Some(Batch(rows)))
    }

    fn forget_oldest(&mut self, but: &[u8; 16]) -> Option<[u8; 16]> {
        if self.0.len() <= MAX {
            return None;
        }
        let oldest = *self
            .0
            .iter()
            .filter(|(id, _)| *id != but)
            .min_by_key(|(_, uses)| uses.expiry)?
            .0;
        self.0.remove(&oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_use_admits_one_key_however_often_it_asks() {
        let mut tokens = Tokens::default();
        let (a, b) = (NodeId([1; 32]), NodeId([2; 32]));
        assert!(matches!(
            tokens.count([7; 16], 100, 1, a),
            Count::Counted(Some(_))
        ));
        assert!(matches!(
            tokens.count([7; 16], 100, 1, a),
            Count::Counted(None)
        ));
        assert!(matches!(tokens.count([7; 16], 100, 1, b), Count::UsedUp));
    }

    #[test]
    fn uses_survive_a_restart() {
        let mut tokens = Tokens::default();
        let Count::Counted(Some(batch)) = tokens.count([7; 16], 100, 1, NodeId([1; 32])) else {
            panic!("the first use counts")
        };
        let mut stored = Stored::default();
        stored.apply(&batch);
        let mut tokens = Tokens::restore(&stored);
        assert!(matches!(
            tokens.count([7; 16], 100, 1, NodeId([2; 32])),
            Count::UsedUp
        ));
    }

    #[test]
    fn memory_is_bounded() {
        let mut tokens = Tokens::default();
        for n in 0..(MAX as u64 + 100) {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&n.to_be_bytes());
            tokens.count(id, n, 1, NodeId([1; 32]));
        }
        assert!(tokens.0.len() <= MAX);
    }
}
