//! Legs: the veth pairs by which containers stand on the domain.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weft_core::layout::{DEVICE_MTU, GATEWAY_MAC, GATEWAY4, GATEWAY6, LEG_PREFIX, container_mac};
use weft_core::model::{AddressPlan, EndpointId};

use super::apply::Namespace;
use super::domain::Domain;
use super::netns::inside;
use super::rtnl::{Rtnl, VethEnd};
use super::sysctl;
use crate::error::{Doing, KernelError, Result};
use crate::plan::{LocalLeg, METRIC_ROUTE, leg_name, plan_leg};
use crate::state::{MAIN_TABLE, Route, RouteKey, Via};

/// What to attach.
#[derive(Clone, Copy, Debug)]
pub struct LegSpec<'a> {
    /// The endpoint.
    pub id: EndpointId,
    /// Its address; MAC and IPv6 address follow from it.
    pub ip: Ipv4Addr,
    /// The container's namespace ([`crate::open_netns`]).
    pub target: BorrowedFd<'a>,
    /// The interface's name inside.
    pub ifname: &'a str,
    /// The cluster's addresses.
    pub addresses: &'a AddressPlan,
}

/// What an attachment got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedLeg {
    /// The leg's name in the domain.
    pub leg: String,
    /// MAC of the interface inside.
    pub mac: [u8; 6],
    /// The IPv6 address inside; `None` where the kernel has no IPv6.
    pub ip6: Option<Ipv6Addr>,
    /// MTU of the interface inside.
    pub mtu: u32,
}

/// A leg found in the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegSeen {
    /// Its name ([`crate::leg_name`] of the endpoint).
    pub name: String,
    /// Both ends are up.
    pub carrier: bool,
}

impl Domain {
    /// Attaches a namespace: makes the pair, addresses, routes and permanent neighbours on both ends. Either all of it
    /// is there afterwards, or nothing.
    ///
    /// The domain's filter drops what the leg sends until it has been applied with this leg in
    /// [`crate::LocalFacts::legs`].
    pub fn attach(&self, spec: &LegSpec<'_>) -> Result<AttachedLeg> {
        check_ifname(spec.ifname)?;
        let leg = leg_name(&spec.id);
        let ipv6 = sysctl::ipv6_available();
        self.make_leg(spec, &leg)?;
        let attached = self
            .furnish_far_end(spec, &leg, ipv6)
            .and_then(|()| furnish_inside(spec, ipv6))
            .and_then(|()| self.finish_leg(spec, &leg, ipv6));
        if let Err(error) = attached {
            let _ = self.detach(&spec.id);
            return Err(error);
        }
        Ok(AttachedLeg {
            leg,
            mac: container_mac(spec.ip),
            ip6: ipv6.then(|| spec.addresses.v6(spec.ip)),
            mtu: DEVICE_MTU,
        })
    }

    fn make_leg(&self, spec: &LegSpec<'_>, leg: &str) -> Result<()> {
        let taken = in_target(spec, |ns| {
            ns.rtnl
                .link(spec.ifname)
                .doing(|| "list the container's devices".into())
        })?;
        if taken.is_some() {
            return Err(KernelError::InterfaceExists(spec.ifname.to_owned()));
        }
        let near = VethEnd {
            name: leg,
            mac: GATEWAY_MAC,
            namespace: None,
        };
        let far = VethEnd {
            name: spec.ifname,
            mac: container_mac(spec.ip),
            namespace: Some(spec.target),
        };
        self.with(|ns| {
            if ns.rtnl.link(leg).doing(|| format!("find {leg}"))?.is_some() {
                return Err(KernelError::Attached(spec.id));
            }
            ns.rtnl
                .add_veth(&near, &far, DEVICE_MTU)
                .doing(|| format!("make the leg {leg}"))
        })
    }

    /// Switches first, then up: so no router solicitation or automatic address ever shows.
    fn furnish_far_end(&self, spec: &LegSpec<'_>, leg: &str, ipv6: bool) -> Result<()> {
        self.with(|ns| {
            leg_switches(leg, ipv6).doing(|| format!("set the switches of {leg}"))?;
            up(&ns.rtnl, leg).doing(|| format!("set {leg} up for {}", spec.ip))?;
            Ok(())
        })
    }

    fn finish_leg(&self, spec: &LegSpec<'_>, leg: &str, ipv6: bool) -> Result<()> {
        let local = LocalLeg {
            id: spec.id,
            ip: spec.ip,
        };
        let wanted = plan_leg(spec.addresses, ipv6, &local);
        self.with(|ns| {
            ns.put(&wanted)?;
            ns.rtnl
                .wait_running(leg)
                .doing(|| format!("see {leg} running"))
        })?;
        in_target(spec, |ns| {
            ns.rtnl
                .wait_running(spec.ifname)
                .doing(|| format!("see {} running inside the container", spec.ifname))
        })?;
        tracing::debug!(leg, ip = %spec.ip, "attached");
        Ok(())
    }

    /// Removes a leg and with it the interface inside; that it is gone already is no error.
    pub fn detach(&self, id: &EndpointId) -> Result<()> {
        let leg = leg_name(id);
        self.with(|ns| {
            ns.rtnl
                .delete_link(&leg)
                .doing(|| format!("delete the leg {leg}"))
        })
    }

    /// Forgets the tracked connections of addresses that are gone, so that clients with the same ports are balanced
    /// anew. Returns how many there were.
    pub fn forget_connections(&self, gone: &[IpAddr]) -> Result<usize> {
        self.run(|| super::conntrack::forget(gone))?
            .doing(|| "forget the connections of what is gone".into())
    }

    /// All legs in the domain.
    pub fn legs(&self) -> Result<Vec<LegSeen>> {
        let links = self.with(|ns| ns.rtnl.links().doing(|| "list the legs".into()))?;
        Ok(links
            .into_iter()
            .filter(|l| l.name.starts_with(LEG_PREFIX))
            .map(|l| LegSeen {
                name: l.name,
                carrier: l.carrier,
            })
            .collect())
    }

    /// Is the attachment still as it was made, on both ends?
    pub fn check(&self, spec: &LegSpec<'_>) -> Result<()> {
        let broken = |missing| KernelError::Broken {
            id: spec.id,
            missing,
        };
        let leg = leg_name(&spec.id);
        let seen = self.with(|ns| ns.rtnl.link(&leg).doing(|| format!("find {leg}")))?;
        match seen {
            None => return Err(broken("its leg in the domain is gone")),
            Some(link) if !link.carrier => return Err(broken("its leg is down")),
            Some(_) => {}
        }
        in_target(spec, |ns| {
            let missing =
                check_inside(&ns.rtnl, spec).doing(|| "look into the container".into())?;
            missing.map_or(Ok(()), |missing| Err(broken(missing)))
        })
    }
}

fn check_ifname(name: &str) -> Result<()> {
    let fine = (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name != "lo"
        && name != "all"
        && name != "default"
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if fine {
        Ok(())
    } else {
        Err(KernelError::InterfaceName(name.to_owned()))
    }
}

fn in_target<T: Send>(
    spec: &LegSpec<'_>,
    work: impl FnOnce(&Namespace) -> Result<T> + Send,
) -> Result<T> {
    let doing = || "enter the container's namespace".to_owned();
    inside(spec.target.as_fd(), || {
        work(&Namespace::open().doing(|| "open netlink in the container".into())?)
    })
    .doing(doing)?
}

fn up(rtnl: &Rtnl, name: &str) -> io::Result<()> {
    match rtnl.link(name)? {
        Some(link) if link.up => Ok(()),
        Some(link) => rtnl.set_up(link.index),
        None => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    }
}

fn leg_switches(leg: &str, ipv6: bool) -> io::Result<()> {
    sysctl::ensure(&format!("net/ipv4/conf/{leg}/rp_filter"), "0")?;
    if ipv6 {
        inside_switches(leg)?;
    }
    Ok(())
}

/// A runtime may have switched IPv6 off for all interfaces of the container; on weft's own it is on, and no router is
/// believed.
fn inside_switches(ifname: &str) -> io::Result<()> {
    for (switch, value) in [
        ("disable_ipv6", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("accept_dad", "0"),
    ] {
        sysctl::ensure(&format!("net/ipv6/conf/{ifname}/{switch}"), value)?;
    }
    Ok(())
}

fn furnish_inside(spec: &LegSpec<'_>, ipv6: bool) -> Result<()> {
    in_target(spec, |ns| {
        furnish(&ns.rtnl, spec, ipv6).doing(|| {
            format!(
                "set up {} with {} inside the container",
                spec.ifname, spec.ip
            )
        })
    })
}

fn furnish(rtnl: &Rtnl, spec: &LegSpec<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        inside_switches(spec.ifname)?;
    }
    up(rtnl, "lo")?;
    up(rtnl, spec.ifname)?;
    let link = rtnl
        .link(spec.ifname)?
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    let plan = spec.addresses;
    let side = Inside {
        rtnl,
        ifname: spec.ifname,
        device: link.index,
    };
    let any: IpNet = Ipv4Net::default().into();
    side.family(spec.ip.into(), GATEWAY4.into(), any, plan.range.into())?;
    if ipv6 {
        let any: IpNet = Ipv6Net::default().into();
        let (ip, range) = (plan.v6(spec.ip), plan.range6());
        side.family(ip.into(), GATEWAY6.into(), any, range.into())?;
    }
    Ok(())
}

struct Inside<'a> {
    rtnl: &'a Rtnl,
    ifname: &'a str,
    device: u32,
}

impl Inside<'_> {
    fn family(&self, ip: IpAddr, gateway: IpAddr, any: IpNet, range: IpNet) -> io::Result<()> {
        self.rtnl.add_address(self.device, ip.into())?;
        self.rtnl.set_neighbour(self.device, gateway, GATEWAY_MAC)?;
        // The way to the gateway stands in the table for whoever reads it, and for `ip route get`.
        if gateway.is_ipv4() {
            self.route(gateway.into(), Via::Device(self.ifname.into()))?;
        }
        let via = Via::Gateway(gateway, self.ifname.into());
        match self.route(any, via.clone()) {
            // Another network of the container has the default route: it keeps it, and weft its range.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.route(range, via),
            other => other,
        }
    }

    fn route(&self, to: IpNet, via: Via) -> io::Result<()> {
        let key = RouteKey {
            table: MAIN_TABLE,
            to,
            metric: if to.addr().is_ipv4() { 0 } else { METRIC_ROUTE },
        };
        let route = Route {
            via,
            mtu: None,
            source: None,
        };
        self.rtnl.add_route(&key, &route, Some(self.device))
    }
}

fn check_inside(rtnl: &Rtnl, spec: &LegSpec<'_>) -> io::Result<Option<&'static str>> {
    let Some(link) = rtnl.link(spec.ifname)? else {
        return Ok(Some("its interface is gone"));
    };
    if link.mac != container_mac(spec.ip) {
        return Ok(Some("its interface has another MAC"));
    }
    let addresses = rtnl.addresses()?;
    let has = |ip: IpAddr| {
        addresses
            .iter()
            .any(|a| a.device == link.index && a.net.addr() == ip)
    };
    if !has(spec.ip.into()) {
        return Ok(Some("its address is gone"));
    }
    if sysctl::ipv6_available() && !has(spec.addresses.v6(spec.ip).into()) {
        return Ok(Some("its IPv6 address is gone"));
    }
    let routed = rtnl
        .routes(crate::state::Family::V4)?
        .iter()
        .any(|r| r.gateway == Some(GATEWAY4.into()) && r.device == Some(link.index));
    Ok((!routed).then_some("its route is gone"))
}
