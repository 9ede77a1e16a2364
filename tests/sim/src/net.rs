//! Links between hosts: latency of their own, and weather over all.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use weft_core::crypto::Random;

/// The underlay address of host `n`.
pub fn address_of(host: usize) -> SocketAddr {
    let [high, low] = u16::try_from(host).unwrap_or(u16::MAX).to_be_bytes();
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 168, high, low)), 6783)
}

/// The host that has this address.
pub fn host_of(address: SocketAddr) -> Option<usize> {
    match address.ip() {
        IpAddr::V4(ip) if ip.octets()[..2] == [192, 168] => {
            Some(usize::from(u16::from_be_bytes([
                ip.octets()[2],
                ip.octets()[3],
            ])))
        }
        _ => None,
    }
}

/// What befalls datagrams on all links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weather {
    /// Of a thousand datagrams so many are lost.
    pub loss: u64,
    /// Of a thousand so many come twice.
    pub twice: u64,
    /// Each is late by up to so many microseconds: they overtake each other.
    pub jitter: u64,
}

/// All links.
pub struct Net {
    /// What befalls datagrams now.
    pub weather: Weather,
    hosts: usize,
    latency: Vec<Duration>,
    blocked: BTreeMap<(usize, usize), u32>,
}

impl Net {
    /// Links of 0.2 to 0.5 ms, or in one world of four up to 40 ms.
    pub fn new(hosts: usize, random: &mut Random) -> Self {
        let spread = if random.range(4) == 0 { 40_000 } else { 300 };
        let mut latency = vec![Duration::ZERO; hosts * hosts];
        for from in 0..hosts {
            for to in 0..from {
                let one = Duration::from_micros(200 + random.range(spread));
                latency[from * hosts + to] = one;
                latency[to * hosts + from] = one;
            }
        }
        Self {
            weather: Weather::default(),
            hosts,
            latency,
            blocked: BTreeMap::new(),
        }
    }

    /// Gives every link this latency.
    pub fn set_latency(&mut self, latency: Duration) {
        self.latency.fill(latency);
    }

    /// Nothing passes from `from` to `to` until as many unblocks.
    pub fn block(&mut self, from: usize, to: usize) {
        *self.blocked.entry((from, to)).or_default() += 1;
    }

    /// Takes one block back.
    pub fn unblock(&mut self, from: usize, to: usize) {
        if let Some(count) = self.blocked.get_mut(&(from, to)) {
            *count -= 1;
            if *count == 0 {
                self.blocked.remove(&(from, to));
            }
        }
    }

    /// The delays after which copies of a datagram arrive; none when it is lost.
    pub fn carry(&self, from: usize, to: usize, random: &mut Random) -> Vec<Duration> {
        // All three are always drawn: a fault must not shift the numbers that come after it more than it has to.
        let (lost, twice) = (random.range(1000), random.range(1000));
        let jitter = [
            random.range(self.weather.jitter + 1),
            random.range(self.weather.jitter + 1),
        ];
        if self.blocked.contains_key(&(from, to)) || lost < self.weather.loss {
            return Vec::new();
        }
        let copies = if twice < self.weather.twice { 2 } else { 1 };
        let latency = self.latency[from * self.hosts + to];
        jitter[..copies]
            .iter()
            .map(|late| latency + Duration::from_micros(*late))
            .collect()
    }
}
