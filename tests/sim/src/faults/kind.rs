//! The kinds of faults, by name.

use std::fmt;
use std::str::FromStr;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Loss, duplicates and overtaking on all links.
    Weather,
    /// One direction of one link.
    OneWay,
    /// One link, while both ends see all others.
    Partial,
    /// Two halves: once, several times in a row, or for minutes.
    Partition,
    /// A crash at any write and, mostly, a restart: what was not synced is torn or lost.
    Crash,
    /// A host that stands still for 0.5 to 9 s.
    Pause,
    /// A host that comes back with an empty disk, as somebody else.
    Wipe,
    /// A host that comes back with the disk of some time ago.
    Restore,
    /// A host that dies and is removed.
    Remove,
    /// A host that dies and is removed by force, on two sides at once.
    Force,
    /// A host that lives and is removed, and comes back as somebody else.
    Evict,
    /// A wall clock that is set by up to ten minutes, and back.
    Clock,
    /// A host that runs twice for a minute: same disk, same key.
    Clone,
    /// A farewell and a return, as `weft down` and `weft up`.
    Leave,
    /// Hosts that join only while things go wrong, on either side of a split.
    Late,
    /// A node of a later version: kinds of records, frames and questions that nobody knows.
    Newer,
    /// A member that lies: others' addresses, others' space, stamps of next year, wrong sums.
    Liar,
    /// A member that signs two roster records under one number.
    Fork,
}

impl Kind {
    /// All of them, with what they are for people.
    pub const NAMES: [(Kind, &str, &str); 18] = [
        (
            Kind::Weather,
            "weather",
            "loss, duplicates, reordering on all links",
        ),
        (Kind::OneWay, "one-way", "one direction of one link"),
        (
            Kind::Partial,
            "partial",
            "one link, while both ends see all others",
        ),
        (
            Kind::Partition,
            "partition",
            "two halves: once, in a row, or for minutes",
        ),
        (
            Kind::Crash,
            "crash",
            "power lost at any write; mostly a restart",
        ),
        (
            Kind::Pause,
            "pause",
            "a host that stands still for 0.5 to 9 s",
        ),
        (
            Kind::Wipe,
            "wipe",
            "back with an empty disk, as somebody else",
        ),
        (
            Kind::Restore,
            "restore",
            "back with the disk of some time ago",
        ),
        (Kind::Remove, "remove", "dead for good, and removed"),
        (
            Kind::Force,
            "force",
            "dead for good, and removed by force, twice at once",
        ),
        (
            Kind::Evict,
            "evict",
            "removed alive; comes back as somebody else",
        ),
        (
            Kind::Clock,
            "clock",
            "a wall clock set by up to 10 min, and back",
        ),
        (
            Kind::Clone,
            "clone",
            "one disk and key on two hosts for a minute",
        ),
        (Kind::Leave, "leave", "a farewell and a return"),
        (Kind::Late, "late", "hosts that join while things go wrong"),
        (
            Kind::Newer,
            "newer",
            "a later version's records, frames, questions",
        ),
        (
            Kind::Liar,
            "liar",
            "a member that lies within what it may do",
        ),
        (
            Kind::Fork,
            "fork",
            "a member that forks its chain of the roster",
        ),
    ];

    /// All of them.
    pub const ALL: [Kind; 18] = {
        let mut all = [Kind::Weather; 18];
        let mut at = 0;
        while at < all.len() {
            all[at] = Kind::NAMES[at].0;
            at += 1;
        }
        all
    };

    /// Those that mean something to membership alone.
    pub const OF_MEMBERS: [Kind; 7] = [
        Kind::Weather,
        Kind::OneWay,
        Kind::Partial,
        Kind::Partition,
        Kind::Crash,
        Kind::Pause,
        Kind::Clock,
    ];

    /// One line for each, for `--help`.
    pub fn help() -> String {
        let lines = Kind::NAMES.map(|(_, name, what)| format!("  {name:<10} {what}"));
        lines.join("\n")
    }

    fn name(self) -> &'static str {
        let found = Kind::NAMES.iter().find(|(kind, _, _)| *kind == self);
        found.map_or("", |(_, name, _)| name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                let all = Kind::ALL.map(|kind| kind.to_string()).join(", ");
                format!("\"{text}\" is no kind of fault; there are {all}")
            })
    }
}
