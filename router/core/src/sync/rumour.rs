//! News that a push did not bring: for a moment after a change those who know it tell a few others how far the writer's log
//! goes now, and who lacks something asks for it. So the last node is reached within a few hundred milliseconds, lost
//! datagrams or not, at a cost that depends on what changed and on nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::frame::{Frame, MAX_NEWS, Want, What};
use super::{Stores, Sync, SyncEvent, send, send_wants};
use crate::model::{NodeId, Now};

/// Between two rounds.
const TICK: Duration = Duration::from_millis(80);
/// A change is told in so many rounds: together with the push all but one of some thousand nodes have it then.
const ROUNDS: u8 = 4;
/// To so many in each.
const LISTENERS: usize = 2;
/// What was asked for comes within this, or is asked for again.
const WANT_GAP: Duration = Duration::from_millis(100);
/// More records at once are no news but a log being caught up on.
pub(super) const NEWS: usize = 16;
/// So long after the last news digests are compared more often.
const LIVELY: Duration = Duration::from_secs(10);

/// Whose logs grew a moment ago.
#[derive(Debug, Default)]
pub(super) struct Rumours {
    /// How many rounds each writer is still told in.
    hot: BTreeMap<NodeId, u8>,
    next: Option<Now>,
    lively_until: Now,
    /// How far a log was asked for, and when.
    wanted: BTreeMap<NodeId, (u64, Now)>,
}

impl Rumours {
    pub(super) fn deadline(&self) -> Option<Now> {
        self.next
    }

    /// Was there any news lately?
    pub(super) fn is_lively(&self, now: Now) -> bool {
        now < self.lively_until
    }

    /// The logs of these writers grew.
    pub(super) fn note(&mut self, now: Now, writers: impl IntoIterator<Item = NodeId>) {
        for writer in writers {
            self.hot.insert(writer, ROUNDS);
            self.lively_until = now.plus(LIVELY);
            self.next.get_or_insert(now.plus(TICK));
        }
    }

    /// Whom to tell of in this round, if one is due.
    fn round(&mut self, now: Now) -> BTreeSet<NodeId> {
        if self.next.is_none_or(|next| next > now) {
            return BTreeSet::new();
        }
        let due = self.hot.keys().copied().collect();
        self.hot.retain(|_, rounds| {
            *rounds -= 1;
            *rounds > 0
        });
        self.next = (!self.hot.is_empty()).then(|| now.plus(TICK));
        self.wanted.retain(|_, (_, at)| now.since(*at) < WANT_GAP);
        due
    }

    /// Is this worth asking for, or was it a moment ago?
    fn ask(&mut self, now: Now, writer: NodeId, upto: u64) -> bool {
        let asked = self
            .wanted
            .get(&writer)
            .is_some_and(|(known, at)| *known >= upto && now.since(*at) < WANT_GAP);
        if !asked {
            self.wanted.insert(writer, (upto, now));
        }
        !asked
    }
}

impl Sync {
    /// Tells a few peers how far the logs go that grew.
    pub(super) fn spread(&mut self, now: Now, stores: &Stores<'_>, out: &mut Vec<SyncEvent>) {
        let due = self.rumours.round(now);
        if due.is_empty() {
            return;
        }
        let news: Vec<(NodeId, u64)> = due
            .into_iter()
            .map(|writer| (writer, stores.catalog.state_of(&writer).complete))
            .collect();
        let all = self.peers.keys().copied().collect();
        for peer in self.choose(all, LISTENERS) {
            let frames = news.chunks(MAX_NEWS);
            out.extend(frames.map(|part| send(peer, &Frame::News(part.to_vec()))));
        }
    }

    /// A peer tells how far logs go that grew: what is missing here is asked for.
    pub(super) fn handle_news(
        &mut self,
        now: Now,
        from: NodeId,
        news: Vec<(NodeId, u64)>,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let mut wants = Vec::new();
        for (writer, upto) in news {
            let complete = stores.catalog.state_of(&writer).complete;
            if upto > complete && self.rumours.ask(now, writer, upto) {
                wants.push(Want {
                    what: What::Log,
                    id: writer,
                    from: complete,
                });
            }
        }
        send_wants(from, &wants, out);
    }
}
