//! What the kernel's IPsec should hold for VXLAN to peers that are sealed, and the steps to it. Pure.
//!
//! For each such peer two policies in the host's namespace, one per direction, between the two addresses and for VXLAN's
//! port alone: what goes is sealed, or not sent; what comes was sealed, or is dropped. And the keys of its sessions, of which
//! the core says which are wanted. Where a NAT lies between, they are told to wrap what they seal into UDP, and by which
//! ports. Policies and keys carry the peer's *request id*, so one peer's keys open nothing that is
//! said to be from another, and weft finds its own again after a crash.
//!
//! INVARIANT: a key is put into the kernel once. One that is gone is reported as lost and never put again: its counter
//! would begin anew, and with it the nonces (threats row 1).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use weft_core::carriers::{EspState, SaId};
use weft_core::crypto::Secret;
use weft_core::layout::ESP_UDP_PORT;
use weft_core::session::transport::{REKEY_AFTER_DATAGRAMS, STOP_AFTER_DATAGRAMS};
use weft_core::view::{PeerNumber, View};

/// Request ids of weft begin so; the peer's number follows.
const REQUEST_ID: u32 = 0x7765_0000;
/// Long packets wear a key out so much sooner.
const LARGE_SHARE: u64 = 32;

/// The request id of a peer's policies and keys.
pub(crate) fn request_id(peer: PeerNumber) -> u32 {
    REQUEST_ID | u32::from(peer.0)
}

/// The peer that a request id stands for, if it is one of weft's.
pub(crate) fn peer_of(request_id: u32) -> Option<PeerNumber> {
    let number = u16::try_from(request_id ^ REQUEST_ID).ok()?;
    Some(PeerNumber(number))
}

/// One policy: VXLAN between two addresses is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Policy {
    pub(crate) peer: PeerNumber,
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    /// Of what this host sends.
    pub(crate) outbound: bool,
}

/// What tells one key in the kernel from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SaKey {
    pub(crate) peer: PeerNumber,
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) spi: u32,
}

/// The UDP ports between which sealed packets go through a NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) from: u16,
    pub(crate) to: u16,
}

/// A key that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sa {
    pub(crate) seals: bool,
    pub(crate) udp: Option<Ports>,
    pub(crate) key: Secret<36>,
    /// After so many packets the kernel uses it no more.
    pub(crate) last_packet: u64,
}

impl Sa {
    fn is_worn(&self, packets: u64) -> bool {
        packets >= self.last_packet / (STOP_AFTER_DATAGRAMS / REKEY_AFTER_DATAGRAMS)
    }
}

/// All that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EspPlan {
    pub(crate) policies: BTreeSet<Policy>,
    pub(crate) keys: BTreeMap<SaKey, Sa>,
}

/// A key that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// That went under it.
    pub(crate) packets: u64,
    pub(crate) udp: Option<Ports>,
}

/// What is there of weft's: policies as wanted ones look, and keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) policies: BTreeSet<Policy>,
    pub(crate) keys: BTreeMap<SaKey, Standing>,
}

/// Which keys were put into the kernel, for as long as they are wanted.
#[derive(Debug, Default)]
pub struct EspMemory {
    put: BTreeSet<SaKey>,
}

/// Plans it.
pub fn plan_esp(view: &View) -> EspPlan {
    let mut plan = EspPlan::default();
    for esp in view.vxlan.iter().flat_map(|vxlan| &vxlan.esp) {
        let (peer, mine, theirs) = (esp.number, esp.mine, esp.theirs);
        let last_packet = match esp.large {
            true => STOP_AFTER_DATAGRAMS / LARGE_SHARE,
            false => STOP_AFTER_DATAGRAMS,
        };
        for outbound in [false, true] {
            let (from, to) = if outbound {
                (mine, theirs)
            } else {
                (theirs, mine)
            };
            plan.policies.insert(Policy {
                peer,
                from,
                to,
                outbound,
            });
            let keys = if outbound {
                &esp.outbound
            } else {
                &esp.inbound
            };
            for sa in keys {
                let spi = sa.spi;
                let key = SaKey {
                    peer,
                    from,
                    to,
                    spi,
                };
                let wanted = Sa {
                    seals: outbound,
                    udp: esp.udp.map(|port| ports(outbound, port)),
                    key: sa.key.clone(),
                    last_packet,
                };
                plan.keys.insert(key, wanted);
            }
        }
    }
    plan
}

fn ports(outbound: bool, peers: u16) -> Ports {
    let (from, to) = match outbound {
        true => (ESP_UDP_PORT, peers),
        false => (peers, ESP_UDP_PORT),
    };
    Ports { from, to }
}

impl EspPlan {
    /// Nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Peers whose packets come inside UDP.
    pub fn peers_in_udp(&self) -> impl Iterator<Item = PeerNumber> {
        let in_udp = self.keys.iter().filter(|(_, sa)| sa.udp.is_some());
        in_udp.map(|(key, _)| key.peer)
    }

    /// Policies to put, then keys to put: those that take before those that seal.
    pub(crate) fn missing(
        &self,
        observed: &Observed,
        memory: &EspMemory,
    ) -> (Vec<Policy>, Vec<(SaKey, Sa)>) {
        let policies = self.policies.difference(&observed.policies);
        let absent = |key: &SaKey| !observed.keys.contains_key(key) && !memory.put.contains(key);
        let mut keys: Vec<(SaKey, Sa)> = self
            .keys
            .iter()
            .filter(|(key, _)| absent(key))
            .map(|(key, sa)| (*key, sa.clone()))
            .collect();
        keys.sort_by_key(|(_, sa)| sa.seals);
        (policies.copied().collect(), keys)
    }

    /// Keys of this process that stand and are to go by other ports from now on: a NAT chose another one.
    pub(crate) fn redirected(&self, observed: &Observed, memory: &EspMemory) -> Vec<(SaKey, Sa)> {
        let is_elsewhere = |(key, sa): &(&SaKey, &Sa)| {
            let stands = observed.keys.get(key).and_then(|standing| standing.udp);
            let is_redirected = stands.is_some() && sa.udp.is_some() && stands != sa.udp;
            is_redirected && memory.put.contains(key)
        };
        let keys = self.keys.iter().filter(is_elsewhere);
        keys.map(|(key, sa)| (*key, sa.clone())).collect()
    }

    /// What is there and not wanted.
    pub(crate) fn strays(&self, observed: &Observed) -> (Vec<SaKey>, Vec<Policy>) {
        let keys = observed.keys.keys();
        let keys = keys.filter(|key| !self.keys.contains_key(key));
        let policies = observed.policies.difference(&self.policies);
        (keys.copied().collect(), policies.copied().collect())
    }

    /// What stands, in the core's words.
    pub(crate) fn state(&self, observed: &Observed, memory: &EspMemory) -> EspState {
        let mut state = EspState::default();
        for (key, sa) in &self.keys {
            let id = SaId {
                peer: key.peer,
                seals: sa.seals,
                spi: key.spi,
            };
            let policy = Policy {
                peer: key.peer,
                from: key.from,
                to: key.to,
                outbound: sa.seals,
            };
            match observed.keys.get(key) {
                // Somebody else's under the same number is none of ours.
                Some(standing) if memory.put.contains(key) => {
                    if observed.policies.contains(&policy) {
                        state.stands.insert(id);
                    }
                    if sa.is_worn(standing.packets) {
                        state.worn.insert(id);
                    }
                }
                None if memory.put.contains(key) => drop(state.lost.insert(id)),
                _ => {}
            }
        }
        state
    }
}

impl EspMemory {
    /// This key is about to be put. Whether or not that works it is not put again.
    pub(crate) fn on_put(&mut self, key: SaKey) {
        self.put.insert(key);
    }

    /// The kernel took none of it.
    pub(crate) fn on_refused(&mut self, key: &SaKey) {
        self.put.remove(key);
    }

    /// The core never wants a key again that it once did not want.
    pub(crate) fn forget_unwanted(&mut self, plan: &EspPlan) {
        self.put.retain(|key| plan.keys.contains_key(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerNumber = PeerNumber(7);

    fn key(spi: u32) -> SaKey {
        SaKey {
            peer: PEER,
            from: [192, 0, 2, 2].into(),
            to: [192, 0, 2, 1].into(),
            spi,
        }
    }

    fn plan(spis: &[u32]) -> EspPlan {
        let wanted = |spi: &u32| {
            let sa = Sa {
                seals: false,
                udp: None,
                key: Secret::new([1; 36]),
                last_packet: STOP_AFTER_DATAGRAMS,
            };
            (key(*spi), sa)
        };
        let policy = Policy {
            peer: PEER,
            from: key(0).from,
            to: key(0).to,
            outbound: false,
        };
        EspPlan {
            policies: [policy].into(),
            keys: spis.iter().map(wanted).collect(),
        }
    }

    #[test]
    fn a_request_id_is_the_peer_s_and_others_are_left_alone() {
        for number in [0, 1, u16::MAX] {
            let number = PeerNumber(number);
            assert_eq!(peer_of(request_id(number)), Some(number));
        }
        assert_eq!(peer_of(0), None);
        assert_eq!(peer_of(16_385), None);
    }

    #[test]
    fn a_key_that_somebody_removed_is_lost_and_never_put_again() {
        let (plan, mut memory) = (plan(&[300]), EspMemory::default());
        let mut observed = Observed::default();
        let (policies, keys) = plan.missing(&observed, &memory);
        assert_eq!((policies.len(), keys.len()), (1, 1));
        memory.on_put(keys[0].0);
        observed.policies = plan.policies.clone();
        observed.keys.insert(key(300), Standing::default());
        assert_eq!(plan.state(&observed, &memory).stands.len(), 1);
        observed.keys.clear();
        let state = plan.state(&observed, &memory);
        assert_eq!((state.stands.len(), state.lost.len()), (0, 1));
        assert!(plan.missing(&observed, &memory).1.is_empty());
    }

    #[test]
    fn without_its_policy_no_key_stands() {
        let (plan, mut memory) = (plan(&[300]), EspMemory::default());
        memory.on_put(key(300));
        let mut observed = Observed::default();
        observed.keys.insert(key(300), Standing::default());
        let state = plan.state(&observed, &memory);
        assert!(state.stands.is_empty() && state.lost.is_empty());
    }

    #[test]
    fn a_key_goes_by_the_port_that_the_nat_chose_and_never_inside_udp_that_did_not_before() {
        let (mut plan, mut memory) = (plan(&[300]), EspMemory::default());
        let at = |port| Some(ports(false, port));
        let observed = |udp| Observed {
            keys: [(key(300), Standing { packets: 5, udp })].into(),
            ..Observed::default()
        };
        plan.keys.values_mut().for_each(|sa| sa.udp = at(40_000));
        let moved = |udp, memory: &EspMemory| plan.redirected(&observed(udp), memory).len();
        assert_eq!(moved(at(6785), &memory), 0, "somebody else's");
        memory.on_put(key(300));
        assert_eq!(moved(at(6785), &memory), 1);
        assert_eq!(moved(at(40_000), &memory), 0);
        assert_eq!(moved(None, &memory), 0);
        assert_eq!(plan.peers_in_udp().collect::<Vec<_>>(), vec![PEER]);
    }

    #[test]
    fn keys_of_an_earlier_process_are_strays() {
        let mut observed = Observed::default();
        observed.keys.insert(key(299), Standing::default());
        let (keys, policies) = plan(&[300]).strays(&observed);
        assert_eq!((keys, policies), (vec![key(299)], vec![]));
        assert_eq!(EspPlan::default().strays(&observed).0.len(), 1);
    }

    #[test]
    fn a_key_is_worn_a_quarter_of_the_way_to_its_end() {
        let plan = plan(&[300]);
        let sa = &plan.keys[&key(300)];
        assert!(!sa.is_worn(REKEY_AFTER_DATAGRAMS - 1) && sa.is_worn(REKEY_AFTER_DATAGRAMS));
    }
}
