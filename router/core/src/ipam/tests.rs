use super::*;
use crate::model::ClusterId;
use proptest::prelude::*;
use std::time::Duration;

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn plan() -> AddressPlan {
    AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap()
}

fn small() -> AddressPlan {
    AddressPlan::new("10.9.0.0/22".parse().unwrap(), &ClusterId([7; 16])).unwrap()
}

fn founder(plan: AddressPlan) -> Allocator {
    let ring = Ring::compute(node(1), plan.range, &[], &BTreeSet::new());
    Allocator::new(node(1), plan, ring, &Stored::default(), Now::default())
}

fn at(seconds: u64) -> Now {
    Now(Duration::from_secs(seconds))
}

#[test]
fn the_founder_owns_all_and_a_newcomer_gets_half_of_the_largest_block() {
    let plan = plan();
    let mut allocator = founder(plan);
    let net = plan.default_network();
    assert_eq!(allocator.allocate(&net).unwrap().to_string(), "10.32.0.1");
    let grants = allocator.donation_for_newcomer(node(2));
    let ring = Ring::compute(
        node(1),
        plan.range,
        &grants.iter().map(|g| (node(1), *g)).collect::<Vec<_>>(),
        &BTreeSet::new(),
    );
    assert_eq!(&ring, allocator.ring());
    let prefixes: Vec<String> = ring
        .prefixes(&node(2), &plan)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(prefixes, ["10.32.192.0/18"]);
    assert_eq!(ring.owner("10.47.255.1".parse().unwrap()), Some(node(2)));
    assert_eq!(ring.owner("10.32.0.1".parse().unwrap()), Some(node(1)));
    assert_eq!(ring.owner("10.48.0.0".parse().unwrap()), None);
    let vips = plan.vips();
    assert!(
        ring.prefixes(&node(1), &plan)
            .iter()
            .all(|p| !vips.contains(p))
    );
}

#[test]
fn first_last_and_dns_addresses_are_never_handed_out() {
    let plan = small();
    let mut allocator = founder(plan);
    let default = plan.default_network();
    let mut got = BTreeSet::new();
    while let Ok(ip) = allocator.allocate(&default) {
        assert!(got.insert(ip) && default.contains(&ip));
    }
    assert_eq!(got.len(), (1 << (32 - default.prefix_len())) - 2);
    let vip = allocator.allocate_vip().unwrap();
    assert_ne!(vip, plan.dns4());
    assert_eq!(u32::from(vip), u32::from(plan.dns4()) + 1);
    let wrong = allocator.allocate_exact(plan.dns4(), &plan.vips());
    assert!(matches!(wrong, Err(ExactError::Unusable { .. })));
}

#[test]
fn a_freed_address_rests_also_across_a_restart() {
    let plan = small();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let ip = allocator.allocate(&net).unwrap();
    let mut stored = Stored::default();
    stored.apply(&allocator.update(at(0), &allocator.ring().clone(), &BTreeSet::from([ip]), &[]));
    stored.apply(&allocator.update(at(5), &allocator.ring().clone(), &BTreeSet::new(), &[]));
    assert_eq!(
        allocator.allocate_exact(ip, &net),
        Err(ExactError::Resting(ip))
    );
    assert_ne!(allocator.allocate(&net).unwrap(), ip);
    let again = Allocator::new(node(1), plan, allocator.ring().clone(), &stored, at(10));
    assert_eq!(again.deadline(), Some(at(70)));
    stored.apply(&allocator.expire(at(65)));
    assert_eq!(allocator.allocate_exact(ip, &net), Ok(()));
    assert_eq!(
        allocator.allocate_exact(ip, &net),
        Err(ExactError::InUse(ip))
    );
    assert_eq!(stored, Stored::default());
}

#[test]
fn one_address_asked_for_is_given_away_when_it_is_free() {
    let plan = plan();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let ip = "10.32.7.7".parse().unwrap();
    allocator.donate_exact(ip, node(3)).unwrap();
    assert_eq!(
        allocator.ring().parts(&node(3)),
        [(u32::from(ip), u32::from(ip))]
    );
    let error = allocator.allocate_exact(ip, &net);
    assert_eq!(error, Err(ExactError::NotOurs { ip, owner: node(3) }));
    let taken = allocator.allocate(&net).unwrap();
    assert_eq!(
        allocator.donate_exact(taken, node(3)),
        Err(ExactError::InUse(taken).into())
    );
}

#[test]
fn one_who_has_run_out_gives_nothing_and_says_so() {
    let plan = small();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let mut got = BTreeSet::new();
    while let Ok(ip) = allocator.allocate(&net) {
        got.insert(ip);
    }
    // The two that are no addresses are left, and of no use to anybody.
    assert_eq!(allocator.free(&net), 2);
    assert_eq!(allocator.donate(&net, node(2)), Err(Exhausted(net).into()));
    // The very last one goes to who asks for it.
    let last = *got.last().unwrap();
    allocator.update(at(0), &allocator.ring().clone(), &got, &[]);
    allocator.release(last, at(0));
    assert_eq!(allocator.donate(&net, node(2)), Err(Exhausted(net).into()));
    allocator.expire(at(60));
    // With the address that is none: two neighbours that are no block of two.
    let grant = allocator.donate(&net, node(2)).unwrap();
    assert_eq!(Ipv4Addr::from(grant.start), last);
    assert_eq!(allocator.free_of(&node(2), &net), 1);
}

#[test]
fn a_gift_lies_beside_what_the_receiver_owns_where_it_can() {
    let plan = plan();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    allocator.donation_for_newcomer(node(2));
    allocator.donation_for_newcomer(node(3));
    let prefixes = |allocator: &Allocator, n: u8| -> Vec<String> {
        let prefixes = allocator.ring().prefixes(&node(n), &plan);
        prefixes.iter().map(ToString::to_string).collect()
    };
    assert_eq!(prefixes(&allocator, 2), ["10.32.128.0/17"]);
    assert_eq!(prefixes(&allocator, 3), ["10.32.64.0/18"]);
    // The lower half of what is left is the highest that touches nobody; the upper one touches node 3.
    allocator.donate(&net, node(3)).unwrap();
    assert_eq!(prefixes(&allocator, 3), ["10.32.32.0/19", "10.32.64.0/18"]);
    assert_eq!(allocator.ring().parts(&node(3)).len(), 2);
    let mut low = founder(plan);
    for ip in ["10.32.63.255", "10.32.191.255"] {
        low.allocate_exact(ip.parse().unwrap(), &net).unwrap();
    }
    // 64/18 and 128/18 are equally large and free: who owns what follows gets the upper half of the lower one.
    low.donate_exact("10.32.128.0".parse().unwrap(), node(4))
        .unwrap();
    low.donate(&net, node(4)).unwrap();
    assert_eq!(low.ring().parts_in(&node(4), &net).len(), 1);
}

#[test]
fn what_voters_guard_is_not_given_away() {
    let plan = small();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let reserve = allocator.wanted(&net).unwrap();
    let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
    allocator.set_locked(vec![(first, reserve.0 - 1)], false);
    let given = allocator.donate(&net, node(2)).unwrap();
    assert_eq!((given.start, given.last), reserve);
    // The rest is guarded, whether a whole block or one address is asked for.
    let guarded = allocator.wanted(&net).unwrap();
    let error = NoGift::Guarded(guarded.0, guarded.1);
    assert_eq!(allocator.donate(&net, node(2)), Err(error));
    let ip = Ipv4Addr::from(first + 1);
    let error = NoGift::Guarded(first + 1, first + 1);
    assert_eq!(allocator.donate_exact(ip, node(2)), Err(error));
    allocator.set_locked(vec![(last, last)], true);
    assert!(allocator.donate(&net, node(2)).is_ok());
}

#[test]
fn one_who_can_set_no_guards_gives_ever_smaller_pieces() {
    let plan = plan();
    let net = plan.default_network();
    let mut allocator = founder(plan);
    let (start, last) = allocator.wanted(&net).unwrap();
    allocator.set_locked(vec![(u32::from(net.network()), start - 1)], true);
    let sizes: Vec<u32> = (2..6)
        .map(|n| allocator.donate(&net, node(n)).unwrap())
        .map(|grant| grant.last - grant.start + 1)
        .collect();
    let half = (last - start).div_ceil(2);
    assert_eq!(sizes, [half, half / 2, half / 4, half / 8]);
}

/// Node 1 has given a part to node 2.
fn with_a_gift() -> (AddressPlan, Grant, Ring) {
    let plan = plan();
    let mut allocator = founder(plan);
    let donated = allocator.donate(&plan.default_network(), node(2)).unwrap();
    (plan, donated, allocator.ring().clone())
}

#[test]
fn a_removed_node_s_part_is_taken_over_and_the_higher_epoch_holds() {
    let (plan, donated, ring) = with_a_gift();
    let (start, last) = (donated.start, donated.last);
    let removed = BTreeSet::from([node(2)]);
    let compute = |more: &[(NodeId, Grant)]| {
        let mut grants = vec![(node(1), donated)];
        grants.extend(more);
        Ring::compute(node(1), plan.range, &grants, &removed)
    };
    let voted = (node(3), ring.takeover(start, last, node(3), false));
    assert_eq!(compute(&[voted]).parts(&node(3)), [(start, last)]);
    // Nobody takes from one who is there.
    let theft = ring.takeover(start, last, node(3), true);
    let nobody = BTreeSet::new();
    let kept = Ring::compute(
        node(1),
        plan.range,
        &[(node(1), donated), (node(3), theft)],
        &nobody,
    );
    assert_eq!(kept.parts(&node(2)), [(start, last)]);
    // Both sides of a split took it by force: one holds, everywhere the same; and a second time wins.
    let [four, five] = [4, 5].map(|n| (node(n), ring.takeover(start, last, node(n), true)));
    assert_eq!(compute(&[four, five]), compute(&[five, four]));
    let again = compute(&[five]).takeover(start, last, node(5), true);
    let held = compute(&[four, five, (node(5), again)]);
    assert_eq!(held.parts(&node(5)), [(start, last)]);
}

#[test]
fn what_was_too_late_counts_no_more_when_the_faster_one_is_removed_in_turn() {
    let (plan, donated, ring) = with_a_gift();
    let (start, last) = (donated.start, donated.last);
    let voted = (node(3), ring.takeover(start, last, node(3), false));
    let forced = (node(4), ring.takeover(start, last, node(4), true));
    let grants = [(node(1), donated), voted, forced];
    let compute = |grants: &[(NodeId, Grant)], removed: &[u8]| {
        let removed = removed.iter().map(|n| node(*n)).collect();
        Ring::compute(node(1), plan.range, grants, &removed)
    };
    assert_eq!(compute(&grants, &[2]).parts(&node(3)), [(start, last)]);
    // Node 4 may be anywhere; what node 3 has left its voters must let go first.
    let left = compute(&grants, &[2, 3]);
    assert_eq!(left.parts(&node(3)), [(start, last)]);
    let heir = (node(5), left.takeover(start, last, node(5), false));
    let after = compute(&[&grants[..], &[heir]].concat(), &[2, 3]);
    assert_eq!(after.parts(&node(5)), [(start, last)]);
}

#[test]
fn whoever_steals_a_piece_of_a_gift_gets_no_more_than_that() {
    let plan = plan();
    let start = u32::from(plan.range.network());
    let grant = |first: u32, last: u32, to: u8, version: u64| Grant {
        start: start + first,
        last: start + last,
        to: node(to),
        version,
        epoch: 0,
    };
    // Node 2 was given all, gave 8 to node 3, which was removed, and then 0..=15 to node 4 when node 5 had said that 8 is
    // its own.
    let grants = [
        (node(1), grant(0, 255, 2, 1)),
        (node(2), grant(8, 8, 3, 2)),
        (node(5), grant(0, 63, 5, 1_000)),
        (node(2), grant(0, 15, 4, 2_000)),
    ];
    let ring = Ring::compute(node(1), plan.range, &grants, &BTreeSet::from([node(3)]));
    let owners = [0, 7, 8, 9, 15, 16].map(|at| ring.owner((start + at).into()).unwrap().0[0]);
    assert_eq!(owners, [4, 4, 5, 4, 4, 2]);
}

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

#[test]
fn a_network_is_an_aligned_block_of_free_space_own_before_others() {
    let plan = plan();
    let mut allocator = founder(plan);
    let first = allocator.blocks(20).remove(0);
    assert_eq!(first.net.to_string(), "10.33.0.0/20");
    assert_eq!(first.owners, BTreeSet::from([node(1)]));
    assert!(allocator.is_own_block(&first.net));
    allocator.hold_block(first.net);
    assert!(!allocator.is_own_block(&first.net));
    assert_eq!(allocator.blocks(20)[0].net, net("10.33.16.0/20"));
    assert_eq!(allocator.blocks(16)[0].net, net("10.34.0.0/16"));
    assert_eq!(allocator.blocks(24), []);
    assert_eq!(allocator.blocks(15), []);
    // What is given away is still to be had, but later.
    allocator
        .donate_block(&net("10.33.16.0/20"), node(2))
        .unwrap();
    assert_eq!(allocator.blocks(20)[0].net, net("10.33.32.0/20"));
    assert_eq!(
        allocator.blocks(20).last().unwrap().net,
        net("10.33.16.0/20")
    );
}

#[test]
fn a_block_that_cant_be_a_network_is_refused_for_its_own_reason() {
    let plan = plan();
    let mut allocator = founder(plan);
    let default = plan.default_network();
    let check = |allocator: &Allocator, text: &str| allocator.check_block(&net(text));
    assert_eq!(
        check(&allocator, "10.33.0.0/24"),
        Err(BlockError::NotOne(net("10.33.0.0/24")))
    );
    assert_eq!(
        check(&allocator, "10.64.0.0/20"),
        Err(BlockError::NotOne(net("10.64.0.0/20")))
    );
    let inside = net("10.32.16.0/20");
    assert_eq!(
        allocator.check_block(&inside),
        Err(BlockError::Overlaps(inside, default))
    );
    allocator.hold_block(net("10.33.0.0/18"));
    let part = net("10.33.16.0/20");
    assert_eq!(
        allocator.check_block(&part),
        Err(BlockError::Overlaps(part, net("10.33.0.0/18")))
    );
    let whole = net("10.33.0.0/16");
    assert_eq!(
        allocator.check_block(&whole),
        Err(BlockError::Overlaps(whole, net("10.33.0.0/18")))
    );
    let ip = allocator.allocate(&net("10.34.0.0/20")).unwrap();
    let used = net("10.34.0.0/18");
    assert_eq!(allocator.check_block(&used), Err(BlockError::InUse(used)));
    allocator.release(ip, at(0));
    assert_eq!(
        allocator.donate_block(&used, node(2)),
        Err(BlockError::InUse(used).into())
    );
    allocator.expire(at(60));
    assert_eq!(allocator.donate_block(&used, node(2)).unwrap().len(), 1);
    assert_eq!(
        allocator.donate_block(&used, node(2)),
        Err(BlockError::NotOurs(used).into())
    );
}

#[test]
fn a_block_in_several_hands_comes_together_again() {
    let plan = plan();
    let block = net("10.33.0.0/20");
    let mut allocator = founder(plan);
    let grants = [
        (node(1), allocator.donate(&block, node(2)).unwrap()),
        (node(1), allocator.donate(&block, node(3)).unwrap()),
    ];
    let owners = allocator.block(&block).owners;
    assert_eq!(owners, BTreeSet::from([node(1), node(2), node(3)]));
    let ring = || Ring::compute(node(1), plan.range, &grants, &BTreeSet::new());
    let mut all = grants.to_vec();
    for n in [1, 2] {
        let mut owner = Allocator::new(node(n), plan, ring(), &Stored::default(), at(0));
        let given = owner.donate_block(&block, node(3)).unwrap();
        all.extend(given.into_iter().map(|grant| (node(n), grant)));
    }
    let whole = Ring::compute(node(1), plan.range, &all, &BTreeSet::new());
    let third = Allocator::new(node(3), plan, whole, &Stored::default(), at(0));
    assert!(third.is_own_block(&block));
}

/// Nodes that give each other parts as they like, also parts that are not theirs.
fn grants() -> impl Strategy<Value = Vec<(NodeId, Grant)>> {
    let one = (0u32..1024, 0u32..256, 1u8..6, 1u8..6, 0u64..8);
    proptest::collection::vec(one, 0..60).prop_map(|list| {
        let base = u32::from(small().range.network());
        list.into_iter()
            .map(|(start, length, from, to, version)| {
                let grant = Grant {
                    start: base + start,
                    last: base + start + length,
                    to: node(to),
                    version,
                    epoch: 0,
                };
                (node(from), grant)
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn the_ring_is_the_same_in_whatever_order_and_everything_has_one_owner(
        (forward, shuffled) in grants().prop_flat_map(|g| (Just(g.clone()), Just(g).prop_shuffle()))
    ) {
        let range = small().range;
        let ring = Ring::compute(node(1), range, &forward, &BTreeSet::new());
        prop_assert_eq!(&ring, &Ring::compute(node(1), range, &shuffled, &BTreeSet::new()));
        let mut covered: Vec<(u32, u32)> = ring.owners().iter().flat_map(|o| ring.parts(o)).collect();
        covered.sort_unstable();
        prop_assert_eq!(covered[0].0, u32::from(range.network()));
        prop_assert_eq!(covered[covered.len() - 1].1, u32::from(range.broadcast()));
        for pair in covered.windows(2) {
            prop_assert_eq!(pair[0].1 + 1, pair[1].0);
        }
    }

    /// Nodes that only give what they own, each on its own view, never come to share an address, whatever part of the
    /// grants they have heard of.
    #[test]
    fn honest_nodes_never_hand_out_one_address_twice(ops in proptest::collection::vec((0usize..3, 0usize..3, 0u8..4, 0usize..40), 1..60)) {
        let plan = small();
        let nets = [plan.default_network(), plan.vips()];
        let mut grants: Vec<(NodeId, Grant)> = Vec::new();
        let mut known: [usize; 3] = [0; 3];
        let mut nodes: Vec<Allocator> = (1..=3)
            .map(|n| Allocator::new(node(n), plan, Ring::compute(node(1), plan.range, &[], &BTreeSet::new()), &Stored::default(), at(0)))
            .collect();
        let mut taken = BTreeSet::new();
        for (who, whom, what, heard) in ops {
            let me = node(who as u8 + 1);
            // It has heard of some of what others gave, and of all its own gifts.
            known[who] = known[who].max(heard.min(grants.len()));
            let view: Vec<_> = grants.iter().enumerate().filter(|(i, g)| *i < known[who] || g.0 == me).map(|(_, g)| *g).collect();
            let used = taken.iter().filter(|(n, _)| *n == who).map(|(_, ip)| *ip).collect();
            nodes[who].update(at(0), &Ring::compute(node(1), plan.range, &view, &BTreeSet::new()), &used, &[]);
            match what {
                0 if who != whom => {
                    if let Ok(grant) = nodes[who].donate(&nets[heard % 2], node(whom as u8 + 1)) {
                        grants.push((me, grant));
                    }
                }
                1 if who != whom => {
                    let ip = Ipv4Addr::from(u32::from(plan.range.network()) + heard as u32);
                    if let Ok(grant) = nodes[who].donate_exact(ip, node(whom as u8 + 1)) {
                        grants.push((me, grant));
                    }
                }
                _ => {
                    if let Ok(ip) = nodes[who].allocate(&nets[0]) {
                        prop_assert!(taken.iter().all(|(_, t)| *t != ip), "{} twice", ip);
                        taken.insert((who, ip));
                    }
                }
            }
        }
    }
}
