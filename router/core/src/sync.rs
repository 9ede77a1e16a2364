//! Carries roster and catalog between nodes: what is new is pushed at once, told on for a moment (`rumour.rs`), and every
//! second, twice as often after news, each node compares roll-ups with one random peer and fetches what differs. Nothing
//! relies on the pushes alone.
//!
//! ```text
//! A                                B
//! digest ------------------------> equal: digest back, done
//!                                  different, more than a few writers:
//!   <------------------ roll-ups - (of the writers in 2 to 128 parts)
//! states of the parts that differ: and on from "sends"; or with few writers at once:
//!   <------- heads and states ---- (how far B knows each chain and each log)
//! sends what B lacks, wants what A lacks
//! ---- roster, deltas, wants ---->
//!   <---------- roster, deltas --- each burst ends with a digest: and again, until equal
//! ```
//!
//! A delta says from where up to where nothing is missing in it; one that does not join on to what is known moves
//! nothing but the records it holds. Where two logs are known equally far and yet differ (somebody lied about being
//! complete, or a clone wrote), all that counts in them is exchanged, at most every ten seconds.
//!
//! After a start this node is not [`Sync::ready`] to write before a peer showed how much of this node's own log it
//! knows: what a restored disk lost comes back first.

mod burst;
mod compare;
mod frame;
mod peer;
mod rumour;
mod take;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::catalog::Catalog;
use crate::crypto::Random;
use crate::hlc::MAX_AHEAD;
use crate::model::{NodeId, Now, WallMicros};
use crate::mutation::{self, Mutation};
use crate::record::Record;
use crate::roster::Roster;
use crate::store::Batch;

use burst::{next_burst, start_of};
use compare::Differs;
pub use frame::MAX_BODY;
pub(crate) use frame::reencode;
use frame::{Frame, Want, pack};
pub(crate) use peer::MAX_JOBS;
use peer::{Job, Peer};
use rumour::Rumours;

/// One random peer is asked so often when nothing changes,
const GOSSIP: Duration = Duration::from_secs(1);
/// and so often for a while after a change.
const GOSSIP_LIVELY: Duration = Duration::from_millis(500);
/// Queued bursts go on so often.
const PUMP: Duration = Duration::from_millis(50);
/// A node with peers that don't answer waits so long before it writes.
const OWN_LOG_WAIT: Duration = Duration::from_secs(30);
/// So long it waits for all of them, once one has answered.
const ALL_ANSWER_WAIT: Duration = Duration::from_secs(3);
/// Up to so many peers everybody is told news directly.
const SMALL: usize = 8;
const MAX_ALARMS: usize = 256;

/// An effect of the sync machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncEvent {
    /// Send this in a `Message::Sync`.
    Send {
        /// To whom.
        to: NodeId,
        /// At most [`MAX_BODY`] octets.
        bytes: Vec<u8>,
    },
    /// Write this.
    Persist(Batch),
    /// The catalog changed.
    Changed,
    /// The roster changed.
    RosterChanged {
        /// New members.
        admitted: Vec<NodeId>,
        /// Members that are no longer: drop their sessions at once.
        revoked: Vec<NodeId>,
    },
    /// Something a person must know.
    Alarm(String),
}

/// What the machine works on during one call.
pub struct Stores<'a> {
    /// The catalog.
    pub catalog: &'a mut Catalog,
    /// The roster.
    pub roster: &'a mut Roster,
    /// The wall clock.
    pub wall: WallMicros,
}

/// The sync machine of one node.
pub struct Sync {
    me: NodeId,
    random: Random,
    started: Now,
    peers: BTreeMap<NodeId, Peer>,
    /// Peers with jobs, and maybe some more.
    served: BTreeSet<NodeId>,
    gossip_at: Now,
    pump_at: Option<Now>,
    rumours: Rumours,
    /// Peers that have shown what they know of this node's own log.
    told: BTreeSet<NodeId>,
    agreed: Option<Now>,
    /// A peer knows this node's own log up to here, and so much of its chain of the roster.
    own_target: u64,
    own_chain: u32,
    own_is_known: bool,
    settled: BTreeMap<NodeId, u64>,
    alarmed: BTreeSet<String>,
    drops: BTreeMap<&'static str, u64>,
}

impl Sync {
    /// A machine without peers.
    pub fn new(me: NodeId, random: Random, now: Now) -> Self {
        Self {
            me,
            random,
            started: now,
            peers: BTreeMap::new(),
            served: BTreeSet::new(),
            gossip_at: now.plus(GOSSIP),
            pump_at: None,
            rumours: Rumours::default(),
            told: BTreeSet::new(),
            agreed: None,
            own_target: 0,
            own_chain: 0,
            own_is_known: false,
            settled: BTreeMap::new(),
            alarmed: BTreeSet::new(),
            drops: BTreeMap::new(),
        }
    }

    /// May this node write and allocate? When it is alone, when its peers have shown (and given back) what they know of
    /// this node's own log, or when nobody did for half a minute. All of them, or all that did so in the first seconds:
    /// the first one that answers may be the one that was cut off.
    pub fn ready(&self, now: Now, roster: &Roster) -> bool {
        if mutation::is_on(Mutation::IgnoreOwnLog) {
            return true;
        }
        let waited = now.since(self.started);
        let mut others = roster.members().filter(|m| m.id != self.me);
        let own_chain = roster.heads().get(&self.me).map_or(0, |head| head.length);
        let knows = self.own_is_known && own_chain >= self.own_chain && !self.told.is_empty();
        let heard = waited >= ALL_ANSWER_WAIT || others.all(|m| self.told.contains(&m.id));
        (knows && heard) || waited >= OWN_LOG_WAIT || roster.members().all(|m| m.id == self.me)
    }

    /// How far this node's clock is from the median of its peers', if that is more than a stamp may be ahead: then it
    /// should refuse to write cluster-wide objects.
    pub fn clock_error(&self) -> Option<Duration> {
        let mut ahead: Vec<i64> = self.peers.values().filter_map(|p| p.ahead).collect();
        ahead.sort_unstable();
        let median = Duration::from_micros(ahead.get(ahead.len() / 2)?.unsigned_abs());
        (median > MAX_AHEAD).then_some(median)
    }

    /// All members hold what the catalog held at this revision: for [`Catalog::collect`].
    pub fn settled(&self, catalog: &Catalog, roster: &Roster) -> u64 {
        let others = roster.members().filter(|m| m.id != self.me);
        others
            .map(|m| self.settled.get(&m.id).copied().unwrap_or(0))
            .min()
            .unwrap_or(catalog.revision())
    }

    /// When a peer last knew just what this node knew.
    pub fn agreed(&self) -> Option<Now> {
        self.agreed
    }

    /// What was dropped, by reason.
    pub fn drops(&self) -> &BTreeMap<&'static str, u64> {
        &self.drops
    }

    /// A peer can be reached.
    pub fn on_peer_up(
        &mut self,
        now: Now,
        peer: NodeId,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        if peer != self.me {
            self.peers.entry(peer).or_insert_with(|| Peer::new(now));
            out.push(send(peer, &digest(stores, Answer::Wanted)));
        }
    }

    /// A peer can't be reached any more.
    pub fn on_peer_down(&mut self, peer: &NodeId) {
        self.peers.remove(peer);
    }

    /// Records of ours that are on disk now: tells the peers.
    pub fn on_local(&mut self, now: Now, records: &[Record], out: &mut Vec<SyncEvent>) {
        self.rumours.note(now, records.iter().map(Record::writer));
        let to = self.choose_few(self.peers.keys().copied().collect());
        push_records(records.iter().map(Record::bytes), &to, Frame::Records, out);
    }

    /// A roster record that a member gave us outside of a sync frame.
    pub fn hear_roster(
        &mut self,
        from: NodeId,
        record: &[u8],
        stores: &mut Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        self.take_roster(from, &[record.to_vec()], stores, out);
    }

    /// A roster record of ours that is on disk now: tells all peers.
    pub fn on_roster(&mut self, record: &[u8], out: &mut Vec<SyncEvent>) {
        let all: Vec<NodeId> = self.peers.keys().copied().collect();
        push_records([record], &all, Frame::Roster, out);
    }

    /// A peer's `Message::Sync`.
    pub fn handle(
        &mut self,
        now: Now,
        from: NodeId,
        bytes: &[u8],
        stores: &mut Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let Some(frame) = Frame::decode(bytes) else {
            return self.drop_for("garbled");
        };
        let compares = matches!(frame, Frame::States(_) | Frame::Heads(_));
        if mutation::is_on(Mutation::NoAntiEntropy) && compares && self.own_is_known {
            return;
        }
        if from == self.me || !stores.roster.is_member(&from) {
            return self.drop_for("no member");
        }
        self.peers.entry(from).or_insert_with(|| Peer::new(now));
        match frame {
            Frame::Digest {
                roster,
                catalog,
                wall,
                answer,
            } => {
                let differs = Differs {
                    roster: roster != stores.roster.digest(),
                    catalog: catalog != stores.catalog.digest(),
                };
                self.note_clock(&from, wall, stores.wall);
                self.handle_digest(now, from, differs, answer, stores, out);
            }
            Frame::Heads(span) => self.handle_heads(now, from, &span, stores, out),
            Frame::States(span) => self.handle_states(now, from, &span, stores, out),
            Frame::Wants(wants) => self.handle_wants(now, from, wants),
            Frame::Roster(records) => self.take_roster(from, &records, stores, out),
            Frame::Delta {
                writer,
                from: start,
                upto,
                records,
            } => {
                let mut batch = Batch::new();
                let revision = stores.catalog.revision();
                let news = self.take_records(now, from, &records, stores, &mut batch, out);
                if let Some(news) = news {
                    batch.append(stores.catalog.extend(&writer, start, upto, stores.roster));
                    if (1..=rumour::NEWS).contains(&news.len()) {
                        self.rumours.note(now, [writer]);
                    }
                }
                self.finish(revision, batch, stores, out);
            }
            Frame::Records(records) => {
                let mut batch = Batch::new();
                let revision = stores.catalog.revision();
                let news = self.take_records(now, from, &records, stores, &mut batch, out);
                self.pass_on(now, from, &news.unwrap_or_default(), out);
                self.finish(revision, batch, stores, out);
            }
            Frame::News(news) => self.handle_news(now, from, news, stores, out),
            Frame::RollUps(theirs) => self.handle_roll_ups(from, &theirs, stores, out),
        }
        self.pump(now, stores, out);
    }

    /// Time passed.
    pub fn expire(&mut self, now: Now, stores: &Stores<'_>, out: &mut Vec<SyncEvent>) {
        if self.gossip_at <= now {
            let gap = match self.rumours.is_lively(now) {
                true => GOSSIP_LIVELY,
                false => GOSSIP,
            };
            self.gossip_at = now.plus(gap);
            let all = self.peers.keys().copied().collect();
            for peer in self.choose(all, 1) {
                out.push(send(peer, &digest(stores, Answer::Wanted)));
            }
        }
        self.spread(now, stores, out);
        if self.pump_at.is_some_and(|at| at <= now) {
            self.pump(now, stores, out);
        }
    }

    /// When to call [`Self::expire`].
    pub fn deadline(&self) -> Option<Now> {
        let others = [self.pump_at, self.rumours.deadline()];
        others.into_iter().flatten().chain([self.gossip_at]).min()
    }

    /// Peers that something is kept of.
    pub(crate) fn peers_known(&self) -> usize {
        self.peers.len()
    }

    /// Bursts that wait to go to peers.
    pub(crate) fn queued(&self) -> usize {
        self.peers.values().map(|peer| peer.jobs.len()).sum()
    }

    fn drop_for(&mut self, reason: &'static str) {
        *self.drops.entry(reason).or_default() += 1;
    }

    fn alarm(&mut self, text: String, out: &mut Vec<SyncEvent>) {
        if self.alarmed.len() < MAX_ALARMS && self.alarmed.insert(text.clone()) {
            out.push(SyncEvent::Alarm(text));
        }
    }

    /// So many that together with what they tell on everybody hears of it; in a small cluster all.
    fn choose_few(&mut self, all: Vec<NodeId>) -> Vec<NodeId> {
        let fan_out = match all.len() {
            few @ ..=SMALL => few,
            many => many.isqrt() + 2,
        };
        self.choose(all, fan_out)
    }

    fn choose(&mut self, mut from: Vec<NodeId>, count: usize) -> Vec<NodeId> {
        let mut chosen = Vec::new();
        while chosen.len() < count && !from.is_empty() {
            let at = self.random.range(from.len() as u64) as usize;
            chosen.push(from.swap_remove(at));
        }
        chosen
    }

    fn queue(&mut self, peer: &NodeId, job: Job) {
        if let Some(state) = self.peers.get_mut(peer) {
            state.queue(job);
            self.served.insert(*peer);
        }
    }

    /// Goes on with what is queued, as fast as each peer's pace allows.
    fn pump(&mut self, now: Now, stores: &Stores<'_>, out: &mut Vec<SyncEvent>) {
        self.served.retain(|id| {
            let Some(peer) = self.peers.get_mut(id) else {
                return false;
            };
            if peer.jobs.is_empty() {
                return false;
            }
            if !peer.bulk.has(now, peer.held_up) {
                return true;
            }
            peer.held_up = 0;
            while let Some(mut job) = peer.jobs.pop_front() {
                let Some(frame) = next_burst(&mut job, stores) else {
                    continue;
                };
                let bytes = frame.encode();
                if !peer.bulk.take(now, bytes.len() as u64) {
                    // The burst that could not go is made again once there is room for it.
                    peer.held_up = bytes.len() as u64;
                    peer.jobs.push_front(Job {
                        at: start_of(&frame, &job),
                        ..job
                    });
                    break;
                }
                out.push(SyncEvent::Send { to: *id, bytes });
                peer.jobs.push_front(job);
            }
            if peer.jobs.is_empty() {
                out.push(send(*id, &digest(stores, Answer::Wanted)));
            }
            !peer.jobs.is_empty()
        });
        self.pump_at = (!self.served.is_empty()).then(|| now.plus(PUMP));
    }
}

enum Answer {
    Wanted,
    None,
}

fn digest(stores: &Stores<'_>, answer: Answer) -> Frame {
    Frame::Digest {
        roster: stores.roster.digest(),
        catalog: stores.catalog.digest(),
        wall: stores.wall.0,
        answer: matches!(answer, Answer::Wanted),
    }
}

/// The body of a `Message::Sync` that carries one roster record.
pub(crate) fn roster_frame(record: &[u8]) -> Vec<u8> {
    Frame::Roster(vec![record.to_vec()]).encode()
}

fn send(to: NodeId, frame: &Frame) -> SyncEvent {
    SyncEvent::Send {
        to,
        bytes: frame.encode(),
    }
}

fn send_wants(to: NodeId, wants: &[Want], out: &mut Vec<SyncEvent>) {
    let frames = wants.chunks((MAX_BODY - 1) / 41);
    out.extend(frames.map(|chunk| send(to, &Frame::Wants(chunk.to_vec()))));
}

/// Sends records to several peers, several in a frame.
fn push_records<'a>(
    records: impl IntoIterator<Item = &'a [u8]>,
    to: &[NodeId],
    frame: impl Fn(Vec<Vec<u8>>) -> Frame,
    out: &mut Vec<SyncEvent>,
) {
    let records: Vec<&[u8]> = records.into_iter().collect();
    let mut rest = records.as_slice();
    while !rest.is_empty() {
        let packed = pack(rest.iter().copied(), 1);
        rest = &rest[packed.len().max(1)..];
        let bytes = frame(packed).encode();
        out.extend(to.iter().map(|to| SyncEvent::Send {
            to: *to,
            bytes: bytes.clone(),
        }));
    }
}

#[cfg(test)]
mod tests;
