//! The people of a cluster: they invite, attach, serve and name things, type a command again that failed, and are told
//! what became of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use weft_core::control::{NameSpec, ServiceSpec, TokenRequest};
use weft_core::model::{EndpointId, Label, NodeId, Now, Proto};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::store::Table;
use weft_core::value::{Kind as RecordKind, endpoint_key, label_key};
use weft_core::view::{EndpointKind, Method, Publish, ServicePort};

use super::{CLOCK_NOTICED, Cluster, ISSUERS};
use crate::faults::Action;
use crate::nodes::some_address;

/// Every command is answered within this by a node that runs on.
const ANSWER_WITHIN: Duration = Duration::from_secs(45);
/// Who could not join tries again after this.
const TRY_AGAIN: Duration = Duration::from_secs(3);
/// Somebody makes a new invitation so often while things go wrong: the old one may name hosts that are gone.
const MINT_EVERY: Duration = Duration::from_secs(10);
/// Hosts come back as somebody else, each with one use.
const USES: u32 = 64;

/// A command that was not answered yet.
pub(super) struct Pending {
    host: usize,
    boots: u64,
    since: Now,
    wish: Wish,
}

/// What was asked for.
pub(super) enum Wish {
    /// An invitation, for everybody.
    Token,
    /// One for the late ones.
    ScarceToken,
    Attach,
    Release,
    Serve(Label),
    Unserve,
    Name,
    Remove(NodeId),
}

impl Cluster {
    /// Makes an invitation on `host`.
    pub(super) fn mint(&mut self, host: usize) {
        let request = TokenRequest {
            ttl_secs: 3600,
            uses: USES,
            reusable: self.random.range(2) == 0,
        };
        self.mint_at = self.world.now.plus(MINT_EVERY);
        self.ask(host, Wish::Token, Command::MintToken(request));
    }

    /// In some worlds the late ones get an invitation good for one less than they are.
    pub(super) fn make_scarce(&mut self) {
        let late = self.plan.late.len();
        if late < 2 || self.random.range(2) == 0 {
            return;
        }
        let uses = late - 1;
        let request = TokenRequest {
            ttl_secs: 3600,
            uses: u32::try_from(uses).unwrap_or(u32::MAX),
            reusable: false,
        };
        let issuer = self.random.range(ISSUERS as u64) as usize;
        self.ask(issuer, Wish::ScarceToken, Command::MintToken(request));
        let has = |cluster: &mut Self| !cluster.invitation.borrow().special.is_empty();
        if self.step_until(Duration::from_secs(5), has).is_some() {
            self.scarce = Some(uses);
        }
    }

    /// Whoever came too late for the scarce invitation gets another one, now that nothing goes wrong.
    pub(super) fn share_out(&mut self) {
        let late = self.plan.late.iter();
        let came = late.filter(|host| self.is_ready(**host)).count();
        if let Some(uses) = self.scarce.filter(|uses| came > *uses) {
            self.violation(format!("an invitation for {uses} let {came} in"));
        }
        self.invitation.borrow_mut().special.clear();
    }

    pub(super) fn mint_again(&mut self) {
        if self.world.now < self.mint_at {
            return;
        }
        let ready: Vec<usize> = self.able();
        if let Some(host) = self.one_of(&ready) {
            self.mint(host);
        }
    }

    /// Hosts that can be asked for something.
    pub(super) fn able(&self) -> Vec<usize> {
        (0..self.world.hosts.len())
            .filter(|host| self.is_ready(*host) && !self.world.hosts[*host].is_paused())
            .filter(|host| !self.ledger.evicted.contains(host))
            .collect()
    }

    pub(super) fn one_of(&mut self, hosts: &[usize]) -> Option<usize> {
        let index = self.random.range(hosts.len() as u64) as usize;
        hosts.get(index).copied()
    }

    /// A person would type the command again.
    pub(super) fn try_again(&mut self) {
        let now = self.world.now;
        for host in 0..self.hosts {
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

    /// The daemon releases what it announces and nobody was told of: after a start, and when others remember more of it
    /// than it did. So does this.
    pub(super) fn clear_leftovers(&mut self) {
        for host in 0..self.world.hosts.len() {
            let boots = self.world.hosts[host].boots();
            let paused = self.world.hosts[host].is_paused();
            let again = self.calm && self.pending.is_empty();
            let done = self.cleared.get(&host) == Some(&boots) && !again;
            if paused || done || !self.is_ready(host) {
                continue;
            }
            self.cleared.insert(host, boots);
            for id in self.leftovers(host) {
                self.ask(host, Wish::Release, Command::Release(id));
            }
        }
    }

    /// Endpoints that it announces and nobody was told of.
    fn leftovers(&self, host: usize) -> Vec<EndpointId> {
        let shell = self.world.hosts[host].machine.as_ref();
        let catalog = shell.and_then(|shell| Some((shell.node().catalog()?, shell.id())));
        let mine = catalog.iter().flat_map(|(all, me)| all.endpoints_of(me));
        mine.map(|endpoint| endpoint.id)
            .filter(|id| !self.ledger.endpoints.contains_key(id))
            .collect()
    }

    pub(super) fn ask(&mut self, host: usize, wish: Wish, command: Command) {
        let id = self.next;
        self.next += 1;
        let boots = self.world.hosts[host].boots();
        let since = self.world.now;
        self.world.note(host, &format!("? {id}: {command:?}"));
        let asked = self
            .world
            .with(host, |shell, now, fx| shell.command(now, id, command, fx));
        if asked.is_some() {
            let pending = Pending {
                host,
                boots,
                since,
                wish,
            };
            self.pending.insert(id, pending);
        }
    }

    /// What a host answered.
    pub(super) fn take_replies(&mut self, host: usize) {
        let answering = self.world.hosts[host].machine.as_ref();
        if !answering.is_some_and(|shell| shell.has_replies()) {
            return;
        }
        let asked = self.pending.iter().filter(|(_, p)| p.host == host);
        let ids: Vec<u64> = asked.map(|(id, _)| *id).collect();
        for id in ids {
            let shell = self.world.hosts[host].machine.as_mut();
            let Some(reply) = shell.and_then(|shell| shell.take_reply(id)) else {
                continue;
            };
            if let Some(pending) = self.pending.remove(&id) {
                self.take_reply(&pending, reply);
            }
        }
    }

    /// Commands of hosts that died are nobody's, the others must be answered in time.
    pub(super) fn time_out(&mut self) {
        let now = self.world.now;
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            let Some(pending) = self.pending.get(&id) else {
                continue;
            };
            let host = &self.world.hosts[pending.host];
            let died = host.machine.is_none() || host.boots() != pending.boots;
            let late = now.since(pending.since) > ANSWER_WITHIN;
            if !died && !late {
                continue;
            }
            if !died {
                self.violation(format!("{} never answered command {id}", pending.host));
            }
            self.pending.remove(&id);
        }
    }

    fn take_reply(&mut self, pending: &Pending, reply: Result<Reply, CommandError>) {
        let (host, now) = (pending.host, self.world.now);
        if self.ledger.evicted.contains(&host) {
            return;
        }
        match (&pending.wish, reply) {
            (Wish::Token, Ok(Reply::Token(text))) => {
                self.invitation.borrow_mut().common = Some(text);
            }
            (Wish::ScarceToken, Ok(Reply::Token(text))) => {
                let late = self.plan.late.iter();
                let special = late.map(|host| (*host, text.clone()));
                self.invitation.borrow_mut().special.extend(special);
            }
            (Wish::Attach, Ok(Reply::Attached(endpoint))) => {
                self.check_written(host, RecordKind::ENDPOINT, &endpoint_key(&endpoint.id));
                let wrong = self.ledger.attached(now, host, endpoint);
                wrong.into_iter().for_each(|line| self.violation(line));
            }
            (Wish::Serve(name), Ok(Reply::Service(service))) => {
                self.check_written(host, RecordKind::SERVICE, &label_key(name));
                let wrong = self.ledger.serves(host, name, service.vip);
                wrong.into_iter().for_each(|line| self.violation(line));
                // What a liar wrote it may have lied about before it was told that it is written.
                let lies = self.ledger.lying.contains(&host);
                if lies || self.has_wrong_clock(host) || host >= self.hosts {
                    self.ledger.loosen(name);
                }
            }
            (Wish::Unserve | Wish::Release | Wish::Name, Ok(_)) => {}
            (Wish::Remove(id), Ok(_)) => self.on_removed(id),
            (Wish::Remove(id), Err(error)) => self.on_not_removed(id, &error),
            (Wish::Token, Err(error)) => self.violation(format!("no invitation: {error}")),
            // A refusal is an answer: what it must not do is change anything, and the promises show that.
            (_, Err(_)) => {}
            (_, Ok(other)) => self.violation(format!("{host} answers {other:?}")),
        }
    }

    /// What a host acknowledges is on its disk by then.
    fn check_written(&mut self, host: usize, kind: RecordKind, key: &[u8]) {
        let row = Table::OwnRecords.key(&[&[kind.0], key]);
        let mut rows = self.world.hosts[host]
            .disk()
            .iter()
            .rev()
            .flat_map(|b| &b.0);
        if !rows.any(|(written, value)| *written == row && value.is_some()) {
            self.violation(format!("{host} acknowledged what is not on its disk"));
        }
    }

    /// What a host stamps whose clock is that wrong others apply later, or not at all.
    fn has_wrong_clock(&self, host: usize) -> bool {
        self.world.hosts[host].clock().abs() > CLOCK_NOTICED
    }

    /// Some random work on some random host.
    pub(super) fn work(&mut self) {
        let able = self.able();
        if able.is_empty() || self.random.range(3) != 0 {
            return;
        }
        let Some(host) = self.one_of(&able) else {
            return;
        };
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

    /// Each host that runs can still give an address.
    pub(super) fn attach_everywhere(&mut self) {
        // Where a forger divided the cluster each side may know other owners.
        if self.small || self.ledger.divided {
            return;
        }
        let mut running: Vec<usize> = self.world.running().map(|(host, _)| host).collect();
        // Where half of the first ones are dead and nobody removed them, their voters can't agree to give anything to
        // those who come later; people are told so.
        let late = &self.plan.late;
        let dead = self.plan.dead.iter().filter(|host| !late.contains(host));
        if dead.count() * 2 >= self.hosts - late.len() {
            running.retain(|host| !late.contains(host));
        }
        let before: BTreeSet<EndpointId> = self.ledger.endpoints.keys().copied().collect();
        running.iter().for_each(|host| self.attach(*host, None));
        self.step_until(ANSWER_WITHIN, |cluster| cluster.pending.is_empty());
        // Others may be given back meanwhile.
        let ids = self.ledger.endpoints.keys();
        let got = ids.filter(|id| !before.contains(*id)).count();
        if got != running.len() {
            self.violation(format!("only {got} of {} hosts can attach", running.len()));
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
        if let Some(shell) = &self.world.hosts[host].machine {
            self.ledger.gone.insert(id, shell.id());
        }
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
