//! What was gathered, as frames for the TAP: headers rebuilt, virtio header first.

use std::io::IoSlice;

use weft_core::underlay::Offload;

use super::{Group, MAX_SEGMENTS, PSH, Span};
use crate::checksum::{Sum, pseudo_header};
use crate::inner::UDP;
use crate::segment::{addresses, checksum_offset, fill_v4_checksum};
use crate::vnet::{
    ETHERNET_LEN, FRAME_HEAD, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VNET_LEN,
    VnetHeader, ether_type,
};

/// Ethernet and virtio headers, IPv4 and TCP with all options.
const MAX_HEAD: usize = FRAME_HEAD + 60 + 60;

/// One frame for the TAP.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    /// Whose, as it was pushed.
    pub(crate) from: usize,
    /// Its octets.
    pub(crate) pieces: &'a [IoSlice<'a>],
    /// What cuts it again, if it is a super-packet.
    pub(crate) offload: Option<Offload>,
}

impl Group {
    /// The headers of the super-packet, with what is to be done to it before them.
    fn write_head(
        &self,
        octets: &[u8],
        from_mac: [u8; 6],
        to_mac: [u8; 6],
    ) -> ([u8; MAX_HEAD], usize) {
        let first = self.first_of(octets);
        let mut head = [0; MAX_HEAD];
        let (gso_type, gso_size) = match (self.spans.len(), self.protocol) {
            (..=1, _) => (GSO_NONE, 0),
            (_, UDP) => (GSO_UDP_L4, self.size as u16),
            _ if first.is_v6() => (GSO_TCPV6, self.size as u16),
            _ => (GSO_TCPV4, self.size as u16),
        };
        let vnet = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: (ETHERNET_LEN + self.headers) as u16,
            gso_size,
            csum_start: (ETHERNET_LEN + self.transport) as u16,
            csum_offset: self.checksum_offset() as u16,
        };
        write_frame_head(&mut head, vnet, first.packet[0], from_mac, to_mac);
        let len = FRAME_HEAD + self.headers;
        let packet = &mut head[FRAME_HEAD..len];
        packet.copy_from_slice(&first.packet[..self.headers]);
        self.fix(packet, first.is_v6());
        (head, len)
    }

    /// What cuts the super-packet again.
    fn offload(&self) -> Option<Offload> {
        match (self.spans.len(), self.protocol) {
            (..=1, _) => None,
            (_, UDP) => Some(Offload::Uso),
            _ => Some(Offload::Tso),
        }
    }

    /// Segment `n` as a group of its own.
    fn part(&self, n: usize) -> Group {
        let span = self.spans[n];
        Group {
            first: Span {
                start: span.start - self.headers,
                len: self.headers + span.len,
            },
            partial: self.partials >> n & 1 != 0,
            size: span.len,
            payload: span.len,
            ends_with_push: false,
            spans: vec![span],
            ..*self
        }
    }

    fn checksum_offset(&self) -> usize {
        checksum_offset(self.protocol).unwrap_or_default()
    }

    fn fix(&self, packet: &mut [u8], is_v6: bool) {
        let len = self.headers + self.payload;
        if is_v6 {
            packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        } else {
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            fill_v4_checksum(&mut packet[..self.transport]);
        }
        let rest = len - self.transport;
        let sum = pseudo_header(addresses(packet), self.protocol, rest).partial();
        let head = &mut packet[self.transport..];
        let field = self.checksum_offset();
        head[field..field + 2].copy_from_slice(&sum);
        if self.protocol == UDP {
            head[4..6].copy_from_slice(&(rest as u16).to_be_bytes());
        } else if self.ends_with_push {
            head[13] |= PSH;
        }
    }
}

/// Writes virtio and Ethernet headers to the first [`FRAME_HEAD`] octets of `head`.
fn write_frame_head(head: &mut [u8], vnet: VnetHeader, first: u8, from: [u8; 6], to: [u8; 6]) {
    head[..VNET_LEN].copy_from_slice(&vnet.to_bytes());
    head[VNET_LEN..VNET_LEN + 6].copy_from_slice(&to);
    head[VNET_LEN + 6..VNET_LEN + 12].copy_from_slice(&from);
    head[VNET_LEN + 12..FRAME_HEAD].copy_from_slice(&ether_type(first));
}

/// Puts frames together.
pub(super) struct Writer<'a, W> {
    pub(super) octets: &'a [u8],
    /// Source and destination.
    pub(super) macs: ([u8; 6], [u8; 6]),
    /// May checksums be left to the kernel?
    pub(super) checksums: bool,
    pub(super) write: W,
}

impl<W: FnMut(&[IoSlice<'_>], Option<Offload>) -> bool> Writer<'_, W> {
    pub(super) fn single(&mut self, packet: &[u8]) {
        let mut head = [0; FRAME_HEAD];
        let (from, to) = self.macs;
        write_frame_head(&mut head, VnetHeader::default(), packet[0], from, to);
        (self.write)(&[IoSlice::new(&head), IoSlice::new(packet)], None);
    }

    pub(super) fn group(&mut self, group: &Group) {
        let taken = match group.spans.len() {
            1 if !group.partial => {
                self.single(group.first.of(self.octets));
                true
            }
            1 if !self.checksums => {
                self.completed(group);
                true
            }
            _ => self.joined(group),
        };
        if !taken && group.spans.len() > 1 {
            self.parts(group);
        }
    }

    fn joined(&mut self, group: &Group) -> bool {
        let (from, to) = self.macs;
        let (head, len) = group.write_head(self.octets, from, to);
        let mut pieces = [IoSlice::new(&[]); MAX_SEGMENTS + 1];
        pieces[0] = IoSlice::new(&head[..len]);
        for (piece, span) in pieces[1..].iter_mut().zip(&group.spans) {
            *piece = IoSlice::new(span.of(self.octets));
        }
        (self.write)(&pieces[..=group.spans.len()], group.offload())
    }

    /// One packet whose checksum is filled in here.
    fn completed(&mut self, group: &Group) {
        let (from, to) = self.macs;
        let (mut head, len) = group.write_head(self.octets, from, to);
        let payload = group.spans[0].of(self.octets);
        head[..VNET_LEN].copy_from_slice(&VnetHeader::default().to_bytes());
        let transport = FRAME_HEAD + group.transport;
        // The field holds the sum of the pseudo-header.
        let sum = Sum::default().add(&head[transport..len]).add(payload);
        let sum = match (sum.finish(), group.protocol) {
            ([0, 0], UDP) => [0xff, 0xff],
            (sum, _) => sum,
        };
        let field = transport + group.checksum_offset();
        head[field..field + 2].copy_from_slice(&sum);
        (self.write)(&[IoSlice::new(&head[..len]), IoSlice::new(payload)], None);
    }

    /// What the group was joined from, each as it came.
    fn parts(&mut self, group: &Group) {
        for n in 0..group.spans.len() {
            let part = group.part(n);
            if part.partial && self.checksums {
                self.joined(&part);
            } else if part.partial {
                self.completed(&part);
            } else {
                self.single(part.first.of(self.octets));
            }
        }
    }
}
