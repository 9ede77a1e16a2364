//! The consistent hash of Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! §3.4: a table of slots, each naming a backend, that every node computes alike from the same backends, that gives
//! all backends nearly equal shares, and of which little changes when a backend comes or goes.

use std::net::Ipv4Addr;

/// Table sizes: primes about twice apart, so that every skip walks the whole table and a table is rarely re-sized (a
/// new size moves most slots; connections that exist are kept by connection tracking all the same).
const SIZES: [usize; 8] = [31, 61, 127, 251, 509, 1021, 2039, 4093];
/// Slots per backend while there are few: shares then differ by a tenth at most.
const SLOTS_PER_BACKEND: usize = 10;
/// Beyond this size a table only grows to give each backend two slots: loading a table costs time in proportion.
const COMFORTABLE: usize = 1021;

/// Most backends one table takes; the rest of a larger set gets no new connections.
pub const MAX_BACKENDS: usize = 2046;

/// The number of slots for this many backends.
pub fn size(backends: usize) -> usize {
    let wanted = backends * SLOTS_PER_BACKEND;
    let wanted = wanted.min(COMFORTABLE).max(backends * 2);
    let fit = SIZES.iter().copied().find(|s| *s >= wanted);
    fit.unwrap_or(SIZES[SIZES.len() - 1])
}

/// The table for `backends`, which must be distinct and in ascending order; empty when there are none. `service` sets
/// apart the tables of different services over the same backends.
pub fn table(backends: &[Ipv4Addr], service: u64) -> Vec<Ipv4Addr> {
    let backends = &backends[..backends.len().min(MAX_BACKENDS)];
    if backends.is_empty() {
        return Vec::new();
    }
    let size = size(backends.len());
    let mut slots: Vec<Option<Ipv4Addr>> = vec![None; size];
    let mut walks: Vec<Walk> = backends
        .iter()
        .map(|ip| Walk::new(*ip, service, size))
        .collect();
    let mut filled = 0;
    // Each backend in turn takes the next free slot of its own permutation.
    'all: loop {
        for (ip, walk) in backends.iter().zip(&mut walks) {
            let slot = walk.next_free(&slots);
            slots[slot] = Some(*ip);
            filled += 1;
            if filled == size {
                break 'all;
            }
        }
    }
    slots.into_iter().flatten().collect()
}

/// One backend's permutation of the slots: offset + n * skip modulo a prime visits each of them once.
struct Walk {
    at: usize,
    skip: usize,
}

impl Walk {
    fn new(ip: Ipv4Addr, service: u64, size: usize) -> Self {
        let seed = mix(service ^ mix(u64::from(u32::from(ip))));
        Self {
            at: (seed % size as u64) as usize,
            skip: (mix(seed) % (size as u64 - 1)) as usize + 1,
        }
    }

    fn next_free(&mut self, slots: &[Option<Ipv4Addr>]) -> usize {
        while slots[self.at].is_some() {
            self.at = (self.at + self.skip) % slots.len();
        }
        self.at
    }
}

/// The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): part of the agreement between nodes, never to change.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn shares(table: &[Ipv4Addr]) -> BTreeMap<Ipv4Addr, usize> {
        let mut shares = BTreeMap::new();
        for ip in table {
            *shares.entry(*ip).or_insert(0) += 1;
        }
        shares
    }

    fn backends() -> impl Strategy<Value = Vec<Ipv4Addr>> {
        proptest::collection::btree_set(any::<u32>(), 1..200)
            .prop_map(|set: BTreeSet<u32>| set.into_iter().map(Ipv4Addr::from).collect())
    }

    proptest! {
        #[test]
        fn every_backend_gets_its_share_and_none_two_slots_more(ips in backends(), service: u64) {
            let table = table(&ips, service);
            prop_assert_eq!(table.len(), size(ips.len()));
            let shares = shares(&table);
            prop_assert_eq!(shares.len(), ips.len());
            let most = shares.values().max().copied().unwrap_or(0);
            let least = shares.values().min().copied().unwrap_or(0);
            prop_assert!(most - least <= 1, "{least} to {most}");
        }

        #[test]
        fn a_backend_that_goes_moves_few_slots_of_the_others(ips in backends(), service: u64, which: prop::sample::Index) {
            let gone = ips[which.index(ips.len())];
            let rest: Vec<Ipv4Addr> = ips.iter().copied().filter(|ip| *ip != gone).collect();
            prop_assume!(!rest.is_empty() && size(rest.len()) == size(ips.len()));
            let (before, after) = (table(&ips, service), table(&rest, service));
            let moved = before.iter().zip(&after).filter(|(b, a)| **b != gone && b != a).count();
            // The paper's figure 12: a few per cent at 100 slots a backend; at ten it is more, and still a minority.
            prop_assert!(moved * 2 <= before.len(), "{moved} of {}", before.len());
        }
    }

    #[test]
    fn a_table_is_the_same_on_every_node_and_in_every_release() {
        let ips = [2, 3, 4].map(|last| Ipv4Addr::new(10, 32, 0, last));
        let drawn: String = table(&ips, 1)
            .iter()
            .map(|ip| char::from(b'0' + ip.octets()[3]))
            .collect();
        assert_eq!(drawn, "3222434443222233444423322324343");
    }

    #[test]
    fn sizes_stay_small_and_never_leave_a_backend_without_a_slot() {
        assert_eq!(
            [0, 1, 3, 4, 25, 26, 102, 103, 600].map(size),
            [31, 31, 31, 61, 251, 509, 1021, 1021, 2039]
        );
        let many: Vec<Ipv4Addr> = (0..5000u32).map(Ipv4Addr::from).collect();
        assert_eq!(shares(&table(&many, 0)).len(), MAX_BACKENDS);
        assert!(table(&[], 0).is_empty());
    }
}
