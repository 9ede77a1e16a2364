//! Routes between the plan's words and netlink's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};

use super::address_family;
use crate::state::{Family, ROUTE_PROTOCOL, Route, RouteKey, Via};

/// A route as the kernel holds it, also those that are not weft's.
#[derive(Clone, Debug)]
pub(crate) struct KernelRoute {
    pub(crate) table: u32,
    pub(crate) to: IpNet,
    pub(crate) metric: u32,
    pub(crate) protocol: RouteProtocol,
    pub(crate) kind: RouteType,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) device: Option<u32>,
    next_hop: Option<u32>,
    mtu: Option<u32>,
    source: Option<IpAddr>,
}

pub(super) fn route_message(key: &RouteKey, what: Option<(&Route, Option<u32>)>) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = address_family(Family::of_net(&key.to));
    header.destination_prefix_length = key.to.prefix_len();
    // Tables above 255 are named by the attribute alone.
    header.table = u8::try_from(key.table).unwrap_or(0);
    header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    header.scope = RouteScope::Universe;
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(key.table));
    attributes.push(RouteAttribute::Priority(key.metric));
    if key.to.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(key.to.network().into()));
    }
    let Some((route, device)) = what else {
        header.scope = RouteScope::NoWhere;
        return message;
    };
    header.kind = match route.via {
        Via::Unreachable => RouteType::Unreachable,
        Via::Blackhole => RouteType::BlackHole,
        _ => RouteType::Unicast,
    };
    match &route.via {
        Via::NextHop(id) => attributes.push(RouteAttribute::NhId(*id)),
        Via::Device(_) => header.scope = RouteScope::Link,
        Via::Gateway(gateway, _) => {
            header.flags = RouteFlags::Onlink;
            attributes.push(RouteAttribute::Gateway((*gateway).into()));
        }
        Via::Unreachable | Via::Blackhole => {}
    }
    attributes.extend(device.map(RouteAttribute::Oif));
    attributes.extend(
        route
            .mtu
            .map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])),
    );
    attributes.extend(
        route
            .source
            .map(|source| RouteAttribute::PrefSource(source.into())),
    );
    message
}

pub(super) fn read_route(message: RouteMessage) -> Option<KernelRoute> {
    let any: IpNet = match message.header.address_family {
        AddressFamily::Inet => Ipv4Net::default().into(),
        AddressFamily::Inet6 => Ipv6Net::default().into(),
        _ => return None,
    };
    let mut route = KernelRoute {
        table: message.header.table.into(),
        to: any,
        metric: 0,
        protocol: message.header.protocol,
        kind: message.header.kind,
        gateway: None,
        device: None,
        next_hop: None,
        mtu: None,
        source: None,
    };
    let bits = message.header.destination_prefix_length;
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.to = IpNet::new(address_of(&address)?, bits).ok()?;
            }
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Priority(metric) => route.metric = metric,
            RouteAttribute::Gateway(address) => route.gateway = address_of(&address),
            RouteAttribute::Oif(index) => route.device = Some(index),
            RouteAttribute::NhId(id) => route.next_hop = Some(id),
            RouteAttribute::PrefSource(address) => route.source = address_of(&address),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|m| match m {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(route)
}

fn address_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

impl KernelRoute {
    /// Weft put it there.
    pub(crate) fn is_ours(&self) -> bool {
        self.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
    }

    /// In the plan's words; `names` are the devices by index.
    pub(crate) fn planned(&self, names: &BTreeMap<u32, String>) -> Option<(RouteKey, Route)> {
        let via = match (self.kind, self.next_hop) {
            (RouteType::Unreachable, _) => Via::Unreachable,
            (RouteType::BlackHole, _) => Via::Blackhole,
            (_, Some(id)) => Via::NextHop(id),
            (_, None) => {
                let device = names.get(&self.device?)?.clone();
                match self.gateway {
                    Some(gateway) => Via::Gateway(gateway, device),
                    None => Via::Device(device),
                }
            }
        };
        let key = RouteKey {
            table: self.table,
            to: self.to,
            metric: self.metric,
        };
        let (mtu, source) = (self.mtu, self.source);
        Some((key, Route { via, mtu, source }))
    }
}
