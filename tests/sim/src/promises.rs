//! What was promised to whom.

mod broken;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use weft_core::crypto::Random;
use weft_core::model::{EndpointId, Label, NodeId, Now};
use weft_core::view::{ADDRESS_REST, Endpoint};

/// Addresses: the first and the last of each part.
#[derive(Default)]
struct Space(BTreeSet<(u32, u32)>);

impl Space {
    fn contains(&self, ip: Ipv4Addr) -> bool {
        let mut parts = self.0.iter();
        parts.any(|(start, last)| (*start..=*last).contains(&ip.into()))
    }
}

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
    tainted: Space,
    /// Space that people take by force: both sides of a split may, until they hear of each other.
    disputed: Space,
    forced: bool,
    /// Nodes that ran twice: either copy says what it knows.
    pub cloned: BTreeSet<NodeId>,
    /// Nodes that lied: they may show more than anybody was promised.
    pub liars: BTreeSet<NodeId>,
    /// Space that liars gave away and removed nodes had had: they may have taken it over by a lie.
    stolen: Space,
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
            tainted: Space::default(),
            stolen: Space::default(),
            disputed: Space::default(),
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
        self.tainted.0.extend(parts);
    }

    /// Does this address belong to a node that ran twice?
    pub fn is_tainted(&self, ip: Ipv4Addr) -> bool {
        self.tainted.contains(ip)
    }

    /// A liar gave this away, that a removed node had had.
    pub fn steal(&mut self, parts: impl IntoIterator<Item = (u32, u32)>) {
        self.stolen.0.extend(parts);
    }

    /// People begin to take this by force.
    pub fn dispute(&mut self, parts: impl IntoIterator<Item = (u32, u32)>) {
        self.disputed.0.extend(parts);
        self.forced = true;
    }

    /// Has nobody ever taken anything by force, and no node run twice?
    pub fn is_quiet(&self) -> bool {
        self.tainted.0.is_empty() && !self.forced
    }

    /// Both sides have heard of each other. What one of them freed at last the other one knows nothing of.
    pub fn settle(&mut self) {
        let disputed = std::mem::take(&mut self.disputed);
        self.released.retain(|ip, _| !disputed.contains(*ip));
    }

    /// Have people taken anything by force that may not be settled yet?
    pub fn in_dispute(&self) -> bool {
        !self.disputed.0.is_empty()
    }

    /// May two believe to own this for now?
    pub fn is_disputed(&self, ip: Ipv4Addr) -> bool {
        self.disputed.contains(ip)
    }

    /// Is nothing promised of this address for now?
    pub fn excuses(&self, ip: Ipv4Addr) -> bool {
        let disturbed = self.is_tainted(ip) || self.is_disputed(ip) || self.stolen.contains(ip);
        self.divided || disturbed
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
        if self.excuses(ip) || self.lying.contains(&host) {
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
            .filter(|_| !self.excuses(vip))
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

    fn is_small(&self) -> bool {
        self.range.prefix_len() > 16
    }
}
