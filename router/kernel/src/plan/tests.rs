use std::collections::BTreeMap;

use weft_core::layout::{VXLAN_CARRIER, VXLAN_CARRIER6};
use weft_core::model::{ClusterId, Generation, Label, NodeId};
use weft_core::view::{Endpoint, Seal, VxlanView};

use super::*;

fn member(id: u8, number: u16, liveness: Liveness, prefixes: &[&str]) -> Member {
    Member {
        id: NodeId([id; 32]),
        name: Label::parse(&format!("n{id}")).unwrap(),
        generation: Generation(1),
        liveness,
        number: PeerNumber(number),
        prefixes: prefixes.iter().map(|p| p.parse().unwrap()).collect(),
        host_addrs: vec![],
        mtu: (number != 0).then_some(1200),
    }
}

fn view() -> View {
    let cluster = ClusterId([7; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    View {
        members: vec![
            member(1, 0, Liveness::Alive, &["10.32.0.0/17"]),
            member(2, 1, Liveness::Alive, &["10.32.128.0/17"]),
            member(3, 2, Liveness::Down, &["10.40.0.0/13"]),
        ],
        endpoints: vec![
            endpoint(1, 1, EndpointKind::Host, [10, 32, 0, 1]),
            endpoint(2, 1, EndpointKind::Container, [10, 32, 0, 2]),
            endpoint(3, 2, EndpointKind::Container, [10, 32, 128, 2]),
        ],
        ..View::empty(NodeId([1; 32]), cluster, plan)
    }
}

fn endpoint(id: u8, node: u8, kind: EndpointKind, ip: [u8; 4]) -> Endpoint {
    Endpoint {
        id: EndpointId([id; 8]),
        node: NodeId([node; 32]),
        kind,
        names: vec![],
        network: Label::parse("default").unwrap(),
        ip: ip.into(),
        labels: BTreeMap::new(),
    }
}

fn facts() -> LocalFacts {
    LocalFacts {
        ipv6: true,
        ..LocalFacts::from_view(&view())
    }
}

fn route(plan: &DomainPlan, to: &str, metric: u32) -> Option<Route> {
    let key = RouteKey {
        table: MAIN_TABLE,
        to: to.parse().unwrap(),
        metric,
    };
    plan.kernel.routes.get(&key).cloned()
}

#[test]
fn local_facts_hold_this_nodes_endpoints_only() {
    let facts = facts();
    assert_eq!(facts.legs.len(), 1);
    assert_eq!(facts.host_ip, Some([10, 32, 0, 1].into()));
}

#[test]
fn a_live_peers_prefix_leads_to_its_next_hop_with_its_path_mtu() {
    let plan = plan_domain(&view(), &facts());
    let found = route(&plan, "10.32.128.0/17", METRIC_ROUTE).unwrap();
    assert_eq!(found.via, Via::NextHop(peer_nexthop(PeerNumber(1))));
    assert_eq!(found.mtu, Some(1200));
    let twin = view().plan.v6_net("10.32.128.0/17".parse().unwrap());
    let found6 = route(&plan, &twin.to_string(), METRIC_ROUTE).unwrap();
    assert_eq!(found6.mtu, Some(1280), "IPv6 can't go below 1280");
}

/// Peers 1 and 2 of the view are open on VXLAN, the first carries.
fn on_vxlan() -> View {
    let open = |id: u8, number: u16, carries: bool| VxlanPeer {
        id: NodeId([id; 32]),
        number: PeerNumber(number),
        mac: [6, id, 0, 0, 0, 0],
        addr: [192, 0, 2, id].into(),
        seal: Seal::Plain,
        carries,
        mtu: 1450,
    };
    let vxlan = VxlanView {
        mac: [6, 1, 0, 0, 0, 0],
        peers: vec![open(2, 1, true), open(3, 2, false)],
        esp: Vec::new(),
    };
    let mut view = view();
    view.members[2].liveness = Liveness::Alive;
    view.vxlan = Some(vxlan);
    view
}

#[test]
fn a_peer_s_one_next_hop_says_which_carrier_it_is_and_the_route_its_mtu() {
    let with = |devices: &[&'static str]| LocalFacts {
        vxlan: devices.iter().copied().collect(),
        ..facts()
    };
    let hop = |devices: &[&'static str], number: u16| {
        let plan = plan_domain(&on_vxlan(), &with(devices));
        let id = peer_nexthop(PeerNumber(number));
        let route = route(&plan, "10.32.128.0/17", METRIC_ROUTE).unwrap();
        (plan.kernel.next_hops[&id].device.clone(), route.mtu)
    };
    const UP: &[&str] = &[VXLAN_CARRIER];
    assert_eq!(hop(UP, 1), (VXLAN_CARRIER.to_owned(), Some(1450)));
    assert_eq!(hop(UP, 2).0, UDP_CARRIER);
    for without in [&[][..], &[VXLAN_CARRIER6]] {
        assert_eq!(hop(without, 1), (UDP_CARRIER.to_owned(), Some(1200)));
    }
    let plan = plan_domain(&on_vxlan(), &with(UP));
    let on = |device: &str| {
        let keys = plan.kernel.neighbours.keys();
        keys.filter(|key| key.0 == device).count()
    };
    assert_eq!(
        (on(UDP_CARRIER), on(VXLAN_CARRIER)),
        (2, 2),
        "falling back is one step"
    );
    assert_eq!(plan.kernel.forwarding.len(), 2);
}

#[test]
fn a_peer_that_is_reached_by_ipv6_is_on_the_device_for_that() {
    let mut view = on_vxlan();
    let addr = "2001:db8::2".parse().unwrap();
    view.vxlan.as_mut().unwrap().peers[0].addr = addr;
    let local = LocalFacts {
        vxlan: [VXLAN_CARRIER6].into(),
        ..facts()
    };
    let plan = plan_domain(&view, &local);
    let hop = &plan.kernel.next_hops[&peer_nexthop(PeerNumber(1))];
    assert_eq!(hop.device, VXLAN_CARRIER6);
    let mac = view.vxlan.as_ref().unwrap().peers[0].mac;
    let leads = [((VXLAN_CARRIER6.to_owned(), mac), addr)];
    assert_eq!(plan.kernel.forwarding, leads.into());
    let host = crate::filter::host_filter(&view, &facts(), Default::default());
    assert!(host.contains("elements = { 2001:db8::2 . 0x060200000000 }"));
    assert!(host.contains("elements = { 192.0.2.3 . 0x060300000000 }"));
}

#[test]
fn the_filter_knows_peers_on_vxlan_and_without_trust_nothing_of_them() {
    let view = on_vxlan();
    let host = crate::filter::host_filter(&view, &facts(), Default::default());
    assert!(host.contains("192.0.2.2 . 0x060200000000, 192.0.2.3 . 0x060300000000"));
    let domain = crate::filter::domain_filter(&view, &facts(), None);
    assert!(domain.contains("06:02:00:00:00:00 . 10.32.128.0/17"));
    let plain = View {
        vxlan: None,
        ..view
    };
    let host = crate::filter::host_filter(&plain, &facts(), Default::default());
    let domain = crate::filter::domain_filter(&plain, &facts(), None);
    for text in [host, domain] {
        assert!(!text.contains("wx0") && !text.contains("vxlan") && !text.contains("6784"));
    }
}

#[test]
fn segments_fit_the_paths_that_are_too_narrow_for_ipv6() {
    let mut view = view();
    let narrow = |view: &View, facts: &LocalFacts| {
        let filter = crate::filter::domain_filter(view, facts, None);
        let lines = filter.lines().map(str::trim);
        let lines = lines.filter(|line| line.contains("base_narrow"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let facts = LocalFacts {
        ipv6: true,
        ..facts()
    };
    for member in &mut view.members {
        member.mtu = Some(1280);
    }
    assert!(narrow(&view, &facts).is_empty());
    view.members[1].mtu = Some(1200);
    let net = view.plan.v6_cover(view.members[1].prefixes[0]);
    let wanted = [
        format!(
            "set base_narrow_1200 {{ type ipv6_addr; flags interval; elements = {{ {net} }}; }}"
        ),
        "ip6 daddr @base_narrow_1200 tcp flags syn tcp option maxseg size set 1140".to_owned(),
        "ip6 saddr @base_narrow_1200 tcp flags syn tcp option maxseg size set 1140".to_owned(),
    ];
    assert_eq!(narrow(&view, &facts), wanted);
    let without = LocalFacts {
        ipv6: false,
        ..facts
    };
    assert!(narrow(&view, &without).is_empty());
}

#[test]
fn a_down_peers_prefix_is_unreachable_and_it_has_no_next_hop() {
    let plan = plan_domain(&view(), &facts());
    let found = route(&plan, "10.40.0.0/13", METRIC_NOWHERE).unwrap();
    assert_eq!(found.via, Via::Unreachable);
    assert!(
        !plan
            .kernel
            .next_hops
            .contains_key(&peer_nexthop(PeerNumber(2)))
    );
}

#[test]
fn the_range_always_has_a_floor() {
    let floor = |plan: &DomainPlan| route(plan, "10.32.0.0/12", METRIC_FLOOR).unwrap().via;
    let plan = plan_domain(&view(), &facts());
    assert_eq!(floor(&plan), Via::Blackhole);
    let bare = DomainPlan {
        kernel: plan.kernel.on_devices(&["lo".to_owned()].into()),
        sysctls: vec![],
    };
    assert_eq!(floor(&bare), Via::Blackhole, "also while the TAP is away");
}

#[test]
fn a_peer_that_owns_the_whole_range_does_not_displace_the_floor() {
    let mut view = view();
    view.members[1].prefixes = vec![view.plan.range];
    let plan = plan_domain(&view, &facts());
    assert_eq!(
        route(&plan, "10.32.0.0/12", METRIC_FLOOR).unwrap().via,
        Via::Blackhole
    );
    assert!(route(&plan, "10.32.0.0/12", METRIC_ROUTE).is_some());
}

#[test]
fn every_peer_has_a_table_that_ends_in_a_blackhole_and_a_rule_behind_the_guard() {
    let plan = plan_domain(&view(), &facts());
    for number in [1, 2] {
        let key = RouteKey {
            table: peer_table(PeerNumber(number)),
            to: "0.0.0.0/0".parse().unwrap(),
            metric: METRIC_FLOOR,
        };
        assert_eq!(plan.kernel.routes[&key].via, Via::Blackhole);
        assert!(plan.kernel.rules.iter().any(|r| {
            r.priority > GUARD_PRIORITY
                && r.action == RuleAction::Lookup(peer_table(PeerNumber(number)))
        }));
    }
}

#[test]
fn without_ipv6_nothing_of_ipv6_is_planned() {
    let facts = LocalFacts {
        ipv6: false,
        ..facts()
    };
    let domain = plan_domain(&view(), &facts);
    let host = plan_host(&view(), &facts);
    for kernel in [&domain.kernel, &host.kernel] {
        assert!(kernel.routes.keys().all(|k| matches!(k.to, IpNet::V4(_))));
        assert!(kernel.addresses.iter().all(|a| matches!(a.1, IpNet::V4(_))));
        assert!(kernel.neighbours.keys().all(|k| k.1.is_ipv4()));
        assert!(kernel.rules.iter().all(|r| r.family == Family::V4));
    }
    assert!(domain.sysctls.iter().all(|s| !s.0.contains("ipv6")));
}

#[test]
fn a_prefix_over_several_networks_covers_the_twins_of_all_its_addresses() {
    let plan = view().plan;
    let cases = [
        "10.32.0.0/12",
        "10.32.0.0/13",
        "10.40.0.0/13",
        "10.32.0.0/15",
        "10.34.0.0/15",
        "10.33.0.0/16",
        "10.33.16.0/20",
        "10.33.32.0/19",
        "10.33.16.0/24",
        "10.47.0.0/16",
        "10.47.128.0/17",
        "10.46.0.0/15",
    ];
    for text in cases {
        let net: Ipv4Net = text.parse().unwrap();
        let twin = plan.v6_cover(net);
        for block in 0..4096u32 {
            let ip = Ipv4Addr::from(u32::from(plan.range.network()) + block * 256 + 7);
            assert_eq!(
                twin.contains(&plan.v6(ip)),
                net.contains(&ip),
                "{text} {twin} {ip}"
            );
        }
    }
}

#[test]
fn the_host_forwards_only_when_something_needs_it() {
    let idle = LocalFacts::default();
    assert!(!plan_host(&view(), &idle).forward);
    assert!(plan_host(&view(), &facts()).forward);
}
