//! A memory for the costly pure functions of [`super`]: checking a signature, multiplying on the curve. A simulator runs
//! all nodes of a cluster in one thread, so the same signature is checked by each of them and both ends of a handshake
//! compute the same secret; with this it is done once, and a search runs several times as many seeds.
//!
//! What it answers is what the function answered for exactly these inputs: nothing is weaker with it, only faster. It is
//! off in every thread until [`enable_for_this_thread`] is called there, which the daemon never does: it would gain
//! nothing, and secrets would stay in memory.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::sha256_parts;

/// Answers kept of each function; then it begins anew.
const MAX: usize = 1 << 16;

#[derive(Default)]
struct Memo {
    verdicts: BTreeMap<[u8; 32], bool>,
    publics: BTreeMap<[u8; 32], [u8; 32]>,
    shared: BTreeMap<[u8; 32], Option<[u8; 32]>>,
}

thread_local! {
    static MEMO: RefCell<Option<Memo>> = const { RefCell::new(None) };
}

/// From here on this thread remembers; what it remembered before is forgotten.
pub fn enable_for_this_thread() {
    MEMO.with_borrow_mut(|memo| *memo = Some(Memo::default()));
}

/// This thread forgets, and computes everything again.
pub fn disable_for_this_thread() {
    MEMO.with_borrow_mut(|memo| *memo = None);
}

pub(super) fn verdict(parts: &[&[u8]], compute: impl FnOnce() -> bool) -> bool {
    remember(|memo| &mut memo.verdicts, || sha256_parts(parts), compute)
}

/// Notes that a signature is good: who signs knows.
pub(super) fn note_good(public: impl FnOnce() -> [u8; 32], signature: &[u8], message: &[u8]) {
    if MEMO.with_borrow(Option::is_some) {
        verdict(&[&public(), signature, message], || true);
    }
}

pub(super) fn public(secret: &[u8; 32], compute: impl FnOnce() -> [u8; 32]) -> [u8; 32] {
    remember(|memo| &mut memo.publics, || *secret, compute)
}

/// What two keys share, by their public halves: it is the same whichever end computes it.
pub(super) fn shared(
    (one, other): (&[u8; 32], &[u8; 32]),
    compute: impl FnOnce() -> Option<[u8; 32]>,
) -> Option<[u8; 32]> {
    let key = || sha256_parts(&[one.min(other), one.max(other)]);
    remember(|memo| &mut memo.shared, key, compute)
}

fn remember<T: Copy>(
    map: impl Fn(&mut Memo) -> &mut BTreeMap<[u8; 32], T>,
    key: impl FnOnce() -> [u8; 32],
    compute: impl FnOnce() -> T,
) -> T {
    MEMO.with_borrow_mut(|memo| {
        let Some(memo) = memo else {
            return compute();
        };
        let (map, key) = (map(memo), key());
        if let Some(known) = map.get(&key) {
            return *known;
        }
        let answer = compute();
        if map.len() >= MAX {
            map.clear();
        }
        map.insert(key, answer);
        answer
    })
}

#[cfg(test)]
mod tests {
    use super::super::{
        Signing, is_sound_noise_key, verify, x25519, x25519_between, x25519_public,
    };
    use crate::model::NodeId;

    #[test]
    fn what_is_remembered_is_what_was_computed() {
        let (a, b) = ([7; 32], [9; 32]);
        let key = Signing::from_bytes(&[3; 32]);
        let (id, signature) = (NodeId(key.public()), key.sign(b"hello"));
        let all = || {
            let (pa, pb) = (x25519_public(&a), x25519_public(&b));
            (
                (pa, pb),
                [x25519_between(&a, &pa, &pb), x25519_between(&b, &pb, &pa)]
                    .map(|s| s.map(|s| *s.expose())),
                [[0; 32], pa].map(|key| is_sound_noise_key(&key)),
                [&b"hello"[..], b"hellp"].map(|text| verify(&id, text, &signature)),
                x25519_between(&a, &pa, &[0; 32]).is_none(),
            )
        };
        let computed = all();
        super::enable_for_this_thread();
        let (first, second) = (all(), all());
        super::disable_for_this_thread();
        assert!(computed == first && first == second);
        assert_eq!(
            computed.1[0],
            x25519(&a, &x25519_public(&b)).map(|s| *s.expose())
        );
    }
}
