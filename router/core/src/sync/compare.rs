//! Finding what differs: digests, then heads and states, then what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::frame::{Frame, MAX_ROLL_UPS, Span, Want, What, spans, spans_of};
use super::peer::{Differing, Job, MAX_JOBS};
use super::take::tell_forks;
use super::{Answer, Stores, Sync, SyncEvent, digest, send, send_wants};
use crate::catalog::{SHARED, WriterState};
use crate::model::{NodeId, Now, WallMicros};
use crate::roster::Head;

/// So many writers' states are told at once; with more only in the parts that differ.
const FEW: usize = 16;
/// Writers in such a part.
const PER_ROLL_UP: usize = 3;
/// Heads and states go to one peer at most so often.
const SUMMARY_GAP: Duration = Duration::from_millis(150);
/// Two logs that are known equally far and differ are exchanged whole when it lasts so long,
const WHOLE_AFTER: Duration = Duration::from_secs(2);
/// and not more often than so.
const WHOLE_GAP: Duration = Duration::from_secs(10);

impl Sync {
    pub(super) fn note_clock(&mut self, from: &NodeId, theirs: u64, ours: WallMicros) {
        if let Some(peer) = self.peers.get_mut(from) {
            let ahead = i128::from(theirs) - i128::from(ours.0);
            peer.ahead = Some(ahead.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64);
        }
    }

    pub(super) fn handle_digest(
        &mut self,
        now: Now,
        from: NodeId,
        differs: Differs,
        answer: bool,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        if !differs.catalog {
            self.told.insert(from);
            self.check_own_log(stores);
        }
        if !differs.roster && !differs.catalog {
            self.agreed = Some(now);
            self.settled.insert(from, stores.catalog.revision());
            if let Some(peer) = self.peers.get_mut(&from) {
                peer.differing.clear();
            }
            if answer {
                out.push(send(from, &digest(stores, Answer::None)));
            }
        } else {
            self.summarise(now, from, differs, stores, out);
        }
    }

    /// Tells a peer how far everything is known here.
    pub(super) fn summarise(
        &mut self,
        now: Now,
        to: NodeId,
        differs: Differs,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let Some(peer) = self.peers.get_mut(&to) else {
            return;
        };
        if peer
            .summary_at
            .is_some_and(|at| now.since(at) < SUMMARY_GAP)
        {
            return;
        }
        peer.summary_at = Some(now);
        if differs.roster {
            let heads: Vec<(NodeId, Head)> = stores.roster.heads().into_iter().collect();
            let frames = spans(&heads, 12).into_iter();
            out.extend(frames.map(|span| send(to, &Frame::Heads(span))));
            tell_forks(stores.roster, 0, &[to], out);
        }
        if !differs.catalog {
            return;
        }
        let writers = stores.catalog.writer_state().len();
        if writers > FEW {
            let parts = (writers / PER_ROLL_UP)
                .next_power_of_two()
                .clamp(2, MAX_ROLL_UPS);
            out.push(send(to, &Frame::RollUps(stores.catalog.roll_ups(parts))));
        } else {
            tell_states(to, first_id()..=last_id(), stores, out);
        }
    }

    /// A peer's roll-ups: tells how far the logs are known in those parts that differ.
    pub(super) fn handle_roll_ups(
        &mut self,
        from: NodeId,
        theirs: &[u64],
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let ours = stores.catalog.roll_ups(theirs.len());
        let mine = part_of(&self.me, ours.len());
        // This node's own log is in there: the peer knows no more of it than this node does.
        if ours[mine] == theirs[mine] {
            self.told.insert(from);
            self.check_own_log(stores);
        }
        let mut part = 0;
        while part < ours.len() {
            let begin = part;
            while part < ours.len() && ours[part] != theirs[part] {
                part += 1;
            }
            if part > begin {
                let ids = first_of(begin, ours.len())..=last_of(part - 1, ours.len());
                tell_states(from, ids, stores, out);
            }
            part += 1;
        }
    }

    pub(super) fn handle_heads(
        &mut self,
        now: Now,
        from: NodeId,
        span: &Span<Head>,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let ours = stores.roster.heads();
        if (span.first..=span.last).contains(&self.me) {
            let theirs = span.entries.iter().find(|(id, _)| *id == self.me);
            let length = theirs.map_or(0, |(_, head)| head.length);
            self.own_chain = self.own_chain.max(length);
        }
        let mut wants = Vec::new();
        for (id, ours, theirs) in join(span, &ours, Head { length: 0, hash: 0 }) {
            if ours == theirs {
                continue;
            }
            // What lasts is more than a tail that is missing: both must see where the chain forks.
            let lasts = self.lasts(now, &from, (What::Chain, id), (ours.hash, theirs.hash));
            let shorter = u64::from(ours.length.min(theirs.length));
            let start = if lasts { 0 } else { shorter };
            if ours.length > theirs.length || (lasts && ours.length > 0) {
                self.queue(
                    &from,
                    Job {
                        what: What::Chain,
                        id,
                        at: start,
                    },
                );
            }
            if theirs.length > ours.length {
                wants.push(Want {
                    what: What::Chain,
                    id,
                    from: start,
                });
            }
        }
        send_wants(from, &wants, out);
    }

    pub(super) fn handle_states(
        &mut self,
        now: Now,
        from: NodeId,
        span: &Span<WriterState>,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let ours = stores.catalog.writer_state();
        let mut wants = Vec::new();
        for (id, ours, theirs) in join(span, &ours, WriterState::default()) {
            if theirs.complete > ours.complete {
                wants.push(Want {
                    what: What::Log,
                    id,
                    from: ours.complete,
                });
            } else if ours.complete > theirs.complete {
                self.queue(
                    &from,
                    Job {
                        what: What::Log,
                        id,
                        at: theirs.complete,
                    },
                );
            } else if ours.sum != theirs.sum {
                self.handle_differing(now, &from, id, ours, theirs, &mut wants);
            }
        }
        if (span.first..=span.last).contains(&self.me) {
            let theirs = span.entries.iter().find(|(id, _)| *id == self.me);
            self.own_target = self.own_target.max(theirs.map_or(0, |(_, s)| s.complete));
            self.told.insert(from);
            self.check_own_log(stores);
        }
        send_wants(from, &wants, out);
    }

    /// A log is known equally far on both sides, and yet differs.
    pub(super) fn handle_differing(
        &mut self,
        now: Now,
        from: &NodeId,
        id: NodeId,
        ours: WriterState,
        theirs: WriterState,
        wants: &mut Vec<Want>,
    ) {
        if id != SHARED {
            // Records that came out of order lie beyond.
            self.queue(
                from,
                Job {
                    what: What::Log,
                    id,
                    at: ours.complete,
                },
            );
        }
        if self.lasts(now, from, (What::Log, id), (ours.sum, theirs.sum)) {
            self.queue(
                from,
                Job {
                    what: What::Whole,
                    id,
                    at: 0,
                },
            );
            wants.push(Want {
                what: What::Whole,
                id,
                from: 0,
            });
        }
    }

    /// Has this difference lasted, and is it time to exchange all of it?
    fn lasts(&mut self, now: Now, from: &NodeId, what: (What, NodeId), sums: (u64, u64)) -> bool {
        let Some(peer) = self.peers.get_mut(from) else {
            return false;
        };
        let seen = peer.differing.entry(what).or_insert(Differing {
            sums,
            since: now,
            asked: None,
        });
        if seen.sums != sums {
            (seen.sums, seen.since) = (sums, now);
        }
        let lasting = now.since(seen.since) >= WHOLE_AFTER;
        let due = lasting && seen.asked.is_none_or(|at| now.since(at) >= WHOLE_GAP);
        if due {
            seen.asked = Some(now);
        }
        due
    }

    pub(super) fn check_own_log(&mut self, stores: &Stores<'_>) {
        self.own_is_known = stores.catalog.state_of(&self.me).complete >= self.own_target;
    }

    pub(super) fn handle_wants(&mut self, now: Now, from: NodeId, wants: Vec<Want>) {
        for Want { what, id, from: at } in wants {
            let Some(peer) = self.peers.get_mut(&from) else {
                return;
            };
            if what == What::Whole {
                if peer
                    .whole_sent
                    .get(&id)
                    .is_some_and(|at| now.since(*at) < WHOLE_GAP)
                {
                    continue;
                }
                if peer.whole_sent.len() >= MAX_JOBS {
                    peer.whole_sent.retain(|_, at| now.since(*at) < WHOLE_GAP);
                    continue;
                }
                peer.whole_sent.insert(id, now);
            }
            self.queue(
                &from,
                Job {
                    what,
                    id,
                    at: if what == What::Whole { 0 } else { at },
                },
            );
        }
    }
}

/// Which of the two roll-ups is not the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Differs {
    pub(super) roster: bool,
    pub(super) catalog: bool,
}

fn tell_states(
    to: NodeId,
    ids: RangeInclusive<NodeId>,
    stores: &Stores<'_>,
    out: &mut Vec<SyncEvent>,
) {
    let states = stores.catalog.writer_state();
    let within: Vec<(NodeId, WriterState)> = states
        .range(ids.clone())
        .map(|(id, state)| (*id, *state))
        .collect();
    let frames = spans_of(ids, &within, 16).into_iter();
    out.extend(frames.map(|span| send(to, &Frame::States(span))));
}

fn first_id() -> NodeId {
    NodeId([0; 32])
}

fn last_id() -> NodeId {
    NodeId([0xff; 32])
}

fn part_of(id: &NodeId, parts: usize) -> usize {
    usize::from(id.0[0]) * parts / 256
}

/// The lowest id of a part.
fn first_of(part: usize, parts: usize) -> NodeId {
    let mut id = first_id();
    id.0[0] = u8::try_from(part * 256 / parts).unwrap_or(u8::MAX);
    id
}

/// The highest.
fn last_of(part: usize, parts: usize) -> NodeId {
    let mut id = last_id();
    id.0[0] = u8::try_from((part + 1) * 256 / parts - 1).unwrap_or(u8::MAX);
    id
}

/// All ids of the span that either side knows, with both sides' values.
fn join<T: Copy>(span: &Span<T>, ours: &BTreeMap<NodeId, T>, nothing: T) -> Vec<(NodeId, T, T)> {
    if span.first > span.last {
        return Vec::new();
    }
    let theirs: BTreeMap<NodeId, T> = span.entries.iter().copied().collect();
    let ids: BTreeSet<NodeId> = ours
        .range(span.first..=span.last)
        .chain(theirs.range(span.first..=span.last))
        .map(|(id, _)| *id)
        .collect();
    ids.into_iter()
        .map(|id| {
            let value = |of: &BTreeMap<NodeId, T>| of.get(&id).copied().unwrap_or(nothing);
            (id, value(ours), value(&theirs))
        })
        .collect()
}
