//! The header that stands before every frame on the TAP (`struct virtio_net_hdr`, virtio 1.2 §5.1.6). It is a matter
//! between this host's kernel and weft: it never goes on a wire and never comes from one.

/// Octets of the header.
pub(crate) const VNET_LEN: usize = 10;
/// Octets of an Ethernet header.
pub(crate) const ETHERNET_LEN: usize = 14;
/// Where the IP packet begins in what the TAP gives.
pub(crate) const FRAME_HEAD: usize = VNET_LEN + ETHERNET_LEN;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the transport checksum holds the pseudo-header's sum alone.
pub(crate) const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_NONE`.
pub(crate) const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
pub(crate) const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
pub(crate) const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
pub(crate) const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, added to the TCP ones: the first segment has CWR set.
pub(crate) const GSO_ECN: u8 = 0x80;

/// What a device still has to do to a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    /// From the beginning of the Ethernet header.
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl VnetHeader {
    /// Reads the header at the beginning of `frame`.
    pub(crate) fn parse(frame: &[u8]) -> Option<Self> {
        let b = frame.first_chunk::<VNET_LEN>()?;
        let number = |at: usize| u16::from_ne_bytes([b[at], b[at + 1]]);
        Some(Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: number(2),
            gso_size: number(4),
            csum_start: number(6),
            csum_offset: number(8),
        })
    }

    /// The header's octets.
    pub(crate) fn to_bytes(self) -> [u8; VNET_LEN] {
        let mut b = [0; VNET_LEN];
        b[0] = self.flags;
        b[1] = self.gso_type;
        b[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        b[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        b[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        b[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        b
    }
}

/// EtherType of the IP version in the high half of a packet's first octet.
pub(crate) fn ether_type(first: u8) -> [u8; 2] {
    if first >> 4 == 6 {
        [0x86, 0xdd]
    } else {
        [0x08, 0x00]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_octets() {
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV6 | GSO_ECN,
            hdr_len: 74,
            gso_size: 1387,
            csum_start: 54,
            csum_offset: 16,
        };
        assert_eq!(VnetHeader::parse(&header.to_bytes()), Some(header));
        assert_eq!(VnetHeader::parse(&[0; 9]), None);
    }
}
