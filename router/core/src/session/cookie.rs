//! What a handshake datagram must show before anybody computes for it: mac1 (the sender holds the cluster's secret), and
//! under load mac2 (the sender receives at the address it claims). As in WireGuard, with our secret in place of the
//! receiver's public key: who does not hold it hears nothing, ever.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::drops::DropReason;
use crate::crypto::{
    AeadKey, Cipher, Random, Secret, TAG_LEN, check_mac16, hkdf_sha256, mac16, same,
};
use crate::model::Now;
use crate::path::Path;
use crate::wire::{DatagramType, MAX_DATAGRAM};

/// Both macs at the end of a handshake datagram.
pub(super) const MACS: usize = 32;
const MAC: usize = 16;
/// Handshakes a second from anybody beyond which cookies are asked for.
const LOAD: u32 = 200;
/// Handshakes a second from one IPv4 address or IPv6 /64.
const PER_SOURCE: u32 = 20;
/// Sources counted in one second; beyond that a cookie is asked from each new one.
const MAX_SOURCES: usize = 4096;
/// A cookie is good for this long, and for as long again.
const COOKIE_LIFE: Duration = Duration::from_secs(60);
/// Head, index, nonce, the cookie, its seal, mac1.
const COOKIE_LEN: usize = 8 + 12 + MAC + TAG_LEN + MAC;

/// Proof of an address.
pub(super) type Cookie = [u8; MAC];

/// The keys of mac1 and of sealed cookies, from the secret both sides hold.
#[derive(Debug)]
pub(super) struct MacKeys {
    mac1: Secret<32>,
    cookie: Secret<32>,
}

/// A handshake datagram taken apart, its mac1 found good.
pub(super) struct Checked<'a> {
    /// Everything before the macs.
    pub(super) body: &'a [u8],
    mac1: [u8; MAC],
    mac2: [u8; MAC],
}

impl MacKeys {
    pub(super) fn new(secret: &Secret<32>) -> Self {
        let key = |purpose| hkdf_sha256(secret.expose(), b"weft handshake 1", &[purpose]);
        Self {
            mac1: key(b"mac1"),
            cookie: key(b"cookie"),
        }
    }

    /// Appends both macs and gives mac1, under which a cookie may come back.
    pub(super) fn finish(&self, datagram: &mut Vec<u8>, cookie: Option<&Cookie>) -> [u8; MAC] {
        let mac1 = mac16(self.mac1.expose(), &[datagram]);
        datagram.extend_from_slice(&mac1);
        let mac2 = cookie.map(|cookie| mac16(&widen(cookie), &[datagram]));
        datagram.extend_from_slice(&mac2.unwrap_or_default());
        mac1
    }

    /// Length and mac1: the first two hurdles.
    pub(super) fn check<'a>(&self, datagram: &'a [u8]) -> Result<Checked<'a>, DropReason> {
        if datagram.len() > MAX_DATAGRAM || datagram.len() < 8 + MACS {
            return Err(DropReason::Malformed);
        }
        let (body, macs) = datagram.split_at(datagram.len() - MACS);
        let (mac1, mac2) = macs.split_at(MAC);
        if !check_mac16(self.mac1.expose(), &[body], mac1) {
            return Err(DropReason::NoSecret);
        }
        Ok(Checked {
            body,
            mac1: mac1.try_into().map_err(|_| DropReason::Malformed)?,
            mac2: mac2.try_into().map_err(|_| DropReason::Malformed)?,
        })
    }

    /// A cookie for the sender of a checked datagram, readable only by one that holds the secret and sent the datagram.
    pub(super) fn seal_cookie(
        &self,
        checked: &Checked<'_>,
        cookie: &Cookie,
        random: &mut Random,
    ) -> Vec<u8> {
        let mut text = *cookie;
        let nonce = random.bytes::<12>();
        let tag = self
            .cookie_key(&checked.mac1, &nonce)
            .seal(0, &checked.mac1, &mut text)
            .unwrap_or_default();
        let mut datagram = DatagramType::Cookie.head().to_vec();
        // The sender's index stands in the same place in every datagram that starts a handshake.
        datagram.extend_from_slice(&checked.body[4..8]);
        datagram.extend_from_slice(&nonce);
        datagram.extend_from_slice(&text);
        datagram.extend_from_slice(&tag);
        let mac1 = mac16(self.mac1.expose(), &[&datagram]);
        datagram.extend_from_slice(&mac1);
        datagram
    }

    /// A cookie datagram without its mac1, which is good: its sender holds the secret.
    pub(super) fn check_cookie<'a>(&self, datagram: &'a [u8]) -> Option<&'a [u8]> {
        let (body, mac1) = datagram.split_at_checked(COOKIE_LEN - MAC)?;
        let is_good = mac1.len() == MAC && check_mac16(self.mac1.expose(), &[body], mac1);
        is_good.then_some(body)
    }

    /// Opens the cookie that came for the datagram with this mac1.
    pub(super) fn open_cookie(&self, datagram: &[u8], mac1: &[u8; MAC]) -> Option<Cookie> {
        let body = self.check_cookie(datagram)?;
        let mut sealed = body[20..].to_vec();
        let text = self
            .cookie_key(mac1, &body[8..20])
            .open(0, mac1, &mut sealed)?;
        (&*text).try_into().ok()
    }

    // One key per datagram answered and nonce drawn: the counter under it is always zero.
    fn cookie_key(&self, mac1: &[u8; MAC], nonce: &[u8]) -> AeadKey {
        let key = hkdf_sha256(self.cookie.expose(), nonce, &[mac1]);
        AeadKey::new(Cipher::ChaCha20Poly1305, &key)
    }
}

/// The index that a cookie or an answer is for.
pub(super) fn index_at(datagram: &[u8], offset: usize) -> Option<u32> {
    let bytes = datagram.get(offset..offset + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn widen(cookie: &Cookie) -> [u8; 32] {
    let mut key = [0; 32];
    key[..MAC].copy_from_slice(cookie);
    key
}

/// What to do with a handshake whose mac1 is good.
pub(super) enum Verdict {
    /// Compute for it.
    Pass,
    /// Send this instead.
    Ask(Cookie),
    /// Nothing.
    Refuse(DropReason),
}

/// Counts handshakes and hands out cookies.
pub(super) struct Gate {
    second: Now,
    total: u32,
    sources: BTreeMap<u128, u32>,
    secret: Secret<32>,
    previous: Secret<32>,
    rotated: Now,
}

impl Gate {
    pub(super) fn new(random: &mut Random, now: Now) -> Self {
        Self {
            second: now,
            total: 0,
            sources: BTreeMap::new(),
            secret: Secret::generate(random),
            previous: Secret::generate(random),
            rotated: now,
        }
    }

    pub(super) fn ask(
        &mut self,
        now: Now,
        from: Path,
        checked: &Checked<'_>,
        random: &mut Random,
    ) -> Verdict {
        self.turn(now, random);
        self.total = self.total.saturating_add(1);
        let is_proven = self.is_proven(from, checked);
        let source = source(from);
        let is_crowded = self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source);
        if (self.total > LOAD || is_crowded) && !is_proven {
            return Verdict::Ask(cookie(&self.secret, from));
        }
        if is_crowded {
            return Verdict::Pass;
        }
        let count = self.sources.entry(source).or_default();
        *count = count.saturating_add(1);
        match *count > PER_SOURCE {
            true => Verdict::Refuse(DropReason::TooMany),
            false => Verdict::Pass,
        }
    }

    fn turn(&mut self, now: Now, random: &mut Random) {
        if now.since(self.second) >= Duration::from_secs(1) {
            self.second = now;
            self.total = 0;
            self.sources.clear();
        }
        if now.since(self.rotated) >= COOKIE_LIFE {
            let fresh = Secret::generate(random);
            self.previous = std::mem::replace(&mut self.secret, fresh);
            self.rotated = now;
        }
    }

    fn is_proven(&self, from: Path, checked: &Checked<'_>) -> bool {
        [&self.secret, &self.previous].iter().any(|secret| {
            let key = widen(&cookie(secret, from));
            same(&mac16(&key, &[checked.body, &checked.mac1]), &checked.mac2)
        })
    }
}

fn cookie(secret: &Secret<32>, from: Path) -> Cookie {
    let addr = match from {
        Path::Direct(addr) => addr.socket(),
        Path::Relayed(by) => return mac16(secret.expose(), &[&by.0]),
    };
    let port = addr.port().to_le_bytes();
    match addr.ip() {
        IpAddr::V4(ip) => mac16(secret.expose(), &[&ip.octets(), &port]),
        IpAddr::V6(ip) => mac16(secret.expose(), &[&ip.octets(), &port]),
    }
}

/// One IPv4 address or IPv6 /64: what one sender commonly has. Or all that one member passes on.
fn source(from: Path) -> u128 {
    let addr = match from {
        Path::Direct(addr) => addr.socket(),
        Path::Relayed(by) => return u128::from(u64::from_be_bytes(by.prefix())) | 1 << 126,
    };
    match addr.ip() {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip) >> 64 | 1 << 127,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn addr(last: u8) -> Path {
        Path::from(SocketAddr::from(([192, 0, 2, last], 6783)))
    }

    fn datagram(keys: &MacKeys, cookie: Option<&Cookie>) -> (Vec<u8>, [u8; MAC]) {
        let mut datagram = DatagramType::Init.head().to_vec();
        datagram.extend_from_slice(&7u32.to_le_bytes());
        datagram.extend_from_slice(b"noise");
        let mac1 = keys.finish(&mut datagram, cookie);
        (datagram, mac1)
    }

    #[test]
    fn only_the_secret_makes_a_good_mac1() {
        let (keys, other) = (
            MacKeys::new(&Secret::new([1; 32])),
            MacKeys::new(&Secret::new([2; 32])),
        );
        let (good, _) = datagram(&keys, None);
        assert_eq!(keys.check(&good).map(|c| c.body.len()).ok(), Some(13));
        assert_eq!(other.check(&good).err(), Some(DropReason::NoSecret));
        for len in 0..good.len() {
            assert!(keys.check(&good[..len]).is_err());
        }
    }

    #[test]
    fn under_load_a_cookie_is_asked_for_and_lets_its_address_in() {
        let mut random = Random::from_seed([1; 32]);
        let keys = MacKeys::new(&Secret::new([1; 32]));
        let now = Now::default();
        let mut gate = Gate::new(&mut random, now);
        let (plain, mac1) = datagram(&keys, None);
        let checked = keys.check(&plain).unwrap();
        for round in 0..LOAD {
            let from = addr((round % 200) as u8);
            assert!(matches!(
                gate.ask(now, from, &checked, &mut random),
                Verdict::Pass
            ));
        }
        let Verdict::Ask(cookie) = gate.ask(now, addr(201), &checked, &mut random) else {
            panic!("no cookie under load");
        };
        let sealed = keys.seal_cookie(&checked, &cookie, &mut random);
        assert!(sealed.len() < plain.len() + 24, "no amplification");
        assert_eq!(index_at(&sealed, 4), Some(7));
        assert_eq!(keys.open_cookie(&sealed, &[0; 16]), None);
        for at in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert_eq!(keys.check_cookie(&bent), None);
        }
        assert_eq!(keys.check_cookie(&sealed[1..]), None);
        let cookie = keys.open_cookie(&sealed, &mac1).unwrap();
        let (proven, _) = datagram(&keys, Some(&cookie));
        let checked = keys.check(&proven).unwrap();
        assert!(matches!(
            gate.ask(now, addr(201), &checked, &mut random),
            Verdict::Pass
        ));
        assert!(matches!(
            gate.ask(now, addr(202), &checked, &mut random),
            Verdict::Ask(_)
        ));
        let later = now.plus(Duration::from_secs(2));
        assert!(matches!(
            gate.ask(later, addr(202), &checked, &mut random),
            Verdict::Pass
        ));
    }

    #[test]
    fn one_source_gets_twenty_a_second() {
        let mut random = Random::from_seed([1; 32]);
        let keys = MacKeys::new(&Secret::new([1; 32]));
        let mut gate = Gate::new(&mut random, Now::default());
        let (plain, _) = datagram(&keys, None);
        let checked = keys.check(&plain).unwrap();
        let passed = (0..50)
            .filter(|port| {
                let from: std::net::SocketAddr = format!("[2001:db8::{port}]:{}", 1000 + port)
                    .parse()
                    .unwrap();
                let verdict = gate.ask(Now::default(), from.into(), &checked, &mut random);
                matches!(verdict, Verdict::Pass)
            })
            .count();
        assert_eq!(passed, 20);
    }
}
