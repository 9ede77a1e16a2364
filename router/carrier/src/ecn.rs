//! What the outer header says for the inner one: congestion marks go through the tunnel in both directions (RFC 6040,
//! normal mode), the class of service only where a person wants the underlay to see it (RFC 2983 §3).

use weft_core::underlay::Dscp;

use crate::checksum::Sum;
use crate::counters::Dropped;
use crate::inner::Inner;

/// The congestion field within the octet once called TOS (RFC 3168 §5).
pub(crate) const MASK: u8 = 0b11;
/// The sender does not know what to do with a mark.
pub(crate) const NOT_ECT: u8 = 0b00;
/// It does (RFC 9331 gives this one a meaning of its own).
pub(crate) const ECT_1: u8 = 0b01;
/// A router on the way was congested.
pub(crate) const CE: u8 = 0b11;

/// The outer octet for an inner one. The congestion field is always copied (RFC 6040 §4.1).
pub(crate) fn outer(dscp: Dscp, inner: u8) -> u8 {
    match dscp {
        Dscp::Clear => inner & MASK,
        Dscp::Copy => inner,
    }
}

/// What a packet's field becomes when it leaves the tunnel: RFC 6040, figure 4. `None` where it must be dropped, because a
/// mark can't be told to a sender that would not understand it.
fn combined(inner: u8, outer: u8) -> Option<u8> {
    match (inner, outer) {
        (NOT_ECT, CE) => None,
        (NOT_ECT, _) => Some(NOT_ECT),
        (CE, _) | (_, CE) => Some(CE),
        (_, ECT_1) => Some(ECT_1),
        (inner, _) => Some(inner),
    }
}

/// Takes the outer header's mark (`outer`, 2 bits) over into `packet`, which `inner` was read from.
pub(crate) fn decapsulate(outer: u8, packet: &mut [u8], inner: &Inner) -> Result<(), Dropped> {
    let before = inner.tos & MASK;
    let after = combined(before, outer).ok_or(Dropped::CeOnNotEct)?;
    if after != before {
        set(packet, after);
    }
    Ok(())
}

/// Marks `packet`, which `inner` was read from, and gives its octet then; `None` if its sender would not understand it.
pub(crate) fn mark(packet: &mut [u8], inner: &Inner) -> Option<u8> {
    (inner.tos & MASK != NOT_ECT).then(|| {
        set(packet, CE);
        inner.tos | CE
    })
}

fn set(packet: &mut [u8], ecn: u8) {
    if packet[0] >> 4 == 6 {
        packet[1] = packet[1] & !(MASK << 4) | ecn << 4;
        return;
    }
    let old = [packet[0], packet[1]];
    packet[1] = packet[1] & !MASK | ecn;
    // RFC 1624, equation 3: a header that was damaged stays so.
    let complement = |octets: [u8; 2]| octets.map(|octet| !octet);
    let sum = Sum::default()
        .add(&complement([packet[10], packet[11]]))
        .add(&complement(old))
        .add(&[packet[0], packet[1]])
        .finish();
    packet[10..12].copy_from_slice(&sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inner::{self, tests::ip};
    use crate::segment::fill_v4_checksum;
    use proptest::prelude::*;

    const ECT_0: u8 = 0b10;

    #[test]
    fn fields_combine_as_rfc_6040_figure_4_has_it() {
        let columns = [NOT_ECT, ECT_0, ECT_1, CE];
        let rows = [
            (NOT_ECT, [Some(NOT_ECT), Some(NOT_ECT), Some(NOT_ECT), None]),
            (ECT_0, [Some(ECT_0), Some(ECT_0), Some(ECT_1), Some(CE)]),
            (ECT_1, [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)]),
            (CE, [Some(CE); 4]),
        ];
        for (inner, expected) in rows {
            assert_eq!(columns.map(|outer| combined(inner, outer)), expected);
        }
    }

    #[test]
    fn the_class_is_seen_outside_only_when_it_is_copied() {
        assert_eq!(outer(Dscp::Clear, 0xba), ECT_0);
        assert_eq!(outer(Dscp::Copy, 0xba), 0xba);
    }

    fn packet(is_v6: bool, tos: u8, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = match is_v6 {
            true => ("fd00::1", "fd00::2"),
            false => ("10.32.0.1", "10.33.0.1"),
        };
        let mut packet = ip(src.parse().unwrap(), dst.parse().unwrap(), 17, payload);
        if is_v6 {
            packet[0] |= tos >> 4;
            packet[1] |= tos << 4;
        } else {
            packet[1] = tos;
            fill_v4_checksum(&mut packet[..20]);
        }
        packet
    }

    proptest! {
        #[test]
        fn a_mark_changes_two_bits_and_keeps_the_header_s_checksum(
            is_v6: bool, tos: u8, outer in 0u8..4, payload in proptest::collection::vec(any::<u8>(), 8..40)
        ) {
            let before = packet(is_v6, tos, &payload);
            let mut after = before.clone();
            let inner = inner::parse(&before).unwrap();
            prop_assert_eq!(inner.tos, tos);
            let Some(ecn) = combined(tos & MASK, outer) else {
                prop_assert_eq!(decapsulate(outer, &mut after, &inner), Err(Dropped::CeOnNotEct));
                return Ok(());
            };
            decapsulate(outer, &mut after, &inner).unwrap();
            prop_assert_eq!(&after, &packet(is_v6, tos & !MASK | ecn, &payload));
        }

        #[test]
        fn a_damaged_header_is_not_mended(tos in 1u8.., bit in 0usize..160) {
            let mut packet = packet(false, tos | ECT_0, &[0; 8]);
            let inner = inner::parse(&packet).unwrap();
            packet[bit / 8] ^= 1 << (bit % 8);
            let good = |p: &[u8]| Sum::default().add(&p[..20]).is_good();
            prop_assert!(!good(&packet));
            if packet[0] == 0x45 {
                set(&mut packet, CE);
                prop_assert!(!good(&packet));
            }
            let _ = inner;
        }
    }
}
