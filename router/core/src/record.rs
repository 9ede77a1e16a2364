//! One record's envelope: laid out by hand, signed by its writer, checked over the octets that came and never encoded
//! again.
//!
//! The signature (Ed25519, strict) is over `"weft record 1"`, the cluster id and all octets before the signature; the
//! first two are not sent. Numbers are big endian.
//!
//! | at | octets | what |
//! |---|---|---|
//! | 0 | 32 | writer |
//! | 32 | 8 | generation |
//! | 40 | 8 | sequence, from 1 |
//! | 48 | 8 | hybrid clock |
//! | 56 | 2 | network number |
//! | 58 | 1 | kind |
//! | 59 | 1 | flags: 1 = tombstone, others zero |
//! | 60 | 1 | length of the key, at most 80 |
//! | 61 | 2 | length of the value |
//! | 63 | | key, value |
//! | end | 64 | signature |

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::crypto::{self, sha256};
use crate::hlc::Stamp;
use crate::identity::Identity;
use crate::model::{ClusterId, Generation, NodeId};
use crate::value::{Kind, Lineage, Object};

/// Longest record, octets: with the delta's header it fits one control frame.
pub const MAX_RECORD: usize = 1000;
/// Longest key, octets.
pub const MAX_KEY: usize = 80;

const TAG: &[u8] = b"weft record 1";
const HEADER: usize = 63;
const SIGNATURE: usize = 64;
const TOMBSTONE: u8 = 1;
/// Kinds from here on can't be records: the store keeps its own notes there.
pub(crate) const RESERVED_KINDS: u8 = 0xf0;

/// Why octets are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Shorter than its own lengths say, or longer, or beyond [`MAX_RECORD`].
    #[error("a record's length is wrong")]
    Length,
    /// A flag, a kind or a sequence that can't be.
    #[error("a record's header is malformed")]
    Header,
}

/// What is to be signed.
#[derive(Clone, Debug)]
pub struct Draft<'a> {
    /// The writer's present start.
    pub generation: Generation,
    /// Its next sequence.
    pub sequence: u64,
    /// When.
    pub stamp: Stamp,
    /// Network number.
    pub network: u16,
    /// Kind.
    pub kind: Kind,
    /// Key.
    pub key: &'a [u8],
    /// The value; `None` says that the object is gone.
    pub value: Option<&'a [u8]>,
}

/// A record: its octets, with the header's fields at hand. Cloning is cheap.
#[derive(Clone)]
pub struct Record(Arc<Inner>);

struct Inner {
    bytes: Box<[u8]>,
    hash: [u8; 32],
    /// What the value says, read when it is first asked for.
    said: OnceLock<Option<(Object, Lineage)>>,
}

impl PartialEq for Record {
    fn eq(&self, other: &Self) -> bool {
        self.0.bytes == other.0.bytes
    }
}

impl Eq for Record {}

impl Record {
    /// Reads a record's header. The signature is not checked yet: see [`Self::verify`].
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() < HEADER + SIGNATURE || bytes.len() > MAX_RECORD {
            return Err(RecordError::Length);
        }
        let record = Self(Arc::new(Inner {
            bytes: bytes.into(),
            hash: sha256(bytes),
            said: OnceLock::new(),
        }));
        let value_len = usize::from(u16::from_be_bytes([bytes[61], bytes[62]]));
        if HEADER + record.key_len() + value_len + SIGNATURE != bytes.len() {
            return Err(RecordError::Length);
        }
        let tombstone_with_value = record.is_tombstone() && value_len > 0;
        let malformed = record.key_len() > MAX_KEY
            || bytes[59] & !TOMBSTONE != 0
            || tombstone_with_value
            || record.sequence() == 0
            || record.kind().0 >= RESERVED_KINDS;
        if malformed {
            Err(RecordError::Header)
        } else {
            Ok(record)
        }
    }

    /// Lays out and signs a record.
    pub fn sign(
        cluster: &ClusterId,
        identity: &Identity,
        draft: &Draft<'_>,
    ) -> Result<Self, RecordError> {
        let value = draft.value.unwrap_or_default();
        let length = HEADER + draft.key.len() + value.len() + SIGNATURE;
        if length > MAX_RECORD || draft.key.len() > MAX_KEY {
            return Err(RecordError::Length);
        }
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&identity.id().0);
        bytes.extend_from_slice(&draft.generation.0.to_be_bytes());
        bytes.extend_from_slice(&draft.sequence.to_be_bytes());
        bytes.extend_from_slice(&draft.stamp.0.to_be_bytes());
        bytes.extend_from_slice(&draft.network.to_be_bytes());
        bytes.push(draft.kind.0);
        bytes.push(if draft.value.is_none() { TOMBSTONE } else { 0 });
        bytes.push(draft.key.len() as u8);
        bytes.extend_from_slice(&(value.len() as u16).to_be_bytes());
        bytes.extend_from_slice(draft.key);
        bytes.extend_from_slice(value);
        let signature = identity.sign(&signed_part(cluster, &bytes));
        bytes.extend_from_slice(&signature);
        Self::parse(&bytes)
    }

    /// Did its writer sign it, for this cluster?
    pub fn verify(&self, cluster: &ClusterId) -> bool {
        let (body, signature) = self.0.bytes.split_at(self.0.bytes.len() - SIGNATURE);
        crypto::verify(&self.writer(), &signed_part(cluster, body), signature)
    }

    /// The octets, for the wire and the disk.
    pub fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }

    /// SHA-256 over the octets.
    pub fn hash(&self) -> &[u8; 32] {
        &self.0.hash
    }

    /// The hash's first octets, for roll-ups.
    pub fn short_hash(&self) -> u64 {
        be_u64(&self.0.hash[..8])
    }

    /// Who wrote it.
    pub fn writer(&self) -> NodeId {
        let mut id = [0; 32];
        id.copy_from_slice(&self.0.bytes[..32]);
        NodeId(id)
    }

    /// In which start of the writer.
    pub fn generation(&self) -> Generation {
        Generation(be_u64(&self.0.bytes[32..40]))
    }

    /// Its place in the writer's log.
    pub fn sequence(&self) -> u64 {
        be_u64(&self.0.bytes[40..48])
    }

    /// When, on the hybrid clock.
    pub fn stamp(&self) -> Stamp {
        Stamp(be_u64(&self.0.bytes[48..56]))
    }

    /// The network it concerns.
    pub fn network(&self) -> u16 {
        u16::from_be_bytes([self.0.bytes[56], self.0.bytes[57]])
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        Kind(self.0.bytes[58])
    }

    /// Does it say that the object is gone?
    pub fn is_tombstone(&self) -> bool {
        self.0.bytes[59] & TOMBSTONE != 0
    }

    /// Its key.
    pub fn key(&self) -> &[u8] {
        &self.0.bytes[HEADER..HEADER + self.key_len()]
    }

    /// Its value, empty for a tombstone.
    pub fn value(&self) -> &[u8] {
        &self.0.bytes[HEADER + self.key_len()..self.0.bytes.len() - SIGNATURE]
    }

    /// What it says, and what its writer knew; `None` when the object is gone, and for what this version can't read.
    pub(crate) fn object(&self) -> Option<&(Object, Lineage)> {
        let read = || {
            let live = !self.is_tombstone();
            live.then(|| Object::decode(self.kind(), &self.writer(), self.key(), self.value()))?
        };
        self.0.said.get_or_init(read).as_ref()
    }

    /// Its place among the writer's records: a later start, then a higher sequence, wins.
    pub(crate) fn place(&self) -> (Generation, u64) {
        (self.generation(), self.sequence())
    }

    fn key_len(&self) -> usize {
        usize::from(self.0.bytes[60])
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Record({} {}/{} kind {} {})",
            self.writer(),
            self.generation().0,
            self.sequence(),
            self.kind().0,
            if self.is_tombstone() { "gone" } else { "live" }
        )
    }
}

fn signed_part(cluster: &ClusterId, body: &[u8]) -> Vec<u8> {
    [TAG, cluster.0.as_slice(), body].concat()
}

pub(crate) fn be_u64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, b| (sum << 8) | u64::from(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Random;
    use proptest::prelude::*;

    const CLUSTER: ClusterId = ClusterId([9; 16]);

    fn identity() -> Identity {
        Identity::generate(&mut Random::from_seed([3; 32]))
    }

    fn sample(value: Option<&[u8]>) -> Record {
        let draft = Draft {
            generation: Generation(7),
            sequence: 12,
            stamp: Stamp(99),
            network: 3,
            kind: Kind::SERVICE,
            key: b"web",
            value,
        };
        Record::sign(&CLUSTER, &identity(), &draft).unwrap()
    }

    #[test]
    fn a_record_reads_back_as_it_was_signed() {
        let record = Record::parse(sample(Some(b"hello")).bytes()).unwrap();
        assert_eq!(record.writer(), identity().id());
        assert_eq!(record.place(), (Generation(7), 12));
        assert_eq!((record.stamp(), record.network()), (Stamp(99), 3));
        assert_eq!(
            (record.kind(), record.key(), record.value()),
            (Kind::SERVICE, b"web".as_slice(), b"hello".as_slice())
        );
        assert!(record.verify(&CLUSTER) && !record.verify(&ClusterId([8; 16])));
        assert!(sample(None).is_tombstone());
    }

    #[test]
    fn ten_thousand_mutants_are_refused() {
        let record = sample(Some(b"hello"));
        let mut random = Random::from_seed([1; 32]);
        for _ in 0..10_000 {
            let mut bytes = record.bytes().to_vec();
            let at = random.range(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.range(8);
            let accepted = Record::parse(&bytes).is_ok_and(|r| r.verify(&CLUSTER));
            assert!(!accepted, "octet {at}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_when_written() {
        let draft = |key: &'static [u8], value: &'static [u8]| Draft {
            generation: Generation(1),
            sequence: 1,
            stamp: Stamp(0),
            network: 0,
            kind: Kind::NAME,
            key,
            value: Some(value),
        };
        for draft in [draft(&[0; 81], b""), draft(b"", &[0; 900])] {
            assert_eq!(
                Record::sign(&CLUSTER, &identity(), &draft),
                Err(RecordError::Length)
            );
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..1100)) {
            if let Ok(record) = Record::parse(&bytes) {
                let _ = (record.key(), record.value(), record.place());
            }
        }

        #[test]
        fn parsing_bent_records_never_panics(at in 56usize..64, to in any::<u8>(), cut in 0usize..200) {
            let mut bytes = sample(Some(b"hello")).bytes().to_vec();
            bytes[at] = to;
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            if let Ok(record) = Record::parse(&bytes) {
                let _ = (record.key(), record.value());
            }
        }
    }
}
