//! The `vxlan` carrier: its devices, who is behind which MAC, and the filter before them.

use std::net::IpAddr;

use weft_core::layout::{
    VXLAN_CARRIER, VXLAN_CARRIER6, VXLAN_CARRIERS, mac_text, peer_nexthop, vxlan_carrier, vxlan_mac,
};
use weft_core::model::NodeId;
use weft_core::view::{PeerNumber, Seal, VxlanPeer, VxlanView};
use weft_kernel::nft;
use weft_kernel::{Domain, KernelError};

use crate::lab::{Lab, on_a_host, run, sh};

/// Where peer 1 of the lab's view is, by either version, and where it moves to.
const HOMES: [[&str; 2]; 2] = [["192.0.2.2", "192.0.2.9"], ["2001:db8::2", "2001:db8::9"]];

fn peer(carries: bool) -> VxlanPeer {
    peer_at(HOMES[0][0], carries)
}

fn peer_at(addr: &str, carries: bool) -> VxlanPeer {
    let id = NodeId([2; 32]);
    VxlanPeer {
        id,
        number: PeerNumber(1),
        mac: vxlan_mac(&id),
        addr: addr.parse().unwrap(),
        seal: Seal::Plain,
        carries,
        mtu: 1450,
    }
}

fn own_mac() -> [u8; 6] {
    vxlan_mac(&NodeId([1; 32]))
}

/// The view and the filter of a host that takes VXLAN from these, and the device by which all of them are reached.
fn trusting(lab: &mut Lab, peers: Vec<VxlanPeer>) -> u32 {
    let mac = own_mac();
    let host = peers.first().map(|peer| peer.addr);
    let device = host.map_or(VXLAN_CARRIER, vxlan_carrier);
    lab.view.vxlan = Some(VxlanView {
        mac,
        peers,
        esp: Vec::new(),
    });
    lab.local.vxlan.clear();
    lab.bring_up();
    let index = ensure(lab, device).unwrap();
    lab.local.vxlan.insert(device);
    index
}

fn ensure(lab: &Lab, device: &str) -> Result<u32, KernelError> {
    lab.domain().ensure_vxlan(&lab.host, device, own_mac())
}

/// A stand-in for the TAP.
fn sealed_carrier(lab: &Lab) {
    lab.in_domain(
        "ip link add wu0 type veth peer name wuf && ip link set wu0 up && ip link set wuf up",
    );
}

fn next_hop(lab: &Lab) -> String {
    let id = peer_nexthop(PeerNumber(1));
    lab.in_domain(&format!("ip nexthop show id {id}"))
}

#[test]
fn peers_are_neighbours_on_it_and_moving_one_replaces_its_next_hop() {
    for (device, homes) in VXLAN_CARRIERS.into_iter().zip(HOMES) {
        on_a_host(|lab| peers_are_neighbours(lab, device, homes));
    }
}

fn peers_are_neighbours(lab: &mut Lab, device: &'static str, [home, next]: [&str; 2]) {
    sealed_carrier(lab);
    let peer = |carries| peer_at(home, carries);
    let mac = mac_text(peer(true).mac);
    let index = trusting(lab, vec![peer(false)]);
    lab.bring_up();
    let link = lab.in_domain(&format!("ip -d link show {device}"));
    for part in [
        "vxlan id 6783",
        "dstport 6784",
        "nolearning",
        "df set",
        "mtu 9000",
        mac_text(own_mac()).as_str(),
        "UP",
    ] {
        assert!(link.contains(part), "{part}: {link}");
    }
    let entries = || lab.in_domain(&format!("bridge fdb show dev {device}"));
    let leads = format!("{mac} dst {home} ");
    assert!(
        entries().contains(&leads) && entries().contains("self permanent"),
        "{}",
        entries()
    );
    let neighbours = lab.in_domain(&format!("ip -6 neigh show dev {device}"));
    assert!(
        neighbours.contains(&format!("fe80::77:1 lladdr {mac} PERMANENT")),
        "{neighbours}"
    );
    assert!(next_hop(lab).contains("dev wu0"), "{}", next_hop(lab));
    // It carries: one object moves, with all routes that name it.
    lab.view.vxlan.as_mut().unwrap().peers[0] = peer(true);
    let (report, _) = lab.bring_up();
    assert!(next_hop(lab).contains(&format!("via fe80::77:1 dev {device}")));
    let routes = lab.in_domain("ip -4 route show 10.32.128.0/17");
    assert!(routes.contains("mtu 1450"), "{routes}");
    assert!(report.failures.is_empty());
    let (again, host) = lab.bring_up();
    assert_eq!((again.changes, host.report.changes), (0, 0), "{again:?}");
    // A peer that moved house, and one that left.
    lab.view.vxlan.as_mut().unwrap().peers[0] = peer_at(next, true);
    lab.bring_up();
    let entries = || lab.in_domain(&format!("bridge fdb show dev {device}"));
    assert!(entries().contains(next) && !entries().contains(&leads));
    lab.view.vxlan.as_mut().unwrap().peers.clear();
    lab.bring_up();
    let entries = lab.in_domain(&format!("bridge fdb show dev {device}"));
    assert_eq!(entries.trim(), "");
    let neighbours = format!("ip neigh show dev {device} nud permanent");
    assert_eq!(lab.in_domain(&neighbours), "");
    assert!(next_hop(lab).contains("dev wu0"));
    // The next start finds the device and keeps it.
    assert_eq!(ensure(lab, device).unwrap(), index);
}

#[test]
fn both_versions_stand_side_by_side_and_go_with_the_filter() {
    on_a_host(|lab| {
        trusting(lab, vec![peer(true), peer_at(HOMES[1][0], true)]);
        ensure(lab, VXLAN_CARRIER6).unwrap();
        let ports = sh("ss -Hlnu");
        assert!(ports.contains("0.0.0.0:6784") && ports.contains("[::]:6784"));
        sh("nft flush ruleset");
        lab.domain().close_unguarded_vxlan(&lab.host).unwrap();
        assert!(!sh("ss -Hlnu").contains(":6784"));
        for device in VXLAN_CARRIERS {
            let link = lab.in_domain(&format!("ip -br link show {device}"));
            assert!(!link.contains("UP"), "{link}");
        }
    });
}

#[test]
fn what_others_put_into_it_is_taken_out() {
    on_a_host(|lab| {
        trusting(lab, vec![peer(true)]);
        lab.bring_up();
        let clean = lab.in_domain("bridge fdb show dev wx0");
        lab.in_domain("bridge fdb append 00:00:00:00:00:00 dev wx0 dst 192.0.2.66");
        lab.in_domain("bridge fdb add 02:00:00:00:00:66 dev wx0 dst 192.0.2.66");
        lab.bring_up();
        assert_eq!(lab.in_domain("bridge fdb show dev wx0"), clean);
    });
}

#[test]
fn while_it_is_not_up_everything_goes_by_the_sealed_carrier() {
    on_a_host(|lab| {
        sealed_carrier(lab);
        trusting(lab, vec![peer(true)]);
        lab.bring_up();
        assert!(next_hop(lab).contains("dev wx0"));
        lab.domain().close_vxlan(VXLAN_CARRIER).unwrap();
        lab.local.vxlan.clear();
        lab.bring_up();
        assert!(next_hop(lab).contains("dev wu0"));
        let routes = lab.in_domain("ip -4 route show 10.32.128.0/17");
        assert!(routes.contains("mtu 1400"), "{routes}");
        // Closed, the host has no socket for it either.
        assert!(!sh("ss -Hlnu").contains(":6784"));
        lab.domain().remove_vxlan(VXLAN_CARRIER).unwrap();
        lab.domain().remove_vxlan(VXLAN_CARRIER).unwrap();
        assert!(!lab.in_domain("ip -br link").contains("wx0"));
    });
}

#[test]
fn a_device_that_is_not_as_it_should_be_is_made_anew() {
    on_a_host(|lab| {
        trusting(lab, vec![]);
        for wrong in [
            "id 6783 dstport 6784 learning",
            "id 6783 dstport 4789 nolearning",
            "id 1 dstport 6784 nolearning",
        ] {
            lab.domain().remove_vxlan(VXLAN_CARRIER).unwrap();
            lab.in_domain(&format!("ip link add wx0 type vxlan {wrong}"));
            ensure(lab, VXLAN_CARRIER).unwrap();
            let link = lab.in_domain("ip -d link show wx0");
            for part in ["vxlan id 6783", "dstport 6784", "nolearning", "df set"] {
                assert!(link.contains(part), "{wrong}: {link}");
            }
        }
    });
}

#[test]
fn what_it_needs_and_another_has_is_told() {
    on_a_host(|lab| {
        trusting(lab, vec![]);
        // As a daemon that was killed leaves it behind.
        let name = format!("{}b", lab.name);
        let (other, _) = Domain::open_or_create(&name).unwrap();
        let error = other
            .ensure_vxlan(&lab.host, VXLAN_CARRIER, own_mac())
            .unwrap_err();
        let teardown = lab.host.teardown(&name, &mut Default::default());
        assert!(matches!(error, KernelError::VxlanTaken), "{error}");
        assert!(teardown.is_empty(), "{teardown:?}");
        lab.domain().close_vxlan(VXLAN_CARRIER).unwrap();
        let _squatter = std::net::UdpSocket::bind("0.0.0.0:6784").unwrap();
        let error = ensure(lab, VXLAN_CARRIER).unwrap_err();
        assert!(matches!(error, KernelError::VxlanTaken), "{error}");
    });
}

#[test]
fn its_filter_counts_as_standing_only_whole() {
    on_a_host(|lab| {
        lab.bring_up();
        assert!(!nft::guards_vxlan(&lab.host).unwrap(), "not asked for");
        trusting(lab, vec![peer(true)]);
        for damage in [
            "flush ruleset",
            "delete table inet weft",
            "flush chain inet weft base_vxlan_in",
            "flush chain inet weft base_vxlan_out",
            "flush chain inet weft base_vxlan_through",
            "insert rule inet weft base_vxlan_in accept",
        ] {
            lab.bring_up();
            assert!(nft::guards_vxlan(&lab.host).unwrap(), "before {damage}");
            ensure(lab, VXLAN_CARRIER).unwrap();
            sh(&format!("nft {damage}"));
            assert!(!nft::guards_vxlan(&lab.host).unwrap(), "after {damage}");
            lab.domain().close_unguarded_vxlan(&lab.host).unwrap();
            let link = lab.in_domain("ip -br link show wx0");
            assert!(!link.contains("UP"), "after {damage}: {link}");
        }
    });
}

#[test]
fn nobody_else_can_take_the_shield_away() {
    on_a_host(|lab| {
        trusting(lab, vec![peer(true), peer_at(HOMES[1][0], true)]);
        lab.bring_up();
        let vxlan = lab.view.vxlan.clone().unwrap();
        lab.host.raise_shield(&vxlan).unwrap();
        ensure(lab, VXLAN_CARRIER).unwrap();
        let shown = sh("nft list ruleset");
        let table = shown.lines().find(|l| l.contains("weft_vxlan_")).unwrap();
        let name = table.split_whitespace().nth(2).unwrap().to_owned();
        for text in [
            "flags owner",
            "ip saddr . @th,176,48 @peers",
            "meta skuid",
            "ip6 saddr . @th,176,48 @sealed6",
            "elements = { 2001:db8::2 . ",
        ] {
            assert!(shown.contains(text), "{text}: {shown}");
        }
        let rules = || sh(&format!("nft list table inet {name}"));
        let before = rules();
        for damage in ["flush ruleset", &format!("flush chain inet {name} in")] {
            run(&format!("nft {damage}"));
            assert_eq!(rules(), before, "{damage}");
        }
        lab.domain().close_unguarded_vxlan(&lab.host).unwrap();
        let link = lab.in_domain("ip -br link show wx0");
        assert!(link.contains("UP"), "{link}");
        // Other peers, and then none.
        let mut other = vxlan.clone();
        other.peers[0].addr = "192.0.2.77".parse().unwrap();
        lab.host.raise_shield(&other).unwrap();
        assert!(rules().contains("192.0.2.77") && !rules().contains("192.0.2.2 "));
        assert!(rules().contains("2001:db8::2 "));
        other.peers.clear();
        lab.host.raise_shield(&other).unwrap();
        assert!(!rules().contains("elements"));
        lab.host.lower_shield();
        assert!(!lab.host.has_shield());
        assert_eq!(sh("nft list ruleset"), "");
        lab.domain().close_unguarded_vxlan(&lab.host).unwrap();
        let link = lab.in_domain("ip -br link show wx0");
        assert!(!link.contains("UP"), "{link}");
    });
}

#[test]
fn a_host_without_trusted_networks_has_nothing_of_it() {
    on_a_host(|lab| {
        lab.bring_up();
        let host = sh("nft list ruleset");
        let domain = lab.in_domain("nft list ruleset");
        for text in [host, domain] {
            assert!(!text.contains("6784") && !text.contains("wx0"), "{text}");
            assert!(!text.contains("vxlan"), "{text}");
        }
    });
}

#[test]
fn a_teardown_takes_it_with_it() {
    on_a_host(|lab| {
        trusting(lab, vec![peer(true)]);
        lab.bring_up();
        assert!(lab.teardown().is_empty());
        // The network identifier is free again.
        sh("ip link add again type vxlan id 6783 dstport 6784");
        assert!(run("ip link show wx0").stdout.is_empty());
        assert_eq!(sh("nft list ruleset"), "");
    });
}

/// The rules against the packets that they are about: what a neighbour on the LAN sends.
#[test]
fn the_host_takes_it_from_the_peer_s_address_and_mac_alone() {
    on_a_host(|lab| takes_from_the_peer_alone(lab, "192.0.2.1", "192.0.2.2", "192.0.2.3"));
}

#[test]
fn and_so_it_does_by_ipv6() {
    on_a_host(|lab| takes_from_the_peer_alone(lab, "2001:db8::1", "2001:db8::2", "2001:db8::3"));
}

fn takes_from_the_peer_alone(lab: &mut Lab, own: &str, home: &str, other: &str) {
    let neighbour = lab.lan();
    let by = peer_at(home, true);
    let device = vxlan_carrier(by.addr);
    let (length, any) = match by.addr {
        IpAddr::V4(_) => (24, ""),
        IpAddr::V6(_) => (64, "local ::"),
    };
    trusting(lab, vec![by]);
    lab.bring_up();
    let devices = [device].into();
    nft::count_vxlan(lab.domain(), &devices, &[by.mac]).unwrap();
    let (mac, own_mac) = (mac_text(by.mac), mac_text(own_mac()));
    let counted = || -> (String, String) {
        let stats = lab.in_domain(&format!("ip -j -s link show {device}"));
        let at = stats.find("\"rx\":{").unwrap();
        let rx = stats[at..].split("\"packets\":").nth(1).unwrap();
        let rx = rx.split(',').next().unwrap().to_owned();
        let chain = sh("nft list chain inet weft base_vxlan_in");
        (rx, chain)
    };
    // A device of the neighbour's own, with whatever MAC it likes.
    sh(&format!(
        "ip -n {neighbour} link add vx type vxlan id 6783 dstport 6784 nolearning {any}"
    ));
    let send = |address: &str, from: &str| {
        sh(&format!(
            "ip -n {neighbour} link set vx down; ip -n {neighbour} link set vx address {from}; \
             ip -n {neighbour} addr replace {address}/{length} dev up1 nodad; ip -n {neighbour} link set vx up; \
             ip -n {neighbour} addr replace 198.18.0.1/24 dev vx; \
             bridge -n {neighbour} fdb replace {own_mac} dev vx dst {own} src_vni 6783; \
             ip -n {neighbour} neigh replace 198.18.0.2 lladdr {own_mac} dev vx"
        ));
        run(&format!(
            "ip netns exec {neighbour} ping -c3 -i0.05 -W1 198.18.0.2"
        ));
    };
    send(home, &mac);
    let (first, chain) = counted();
    assert!(
        first.parse::<u32>().unwrap() >= 3,
        "the peer gets in: {first} {chain}"
    );
    // The domain counts by peer what comes.
    let received = nft::vxlan_received(lab.domain()).unwrap();
    assert!(received[&by.mac] >= 3, "{received:?}");
    send(home, "02:00:00:00:00:09");
    let (second, chain) = counted();
    assert_eq!(first, second, "another MAC: {chain}");
    sh(&format!(
        "ip -n {neighbour} addr del {home}/{length} dev up1"
    ));
    send(other, &mac);
    let (third, chain) = counted();
    assert_eq!(first, third, "another address: {chain}");
    assert!(!chain.contains("packets 0 "), "counted: {chain}");
}
