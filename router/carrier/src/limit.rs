//! How many handshakes are looked at. Those of strangers end at a MAC, in the thread that reads them; on the others the core
//! spends a Diffie-Hellman.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Sources told apart. They share cells by a keyed hash, so nobody chooses whose.
const CELLS: usize = 4096;
/// Per source: an IPv4 address or an IPv6 /64.
const PER_SOURCE: Rate = Rate {
    per_second: 20,
    burst: 40,
};
/// Handshakes of those who hold the cluster's secret.
pub(crate) const HANDSHAKES: Limits = Limits {
    per_source: PER_SOURCE,
    in_all: Rate {
        per_second: 5000,
        burst: 1000,
    },
};
/// Join-inits of anybody. A flood of other addresses' takes from a newcomer's chance to be heard, who asks again every
/// second; all of these cost some hundredths of a processor.
pub(crate) const JOINS: Limits = Limits {
    per_source: PER_SOURCE,
    in_all: Rate {
        per_second: 4000,
        burst: 1000,
    },
};

/// How many of a kind.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    per_source: Rate,
    /// Of all together.
    in_all: Rate,
}

#[derive(Clone, Copy)]
struct Rate {
    per_second: u32,
    burst: u32,
}

/// Tokens in thousandths, so that a part of a second counts.
#[derive(Clone, Copy)]
struct Bucket {
    milli_tokens: u32,
    at_ms: u32,
}

impl Bucket {
    fn take(&mut self, rate: Rate, now_ms: u32) -> bool {
        let passed = now_ms.wrapping_sub(self.at_ms);
        self.at_ms = now_ms;
        self.milli_tokens = passed
            .saturating_mul(rate.per_second)
            .saturating_add(self.milli_tokens)
            .min(rate.burst * 1000);
        match self.milli_tokens.checked_sub(1000) {
            Some(rest) => {
                self.milli_tokens = rest;
                true
            }
            None => false,
        }
    }
}

/// Probes of the `vxlan` carrier in all: each costs the core a look at its peers. Whoever can send on a trusted network can
/// send any number.
const PROBES: Rate = Rate {
    per_second: 1000,
    burst: 500,
};

/// Lets so many probes through and no more.
pub(crate) struct ProbeGate {
    start: Instant,
    bucket: Bucket,
}

impl ProbeGate {
    pub(crate) fn new() -> Self {
        let bucket = Bucket {
            milli_tokens: PROBES.burst * 1000,
            at_ms: 0,
        };
        Self {
            start: Instant::now(),
            bucket,
        }
    }

    /// May this one pass?
    pub(crate) fn admits(&mut self) -> bool {
        let now = self.start.elapsed().as_millis() as u32;
        self.bucket.take(PROBES, now)
    }
}

/// Lets so many through and no more.
pub(crate) struct HandshakeGate {
    limits: Limits,
    start: Instant,
    hash: RandomState,
    all: Bucket,
    cells: Vec<Bucket>,
}

impl HandshakeGate {
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        let full = |rate: Rate| Bucket {
            milli_tokens: rate.burst * 1000,
            at_ms: 0,
        };
        Self {
            limits,
            start: now,
            hash: RandomState::new(),
            all: full(limits.in_all),
            cells: vec![full(limits.per_source); CELLS],
        }
    }

    /// May a handshake from `ip` be looked at?
    pub(crate) fn admits(&mut self, ip: IpAddr, now: Instant) -> bool {
        // Wraps after 49 days, as the arithmetic of the buckets does.
        let elapsed: Duration = now.saturating_duration_since(self.start);
        let now_ms = elapsed.as_millis() as u32;
        let source = match ip {
            IpAddr::V4(ip) => u64::from(u32::from(ip)),
            IpAddr::V6(ip) => (u128::from(ip) >> 64) as u64,
        };
        let cell = self.hash.hash_one(source) as usize % CELLS;
        let Limits { per_source, in_all } = self.limits;
        self.cells[cell].take(per_source, now_ms) && self.all.take(in_all, now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(gate: &mut HandshakeGate, ip: &str, tries: usize, now: Instant) -> usize {
        let ip = ip.parse().unwrap();
        (0..tries).filter(|_| gate.admits(ip, now)).count()
    }

    #[test]
    fn one_source_gets_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut gate = HandshakeGate::new(HANDSHAKES, start);
        assert_eq!(admitted(&mut gate, "192.0.2.1", 1000, start), 40);
        let later = start + Duration::from_millis(500);
        assert_eq!(admitted(&mut gate, "192.0.2.1", 1000, later), 10);
    }

    #[test]
    fn a_slash_64_is_one_source() {
        let start = Instant::now();
        let mut gate = HandshakeGate::new(HANDSHAKES, start);
        assert_eq!(admitted(&mut gate, "2001:db8::1", 100, start), 40);
        assert_eq!(admitted(&mut gate, "2001:db8::2", 100, start), 0);
    }

    #[test]
    fn all_sources_together_are_bounded() {
        let start = Instant::now();
        let mut gate = HandshakeGate::new(HANDSHAKES, start);
        let admitted = (0..100_000u32)
            .filter(|n| gate.admits(IpAddr::V4((0xc000_0000 + n).into()), start))
            .count();
        assert_eq!(admitted, 1000);
    }
}
