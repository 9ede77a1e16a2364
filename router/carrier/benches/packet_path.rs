//! How fast the packet path is when no kernel takes part: cut, seal, open, police and join, on one core.

use std::time::{Duration, Instant};

use weft_carrier::measure::{Path, tcp_frame};
use weft_core::crypto::Cipher;

const TIME: Duration = Duration::from_millis(700);

fn main() {
    for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
        run(cipher, "one stream, 62 KiB super-packets", 62_000, 1381, 16);
        run(cipher, "1,400-octet packets", 1360, 0, 64);
        run(cipher, "64-octet packets", 24, 0, 64);
    }
}

/// `count` frames of `payload` octets a round; prints the rate of inner octets and of packets before they were cut.
fn run(cipher: Cipher, what: &str, payload: usize, size: u16, count: usize) {
    let mut path = Path::new(cipher, 1439);
    let frames: Vec<_> = (0..count)
        .map(|n| tcp_frame(payload, size, (n * payload) as u32))
        .collect();
    let (mut bytes, mut packets, mut rounds) = (0, 0, 0);
    let mut last = None;
    let mut busy = Duration::ZERO;
    while busy < TIME {
        // The path completes checksums in place, so each round needs fresh frames; copying them is not measured.
        let mut fresh = frames.clone();
        let start = Instant::now();
        let round = path.pass(fresh.iter_mut().map(Vec::as_mut_slice));
        busy += start.elapsed();
        bytes += count * (payload + 40);
        packets += count;
        rounds += 1;
        last = Some(round);
    }
    assert_eq!(path.drops(), 0, "nothing may be dropped here");
    let seconds = busy.as_secs_f64();
    println!(
        "{:18} {what:34} {:6.2} Gbit/s {:9.0} packets/s  {rounds} rounds of {last:?}",
        cipher.name(),
        bytes as f64 * 8.0 / seconds / 1e9,
        packets as f64 / seconds,
    );
}
