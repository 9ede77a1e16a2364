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

use super::cookie::Cookie;
use super::desk::Desk;
use super::drops::DropReason;
use super::handshake::Capabilities;
use super::noise::Noise;
use super::starts::Starts;
use super::timers::{AT_ONCE, CHALLENGE_EVERY, Dial, KEEPALIVE_BUSY, LINGER, Rtt, YIELD_FOR};
use super::transport::Transport;
use super::{Probe, SessionEvent};
use crate::model::{Generation, NodeId, Now};
use crate::wire::FrameKind;

/// Control messages that wait for a session.
const QUEUE: usize = 64;
/// Handshakes of ours under way to one peer: their answers may take longer than we wait before the next.
pub(super) const ATTEMPTS: usize = 4;
/// Answered handshakes of one peer that wait for its first datagram, and replaced sessions that linger.
const SPARE: usize = 3;
/// Sessions of one peer that may be received on: the present one, the answered and the replaced ones.
pub(crate) const MAX_SESSIONS: usize = 1 + 2 * SPARE;
/// Echoes under way.
const PROBES: usize = 8;
/// Addresses remembered of one peer.
const CANDIDATES: usize = 16;

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
    pub(super) from: SocketAddr,
}

/// A first message of ours, until its answer.
pub(super) struct Attempt {
    pub(super) index: u32,
    pub(super) noise: Noise,
    pub(super) mac1: [u8; 16],
    pub(super) to: SocketAddr,
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
    pub(super) candidates: Vec<SocketAddr>,
    pub(super) path: Option<SocketAddr>,
    pub(super) current: Option<Live>,
    former: Vec<Former>,
    pub(super) pending: Vec<Pending>,
    pub(super) attempts: Vec<Attempt>,
    pub(super) dial: Option<Dial>,
    pub(super) cookie: Option<(Cookie, SocketAddr, Now)>,
    queue: VecDeque<Vec<u8>>,
    pub(super) starts: Starts,
    pub(super) rtt: Rtt,
    probes: VecDeque<(u64, Now)>,
    challenge: Option<(SocketAddr, u64, Now)>,
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
}

impl Link {
    pub(super) fn new(peer: NodeId, now: Now) -> Self {
        Self {
            peer,
            candidates: Vec::new(),
            path: None,
            current: None,
            former: Vec::new(),
            pending: Vec::new(),
            attempts: Vec::new(),
            dial: None,
            cookie: None,
            queue: VecDeque::new(),
            starts: Starts::new(now),
            rtt: Rtt::default(),
            probes: VecDeque::new(),
            challenge: None,
            last_probe: None,
            last_heard: now,
            last_used: now,
            last_packet: None,
            unanswered: None,
            hoping_since: None,
            fast_since: None,
            silent: false,
        }
    }

    pub(super) fn set_candidates(&mut self, candidates: Vec<SocketAddr>) {
        self.candidates.clear();
        for address in candidates {
            if !self.candidates.contains(&address) && self.candidates.len() < CANDIDATES {
                self.candidates.push(address);
            }
        }
    }

    /// Where to call, best first.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let others = self.candidates.iter().filter(|a| Some(**a) != self.path);
        self.path.iter().chain(others).copied().collect()
    }

    /// Is there anything that time changes?
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some() || !self.pending.is_empty() || !self.attempts.is_empty()
    }

    /// Nothing here that would be missed.
    pub(super) fn is_empty(&self) -> bool {
        !self.is_busy() && self.dial.is_none() && self.candidates.is_empty()
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
        path: SocketAddr,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        self.dial = None;
        for attempt in self.attempts.drain(..) {
            desk.release(attempt.index);
        }
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
        self.set_path(path, out);
        out.push(established);
        self.fast_since = None;
        self.probe(now, desk, out);
        for body in std::mem::take(&mut self.queue) {
            self.seal(FrameKind::Control, &body, path, desk, out);
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

    fn set_path(&mut self, addr: SocketAddr, out: &mut Vec<SessionEvent>) {
        if self.path != Some(addr) {
            self.path = Some(addr);
            let peer = self.peer;
            out.push(SessionEvent::Path { peer, addr });
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
        if let Some(path) = self.path
            && self.seal(FrameKind::Control, &body, path, desk, out)
        {
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

    fn seal(
        &self,
        kind: FrameKind,
        body: &[u8],
        to: SocketAddr,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) -> bool {
        let Some(live) = &self.current else {
            return false;
        };
        let mut datagram = Vec::new();
        match live.transport.seal(kind, body, &mut datagram) {
            Ok(()) => {
                out.push(SessionEvent::Send { to, datagram });
                true
            }
            Err(_) => {
                desk.drops.count(DropReason::Unsendable);
                false
            }
        }
    }

    /// Asks for an echo along the path.
    pub(super) fn probe(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        let Some(path) = self.path else {
            return;
        };
        let nonce = desk.random.u64();
        if self.probes.len() >= PROBES {
            self.probes.pop_front();
        }
        self.probes.push_back((nonce, now));
        self.last_probe = Some(now);
        self.unanswered.get_or_insert(now);
        let request = Probe::Request(nonce).to_bytes();
        self.seal(FrameKind::Probe, &request, path, desk, out);
    }

    /// Something sealed came from an address that is not the path: ask there for an echo, and move only when it comes.
    pub(super) fn challenge(
        &mut self,
        now: Now,
        from: SocketAddr,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        let is_waiting = self
            .challenge
            .is_some_and(|(_, _, at)| now.since(at) < CHALLENGE_EVERY);
        if self.path == Some(from) || is_waiting || self.current.is_none() {
            return;
        }
        let nonce = desk.random.u64();
        self.challenge = Some((from, nonce, now));
        let request = Probe::Request(nonce).to_bytes();
        self.seal(FrameKind::Probe, &request, from, desk, out);
    }

    pub(super) fn on_probe(
        &mut self,
        now: Now,
        from: SocketAddr,
        probe: Probe,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        match probe {
            Probe::Request(nonce) => {
                let reply = Probe::Reply(nonce).to_bytes();
                self.seal(FrameKind::Probe, &reply, from, desk, out);
            }
            Probe::Reply(nonce) => self.on_echo(now, from, nonce, out),
        }
    }

    fn on_echo(&mut self, now: Now, from: SocketAddr, nonce: u64, out: &mut Vec<SessionEvent>) {
        if let Some((address, expected, _)) = self.challenge
            && expected == nonce
        {
            if address == from {
                self.challenge = None;
                self.set_path(from, out);
            }
            return;
        }
        let Some(position) = self.probes.iter().position(|(n, _)| *n == nonce) else {
            return;
        };
        if let Some((_, sent)) = self.probes.remove(position) {
            self.rtt.sample(now.since(sent));
            let rtt = self.rtt.smoothed().unwrap_or_default();
            let peer = self.peer;
            out.push(SessionEvent::Rtt { peer, rtt });
        }
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
        self.probes.clear();
        self.challenge = None;
        self.unanswered = None;
        self.hoping_since = None;
        self.fast_since = None;
        self.last_probe = None;
        self.silent = false;
        had
    }
}
