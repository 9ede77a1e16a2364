//! From what is wanted and what is there to the steps between, in an order the kernel accepts.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use weft_core::layout::mac_text;

use crate::state::{Kernel, NextHop, Route, RouteKey, Rule};

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Adds an address to a device.
    AddAddress(String, IpNet),
    /// Takes it away.
    DelAddress(String, IpNet),
    /// Adds or replaces a permanent neighbour.
    SetNeighbour(String, IpAddr, [u8; 6]),
    /// Forgets it.
    DelNeighbour(String, IpAddr),
    /// Adds or replaces an entry of a VXLAN device's forwarding database.
    SetForwarding(String, [u8; 6], IpAddr),
    /// Deletes it.
    DelForwarding(String, [u8; 6]),
    /// Adds or replaces a next-hop object.
    SetNextHop(u32, NextHop),
    /// Deletes it, and with it every route that names it.
    DelNextHop(u32),
    /// Adds or replaces a route.
    SetRoute(RouteKey, Route),
    /// Deletes it.
    DelRoute(RouteKey),
    /// Adds a rule.
    AddRule(Rule),
    /// Deletes it.
    DelRule(Rule),
}

/// In words that follow "can't".
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::AddAddress(device, net) => write!(f, "add {net} to {device}"),
            Op::DelAddress(device, net) => write!(f, "take {net} from {device}"),
            Op::SetNeighbour(device, ip, _) => write!(f, "set the neighbour {ip} on {device}"),
            Op::DelNeighbour(device, ip) => write!(f, "forget the neighbour {ip} on {device}"),
            Op::SetForwarding(device, mac, to) => {
                write!(f, "lead {} on {device} to {to}", mac_text(*mac))
            }
            Op::DelForwarding(device, mac) => {
                write!(f, "lead {} on {device} nowhere", mac_text(*mac))
            }
            Op::SetNextHop(id, hop) => {
                write!(
                    f,
                    "set the next hop {id} by {} on {}",
                    hop.gateway, hop.device
                )
            }
            Op::DelNextHop(id) => write!(f, "delete the next hop {id}"),
            Op::SetRoute(key, _) => write!(f, "set the route to {} in table {}", key.to, key.table),
            Op::DelRoute(key) => {
                write!(f, "delete the route to {} in table {}", key.to, key.table)
            }
            Op::AddRule(rule) => write!(f, "add the ip rule with priority {}", rule.priority),
            Op::DelRule(rule) => write!(f, "delete the ip rule with priority {}", rule.priority),
        }
    }
}

/// The steps from `observed` to `wanted`.
///
/// INVARIANT: what is added stands on what was added before it (addresses, neighbours, forwarding, next hops, routes, rules), and
/// things go in the opposite order, so that at no moment a packet finds a rule without its table or a route without its
/// next hop. Routes are replaced, never deleted and added.
pub fn diff(wanted: &Kernel, observed: &Kernel) -> Vec<Op> {
    let mut ops = Vec::new();
    put(wanted, observed, &mut ops);
    remove(wanted, observed, &mut ops);
    ops
}

fn put(wanted: &Kernel, observed: &Kernel, ops: &mut Vec<Op>) {
    for (device, net) in wanted.addresses.difference(&observed.addresses) {
        ops.push(Op::AddAddress(device.clone(), *net));
    }
    for ((device, ip), mac) in &wanted.neighbours {
        if observed.neighbours.get(&(device.clone(), *ip)) != Some(mac) {
            ops.push(Op::SetNeighbour(device.clone(), *ip, *mac));
        }
    }
    for ((device, mac), to) in &wanted.forwarding {
        if observed.forwarding.get(&(device.clone(), *mac)) != Some(to) {
            ops.push(Op::SetForwarding(device.clone(), *mac, *to));
        }
    }
    for (id, hop) in &wanted.next_hops {
        if observed.next_hops.get(id) != Some(hop) {
            ops.push(Op::SetNextHop(*id, hop.clone()));
        }
    }
    for (key, route) in &wanted.routes {
        if observed.routes.get(key) != Some(route) {
            ops.push(Op::SetRoute(*key, route.clone()));
        }
    }
    for rule in wanted.rules.difference(&observed.rules) {
        ops.push(Op::AddRule(*rule));
    }
}

fn remove(wanted: &Kernel, observed: &Kernel, ops: &mut Vec<Op>) {
    for rule in observed.rules.difference(&wanted.rules) {
        ops.push(Op::DelRule(*rule));
    }
    for key in observed.routes.keys() {
        if !wanted.routes.contains_key(key) {
            ops.push(Op::DelRoute(*key));
        }
    }
    for id in observed.next_hops.keys() {
        if !wanted.next_hops.contains_key(id) {
            ops.push(Op::DelNextHop(*id));
        }
    }
    for key in observed.forwarding.keys() {
        if !wanted.forwarding.contains_key(key) {
            ops.push(Op::DelForwarding(key.0.clone(), key.1));
        }
    }
    for key in observed.neighbours.keys() {
        if !wanted.neighbours.contains_key(key) {
            ops.push(Op::DelNeighbour(key.0.clone(), key.1));
        }
    }
    for (device, net) in observed.addresses.difference(&wanted.addresses) {
        ops.push(Op::DelAddress(device.clone(), *net));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Family, RuleAction, Selector, Via};

    fn kernel() -> Kernel {
        let mut kernel = Kernel::default();
        kernel.next_hops.insert(
            7,
            NextHop {
                device: "wu0".into(),
                gateway: "fe80::77:1".parse().unwrap(),
            },
        );
        kernel
            .neighbours
            .insert(("wu0".into(), "fe80::77:1".parse().unwrap()), [2; 6]);
        kernel.routes.insert(key("10.32.0.0/24"), route(1400));
        kernel.rules.insert(Rule {
            family: Family::V4,
            priority: 1001,
            selector: Selector::Mark {
                mark: 1,
                mask: 0xfff,
            },
            action: RuleAction::Lookup(10_001),
        });
        kernel
            .addresses
            .insert(("lo".into(), "10.47.0.1/32".parse().unwrap()));
        kernel
            .forwarding
            .insert(("wx0".into(), [6; 6]), [192, 0, 2, 2].into());
        kernel
    }

    fn key(to: &str) -> RouteKey {
        RouteKey {
            table: 254,
            to: to.parse().unwrap(),
            metric: 0,
        }
    }

    fn route(mtu: u32) -> Route {
        Route {
            via: Via::NextHop(7),
            mtu: Some(mtu),
            source: None,
        }
    }

    #[test]
    fn equal_states_need_no_step() {
        assert_eq!(diff(&kernel(), &kernel()), vec![]);
    }

    #[test]
    fn everything_is_put_in_an_order_the_kernel_accepts() {
        let ops = diff(&kernel(), &Kernel::default());
        assert!(matches!(
            ops.as_slice(),
            [
                Op::AddAddress(..),
                Op::SetNeighbour(..),
                Op::SetForwarding(..),
                Op::SetNextHop(..),
                Op::SetRoute(..),
                Op::AddRule(..)
            ]
        ));
    }

    #[test]
    fn everything_is_removed_in_the_opposite_order() {
        let ops = diff(&Kernel::default(), &kernel());
        assert!(matches!(
            ops.as_slice(),
            [
                Op::DelRule(..),
                Op::DelRoute(..),
                Op::DelNextHop(..),
                Op::DelForwarding(..),
                Op::DelNeighbour(..),
                Op::DelAddress(..)
            ]
        ));
    }

    #[test]
    fn a_changed_path_mtu_replaces_the_route_and_nothing_else() {
        let mut wanted = kernel();
        wanted.routes.insert(key("10.32.0.0/24"), route(1300));
        assert_eq!(
            diff(&wanted, &kernel()),
            vec![Op::SetRoute(key("10.32.0.0/24"), route(1300))]
        );
    }

    #[test]
    fn a_peer_that_moved_to_another_carrier_has_its_one_next_hop_replaced() {
        let mut wanted = kernel();
        let hop = NextHop {
            device: "wx0".into(),
            gateway: "fe80::77:1".parse().unwrap(),
        };
        wanted.next_hops.insert(7, hop.clone());
        assert_eq!(diff(&wanted, &kernel()), vec![Op::SetNextHop(7, hop)]);
    }

    #[test]
    fn without_its_carrier_a_peer_keeps_no_next_hop_and_no_route() {
        let present = ["lo".to_owned()].into();
        let left = kernel().on_devices(&present);
        assert!(left.next_hops.is_empty() && left.routes.is_empty() && left.neighbours.is_empty());
        assert!(left.forwarding.is_empty());
        assert_eq!(left.addresses, kernel().addresses);
    }
}
