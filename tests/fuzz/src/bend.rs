//! Harms inputs as fuzzers do, from a seed: for `cargo test`, which knows no coverage.

use weft_core::crypto::Random;

const LONGEST: usize = 8192;

/// One of `corpus`, harmed in one to four ways.
pub fn bent(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = pick(corpus, random).to_vec();
    for _ in 0..=random.range(4) {
        harm(&mut data, corpus, random);
    }
    data.truncate(LONGEST);
    data
}

fn pick<'a>(corpus: &'a [Vec<u8>], random: &mut Random) -> &'a [u8] {
    match corpus.len() {
        0 => &[],
        length => &corpus[below(length, random)],
    }
}

fn below(end: usize, random: &mut Random) -> usize {
    random.range(end as u64) as usize
}

fn harm(data: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    if data.is_empty() {
        data.push(random.u64() as u8);
        return;
    }
    let at = below(data.len(), random);
    let end = at + below((data.len() - at).min(64) + 1, random);
    match random.range(10) {
        0 | 1 => data[at] ^= 1 << random.range(8),
        2 => {
            data[at] = data[at]
                .wrapping_add(random.range(35) as u8)
                .wrapping_sub(17)
        }
        3 => data[at] = [0, 1, 0x7f, 0x80, 0xfb, 0xfd, 0xff][below(7, random)],
        4 => drop(data.drain(at..end)),
        5 => {
            let copy = data[at..end].to_vec();
            let to = below(data.len() + 1, random);
            data.splice(to..to, copy);
        }
        6 => {
            let number =
                [0, 1, u64::MAX, 1 << 31, 1 << 63, u64::from(u32::MAX), 4095][below(7, random)];
            let width = 1 << random.range(4);
            let octets = number.to_be_bytes();
            let end = (at + width).min(data.len());
            data.splice(at..end, octets[8 - width..].iter().copied());
        }
        7 => {
            let noise: Vec<u8> = (0..=random.range(16)).map(|_| random.u64() as u8).collect();
            data.splice(at..at, noise);
        }
        8 => {
            let other = pick(corpus, random);
            let from = below(other.len() + 1, random);
            data.truncate(at);
            data.extend_from_slice(&other[from..]);
        }
        _ => data.truncate(at),
    }
}
