mod branches;

use super::intake::HOUR_MICROS;
use super::*;
use crate::session::Trust;
use proptest::prelude::*;

const WALL: WallMicros = WallMicros(1_800_000_000_000_000);

fn identity(n: u8) -> Identity {
    Identity::generate(&mut Random::from_seed([n; 32]))
}

fn name(n: u8) -> NodeName {
    NodeName::parse(&format!("node-{n}")).unwrap()
}

fn founded() -> (Roster, Batch) {
    Roster::found(&identity(1), name(1), &mut Random::from_seed([99; 32]))
}

fn admit(roster: &mut Roster, by: u8, whom: u8, rights: Rights) -> Result<Issued, RosterError> {
    let subject = identity(whom);
    roster.admit(
        &identity(by),
        subject.id(),
        subject.noise_public(),
        name(whom),
        rights,
    )
}

fn id(n: u8) -> NodeId {
    identity(n).id()
}

/// A cluster of `n` nodes, all admitted by the founder.
fn cluster(n: u8) -> Roster {
    let (mut roster, _) = founded();
    for whom in 2..=n {
        admit(&mut roster, 1, whom, Rights::ALL).unwrap();
    }
    roster
}

fn copy(of: &Roster) -> Roster {
    Roster::join(of.cluster(), of.records()).unwrap().0
}

#[test]
fn the_cluster_id_is_the_hash_of_the_founding_record() {
    let (roster, batch) = founded();
    assert!(roster.is_member(&id(1)) && roster.founder() == id(1));
    assert_eq!(
        crypto::sha256(roster.records()[0])[..16],
        roster.cluster().0
    );
    assert_eq!(batch.0.len(), 1);
    let other = Roster::join(ClusterId([0; 16]), roster.records());
    assert_eq!(other.err(), Some(RosterError::NotFounding));
}

#[test]
fn one_who_joins_or_restarts_has_the_same_roster() {
    let mut roster = cluster(3);
    admit(&mut roster, 3, 4, Rights::INVITE).unwrap();
    roster.revoke(&identity(1), id(2), 17).unwrap();
    let (joined, batch) = Roster::join(roster.cluster(), roster.records()).unwrap();
    let mut stored = Stored::default();
    stored.apply(&batch);
    let restored = Roster::restore(roster.cluster(), &stored).unwrap();
    for other in [&joined, &restored] {
        assert_eq!(other.digest(), roster.digest());
        assert_eq!(other.heads(), roster.heads());
        assert_eq!(other.verdict, roster.verdict);
    }
    assert!(!restored.is_member(&id(2)) && restored.is_member(&id(4)));
    assert_eq!(
        restored.standing(&id(2)),
        Standing::Revoked(17, Rights::ALL)
    );
}

#[test]
fn nobody_gives_rights_it_lacks() {
    let mut roster = cluster(2);
    admit(&mut roster, 2, 3, Rights::PUBLISH).unwrap();
    assert_eq!(
        admit(&mut roster, 3, 4, Rights::PUBLISH),
        Err(RosterError::NoRight)
    );
    assert_eq!(
        roster.revoke(&identity(3), id(2), 0).err(),
        Some(RosterError::NoRight)
    );
    assert_eq!(
        roster.approve(&identity(3), [0; 32]).err(),
        Some(RosterError::NoRight)
    );
    // One that writes such a record all the same is not believed.
    let body = Body::Admit(Admission {
        id: id(4),
        noise: identity(4).noise_public(),
        rights: Rights::ALL,
        name: name(4),
    });
    let previous = roster.link(&id(2), 0).unwrap().hash;
    let forged = Link::sign(&roster.cluster(), &identity(3), 0, previous, &body);
    roster.insert(&forged.bytes, WALL).unwrap();
    assert!(!roster.is_member(&id(4)));
}

#[test]
fn a_revoked_node_can_admit_nobody_and_what_it_admitted_before_stays() {
    let mut roster = cluster(3);
    admit(&mut roster, 2, 4, Rights::ALL).unwrap();
    let mut rogue = copy(&roster);
    roster.revoke(&identity(1), id(2), 5).unwrap();
    let late = admit(&mut rogue, 2, 5, Rights::ALL).unwrap();
    roster.insert(&late.bytes, WALL).unwrap();
    assert!(roster.is_member(&id(4)) && !roster.is_member(&id(5)) && !roster.is_member(&id(2)));
    assert_eq!(
        admit(&mut roster, 1, 2, Rights::ALL),
        Err(RosterError::NoRight)
    );
}

#[test]
fn a_second_revocation_waits_for_a_majority_on_the_first() {
    let mut roster = cluster(5);
    roster.revoke(&identity(2), id(3), 0).unwrap();
    assert!(!roster.is_member(&id(3)));
    roster.revoke(&identity(2), id(4), 0).unwrap();
    assert!(roster.is_member(&id(4)));
    let [pending] = roster.pending() else {
        panic!("one waits")
    };
    assert_eq!((pending.issuer, pending.subject), (id(2), id(4)));
    let first = pending.waits_for;
    // Voters are 1, 2, 4 and 5: two of four are no majority.
    roster.approve(&identity(1), first).unwrap();
    assert!(roster.is_member(&id(4)));
    let change = roster.approve(&identity(5), first).unwrap().change;
    assert_eq!(change.revoked, [id(4)]);
    assert!(roster.pending().is_empty());
}

#[test]
fn newcomers_bring_nobody_back() {
    let mut here = cluster(4);
    let mut there = copy(&here);
    let first = here.revoke(&identity(2), id(3), 0).unwrap();
    here.approve(&identity(1), crypto::sha256(&first.bytes))
        .unwrap();
    here.revoke(&identity(2), id(4), 0).unwrap();
    assert!(!here.is_member(&id(4)));
    // Behind a split more come than there were.
    for newcomer in 5..12 {
        let issued = admit(&mut there, 4 - newcomer % 2, newcomer, Rights::ALL).unwrap();
        let _ = here.insert(&issued.bytes, WALL);
        assert!(!here.is_member(&id(4)) && here.pending().is_empty());
    }
}

#[test]
fn alone_in_a_cluster_its_host_needs_nobody_to_agree() {
    let mut roster = cluster(2);
    roster.revoke(&identity(1), id(2), 0).unwrap();
    for newcomer in 3..6 {
        admit(&mut roster, 1, newcomer, Rights::ALL).unwrap();
        roster.revoke(&identity(1), id(newcomer), 0).unwrap();
        assert!(!roster.is_member(&id(newcomer)), "{newcomer}");
    }
}

#[test]
fn who_says_that_it_knows_nobody_needs_the_others_all_the_same() {
    let mut roster = cluster(4);
    for subject in [3, 4] {
        let revocation = Revocation {
            id: id(subject),
            last_sequence: 0,
            tip: Tip {
                length: 0,
                hash: [0; 32],
            },
            voters: 1,
        };
        roster
            .issue(&identity(2), Body::Revoke(revocation))
            .unwrap();
    }
    assert!(!roster.is_member(&id(3)) && roster.is_member(&id(4)));
}

fn agrees(roster: &mut Roster, voter: u8, to: &Issued, voters: u32) {
    let approval = Approval {
        revocation: crypto::sha256(&to.bytes),
        voters,
    };
    roster
        .issue(&identity(voter), Body::Approve(approval))
        .unwrap();
}

#[test]
fn whom_a_stolen_key_let_in_agrees_to_nothing_that_it_does() {
    // The founder let all the others in, and counts them.
    for (stolen, honest) in [(2, [4, 5]), (1, [2, 5])] {
        let mut roster = cluster(5);
        admit(&mut roster, stolen, 9, Rights::ALL).unwrap();
        let first = roster.revoke(&identity(stolen), id(3), 0).unwrap();
        agrees(&mut roster, 9, &first, 1);
        let next = if stolen == 2 { 1 } else { 4 };
        roster.revoke(&identity(stolen), id(next), 0).unwrap();
        assert!(roster.is_member(&id(next)), "{stolen}");
        for voter in honest {
            roster
                .approve(&identity(voter), crypto::sha256(&first.bytes))
                .unwrap();
        }
        assert!(!roster.is_member(&id(next)), "{stolen}");
    }
}

#[test]
fn two_stolen_keys_evict_nobody_once_both_are_revoked() {
    let mut roster = cluster(6);
    let mut rogue = copy(&roster);
    let first = roster.revoke(&identity(1), id(2), 0).unwrap();
    for voter in [4, 5, 6] {
        roster
            .approve(&identity(voter), crypto::sha256(&first.bytes))
            .unwrap();
    }
    roster.revoke(&identity(1), id(3), 0).unwrap();
    assert!(!roster.is_member(&id(2)) && !roster.is_member(&id(3)));
    let eviction = rogue.revoke(&identity(2), id(4), 0).unwrap();
    let witness = rogue
        .witness(&identity(3), crypto::sha256(&eviction.bytes))
        .unwrap();
    for record in [eviction, witness] {
        roster.insert(&record.bytes, WALL).unwrap();
    }
    assert!(roster.is_member(&id(4)));
}

#[test]
fn two_that_revoke_each_other_are_both_out_in_whatever_order_it_is_heard() {
    let (mut a, mut b) = (cluster(4), cluster(4));
    let one = a.revoke(&identity(2), id(3), 0).unwrap();
    let other = b.revoke(&identity(3), id(2), 0).unwrap();
    a.insert(&other.bytes, WALL).unwrap();
    b.insert(&one.bytes, WALL).unwrap();
    assert_eq!(a.verdict, b.verdict);
    assert!(!a.is_member(&id(2)) && !a.is_member(&id(3)) && a.is_member(&id(4)));
}

#[test]
fn a_revoked_rogue_evicts_nobody_but_the_one_that_revoked_it() {
    let mut roster = cluster(4);
    let mut rogue = copy(&roster);
    roster.revoke(&identity(1), id(2), 0).unwrap();
    let late = rogue.revoke(&identity(2), id(3), 0).unwrap();
    roster.insert(&late.bytes, WALL).unwrap();
    assert!(roster.is_member(&id(3)));
}

#[test]
fn a_removal_that_another_heard_of_outlives_its_issuer() {
    let mut here = cluster(5);
    let mut there = copy(&here);
    let removal = here.revoke(&identity(2), id(3), 0).unwrap();
    there.revoke(&identity(4), id(2), 0).unwrap();
    let later = there.records().into_iter().map(<[u8]>::to_vec);
    for record in later.collect::<Vec<_>>() {
        let _ = here.insert(&record, WALL);
    }
    assert!(here.is_member(&id(3)), "nobody else has heard of it");
    let record = crypto::sha256(&removal.bytes);
    assert_eq!(here.subject_of(&record), Some(id(3)));
    here.witness(&identity(5), record).unwrap();
    assert!(!here.is_member(&id(3)) && !here.is_member(&id(2)));
}

#[test]
fn what_a_node_approved_counts_as_far_as_any_of_its_removers_knew() {
    let mut here = cluster(7);
    let mut behind = copy(&here);
    let first = here.revoke(&identity(1), id(7), 0).unwrap();
    let first = crypto::sha256(&first.bytes);
    for voter in [2, 3, 6] {
        here.approve(&identity(voter), first).unwrap();
    }
    here.revoke(&identity(1), id(5), 0).unwrap();
    here.revoke(&identity(2), id(6), 0).unwrap();
    assert!(!here.is_member(&id(5)) && !here.is_member(&id(6)));
    // Node 4 knew nothing of that, nor that node 6 had approved anything.
    let late = behind.revoke(&identity(4), id(6), 0).unwrap();
    here.insert(&late.bytes, WALL).unwrap();
    assert!(!here.is_member(&id(5)) && !here.is_member(&id(6)));
}

#[test]
fn of_two_removals_the_words_count_that_either_knew() {
    let mut a = cluster(4);
    let mut b = copy(&a);
    a.revoke(&identity(2), id(4), 40).unwrap();
    let other = b.revoke(&identity(3), id(4), 48).unwrap();
    a.insert(&other.bytes, WALL).unwrap();
    assert_eq!(a.standing(&id(4)), Standing::Revoked(48, Rights::ALL));
}

#[test]
fn of_several_removals_above_it_a_caller_is_shown_the_one_that_keeps_it_out() {
    let mut roster = cluster(4);
    roster.revoke(&identity(3), id(1), 0).unwrap();
    let mut void = copy(&roster);
    roster.revoke(&identity(4), id(2), 0).unwrap();
    admit(&mut void, 2, 5, Rights::ALL).unwrap();
    let shown = roster.why_no_member(
        (&id(5), &identity(5).noise_public()),
        &void.admit_chain(&id(5)),
    );
    let record = void.read_refusal(&shown.unwrap());
    assert_eq!(record.as_deref(), roster.revocation(&id(2)));
    let removal = void.removal_in(&record.unwrap()).unwrap();
    assert!(void.is_void_by(&removal, &id(5)));
}

#[test]
fn a_caller_let_in_by_the_other_branch_of_a_chain_and_whom_it_calls_both_see_the_fork() {
    let mut one = cluster(2);
    let mut other = copy(&one);
    admit(&mut one, 2, 3, Rights::ALL).unwrap();
    admit(&mut other, 2, 4, Rights::ALL).unwrap();
    let (caller, chain) = (
        (&id(4), &identity(4).noise_public()),
        other.admit_chain(&id(4)),
    );
    assert_eq!(one.learn_chain(&chain), None);
    assert_eq!(one.forks().len(), 1);
    let shown = one.why_no_member(caller, &chain).unwrap();
    let record = other.read_refusal(&shown).unwrap();
    assert_eq!(other.removal_in(&record), None);
    let fork = RosterError::Forked {
        issuer: id(2),
        index: 0,
    };
    assert_eq!(other.insert(&record, WALL).unwrap_err(), fork);
    // The same again is no news.
    one.learn_chain(&chain);
    assert_eq!((one.forks().len(), other.forks().len()), (1, 1));
}

#[test]
fn a_caller_that_is_no_member_is_shown_why() {
    let mut roster = cluster(2);
    let mut void = copy(&roster);
    roster.revoke(&identity(1), id(2), 0).unwrap();
    let revocation = roster.revocation(&id(2)).map(<[u8]>::to_vec);
    assert!(revocation.is_some());
    let (two, three) = (identity(2).noise_public(), identity(3).noise_public());
    let shown = roster.why_no_member((&id(2), &two), &[]).unwrap();
    assert_eq!(void.read_refusal(&shown), revocation);
    // Let in by who had not heard that it was removed.
    admit(&mut void, 2, 3, Rights::ALL).unwrap();
    let chain = void.admit_chain(&id(3));
    assert_eq!(roster.learn_chain(&chain), None);
    let shown = roster.why_no_member((&id(3), &three), &chain).unwrap();
    assert_eq!(void.read_refusal(&shown), revocation);
    let record = revocation.unwrap();
    let removal = void.removal_in(&record).unwrap();
    assert_eq!((removal.subject, removal.by), (id(2), id(1)));
    let gone = [1, 2, 3].map(|n| void.is_void_by(&removal, &id(n)));
    assert_eq!(gone, [false, true, true]);
    assert_eq!(void.admitters_of(&id(3)), [id(2), id(1)]);
    // Others hear nothing.
    assert_eq!(roster.why_no_member((&id(3), &two), &chain), None);
    assert_eq!(roster.why_no_member((&id(4), &three), &chain), None);
    assert_eq!(roster.why_no_member((&id(1), &two), &[]), None);
}

#[test]
fn leaving_is_free_and_needs_no_right() {
    let (mut roster, _) = founded();
    admit(&mut roster, 1, 2, Rights(0)).unwrap();
    roster.revoke(&identity(2), id(2), 9).unwrap();
    assert!(!roster.is_member(&id(2)));
}

#[test]
fn a_forked_chain_is_reported_and_its_second_branch_is_void() {
    let mut roster = cluster(2);
    let mut twin = copy(&roster);
    admit(&mut roster, 1, 3, Rights::ALL).unwrap();
    let other = admit(&mut twin, 1, 4, Rights::ALL).unwrap();
    let error = roster.insert(&other.bytes, WALL);
    assert_eq!(
        error,
        Err(RosterError::Forked {
            issuer: id(1),
            index: 2
        })
    );
    assert!(!roster.is_member(&id(4)));
    assert_eq!(roster.forks().len(), 1);
}

#[test]
fn a_known_node_is_never_admitted_with_other_keys() {
    let mut roster = cluster(3);
    let stolen = roster.admit(
        &identity(3),
        id(2),
        identity(9).noise_public(),
        name(2),
        Rights::ALL,
    );
    assert_eq!(
        stolen.err(),
        Some(RosterError::OtherKeys {
            issuer: id(3),
            subject: id(2)
        })
    );
    let low_order = roster.admit(&identity(3), id(8), [0; 32], name(8), Rights::ALL);
    assert_eq!(low_order.err(), Some(RosterError::Bad));
}

#[test]
fn behind_an_unknown_kind_no_admission_counts() {
    let mut roster = cluster(2);
    let previous = roster.link(&id(1), 1).unwrap().hash;
    let unknown = Link::sign(&roster.cluster(), &identity(1), 2, previous, &Body::Unknown);
    roster.insert(&unknown.bytes, WALL).unwrap();
    admit(&mut roster, 1, 3, Rights::ALL).unwrap();
    assert!(!roster.is_member(&id(3)) && roster.is_member(&id(2)));
    // It is passed on all the same.
    assert_eq!(copy(&roster).digest(), roster.digest());
}

#[test]
fn a_stranger_is_believed_by_the_chain_it_shows() {
    let old = cluster(2);
    let mut roster = copy(&old);
    admit(&mut roster, 2, 3, Rights::ALL).unwrap();
    admit(&mut roster, 3, 4, Rights::ALL).unwrap();
    let chain = roster.admit_chain(&id(4));
    assert_eq!(roster.chain_of(&id(4)).len(), 3);
    assert!(roster.chain_of(&id(1)).is_empty());
    let mut behind = copy(&old);
    let mut bent = chain.clone();
    bent[200] ^= 1;
    assert_eq!(behind.learn_chain(&bent), None);
    assert_eq!(behind.learn_chain(&chain), Some(id(4)));
    assert_eq!(behind.noise_key(&id(4)), Some(identity(4).noise_public()));
    // The chain is not in the roster: its digest is that of the records.
    assert_eq!(behind.digest(), old.digest());
    for record in roster.records_after(&old.heads()) {
        behind.insert(record, WALL).unwrap();
    }
    assert_eq!(
        (behind.digest(), &behind.verdict),
        (roster.digest(), &roster.verdict)
    );
    assert!(behind.loose.is_empty());
}

#[test]
fn a_chain_of_a_revoked_issuer_is_not_believed() {
    let old = cluster(2);
    let mut rogue = copy(&old);
    admit(&mut rogue, 2, 3, Rights::ALL).unwrap();
    let mut roster = copy(&old);
    roster.revoke(&identity(1), id(2), 0).unwrap();
    assert_eq!(roster.learn_chain(&rogue.admit_chain(&id(3))), None);
    assert!(roster.loose.is_empty());
}

#[test]
fn the_end_of_a_long_chain_shows_why_its_holder_is_no_member() {
    let old = cluster(2);
    let mut rogue = copy(&old);
    for n in 2..=4 {
        admit(&mut rogue, n, n + 1, Rights::ALL).unwrap();
    }
    let mut roster = copy(&old);
    roster.revoke(&identity(1), id(2), 0).unwrap();
    let (noise, chain) = (rogue.noise_key(&id(5)).unwrap(), rogue.admit_chain(&id(5)));
    assert!(roster.why_no_member((&id(5), &noise), &chain).is_some());
}

#[test]
fn a_chain_too_long_to_show_is_issued_anew_nearer_to_the_founder() {
    let (mut roster, _) = founded();
    for n in 1..=4 {
        admit(&mut roster, n, n + 1, Rights::ALL).unwrap();
    }
    assert_eq!(roster.chain_of(&id(5)).len(), MAX_CHAIN, "its end");
    assert_eq!(
        roster.too_deep().iter().map(|m| m.id).collect::<Vec<_>>(),
        [id(5)]
    );
    admit(&mut roster, 1, 5, Rights::ALL).unwrap();
    assert_eq!(roster.chain_of(&id(5)).len(), 1);
    assert!(roster.too_deep().is_empty());
}

#[test]
fn one_issuer_is_not_believed_more_than_so_many_new_nodes_an_hour() {
    let roster = cluster(2);
    let mut rogue = copy(&roster);
    let records: Vec<Vec<u8>> = (0..100)
        .map(|n| {
            let subject = identity(100 + n);
            rogue
                .admit(
                    &identity(2),
                    subject.id(),
                    subject.noise_public(),
                    name(9),
                    Rights::ALL,
                )
                .unwrap()
                .bytes
        })
        .collect();
    let mut roster = roster;
    let taken = records
        .iter()
        .filter(|r| roster.insert(r, WALL).is_ok())
        .count();
    assert_eq!(taken, 64);
    let later = WallMicros(WALL.0 + HOUR_MICROS + 1);
    assert!(roster.insert(&records[64], later).is_ok());
}

#[test]
fn ten_thousand_mutants_change_nothing() {
    let mut roster = cluster(3);
    let before = (roster.digest(), roster.verdict.clone());
    let records: Vec<Vec<u8>> = roster.records().iter().map(|r| r.to_vec()).collect();
    let mut random = Random::from_seed([4; 32]);
    for n in 0..10_000 {
        let mut bytes = records[n % records.len()].clone();
        let at = random.range(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.range(8);
        assert!(roster.insert(&bytes, WALL).is_err(), "octet {at}");
    }
    assert_eq!((roster.digest(), roster.verdict.clone()), before);
    assert!(roster.forks().is_empty());
}

/// What anybody may do to a cluster of six.
fn records(ops: &[(u8, u8, u8)]) -> (Roster, Vec<Vec<u8>>) {
    let (mut roster, _) = founded();
    for (by, whom, what) in ops {
        let (by, whom) = (by % 6 + 1, whom % 6 + 1);
        match what % 4 {
            0 | 1 => drop(admit(&mut roster, by, whom, Rights::ALL)),
            2 => drop(roster.revoke(&identity(by), id(whom), 0)),
            _ => {
                let first = roster.pending().first().map(|p| p.waits_for);
                drop(first.map(|f| roster.approve(&identity(by), f)));
            }
        }
    }
    let records = roster.records().iter().map(|r| r.to_vec()).collect();
    (roster, records)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn rosters_agree_in_whatever_order_the_records_come(
        ops in proptest::collection::vec((0u8..6, 0u8..6, 0u8..4), 1..24),
        seed in any::<[u8; 32]>(),
    ) {
        let (roster, mut records) = records(&ops);
        let (mut other, _) = Roster::join(roster.cluster(), [records[0].as_slice()]).unwrap();
        let mut random = Random::from_seed(seed);
        for at in (1..records.len()).rev() {
            records.swap(at, random.range(at as u64 + 1) as usize);
        }
        // What comes too early is sent again.
        for _ in 0..records.len() {
            for record in &records {
                let _ = other.insert(record, WALL);
            }
        }
        prop_assert_eq!(other.digest(), roster.digest());
        prop_assert_eq!(&other.verdict, &roster.verdict);
    }

    #[test]
    fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..320)) {
        let mut roster = cluster(2);
        prop_assert!(roster.insert(&bytes, WALL).is_err());
        prop_assert_eq!(roster.learn_chain(&bytes), None);
    }
}
