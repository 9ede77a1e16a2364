//! All paths to one peer: who told of them, what was asked along them, and the one that is taken.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::mtu::Mtu;
use super::{Class, Path, PathInfo};
use crate::model::{NodeId, Now};
use crate::session::Rtt;
use crate::underlay::UnderlayAddr;

/// Addresses that a peer may name, those of its TCP port among them.
const MAX_TOLD: usize = 20;
/// Addresses it was seen at and doesn't name.
const MAX_SEEN: usize = 4;
/// Members that are tried between.
pub(crate) const MAX_RELAYS: usize = 3;
/// Between two questions about addresses that a peer was seen at: an echo is asked for there, and whoever stands between
/// chooses the address.
const SEEN_EVERY: Duration = Duration::from_secs(1);
/// A path that answered this long ago is as good as one that answers now.
const PROOF: Duration = Duration::from_secs(5);
/// Between questions along a path that may replace the present one at once: better ones at first, all of them when that one
/// is silent.
const SOON: Duration = Duration::from_millis(500);
/// Between questions along a path that would be better, in the end: while packets pass, and while only gossip does.
const BETTER_BUSY: Duration = Duration::from_secs(30);
const BETTER_IDLE: Duration = Duration::from_secs(300);
/// The same while a connection is all there is: what waits for one lost segment of it, waits for all, so nobody should stay
/// in one for longer than must be.
const BACK_BUSY: Duration = Duration::from_secs(3);
const BACK_IDLE: Duration = Duration::from_secs(30);
/// Between questions along one that is as good or worse, while packets pass.
const OTHERS_BUSY: Duration = Duration::from_secs(120);
/// Round trips measured before one path is taken for faster than another.
const SAMPLES: u32 = 3;
/// So many of the last round trips count, and as many before.
const WINDOW: u32 = 8;
/// A path that is faster by less than this is not worth a change.
const FASTER: Duration = Duration::from_millis(2);
/// How long the present path has to answer, beside its round trip, once the peer sends from elsewhere.
const DOUBT: Duration = Duration::from_millis(200);

/// How a path became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The peer's record names it.
    Told,
    /// Something sealed came from there.
    Seen,
    /// A member that may relay.
    Relay,
}

#[derive(Clone, Debug)]
struct Known {
    path: Path,
    origin: Origin,
    rtt: Rtt,
    /// The shortest round trips of the present and of the last [`WINDOW`]: what is longer tells more of the hosts' load than
    /// of the path.
    shortest: [Option<Duration>; 2],
    samples: u32,
    /// When it last answered.
    proven: Option<Now>,
    /// What was last asked along it, and when.
    asked: Option<(u64, Now)>,
    is_answered: bool,
    /// Questions since the last answer.
    missed: u32,
    mtu: Mtu,
}

/// What the link's state means for its paths.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mood {
    /// Packets pass.
    pub(crate) busy: bool,
    /// The present path owes an answer.
    pub(crate) silent: bool,
}

/// The paths to one peer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Paths {
    /// Networks that this host trusts.
    trusted: Arc<[IpNet]>,
    known: Vec<Known>,
    current: Option<Path>,
    /// Since when the peer sends from elsewhere and the present path has not answered.
    doubted: Option<Now>,
    last_seen: Option<Now>,
}

impl Known {
    fn new(path: Path, origin: Origin) -> Self {
        Self {
            path,
            origin,
            rtt: Rtt::default(),
            shortest: [None; 2],
            samples: 0,
            proven: None,
            asked: None,
            is_answered: false,
            missed: 0,
            mtu: path.mtu(),
        }
    }

    fn is_proven(&self, now: Now) -> bool {
        self.proven.is_some_and(|at| now.since(at) < PROOF)
    }

    fn measure(&mut self, rtt: Duration) {
        self.rtt.sample(rtt);
        if self.samples.is_multiple_of(WINDOW) {
            self.shortest = [None, self.shortest[0]];
        }
        let now = &mut self.shortest[0];
        *now = Some(now.map_or(rtt, |shortest| shortest.min(rtt)));
        self.samples = self.samples.saturating_add(1);
    }

    fn shortest(&self) -> Option<Duration> {
        self.shortest.iter().flatten().min().copied()
    }

    /// Is it faster than `other` by more than chance and by enough to be worth it?
    fn is_faster(&self, other: &Self) -> bool {
        let (Some(mine), Some(theirs)) = (self.shortest(), other.shortest()) else {
            return false;
        };
        mine + FASTER < theirs && mine * 5 < theirs * 4
    }
}

impl Paths {
    /// None yet, of a host that trusts these networks.
    pub(crate) fn new(trusted: Arc<[IpNet]>) -> Self {
        Self {
            trusted,
            ..Self::default()
        }
    }

    fn class(&self, path: Path) -> Class {
        path.class(&self.trusted)
    }

    /// The path that is taken.
    pub(crate) fn current(&self) -> Option<Path> {
        self.current
    }

    /// Nothing is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The addresses that the peer's record names, best first. Replaces what it named before; what is in use stays.
    pub(crate) fn tell(&mut self, addresses: &[UnderlayAddr]) {
        let mut told: Vec<Path> = Vec::new();
        for path in addresses.iter().copied().map(Path::Direct) {
            if !told.contains(&path) && told.len() < MAX_TOLD {
                told.push(path);
            }
        }
        self.replace(Origin::Told, &told);
    }

    /// The members that may relay, best first. Replaces those before.
    pub(crate) fn offer(&mut self, relays: &[NodeId]) {
        let relays: Vec<Path> = relays
            .iter()
            .take(MAX_RELAYS)
            .map(|by| Path::Relayed(*by))
            .collect();
        self.replace(Origin::Relay, &relays);
    }

    /// A member can't be reached any more, so nobody can through it.
    pub(crate) fn lose_relay(&mut self, relay: &NodeId) -> bool {
        let lost = Path::Relayed(*relay);
        self.known
            .retain(|known| known.path != lost || self.current == Some(lost));
        if let Some(known) = self.find(lost) {
            known.proven = None;
        }
        self.current == Some(lost)
    }

    /// The connection along `path` is gone. True when that was the present path and can be made anew from here.
    pub(crate) fn lose_connection(&mut self, now: Now, path: Path) -> bool {
        let is_present = self.current == Some(path);
        // Where one came from nobody listens.
        self.known
            .retain(|known| known.path != path || known.origin != Origin::Seen || is_present);
        let Some(known) = self.find(path) else {
            return false;
        };
        known.proven = None;
        let is_told = known.origin == Origin::Told;
        if is_present {
            self.doubted.get_or_insert(now);
        }
        is_present && is_told
    }

    fn replace(&mut self, origin: Origin, paths: &[Path]) {
        let mut rest = std::mem::take(&mut self.known);
        let mut take = |path: Path| {
            let place = rest.iter().position(|known| known.path == path)?;
            Some(rest.remove(place))
        };
        let mut listed: Vec<Known> = paths
            .iter()
            .map(|path| {
                let mut known = take(*path).unwrap_or_else(|| Known::new(*path, origin));
                known.origin = origin;
                known
            })
            .collect();
        for known in &mut rest {
            if known.origin == origin && Some(known.path) == self.current {
                known.origin = Origin::Seen;
            }
        }
        rest.retain(|known| known.origin != origin);
        // The order is the order in which they are called: told, seen, relays.
        let relays: Vec<Known> = rest
            .extract_if(.., |known| known.origin == Origin::Relay)
            .collect();
        match origin {
            Origin::Relay => rest.append(&mut listed),
            _ => {
                listed.append(&mut rest);
                rest = listed;
                rest.extend(relays);
            }
        }
        self.known = rest;
    }

    /// Where to call, best first.
    pub(crate) fn to_call(&self) -> Vec<Path> {
        let others = self.known.iter().map(|known| known.path);
        self.current
            .into_iter()
            .chain(others.filter(|path| Some(*path) != self.current))
            .collect()
    }

    /// What is known of all of them, in that order.
    pub(crate) fn list(&self) -> Vec<PathInfo> {
        let info = |known: &Known| PathInfo {
            path: known.path,
            in_use: Some(known.path) == self.current,
            rtt_micros: known
                .rtt
                .smoothed()
                .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            unanswered: known.missed,
            answered: known.proven.is_some() || known.samples > 0,
        };
        self.known.iter().map(info).collect()
    }

    /// Somebody is called along `path`.
    pub(crate) fn on_called(&mut self, path: Path) {
        if let Some(known) = self.find(path) {
            known.missed = known.missed.saturating_add(1);
        }
    }

    /// How many of those have nobody between.
    pub(crate) fn direct(&self) -> usize {
        let direct = |known: &&Known| known.path.direct().is_some();
        self.known.iter().filter(direct).count()
    }

    /// Is the peer reached where its record does not say it is?
    pub(crate) fn is_off_record(&self) -> bool {
        let is_told = |known: &&Known| known.origin == Origin::Told;
        let mut told = self.known.iter().filter(is_told).peekable();
        told.peek().is_some() && told.all(|known| Some(known.path) != self.current)
    }

    /// Something sealed came along `path`, which is not the present one. True when an echo should be asked for there.
    pub(crate) fn see(&mut self, now: Now, path: Path) -> bool {
        self.doubted.get_or_insert(now);
        let asked_lately = |known: &Known| {
            known
                .asked
                .is_some_and(|(_, at)| now.since(at) < SEEN_EVERY)
                || known.is_proven(now)
        };
        if let Some(known) = self.find(path) {
            return !asked_lately(known);
        }
        if self.last_seen.is_some_and(|at| now.since(at) < SEEN_EVERY) {
            return false;
        }
        self.last_seen = Some(now);
        let place = self.place_of_seen();
        self.known.insert(place, Known::new(path, Origin::Seen));
        true
    }

    /// Behind what was told and seen; the oldest of too many seen ones goes.
    fn place_of_seen(&mut self) -> usize {
        let is_idle =
            |known: &Known| known.origin == Origin::Seen && Some(known.path) != self.current;
        let seen = self.known.iter().filter(|known| is_idle(known)).count();
        if seen >= MAX_SEEN
            && let Some(oldest) = self.known.iter().position(is_idle)
        {
            self.known.remove(oldest);
        }
        let is_relay = |known: &Known| known.origin == Origin::Relay;
        self.known
            .iter()
            .position(is_relay)
            .unwrap_or(self.known.len())
    }

    /// Since when there is doubt about the present path.
    pub(crate) fn is_doubted(&self) -> bool {
        self.doubted.is_some()
    }

    /// Paths along which an echo should be asked for now.
    pub(crate) fn due(&self, now: Now, mood: Mood) -> Vec<Path> {
        let is_due = |known: &&Known| {
            let every = self.interval(known, mood);
            Some(known.path) != self.current
                && every
                    .is_some_and(|every| known.asked.is_none_or(|(_, at)| now.since(at) >= every))
        };
        self.known
            .iter()
            .filter(is_due)
            .map(|known| known.path)
            .collect()
    }

    fn interval(&self, known: &Known, mood: Mood) -> Option<Duration> {
        let present = self.current.and_then(|path| self.look_up(path))?;
        let backed_off = SOON.saturating_mul(1 << known.missed.min(10));
        if known.path == present.path {
            // The link's keepalives ask along it; but what the others are measured by should be known soon.
            return (known.samples < SAMPLES).then_some(backed_off.min(BETTER_BUSY));
        }
        if mood.silent {
            return Some(SOON);
        }
        if known.path.tcp().is_some() && !self.wants_tcp(present.path) {
            return None;
        }
        let is_promising = known.is_answered && known.samples < SAMPLES && known.is_faster(present);
        if is_promising {
            return Some(SOON);
        }
        let (busy, idle) = match present.path.tcp() {
            Some(_) => (BACK_BUSY, BACK_IDLE),
            None => (BETTER_BUSY, BETTER_IDLE),
        };
        match (self.class(known.path) < self.class(present.path), mood.busy) {
            (true, true) => Some(backed_off.min(busy)),
            (true, false) => Some(backed_off.min(idle)),
            (false, true) => Some(OTHERS_BUSY),
            // Once, so that there is something to fall back to that is known to work.
            (false, false) if known.asked.is_none() => Some(Duration::ZERO),
            (false, false) => None,
        }
    }

    /// A connection costs both ends something as long as it is open, so none is opened, nor kept from falling asleep, only to
    /// know whether it would work: neither beside a path by UDP that answers, nor beside another connection.
    fn wants_tcp(&self, present: Path) -> bool {
        self.class(present) > Class::Tcp
    }

    /// The kernel sends IP packets of so many octets along `path` in one piece. True when that changes what the present
    /// path takes.
    pub(crate) fn set_ceiling(&mut self, path: Path, ceiling: u16) -> bool {
        let before = self.mtu();
        if let Some(known) = self.find(path) {
            known.mtu.set_ceiling(ceiling);
        }
        self.mtu() != before
    }

    /// What the present path takes, in octets of IP packets; `None` before anything is known.
    pub(crate) fn mtu(&self) -> Option<u16> {
        let present = self.current.and_then(|path| self.look_up(path))?;
        present.mtu.size()
    }

    /// The size of which an echo along the present path should be asked for now.
    pub(crate) fn size_due(&mut self, now: Now, mood: Mood) -> Option<(Path, u16)> {
        let path = self.current.filter(|_| mood.busy && !mood.silent)?;
        let known = self.find(path)?;
        let slack = known.rtt.slack();
        Some((path, known.mtu.due(now, slack)?))
    }

    /// An echo of this size was asked for along `path`.
    pub(crate) fn on_size_asked(&mut self, now: Now, path: Path, size: u16, nonce: u64) {
        if let Some(known) = self.find(path) {
            known.mtu.on_asked(now, size, nonce);
        }
    }

    /// An echo with this number was asked for along `path`.
    pub(crate) fn on_asked(&mut self, now: Now, path: Path, nonce: u64) {
        if let Some(known) = self.find(path) {
            known.asked = Some((nonce, now));
            known.is_answered = false;
            known.missed = known.missed.saturating_add(1);
        }
    }

    /// An echo came along `path`. True if it was asked for there: the path works.
    pub(crate) fn on_echo(&mut self, now: Now, path: Path, nonce: u64) -> bool {
        let current = self.current;
        let Some(known) = self.find(path) else {
            return false;
        };
        if known.mtu.on_echo(now, nonce) {
            known.proven = Some(now);
            return true;
        }
        let Some((_, sent)) = known.asked.filter(|(asked, _)| *asked == nonce) else {
            return false;
        };
        if !std::mem::replace(&mut known.is_answered, true) {
            let rtt = now.since(sent);
            known.measure(rtt);
        }
        known.proven = Some(now);
        known.missed = 0;
        if current == Some(path) {
            self.doubted = None;
        }
        true
    }

    /// A handshake went through along `path`: it works, and it is taken where none is that does.
    pub(crate) fn on_through(&mut self, now: Now, path: Path, is_silent: bool) {
        if self.find(path).is_none() {
            let place = self.place_of_seen();
            self.known.insert(place, Known::new(path, Origin::Seen));
        }
        if let Some(known) = self.find(path) {
            known.proven = Some(now);
            known.missed = 0;
        }
        let is_lost = self.current.is_none() || is_silent;
        let is_better = self
            .current
            .is_some_and(|at| self.class(path) < self.class(at));
        if is_lost || is_better {
            self.take(path);
        }
    }

    fn take(&mut self, path: Path) {
        self.current = Some(path);
        self.doubted = None;
    }

    /// Takes the best path that answers, if that is another one than the present one. True when it is.
    pub(crate) fn choose(&mut self, now: Now, mood: Mood) -> bool {
        let Some(present) = self.current.and_then(|path| self.look_up(path)) else {
            return false;
        };
        let slack = present.rtt.slack() + DOUBT;
        let is_doubtful = self.doubted.is_some_and(|at| now.since(at) >= slack);
        let is_gone = mood.silent || is_doubtful;
        let best = self
            .known
            .iter()
            .filter(|known| known.is_proven(now) && known.path != present.path)
            .min_by_key(|known| (self.class(known.path), known.shortest()));
        let Some(best) = best else {
            return false;
        };
        let faster = self.class(best.path) == self.class(present.path)
            && best.samples >= SAMPLES
            && present.samples >= SAMPLES
            && best.is_faster(present);
        let path = best.path;
        let changes = is_gone || self.class(path) < self.class(present.path) || faster;
        if changes {
            // What it answered before it went silent says nothing any more, however short a time ago.
            let left = self.current.filter(|_| is_gone);
            if let Some(left) = left.and_then(|left| self.find(left)) {
                left.proven = None;
            }
            self.take(path);
        }
        changes
    }

    /// Nothing measured before counts: the sessions are gone, or this host is elsewhere.
    pub(crate) fn doubt_all(&mut self, now: Now) {
        for known in &mut self.known {
            known.proven = None;
            known.asked = None;
            known.missed = 0;
        }
        self.doubted.get_or_insert(now);
    }

    /// Forgets what is in use; the addresses stay.
    pub(crate) fn close(&mut self) {
        self.known.retain(|known| known.origin == Origin::Told);
        for known in &mut self.known {
            *known = Known::new(known.path, known.origin);
        }
        self.doubted = None;
    }

    /// The smoothed round trip along the present path.
    pub(crate) fn rtt(&self) -> Rtt {
        let present = self.current.and_then(|path| self.look_up(path));
        present.map(|known| known.rtt).unwrap_or_default()
    }

    fn find(&mut self, path: Path) -> Option<&mut Known> {
        self.known.iter_mut().find(|known| known.path == path)
    }

    fn look_up(&self, path: Path) -> Option<&Known> {
        self.known.iter().find(|known| known.path == path)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addr(n: u8) -> UnderlayAddr {
        UnderlayAddr::Udp(([192, 0, 2, n], 6783).into())
    }

    fn tcp(n: u8) -> UnderlayAddr {
        UnderlayAddr::Tcp(([192, 0, 2, n], 443).into())
    }

    fn path(n: u8) -> Path {
        match n {
            0..200 => Path::Direct(addr(n)),
            _ => Path::Relayed(NodeId([n; 32])),
        }
    }

    fn secs(n: u64) -> Now {
        Now(Duration::from_secs(n))
    }

    /// A link that has a session along path 1 since `secs(0)`.
    fn through_one(told: &[u8]) -> Paths {
        let mut paths = Paths::default();
        let told: Vec<UnderlayAddr> = told.iter().copied().map(addr).collect();
        paths.tell(&told);
        paths.on_through(secs(0), path(1), false);
        paths
    }

    fn answer(paths: &mut Paths, now: Now, n: u8, after: u64) {
        paths.on_asked(now, path(n), 7);
        let then = now.plus(Duration::from_millis(after));
        assert!(paths.on_echo(then, path(n), 7));
    }

    #[test]
    fn as_long_as_it_answers_a_path_is_kept_whatever_was_seen_elsewhere() {
        let mut paths = through_one(&[1, 2]);
        assert!(paths.see(secs(1), path(9)));
        answer(&mut paths, secs(1), 9, 10);
        answer(&mut paths, secs(1), 1, 10);
        assert!(!paths.choose(secs(2), Mood::default()));
        assert_eq!(paths.current(), Some(path(1)));
    }

    #[test]
    fn one_that_does_not_answer_is_left_for_one_that_does_and_no_other() {
        let mut paths = through_one(&[1, 2]);
        let silent = Mood {
            silent: true,
            ..Mood::default()
        };
        assert!(!paths.choose(secs(9), silent), "nothing else has answered");
        answer(&mut paths, secs(9), 2, 10);
        assert!(paths.choose(secs(10), silent));
        assert_eq!(paths.current(), Some(path(2)));
    }

    #[test]
    fn an_echo_that_was_not_asked_for_there_proves_nothing() {
        let mut paths = through_one(&[1, 2]);
        paths.on_asked(secs(1), path(2), 7);
        assert!(!paths.on_echo(secs(1), path(2), 8));
        assert!(!paths.on_echo(secs(1), path(9), 7));
        assert!(!paths.on_echo(secs(1), path(1), 7));
        let gone = Mood {
            silent: true,
            ..Mood::default()
        };
        assert!(!paths.choose(secs(1), gone));
    }

    #[test]
    fn a_faster_path_is_taken_once_it_was_measured_thrice() {
        let mut paths = through_one(&[1, 2]);
        let busy = Mood {
            busy: true,
            ..Mood::default()
        };
        for n in 1..=3 {
            answer(&mut paths, secs(n), 1, 40);
            assert!(!paths.choose(secs(n), busy));
            answer(&mut paths, secs(n), 2, 20);
        }
        assert!(paths.choose(secs(4), busy));
        assert_eq!(paths.current(), Some(path(2)));
    }

    #[test]
    fn a_connection_is_thought_of_only_when_nothing_answers_by_udp() {
        let mut paths = through_one(&[1, 2]);
        paths.tell(&[addr(1), addr(2), tcp(1)]);
        let connection = Path::Direct(tcp(1));
        for (busy, silent) in [(false, false), (true, false), (true, true)] {
            let due = paths.due(secs(1), Mood { busy, silent });
            assert_eq!(due.contains(&connection), silent);
        }
        assert_eq!(paths.to_call().last(), Some(&connection));
        // It answers, and nothing else does.
        paths.on_asked(secs(9), connection, 7);
        paths.on_echo(secs(9), connection, 7);
        let silent = Mood {
            busy: true,
            silent: true,
        };
        assert!(paths.choose(secs(9), silent));
        assert_eq!(paths.current(), Some(connection));
        let busy = Mood {
            busy: true,
            silent: false,
        };
        assert!(paths.due(secs(60), busy).contains(&path(2)));
        answer(&mut paths, secs(60), 2, 10);
        assert!(paths.choose(secs(60), busy));
        assert_eq!(paths.current(), Some(path(2)));
    }

    #[test]
    fn a_connection_that_is_gone_proves_nothing_and_one_that_came_from_there_leads_nowhere() {
        let mut paths = through_one(&[1]);
        let (told, seen) = (Path::Direct(tcp(1)), Path::Direct(tcp(9)));
        paths.tell(&[addr(1), tcp(1)]);
        paths.see(secs(1), seen);
        for path in [told, seen] {
            paths.on_asked(secs(1), path, 7);
            paths.on_echo(secs(1), path, 7);
            assert!(!paths.lose_connection(secs(1), path));
        }
        let silent = Mood {
            busy: true,
            silent: true,
        };
        assert!(!paths.choose(secs(1), silent), "neither is good any more");
        assert_eq!(paths.to_call(), [path(1), told]);
        paths.take(told);
        assert!(paths.lose_connection(secs(1), told));
    }

    #[test]
    fn at_rest_nothing_is_asked_of_paths_that_are_no_better() {
        let mut paths = through_one(&[1, 2, 3]);
        (0..3).for_each(|_| answer(&mut paths, secs(0), 1, 10));
        let due = paths.due(secs(1), Mood::default());
        assert_eq!(due, [path(2), path(3)], "once, to know whether they work");
        for other in due {
            paths.on_asked(secs(1), other, 1);
        }
        assert_eq!(paths.due(secs(10_000), Mood::default()), []);
    }

    proptest! {
        #[test]
        fn whatever_comes_the_table_is_bounded_and_the_path_in_use_known(
            steps in proptest::collection::vec((0..7u8, any::<u8>()), 0..300)
        ) {
            let mut paths = through_one(&[1]);
            for (at, (step, n)) in steps.into_iter().enumerate() {
                let now = secs(at as u64);
                match step {
                    0 => drop(paths.see(now, path(n))),
                    1 => paths.tell(&[addr(n), addr(n.wrapping_add(1))]),
                    2 => paths.offer(&[NodeId([n; 32]), NodeId([7; 32])]),
                    3 => paths.on_through(now, path(n), n % 2 == 0),
                    4 => drop(paths.lose_relay(&NodeId([n; 32]))),
                    5 => drop(paths.choose(now, Mood { busy: true, silent: n % 2 == 0 })),
                    _ => {
                        paths.on_asked(now, path(n), 5);
                        paths.on_echo(now, path(n), 5);
                    }
                }
                let known = paths.list();
                prop_assert!(known.len() <= MAX_TOLD + MAX_SEEN + MAX_RELAYS + 2);
                prop_assert_eq!(known.iter().filter(|known| known.in_use).count(), 1);
                prop_assert_eq!(paths.to_call().len(), known.len());
            }
        }
    }
}
