//! What goes wrong in a world, planned from its seed. Each fault draws from a generator of its own, so that one can be
//! left out and the others stay as they are.

mod kind;

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use weft_core::crypto::Random;
use weft_core::model::Now;

use crate::net::Weather;
pub use kind::Kind;

/// Faults of one plan: so many and up to so many more.
const FEWEST: u64 = 3;
const MORE: u64 = 6;
/// They begin within this.
const SPREAD_MILLIS: u64 = 30_000;
/// Two copies of one host run side by side for so long, and up to so much longer.
const CLONED: Duration = Duration::from_secs(60);
const CLONED_MORE_MILLIS: u64 = 30_000;
/// Nobody puts a disk back sooner than that: starts are counted by seconds, and a few may have come within one.
const PUT_BACK: Duration = Duration::from_secs(5);
/// A restart out of a backup gets so much peace to hear from others what it forgot.
const PEACE: Duration = Duration::from_secs(45);

/// Something that happens to a host or to the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It starts, if it is off.
    Boot(usize),
    /// It loses power.
    Crash(usize),
    /// It loses power right after it next hands something to its disk.
    CrashAtWrite(usize),
    /// It says farewell; a crash follows.
    Leave(usize),
    /// It loses power and its disk; what comes up there later is somebody else.
    Wipe(usize),
    /// A person elsewhere removes whoever it is now.
    Remove(usize),
    /// The same by force, and another person too.
    Force(usize),
    /// What is on its disk now is kept elsewhere.
    Backup(usize),
    /// It loses power, and its disk is again what was kept.
    Restore(usize),
    /// A copy of the first starts on the second, which is a host beyond the others.
    Clone(usize, usize),
    /// The copy ends for good, and the original starts anew.
    Unclone(usize, usize),
    /// Its wall clock is set by so many microseconds.
    Clock(usize, i64),
    /// It stands still; its sockets fill.
    Pause(usize),
    /// It goes on.
    Resume(usize),
    /// Nothing passes from the first to the second.
    Block(usize, usize),
    /// One block less.
    Unblock(usize, usize),
    /// New weather.
    Weather(Weather),
    /// It says what a later version might say.
    Newer(usize),
    /// It says what is not so.
    Lie(usize),
    /// It signs two roster records where there is room for one.
    Fork(usize),
}

impl Action {
    /// The host it happens to; 0 for the links.
    pub fn host(self) -> usize {
        match self {
            Action::Boot(host)
            | Action::Crash(host)
            | Action::CrashAtWrite(host)
            | Action::Leave(host)
            | Action::Wipe(host)
            | Action::Remove(host)
            | Action::Force(host)
            | Action::Backup(host)
            | Action::Restore(host)
            | Action::Clone(host, _)
            | Action::Unclone(host, _)
            | Action::Clock(host, _)
            | Action::Pause(host)
            | Action::Resume(host)
            | Action::Block(host, _)
            | Action::Unblock(host, _)
            | Action::Newer(host)
            | Action::Lie(host)
            | Action::Fork(host) => host,
            Action::Weather(_) => 0,
        }
    }
}

/// One thing that goes wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Its place in the plan, for `--without`.
    pub number: usize,
    /// What sort.
    pub kind: Kind,
    /// What happens when.
    pub actions: Vec<(Now, Action)>,
}

impl Fault {
    /// The host it begins with, unless nothing of it is left.
    fn host(&self) -> Option<usize> {
        self.actions.first().map(|(_, action)| action.host())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |now: Option<&(Now, Action)>| now.map_or(0.0, |(at, _)| at.0.as_secs_f64());
        write!(
            f,
            "{}: {} from {:.1} s to {:.1} s",
            self.number,
            self.kind,
            at(self.actions.first()),
            at(self.actions.last())
        )?;
        match self.actions.first() {
            Some((_, Action::Weather(weather))) => write!(f, ", {weather:?}"),
            Some((_, action)) if self.actions.len() <= 8 => write!(f, ", {action:?}"),
            _ => Ok(()),
        }
    }
}

/// A plan of faults.
#[derive(Debug, Default)]
pub struct Plan {
    /// The faults one by one.
    pub faults: Vec<Fault>,
    /// What happens when, of all faults.
    pub actions: Vec<(Now, Action)>,
    /// After this nothing goes wrong any more.
    pub end: Now,
    /// Hosts that stay off.
    pub dead: BTreeSet<usize>,
    /// Hosts that start only while things go wrong.
    pub late: BTreeSet<usize>,
    /// Hosts whose disks are lost, or that are.
    lost: BTreeSet<usize>,
}

impl Plan {
    /// Three to eight faults of the given kinds among `hosts` hosts, from `from` on. At least two hosts live.
    pub fn draw(hosts: usize, kinds: &[Kind], from: Now, random: &mut Random) -> Self {
        Self::draw_without(hosts, kinds, from, random, &BTreeSet::new())
    }

    /// The same, but for the faults with these numbers.
    pub fn draw_without(
        hosts: usize,
        kinds: &[Kind],
        from: Now,
        random: &mut Random,
        without: &BTreeSet<usize>,
    ) -> Self {
        let mut plan = Self {
            end: from,
            ..Self::default()
        };
        if kinds.is_empty() {
            return plan;
        }
        for number in 0..(FEWEST + random.range(MORE)) as usize {
            let mut random = random.fork();
            let mut kind = kinds[random.range(kinds.len() as u64) as usize];
            // It takes more than a minute of the world's time, which is better spent on three other worlds.
            if kind == Kind::Clone && kinds.len() > 3 && random.range(3) > 0 {
                kind = kinds[random.range(kinds.len() as u64) as usize];
            }
            let start = from.plus(Duration::from_millis(random.range(SPREAD_MILLIS)));
            let stop = start.plus(Duration::from_millis(200 + random.range(10_000)));
            if !without.contains(&number) {
                let actions = plan.actions_of(kind, hosts, (start, stop), &mut random);
                plan.faults.push(Fault {
                    number,
                    kind,
                    actions,
                });
            }
        }
        plan.settle(from, hosts);
        plan
    }

    /// Is there any fault of this kind?
    pub fn has(&self, kind: Kind) -> bool {
        self.faults
            .iter()
            .any(|fault| fault.kind == kind && !fault.actions.is_empty())
    }

    fn actions_of(
        &mut self,
        kind: Kind,
        hosts: usize,
        (start, stop): (Now, Now),
        random: &mut Random,
    ) -> Vec<(Now, Action)> {
        let one = random.range(hosts as u64) as usize;
        let other = (one + 1 + random.range(hosts as u64 - 1) as usize) % hosts;
        match kind {
            Kind::Weather => {
                let weather = Weather {
                    loss: random.range(300),
                    twice: random.range(100),
                    jitter: random.range(30_000),
                };
                vec![
                    (start, Action::Weather(weather)),
                    (stop, Action::Weather(Weather::default())),
                ]
            }
            Kind::OneWay => cut([(one, other)], start, stop),
            Kind::Partial => cut([(one, other), (other, one)], start, stop),
            Kind::Partition => split(hosts, start, stop, random),
            Kind::Crash => self.crash(one, hosts, start, stop, random),
            Kind::Pause => {
                let pause = Duration::from_millis(500 + random.range(8_500));
                vec![
                    (start, Action::Pause(one)),
                    (start.plus(pause), Action::Resume(one)),
                ]
            }
            Kind::Wipe if self.may_lose(one, hosts) => {
                vec![(start, Action::Wipe(one)), (stop, Action::Boot(one))]
            }
            Kind::Evict if self.may_lose(one, hosts) => vec![
                (start, Action::Remove(one)),
                (stop, Action::Wipe(one)),
                (stop, Action::Boot(one)),
            ],
            Kind::Remove if self.may_lose(one, hosts) => {
                self.dead.insert(one);
                vec![(start, Action::Crash(one)), (stop, Action::Remove(one))]
            }
            Kind::Force if self.may_lose(one, hosts) => {
                self.dead.insert(one);
                vec![(start, Action::Crash(one)), (stop, Action::Force(one))]
            }
            Kind::Wipe | Kind::Evict | Kind::Remove | Kind::Force => Vec::new(),
            Kind::Restore => vec![
                (start, Action::Backup(one)),
                (stop, Action::Restore(one)),
                (stop.plus(PUT_BACK), Action::Boot(one)),
            ],
            Kind::Clock => clock(one, start, stop, random),
            Kind::Clone => {
                let apart = CLONED + Duration::from_millis(random.range(CLONED_MORE_MILLIS));
                vec![
                    (start, Action::Clone(one, hosts)),
                    (start.plus(apart), Action::Unclone(one, hosts)),
                ]
            }
            Kind::Leave => vec![
                (start, Action::Leave(one)),
                (start.plus(Duration::from_millis(100)), Action::Crash(one)),
                (stop, Action::Boot(one)),
            ],
            // Two hosts must be there from the beginning.
            Kind::Late if one >= 2 => {
                self.late.insert(one);
                vec![(start, Action::Boot(one))]
            }
            Kind::Late => Vec::new(),
            Kind::Newer => often(one, start, stop, Action::Newer),
            Kind::Liar => often(one, start, stop, Action::Lie),
            Kind::Fork => vec![(start, Action::Fork(one))],
        }
    }

    /// Most hosts must keep what all know: where most are lost at once, nobody can agree on what becomes of them.
    fn may_lose(&mut self, host: usize, hosts: usize) -> bool {
        let may = self.lost.contains(&host) || (self.lost.len() + 1) * 2 < hosts;
        if may {
            self.lost.insert(host);
        }
        may
    }

    fn crash(
        &mut self,
        host: usize,
        hosts: usize,
        start: Now,
        stop: Now,
        random: &mut Random,
    ) -> Vec<(Now, Action)> {
        if random.range(4) == 0 && self.may_lose(host, hosts) {
            self.dead.insert(host);
        }
        let how = match random.range(2) {
            0 => Action::Crash(host),
            _ => Action::CrashAtWrite(host),
        };
        vec![(start, how), (stop, Action::Boot(host))]
    }

    /// What only the whole plan shows.
    fn settle(&mut self, from: Now, hosts: usize) {
        self.part_clones(hosts);
        self.one_restore();
        let calm = self.last_cut(from);
        for fault in &mut self.faults {
            if fault.kind == Kind::Restore && !fault.actions.is_empty() {
                // A node that comes out of a backup must hear from somebody what it gave away since: without a word from
                // anybody it goes on after half a minute, which is the one thing that nothing can help.
                let late = calm.since(fault.actions[1].0);
                fault.actions[1].0 = fault.actions[1].0.plus(late);
                fault.actions[2].0 = fault.actions[2].0.plus(late);
            }
        }
        // After its death nothing brings a host back.
        let dead = &self.dead;
        for fault in &mut self.faults {
            fault.actions.retain(|(_, action)| match action {
                Action::Boot(host) | Action::Unclone(host, _) | Action::Clone(host, _) => {
                    !dead.contains(host)
                }
                Action::Restore(host) | Action::Wipe(host) => !dead.contains(host),
                _ => true,
            });
        }
        self.late.retain(|host| !dead.contains(host));
        let all = self.faults.iter().flat_map(|fault| fault.actions.iter());
        self.actions = all.copied().collect();
        self.actions.sort_by_key(|(at, _)| *at);
        self.end = self.actions.iter().map(|(at, _)| *at).max().unwrap_or(from);
        if self.has(Kind::Restore) {
            self.end = self.end.max(calm.plus(PEACE));
        }
    }

    /// There is one host beyond the others, so one copy at a time; and what is copied is not wiped or turned back
    /// meanwhile: three things at once with one key are more than anybody promised.
    ///
    /// Somebody must go on who met the original: who came since may know the copy's address alone, and with the copy it
    /// is gone.
    fn part_clones(&mut self, hosts: usize) {
        let lasting: BTreeSet<usize> = (0..hosts)
            .filter(|host| !self.lost.contains(host) && !self.late.contains(host))
            .collect();
        let late = &self.late;
        let met = |host: usize| !late.contains(&host) && lasting.iter().any(|other| *other != host);
        let mut cloned = None;
        for fault in &mut self.faults {
            if fault.kind != Kind::Clone {
                continue;
            }
            if !fault.host().is_some_and(met) {
                fault.actions.clear();
            }
            match cloned {
                None => cloned = fault.host(),
                Some(_) => fault.actions.clear(),
            }
        }
        for fault in &mut self.faults {
            let ends_it = matches!(
                fault.kind,
                Kind::Wipe | Kind::Evict | Kind::Remove | Kind::Force | Kind::Restore | Kind::Leave
            );
            if ends_it && fault.host() == cloned {
                fault.actions.clear();
            }
        }
        if let Some(host) = cloned {
            // Of two copies others hear one: what the other knows of a log that was lost may not be heard.
            let restores = self.faults.iter_mut().filter(|f| f.kind == Kind::Restore);
            restores.for_each(|fault| fault.actions.clear());
            self.dead.remove(&host);
        }
    }

    /// Two that come out of backups at once may both have forgotten what one gave the other, and nobody else needs to
    /// know it.
    fn one_restore(&mut self) {
        let of_kind = |fault: &&mut Fault| fault.kind == Kind::Restore && !fault.actions.is_empty();
        let restores = self.faults.iter_mut().filter(of_kind);
        restores.skip(1).for_each(|fault| fault.actions.clear());
    }

    /// When the last link is whole again and the last clock right.
    fn last_cut(&self, from: Now) -> Now {
        let cuts = self.faults.iter().filter(|fault| {
            !matches!(
                fault.kind,
                Kind::Restore | Kind::Clone | Kind::Liar | Kind::Newer
            )
        });
        let ends = cuts.filter_map(|fault| fault.actions.last());
        ends.map(|(at, _)| *at).max().unwrap_or(from)
    }
}

fn cut(
    pairs: impl IntoIterator<Item = (usize, usize)>,
    start: Now,
    stop: Now,
) -> Vec<(Now, Action)> {
    let pairs: Vec<(usize, usize)> = pairs.into_iter().collect();
    let blocks = pairs.iter().map(|(a, b)| (start, Action::Block(*a, *b)));
    let unblocks = pairs.iter().map(|(a, b)| (stop, Action::Unblock(*a, *b)));
    blocks.chain(unblocks).collect()
}

/// Two halves: once, several times in a row, or for minutes.
fn split(hosts: usize, start: Now, stop: Now, random: &mut Random) -> Vec<(Now, Action)> {
    let halves: Vec<bool> = (0..hosts).map(|_| random.range(2) == 0).collect();
    let pairs = || {
        let all = (0..hosts).flat_map(|a| (0..hosts).map(move |b| (a, b)));
        all.filter(|(a, b)| halves[*a] != halves[*b])
            .collect::<Vec<_>>()
    };
    match random.range(24) {
        0 => {
            let long = Duration::from_millis(60_000 + random.range(120_000));
            cut(pairs(), start, start.plus(long))
        }
        1..=6 => {
            let mut actions = Vec::new();
            let mut at = start;
            for _ in 0..2 + random.range(4) {
                let stop = at.plus(Duration::from_millis(100 + random.range(5_000)));
                actions.extend(cut(pairs(), at, stop));
                at = stop.plus(Duration::from_millis(50 + random.range(3_000)));
            }
            actions
        }
        _ => cut(pairs(), start, stop),
    }
}

/// A clock that is minutes off, or that jumps away and back.
fn clock(host: usize, start: Now, stop: Now, random: &mut Random) -> Vec<(Now, Action)> {
    let most = [10_000, 90_000, 600_000][random.range(3) as usize];
    let millis = random.range(2 * most) as i64 - most as i64;
    let micros = millis * 1000;
    vec![
        (start, Action::Clock(host, micros)),
        (stop, Action::Clock(host, -micros)),
    ]
}

fn often(
    host: usize,
    start: Now,
    stop: Now,
    action: impl Fn(usize) -> Action,
) -> Vec<(Now, Action)> {
    let steps = stop.since(start).as_millis() / 500;
    (0..=steps as u64)
        .map(|step| (start.plus(Duration::from_millis(500 * step)), action(host)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u8, without: &[usize]) -> Plan {
        let mut random = Random::from_seed([seed; 32]);
        let without = without.iter().copied().collect();
        Plan::draw_without(6, &Kind::ALL, Now::default(), &mut random, &without)
    }

    #[test]
    fn a_fault_left_out_leaves_the_others_as_they_are() {
        for seed in 0..50 {
            let (all, less) = (draw(seed, &[]), draw(seed, &[1]));
            let kinds = |plan: &Plan| -> Vec<(usize, Kind)> {
                plan.faults.iter().map(|f| (f.number, f.kind)).collect()
            };
            let mut expected = kinds(&all);
            expected.retain(|(number, _)| *number != 1);
            assert_eq!(kinds(&less), expected);
        }
    }

    #[test]
    fn every_block_ends_and_two_hosts_live() {
        for seed in 0..200 {
            let plan = draw(seed, &[]);
            let count = |wanted: fn(&Action) -> bool| {
                plan.actions.iter().filter(|(_, a)| wanted(a)).count()
            };
            assert_eq!(
                count(|a| matches!(a, Action::Block(..))),
                count(|a| matches!(a, Action::Unblock(..)))
            );
            assert!(plan.dead.len() + 2 <= 6);
            assert!(plan.actions.iter().all(|(at, _)| *at <= plan.end));
        }
    }
}
