//! What never goes back: the number of a host's starts, and what a node holds of anybody's log.

use std::collections::BTreeMap;

use weft_core::model::{Generation, NodeId};

use super::Known;
use crate::promises::Ledger;
use crate::world::Key;

/// A record's place: of two under one key the higher one holds.
type Place = (Generation, u64);

/// What one start of a host holds of each log: the highest place.
pub(super) type Newest = BTreeMap<NodeId, Place>;

/// A start of a host: with which key and from which state of its disk, the how manieth, under which number.
pub(super) type Start = ((Key, u64), u64, Generation);

/// No two starts have one number: what was said in the later one would count as said in the earlier one.
pub(super) fn counts_on(
    host: usize,
    before: Option<Start>,
    (disk, boots, number): Start,
    lines: &mut Vec<String>,
) {
    let earlier = before.filter(|(of, other, _)| *of == disk && *other != boots);
    if earlier.is_some_and(|(_, _, last)| number <= last) {
        lines.push(format!(
            "{host} starts with the number {}, which is not above the last",
            number.0
        ));
    }
}

/// The newest record that a node holds of a member's log is only ever replaced by a newer one.
pub(super) fn keeps_the_newest(
    known: Known<'_>,
    ledger: &Ledger,
    newest: &mut Newest,
    lines: &mut Vec<String>,
) {
    let Known {
        host,
        catalog,
        roster,
        ..
    } = known;
    for writer in catalog.writers().copied() {
        // Of what a removed node said some is void, and of two copies either is heard.
        if !roster.is_member(&writer) || ledger.cloned.contains(&writer) {
            newest.remove(&writer);
            continue;
        }
        let before = newest.get(&writer).copied().unwrap_or_default();
        // A later start of a writer that lost its disk's end may count from lower down.
        let held = catalog
            .highest_after(&writer, before.1.saturating_sub(1))
            .filter(|held| *held >= before)
            .or_else(|| catalog.highest_after(&writer, 0))
            .unwrap_or_default();
        if held < before {
            lines.push(format!(
                "{host} held {writer}'s record {} and has only {} now",
                before.1, held.1
            ));
        }
        newest.insert(writer, held);
    }
}
