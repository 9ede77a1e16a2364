//! Two hosts that do ESP, each with a kernel that holds what it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::crypto::Secret;
use crate::layout::ESP_UDP_PORT;
use crate::session::transport::EspKeys;

/// One end: the machine, and its kernel.
struct End {
    carriers: Carriers,
    stands: BTreeSet<SaId>,
    /// And whether inside UDP.
    put: BTreeMap<SaId, bool>,
    /// All that it once wanted and then did not.
    gone: BTreeSet<SaId>,
}

struct Sealed {
    ends: [End; 2],
    now: Now,
    /// The number of the present session.
    session: u32,
    /// Words get lost.
    deaf: bool,
    /// The first end is behind one: the second sees it under another address.
    nat: bool,
    renewals: usize,
}

/// The SPI of what comes to this end in this session.
fn spi(session: u32, end: usize) -> u32 {
    1000 + session * 2 + u32::try_from(end).unwrap()
}

impl Sealed {
    fn new(trusted: [&[&str]; 2]) -> Self {
        let end = |id: NodeId, nets: &[&str]| End {
            carriers: Carriers::new(
                id,
                nets.iter().map(|text| net(text)).collect(),
                Esp::Ready,
                Random::from_seed(id.0),
            ),
            stands: BTreeSet::new(),
            put: BTreeMap::new(),
            gone: BTreeSet::new(),
        };
        let mut sealed = Self {
            ends: [end(A, trusted[0]), end(B, trusted[1])],
            now: Now(Duration::from_secs(100)),
            session: 0,
            deaf: false,
            nat: false,
            renewals: 0,
        };
        for at in [0, 1] {
            sealed.act(at, |carriers, now, out| {
                let (v4, v6) = (Ok(()), Ok(()));
                carriers.set_devices(now, Devices { v4, v6 }, out)
            });
        }
        sealed.agree();
        sealed
    }

    /// A new session.
    fn agree(&mut self) {
        self.session += 1;
        self.see();
    }

    /// What each end sees now, in the present session.
    fn see(&mut self) {
        for at in [0, 1] {
            let mut facts = self.facts(at, "192.0.2.");
            if self.nat && at == 0 {
                facts.source = Some([10, 0, 0, 1].into());
            }
            self.act(at, |carriers, now, out| {
                carriers.set_peers(now, vec![facts], out)
            });
        }
    }

    fn facts(&self, at: usize, net: &str) -> Facts {
        let other = 1 - at;
        let half = |end: usize| Secret::new([u8::try_from(end).unwrap(); 36]);
        let address = |end: usize| format!("{net}{}", end + 1);
        Facts {
            consents: !self.ends[other].carriers.trusted.is_empty(),
            esp: true,
            keys: Some(SessionKeys {
                inbound: spi(self.session, at),
                outbound: spi(self.session, other),
                keys: EspKeys {
                    send: half(other),
                    receive: half(at),
                },
            }),
            ..facts([A, B][other], &address(other), &address(at))
        }
    }

    fn act(&mut self, at: usize, what: impl FnOnce(&mut Carriers, Now, &mut Vec<Event>)) {
        let mut out = Vec::new();
        what(&mut self.ends[at].carriers, self.now, &mut out);
        self.deliver(at, out);
    }

    fn deliver(&mut self, from: usize, out: Vec<Event>) {
        let (to, sender) = (1 - from, [A, B][from]);
        for event in out {
            match event {
                Event::Say { word, .. } if !self.deaf => {
                    let word = wire::encode(&word);
                    self.act(to, |carriers, now, out| {
                        carriers.on_word(now, sender, &word, out)
                    });
                }
                Event::Probe { nonce, .. } if self.arrives(from) => {
                    let mac = vxlan_mac(&sender);
                    self.act(to, |carriers, now, out| {
                        carriers.on_probe(now, mac, nonce, out)
                    });
                }
                Event::Renew { .. } => self.renewals += 1,
                _ => {}
            }
        }
    }

    /// What goes in the clear does; otherwise the kernel of this end seals with a key that the other one's opens.
    fn arrives(&self, from: usize) -> bool {
        let view = self.ends[from].carriers.view();
        let mut peers = view.into_iter().flat_map(|view| view.peers);
        if peers.any(|peer| peer.seal == Seal::Plain) {
            return true;
        }
        let opens = |id: &SaId| {
            let at_peer = SaId {
                seals: false,
                ..*id
            };
            let other = &self.ends[1 - from];
            // Each takes the other's packets inside UDP alone, or never there.
            other.stands.contains(&at_peer)
                && other.put.get(&at_peer) == self.ends[from].put.get(id)
        };
        self.ends[from]
            .stands
            .iter()
            .any(|id| id.seals && opens(id))
    }

    /// Both kernels get what is wanted, and tell.
    fn reconcile(&mut self) {
        for at in [0, 1] {
            self.reconcile_one(at);
        }
    }

    fn reconcile_one(&mut self, at: usize) {
        let end = &mut self.ends[at];
        let wanted = wanted(&end.carriers);
        assert!(
            !wanted.keys().any(|id| end.gone.contains(id)),
            "a key is wanted again: {wanted:?}"
        );
        let dropped = end.put.extract_if(.., |id, _| !wanted.contains_key(id));
        end.gone.extend(dropped.map(|(id, _)| id));
        for (id, udp) in &wanted {
            let before = end.put.insert(*id, *udp);
            assert!(before.is_none_or(|before| before == *udp), "no kernel does");
            if before.is_none() {
                end.stands.insert(*id);
            }
        }
        end.stands.retain(|id| wanted.contains_key(id));
        let lost = end.put.keys().filter(|id| !end.stands.contains(id));
        let state = EspState {
            lost: lost.copied().collect(),
            stands: end.stands.clone(),
            ..EspState::default()
        };
        self.act(at, |carriers, now, out| carriers.set_esp(now, state, out));
    }

    /// Time passes, and kernels are looked at each second.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds * 10 {
            self.now = self.now.plus(Duration::from_millis(100));
            for at in [0, 1] {
                self.act(at, |carriers, now, out| carriers.expire(now, out));
            }
            self.reconcile();
        }
    }

    /// New sessions as they are asked for: one end may find out later than the other, and then wants keys of its own.
    fn settle(&mut self) {
        for _ in 0..2 {
            self.agree();
            self.pass(5);
        }
        assert_eq!(self.carriers(), BOTH);
    }

    fn carriers(&self) -> [Carrier; 2] {
        let of = |at: usize| self.ends[at].carriers.of(&[A, B][1 - at]).0;
        [of(0), of(1)]
    }
}

fn wanted(carriers: &Carriers) -> BTreeMap<SaId, bool> {
    let peers = carriers.view().map(|view| view.esp).unwrap_or_default();
    let of = |peer: &EspPeer| {
        let (number, inbound, outbound) =
            (peer.number, peer.inbound.clone(), peer.outbound.clone());
        let udp = peer.udp.is_some();
        let id = move |seals: bool, spi: u32| {
            let peer = number;
            (SaId { peer, seals, spi }, udp)
        };
        let inbound = inbound.into_iter().map(move |sa| id(false, sa.spi));
        let outbound = outbound.into_iter().map(move |sa| id(true, sa.spi));
        inbound.chain(outbound).collect::<Vec<_>>()
    };
    peers.iter().flat_map(of).collect()
}

const BOTH: [Carrier; 2] = [Carrier::Esp; 2];

#[test]
fn two_that_do_esp_use_it_once_both_kernels_have_the_keys() {
    let mut pair = Sealed::new([&[], &[]]);
    assert_eq!(pair.carriers(), [Carrier::Udp; 2]);
    pair.pass(5);
    assert_eq!(pair.carriers(), BOTH);
    let view = pair.ends[0].carriers.view().unwrap();
    assert_eq!(view.peers[0].seal, Seal::Esp);
    assert_eq!(view.peers[0].mtu, 1416);
    assert_eq!(pair.renewals, 0);
}

#[test]
fn where_one_end_alone_trusts_the_network_both_seal() {
    for trusted in [[&["192.0.2.0/24"][..], &[]], [&[], &["192.0.2.0/24"]]] {
        let mut pair = Sealed::new(trusted);
        pair.pass(5);
        assert_eq!(pair.carriers(), BOTH);
    }
    // Both list subnets, but one of them another one.
    let mut pair = Sealed::new([&["192.0.2.0/24"], &["198.51.100.0/24"]]);
    pair.pass(5);
    assert_eq!(pair.carriers(), BOTH);
    let mut pair = Sealed::new([&["192.0.2.0/24"], &["192.0.2.0/24"]]);
    pair.pass(5);
    assert_eq!(pair.carriers(), [Carrier::Vxlan; 2]);
}

#[test]
fn new_keys_take_over_without_a_moment_on_another_carrier() {
    let mut pair = Sealed::new([&[], &[]]);
    pair.pass(5);
    for deaf in [false, true, false] {
        pair.deaf = deaf;
        pair.agree();
        for _ in 0..50 {
            assert_eq!(pair.carriers(), BOTH);
            assert!(pair.arrives(0) && pair.arrives(1));
            pair.now = pair.now.plus(Duration::from_millis(20));
            pair.reconcile();
        }
        pair.deaf = false;
        pair.pass(20);
        assert_eq!(pair.carriers(), BOTH);
        let newest = spi(pair.session, 0);
        let inbound = &pair.ends[0].carriers.view().unwrap().esp[0].inbound;
        let numbers: Vec<u32> = inbound.iter().map(|sa| sa.spi).collect();
        assert_eq!(numbers, vec![newest], "former keys go");
    }
    assert_eq!(pair.renewals, 0);
}

#[test]
fn lost_keys_are_never_used_again_and_a_new_session_brings_new_ones() {
    let mut pair = Sealed::new([&[], &[]]);
    pair.pass(5);
    pair.ends[0].stands.clear();
    pair.reconcile();
    assert_eq!(pair.carriers(), [Carrier::Udp; 2], "the peer is told");
    assert_eq!(pair.renewals, 1);
    pair.pass(11);
    assert_eq!(pair.carriers(), [Carrier::Udp; 2]);
    assert_eq!(pair.renewals, 3, "asked again, not too often");
    pair.agree();
    pair.pass(5);
    assert_eq!(pair.carriers(), BOTH);
}

#[test]
fn between_other_addresses_other_keys_are_used() {
    for (elsewhere, mtu) in [("198.51.100.", 1416), ("2001:db8::", 1396)] {
        let mut pair = Sealed::new([&[], &[]]);
        pair.pass(5);
        let is_there = |pair: &mut Sealed| {
            for at in [0, 1] {
                let facts = pair.facts(at, elsewhere);
                pair.act(at, |carriers, now, out| {
                    carriers.set_peers(now, vec![facts], out)
                });
            }
            pair.pass(5);
        };
        is_there(&mut pair);
        assert_eq!(pair.carriers(), [Carrier::Udp; 2]);
        assert!(pair.renewals >= 2);
        pair.session += 1;
        is_there(&mut pair);
        assert_eq!(pair.carriers(), BOTH);
        assert_eq!(pair.ends[0].carriers.of(&B).2, Some(mtu));
    }
}

#[test]
fn through_a_nat_both_seal_inside_udp_with_keys_of_their_own() {
    let mut pair = Sealed::new([&[], &[]]);
    pair.nat = true;
    pair.see();
    pair.pass(10);
    assert_eq!(pair.carriers(), [Carrier::Udp; 2]);
    assert!(pair.renewals >= 2);
    pair.settle();
    let esp = |at: usize, pair: &Sealed| pair.ends[at].carriers.view().unwrap().esp[0].clone();
    assert_eq!(esp(1, &pair).udp, Some(ESP_UDP_PORT));
    assert_eq!(pair.ends[0].carriers.of(&B).2, Some(1408));
    // The NAT took another port; from elsewhere nobody can say so.
    for (from, port) in [([192, 0, 2, 7], ESP_UDP_PORT), ([192, 0, 2, 1], 40_000)] {
        pair.act(1, |carriers, now, out| {
            carriers.set_esp_port(now, PeerNumber(1), (from.into(), 40_000), out)
        });
        assert_eq!(esp(1, &pair).udp, Some(port));
    }
    pair.agree();
    pair.pass(20);
    assert_eq!(pair.carriers(), BOTH);
    assert_eq!(esp(1, &pair).udp, Some(40_000), "new keys, the same way");
    // The NAT is gone.
    pair.nat = false;
    pair.see();
    pair.pass(10);
    pair.settle();
    assert_eq!(esp(1, &pair).udp, None);
}

#[test]
fn of_two_peers_behind_one_address_the_first_has_it_until_it_is_gone() {
    let mut pair = Sealed::new([&[], &[]]);
    pair.pass(5);
    let first = pair.facts(1, "192.0.2.");
    let other = NodeId([0; 32]);
    let second = Facts {
        peer: other,
        number: PeerNumber(2),
        ..first.clone()
    };
    let both = vec![second.clone(), first];
    pair.act(1, |carriers, now, out| carriers.set_peers(now, both, out));
    let carriers = &pair.ends[1].carriers;
    assert_eq!(carriers.of(&A).0, Carrier::Esp);
    let taken = Why::AddressTaken([192, 0, 2, 1].into());
    assert_eq!(carriers.of(&other).1, taken);
    assert_eq!(carriers.view().unwrap().esp.len(), 1);
    pair.act(1, |carriers, now, out| {
        carriers.set_peers(now, vec![second], out)
    });
    assert_ne!(pair.ends[1].carriers.of(&other).1, taken);
}

#[test]
fn a_host_whose_kernel_has_no_esp_says_so() {
    let lacking = Esp::Lacking("no such thing".to_owned());
    let facts = Facts {
        esp: true,
        ..facts(B, "192.0.2.2", "192.0.2.1")
    };
    let why = ends(&[], &lacking, &facts, None).unwrap_err();
    assert!(why.to_string().contains("no such thing"), "{why}");
    let facts = Facts {
        esp: false,
        ..facts
    };
    assert_eq!(ends(&[], &Esp::Ready, &facts, None), Err(Why::PeerLacksEsp));
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Op {
    Pass(u8),
    Agree,
    Flush(usize),
    Deaf(bool),
    Reconcile(usize),
    Nat(bool),
    Lose,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0u8..15).prop_map(Op::Pass),
        3 => Just(Op::Agree),
        1 => (0usize..2).prop_map(Op::Flush),
        1 => any::<bool>().prop_map(Op::Deaf),
        2 => (0usize..2).prop_map(Op::Reconcile),
        1 => any::<bool>().prop_map(Op::Nat),
        1 => Just(Op::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The kernels' own checks are in `reconcile`: no key is ever wanted a second time.
    #[test]
    fn whatever_happens_no_key_is_used_twice_and_in_the_end_both_seal(ops in proptest::collection::vec(op(), 0..30)) {
        let mut pair = Sealed::new([&[], &[]]);
        for op in ops {
            match op {
                Op::Pass(seconds) => pair.pass(seconds.into()),
                Op::Agree => pair.agree(),
                Op::Flush(at) => pair.ends[at].stands.clear(),
                Op::Deaf(deaf) => pair.deaf = deaf,
                Op::Reconcile(at) => pair.reconcile_one(at),
                Op::Nat(nat) => {
                    pair.nat = nat;
                    pair.see();
                }
                Op::Lose => {
                    for at in [0, 1] {
                        pair.act(at, |carriers, now, out| carriers.set_peers(now, vec![], out));
                    }
                    // Whoever had no session has new keys with the next one.
                    pair.reconcile();
                    pair.agree();
                }
            }
        }
        pair.deaf = false;
        pair.reconcile();
        pair.agree();
        pair.pass(70);
        // Keys that were lost before call for one more session, and so does a NAT that is found or gone.
        for _ in 0..2 {
            if pair.carriers() != BOTH {
                pair.agree();
                pair.pass(70);
            }
        }
        prop_assert_eq!(pair.carriers(), BOTH);
    }
}
