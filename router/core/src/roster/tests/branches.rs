//! Forked chains, once their issuer is removed.

use super::*;

/// Two sides of a cluster of `n` nodes in which node 2 let in node 10 and those after it, and by the other branch 20 and
/// those after it.
fn forked(n: u8, ones: u8, others: u8) -> (Roster, Roster) {
    let mut one = cluster(n);
    let mut other = copy(&one);
    for whom in 0..ones {
        admit(&mut one, 2, 10 + whom, Rights::ALL).unwrap();
    }
    for whom in 0..others {
        admit(&mut other, 2, 20 + whom, Rights::ALL).unwrap();
    }
    (one, other)
}

/// Each tells the other all that it has, until nothing is new; and writes what it should.
fn talk(one: &mut Roster, other: &mut Roster) {
    for _ in 0..8 {
        tell(&one.clone(), other);
        tell(&other.clone(), one);
    }
}

fn tell(from: &Roster, to: &mut Roster) {
    let proofs = from.forks().iter().flat_map(|fork| from.proof_of(fork));
    for record in from.records().into_iter().chain(proofs) {
        let _ = to.insert(record, WALL);
    }
}

fn members(roster: &Roster) -> Vec<NodeId> {
    roster.members().map(|member| member.id).collect()
}

fn agree(one: &Roster, other: &Roster) {
    assert_eq!(one.heads(), other.heads());
    assert_eq!(one.digest(), other.digest());
    assert_eq!(one.verdict, other.verdict);
    assert_eq!(members(&copy(one)), members(one));
}

#[test]
fn the_branch_holds_that_the_remover_of_its_issuer_knew() {
    for (ones, others) in [(1, 1), (1, 3), (3, 1), (2, 2)] {
        let (mut one, mut other) = forked(4, ones, others);
        talk(&mut one, &mut other);
        assert!(one.is_member(&id(10)) && other.is_member(&id(20)));
        one.revoke(&identity(3), id(2), 0).unwrap();
        talk(&mut one, &mut other);
        agree(&one, &other);
        assert!(one.is_member(&id(9 + ones)) && !one.is_member(&id(20)));
    }
}

/// All tell each other all that they have, until nothing is new.
fn talk_all(sides: &mut [Roster]) {
    for _ in 0..8 {
        for from in 0..sides.len() {
            for to in 0..sides.len() {
                let said = sides[from].clone();
                tell(&said, &mut sides[to]);
            }
        }
    }
}

/// All are as the remover is, and have the members that it had.
fn agree_all(sides: &[Roster], remover: usize, kept: &[NodeId]) {
    for side in sides {
        agree(&sides[remover], side);
        assert_eq!(members(side), kept, "{remover}");
    }
}

/// A cluster of four in which node 2 forked its chain, and one of the branches again: 10 and 11, 10 and 30 and those after
/// it, 20 and those after it.
fn forked_twice(twigs: u8, others: u8) -> [Roster; 3] {
    let (mut one, other) = forked(4, 1, others);
    let mut twig = copy(&one);
    admit(&mut one, 2, 11, Rights::ALL).unwrap();
    for whom in 0..twigs {
        admit(&mut twig, 2, 30 + whom, Rights::ALL).unwrap();
    }
    [one, twig, other]
}

#[test]
fn of_a_branch_that_is_forked_again_the_one_holds_that_the_remover_knew() {
    for (twigs, others) in [(1, 1), (1, 4), (4, 1), (3, 2), (2, 3)] {
        for remover in 0..3 {
            let mut sides = forked_twice(twigs, others);
            talk_all(&mut sides);
            let removal = sides[remover].revoke(&identity(3), id(2), 0).unwrap();
            let kept = members(&sides[remover]);
            // Whoever hears of it may have heard nothing else.
            for side in &mut sides {
                let _ = side.insert(&removal.bytes, WALL);
            }
            talk_all(&mut sides);
            agree_all(&sides, remover, &kept);
        }
    }
}

#[test]
fn of_three_records_in_one_place_the_one_holds_that_the_remover_knew() {
    for remover in 0..3 {
        let (one, other) = forked(4, 2, 1);
        let mut third = cluster(4);
        admit(&mut third, 2, 40, Rights::ALL).unwrap();
        let mut sides = [one, other, third];
        talk_all(&mut sides);
        sides[remover].revoke(&identity(3), id(2), 0).unwrap();
        let kept = members(&sides[remover]);
        talk_all(&mut sides);
        agree_all(&sides, remover, &kept);
    }
}

#[test]
fn a_chain_that_is_only_too_short_is_not_left_for_another_branch() {
    let (mut one, other) = forked(4, 3, 3);
    let mut behind = cluster(4);
    let first = one.records_from(&id(2), 0).next().unwrap().to_vec();
    behind.insert(&first, WALL).unwrap();
    tell(&other, &mut behind);
    let removal = one.revoke(&identity(3), id(2), 0).unwrap();
    behind.insert(&removal.bytes, WALL).unwrap();
    tell(&other, &mut behind);
    let held = behind.records_from(&id(2), 0).next();
    assert_eq!(
        held,
        Some(first.as_slice()),
        "nothing says that it is wrong"
    );
    assert!(!behind.astray.is_empty());
    talk(&mut one, &mut behind);
    agree(&one, &behind);
    assert!(behind.astray.is_empty(), "it is found");
    assert!(behind.is_member(&id(12)));
}

#[test]
fn of_two_removers_that_knew_different_branches_none_lets_anybody_in() {
    let (mut one, mut other) = forked(5, 2, 3);
    one.revoke(&identity(3), id(2), 0).unwrap();
    other.revoke(&identity(4), id(2), 0).unwrap();
    talk(&mut one, &mut other);
    agree(&one, &other);
    assert_eq!(members(&one).len(), 4);
    assert!(!one.is_member(&id(10)) && !one.is_member(&id(20)));
}

#[test]
fn who_is_in_by_one_branch_alone_does_not_say_which_one_holds() {
    let (mut one, mut other) = forked(4, 1, 1);
    talk(&mut one, &mut other);
    let removal = other.revoke(&identity(20), id(2), 0).unwrap();
    let record = crypto::sha256(&removal.bytes);
    other.witness(&identity(4), record).unwrap();
    // Its remover comes last.
    admit(&mut one, 3, 30, Rights::ALL).unwrap();
    admit(&mut one, 30, 31, Rights::ALL).unwrap();
    one.revoke(&identity(31), id(2), 0).unwrap();
    talk(&mut one, &mut other);
    agree(&one, &other);
    assert!(one.is_member(&id(10)) && !one.is_member(&id(20)));
}

#[test]
fn who_removed_before_the_fork_leaves_both_branches_void_and_all_alike() {
    let mut third = cluster(4);
    third.revoke(&identity(3), id(2), 0).unwrap();
    let (mut one, mut other) = forked(4, 2, 1);
    talk(&mut one, &mut other);
    for (a, b) in [(&mut third.clone(), &mut one), (&mut third, &mut other)] {
        talk(a, b);
        assert!(!a.is_member(&id(10)) && !a.is_member(&id(20)));
    }
    talk(&mut one, &mut other);
    agree(&one, &other);
    assert_eq!(members(&one).len(), 3);
}

#[test]
fn who_was_let_in_by_a_branch_that_is_left_leaves_nothing() {
    let (mut one, mut other) = forked(3, 1, 1);
    admit(&mut other, 20, 21, Rights::ALL).unwrap();
    other.revoke(&identity(21), id(3), 0).unwrap();
    talk(&mut one, &mut other);
    one.revoke(&identity(1), id(2), 0).unwrap();
    talk(&mut one, &mut other);
    agree(&one, &other);
    assert_eq!(other.heads().len(), 2);
    assert!(other.is_member(&id(3)) && !other.is_member(&id(21)));
}

#[test]
fn what_a_branch_left_is_left_on_disk_too_and_it_is_never_taken_again() {
    let (mut one, mut other) = forked(3, 1, 2);
    let left: Vec<Vec<u8>> = other.records_from(&id(2), 0).map(<[u8]>::to_vec).collect();
    let mut stored = Stored::default();
    stored.apply(&Roster::join(other.cluster(), other.records()).unwrap().1);
    let first = one.records_from(&id(2), 0).next().unwrap().to_vec();
    let fork = RosterError::Forked {
        issuer: id(2),
        index: 0,
    };
    assert_eq!(other.insert(&first, WALL).unwrap_err(), fork);
    let removal = one.revoke(&identity(3), id(2), 0).unwrap();
    stored.apply(&other.insert(&removal.bytes, WALL).unwrap().batch);
    for record in &left {
        assert!(other.insert(record, WALL).is_err());
    }
    assert_eq!(one.insert(&left[0], WALL).unwrap_err(), fork);
    let restored = Roster::restore(other.cluster(), &stored).unwrap();
    for roster in [&restored, &other] {
        assert_eq!(roster.forks().len(), 1);
        assert_eq!(roster.heads(), one.heads());
        assert_eq!(roster.verdict, one.verdict);
    }
}

#[test]
fn a_removed_node_lets_nobody_in_by_a_chain_of_its_own_making() {
    let mut roster = cluster(3);
    let mut behind = copy(&roster);
    let mut stolen = copy(&roster);
    admit(&mut roster, 2, 4, Rights::ALL).unwrap();
    admit(&mut roster, 2, 5, Rights::ALL).unwrap();
    let removal = roster.revoke(&identity(3), id(2), 0).unwrap();
    let chains = [4, 5].map(|n| roster.admit_chain(&id(n)));
    admit(&mut stolen, 2, 6, Rights::ALL).unwrap();
    let forged = stolen.admit_chain(&id(6));
    // Before it hears of the removal, and after.
    let mut early = copy(&behind);
    assert_eq!(early.learn_chain(&forged), Some(id(6)));
    for roster in [&mut early, &mut behind] {
        roster.insert(&removal.bytes, WALL).unwrap();
        assert!(!roster.is_member(&id(6)));
        assert_eq!(roster.learn_chain(&forged), None);
        // The removal names the last one; the one before is believed when the chain is known.
        assert_eq!(roster.learn_chain(&chains[0]), None);
        assert_eq!(roster.learn_chain(&chains[1]), Some(id(5)));
    }
}

#[test]
fn who_was_let_in_by_the_branch_that_lost_is_shown_so_by_a_remover_that_it_does_not_know() {
    let (mut one, mut other) = forked(3, 1, 1);
    talk(&mut one, &mut other);
    admit(&mut one, 3, 30, Rights::ALL).unwrap();
    one.revoke(&identity(30), id(2), 0).unwrap();
    let caller = (&id(20), &identity(20).noise_public());
    let shown = one
        .why_no_member(caller, &other.admit_chain(&id(20)))
        .unwrap();
    for cut in 0..shown.len() {
        let _ = other.clone().read_refusal(&shown[..cut]);
    }
    let record = other.read_refusal(&shown).unwrap();
    let removal = other.removal_in(&record).unwrap();
    assert_eq!((removal.subject, removal.by), (id(2), id(30)));
    let gone = [1, 2, 3, 20].map(|n| other.is_void_by(&removal, &id(n)));
    assert_eq!(gone, [false, true, false, true]);
}

#[test]
fn a_record_shown_in_a_handshake_goes_with_all_that_hangs_on_it_when_another_comes_in_its_place() {
    let (one, mut other) = forked(3, 1, 1);
    admit(&mut other, 20, 21, Rights::ALL).unwrap();
    let mut third = cluster(3);
    assert_eq!(third.learn_chain(&other.admit_chain(&id(20))), Some(id(20)));
    let hanging: Vec<Vec<u8>> = other.records_from(&id(20), 0).map(<[u8]>::to_vec).collect();
    for record in &hanging {
        third.insert(record, WALL).unwrap();
    }
    assert!(third.is_member(&id(21)));
    // On disk there is nothing of the handshake.
    let mut stored = Stored::default();
    for issuer in [id(1), id(20)] {
        for (index, record) in third.records_from(&issuer, 0).enumerate() {
            let key = Table::Roster.key(&[&issuer.0, &(index as u32).to_be_bytes()]);
            stored.apply(&Batch(vec![(key, Some(record.to_vec()))]));
        }
    }
    let restored = Roster::restore(third.cluster(), &stored).unwrap();
    assert_eq!(restored.digest(), cluster(3).digest());
    let first = one.records_from(&id(2), 0).next().unwrap();
    third.insert(first, WALL).unwrap();
    assert!(third.is_member(&id(10)) && !third.is_member(&id(21)));
    assert_eq!((third.forks().len(), third.heads().len()), (1, 2));
}
