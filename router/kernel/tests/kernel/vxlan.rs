//! The `vxlan` carrier: its device, who is behind which MAC, and the filter before it.

use weft_core::layout::{mac_text, peer_nexthop, vxlan_mac};
use weft_core::model::NodeId;
use weft_core::view::{PeerNumber, Seal, VxlanPeer, VxlanView};
use weft_kernel::nft;
use weft_kernel::{Domain, KernelError};

use crate::lab::{Lab, on_a_host, run, sh};

/// Peer 1 of the lab's view, at 192.0.2.2.
fn peer(carries: bool) -> VxlanPeer {
    let id = NodeId([2; 32]);
    VxlanPeer {
        id,
        number: PeerNumber(1),
        mac: vxlan_mac(&id),
        addr: [192, 0, 2, 2].into(),
        seal: Seal::Plain,
        carries,
        mtu: 1450,
    }
}

fn own_mac() -> [u8; 6] {
    vxlan_mac(&NodeId([1; 32]))
}

/// The view and the filter of a host that takes VXLAN from these, and the device.
fn trusting(lab: &mut Lab, peers: Vec<VxlanPeer>) -> u32 {
    let mac = own_mac();
    lab.view.vxlan = Some(VxlanView {
        mac,
        peers,
        esp: Vec::new(),
    });
    lab.local.vxlan = false;
    lab.bring_up();
    let index = lab.domain().ensure_vxlan(&lab.host, mac).unwrap();
    lab.local.vxlan = true;
    index
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
    on_a_host(|lab| {
        sealed_carrier(lab);
        let mac = mac_text(peer(true).mac);
        let index = trusting(lab, vec![peer(false)]);
        lab.bring_up();
        let link = lab.in_domain("ip -d link show wx0");
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
        let entries = lab.in_domain("bridge fdb show dev wx0");
        let leads = format!("{mac} dst 192.0.2.2 ");
        assert!(
            entries.contains(&leads) && entries.contains("self permanent"),
            "{entries}"
        );
        let neighbours = lab.in_domain("ip -6 neigh show dev wx0");
        assert!(
            neighbours.contains(&format!("fe80::77:1 lladdr {mac} PERMANENT")),
            "{neighbours}"
        );
        assert!(next_hop(lab).contains("dev wu0"), "{}", next_hop(lab));
        // It carries: one object moves, with all routes that name it.
        lab.view.vxlan.as_mut().unwrap().peers[0] = peer(true);
        let (report, _) = lab.bring_up();
        assert!(next_hop(lab).contains("via fe80::77:1 dev wx0"));
        let routes = lab.in_domain("ip -4 route show 10.32.128.0/17");
        assert!(routes.contains("mtu 1450"), "{routes}");
        assert!(report.failures.is_empty());
        let (again, host) = lab.bring_up();
        assert_eq!((again.changes, host.report.changes), (0, 0), "{again:?}");
        // A peer that moved house, and one that left.
        let moved = VxlanPeer {
            addr: [192, 0, 2, 9].into(),
            ..peer(true)
        };
        lab.view.vxlan.as_mut().unwrap().peers[0] = moved;
        lab.bring_up();
        let entries = lab.in_domain("bridge fdb show dev wx0");
        assert!(entries.contains("192.0.2.9") && !entries.contains("192.0.2.2"));
        lab.view.vxlan.as_mut().unwrap().peers.clear();
        lab.bring_up();
        assert_eq!(lab.in_domain("bridge fdb show dev wx0").trim(), "");
        assert_eq!(lab.in_domain("ip neigh show dev wx0 nud permanent"), "");
        assert!(next_hop(lab).contains("dev wu0"));
        // The next start finds the device and keeps it.
        let found = lab.domain().ensure_vxlan(&lab.host, own_mac()).unwrap();
        assert_eq!(found, index);
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
        lab.domain().close_vxlan().unwrap();
        lab.local.vxlan = false;
        lab.bring_up();
        assert!(next_hop(lab).contains("dev wu0"));
        let routes = lab.in_domain("ip -4 route show 10.32.128.0/17");
        assert!(routes.contains("mtu 1400"), "{routes}");
        // Closed, the host has no socket for it either.
        assert!(!sh("ss -Hlnu").contains(":6784"));
        lab.domain().remove_vxlan().unwrap();
        lab.domain().remove_vxlan().unwrap();
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
            lab.domain().remove_vxlan().unwrap();
            lab.in_domain(&format!("ip link add wx0 type vxlan {wrong}"));
            lab.domain().ensure_vxlan(&lab.host, own_mac()).unwrap();
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
        let error = other.ensure_vxlan(&lab.host, own_mac()).unwrap_err();
        let teardown = lab.host.teardown(&name, &mut Default::default());
        assert!(matches!(error, KernelError::VxlanTaken), "{error}");
        assert!(teardown.is_empty(), "{teardown:?}");
        lab.domain().close_vxlan().unwrap();
        let _squatter = std::net::UdpSocket::bind("0.0.0.0:6784").unwrap();
        let error = lab.domain().ensure_vxlan(&lab.host, own_mac()).unwrap_err();
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
            lab.domain().ensure_vxlan(&lab.host, own_mac()).unwrap();
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
        trusting(lab, vec![peer(true)]);
        lab.bring_up();
        let vxlan = lab.view.vxlan.clone().unwrap();
        lab.host.raise_shield(&vxlan).unwrap();
        lab.domain().ensure_vxlan(&lab.host, own_mac()).unwrap();
        let shown = sh("nft list ruleset");
        let table = shown.lines().find(|l| l.contains("weft_vxlan_")).unwrap();
        let name = table.split_whitespace().nth(2).unwrap().to_owned();
        for text in ["flags owner", "ip saddr . @th,176,48 @peers", "meta skuid"] {
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
        other.peers.clear();
        lab.host.raise_shield(&other).unwrap();
        assert!(!rules().contains("192.0.2.77"));
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
    on_a_host(|lab| {
        let neighbour = lab.lan();
        trusting(lab, vec![peer(true)]);
        lab.bring_up();
        let (mac, own) = (mac_text(peer(true).mac), mac_text(own_mac()));
        let counted = || -> (String, String) {
            let stats = lab.in_domain("ip -j -s link show wx0");
            let at = stats.find("\"rx\":{").unwrap();
            let rx = stats[at..].split("\"packets\":").nth(1).unwrap();
            let rx = rx.split(',').next().unwrap().to_owned();
            let chain = sh("nft list chain inet weft base_vxlan_in");
            (rx, chain)
        };
        // A device of the neighbour's own, with whatever MAC it likes.
        sh(&format!(
            "ip -n {neighbour} link add vx type vxlan id 6783 dstport 6784 nolearning"
        ));
        let send = |address: &str, from: &str| {
            sh(&format!(
                "ip -n {neighbour} link set vx down; ip -n {neighbour} link set vx address {from}; \
                 ip -n {neighbour} addr replace {address}/24 dev up1; ip -n {neighbour} link set vx up; \
                 ip -n {neighbour} addr replace 198.18.0.1/24 dev vx; \
                 bridge -n {neighbour} fdb replace {own} dev vx dst 192.0.2.1 src_vni 6783; \
                 ip -n {neighbour} neigh replace 198.18.0.2 lladdr {own} dev vx"
            ));
            run(&format!(
                "ip netns exec {neighbour} ping -c3 -i0.05 -W1 198.18.0.2"
            ));
        };
        send("192.0.2.2", &mac);
        let (first, _) = counted();
        assert!(
            first.parse::<u32>().unwrap() >= 3,
            "the peer gets in: {first}"
        );
        // The domain counts by peer what comes.
        let received = nft::vxlan_received(lab.domain()).unwrap();
        assert!(received[&peer(true).mac] >= 3, "{received:?}");
        send("192.0.2.2", "02:00:00:00:00:09");
        let (second, chain) = counted();
        assert_eq!(first, second, "another MAC: {chain}");
        sh(&format!("ip -n {neighbour} addr del 192.0.2.2/24 dev up1"));
        send("192.0.2.3", &mac);
        let (third, chain) = counted();
        assert_eq!(first, third, "another address: {chain}");
        assert!(!chain.contains("packets 0 "), "counted: {chain}");
    });
}
