//! Membership alone in the world: each datagram stands for one that a session carried, so it names its sender and the
//! sender's start, as a handshake would have shown them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use weft_core::membership::{Membership, MembershipEvent};
use weft_core::model::{Generation, NodeId, Now};

use crate::faults::{Action, Kind, Plan};
use crate::net::{address_of, host_of};
use crate::world::{Boot, Effects, Machine, World};

/// After the last fault all must see all as they are within this.
pub const WHOLE_WITHIN: Duration = Duration::from_secs(15);
/// And it must stay so for this.
const STAYS_WHOLE: Duration = Duration::from_secs(10);
/// A dead host must be down everywhere within this, while nothing else goes wrong.
const DEATH_WITHIN: Duration = Duration::from_secs(12);

/// The node on host `n`.
pub fn node_of(host: usize) -> NodeId {
    let mut id = [0; 32];
    id[30..].copy_from_slice(&u16::try_from(host + 1).unwrap_or(u16::MAX).to_be_bytes());
    id[0] = 0xe5;
    NodeId(id)
}

fn host_with(id: &NodeId) -> usize {
    usize::from(u16::from_be_bytes([id.0[30], id.0[31]])).saturating_sub(1)
}

/// One node with nothing but membership.
pub struct Gossiper {
    generation: Generation,
    sessions: BTreeMap<usize, Generation>,
    membership: Membership,
    /// What its events add up to.
    told: BTreeMap<NodeId, Generation>,
    /// Whom it took for dead.
    downs: Vec<usize>,
}

impl Gossiper {
    fn boot(boot: Boot<'_, ()>, hosts: usize) -> Self {
        let generation = Generation(boot.wall.0 / 1_000_000 + boot.boots);
        let me = node_of(boot.host);
        let mut membership = Membership::new(me, generation, boot.random, boot.now);
        (0..hosts).for_each(|host| membership.add_seed(node_of(host)));
        Self {
            generation,
            sessions: BTreeMap::new(),
            membership,
            told: BTreeMap::new(),
            downs: Vec::new(),
        }
    }

    /// This start of it.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whom it sees alive, and under which start.
    pub fn sees(&self) -> &BTreeMap<NodeId, Generation> {
        &self.told
    }

    /// Whom it took for dead since the last call.
    pub fn take_downs(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.downs)
    }

    fn carry_out(&mut self, events: Vec<MembershipEvent>, fx: &mut Effects<()>) {
        for event in events {
            match event {
                MembershipEvent::Send { to, bytes } => {
                    let mut sealed = self.generation.0.to_be_bytes().to_vec();
                    sealed.extend(bytes);
                    fx.sends.push((address_of(host_with(&to)), sealed));
                }
                MembershipEvent::Up { id, generation } => {
                    fx.notes
                        .push(format!("up {} start {}", host_with(&id), generation.0));
                    self.told.insert(id, generation);
                }
                MembershipEvent::Down { id } => {
                    fx.notes.push(format!("down {}", host_with(&id)));
                    self.told.remove(&id);
                    self.downs.push(host_with(&id));
                }
            }
        }
    }

    /// What the sessions would have measured.
    pub fn set_rtt(&mut self, now: Now, rtt: Duration, fx: &mut Effects<()>) {
        let mut out = Vec::new();
        self.membership.set_rtt(now, rtt, &mut out);
        self.carry_out(out, fx);
    }
}

impl Machine for Gossiper {
    type Batch = ();

    fn deliver(&mut self, now: Now, from: SocketAddr, bytes: &mut [u8], fx: &mut Effects<()>) {
        let bytes = &*bytes;
        let (Some(host), Some((start, bytes))) = (host_of(from), bytes.split_first_chunk()) else {
            return;
        };
        let start = Generation(u64::from_be_bytes(*start));
        let known = self.sessions.entry(host).or_insert(start);
        if *known > start {
            // That session ended when the next began.
            return;
        }
        *known = start;
        let mut out = Vec::new();
        self.membership
            .on_proven(now, node_of(host), start, &mut out);
        self.membership.handle(now, node_of(host), bytes, &mut out);
        self.carry_out(out, fx);
    }

    fn persisted(&mut self, _: Now, _: u64, _: &mut Effects<()>) {}

    fn expire(&mut self, now: Now, fx: &mut Effects<()>) {
        let mut out = Vec::new();
        self.membership.expire(now, &mut out);
        self.carry_out(out, fx);
    }

    fn deadline(&self) -> Option<Now> {
        self.membership.deadline()
    }
}

/// A world of nodes with nothing but membership, all off.
pub fn world(seed: u64, hosts: usize, keep_trace: bool) -> World<Gossiper> {
    World::new(
        seed,
        hosts,
        keep_trace,
        Box::new(move |boot| Gossiper::boot(boot, hosts)),
    )
}

/// How one seed ended.
pub struct Verdict {
    /// What was promised and not kept, one line each.
    pub violations: Vec<String>,
    /// From the last fault until all saw all as they are.
    pub whole_after: Option<Duration>,
    /// A hash over everything that happened.
    pub fingerprint: u64,
    /// Everything that happened, when it was to be kept.
    pub trace: String,
}

/// Runs one seed: all start within a second, things go wrong, nothing goes wrong any more, one host dies.
pub fn run(seed: u64, hosts: usize, kinds: &[Kind], keep_trace: bool) -> Verdict {
    let mut world = world(seed, hosts, keep_trace);
    start_all(&mut world);
    let mut random = world.random().fork();
    let kinds: Vec<Kind> = kinds
        .iter()
        .copied()
        .filter(|kind| Kind::OF_MEMBERS.contains(kind))
        .collect();
    let plan = Plan::draw(hosts, &kinds, Now(Duration::from_secs(5)), &mut random);
    for (at, action) in &plan.actions {
        world.schedule(*at, *action);
    }
    let mut violations = Vec::new();
    world.run_until(Now(Duration::from_secs(5)).min(plan.end));
    violations.extend(
        differences(&world)
            .into_iter()
            .map(|line| format!("after start: {line}")),
    );
    world.run_until(plan.end);
    let whole_after = run_until_whole(&mut world, WHOLE_WITHIN);
    if whole_after.is_none() {
        violations.extend(differences(&world));
    }
    world.run_for(STAYS_WHOLE);
    violations.extend(
        differences(&world)
            .into_iter()
            .map(|line| format!("later: {line}")),
    );
    violations.extend(die(&mut world, &mut random));
    Verdict {
        violations,
        whole_after,
        fingerprint: world.fingerprint,
        trace: world.trace().to_owned(),
    }
}

/// All start within a second.
pub fn start_all(world: &mut World<Gossiper>) {
    for host in 0..world.hosts.len() {
        let at = Now(Duration::from_micros(world.random().range(1_000_000)));
        world.schedule(at, Action::Boot(host));
    }
}

/// One more host dies when all is well: nobody may miss it, and nobody else may be missed.
fn die(world: &mut World<Gossiper>, random: &mut weft_core::crypto::Random) -> Vec<String> {
    let running: Vec<usize> = world.running().map(|(host, _)| host).collect();
    let victim = running[random.range(running.len() as u64) as usize];
    world.schedule(world.now, Action::Crash(victim));
    world.run_for(DEATH_WITHIN);
    differences(world)
        .into_iter()
        .map(|line| format!("after a death: {line}"))
        .collect()
}

/// Lets time pass until all see all as they are; how long that took, unless it took longer than `limit`.
pub fn run_until_whole(world: &mut World<Gossiper>, limit: Duration) -> Option<Duration> {
    let start = world.now;
    loop {
        if differences(world).is_empty() {
            return Some(world.now.since(start));
        }
        if world.now.since(start) >= limit {
            return None;
        }
        world.run_for(Duration::from_millis(10));
    }
}

/// Where a view and the truth differ.
pub fn differences(world: &World<Gossiper>) -> Vec<String> {
    let truth: BTreeMap<NodeId, Generation> = world
        .running()
        .map(|(host, node)| (node_of(host), node.generation))
        .collect();
    let mut lines = Vec::new();
    for (host, node) in world.running() {
        let seen: BTreeMap<NodeId, Generation> = node.membership.alive().collect();
        if seen != node.told {
            lines.push(format!("{host}'s events don't add up to what it sees"));
        }
        for other in (0..world.hosts.len()).filter(|other| *other != host) {
            let (seen, true_start) = (seen.get(&node_of(other)), truth.get(&node_of(other)));
            if seen != true_start {
                lines.push(format!(
                    "{host} sees {other} as {seen:?}, it is {true_start:?}"
                ));
            }
        }
    }
    lines
}
