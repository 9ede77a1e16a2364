//! What the kernel holds for weft, as plain comparable data: what a plan wants and what was observed have one shape.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

/// Routes that weft made carry this protocol number (free in `/etc/iproute2/rt_protos`), so that nobody else's are touched.
pub const ROUTE_PROTOCOL: u8 = 0x77;
/// The kernel's main routing table.
pub const MAIN_TABLE: u32 = 254;
/// Priority of the kernel's rule for the main table.
pub const MAIN_PRIORITY: u32 = 32766;

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(ip: &IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// The family of a prefix.
    pub fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Family::V4,
            IpNet::V6(_) => Family::V6,
        }
    }
}

/// A next-hop object: where packets for one peer go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// The device.
    pub device: String,
    /// The gateway on it.
    pub gateway: IpAddr,
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// To a next-hop object.
    NextHop(u32),
    /// Straight to a device.
    Device(String),
    /// To a gateway on a device, whether or not an address of the device covers it.
    Gateway(IpAddr, String),
    /// Refused with an ICMP error.
    Unreachable,
    /// Dropped in silence.
    Blackhole,
}

/// The key of a route: the kernel holds one per table, prefix and metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKey {
    /// Routing table.
    pub table: u32,
    /// Destination.
    pub to: IpNet,
    /// Metric; IPv6 knows no 0.
    pub metric: u32,
}

/// What stands under a [`RouteKey`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Where it leads.
    pub via: Via,
    /// Largest packet, when the path carries less than the device.
    pub mtu: Option<u32>,
    /// Source address for packets that have none yet.
    pub source: Option<IpAddr>,
}

/// Which packets an ip rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Selector {
    /// Packets to a prefix.
    To(IpNet),
    /// Packets whose mark, masked, has this value.
    Mark {
        /// The value.
        mark: u32,
        /// The bits that count.
        mask: u32,
    },
}

/// What an ip rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleAction {
    /// Looks into a table.
    Lookup(u32),
    /// Jumps to the rule with this priority.
    Goto(u32),
}

/// One ip rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Its family.
    pub family: Family,
    /// Its place.
    pub priority: u32,
    /// For which packets.
    pub selector: Selector,
    /// What happens with them.
    pub action: RuleAction,
}

/// A device's name and an address: the key of a neighbour.
pub type NeighbourKey = (String, IpAddr);

/// A device's name and a MAC: the key of an entry in its forwarding database.
pub type ForwardingKey = (String, [u8; 6]);

/// Everything in one namespace that weft answers for, but for devices and the nft table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Next-hop objects by id.
    pub next_hops: BTreeMap<u32, NextHop>,
    /// Permanent neighbours and their MACs.
    pub neighbours: BTreeMap<NeighbourKey, [u8; 6]>,
    /// Routes.
    pub routes: BTreeMap<RouteKey, Route>,
    /// ip rules.
    pub rules: BTreeSet<Rule>,
    /// Addresses by device.
    pub addresses: BTreeSet<(String, IpNet)>,
    /// Where frames to a MAC on a VXLAN device are sent, by device and MAC.
    pub forwarding: BTreeMap<ForwardingKey, IpAddr>,
}

impl Kernel {
    /// Only what can be put while no other devices than these are there: a next hop on a device without carrier is
    /// refused by the kernel, and so is every route that names it.
    pub fn on_devices(&self, present: &BTreeSet<String>) -> Kernel {
        let next_hops: BTreeMap<u32, NextHop> = self
            .next_hops
            .iter()
            .filter(|(_, hop)| present.contains(&hop.device))
            .map(|(id, hop)| (*id, hop.clone()))
            .collect();
        let reachable = |route: &Route| match &route.via {
            Via::NextHop(id) => next_hops.contains_key(id),
            Via::Device(device) | Via::Gateway(_, device) => present.contains(device),
            Via::Unreachable | Via::Blackhole => true,
        };
        Kernel {
            routes: self
                .routes
                .iter()
                .filter(|(_, route)| reachable(route))
                .map(|(key, route)| (*key, route.clone()))
                .collect(),
            neighbours: self
                .neighbours
                .iter()
                .filter(|((device, _), _)| present.contains(device))
                .map(|(key, mac)| (key.clone(), *mac))
                .collect(),
            rules: self.rules.clone(),
            addresses: self
                .addresses
                .iter()
                .filter(|(device, _)| present.contains(device))
                .cloned()
                .collect(),
            forwarding: self
                .forwarding
                .iter()
                .filter(|((device, _), _)| present.contains(device))
                .map(|(key, to)| (key.clone(), *to))
                .collect(),
            next_hops,
        }
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: Kernel) {
        self.next_hops.extend(other.next_hops);
        self.neighbours.extend(other.neighbours);
        self.routes.extend(other.routes);
        self.rules.extend(other.rules);
        self.addresses.extend(other.addresses);
        self.forwarding.extend(other.forwarding);
    }
}
