//! The host's side: packets from outside to a published port are sent to the VIP, which lies behind `weft0`.

use std::net::IpAddr;

use weft_core::layout::HOST_LEG;

use super::{base_chain, collection};
use crate::plan::{Frontend, LbPlan, Published};

/// Renders what stands in the host's table, beside the base filter. Whether forwarding is allowed isn't decided here.
pub fn host_fragment(plan: &LbPlan) -> String {
    let mut out = String::new();
    let mut rules = vec![
        // The domain has already translated what containers ask of this host.
        format!("iifname \"{HOST_LEG}\" return"),
        // A neighbour on the LAN could send these; the kernel refuses them as martians only after this hook.
        "ip daddr 127.0.0.0/8 return".to_owned(),
        "ip6 daddr ::1 return".to_owned(),
        "fib daddr type != local return".to_owned(),
        "meta l4proto != { tcp, udp } return".to_owned(),
    ];
    family(plan, Family::V4, &mut out, &mut rules);
    if plan.ipv6 {
        family(plan, Family::V6, &mut out, &mut rules);
    }
    base_chain(
        &mut out,
        "lb_nat",
        "nat hook prerouting priority dstnat",
        &rules,
    );
    // Two published ports may stand for one port of a VIP, and a client may use one source port for both: at this hook
    // the kernel then gives the second another one.
    base_chain(
        &mut out,
        "lb_source",
        "nat hook postrouting priority srcnat",
        &[],
    );
    out
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn keyword(self) -> &'static str {
        match self {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        }
    }

    fn number(self) -> u8 {
        match self {
            Family::V4 => 4,
            Family::V6 => 6,
        }
    }

    fn holds(self, addr: IpAddr) -> bool {
        addr.is_ipv4() == (self == Family::V4)
    }

    fn vip(self, plan: &LbPlan, at: &Frontend) -> IpAddr {
        match self {
            Family::V4 => at.vip.into(),
            Family::V6 => plan.plan.v6(at.vip).into(),
        }
    }
}

/// Publications for one address alone are looked up before those for any. A port whose service has no backend at all is
/// translated too, so that the domain refuses it.
fn family(plan: &LbPlan, family: Family, out: &mut String, rules: &mut Vec<String>) {
    let (word, n) = (family.keyword(), family.number());
    let (mut at, mut any) = (Vec::new(), Vec::new());
    for (Published { proto, addr, port }, front) in &plan.published {
        let to = format!("{} . {}", family.vip(plan, front), front.port);
        match addr {
            None => any.push(format!("{proto} . {port} : {to}")),
            Some(ip) if family.holds(*ip) => at.push(format!("{ip} . {proto} . {port} : {to}")),
            Some(_) => {}
        }
    }
    collection(
        out,
        &format!("map lb_at{n}"),
        &format!("type ipv{n}_addr . inet_proto . inet_service : ipv{n}_addr . inet_service"),
        &at,
    );
    collection(
        out,
        &format!("map lb_any{n}"),
        &format!("type inet_proto . inet_service : ipv{n}_addr . inet_service"),
        &any,
    );
    rules.push(format!(
        "dnat {word} to {word} daddr . meta l4proto . th dport map @lb_at{n}"
    ));
    rules.push(format!(
        "dnat {word} to meta l4proto . th dport map @lb_any{n}"
    ));
}
