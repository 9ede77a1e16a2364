//! Packets that are too long for a path and yet not too long for IPv6, which sends 1,280 octets without asking: they go in
//! two frames, and are put together at the far end (RFC 8200 §5 wants it of whatever is below IPv6).
//!
//! ```text
//! | number, 32 bits little-endian | which half, and more: 8 bits | its octets ... |
//! ```
//!
//! INVARIANT: what one half says is believed only together with the other one of the same session and number. Both were
//! sealed by the same host, so a forger gets nothing from it; a whole packet then is looked at like any other.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};

use weft_core::layout::IPV6_MIN_MTU;

/// Octets before each half.
pub(crate) const HALF_HEAD: usize = 5;
/// The longest packet that is cut.
pub(crate) const MAX_WHOLE: usize = IPV6_MIN_MTU as usize;
/// The longest half.
const MAX_HALF: usize = MAX_WHOLE.div_ceil(2);
/// Halves that wait for the other one at a time, of all peers; of more, the oldest is given up.
const MAX_WAITING: usize = 64;

/// Set in the second half.
const SECOND: u8 = 1;
/// Set in both halves of a packet whose transport checksum is not filled in.
const PARTIAL: u8 = 2;

/// Must a packet of this length be cut where the path takes `mtu` octets, and does it fit then?
pub(crate) fn is_cut(len: usize, mtu: usize) -> bool {
    len > mtu && len <= MAX_WHOLE && len.div_ceil(2) + HALF_HEAD <= mtu
}

/// Numbers for the packets that are cut on their way to one peer. They come again after 2^32, when the session is long
/// over.
#[derive(Debug, Default)]
pub(crate) struct Numbers(AtomicU32);

impl Numbers {
    pub(crate) fn next(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// A packet and how it is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut<'a> {
    pub(crate) packet: &'a [u8],
    pub(crate) number: u32,
    pub(crate) partial: bool,
}

impl Cut<'_> {
    /// Writes the first or the second half to the beginning of `out`, which has room for it. Gives its length.
    pub(crate) fn write(&self, second: bool, out: &mut [u8]) -> usize {
        let (first, rest) = self.packet.split_at(self.packet.len().div_ceil(2));
        let half = if second { rest } else { first };
        let flags = if second { SECOND } else { 0 } | if self.partial { PARTIAL } else { 0 };
        out[..4].copy_from_slice(&self.number.to_le_bytes());
        out[4] = flags;
        out[HALF_HEAD..HALF_HEAD + half.len()].copy_from_slice(half);
        HALF_HEAD + half.len()
    }
}

/// A half that is none: too short, too long, or marked as nothing that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Torn;

/// What a half belongs to: a session and a number in it.
type Whose = (u32, u32);

struct Waiting {
    whose: Whose,
    flags: u8,
    len: usize,
    octets: [u8; MAX_HALF],
}

/// Halves that wait for the other one, the oldest first.
#[derive(Default)]
pub(crate) struct Halves {
    waiting: VecDeque<Waiting>,
}

/// A packet of two halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) len: usize,
    /// Is its transport checksum yet to be filled in?
    pub(crate) partial: bool,
}

impl Halves {
    /// Takes a half that came in the session `session`. Where it was the second to come, the packet is written to the
    /// beginning of `out`, which has room for [`MAX_WHOLE`] octets.
    pub(crate) fn take(
        &mut self,
        session: u32,
        body: &[u8],
        out: &mut [u8],
    ) -> Result<Option<Whole>, Torn> {
        let (head, half) = body.split_first_chunk::<HALF_HEAD>().ok_or(Torn)?;
        let [number @ .., flags] = *head;
        if half.is_empty() || half.len() > MAX_HALF || flags & !(SECOND | PARTIAL) != 0 {
            return Err(Torn);
        }
        let whose = (session, u32::from_le_bytes(number));
        // Mostly it is the last that came.
        let Some(at) = self.waiting.iter().rposition(|w| w.whose == whose) else {
            self.keep(whose, flags, half);
            return Ok(None);
        };
        let other = &self.waiting[at];
        if other.flags ^ flags != SECOND {
            return Err(Torn);
        }
        let kept = &other.octets[..other.len];
        let (first, second) = match flags & SECOND {
            0 => (half, kept),
            _ => (kept, half),
        };
        let len = first.len() + second.len();
        out[..first.len()].copy_from_slice(first);
        out[first.len()..len].copy_from_slice(second);
        self.waiting.remove(at);
        let partial = flags & PARTIAL != 0;
        Ok(Some(Whole { len, partial }))
    }

    fn keep(&mut self, whose: Whose, flags: u8, half: &[u8]) {
        let mut octets = [0; MAX_HALF];
        octets[..half.len()].copy_from_slice(half);
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Waiting {
            whose,
            flags,
            len: half.len(),
            octets,
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bodies of the two frames that a packet goes in.
    pub(crate) fn halves(packet: &[u8], number: u32, partial: bool) -> [Vec<u8>; 2] {
        let cut = Cut {
            packet,
            number,
            partial,
        };
        [false, true].map(|second| {
            let mut out = [0; HALF_HEAD + MAX_HALF];
            let len = cut.write(second, &mut out);
            out[..len].to_vec()
        })
    }

    fn take(
        halves: &mut Halves,
        session: u32,
        body: &[u8],
    ) -> Result<Option<(Vec<u8>, bool)>, Torn> {
        let mut out = [0; MAX_WHOLE];
        let whole = halves.take(session, body, &mut out)?;
        Ok(whole.map(|whole| (out[..whole.len].to_vec(), whole.partial)))
    }

    #[test]
    fn only_what_ipv6_may_send_is_cut_and_only_where_it_must_be() {
        assert!(!is_cut(1280, 1280));
        assert!(is_cut(1280, 1279));
        assert!(is_cut(1200, 1199));
        assert!(!is_cut(1281, 1199));
        assert!(!is_cut(1280, 644));
        assert!(is_cut(1280, 645));
    }

    #[test]
    fn halves_of_other_sessions_numbers_or_kinds_are_not_put_together() {
        let mut kept = Halves::default();
        let [first, second] = halves(&[1; 1280], 7, false);
        let [_, partial] = halves(&[1; 1280], 7, true);
        let [_, other] = halves(&[2; 1280], 8, false);
        assert_eq!(take(&mut kept, 5, &first), Ok(None));
        assert_eq!(take(&mut kept, 6, &second), Ok(None));
        assert_eq!(take(&mut kept, 5, &other), Ok(None));
        assert_eq!(take(&mut kept, 5, &partial), Err(Torn));
        assert_eq!(take(&mut kept, 5, &first), Err(Torn));
        let whole = Ok(Some((vec![1; 1280], false)));
        assert_eq!(take(&mut kept, 5, &second), whole);
        assert_eq!(take(&mut kept, 6, &first), whole);
        assert_eq!(take(&mut kept, 5, &second), Ok(None), "once");
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut kept = Halves::default();
        let all: Vec<_> = (0..=MAX_WAITING as u32)
            .map(|n| halves(&[3; 1280], n, true))
            .collect();
        for [first, _] in &all {
            assert_eq!(take(&mut kept, 1, first), Ok(None));
        }
        assert_eq!(kept.waiting.len(), MAX_WAITING);
        for [_, second] in &all[1..] {
            assert_eq!(take(&mut kept, 1, second), Ok(Some((vec![3; 1280], true))));
        }
        assert_eq!(take(&mut kept, 1, &all[0][1]), Ok(None), "given up");
    }

    proptest! {
        #[test]
        fn what_is_cut_comes_out(packet in proptest::collection::vec(any::<u8>(), 2..=MAX_WHOLE), number: u32, partial: bool, turned: bool) {
            let mut kept = Halves::default();
            let mut parts = halves(&packet, number, partial);
            if turned {
                parts.reverse();
            }
            prop_assert_eq!(take(&mut kept, 1, &parts[0]), Ok(None));
            prop_assert_eq!(take(&mut kept, 1, &parts[1]), Ok(Some((packet, partial))));
        }

        #[test]
        fn no_octets_make_it_panic(bodies in proptest::collection::vec((0u32..2, 0u8..2, 0u8..5, 0usize..700), 0..200)) {
            let mut kept = Halves::default();
            for (session, number, flags, len) in bodies {
                let mut body = vec![number, 0, 0, 0, flags];
                body.resize(len, 0);
                if let Ok(Some((whole, _))) = take(&mut kept, session, &body) {
                    prop_assert!(whole.len() <= MAX_WHOLE);
                }
                prop_assert!(kept.waiting.len() <= MAX_WAITING);
            }
        }
    }
}
