//! Invitations: what `weft token` prints and `weft up --join` takes.
//!
//! ```text
//! weft1_ base64url( signed body | secret 32 | first 4 of SHA-256 over both )
//! signed body = version 1 | bincode(TokenBody) | Ed25519 signature of its issuer 64
//! secret      = HKDF(cluster secret, signed body)
//! ```
//!
//! The secret follows from the body, so any member can check an invitation that it never saw; and who forges a body has
//! no secret for it.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

use crate::crypto::{Secret, hkdf_sha256, sha256, verify};
use crate::identity::Identity;
use crate::model::{ClusterId, NodeId};
use crate::underlay::{self, UnderlayAddr};
use crate::wire;

/// Members named in one invitation.
pub const MAX_MEMBERS: usize = 5;
/// Addresses of each.
pub const MAX_ADDRESSES: usize = 4;
/// Longest signed body: it travels in the joiner's first datagram, beside the handshake.
pub const MAX_SIGNED: usize = 880;

const PREFIX: &str = "weft1_";
const VERSION: u8 = 1;
const SIGNATURE: usize = 64;
const SECRET: usize = 32;
const CHECKSUM: usize = 4;
/// Generous: base64 of the longest body is some 1,300 characters.
const MAX_TEXT: usize = 2048;
const SIGN_TAG: &[u8] = b"weft invitation 1";

/// Why a text is no invitation, or none can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Something else altogether.
    #[error(
        "this is not an invitation: one begins with \"{PREFIX}\" and is printed by `weft token`"
    )]
    NotAToken,
    /// Of another version of weft.
    #[error(
        "this invitation is of another version ({0}); this host understands \"{PREFIX}\": use the same weft everywhere"
    )]
    Version(String),
    /// Longer than any invitation.
    #[error("this is longer than any invitation: is it copied more than once?")]
    TooLong,
    /// Letters are missing or changed.
    #[error("this invitation is garbled: copy it again, whole")]
    Garbled,
    /// The body to sign does not fit the joiner's first datagram.
    #[error("an invitation can't name so many members and addresses")]
    TooBig,
}

/// A member that a joiner may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenMember {
    /// Its id.
    pub id: NodeId,
    /// Its X25519 key: only its holder understands the joiner.
    pub noise_key: [u8; 32],
    /// Where it may be reached, best first.
    pub addresses: Vec<SocketAddr>,
    /// The port at those addresses where it listens for TCP connections, for networks that let no UDP out.
    #[serde(with = "port_octets")]
    pub tcp_port: Option<NonZeroU16>,
}

/// A port in two octets, network order, zero for none: there is room for no more beside a joiner's handshake.
mod port_octets {
    use std::num::NonZeroU16;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        port: &Option<NonZeroU16>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        port.map_or(0, NonZeroU16::get).to_be_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<NonZeroU16>, D::Error> {
        <[u8; 2]>::deserialize(from).map(|octets| NonZeroU16::new(u16::from_be_bytes(octets)))
    }
}

impl TokenMember {
    /// Where it takes datagrams by UDP.
    pub(crate) fn udp(&self) -> Vec<UnderlayAddr> {
        self.addresses.iter().copied().map(Into::into).collect()
    }

    /// Where it takes connections.
    pub(crate) fn tcp(&self) -> Vec<UnderlayAddr> {
        underlay::listening(&self.addresses, self.tcp_port)
    }
}

/// What an invitation says. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBody {
    /// The cluster to join.
    pub cluster: ClusterId,
    /// Drawn at random: what the issuer counts uses under.
    pub id: [u8; 16],
    /// Who made it.
    pub issuer: NodeId,
    /// Unix seconds.
    pub issued_at: u64,
    /// Unix seconds, by the clock of the member asked.
    pub expires_at: u64,
    /// How many nodes may join with it; 0 = any number.
    pub uses: u32,
    /// Whom to ask.
    pub members: Vec<TokenMember>,
}

impl TokenBody {
    /// May any number of nodes join with it?
    pub fn is_reusable(&self) -> bool {
        self.uses == 0
    }
}

/// An invitation.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    body: TokenBody,
    signed: Vec<u8>,
    secret: Secret<32>,
}

impl Token {
    /// Signs `body`. Members and addresses beyond the limits are left out, the last first.
    pub fn issue(
        issuer: &Identity,
        cluster_secret: &Secret<32>,
        mut body: TokenBody,
    ) -> Result<Self, TokenError> {
        body.issuer = issuer.id();
        body.members.truncate(MAX_MEMBERS);
        for member in &mut body.members {
            member.addresses.truncate(MAX_ADDRESSES);
        }
        let mut signed = vec![VERSION];
        signed.extend_from_slice(&wire::encode(&body));
        let signature = issuer.sign(&to_sign(&signed));
        signed.extend_from_slice(&signature);
        if signed.len() > MAX_SIGNED {
            return Err(TokenError::TooBig);
        }
        let secret = secret_of(cluster_secret, &signed);
        Ok(Self {
            body,
            signed,
            secret,
        })
    }

    /// Reads the text form.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        if text.len() > MAX_TEXT {
            return Err(TokenError::TooLong);
        }
        // Mail and terminals break long lines.
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            return Err(other_version(&text));
        };
        let bytes = BASE64URL_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| TokenError::Garbled)?;
        let (rest, checksum) = split_end(&bytes, CHECKSUM)?;
        if sha256(rest)[..CHECKSUM] != *checksum {
            return Err(TokenError::Garbled);
        }
        let (signed, secret) = split_end(rest, SECRET)?;
        let body = read_body(signed).ok_or(TokenError::Garbled)?;
        let secret: [u8; 32] = secret.try_into().map_err(|_| TokenError::Garbled)?;
        Ok(Self {
            body,
            signed: signed.to_vec(),
            secret: Secret::new(secret),
        })
    }

    /// The text form. Who has it can join.
    pub fn text(&self) -> String {
        let mut bytes = self.signed.clone();
        bytes.extend_from_slice(self.secret.expose());
        let checksum = sha256(&bytes);
        bytes.extend_from_slice(&checksum[..CHECKSUM]);
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }

    /// What it says.
    pub fn body(&self) -> &TokenBody {
        &self.body
    }

    pub(crate) fn signed(&self) -> &[u8] {
        &self.signed
    }

    pub(crate) fn secret(&self) -> &Secret<32> {
        &self.secret
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("body", &self.body)
            .field("secret", &self.secret)
            .finish_non_exhaustive()
    }
}

/// The secret that goes with a signed body: whoever holds the cluster's can tell.
pub(crate) fn secret_of(cluster_secret: &Secret<32>, signed: &[u8]) -> Secret<32> {
    hkdf_sha256(cluster_secret.expose(), SIGN_TAG, &[signed])
}

/// Reads a signed body whose signature holds.
pub(crate) fn read_body(signed: &[u8]) -> Option<TokenBody> {
    if signed.len() > MAX_SIGNED || signed.first() != Some(&VERSION) {
        return None;
    }
    let (unsigned, signature) = split_end(signed, SIGNATURE).ok()?;
    let body: TokenBody = wire::decode(unsigned.get(1..)?).ok()?;
    let is_small = body.members.len() <= MAX_MEMBERS
        && body
            .members
            .iter()
            .all(|member| member.addresses.len() <= MAX_ADDRESSES);
    (is_small && verify(&body.issuer, &to_sign(unsigned), signature)).then_some(body)
}

fn to_sign(unsigned: &[u8]) -> Vec<u8> {
    [SIGN_TAG, unsigned].concat()
}

fn split_end(bytes: &[u8], len: usize) -> Result<(&[u8], &[u8]), TokenError> {
    let at = bytes.len().checked_sub(len).ok_or(TokenError::Garbled)?;
    Ok(bytes.split_at(at))
}

fn other_version(text: &str) -> TokenError {
    let version = text
        .strip_prefix("weft")
        .and_then(|rest| rest.split_once('_'))
        .map(|(version, _)| version)
        .filter(|version| version.len() < 6 && version.bytes().all(|b| b.is_ascii_digit()));
    match version {
        Some(version) if !version.is_empty() => TokenError::Version(version.to_owned()),
        _ => TokenError::NotAToken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Random;

    fn body(members: usize, addresses: usize) -> TokenBody {
        let member = TokenMember {
            id: NodeId([2; 32]),
            noise_key: [3; 32],
            addresses: vec!["[2001:db8::1]:6783".parse().unwrap(); addresses],
            tcp_port: NonZeroU16::new(65_535),
        };
        TokenBody {
            cluster: ClusterId([1; 16]),
            id: [9; 16],
            issuer: NodeId([0; 32]),
            issued_at: 1_800_000_000,
            expires_at: 1_800_003_600,
            uses: 1,
            members: vec![member; members],
        }
    }

    fn token(members: usize, addresses: usize) -> (Token, Secret<32>) {
        let issuer = Identity::generate(&mut Random::from_seed([1; 32]));
        let secret = Secret::new([5; 32]);
        let token = Token::issue(&issuer, &secret, body(members, addresses)).unwrap();
        (token, secret)
    }

    #[test]
    fn it_survives_the_text_form_and_line_breaks() {
        let (token, secret) = token(2, 2);
        let text = token.text();
        let broken = format!(" {}\r\n  {}\n", &text[..40], &text[40..]);
        for text in [text, broken] {
            let again = Token::parse(&text).unwrap();
            assert_eq!(again, token);
            assert!(secret_of(&secret, again.signed()) == *again.secret());
        }
    }

    #[test]
    fn the_largest_one_fits_and_larger_ones_are_cut() {
        let (token, _) = token(7, 9);
        assert!(token.signed().len() <= MAX_SIGNED);
        assert_eq!(token.body().members.len(), MAX_MEMBERS);
        assert_eq!(token.body().members[0].addresses.len(), MAX_ADDRESSES);
        assert_eq!(Token::parse(&token.text()).unwrap(), token);
    }

    #[test]
    fn each_sort_of_wrong_text_has_its_own_error() {
        let text = token(1, 1).0.text();
        assert_eq!(Token::parse("hello"), Err(TokenError::NotAToken));
        assert_eq!(Token::parse(""), Err(TokenError::NotAToken));
        assert_eq!(
            Token::parse(&text.replacen("weft1_", "weft2_", 1)),
            Err(TokenError::Version("2".into()))
        );
        assert_eq!(Token::parse(&text.repeat(20)), Err(TokenError::TooLong));
        assert_eq!(Token::parse(&text[..60]), Err(TokenError::Garbled));
        assert_eq!(Token::parse("weft1_"), Err(TokenError::Garbled));
        assert_eq!(Token::parse("weft1_§"), Err(TokenError::Garbled));
    }

    #[test]
    fn every_changed_letter_is_noticed() {
        let text = token(1, 1).0.text();
        for at in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(Token::parse(&changed), Err(TokenError::Garbled), "{at}");
        }
    }

    #[test]
    fn a_body_nobody_signed_is_no_invitation() {
        let (token, _) = token(1, 1);
        let mut signed = token.signed().to_vec();
        assert!(read_body(&signed).is_some());
        let at = signed.len() - 70;
        signed[at] ^= 1;
        assert!(read_body(&signed).is_none());
    }

    #[test]
    fn its_secret_is_not_printed() {
        let (token, _) = token(1, 1);
        let shown = format!("{token:?}");
        assert!(shown.contains("***"));
        assert!(!shown.contains(&format!("{:?}", token.secret().expose())));
    }
}
