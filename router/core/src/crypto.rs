//! The primitives, and the only module that names ring and the dalek crates ([`crate::session`]'s `noise` is the only
//! one that names snow): the generator everything random is drawn from, secrets that wipe themselves, hashes,
//! signatures, key agreement and the packets' AEAD.

pub mod memo;

use std::convert::Infallible;
use std::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng, TryCryptoRng, TryRng};
use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::{digest, hkdf, hmac};
use serde::{Deserialize, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::model::NodeId;

/// The one source of randomness of a node, seeded once by its owner: by the operating system in the daemon, by a number
/// in the simulator. It is a rand generator too, for libraries that want one.
pub struct Random(StdRng);

impl Random {
    /// Starts a generator. Equal seeds draw equal numbers.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(StdRng::from_seed(seed))
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }

    /// `N` random bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    /// A random number.
    pub fn u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A random number below `end`, all of them equally likely; 0 when `end` is 0.
    pub fn range(&mut self, end: u64) -> u64 {
        if end == 0 {
            return 0;
        }
        self.0.random_range(0..end)
    }

    /// A generator of its own for a part of the node, so that parts don't shift each other's numbers.
    pub fn fork(&mut self) -> Self {
        let mut seed: [u8; 32] = self.bytes();
        let child = Self::from_seed(seed);
        seed.zeroize();
        child
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Random(***)")
    }
}

impl TryRng for Random {
    type Error = Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        self.0.try_next_u32()
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        self.0.try_next_u64()
    }
    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Infallible> {
        self.0.try_fill_bytes(dst)
    }
}

impl TryCryptoRng for Random {}

/// Bytes that nobody may see: wiped when dropped, never printed, compared in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret<const N: usize>([u8; N]);

impl<const N: usize> Secret<N> {
    /// Takes charge of `bytes`.
    pub fn new(bytes: [u8; N]) -> Self {
        Self(bytes)
    }

    /// Draws a fresh one.
    pub fn generate(random: &mut Random) -> Self {
        Self(random.bytes())
    }

    /// The bytes, for the one place that needs them.
    pub fn expose(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl<const N: usize> PartialEq for Secret<N> {
    fn eq(&self, other: &Self) -> bool {
        same(&self.0, &other.0)
    }
}

impl<const N: usize> Eq for Secret<N> {}

/// Compares without telling by its duration where the difference lies.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y));
    a.len() == b.len() && std::hint::black_box(difference) == 0
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha256_parts(&[bytes])
}

/// SHA-256 over several pieces, as if they stood one after the other.
pub fn sha256_parts(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA256 (RFC 5869): a key for the purpose that `info` names, from `ikm`.
pub fn hkdf_sha256<const N: usize>(ikm: &[u8], salt: &[u8], info: &[&[u8]]) -> Secret<N> {
    let mut key = [0; N];
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(ikm)
        .expand(info, Length(N))
        .and_then(|okm| okm.fill(&mut key))
        .expect("fails only beyond 255 blocks of output, and keys are short");
    Secret(key)
}

/// HMAC-SHA256 cut to 16 bytes.
pub fn mac16(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 16] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in parts {
        context.update(part);
    }
    let mut tag = [0; 16];
    tag.copy_from_slice(&context.sign().as_ref()[..16]);
    tag
}

/// Checks a [`mac16`] in constant time.
pub fn check_mac16(key: &[u8; 32], parts: &[&[u8]], tag: &[u8]) -> bool {
    same(&mac16(key, parts), tag)
}

/// Checks an Ed25519 signature, strictly: one message, key and signature have one verdict everywhere.
pub fn verify(id: &NodeId, message: &[u8], signature: &[u8]) -> bool {
    let Ok(parsed) = Signature::from_slice(signature) else {
        return false;
    };
    memo::verdict(&[&id.0, signature, message], || {
        VerifyingKey::from_bytes(&id.0)
            .is_ok_and(|key| !key.is_weak() && key.verify_strict(message, &parsed).is_ok())
    })
}

/// An Ed25519 key pair.
#[derive(Clone)]
pub(crate) struct Signing(SigningKey);

impl Signing {
    pub(crate) fn from_bytes(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    pub(crate) fn seed(&self) -> Secret<32> {
        Secret(self.0.to_bytes())
    }

    pub(crate) fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        let signature = self.0.sign(message).to_bytes();
        memo::note_good(|| self.public(), &signature, message);
        signature
    }
}

/// The public half of an X25519 key.
pub(crate) fn x25519_public(secret: &[u8; 32]) -> [u8; 32] {
    memo::public(secret, || {
        PublicKey::from(&StaticSecret::from(*secret)).to_bytes()
    })
}

/// [`x25519`] for one who knows its own public half.
pub(crate) fn x25519_between(
    secret: &[u8; 32],
    own: &[u8; 32],
    public: &[u8; 32],
) -> Option<Secret<32>> {
    memo::shared((own, public), || {
        x25519(secret, public).map(|shared| *shared.expose())
    })
    .map(Secret)
}

/// X25519 (RFC 7748). `None` for a low-order peer key, whose shared secret is all zeros whatever ours is (§6.1).
pub(crate) fn x25519(secret: &[u8; 32], public: &[u8; 32]) -> Option<Secret<32>> {
    let shared = StaticSecret::from(*secret).diffie_hellman(&PublicKey::from(*public));
    shared.was_contributory().then(|| Secret(shared.to_bytes()))
}

/// Is `public` a key that a node may be admitted with? Low-order points are refused.
pub fn is_sound_noise_key(public: &[u8; 32]) -> bool {
    // Every clamped scalar is a multiple of eight, so any one of them shows a low-order point.
    memo::verdict(&[b"sound", public], || {
        x25519(&[0x42; 32], public).is_some()
    })
}

/// The AEADs that packets may be sealed with. The shell knows whether this CPU has AES instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Cipher {
    /// AES-256-GCM: the faster one where the CPU has AES.
    Aes256Gcm,
    /// ChaCha20-Poly1305: the faster one elsewhere.
    ChaCha20Poly1305,
}

impl Cipher {
    /// As `weft status` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Cipher::Aes256Gcm => "aes-256-gcm",
            Cipher::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            Cipher::Aes256Gcm => &aead::AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }
}

/// Bytes that sealing adds.
pub const TAG_LEN: usize = 16;

/// One AEAD key, used in one direction for one purpose. The caller owns the counter and never uses a value twice.
pub(crate) struct AeadKey(LessSafeKey);

impl AeadKey {
    pub(crate) fn new(cipher: Cipher, key: &Secret<32>) -> Self {
        let key = UnboundKey::new(cipher.algorithm(), key.expose())
            .expect("both algorithms take keys of 32 bytes");
        Self(LessSafeKey::new(key))
    }

    /// Seals `text` in place and gives the tag. `None` only for texts beyond the algorithm's limit of 64 GiB.
    pub(crate) fn seal(&self, counter: u64, aad: &[u8], text: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(counter), Aad::from(aad), text)
            .ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Opens `sealed` (text and tag) in place and gives the text.
    pub(crate) fn open<'a>(
        &self,
        counter: u64,
        aad: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        self.0
            .open_in_place(nonce(counter), Aad::from(aad), sealed)
            .ok()
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_draw_equal_numbers_and_forks_differ() {
        let (mut a, mut b) = (Random::from_seed([1; 32]), Random::from_seed([1; 32]));
        assert_eq!(a.bytes::<40>(), b.bytes::<40>());
        assert_eq!(a.fork().u64(), b.fork().u64());
        assert_ne!(a.fork().u64(), a.fork().u64());
        assert!((0..1000).all(|_| a.range(7) < 7));
        assert_eq!(a.range(0), 0);
    }

    #[test]
    fn hashes_match_published_vectors() {
        let hex = data_encoding::HEXLOWER.encode(&sha256(b"abc"));
        assert_eq!(
            hex,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        // RFC 5869 A.1.
        let okm = hkdf_sha256::<42>(
            &[0x0b; 22],
            &(0..=12).collect::<Vec<u8>>(),
            &[&[0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9]],
        );
        assert!(
            data_encoding::HEXLOWER
                .encode(okm.expose())
                .starts_with("3cb25f25faacd57a90434f64d0362f2a")
        );
    }

    #[test]
    fn low_order_keys_are_refused() {
        let mut one = [0; 32];
        one[0] = 1;
        assert!(!is_sound_noise_key(&[0; 32]));
        assert!(!is_sound_noise_key(&one));
        assert!(is_sound_noise_key(&x25519_public(&[9; 32])));
    }

    #[test]
    fn signatures_hold_for_their_message_alone() {
        let key = Signing::from_bytes(&[3; 32]);
        let id = NodeId(key.public());
        let signature = key.sign(b"hello");
        assert!(verify(&id, b"hello", &signature));
        assert!(!verify(&id, b"hellp", &signature));
        assert!(!verify(&NodeId([0; 32]), b"hello", &signature));
        assert!(!verify(&id, b"hello", &signature[..63]));
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(format!("{:?}", Secret::new([7u8; 32])), "***");
        assert_eq!(format!("{:?}", Random::from_seed([7; 32])), "Random(***)");
    }

    #[test]
    fn a_mac_is_checked_whole() {
        let tag = mac16(&[1; 32], &[b"ab", b"c"]);
        assert!(check_mac16(&[1; 32], &[b"abc"], &tag));
        assert!(!check_mac16(&[1; 32], &[b"abc"], &tag[..15]));
        assert!(!check_mac16(&[2; 32], &[b"abc"], &tag));
    }
}
