//! Two hosts on one virtual network: words always arrive, probes unless it is blocked.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

mod sealed;

const A: NodeId = NodeId([1; 32]);
const B: NodeId = NodeId([2; 32]);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn facts(peer: NodeId, theirs: &str, mine: &str) -> Facts {
    Facts {
        peer,
        number: PeerNumber(1),
        generation: Generation(1),
        consents: true,
        esp: false,
        keys: None,
        path: Some(SocketAddr::new(theirs.parse().unwrap(), 6783)),
        source: Some(mine.parse().unwrap()),
        path_mtu: Some(1500),
        mac_taken: false,
    }
}

/// Both ends and what is between them.
struct Pair {
    ends: [Carriers; 2],
    /// Where they are, each as the other one sees it.
    at: [&'static str; 2],
    now: Now,
    /// Probes pass.
    open: bool,
    /// What the second end is told does not arrive.
    deaf: bool,
    /// Probes seen on the wire.
    probes: usize,
}

impl Pair {
    fn new(trusted: [&[&str]; 2]) -> Self {
        Self::at(["192.0.2.1", "192.0.2.2"], trusted)
    }

    fn at(at: [&'static str; 2], trusted: [&[&str]; 2]) -> Self {
        let end = |id: NodeId, nets: &[&str]| {
            let nets = nets.iter().map(|text| net(text)).collect();
            Carriers::new(id, nets, Esp::Unasked, Random::from_seed(id.0))
        };
        let mut pair = Self {
            ends: [end(A, trusted[0]), end(B, trusted[1])],
            at,
            now: Now(Duration::from_secs(100)),
            open: true,
            deaf: false,
            probes: 0,
        };
        pair.device(0, Ok(()));
        pair.device(1, Ok(()));
        pair.meet(1);
        pair
    }

    /// Sessions are there, in this start of the second one.
    fn meet(&mut self, generation: u64) {
        let consents = |end: &Carriers| end.is_on();
        let [a, b] = self.at;
        let mut of_b = facts(B, b, a);
        of_b.consents = consents(&self.ends[1]);
        of_b.generation = Generation(generation);
        let mut of_a = facts(A, a, b);
        of_a.consents = consents(&self.ends[0]);
        self.set(0, vec![of_b]);
        self.set(1, vec![of_a]);
    }

    fn set(&mut self, end: usize, peers: Vec<Facts>) {
        let mut out = Vec::new();
        self.ends[end].set_peers(self.now, peers, &mut out);
        self.deliver(end, out);
    }

    /// The device that leads to the other one; there is no other.
    fn device(&mut self, end: usize, state: Result<(), String>) {
        let mut devices = Devices::default();
        match self.at[end].contains(':') {
            false => devices.v4 = state,
            true => devices.v6 = state,
        }
        let mut out = Vec::new();
        self.ends[end].set_devices(self.now, devices, &mut out);
        self.deliver(end, out);
    }

    fn deliver(&mut self, from: usize, out: Vec<Event>) {
        let (to, sender) = (1 - from, [A, B][from]);
        for event in out {
            let mut answers = Vec::new();
            match event {
                Event::Say { word, .. } if !(self.deaf && to == 1) => {
                    let word = wire::encode(&word);
                    self.ends[to].on_word(self.now, sender, &word, &mut answers);
                }
                Event::Probe {
                    host,
                    to: mac,
                    nonce,
                    ..
                } => {
                    assert_eq!(mac, vxlan_mac(&[A, B][to]));
                    assert_eq!(host.to_string(), self.at[to]);
                    self.probes += 1;
                    if self.open {
                        let mac = vxlan_mac(&sender);
                        self.ends[to].on_probe(self.now, mac, nonce, &mut answers);
                    }
                }
                Event::Say { .. } | Event::Renew { .. } | Event::Changed => {}
            }
            self.deliver(to, answers);
        }
    }

    /// Lets time pass, from one deadline to the next.
    fn pass(&mut self, time: Duration) {
        let end = self.now.plus(time);
        loop {
            let due = self.ends.iter().filter_map(Carriers::deadline).min();
            let Some(due) = due.filter(|due| *due <= end) else {
                break;
            };
            self.now = self.now.max(due);
            for at in [0, 1] {
                let mut out = Vec::new();
                self.ends[at].expire(self.now, &mut out);
                self.deliver(at, out);
            }
        }
        self.now = end;
    }

    fn carriers(&self) -> [Carrier; 2] {
        [self.ends[0].of(&B).0, self.ends[1].of(&A).0]
    }

    fn why(&self, end: usize) -> Why {
        self.ends[end].of(&[B, A][end]).1
    }
}

const BOTH_PLAIN: [Carrier; 2] = [Carrier::Vxlan; 2];
const BOTH_SEALED: [Carrier; 2] = [Carrier::Udp; 2];
const NET: &[&str] = &["192.0.2.0/24"];

#[test]
fn two_that_trust_the_network_between_them_carry_at_once() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.carriers(), BOTH_PLAIN);
    assert_eq!(pair.ends[0].of(&B).2, Some(1450));
    let view = pair.ends[0].view().unwrap();
    assert_eq!(view.mac, vxlan_mac(&A));
    assert_eq!(view.peers.len(), 1);
    assert!(view.peers[0].carries);
    // Nothing more is said about it, and probes are few.
    let before = pair.probes;
    pair.pass(Duration::from_secs(60));
    assert_eq!(pair.probes - before, 60, "one each every two seconds");
    assert_eq!(pair.carriers(), BOTH_PLAIN);
}

#[test]
fn unless_both_trust_both_addresses_not_even_a_probe_is_sent() {
    for (trusted, why) in [
        ([NET, &[]], Why::PeerListsNone),
        ([&[][..], NET], Why::NoTrustedSubnet),
        ([&[][..], &[]], Why::NoTrustedSubnet),
        ([NET, &["10.0.0.0/8"]], Why::PeerNotOpen),
        ([NET, &["192.0.2.1/32"]], Why::PeerNotOpen),
        (
            [&["192.0.2.1/32"][..], NET],
            Why::OutsideTrusted([192, 0, 2, 2].into()),
        ),
    ] {
        let mut pair = Pair::new(trusted);
        pair.pass(Duration::from_secs(600));
        assert_eq!(pair.carriers(), BOTH_SEALED, "{trusted:?}");
        assert_eq!(pair.probes, 0, "{trusted:?}");
        assert_eq!(pair.why(0), why, "{trusted:?}");
    }
}

#[test]
fn hosts_that_see_each_other_under_other_addresses_stay_sealed() {
    let mut pair = Pair::new([NET, NET]);
    // A NAT between them: the second sees the first under another address, also a trusted one.
    pair.set(1, vec![facts(A, "192.0.2.77", "192.0.2.2")]);
    pair.pass(Duration::from_secs(60));
    assert_eq!(pair.carriers(), BOTH_SEALED);
    assert_eq!(pair.why(0), Why::OtherEnds);
}

#[test]
fn a_way_that_is_blocked_is_left_within_three_seconds_and_taken_again() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    pair.open = false;
    pair.pass(Duration::from_millis(3100));
    assert_eq!(pair.carriers(), BOTH_SEALED);
    assert_eq!(pair.why(0), Why::NoAnswer);
    let before = pair.probes;
    pair.pass(Duration::from_secs(600));
    assert!(pair.probes - before < 2 * 30, "{}", pair.probes - before);
    pair.open = true;
    pair.pass(Duration::from_secs(31));
    assert_eq!(pair.carriers(), BOTH_PLAIN);
}

#[test]
fn one_lost_probe_changes_nothing() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    pair.open = false;
    pair.pass(Duration::from_millis(2100));
    pair.open = true;
    pair.pass(Duration::from_secs(5));
    assert_eq!(pair.carriers(), BOTH_PLAIN);
}

#[test]
fn a_peer_that_says_nothing_is_carried_to_for_a_while() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    // Its daemon restarts; its kernel does what it did.
    pair.deaf = true;
    pair.open = false;
    pair.pass(Duration::from_secs(7));
    assert_eq!(pair.carriers()[0], Carrier::Vxlan);
    pair.pass(Duration::from_secs(10));
    assert_eq!(pair.carriers()[0], Carrier::Udp);
}

#[test]
fn a_device_that_goes_down_is_told_and_so_is_its_return() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    pair.device(1, Err("its filter does not stand".into()));
    assert_eq!(pair.carriers(), BOTH_SEALED, "at once");
    assert_eq!(pair.why(0), Why::PeerNotOpen);
    assert!(matches!(pair.why(1), Why::Device(_)));
    pair.device(1, Ok(()));
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.carriers(), BOTH_PLAIN);
}

#[test]
fn what_a_peer_said_in_an_earlier_start_is_void() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    pair.deaf = true;
    let before = pair.probes;
    pair.ends[1] = Carriers::new(
        B,
        vec![net("10.0.0.0/8")],
        Esp::Unasked,
        Random::from_seed([9; 32]),
    );
    pair.meet(2);
    assert_eq!(pair.carriers(), BOTH_SEALED);
    pair.pass(Duration::from_secs(60));
    assert_eq!(pair.probes, before);
}

#[test]
fn who_is_gone_is_forgotten() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(10));
    pair.set(0, vec![]);
    assert_eq!(pair.ends[0].view().unwrap().peers, vec![]);
    assert_eq!(pair.ends[0].deadline(), None);
    // The other one learns it when nobody answers any more.
    pair.pass(Duration::from_secs(30));
    assert_eq!(pair.carriers(), BOTH_SEALED);
}

#[test]
fn probes_of_a_stranger_and_a_flood_get_no_answer() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_secs(1));
    let mut out = Vec::new();
    pair.ends[0].on_probe(pair.now, [2; 6], 7, &mut out);
    assert_eq!(out, vec![]);
    for nonce in 0..1000 {
        pair.ends[0].on_probe(pair.now, vxlan_mac(&B), nonce, &mut out);
    }
    assert!(out.len() <= 1, "{}", out.len());
}

#[test]
fn ipv6_between_hosts_has_a_device_of_its_own() {
    const NET6: &[&str] = &["2001:db8::/64"];
    let mut pair = Pair::at(["2001:db8::1", "2001:db8::2"], [NET6, NET6]);
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.carriers(), BOTH_PLAIN);
    let of = |pair: &Pair| pair.ends[0].view().unwrap().peers[0];
    assert_eq!(of(&pair).addr.to_string(), "2001:db8::2");
    assert_eq!((pair.ends[0].of(&B).2, of(&pair).mtu), (Some(1430), 1430));
    // The other version's is not asked.
    let devices = Devices {
        v4: Ok(()),
        ..Devices::default()
    };
    pair.ends[0].set_devices(pair.now, devices, &mut Vec::new());
    assert!(matches!(pair.why(0), Why::Device(_)));
    assert!(!of(&pair).carries);
}

#[test]
fn a_link_s_own_addresses_and_a_path_without_a_known_source_are_sealed() {
    let good = facts(B, "192.0.2.2", "192.0.2.1");
    let link = facts(B, "fe80::2", "fe80::1");
    assert_eq!(
        ends(&[net("fe80::/10")], &Esp::Unasked, &link, None),
        Err(Why::LinkLocal("fe80::2".parse().unwrap()))
    );
    assert!(plain(&facts(B, "2001:db8::2", "2001:db8::1")).is_ok());
    let stranger = "2002:db8::2";
    assert_eq!(
        plain(&facts(B, stranger, "2001:db8::1")),
        Err(Why::OutsideTrusted(stranger.parse().unwrap()))
    );
    assert_eq!(
        plain(&facts(B, "2001:db8::2", "192.0.2.1")),
        Err(Why::NoPath)
    );
    let unknown = Facts {
        source: None,
        ..good.clone()
    };
    let taken = Facts {
        mac_taken: true,
        ..good.clone()
    };
    let mapped = Facts {
        path: Some("[::ffff:192.0.2.2]:6783".parse().unwrap()),
        ..good.clone()
    };
    assert_eq!(plain(&unknown), Err(Why::NoPath));
    assert_eq!(plain(&taken), Err(Why::MacTaken));
    assert_eq!(plain(&mapped), plain(&good));
}

#[test]
fn what_leaves_too_little_for_ipv6_is_left_to_userspace() {
    let mut pair = Pair::new([NET, NET]);
    pair.pass(Duration::from_millis(1));
    let takes = |pair: &mut Pair, octets| {
        let path_mtu = Some(octets);
        let good = facts(B, "192.0.2.2", "192.0.2.1");
        pair.set(0, vec![Facts { path_mtu, ..good }]);
        pair.why(0)
    };
    assert_eq!(takes(&mut pair, 1330), Why::BothTrust);
    assert_eq!(takes(&mut pair, 1329), Why::SmallPath(1279));
    assert_eq!(pair.carriers(), [Carrier::Udp, Carrier::Vxlan]);
    assert!(!pair.ends[0].view().unwrap().peers[0].carries);
    assert_eq!(takes(&mut pair, 1500), Why::BothTrust);
}

/// What an older weft says and hears of an opening, octet for octet.
#[test]
fn words_are_as_they_ever_were() {
    let opening = Opening {
        yours: [192, 0, 2, 1].into(),
        mine: [192, 0, 2, 2].into(),
        spi: Some(5),
        confirmed: true,
        knows: None,
    };
    let said = wire::encode(&Word::open(opening));
    assert_eq!(said, [0, 192, 0, 2, 1, 192, 0, 2, 2, 1, 5, 1, 0]);
    assert_eq!(wire::encode(&Word::Shut), [1]);
    let six = "2001:db8::1".parse().unwrap();
    let said = wire::encode(&Word::open(opening.between(six, six)));
    assert_eq!((said[0], said.len()), (5, 1 + 16 + 16 + 4));
}

fn plain(facts: &Facts) -> Result<Ends, Why> {
    let trusted = [net("192.0.2.0/24"), net("2001:db8::/32")];
    ends(&trusted, &Esp::Unasked, facts, None)
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Op {
    Pass(u16),
    Block(bool),
    Deafen(bool),
    Device(usize, bool),
    Meet(u8),
    Part(usize),
    Garble(usize, Vec<u8>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u16..5000).prop_map(Op::Pass),
        1 => any::<bool>().prop_map(Op::Block),
        1 => any::<bool>().prop_map(Op::Deafen),
        1 => (0usize..2, any::<bool>()).prop_map(|(end, up)| Op::Device(end, up)),
        1 => (1u8..3).prop_map(Op::Meet),
        1 => (0usize..2).prop_map(Op::Part),
        1 => (0usize..2, proptest::collection::vec(any::<u8>(), 0..12))
            .prop_map(|(end, bytes)| Op::Garble(end, bytes)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens: in the clear only where this end trusts it, its device is up, and the other end said the same; and
    /// when all is well again, both carry.
    #[test]
    fn nothing_is_ever_in_the_clear_that_both_did_not_agree_on(ops in proptest::collection::vec(op(), 0..40)) {
        let mut pair = Pair::new([NET, NET]);
        for op in ops {
            match op {
                Op::Pass(millis) => pair.pass(Duration::from_millis(millis.into())),
                Op::Block(blocked) => pair.open = !blocked,
                Op::Deafen(deaf) => pair.deaf = deaf,
                Op::Device(end, up) => pair.device(end, if up { Ok(()) } else { Err("down".into()) }),
                Op::Meet(generation) => pair.meet(generation.into()),
                Op::Part(end) => pair.set(end, vec![]),
                Op::Garble(end, bytes) => {
                    let mut out = Vec::new();
                    let from = [B, A][end];
                    pair.ends[end].on_word(pair.now, from, &bytes, &mut out);
                }
            }
            for end in &pair.ends {
                for peer in end.peers.values() {
                    let carries = peer.choice(&end.devices, &end.esp_state).0 == Carrier::Vxlan;
                    let agreed = end.devices.v4.is_ok() && peer.ends.is_ok() && peer.told == peer.ends.clone().ok();
                    prop_assert!(!carries || agreed);
                }
            }
        }
        pair.open = true;
        pair.deaf = false;
        pair.device(0, Ok(()));
        pair.device(1, Ok(()));
        // Both have lost their sessions and made new ones.
        pair.set(0, vec![]);
        pair.set(1, vec![]);
        pair.meet(3);
        pair.pass(Duration::from_secs(61));
        prop_assert_eq!(pair.carriers(), BOTH_PLAIN);
    }

    #[test]
    fn the_choice_is_plain_only_if_nothing_speaks_against_it(
        device in any::<bool>(), own in any::<bool>(), told in 0u8..3, reaches in proptest::option::of(any::<bool>()),
    ) {
        let here = Ends { mine: [192, 0, 2, 1].into(), theirs: [192, 0, 2, 2].into(), seal: Seal::Plain };
        let other = Ends { mine: [192, 0, 2, 9].into(), ..here };
        let mut devices = Devices { v6: Ok(()), ..Devices::default() };
        if device { devices.v4 = Ok(()) }
        let ends = if own { Ok(here) } else { Err(Why::NoPath) };
        let told = [None, Some(here), Some(other)][usize::from(told)];
        let (carrier, why) = choose(&devices, &ends, told, false, Ok(()), reaches);
        let plain = device && own && told == Some(here) && reaches == Some(true);
        prop_assert_eq!(carrier == Carrier::Vxlan, plain);
        prop_assert_eq!(why == Why::BothTrust, plain);
    }
}
