//! ip rules between the plan's words and netlink's.

use ipnet::IpNet;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction as KernelAction, RuleAttribute, RuleMessage};

use super::address_family;
use crate::state::{Family, ROUTE_PROTOCOL, Rule, RuleAction, Selector};

pub(super) fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(
        ROUTE_PROTOCOL,
    )));
    match rule.selector {
        Selector::To(net) => {
            message.header.dst_len = net.prefix_len();
            attributes.push(RuleAttribute::Destination(net.network()));
        }
        Selector::Mark { mark, mask } => {
            attributes.push(RuleAttribute::FwMark(mark));
            attributes.push(RuleAttribute::FwMask(mask));
        }
    }
    match rule.action {
        RuleAction::Lookup(table) => {
            message.header.action = KernelAction::ToTable;
            attributes.push(RuleAttribute::Table(table));
        }
        RuleAction::Goto(priority) => {
            message.header.action = KernelAction::Goto;
            attributes.push(RuleAttribute::Goto(priority));
        }
    }
    message
}

/// Weft's own rules only.
pub(super) fn read_rule(family: Family, message: &RuleMessage) -> Option<Rule> {
    let mut ours = false;
    let (mut priority, mut to, mut mark, mut mask) = (0, None, 0, None);
    let (mut table, mut target) = (u32::from(message.header.table), None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(protocol) => {
                ours = *protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
            }
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Destination(ip) => {
                to = IpNet::new(*ip, message.header.dst_len).ok();
            }
            RuleAttribute::FwMark(value) => mark = *value,
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Goto(value) => target = Some(*value),
            _ => {}
        }
    }
    let selector = match (to, mask) {
        (Some(net), _) => Selector::To(net),
        (None, Some(mask)) => Selector::Mark { mark, mask },
        (None, None) => return None,
    };
    let action = match (message.header.action, target) {
        (KernelAction::Goto, Some(priority)) => RuleAction::Goto(priority),
        (KernelAction::ToTable, _) => RuleAction::Lookup(table),
        _ => return None,
    };
    ours.then_some(Rule {
        family,
        priority,
        selector,
        action,
    })
}
