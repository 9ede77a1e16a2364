//! What goes wrong in a world, planned from its seed.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use weft_core::crypto::Random;
use weft_core::model::Now;

use crate::net::Weather;

/// Something that happens to a host or to the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It starts, if it is off.
    Boot(usize),
    /// It loses power.
    Crash(usize),
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
}

impl Action {
    /// The host it happens to; 0 for the links.
    pub fn host(self) -> usize {
        match self {
            Action::Boot(host) | Action::Crash(host) => host,
            Action::Pause(host) | Action::Resume(host) => host,
            Action::Block(from, _) | Action::Unblock(from, _) => from,
            Action::Weather(_) => 0,
        }
    }
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Loss, duplicates and overtaking on all links.
    Weather,
    /// One direction of one link.
    OneWay,
    /// Two halves.
    Partition,
    /// A crash and, mostly, a restart.
    Crash,
    /// A host that stands still.
    Pause,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 5] = [
        Kind::Weather,
        Kind::OneWay,
        Kind::Partition,
        Kind::Crash,
        Kind::Pause,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Weather => "weather",
            Kind::OneWay => "one-way",
            Kind::Partition => "partition",
            Kind::Crash => "crash",
            Kind::Pause => "pause",
        })
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.to_string() == text)
            .ok_or_else(|| {
                let all = Kind::ALL.map(|kind| kind.to_string()).join(", ");
                format!("\"{text}\" is no kind of fault; there are {all}")
            })
    }
}

/// A plan of faults.
pub struct Plan {
    /// What happens when.
    pub actions: Vec<(Now, Action)>,
    /// After this nothing goes wrong any more.
    pub end: Now,
    /// Hosts that stay off.
    pub dead: BTreeSet<usize>,
}

impl Plan {
    /// Three to eight faults of the given kinds among `hosts` hosts, within 40 s from `from`. At least two hosts live.
    pub fn draw(hosts: usize, kinds: &[Kind], from: Now, random: &mut Random) -> Self {
        let mut plan = Self {
            actions: Vec::new(),
            end: from,
            dead: BTreeSet::new(),
        };
        if kinds.is_empty() {
            return plan;
        }
        for _ in 0..3 + random.range(6) {
            let kind = kinds[random.range(kinds.len() as u64) as usize];
            let start = from.plus(Duration::from_millis(random.range(30_000)));
            let stop = start.plus(Duration::from_millis(200 + random.range(10_000)));
            plan.add(kind, hosts, start, stop, random);
        }
        plan.end = plan.actions.iter().map(|(at, _)| *at).max().unwrap_or(from);
        plan
    }

    fn add(&mut self, kind: Kind, hosts: usize, start: Now, stop: Now, random: &mut Random) {
        let one = random.range(hosts as u64) as usize;
        let other = (one + 1 + random.range(hosts as u64 - 1) as usize) % hosts;
        match kind {
            Kind::Weather => {
                let weather = Weather {
                    loss: random.range(300),
                    twice: random.range(100),
                    jitter: random.range(30_000),
                };
                self.actions.push((start, Action::Weather(weather)));
                self.actions
                    .push((stop, Action::Weather(Weather::default())));
            }
            Kind::OneWay => self.block([(one, other)], start, stop),
            Kind::Partition => {
                let halves: Vec<bool> = (0..hosts).map(|_| random.range(2) == 0).collect();
                let pairs = (0..hosts).flat_map(|a| (0..hosts).map(move |b| (a, b)));
                self.block(pairs.filter(|(a, b)| halves[*a] != halves[*b]), start, stop);
            }
            Kind::Crash => {
                self.actions.push((start, Action::Crash(one)));
                let stays_dead = random.range(4) == 0 && self.dead.len() + 2 < hosts;
                if stays_dead || self.dead.contains(&one) {
                    self.bury(one);
                } else {
                    self.actions.push((stop, Action::Boot(one)));
                }
            }
            Kind::Pause => {
                self.actions.push((start, Action::Pause(one)));
                self.actions.push((stop, Action::Resume(one)));
            }
        }
    }

    /// `host` stays off after its first crash.
    fn bury(&mut self, host: usize) {
        self.dead.insert(host);
        self.actions
            .retain(|(_, action)| *action != Action::Boot(host));
    }

    fn block(&mut self, pairs: impl IntoIterator<Item = (usize, usize)>, start: Now, stop: Now) {
        for (from, to) in pairs {
            self.actions.push((start, Action::Block(from, to)));
            self.actions.push((stop, Action::Unblock(from, to)));
        }
    }
}
