//! Recording what passes a device, and reading it back: Ethernet, IPv4, IPv6, UDP and TCP ports, nothing more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::command::Spawned;
use crate::netns::Netns;

/// A running `tcpdump`.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Spawned,
    file: PathBuf,
}

/// One recorded frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// All of it, from the destination MAC on.
    pub bytes: Vec<u8>,
    /// Network-layer source, of IP packets.
    pub src: Option<IpAddr>,
    /// Network-layer destination, of IP packets.
    pub dst: Option<IpAddr>,
    /// IP protocol (17 = UDP).
    pub proto: Option<u8>,
    /// Source and destination port, of TCP and UDP.
    pub ports: Option<(u16, u16)>,
}

impl Capture {
    /// Starts recording on `device` in `space`; returns once packets are being recorded.
    pub fn start(space: &Netns, device: &str, file: &Path) -> Self {
        let path = file.to_str().expect("the lab's paths are text");
        // -Z root: Debian's tcpdump drops its rights otherwise, and can't write in the lab's directory then.
        let args = [
            "tcpdump",
            "-n",
            "-i",
            device,
            "--immediate-mode",
            "-U",
            "-s",
            "0",
            // KiB: at full length the usual buffer holds eight frames.
            "-B",
            "16384",
            "-Z",
            "root",
            "-w",
            path,
        ];
        let mut tcpdump = Spawned::start(&space.enter(&args), &[], &file.with_extension("tcpdump"));
        tcpdump.wait_for("listening on", Duration::from_secs(15));
        Self {
            tcpdump,
            file: file.to_owned(),
        }
    }

    /// What was recorded so far.
    pub fn frames(&self) -> Vec<Frame> {
        let bytes = std::fs::read(&self.file).unwrap_or_default();
        parse(&bytes)
    }

    /// Ends the recording.
    pub fn stop(mut self) -> Vec<Frame> {
        self.tcpdump.signal(Signal::SIGINT);
        self.tcpdump.wait(Duration::from_secs(10));
        self.frames()
    }
}

impl Frame {
    /// Does `needle` stand anywhere in it?
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.bytes.windows(needle.len()).any(|w| w == needle)
    }

    /// Is one of its ports `port`, over UDP?
    pub fn is_udp(&self, port: u16) -> bool {
        self.proto == Some(17) && self.ports.is_some_and(|(s, d)| s == port || d == port)
    }

    /// The IP packet in it.
    pub fn packet(&self) -> &[u8] {
        &self.bytes[14..]
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut frame = Self {
            bytes: bytes.to_vec(),
            src: None,
            dst: None,
            proto: None,
            ports: None,
        };
        let Some((header, packet)) = bytes.split_at_checked(14) else {
            return frame;
        };
        match [header[12], header[13]] {
            [0x08, 0x00] => frame.read_v4(packet),
            [0x86, 0xdd] => frame.read_v6(packet),
            _ => None,
        };
        frame
    }

    fn read_v4(&mut self, packet: &[u8]) -> Option<()> {
        let octets = |at: usize| {
            packet
                .get(at..at + 4)?
                .try_into()
                .ok()
                .map(|o: [u8; 4]| Ipv4Addr::from(o))
        };
        self.src = Some(octets(12)?.into());
        self.dst = Some(octets(16)?.into());
        self.proto = Some(packet[9]);
        self.read_ports(packet.get(usize::from(packet[0] & 0xf) * 4..)?)
    }

    fn read_v6(&mut self, packet: &[u8]) -> Option<()> {
        let octets = |at: usize| {
            packet
                .get(at..at + 16)?
                .try_into()
                .ok()
                .map(|o: [u8; 16]| Ipv6Addr::from(o))
        };
        self.src = Some(octets(8)?.into());
        self.dst = Some(octets(24)?.into());
        self.proto = Some(packet[6]);
        self.read_ports(packet.get(40..)?)
    }

    fn read_ports(&mut self, segment: &[u8]) -> Option<()> {
        let port = |at: usize| {
            segment
                .get(at..at + 2)
                .map(|b| u16::from_be_bytes([b[0], b[1]]))
        };
        if matches!(self.proto, Some(6 | 17)) {
            self.ports = Some((port(0)?, port(2)?));
        }
        Some(())
    }
}

/// Classic pcap, little-endian, Ethernet; a torn last record is left out.
fn parse(file: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut rest = file.get(24..).unwrap_or_default();
    while let Some((header, body)) = rest.split_at_checked(16) {
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        let Some((frame, next)) = body.split_at_checked(length) else {
            break;
        };
        frames.push(Frame::parse(frame));
        rest = next;
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_udp_packet_is_read_back() {
        let mut frame = vec![0u8; 12];
        frame.extend([
            0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
        ]);
        frame.extend([0x1a, 0x7f, 0, 53, 0, 8, 0, 0]);
        let mut file = vec![0u8; 24];
        file.extend([0u8; 8]);
        file.extend((frame.len() as u32).to_le_bytes());
        file.extend([0u8; 4]);
        file.extend(&frame);
        file.extend([1, 2, 3]);
        let frames = parse(&file);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].src, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(frames[0].ports, Some((6783, 53)));
        assert!(frames[0].is_udp(53) && !frames[0].is_udp(54));
    }
}
