//! One encrypted link to each peer: handshakes, sealed datagrams, keepalives, roaming, renewal of keys.
//!
//! [`Sessions`] holds all links of a node and does no I/O: datagrams, frames that the carrier opened, and time come in;
//! [`SessionEvent`]s go out. Inner packets don't pass through here: the carrier seals and opens them itself with the
//! [`Transport`](transport::Transport) that [`SessionEvent::Established`] hands over.
//!
//! A datagram is looked at in this order, and nothing is answered or changed before its turn: length and type, mac1 (who
//! has no secret hears nothing), rate and cookie, Diffie-Hellman, roster, (generation, counter). See `handshake.rs` for the
//! exchange, `calls.rs` for who calls whom and when, `link.rs` for what happens over time.

mod calls;
mod cookie;
mod desk;
pub mod drops;
mod events;
pub mod guard;
pub(crate) mod half;
pub mod handshake;
pub mod join;
mod link;
mod noise;
mod refusal;
mod relay;
pub mod replay;
mod starts;
mod timers;
pub mod transport;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::crypto::Random;
use crate::identity::Identity;
use crate::model::{Generation, NodeId, Now};
use crate::path::{Path, PathInfo};
use crate::underlay::UnderlayAddr;
use crate::wire::{self, DataHeader, DatagramType, FrameKind, MAX_CONTROL, Message};
use cookie::{Gate, MacKeys};
use desk::Desk;
use drops::{DropReason, Drops};
use handshake::{Capabilities, Context};
use link::{Link, Wish};
use refusal::Refused;
use timers::{POLL, keepalive_idle};

pub(crate) use events::Probe;
pub use events::{SessionConfig, SessionEvent, SessionInfo, Trust};
pub(crate) use link::MAX_SESSIONS;
pub(crate) use timers::Rtt;

/// Links a node keeps at once.
pub const MAX_LINKS: usize = 1024;
/// Handshakes under way at once, in both directions.
pub const MAX_HALF_OPEN: usize = 256;

/// All links of a node.
///
/// Contract with the caller: drain `out` in order; call [`Self::expire`] when [`Self::deadline`] is due (early, late or
/// twice is harmless); ask `deadline` again after each call; pass `now` that never goes backwards. Datagrams of types
/// other than data go to [`Self::handle_datagram`]; data goes there too, unless the carrier opened it, in which case its
/// control and probe frames go to [`Self::handle_opened`].
pub struct Sessions {
    context: Context,
    config: SessionConfig,
    instance: u64,
    counter: u64,
    desk: Desk,
    gate: Gate,
    links: BTreeMap<NodeId, Link>,
    refused: Refused,
    next_poll: Now,
}

impl Sessions {
    /// No links yet.
    pub fn new(identity: Identity, config: SessionConfig, mut random: Random, now: Now) -> Self {
        let macs = MacKeys::new(&config.cluster_secret);
        let me = identity.id();
        Self {
            context: Context::new(identity, &config.cluster, macs),
            gate: Gate::new(&mut random, now),
            instance: random.u64(),
            counter: 0,
            desk: Desk::new(me, random, config.trusted_subnets.as_slice().into()),
            links: BTreeMap::new(),
            refused: Refused::default(),
            next_poll: now,
            config,
        }
    }

    /// Where `peer` may be reached, best first. Replaces what was known.
    pub fn set_addresses(&mut self, now: Now, peer: NodeId, candidates: &[UnderlayAddr]) {
        if let Some(link) = self.link(now, peer) {
            link.paths.tell(candidates);
        }
        if self.links.get(&peer).is_some_and(Link::is_empty) {
            self.links.remove(&peer);
        }
    }

    /// A datagram came. Data is opened here.
    pub fn handle_datagram(
        &mut self,
        now: Now,
        from: Path,
        bytes: &mut [u8],
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        if !self.is_open_way(from, trust) {
            return;
        }
        let result = match DatagramType::of(bytes) {
            Some(DatagramType::Init) => self.on_init(now, from, bytes, trust, out),
            Some(DatagramType::Response) => self.on_response(now, from, bytes, trust, out),
            Some(DatagramType::Cookie) => self.on_cookie(now, bytes, trust, out),
            Some(DatagramType::Data) => self.on_data(now, from, bytes, trust, out),
            _ => Err(DropReason::Malformed),
        };
        if let Err(reason) = result {
            self.desk.drops.count(reason);
        }
    }

    /// The carrier opened a control or probe frame that came for `local_index`.
    pub fn handle_opened(
        &mut self,
        now: Now,
        local_index: u32,
        from: Path,
        frame: (u8, &[u8]),
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        if !self.is_open_way(from, trust) {
            return;
        }
        if let Err(reason) = self.on_frame(now, local_index, from, frame, trust, out) {
            self.desk.drops.count(reason);
        }
    }

    /// The carrier opened a datagram for `local_index` that came from another address than the peer's path.
    pub fn handle_moved(
        &mut self,
        now: Now,
        local_index: u32,
        from: Path,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.is_open_way(from, trust)
            && let Some(peer) = self.desk.peer(local_index)
            && let Some(link) = self.links.get_mut(&peer)
        {
            link.challenge(now, from, &mut self.desk, out);
        }
    }

    /// Sends a control message, at once or when there is a session. Without one, calls.
    pub fn send(
        &mut self,
        now: Now,
        to: &NodeId,
        message: &Message,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        let body = wire::encode(message);
        if body.len() > MAX_CONTROL {
            self.desk.drops.count(DropReason::Oversized);
            return;
        }
        let Some(link) = link_in(&mut self.links, &self.desk, now, *to) else {
            self.desk.drops.count(DropReason::Full);
            return;
        };
        let waits = !link.send(now, body, &mut self.desk, out);
        if waits {
            self.dial(now, to, trust, out);
        }
    }

    /// The carrier has packets for `peer` and no session.
    pub fn want(
        &mut self,
        now: Now,
        peer: &NodeId,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        let Some(link) = self.link(now, *peer) else {
            self.desk.drops.count(DropReason::Full);
            return;
        };
        link.on_wanted(now);
        if link.current.is_none() {
            self.dial(now, peer, trust, out);
        }
    }

    /// New keys for this session, as soon as may be: those for ESP are used up or gone.
    pub fn renew(&mut self, now: Now, peer: &NodeId) {
        if let Some(link) = self.links.get_mut(peer)
            && link.current.is_some()
        {
            link.start_dial(now);
        }
    }

    /// The peer left: all its keys go at once. Its addresses and the count of its handshakes stay, so that it may be called
    /// again should it return, and nothing old can be replayed.
    pub fn drop_peer(&mut self, peer: &NodeId, out: &mut Vec<SessionEvent>) {
        if let Some(link) = self.links.get_mut(peer)
            && link.close(&mut self.desk, out)
        {
            out.push(SessionEvent::Lost { peer: *peer });
        }
    }

    /// The peer is no member any more: nothing is kept of it. What was recorded of its handshakes opens nothing, should it
    /// be one again: a session counts only once its first data has come.
    pub fn forget_peer(&mut self, peer: &NodeId, out: &mut Vec<SessionEvent>) {
        self.drop_peer(peer, out);
        self.links.remove(peer);
    }

    /// Peers that there is a link to, with or without a session.
    pub fn linked(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.links.keys().copied()
    }

    /// This machine may be a copy of a running one (a snapshot was resumed): no key and no random number made before may be
    /// used again. Sessions go and are made anew, with randomness that the copy does not have.
    pub fn rekey_all(
        &mut self,
        now: Now,
        random: Random,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        self.desk.random = random;
        self.gate = Gate::new(&mut self.desk.random, now);
        self.instance = self.desk.random.u64();
        let peers: Vec<NodeId> = self.links.keys().copied().collect();
        for peer in peers {
            let Some(link) = self.links.get_mut(&peer) else {
                continue;
            };
            if link.close(&mut self.desk, out) {
                out.push(SessionEvent::Lost { peer });
                self.dial(now, &peer, trust, out);
            }
        }
    }

    /// This node calls in another generation from now on: what was agreed in the one before is void.
    pub fn set_generation(
        &mut self,
        now: Now,
        generation: Generation,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        self.config.generation = generation;
        let random = self.desk.random.fork();
        self.rekey_all(now, random, trust, out);
    }

    /// Time passed.
    pub fn expire(&mut self, now: Now, trust: &impl Trust, out: &mut Vec<SessionEvent>) {
        if now >= self.next_poll {
            self.next_poll = now.plus(POLL);
            self.poll(now, out);
            self.offer_relays(now, trust);
            self.measure_relayed(out);
        }
        let due: Vec<NodeId> = self
            .links
            .values()
            .filter(|link| link.dial.is_some_and(|dial| dial.next <= now))
            .map(|link| link.peer)
            .collect();
        for peer in due {
            self.call(now, &peer, None, trust, out);
        }
    }

    /// When to call [`Self::expire`] next.
    pub fn deadline(&self) -> Option<Now> {
        let poll = self
            .links
            .values()
            .any(|link| link.is_busy() || link.dial.is_some())
            .then_some(self.next_poll);
        let dials = self.links.values().filter_map(|link| Some(link.dial?.next));
        dials.chain(poll).min()
    }

    /// All links with a session.
    pub fn peers(&self) -> impl Iterator<Item = SessionInfo> + '_ {
        self.links.values().filter_map(|link| {
            let live = link.current.as_ref()?;
            Some(SessionInfo {
                peer: link.peer,
                path: link.paths.current(),
                rtt: link.paths.rtt().smoothed(),
                mtu: link.inner_mtu(),
                path_mtu: link.paths.mtu(),
                established: live.since,
                generation: live.generation,
                capabilities: live.capabilities,
                transport: live.transport.clone(),
                silent: link.silent,
            })
        })
    }

    /// What is known of the ways to `peer`.
    pub fn paths(&self, peer: &NodeId) -> Vec<PathInfo> {
        let link = self.links.get(peer);
        link.map(|link| link.paths.list()).unwrap_or_default()
    }

    /// There is no session with this member any more: nobody is reached through it.
    pub fn lose_relay(&mut self, now: Now, relay: &NodeId, out: &mut Vec<SessionEvent>) {
        for link in self.links.values_mut() {
            link.lose_relay(now, relay, &mut self.desk, out);
        }
    }

    /// A connection is gone.
    pub fn lose_connection(&mut self, now: Now, with: SocketAddr, out: &mut Vec<SessionEvent>) {
        let path = Path::Direct(UnderlayAddr::Tcp(with));
        for link in self.links.values_mut() {
            link.lose_connection(now, path, &mut self.desk, out);
        }
    }

    /// The kernel sends IP packets of at most `mtu` octets to `addr` in one piece.
    pub fn set_ceiling(&mut self, addr: SocketAddr, mtu: u16, out: &mut Vec<SessionEvent>) {
        for link in self.links.values_mut() {
            link.set_ceiling(addr.into(), mtu, out);
        }
    }

    /// This host's addresses changed.
    pub fn on_moved(&mut self, now: Now, out: &mut Vec<SessionEvent>) {
        for link in self.links.values_mut() {
            link.on_moved(now, &mut self.desk, out);
        }
    }

    /// The peer sees this host at an address that is, or is not, one of its own.
    pub fn set_behind_nat(&mut self, peer: &NodeId, behind_nat: bool) {
        if let Some(link) = self.links.get_mut(peer) {
            link.set_behind_nat(behind_nat);
        }
    }

    /// What was dropped, by reason.
    pub fn drops(&self) -> &Drops {
        &self.desk.drops
    }

    fn link(&mut self, now: Now, peer: NodeId) -> Option<&mut Link> {
        link_in(&mut self.links, &self.desk, now, peer)
    }

    /// Links, and handshakes under way.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.links.len(), self.half_open())
    }

    fn half_open(&self) -> usize {
        self.links
            .values()
            .map(|link| link.attempts.len() + link.pending.len())
            .sum()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            plain_vxlan: !self.desk.trusted.is_empty(),
            esp: self.config.esp,
            relay: self.config.relay,
            ..Capabilities::new(self.config.cipher)
        }
    }

    fn poll(&mut self, now: Now, out: &mut Vec<SessionEvent>) {
        let sessions = self.links.values().filter(|link| link.current.is_some());
        let idle = keepalive_idle(sessions.count());
        for link in self.links.values_mut() {
            if let Wish::Close = link.poll(now, idle, &mut self.desk, out) {
                link.close(&mut self.desk, out);
                out.push(SessionEvent::Lost { peer: link.peer });
            }
        }
        self.links.retain(|_, link| !link.is_empty());
    }

    fn on_data(
        &mut self,
        now: Now,
        from: Path,
        bytes: &mut [u8],
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let header = DataHeader::parse(bytes).ok_or(DropReason::Malformed)?;
        let transport = self
            .desk
            .peer(header.receiver)
            .and_then(|peer| self.links.get(&peer)?.transport(header.receiver))
            .ok_or(DropReason::UnknownSession)?;
        let (kind, body) = transport.open(bytes)?;
        self.on_frame(now, header.receiver, from, (kind, body), trust, out)
    }

    fn on_frame(
        &mut self,
        now: Now,
        local_index: u32,
        from: Path,
        (kind, body): (u8, &[u8]),
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let link = link_at(&mut self.links, &self.desk, local_index)?;
        let peer = link.peer;
        let desk = &mut self.desk;
        link.confirm(now, local_index, desk, out);
        link.on_heard(now, out);
        link.challenge(now, from, desk, out);
        match FrameKind::of(kind) {
            Some(FrameKind::Probe) => {
                let probe = Probe::parse(body).ok_or(DropReason::BadFrame)?;
                link.on_probe(now, from, probe, desk, out);
            }
            Some(FrameKind::Control) => {
                let message = decode_control(body)?;
                link.on_used(now);
                let is_bye = message == Message::Bye;
                out.push(SessionEvent::Frame { peer, message });
                if is_bye && link.close(desk, out) {
                    out.push(SessionEvent::Lost { peer });
                }
            }
            Some(FrameKind::Packet | FrameKind::Bundle | FrameKind::Partial | FrameKind::Half) => {
                link.on_wanted(now);
                let body = body.to_vec();
                out.push(SessionEvent::Packet { peer, kind, body });
            }
            // One within the other is none of ours: two members between know of each other.
            Some(FrameKind::Relay) if from.relay().is_some() => {
                return Err(DropReason::BadFrame);
            }
            Some(FrameKind::Relay) => {
                link.on_used(now);
                return self.on_relayed(now, peer, body, trust, out);
            }
            None => return Err(DropReason::UnknownKind),
        }
        Ok(())
    }
}

fn decode_control(body: &[u8]) -> Result<Message, DropReason> {
    if body.len() > MAX_CONTROL {
        return Err(DropReason::BadFrame);
    }
    wire::decode(body).map_err(|_| DropReason::BadFrame)
}

/// The link whose session or attempt has this index; borrows nothing else, either.
fn link_at<'a>(
    links: &'a mut BTreeMap<NodeId, Link>,
    desk: &Desk,
    index: u32,
) -> Result<&'a mut Link, DropReason> {
    let link = desk.peer(index).and_then(|peer| links.get_mut(&peer));
    link.ok_or(DropReason::UnknownSession)
}

/// The link to `peer`, a new one if there is none; borrows nothing else, so that the desk is free for it.
fn link_in<'a>(
    links: &'a mut BTreeMap<NodeId, Link>,
    desk: &Desk,
    now: Now,
    peer: NodeId,
) -> Option<&'a mut Link> {
    let is_full = links.len() >= MAX_LINKS && !links.contains_key(&peer);
    if is_full || peer == desk.me {
        return None;
    }
    let link = links.entry(peer);
    Some(link.or_insert_with(|| Link::new(peer, desk, now)))
}
