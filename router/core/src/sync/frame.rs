//! The bodies of `Message::Sync`: laid out by hand, numbers big endian, at most [`crate::wire::MAX_CONTROL`] octets
//! with the message around them.
//!
//! | first octet | then |
//! |---|---|
//! | 1 digest | roster roll-up 8, catalog roll-up 8, sender's wall clock 8, 1 if an answer is wanted even when equal |
//! | 2 heads | first and last issuer covered 32 + 32, then each (issuer 32, length 4, hash 8) |
//! | 3 states | first and last writer covered 32 + 32, then each (writer 32, complete 8, sum 8) |
//! | 4 wants | each (what 1, id 32, from 8) |
//! | 5 roster | each (length 2, record) |
//! | 6 delta | writer 32, from 8, complete up to 8, then each (length 2, record) |
//! | 7 records | each (length 2, record) |
//! | 8 news | each (writer 32, complete 8): logs that grew a moment ago |
//! | 9 roll-ups | 2, 4 … or 128 of them, 8 each: of the writers whose ids begin with 0, 1 … in the first 1, 2 … or 7 bits |
//!
//! Heads and states say of every id in the span that they cover how far it is known: one that is not listed is not
//! known at all. So the parts of a long list can be lost one by one.

use std::ops::RangeInclusive;

use crate::catalog::WriterState;
use crate::model::NodeId;
use crate::roster::Head;

/// Largest body.
pub const MAX_BODY: usize = 1100;
/// Logs in one frame of news.
pub(super) const MAX_NEWS: usize = (MAX_BODY - 1) / 40;
/// Roll-ups in a frame.
pub(super) const MAX_ROLL_UPS: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Digest {
        roster: u64,
        catalog: u64,
        wall: u64,
        answer: bool,
    },
    Heads(Span<Head>),
    States(Span<WriterState>),
    Wants(Vec<Want>),
    Roster(Vec<Vec<u8>>),
    Delta {
        writer: NodeId,
        from: u64,
        upto: u64,
        records: Vec<Vec<u8>>,
    },
    Records(Vec<Vec<u8>>),
    News(Vec<(NodeId, u64)>),
    RollUps(Vec<u64>),
}

/// Part of a list ordered by id: all entries from `first` to `last`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span<T> {
    pub(super) first: NodeId,
    pub(super) last: NodeId,
    pub(super) entries: Vec<(NodeId, T)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Want {
    pub(super) what: What,
    pub(super) id: NodeId,
    pub(super) from: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// A writer's log from a sequence on.
    Log,
    /// All that counts of a writer.
    Whole,
    /// An issuer's chain from an index on.
    Chain,
}

impl Frame {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAX_BODY);
        match self {
            Frame::Digest {
                roster,
                catalog,
                wall,
                answer,
            } => {
                out.push(1);
                for number in [roster, catalog, wall] {
                    out.extend_from_slice(&number.to_be_bytes());
                }
                out.push(u8::from(*answer));
            }
            Frame::Heads(span) => write_span(2, span, &mut out, |head, out| {
                out.extend_from_slice(&head.length.to_be_bytes());
                out.extend_from_slice(&head.hash.to_be_bytes());
            }),
            Frame::States(span) => write_span(3, span, &mut out, |state, out| {
                out.extend_from_slice(&state.complete.to_be_bytes());
                out.extend_from_slice(&state.sum.to_be_bytes());
            }),
            Frame::Wants(wants) => {
                out.push(4);
                for want in wants {
                    out.push(want.what as u8);
                    out.extend_from_slice(&want.id.0);
                    out.extend_from_slice(&want.from.to_be_bytes());
                }
            }
            Frame::Roster(records) => {
                out.push(5);
                write_records(records, &mut out);
            }
            Frame::Delta {
                writer,
                from,
                upto,
                records,
            } => {
                out.push(6);
                out.extend_from_slice(&writer.0);
                out.extend_from_slice(&from.to_be_bytes());
                out.extend_from_slice(&upto.to_be_bytes());
                write_records(records, &mut out);
            }
            Frame::Records(records) => {
                out.push(7);
                write_records(records, &mut out);
            }
            Frame::News(news) => {
                out.push(8);
                for (writer, complete) in news {
                    out.extend_from_slice(&writer.0);
                    out.extend_from_slice(&complete.to_be_bytes());
                }
            }
            Frame::RollUps(roll_ups) => {
                out.push(9);
                for number in roll_ups {
                    out.extend_from_slice(&number.to_be_bytes());
                }
            }
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let frame = match reader.octet()? {
            1 => Frame::Digest {
                roster: reader.u64()?,
                catalog: reader.u64()?,
                wall: reader.u64()?,
                answer: reader.octet()? != 0,
            },
            2 => Frame::Heads(reader.span(|r| {
                Some(Head {
                    length: u32::from_be_bytes(r.take()?),
                    hash: r.u64()?,
                })
            })?),
            3 => Frame::States(reader.span(|r| {
                Some(WriterState {
                    complete: r.u64()?,
                    sum: r.u64()?,
                })
            })?),
            4 => Frame::Wants(reader.all(|r| {
                let what = match r.octet()? {
                    0 => What::Log,
                    1 => What::Whole,
                    2 => What::Chain,
                    _ => return None,
                };
                Some(Want {
                    what,
                    id: r.id()?,
                    from: r.u64()?,
                })
            })?),
            5 => Frame::Roster(reader.all(Reader::record)?),
            6 => Frame::Delta {
                writer: reader.id()?,
                from: reader.u64()?,
                upto: reader.u64()?,
                records: reader.all(Reader::record)?,
            },
            7 => Frame::Records(reader.all(Reader::record)?),
            8 => Frame::News(reader.all(|r| Some((r.id()?, r.u64()?)))?),
            9 => {
                let roll_ups = reader.all(Reader::u64)?;
                let count = roll_ups.len();
                if !(2..=MAX_ROLL_UPS).contains(&count) || !count.is_power_of_two() {
                    return None;
                }
                Frame::RollUps(roll_ups)
            }
            _ => return None,
        };
        reader.0.is_empty().then_some(frame)
    }
}

/// Decodes a body and encodes what it said.
pub(crate) fn reencode(bytes: &[u8]) -> Option<Vec<u8>> {
    Frame::decode(bytes).map(|frame| frame.encode())
}

/// Cuts an ordered list into frames that cover all ids without a gap.
pub(super) fn spans<T: Copy>(entries: &[(NodeId, T)], entry_octets: usize) -> Vec<Span<T>> {
    spans_of(NodeId([0; 32])..=NodeId([0xff; 32]), entries, entry_octets)
}

/// Cuts an ordered list of ids within `ids` into frames that cover all of those without a gap.
pub(super) fn spans_of<T: Copy>(
    ids: RangeInclusive<NodeId>,
    entries: &[(NodeId, T)],
    entry_octets: usize,
) -> Vec<Span<T>> {
    let per_frame = (MAX_BODY - 65) / (32 + entry_octets);
    let (mut first, end) = ids.into_inner();
    let mut spans = Vec::new();
    let mut chunks = entries.chunks(per_frame).peekable();
    while let Some(chunk) = chunks.next() {
        let greatest = chunk.last().map_or(first, |(id, _)| *id);
        let last = if chunks.peek().is_some() {
            greatest
        } else {
            end
        };
        spans.push(Span {
            first,
            last,
            entries: chunk.to_vec(),
        });
        first = successor(greatest);
    }
    if spans.is_empty() {
        spans.push(Span {
            first,
            last: end,
            entries: Vec::new(),
        });
    }
    spans
}

fn successor(id: NodeId) -> NodeId {
    let mut next = id;
    for octet in next.0.iter_mut().rev() {
        let (sum, carried) = octet.overflowing_add(1);
        *octet = sum;
        if !carried {
            break;
        }
    }
    next
}

/// Packs as many records as fit behind a header of `header` octets; at least one.
pub(super) fn pack<'a>(records: impl IntoIterator<Item = &'a [u8]>, header: usize) -> Vec<Vec<u8>> {
    let mut room = MAX_BODY - header;
    let mut packed = Vec::new();
    for record in records {
        let needed = record.len() + 2;
        if needed > room {
            break;
        }
        room -= needed;
        packed.push(record.to_vec());
    }
    packed
}

fn write_records(records: &[Vec<u8>], out: &mut Vec<u8>) {
    for record in records {
        out.extend_from_slice(&(record.len() as u16).to_be_bytes());
        out.extend_from_slice(record);
    }
}

fn write_span<T>(kind: u8, span: &Span<T>, out: &mut Vec<u8>, write: impl Fn(&T, &mut Vec<u8>)) {
    out.push(kind);
    out.extend_from_slice(&span.first.0);
    out.extend_from_slice(&span.last.0);
    for (id, value) in &span.entries {
        out.extend_from_slice(&id.0);
        write(value, out);
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn octet(&mut self) -> Option<u8> {
        self.take().map(|[octet]| octet)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn id(&mut self) -> Option<NodeId> {
        self.take().map(NodeId)
    }

    fn record(&mut self) -> Option<Vec<u8>> {
        let length = usize::from(u16::from_be_bytes(self.take()?));
        let (record, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(record.to_vec())
    }

    fn all<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut items = Vec::new();
        while !self.0.is_empty() {
            items.push(read(self)?);
        }
        Some(items)
    }

    fn span<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Span<T>> {
        let (first, last) = (self.id()?, self.id()?);
        let entries = self.all(|r| Some((r.id()?, read(r)?)))?;
        Some(Span {
            first,
            last,
            entries,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_survive_the_wire() {
        let id = NodeId([7; 32]);
        let frames = [
            Frame::Digest {
                roster: 1,
                catalog: 2,
                wall: 3,
                answer: true,
            },
            Frame::Heads(Span {
                first: id,
                last: id,
                entries: vec![(id, Head { length: 4, hash: 5 })],
            }),
            Frame::States(Span {
                first: id,
                last: id,
                entries: vec![(
                    id,
                    WriterState {
                        complete: 6,
                        sum: 7,
                    },
                )],
            }),
            Frame::Wants(vec![Want {
                what: What::Chain,
                id,
                from: 9,
            }]),
            Frame::Roster(vec![vec![1, 2], vec![]]),
            Frame::Delta {
                writer: id,
                from: 1,
                upto: 2,
                records: vec![vec![3; 900]],
            },
            Frame::Records(vec![vec![3; 900]]),
            Frame::News(vec![(id, 1), (NodeId([8; 32]), u64::MAX)]),
            Frame::RollUps(vec![1, 2, 3, u64::MAX]),
        ];
        for frame in frames {
            assert_eq!(Frame::decode(&frame.encode()), Some(frame));
        }
    }

    #[test]
    fn the_parts_of_a_long_list_cover_every_id_and_fit() {
        let entries: Vec<(NodeId, WriterState)> = (0..=255)
            .map(|n| (NodeId([n; 32]), WriterState::default()))
            .collect();
        let spans = spans(&entries, 16);
        assert!(spans.len() > 5);
        assert_eq!(spans[0].first, NodeId([0; 32]));
        assert_eq!(spans[spans.len() - 1].last, NodeId([0xff; 32]));
        for pair in spans.windows(2) {
            assert_eq!(successor(pair[0].last), pair[1].first);
        }
        assert!(
            spans
                .iter()
                .all(|s| Frame::States(s.clone()).encode().len() <= MAX_BODY)
        );
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _ = Frame::decode(&bytes);
        }

        #[test]
        fn decoding_bent_frames_never_panics(kind in 0u8..11, bytes in proptest::collection::vec(0u8..4, 0..300)) {
            let _ = Frame::decode(&[&[kind], bytes.as_slice()].concat());
        }
    }
}
