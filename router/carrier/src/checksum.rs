//! The Internet checksum (RFC 1071), fast enough to be taken over every octet that passes.

/// A one's complement sum under way. Kept in the host's byte order: RFC 1071 §2(B) allows it as long as the two octets of
/// the result are stored as they came.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds `bytes`. Only the last piece of what is summed may have an odd length.
    pub(crate) fn add(mut self, bytes: &[u8]) -> Self {
        // Two lanes of 32 bits per word can't overflow 64 bits within a packet, and the compiler makes vectors of it.
        let mut lanes = [0u64; 4];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
                let word = u64::from_ne_bytes(*word);
                *lane += (word & 0xffff_ffff) + (word >> 32);
            }
        }
        let mut pairs = blocks.remainder().chunks_exact(2);
        for pair in &mut pairs {
            self.0 += u64::from(u16::from_ne_bytes([pair[0], pair[1]]));
        }
        if let [last] = pairs.remainder() {
            self.0 += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        for lane in lanes {
            self.0 += (lane & 0xffff_ffff) + (lane >> 32);
        }
        self
    }

    /// Adds one number of 16 bits.
    pub(crate) fn add_u16(mut self, number: u16) -> Self {
        self.0 += u64::from(number.to_be());
        self
    }

    /// The sum itself, as it is stored where a device is to complete it.
    pub(crate) fn partial(self) -> [u8; 2] {
        self.fold().to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    pub(crate) fn finish(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// Is this the sum over something that carries its right checksum?
    pub(crate) fn is_good(self) -> bool {
        self.fold() == 0xffff
    }

    fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

/// The pseudo-header of TCP and UDP (RFC 9293 §3.1, RFC 8200 §8.1): `addresses` are source and destination side by side,
/// `length` that of header and payload of the transport protocol.
pub(crate) fn pseudo_header(addresses: &[u8], protocol: u8, length: usize) -> Sum {
    Sum::default()
        .add(addresses)
        .add_u16(u16::from(protocol))
        .add_u16((length >> 16) as u16)
        .add_u16(length as u16)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 §4.1, word by word.
    pub(crate) fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        let sum = Sum::default().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), [0xdd, 0xf2]);
        assert_eq!(sum.finish(), [!0xdd, !0xf2]);
    }

    #[test]
    fn a_whole_super_packet_of_ones_does_not_overflow() {
        let bytes = vec![0xff; 65536];
        assert_eq!(Sum::default().add(&bytes).partial(), [0xff, 0xff]);
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_naive_sum(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in 0usize..3000) {
            let cut = cut.min(bytes.len()) & !1;
            let sum = Sum::default().add(&bytes[..cut]).add(&bytes[cut..]);
            prop_assert_eq!(sum.partial(), naive(&bytes).to_be_bytes());
        }
    }
}
