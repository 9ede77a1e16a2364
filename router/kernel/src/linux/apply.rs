//! Reads what one namespace holds in the plan's words and makes the steps between.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::sys::socket::SockProtocol;
use weft_core::layout::{HOST_LEG, HOST_TABLE, LEG_PREFIX, VXLAN_CARRIERS};

use super::raw::RawSocket;
use super::rtnl::{Link, Rtnl};
use super::{nexthop, sysctl};
use crate::diff::{Op, diff};
use crate::error::{Doing, KernelError, Result};
use crate::state::{Family, Kernel, Route, Via};

/// So often at most one reconciliation looks at what is there.
const MAX_PASSES: usize = 10;

/// What a reconciliation did.
#[derive(Debug, Default)]
pub struct Report {
    /// How many things were put, replaced or removed; 0 when all was as planned.
    pub changes: usize,
    /// Devices of the plan that are not there, or have no carrier: what stands on them was left out.
    pub absent: BTreeSet<String>,
    /// Steps that failed; the others were made all the same, and the next reconciliation tries again.
    pub failures: Vec<KernelError>,
}

/// Which namespace the plan is for: it decides what in there is weft's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Domain,
    Host,
}

/// Sockets into the calling thread's namespace.
pub(crate) struct Namespace {
    pub(crate) rtnl: Rtnl,
    raw: RawSocket,
}

impl Namespace {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self {
            rtnl: Rtnl::open()?,
            raw: RawSocket::open(SockProtocol::NetlinkRoute)?,
        })
    }

    /// Brings the namespace to the plan. A container may end at any moment, and its devices with it: where a step failed
    /// while devices came or went, all is looked at once more.
    pub(crate) fn reconcile(&self, wanted: &Kernel, place: Place) -> Result<Report> {
        let list = || self.rtnl.links().doing(|| "list the devices".into());
        let mut links = list()?;
        let mut report = self.pass(wanted, place, &links)?;
        for _ in 1..MAX_PASSES {
            if report.failures.is_empty() {
                break;
            }
            let now = list()?;
            if usable(&now) == usable(&links) {
                break;
            }
            links = now;
            let changes = report.changes;
            report = self.pass(wanted, place, &links)?;
            report.changes += changes;
        }
        Ok(report)
    }

    fn pass(&self, wanted: &Kernel, place: Place, links: &[Link]) -> Result<Report> {
        let present = usable(links);
        let wanted_here = wanted.on_devices(&present);
        let observed = self
            .observe(links, &wanted_here, place)
            .doing(|| "read routes, rules, neighbours and addresses".into())?;
        let ops = diff(&wanted_here, &observed);
        let mut report = Report {
            absent: devices(wanted)
                .into_iter()
                .filter(|d| !present.contains(d))
                .collect(),
            ..Report::default()
        };
        self.apply(&ops, links, &mut report);
        Ok(report)
    }

    /// Puts all of `wanted` and removes nothing: for a leg in the making.
    pub(crate) fn put(&self, wanted: &Kernel) -> Result<()> {
        let links = self.rtnl.links().doing(|| "list the devices".into())?;
        let mut report = Report::default();
        self.apply(&diff(wanted, &Kernel::default()), &links, &mut report);
        report.failures.into_iter().next().map_or(Ok(()), Err)
    }

    fn apply(&self, ops: &[Op], links: &[Link], report: &mut Report) {
        let indices: BTreeMap<&str, u32> =
            links.iter().map(|l| (l.name.as_str(), l.index)).collect();
        for op in ops {
            match self.step(op, &indices) {
                Ok(()) => report.changes += 1,
                Err(source) => report.failures.push(KernelError::System {
                    doing: op.to_string(),
                    source,
                }),
            }
        }
    }

    fn step(&self, op: &Op, indices: &BTreeMap<&str, u32>) -> io::Result<()> {
        let index = |name: &str| {
            let found = indices.get(name).copied();
            found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
        };
        let rtnl = &self.rtnl;
        match op {
            Op::AddAddress(device, net) => rtnl.add_address(index(device)?, *net),
            Op::DelAddress(device, net) => rtnl.delete_address(index(device)?, *net),
            Op::SetNeighbour(device, ip, mac) => rtnl.set_neighbour(index(device)?, *ip, *mac),
            Op::DelNeighbour(device, ip) => rtnl.delete_neighbour(index(device)?, *ip),
            Op::SetForwarding(device, mac, to) => rtnl.set_forwarding(index(device)?, *mac, *to),
            Op::DelForwarding(device, mac) => rtnl.delete_forwarding(index(device)?, *mac),
            Op::SetNextHop(id, hop) => nexthop::set(&self.raw, *id, hop, index(&hop.device)?),
            Op::DelNextHop(id) => nexthop::delete(&self.raw, *id),
            Op::SetRoute(key, route) => {
                rtnl.set_route(key, route, device_of(route).map(index).transpose()?)
            }
            Op::DelRoute(key) => rtnl.delete_route(key),
            Op::AddRule(rule) => rtnl.add_rule(rule),
            Op::DelRule(rule) => rtnl.delete_rule(rule),
        }
    }

    fn observe(&self, links: &[Link], wanted: &Kernel, place: Place) -> io::Result<Kernel> {
        let names: BTreeMap<u32, String> =
            links.iter().map(|l| (l.index, l.name.clone())).collect();
        let mut kernel = Kernel {
            next_hops: match place {
                Place::Domain => nexthop::list(&self.raw, |i| names.get(&i).cloned())?,
                Place::Host => BTreeMap::new(),
            },
            ..Kernel::default()
        };
        let families: &[Family] = if sysctl::ipv6_available() {
            &[Family::V4, Family::V6]
        } else {
            &[Family::V4]
        };
        for family in families {
            kernel.rules.extend(self.rtnl.rules(*family)?);
            let routes = self.rtnl.routes(*family)?;
            kernel.routes.extend(
                routes
                    .iter()
                    .filter(|r| r.is_ours() && (place == Place::Domain || r.table == HOST_TABLE))
                    .filter_map(|r| r.planned(&names)),
            );
        }
        kernel.routes.retain(|key, route| {
            wanted.routes.contains_key(key) || device_of(route).is_none_or(|d| !is_leg(d))
        });
        for (index, ip, mac) in self.rtnl.neighbours()? {
            let Some(name) = names.get(&index) else {
                continue;
            };
            let key = (name.clone(), ip);
            if wanted.neighbours.contains_key(&key) || is_ours(name, place) {
                kernel.neighbours.insert(key, mac);
            }
        }
        if place == Place::Domain
            && links
                .iter()
                .any(|link| VXLAN_CARRIERS.contains(&link.name.as_str()))
        {
            let entries = self.rtnl.forwarding()?.into_iter();
            let named = entries
                .filter_map(|(index, mac, to)| Some(((names.get(&index)?.clone(), mac), to)));
            kernel.forwarding.extend(named);
        }
        for address in self.rtnl.addresses()? {
            let Some(name) = names.get(&address.device) else {
                continue;
            };
            let key = (name.clone(), address.net);
            let removable = is_ours(name, place) && !made_by_kernel(address.net.addr());
            if wanted.addresses.contains(&key) || removable {
                kernel.addresses.insert(key);
            }
        }
        Ok(kernel)
    }
}

/// May a neighbour or address on this device be removed because the plan has it not? Never on a leg: it may be in the
/// making and the plan too old to know it; and all that is on it goes when it goes.
fn is_ours(device: &str, place: Place) -> bool {
    match place {
        Place::Domain => !is_leg(device),
        Place::Host => device == HOST_LEG,
    }
}

fn is_leg(device: &str) -> bool {
    device.starts_with(LEG_PREFIX)
}

/// Loopback's own and automatic link-local addresses.
fn made_by_kernel(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

fn device_of(route: &Route) -> Option<&str> {
    match &route.via {
        Via::Device(device) | Via::Gateway(_, device) => Some(device),
        Via::NextHop(_) | Via::Unreachable | Via::Blackhole => None,
    }
}

/// Loopback needs no carrier; the others are of no use to routes without.
fn usable(links: &[Link]) -> BTreeSet<String> {
    links
        .iter()
        .filter(|l| l.carrier || l.loopback)
        .map(|l| l.name.clone())
        .collect()
}

fn devices(kernel: &Kernel) -> BTreeSet<String> {
    let hops = kernel.next_hops.values().map(|h| h.device.as_str());
    let routes = kernel.routes.values().filter_map(device_of);
    let neighbours = kernel.neighbours.keys().map(|k| k.0.as_str());
    let addresses = kernel
        .addresses
        .iter()
        .map(|a: &(String, IpNet)| a.0.as_str());
    hops.chain(routes)
        .chain(neighbours)
        .chain(addresses)
        .map(str::to_owned)
        .collect()
}

/// Sets switches in the calling thread's namespace.
pub(crate) fn set_sysctls(sysctls: &[(String, String)], report: &mut Report) {
    for (name, value) in sysctls {
        match sysctl::ensure(name, value) {
            Ok(wrote) => report.changes += usize::from(wrote),
            Err(source) => report.failures.push(KernelError::System {
                doing: format!("set {name} to {value}"),
                source,
            }),
        }
    }
}
