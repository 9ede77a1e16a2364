//! What the cluster's own names stand for: a pure function of the view.
//!
//! | name | answer |
//! |---|---|
//! | `NAME.weft.internal`, `NAME` | the VIP of the service so named; else all endpoints so named in the asker's network (hosts see all), shuffled; else what a person bound it to |
//! | `NODE.node.weft.internal` | the overlay address of that host |
//! | `dns.weft.internal` | the DNS address |
//! | reverse names of the range and of the cluster's IPv6 prefix | the service, host or first name of the endpoint |
//! | `localhost` | loopback (RFC 6761 §6.3) |
//!
//! A name of one label that isn't known does not exist: it is never forwarded, because what people type as a short name
//! is nobody else's business. Only questions about top-level domains as such (NS, SOA, DS, DNSKEY) are.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use weft_core::model::{AddressPlan, NetworkName, NodeId};
use weft_core::view::{Endpoint, EndpointKind, Liveness, View};

use crate::arpa::{self, Spot};

/// The domain of all names.
pub const DOMAIN: &str = "weft.internal";
/// Seconds that answers, negative ones too, may be kept: names move with containers.
pub const TTL: u32 = 5;
/// Most addresses of one family in an answer: they must fit in a TCP message.
const MAX_ADDRESSES: usize = 1000;

/// The record types that the zone tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IPv4 address.
    A,
    /// IPv6 address.
    Aaaa,
    /// Name of an address.
    Ptr,
    /// Start of a zone.
    Soa,
    /// Name server of a zone.
    Ns,
    /// Keys and signers of a zone: DS, DNSKEY.
    Delegation,
    /// Whatever there is.
    Any,
    /// Any other type: none of our names has one.
    Other,
}

/// One record's data.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Data {
    /// IPv4 address.
    A(Ipv4Addr),
    /// IPv6 address.
    Aaaa(Ipv6Addr),
    /// A name, without the last dot.
    Ptr(String),
    /// The zone's SOA.
    Soa,
    /// The zone's name server: `dns.weft.internal`.
    Ns,
}

/// What the zone says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These, at least one.
    Found(Vec<Data>),
    /// The name exists without such records (NOERROR). With the zone whose SOA goes with it.
    NoData(Option<String>),
    /// There is no such name (NXDOMAIN).
    NoName(Option<String>),
    /// Not ours: ask the host's resolvers.
    Forward,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Addresses {
    v4: BTreeSet<Ipv4Addr>,
    v6: BTreeSet<Ipv6Addr>,
}

/// Whose endpoints an asker sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Those of all networks: the asker is a host.
    All,
    /// Those of one network. `None` is a container whose network was removed.
    Network(Option<NetworkName>),
}

impl Sight {
    fn sees(&self, network: &NetworkName) -> bool {
        match self {
            Sight::All => true,
            Sight::Network(own) => own.as_ref() == Some(network),
        }
    }
}

/// Names that one kind of owner has given.
type Names = BTreeMap<String, Addresses>;

/// All names of one view, indexed.
#[derive(Clone, Debug)]
pub struct Zone {
    plan: AddressPlan,
    revision: u64,
    /// Ours, and the services'.
    strong: Names,
    /// The endpoints', by name and network.
    endpoints: BTreeMap<String, BTreeMap<NetworkName, Addresses>>,
    /// Those that people bound.
    manual: Names,
    nodes: Names,
    /// With the network of an endpoint.
    reverse: BTreeMap<IpAddr, (String, Option<NetworkName>)>,
    networks: Vec<(NetworkName, Vec<Ipv4Net>)>,
    hosts: BTreeSet<Ipv4Addr>,
}

impl Zone {
    /// Indexes a view. Without IPv6 in the domain no AAAA is given for overlay addresses: they would lead nowhere.
    pub fn new(view: &View, ipv6: bool) -> Self {
        let mut zone = Self {
            plan: view.plan,
            revision: view.revision,
            strong: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            manual: BTreeMap::new(),
            nodes: BTreeMap::new(),
            reverse: BTreeMap::new(),
            networks: networks(view),
            hosts: hosts(view).map(|e| e.ip).collect(),
        };
        let own = |ip: Ipv4Addr| Addresses {
            v4: BTreeSet::from([ip]),
            v6: ipv6.then(|| view.plan.v6(ip)).into_iter().collect(),
        };
        zone.add_fixed(own(view.plan.dns4()));
        // From the strongest claim on a name to the weakest.
        zone.add_services(view, &own);
        zone.add_endpoints(view, &own);
        zone.add_manual(view);
        zone.add_nodes(view, &own);
        zone
    }

    /// Revision of the view it was made from.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What an asker with this address sees.
    pub fn sight(&self, asker: IpAddr) -> Sight {
        let ip = match asker.to_canonical() {
            IpAddr::V4(ip) => Some(ip).filter(|ip| self.plan.range.contains(ip)),
            IpAddr::V6(ip) => self.plan.v4_of(ip),
        };
        // Nobody else's containers ask here: what has no address of the overlay is this host.
        let Some(ip) = ip.filter(|ip| !self.hosts.contains(ip)) else {
            return Sight::All;
        };
        let own = |(_, blocks): &&(_, Vec<Ipv4Net>)| blocks.iter().any(|net| net.contains(&ip));
        let network = self.networks.iter().find(own);
        Sight::Network(network.map(|(name, _)| name.clone()))
    }

    /// Answers for a name (its labels, the leftmost first, in any case). Addresses come in an order drawn from `seed`.
    pub fn answer(&self, sight: &Sight, labels: &[&[u8]], kind: Kind, seed: u64) -> Answer {
        // No name of ours, reverse ones included, has more labels than 32 nibbles and two.
        let labels: Vec<String> = labels
            .iter()
            .map(|l| String::from_utf8_lossy(l).to_ascii_lowercase())
            .collect();
        let parts: Vec<&str> = labels.iter().map(String::as_str).collect();
        match parts.as_slice() {
            [] => Answer::Forward,
            [.., "localhost"] => localhost(kind),
            ["internal"] => Answer::NoData(None),
            [below @ .., "weft", "internal"] => self.inside(sight, below, kind, seed),
            [name] => self.short(sight, name, kind, seed),
            _ => self.reverse(sight, &labels, kind),
        }
    }

    /// From the strongest claim on a name to the weakest.
    fn find(&self, sight: &Sight, name: &str) -> Option<Cow<'_, Addresses>> {
        if let Some(addresses) = self.strong.get(name) {
            return Some(Cow::Borrowed(addresses));
        }
        let mut seen = Addresses::default();
        for (network, addresses) in self.endpoints.get(name).into_iter().flatten() {
            if sight.sees(network) {
                seen.extend(addresses.clone());
            }
        }
        match seen.v4.is_empty() {
            true => self.manual.get(name).map(Cow::Borrowed),
            false => Some(Cow::Owned(seen)),
        }
    }

    fn inside(&self, sight: &Sight, below: &[&str], kind: Kind, seed: u64) -> Answer {
        let apex = Some(DOMAIN.to_owned());
        let found = match below {
            [] => return at_apex(kind, apex),
            [name] => self.find(sight, name),
            [name, "node"] => self.nodes.get(*name).map(Cow::Borrowed),
            _ => None,
        };
        match found {
            Some(addresses) => addresses.records(kind, seed, apex),
            None if matches!(below, ["node"]) => Answer::NoData(apex),
            None => Answer::NoName(apex),
        }
    }

    fn short(&self, sight: &Sight, name: &str, kind: Kind, seed: u64) -> Answer {
        match self.find(sight, name) {
            Some(addresses) => addresses.records(kind, seed, None),
            None if matches!(kind, Kind::Ns | Kind::Soa | Kind::Delegation) => Answer::Forward,
            None => Answer::NoName(None),
        }
    }

    fn reverse(&self, sight: &Sight, labels: &[String], kind: Kind) -> Answer {
        let Some(place) = arpa::locate(labels, &self.plan) else {
            return Answer::Forward;
        };
        let apex = Some(place.apex);
        let name = match place.spot {
            Spot::Apex => return at_apex(kind, apex),
            Spot::Prefix => return Answer::NoData(apex),
            Spot::Nothing => None,
            Spot::Address(ip) => {
                let found = self.reverse.get(&ip);
                let seen = |network: &Option<_>| network.as_ref().is_none_or(|n| sight.sees(n));
                found
                    .filter(|(_, network)| seen(network))
                    .map(|(name, _)| name)
            }
        };
        match (name, kind) {
            (None, _) => Answer::NoName(apex),
            (Some(name), Kind::Ptr | Kind::Any) => Answer::Found(vec![Data::Ptr(name.clone())]),
            (Some(_), _) => Answer::NoData(apex),
        }
    }

    fn add_fixed(&mut self, dns: Addresses) {
        self.name_addresses(&dns, format!("dns.{DOMAIN}"), None);
        self.strong.insert("dns".to_owned(), dns);
    }

    fn add_services(&mut self, view: &View, own: &dyn Fn(Ipv4Addr) -> Addresses) {
        for service in &view.services {
            let addresses = own(service.vip);
            self.name_addresses(&addresses, format!("{}.{DOMAIN}", service.name), None);
            let name = service.name.as_str().to_owned();
            self.strong.entry(name).or_insert(addresses);
        }
    }

    /// Endpoints of silent nodes are left out of a name while others answer.
    fn add_endpoints(&mut self, view: &View, own: &dyn Fn(Ipv4Addr) -> Addresses) {
        let alive: BTreeSet<NodeId> = view
            .members
            .iter()
            .filter(|m| m.liveness == Liveness::Alive)
            .map(|m| m.id)
            .collect();
        let mut by_name: BTreeMap<(&str, &NetworkName), Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in containers(view) {
            if let Some(first) = endpoint.names.first() {
                let network = Some(endpoint.network.clone());
                self.name_addresses(&own(endpoint.ip), format!("{first}.{DOMAIN}"), network);
            }
            for name in &endpoint.names {
                let place = (name.as_str(), &endpoint.network);
                by_name.entry(place).or_default().push(endpoint);
            }
        }
        for ((name, network), endpoints) in by_name {
            let any_alive = endpoints.iter().any(|e| alive.contains(&e.node));
            let mut all = Addresses::default();
            for endpoint in endpoints {
                if !any_alive || alive.contains(&endpoint.node) {
                    all.extend(own(endpoint.ip));
                }
            }
            let networks = self.endpoints.entry(name.to_owned()).or_default();
            networks.insert(network.clone(), all);
        }
    }

    fn add_manual(&mut self, view: &View) {
        let mut manual: BTreeMap<&str, Addresses> = BTreeMap::new();
        for bound in &view.names {
            let addresses = manual.entry(bound.name.as_str()).or_default();
            match bound.ip {
                IpAddr::V4(ip) => addresses.v4.insert(ip),
                IpAddr::V6(ip) => addresses.v6.insert(ip),
            };
        }
        for (name, addresses) in manual {
            self.name_addresses(&addresses, format!("{name}.{DOMAIN}"), None);
            self.manual.insert(name.to_owned(), addresses);
        }
    }

    /// Two nodes may share a name: then it stands for both.
    fn add_nodes(&mut self, view: &View, own: &dyn Fn(Ipv4Addr) -> Addresses) {
        for endpoint in hosts(view) {
            let Some(member) = view.member(&endpoint.node) else {
                continue;
            };
            let addresses = own(endpoint.ip);
            self.name_addresses(&addresses, format!("{}.node.{DOMAIN}", member.name), None);
            let name = member.name.as_str().to_owned();
            self.nodes.entry(name).or_default().extend(addresses);
        }
    }

    /// The reverse names; the first claim on an address stays.
    fn name_addresses(
        &mut self,
        addresses: &Addresses,
        name: String,
        network: Option<NetworkName>,
    ) {
        let v4 = addresses.v4.iter().map(|ip| IpAddr::V4(*ip));
        for ip in v4.chain(addresses.v6.iter().map(|ip| IpAddr::V6(*ip))) {
            let entry = self.reverse.entry(ip);
            entry.or_insert_with(|| (name.clone(), network.clone()));
        }
    }
}

impl Addresses {
    fn extend(&mut self, other: Addresses) {
        self.v4.extend(other.v4);
        self.v6.extend(other.v6);
    }

    fn records(&self, kind: Kind, seed: u64, apex: Option<String>) -> Answer {
        let v4 = || shuffled(self.v4.iter().map(|ip| Data::A(*ip)), seed);
        let v6 = || shuffled(self.v6.iter().map(|ip| Data::Aaaa(*ip)), seed);
        let found = match kind {
            Kind::A => v4(),
            Kind::Aaaa => v6(),
            Kind::Any => v4().into_iter().chain(v6()).collect(),
            _ => Vec::new(),
        };
        if found.is_empty() {
            Answer::NoData(apex)
        } else {
            Answer::Found(found)
        }
    }
}

fn hosts(view: &View) -> impl Iterator<Item = &Endpoint> {
    view.endpoints
        .iter()
        .filter(|e| e.kind == EndpointKind::Host)
}

fn networks(view: &View) -> Vec<(NetworkName, Vec<Ipv4Net>)> {
    let networks = view.networks.iter();
    networks
        .map(|network| (network.name.clone(), network.blocks().collect()))
        .collect()
}

fn containers(view: &View) -> impl Iterator<Item = &Endpoint> {
    view.endpoints
        .iter()
        .filter(|e| e.kind == EndpointKind::Container)
}

fn at_apex(kind: Kind, apex: Option<String>) -> Answer {
    match kind {
        Kind::Soa => Answer::Found(vec![Data::Soa]),
        Kind::Ns => Answer::Found(vec![Data::Ns]),
        Kind::Any => Answer::Found(vec![Data::Soa, Data::Ns]),
        _ => Answer::NoData(apex),
    }
}

fn localhost(kind: Kind) -> Answer {
    let (v4, v6) = (
        Data::A(Ipv4Addr::LOCALHOST),
        Data::Aaaa(Ipv6Addr::LOCALHOST),
    );
    match kind {
        Kind::A => Answer::Found(vec![v4]),
        Kind::Aaaa => Answer::Found(vec![v6]),
        Kind::Any => Answer::Found(vec![v4, v6]),
        _ => Answer::NoData(None),
    }
}

/// Fisher and Yates, from a seed: equal seeds give equal orders.
fn shuffled(items: impl Iterator<Item = Data>, mut seed: u64) -> Vec<Data> {
    let mut items: Vec<Data> = items.collect();
    for last in (1..items.len()).rev() {
        seed = mix(seed);
        items.swap(last, (seed % (last as u64 + 1)) as usize);
    }
    items.truncate(MAX_ADDRESSES);
    items
}

/// SplitMix64's finalizer (Steele et al., OOPSLA 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
