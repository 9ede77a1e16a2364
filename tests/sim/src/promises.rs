//! What was promised to whom, and where a node shows something else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use weft_core::crypto::Random;
use weft_core::model::{EndpointId, Label, NodeId, Now};
use weft_core::view::{ADDRESS_REST, Endpoint, Liveness, View};

use crate::nodes::Shell;
use crate::watch::history;
use crate::world::World;

/// What the nodes said they did.
pub struct Ledger {
    range: Ipv4Net,
    /// Acknowledged and not taken back: the host and the address.
    pub endpoints: BTreeMap<EndpointId, (usize, Ipv4Addr)>,
    /// Acknowledged and not removed: who made it, and its address.
    pub services: BTreeMap<Label, (usize, Ipv4Addr)>,
    /// Addresses that services had before.
    former: BTreeSet<(Label, Ipv4Addr)>,
    released: BTreeMap<Ipv4Addr, (usize, Now)>,
    /// Given back, with whose it was.
    pub gone: BTreeMap<EndpointId, NodeId>,
    /// Space of a node that runs twice, first and last address: of that nothing is promised but an alarm.
    tainted: BTreeSet<(u32, u32)>,
    /// Space that people take by force: both sides of a split may, until they hear of each other.
    disputed: Vec<(u32, u32)>,
    forced: bool,
    /// Nodes that ran twice: either copy says what it knows.
    pub cloned: BTreeSet<NodeId>,
    /// Nodes that lied: they may show more than anybody was promised.
    pub liars: BTreeSet<NodeId>,
    /// Hosts with their keys: what a liar gave away may be what it lied about.
    pub lying: BTreeSet<usize>,
    /// Somebody forked its chain of the roster: of those who hold one branch or the other each may know other removals,
    /// and so other owners, until the forger is removed.
    pub divided: bool,
    /// Hosts whose present key was removed: nothing that they say counts.
    pub evicted: BTreeSet<usize>,
    /// Services whose maker or remover can't be held to them: its clock was wrong, or its disk was lost.
    loose: BTreeSet<Label>,
}

impl Ledger {
    /// Nothing promised yet.
    pub fn new(range: Ipv4Net) -> Self {
        Self {
            range,
            endpoints: BTreeMap::new(),
            services: BTreeMap::new(),
            former: BTreeSet::new(),
            released: BTreeMap::new(),
            gone: BTreeMap::new(),
            tainted: BTreeSet::new(),
            disputed: Vec::new(),
            forced: false,
            cloned: BTreeSet::new(),
            liars: BTreeSet::new(),
            lying: BTreeSet::new(),
            divided: false,
            evicted: BTreeSet::new(),
            loose: BTreeSet::new(),
        }
    }

    /// A node begins to run twice: it owns this.
    pub fn taint(&mut self, parts: impl IntoIterator<Item = (u32, u32)>) {
        self.tainted.extend(parts);
    }

    /// Does this address belong to a node that ran twice?
    pub fn is_tainted(&self, ip: u32) -> bool {
        let mut parts = self.tainted.iter();
        parts.any(|(start, last)| (*start..=*last).contains(&ip))
    }

    /// People begin to take this by force.
    pub fn dispute(&mut self, parts: impl IntoIterator<Item = (u32, u32)>) {
        self.disputed.extend(parts);
        self.forced = true;
    }

    /// Has nobody ever taken anything by force, and no node run twice?
    pub fn is_quiet(&self) -> bool {
        self.tainted.is_empty() && !self.forced
    }

    /// Both sides have heard of each other. What one of them freed at last the other one knows nothing of.
    pub fn settle(&mut self) {
        let disputed = std::mem::take(&mut self.disputed);
        let is_in = |ip: u32| {
            disputed
                .iter()
                .any(|(start, last)| (*start..=*last).contains(&ip))
        };
        self.released.retain(|ip, _| !is_in((*ip).into()));
    }

    /// Have people taken anything by force that may not be settled yet?
    pub fn in_dispute(&self) -> bool {
        !self.disputed.is_empty()
    }

    /// May two believe to own this for now?
    pub fn is_disputed(&self, ip: u32) -> bool {
        let mut parts = self.disputed.iter();
        parts.any(|(start, last)| (*start..=*last).contains(&ip))
    }

    /// An endpoint got another address because another node's force held.
    pub fn readdressed(&mut self, id: &EndpointId, to: Ipv4Addr) {
        if let Some((_, ip)) = self.endpoints.get_mut(id) {
            *ip = to;
        }
    }

    /// A service got another address because another one has its. Who has not heard of it shows the one before.
    pub fn parted(&mut self, name: &Label, to: Ipv4Addr) {
        if !self.is_quiet() {
            self.loosen(name);
        }
        if let Some((_, vip)) = self.services.get_mut(name).filter(|(_, vip)| *vip != to) {
            self.former.insert((name.clone(), *vip));
            *vip = to;
        }
    }

    /// Had this service that address before?
    pub fn had(&self, name: &Label, vip: Ipv4Addr) -> bool {
        self.former.contains(&(name.clone(), vip))
    }

    /// Nobody can be held to this service any more.
    pub fn loosen(&mut self, name: &Label) {
        self.loose.insert(name.clone());
    }

    /// Nobody can be held to what this host made.
    pub fn loosen_made_by(&mut self, host: usize) {
        let made = self.services.iter();
        let made = made.filter(|(_, (maker, _))| *maker == host);
        self.loose.extend(made.map(|(name, _)| name.clone()));
    }

    /// Can nobody be held to this service?
    pub fn is_loose(&self, name: &Label) -> bool {
        self.loose.contains(name)
    }

    /// A host lost its disk, or what was written since a backup: only what `keeps` says is promised still.
    pub fn forget(&mut self, host: usize, keeps: impl Fn(&EndpointId) -> bool) {
        self.endpoints
            .retain(|id, (owner, _)| *owner != host || keeps(id));
        self.released.retain(|_, (owner, _)| *owner != host);
        self.loosen_made_by(host);
    }

    /// A host was given an endpoint. What is wrong with that?
    pub fn attached(&mut self, now: Now, host: usize, endpoint: Endpoint) -> Option<String> {
        let ip = endpoint.ip;
        let twin = self
            .endpoints
            .values()
            .find(|(other, held)| *held == ip && !self.lying.contains(other))
            .copied();
        let rests = self
            .released
            .get(&ip)
            .filter(|(other, at)| now.since(*at) < ADDRESS_REST && !self.lying.contains(other))
            .map(|(_, at)| *at);
        self.endpoints.insert(endpoint.id, (host, ip));
        let excused = self.is_tainted(ip.into()) || self.is_disputed(ip.into());
        if excused || self.divided || self.lying.contains(&host) {
            return None;
        }
        if let Some((other, _)) = twin {
            return Some(format!("{ip} was given to {host} while {other} has it"));
        }
        rests.map(|at| {
            let rested = now.since(at);
            format!("{ip} was given to {host} after a rest of only {rested:?}")
        })
    }

    /// A host is about to give an endpoint back.
    pub fn released(&mut self, now: Now, id: &EndpointId) {
        if let Some((host, ip)) = self.endpoints.remove(id) {
            self.released.insert(ip, (host, now));
        }
    }

    /// A host made a service. What is wrong with that?
    pub fn serves(&mut self, host: usize, name: &Label, vip: Ipv4Addr) -> Option<String> {
        // What a host took to its lost disk nobody may ever have heard of.
        let mut held = self
            .services
            .iter()
            .filter(|(name, _)| !self.is_loose(name));
        let twin = held.find(|(_, (_, other))| *other == vip);
        let wrong = twin
            .filter(|_| {
                !self.is_tainted(vip.into()) && !self.is_disputed(vip.into()) && !self.divided
            })
            .map(|(other, _)| format!("{name} and {other} both have {vip}"));
        self.services.insert(name.clone(), (host, vip));
        wrong
    }

    /// A host's endpoints.
    pub fn of_host(&self, host: usize) -> Vec<EndpointId> {
        let own = self
            .endpoints
            .iter()
            .filter(|(_, (owner, _))| *owner == host);
        own.map(|(id, _)| *id).collect()
    }

    /// An address of network `default`.
    pub fn some_address(&self, random: &mut Random) -> Ipv4Addr {
        let size = 1_u64 << (32 - self.range.prefix_len() - 4);
        let offset = u32::try_from(random.range(size)).unwrap_or(0);
        Ipv4Addr::from(u32::from(self.range.network()) + offset)
    }

    /// A service that is there.
    pub fn some_service(&self, random: &mut Random) -> Option<Label> {
        let index = random.range(self.services.len() as u64) as usize;
        self.services.keys().nth(index).cloned()
    }

    /// Where the nodes that run show something else than was promised, now that all should agree.
    pub fn broken(
        &self,
        world: &mut World<Shell>,
        hosts: usize,
        dead: &BTreeSet<usize>,
    ) -> Vec<String> {
        let truth: BTreeMap<NodeId, usize> = (0..hosts)
            .filter_map(|host| Some((world.hosts[host].machine.as_ref()?.id(), host)))
            .collect();
        let mut lines = Vec::new();
        let mut digests = BTreeMap::new();
        let mut first: Option<(usize, View)> = None;
        for host in 0..hosts {
            let Some(shell) = world.hosts[host].machine.as_mut() else {
                if !dead.contains(&host) {
                    lines.push(format!("{host} is off"));
                }
                continue;
            };
            let Some(view) = shell.view() else {
                lines.push(format!("{host} is no member: {:?}", shell.failed));
                continue;
            };
            digests.insert(host, shell.digest());
            self.check_members(host, &view, &truth, &mut lines);
            self.check_endpoints(host, &view, &truth, &mut lines);
            self.check_services(host, &view, dead, &mut lines);
            check_ring(host, shell, &view, &mut lines);
            match &first {
                None => first = Some((host, view)),
                Some((one, other)) => self.compare((*one, other), (host, &view), &mut lines),
            }
        }
        let values: BTreeSet<_> = digests.values().collect();
        if values.len() > 1 {
            lines.push(format!("digests differ: {digests:x?}"));
            lines.extend(where_they_differ(world, hosts));
        }
        lines
    }

    fn check_members(
        &self,
        host: usize,
        view: &View,
        truth: &BTreeMap<NodeId, usize>,
        lines: &mut Vec<String>,
    ) {
        for member in &view.members {
            let lives = truth.contains_key(&member.id);
            if lives != (member.liveness == Liveness::Alive) {
                let (name, seen) = (&member.name, member.liveness);
                lines.push(format!("{host} sees {name} {seen:?}, it lives: {lives}"));
            }
        }
        let missing = truth.iter().filter(|(id, _)| view.member(id).is_none());
        lines.extend(missing.map(|(_, other)| format!("{host} does not know {other}")));
    }

    /// What lives and was promised is shown, what is dead is hidden, and nothing else is there.
    fn check_endpoints(
        &self,
        host: usize,
        view: &View,
        truth: &BTreeMap<NodeId, usize>,
        lines: &mut Vec<String>,
    ) {
        let shown: BTreeMap<EndpointId, Ipv4Addr> = view
            .endpoints
            .iter()
            .filter(|endpoint| !self.is_tainted(endpoint.ip.into()))
            .filter(|endpoint| {
                !self.liars.contains(&endpoint.node) || self.endpoints.contains_key(&endpoint.id)
            })
            .map(|endpoint| (endpoint.id, endpoint.ip))
            .collect();
        let living: BTreeSet<usize> = truth.values().copied().collect();
        let promised: BTreeMap<EndpointId, Ipv4Addr> = self
            .endpoints
            .iter()
            .filter(|(_, (owner, ip))| living.contains(owner) && !self.is_tainted((*ip).into()))
            .map(|(id, (_, ip))| (*id, *ip))
            .collect();
        let missing = promised
            .iter()
            .filter(|(id, ip)| shown.get(*id) != Some(*ip));
        lines.extend(missing.map(|(id, ip)| format!("{host} does not show {id} at {ip}")));
        let extra = shown.iter().filter(|(id, _)| !promised.contains_key(*id));
        lines
            .extend(extra.map(|(id, ip)| format!("{host} shows {id} at {ip}, which is not there")));
        // In a small range there may be none to have instead.
        let crowded = self.is_small() && !self.is_quiet();
        let excused = crowded || self.lying.contains(&host);
        let me = view.member(&view.me).filter(|_| !excused);
        lines.extend(me.into_iter().flat_map(|me| {
            let own = view.endpoints.iter().filter(|e| e.node == me.id);
            let foreign = own.filter(|e| !me.prefixes.iter().any(|net| net.contains(&e.ip)));
            foreign.map(|e| format!("{host} still has {} in another's part", e.ip))
        }));
        let addresses: BTreeSet<Ipv4Addr> = shown.values().copied().collect();
        if addresses.len() != shown.len() {
            lines.push(format!("{host} shows one address twice"));
        }
    }

    fn check_services(
        &self,
        host: usize,
        view: &View,
        dead: &BTreeSet<usize>,
        lines: &mut Vec<String>,
    ) {
        // What its maker took to the grave before it told anybody is nobody's fault.
        for (name, (_, vip)) in self
            .services
            .iter()
            .filter(|(name, (by, _))| !dead.contains(by) && !self.is_loose(name))
        {
            let shown = view.services.iter().find(|service| service.name == *name);
            if shown.map(|service| service.vip) != Some(*vip) {
                lines.push(format!("{host} does not show {name} at {vip}"));
            }
        }
        let mut vips = BTreeMap::new();
        let services = view.services.iter();
        for service in services.filter(|service| !self.is_tainted(service.vip.into())) {
            if let Some(twin) = vips.insert(service.vip, &service.name) {
                let (name, vip) = (&service.name, service.vip);
                lines.push(format!("{host} shows {name} and {twin} at {vip}"));
            }
        }
    }

    fn compare(
        &self,
        (one, a): (usize, &View),
        (other, b): (usize, &View),
        lines: &mut Vec<String>,
    ) {
        let crowded = self.is_small() && !self.is_quiet();
        // What a liar claims to have it shows itself, for a while.
        let excused = crowded || [one, other].iter().any(|host| self.lying.contains(host));
        let owned = |view: &View| -> Vec<(NodeId, Vec<Ipv4Net>)> {
            view.members
                .iter()
                .map(|member| (member.id, member.prefixes.clone()))
                .collect()
        };
        let differences = [
            (
                "endpoints",
                difference(&a.endpoints, &b.endpoints).filter(|_| !excused),
            ),
            ("services", difference(&a.services, &b.services)),
            ("names", difference(&a.names, &b.names)),
            ("owners", difference(&owned(a), &owned(b))),
        ];
        for (what, difference) in differences {
            if let Some(difference) = difference {
                lines.push(format!(
                    "{one} and {other} show different {what}: {difference}"
                ));
            }
        }
    }

    fn is_small(&self) -> bool {
        self.range.prefix_len() > 16
    }
}

/// Which logs and chains the nodes know differently.
fn where_they_differ(world: &World<Shell>, hosts: usize) -> Vec<String> {
    let mut known: Vec<(usize, &Shell)> =
        world.running().filter(|(host, _)| *host < hosts).collect();
    let Some((one, first)) = known.pop() else {
        return Vec::new();
    };
    let states = |shell: &Shell| Some(shell.node().catalog()?.writer_state());
    let heads = |shell: &Shell| Some(shell.node().roster()?.heads());
    let mut lines = Vec::new();
    for (other, shell) in known {
        for (writer, a) in states(first).into_iter().flatten() {
            let b = states(shell).and_then(|states| states.get(&writer).copied());
            if b != Some(a) {
                lines.push(format!(
                    "of {writer}: {one} knows {a:x?}, {other} knows {b:x?}"
                ));
            }
        }
        for (issuer, a) in heads(first).into_iter().flatten() {
            let b = heads(shell).and_then(|heads| heads.get(&issuer).copied());
            if b != Some(a) {
                lines.push(format!(
                    "of {issuer}'s chain: {one} knows {a:x?}, {other} knows {b:x?}"
                ));
            }
        }
    }
    lines
}

/// Every address outside the VIPs has exactly one owner.
fn check_ring(host: usize, shell: &Shell, view: &View, lines: &mut Vec<String>) {
    let grants = |ip: u32| shell.node().catalog().map(|catalog| history(catalog, ip));
    let mut parts: Vec<(u64, u64)> = view
        .members
        .iter()
        .flat_map(|member| &member.prefixes)
        .map(|net| {
            (
                u64::from(u32::from(net.network())),
                u64::from(u32::from(net.broadcast())),
            )
        })
        .collect();
    parts.sort_unstable();
    let mut next = u64::from(u32::from(view.plan.range.network()));
    for (start, last) in parts {
        if start != next {
            let at = Ipv4Addr::from(start.min(next) as u32);
            let what = if start > next {
                "nobody owns"
            } else {
                "two own"
            };
            let grants = grants(at.into());
            lines.push(format!("{host}: {what} {at}: {grants:?}"));
        }
        next = last + 1;
    }
    if next != u64::from(u32::from(view.plan.vips().network())) {
        lines.push(format!(
            "{host}: nobody owns {}",
            Ipv4Addr::from(next as u32)
        ));
    }
}

/// The first thing that only one of two lists has.
fn difference<T: PartialEq + fmt::Debug>(a: &[T], b: &[T]) -> Option<String> {
    let only = |here: &[T], there: &[T]| {
        let first = here.iter().find(|thing| !there.contains(thing));
        first.map(|thing| format!("{thing:?}"))
    };
    match (only(a, b), only(b, a)) {
        (None, None) => (a != b).then(|| "another order".to_owned()),
        (first, second) => Some(format!("{first:?}, {second:?}")),
    }
}
