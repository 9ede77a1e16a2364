//! One peer: its addresses, sessions, half-open handshakes, keepalives and queue.
//!
//! ```text
//!            send, want                    answer came, or its first datagram
//!   idle ------------------> dialling ------------------------------------------> live
//!    ^                          |  30 s without success: Lost                     | |
//!    |<-------------------------+                                                 | | 120 s, worn out, or 3 s of silence:
//!    |<---------------------------------------------------------------------------+ +-> dialling beside the live session
//!                               10 min unused, Bye, or given up: Lost
//! ```
//!
//! INVARIANT: the path moves only to an address from which a sealed echo came that was asked for there, or through which
//! a whole handshake went.

mod watch;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::cookie::Cookie;
use super::desk::Desk;
use super::drops::DropReason;
use super::handshake::Capabilities;
use super::noise::Noise;
use super::starts::Starts;
use super::timers::{AT_ONCE, Dial, KEEPALIVE_BUSY, LINGER, YIELD_FOR};
use super::transport::Transport;
use super::{Probe, SessionEvent};
use crate::model::{Generation, NodeId, Now};
use crate::path::Path;
use crate::path::paths::{MAX_RELAYS, Mood, Paths};
use crate::wire::{FrameKind, OVERHEAD, RelayHead};

/// Control messages that wait for a session.
const QUEUE: usize = 64;
/// Handshakes of ours under way to one peer: their answers may take longer than we wait before the next.
pub(super) const ATTEMPTS: usize = 4;
/// Answered handshakes of one peer that wait for its first datagram, and replaced sessions that linger.
const SPARE: usize = 3;
/// Sessions of one peer that may be received on: the present one, the answered and the replaced ones.
pub(crate) const MAX_SESSIONS: usize = 1 + 2 * SPARE;

/// Between offers of members that may relay: time for those to answer that were offered before.
const OFFER_EVERY: Duration = Duration::from_secs(2);

/// An established session.
pub(super) struct Live {
    pub(super) transport: Arc<Transport>,
    pub(super) initiated: bool,
    pub(super) since: Now,
    pub(super) generation: Generation,
    pub(super) capabilities: Capabilities,
    /// Datagrams opened, frames with packets in both directions, at the last look.
    seen: (u64, u64),
}

impl Live {
    pub(super) fn new(
        transport: Arc<Transport>,
        initiated: bool,
        since: Now,
        generation: Generation,
        capabilities: Capabilities,
    ) -> Self {
        Self {
            transport,
            initiated,
            since,
            generation,
            capabilities,
            seen: (0, 0),
        }
    }

    /// Did datagrams, did packets pass since the last look?
    fn look(&mut self) -> (bool, bool) {
        let counters = self.transport.counters();
        let now = (
            counters.rx_datagrams,
            counters.tx_packets + counters.rx_packets,
        );
        let changed = (now.0 != self.seen.0, now.1 != self.seen.1);
        self.seen = now;
        changed
    }
}

/// A session we answered for, until its first datagram.
pub(super) struct Pending {
    pub(super) live: Live,
    pub(super) from: Path,
}

/// A first message of ours, until its answer.
pub(super) struct Attempt {
    pub(super) index: u32,
    pub(super) noise: Noise,
    pub(super) mac1: [u8; 16],
    pub(super) to: Path,
    pub(super) sent: Now,
}

/// A replaced session.
struct Former {
    live: Live,
    retire: Now,
}

/// What [`Link::poll`] wants done by who holds the keys.
pub(super) enum Wish {
    Nothing,
    /// The link is over: close it.
    Close,
}

pub(super) struct Link {
    pub(super) peer: NodeId,
    pub(super) paths: Paths,
    pub(super) current: Option<Live>,
    former: Vec<Former>,
    pub(super) pending: Vec<Pending>,
    pub(super) attempts: Vec<Attempt>,
    pub(super) dial: Option<Dial>,
    pub(super) cookie: Option<(Cookie, Path, Now)>,
    queue: VecDeque<Vec<u8>>,
    pub(super) starts: Starts,
    last_probe: Option<Now>,
    last_heard: Now,
    last_used: Now,
    last_packet: Option<Now>,
    /// The first probe since the peer was heard last.
    unanswered: Option<Now>,
    /// The first message since then that may be answered.
    hoping_since: Option<Now>,
    fast_since: Option<Now>,
    pub(super) silent: bool,
    /// When members were offered that may relay.
    offered: Option<Now>,
    /// The peer sees this host at an address that this host does not have: only traffic keeps a NAT's door open.
    behind_nat: bool,
}

impl Link {
    pub(super) fn new(peer: NodeId, desk: &Desk, now: Now) -> Self {
        Self {
            peer,
            paths: Paths::new(desk.trusted.clone()),
            current: None,
            former: Vec::new(),
            pending: Vec::new(),
            attempts: Vec::new(),
            dial: None,
            cookie: None,
            queue: VecDeque::new(),
            starts: Starts::new(now),
            last_probe: None,
            last_heard: now,
            last_used: now,
            last_packet: None,
            unanswered: None,
            hoping_since: None,
            fast_since: None,
            silent: false,
            offered: None,
            behind_nat: false,
        }
    }

    /// Is there anything that time changes?
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some() || !self.pending.is_empty() || !self.attempts.is_empty()
    }

    /// Nothing here that would be missed.
    pub(super) fn is_empty(&self) -> bool {
        !self.is_busy() && self.dial.is_none() && self.paths.is_empty()
    }

    pub(super) fn transport(&self, index: u32) -> Option<Arc<Transport>> {
        let former = self.former.iter().map(|f| &f.live);
        let pending = self.pending.iter().map(|p| &p.live);
        self.current
            .iter()
            .chain(former)
            .chain(pending)
            .find(|live| live.transport.local_index() == index)
            .map(|live| live.transport.clone())
    }

    /// Wants a session, unless one is already on its way.
    pub(super) fn start_dial(&mut self, now: Now) {
        if self.dial.is_some() {
            return;
        }
        let is_answered = self
            .pending
            .iter()
            .any(|p| now.since(p.live.since) < YIELD_FOR);
        let next = if is_answered {
            now.plus(YIELD_FOR)
        } else {
            now
        };
        self.dial = Some(Dial {
            since: now,
            next,
            tries: 0,
        });
    }

    /// Lets the other side's handshake go first.
    pub(super) fn yield_dial(&mut self, now: Now) {
        if let Some(dial) = &mut self.dial {
            dial.next = dial.next.max(now.plus(YIELD_FOR));
        }
    }

    /// Keeps an attempt; the oldest goes when there are too many.
    pub(super) fn add_attempt(&mut self, attempt: Attempt, desk: &mut Desk) {
        if self.attempts.len() >= ATTEMPTS {
            desk.release(self.attempts.remove(0).index);
        }
        self.attempts.push(attempt);
    }

    /// Keeps an answered handshake; the oldest goes when there are too many.
    pub(super) fn add_pending(
        &mut self,
        pending: Pending,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.pending.len() >= SPARE {
            let oldest = self.pending.remove(0);
            desk.retire(&oldest.live, out);
        }
        self.pending.push(pending);
    }

    /// The first datagram of an answered handshake came: both sides hold the keys now.
    pub(super) fn confirm(
        &mut self,
        now: Now,
        index: u32,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        let position = self
            .pending
            .iter()
            .position(|p| p.live.transport.local_index() == index);
        let Some(position) = position else {
            return;
        };
        let confirmed = self.pending.remove(position);
        for older in self.pending.drain(..position) {
            desk.retire(&older.live, out);
        }
        self.adopt(now, confirmed.live, confirmed.from, desk, out);
    }

    /// A session is established: send through it from now on, unless both sides made one at once and the other one goes
    /// first. Both decide alike: the one that the lower node id began.
    pub(super) fn adopt(
        &mut self,
        now: Now,
        live: Live,
        path: Path,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        self.dial = None;
        for attempt in self.attempts.drain(..) {
            desk.release(attempt.index);
        }
        let was_silent = self.silent;
        self.on_heard(now, out);
        if self.keeps_current(now, &live, desk) {
            self.linger(now, live, desk, out);
            return;
        }
        let established = SessionEvent::Established {
            peer: self.peer,
            transport: live.transport.clone(),
            generation: live.generation,
        };
        if let Some(former) = self.current.replace(live) {
            self.linger(now, former, desk, out);
        }
        let before = self.paths.current();
        self.paths.on_through(now, path, was_silent);
        self.tell_path(before, out);
        out.push(established);
        self.fast_since = None;
        self.probe(now, desk, out);
        for body in std::mem::take(&mut self.queue) {
            self.seal(FrameKind::Control, &body, None, desk, out);
        }
    }

    fn keeps_current(&self, now: Now, new: &Live, desk: &Desk) -> bool {
        self.current.as_ref().is_some_and(|current| {
            let at_once = now.since(current.since) < AT_ONCE
                && current.initiated != new.initiated
                && current.generation == new.generation;
            at_once && current.initiated == (desk.me < self.peer)
        })
    }

    fn linger(&mut self, now: Now, live: Live, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        if self.former.len() >= SPARE {
            let oldest = self.former.remove(0);
            desk.retire(&oldest.live, out);
        }
        let retire = now.plus(LINGER);
        self.former.push(Former { live, retire });
    }

    fn tell_path(&self, before: Option<Path>, out: &mut Vec<SessionEvent>) {
        if let Some(path) = self.paths.current()
            && before != Some(path)
        {
            let peer = self.peer;
            out.push(SessionEvent::Path { peer, path });
        }
    }

    /// Sends a control message, or keeps it until there is a session. False when it waits.
    pub(super) fn send(
        &mut self,
        now: Now,
        body: Vec<u8>,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) -> bool {
        self.last_used = now;
        if self.seal(FrameKind::Control, &body, None, desk, out) {
            // Nothing heard for a while: unless this is answered, ask soon, and not at the next keepalive.
            if now.since(self.last_heard) > KEEPALIVE_BUSY * 2 {
                self.hoping_since.get_or_insert(now);
            }
            return true;
        }
        if self.queue.len() >= QUEUE {
            self.queue.pop_front();
            desk.drops.count(DropReason::Unsendable);
        }
        self.queue.push_back(body);
        false
    }

    /// Inner packets go to this peer.
    pub(super) fn on_wanted(&mut self, now: Now) {
        self.last_used = now;
        self.last_packet = Some(now);
    }

    /// Seals and sends a frame along `path`, or the present one.
    fn seal(
        &self,
        kind: FrameKind,
        body: &[u8],
        path: Option<Path>,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) -> bool {
        let (Some(live), Some(path)) = (&self.current, path.or(self.paths.current())) else {
            return false;
        };
        let mut datagram = Vec::new();
        match live.transport.seal(kind, body, &mut datagram) {
            Ok(()) => {
                out.push(SessionEvent::send(path, self.peer, datagram));
                true
            }
            Err(_) => {
                desk.drops.count(DropReason::Unsendable);
                false
            }
        }
    }

    /// Asks for an echo along the present path.
    pub(super) fn probe(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        let Some(path) = self.paths.current() else {
            return;
        };
        self.last_probe = Some(now);
        self.unanswered.get_or_insert(now);
        self.ask(now, path, desk, out);
    }

    fn ask(&mut self, now: Now, path: Path, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        let nonce = desk.random.u64();
        self.paths.on_asked(now, path, nonce);
        let request = Probe::Request(nonce).to_bytes();
        self.seal(FrameKind::Probe, &request, Some(path), desk, out);
    }

    /// Something sealed came along another path than the present one: ask there for an echo, and whether the present one
    /// still answers. It is left only for one that does.
    pub(super) fn challenge(
        &mut self,
        now: Now,
        from: Path,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.paths.current() == Some(from) || self.current.is_none() {
            return;
        }
        let is_news = !self.paths.is_doubted();
        if self.paths.see(now, from) {
            self.ask(now, from, desk, out);
        }
        if is_news {
            self.probe(now, desk, out);
        }
    }

    /// This host's addresses changed: what was measured before may not hold.
    pub(super) fn on_moved(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        if self.current.is_none() {
            return;
        }
        self.paths.doubt_all(now);
        self.probe(now, desk, out);
    }

    /// Sends a frame that somebody else's datagram is in.
    pub(super) fn send_frame(
        &mut self,
        now: Now,
        kind: FrameKind,
        body: &[u8],
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) -> bool {
        self.last_used = now;
        self.seal(kind, body, None, desk, out)
    }

    /// Members that may relay, the nearest first, should there be no better way. Of many the nearest are tried, and another
    /// one each time.
    pub(super) fn offer_relays(&mut self, now: Now, mut relays: Vec<NodeId>, desk: &mut Desk) {
        self.offered = Some(now);
        if relays.len() > MAX_RELAYS {
            let others = relays.len() - (MAX_RELAYS - 1);
            let drawn = desk.random.range(others as u64) as usize;
            relays.swap(MAX_RELAYS - 1, MAX_RELAYS - 1 + drawn);
        }
        self.paths.offer(&relays);
    }

    /// Is somebody between wanted, or might another one be better?
    pub(super) fn wants_relay(&self, now: Now) -> bool {
        let is_relayed = self
            .paths
            .current()
            .is_some_and(|path| path.relay().is_some());
        let wanted = match self.current {
            Some(_) => self.silent || is_relayed,
            None => self
                .dial
                .is_some_and(|dial| dial.tries as usize >= self.paths.direct()),
        };
        wanted && self.offered.is_none_or(|at| now.since(at) >= OFFER_EVERY)
    }

    /// There is no way through this member any more.
    pub(super) fn lose_relay(
        &mut self,
        now: Now,
        relay: &NodeId,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.paths.lose_relay(relay) {
            self.probe(now, desk, out);
        }
    }

    /// The connection along `path` is gone: was it needed?
    pub(super) fn lose_connection(
        &mut self,
        now: Now,
        path: Path,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.paths.lose_connection(now, path) {
            self.probe(now, desk, out);
            // Most often its far end has started anew, and knows this session no more.
            self.start_dial(now);
        }
    }

    /// Asks along the paths whose turn it is, and takes the best one.
    fn look_for_paths(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        if self.current.is_none() {
            return;
        }
        let mood = self.mood(now);
        for path in self.paths.due(now, mood) {
            self.ask(now, path, desk, out);
        }
        self.choose(now, mood, out);
        let before = self.paths.mtu();
        if let Some((path, size)) = self.paths.size_due(now, mood) {
            self.ask_size(now, path, size, desk, out);
        }
        self.tell_mtu(before, out);
    }

    /// Asks for an echo in an IP packet of so many octets.
    fn ask_size(
        &mut self,
        now: Now,
        path: Path,
        size: u16,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        let nonce = desk.random.u64();
        self.paths.on_size_asked(now, path, size, nonce);
        let mut request = Probe::Request(nonce).to_bytes();
        let body = usize::from(size.saturating_sub(path.headers())).saturating_sub(OVERHEAD);
        request.resize(body.max(request.len()), 0);
        self.seal(FrameKind::Probe, &request, Some(path), desk, out);
    }

    fn tell_mtu(&self, before: Option<u16>, out: &mut Vec<SessionEvent>) {
        if self.paths.mtu() != before {
            out.push(SessionEvent::Mtu { peer: self.peer });
        }
    }

    /// The kernel sends IP packets of so many octets along `path` in one piece. Counts for the present path alone.
    pub(super) fn set_ceiling(&mut self, path: Path, ceiling: u16, out: &mut Vec<SessionEvent>) {
        // Told of each link's path every few seconds, so that whoever does not take it should be done with it at once.
        if self.paths.current() == Some(path) && self.paths.set_ceiling(path, ceiling) {
            out.push(SessionEvent::Mtu { peer: self.peer });
        }
    }

    /// The largest inner packet that fits into one datagram; `None` before anything is known.
    pub(super) fn inner_mtu(&self) -> Option<u16> {
        let path = self.paths.current()?;
        let around = path.headers() + OVERHEAD as u16;
        Some(self.paths.mtu()?.saturating_sub(around))
    }

    /// The longest datagram that may be given to this peer to pass on.
    pub(super) fn passes_on(&self) -> Option<u16> {
        self.inner_mtu()?.checked_sub(RelayHead::LEN as u16)
    }

    fn choose(&mut self, now: Now, mood: Mood, out: &mut Vec<SessionEvent>) {
        let before = self.paths.current();
        if self.paths.choose(now, mood) {
            self.unanswered = None;
            self.tell_path(before, out);
        }
    }

    fn mood(&self, now: Now) -> Mood {
        Mood {
            busy: self.is_carrying(now),
            silent: self.silent,
        }
    }

    pub(super) fn on_probe(
        &mut self,
        now: Now,
        from: Path,
        probe: Probe,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        match probe {
            Probe::Request(nonce) => {
                let reply = Probe::Reply(nonce, from.udp()).to_bytes();
                self.seal(FrameKind::Probe, &reply, Some(from), desk, out);
            }
            Probe::Reply(nonce, seen) => self.on_echo(now, from, nonce, seen, out),
        }
    }

    fn on_echo(
        &mut self,
        now: Now,
        from: Path,
        nonce: u64,
        seen: Option<SocketAddr>,
        out: &mut Vec<SessionEvent>,
    ) {
        let before = self.paths.mtu();
        if !self.paths.on_echo(now, from, nonce) {
            return;
        }
        self.tell_mtu(before, out);
        let peer = self.peer;
        self.choose(now, self.mood(now), out);
        if self.paths.current() == Some(from) {
            let rtt = self.rtt();
            out.push(SessionEvent::Rtt { peer, rtt });
        }
        if let Some(addr) = seen {
            out.push(SessionEvent::SeenAt { peer, addr });
        }
    }

    /// Smoothed round trip along the present path.
    pub(super) fn rtt(&self) -> Duration {
        self.paths.rtt().smoothed().unwrap_or_default()
    }

    /// Only traffic keeps the way to this host open.
    pub(super) fn set_behind_nat(&mut self, behind_nat: bool) {
        self.behind_nat = behind_nat;
    }

    /// Something authenticated came.
    pub(super) fn on_heard(&mut self, now: Now, out: &mut Vec<SessionEvent>) {
        let peer = self.peer;
        self.last_heard = now;
        self.unanswered = None;
        self.hoping_since = None;
        if std::mem::take(&mut self.silent) {
            out.push(SessionEvent::Answering { peer });
        }
        out.push(SessionEvent::Heard { peer });
    }

    /// A frame that is no probe came or went.
    pub(super) fn on_used(&mut self, now: Now) {
        self.last_used = now;
    }

    /// Forgets all keys and what waits. True when there was anything to lose.
    pub(super) fn close(&mut self, desk: &mut Desk, out: &mut Vec<SessionEvent>) -> bool {
        let had = self.is_busy() || self.dial.is_some();
        for live in self
            .current
            .take()
            .into_iter()
            .chain(self.former.drain(..).map(|f| f.live))
            .chain(self.pending.drain(..).map(|p| p.live))
        {
            desk.retire(&live, out);
        }
        for attempt in self.attempts.drain(..) {
            desk.release(attempt.index);
        }
        for _ in self.queue.drain(..) {
            desk.drops.count(DropReason::Unsendable);
        }
        self.dial = None;
        self.paths.close();
        self.unanswered = None;
        self.hoping_since = None;
        self.fast_since = None;
        self.last_probe = None;
        self.silent = false;
        had
    }
}
