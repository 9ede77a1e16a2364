//! Two starts of one node that did not know of each other: a lost disk, a copied one.

use super::*;

#[test]
fn two_records_with_one_sequence_are_a_clone_and_the_lower_hash_stays() {
    let roster = roster(2);
    let mut original = catalog(2, &roster);
    let mut clone = catalog(2, &roster);
    let a = original
        .put(&endpoint(2, 1), &identity(2), NOON)
        .unwrap()
        .records;
    let b = clone
        .put(&endpoint(2, 2), &identity(2), NOON)
        .unwrap()
        .records;
    let (mut one, mut other) = (catalog(1, &roster), catalog(1, &roster));
    one.insert(&a[0], &roster, NOON).unwrap();
    other.insert(&b[0], &roster, NOON).unwrap();
    let verdicts = [
        one.insert(&b[0], &roster, NOON),
        other.insert(&a[0], &roster, NOON),
    ];
    assert!(
        verdicts
            .iter()
            .any(|v| *v == Err(DropReason::Clone(identity(2).id())))
    );
    assert!(
        verdicts
            .iter()
            .any(|v| v.as_ref().is_ok_and(|a| a.alarm.is_some()))
    );
    assert!(same(&one, &other));
    assert_eq!(one.digest(), other.digest());
}

#[test]
fn one_that_lost_its_disk_and_wrote_again_sorts_itself_out() {
    let roster = roster(2);
    let me = identity(1);
    let mut first = catalog(1, &roster);
    let lost: Vec<Record> = (1..=3)
        .flat_map(|n| first.put(&endpoint(1, n), &me, NOON).unwrap().records)
        .collect();
    let mut peer = catalog(2, &roster);
    insert_all(&mut peer, &lost, &roster, NOON);
    // No peer answered in time: it writes under sequences that it had used.
    let mut second = Catalog::new(me.id(), roster.cluster(), first.plan, Generation(2));
    let new = second.put(&endpoint(1, 9), &me, later(40)).unwrap().records;
    insert_all(&mut peer, &new, &roster, NOON);
    insert_all(&mut second, &lost, &roster, later(41));
    assert!(second.needs_repair());
    let repaired = second.repair(&me, later(41)).unwrap().records;
    assert!(!second.needs_repair() && repaired.iter().all(|r| r.sequence() > 3));
    insert_all(&mut peer, &repaired, &roster, later(41));
    assert_eq!(peer.endpoints(&BTreeSet::new()).len(), 4);
    assert!(same(&peer, &second) && peer.digest() == second.digest());
}

#[test]
fn two_copies_that_count_the_same_start_lose_nothing_of_what_they_wrote() {
    let roster = roster(2);
    let me = identity(1);
    let mut copies = [catalog(1, &roster), catalog(1, &roster)];
    let mut peer = catalog(2, &roster);
    for (n, copy) in copies.iter_mut().enumerate() {
        copy.put(&endpoint(1, n as u8 + 1), &me, NOON).unwrap();
    }
    for _ in 0..4 {
        let said = copies
            .each_ref()
            .map(|copy| copy.records_after(&me.id(), 0));
        for (copy, heard) in copies.iter_mut().zip(said.iter().rev()) {
            insert_all(copy, heard, &roster, NOON);
            copy.repair(&me, NOON).unwrap();
        }
    }
    for copy in &copies {
        insert_all(&mut peer, &copy.records_after(&me.id(), 0), &roster, NOON);
        assert_eq!(copy.endpoints(&BTreeSet::new()).len(), 2);
    }
    assert_eq!(peer.endpoints(&BTreeSet::new()).len(), 2);
}

/// Of two starts of a node that lost its disk, records stand under one key, the later start's under a higher sequence.
#[test]
fn what_a_superseded_record_tells_of_the_log_survives_the_disk() {
    let roster = roster(2);
    let (me, cluster) = (identity(1), roster.cluster());
    let value = endpoint(1, 7).encode(Lineage::default());
    let sign = |generation, sequence, key: &[u8]| {
        let draft = Draft {
            generation: Generation(generation),
            sequence,
            stamp: Stamp(1),
            network: 0,
            kind: Kind::ENDPOINT,
            key,
            value: Some(&value),
        };
        Record::sign(&cluster, &me, &draft).unwrap()
    };
    let (late, next) = (sign(2, 9, b"under one"), sign(1, 2, b"another"));
    let early = sign(1, 1, b"under one");
    let mut stored = Stored::default();
    let mut one = catalog(2, &roster);
    for record in [late, next] {
        let applied = one.insert(&record, &roster, NOON).unwrap();
        assert!(applied.held);
        stored.apply(&applied.batch);
    }
    assert_eq!(one.state_of(&me.id()).complete, 0, "the first is missing");
    let before = one.space_revision();
    let applied = one.insert(&early, &roster, NOON).unwrap();
    assert!(!applied.held && one.space_revision() > before);
    stored.apply(&applied.batch);
    assert_eq!(one.state_of(&me.id()).complete, 2);
    let again = one.insert(&early, &roster, NOON);
    assert_eq!(
        again,
        Err(DropReason::Superseded),
        "nothing new the second time"
    );
    let mut restored = catalog(2, &roster);
    restored.restore(&stored, NOON);
    assert_eq!(restored.state_of(&me.id()), one.state_of(&me.id()));
    assert_eq!(restored.digest(), one.digest());
}

/// Its clock was ahead in the start that an old disk knows nothing of.
#[test]
fn a_start_below_the_last_in_its_own_log_knows_that_until_it_has_written() {
    let roster = roster(2);
    let me = identity(1);
    let start = |number| {
        let plan = catalog(1, &roster).plan;
        Catalog::new(me.id(), roster.cluster(), plan, Generation(number))
    };
    let mut lost = start(9);
    let told = lost.put(&endpoint(1, 1), &me, NOON).unwrap().records;
    let mut again = start(5);
    assert_eq!(again.outdated_by(), None);
    insert_all(&mut again, &told, &roster, NOON);
    assert_eq!(again.outdated_by(), Some(Generation(9)));
    again.become_later(Generation(10), &me, NOON).unwrap();
    assert_eq!(again.outdated_by(), None);
    // What it says of the same endpoint counts with others then.
    let key = endpoint(1, 1).key();
    let gone = again.remove(Kind::ENDPOINT, &key, &me, NOON).unwrap();
    let mut peer = catalog(2, &roster);
    insert_all(&mut peer, &told, &roster, NOON);
    insert_all(&mut peer, &gone.records, &roster, NOON);
    assert!(peer.endpoints(&BTreeSet::new()).is_empty());
    assert_eq!(again.outdated_by(), None);
}
