//! Who a node is: an Ed25519 key that signs, whose public half is the node's id, and an X25519 key for the sessions,
//! which the roster's admit record binds to it.

use std::fmt;

use crate::crypto::{Random, Secret, Signing, x25519_public};
use crate::model::NodeId;

/// A node's own keys. Made once, kept on disk, never shown.
#[derive(Clone)]
pub struct Identity {
    signing: Signing,
    noise: Secret<32>,
    id: NodeId,
    noise_public: [u8; 32],
}

impl Identity {
    /// Draws new keys.
    pub fn generate(random: &mut Random) -> Self {
        Self::from_bytes(&Secret::generate(random))
    }

    /// The keys as [`Self::to_bytes`] gave them.
    pub fn from_bytes(bytes: &Secret<64>) -> Self {
        let (mut seed, mut noise) = ([0; 32], [0; 32]);
        seed.copy_from_slice(&bytes.expose()[..32]);
        noise.copy_from_slice(&bytes.expose()[32..]);
        let (seed, noise) = (Secret::new(seed), Secret::new(noise));
        let signing = Signing::from_bytes(seed.expose());
        Self {
            id: NodeId(signing.public()),
            noise_public: x25519_public(noise.expose()),
            signing,
            noise,
        }
    }

    /// For the disk: the Ed25519 seed, then the X25519 key.
    pub fn to_bytes(&self) -> Secret<64> {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(self.signing.seed().expose());
        bytes[32..].copy_from_slice(self.noise.expose());
        Secret::new(bytes)
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The public half of the sessions' key.
    pub fn noise_public(&self) -> [u8; 32] {
        self.noise_public
    }

    /// Signs `message`. The message begins with a tag that says what it is, so that no signature fits elsewhere.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.signing.sign(message)
    }

    pub(crate) fn noise_secret(&self) -> &Secret<32> {
        &self.noise
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::verify;

    #[test]
    fn an_identity_survives_the_disk_and_signs_as_its_id() {
        let identity = Identity::generate(&mut Random::from_seed([5; 32]));
        let again = Identity::from_bytes(&identity.to_bytes());
        assert_eq!(again.id(), identity.id());
        assert_eq!(again.noise_public(), identity.noise_public());
        assert!(verify(&identity.id(), b"x", &again.sign(b"x")));
        let shown = format!("{identity:?}");
        assert_eq!(shown, format!("Identity({})", identity.id().short()));
    }
}
