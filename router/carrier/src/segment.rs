//! What the kernel leaves to the device: cutting super-packets (TSO, USO) into packets, and completing checksums. That
//! goes on to the far end, whose kernel knows best whether anybody still needs one: the seal says more than a checksum.
//! What came with a whole checksum keeps it.

use crate::checksum::{Sum, pseudo_header};
use crate::counters::Dropped;
use crate::inner::{Addresses, Inner, TCP, UDP};
use crate::vnet::{
    ETHERNET_LEN, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader,
};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A super-packet and how it is to be cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    protocol: u8,
    is_v6: bool,
    /// Where TCP or UDP begins.
    transport: usize,
    /// Where the payload begins: octets of headers that every packet repeats.
    headers: usize,
    /// Octets of payload in each packet but the last.
    size: usize,
    /// Length of the super-packet.
    len: usize,
    /// Can the far end tell where the checksums belong?
    partial: bool,
}

/// What is to be done with what came from the TAP.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Prepared {
    /// It goes as it is. If it is `partial` its transport checksum is not filled in.
    Single { partial: bool },
    /// It is to be cut.
    Super(Cut),
}

/// Says what is to be done with `packet`, and completes it where the far end could not. `packet` is exactly what `inner`
/// was read from.
pub(crate) fn prepare(
    vnet: &VnetHeader,
    packet: &mut [u8],
    inner: &Inner,
) -> Result<Prepared, Dropped> {
    let needs_sum = vnet.flags & NEEDS_CSUM != 0;
    if vnet.gso_type != GSO_NONE {
        let cut = cut(vnet, packet, inner).ok_or(Dropped::Malformed)?;
        return Ok(Prepared::Super(cut));
    }
    let partial = needs_sum && is_plain(vnet, inner);
    if needs_sum && !partial {
        complete(vnet, packet, inner)?;
    }
    Ok(Prepared::Single { partial })
}

/// Where the transport checksum of a protocol stands behind the beginning of its header.
pub(crate) fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        _ => None,
    }
}

/// Is the checksum that is missing TCP's or UDP's right behind the IP header, where the far end will look for it?
fn is_plain(vnet: &VnetHeader, inner: &Inner) -> bool {
    let offset = checksum_offset(inner.protocol);
    let start = usize::from(vnet.csum_start);
    start == ETHERNET_LEN + inner.transport
        && offset == Some(usize::from(vnet.csum_offset))
        && transport_end(inner).is_some_and(|end| end <= inner.len)
        && !inner.fragment
}

/// Where the least header of its transport ends.
fn transport_end(inner: &Inner) -> Option<usize> {
    match inner.protocol {
        TCP => Some(inner.transport + 20),
        UDP => Some(inner.transport + 8),
        _ => None,
    }
}

/// The checksum's field holds the sum of the pseudo-header; the rest is added here.
fn complete(vnet: &VnetHeader, packet: &mut [u8], inner: &Inner) -> Result<(), Dropped> {
    let start = usize::from(vnet.csum_start)
        .checked_sub(ETHERNET_LEN)
        .filter(|start| *start >= inner.transport)
        .ok_or(Dropped::Malformed)?;
    let field = start + usize::from(vnet.csum_offset);
    if field + 2 > packet.len() {
        return Err(Dropped::Malformed);
    }
    let mut sum = Sum::default().add(&packet[start..]).finish();
    // RFC 768: zero would say that there is none; its complement is the same number.
    if sum == [0, 0] && inner.protocol == UDP {
        sum = [0xff, 0xff];
    }
    packet[field..field + 2].copy_from_slice(&sum);
    Ok(())
}

fn cut(vnet: &VnetHeader, packet: &[u8], inner: &Inner) -> Option<Cut> {
    let is_v6 = matches!(inner.addresses, Addresses::V6 { .. });
    let protocol = match (vnet.gso_type & !GSO_ECN, is_v6) {
        (GSO_TCPV4, false) | (GSO_TCPV6, true) => TCP,
        (GSO_UDP_L4, _) => UDP,
        _ => return None,
    };
    // On IPv6, extension headers may stand between; where TCP begins the kernel has said.
    let transport = if is_v6 && vnet.flags & NEEDS_CSUM != 0 {
        usize::from(vnet.csum_start).checked_sub(ETHERNET_LEN)?
    } else if inner.protocol == protocol {
        inner.transport
    } else {
        return None;
    };
    if transport < inner.transport || inner.fragment {
        return None;
    }
    let headers = match protocol {
        TCP => transport + usize::from(*packet.get(transport + 12)? >> 4) * 4,
        _ => transport + 8,
    };
    let least = if protocol == TCP {
        transport + 20
    } else {
        headers
    };
    let cut = Cut {
        protocol,
        is_v6,
        transport,
        headers,
        size: usize::from(vnet.gso_size),
        len: packet.len(),
        partial: transport == inner.transport && inner.protocol == protocol,
    };
    (headers >= least && headers <= packet.len() && cut.size > 0).then_some(cut)
}

impl Cut {
    /// How many packets it makes.
    pub(crate) fn count(&self) -> usize {
        (self.len - self.headers).div_ceil(self.size).max(1)
    }

    /// Is the transport checksum of the packets yet to be filled in?
    pub(crate) fn is_partial(&self) -> bool {
        self.partial
    }

    /// Length of packet `n`.
    pub(crate) fn length(&self, n: usize) -> usize {
        let (start, end) = self.payload(n);
        self.headers + end - start
    }

    fn payload(&self, n: usize) -> (usize, usize) {
        let start = (self.headers + n * self.size).min(self.len);
        (start, (start + self.size).min(self.len))
    }

    /// Writes packet `n` of the super-packet `whole` to the beginning of `out`, which has room for it.
    pub(crate) fn write(&self, whole: &[u8], n: usize, out: &mut [u8]) {
        let (start, end) = self.payload(n);
        let out = &mut out[..self.headers + end - start];
        out[..self.headers].copy_from_slice(&whole[..self.headers]);
        out[self.headers..].copy_from_slice(&whole[start..end]);
        self.fix_ip(n, out);
        match self.protocol {
            TCP => self.fix_tcp(n, end == self.len, out),
            _ => self.fix_udp(out),
        }
    }

    fn fix_ip(&self, n: usize, packet: &mut [u8]) {
        let len = packet.len();
        if self.is_v6 {
            packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
            return;
        }
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(n as u16);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        fill_v4_checksum(&mut packet[..self.transport]);
    }

    fn fix_tcp(&self, n: usize, is_last: bool, packet: &mut [u8]) {
        let tcp = &mut packet[self.transport..];
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let sequence = sequence.wrapping_add((n * self.size) as u32);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if !is_last {
            tcp[13] &= !(FIN | PSH);
        }
        // RFC 3168 §6.1.2: once is enough, and twice would say it happened twice.
        if n > 0 {
            tcp[13] &= !CWR;
        }
        if self.partial {
            return;
        }
        tcp[16..18].fill(0);
        let sum = self.transport_sum(packet).finish();
        packet[self.transport + 16..self.transport + 18].copy_from_slice(&sum);
    }

    fn fix_udp(&self, packet: &mut [u8]) {
        let len = packet.len() - self.transport;
        let udp = &mut packet[self.transport..];
        udp[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        if self.partial {
            return;
        }
        udp[6..8].fill(0);
        let sum = match self.transport_sum(packet).finish() {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        };
        packet[self.transport + 6..self.transport + 8].copy_from_slice(&sum);
    }

    fn transport_sum(&self, packet: &[u8]) -> Sum {
        let (header, rest) = packet.split_at(self.transport);
        pseudo_header(addresses(header), self.protocol, rest.len()).add(rest)
    }
}

/// Source and destination of an IP header, as they stand there side by side.
pub(crate) fn addresses(header: &[u8]) -> &[u8] {
    if header[0] >> 4 == 6 {
        &header[8..40]
    } else {
        &header[12..20]
    }
}

/// Computes the checksum of the IPv4 header that fills `header`.
pub(crate) fn fill_v4_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = Sum::default().add(header).finish();
    header[10..12].copy_from_slice(&sum);
}

#[cfg(test)]
pub(crate) mod tests;
