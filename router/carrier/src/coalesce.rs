//! Consecutive TCP segments or UDP datagrams of one flow, joined into the super-packet they were cut from: one write to the
//! TAP and one walk through the kernel instead of forty.
//!
//! INVARIANT: packets of one flow keep their order. A packet that can't join the flow's open group closes it.
//! INVARIANT: the receiver's kernel is told that a group's checksum is yet to be filled in, so it will not check the
//! payload again. Therefore only packets are joined whose checksums were found right, or that were sealed by the host they
//! began on without having one; all others go as they came.

mod frames;

use std::io::IoSlice;

use crate::checksum::{Sum, pseudo_header};
use crate::counters::Dropped;
use crate::inner::{Inner, TCP, UDP};
use crate::offload::Joins;
use crate::segment::addresses;

pub(crate) use frames::Frame;
use frames::Writer;

/// Flows joined at a time; of more, the oldest is closed. A batch rarely holds more, and each packet is compared to all.
const MAX_OPEN: usize = 8;
/// Segments of one group: what one vectored write takes is far more.
const MAX_SEGMENTS: usize = 64;
/// Octets of a UDP header.
const UDP_LEN: usize = 8;

/// Set in TCP's flags where nothing should wait behind a segment.
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const ECE: u8 = 0x40;

/// Where a piece lies in the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Span {
    fn of(self, octets: &[u8]) -> &[u8] {
        &octets[self.start..self.start + self.len]
    }
}

#[derive(Debug)]
enum Item {
    Single { packet: Span, from: usize },
    Group(usize),
}

#[derive(Debug)]
struct Group {
    from: usize,
    first: Span,
    protocol: u8,
    /// Does the first one come without a checksum?
    partial: bool,
    /// Which of them do, one bit each.
    partials: u64,
    transport: usize,
    headers: usize,
    /// Payload of each segment but the last.
    size: usize,
    /// Of TCP.
    next_sequence: u32,
    /// Payload of all segments.
    payload: usize,
    /// Is the first segment known to be right? It is not looked at before a second one comes: most groups stay alone.
    verified: bool,
    ends_with_push: bool,
    spans: Vec<Span>,
}

/// Gathers the packets of one batch. `from` is whatever the caller tells peers apart by.
#[derive(Debug)]
pub(crate) struct Coalescer {
    joins: Joins,
    items: Vec<Item>,
    /// The first `used` are of this batch; the others are kept for their room.
    groups: Vec<Group>,
    used: usize,
    open: Vec<usize>,
}

/// A packet as far as joining takes it apart: a TCP segment or a UDP datagram.
#[derive(Clone, Copy)]
struct Segment<'a> {
    packet: &'a [u8],
    protocol: u8,
    transport: usize,
    /// Where the payload begins.
    headers: usize,
    /// Has it no checksum yet?
    partial: bool,
}

impl<'a> Segment<'a> {
    fn read(packet: &'a [u8], inner: &Inner, partial: bool) -> Option<Self> {
        let at = inner.transport;
        let (headers, fits) = match inner.protocol {
            TCP => {
                let words = usize::from(*packet.get(at + 12)? >> 4);
                (at + words * 4, words >= 5)
            }
            UDP => {
                let len = packet.get(at + 4..at + 6)?;
                let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
                (at + UDP_LEN, len == packet.len() - at)
            }
            _ => return None,
        };
        (fits && headers <= packet.len() && !inner.fragment).then_some(Self {
            packet,
            protocol: inner.protocol,
            transport: at,
            headers,
            partial,
        })
    }

    /// The transport's header.
    fn head(&self) -> &'a [u8] {
        &self.packet[self.transport..self.headers]
    }

    fn payload(&self) -> usize {
        self.packet.len() - self.headers
    }

    /// Of TCP; in UDP's header the same octets say something else.
    fn sequence(&self) -> u32 {
        let head = self.head();
        u32::from_be_bytes([head[4], head[5], head[6], head[7]])
    }

    fn is_pushed(&self) -> bool {
        self.protocol == TCP && self.head()[13] & PSH != 0
    }

    fn is_v6(&self) -> bool {
        self.packet[0] >> 4 == 6
    }

    /// May it be part of a group at all?
    fn may_join(&self) -> bool {
        let plain = if self.is_v6() {
            self.transport == 40
        } else {
            self.transport == 20
        };
        let head = self.head();
        let fits = match self.protocol {
            // The echo of a mark (RFC 3168 §6.1.3) stands in every segment until it is answered.
            TCP => head[13] & !(PSH | ECE) == ACK,
            // Without a checksum on purpose (RFC 768) it would get one.
            _ => self.partial || head[6..8] != [0, 0],
        };
        plain && self.payload() > 0 && fits
    }

    fn same_flow(&self, other: &Self) -> bool {
        self.packet[0] >> 4 == other.packet[0] >> 4
            && self.protocol == other.protocol
            && self.head()[..4] == other.head()[..4]
            && addresses(self.packet) == addresses(other.packet)
    }

    /// Do the headers differ only where those of consecutive segments do?
    fn same_headers(&self, first: &Self, place: usize) -> bool {
        let (a, b) = (self.packet, first.packet);
        if self.transport != first.transport || self.headers != first.headers {
            return false;
        }
        let same_ip = if self.is_v6() {
            a[..4] == b[..4] && a[6..8] == b[6..8]
        } else {
            a[..2] == b[..2] && a[6..10] == b[6..10] && self.id_follows(first, place)
        };
        if self.protocol == UDP {
            return same_ip;
        }
        let (a, b) = (self.head(), first.head());
        same_ip
            && a[8..13] == b[8..13]
            && (a[13] ^ b[13]) & !PSH == 0
            && a[14..16] == b[14..16]
            && a[18..] == b[18..]
    }

    /// With "don't fragment" the id means nothing (RFC 6864 §4.1); without, it has to count.
    fn id_follows(&self, first: &Self, place: usize) -> bool {
        let id = |s: &Self| u16::from_be_bytes([s.packet[4], s.packet[5]]);
        self.packet[6] & 0x40 != 0 || id(self) == id(first).wrapping_add(place as u16)
    }

    fn is_intact(&self) -> bool {
        let (header, rest) = self.packet.split_at(self.transport);
        let ip_good = self.is_v6() || Sum::default().add(header).is_good();
        let sum = || pseudo_header(addresses(header), self.protocol, rest.len()).add(rest);
        ip_good && (self.partial || sum().is_good())
    }
}

impl Group {
    fn first_of<'a>(&self, octets: &'a [u8]) -> Segment<'a> {
        Segment {
            packet: self.first.of(octets),
            protocol: self.protocol,
            transport: self.transport,
            headers: self.headers,
            partial: self.partial,
        }
    }

    /// Joins `segment` to the group if it is the very next one.
    fn join(&mut self, octets: &[u8], span: Span, segment: &Segment<'_>) -> bool {
        let first = self.first_of(octets);
        let payload = segment.payload();
        let fits = payload <= self.size
            && self.headers + self.payload + payload <= usize::from(u16::MAX)
            && self.spans.len() < MAX_SEGMENTS;
        let follows = segment.may_join()
            && (segment.protocol == UDP || segment.sequence() == self.next_sequence)
            && segment.same_headers(&first, self.spans.len());
        if !(fits && follows) {
            return false;
        }
        if !self.verified && !first.is_intact() {
            return false;
        }
        self.verified = true;
        if !segment.is_intact() {
            return false;
        }
        self.partials |= u64::from(segment.partial) << self.spans.len();
        self.spans.push(Span {
            start: span.start + segment.headers,
            len: payload,
        });
        self.payload += payload;
        self.next_sequence = self.next_sequence.wrapping_add(payload as u32);
        self.ends_with_push = segment.is_pushed();
        true
    }

    /// Nothing can follow a short segment, and nothing should wait behind a pushed one.
    fn is_complete(&self) -> bool {
        self.ends_with_push || self.spans.last().is_some_and(|last| last.len < self.size)
    }
}

impl Coalescer {
    pub(crate) fn new(joins: Joins) -> Self {
        Self {
            joins,
            items: Vec::new(),
            groups: Vec::new(),
            used: 0,
            open: Vec::new(),
        }
    }

    /// What may be left to the kernel from now on. Only while nothing is gathered.
    pub(crate) fn set_joins(&mut self, joins: Joins) {
        self.joins = joins;
    }

    /// Takes the packet at `span` of `octets`; `inner` was read from it and fills it. Refuses one without a checksum
    /// (`partial`) whose checksum nobody could fill in.
    pub(crate) fn push(
        &mut self,
        octets: &[u8],
        span: Span,
        from: usize,
        inner: &Inner,
        partial: bool,
    ) -> Result<(), Dropped> {
        match Segment::read(span.of(octets), inner, partial) {
            Some(segment) => self.push_segment(octets, span, from, &segment),
            None if partial => return Err(Dropped::Malformed),
            None => self.single(span, from),
        }
        Ok(())
    }

    fn push_segment(&mut self, octets: &[u8], span: Span, from: usize, segment: &Segment<'_>) {
        if let Some(place) = self.find(octets, from, segment) {
            let index = self.open[place];
            let joined = self.groups[index].join(octets, span, segment);
            if !joined || self.groups[index].is_complete() {
                self.open.remove(place);
            }
            if joined {
                return;
            }
        }
        let may_grow = segment.may_join()
            && !segment.is_pushed()
            && match segment.protocol {
                UDP => self.joins.udp,
                _ => self.joins.tcp,
            };
        if may_grow || segment.partial {
            self.begin(span, from, segment, may_grow);
        } else {
            self.single(span, from);
        }
    }

    fn find(&self, octets: &[u8], from: usize, segment: &Segment<'_>) -> Option<usize> {
        self.open.iter().position(|index| {
            let group = &self.groups[*index];
            group.from == from && group.first_of(octets).same_flow(segment)
        })
    }

    fn single(&mut self, packet: Span, from: usize) {
        self.items.push(Item::Single { packet, from });
    }

    fn begin(&mut self, span: Span, from: usize, segment: &Segment<'_>, may_grow: bool) {
        let mut spans = match self.groups.get_mut(self.used) {
            Some(old) => std::mem::take(&mut old.spans),
            None => Vec::with_capacity(MAX_SEGMENTS),
        };
        spans.clear();
        let payload = segment.payload();
        spans.push(Span {
            start: span.start + segment.headers,
            len: payload,
        });
        let group = Group {
            from,
            first: span,
            protocol: segment.protocol,
            partial: segment.partial,
            partials: segment.partial.into(),
            transport: segment.transport,
            headers: segment.headers,
            size: payload,
            next_sequence: segment.sequence().wrapping_add(payload as u32),
            payload,
            verified: false,
            ends_with_push: segment.is_pushed(),
            spans,
        };
        match self.groups.get_mut(self.used) {
            Some(old) => *old = group,
            None => self.groups.push(group),
        }
        if may_grow {
            if self.open.len() == MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(self.used);
        }
        self.items.push(Item::Group(self.used));
        self.used += 1;
    }

    /// Hands out everything gathered, in order, and begins anew. `mac_of` gives the source MAC for a `from`. A super-packet
    /// that `write` says no to is handed out again in its parts.
    pub(crate) fn drain(
        &mut self,
        octets: &[u8],
        to: [u8; 6],
        mac_of: impl Fn(usize) -> [u8; 6],
        mut write: impl FnMut(Frame<'_>) -> bool,
    ) {
        for item in &self.items {
            let from = match item {
                Item::Single { from, .. } => *from,
                Item::Group(index) => self.groups[*index].from,
            };
            let mut writer = Writer {
                octets,
                macs: (mac_of(from), to),
                checksums: self.joins.checksums,
                write: |pieces: &[IoSlice<'_>], offload| {
                    write(Frame {
                        from,
                        pieces,
                        offload,
                    })
                },
            };
            match item {
                Item::Single { packet, .. } => writer.single(packet.of(octets)),
                Item::Group(index) => writer.group(&self.groups[*index]),
            }
        }
        self.items.clear();
        self.open.clear();
        self.used = 0;
    }
}

#[cfg(test)]
mod tests;
