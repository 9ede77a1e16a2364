//! From the view and the facts of this host to what its two namespaces should hold. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weft_core::layout::{
    GATEWAY_MAC, GATEWAY4, GATEWAY6, HOST_LEG, HOST_LEG_FAR, HOST_LEG_MAC, HOST_TABLE,
    IPV6_MIN_MTU, LEG_PREFIX, PEER_MARK_MASK, UDP_CARRIER, VXLAN_CARRIERS, container_mac,
    peer_link_local, peer_mac, peer_nexthop, peer_table, vxlan_carrier,
};
use weft_core::model::{AddressPlan, EndpointId};
use weft_core::view::{EndpointKind, Liveness, Member, PeerNumber, View, VxlanPeer};

use crate::state::{
    Family, Kernel, MAIN_PRIORITY, MAIN_TABLE, NextHop, Route, RouteKey, Rule, RuleAction,
    Selector, Via,
};

/// The host's address on the segment between domain and host: only a key for permanent neighbours, nobody owns it.
pub(crate) const HOST_GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);
/// The same for IPv6.
pub(crate) const HOST_GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Metric of a route that leads somewhere. IPv6 knows no 0, so that both families use this one.
pub(crate) const METRIC_ROUTE: u32 = 1024;
/// Metric of what is known to lead nowhere: a Down peer's prefixes, this host's own unused addresses.
pub(crate) const METRIC_NOWHERE: u32 = 2048;
/// Metric of the floor under the whole range: nothing of the mesh ever falls through to a default route.
pub(crate) const METRIC_FLOOR: u32 = 4096;

/// Priority of the guard: packets without a peer's mark skip the rules of all peers.
const GUARD_PRIORITY: u32 = 10_000;
/// Priority of a peer's rule is this plus its number.
const PEER_PRIORITY: u32 = 10_001;

/// IPv6 routes can't carry less (RFC 8200 §5).
const MIN_MTU6: u32 = IPV6_MIN_MTU as u32;

/// One attachment of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalLeg {
    /// Its endpoint.
    pub id: EndpointId,
    /// Its address; MAC and IPv6 address follow from it.
    pub ip: Ipv4Addr,
}

/// What the daemon knows about its own host beside the view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFacts {
    /// Attachments, those in the making included: the filter must know an address before its leg is up.
    pub legs: Vec<LocalLeg>,
    /// The host's own overlay address, once it has one.
    pub host_ip: Option<Ipv4Addr>,
    /// The kernel has IPv6 ([`crate::ipv6_available`]).
    pub ipv6: bool,
    /// The host's own resolvers: containers' queries to them are turned to weft's DNS, because runtimes add them to a
    /// container's `resolv.conf` and musl asks all it finds.
    pub resolvers: Vec<IpAddr>,
    /// A port is published on this host.
    pub published: bool,
    /// The devices of the `vxlan` carrier that are up behind its filter. By others nothing goes.
    pub vxlan: BTreeSet<&'static str>,
}

impl LocalFacts {
    /// The facts that the view itself holds: this node's endpoints and the host's own address.
    pub fn from_view(view: &View) -> Self {
        let mine = || view.endpoints.iter().filter(|e| e.node == view.me);
        LocalFacts {
            legs: mine()
                .filter(|e| e.kind == EndpointKind::Container)
                .map(|e| LocalLeg { id: e.id, ip: e.ip })
                .collect(),
            host_ip: mine().find(|e| e.kind == EndpointKind::Host).map(|e| e.ip),
            published: view
                .services
                .iter()
                .any(|s| s.ports.iter().any(|p| !p.publish.is_empty())),
            ..LocalFacts::default()
        }
    }
}

/// What the domain should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainPlan {
    /// Next hops, neighbours, routes, rules, addresses.
    pub kernel: Kernel,
    /// Sysctls below `/proc/sys`; those of devices that are not there yet are skipped.
    pub sysctls: Vec<(String, String)>,
}

/// What the host should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// Addresses and neighbours of `weft0`, weft's table and the rule that leads there.
    pub kernel: Kernel,
    /// The host must forward: something is published here, or a container may want to go out.
    pub forward: bool,
    /// The kernel has IPv6.
    pub ipv6: bool,
}

/// The name of an endpoint's leg in the domain.
pub fn leg_name(id: &EndpointId) -> String {
    let mut name = LEG_PREFIX.to_owned();
    name.push_str(&id.to_string()[..10]);
    name
}

/// Plans the domain.
pub fn plan_domain(view: &View, local: &LocalFacts) -> DomainPlan {
    let mut plan = Planner {
        addresses: &view.plan,
        ipv6: local.ipv6,
        kernel: Kernel::default(),
    };
    plan.floor();
    plan.dns();
    plan.host_leg(local.host_ip);
    plan.guard();
    for member in &view.members {
        if member.id == view.me {
            plan.own_prefixes(member);
        } else if member.number.0 != 0 {
            let is_up = |peer: &&VxlanPeer| local.vxlan.contains(vxlan_carrier(peer.addr));
            plan.peer(member, view.vxlan_peer(&member.id).filter(is_up));
        }
    }
    for leg in &local.legs {
        plan.leg(&leg_name(&leg.id), leg.ip);
    }
    DomainPlan {
        kernel: plan.kernel,
        sysctls: domain_sysctls(local.ipv6),
    }
}

/// What one leg needs in the domain: the same part of [`plan_domain`], for the moment of attaching.
pub(crate) fn plan_leg(addresses: &AddressPlan, ipv6: bool, leg: &LocalLeg) -> Kernel {
    let mut plan = Planner {
        addresses,
        ipv6,
        kernel: Kernel::default(),
    };
    plan.leg(&leg_name(&leg.id), leg.ip);
    plan.kernel
}

/// Plans the host.
pub fn plan_host(view: &View, local: &LocalFacts) -> HostPlan {
    let mut kernel = Kernel::default();
    let range: IpNet = view.plan.range.into();
    let source = local.host_ip.map(IpAddr::from);
    host_side(&mut kernel, range, GATEWAY4.into(), source);
    if local.ipv6 {
        let source = local.host_ip.map(|ip| IpAddr::from(view.plan.v6(ip)));
        host_side(
            &mut kernel,
            view.plan.range6().into(),
            GATEWAY6.into(),
            source,
        );
    }
    HostPlan {
        kernel,
        forward: local.published || !local.legs.is_empty(),
        ipv6: local.ipv6,
    }
}

fn host_side(kernel: &mut Kernel, range: IpNet, gateway: IpAddr, source: Option<IpAddr>) {
    if let Some(ip) = source {
        kernel.addresses.insert((HOST_LEG.into(), IpNet::from(ip)));
    }
    kernel
        .neighbours
        .insert((HOST_LEG.into(), gateway), GATEWAY_MAC);
    let key = |metric| RouteKey {
        table: HOST_TABLE,
        to: range,
        metric,
    };
    let via = Via::Gateway(gateway, HOST_LEG.into());
    kernel.routes.insert(
        key(METRIC_ROUTE),
        Route {
            via,
            mtu: None,
            source,
        },
    );
    kernel
        .routes
        .insert(key(METRIC_FLOOR), nowhere(Via::Unreachable));
    kernel.rules.insert(Rule {
        family: Family::of_net(&range),
        priority: HOST_TABLE,
        selector: Selector::To(range),
        action: RuleAction::Lookup(HOST_TABLE),
    });
}

fn nowhere(via: Via) -> Route {
    Route {
        via,
        mtu: None,
        source: None,
    }
}

struct Planner<'a> {
    addresses: &'a AddressPlan,
    ipv6: bool,
    kernel: Kernel,
}

impl Planner<'_> {
    fn route(&mut self, table: u32, to: impl Into<IpNet>, metric: u32, route: Route) {
        let to = to.into();
        let key = RouteKey { table, to, metric };
        self.kernel.routes.insert(key, route);
    }

    /// A route of both families for an IPv4 prefix of the range.
    fn both(&mut self, net: Ipv4Net, metric: u32, via: Via, mtu: Option<u32>) {
        let source = None;
        let route = Route { via, mtu, source };
        if self.ipv6 {
            let mtu = mtu.map(|m| m.max(MIN_MTU6));
            let route6 = Route {
                mtu,
                ..route.clone()
            };
            self.route(MAIN_TABLE, self.addresses.v6_cover(net), metric, route6);
        }
        self.route(MAIN_TABLE, net, metric, route);
    }

    /// When the TAP's last descriptor closes, the kernel deletes its next hops and their routes; what is left must not
    /// fall through to the default route. A blackhole, because a restart must not send errors into live connections.
    fn floor(&mut self) {
        let range = self.addresses.range;
        self.route(MAIN_TABLE, range, METRIC_FLOOR, nowhere(Via::Blackhole));
        if self.ipv6 {
            let range6 = self.addresses.range6();
            self.route(MAIN_TABLE, range6, METRIC_FLOOR, nowhere(Via::Blackhole));
        }
    }

    fn address(&mut self, device: &str, ip: IpAddr) {
        self.kernel
            .addresses
            .insert((device.into(), IpNet::from(ip)));
    }

    fn dns(&mut self) {
        self.address("lo", self.addresses.dns4().into());
        if self.ipv6 {
            self.address("lo", self.addresses.dns6().into());
        }
    }

    /// The addresses of a container's gateway, on one device of the domain.
    fn gateway(&mut self, device: &str) {
        self.address(device, GATEWAY4.into());
        if self.ipv6 {
            self.address(device, GATEWAY6.into());
        }
    }

    fn neighbour(&mut self, device: &str, ip: IpAddr, mac: [u8; 6]) {
        self.kernel.neighbours.insert((device.into(), ip), mac);
    }

    fn host_leg(&mut self, host_ip: Option<Ipv4Addr>) {
        self.gateway(HOST_LEG_FAR);
        let any4: IpNet = Ipv4Net::default().into();
        self.host_routes(
            any4,
            HOST_GATEWAY4.into(),
            host_ip.map(|ip| Ipv4Net::from(ip).into()),
        );
        if self.ipv6 {
            let any6: IpNet = Ipv6Net::default().into();
            let host6 = host_ip.map(|ip| Ipv6Net::from(self.addresses.v6(ip)).into());
            self.host_routes(any6, HOST_GATEWAY6.into(), host6);
        }
    }

    fn host_routes(&mut self, any: IpNet, gateway: IpAddr, host: Option<IpNet>) {
        self.neighbour(HOST_LEG_FAR, gateway, HOST_LEG_MAC);
        let via = Via::Gateway(gateway, HOST_LEG_FAR.into());
        for to in std::iter::once(any).chain(host) {
            self.route(MAIN_TABLE, to, METRIC_ROUTE, nowhere(via.clone()));
        }
    }

    fn families(&self) -> &'static [Family] {
        if self.ipv6 {
            &[Family::V4, Family::V6]
        } else {
            &[Family::V4]
        }
    }

    /// One comparison for the many packets without a mark instead of one per peer: 300 rules double the latency.
    fn guard(&mut self) {
        for family in self.families() {
            self.kernel.rules.insert(Rule {
                family: *family,
                priority: GUARD_PRIORITY,
                selector: Selector::Mark {
                    mark: 0,
                    mask: PEER_MARK_MASK,
                },
                action: RuleAction::Goto(MAIN_PRIORITY),
            });
        }
    }

    fn own_prefixes(&mut self, me: &Member) {
        for net in &me.prefixes {
            self.both(*net, METRIC_NOWHERE, Via::Unreachable, None);
        }
    }

    fn peer(&mut self, member: &Member, vxlan: Option<&VxlanPeer>) {
        let number = member.number;
        let alive = member.liveness != Liveness::Down;
        if let Some(vxlan) = vxlan {
            self.on_vxlan(vxlan);
        }
        let (carrier, mtu) = path(member, vxlan);
        let via = if alive {
            self.next_hop(number, carrier);
            Via::NextHop(peer_nexthop(number))
        } else {
            Via::Unreachable
        };
        let mtu = mtu.filter(|_| alive).map(u32::from);
        let metric = if alive { METRIC_ROUTE } else { METRIC_NOWHERE };
        for net in &member.prefixes {
            self.both(*net, metric, via.clone(), mtu);
        }
        self.replies(number, alive.then_some(via), mtu);
    }

    /// What stands for a peer on both carriers alike.
    fn peer_gateway(&self, number: PeerNumber) -> IpAddr {
        if self.ipv6 {
            peer_link_local(number).into()
        } else {
            peer_link_local4(number).into()
        }
    }

    /// The peer is a neighbour on `wu0` in any case: falling back to it is one step then.
    fn next_hop(&mut self, number: PeerNumber, carrier: &str) {
        let gateway = self.peer_gateway(number);
        self.neighbour(UDP_CARRIER, gateway, peer_mac(number));
        self.kernel.next_hops.insert(
            peer_nexthop(number),
            NextHop {
                device: carrier.into(),
                gateway,
            },
        );
    }

    /// The peer as a neighbour on `wx0` or `wx6`, and where frames to it go, whether or not packets take that way: probes do.
    fn on_vxlan(&mut self, peer: &VxlanPeer) {
        let gateway = self.peer_gateway(peer.number);
        let device = vxlan_carrier(peer.addr);
        self.neighbour(device, gateway, peer.mac);
        self.kernel
            .forwarding
            .insert((device.into(), peer.mac), peer.addr);
    }

    /// Replies to connections that came in through a peer's published ports go back through that peer, or nowhere.
    fn replies(&mut self, number: PeerNumber, via: Option<Via>, mtu: Option<u32>) {
        let table = peer_table(number);
        for family in self.families() {
            let (any, mtu): (IpNet, _) = match family {
                Family::V4 => (Ipv4Net::default().into(), mtu),
                Family::V6 => (Ipv6Net::default().into(), mtu.map(|m| m.max(MIN_MTU6))),
            };
            if let Some(via) = via.clone() {
                let source = None;
                self.route(table, any, METRIC_ROUTE, Route { via, mtu, source });
            }
            self.route(table, any, METRIC_FLOOR, nowhere(Via::Blackhole));
            self.kernel.rules.insert(Rule {
                family: *family,
                priority: PEER_PRIORITY + u32::from(number.0),
                selector: Selector::Mark {
                    mark: u32::from(number.0),
                    mask: PEER_MARK_MASK,
                },
                action: RuleAction::Lookup(table),
            });
        }
    }

    fn leg(&mut self, device: &str, ip: Ipv4Addr) {
        self.gateway(device);
        let mut ips: Vec<IpAddr> = vec![ip.into()];
        if self.ipv6 {
            ips.push(self.addresses.v6(ip).into());
        }
        for address in ips {
            self.neighbour(device, address, container_mac(ip));
            let via = Via::Device(device.into());
            self.route(MAIN_TABLE, IpNet::from(address), METRIC_ROUTE, nowhere(via));
        }
    }
}

/// By which carrier packets go to a peer, and how long they may be there, octets, where that is known. `vxlan` is how the peer
/// is reached by that, if it may be.
pub(crate) fn path(peer: &Member, vxlan: Option<&VxlanPeer>) -> (&'static str, Option<u16>) {
    match vxlan.filter(|vxlan| vxlan.carries) {
        Some(vxlan) => (vxlan_carrier(vxlan.addr), Some(vxlan.mtu)),
        None => (UDP_CARRIER, peer.mtu),
    }
}

/// A peer's link-local IPv4 address, for kernels without IPv6: 169.254.16.0 and up.
pub(crate) fn peer_link_local4(number: PeerNumber) -> Ipv4Addr {
    let [high, low] = number.0.to_be_bytes();
    Ipv4Addr::new(169, 254, 16 + high, low)
}

/// Every one set outright: the defaults of a new namespace differ between kernels and distributions.
pub(crate) fn domain_sysctls(ipv6: bool) -> Vec<(String, String)> {
    let mut sysctls = Vec::new();
    let mut set = |path: String, value: &str| sysctls.push((path, value.to_owned()));
    set("net/ipv4/ip_forward".into(), "1");
    // A peer that answers late may look out of window after a path change; it is no attacker, the seal vouched for it.
    set("net/netfilter/nf_conntrack_tcp_be_liberal".into(), "1");
    let devices = ["all", "default", HOST_LEG_FAR, UDP_CARRIER];
    for device in devices.into_iter().chain(VXLAN_CARRIERS) {
        let v4 = |name: &str| format!("net/ipv4/conf/{device}/{name}");
        set(v4("rp_filter"), "0");
        // The rules of peers make the kernel look every source up once more. From an address of the domain itself nobody
        // can send: the filter drops the range's from legs, carriers and the host, and from the link-local one of the
        // host's leg nobody but the host.
        set(v4("accept_local"), "1");
        set(v4("accept_redirects"), "0");
        set(v4("send_redirects"), "0");
        set(v4("accept_source_route"), "0");
        // All neighbours are permanent: no ARP answer is ever due, and none asked for may fill the host's one table.
        set(v4("arp_ignore"), "8");
        if !ipv6 {
            continue;
        }
        let v6 = |name: &str| format!("net/ipv6/conf/{device}/{name}");
        set(v6("disable_ipv6"), "0");
        set(v6("forwarding"), "1");
        set(v6("accept_ra"), "0");
        set(v6("accept_redirects"), "0");
        set(v6("accept_dad"), "0");
    }
    sysctls
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
