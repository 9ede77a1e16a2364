//! A handful of machines on one virtual wire of half a millisecond, and a liar among them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use foca::{Message, State};

use super::*;

const WIRE: Duration = Duration::from_micros(500);

struct Node {
    machine: Membership,
    generation: Generation,
    seen: BTreeMap<NodeId, Generation>,
    downs: usize,
}

struct Wire {
    now: Now,
    nodes: BTreeMap<NodeId, Node>,
    flying: VecDeque<(Now, NodeId, NodeId, Generation, Vec<u8>)>,
    cut: Vec<(NodeId, NodeId)>,
}

fn id(number: u8) -> NodeId {
    NodeId([number; 32])
}

impl Wire {
    fn of(count: u8) -> Self {
        let mut wire = Self {
            now: Now::default(),
            nodes: BTreeMap::new(),
            flying: VecDeque::new(),
            cut: Vec::new(),
        };
        (1..=count).for_each(|number| wire.start(number, count, Generation(100)));
        wire.run(5_000);
        (1..=count).for_each(|number| assert_eq!(wire.sees(number).len(), usize::from(count) - 1));
        wire
    }

    fn start(&mut self, number: u8, count: u8, generation: Generation) {
        let random = Random::from_seed([number; 32]);
        let mut machine = Membership::new(id(number), generation, random, self.now);
        (1..=count).for_each(|other| machine.add_seed(id(other)));
        let node = Node {
            machine,
            generation,
            seen: BTreeMap::new(),
            downs: 0,
        };
        self.nodes.insert(id(number), node);
    }

    fn sees(&self, number: u8) -> Vec<NodeId> {
        let node = &self.nodes[&id(number)];
        assert!(
            node.machine
                .alive()
                .eq(node.seen.iter().map(|(id, start)| (*id, *start)))
        );
        node.seen.keys().copied().collect()
    }

    fn with(
        &mut self,
        of: NodeId,
        call: impl FnOnce(&mut Membership, Now, &mut Vec<MembershipEvent>),
    ) {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&of) else {
            return;
        };
        let mut out = Vec::new();
        call(&mut node.machine, now, &mut out);
        for event in out {
            match event {
                MembershipEvent::Up { id, generation } => {
                    node.seen.insert(id, generation);
                }
                MembershipEvent::Down { id } => {
                    node.downs += 1;
                    assert!(node.seen.remove(&id).is_some());
                }
                MembershipEvent::Send { to, bytes } => {
                    assert!(bytes.len() <= MAX_DATAGRAM);
                    self.flying
                        .push_back((now.plus(WIRE), of, to, node.generation, bytes));
                }
            }
        }
    }

    fn run(&mut self, millis: u64) {
        let end = self.now.plus(Duration::from_millis(millis));
        loop {
            let timers = self
                .nodes
                .values()
                .filter_map(|node| node.machine.deadline());
            let next = timers
                .chain(self.flying.front().map(|flying| flying.0))
                .min();
            let Some(next) = next.filter(|next| *next <= end) else {
                break;
            };
            self.now = self.now.max(next);
            while self
                .flying
                .front()
                .is_some_and(|flying| flying.0 <= self.now)
            {
                let (_, from, to, generation, bytes) = self.flying.pop_front().unwrap();
                if !self.cut.contains(&(from, to)) {
                    self.with(to, |machine, now, out| {
                        machine.on_proven(now, from, generation, out);
                        machine.handle(now, from, &bytes, out);
                    });
                }
            }
            let all: Vec<NodeId> = self.nodes.keys().copied().collect();
            all.into_iter()
                .for_each(|id| self.with(id, |machine, now, out| machine.expire(now, out)));
        }
        self.now = end;
    }

    fn kill(&mut self, number: u8) {
        self.nodes.remove(&id(number));
    }

    fn life(&self, number: u8) -> Life {
        self.nodes[&id(number)].machine.me.life
    }

    /// `from` says to `to` what no honest node says.
    fn lie(&mut self, from: u8, to: u8, body: Body) {
        let (life, digest) = (self.life(from), self.nodes[&id(from)].machine.digest);
        let bytes = Datagram {
            digest,
            life,
            incarnation: 0,
            body,
        }
        .encode();
        self.with(id(to), |machine, now, out| {
            machine.handle(now, id(from), &bytes, out)
        });
    }

    fn gossip(&self, to: u8, members: Vec<Member<Ident>>) -> Body {
        Body::Gossip {
            to: self.life(to),
            message: Message::Gossip,
            members,
        }
    }

    fn drops(&self, number: u8, reason: DropReason) -> u64 {
        self.nodes[&id(number)]
            .machine
            .drops
            .get(&reason)
            .copied()
            .unwrap_or(0)
    }
}

fn member(number: u8, generation: u64, renewals: u64, state: State) -> Member<Ident> {
    let life = Life {
        generation: Generation(generation),
        renewals,
    };
    Member::new(
        Ident {
            id: id(number),
            life,
        },
        0,
        state,
    )
}

#[test]
fn a_dead_node_is_missed_by_all_and_seen_again_when_it_is_back() {
    let mut wire = Wire::of(4);
    wire.kill(4);
    wire.run(8_000);
    (1..4).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
    wire.start(4, 4, Generation(101));
    wire.run(3_000);
    (1..=4).for_each(|number| assert_eq!(wire.sees(number).len(), 3));
    assert_eq!(wire.nodes[&id(1)].seen[&id(4)], Generation(101));
}

#[test]
fn a_quick_restart_is_told_as_up_without_a_down() {
    let mut wire = Wire::of(3);
    wire.start(3, 3, Generation(200));
    wire.run(1_000);
    for number in [1, 2] {
        assert_eq!(wire.nodes[&id(number)].seen[&id(3)], Generation(200));
        assert_eq!(wire.nodes[&id(number)].downs, 0);
    }
}

#[test]
fn a_farewell_is_believed_at_once() {
    let mut wire = Wire::of(4);
    wire.with(id(4), |machine, _, out| machine.leave(out));
    wire.run(5);
    (1..4).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
    assert_eq!(wire.nodes[&id(4)].machine.deadline(), None);
    wire.run(20_000);
    (1..4).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
}

#[test]
fn a_revoked_node_is_gone_at_once_and_for_good() {
    let mut wire = Wire::of(3);
    wire.with(id(1), |machine, now, out| machine.remove(now, id(3), out));
    assert_eq!(wire.sees(1), vec![id(2)]);
    let bytes = {
        let life = wire.life(3);
        Datagram {
            digest: 0,
            life,
            incarnation: 9,
            body: Body::Hello(Standing::Unknown),
        }
        .encode()
    };
    wire.with(id(1), |machine, now, out| {
        machine.handle(now, id(3), &bytes, out)
    });
    assert_eq!(wire.sees(1), vec![id(2)]);
    assert_eq!(wire.drops(1, DropReason::Unproven), 1);
}

#[test]
fn a_member_that_calls_live_nodes_dead_parts_nobody() {
    let mut wire = Wire::of(4);
    for _ in 0..1_000 {
        for victim in [2, 3] {
            let life = wire.life(victim);
            let dead = member(victim, life.generation.0, life.renewals, State::Down);
            for to in [2, 3, 4] {
                let lie = wire.gossip(to, vec![dead.clone()]);
                wire.lie(1, to, lie);
            }
            let standing = Standing::Down(life);
            wire.lie(1, victim, Body::Hello(standing));
        }
        wire.run(10);
    }
    for number in [2, 3, 4] {
        assert_eq!(
            wire.nodes[&id(number)].downs,
            0,
            "node {number} lost somebody"
        );
        // Ten seconds: four at once, then one in two seconds.
        assert!(wire.life(number).renewals <= 10, "{:?}", wire.life(number));
    }
}

#[test]
fn under_constant_lies_a_real_death_is_still_noticed() {
    let mut wire = Wire::of(4);
    wire.kill(4);
    for _ in 0..1_500 {
        for victim in [2, 3] {
            let standing = Standing::Down(wire.life(victim));
            wire.lie(1, victim, Body::Hello(standing));
        }
        wire.run(10);
    }
    for number in [2, 3] {
        assert!(!wire.sees(number).contains(&id(4)));
    }
}

#[test]
fn a_start_that_nobody_proved_is_not_believed_but_asked_after() {
    let mut wire = Wire::of(3);
    let before = wire.drops(2, DropReason::UnprovenSubject);
    let lie = wire.gossip(
        2,
        vec![
            member(3, 999, 0, State::Down),
            member(3, 999, 0, State::Alive),
        ],
    );
    wire.lie(1, 2, lie);
    assert_eq!(wire.sees(2), vec![id(1), id(3)]);
    assert_eq!(wire.drops(2, DropReason::UnprovenSubject), before + 2);
    assert!(
        wire.flying
            .iter()
            .any(|(_, from, to, ..)| (*from, *to) == (id(2), id(3)))
    );
    let lie = wire.gossip(2, vec![member(9, 1, 0, State::Alive)]);
    wire.lie(1, 2, lie);
    assert_eq!(wire.drops(2, DropReason::UnknownSubject), 1);
}

#[test]
fn nobody_can_push_a_name_to_where_its_owner_cannot_follow() {
    let mut wire = Wire::of(3);
    for to in [2, 3] {
        let lie = wire.gossip(to, vec![member(3, 100, u64::MAX, State::Alive)]);
        wire.lie(1, to, lie);
        wire.lie(
            1,
            to,
            Body::Hello(Standing::Down(Life {
                generation: Generation(100),
                renewals: u64::MAX,
            })),
        );
    }
    assert!(wire.drops(2, DropReason::Implausible) > 0);
    wire.run(10_000);
    assert_eq!(wire.life(3).renewals, 0);
    assert_eq!((wire.nodes[&id(2)].downs, wire.nodes[&id(3)].downs), (0, 0));
}

#[test]
fn garbage_stale_starts_and_strangers_are_counted_drops() {
    let mut wire = Wire::of(2);
    wire.with(id(1), |machine, now, out| {
        machine.handle(now, id(2), b"garbage", out);
        machine.handle(now, id(2), &[], out);
        machine.handle(now, id(9), b"garbage", out);
    });
    assert_eq!(wire.drops(1, DropReason::Malformed), 2);
    assert_eq!(wire.drops(1, DropReason::Unproven), 1);
    let life = Life {
        generation: Generation(99),
        renewals: 7,
    };
    let old = Datagram {
        digest: 0,
        life,
        incarnation: 0,
        body: Body::Leave,
    }
    .encode();
    wire.with(id(1), |machine, now, out| {
        machine.handle(now, id(2), &old, out)
    });
    assert_eq!(wire.drops(1, DropReason::Stale), 1);
    assert_eq!(wire.sees(1), vec![id(2)]);
}

#[test]
fn halves_find_each_other_again() {
    let mut wire = Wire::of(5);
    let sides = |a: u8, b: u8| (a <= 2) != (b <= 2);
    for a in 1..=5 {
        wire.cut
            .extend((1..=5).filter(|b| sides(a, *b)).map(|b| (id(a), id(b))));
    }
    wire.run(30_000);
    assert_eq!((wire.sees(1).len(), wire.sees(5).len()), (1, 2));
    wire.cut.clear();
    wire.run(4_000);
    (1..=5).for_each(|number| assert_eq!(wire.sees(number).len(), 4, "node {number}"));
}

#[test]
fn two_that_cannot_hear_each_other_stay_members_through_a_third() {
    let mut wire = Wire::of(3);
    wire.cut = vec![(id(1), id(2)), (id(2), id(1))];
    wire.run(120_000);
    assert_eq!(wire.nodes.values().map(|node| node.downs).sum::<usize>(), 0);
}

#[test]
fn after_a_pause_of_our_own_nobody_is_blamed() {
    let mut wire = Wire::of(3);
    let mut asleep = wire.nodes.remove(&id(1)).unwrap();
    wire.run(2_000);
    asleep.downs = 0;
    wire.nodes.insert(id(1), asleep);
    wire.run(10_000);
    assert_eq!(wire.nodes[&id(1)].downs, 0);
    (1..=3).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
}

#[test]
fn a_longer_round_trip_slows_it_down_and_keeps_all_members() {
    let mut wire = Wire::of(3);
    for number in 1..=3 {
        wire.with(id(number), |machine, now, out| {
            machine.set_rtt(now, Duration::from_millis(320), out);
        });
    }
    wire.run(20_000);
    (1..=3).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
    assert_eq!(wire.nodes.values().map(|node| node.downs).sum::<usize>(), 0);
}

#[test]
fn other_authenticated_traffic_is_evidence_of_life() {
    let mut wire = Wire::of(2);
    // Node 2's membership falls silent, its tunnel doesn't.
    wire.cut = vec![(id(2), id(1))];
    for _ in 0..100 {
        wire.run(100);
        wire.with(id(1), |machine, now, out| machine.heard(now, id(2), out));
    }
    assert_eq!(wire.nodes[&id(1)].downs, 0);
}

#[test]
fn an_early_late_or_repeated_expire_is_harmless() {
    let mut wire = Wire::of(3);
    for _ in 0..500 {
        let all: Vec<NodeId> = wire.nodes.keys().copied().collect();
        for id in all {
            for _ in 0..2 {
                wire.with(id, |machine, now, out| machine.expire(now, out));
            }
        }
        wire.run(7);
    }
    (1..=3).for_each(|number| assert_eq!(wire.sees(number).len(), 2));
}
