//! Does what is cut by the kernel arrive, and what leaves by another source port? Cards and drivers exist that take a run
//! and send nothing of it, or garbage. So each new session and path is tried with runs of full-sized echo requests beside
//! single ones of the same length: where the single ones are answered and a place of the runs never is, runs to that peer
//! end. From each further source port goes a single one: nothing else leaves by it before that was answered.
//!
//! ```text
//! new session, path or size ──> round ── all of a run answered ──> good
//!                                │ ^
//!                       200 ms   └─┘ six times, a second more ──> single ones answered, a place never: failing
//!                                                              └─> hardly any answered: again, when packets go out ten
//!                                                                  seconds later
//! ```

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use weft_core::underlay::{Offload, OffloadState, UnderlayAddr};
use weft_core::view::PeerNumber;
use weft_core::wire::{DATA_HEADER, ECHO_REPLY, ECHO_REQUEST, FrameKind, OVERHEAD};

use crate::batch::{Run, Sent, Way, Wire};
use crate::shared::Shared;
use crate::source_ports::MAX_SOURCE_PORTS;
use crate::table::Table;

/// Rounds before the verdict.
const ROUNDS: u32 = 6;
/// Between two of them.
const GAP: Duration = Duration::from_millis(200);
/// How long the last answers may take.
const GRACE: Duration = Duration::from_secs(1);
/// After a trial that said nothing, before the next.
const AGAIN: Duration = Duration::from_secs(10);
/// Between looks at who has become worth a trial.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Datagrams of one run.
const TRAIN: u64 = 4;
/// Answers of one round in [`Echoes`]: the single datagram, the run, and one from each further source port.
const ROUND_BITS: u32 = 8;
/// Those of the run.
const ALL: u64 = ((1 << TRAIN) - 1) << 1;
/// The first of those from further ports.
const FURTHER: u64 = TRAIN + 1;
const _: () = assert!(FURTHER + MAX_SOURCE_PORTS as u64 - 1 == ROUND_BITS as u64);
/// Single datagrams that must have been answered before silence about the others means anything.
const ENOUGH: u32 = 3;
/// Flag and nonce of an echo, before its padding.
const ECHO: usize = 9;

/// Answers to the trial of one peer, taken by the receiving threads.
#[derive(Debug, Default)]
pub(crate) struct Echoes {
    /// What the nonces of this trial begin with; their last six bits say which answer it is. Zero: no trial.
    base: AtomicU64,
    answered: AtomicU64,
}

impl Echoes {
    fn begin(&self, base: u64) {
        self.answered.store(0, Ordering::Relaxed);
        self.base.store(base, Ordering::Release);
    }

    fn end(&self) {
        self.base.store(0, Ordering::Relaxed);
    }

    /// Takes the body of a probe, if it is an answer to the trial under way.
    pub(crate) fn take(&self, body: &[u8]) -> bool {
        let base = self.base.load(Ordering::Acquire);
        let Some((&[flag, ref nonce @ ..], _)) = body.split_first_chunk::<ECHO>() else {
            return false;
        };
        let nonce = u64::from_le_bytes(*nonce);
        let ours = base != 0 && flag == ECHO_REPLY && nonce & !63 == base;
        if ours {
            self.answered.fetch_or(1 << (nonce & 63), Ordering::Relaxed);
        }
        ours
    }

    fn round(&self, round: u32) -> u64 {
        self.answered.load(Ordering::Relaxed) >> (round * ROUND_BITS) & ((1 << ROUND_BITS) - 1)
    }

    /// The further source ports from which something was answered: bit n for port n + 1.
    fn ports(&self) -> u8 {
        let of = |round| (self.round(round) >> FURTHER) as u8;
        (0..ROUNDS).fold(0, |all, round| all | of(round))
    }

    /// What the answers of all rounds say of runs; `None` while they say nothing.
    fn verdict(&self, is_over: bool) -> Option<OffloadState> {
        let rounds: Vec<u64> = (0..ROUNDS).map(|n| self.round(n)).collect();
        if rounds.iter().any(|answers| answers & ALL == ALL) {
            return Some(OffloadState::On);
        }
        let singles = rounds.iter().filter(|answers| *answers & 1 != 0).count();
        let ever = rounds.iter().fold(0, |all, answers| all | answers);
        let failing = is_over && singles as u32 >= ENOUGH && ever & ALL != ALL;
        failing.then_some(OffloadState::Failing)
    }
}

/// What a trial holds for: another of these, another trial.
type Subject = (u32, UnderlayAddr, usize);

#[derive(Debug)]
struct Trial {
    subject: Subject,
    /// What is still to be found out.
    open: Open,
    /// Rounds sent.
    rounds: u32,
    base: u64,
    /// When to go on; `None` when it is over.
    next: Option<Instant>,
    /// It is over and said nothing: from then on another may be begun.
    again: Option<Instant>,
}

/// Questions.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Do runs arrive?
    runs: bool,
    /// Which of so many further source ports reach the peer?
    further_ports: u8,
}

impl Open {
    fn all(shared: &Shared) -> Self {
        Self {
            runs: shared.offloads.is_on(Offload::Gso),
            further_ports: shared.further_ports,
        }
    }

    fn is_any(self) -> bool {
        self.runs || self.further_ports > 0
    }
}

/// The trials of all peers: those under way, and what the finished ones held for.
#[derive(Debug)]
pub(crate) struct Trials {
    of: BTreeMap<PeerNumber, Trial>,
    hash: RandomState,
    begun: u64,
    look_again: Instant,
    /// The first of those under way: asked for with every packet, so not looked for then.
    next: Option<Instant>,
}

impl Trials {
    /// None yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            of: BTreeMap::new(),
            hash: RandomState::default(),
            begun: 0,
            look_again: now,
            next: None,
        }
    }

    /// A question is due, or packets went out since the last look, perhaps to somebody who was not tried yet.
    pub(crate) fn is_worth_a_look(&self, now: Instant) -> bool {
        now >= self.look_again || self.deadline().is_some_and(|at| now >= at)
    }

    /// When [`Self::go_on`] has something to do, unless the table changes before.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.next
    }

    /// Begins trials for what is new in the table, and goes on with those under way.
    pub(crate) fn go_on(&mut self, now: Instant, table: &Table, shared: &Shared, wire: &impl Wire) {
        self.of.retain(|number, _| table.place(*number).is_some());
        let open = Open::all(shared);
        if open.is_any() {
            self.go_through(now, table, open, wire);
        }
        self.next = self.of.values().filter_map(|trial| trial.next).min();
        self.look_again = now + LOOK_EVERY;
    }

    fn go_through(&mut self, now: Instant, table: &Table, open: Open, wire: &impl Wire) {
        for way in table.peers.iter().filter_map(Way::to) {
            // Who has nothing to send needs no runs, and hundreds of trials at rest would cost more than all the gossip does.
            // What goes through somebody is cut there, and nobody cuts what goes by TCP.
            if way.transport.counters().tx_packets == 0 || !way.is_direct_udp() {
                continue;
            }
            let subject = (way.transport.remote_index(), way.lane.to, way.peer.mtu);
            let known = self.of.get(&way.peer.number);
            if !known.is_some_and(|trial| trial.holds_for(subject, now)) {
                let is_elsewhere = known.is_none_or(|known| known.subject.1 != subject.1);
                let trial = self.begin(subject, open, now);
                way.peer.state.echoes.begin(trial.base);
                // What reached the peer there a session ago is taken to do so until it is known not to.
                if is_elsewhere {
                    way.peer.state.source_ports.set(0);
                }
                self.of.insert(way.peer.number, trial);
            }
            if let Some(trial) = self.of.get_mut(&way.peer.number) {
                trial.go_on(now, way, wire);
            }
        }
    }

    fn begin(&mut self, subject: Subject, open: Open, now: Instant) -> Trial {
        self.begun += 1;
        // Inside the seal nobody guesses it; it must only differ from what came before.
        let base = self.hash.hash_one(self.begun) & !63 | 64;
        Trial {
            subject,
            open,
            rounds: 0,
            base,
            next: Some(now),
            again: None,
        }
    }
}

impl Trial {
    fn holds_for(&self, subject: Subject, now: Instant) -> bool {
        self.subject == subject && self.again.is_none_or(|at| now < at)
    }

    fn go_on(&mut self, now: Instant, way: Way<'_>, wire: &impl Wire) {
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        let is_over = self.rounds >= ROUNDS;
        self.take_answers(way, is_over);
        if !self.open.is_any() {
            return self.end(way);
        }
        if is_over {
            // Of runs nobody said anything: that is not their fault. A port that reached nobody is done without.
            self.again = self.open.runs.then(|| now + AGAIN);
            return self.end(way);
        }
        self.send_round(way, wire);
        if !self.open.is_any() {
            return self.end(way);
        }
        self.rounds += 1;
        let wait = if self.rounds < ROUNDS { GAP } else { GRACE };
        self.next = Some(now + wait);
    }

    /// What is known already is no longer asked.
    fn take_answers(&mut self, way: Way<'_>, is_over: bool) {
        let state = &way.peer.state;
        if self.open.runs
            && let Some(verdict) = state.echoes.verdict(is_over)
        {
            self.close_runs(way, verdict);
        }
        if self.open.further_ports > 0 {
            let (proven, all) = (state.echoes.ports(), (1 << self.open.further_ports) - 1);
            let former = if is_over { 0 } else { state.source_ports.get() };
            state.source_ports.set((former | proven) & all);
            if proven & all == all {
                self.open.further_ports = 0;
            }
        }
    }

    fn close_runs(&mut self, way: Way<'_>, verdict: OffloadState) {
        way.peer.state.gso.set(verdict);
        self.open.runs = false;
    }

    fn end(&mut self, way: Way<'_>) {
        way.peer.state.echoes.end();
        self.next = None;
    }

    /// What is lost is lost: there are more rounds.
    fn send_round(&mut self, way: Way<'_>, wire: &impl Wire) {
        let stride = way.peer.mtu + OVERHEAD;
        let ask = |octets: &[u8], source| {
            let run = Run {
                octets,
                stride,
                tos: 0,
            };
            wire.send(way.leaving_by(source).lane, run)
        };
        if let Some(single) = self.questions(way, 0..1) {
            let _ = ask(&single, 0);
        }
        if self.open.runs
            && let Some(train) = self.questions(way, 1..FURTHER)
            && let Ok(Sent::OneByOne) = ask(&train, 0)
        {
            self.close_runs(way, OffloadState::Refused);
        }
        for port in 0..self.open.further_ports {
            let place = FURTHER + u64::from(port);
            if let Some(single) = self.questions(way, place..place + 1) {
                let _ = ask(&single, port + 1);
            }
        }
    }

    /// Echo requests for these places of the present round, sealed, one behind the other. `None` where the session seals no
    /// more.
    fn questions(&self, way: Way<'_>, places: Range<u64>) -> Option<Vec<u8>> {
        let stride = way.peer.mtu + OVERHEAD;
        let mut octets = Vec::new();
        for place in places {
            let start = octets.len();
            let nonce = self.base | (u64::from(self.rounds * ROUND_BITS) + place);
            octets.resize(start + stride, 0);
            let frame = octets[start + DATA_HEADER..].first_chunk_mut::<{ 1 + ECHO }>()?;
            frame[0] = FrameKind::Probe as u8;
            frame[1] = ECHO_REQUEST;
            frame[2..].copy_from_slice(&nonce.to_le_bytes());
            let length = 1 + way.peer.mtu;
            way.transport
                .seal_in_place(&mut octets[start..], length)
                .ok()?;
        }
        Some(octets)
    }
}

#[cfg(test)]
mod tests;
