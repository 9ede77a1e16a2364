//! The Noise handshakes, and the only module that names snow. Its random numbers come from ours, so that equal seeds shake
//! hands alike, and its key agreement refuses low-order keys, which snow by itself takes.

use std::cell::RefCell;
use std::sync::LazyLock;

use snow::Builder;
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver, FallbackResolver, RingResolver};
use snow::types::{Cipher, Dh, Hash, Random as SnowRandom};

use super::transport::{EspKeys, TransportKeys};
use crate::crypto::{self, Random, Secret, hkdf_sha256, x25519_between, x25519_public};
use crate::identity::Identity;
use crate::wire::MAX_DATAGRAM;

/// Octets of a first message beside its payload: ephemeral key, sealed static key, tag.
pub(super) const FIRST_OVERHEAD: usize = 32 + 48 + 16;

static IK: LazyLock<NoiseParams> = LazyLock::new(|| {
    "Noise_IK_25519_AESGCM_SHA256"
        .parse()
        .expect("a constant that the tests parse")
});
static IK_PSK1: LazyLock<NoiseParams> = LazyLock::new(|| {
    "Noise_IKpsk1_25519_AESGCM_SHA256"
        .parse()
        .expect("a constant that the tests parse")
});

/// The handshake failed: wrong key, wrong secret, altered on the way. Nothing is told about which.
#[derive(Debug)]
pub(super) struct NoiseError;

impl From<snow::Error> for NoiseError {
    fn from(_: snow::Error) -> Self {
        NoiseError
    }
}

/// What both sides must agree on before the first message.
pub(super) struct Terms<'a> {
    pub(super) identity: &'a Identity,
    pub(super) prologue: &'a [u8],
    /// IKpsk1 instead of IK.
    pub(super) psk: Option<&'a Secret<32>>,
}

/// One handshake under way.
pub(super) struct Noise {
    state: Box<snow::HandshakeState>,
}

impl Noise {
    /// Calls the holder of `remote`.
    pub(super) fn initiator(
        terms: &Terms<'_>,
        remote: &[u8; 32],
        random: &mut Random,
    ) -> Result<Self, NoiseError> {
        let state = builder(terms, random)?
            .remote_public_key(remote)?
            .build_initiator()?;
        Ok(Self {
            state: Box::new(state),
        })
    }

    /// Waits for a call.
    pub(super) fn responder(terms: &Terms<'_>, random: &mut Random) -> Result<Self, NoiseError> {
        let state = builder(terms, random)?.build_responder()?;
        Ok(Self {
            state: Box::new(state),
        })
    }

    pub(super) fn write(&mut self, payload: &[u8]) -> Result<Vec<u8>, NoiseError> {
        let mut message = vec![0; payload.len() + FIRST_OVERHEAD];
        let len = self.state.write_message(payload, &mut message)?;
        message.truncate(len);
        Ok(message)
    }

    /// Reads the other side's message; on failure the handshake goes on waiting for the true one.
    pub(super) fn read(&mut self, message: &[u8]) -> Result<Vec<u8>, NoiseError> {
        if message.len() > MAX_DATAGRAM {
            return Err(NoiseError);
        }
        let mut payload = vec![0; message.len()];
        let len = self.state.read_message(message, &mut payload)?;
        payload.truncate(len);
        Ok(payload)
    }

    pub(super) fn remote_static(&self) -> Option<[u8; 32]> {
        self.state.get_remote_static()?.try_into().ok()
    }

    /// The hash over all that was said: signed by a joiner, it can't be said again elsewhere.
    pub(super) fn hash(&self) -> Vec<u8> {
        self.state.get_handshake_hash().to_vec()
    }

    /// The session's keys, one per direction, once both messages are through.
    pub(super) fn into_keys(mut self, cipher: crypto::Cipher) -> TransportKeys {
        let is_initiator = self.state.is_initiator();
        let (to_responder, to_initiator) = self.state.dangerously_get_raw_split();
        let (to_responder, to_initiator) = (Secret::new(to_responder), Secret::new(to_initiator));
        let (send, receive) = match is_initiator {
            true => (&to_responder, &to_initiator),
            false => (&to_initiator, &to_responder),
        };
        let data = |split: &Secret<32>| {
            hkdf_sha256(
                split.expose(),
                b"weft session 1",
                &[b"data ", cipher.name().as_bytes()],
            )
        };
        let esp = |split: &Secret<32>| {
            hkdf_sha256(
                split.expose(),
                b"weft session 1",
                &[b"esp ", b"rfc4106(gcm(aes))"],
            )
        };
        TransportKeys {
            cipher,
            send: data(send),
            receive: data(receive),
            esp: Some(EspKeys {
                send: esp(send),
                receive: esp(receive),
            }),
        }
    }
}

fn builder<'a>(terms: &'a Terms<'a>, random: &mut Random) -> Result<Builder<'a>, NoiseError> {
    let params = if terms.psk.is_some() { &IK_PSK1 } else { &IK };
    let ours = Ours(RefCell::new(random.fork()));
    let rest = FallbackResolver::new(Box::new(RingResolver), Box::new(DefaultResolver));
    let resolver = FallbackResolver::new(Box::new(ours), Box::new(rest));
    let builder = Builder::with_resolver((*params).clone(), Box::new(resolver))
        .local_private_key(terms.identity.noise_secret().expose())?
        .prologue(terms.prologue)?;
    match terms.psk {
        Some(psk) => Ok(builder.psk(1, psk.expose())?),
        None => Ok(builder),
    }
}

/// Our own generator and key agreement; ciphers and hashes are ring's.
struct Ours(RefCell<Random>);

impl CryptoResolver for Ours {
    fn resolve_rng(&self) -> Option<Box<dyn SnowRandom>> {
        Some(Box::new(Source(self.0.borrow_mut().fork())))
    }
    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        match choice {
            DHChoice::Curve25519 => Some(Box::new(StrictDh::default())),
            _ => None,
        }
    }
    fn resolve_hash(&self, _: &HashChoice) -> Option<Box<dyn Hash>> {
        None
    }
    fn resolve_cipher(&self, _: &CipherChoice) -> Option<Box<dyn Cipher>> {
        None
    }
}

struct Source(Random);

impl SnowRandom for Source {
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), snow::Error> {
        self.0.fill(bytes);
        Ok(())
    }
}

struct StrictDh {
    secret: Secret<32>,
    public: [u8; 32],
}

impl Default for StrictDh {
    fn default() -> Self {
        Self {
            secret: Secret::new([0; 32]),
            public: [0; 32],
        }
    }
}

impl Dh for StrictDh {
    fn name(&self) -> &'static str {
        "25519"
    }
    fn pub_len(&self) -> usize {
        32
    }
    fn priv_len(&self) -> usize {
        32
    }
    fn set(&mut self, privkey: &[u8]) {
        let mut secret = [0; 32];
        secret.copy_from_slice(&privkey[..32]);
        self.public = x25519_public(&secret);
        self.secret = Secret::new(secret);
    }
    fn generate(&mut self, rng: &mut dyn SnowRandom) -> Result<(), snow::Error> {
        let mut secret = [0; 32];
        rng.try_fill_bytes(&mut secret)?;
        self.set(&secret);
        Ok(())
    }
    fn pubkey(&self) -> &[u8] {
        &self.public
    }
    fn privkey(&self) -> &[u8] {
        self.secret.expose()
    }
    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        // snow hands over its key buffer, which is as long as the longest key of any curve.
        let public = pubkey.first_chunk::<32>().ok_or(snow::Error::Dh)?;
        let shared =
            x25519_between(self.secret.expose(), &self.public, public).ok_or(snow::Error::Dh)?;
        out[..32].copy_from_slice(shared.expose());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Cipher;

    fn identities() -> (Identity, Identity, Random) {
        let mut random = Random::from_seed([8; 32]);
        let (a, b) = (
            Identity::generate(&mut random),
            Identity::generate(&mut random),
        );
        (a, b, random)
    }

    fn terms<'a>(identity: &'a Identity, psk: Option<&'a Secret<32>>) -> Terms<'a> {
        Terms {
            identity,
            prologue: b"test",
            psk,
        }
    }

    #[test]
    fn both_ends_get_the_same_keys() {
        let (a, b, mut random) = identities();
        let psk = Secret::new([1; 32]);
        for psk in [None, Some(&psk)] {
            let mut caller =
                Noise::initiator(&terms(&a, psk), &b.noise_public(), &mut random).unwrap();
            let mut called = Noise::responder(&terms(&b, psk), &mut random).unwrap();
            let first = caller.write(b"hi").unwrap();
            assert_eq!(first.len(), FIRST_OVERHEAD + 2);
            assert_eq!(called.read(&first).unwrap(), b"hi");
            assert_eq!(called.remote_static(), Some(a.noise_public()));
            let second = called.write(b"ho").unwrap();
            assert_eq!(second.len(), 32 + 16 + 2);
            assert_eq!(caller.read(&second).unwrap(), b"ho");
            assert_eq!(caller.hash(), called.hash());
            let (x, y) = (
                caller.into_keys(Cipher::Aes256Gcm),
                called.into_keys(Cipher::Aes256Gcm),
            );
            assert!(x.send == y.receive && x.receive == y.send && x.send != x.receive);
            let (esp_x, esp_y) = (x.esp.unwrap(), y.esp.unwrap());
            assert!(esp_x.send == esp_y.receive && esp_x.receive == esp_y.send);
            assert!(
                esp_x.send != esp_x.receive && esp_x.send.expose()[..32] != x.send.expose()[..]
            );
        }
    }

    #[test]
    fn a_wrong_secret_is_refused_before_any_answer() {
        let (a, b, mut random) = identities();
        let (right, wrong) = (Secret::new([1; 32]), Secret::new([2; 32]));
        let mut caller =
            Noise::initiator(&terms(&a, Some(&wrong)), &b.noise_public(), &mut random).unwrap();
        let mut called = Noise::responder(&terms(&b, Some(&right)), &mut random).unwrap();
        assert!(called.read(&caller.write(b"").unwrap()).is_err());
    }

    #[test]
    fn low_order_keys_get_no_handshake() {
        let (a, b, mut random) = identities();
        let mut caller = Noise::initiator(&terms(&a, None), &[0; 32], &mut random).unwrap();
        assert!(caller.write(b"").is_err());
        let mut called = Noise::responder(&terms(&b, None), &mut random).unwrap();
        assert!(called.read(&[0; 120]).is_err());
    }

    #[test]
    fn short_messages_are_errors_and_the_true_one_still_works() {
        let (a, b, mut random) = identities();
        let mut caller =
            Noise::initiator(&terms(&a, None), &b.noise_public(), &mut random).unwrap();
        let mut called = Noise::responder(&terms(&b, None), &mut random).unwrap();
        let first = caller.write(b"payload").unwrap();
        for len in 0..first.len() {
            assert!(called.read(&first[..len]).is_err(), "{len}");
        }
        assert_eq!(called.read(&first).unwrap(), b"payload");
    }
}
