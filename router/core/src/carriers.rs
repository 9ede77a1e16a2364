//! Which carrier takes packets to a peer: `vxlan` where both ends trust the network between them, `esp` (the same under
//! the kernel's encryption) where both ends asked for that and can, `udp` everywhere else.
//!
//! ```text
//!           both addresses lie in this host's trusted subnets, or both do ESP
//!   closed ---------------------------------------------------> open: takes VXLAN from the peer, tells it so
//!     ^                                                           |  the peer is open, too, for the same two addresses
//!     | session lost, other path, device down                     v
//!     +---------------------------------------------------- probing <----------------+
//!                                                                 | answered         | three in a row did not come
//!                                                                 v                  |
//!                                                              carrying -------------+
//! ```
//!
//! All words are said inside the session; only the probes themselves go over VXLAN, in the clear, and prove nothing but
//! that the way is open: the answer to one is sealed. A probe counts as lost only when the peer itself says, inside the
//! session, that it did not come: a daemon that restarts says nothing, and its kernel carries on.
//!
//! INVARIANT: nothing is sent in the clear to a peer that did not say, in its present session, that it takes it between
//! the very addresses that this host's own configuration trusts (threats C10). Where one end alone would, both seal or use
//! `udp`.

mod devices;
mod esp;
mod nat;
mod peer;
mod probing;
#[cfg(test)]
mod tests;
mod why;
mod words;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::crypto::Random;
use crate::layout::vxlan_mac;
use crate::model::{Generation, NodeId, Now};
use crate::view::{Carrier, EspPeer, PeerNumber, Seal, VxlanPeer, VxlanView};
use crate::wire;
pub use devices::Devices;
pub use esp::{Esp, EspState, SaId, SessionKeys};
use peer::Peer;
use probing::{Probing, Step};
pub use why::Why;
use words::{Opening, Word};

/// The Ethernet header of a probe.
const ETHERNET: u16 = 14;
/// Packets of more octets wear a key out sooner.
const LARGE: u16 = 2048;

/// What is known of a peer that there is a session with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Who.
    pub peer: NodeId,
    /// This host's number for it.
    pub number: PeerNumber,
    /// Its present start.
    pub generation: Generation,
    /// It said in the handshake that it lists trusted subnets, too.
    pub consents: bool,
    /// It said there that it does ESP.
    pub esp: bool,
    /// The present session's keys for that.
    pub keys: Option<SessionKeys>,
    /// Where it is.
    pub path: Option<SocketAddr>,
    /// The host's own address from which it sends there.
    pub source: Option<IpAddr>,
    /// Largest packet that the path takes in one piece, octets, outer headers included.
    pub path_mtu: Option<u16>,
    /// Somebody who has been known here for longer has the same MAC.
    pub mac_taken: bool,
}

/// The two ends of a way, and how packets go between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// This host's address.
    pub mine: IpAddr,
    /// The peer's, of the same IP version.
    pub theirs: IpAddr,
    /// In the clear, or sealed by the kernel.
    pub seal: Seal,
}

/// Between which addresses this host takes VXLAN from a peer, and how, or why it takes none. What both trust goes in the
/// clear, unless the peer told that it takes sealed packets alone.
pub fn ends(trusted: &[IpNet], esp: &Esp, facts: &Facts, told: Option<Ends>) -> Result<Ends, Why> {
    let plain = plain_ends(trusted, facts);
    let sealed = || {
        let ends = pair(facts)?;
        let seal = Seal::Esp;
        Ok(Ends { seal, ..ends })
    };
    let asks_for_seal = told.is_some_and(|told| told.seal == Seal::Esp);
    match (plain, esp) {
        (Ok(_), Esp::Ready) if facts.esp && asks_for_seal => sealed(),
        (Err(_), Esp::Ready) if facts.esp => sealed(),
        (Err(_), Esp::Ready) => Err(Why::PeerLacksEsp),
        (Err(_), Esp::Lacking(trouble)) => Err(Why::NoEsp(trouble.clone())),
        (plain, _) => plain,
    }
}

fn plain_ends(trusted: &[IpNet], facts: &Facts) -> Result<Ends, Why> {
    if trusted.is_empty() {
        return Err(Why::NoTrustedSubnet);
    }
    if !facts.consents {
        return Err(Why::PeerListsNone);
    }
    let ends = pair(facts)?;
    for ip in [ends.mine, ends.theirs] {
        let is_inside = trusted.iter().any(|net| net.contains(&ip));
        if !is_inside {
            return Err(Why::OutsideTrusted(ip));
        }
    }
    Ok(ends)
}

/// The two addresses, where there is a way that VXLAN could take.
fn pair(facts: &Facts) -> Result<Ends, Why> {
    if facts.mac_taken {
        return Err(Why::MacTaken);
    }
    let (Some(path), Some(source), Some(_)) = (facts.path, facts.source, facts.path_mtu) else {
        return Err(Why::NoPath);
    };
    let (theirs, mine) = (path.ip().to_canonical(), source.to_canonical());
    if theirs.is_ipv4() != mine.is_ipv4() {
        return Err(Why::NoPath);
    }
    if let Some(ip) = [theirs, mine].into_iter().find(is_of_one_link) {
        return Err(Why::LinkLocal(ip));
    }
    Ok(Ends {
        mine,
        theirs,
        seal: Seal::Plain,
    })
}

/// Such an address says nothing without the device that it belongs to (RFC 4007 §6).
fn is_of_one_link(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Whether the two ends mean the same way: between the same addresses, or sealed through a NAT that shows others to each.
fn is_same_way(ends: Ends, told: Ends, nat: bool) -> bool {
    told == ends || (nat && ends.seal == Seal::Esp && told.seal == Seal::Esp)
}

/// Which carrier it is, and why: `devices` are the carrier's own, `ends` what [`ends`] says, `told` what the peer told
/// of itself, `nat` whether a NAT lies between, `sealing` whether the kernel has keys for it (where they are needed),
/// `reaches` whether probes arrive (`None` before the first).
pub fn choose(
    devices: &Devices,
    ends: &Result<Ends, Why>,
    told: Option<Ends>,
    nat: bool,
    sealing: Result<(), Why>,
    reaches: Option<bool>,
) -> (Carrier, Why) {
    let sealed = |why| (Carrier::Udp, why);
    let ends = match ends {
        Ok(ends) => *ends,
        Err(why) => return sealed(why.clone()),
    };
    if let Err(trouble) = devices.to(ends.theirs) {
        return sealed(Why::Device(trouble.clone()));
    }
    match told {
        None => return sealed(Why::PeerNotOpen),
        Some(told) if !is_same_way(ends, told, nat) => return sealed(Why::OtherEnds),
        Some(_) => {}
    }
    if let (Seal::Esp, Err(why)) = (ends.seal, sealing) {
        return sealed(why);
    }
    match reaches {
        Some(true) if ends.seal == Seal::Esp && nat => (Carrier::Esp, Why::BothSealThroughNat),
        Some(true) if ends.seal == Seal::Esp => (Carrier::Esp, Why::BothSeal),
        Some(true) => (Carrier::Vxlan, Why::BothTrust),
        Some(false) => sealed(Why::NoAnswer),
        None => sealed(Why::Trying),
    }
}

/// What it wants done, or tells.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Tell the peer inside the session.
    Say { to: NodeId, word: Word },
    /// Send a probe over VXLAN.
    Probe {
        host: IpAddr,
        to: [u8; 6],
        nonce: u64,
        length: u16,
    },
    /// New keys are wanted for the session with this peer.
    Renew { peer: NodeId },
    /// Some peer's carrier, or who it takes VXLAN from, is another now.
    Changed,
}

/// Which peer each address is used for: the kernel's policies tell peers apart by nothing else, and behind one NAT there may
/// be several. Who has an address keeps it while that is where its path leads.
#[derive(Debug, Default)]
struct Holders(BTreeMap<IpAddr, NodeId>);

impl Holders {
    /// True if the address is this peer's, or nobody's until now.
    fn take(&mut self, address: IpAddr, peer: NodeId) -> bool {
        *self.0.entry(address).or_insert(peer) == peer
    }

    /// Addresses that lead to their holders no more are free.
    fn free(&mut self, leads_to: impl Fn(IpAddr, &NodeId) -> bool) {
        self.0.retain(|address, peer| leads_to(*address, peer));
    }
}

/// All peers' carriers.
#[derive(Debug)]
pub(crate) struct Carriers {
    me: NodeId,
    trusted: Vec<IpNet>,
    esp: Esp,
    esp_state: EspState,
    devices: Devices,
    peers: BTreeMap<NodeId, Peer>,
    holders: Holders,
    random: Random,
    /// What was shown last.
    shown: Option<VxlanView>,
    due: Option<Now>,
}

impl Carriers {
    pub(crate) fn new(me: NodeId, trusted: Vec<IpNet>, esp: Esp, random: Random) -> Self {
        Self {
            me,
            trusted,
            esp,
            esp_state: EspState::default(),
            devices: Devices::default(),
            peers: BTreeMap::new(),
            holders: Holders::default(),
            random,
            shown: None,
            due: None,
        }
    }

    /// Does this host list any trusted subnet, or do ESP? Otherwise nothing here ever does anything.
    pub(crate) fn is_on(&self) -> bool {
        !self.trusted.is_empty() || self.esp == Esp::Ready
    }

    /// What the edges plan from.
    pub(crate) fn view(&self) -> Option<VxlanView> {
        self.is_on().then(|| VxlanView {
            mac: vxlan_mac(&self.me),
            peers: self.open_peers(),
            esp: self.esp_peers(),
        })
    }

    /// Which carrier takes packets to `peer`, why, and the largest packet if it is `vxlan`.
    pub(crate) fn of(&self, peer: &NodeId) -> (Carrier, Why, Option<u16>) {
        let Some(peer) = self.peers.get(peer) else {
            let why = match &self.esp {
                _ if self.is_on() => Why::NoPath,
                Esp::Lacking(trouble) => Why::NoEsp(trouble.clone()),
                _ => Why::NoTrustedSubnet,
            };
            return (Carrier::Udp, why, None);
        };
        let (carrier, why) = peer.choice(&self.devices, &self.esp_state);
        let mtu = (carrier != Carrier::Udp).then(|| peer.mtu());
        (carrier, why, mtu)
    }

    fn open_peers(&self) -> Vec<VxlanPeer> {
        let open = self.peers.iter().filter_map(|(id, peer)| {
            let ends = peer.ends.as_ref().ok()?;
            Some(VxlanPeer {
                id: *id,
                number: peer.facts.number,
                mac: peer.mac,
                addr: ends.theirs,
                seal: ends.seal,
                carries: peer.choice(&self.devices, &self.esp_state).0 != Carrier::Udp,
                mtu: peer.mtu(),
            })
        });
        open.collect()
    }

    fn esp_peers(&self) -> Vec<EspPeer> {
        let sealed = self.peers.values().filter_map(|peer| {
            let ends = peer.ends.as_ref().ok()?;
            (ends.seal == Seal::Esp).then(|| EspPeer {
                number: peer.facts.number,
                mine: ends.mine,
                theirs: ends.theirs,
                udp: peer.nat.is_between().then(|| peer.nat.port()),
                inbound: peer.keys.inbound(),
                outbound: peer.keys.outbound(),
                large: peer.mtu() > LARGE,
            })
        });
        sealed.collect()
    }

    /// Sessions, paths or members changed: these are the peers with a session now.
    pub(crate) fn set_peers(&mut self, now: Now, peers: Vec<Facts>, out: &mut Vec<Event>) {
        let present: Vec<NodeId> = peers.iter().map(|facts| facts.peer).collect();
        self.peers.retain(|id, _| present.contains(id));
        for facts in peers {
            let peer = self
                .peers
                .entry(facts.peer)
                .or_insert_with(|| Peer::new(facts.clone()));
            if peer.facts.generation != facts.generation {
                *peer = Peer::new(facts.clone());
            }
            peer.facts = facts;
        }
        let known = &self.peers;
        self.holders
            .free(|address, id| known.get(id).is_some_and(|peer| peer.is_at(address)));
        for peer in self.peers.values_mut() {
            peer.meet(now, &self.trusted, &self.esp, &mut self.holders);
        }
        self.settle(now, out);
    }

    /// The carrier's devices are up behind their filter, or why not.
    pub(crate) fn set_devices(&mut self, now: Now, devices: Devices, out: &mut Vec<Event>) {
        if self.devices != devices {
            self.devices = devices;
            self.settle(now, out);
        }
    }

    /// What the kernel has of the keys that were shown.
    pub(crate) fn set_esp(&mut self, now: Now, state: EspState, out: &mut Vec<Event>) {
        if self.esp_state != state {
            for peer in self.peers.values_mut() {
                peer.keys.observe(peer.facts.number, &state);
            }
            self.esp_state = state;
            self.settle(now, out);
        }
    }

    /// The kernel opened what this peer sealed, and it came inside UDP by another port of its address than was known: a NAT
    /// chose that, and this host's packets are to go there.
    pub(crate) fn set_esp_port(
        &mut self,
        now: Now,
        number: PeerNumber,
        from: (IpAddr, u16),
        out: &mut Vec<Event>,
    ) {
        let (address, port) = from;
        let mut peers = self.peers.values_mut();
        let sender = peers.find(|peer| peer.facts.number == number && peer.is_at(address));
        if sender.is_some_and(|peer| peer.nat.set_port(port)) {
            self.settle(now, out);
        }
    }

    /// The peer said something, inside its session.
    pub(crate) fn on_word(&mut self, now: Now, from: NodeId, word: &[u8], out: &mut Vec<Event>) {
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        let Ok(word) = wire::decode(word) else {
            return;
        };
        match word {
            Word::Open(opening) => self.on_open(now, from, opening.any()),
            Word::Open6(opening) => self.on_open(now, from, opening.any()),
            Word::Shut => {
                peer.told = None;
                peer.nat.doubt();
            }
            Word::Sent(nonce) if peer.ends.is_ok() => {
                let word = match peer.came.contains(&nonce) {
                    true => Word::Came(nonce),
                    false => Word::Missed(nonce),
                };
                out.push(Event::Say { to: from, word });
            }
            Word::Sent(_) => {}
            Word::Came(nonce) => peer.probing.on_came(now, nonce),
            Word::Missed(nonce) => peer.probing.on_missed(now, nonce),
        }
        self.settle(now, out);
    }

    fn on_open(&mut self, now: Now, from: NodeId, opening: Opening<IpAddr>) {
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        peer.on_open(now, opening);
        peer.meet(now, &self.trusted, &self.esp, &mut self.holders);
        if !opening.confirmed {
            // Said once more, this time with the confirmation.
            peer.said = None;
        }
    }

    /// A probe came over VXLAN, from this MAC as it says.
    pub(crate) fn on_probe(&mut self, now: Now, from: [u8; 6], nonce: u64, out: &mut Vec<Event>) {
        let sender = self
            .peers
            .values_mut()
            .find(|peer| peer.mac == from && peer.ends.is_ok());
        let Some(peer) = sender else { return };
        if peer.remember(now, nonce) {
            let (to, word) = (peer.facts.peer, Word::Came(nonce));
            out.push(Event::Say { to, word });
        }
    }

    /// Time passed.
    pub(crate) fn expire(&mut self, now: Now, out: &mut Vec<Event>) {
        if self.due.is_some_and(|due| due <= now) {
            self.settle(now, out);
        }
    }

    /// When to call `expire` next.
    pub(crate) fn deadline(&self) -> Option<Now> {
        self.due
    }

    /// Says and sends what is due now, and shows what changed by it.
    fn settle(&mut self, now: Now, out: &mut Vec<Event>) {
        let crowd = self.peers.len();
        for (id, peer) in &mut self.peers {
            peer.look_for_nat(now);
            if let Some(word) = peer.tell(now, &self.devices) {
                out.push(Event::Say { to: *id, word });
            }
            if peer.keys.step(now) {
                out.push(Event::Renew { peer: *id });
            }
            let Some(ends) = peer.agreed(&self.devices) else {
                peer.probing = Probing::default();
                continue;
            };
            let step = peer.probing.step(now, crowd, &mut self.random);
            match step {
                Some(Step::Probe { nonce, whole }) => {
                    // Until it carries, each is as large as the largest packet will be.
                    let length = ETHERNET + if whole { peer.mtu() } else { 0 };
                    let (host, to) = (ends.theirs, peer.mac);
                    out.push(Event::Probe {
                        host,
                        to,
                        nonce,
                        length,
                    });
                }
                Some(Step::Ask(nonce)) => {
                    let (to, word) = (*id, Word::Sent(nonce));
                    out.push(Event::Say { to, word });
                }
                None => {}
            }
        }
        let shown = self.view();
        if shown != self.shown {
            self.shown = shown;
            out.push(Event::Changed);
        }
        let tellings = self.peers.values().filter_map(|p| Some(p.tell_again?.0));
        let probings = self.peers.values().filter_map(|p| p.probing.due());
        let keys = self.peers.values().filter_map(|p| p.keys.deadline());
        let nats = self.peers.values().filter_map(|p| p.nat.due());
        self.due = tellings.chain(probings).chain(keys).chain(nats).min();
    }
}
