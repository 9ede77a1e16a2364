use weft_core::layout::{VXLAN_CARRIER, VXLAN_CARRIER6, VXLAN_CARRIERS, vxlan_mac};
use weft_core::model::{ClusterId, EndpointId, Generation, Label, NodeId};
use weft_core::view::{
    Endpoint, EndpointKind, NetworkView, PeerNumber, Seal, VxlanPeer, VxlanView,
};

use super::*;
use crate::plan::LocalLeg;

const BACKEND: Backend = Backend {
    ip: Ipv4Addr::new(10, 32, 128, 2),
    proto: Proto::Tcp,
    port: 80,
};

fn member(id: u8, liveness: Liveness, prefix: &str) -> Member {
    Member {
        id: NodeId([id; 32]),
        name: Label::parse(&format!("n{id}")).unwrap(),
        generation: Generation(1),
        liveness,
        number: PeerNumber(u16::from(id) - 1),
        prefixes: vec![prefix.parse().unwrap()],
        host_addrs: vec![],
        mtu: Some(1439),
    }
}

fn peer(id: u8, mtu: u16) -> VxlanPeer {
    let id_of_it = NodeId([id; 32]);
    VxlanPeer {
        id: id_of_it,
        number: PeerNumber(u16::from(id) - 1),
        mac: vxlan_mac(&id_of_it),
        addr: [192, 0, 2, id].into(),
        seal: Seal::Plain,
        carries: true,
        mtu,
    }
}

fn network(name: &str, net: &str) -> NetworkView {
    NetworkView {
        name: Label::parse(name).unwrap(),
        net: net.parse().unwrap(),
        also: vec![],
        size: 4096,
        used: 0,
        free_here: 4096,
        low: false,
    }
}

/// This host, two peers over `vxlan`, and a container of the second one's.
fn view() -> View {
    let cluster = ClusterId([7; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    View {
        members: vec![
            member(1, Liveness::Alive, "10.32.0.0/17"),
            member(2, Liveness::Alive, "10.32.128.0/17"),
            member(3, Liveness::Alive, "10.40.0.0/13"),
        ],
        endpoints: vec![Endpoint {
            id: EndpointId([3; 8]),
            node: NodeId([2; 32]),
            kind: EndpointKind::Container,
            names: vec![],
            network: Label::parse("default").unwrap(),
            ip: BACKEND.ip,
            labels: BTreeMap::new(),
        }],
        networks: vec![
            network("default", "10.32.0.0/16"),
            network("blue", "10.40.0.0/20"),
        ],
        vxlan: Some(VxlanView {
            mac: vxlan_mac(&NodeId([1; 32])),
            peers: vec![peer(2, 1450), peer(3, 1450)],
            esp: vec![],
        }),
        ..View::empty(NodeId([1; 32]), cluster, plan)
    }
}

fn peers_of(view: &mut View) -> &mut Vec<VxlanPeer> {
    &mut view.vxlan.as_mut().unwrap().peers
}

fn local() -> LocalFacts {
    let leg = LocalLeg {
        id: EndpointId([2; 8]),
        ip: [10, 32, 0, 2].into(),
    };
    LocalFacts {
        legs: vec![leg],
        ipv6: true,
        ..LocalFacts::default()
    }
}

fn noted(view: &View, backends: &[Backend]) -> FastMemory {
    let mut memory = FastMemory::default();
    memory.note(view, backends.iter().copied());
    memory
}

fn planned(view: &View, memory: &FastMemory) -> FastPath {
    plan_fast_path(view, &local(), memory, &VXLAN_CARRIERS.into()).unwrap()
}

/// The prefixes that are led to, and by which carrier.
fn led(view: &View, by_vxlan: &[&'static str]) -> Vec<(String, &'static str)> {
    let by_vxlan = by_vxlan.iter().copied().collect();
    let plan = plan_fast_path(view, &local(), &FastMemory::default(), &by_vxlan);
    let ways = plan.map_or_else(Vec::new, |plan| plan.ways);
    let ways = ways.iter().map(|(net, way)| (net.to_string(), way.carrier));
    ways.collect()
}

const SECOND: &str = "10.32.128.0/17";
const THIRD: &str = "10.40.0.0/20";

fn by(carrier: &'static str, nets: &[&str]) -> Vec<(String, &'static str)> {
    let nets = nets.iter().map(|net| ((*net).to_owned(), carrier));
    nets.collect()
}

#[test]
fn it_leads_to_peers_that_are_alive_by_the_carrier_of_each() {
    let mut view = view();
    assert_eq!(
        led(&view, &VXLAN_CARRIERS),
        by(VXLAN_CARRIER, &[SECOND, THIRD])
    );
    assert!(led(&view, &[]).is_empty());
    view.members[2].liveness = Liveness::Down;
    assert_eq!(led(&view, &VXLAN_CARRIERS), by(VXLAN_CARRIER, &[SECOND]));
    view.vxlan = None;
    assert_eq!(led(&view, &[]), by(UDP_CARRIER, &[SECOND]));
    view.members[1].mtu = None;
    assert!(led(&view, &[]).is_empty());
}

#[test]
fn each_version_of_the_underlay_has_its_device() {
    let mut view = view();
    peers_of(&mut view)[1].addr = "2001:db8::3".parse().unwrap();
    let second = by(VXLAN_CARRIER, &[SECOND]);
    let third = by(VXLAN_CARRIER6, &[THIRD]);
    assert_eq!(
        led(&view, &VXLAN_CARRIERS),
        [second, third.clone()].concat()
    );
    assert_eq!(led(&view, &[VXLAN_CARRIER6]), third);
    let plan = planned(&view, &noted(&view, &[]));
    let from = |device| &plan.carriers[device].owners;
    // From nobody packets come by another one than theirs.
    assert_eq!(from(VXLAN_CARRIER).len(), 1);
    assert_eq!(from(VXLAN_CARRIER6)[0].1.mac, vxlan_mac(&NodeId([3; 32])));
    assert_eq!(from(VXLAN_CARRIER6).len(), 1);
}

#[test]
fn both_carriers_stand_side_by_side() {
    let mut view = view();
    peers_of(&mut view)[0].carries = false;
    let memory = noted(&view, &[]);
    let both = [by(UDP_CARRIER, &[SECOND]), by(VXLAN_CARRIER, &[THIRD])];
    assert_eq!(led(&view, &VXLAN_CARRIERS), both.concat());
    assert_eq!(led(&view, &[]), both[0]);
    let plan = planned(&view, &memory);
    // From everybody packets may come by either.
    for (carrier, mac) in [
        (UDP_CARRIER, peer_mac(PeerNumber(1))),
        (VXLAN_CARRIER, vxlan_mac(&NodeId([2; 32]))),
    ] {
        let owners = &plan.carriers[carrier].owners;
        assert_eq!(owners.len(), 2);
        assert_eq!(
            (owners[0].0.to_string(), owners[0].1.mac),
            (SECOND.into(), mac)
        );
    }
}

#[test]
fn what_a_service_stood_for_is_remembered_as_long_as_somebody_has_the_address() {
    let mut view = view();
    let mut memory = noted(&view, &[BACKEND]);
    memory.note(&view, std::iter::empty());
    assert!(memory.table().contains("{ 10.32.128.2 . tcp . 80 }"));
    let plan = planned(&view, &memory);
    assert_eq!(plan.memory, memory);
    view.endpoints.clear();
    memory.note(&view, std::iter::empty());
    assert!(memory.translated.is_empty());
}

#[test]
fn it_stands_on_devices_that_are_there() {
    let view = view();
    let plan = planned(&view, &noted(&view, &[]));
    let leg = leg_name(&EndpointId([2; 8]));
    assert!(plan.has_device(&leg) && plan.has_device(VXLAN_CARRIER));
    assert!(plan.has_device(UDP_CARRIER) && !plan.has_device("wh0"));
}

#[test]
fn addresses_are_in_one_network_if_they_are_in_any_of_its_blocks() {
    let mut view = view();
    view.networks[1].also = vec!["10.41.0.0/19".parse().unwrap()];
    // Not one of its own: it is another network's already.
    view.networks[1].also.push("10.32.4.0/22".parse().unwrap());
    let plan = planned(&view, &noted(&view, &[]));
    let of = |network| {
        let owners = plan.ways.iter();
        let owners = owners.filter(move |(_, way)| way.owner.place.network == network);
        let shown = owners.map(|(net, way)| (net.to_string(), way.owner.place.block));
        shown.collect::<Vec<_>>()
    };
    let own = plan.legs.values().next().unwrap().place;
    assert_eq!(of(own.network), [("10.32.128.0/17".to_owned(), 0)]);
    // Each number of a block by itself, as the IPv6 addresses name it.
    let blue = [
        ("10.40.0.0/20".to_owned(), 128),
        ("10.41.0.0/20".to_owned(), 144),
        ("10.41.16.0/20".to_owned(), 145),
    ];
    assert_eq!(of(own.network + 1), blue);
}

#[test]
fn what_is_in_no_network_is_nobody_s() {
    let mut view = view();
    view.networks.truncate(1);
    let memory = noted(&view, &[]);
    assert_eq!(led(&view, &VXLAN_CARRIERS), by(VXLAN_CARRIER, &[SECOND]));
    view.networks.clear();
    assert_eq!(
        plan_fast_path(&view, &local(), &memory, &VXLAN_CARRIERS.into()),
        None
    );
}
