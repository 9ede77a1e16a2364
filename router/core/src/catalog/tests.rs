use super::*;
use crate::crypto::Random;
use crate::identity::Identity;
use crate::model::{EndpointId, Label, NetworkName, Proto};
use crate::record::Draft;
use crate::value::{Lineage, Object};
use crate::value::{NodeInfo, endpoint_key, label_key};
use crate::view::{Endpoint, EndpointKind, ManualName, Method, Service, ServicePort};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr};

mod copies;

pub(crate) const NOON: WallMicros = WallMicros(1_800_000_000_000_000);
const SECOND: u64 = 1_000_000;

pub(crate) fn later(seconds: u64) -> WallMicros {
    WallMicros(NOON.0 + seconds * SECOND)
}

pub(crate) fn identity(n: u8) -> Identity {
    Identity::generate(&mut Random::from_seed([n; 32]))
}

pub(crate) fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

pub(crate) fn roster(n: u8) -> Roster {
    let (mut roster, _) =
        Roster::found(&identity(1), label("one"), &mut Random::from_seed([9; 32]));
    for whom in 2..=n {
        let subject = identity(whom);
        roster
            .admit(
                &identity(1),
                subject.id(),
                subject.noise_public(),
                label("other"),
                Rights::ALL,
            )
            .unwrap();
    }
    roster
}

pub(crate) fn catalog(n: u8, roster: &Roster) -> Catalog {
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &roster.cluster()).unwrap();
    Catalog::new(identity(n).id(), roster.cluster(), plan, Generation(1))
}

pub(crate) fn endpoint(of: u8, number: u8) -> Object {
    Object::Endpoint(Endpoint {
        id: EndpointId([of, number, 0, 0, 0, 0, 0, 0]),
        node: identity(of).id(),
        kind: EndpointKind::Container,
        names: vec![label("web")],
        network: NetworkName::parse("default").unwrap(),
        ip: Ipv4Addr::new(10, 32, of, number),
        labels: BTreeMap::new(),
    })
}

pub(crate) fn service(name: &str, vip: u8) -> Object {
    Object::Service(Service {
        name: label(name),
        vip: Ipv4Addr::new(10, 47, 0, vip),
        ports: vec![ServicePort {
            proto: Proto::Tcp,
            port: 80,
            target: 80,
            publish: Vec::new(),
        }],
        selector: BTreeMap::new(),
        method: Method::Maglev,
    })
}

fn manual(name: &str, last: u8) -> Object {
    Object::Name(ManualName {
        name: label(name),
        ip: IpAddr::V4(Ipv4Addr::new(192, 0, 2, last)),
    })
}

fn insert_all(catalog: &mut Catalog, records: &[Record], roster: &Roster, wall: WallMicros) {
    for record in records {
        let _ = catalog.insert(record, roster, wall);
    }
}

fn same(a: &Catalog, b: &Catalog) -> bool {
    let held = |c: &Catalog| -> Vec<(NodeId, Vec<Record>)> {
        c.logs
            .keys()
            .map(|w| (*w, c.records_after(w, 0)))
            .filter(|(_, r)| !r.is_empty())
            .collect()
    };
    held(a) == held(b)
}

#[test]
fn what_is_written_is_read_and_survives_the_disk() {
    let roster = roster(1);
    let me = identity(1);
    let mut one = catalog(1, &roster);
    let mut stored = Stored::default();
    let info = NodeInfo {
        name: label("one"),
        host_addrs: Vec::new(),
        underlay: Vec::new(),
        tcp_port: None,
        caps: 3,
    };
    for object in [
        endpoint(1, 7),
        service("web", 9),
        manual("db", 1),
        Object::NodeInfo(info),
    ] {
        stored.apply(&one.put(&object, &me, NOON).unwrap().batch);
    }
    stored.apply(
        &one.remove(Kind::NAME, &label_key(&label("db")), &me, NOON)
            .unwrap()
            .batch,
    );
    let mut again = catalog(1, &roster);
    again.restore(&stored, NOON);
    for catalog in [&one, &again] {
        assert_eq!(catalog.endpoints(&BTreeSet::new()).len(), 1);
        assert!(catalog.endpoints(&BTreeSet::from([me.id()])).is_empty());
        assert_eq!(catalog.services(NOON).len(), 1);
        assert!(catalog.names(NOON).is_empty());
        assert_eq!(catalog.nodes()[&me.id()].caps, 3);
        assert_eq!(catalog.used_addresses(&BTreeSet::new()).len(), 2);
        assert_eq!(catalog.last_sequence(&me.id()), 5);
    }
    assert!(same(&one, &again));
    assert_eq!(one.digest(), again.digest());
}

#[test]
fn a_sequence_never_begins_anew_and_nothing_is_written_twice() {
    let roster = roster(1);
    let me = identity(1);
    let mut one = catalog(1, &roster);
    let mut stored = Stored::default();
    stored.apply(&one.put(&endpoint(1, 1), &me, NOON).unwrap().batch);
    assert_eq!(
        one.put(&endpoint(1, 1), &me, later(1)),
        Ok(Written::default())
    );
    stored.apply(&one.put(&service("web", 1), &me, NOON).unwrap().batch);
    assert_eq!(
        one.put(&service("web", 1), &me, later(1)),
        Ok(Written::default())
    );
    stored.apply(
        &one.remove(
            Kind::ENDPOINT,
            &endpoint_key(&EndpointId([1, 1, 0, 0, 0, 0, 0, 0])),
            &me,
            NOON,
        )
        .unwrap()
        .batch,
    );
    assert_eq!(
        one.remove(Kind::ENDPOINT, b"12345678", &me, NOON),
        Ok(Written::default())
    );
    let mut again = Catalog::new(me.id(), roster.cluster(), one.plan, Generation(2));
    again.restore(&stored, NOON);
    let written = again.put(&endpoint(1, 2), &me, later(2)).unwrap();
    assert_eq!(written.records[0].place(), (Generation(2), 4));
}

#[test]
fn the_last_writer_of_a_cluster_wide_object_wins_everywhere() {
    let roster = roster(2);
    let (mut one, mut two) = (catalog(1, &roster), catalog(2, &roster));
    let a = one
        .put(&service("web", 1), &identity(1), NOON)
        .unwrap()
        .records;
    insert_all(&mut two, &a, &roster, NOON);
    // Its own clock is behind, and yet its edit comes after what it saw.
    let Object::Service(mut edited) = service("web", 1) else {
        unreachable!()
    };
    edited.ports[0].target = 8080;
    let b = two
        .put(
            &Object::Service(edited.clone()),
            &identity(2),
            WallMicros(NOON.0 - 5 * SECOND),
        )
        .unwrap()
        .records;
    insert_all(&mut one, &b, &roster, NOON);
    for catalog in [&one, &two] {
        assert_eq!(catalog.services(NOON), std::slice::from_ref(&edited));
        assert!(catalog.duplicates(NOON).is_empty());
    }
    // The other may remove it, though it wrote only the first version.
    let gone = one
        .remove(Kind::SERVICE, b"web", &identity(1), NOON)
        .unwrap()
        .records;
    insert_all(&mut two, &gone, &roster, NOON);
    assert!(one.services(NOON).is_empty() && two.services(NOON).is_empty());
    assert_eq!(one.digest(), two.digest());
}

#[test]
fn two_objects_created_under_one_name_in_a_split_are_shown_until_it_is_settled() {
    let roster = roster(3);
    let (mut one, mut two, mut three) = (
        catalog(1, &roster),
        catalog(2, &roster),
        catalog(3, &roster),
    );
    let a = one
        .put(&service("web", 1), &identity(1), NOON)
        .unwrap()
        .records;
    let b = two
        .put(&service("web", 2), &identity(2), later(1))
        .unwrap()
        .records;
    insert_all(&mut three, &[b[0].clone(), a[0].clone()], &roster, later(2));
    let [lost] = &three.duplicates(later(2))[..] else {
        panic!("one lost")
    };
    assert_eq!((lost.kept, lost.lost), (identity(2).id(), identity(1).id()));
    assert_eq!(lost.object, service("web", 1));
    // Neither address may be handed out again while both are there.
    assert_eq!(three.used_addresses(&BTreeSet::new()).len(), 2);
    let settled = three
        .put(&service("web", 2), &identity(3), later(3))
        .unwrap()
        .records;
    assert_eq!(settled.len(), 1);
    assert!(three.duplicates(later(3)).is_empty());
    insert_all(&mut one, &b, &roster, later(3));
    assert_eq!(one.duplicates(later(3)).len(), 1);
    insert_all(&mut one, &settled, &roster, later(3));
    assert!(one.duplicates(later(3)).is_empty());
    // One created anew after a removal is no conflict with the old one.
    let gone = three
        .remove(Kind::SERVICE, b"web", &identity(3), later(4))
        .unwrap()
        .records;
    insert_all(&mut one, &gone, &roster, later(4));
    one.put(&service("web", 5), &identity(1), later(5)).unwrap();
    assert!(one.duplicates(later(5)).is_empty());
}

#[test]
fn an_edit_from_a_year_ahead_is_kept_but_the_peers_edits_win() {
    let roster = roster(2);
    let (mut one, mut two) = (catalog(1, &roster), catalog(2, &roster));
    let ahead = later(365 * 86_400);
    let wrong = two
        .put(&manual("db", 66), &identity(2), ahead)
        .unwrap()
        .records;
    one.insert(&wrong[0], &roster, NOON).unwrap();
    assert!(one.names(NOON).is_empty());
    assert!(
        one.next_due(NOON)
            .is_some_and(|due| due > later(364 * 86_400))
    );
    let right = one
        .put(&manual("db", 1), &identity(1), NOON)
        .unwrap()
        .records;
    assert!(right[0].stamp().is_due(NOON));
    assert_eq!(one.names(NOON).len(), 1);
    assert_eq!(
        one.names(NOON)[0].ip,
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))
    );
    assert_eq!(
        one.names(ahead)[0].ip,
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 66))
    );
}

#[test]
fn strangers_revoked_nodes_and_those_without_the_right_are_not_heard() {
    let mut roster = roster(2);
    let subject = identity(3);
    roster
        .admit(
            &identity(1),
            subject.id(),
            subject.noise_public(),
            label("poor"),
            Rights(0),
        )
        .unwrap();
    let mut one = catalog(1, &roster);
    let mut stranger = catalog(4, &roster);
    let record = stranger
        .put(&endpoint(4, 1), &identity(4), NOON)
        .unwrap()
        .records;
    assert_eq!(
        one.insert(&record[0], &roster, NOON),
        Err(DropReason::UnknownWriter)
    );
    let mut poor = catalog(3, &roster);
    let record = poor
        .put(&service("web", 1), &identity(3), NOON)
        .unwrap()
        .records;
    assert_eq!(
        one.insert(&record[0], &roster, NOON),
        Err(DropReason::NoRight)
    );
    let mut two = catalog(2, &roster);
    let records: Vec<Record> = (1..=3)
        .flat_map(|n| {
            two.put(&endpoint(2, n), &identity(2), NOON)
                .unwrap()
                .records
        })
        .collect();
    let mut late = catalog(1, &roster);
    insert_all(&mut one, &records, &roster, NOON);
    roster.revoke(&identity(1), identity(2).id(), 2).unwrap();
    one.prune(&roster);
    assert_eq!(
        late.insert(&records[2], &roster, NOON),
        Err(DropReason::Revoked)
    );
    insert_all(&mut late, &records, &roster, NOON);
    assert_eq!(one.endpoints(&BTreeSet::new()).len(), 2);
    assert!(same(&one, &late));
    assert_eq!(one.digest(), late.digest());
}

#[test]
fn what_a_removal_that_does_not_count_had_cut_is_proved_anew() {
    let member = roster(2);
    let mut removed = member.clone();
    removed
        .revoke(&identity(1), identity(2).id(), 2)
        .expect("the founder may");
    let mut two = catalog(2, &member);
    let versions = [endpoint(2, 1), service("web", 1), service("web", 2)];
    let records: Vec<Record> = versions
        .iter()
        .flat_map(|object| two.put(object, &identity(2), NOON).unwrap().records)
        .collect();
    let mut one = catalog(1, &member);
    insert_all(&mut one, &records, &member, NOON);
    // The second record was superseded by the third, which is void: nothing is left to show that the log had a second.
    one.prune(&removed);
    assert_eq!(one.state_of(&identity(2).id()).complete, 2);
    one.prune(&member);
    let mut late = catalog(3, &member);
    insert_all(
        &mut late,
        &one.records_after(&identity(2).id(), 0),
        &member,
        NOON,
    );
    late.extend(&identity(2).id(), 0, 2, &member);
    assert_eq!(one.digest(), late.digest());
    // Who has them still brings them back.
    insert_all(&mut one, &records, &member, NOON);
    assert_eq!(one.digest(), two.digest());
}

#[test]
fn a_lying_record_about_another_nodes_endpoint_is_not_shown() {
    let roster = roster(2);
    let mut two = catalog(2, &roster);
    let records = two
        .put(&endpoint(1, 1), &identity(2), NOON)
        .unwrap()
        .records;
    let mut one = catalog(1, &roster);
    one.insert(&records[0], &roster, NOON).unwrap();
    assert!(one.endpoints(&BTreeSet::new()).is_empty());
}

#[test]
fn many_short_lived_endpoints_leave_no_trail() {
    let roster = roster(2);
    let me = identity(1);
    let mut one = catalog(1, &roster);
    let mut two = catalog(2, &roster);
    let mut stored = Stored::default();
    stored.apply(&one.put(&service("web", 1), &me, NOON).unwrap().batch);
    stored.apply(&one.put(&endpoint(1, 0), &me, NOON).unwrap().batch);
    let early = one.records_after(&me.id(), 0);
    let mut all = Vec::new();
    for n in 0u16..700 {
        let [high, low] = n.to_be_bytes();
        let Object::Endpoint(mut e) = endpoint(1, 1) else {
            unreachable!()
        };
        e.id = EndpointId([9, high, low, 0, 0, 0, 0, 0]);
        let key = endpoint_key(&e.id);
        for written in [
            one.put(&Object::Endpoint(e), &me, NOON),
            one.remove(Kind::ENDPOINT, &key, &me, NOON),
        ] {
            let written = written.unwrap();
            stored.apply(&written.batch);
            all.extend(written.records);
        }
    }
    assert!(one.logs[&me.id()].slots.len() < 600);
    assert_eq!(one.endpoints(&BTreeSet::new()).len(), 1);
    assert_eq!(one.services(NOON).len(), 1);
    // One that hears of it in the worst order, the old news last, agrees.
    all.reverse();
    insert_all(&mut two, &all, &roster, NOON);
    insert_all(&mut two, &early, &roster, NOON);
    assert!(same(&one, &two));
    let mut again = catalog(1, &roster);
    again.restore(&stored, NOON);
    assert!(same(&one, &again) && one.digest() == again.digest());
}

#[test]
fn what_is_gone_cluster_wide_is_forgotten_when_all_have_it() {
    let roster = roster(2);
    let (mut one, mut two) = (catalog(1, &roster), catalog(2, &roster));
    let mut records = one
        .put(&service("web", 1), &identity(1), NOON)
        .unwrap()
        .records;
    insert_all(&mut two, &records, &roster, NOON);
    records.extend(
        two.remove(Kind::SERVICE, b"web", &identity(2), NOON)
            .unwrap()
            .records,
    );
    records.extend(
        two.put(&endpoint(2, 1), &identity(2), NOON)
            .unwrap()
            .records,
    );
    insert_all(&mut one, &records, &roster, NOON);
    records.extend(
        one.put(&endpoint(1, 1), &identity(1), NOON)
            .unwrap()
            .records,
    );
    insert_all(&mut two, &records, &roster, NOON);
    assert!(one.collect(later(10), one.revision()).is_empty());
    assert_eq!(one.digest(), two.digest());
    assert!(one.collect(later(4000), 0).is_empty());
    assert!(!one.collect(later(4000), one.revision()).is_empty());
    assert_eq!(one.shared.len(), 0);
    // It says the same as the one that has not forgotten yet.
    two.move_on(later(4000));
    assert_eq!((one.digest(), two.shared.len()), (two.digest(), 1));
}

#[test]
fn what_a_record_from_the_future_outranks_is_not_missed() {
    let roster = roster(2);
    let (mut one, mut two) = (catalog(1, &roster), catalog(2, &roster));
    let web = |number: u8| service("web", number);
    let _ = one.put(&web(1), &identity(1), NOON).unwrap();
    let written = two.put(&web(2), &identity(2), later(4000)).unwrap();
    insert_all(&mut one, &written.records, &roster, NOON);
    assert_ne!(one.state_of(&SHARED), two.state_of(&SHARED));
    insert_all(&mut two, &one.records_that_count(&SHARED), &roster, NOON);
    assert_eq!(one.state_of(&SHARED), two.state_of(&SHARED));
    assert_eq!(one.services(NOON), two.services(NOON));
    assert_eq!(two.services(NOON).len(), 1);
}

#[test]
fn limits_hold_per_writer() {
    let roster = roster(2);
    let mut one = catalog(1, &roster);
    let sign = |sequence: u64, kind: u8| {
        let draft = Draft {
            generation: Generation(1),
            sequence,
            stamp: Stamp::at(NOON),
            network: 0,
            kind: Kind(kind),
            key: &sequence.to_be_bytes(),
            value: Some(&[7; 800]),
        };
        Record::sign(&roster.cluster(), &identity(2), &draft).unwrap()
    };
    let taken = (1..=100)
        .filter(|n| one.insert(&sign(*n, 99), &roster, NOON).is_ok())
        .count();
    assert_eq!(taken, log::MAX_UNKNOWN_OCTETS / sign(1, 99).bytes().len());
    assert!(
        one.insert(&sign(500, Kind::ENDPOINT.0), &roster, NOON)
            .is_ok()
    );
}

#[test]
fn ten_thousand_mutants_leave_no_trace() {
    let roster = roster(2);
    let mut two = catalog(2, &roster);
    let mut records = Vec::new();
    for n in 1..=5 {
        records.extend(
            two.put(&endpoint(2, n), &identity(2), NOON)
                .unwrap()
                .records,
        );
        records.extend(
            two.put(&service(&format!("s{n}"), n), &identity(2), NOON)
                .unwrap()
                .records,
        );
    }
    let mut one = catalog(1, &roster);
    insert_all(&mut one, &records[..6], &roster, NOON);
    let digest = one.digest();
    let mut random = Random::from_seed([8; 32]);
    for n in 0..10_000 {
        let mut bytes = records[n % records.len()].bytes().to_vec();
        let at = random.range(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.range(8);
        if let Ok(record) = Record::parse(&bytes) {
            assert!(one.insert(&record, &roster, NOON).is_err());
        }
    }
    assert_eq!(one.digest(), digest);
    insert_all(&mut one, &records, &roster, NOON);
    assert_eq!(one.digest(), two.digest());
}

/// Three writers that write and remove a few things, each at its own time, some far ahead, hearing of nothing or of all.
fn histories(ops: &[(u8, u8, u8, u16)]) -> (Roster, Vec<Record>) {
    let roster = roster(3);
    let mut writers: Vec<Catalog> = (1..=3).map(|n| catalog(n, &roster)).collect();
    let mut all: Vec<Record> = Vec::new();
    for (who, what, which, second) in ops {
        let n = who % 3 + 1;
        let me = identity(n);
        let wall = later(u64::from(*second));
        let known = all.clone();
        let writer = &mut writers[usize::from(who % 3)];
        let written = match what % 6 {
            0 => writer.put(&endpoint(n, which % 4), &me, wall),
            1 => writer.remove(
                Kind::ENDPOINT,
                &endpoint_key(&EndpointId([n, which % 4, 0, 0, 0, 0, 0, 0])),
                &me,
                wall,
            ),
            2 => writer.put(&service(&format!("s{}", which % 3), *which), &me, wall),
            3 => writer.remove(
                Kind::SERVICE,
                format!("s{}", which % 3).as_bytes(),
                &me,
                wall,
            ),
            4 => writer.put(&manual("db", *which), &me, wall),
            _ => {
                insert_all(writer, &known, &roster, wall);
                Ok(Written::default())
            }
        };
        all.extend(written.unwrap().records);
    }
    (roster, all)
}

fn ops() -> impl Strategy<Value = Vec<(u8, u8, u8, u16)>> {
    proptest::collection::vec((0u8..3, 0u8..6, 0u8..200, 0u16..300), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn merging_is_commutative_associative_and_idempotent(ops in ops(), seed in any::<[u8; 32]>()) {
        let (roster, all) = histories(&ops);
        let mut random = Random::from_seed(seed);
        let mut straight = catalog(9, &roster);
        insert_all(&mut straight, &all, &roster, NOON);
        let mut shuffled = all.clone();
        for at in (1..shuffled.len()).rev() {
            shuffled.swap(at, random.range(at as u64 + 1) as usize);
        }
        let mut other = catalog(9, &roster);
        insert_all(&mut other, &shuffled, &roster, NOON);
        insert_all(&mut other, &all, &roster, NOON);
        // Two halves merged: what one holds is given to the other.
        let (mut left, mut right) = (catalog(9, &roster), catalog(9, &roster));
        let (a, b) = shuffled.split_at(random.range(shuffled.len() as u64 + 1) as usize);
        insert_all(&mut left, a, &roster, NOON);
        insert_all(&mut right, b, &roster, NOON);
        for n in 1..=3 {
            insert_all(&mut left, &right.records_after(&identity(n).id(), 0), &roster, NOON);
        }
        for merged in [&other, &left] {
            prop_assert!(same(&straight, merged));
            for wall in [NOON, later(150), later(1000)] {
                prop_assert_eq!(straight.services(wall), merged.services(wall));
                prop_assert_eq!(straight.names(wall), merged.names(wall));
                prop_assert_eq!(straight.duplicates(wall), merged.duplicates(wall));
            }
        }
        // The roll-ups agree as soon as both know how far each log goes.
        for n in 1..=3 {
            let writer = identity(n).id();
            let top = straight.last_sequence(&writer);
            for catalog in [&mut straight, &mut other, &mut left] {
                catalog.extend(&writer, 0, top, &roster);
            }
        }
        prop_assert_eq!(straight.digest(), other.digest());
        prop_assert_eq!(straight.digest(), left.digest());
    }

    #[test]
    fn every_record_shows_in_the_roll_up(ops in ops()) {
        let (roster, all) = histories(&ops);
        let mut catalog = catalog(9, &roster);
        let mut seen = BTreeSet::from([catalog.digest()]);
        for record in &all {
            if catalog.insert(record, &roster, NOON).is_ok_and(|applied| applied.held) {
                prop_assert!(seen.insert(catalog.digest()));
            }
        }
    }
}
