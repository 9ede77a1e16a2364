//! Forged VXLAN: what somebody who is no peer could send.

use std::net::Ipv4Addr;

use crate::host::Host;
use crate::lab::Lab;

/// VXLAN's port on the hosts.
const VXLAN: u16 = 6784;
/// Where forged datagrams go in a container.
const PORT: u16 = 80;

/// How often a file holds each packet.
pub const TIMES: usize = 20;

/// A datagram of VXLAN around a datagram to a container.
#[derive(Debug, Clone)]
pub struct Forged<'a> {
    /// Outer source.
    pub from: Ipv4Addr,
    /// Outer destination.
    pub to: Ipv4Addr,
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
        ipv4(self.from, self.to, &udp(50_000, VXLAN, &self.payload()), 0)
    }

    /// The packet in two fragments, the first with so many octets.
    pub fn fragments(&self, first: usize) -> Vec<Vec<u8>> {
        let datagram = udp(50_000, VXLAN, &self.payload());
        let (head, tail) = datagram.split_at(first);
        let more = 0x2000;
        let behind = u16::try_from(first / 8).expect("a short packet");
        vec![
            ipv4(self.from, self.to, head, more),
            ipv4(self.from, self.to, tail, behind),
        ]
    }
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a short packet");
    // No checksum (RFC 768).
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
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("a folded sum");
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header.extend(payload);
    header
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

/// The host's MAC on VXLAN.
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
