//! What is kept on disk, as batches: sorted keys with values, written in one transaction. The file itself is the
//! daemon's.
//!
//! | table | key after the table's octet | value | owner |
//! |---|---|---|---|
//! | 1 | kind, key | own record | catalog |
//! | 2 | writer, kind, key | another's record | catalog |
//! | 3 | issuer, index (big endian) | roster record | roster |
//! | 4 | name | the cluster's and this node's own facts | node |
//! | 5 | peer | this host's number for it | node |
//! | 6 | token id | who used it | node |
//! | 7 | endpoint id | local attachment | daemon |
//! | 8 | address | freed and resting | ipam |

use std::collections::BTreeMap;

/// The tables; the first octet of every key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Table {
    /// Records that this node wrote.
    OwnRecords = 1,
    /// Records of others.
    Records = 2,
    /// The roster.
    Roster = 3,
    /// Cluster id, secret, range, generation and the like.
    Cluster = 4,
    /// Numbers given to peers.
    PeerNumbers = 5,
    /// Tokens that were used.
    SpentTokens = 6,
    /// The daemon's local attachments.
    Attachments = 7,
    /// Addresses that rest.
    Resting = 8,
}

impl Table {
    /// A key in this table.
    pub fn key(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = vec![self as u8];
        for part in parts {
            key.extend_from_slice(part);
        }
        key
    }
}

/// A key of the store, the table's octet first.
pub type Key = Vec<u8>;

/// What is to be written in one transaction: later entries win over earlier ones; `None` deletes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch(pub Vec<(Key, Option<Vec<u8>>)>);

impl Batch {
    /// Nothing to write.
    pub fn new() -> Self {
        Self::default()
    }

    /// Is there nothing to write?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes `value` under `key`.
    pub fn put(&mut self, key: Key, value: impl Into<Vec<u8>>) {
        self.0.push((key, Some(value.into())));
    }

    /// Deletes `key`.
    pub fn delete(&mut self, key: Key) {
        self.0.push((key, None));
    }

    /// Adds what `other` writes, after what is there.
    pub fn append(&mut self, other: Batch) {
        self.0.extend(other.0);
    }
}

/// What was on disk at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored(pub BTreeMap<Vec<u8>, Vec<u8>>);

impl Stored {
    /// Does as the disk does with a batch.
    pub fn apply(&mut self, batch: &Batch) {
        for (key, value) in &batch.0 {
            match value {
                Some(value) => self.0.insert(key.clone(), value.clone()),
                None => self.0.remove(key),
            };
        }
    }

    /// The value under a key of `table`.
    pub fn get(&self, table: Table, parts: &[&[u8]]) -> Option<&[u8]> {
        self.0.get(&table.key(parts)).map(Vec::as_slice)
    }

    /// A table's rows in the order of their keys, which come without the table's octet.
    pub fn rows(&self, table: Table) -> impl Iterator<Item = (&[u8], &[u8])> {
        let from = table as u8;
        self.0
            .range(vec![from]..vec![from + 1])
            .map(|(key, value)| (&key[1..], value.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_applied_is_read_back_table_by_table() {
        let mut stored = Stored::default();
        let mut batch = Batch::new();
        batch.put(Table::Cluster.key(&[b"id"]), *b"1");
        batch.put(Table::Cluster.key(&[b"name"]), *b"2");
        batch.put(Table::PeerNumbers.key(&[b"id"]), *b"3");
        batch.delete(Table::Cluster.key(&[b"name"]));
        stored.apply(&batch);
        let rows: Vec<_> = stored.rows(Table::Cluster).collect();
        assert_eq!(rows, [(b"id".as_slice(), b"1".as_slice())]);
        assert_eq!(
            stored.get(Table::PeerNumbers, &[b"id"]),
            Some(b"3".as_slice())
        );
        assert_eq!(stored.get(Table::Cluster, &[b"name"]), None);
    }
}
