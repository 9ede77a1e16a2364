//! Who is alive: SWIM by foca, behind our own types and with what it lacks.
//!
//! Datagrams of this machine travel inside sealed sessions, so the sender is known and only news about third nodes can
//! be lies. What is added to foca, and where:
//!
//! - *Own verdict* (`checks`): foca's timer that turns a suspect into a dead node is never run. Suspects are asked
//!   directly, and the verdict falls only when one stayed silent throughout; any authenticated datagram of it is
//!   evidence of life. News that somebody is dead is believed after a check of our own, so a lying member can't hide a
//!   pair of live nodes from each other.
//! - *Hellos to the lost* (`hello`): every known node that is no member is greeted for ever, so partitions heal.
//! - *Digest and lists* (`hello`): each datagram carries a digest of who is alive; where it differs, lists are swapped.
//! - *Clean renewal* (`engine`): a node that was declared dead takes its next name with a fresh foca.
//! - *Only proven starts count*: news about a generation that neither a handshake nor a signed record has shown is
//!   dropped, and the node itself is asked.
//!
//! ```text
//!              hello or list says alive               silent through a check
//!   unknown -----------------------------> alive -------------------------------> down
//!                                           ^ |  hears "you are down": renews      |
//!                                           | +------------------------------------+
//!                                           +---- hello under a younger life ------+
//! ```
//!
//! INVARIANT: `members` is what foca holds, `visible` what of it is active; [`MembershipEvent::Up`] and
//! [`MembershipEvent::Down`] are exactly the changes of `visible`.

mod checks;
mod engine;
mod hello;
mod ident;
mod pace;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::time::Duration;

use foca::{Foca, Incarnation, Member, NoCustomBroadcast, State};

use crate::crypto::Random;
use crate::model::{Generation, NodeId, Now};
use crate::view::Liveness;

use self::checks::Check;
use self::engine::{Probe, Task};
use self::ident::{Ident, Life, Plain};
use self::pace::Pace;
use self::wire::{Body, Datagram, Standing};

pub use self::wire::MAX_DATAGRAM;
pub(crate) use self::wire::reencode;

type Engine = Foca<Ident, Plain, Random, NoCustomBroadcast>;

/// A rumour about a third node may be at most this many renewals ahead of what we know. A node's own word has no such
/// bound, so a liar can't push a name to where its owner couldn't follow.
const RENEWALS_AHEAD: u64 = 1024;
/// However many tell us that we are dead, a new name is taken no more than once in this time on average: each costs the
/// probes under way. A liar can make us change names so often, and no more than that.
const RENEWAL_GAP: Duration = Duration::from_secs(2);
/// So many may follow each other at once.
const RENEWAL_BURST: u32 = 4;
/// A timer of our own that is later than this means that we were paused, and that silence proves nothing.
const PAUSED: Duration = Duration::from_millis(300);
/// Questions caused by one datagram's news about unproven nodes.
const HELLOS_PER_DATAGRAM: usize = 8;

/// What the machine wants done, or has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipEvent {
    /// Send these bytes inside a session with `to`; one is made when there is none. At most [`MAX_DATAGRAM`] octets.
    Send {
        /// The peer.
        to: NodeId,
        /// What it is to get.
        bytes: Vec<u8>,
    },
    /// A node is alive, or came back under a new start without having been missed.
    Up {
        /// The node.
        id: NodeId,
        /// Its start.
        generation: Generation,
    },
    /// A node is gone: dead, left or removed.
    Down {
        /// The node.
        id: NodeId,
    },
}

/// Why a datagram or a piece of news was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// Its bytes mean nothing.
    Malformed,
    /// From a node that nobody admitted, or whose start nobody proved.
    Unproven,
    /// From another start than the proven one.
    Stale,
    /// Meant for a name of this node that it doesn't bear.
    Misaddressed,
    /// News about a node that is not known here.
    UnknownSubject,
    /// News about a start that nobody proved.
    UnprovenSubject,
    /// News about a name too far ahead.
    Implausible,
    /// foca refused it.
    Refused,
}

/// What is known about another node.
#[derive(Debug)]
struct Peer {
    /// The highest start that a handshake or a record signed by it has shown.
    proven: Option<Generation>,
    /// The last authenticated datagram.
    heard: Option<Now>,
    /// No unasked hello before this.
    next_hello: Now,
    /// No unasked list before this, and how long to wait after the next.
    next_list: Now,
    list_gap: Duration,
    /// No list in answer before this.
    next_reply: Now,
    check: Option<Check>,
}

impl Peer {
    fn new() -> Self {
        Self {
            proven: None,
            heard: None,
            next_hello: Now::default(),
            next_list: Now::default(),
            list_gap: hello::LIST_GAP,
            next_reply: Now::default(),
            check: None,
        }
    }
}

/// The membership of one node.
///
/// The caller feeds every datagram that waits before it calls [`Self::expire`] (otherwise the silence of a busy moment
/// looks like the silence of the dead) and calls that when [`Self::deadline`] has come, also when it came by handling a
/// datagram. It calls [`Self::heard`] for authenticated datagrams of other kinds, and tells by [`Self::on_proven`] which
/// start of a node is real before it hands in that start's datagrams.
pub struct Membership {
    me: Ident,
    /// foca's own, which it doesn't show.
    incarnation: Incarnation,
    foca: Engine,
    random: Random,
    pace: Pace,
    peers: BTreeMap<NodeId, Peer>,
    /// What foca holds, by id: it looks for a member one by one, and each datagram asks for some.
    members: BTreeMap<NodeId, Member<Ident>>,
    visible: BTreeMap<NodeId, Life>,
    digest: u64,
    timers: BTreeMap<(Now, u64), Task>,
    sequence: u64,
    probe: Option<Probe>,
    news_waits: bool,
    /// The leaky bucket of renewals: until when those taken are paid for.
    renewals_paid: Now,
    eager_until: Now,
    /// In a crowd no unasked list to anybody before this.
    next_list: Now,
    left: bool,
    drops: BTreeMap<DropReason, u64>,
}

impl Membership {
    /// A node alone with itself. Call [`Self::add_seed`] for all that are known, then [`Self::expire`] when
    /// [`Self::deadline`] says so.
    pub fn new(me: NodeId, generation: Generation, mut random: Random, now: Now) -> Self {
        let me = Ident {
            id: me,
            life: Life {
                generation,
                renewals: 0,
            },
        };
        let pace = Pace::default();
        let foca = Foca::new(me, pace.config(), random.fork(), Plain);
        let mut machine = Self {
            me,
            incarnation: 0,
            foca,
            random,
            pace,
            peers: BTreeMap::new(),
            members: BTreeMap::new(),
            visible: BTreeMap::new(),
            digest: hello::digest_of(&me),
            timers: BTreeMap::new(),
            sequence: 0,
            probe: None,
            news_waits: false,
            renewals_paid: now,
            eager_until: now.plus(hello::EAGER),
            next_list: now,
            left: false,
            drops: BTreeMap::new(),
        };
        machine.arm(now, Task::Hello);
        machine
    }

    /// A node of the roster or of an invitation: it is greeted for ever until it is a member.
    pub fn add_seed(&mut self, id: NodeId) {
        if id != self.me.id {
            self.peers.entry(id).or_insert_with(Peer::new);
        }
    }

    /// All nodes that are greeted or heard.
    pub fn known(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.peers.keys().copied()
    }

    /// A handshake with `id`, or a record signed by it, has shown this start of it. A lower one than known is ignored.
    pub fn on_proven(
        &mut self,
        now: Now,
        id: NodeId,
        generation: Generation,
        out: &mut Vec<MembershipEvent>,
    ) {
        if id == self.me.id || self.left {
            return;
        }
        let peer = self.peers.entry(id).or_insert_with(Peer::new);
        if peer.proven >= Some(generation) {
            return;
        }
        peer.proven = Some(generation);
        peer.next_hello = now;
        self.hello_if_due(now, id, out);
    }

    /// A node was revoked: it is gone at once, and nothing is heard of it any more.
    pub fn remove(&mut self, now: Now, id: NodeId, out: &mut Vec<MembershipEvent>) {
        self.peers.remove(&id);
        if let Some(held) = self.active(&id) {
            self.apply(
                now,
                vec![Member::new(*held.id(), held.incarnation(), State::Down)],
                out,
            );
        }
    }

    /// A datagram of membership came from `from` through its session.
    pub fn handle(&mut self, now: Now, from: NodeId, bytes: &[u8], out: &mut Vec<MembershipEvent>) {
        if self.left {
            return;
        }
        self.notice_pause(now, out);
        let Some(proven) = self.peers.get(&from).and_then(|peer| peer.proven) else {
            return self.dropped(DropReason::Unproven);
        };
        let Ok(datagram) = Datagram::decode(bytes) else {
            return self.dropped(DropReason::Malformed);
        };
        if datagram.life.generation != proven {
            return self.dropped(DropReason::Stale);
        }
        self.heard(now, from, out);
        self.take_datagram(now, from, datagram, out);
    }

    /// Any authenticated datagram came from `from`: evidence of life.
    pub fn heard(&mut self, now: Now, from: NodeId, out: &mut Vec<MembershipEvent>) {
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        peer.heard = Some(now);
        self.answer_probe(now, from, out);
        self.acquit(now, from, out);
    }

    /// Time passed. Harmless when called early, late or twice.
    pub fn expire(&mut self, now: Now, out: &mut Vec<MembershipEvent>) {
        self.notice_pause(now, out);
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let task = entry.remove();
            self.run(now, task, out);
        }
    }

    /// When to call [`Self::expire`] next.
    pub fn deadline(&self) -> Option<Now> {
        self.timers.keys().next().map(|(at, _)| *at)
    }

    /// Is `id` alive? This node itself is; a node never heard of is down.
    pub fn liveness(&self, id: &NodeId) -> Liveness {
        if self.visible.contains_key(id) || *id == self.me.id {
            Liveness::Alive
        } else {
            Liveness::Down
        }
    }

    /// The live members and their starts, without this node.
    pub fn alive(&self) -> impl Iterator<Item = (NodeId, Generation)> + '_ {
        self.visible.iter().map(|(id, life)| (*id, life.generation))
    }

    /// When an authenticated datagram last came from `id`.
    pub fn last_heard(&self, id: &NodeId) -> Option<Now> {
        self.peers.get(id).and_then(|peer| peer.heard)
    }

    /// What was dropped so far.
    pub fn drops(&self) -> &BTreeMap<DropReason, u64> {
        &self.drops
    }

    /// The round trip time, smoothed, of the farthest peers that count: all timers follow it.
    pub fn set_rtt(&mut self, now: Now, smoothed: Duration, out: &mut Vec<MembershipEvent>) {
        if self.left {
            return;
        }
        if let Some(pace) = self.pace.for_rtt(smoothed) {
            self.pace = pace;
            self.rebuild(now, out);
        }
    }

    /// Says farewell to the members. The machine is silent from then on.
    pub fn leave(&mut self, out: &mut Vec<MembershipEvent>) {
        if self.left {
            return;
        }
        let members: Vec<NodeId> = self
            .visible
            .keys()
            .take(hello::FAREWELLS)
            .copied()
            .collect();
        for id in members {
            self.send(id, Body::Leave, out);
        }
        self.left = true;
        self.timers.clear();
    }

    fn take_datagram(
        &mut self,
        now: Now,
        from: NodeId,
        datagram: Datagram,
        out: &mut Vec<MembershipEvent>,
    ) {
        let source = Ident {
            id: from,
            life: datagram.life,
        };
        if datagram.body == Body::Leave {
            return self.take_farewell(now, source, datagram.incarnation, out);
        }
        let admitted = self.admit(now, source, datagram.incarnation, out);
        match datagram.body {
            Body::Hello(standing) => self.take_hello(now, from, standing, out),
            Body::Answer(standing) => self.take_answer(now, from, admitted, standing, out),
            _ if !admitted => self.hello_if_due(now, from, out),
            Body::Gossip { to, .. } | Body::Check { to, .. } if to != self.me.life => {
                self.dropped(DropReason::Misaddressed);
                self.hello_if_due(now, from, out);
            }
            Body::Gossip {
                message, members, ..
            } => {
                self.take_news(now, source, members, out);
                self.take_message(now, source, datagram.incarnation, message, out);
            }
            Body::List { want, members } => self.take_list(now, source, want, members, out),
            Body::Check { incarnation, .. } => {
                self.refute(now, incarnation, out);
                self.answer(from, out);
            }
            Body::Leave => {}
        }
        if admitted {
            self.compare(now, from, datagram.digest, out);
        }
    }

    /// Takes the sender for a member, unless a younger life of it is known or this one was declared dead.
    fn admit(
        &mut self,
        now: Now,
        source: Ident,
        incarnation: Incarnation,
        out: &mut Vec<MembershipEvent>,
    ) -> bool {
        if let Some(held) = self.held(&source.id) {
            let known = held.id().life;
            if known > source.life || (known == source.life && held.state() == State::Down) {
                return false;
            }
            if known == source.life && incarnation <= held.incarnation() {
                return true;
            }
        }
        let stranger = !self.visible.contains_key(&source.id);
        self.apply(
            now,
            vec![Member::new(source, incarnation, State::Alive)],
            out,
        );
        if stranger {
            self.offer_list(now, source.id, out);
        }
        true
    }

    fn take_farewell(
        &mut self,
        now: Now,
        source: Ident,
        incarnation: Incarnation,
        out: &mut Vec<MembershipEvent>,
    ) {
        let current = self
            .active(&source.id)
            .is_some_and(|held| held.id().life <= source.life);
        if current {
            self.apply(
                now,
                vec![Member::new(source, incarnation, State::Down)],
                out,
            );
        }
    }

    /// News from a member about others, or about ourselves. What may be believed goes to foca.
    fn take_news(
        &mut self,
        now: Now,
        source: Ident,
        members: Vec<Member<Ident>>,
        out: &mut Vec<MembershipEvent>,
    ) {
        let mut believed = Vec::with_capacity(members.len());
        let mut hellos = HELLOS_PER_DATAGRAM;
        for member in members {
            if member.id().id == self.me.id {
                self.take_word_of_me(now, &member, out);
            } else if !self.is_news(&member) {
                // Lists hold hundreds of which all is known.
            } else if let Err(reason) = self.plausible(&member) {
                self.dropped(reason);
                if reason == DropReason::UnprovenSubject && hellos > 0 {
                    hellos -= 1;
                    self.hello_if_due(now, member.id().id, out);
                }
            } else if member.state() != State::Down || member.id().id == source.id {
                self.note_suspicion(now, &member);
                believed.push(member);
            } else {
                self.charge(now, &member, out);
            }
        }
        self.apply(now, believed, out);
    }

    fn plausible(&self, member: &Member<Ident>) -> Result<(), DropReason> {
        let subject = member.id();
        let peer = self
            .peers
            .get(&subject.id)
            .ok_or(DropReason::UnknownSubject)?;
        if peer.proven < Some(subject.life.generation) {
            return Err(DropReason::UnprovenSubject);
        }
        if peer.proven > Some(subject.life.generation) {
            return Err(DropReason::Stale);
        }
        let known = self.held(&subject.id).map(|held| held.id().life);
        let renewals = known
            .filter(|life| life.generation == subject.life.generation)
            .map_or(0, |life| life.renewals);
        if subject.life.renewals > renewals.saturating_add(RENEWALS_AHEAD) {
            return Err(DropReason::Implausible);
        }
        Ok(())
    }

    /// Somebody talks about this node itself.
    fn take_word_of_me(
        &mut self,
        now: Now,
        member: &Member<Ident>,
        out: &mut Vec<MembershipEvent>,
    ) {
        let life = member.id().life;
        if life == self.me.life {
            match member.state() {
                State::Alive => {}
                State::Suspect => self.refute(now, member.incarnation(), out),
                State::Down => {
                    self.renew(now, life.renewals, out);
                }
            }
        } else if life.generation == self.me.life.generation && life > self.me.life {
            self.renew(now, life.renewals, out);
        }
    }

    /// Is it anything else than what foca holds?
    fn is_news(&self, member: &Member<Ident>) -> bool {
        self.held(&member.id().id).is_none_or(|held| {
            held.id() != member.id()
                || (held.incarnation(), held.state()) != (member.incarnation(), member.state())
        })
    }

    /// What foca holds about `id`.
    fn held(&self, id: &NodeId) -> Option<&Member<Ident>> {
        self.members.get(id)
    }

    fn active(&self, id: &NodeId) -> Option<Member<Ident>> {
        self.held(id)
            .filter(|member| member.state() != State::Down)
            .cloned()
    }

    fn standing_of(&self, id: &NodeId) -> Standing {
        match self.held(id) {
            None => Standing::Unknown,
            Some(member) if member.state() == State::Down => Standing::Down(member.id().life),
            Some(member) => Standing::Active(member.id().life),
        }
    }

    fn dropped(&mut self, reason: DropReason) {
        *self.drops.entry(reason).or_default() += 1;
    }
}
