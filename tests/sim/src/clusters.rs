//! A cluster's life under one seed: one host founds it, the others join by an invitation, all attach, serve and name
//! things while links and hosts fail; then nothing fails any more, and all must be as it was promised.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::Duration;

use ipnet::Ipv4Net;
use weft_core::control::{NameSpec, ServiceSpec, TokenRequest};
use weft_core::crypto::{Random, memo};
use weft_core::model::{AddressPlan, EndpointId, Label, Now, Proto};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::view::{EndpointKind, Method, Publish, ServicePort};

use crate::faults::{Action, Kind, Plan};
use crate::members::Verdict;
use crate::nodes::{self, Invitation, Shell, some_address};
use crate::promises::Ledger;
use crate::world::World;

/// The driver looks around so often.
const STEP: Duration = Duration::from_millis(100);
/// All must have joined within this when nothing goes wrong.
const JOINED_WITHIN: Duration = Duration::from_secs(60);
/// After the last fault all must agree within this.
const AGREE_WITHIN: Duration = Duration::from_secs(60);
/// Every command is answered within this by a node that runs on.
const ANSWER_WITHIN: Duration = Duration::from_secs(45);
/// Who could not join tries again after this.
const TRY_AGAIN: Duration = Duration::from_secs(3);
/// In worlds with a small range addresses run out, and that is no fault.
const SMALL_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 9, 0, 0), 22);

/// A command that was not answered yet.
struct Pending {
    host: usize,
    boots: u64,
    since: Now,
    wish: Wish,
}

/// What was asked for.
enum Wish {
    Token,
    Attach,
    Release,
    Serve(Label),
    Unserve,
    Name,
}

/// One seed's cluster.
pub struct Cluster {
    world: World<Shell>,
    random: Random,
    invitation: Invitation,
    ledger: Ledger,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    /// The start of each host whose leftovers were cleared.
    cleared: BTreeMap<usize, u64>,
    retry_at: BTreeMap<usize, Now>,
    dead: BTreeSet<usize>,
    small: bool,
    violations: Vec<String>,
}

/// Runs one seed.
pub fn run(seed: u64, hosts: usize, kinds: &[Kind], keep_trace: bool) -> Verdict {
    memo::enable_for_this_thread();
    let mut cluster = Cluster::new(seed, hosts, keep_trace);
    cluster.found_and_join();
    let whole_after = cluster.live_through(kinds);
    let Cluster {
        world, violations, ..
    } = cluster;
    Verdict {
        violations,
        whole_after,
        fingerprint: world.fingerprint,
        trace: world.trace().to_owned(),
    }
}

impl Cluster {
    fn new(seed: u64, hosts: usize, keep_trace: bool) -> Self {
        let invitation = Rc::new(RefCell::new(None));
        let small = seed % 3 == 2;
        let range = if small {
            SMALL_RANGE
        } else {
            AddressPlan::DEFAULT_RANGE
        };
        let mut world = nodes::world(seed, hosts, range, invitation.clone(), keep_trace);
        let random = world.random().fork();
        Self {
            world,
            random,
            invitation,
            ledger: Ledger::new(range),
            pending: BTreeMap::new(),
            next: 1,
            cleared: BTreeMap::new(),
            retry_at: BTreeMap::new(),
            dead: BTreeSet::new(),
            small,
            violations: Vec::new(),
        }
    }

    fn found_and_join(&mut self) {
        let hosts = self.world.hosts.len();
        self.world.act(Action::Boot(0));
        self.step_until(Duration::from_secs(10), |cluster| cluster.is_ready(0));
        let uses = u32::try_from(hosts).unwrap_or(u32::MAX);
        let reusable = self.random.range(2) == 0;
        let request = TokenRequest {
            ttl_secs: 3600,
            uses,
            reusable,
        };
        self.ask(0, Wish::Token, Command::MintToken(request));
        self.step_until(Duration::from_secs(5), |cluster| {
            cluster.invitation.borrow().is_some()
        });
        for host in 1..hosts {
            let at = self
                .world
                .now
                .plus(Duration::from_millis(self.random.range(5_000)));
            self.world.schedule(at, Action::Boot(host));
        }
        let all = |cluster: &mut Self| (0..hosts).all(|host| cluster.is_ready(host));
        if self.step_until(JOINED_WITHIN, all).is_none() {
            let late: Vec<usize> = (0..hosts).filter(|host| !self.is_ready(*host)).collect();
            self.violations.push(format!(
                "hosts {late:?} are not ready after {JOINED_WITHIN:?}"
            ));
        }
    }

    /// Faults and work together, then work's end. How long it took from the last fault until all agreed.
    fn live_through(&mut self, kinds: &[Kind]) -> Option<Duration> {
        let hosts = self.world.hosts.len();
        let from = self.world.now.plus(Duration::from_secs(2));
        let plan = Plan::draw(hosts, kinds, from, &mut self.random);
        plan.actions
            .iter()
            .for_each(|(at, action)| self.world.schedule(*at, *action));
        self.dead.clone_from(&plan.dead);
        while self.world.now < plan.end {
            self.work();
            self.step();
        }
        // The last commands and the last failed joiners get their time.
        let agreed = self.step_until(AGREE_WITHIN, |cluster| {
            cluster.pending.is_empty() && cluster.has_no_leftovers() && cluster.broken().is_empty()
        });
        let broken = self.broken();
        self.violations.extend(broken);
        self.attach_everywhere();
        let agreed_again = self.step_until(Duration::from_secs(20), |cluster| {
            cluster.pending.is_empty() && cluster.broken().is_empty()
        });
        if agreed_again.is_none() {
            let broken = self.broken();
            self.violations
                .extend(broken.into_iter().map(|line| format!("in the end: {line}")));
        }
        agreed
    }

    /// Each host that runs can still give an address.
    fn attach_everywhere(&mut self) {
        if self.small {
            return;
        }
        let running: Vec<usize> = self.world.running().map(|(host, _)| host).collect();
        let before = self.ledger.endpoints.len();
        running.iter().for_each(|host| self.attach(*host, None));
        self.step_until(ANSWER_WITHIN, |cluster| cluster.pending.is_empty());
        let got = self.ledger.endpoints.len() - before;
        if got != running.len() {
            self.violations
                .push(format!("only {got} of {} hosts can attach", running.len()));
        }
    }

    fn broken(&mut self) -> Vec<String> {
        self.ledger.broken(&mut self.world, &self.dead)
    }

    fn is_ready(&self, host: usize) -> bool {
        self.world.hosts[host]
            .machine
            .as_ref()
            .is_some_and(|shell| shell.ready)
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
            if self.world.now.since(start) >= limit {
                return None;
            }
            self.step();
        }
        Some(self.world.now.since(start))
    }

    fn step(&mut self) {
        self.world.run_for(STEP);
        self.take_replies();
        self.try_again();
        self.clear_leftovers();
        self.note_alarms();
    }

    fn note_alarms(&mut self) {
        for (index, host) in self.world.hosts.iter_mut().enumerate() {
            let alarms = host
                .machine
                .as_mut()
                .map(|shell| std::mem::take(&mut shell.alarms));
            // Both sides of a split may create one name; that is told, and nothing to complain of.
            let lines = alarms
                .into_iter()
                .flatten()
                .filter(|line| !line.contains("was created twice"))
                // Small ranges fill up, and people are told.
                .filter(|line| !line.contains("is nearly full"));
            self.violations
                .extend(lines.map(|line| format!("{index} raised an alarm: {line}")));
        }
    }

    /// A person would type the command again.
    fn try_again(&mut self) {
        let now = self.world.now;
        for host in 0..self.world.hosts.len() {
            let failed = self.world.hosts[host]
                .machine
                .as_ref()
                .is_some_and(|s| s.failed.is_some());
            if !failed {
                self.retry_at.remove(&host);
                continue;
            }
            let at = *self.retry_at.entry(host).or_insert(now.plus(TRY_AGAIN));
            if now >= at {
                self.retry_at.remove(&host);
                self.world.act(Action::Crash(host));
                self.world.act(Action::Boot(host));
            }
        }
    }

    /// After a restart the daemon releases what it holds and nobody was told of; so does this.
    fn clear_leftovers(&mut self) {
        for host in 0..self.world.hosts.len() {
            let boots = self.world.hosts[host].boots();
            let paused = self.world.hosts[host].is_paused();
            if paused || !self.is_ready(host) || self.cleared.get(&host) == Some(&boots) {
                continue;
            }
            self.cleared.insert(host, boots);
            let Some(shell) = self.world.hosts[host].machine.as_mut() else {
                continue;
            };
            let (me, view) = (shell.id(), shell.view());
            let mine = view
                .into_iter()
                .flat_map(|view| view.endpoints)
                .filter(|e| e.node == me);
            let left: Vec<EndpointId> = mine
                .map(|e| e.id)
                .filter(|id| !self.ledger.endpoints.contains_key(id))
                .collect();
            left.into_iter()
                .for_each(|id| self.ask(host, Wish::Release, Command::Release(id)));
        }
    }

    fn ask(&mut self, host: usize, wish: Wish, command: Command) {
        let id = self.next;
        self.next += 1;
        let boots = self.world.hosts[host].boots();
        let since = self.world.now;
        let asked = self
            .world
            .with(host, |shell, now, fx| shell.command(now, id, command, fx));
        if asked.is_some() {
            self.pending.insert(
                id,
                Pending {
                    host,
                    boots,
                    since,
                    wish,
                },
            );
        }
    }

    fn take_replies(&mut self) {
        let now = self.world.now;
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            let Some(pending) = self.pending.get(&id) else {
                continue;
            };
            let host = &mut self.world.hosts[pending.host];
            let same = host.boots() == pending.boots;
            let reply = host
                .machine
                .as_mut()
                .filter(|_| same)
                .map(|shell| shell.take_reply(id));
            match reply {
                // It died with the answer; nobody was told anything.
                None => {
                    self.pending.remove(&id);
                }
                Some(None) if now.since(pending.since) > ANSWER_WITHIN => {
                    self.violations
                        .push(format!("{} never answered command {id}", pending.host));
                    self.pending.remove(&id);
                }
                Some(None) => {}
                Some(Some(reply)) => {
                    if let Some(pending) = self.pending.remove(&id) {
                        self.take_reply(&pending, reply);
                    }
                }
            }
        }
    }

    fn take_reply(&mut self, pending: &Pending, reply: Result<Reply, CommandError>) {
        let (host, now) = (pending.host, self.world.now);
        match (&pending.wish, reply) {
            (Wish::Token, Ok(Reply::Token(text))) => *self.invitation.borrow_mut() = Some(text),
            (Wish::Attach, Ok(Reply::Attached(endpoint))) => {
                let wrong = self.ledger.attached(now, host, endpoint);
                self.violations.extend(wrong);
            }
            (Wish::Serve(name), Ok(Reply::Service(service))) => {
                let wrong = self.ledger.serves(host, name, service.vip);
                self.violations.extend(wrong);
            }
            (Wish::Unserve | Wish::Release | Wish::Name, Ok(_)) => {}
            (Wish::Token, Err(error)) => self.violations.push(format!("no invitation: {error}")),
            // A refusal is an answer: what it must not do is change anything, and the promises show that.
            (_, Err(_)) => {}
            (_, Ok(other)) => self.violations.push(format!("{host} answers {other:?}")),
        }
    }

    /// Some random work on some random host.
    fn work(&mut self) {
        let ready: Vec<usize> = (0..self.world.hosts.len())
            .filter(|host| self.is_ready(*host) && !self.world.hosts[*host].is_paused())
            .collect();
        if ready.is_empty() || self.random.range(3) != 0 {
            return;
        }
        let host = ready[self.random.range(ready.len() as u64) as usize];
        match self.random.range(20) {
            0..=8 => self.attach(host, None),
            9..=10 => {
                let ip = self.ledger.some_address(&mut self.random);
                self.attach(host, Some(ip));
            }
            11..=14 => self.release(host),
            15..=17 => self.serve(host),
            18 => self.unserve(host),
            _ => self.name(host),
        }
    }

    fn attach(&mut self, host: usize, ip: Option<Ipv4Addr>) {
        let command = Command::Attach {
            kind: EndpointKind::Container,
            names: vec![label(&format!("app-{}", self.random.range(4)))],
            network: label("default"),
            ip,
            labels: BTreeMap::new(),
        };
        self.ask(host, Wish::Attach, command);
    }

    fn release(&mut self, host: usize) {
        let own = self.ledger.of_host(host);
        if own.is_empty() {
            return;
        }
        let id = own[self.random.range(own.len() as u64) as usize];
        self.ledger.released(self.world.now, &id);
        self.ask(host, Wish::Release, Command::Release(id));
    }

    fn serve(&mut self, host: usize) {
        let name = label(&format!("svc-{}", self.next));
        let mut port = ServicePort {
            proto: Proto::Tcp,
            port: 80,
            target: 8080,
            publish: Vec::new(),
        };
        if self.random.range(3) == 0 {
            let number = 20_000 + (self.next % 40_000) as u16;
            port.publish.push(Publish {
                addr: None,
                port: number,
            });
        }
        let spec = ServiceSpec {
            name: name.clone(),
            ports: vec![port],
            selector: BTreeMap::new(),
            method: Method::Maglev,
        };
        self.ask(host, Wish::Serve(name), Command::CreateService(spec));
    }

    fn unserve(&mut self, host: usize) {
        if let Some(name) = self.ledger.some_service(&mut self.random) {
            self.ledger.services.remove(&name);
            self.ask(host, Wish::Unserve, Command::RemoveService(name));
        }
    }

    fn name(&mut self, host: usize) {
        let name = label(&format!("name-{}", self.random.range(10)));
        let ip = some_address(self.random.range(60_000));
        self.ask(host, Wish::Name, Command::AddName(NameSpec { name, ip }));
    }
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("letters, digits and hyphens")
}
