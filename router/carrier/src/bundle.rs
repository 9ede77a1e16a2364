//! Several small packets in one frame: a length of 16 bits, little-endian, before each.

use std::ops::Range;

/// Octets before each packet.
pub(crate) const ITEM_HEAD: usize = 2;

/// Writes `len` before a packet that begins [`ITEM_HEAD`] behind the beginning of `out`.
pub(crate) fn write_head(out: &mut [u8], len: usize) {
    out[..ITEM_HEAD].copy_from_slice(&(len as u16).to_le_bytes());
}

/// Where the packets of a bundle lie in its body. Ends with an error where the body ends within an item; the packets
/// before it stand.
pub(crate) struct Items<'a> {
    body: &'a [u8],
    at: usize,
}

/// A bundle that ends in the middle of an item, or holds an empty one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Torn;

impl<'a> Items<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Self { body, at: 0 }
    }

    fn take(&mut self) -> Option<Range<usize>> {
        let head = self.body.get(self.at..)?.first_chunk::<ITEM_HEAD>()?;
        let start = self.at + ITEM_HEAD;
        let end = start + usize::from(u16::from_le_bytes(*head));
        if end == start || end > self.body.len() {
            return None;
        }
        self.at = end;
        Some(start..end)
    }
}

impl Iterator for Items<'_> {
    type Item = Result<Range<usize>, Torn>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.body.len() {
            return None;
        }
        Some(self.take().ok_or_else(|| {
            self.at = self.body.len();
            Torn
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_torn_bundle_gives_what_came_before_the_tear() {
        let body = [1, 0, 7, 9, 0, 1, 2];
        let items: Vec<_> = Items::new(&body).collect();
        assert_eq!(items, [Ok(2..3), Err(Torn)]);
        assert_eq!(
            Items::new(&[0, 0, 1, 0, 5]).collect::<Vec<_>>(),
            [Err(Torn)]
        );
        assert_eq!(Items::new(&[5]).collect::<Vec<_>>(), [Err(Torn)]);
        assert_eq!(Items::new(&[]).count(), 0);
    }

    proptest! {
        #[test]
        fn what_is_bundled_comes_out(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..20)) {
            let mut body = Vec::new();
            for packet in &packets {
                let mut head = [0; ITEM_HEAD];
                write_head(&mut head, packet.len());
                body.extend_from_slice(&head);
                body.extend_from_slice(packet);
            }
            let out: Vec<_> = Items::new(&body).map(|r| body[r.unwrap()].to_vec()).collect();
            prop_assert_eq!(out, packets);
        }

        #[test]
        fn no_octets_make_it_panic_or_overlap(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut last = 0;
            for range in Items::new(&body).flatten() {
                prop_assert!(range.start >= last + ITEM_HEAD && range.end <= body.len());
                last = range.end;
            }
        }
    }
}
