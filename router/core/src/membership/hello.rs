//! Finding each other, and finding each other again: hellos to all who are known and no members, a digest on each
//! datagram, and lists of the living where the digests differ.

use std::time::Duration;

use foca::{Member, State};

use crate::model::{NodeId, Now};

use super::engine::Task;
use super::ident::Ident;
use super::wire::{Body, LIST, Standing};
use super::{Membership, MembershipEvent};

/// How often a node looks whom to greet.
const TICK: Duration = Duration::from_millis(200);
/// In the whole cluster each of the lost is greeted once in so many ticks: 0.8 s. With three nodes that is what the end of
/// a split waits for.
const TICKS_PER_HELLO: u64 = 4;
/// So long after its start a node that knows no member greets two at each tick.
pub(super) const EAGER: Duration = Duration::from_secs(3);
/// Hellos that something else than the tick causes, to one node.
pub(super) const HELLO_GAP: Duration = Duration::from_millis(200);
/// Lists that a differing digest causes, to one node: the first gap. It grows while they don't help.
pub(super) const LIST_GAP: Duration = Duration::from_millis(400);
/// The gap grows up to this.
const LIST_GAP_MAX: Duration = Duration::from_secs(5);
/// Above so many members lists to all together keep this distance too: when a large cluster starts or heals everybody
/// differs from everybody, and gossip does the most of it anyway.
const CROWD: usize = 16;
const CROWD_GAP: Duration = Duration::from_millis(50);
/// Lists that one node's questions cause.
const REPLY_GAP: Duration = Duration::from_millis(100);
/// Datagrams that one list may fill: 80 members. Larger clusters send another part each time.
const LIST_PARTS: usize = 4;
/// Members told of a farewell; the others hear of it from these.
pub(super) const FAREWELLS: usize = 64;

/// One member's part of the digest; the digest is the XOR of all. FNV-1a with a final mix: it guards against
/// accident, not malice, for the members are authenticated.
pub(super) fn digest_of(ident: &Ident) -> u64 {
    let numbers = [
        ident.life.generation.0.to_be_bytes(),
        ident.life.renewals.to_be_bytes(),
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in ident.id.0.iter().chain(numbers.as_flattened()) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 32;
    hash.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ (hash >> 29)
}

impl Membership {
    /// The tick: as many nodes as there are share the work.
    pub(super) fn greet_the_lost(&mut self, now: Now, out: &mut Vec<MembershipEvent>) {
        self.arm(now.plus(TICK), Task::Hello);
        // Whoever is seen is known.
        let lost = self.peers.len().saturating_sub(self.visible.len()) as u64;
        let company = self.visible.len() as u64 + 1;
        let eager = self.visible.is_empty() && now < self.eager_until;
        if lost == 0 || (!eager && self.random.range(TICKS_PER_HELLO * company) >= lost) {
            return;
        }
        let lost: Vec<NodeId> = self
            .peers
            .keys()
            .filter(|id| !self.visible.contains_key(id))
            .copied()
            .collect();
        let Some(first) = self.one_of(&lost) else {
            return;
        };
        self.greet(first, out);
        let second = if eager { self.one_of(&lost) } else { None };
        if let Some(second) = second.filter(|second| *second != first) {
            self.greet(second, out);
        }
    }

    fn one_of(&mut self, ids: &[NodeId]) -> Option<NodeId> {
        let index = self.random.range(ids.len() as u64) as usize;
        ids.get(index).copied()
    }

    fn greet(&mut self, id: NodeId, out: &mut Vec<MembershipEvent>) {
        let standing = self.standing_of(&id);
        self.send(id, Body::Hello(standing), out);
    }

    /// Greets `id` unless that was done a moment ago.
    pub(super) fn hello_if_due(&mut self, now: Now, id: NodeId, out: &mut Vec<MembershipEvent>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if now >= peer.next_hello {
            peer.next_hello = now.plus(HELLO_GAP);
            self.greet(id, out);
        }
    }

    /// Tells a node how it is held here.
    pub(super) fn answer(&mut self, to: NodeId, out: &mut Vec<MembershipEvent>) {
        let standing = self.standing_of(&to);
        self.send(to, Body::Answer(standing), out);
    }

    pub(super) fn take_hello(
        &mut self,
        now: Now,
        from: NodeId,
        standing: Standing,
        out: &mut Vec<MembershipEvent>,
    ) {
        self.take_standing(now, standing, out);
        self.answer(from, out);
    }

    pub(super) fn take_answer(
        &mut self,
        now: Now,
        from: NodeId,
        admitted: bool,
        standing: Standing,
        out: &mut Vec<MembershipEvent>,
    ) {
        if self.take_standing(now, standing, out) {
            self.greet(from, out);
        } else if !admitted {
            self.hello_if_due(now, from, out);
        }
    }

    /// Another says how it holds this node. Where that is no longer possible, a new name is due: was one taken?
    fn take_standing(
        &mut self,
        now: Now,
        standing: Standing,
        out: &mut Vec<MembershipEvent>,
    ) -> bool {
        let (life, lost) = match standing {
            Standing::Unknown => return false,
            Standing::Active(life) => (life, life > self.me.life),
            Standing::Down(life) => (life, life >= self.me.life),
            Standing::Contested(life) => (life, life == self.me.life),
        };
        // Another start than this one can't be outrun by renewing: the next start will be younger than either.
        lost && life.generation == self.me.life.generation && self.renew(now, life.renewals, out)
    }

    /// The other's digest, after all else in its datagram was taken.
    pub(super) fn compare(
        &mut self,
        now: Now,
        from: NodeId,
        digest: u64,
        out: &mut Vec<MembershipEvent>,
    ) {
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        if digest == self.digest {
            peer.list_gap = LIST_GAP;
        } else {
            self.offer_list(now, from, out);
        }
    }

    /// Sends the list of the living and asks for the other's, unless that was done a moment ago.
    pub(super) fn offer_list(&mut self, now: Now, to: NodeId, out: &mut Vec<MembershipEvent>) {
        let Some(peer) = self.peers.get_mut(&to) else {
            return;
        };
        let crowded = self.visible.len() > CROWD && now < self.next_list;
        if now < peer.next_list || crowded {
            return;
        }
        self.next_list = now.plus(CROWD_GAP);
        peer.next_list = now.plus(peer.list_gap);
        peer.list_gap = (peer.list_gap * 3 / 2).min(LIST_GAP_MAX);
        self.send_list(to, true, out);
    }

    fn send_list(&mut self, to: NodeId, want: bool, out: &mut Vec<MembershipEvent>) {
        let mut members: Vec<Member<Ident>> = self
            .members
            .values()
            .filter(|member| member.state() != State::Down && member.id().id != to)
            .cloned()
            .collect();
        if members.len() > LIST * LIST_PARTS {
            let start = self.random.range(members.len() as u64) as usize;
            members.rotate_left(start);
            members.truncate(LIST * LIST_PARTS);
        }
        if members.is_empty() {
            self.send(to, Body::List { want, members }, out);
            return;
        }
        for (index, part) in members.chunks(LIST).enumerate() {
            // One question is enough.
            let want = want && index == 0;
            self.send(
                to,
                Body::List {
                    want,
                    members: part.to_vec(),
                },
                out,
            );
        }
    }

    pub(super) fn take_list(
        &mut self,
        now: Now,
        source: Ident,
        want: bool,
        members: Vec<Member<Ident>>,
        out: &mut Vec<MembershipEvent>,
    ) {
        let dead_here: Vec<Member<Ident>> = match self.members.len() > self.visible.len() {
            true => members
                .iter()
                .filter(|member| member.state() != State::Down)
                .filter_map(|member| self.held(&member.id().id).filter(|h| h.id() == member.id()))
                .filter(|held| held.state() == State::Down)
                .cloned()
                .collect(),
            false => Vec::new(),
        };
        if !dead_here.is_empty() {
            self.send(
                source.id,
                Body::List {
                    want: false,
                    members: dead_here,
                },
                out,
            );
        }
        self.take_news(now, source, members, out);
        let Some(peer) = self.peers.get_mut(&source.id) else {
            return;
        };
        if want && now >= peer.next_reply {
            peer.next_reply = now.plus(REPLY_GAP);
            self.send_list(source.id, false, out);
        }
    }
}
