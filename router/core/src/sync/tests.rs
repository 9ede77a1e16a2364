use super::peer::{BULK_BURST, BULK_RATE};
use super::*;
use crate::catalog::tests::{NOON, catalog, endpoint, identity, label, later, roster, service};
use crate::model::{AddressPlan, Generation};
use crate::roster::Rights;
use crate::store::Stored;
use crate::value::Kind;
use proptest::prelude::*;

/// One node with its disk.
struct Node {
    n: u8,
    catalog: Catalog,
    roster: Roster,
    sync: Sync,
    stored: Stored,
    alarms: Vec<String>,
    revoked: Vec<NodeId>,
}

/// Nodes on a virtual network that loses, doubles and reorders.
struct World {
    nodes: Vec<Node>,
    random: Random,
    now: Now,
    wire: BTreeMap<(Now, u64), (NodeId, NodeId, Vec<u8>)>,
    sent: u64,
    octets: u64,
    loss: u64,
    /// Pairs that can't reach each other.
    cut: BTreeSet<(NodeId, NodeId)>,
}

fn node(n: u8, roster: &Roster, stored: Stored, now: Now) -> Node {
    let mut catalog = catalog(n, roster);
    catalog.restore(&stored, NOON);
    let sync = Sync::new(identity(n).id(), Random::from_seed([n; 32]), now);
    Node {
        n,
        catalog,
        roster: roster.clone(),
        sync,
        stored,
        alarms: Vec::new(),
        revoked: Vec::new(),
    }
}

impl World {
    fn new(count: u8, seed: u8, loss: u64) -> Self {
        let roster = roster(count);
        let nodes = (1..=count)
            .map(|n| node(n, &roster, Stored::default(), Now::default()))
            .collect();
        let mut world = Self {
            nodes,
            random: Random::from_seed([seed; 32]),
            now: Now::default(),
            wire: BTreeMap::new(),
            sent: 0,
            octets: 0,
            loss,
            cut: BTreeSet::new(),
        };
        for a in 0..count {
            world.up(a);
        }
        world
    }

    /// Node at index `a` meets all others.
    fn up(&mut self, a: u8) {
        let others: Vec<NodeId> = self.nodes.iter().map(|n| identity(n.n).id()).collect();
        for other in others {
            self.on(a, |node, now, out| {
                let stores = Stores {
                    catalog: &mut node.catalog,
                    roster: &mut node.roster,
                    wall: NOON,
                };
                node.sync.on_peer_up(now, other, &stores, out);
            });
        }
    }

    fn on(&mut self, at: u8, act: impl FnOnce(&mut Node, Now, &mut Vec<SyncEvent>)) {
        let mut out = Vec::new();
        let node = &mut self.nodes[usize::from(at)];
        act(node, self.now, &mut out);
        let me = identity(node.n).id();
        for event in out {
            match event {
                SyncEvent::Send { to, bytes } => {
                    assert!(bytes.len() <= MAX_BODY);
                    self.octets += bytes.len() as u64;
                    let copies = u64::from(self.random.range(100) >= self.loss)
                        + u64::from(self.random.range(100) < 5);
                    for _ in 0..copies {
                        let delay = Duration::from_micros(100 + self.random.range(20_000));
                        self.sent += 1;
                        self.wire
                            .insert((self.now.plus(delay), self.sent), (me, to, bytes.clone()));
                    }
                }
                SyncEvent::Persist(batch) => self.nodes[usize::from(at)].stored.apply(&batch),
                SyncEvent::RosterChanged { revoked, .. } => {
                    self.nodes[usize::from(at)].revoked.extend(revoked)
                }
                SyncEvent::Alarm(text) => self.nodes[usize::from(at)].alarms.push(text),
                SyncEvent::Changed => {}
            }
        }
    }

    fn write(
        &mut self,
        at: u8,
        act: impl FnOnce(&mut Catalog, &crate::identity::Identity) -> crate::catalog::Written,
    ) {
        self.on(at, |node, now, out| {
            let written = act(&mut node.catalog, &identity(node.n));
            node.stored.apply(&written.batch);
            node.sync.on_local(now, &written.records, out);
        });
    }

    fn put(&mut self, at: u8, object: &crate::value::Object) {
        self.write(at, |catalog, me| catalog.put(object, me, NOON).unwrap());
    }

    /// Lets time pass up to `seconds` from the start.
    fn run(&mut self, seconds: u64) {
        let end = Now(Duration::from_secs(seconds));
        loop {
            let timer = self
                .nodes
                .iter()
                .enumerate()
                .filter_map(|(i, n)| Some((n.sync.deadline()?, i)))
                .min();
            let packet = self.wire.keys().next().map(|(at, _)| *at);
            let next = packet
                .into_iter()
                .chain(timer.map(|(at, _)| at))
                .min()
                .unwrap_or(end);
            if next > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            if packet == Some(next) {
                self.deliver();
            } else if let Some((_, at)) = timer {
                self.on(at as u8, |node, now, out| {
                    let stores = Stores {
                        catalog: &mut node.catalog,
                        roster: &mut node.roster,
                        wall: NOON,
                    };
                    node.sync.expire(now, &stores, out);
                });
            }
        }
    }

    fn deliver(&mut self) {
        let Some((_, (from, to, bytes))) = self.wire.pop_first() else {
            return;
        };
        if self.cut.contains(&(from, to)) {
            return;
        }
        let Some(at) = self.nodes.iter().position(|n| identity(n.n).id() == to) else {
            return;
        };
        self.on(at as u8, |node, now, out| {
            let mut stores = Stores {
                catalog: &mut node.catalog,
                roster: &mut node.roster,
                wall: NOON,
            };
            node.sync.handle(now, from, &bytes, &mut stores, out);
        });
    }

    fn split(&mut self, a: u8, b: u8) {
        let (a, b) = (identity(a).id(), identity(b).id());
        self.cut.extend([(a, b), (b, a)]);
    }

    fn assert_whole(&self) {
        let first = &self.nodes[0];
        for node in &self.nodes {
            assert_eq!(
                node.catalog.writer_state(),
                first.catalog.writer_state(),
                "node {}",
                node.n
            );
            assert_eq!(node.catalog.digest(), first.catalog.digest());
            assert_eq!(node.roster.digest(), first.roster.digest());
            assert_eq!(node.catalog.services(NOON), first.catalog.services(NOON));
            assert_eq!(
                node.catalog.endpoints(&BTreeSet::new()),
                first.catalog.endpoints(&BTreeSet::new())
            );
            // What is on disk makes the same catalog.
            let mut again = catalog(node.n, &node.roster);
            again.restore(&node.stored, NOON);
            assert_eq!(again.digest(), first.catalog.digest());
        }
    }
}

#[test]
fn news_reach_everybody_at_once() {
    let mut world = World::new(3, 1, 0);
    world.run(1);
    world.put(0, &endpoint(1, 1));
    let now = world.now;
    while world.nodes[2]
        .catalog
        .endpoints(&BTreeSet::new())
        .is_empty()
    {
        world.deliver();
        assert!(world.wire.keys().next().is_some());
    }
    let first = world.wire.keys().next().map(|(at, _)| at.since(now));
    assert!(first < Some(Duration::from_millis(50)));
}

#[test]
fn all_agree_after_loss_doubling_and_reordering() {
    for seed in 0..20 {
        let mut world = World::new(4, seed, 30);
        for n in 1..=30u8 {
            let at = n % 4;
            world.put(at, &endpoint(at + 1, n));
            if n % 3 == 0 {
                world.put(at, &service(&format!("s{}", n % 5), n));
            }
            if n % 7 == 0 {
                world.write(at, |c, me| {
                    c.remove(Kind::SERVICE, format!("s{}", n % 5).as_bytes(), me, NOON)
                        .unwrap()
                });
            }
            world.run(u64::from(n) / 8);
        }
        world.run(15);
        world.assert_whole();
        assert!(
            world.nodes.iter().all(|n| n.alarms.is_empty()),
            "seed {seed}"
        );
    }
}

#[test]
fn halves_agree_after_a_split_and_a_chain_of_links_is_enough() {
    let mut world = World::new(3, 3, 10);
    world.split(1, 3);
    world.run(2);
    world.put(0, &service("web", 1));
    world.put(2, &service("web", 2));
    for n in 0..40 {
        world.put(2, &endpoint(3, n));
    }
    world.run(12);
    world.assert_whole();
    let lost = world.nodes[1].catalog.duplicates(NOON);
    assert_eq!(lost.len(), 1);
}

#[test]
fn a_large_catalog_comes_at_a_bounded_pace() {
    let mut world = World::new(2, 5, 0);
    world.split(1, 2);
    for n in 0..1000u16 {
        let crate::value::Object::Endpoint(mut e) = endpoint(1, 1) else {
            unreachable!()
        };
        e.id.0[6..].copy_from_slice(&n.to_be_bytes());
        world.put(0, &crate::value::Object::Endpoint(e));
    }
    world.run(1);
    world.cut.clear();
    world.octets = 0;
    world.run(2);
    assert!(
        world.octets < BULK_BURST + 2 * BULK_RATE,
        "{}",
        world.octets
    );
    world.run(20);
    world.assert_whole();
}

#[test]
fn a_restored_disk_gets_its_own_log_back_before_it_is_ready() {
    let mut world = World::new(3, 6, 10);
    world.run(1);
    assert!(
        world
            .nodes
            .iter()
            .all(|n| n.sync.ready(world.now, &n.roster))
    );
    world.put(0, &endpoint(1, 1));
    let backup = world.nodes[0].stored.clone();
    world.put(0, &endpoint(1, 2));
    world.put(0, &endpoint(1, 3));
    world.run(4);
    let roster = world.nodes[0].roster.clone();
    world.nodes[0] = node(1, &roster, backup, world.now);
    world.nodes[0].catalog = {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &roster.cluster()).unwrap();
        let mut catalog = Catalog::new(identity(1).id(), roster.cluster(), plan, Generation(2));
        catalog.restore(&world.nodes[0].stored, NOON);
        catalog
    };
    assert!(!world.nodes[0].sync.ready(world.now, &roster));
    world.up(0);
    while !world.nodes[0].sync.ready(world.now, &roster) {
        assert!(world.now < Now(Duration::from_secs(10)));
        let next = world.now.0.as_secs() + 1;
        world.run(next);
    }
    assert_eq!(world.nodes[0].catalog.last_sequence(&identity(1).id()), 3);
    world.put(0, &endpoint(1, 4));
    world.run(15);
    world.assert_whole();
    assert!(world.nodes.iter().all(|n| n.alarms.is_empty()));
    assert_eq!(world.nodes[2].catalog.endpoints(&BTreeSet::new()).len(), 4);
}

#[test]
fn one_without_answering_peers_waits_half_a_minute_and_one_alone_does_not() {
    let lonely = roster(1);
    let alone = node(1, &lonely, Stored::default(), Now::default());
    assert!(alone.sync.ready(Now::default(), &lonely));
    let many = roster(2);
    let waiting = node(1, &many, Stored::default(), Now::default());
    assert!(!waiting.sync.ready(Now(Duration::from_secs(29)), &many));
    assert!(waiting.sync.ready(Now(Duration::from_secs(30)), &many));
}

#[test]
fn a_revocation_is_heard_within_two_seconds_and_a_new_member_is_known() {
    let mut world = World::new(5, 7, 20);
    world.run(1);
    world.on(0, |node, _, out| {
        let subject = identity(9);
        let me = identity(1);
        let admitted = node
            .roster
            .admit(
                &me,
                subject.id(),
                subject.noise_public(),
                label("nine"),
                Rights::ALL,
            )
            .unwrap();
        let revoked = node.roster.revoke(&me, identity(2).id(), 0).unwrap();
        for issued in [admitted, revoked] {
            node.stored.apply(&issued.change.batch);
            node.sync.on_roster(&issued.bytes, out);
        }
    });
    world.run(3);
    for node in [
        &world.nodes[0],
        &world.nodes[2],
        &world.nodes[3],
        &world.nodes[4],
    ] {
        assert!(
            !node.roster.is_member(&identity(2).id()) && node.roster.is_member(&identity(9).id())
        );
    }
    assert_eq!(world.nodes[3].revoked, [identity(2).id()]);
    // The revoked one is not listened to any more.
    let before = world.nodes[2]
        .sync
        .drops()
        .get("no member")
        .copied()
        .unwrap_or(0);
    world.put(1, &endpoint(2, 1));
    world.run(5);
    assert!(world.nodes[2].sync.drops()["no member"] > before);
    assert!(
        world.nodes[2]
            .catalog
            .endpoints(&BTreeSet::new())
            .is_empty()
    );
}

#[test]
fn a_lie_about_being_complete_is_made_good() {
    let mut world = World::new(3, 8, 0);
    world.split(1, 2);
    world.split(2, 3);
    for n in 1..=5 {
        world.put(0, &endpoint(1, n));
    }
    world.run(2);
    // Node 2 gets the last record and is told that nothing was before it.
    let writer = identity(1).id();
    let last = world.nodes[0].catalog.records_after(&writer, 4);
    let lie = Frame::Delta {
        writer,
        from: 0,
        upto: u64::MAX,
        records: vec![last[0].bytes().to_vec()],
    };
    world.on(1, |node, now, out| {
        let mut stores = Stores {
            catalog: &mut node.catalog,
            roster: &mut node.roster,
            wall: NOON,
        };
        node.sync
            .handle(now, identity(3).id(), &lie.encode(), &mut stores, out);
    });
    assert_eq!(world.nodes[1].catalog.state_of(&writer).complete, 5);
    world.cut.clear();
    world.run(25);
    world.assert_whole();
}

#[test]
fn what_all_hold_is_known_to_be_settled() {
    let mut world = World::new(3, 9, 0);
    world.put(0, &endpoint(1, 1));
    world.run(10);
    let node = &world.nodes[0];
    assert_eq!(
        node.sync.settled(&node.catalog, &node.roster),
        node.catalog.revision()
    );
    world.split(1, 3);
    world.put(0, &endpoint(1, 2));
    world.run(11);
    let node = &world.nodes[0];
    assert!(node.sync.settled(&node.catalog, &node.roster) < node.catalog.revision());
}

#[test]
fn a_clock_far_from_the_peers_is_noticed() {
    let mut world = World::new(3, 10, 0);
    world.run(3);
    assert_eq!(world.nodes[0].sync.clock_error(), None);
    for peer in [2, 3] {
        world.on(0, |node, now, out| {
            let frame = Frame::Digest {
                roster: 0,
                catalog: 0,
                wall: later(3600).0,
                answer: false,
            };
            let mut stores = Stores {
                catalog: &mut node.catalog,
                roster: &mut node.roster,
                wall: NOON,
            };
            node.sync
                .handle(now, identity(peer).id(), &frame.encode(), &mut stores, out);
        });
    }
    assert_eq!(
        world.nodes[0].sync.clock_error(),
        Some(Duration::from_secs(3600))
    );
}

#[test]
fn at_rest_little_is_said() {
    let mut world = World::new(4, 11, 0);
    world.put(0, &endpoint(1, 1));
    world.run(10);
    world.octets = 0;
    world.run(20);
    // Two digests per half second and node.
    assert!(
        world.octets <= 4 * 10 * 2 * 2 * 26 + 1000,
        "{}",
        world.octets
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_frame_from_a_member_is_survived(
        kind in 0u8..9,
        bytes in proptest::collection::vec(any::<u8>(), 0..1100),
    ) {
        let mut world = World::new(2, 12, 0);
        world.put(0, &endpoint(1, 1));
        world.run(1);
        let frame = [&[kind], bytes.as_slice()].concat();
        world.on(0, |node, now, out| {
            let mut stores = Stores { catalog: &mut node.catalog, roster: &mut node.roster, wall: NOON };
            node.sync.handle(now, identity(2).id(), &frame, &mut stores, out);
        });
        world.run(6);
        world.assert_whole();
    }
}
