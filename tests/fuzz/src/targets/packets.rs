//! Frames that carry packets, through the packet path without a kernel.

use weft_carrier::measure::{Path, tcp_frame};
use weft_core::crypto::Cipher;
use weft_core::layout::{UDP_CARRIER_MAC, peer_mac};
use weft_core::view::PeerNumber;
use weft_core::wire::FrameKind;

use super::Seen;
use crate::pieces::{cut, join, marked};

/// Octets before the packet in a frame of the TAP: virtio's header and Ethernet's.
const HEAD: usize = 10 + 14;

/// Mark 0: a packet. 1: a bundle. 2: what the near TAP gives. 3: a packet without its checksum. 4: half a packet.
pub(super) fn packets(data: &[u8]) -> Seen {
    let mut path = Path::new(Cipher::ChaCha20Poly1305, 1400);
    let mut count = 0;
    for piece in cut(data, 16) {
        let Some((mark, body)) = piece.split_first() else {
            continue;
        };
        let frames = match mark & 7 {
            0 => path.receive(FrameKind::Packet, body),
            1 | 5 => path.receive(FrameKind::Bundle, body),
            2 | 6 => {
                let mut frame = body.to_vec();
                path.pass_whole(std::iter::once(&mut frame[..]))
            }
            4 => path.receive(FrameKind::Half, body),
            _ => path.receive(FrameKind::Partial, body),
        };
        frames.iter().for_each(|frame| check(frame));
        count += frames.len();
    }
    Seen::when(count > 0)
}

/// What the kernel gets must be such that it can rely on it.
fn check(frame: &[u8]) {
    assert!(frame.len() > HEAD + 20 && frame.len() <= HEAD + 65_535);
    assert_eq!(frame[10..16], UDP_CARRIER_MAC);
    assert_eq!(frame[16..22], peer_mac(PeerNumber(9)));
    let number = |at: usize| usize::from(u16::from_ne_bytes([frame[at], frame[at + 1]]));
    let (flags, kind) = (frame[0], frame[1] & 0x7f);
    assert!(
        [0, 1, 4, 5].contains(&kind),
        "segments of TCP or UDP, or none: {kind}"
    );
    let (gso_size, start, offset) = (number(4), number(6), number(8));
    if kind != 0 {
        assert!(flags & 1 == 1 && gso_size > 0, "segments need checksums");
    }
    if flags & 1 == 1 {
        assert!(
            10 + start + offset + 2 <= frame.len(),
            "a checksum beyond the end"
        );
    }
    let packet = &frame[HEAD..];
    let length = match packet[0] >> 4 {
        4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
        6 => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
        version => panic!("version {version}"),
    };
    assert_eq!(length, packet.len(), "a header that tells the truth");
}

pub(super) fn packets_seeds() -> Vec<Vec<u8>> {
    let small = tcp_frame(40, 0, 1);
    let packet = &small[HEAD..];
    let two = bundle(&[packet, packet]);
    let six = six();
    vec![
        join([marked(0, packet)]),
        join([marked(1, &two)]),
        join([marked(1, &bundle(&[packet, &six]))]),
        join([marked(2, &small)]),
        join([marked(3, packet)]),
        join([marked(2, &tcp_frame(6000, 1348, 1))]),
        join([marked(0, &six)]),
        join([
            marked(4, &half(0, &six[..30])),
            marked(4, &half(1, &six[30..])),
        ]),
        join([
            marked(2, &tcp_frame(1300, 0, 1)),
            marked(2, &tcp_frame(1300, 0, 1301)),
        ]),
    ]
}

/// Lengths are little endian in a bundle.
fn bundle(packets: &[&[u8]]) -> Vec<u8> {
    let one = |packet: &&[u8]| [&(packet.len() as u16).to_le_bytes(), *packet].concat();
    packets.iter().flat_map(one).collect()
}

/// The first or the second half of packet 1.
fn half(flags: u8, octets: &[u8]) -> Vec<u8> {
    [&[1, 0, 0, 0, flags], octets].concat()
}

/// An IPv6 UDP packet between two addresses of nobody.
fn six() -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 12, 17, 64];
    packet.extend_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend_from_slice(&[0, 53, 0, 53, 0, 12, 1, 2, 1, 2, 3, 4]);
    packet
}
