//! Who knocks: told apart before anything of a handshake is copied, queued or counted for its sender. Strangers cost the
//! thread that reads a MAC, and those to whom this node has to listen nothing.

use super::cookie::MacKeys;
use super::join;
use crate::crypto::Secret;
use crate::token::secret_of;
use crate::wire::{DatagramType, MAX_DATAGRAM};

/// Knows the holders of a cluster's secret, and of invitations to it, by the MAC on their handshakes. That they hold it is
/// all it says: whose handshake it is, and whether it is new, is still to be found out.
#[derive(Debug)]
pub struct Guard {
    secret: Secret<32>,
    macs: MacKeys,
}

impl Guard {
    /// For members of the cluster that has this secret.
    pub fn new(cluster_secret: &Secret<32>) -> Self {
        Self {
            secret: cluster_secret.clone(),
            macs: MacKeys::new(cluster_secret),
        }
    }

    /// Did somebody make this handshake or cookie who holds a secret of ours? Costs one MAC over it; for a join-init three
    /// more hashes, as its key is made from the invitation in it.
    pub fn knows(&self, datagram: &[u8]) -> bool {
        if datagram.len() > MAX_DATAGRAM {
            return false;
        }
        match DatagramType::of(datagram) {
            Some(DatagramType::Init | DatagramType::Response) => self.macs.check(datagram).is_ok(),
            Some(DatagramType::Cookie) => self.macs.check_cookie(datagram).is_some(),
            Some(DatagramType::JoinInit) => {
                join::split_init(datagram).is_some_and(|(signed, _)| {
                    let macs = MacKeys::new(&secret_of(&self.secret, signed));
                    macs.check(datagram).is_ok()
                })
            }
            // A member has no invitation to use, and sealed frames are known by their session.
            Some(DatagramType::JoinResponse | DatagramType::Data) | None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(kind: DatagramType, secret: &Secret<32>) -> Vec<u8> {
        let signed = [7; 100];
        let mut datagram = kind.head().to_vec();
        datagram.extend([1, 2, 3, 4]);
        let secret = match kind {
            DatagramType::JoinInit => {
                datagram.extend([100, 0]);
                datagram.extend(signed);
                secret_of(secret, &signed)
            }
            _ => secret.clone(),
        };
        datagram.extend([9; 120]);
        MacKeys::new(&secret).finish(&mut datagram, None);
        datagram
    }

    #[test]
    fn who_holds_the_secret_is_known_and_nobody_else() {
        let (ours, theirs) = (Secret::new([1; 32]), Secret::new([2; 32]));
        let guard = Guard::new(&ours);
        for kind in [
            DatagramType::Init,
            DatagramType::Response,
            DatagramType::JoinInit,
        ] {
            assert!(guard.knows(&datagram(kind, &ours)), "{kind:?}");
            assert!(!guard.knows(&datagram(kind, &theirs)), "{kind:?}");
            let good = datagram(kind, &ours);
            for len in 0..good.len() {
                assert!(!guard.knows(&good[..len]), "{kind:?} {len}");
            }
            // mac2 is the cookie's, and no matter here.
            for at in 0..good.len() - 16 {
                let mut bent = good.clone();
                bent[at] ^= 1;
                assert!(!guard.knows(&bent), "{kind:?} {at}");
            }
        }
        for kind in [DatagramType::JoinResponse, DatagramType::Data] {
            assert!(!guard.knows(&datagram(kind, &ours)), "{kind:?}");
        }
    }
}
