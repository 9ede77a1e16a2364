//! Signed things: records of the catalog and of the roster, as they came and signed anew.

use std::collections::BTreeSet;

use weft_core::catalog::Catalog;
use weft_core::crypto::{Random, sha256};
use weft_core::fuzz;
use weft_core::identity::Identity;
use weft_core::ipam::Ring;
use weft_core::model::{AddressPlan, Generation, NodeId, WallMicros};
use weft_core::record::{MAX_KEY, MAX_RECORD, Record};
use weft_core::roster::{MAX_LINK, Rights, Roster};
use weft_core::session::Trust;
use weft_core::store::{Stored, Table};

use super::Seen;
use crate::pieces::{cut, join, marked};
use crate::scene::{NOON, SCENE, identity, label, second};

const HEADER: usize = 63;
const SIGNATURE: usize = 64;

thread_local! {
    // Checking all signatures anew for each input would be most of its time.
    static STORES: (Roster, Catalog) = {
        let roster = Roster::restore(SCENE.cluster, &SCENE.disk).expect("a member's disk has it");
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &SCENE.cluster);
        let plan = plan.expect("the default");
        let mut catalog = Catalog::new(identity(1).id(), SCENE.cluster, plan, Generation(9));
        catalog.restore(&SCENE.disk, NOON);
        (roster, catalog)
    };
}

/// The roster and the catalog that host 1 has on its disk.
pub(super) fn stores() -> (Roster, Catalog) {
    STORES.with(Clone::clone)
}

/// A record of these octets by host 2: writer, lengths and signature are made right, all else is as it was.
pub(super) fn reseal(octets: &[u8]) -> Vec<u8> {
    let end = octets.len().min(MAX_RECORD).saturating_sub(SIGNATURE);
    let mut bytes = octets[..end].to_vec();
    bytes.resize(end.max(HEADER), 0);
    bytes[..32].copy_from_slice(&second().0);
    let most = (bytes.len() - HEADER).min(MAX_KEY);
    bytes[60] = bytes[60].min(most as u8);
    let value = bytes.len() - HEADER - usize::from(bytes[60]);
    bytes[61..63].copy_from_slice(&(value as u16).to_be_bytes());
    let signed = [b"weft record 1", SCENE.cluster.0.as_slice(), &bytes].concat();
    bytes.extend_from_slice(&identity(2).sign(&signed));
    bytes
}

/// Records, one per piece, for host 1's catalog: each as it is, and signed by host 2.
pub(super) fn record(data: &[u8]) -> Seen {
    let (roster, _) = stores();
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &SCENE.cluster).expect("the default");
    let mut catalog = Catalog::new(identity(1).id(), SCENE.cluster, plan, Generation(9));
    let mut stored = Stored::default();
    let mut taken = false;
    for piece in cut(data, 8) {
        for bytes in [piece.to_vec(), reseal(piece)] {
            let Ok(record) = Record::parse(&bytes) else {
                continue;
            };
            assert_eq!(record.bytes(), bytes);
            check_value(&record);
            let Ok(applied) = catalog.insert(&record, &roster, NOON) else {
                continue;
            };
            assert!(record.verify(&SCENE.cluster), "taken without a signature");
            assert!(roster.is_member(&record.writer()), "taken from a stranger");
            stored.apply(&applied.batch);
            taken = true;
        }
    }
    read_all(&catalog, &roster);
    // As any node does every few seconds, and a restored one at once: what is long gone does not count. Nothing is
    // settled, so nothing is forgotten.
    stored.apply(&catalog.collect(NOON, 0));
    let mut restored = Catalog::new(identity(1).id(), SCENE.cluster, plan, Generation(9));
    restored.restore(&stored, NOON);
    assert_eq!(
        restored.digest(),
        catalog.digest(),
        "the disk knows the same"
    );
    Seen::when(taken)
}

fn check_value(record: &Record) {
    let again = |value: &[u8]| fuzz::value(record.kind(), &record.writer(), record.key(), value);
    if let Some(once) = again(record.value()) {
        assert_eq!(again(&once).as_ref(), Some(&once), "read as it was written");
    }
}

/// Everything that planning asks of a catalog.
fn read_all(catalog: &Catalog, roster: &Roster) {
    let hidden = BTreeSet::new();
    let wall = WallMicros(NOON.0 + 1);
    let grants = catalog.grants();
    let removed = BTreeSet::from([second()]);
    let ring = Ring::compute(
        roster.founder(),
        AddressPlan::DEFAULT_RANGE,
        &grants,
        &removed,
    );
    for owner in ring.owners() {
        let _ = ring.parts(&owner);
    }
    let _ = (catalog.nodes(), catalog.endpoints(&hidden));
    let _ = (catalog.conflicts(&hidden), catalog.services(wall));
    let _ = (catalog.names(wall), catalog.networks(wall));
    let _ = (catalog.duplicates(wall), catalog.used_addresses(&removed));
    let destroyed = catalog.destroyed();
    for node in catalog.nodes().keys() {
        let vote = |voter: &NodeId| catalog.vote(voter, node);
        if let Some(electorate) = catalog.electorate(node, &destroyed) {
            let _ = (electorate.locked(vote), electorate.decided(vote, false));
        }
    }
    let _ = (catalog.next_due(wall), catalog.writer_state());
}

pub(super) fn record_seeds() -> Vec<Vec<u8>> {
    let mut records = SCENE.rows(Table::Records);
    records.extend(SCENE.rows(Table::OwnRecords));
    records.retain(|bytes| Record::parse(bytes).is_ok());
    let mut seeds: Vec<Vec<u8>> = records.iter().map(|record| join([record])).collect();
    seeds.extend(records.chunks(8).map(join));
    seeds
}

/// Records of the roster. A piece is: whose (host 1 to 4), what is left as it came (1 = index, 2 = what goes before,
/// 4 = the signature), kind and body; or, from 0x80 on, a whole record, a chain as a handshake shows it, or a row that
/// the disk loses.
pub(super) fn roster(data: &[u8]) -> Seen {
    let (mut roster, mut stored) = founded();
    let mut taken = false;
    for piece in cut(data, 12) {
        match piece {
            [0x80, raw @ ..] => taken |= take(&mut roster, &mut stored, raw),
            [0x81, chain @ ..] => {
                if let Some(learnt) = roster.learn_chain(chain) {
                    assert!(roster.is_member(&learnt));
                    taken = true;
                }
            }
            [0x82, row, ..] => lose(&roster, &stored, *row),
            [who, flags, body @ ..] => {
                let bytes = made(&roster, 1 + who % 4, *flags, body);
                taken |= take(&mut roster, &mut stored, &bytes);
            }
            _ => {}
        }
    }
    check(&roster, &stored);
    Seen::when(taken)
}

/// A disk that lost a row of the roster is refused, or what is left is in order.
fn lose(roster: &Roster, stored: &Stored, row: u8) {
    let mut stored = stored.clone();
    let keys: Vec<Vec<u8>> = stored.0.keys().cloned().collect();
    stored.0.remove(&keys[usize::from(row) % keys.len()]);
    let Ok(restored) = Roster::restore(roster.cluster(), &stored) else {
        return;
    };
    for issuer in restored.heads().keys() {
        for (index, record) in (0u32..).zip(restored.records_from(issuer, 0)) {
            assert_eq!(record[32..36], index.to_be_bytes(), "a chain with a gap");
        }
    }
}

/// A cluster of hosts 1 and 2.
fn founded() -> (Roster, Stored) {
    let mut random = Random::from_seed([9; 32]);
    let mut stored = Stored::default();
    let (mut roster, batch) = Roster::found(&identity(1), label("one"), &mut random);
    stored.apply(&batch);
    let (id, noise) = keys(2);
    let issued = roster.admit(&identity(1), id, noise, label("two"), Rights::ALL);
    stored.apply(&issued.expect("a founder may").change.batch);
    (roster, stored)
}

fn keys(number: u8) -> (NodeId, [u8; 32]) {
    let identity = identity(number);
    (identity.id(), identity.noise_public())
}

fn take(roster: &mut Roster, stored: &mut Stored, bytes: &[u8]) -> bool {
    if let Some(once) = fuzz::roster_record(bytes) {
        // A name is read in lower case; the octets that count are those that came.
        assert!(once.eq_ignore_ascii_case(bytes), "written as it was read");
    }
    let Ok(inserted) = roster.insert(bytes, NOON) else {
        return false;
    };
    stored.apply(&inserted.batch);
    let again = roster.insert(bytes, NOON).expect("it was taken before");
    assert!(again.known);
    true
}

/// A record of the host, with all right that is not wrong on purpose.
fn made(roster: &Roster, who: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    let issuer = identity(who);
    let chain: Vec<&[u8]> = roster.records_from(&issuer.id(), 0).collect();
    let given = body.get(..4).unwrap_or(&[0; 4]);
    let index = match flags & 1 {
        0 => (chain.len() as u32).to_be_bytes(),
        _ => [given[0], given[1], given[2], given[3]],
    };
    let previous = match (flags & 2, chain.last()) {
        (0, Some(last)) => sha256(last),
        (0, None) => admission_of(roster, &issuer.id()).unwrap_or_default(),
        _ => sha256(body),
    };
    let mut bytes = issuer.id().0.to_vec();
    bytes.extend_from_slice(&index);
    bytes.extend_from_slice(&previous);
    let room = MAX_LINK - SIGNATURE - bytes.len();
    bytes.extend_from_slice(&body[..body.len().min(room)]);
    sign(&issuer, roster, bytes, flags)
}

fn sign(issuer: &Identity, roster: &Roster, mut bytes: Vec<u8>, flags: u8) -> Vec<u8> {
    let cluster = roster.cluster();
    let signed = [b"weft roster 1", cluster.0.as_slice(), &bytes].concat();
    let mut signature = issuer.sign(&signed);
    signature[0] ^= flags >> 2 & 1;
    bytes.extend_from_slice(&signature);
    bytes
}

fn admission_of(roster: &Roster, id: &NodeId) -> Option<[u8; 32]> {
    let admits = |record: &&&[u8]| record[68] == 2 && record.get(69..101) == Some(&id.0[..]);
    let records = roster.records();
    records.iter().find(admits).map(|record| sha256(record))
}

fn check(roster: &Roster, stored: &Stored) {
    let restored = Roster::restore(roster.cluster(), stored).expect("it was written");
    assert_eq!(restored.heads(), roster.heads(), "the disk knows the same");
    // A fork is no part of the chain: after a start others tell of it.
    if roster.forks().is_empty() {
        assert_eq!(restored.digest(), roster.digest());
    }
    let members = |roster: &Roster| -> Vec<NodeId> {
        let known = (1..6).map(|number| identity(number).id());
        known
            .filter(|id| roster.standing(id) != weft_core::roster::Standing::Unknown)
            .collect()
    };
    let _ = (roster.pending(), roster.forks(), roster.too_deep());
    // What handshakes taught is not on the disk; what holds by the chains alone is.
    assert!(members(roster).len() >= members(&restored).len());
    for member in roster.members() {
        let _ = roster.chain_of(&member.id);
    }
}

pub(super) fn roster_seeds() -> Vec<Vec<u8>> {
    let admit = |number: u8, rights: u16| {
        let (id, noise) = keys(number);
        let name = format!("host-{number}");
        let mut body = vec![2];
        body.extend_from_slice(&id.0);
        body.extend_from_slice(&noise);
        body.extend_from_slice(&rights.to_be_bytes());
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body
    };
    let revoke = |number: u8, links: u32| {
        let mut body = vec![3];
        body.extend_from_slice(&identity(number).id().0);
        body.extend_from_slice(&7u64.to_be_bytes());
        body.extend_from_slice(&links.to_be_bytes());
        body.extend_from_slice(&[0; 32]);
        body
    };
    let of = |who: u8, body: Vec<u8>| marked(who, &marked(0, &body));
    let (roster, _) = founded();
    let chain = roster.admit_chain(&second());
    let mut unknown = vec![9];
    unknown.extend_from_slice(b"of a later version");
    let founder = identity(1).id();
    let whole = roster.records_from(&founder, 1).map(|r| marked(0x80, r));
    let mut seeds = vec![
        join([
            of(0, admit(3, 31)),
            of(2, admit(4, 31)),
            of(3, revoke(2, 0)),
        ]),
        join([of(1, admit(3, 5)), of(0, revoke(2, 1)), of(0, revoke(3, 0))]),
        join([
            of(0, admit(3, 31)),
            of(0, revoke(3, 0)),
            of(2, admit(4, 31)),
        ]),
        join([
            of(0, admit(3, 31)),
            of(0, revoke(3, u32::MAX)),
            of(2, admit(4, 31)),
        ]),
        join([
            of(0, admit(3, 31)),
            of(2, admit(4, 31)),
            of(2, revoke(4, 0)),
            vec![0x82, 3],
            vec![0x82, 2],
        ]),
        join([of(0, unknown), of(0, admit(3, 31))]),
        join([of(0, admit(3, 31)), of(0, marked(4, &[5; 32]))]),
        join([marked(0x81, &chain)]),
    ];
    seeds.extend(whole.map(|piece| join([piece])));
    seeds
}
