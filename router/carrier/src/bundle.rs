//! Several small packets in one frame: before each 16 bits, little-endian, of which the highest says that the packet's
//! transport checksum is not filled in, and the others its length.

use std::ops::Range;

/// Octets before each packet.
pub(crate) const ITEM_HEAD: usize = 2;

/// Set in the length of a packet whose transport checksum is not filled in. No path takes bundles of packets this long.
const PARTIAL: u16 = 1 << 15;
/// The longest packet that fits in a bundle.
pub(crate) const MAX_ITEM: usize = PARTIAL as usize - 1;

/// A packet's place in a bundle's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) range: Range<usize>,
    /// Is its transport checksum yet to be filled in?
    pub(crate) partial: bool,
}

/// Writes what stands before a packet of `len` octets, which begins [`ITEM_HEAD`] behind the beginning of `out`.
pub(crate) fn write_head(out: &mut [u8], len: usize, partial: bool) {
    let flag = if partial { PARTIAL } else { 0 };
    out[..ITEM_HEAD].copy_from_slice(&(len as u16 | flag).to_le_bytes());
}

/// Finds one packet of a bundle after the other. Ends with an error where the body ends within an item; the packets before
/// it stand.
#[derive(Debug, Default)]
pub(crate) struct Items {
    at: usize,
}

/// A bundle that ends in the middle of an item, or holds an empty one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Torn;

impl Items {
    /// Where the next one lies in `body`, which is the same each time as far as it was not looked at yet.
    pub(crate) fn next_in(&mut self, body: &[u8]) -> Option<Result<Item, Torn>> {
        if self.at >= body.len() {
            return None;
        }
        Some(self.take(body).ok_or_else(|| {
            self.at = body.len();
            Torn
        }))
    }

    fn take(&mut self, body: &[u8]) -> Option<Item> {
        let head = body.get(self.at..)?.first_chunk::<ITEM_HEAD>()?;
        let head = u16::from_le_bytes(*head);
        let start = self.at + ITEM_HEAD;
        let end = start + usize::from(head & !PARTIAL);
        if end == start || end > body.len() {
            return None;
        }
        self.at = end;
        Some(Item {
            range: start..end,
            partial: head & PARTIAL != 0,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All packets of a bundle.
    pub(crate) fn items(body: &[u8]) -> Vec<Result<Item, Torn>> {
        let mut items = Items::default();
        std::iter::from_fn(|| items.next_in(body)).collect()
    }

    #[test]
    fn a_torn_bundle_gives_what_came_before_the_tear() {
        let body = [1, 0, 7, 9, 0, 1, 2];
        let items = items(&body);
        let first = Item {
            range: 2..3,
            partial: false,
        };
        assert_eq!(items, [Ok(first), Err(Torn)]);
        assert_eq!(super::tests::items(&[0, 0, 1, 0, 5]), [Err(Torn)]);
        assert_eq!(super::tests::items(&[5]), [Err(Torn)]);
        assert_eq!(super::tests::items(&[]), []);
    }

    proptest! {
        #[test]
        fn what_is_bundled_comes_out(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..20)) {
            let mut body = Vec::new();
            for packet in &packets {
                let mut head = [0; ITEM_HEAD];
                write_head(&mut head, packet.len(), packet[0] & 1 == 0);
                body.extend_from_slice(&head);
                body.extend_from_slice(packet);
            }
            let items: Vec<_> = items(&body).into_iter().map(Result::unwrap).collect();
            let out: Vec<_> = items.iter().map(|item| body[item.range.clone()].to_vec()).collect();
            prop_assert!(items.iter().zip(&packets).all(|(item, packet)| item.partial == (packet[0] & 1 == 0)));
            prop_assert_eq!(out, packets);
        }

        #[test]
        fn no_octets_make_it_panic_or_overlap(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut last = 0;
            for Item { range, .. } in items(&body).into_iter().flatten() {
                prop_assert!(range.start >= last + ITEM_HEAD && range.end <= body.len());
                last = range.end;
            }
        }
    }
}
