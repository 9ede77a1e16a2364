use std::collections::BTreeMap;

use weft_core::model::{ClusterId, EndpointId, Generation, Label};
use weft_core::view::{Endpoint, ManualName, Member, Method, PeerNumber, Service};

use super::*;

fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

fn member(n: u8, name: &str, liveness: Liveness) -> Member {
    Member {
        id: NodeId([n; 32]),
        name: label(name),
        generation: Generation(1),
        liveness,
        number: PeerNumber(n.into()),
        prefixes: Vec::new(),
        host_addrs: Vec::new(),
        mtu: None,
    }
}

fn endpoint(id: u8, node: u8, kind: EndpointKind, names: &[&str], last: u8) -> Endpoint {
    Endpoint {
        id: EndpointId([id; 8]),
        node: NodeId([node; 32]),
        kind,
        names: names.iter().map(|n| label(n)).collect(),
        network: label("default"),
        ip: Ipv4Addr::new(10, 32, 0, last),
        labels: BTreeMap::new(),
    }
}

fn view() -> View {
    use EndpointKind::{Container, Host};
    let cluster = ClusterId([0xab; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    View {
        revision: 42,
        members: vec![
            member(1, "alpha", Liveness::Alive),
            member(2, "beta", Liveness::Silent),
        ],
        endpoints: vec![
            endpoint(1, 1, Host, &[], 1),
            endpoint(2, 2, Host, &[], 2),
            endpoint(3, 1, Container, &["db", "store"], 10),
            endpoint(4, 1, Container, &["db"], 11),
            endpoint(5, 2, Container, &["db"], 12),
            endpoint(6, 2, Container, &["far"], 13),
            endpoint(7, 1, Container, &["web"], 14),
            endpoint(8, 1, Container, &[], 15),
        ],
        services: vec![Service {
            name: label("web"),
            vip: Ipv4Addr::new(10, 47, 0, 9),
            ports: Vec::new(),
            selector: BTreeMap::new(),
            method: Method::Maglev,
        }],
        names: vec![
            ManualName {
                name: label("printer"),
                ip: "192.0.2.7".parse().unwrap(),
            },
            ManualName {
                name: label("printer"),
                ip: "192.0.2.8".parse().unwrap(),
            },
        ],
        ..View::empty(NodeId([1; 32]), cluster, plan)
    }
}

fn ask(zone: &Zone, name: &str, kind: Kind) -> Answer {
    let labels: Vec<&[u8]> = name
        .split('.')
        .filter(|l| !l.is_empty())
        .map(str::as_bytes)
        .collect();
    zone.answer(&Sight::All, &labels, kind, 1)
}

fn at(name: &str, kind: Kind) -> Answer {
    ask(&Zone::new(&view(), true), name, kind)
}

fn sorted(answer: Answer) -> Vec<Data> {
    match answer {
        Answer::Found(mut data) => {
            data.sort();
            data
        }
        other => panic!("{other:?}"),
    }
}

fn v4(last: u8) -> Data {
    Data::A(Ipv4Addr::new(10, 32, 0, last))
}

fn v6(ip: [u8; 4]) -> Data {
    Data::Aaaa(view().plan.v6(ip.into()))
}

fn apex() -> Option<String> {
    Some(DOMAIN.to_owned())
}

#[test]
fn a_service_stands_for_its_vip_even_when_endpoints_bear_its_name() {
    for name in ["web", "web.weft.internal", "WEB.Weft.Internal"] {
        assert_eq!(
            at(name, Kind::A),
            Answer::Found(vec![Data::A(Ipv4Addr::new(10, 47, 0, 9))]),
            "{name}"
        );
        assert_eq!(
            at(name, Kind::Aaaa),
            Answer::Found(vec![v6([10, 47, 0, 9])])
        );
    }
}

#[test]
fn an_endpoint_name_stands_for_all_that_answer() {
    assert_eq!(sorted(at("db", Kind::A)), [v4(10), v4(11)]);
    assert_eq!(sorted(at("store", Kind::A)), [v4(10)]);
    // All of them are silent: better than none.
    assert_eq!(sorted(at("far", Kind::A)), [v4(13)]);
    assert_eq!(at("db", Kind::Any), {
        let zone = Zone::new(&view(), true);
        ask(&zone, "db.weft.internal", Kind::Any)
    });
    assert_eq!(sorted(at("db", Kind::Any)).len(), 4);
}

#[test]
fn orders_differ_by_seed_and_are_equal_for_equal_seeds() {
    let mut view = view();
    view.endpoints = (0..20)
        .map(|n| endpoint(n, 1, EndpointKind::Container, &["many"], n))
        .collect();
    let zone = Zone::new(&view, true);
    let order = |seed| zone.answer(&Sight::All, &[b"many"], Kind::A, seed);
    assert_eq!(order(5), order(5));
    assert_ne!(order(5), order(6));
    let first: BTreeSet<Data> = (0..400)
        .map(|s| match order(s) {
            Answer::Found(data) => data[0].clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(first.len(), 20);
}

#[test]
fn names_that_people_bound_and_names_of_nodes() {
    let printer = [7, 8].map(|last| Data::A(Ipv4Addr::new(192, 0, 2, last)));
    assert_eq!(sorted(at("printer.weft.internal", Kind::A)), printer);
    assert_eq!(at("printer", Kind::Aaaa), Answer::NoData(None));
    assert_eq!(sorted(at("beta.node.weft.internal", Kind::A)), [v4(2)]);
    assert_eq!(at("node.weft.internal", Kind::A), Answer::NoData(apex()));
    assert_eq!(
        at("gamma.node.weft.internal", Kind::A),
        Answer::NoName(apex())
    );
    // A node's name alone is no name of the network.
    assert_eq!(at("alpha", Kind::A), Answer::NoName(None));
    let dns = Data::A(Ipv4Addr::new(10, 47, 0, 1));
    assert_eq!(sorted(at("dns.weft.internal", Kind::A)), [dns]);
}

#[test]
fn no_such_name_and_no_such_type_are_told_apart() {
    for kind in [
        Kind::A,
        Kind::Aaaa,
        Kind::Ptr,
        Kind::Any,
        Kind::Other,
        Kind::Ns,
    ] {
        assert_eq!(at("nobody.weft.internal", kind), Answer::NoName(apex()));
        assert_eq!(at("x.db.weft.internal", kind), Answer::NoName(apex()));
    }
    for kind in [Kind::Ptr, Kind::Other, Kind::Soa, Kind::Ns] {
        assert_eq!(at("db.weft.internal", kind), Answer::NoData(apex()));
    }
    let narrow = Zone::new(&view(), false);
    assert_eq!(
        ask(&narrow, "db.weft.internal", Kind::Aaaa),
        Answer::NoData(apex())
    );
    assert_eq!(
        at("weft.internal", Kind::Soa),
        Answer::Found(vec![Data::Soa])
    );
    assert_eq!(at("weft.internal", Kind::Ns), Answer::Found(vec![Data::Ns]));
    assert_eq!(at("weft.internal", Kind::A), Answer::NoData(apex()));
}

#[test]
fn short_names_stay_at_home_and_other_peoples_names_do_not() {
    for kind in [Kind::A, Kind::Aaaa, Kind::Any, Kind::Other] {
        assert_eq!(at("nobody", kind), Answer::NoName(None));
    }
    assert_eq!(at("internal", Kind::A), Answer::NoData(None));
    for (name, kind) in [
        ("example.com", Kind::A),
        ("other.internal", Kind::A),
        ("notweft.internal", Kind::A),
        ("com", Kind::Ns),
        ("com", Kind::Delegation),
        ("", Kind::Ns),
        ("1.2.0.192.in-addr.arpa", Kind::Ptr),
    ] {
        assert_eq!(at(name, kind), Answer::Forward, "{name}");
    }
    assert_eq!(
        at("localhost", Kind::A),
        Answer::Found(vec![Data::A(Ipv4Addr::LOCALHOST)])
    );
}

#[test]
fn reverse_names_lead_to_one_name() {
    let pointer = |name: &str| Answer::Found(vec![Data::Ptr(name.to_owned())]);
    let zone = Some("32.10.in-addr.arpa".to_owned());
    assert_eq!(
        at("10.0.32.10.in-addr.arpa", Kind::Ptr),
        pointer("db.weft.internal")
    );
    assert_eq!(
        at("10.0.32.10.IN-ADDR.ARPA", Kind::Any),
        pointer("db.weft.internal")
    );
    assert_eq!(
        at("1.0.32.10.in-addr.arpa", Kind::Ptr),
        pointer("alpha.node.weft.internal")
    );
    assert_eq!(
        at("9.0.47.10.in-addr.arpa", Kind::Ptr),
        pointer("web.weft.internal")
    );
    assert_eq!(
        at("1.0.47.10.in-addr.arpa", Kind::Ptr),
        pointer("dns.weft.internal")
    );
    assert_eq!(
        at("10.0.32.10.in-addr.arpa", Kind::A),
        Answer::NoData(zone.clone())
    );
    assert_eq!(
        at("0.32.10.in-addr.arpa", Kind::Ptr),
        Answer::NoData(zone.clone())
    );
    assert_eq!(
        at("32.10.in-addr.arpa", Kind::Soa),
        Answer::Found(vec![Data::Soa])
    );
    assert_eq!(
        at("15.0.32.10.in-addr.arpa", Kind::Ptr),
        Answer::NoName(zone.clone())
    );
    assert_eq!(
        at("99.0.32.10.in-addr.arpa", Kind::Ptr),
        Answer::NoName(zone)
    );
    let reversed: String = view()
        .plan
        .v6(Ipv4Addr::new(10, 32, 0, 13))
        .octets()
        .iter()
        .rev()
        .map(|o| format!("{:x}.{:x}.", o & 15, o >> 4))
        .collect();
    assert_eq!(
        at(&format!("{reversed}ip6.arpa"), Kind::Ptr),
        pointer("far.weft.internal")
    );
}

#[test]
fn labels_that_are_no_text_are_just_unknown() {
    let zone = Zone::new(&view(), true);
    let labels: [&[u8]; 3] = [&[0xff, 0, b'.'], b"weft", b"internal"];
    assert_eq!(
        zone.answer(&Sight::All, &labels, Kind::A, 0),
        Answer::NoName(apex())
    );
}

#[test]
fn a_container_sees_the_endpoints_of_its_own_network_and_a_host_all() {
    let mut view = view();
    let net = |text: &str| text.parse::<Ipv4Net>().unwrap();
    let network = |name: &str, block: &str, also: &[&str]| weft_core::view::NetworkView {
        name: label(name),
        net: net(block),
        also: also.iter().map(|block| net(block)).collect(),
        size: 4094,
        used: 0,
        free_here: 0,
        low: false,
    };
    view.networks = vec![
        network("default", "10.32.0.0/16", &[]),
        network("blue", "10.33.0.0/20", &["10.34.0.0/20"]),
    ];
    for (id, name, ip) in [
        (20, "db", [10, 33, 0, 7]),
        (21, "only", [10, 34, 0, 8]),
        (22, "web", [10, 33, 0, 9]),
    ] {
        let mut blue = endpoint(id, 1, EndpointKind::Container, &[name], 0);
        (blue.network, blue.ip) = (label("blue"), ip.into());
        view.endpoints.push(blue);
    }
    let zone = Zone::new(&view, true);
    let from = |text: &str| zone.sight(text.parse().unwrap());
    let blue = Sight::Network(Some(label("blue")));
    let default = Sight::Network(Some(label("default")));
    assert_eq!(
        (from("10.32.0.10"), from("10.34.0.8")),
        (default.clone(), blue.clone())
    );
    let twin = view.plan.v6(Ipv4Addr::new(10, 33, 0, 7));
    assert_eq!(zone.sight(twin.into()), blue);
    assert_eq!(from("10.40.0.1"), Sight::Network(None));
    for host in ["10.32.0.1", "127.0.0.1", "169.254.1.2", "fe80::1"] {
        assert_eq!(from(host), Sight::All, "{host}");
    }
    let ask = |sight: &Sight, name: &str| match zone.answer(sight, &[name.as_bytes()], Kind::A, 1) {
        Answer::Found(found) => found.len(),
        _ => 0,
    };
    for (name, seen) in [
        ("db", [3, 2, 1, 0]),
        ("only", [1, 0, 1, 0]),
        ("store", [1, 1, 0, 0]),
    ] {
        let sights = [
            Sight::All,
            default.clone(),
            blue.clone(),
            Sight::Network(None),
        ];
        assert_eq!(sights.map(|sight| ask(&sight, name)), seen, "{name}");
    }
    // Services, and what people bound, are for all.
    let vip = Answer::Found(vec![Data::A(Ipv4Addr::new(10, 47, 0, 9))]);
    assert_eq!(zone.answer(&blue, &[b"web"], Kind::A, 1), vip);
    assert_eq!(ask(&blue, "printer"), 2);
    let labels: Vec<&[u8]> = "10.0.32.10.in-addr.arpa"
        .split('.')
        .map(str::as_bytes)
        .collect();
    assert!(matches!(
        zone.answer(&blue, &labels, Kind::Ptr, 1),
        Answer::NoName(_)
    ));
    assert!(matches!(
        zone.answer(&default, &labels, Kind::Ptr, 1),
        Answer::Found(_)
    ));
}
