//! Forged VXLAN: what somebody who is no peer could send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::host::Host;
use crate::lab::Lab;

/// VXLAN's port on the hosts.
const VXLAN: u16 = 6784;
/// Where forged datagrams go in a container.
const PORT: u16 = 80;

const UDP: u8 = 17;
/// IPv6's extension headers.
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// How often a file holds each packet.
pub const TIMES: usize = 20;

/// A datagram of VXLAN around a datagram to a container.
#[derive(Debug, Clone)]
pub struct Forged<'a> {
    /// Outer source.
    pub from: IpAddr,
    /// Outer destination, of the same version.
    pub to: IpAddr,
    /// Inner source and destination.
    pub macs: ([u8; 6], [u8; 6]),
    /// Inner source and destination.
    pub inner: (Ipv4Addr, Ipv4Addr),
    /// What each says; each way of forging has its own.
    pub text: &'a str,
}

impl Forged<'_> {
    /// What a UDP socket would be given.
    pub fn payload(&self) -> Vec<u8> {
        let (from_mac, to_mac) = self.macs;
        let datagram = udp(40_000, PORT, self.text.as_bytes());
        let mut bytes = vec![0x08, 0, 0, 0];
        bytes.extend((6783u32 << 8).to_be_bytes());
        bytes.extend([to_mac, from_mac].concat());
        bytes.extend([0x08, 0x00]);
        bytes.extend(ipv4(self.inner.0, self.inner.1, &datagram, 0));
        bytes
    }

    /// The whole packet.
    pub fn packet(&self) -> Vec<u8> {
        let datagram = self.datagram();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from, to, &datagram, 0),
            (from, to) => ipv6(v6(from), v6(to), UDP, &datagram),
        }
    }

    /// The packet in two fragments, the first with so many octets.
    pub fn fragments(&self, first: usize) -> Vec<Vec<u8>> {
        self.pieces(UDP, &self.datagram(), first)
    }

    /// The IPv6 packet in two fragments, the first of which ends before the UDP header begins (which RFC 7112 forbids): it
    /// holds destination options that say nothing (RFC 8200 §4.6).
    pub fn behind_options(&self) -> Vec<Vec<u8>> {
        let padding = [UDP, 0, 1, 4, 0, 0, 0, 0];
        let rest = [&padding[..], &self.datagram()].concat();
        self.pieces(DESTINATION_OPTIONS, &rest, padding.len())
    }

    fn pieces(&self, proto: u8, whole: &[u8], first: usize) -> Vec<Vec<u8>> {
        let (head, tail) = whole.split_at(first);
        let behind = u16::try_from(first / 8).expect("a short packet");
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                vec![ipv4(from, to, head, 0x2000), ipv4(from, to, tail, behind)]
            }
            (from, to) => {
                let piece = |offset: u16, more: u16, part: &[u8]| {
                    let mut body = vec![proto, 0];
                    body.extend((offset << 3 | more).to_be_bytes());
                    body.extend(0x7766_7766u32.to_be_bytes());
                    body.extend(part);
                    ipv6(v6(from), v6(to), FRAGMENT, &body)
                };
                vec![piece(0, 1, head), piece(behind, 0, tail)]
            }
        }
    }

    /// IPv4's goes without a checksum (RFC 768).
    fn datagram(&self) -> Vec<u8> {
        let mut datagram = udp(50_000, VXLAN, &self.payload());
        if self.to.is_ipv6() {
            let length = u32::try_from(datagram.len()).expect("a short packet");
            let ends = [v6(self.from).octets(), v6(self.to).octets()].concat();
            let rest = [length.to_be_bytes(), u32::from(UDP).to_be_bytes()].concat();
            let sum = checksum(&[ends, rest, datagram.clone()].concat());
            datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        datagram
    }
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a short packet");
    let mut bytes: Vec<u8> = [from, to, length, 0].map(u16::to_be_bytes).concat();
    bytes.extend(payload);
    bytes
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8], fragment: u16) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("a short packet");
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend(0x7766u16.to_be_bytes());
    header.extend(fragment.to_be_bytes());
    header.extend([64, 17, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend(payload);
    header
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("a short packet");
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next, 64]);
    packet.extend([from.octets(), to.octets()].concat());
    packet.extend(payload);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|word| [word[0], *word.get(1).unwrap_or(&0)]);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("a folded sum")
}

/// A file of packets behind their lengths, [`TIMES`] over, as `lab-tool replay` reads them.
pub fn forged_file(lab: &Lab, name: &str, packets: &[Vec<u8>]) -> String {
    let mut bytes = Vec::new();
    for packet in std::iter::repeat_n(packets, TIMES).flatten() {
        bytes.extend(
            u16::try_from(packet.len())
                .expect("a short packet")
                .to_be_bytes(),
        );
        bytes.extend(packet);
    }
    let path = lab.dir().join(format!("forged-{name}"));
    std::fs::write(&path, bytes).expect("writing a file of packets");
    path.to_string_lossy().into_owned()
}

/// The host's MAC on VXLAN, the same by either version.
pub fn vxlan_mac(host: &Host) -> [u8; 6] {
    let link = ["exec", "--", "ip", "-j", "link", "show", "wx0"];
    let link = host.weft(&link).json();
    let text = link[0]["address"].as_str().expect("wx0 has a MAC");
    let octets: Vec<u8> = text
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).expect("hex digits"))
        .collect();
    octets.try_into().expect("six octets")
}
