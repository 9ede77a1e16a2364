//! A cluster's life under one seed: one host founds it, the others join by an invitation, all attach, serve and name
//! things while links and hosts fail; then nothing fails any more, and all must be as it was promised.

mod forks;
mod people;
mod removals;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::Duration;

use ipnet::Ipv4Net;
use weft_core::catalog::Catalog;
use weft_core::crypto::{Random, memo};
use weft_core::model::{AddressPlan, EndpointId, Label, NodeId, Now};
use weft_core::roster::Roster;
use weft_core::store::{Batch, Stored, Table};
use weft_core::value::{Kind as RecordKind, endpoint_key};
use weft_core::view::ADDRESS_REST;

use crate::faults::{Action, Kind, Plan};
use crate::members::Verdict;
use crate::nodes::{self, Invitation, Invitations, Shell, identity_of};
use crate::promises::Ledger;
use crate::watch::{self, Watch};
use crate::world::World;
use people::Pending;
use removals::Removal;

/// The driver looks around so often; after each event it looks at who did something.
const STEP: Duration = Duration::from_millis(100);
/// All must have joined within this when nothing goes wrong.
const JOINED_WITHIN: Duration = Duration::from_secs(60);
/// After the last fault all must agree within this: services that share an address wait for a free one, and where there is
/// none that is one that rests.
const AGREE_WITHIN: Duration = ADDRESS_REST.saturating_add(Duration::from_secs(15));
/// Scarce invitations are made by one of the first so many hosts.
const ISSUERS: usize = 2;
/// In worlds with a small range addresses run out, and that is no fault.
const SMALL_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 9, 0, 0), 22);
/// More lines about one seed tell nothing more.
const MAX_VIOLATIONS: usize = 50;
/// A clock may be wrong by so much without anybody noticing.
const CLOCK_NOTICED: i64 = 50_000_000;
/// Two copies of one node that ran side by side for so long must have been noticed.
const CLONE_NOTICED: Duration = Duration::from_secs(50);

/// What a seed is run with.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many hosts.
    pub hosts: usize,
    /// Kinds of faults.
    pub kinds: Vec<Kind>,
    /// Numbers of faults to leave out.
    pub without: BTreeSet<usize>,
    /// Keep all that happens.
    pub keep_trace: bool,
}

impl Options {
    /// So many hosts, all kinds of faults.
    pub fn new(hosts: usize) -> Self {
        Self {
            hosts,
            kinds: Kind::ALL.to_vec(),
            without: BTreeSet::new(),
            keep_trace: false,
        }
    }
}

/// One seed's cluster.
struct Cluster {
    seed: u64,
    world: World<Shell>,
    random: Random,
    invitation: Invitation,
    ledger: Ledger,
    watch: Watch,
    plan: Plan,
    hosts: usize,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    /// The start of each host whose leftovers were cleared.
    cleared: BTreeMap<usize, u64>,
    retry_at: BTreeMap<usize, Now>,
    removals: Vec<Removal>,
    /// The digest of each host's roster when it was last looked whom it leaves no member.
    rosters: BTreeMap<usize, u64>,
    mint_at: Now,
    /// Uses of the scarce invitation, when there is one.
    scarce: Option<usize>,
    /// Since when a node runs twice, and whether anybody said so.
    cloned: Option<Now>,
    clone_told: bool,
    /// The other members that the backup knows.
    in_backup: BTreeSet<NodeId>,
    /// A host came back out of it, and whom it let in since nobody knows whom it knows.
    restored_alone: bool,
    /// Hosts that are members for nobody but themselves, and since when.
    alone: BTreeMap<usize, Now>,
    small: bool,
    calm: bool,
    violations: Vec<String>,
}

/// Runs one seed with all kinds of faults among `kinds`.
pub fn run(seed: u64, hosts: usize, kinds: &[Kind], keep_trace: bool) -> Verdict {
    let options = Options {
        kinds: kinds.to_vec(),
        keep_trace,
        ..Options::new(hosts)
    };
    run_with(seed, &options).0
}

/// The faults of one seed.
pub fn plan_of(seed: u64, options: &Options) -> Plan {
    Cluster::new(seed, options).plan
}

/// Runs one seed; its verdict, and the plan of its faults.
pub fn run_with(seed: u64, options: &Options) -> (Verdict, Plan) {
    memo::enable_for_this_thread();
    let mut cluster = Cluster::new(seed, options);
    cluster.found_and_join();
    let whole_after = cluster.live_through();
    memo::disable_for_this_thread();
    let Cluster {
        world,
        violations,
        plan,
        ..
    } = cluster;
    let verdict = Verdict {
        violations,
        whole_after,
        fingerprint: world.fingerprint,
        trace: world.trace().to_owned(),
    };
    (verdict, plan)
}

impl Cluster {
    fn new(seed: u64, options: &Options) -> Self {
        let hosts = options.hosts;
        let invitation = Rc::new(RefCell::new(Invitations::default()));
        let small = seed % 3 == 2;
        let range = if small {
            SMALL_RANGE
        } else {
            AddressPlan::DEFAULT_RANGE
        };
        // One more, for a copy.
        let mut world = nodes::world(
            seed,
            hosts + 1,
            range,
            invitation.clone(),
            options.keep_trace,
        );
        let mut random = world.random().fork();
        let mut faults = random.fork();
        let plan = Plan::draw_without(
            hosts,
            &options.kinds,
            Now::default(),
            &mut faults,
            &options.without,
        );
        Self {
            seed,
            world,
            random,
            invitation,
            ledger: Ledger::new(range),
            watch: Watch::default(),
            plan,
            hosts,
            pending: BTreeMap::new(),
            next: 1,
            cleared: BTreeMap::new(),
            retry_at: BTreeMap::new(),
            removals: Vec::new(),
            rosters: BTreeMap::new(),
            mint_at: Now::default(),
            scarce: None,
            cloned: None,
            clone_told: false,
            in_backup: BTreeSet::new(),
            restored_alone: false,
            alone: BTreeMap::new(),
            small,
            calm: true,
            violations: Vec::new(),
        }
    }

    fn violation(&mut self, line: String) {
        if !self.is_lost() {
            self.world.note(0, &format!("VIOLATION {line}"));
            let at = self.world.now.0.as_secs_f64();
            self.violations.push(format!("at {at:.3} s: {line}"));
        }
    }

    /// So much is wrong that more of it would tell nothing: a world may go wrong faster and faster.
    fn is_lost(&self) -> bool {
        self.violations.len() >= MAX_VIOLATIONS
    }

    fn found_and_join(&mut self) {
        self.world.act(Action::Boot(0));
        self.step_until(Duration::from_secs(10), |cluster| cluster.is_ready(0));
        self.mint(0);
        self.step_until(Duration::from_secs(5), |cluster| {
            cluster.invitation.borrow().common.is_some()
        });
        let early: Vec<usize> = (0..self.hosts)
            .filter(|host| !self.plan.late.contains(host))
            .collect();
        for host in early.iter().skip(1) {
            let after = Duration::from_millis(self.random.range(5_000));
            let at = self.world.now.plus(after);
            self.world.schedule(at, Action::Boot(*host));
        }
        let all = |cluster: &mut Self| early.iter().all(|host| cluster.is_ready(*host));
        if self.step_until(JOINED_WITHIN, all).is_none() {
            let late: Vec<&usize> = early.iter().filter(|host| !self.is_ready(**host)).collect();
            let line = format!("hosts {late:?} are not ready after {JOINED_WITHIN:?}");
            self.violation(line);
        }
    }

    /// Faults and work together, then work's end. How long it took from the last fault until all agreed.
    fn live_through(&mut self) -> Option<Duration> {
        self.make_scarce();
        let from = self.world.now.plus(Duration::from_secs(2));
        for fault in &self.plan.faults {
            self.world.note(0, &format!("fault {fault}"));
        }
        for (at, action) in &self.plan.actions {
            self.world.schedule(from.plus(at.0), *action);
        }
        let end = from.plus(self.plan.end.0);
        self.calm = false;
        while self.world.now < end && !self.is_lost() {
            self.work();
            self.step();
        }
        self.world.carry_out_crashes();
        self.calm = true;
        self.share_out();
        self.remove_by_force();
        // The last commands and the last failed joiners get their time.
        let mut agreed = self.agree();
        // Where addresses are scarce one's next may be what another gave up as it got its own, and that rests.
        if agreed.is_none() && self.small && !self.ledger.is_quiet() {
            agreed = self.agree().map(|took| AGREE_WITHIN + took);
        }
        if agreed.is_none() {
            self.broken()
                .into_iter()
                .for_each(|line| self.violation(line));
        }
        self.remove_forgers();
        // Where addresses are scarce some wait for theirs longer than that.
        if !self.is_displaced() {
            self.ledger.settle();
        }
        self.attach_everywhere();
        let agreed_again = self.step_until(Duration::from_secs(20), |cluster| {
            cluster.pending.is_empty() && cluster.broken().is_empty()
        });
        if agreed_again.is_none() {
            for line in self.broken() {
                self.violation(format!("in the end: {line}"));
            }
        }
        agreed
    }

    fn agree(&mut self) -> Option<Duration> {
        self.step_until(AGREE_WITHIN, |cluster| {
            cluster.is_settled() && cluster.broken().is_empty()
        })
    }

    /// Where the nodes differ from the promises, but for what nobody promised: a member that forked its chain of the
    /// roster has divided the cluster until it is removed, and all must know that.
    fn broken(&mut self) -> Vec<String> {
        if !self.forgers().is_empty() {
            return self.blind_to_forks();
        }
        // Where only the forger itself ever had the other branch, and is gone, there is but one.
        if self.restored_alone && !self.is_fork_seen() {
            return Vec::new();
        }
        self.ledger
            .broken(&mut self.world, self.hosts, &self.plan.dead)
    }

    fn is_ready(&self, host: usize) -> bool {
        self.world.hosts[host]
            .machine
            .as_ref()
            .is_some_and(|shell| shell.ready)
    }

    fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.removals.is_empty() && self.has_no_leftovers()
    }

    /// Does an endpoint still have an address in another's part?
    fn is_displaced(&self) -> bool {
        self.ledger.endpoints.values().any(|(host, ip)| {
            let shell = self.world.hosts[*host].machine.as_ref();
            let owner =
                shell.and_then(|shell| Some((shell.id(), shell.node().ring()?.owner(*ip)?)));
            owner.is_some_and(|(me, owner)| me != owner)
        })
    }

    fn has_no_leftovers(&self) -> bool {
        self.world.running().all(|(host, shell)| {
            shell.ready && self.cleared.get(&host) == Some(&self.world.hosts[host].boots())
        })
    }

    fn step_until(
        &mut self,
        limit: Duration,
        done: impl Fn(&mut Self) -> bool,
    ) -> Option<Duration> {
        let start = self.world.now;
        while !done(self) {
            if self.world.now.since(start) >= limit || self.is_lost() {
                return None;
            }
            self.step();
        }
        Some(self.world.now.since(start))
    }

    fn step(&mut self) {
        let until = self.world.now.plus(STEP);
        while self.world.step(until) {
            self.look();
        }
        self.look();
        self.time_out();
        self.mint_again();
        self.remove_again();
        self.try_again();
        self.clear_leftovers();
        self.note_alarms();
        watch::sizes(&self.world)
            .into_iter()
            .for_each(|line| self.violation(line));
    }

    /// After an event: what was done, what was answered, what changed.
    fn look(&mut self) {
        for action in self.world.take_acted() {
            self.on_action(action);
        }
        for host in self.world.take_touched() {
            self.take_replies(host);
            if self.cloned.is_some() && self.runs_twice(host) {
                self.taint_own(host);
            }
            self.look_whom_that_voids(host);
            self.taint_gifts(host);
            let shell = self.world.hosts[host].machine.as_ref();
            let alarms = || shell.into_iter().flat_map(|shell| &shell.alarms);
            let is_told = alarms().any(|line| line.contains("was let in by"));
            for (name, vip) in alarms().filter_map(|line| parted(line)) {
                self.ledger.parted(&name, vip);
            }
            if is_told {
                // Who told it so may be gone before the alarms are looked at.
                self.leave_out_if_void(host, true);
            }
            let lines = self.watch.look(&mut self.world, host, &mut self.ledger);
            lines.into_iter().for_each(|line| self.violation(line));
        }
    }

    /// What an action means for the promises.
    fn on_action(&mut self, action: Action) {
        match action {
            Action::Wipe(host) => self.on_wiped(host),
            Action::Remove(host) => self.on_removal(host, 1, false),
            Action::Force(host) => self.on_removal(host, 2, true),
            Action::Backup(host) => self.in_backup = self.others_known_to(host),
            Action::Restore(host) => {
                // It admits others, and gives them space, as if nobody had come: there is nobody whom it knows to ask.
                self.restored_alone |= self.has_forgotten_friends(host);
                self.ledger.divided |= self.restored_alone;
                // A backup does not know who came since.
                self.count_uses_no_more(host);
                self.taint_forgotten_gifts(host);
                let kept = stored(self.world.hosts[host].disk());
                let is_kept = |id: &EndpointId| {
                    let key = [&[RecordKind::ENDPOINT.0], endpoint_key(id).as_slice()].concat();
                    kept.get(Table::OwnRecords, &[&key]).is_some()
                };
                self.ledger.forget(host, is_kept);
            }
            Action::Clone(host, _) => {
                self.cloned = Some(self.world.now);
                // Each copy counts for itself.
                self.count_uses_no_more(host);
                self.clone_told = false;
                // A disk is copied, too, while nobody runs on it.
                self.ledger.cloned.insert(self.id_of(host));
                self.taint(host);
            }
            Action::Unclone(host, copy) => self.end_clone(host, copy),
            Action::Fork(_) => self.ledger.divided |= self.may_divide(),
            Action::Lie(host) => {
                let liar = self.world.hosts[host].machine.as_ref();
                self.ledger.liars.extend(liar.map(Shell::id));
                self.ledger.lying.insert(host);
                self.ledger.loosen_made_by(host);
            }
            _ => {}
        }
    }

    fn count_uses_no_more(&mut self, host: usize) {
        if host < ISSUERS {
            self.scarce = None;
        }
    }

    fn others_known_to(&self, host: usize) -> BTreeSet<NodeId> {
        let shell = self.world.hosts[host].machine.as_ref();
        let roster = shell.and_then(|shell| shell.node().roster());
        let members = roster.into_iter().flat_map(Roster::members);
        let me = self.id_of(host);
        members.map(|m| m.id).filter(|id| *id != me).collect()
    }

    /// Is there a host of which neither the backup knows, out of which this host came back, nor anybody whom it can ask?
    fn has_forgotten_friends(&self, host: usize) -> bool {
        let others = (0..self.world.hosts.len()).filter(|other| *other != host);
        let (known, strangers): (Vec<usize>, Vec<usize>) =
            others.partition(|other| self.in_backup.contains(&self.id_of(*other)));
        let mut heard: BTreeSet<NodeId> = BTreeSet::new();
        for peer in known {
            heard.extend(self.others_known_to(peer));
        }
        let came_in = |other: &usize| match &self.world.hosts[*other].machine {
            Some(shell) => shell.node().roster().is_some(),
            None => !self.world.hosts[*other].disk().is_empty(),
        };
        let mut strangers = strangers.into_iter().filter(came_in);
        strangers.any(|other| !heard.contains(&self.id_of(other)))
    }

    fn id_of(&self, host: usize) -> NodeId {
        identity_of(self.seed, self.world.hosts[host].key()).id()
    }

    fn taint(&mut self, host: usize) {
        if let Some(id) = self.world.hosts[host].machine.as_ref().map(Shell::id) {
            let parts = self.space_of(&id);
            self.ledger.taint(parts);
        }
    }

    /// Is anybody removed here? Else a fork divides nothing.
    fn may_divide(&self) -> bool {
        let kinds = [Kind::Wipe, Kind::Evict, Kind::Remove, Kind::Force];
        kinds.into_iter().any(|kind| self.plan.has(kind))
    }

    fn runs_twice(&self, host: usize) -> bool {
        let key = self.world.hosts[self.hosts].key();
        self.world.hosts[host].key() == key
    }

    fn taint_own(&mut self, host: usize) {
        let shell = self.world.hosts[host].machine.as_ref();
        let parts = shell.and_then(|shell| Some(shell.node().ring()?.parts(&shell.id())));
        self.ledger.taint(parts.unwrap_or_default());
    }

    /// Of what a node that ran twice took over or gave away the other copy knows nothing.
    fn taint_gifts(&mut self, host: usize) {
        let shell = self.world.hosts[host].machine.as_ref();
        let catalog = shell.and_then(|shell| shell.node().catalog());
        let Some(catalog) = catalog.filter(|_| self.runs_twice(host)) else {
            return;
        };
        let cloned = &self.ledger.cloned;
        let mut grants = catalog.grants();
        grants.retain(|(writer, _)| cloned.contains(writer));
        let parts = grants.iter().map(|(_, grant)| (grant.start, grant.last));
        self.ledger.taint(parts.collect::<Vec<_>>());
    }

    /// What it gave since the backup and nobody remembers but who got it: it can't know whom to ask for that, and will give
    /// it again.
    fn taint_forgotten_gifts(&mut self, host: usize) {
        let id = self.id_of(host);
        let mut known: BTreeMap<(u32, u32, NodeId), bool> = BTreeMap::new();
        for (_, shell) in self.world.running() {
            let grants = shell.node().catalog().map(Catalog::grants);
            for (_, grant) in grants.into_iter().flatten().filter(|(by, _)| *by == id) {
                let by_another = known.entry((grant.start, grant.last, grant.to));
                *by_another.or_default() |= shell.id() != grant.to;
            }
        }
        let forgotten = known.into_iter().filter(|(_, by_another)| !by_another);
        let parts = forgotten.map(|((start, last, _), _)| (start, last));
        self.ledger.taint(parts.collect::<Vec<_>>());
    }

    /// All that a node owns according to anybody: some hear of its latest part only later.
    fn space_of(&self, id: &NodeId) -> BTreeSet<(u32, u32)> {
        let shells = self.world.running();
        let rings = shells.filter_map(|(_, shell)| shell.node().ring());
        rings.flat_map(|ring| ring.parts(id)).collect()
    }

    fn end_clone(&mut self, host: usize, copy: usize) {
        self.ledger.forget(copy, |_| false);
        // What one wrote over the other had just written it says once more after a pause, if it is still there.
        self.ledger.loosen_made_by(host);
        self.taint(host);
        let since = self.cloned.take();
        let long = since.is_some_and(|since| self.world.now.since(since) >= CLONE_NOTICED);
        if long && !self.clone_told && self.clone_was_seen(host) {
            self.violation(format!("{host} ran twice, and nobody raised an alarm"));
        }
    }

    /// Had both copies a chance to be seen: did nothing else befall that host or its links?
    fn clone_was_seen(&self, host: usize) -> bool {
        self.plan.faults.iter().all(|fault| match fault.kind {
            Kind::Clone | Kind::Weather | Kind::Newer | Kind::Liar | Kind::Late => true,
            _ => fault.actions.iter().all(|(_, action)| match action {
                Action::Block(..) | Action::Unblock(..) => false,
                action => action.host() != host,
            }),
        })
    }

    fn note_alarms(&mut self) {
        let mut lines = Vec::new();
        for (index, host) in self.world.hosts.iter_mut().enumerate() {
            let alarms = host
                .machine
                .as_mut()
                .map(|shell| std::mem::take(&mut shell.alarms));
            lines.extend(alarms.into_iter().flatten().map(|line| (index, line)));
        }
        for (index, line) in lines {
            // What a person's command just now brought about nobody has looked at yet.
            if let Some((name, vip)) = parted(&line) {
                self.ledger.parted(&name, vip);
            }
            let twice = line.contains("twice (") || line.contains("runs twice");
            let forked = line.contains("two different roster records");
            self.clone_told |= twice || forked;
            self.ledger.divided |= forked && self.may_divide();
            // Both sides of a split may create one name; that is told, and nothing to complain of.
            let expected = line.contains("was created twice")
                || line.contains("had one virtual address")
                // Small ranges fill up, and people are told.
                || line.contains("is nearly full")
                || (twice && (self.plan.has(Kind::Clone) || self.plan.has(Kind::Liar)))
                // Out of a backup, and counted starts by a clock that was ahead.
                || (twice && self.plan.has(Kind::Restore) && self.plan.has(Kind::Clock))
                || (line.contains("this node was removed") && self.ledger.evicted.contains(&index))
                || (line.contains("was let in by") && self.is_told_to_begin_anew(index))
                // A liar may say that it took over what others own: that counts once the owner is removed.
                || (line.contains("belongs to node")
                    && !(self.ledger.is_quiet() && self.ledger.liars.is_empty()))
                || (line.contains("which no service can have") && self.plan.has(Kind::Liar))
                || (forked && (self.plan.has(Kind::Clone) || self.plan.has(Kind::Fork)))
                || (forked && self.restored_alone);
            if !expected {
                self.violation(format!("{index} raised an alarm: {line}"));
            }
        }
    }
}

/// The service that got another address, and which.
fn parted(line: &str) -> Option<(Label, Ipv4Addr)> {
    let (_, rest) = line.split_once(" had one virtual address, ")?;
    let (_, rest) = rest.split_once(": \"")?;
    let (name, rest) = rest.split_once("\" has ")?;
    let (vip, _) = rest.split_once(' ')?;
    Some((Label::parse(name).ok()?, vip.parse().ok()?))
}

/// What a start would find on this disk.
fn stored(disk: &[Batch]) -> Stored {
    let mut stored = Stored::default();
    disk.iter().for_each(|batch| stored.apply(batch));
    stored
}
