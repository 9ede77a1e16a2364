//! One peer: what is known and was said of the way to it, and how the way is.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::esp::Keyring;
use super::nat::Nat;
use super::probing::Probing;
use super::{
    Devices, Ends, Esp, EspState, Facts, Holders, Opening, Why, Word, choose, ends, is_same_way,
};
use crate::layout::{
    DEVICE_MTU, ESP_HEADERS, ESP_TAG, ESP_TRAILER, IPV6_MIN_MTU, UDP_HEADER, VXLAN_OVERHEAD,
    ip_header, vxlan_mac,
};
use crate::model::Now;
use crate::view::{Carrier, Seal};

/// An opening that the peer has not confirmed is told again after this long, then twice as long, up to [`TELL_LAST`]: the
/// peer may not be ready for it yet, or list no such subnet.
const TELL_FIRST: Duration = Duration::from_secs(2);
const TELL_LAST: Duration = Duration::from_secs(60);
/// A peer's probes are answered at most this often: whoever can send on a trusted network can forge them.
const ANSWER_GAP: Duration = Duration::from_millis(20);
/// Probes remembered of a peer, for when it asks after one.
const REMEMBERED: usize = 4;

/// What was told to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Said {
    ends: Ends,
    spi: Option<u32>,
    confirmed: bool,
    knows: Option<u32>,
}

/// One peer with a session.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) facts: Facts,
    pub(super) mac: [u8; 6],
    pub(super) ends: Result<Ends, Why>,
    /// What it told of itself.
    pub(super) told: Option<Ends>,
    /// It knows what was told to it.
    pub(super) confirmed: bool,
    /// What was told to it last, and whether with a confirmation.
    pub(super) said: Option<Said>,
    /// When to tell it once more, and after how long a wait that is.
    pub(super) tell_again: Option<(Now, Duration)>,
    pub(super) probing: Probing,
    /// For ESP.
    pub(super) keys: Keyring,
    /// What lies between, for ESP.
    pub(super) nat: Nat,
    /// The SPI under which it takes packets.
    told_spi: Option<u32>,
    /// Its last probes, newest last, and when one was answered.
    pub(super) came: Vec<u64>,
    answered: Option<Now>,
}

impl Peer {
    pub(super) fn new(facts: Facts) -> Self {
        Self {
            mac: vxlan_mac(&facts.peer),
            ends: Err(Why::NoPath),
            told: None,
            confirmed: false,
            said: None,
            tell_again: None,
            probing: Probing::default(),
            keys: Keyring::default(),
            nat: Nat::default(),
            told_spi: None,
            came: Vec::new(),
            answered: None,
            facts,
        }
    }

    fn is_sealed(&self) -> bool {
        self.ends.as_ref().is_ok_and(|ends| ends.seal == Seal::Esp)
    }

    pub(super) fn mtu(&self) -> u16 {
        let Ok(ends) = &self.ends else { return 0 };
        let path = self.facts.path_mtu.unwrap_or(0);
        let behind_ip = path.saturating_sub(ip_header(ends.theirs));
        let outer = match ends.seal {
            Seal::Esp if self.nat.is_between() => within_esp(behind_ip.saturating_sub(UDP_HEADER)),
            Seal::Esp => within_esp(behind_ip),
            Seal::Plain => behind_ip,
        };
        outer
            .saturating_sub(VXLAN_OVERHEAD)
            .min(u16::try_from(DEVICE_MTU).unwrap_or(u16::MAX))
    }

    /// The ends, if both are open for the same two addresses, and the kernel has keys where they are needed.
    pub(super) fn agreed(&self, devices: &Devices) -> Option<Ends> {
        let (ends, told) = (self.open(devices)?, self.told?);
        let is_same = is_same_way(ends, told, self.nat.is_between());
        let is_open = is_same && (ends.seal == Seal::Plain || self.is_keyed());
        is_open.then_some(ends)
    }

    /// The ends between which this host would take packets now.
    fn open(&self, devices: &Devices) -> Option<Ends> {
        let ends = *self.ends.as_ref().ok()?;
        devices.to(ends.theirs).is_ok().then_some(ends)
    }

    /// Does its path lead to this address?
    pub(super) fn is_at(&self, address: IpAddr) -> bool {
        let path = self.facts.path.map(|path| path.ip().to_canonical());
        path == Some(address)
    }

    fn is_keyed(&self) -> bool {
        self.keys.takes().is_some() && self.keys.seals()
    }

    pub(super) fn choice(&self, devices: &Devices, esp: &EspState) -> (Carrier, Why) {
        // Userspace sends what IPv6 asks for in two pieces, the kernel does not.
        if self.ends.is_ok() && self.mtu() < IPV6_MIN_MTU {
            return (Carrier::Udp, Why::SmallPath(self.mtu()));
        }
        let sealing = match esp.trouble_with(self.facts.number) {
            Some(trouble) => Err(Why::EspRefused(trouble.to_owned())),
            None if self.is_keyed() => Ok(()),
            None => Err(Why::EspKeys),
        };
        let reaches = self.probing.reaches();
        let nat = self.nat.is_between();
        choose(devices, &self.ends, self.told, nat, sealing, reaches)
    }

    /// What is known of it changed: between which addresses, and with which keys.
    pub(super) fn meet(&mut self, now: Now, trusted: &[IpNet], esp: &Esp, holders: &mut Holders) {
        let ends = ends(trusted, esp, &self.facts, self.told);
        let ends = ends.and_then(|ends| match holders.take(ends.theirs, self.facts.peer) {
            true => Ok(ends),
            false => Err(Why::AddressTaken(ends.theirs)),
        });
        if self.ends != ends {
            self.confirmed = false;
            self.nat.forget_port();
            self.leave_way();
        }
        self.ends = ends;
        self.compare_ends(now);
        self.offer_keys();
        if let (true, Some(spi)) = (self.is_sealed(), self.told_spi) {
            self.keys.seal_to(spi);
        }
    }

    /// Packets go another way from now on.
    fn leave_way(&mut self) {
        self.probing = Probing::default();
        if self.is_sealed() {
            self.keys.retire();
        }
    }

    fn offer_keys(&mut self) {
        if self.is_sealed()
            && let Some(session) = &self.facts.keys
        {
            self.keys.offer(session);
        }
    }

    /// Whether the peer sees the addresses that this host sees.
    fn compare_ends(&mut self, now: Now) {
        if let (Ok(ends), Some(told)) = (&self.ends, self.told)
            && (ends.seal, told.seal) == (Seal::Esp, Seal::Esp)
            && self.nat.compare(now, told == *ends)
        {
            self.leave_way();
        }
    }

    /// Time passed: a difference that lasts is a NAT's.
    pub(super) fn look_for_nat(&mut self, now: Now) {
        if self.nat.settle(now) {
            self.leave_way();
            self.offer_keys();
        }
    }

    /// It takes VXLAN from this host, and may have heard what this host takes.
    pub(super) fn on_open(&mut self, now: Now, opening: Opening<IpAddr>) {
        self.told = Some(opening.ends());
        self.told_spi = opening.spi;
        let knows = opening.confirmed.then_some(opening.knows);
        let said = self.said.map(|said| said.spi);
        self.confirmed = knows.is_some() && knows == said;
        if let (true, Some(Some(spi))) = (self.confirmed, said) {
            self.keys.on_confirmed(now, spi);
        }
    }

    /// A probe came from it. True if it is to be told.
    pub(super) fn remember(&mut self, now: Now, nonce: u64) -> bool {
        if self.came.len() >= REMEMBERED {
            self.came.remove(0);
        }
        self.came.push(nonce);
        let is_flood = self.answered.is_some_and(|at| now.since(at) < ANSWER_GAP);
        if !is_flood {
            self.answered = Some(now);
        }
        !is_flood
    }

    /// What to tell it of what this host takes from it, when that is another thing than was told, or was not confirmed.
    pub(super) fn tell(&mut self, now: Now, devices: &Devices) -> Option<Word> {
        let open = self.open(devices);
        let spi = self.keys.takes().filter(|_| self.is_sealed());
        let open = open.filter(|open| open.seal == Seal::Plain || spi.is_some());
        let Some(ends) = open else {
            self.tell_again = None;
            return self.said.take().map(|_| Word::Shut);
        };
        if self.said.is_some_and(|said| said.spi != spi) {
            // The confirmation was for another one.
            self.confirmed = false;
        }
        if self.confirmed {
            self.tell_again = None;
        }
        let say = Said {
            ends,
            spi,
            confirmed: self.told.is_some(),
            knows: self.told_spi,
        };
        let is_news = self.said != Some(say);
        let again = self.tell_again.filter(|(at, _)| *at <= now);
        let wait = match (is_news, again) {
            (true, _) => TELL_FIRST,
            (false, Some((_, wait))) => (wait * 2).min(TELL_LAST),
            (false, None) => return None,
        };
        self.said = Some(say);
        self.tell_again = (!self.confirmed).then(|| (now.plus(wait), wait));
        Some(Word::open(Opening {
            yours: ends.theirs,
            mine: ends.mine,
            spi,
            confirmed: say.confirmed,
            knows: say.knows,
        }))
    }
}

/// The most that ESP makes into no more than so many octets, both behind the IP header: it pads what it seals, trailer and
/// all, to a multiple of four (RFC 4303 §2.4).
fn within_esp(room: u16) -> u16 {
    let sealed = room.saturating_sub(ESP_HEADERS + ESP_TAG) & !3;
    sealed.saturating_sub(ESP_TRAILER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_packet_is_never_longer_than_the_path_takes() {
        for room in 100..9100 {
            let padded = (within_esp(room) + ESP_TRAILER).next_multiple_of(4);
            let whole = ESP_HEADERS + padded + ESP_TAG;
            assert!(whole <= room && room - whole < 4, "{room} {whole}");
        }
    }
}
