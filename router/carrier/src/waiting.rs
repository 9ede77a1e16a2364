//! Frames for peers without a session: kept for a moment while it comes up, so that a first ping is not lost.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use weft_core::view::PeerNumber;

/// How long a frame waits.
const PATIENCE: Duration = Duration::from_secs(1);
/// Frames for one peer.
const MAX_FRAMES: usize = 64;
/// Octets for all peers together.
const MAX_BYTES: usize = 4 << 20;

/// Frames as the TAP gave them, by peer, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    queues: BTreeMap<PeerNumber, VecDeque<(Instant, Vec<u8>)>>,
    bytes: usize,
}

impl Waiting {
    pub(crate) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Keeps a copy of `frame`; `false` if there is no room.
    pub(crate) fn keep(&mut self, peer: PeerNumber, frame: &[u8], now: Instant) -> bool {
        if self.bytes + frame.len() > MAX_BYTES {
            return false;
        }
        let queue = self.queues.entry(peer).or_default();
        if queue.len() >= MAX_FRAMES {
            return false;
        }
        queue.push_back((now, frame.to_vec()));
        self.bytes += frame.len();
        true
    }

    /// Peers that something waits for.
    pub(crate) fn peers(&self) -> impl Iterator<Item = PeerNumber> + '_ {
        self.queues.keys().copied()
    }

    /// Gives up all that waits for `peer`, oldest first.
    pub(crate) fn take(&mut self, peer: PeerNumber) -> impl Iterator<Item = Vec<u8>> + use<> {
        let queue = self.queues.remove(&peer).unwrap_or_default();
        self.bytes -= queue.iter().map(|(_, frame)| frame.len()).sum::<usize>();
        queue.into_iter().map(|(_, frame)| frame)
    }

    /// Drops what has waited in vain and says how many that were of which peer.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<(PeerNumber, u64)> {
        let mut dropped = Vec::new();
        for (peer, queue) in &mut self.queues {
            let fresh =
                |(since, _): &(Instant, Vec<u8>)| now.saturating_duration_since(*since) < PATIENCE;
            let old = queue.iter().position(fresh).unwrap_or(queue.len());
            self.bytes -= queue
                .drain(..old)
                .map(|(_, frame)| frame.len())
                .sum::<usize>();
            if old > 0 {
                dropped.push((*peer, old as u64));
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerNumber = PeerNumber(3);

    #[test]
    fn frames_wait_a_second_and_no_longer() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        assert!(waiting.keep(PEER, &[1], start));
        assert!(waiting.keep(PEER, &[2], start + PATIENCE / 2));
        assert_eq!(waiting.expire(start + PATIENCE), [(PEER, 1)]);
        assert_eq!(waiting.take(PEER).collect::<Vec<_>>(), [[2]]);
        assert!(waiting.is_empty() && waiting.bytes == 0);
    }

    #[test]
    fn neither_one_peer_nor_all_can_fill_the_memory() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        let kept = (0..100)
            .filter(|_| waiting.keep(PEER, &[0; 9], start))
            .count();
        assert_eq!(kept, MAX_FRAMES);
        let big = vec![0; 65_000];
        for number in 10..4000 {
            waiting.keep(PeerNumber(number), &big, start);
        }
        assert!(waiting.bytes <= MAX_BYTES);
        let expired = waiting.expire(start + PATIENCE);
        let expired: u64 = expired.iter().map(|(_, frames)| frames).sum();
        assert_eq!(expired, 64 + (MAX_BYTES / 65_000) as u64);
        assert_eq!(waiting.bytes, 0);
    }
}
