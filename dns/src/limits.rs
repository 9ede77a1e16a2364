//! Bounds: how often a client may ask, and how many of its queries and connections may wait at once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bounds of a server. The defaults suit a host with some hundred containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Queries a second of one client address; also its burst. What is more is dropped.
    pub per_client_rate: u32,
    /// Queries that wait for the host's resolvers, in all. What is more gets SERVFAIL. Answers from the cluster's own
    /// names never wait, so a flood of forwarded queries doesn't touch them.
    pub in_flight: usize,
    /// The same for one client.
    pub in_flight_per_client: usize,
    /// TCP connections in all; more are closed at once.
    pub tcp: usize,
    /// The same for one client.
    pub tcp_per_client: usize,
    /// How long a TCP connection may take for its next message.
    pub tcp_idle: Duration,
    /// How long one resolver of the host may take.
    pub upstream_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_client_rate: 200,
            in_flight: 512,
            in_flight_per_client: 128,
            tcp: 64,
            tcp_per_client: 8,
            tcp_idle: Duration::from_secs(2),
            upstream_timeout: Duration::from_secs(2),
        }
    }
}

/// Clients whose rate is remembered; idle ones are forgotten first.
const MAX_CLIENTS: usize = 4096;
/// A bucket counts thousandths, so that slow refills aren't lost to rounding.
const TOKEN: u64 = 1000;

/// A token bucket per client.
#[derive(Debug)]
pub(crate) struct Rate {
    per_second: u64,
    buckets: BTreeMap<IpAddr, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: u64,
    at: Duration,
}

impl Rate {
    pub(crate) fn new(per_second: u32) -> Self {
        Self {
            per_second: u64::from(per_second),
            buckets: BTreeMap::new(),
        }
    }

    /// May this client ask once more? `now` counts from any fixed moment.
    pub(crate) fn allow(&mut self, client: IpAddr, now: Duration) -> bool {
        let full = self.per_second * TOKEN;
        if !self.buckets.contains_key(&client) && self.buckets.len() >= MAX_CLIENTS {
            // A bucket not touched for a second is full again: forgetting it changes nothing.
            self.buckets
                .retain(|_, b| now.saturating_sub(b.at) < Duration::from_secs(1));
            if self.buckets.len() >= MAX_CLIENTS {
                return false;
            }
        }
        let bucket = self.buckets.entry(client).or_insert(Bucket {
            tokens: full,
            at: now,
        });
        let passed = now.saturating_sub(bucket.at).as_millis().min(1000) as u64;
        if passed > 0 {
            // Thousandths per millisecond are tokens per second.
            bucket.tokens = (bucket.tokens + passed * self.per_second).min(full);
            bucket.at = now;
        }
        match bucket.tokens.checked_sub(TOKEN) {
            Some(rest) => {
                bucket.tokens = rest;
                true
            }
            None => false,
        }
    }
}

/// Places that clients take and give back.
#[derive(Debug)]
pub(crate) struct Slots {
    total: usize,
    per_client: usize,
    taken: Mutex<BTreeMap<IpAddr, usize>>,
}

/// One place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    client: IpAddr,
}

impl Slots {
    pub(crate) fn new(total: usize, per_client: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            per_client,
            taken: Mutex::new(BTreeMap::new()),
        })
    }

    pub(crate) fn take(self: &Arc<Self>, client: IpAddr) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = taken.get(&client).copied().unwrap_or(0);
        if mine >= self.per_client || taken.values().sum::<usize>() >= self.total {
            return None;
        }
        taken.insert(client, mine + 1);
        Some(Slot {
            slots: self.clone(),
            client,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self
            .slots
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = taken.get_mut(&self.client) {
            *mine -= 1;
            if *mine == 0 {
                taken.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 32, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 32, 0, 2));

    #[test]
    fn a_client_gets_its_rate_and_takes_nothing_from_others() {
        let mut rate = Rate::new(200);
        let at = Duration::from_millis;
        let first = (0..1000).filter(|_| rate.allow(A, at(0))).count();
        assert_eq!(first, 200);
        assert!(rate.allow(B, at(0)));
        let later = (0..1000).filter(|_| rate.allow(A, at(100))).count();
        assert_eq!(later, 20);
        let much_later = (0..1000).filter(|_| rate.allow(A, at(60_000))).count();
        assert_eq!(much_later, 200);
    }

    #[test]
    fn many_clients_take_bounded_memory_and_old_ones_make_room() {
        let mut rate = Rate::new(1);
        for n in 0..10_000u32 {
            rate.allow(std::net::Ipv4Addr::from(n).into(), Duration::ZERO);
        }
        assert_eq!(rate.buckets.len(), MAX_CLIENTS);
        assert!(!rate.allow(A, Duration::ZERO));
        assert!(rate.allow(A, Duration::from_secs(2)));
    }

    #[test]
    fn slots_are_bounded_in_all_and_per_client_and_come_back() {
        let slots = Slots::new(3, 2);
        let held = [slots.take(A), slots.take(A)];
        assert!(held.iter().all(Option::is_some));
        assert!(slots.take(A).is_none());
        let other = slots.take(B);
        assert!(other.is_some());
        assert!(slots.take(B).is_none());
        drop(held);
        assert!(slots.take(B).is_some());
    }
}
