//! Both fragments in the real kernel, with real packets. Needs root, `ip` and `nft`; fails without.

#![allow(clippy::unwrap_used)]

mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lab::{CLIENT4, CLIENT6, FAR4, FAR6, HOST4, HOST6, Lab, Ns, PEERS, RESOLVER, read_line};
use socket2::Type;
use weft_core::model::{ClusterId, EndpointId, Generation, Label, NodeId, Proto};
use weft_core::view::{
    Endpoint, EndpointKind, Liveness, Member, Method, PeerNumber, Publish, Service, ServicePort,
    View,
};
use weft_lb::{LocalFacts, domain_fragment, host_fragment, plan, wanted};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 47, 0, 9);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 47, 0, 10);
const TARGET: u16 = 8080;
const NAMES: [&str; 3] = ["b0", "b1", "b2"];

fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

fn member(n: u8, number: PeerNumber) -> Member {
    Member {
        id: NodeId([n; 32]),
        name: label("node"),
        generation: Generation(1),
        liveness: Liveness::Alive,
        number,
        prefixes: Vec::new(),
        host_addrs: Vec::new(),
        mtu: None,
    }
}

fn service(name: &str, vip: Ipv4Addr, published: u16) -> Service {
    let port = |proto| ServicePort {
        proto,
        port: 80,
        target: TARGET,
        publish: vec![Publish {
            addr: None,
            port: published,
        }],
    };
    Service {
        name: label(name),
        vip,
        ports: vec![port(Proto::Tcp), port(Proto::Udp)],
        selector: BTreeMap::new(),
        method: Method::Maglev,
    }
}

/// Containers 0 and 1 are `web`; 2 is nothing. Service `empty` has no backend.
fn view(lab: &Lab, web: &[usize]) -> View {
    let me = NodeId([1; 32]);
    let endpoint = |n: usize| Endpoint {
        id: EndpointId([n as u8; 8]),
        node: me,
        kind: EndpointKind::Container,
        names: vec![label(if web.contains(&n) { "web" } else { "x" })],
        network: label("default"),
        ip: Lab::ip(n),
        labels: BTreeMap::new(),
    };
    View {
        members: vec![
            member(1, PeerNumber(0)),
            member(2, PEERS[0]),
            member(3, PEERS[1]),
        ],
        endpoints: (0..3).map(endpoint).collect(),
        services: vec![service("empty", EMPTY, 8001), service("web", VIP, 8000)],
        ..View::empty(me, ClusterId([0xab; 16]), lab.plan)
    }
}

fn apply(lab: &Lab, web: &[usize]) {
    let view = view(lab, web);
    let facts = LocalFacts {
        host_addrs: [HOST4, HOST6].map(|ip| ip.parse().unwrap()).to_vec(),
        published_here: wanted(&view),
        resolvers: vec![RESOLVER.parse().unwrap()],
        ipv6: true,
    };
    let plan = plan(&view, &facts);
    lab.domain.nft(&domain_fragment(&plan));
    lab.host.nft(&host_fragment(&plan));
}

fn rig(web: &[usize]) -> Lab {
    let lab = Lab::new();
    apply(&lab, web);
    for (ns, name) in lab.containers.iter().zip(NAMES) {
        ns.serve(name, TARGET);
    }
    lab
}

/// Who answered, and whom it saw.
fn said(text: &str) -> (String, SocketAddr) {
    let (name, addr) = text.split_once(' ').unwrap();
    (name.to_owned(), addr.parse().unwrap())
}

fn ask(ns: &Ns, kind: Type, from: Option<SocketAddr>, to: SocketAddr) -> (String, SocketAddr) {
    let reply = if kind == Type::STREAM {
        ns.tcp(from, to)
    } else {
        ns.udp(from, to)
    };
    said(&reply.unwrap_or_else(|e| panic!("{to}: {e}")))
}

/// Asks from many ports; returns who answered and what addresses the servers saw.
fn ask_often(ns: &Ns, to: SocketAddr) -> (BTreeSet<String>, BTreeSet<IpAddr>) {
    let mut names = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for kind in [Type::STREAM, Type::DGRAM] {
        for _ in 0..20 {
            let (name, addr) = ask(ns, kind, None, to);
            names.insert(name);
            seen.insert(addr.ip());
        }
    }
    (names, seen)
}

fn both() -> BTreeSet<String> {
    ["b0", "b1"].map(str::to_owned).into()
}

#[test]
fn containers_and_the_host_reach_a_vip_and_keep_their_addresses() {
    let lab = rig(&[0, 1]);
    for v6 in [false, true] {
        let vip = SocketAddr::new(lab.either(VIP, v6), 80);
        let (names, seen) = ask_often(&lab.containers[2], vip);
        assert_eq!(names, both());
        assert_eq!(seen, [lab.ip_of(2, v6)].into());
        let (names, seen) = ask_often(&lab.host, vip);
        assert_eq!(names, both());
        assert_eq!(seen, [lab.either(Ipv4Addr::new(10, 32, 0, 1), v6)].into());
    }
}

#[test]
fn one_client_port_leads_to_one_backend_as_the_table_says() {
    let lab = rig(&[0, 1]);
    let vip = SocketAddr::new(VIP.into(), 80);
    for port in 40_000..40_010 {
        let from = Some(SocketAddr::new(lab.ip_of(2, false), port));
        let first = ask(&lab.containers[2], Type::DGRAM, from, vip);
        apply(&lab, &[0, 1]);
        assert_eq!(ask(&lab.containers[2], Type::DGRAM, from, vip), first);
        assert_eq!(first.1.port(), port);
        // TCP and UDP are different ports of the service with tables of their own; each is stable.
        let tcp = ask(&lab.containers[2], Type::STREAM, from, vip);
        assert_eq!(tcp.1.port(), port);
    }
}

#[test]
fn a_client_outside_reaches_a_published_port_and_is_seen_as_itself() {
    let lab = rig(&[0, 1]);
    for (host, client) in [(HOST4, CLIENT4), (HOST6, CLIENT6)] {
        let to = SocketAddr::new(host.parse().unwrap(), 8000);
        let (names, seen) = ask_often(&lab.client, to);
        assert_eq!(names, both());
        assert_eq!(seen, [client.parse().unwrap()].into());
        let from = SocketAddr::new(client.parse().unwrap(), 45_000);
        assert_eq!(ask(&lab.client, Type::STREAM, Some(from), to).1, from);
    }
}

#[test]
fn a_container_reaches_its_own_hosts_published_port() {
    let lab = rig(&[0, 1]);
    for (host, v6) in [(HOST4, false), (HOST6, true)] {
        let to = SocketAddr::new(host.parse().unwrap(), 8000);
        let (names, seen) = ask_often(&lab.containers[2], to);
        assert_eq!(names, both());
        assert_eq!(seen, [lab.ip_of(2, v6)].into());
    }
}

#[test]
fn a_backend_reaches_itself_through_its_vip_and_its_published_port() {
    let lab = rig(&[0]);
    for v6 in [false, true] {
        let gateway = lab.either(lab.plan.dns4(), v6);
        let host = if v6 { HOST6 } else { HOST4 };
        let vip = SocketAddr::new(lab.either(VIP, v6), 80);
        let published = SocketAddr::new(host.parse().unwrap(), 8000);
        for to in [vip, published] {
            let (names, seen) = ask_often(&lab.containers[0], to);
            assert_eq!(names, ["b0".to_owned()].into());
            assert_eq!(seen, [gateway].into());
        }
        // Another backend keeps its address.
        let (_, seen) = ask_often(&lab.containers[1], vip);
        assert_eq!(seen, [lab.ip_of(1, v6)].into());
    }
}

#[test]
fn what_nobody_serves_is_refused_at_once() {
    let lab = rig(&[0, 1]);
    for v6 in [false, true] {
        let host = if v6 { HOST6 } else { HOST4 };
        let cases = [
            (
                &lab.containers[2],
                SocketAddr::new(lab.either(EMPTY, v6), 80),
            ),
            (&lab.containers[2], SocketAddr::new(lab.either(VIP, v6), 81)),
            (&lab.host, SocketAddr::new(lab.either(VIP, v6), 81)),
            (&lab.client, SocketAddr::new(host.parse().unwrap(), 8001)),
        ];
        for (ns, to) in cases {
            for reply in [ns.tcp(None, to), ns.udp(None, to)] {
                assert_eq!(
                    reply.unwrap_err().kind(),
                    ErrorKind::ConnectionRefused,
                    "{to}"
                );
            }
        }
    }
}

#[test]
fn one_client_through_two_hosts_to_one_backend_gets_both_answers() {
    let lab = rig(&[0]);
    for (far, v6) in [(FAR4, false), (FAR6, true)] {
        let from = Some(SocketAddr::new(far.parse().unwrap(), 46_000));
        let to = SocketAddr::new(lab.ip_of(0, v6), TARGET);
        for kind in [Type::STREAM, Type::DGRAM] {
            // Both are open at once, from the same address and port.
            let mut held: Vec<_> = lab
                .peers
                .iter()
                .map(|peer| peer.connect(from, to, kind))
                .collect();
            for socket in &mut held {
                if kind == Type::DGRAM {
                    socket.write_all(b"?").unwrap();
                }
                let (name, seen) = said(&read_line(socket).unwrap());
                assert_eq!((name.as_str(), seen.ip()), ("b0", far.parse().unwrap()));
            }
            for (n, socket) in held.iter_mut().enumerate().filter(|_| kind == Type::STREAM) {
                let text = format!("again {n}");
                socket.write_all(text.as_bytes()).unwrap();
                assert_eq!(read_line(socket).unwrap(), text);
            }
        }
    }
}

#[test]
fn a_connection_outlives_every_change_of_the_tables() {
    let lab = rig(&[0, 1]);
    let to = SocketAddr::new(HOST4.parse().unwrap(), 8000);
    let mut socket = lab.client.connect(None, to, Type::STREAM);
    let (name, _) = said(&read_line(&mut socket).unwrap());
    let other: Vec<usize> = (0..2).filter(|n| NAMES[*n] != name).collect();
    for web in [&other[..], &[0, 1], &[]] {
        apply(&lab, web);
        socket.write_all(b"still there?").unwrap();
        assert_eq!(read_line(&mut socket).unwrap(), "still there?");
    }
    let late = lab.client.tcp(None, to).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn queries_to_the_hosts_resolver_come_to_the_domain_instead() {
    let lab = rig(&[0]);
    lab.domain
        .serve_udp_at("dns", SocketAddr::new(lab.plan.dns4().into(), 53));
    let to = SocketAddr::new(RESOLVER.parse().unwrap(), 53);
    let (name, seen) = ask(&lab.containers[2], Type::DGRAM, None, to);
    assert_eq!((name.as_str(), seen.ip()), ("dns", lab.ip_of(2, false)));
}

#[test]
fn fragments_with_nothing_in_them_load_too() {
    let lab = Lab::new();
    let mut view = view(&lab, &[]);
    view.members.truncate(1);
    view.endpoints.clear();
    view.services.clear();
    for ipv6 in [false, true] {
        let facts = LocalFacts {
            ipv6,
            ..LocalFacts::default()
        };
        let plan = plan(&view, &facts);
        lab.domain.nft(&domain_fragment(&plan));
        lab.host.nft(&host_fragment(&plan));
    }
}
