//! The targets, one module per room.

mod disk;
mod doors;
mod frames;
mod names;
mod packets;
mod records;
mod texts;

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing in it was taken.
    Refused,
    /// At least a part was.
    Taken,
}

impl Seen {
    fn when(taken: bool) -> Self {
        if taken { Self::Taken } else { Self::Refused }
    }
}

/// One target.
pub struct Target {
    /// Its name, and that of its part of the corpus.
    pub name: &'static str,
    /// What it does with octets.
    pub body: fn(&[u8]) -> Seen,
    /// Inputs made of real encodings, all of them [`Seen::Taken`].
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The most that one input may make it allocate, octets: what `body` needs for itself included.
    pub memory: usize,
    /// What is beyond is cut off.
    pub longest: usize,
}

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// All of them.
pub static TARGETS: &[Target] = &[
    Target {
        name: "plain",
        body: frames::plain,
        seeds: frames::plain_seeds,
        // A decoded value is at most some forty times its octets (an address in a list), growing as lists do.
        memory: 512 * KIB,
        longest: 4 * KIB,
    },
    Target {
        name: "sync",
        body: frames::sync,
        seeds: frames::sync_seeds,
        memory: MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "membership",
        body: frames::membership,
        seeds: frames::membership_seeds,
        memory: MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "frames",
        body: frames::frames,
        seeds: frames::frames_seeds,
        memory: 4 * MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "record",
        body: records::record,
        seeds: records::record_seeds,
        memory: MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "roster",
        body: records::roster,
        seeds: records::roster_seeds,
        memory: MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "handshake",
        body: doors::handshake,
        seeds: doors::handshake_seeds,
        memory: 4 * MIB,
        longest: 4 * KIB,
    },
    Target {
        name: "join",
        body: doors::join,
        seeds: doors::join_seeds,
        memory: 4 * MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "joiner",
        body: doors::joiner,
        seeds: doors::joiner_seeds,
        memory: 8 * MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "token",
        body: texts::token,
        seeds: texts::token_seeds,
        memory: 64 * KIB,
        longest: 4 * KIB,
    },
    Target {
        name: "api",
        body: texts::api,
        seeds: texts::api_seeds,
        memory: 4 * MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "cni",
        body: texts::cni,
        seeds: texts::cni_seeds,
        memory: 2 * MIB,
        longest: 8 * KIB,
    },
    Target {
        name: "text",
        body: texts::text,
        seeds: texts::text_seeds,
        // Three errors quote it, one of them with up to six octets for one, in strings that double as they grow.
        memory: 128 * KIB,
        longest: 2 * KIB,
    },
    Target {
        name: "disk",
        body: disk::disk,
        seeds: disk::disk_seeds,
        memory: 8 * MIB,
        longest: 4 * KIB,
    },
    Target {
        name: "dns",
        body: names::dns,
        seeds: names::dns_seeds,
        // hickory makes room for as many questions as a header announces: 65,535 of them.
        memory: 16 * MIB,
        longest: 4 * KIB,
    },
    Target {
        name: "packets",
        body: packets::packets,
        seeds: packets::packets_seeds,
        memory: 4 * MIB,
        longest: 16 * KIB,
    },
];
