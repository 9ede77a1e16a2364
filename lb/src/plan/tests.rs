use std::net::Ipv4Addr;

use weft_core::model::{ClusterId, EndpointId, Generation, Label, NodeId};
use weft_core::view::{
    Endpoint, EndpointKind, Liveness, Member, Method, Publish, PublishConflict, Seal, ServicePort,
    VxlanPeer, VxlanView,
};

use super::*;
use crate::{domain_fragment, host_fragment};

fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

fn member(n: u8, number: u16) -> Member {
    Member {
        id: NodeId([n; 32]),
        name: label("node"),
        generation: Generation(1),
        liveness: Liveness::Alive,
        number: PeerNumber(number),
        prefixes: Vec::new(),
        host_addrs: Vec::new(),
        mtu: None,
    }
}

fn endpoint(node: u8, kind: EndpointKind, name: &str, last: u8) -> Endpoint {
    Endpoint {
        id: EndpointId([last; 8]),
        node: NodeId([node; 32]),
        kind,
        names: vec![label(name)],
        network: label("default"),
        ip: Ipv4Addr::new(10, 32, 0, last),
        labels: BTreeMap::new(),
    }
}

fn port(proto: Proto, port: u16, publish: &[(Option<IpAddr>, u16)]) -> ServicePort {
    let publish = publish.iter();
    ServicePort {
        proto,
        port,
        target: port + 1000,
        publish: publish
            .map(|(addr, port)| Publish {
                addr: *addr,
                port: *port,
            })
            .collect(),
    }
}

fn service(name: &str, last: u8, ports: Vec<ServicePort>) -> Service {
    Service {
        name: label(name),
        vip: Ipv4Addr::new(10, 47, 0, last),
        ports,
        selector: BTreeMap::new(),
        method: Method::Maglev,
    }
}

fn view() -> View {
    use EndpointKind::{Container, Host};
    let cluster = ClusterId([0xab; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    let only = Some("192.0.2.1".parse().unwrap());
    View {
        members: vec![member(1, 0), member(2, 5), member(3, 9)],
        endpoints: vec![
            endpoint(1, Host, "web", 1),
            endpoint(1, Container, "web", 10),
            endpoint(2, Container, "web", 11),
            endpoint(1, Container, "other", 12),
        ],
        services: vec![
            service("empty", 3, vec![port(Proto::Tcp, 80, &[(None, 8003)])]),
            service(
                "web",
                2,
                vec![
                    port(Proto::Tcp, 80, &[(None, 8080), (only, 8081)]),
                    port(Proto::Udp, 53, &[]),
                ],
            ),
        ],
        ..View::empty(NodeId([1; 32]), cluster, plan)
    }
}

fn local(view: &View) -> LocalFacts {
    LocalFacts {
        host_addrs: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        published_here: wanted(view),
        resolvers: ["192.0.2.53", "127.0.0.53", "10.47.0.1", "2001:db8::53"]
            .map(|ip| ip.parse().unwrap())
            .to_vec(),
        ipv6: true,
    }
}

fn published(port: u16) -> Published {
    Published {
        proto: Proto::Tcp,
        addr: None,
        port,
    }
}

#[test]
fn backends_are_balanced_and_the_hosts_own_legs_never_are() {
    let view = view();
    let plan = plan(&view, &local(&view));
    assert_eq!(
        plan.services.len(),
        2,
        "a service without backends has none"
    );
    let (at, balance) = plan.services.first_key_value().unwrap();
    assert_eq!((at.port, balance.target), (80, 1080));
    let backends: BTreeSet<Ipv4Addr> = balance.table.iter().copied().collect();
    assert_eq!(
        backends,
        [10, 11].map(|n| Ipv4Addr::new(10, 32, 0, n)).into()
    );
    assert_eq!(plan.peers, [5, 9].map(PeerNumber).into());
    assert_eq!(plan.local.len(), 2);
    let target = Target {
        ip: Ipv4Addr::new(10, 32, 0, 10),
        proto: Proto::Tcp,
        port: 1080,
    };
    assert_eq!(plan.targets, [target].into());
}

#[test]
fn every_node_computes_the_same_tables() {
    let one = view();
    let mut other = view();
    other.me = NodeId([2; 32]);
    other.members.iter_mut().for_each(|m| m.number.0 += 1);
    other.endpoints.reverse();
    assert_eq!(
        plan(&one, &local(&one)).services,
        plan(&other, &LocalFacts::default()).services
    );
}

#[test]
fn a_silent_node_loses_its_backends_and_gets_them_back() {
    let mut view = view();
    let all = plan(&view, &local(&view));
    view.members[1].liveness = Liveness::Silent;
    let fewer = plan(&view, &local(&view));
    let (_, balance) = fewer.services.first_key_value().unwrap();
    assert!(balance.table.iter().all(|ip| ip.octets()[3] == 10));
    view.members[1].liveness = Liveness::Alive;
    assert_eq!(plan(&view, &local(&view)), all);
}

#[test]
fn reserved_ports_and_conflicts_are_not_served() {
    let mut view = view();
    view.services[0].ports = vec![port(
        Proto::Tcp,
        80,
        &[(None, 22), (None, 8003), (None, 8004)],
    )];
    view.conflicts = vec![
        PublishConflict {
            node: view.me,
            proto: Proto::Tcp,
            port: 8003,
            owner: "nginx".to_owned(),
        },
        PublishConflict {
            node: NodeId([2; 32]),
            proto: Proto::Tcp,
            port: 8004,
            owner: "nginx".to_owned(),
        },
    ];
    let wanted = wanted(&view);
    assert!(!wanted.contains(&published(22)) && !wanted.contains(&published(8003)));
    assert!(wanted.contains(&published(8004)) && wanted.contains(&published(8080)));
}

#[test]
fn what_two_services_claim_belongs_to_the_first_by_name() {
    let mut view = view();
    let rival = service(
        "zzz",
        2,
        vec![port(Proto::Tcp, 80, &[(None, 8080), (None, 8090)])],
    );
    let before = plan(&view, &local(&view));
    view.services.push(rival);
    let after = plan(&view, &local(&view));
    assert_eq!(after.services, before.services);
    assert_eq!(
        after.published.get(&published(8080)),
        before.published.get(&published(8080))
    );
    let text = domain_fragment(&after);
    let key = "10.47.0.2 . tcp . 80 :";
    assert_eq!(text.matches(key).count(), 1);
}

#[test]
fn text_holds_no_name_and_no_address_family_that_is_off() {
    let mut view = view();
    let mut local = local(&view);
    local.ipv6 = false;
    let nasty = label(&"evil-name".repeat(7));
    view.services[1].name = nasty.clone();
    view.endpoints
        .iter_mut()
        .for_each(|e| e.names = vec![nasty.clone()]);
    let plan = plan(&view, &local);
    let text = domain_fragment(&plan) + &host_fragment(&plan);
    assert!(!text.contains("evil"));
    assert!(!text.contains("fdab:") && !text.contains("ip6 to"));
    assert!(text.contains("set published6 {"), "declared all the same");
    assert!(text.contains("ip daddr 192.0.2.53 ") && !text.contains("127.0.0.53"));
}

#[test]
fn a_peer_is_told_by_its_mac_on_either_carrier_and_has_one_number() {
    let mut view = View::empty(
        NodeId([1; 32]),
        ClusterId([7; 16]),
        AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap(),
    );
    view.members = vec![member(1, 0), member(2, 5)];
    let sealed = domain_fragment(&plan(&view, &LocalFacts::default()));
    assert!(!sealed.contains("wx0"), "{sealed}");
    assert!(sealed.contains("elements = { 02:77:01:00:00:05 : 5 }"));
    let open = |id: u8, number: u16| VxlanPeer {
        id: NodeId([id; 32]),
        number: PeerNumber(number),
        mac: [6, id, 0, 0, 0, 0],
        addr: [192, 0, 2, id].into(),
        carries: false,
        mtu: 1450,
        seal: Seal::Plain,
    };
    // The second is no member any more.
    let peers = vec![open(2, 5), open(3, 6)];
    let mac = [6; 6];
    view.vxlan = Some(VxlanView {
        mac,
        peers,
        esp: Vec::new(),
    });
    let both = domain_fragment(&plan(&view, &LocalFacts::default()));
    assert!(both.contains("elements = { 02:77:01:00:00:05 : 5, 06:02:00:00:00:00 : 5 }"));
    assert!(both.contains("06:02:00:00:00:00 : goto lb_from_5"));
    assert!(both.contains(
        "ip saddr != 10.32.0.0/12 iifname { \"wu0\", \"wx0\", \"wx6\" } ct original zone set"
    ));
}
