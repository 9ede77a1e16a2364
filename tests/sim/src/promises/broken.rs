//! Where nodes show something else than was promised, now that all should agree.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use weft_core::model::{EndpointId, NodeId};
use weft_core::roster::{Roster, Standing};
use weft_core::view::{Liveness, View};

use super::Ledger;
use crate::nodes::Shell;
use crate::watch::history;
use crate::world::World;

impl Ledger {
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
            .filter(|endpoint| !self.is_tainted(endpoint.ip))
            .filter(|endpoint| {
                !self.liars.contains(&endpoint.node) || self.endpoints.contains_key(&endpoint.id)
            })
            .map(|endpoint| (endpoint.id, endpoint.ip))
            .collect();
        let living: BTreeSet<usize> = truth.values().copied().collect();
        let promised: BTreeMap<EndpointId, Ipv4Addr> = self
            .endpoints
            .iter()
            .filter(|(_, (owner, ip))| living.contains(owner) && !self.is_tainted(*ip))
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
        // As many services as there are virtual addresses, or more, can come together; then some share one until others
        // have gone.
        let all = view.plan.vips().hosts();
        let usable = all.filter(|ip| *ip != view.plan.dns4());
        if view.services.len() >= usable.take(view.services.len() + 1).count() {
            return;
        }
        let mut vips = BTreeMap::new();
        let services = view.services.iter();
        for service in services.filter(|service| !self.is_tainted(service.vip)) {
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
    let forks = |shell: &Shell| {
        let forks = shell.node().roster().map(Roster::forks);
        let places = forks.into_iter().flatten().map(|f| (f.issuer, f.index));
        places.collect::<BTreeSet<_>>()
    };
    let mut lines = Vec::new();
    for (other, shell) in known {
        if forks(first) != forks(shell) {
            let both = [first, shell].map(forks);
            lines.push(format!("{one} and {other} know different forks: {both:?}"));
        }
        let (a, b) = (
            states(first).unwrap_or_default(),
            states(shell).unwrap_or_default(),
        );
        lines.extend(differing(&a, &b).map(|(writer, a, b)| {
            format!("of {writer}: {one} knows {a:x?}, {other} knows {b:x?}")
        }));
        let (a, b) = (
            heads(first).unwrap_or_default(),
            heads(shell).unwrap_or_default(),
        );
        lines.extend(differing(&a, &b).map(|(issuer, a, b)| {
            format!("of {issuer}'s chain: {one} knows {a:x?}, {other} knows {b:x?}")
        }));
    }
    lines
}

/// What two nodes know differently of anybody.
fn differing<'a, T: PartialEq>(
    a: &'a BTreeMap<NodeId, T>,
    b: &'a BTreeMap<NodeId, T>,
) -> impl Iterator<Item = (NodeId, Option<&'a T>, Option<&'a T>)> {
    let ids: BTreeSet<NodeId> = a.keys().chain(b.keys()).copied().collect();
    let both = ids.into_iter().map(|id| (id, a.get(&id), b.get(&id)));
    both.filter(|(_, a, b)| a != b)
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
            if start > next && wait_for_givers(shell, view, (next as u32, (start - 1) as u32)) {
                next = last + 1;
                continue;
            }
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

/// What went to somebody whom nobody knows any more its giver takes back, once it is back itself or is removed. Does all of
/// this interval wait for that?
fn wait_for_givers(shell: &Shell, view: &View, (mut at, last): (u32, u32)) -> bool {
    let node = shell.node();
    let (Some(ring), Some(catalog), Some(roster)) = (node.ring(), node.catalog(), node.roster())
    else {
        return false;
    };
    let gifts = catalog.grants();
    let is_down = |id: &NodeId| {
        let member = view.member(id);
        member.is_some_and(|member| member.liveness == Liveness::Down)
    };
    while at <= last {
        let owner = ring.owner(at.into());
        let stranger = owner.filter(|id| roster.standing(id) == Standing::Unknown);
        let parts = stranger.map_or_else(Vec::new, |id| ring.parts(&id));
        let Some((_, end)) = parts
            .into_iter()
            .find(|(start, end)| (*start..=*end).contains(&at))
        else {
            return false;
        };
        let mut gifts = gifts.iter().filter(|(_, grant)| {
            (grant.start..=grant.last).contains(&at) && Some(grant.to) == stranger
        });
        if !gifts.any(|(giver, _)| is_down(giver)) {
            return false;
        }
        at = end + 1;
    }
    true
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
