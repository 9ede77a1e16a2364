//! The domain: legs, routes, filter, adoption, teardown.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crate::lab::{Container, Lab, eventually, member, network, on_a_host, run, sh, snapshot};
use weft_core::control::Target;
use weft_core::layout::{UDP_CARRIER_MAC, mac_text, peer_mac, peer_nexthop, peer_table};
use weft_core::model::EndpointId;
use weft_core::view::{Liveness, NetworkView, PeerNumber};
use weft_kernel::nft::{self, Where};
use weft_kernel::{
    Domain, KernelError, KernelEvent, LocalLeg, Origin, Refusal, inside, leg_name, open_netns,
    plan_domain, preflight, watch,
};

#[test]
fn this_machine_has_all_that_weft_needs() {
    assert_eq!(preflight(), vec![]);
}

#[test]
fn two_containers_and_their_host_reach_each_other_on_both_families() {
    on_a_host(|lab| {
        let (a, b) = (lab.container([10, 32, 0, 2]), lab.container([10, 32, 0, 3]));
        let attached = lab.attach(&a).unwrap();
        assert_eq!(attached.ip6, Some(lab.view.plan.v6(a.ip)));
        lab.attach(&b).unwrap();
        lab.bring_up();
        assert!(a.pings(b.ip), "IPv4");
        assert!(b.pings(lab.view.plan.v6(a.ip)), "IPv6");
        assert!(a.pings("10.32.0.1"), "the host's own address");
        assert!(a.pings(lab.view.plan.v6([10, 32, 0, 1].into())));
        assert!(a.pings("10.47.0.1"), "the DNS address");
        sh(&format!("ping -n -c1 -W2 {}", a.ip));
        sh(&format!("ping -n -c1 -W2 {}", lab.view.plan.v6(b.ip)));
        lab.domain().check(&lab.spec(&a)).unwrap();
    });
}

#[test]
fn datagrams_of_a_busy_leg_are_gathered_on_a_thread_of_its_own() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        let attached = lab.attach(&a).unwrap();
        lab.bring_up();
        let gatherer = lab.domain().gather().unwrap();
        for leg in [attached.leg.as_str(), "wh0"] {
            let wanted = ["generic-receive-offload", "rx-udp-gro-forwarding"];
            eventually(&format!("{leg} joins datagrams"), || {
                let features = lab.in_domain(&format!("ethtool -k {leg}"));
                wanted
                    .iter()
                    .all(|f| features.contains(&format!("{f}: on")))
            });
            assert!(!has_thread(lab, leg));
        }
        let busy = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| floods(&a, &busy));
            eventually("a busy leg gets a thread", || {
                has_thread(lab, &attached.leg)
            });
            busy.store(false, Ordering::Relaxed);
        });
        assert!(!has_thread(lab, "wh0"));
        eventually("a quiet leg loses it", || !has_thread(lab, &attached.leg));
        drop(gatherer);
    });
}

fn floods(container: &Container, busy: &AtomicBool) {
    let socket = inside(container.fd.as_fd(), || UdpSocket::bind("0.0.0.0:0")).unwrap();
    let socket = socket.unwrap();
    while busy.load(Ordering::Relaxed) {
        // Nobody listens there, and the host's kernel says so.
        let _ = socket.send_to(&[0; 64], "10.32.0.1:9");
    }
}

/// sysfs shows the devices of the namespace in which it was mounted.
fn has_thread(lab: &Lab, leg: &str) -> bool {
    let show = format!("mount -t sysfs own /sys && cat /sys/class/net/{leg}/threaded");
    let own = format!("unshare --mount --propagation slave sh -c '{show}'");
    lab.in_domain(&own).trim() == "1"
}

#[test]
fn a_second_reconciliation_finds_nothing_to_do() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        fake_carrier(lab);
        let (domain, _) = lab.bring_up();
        assert!(domain.changes > 0, "{domain:?}");
        let (domain, host) = lab.bring_up();
        assert_eq!((domain.changes, host.report.changes), (0, 0), "{domain:?}");
    });
}

#[test]
fn a_container_sends_only_from_its_own_addresses_and_mac() {
    on_a_host(|lab| {
        let (a, b) = (lab.container([10, 32, 0, 2]), lab.container([10, 32, 0, 3]));
        lab.attach(&a).unwrap();
        lab.attach(&b).unwrap();
        lab.bring_up();
        assert!(a.pings(b.ip));
        let forged6 = lab.view.plan.v6([10, 32, 0, 99].into());
        a.run("ip addr add 10.32.0.99/32 dev eth0");
        a.run(&format!("ip addr add {forged6}/128 dev eth0 nodad"));
        assert!(a.pings_in_vain("-I 10.32.0.99 10.32.0.3"));
        let b6 = lab.view.plan.v6(b.ip);
        assert!(a.pings_in_vain(&format!("-I {forged6} {b6}")));
        a.run("ip link set eth0 address 02:78:00:00:00:66");
        assert!(a.pings_in_vain("10.32.0.3"), "another MAC");
        let error = lab.domain().check(&lab.spec(&a)).unwrap_err();
        assert!(matches!(error, KernelError::Broken { .. }), "{error}");
    });
}

#[test]
fn containers_reach_each_other_only_within_a_network_but_for_services_and_hosts() {
    on_a_host(|lab| {
        let blue = NetworkView {
            also: vec!["10.34.0.0/20".parse().unwrap()],
            ..network("blue", "10.33.0.0/20".parse().unwrap())
        };
        lab.view.networks.push(blue);
        // Such a network is a lie; the table must be taken all the same.
        let inside = network("lie", "10.33.0.0/22".parse().unwrap());
        lab.view.networks.push(inside);
        let a = lab.container([10, 32, 0, 2]);
        let (b, c) = (lab.container([10, 33, 0, 2]), lab.container([10, 34, 0, 2]));
        for container in [&a, &b, &c] {
            lab.attach(container).unwrap();
        }
        lab.bring_up();
        let v6 = |ip: std::net::Ipv4Addr| lab.view.plan.v6(ip);
        assert!(b.pings(c.ip) && c.pings(b.ip), "one network, made twice");
        assert!(b.pings(v6(c.ip)), "IPv6");
        assert!(a.pings_in_vain(&b.ip.to_string()) && b.pings_in_vain(&a.ip.to_string()));
        assert!(a.pings_in_vain(&v6(b.ip).to_string()), "IPv6");
        let text = a.run("bash -c 'exec 3<>/dev/tcp/10.33.0.2/22' 2>&1").stdout;
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(text.contains("No route to host"), "told at once: {text}");
        assert!(
            b.pings("10.32.0.1") && b.pings("10.47.0.1"),
            "the host, DNS"
        );
        sh(&format!("ping -n -c1 -W2 {}", b.ip));
        sh(&format!("ping -n -c1 -W2 {}", v6(b.ip)));
        let base = weft_kernel::filter::domain_filter(&lab.view, &lab.local, None);
        let service = "set published4 { type ipv4_addr . inet_proto . inet_service; }
set published6 { type ipv6_addr . inet_proto . inet_service; }
chain lb_test { type nat hook prerouting priority dstnat; ip daddr 10.47.0.9 dnat ip to 10.33.0.2; }";
        nft::apply(Where::Domain(lab.domain()), &[service, &base]).unwrap();
        assert!(a.pings("10.47.0.9"), "a service of another network");
    });
}

#[test]
fn a_container_can_make_no_neighbours_and_reaches_nothing_else_in_the_domain() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        a.run("ip neigh del 169.254.1.1 dev eth0; ip addr add 10.32.7.7/32 dev eth0");
        assert!(a.pings_in_vain("10.32.0.1"), "no ARP is answered");
        let neighbours = lab.in_domain("ip neigh show nud all");
        assert!(!neighbours.contains("10.32.7.7"), "{neighbours}");
        a.run("ip neigh replace 169.254.1.1 lladdr 02:77:fe:00:00:01 dev eth0 nud permanent");
        let connect = "bash -c 'exec 3<>/dev/tcp/10.47.0.1/22' 2>&1";
        let output = a.run(connect);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("refused"), "{text}");
    });
}

#[test]
fn a_domain_left_behind_is_adopted_and_its_containers_never_notice() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        lab.domain = None;
        let (domain, origin) = Domain::open_or_create(&lab.name).unwrap();
        assert_eq!(origin, Origin::Adopted);
        lab.domain = Some(domain);
        assert_eq!(lab.domain().legs().unwrap().len(), 1);
        assert!(!lab.domain().ensure_host_leg(&lab.host).unwrap());
        assert!(a.pings("10.32.0.1"));
        let (domain, host) = lab.bring_up();
        assert_eq!((domain.changes, host.report.changes), (0, 0));
    });
}

#[test]
fn a_plain_file_left_by_a_crash_becomes_a_domain() {
    on_a_host(|lab| {
        lab.teardown();
        fs::write(format!("/run/netns/{}", lab.name), "").unwrap();
        let (domain, origin) = Domain::open_or_create(&lab.name).unwrap();
        assert_eq!(origin, Origin::Fresh);
        lab.domain = Some(domain);
    });
}

#[test]
fn an_attachment_is_made_whole_or_not_at_all() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        a.run("ip link add eth0 type veth peer name other");
        let error = lab.attach(&a).unwrap_err();
        assert!(matches!(error, KernelError::InterfaceExists(_)), "{error}");
        assert_eq!(lab.domain().legs().unwrap(), vec![]);
        a.run("ip link del eth0");
        let leg = lab.attach(&a).unwrap().leg;
        assert_eq!(leg, leg_name(&a.id));
        let again = lab.domain().attach(&lab.spec(&a)).unwrap_err();
        assert!(matches!(again, KernelError::InterfaceExists(_)), "{again}");
        lab.domain().detach(&a.id).unwrap();
        lab.domain().detach(&a.id).unwrap();
        assert_eq!(lab.domain().legs().unwrap(), vec![]);
        for bad in ["", "lo", "a/b", "../x", "sixteen-letters-", "a b"] {
            let mut spec = lab.spec(&a);
            spec.ifname = bad;
            let error = lab.domain().attach(&spec).unwrap_err();
            assert!(
                matches!(error, KernelError::InterfaceName(_)),
                "{bad}: {error}"
            );
        }
    });
}

#[test]
fn a_container_with_a_default_route_keeps_it_and_gets_the_range() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        a.run(
            "ip link add net0 type veth peer name net1; ip link set net0 up; ip link set net1 up",
        );
        a.run("ip addr add 198.51.100.2/24 dev net0; ip route add default via 198.51.100.1");
        lab.attach(&a).unwrap();
        let routes = String::from_utf8(a.run("ip route").stdout).unwrap();
        assert!(routes.contains("default via 198.51.100.1"), "{routes}");
        assert!(routes.contains("10.32.0.0/12 via 169.254.1.1"), "{routes}");
        assert!(a.pings("10.32.0.1"));
    });
}

/// Stands for the TAP: a veth whose other end decides whether it has carrier.
fn fake_carrier(lab: &crate::lab::Lab) {
    lab.in_domain(
        "ip link add wu0 type veth peer name wuf && ip link set wu0 up && ip link set wuf up",
    );
}

#[test]
fn routes_to_peers_come_and_go_with_the_carrier_and_the_floor_stays() {
    on_a_host(|lab| {
        let floor = |lab: &crate::lab::Lab| {
            let v4 = lab.in_domain("ip -4 route show type blackhole");
            let v6 = lab.in_domain("ip -6 route show type blackhole");
            assert!(v4.contains("10.32.0.0/12"), "{v4}");
            assert!(v6.contains(&lab.view.plan.range6().to_string()), "{v6}");
        };
        let (report, _) = lab.bring_up();
        assert!(report.absent.contains("wu0"));
        floor(lab);
        fake_carrier(lab);
        lab.bring_up();
        let id = peer_nexthop(PeerNumber(1));
        let routes = lab.in_domain("ip -4 route show 10.32.128.0/17");
        assert!(routes.contains(&format!("nhid {id}")), "{routes}");
        assert!(routes.contains("mtu 1400"), "{routes}");
        let routes = lab.in_domain("ip -6 route show table all");
        assert!(routes.contains(&format!("nhid {id}")), "{routes}");
        let table = peer_table(PeerNumber(1));
        let replies = lab.in_domain(&format!("ip -4 route show table {table}"));
        assert!(replies.contains("default nhid"), "{replies}");
        lab.in_domain("ip link set wuf down");
        eventually("carrier lost", || {
            lab.in_domain("ip -br link show wu0")
                .contains("LOWERLAYERDOWN")
        });
        lab.bring_up();
        floor(lab);
        assert!(!lab.in_domain("ip -4 route").contains("nhid"));
        lab.in_domain("ip link set wuf up");
        eventually("carrier back", || {
            lab.bring_up();
            lab.in_domain("ip -4 route").contains("nhid")
        });
    });
}

#[test]
fn a_peer_that_dies_turns_unreachable_and_a_new_path_mtu_is_taken_over() {
    on_a_host(|lab| {
        fake_carrier(lab);
        lab.bring_up();
        lab.view.members[1].mtu = Some(1300);
        lab.bring_up();
        assert!(
            lab.in_domain("ip -4 route show 10.40.0.0/13")
                .contains("mtu 1300")
        );
        lab.view.members[1].liveness = Liveness::Down;
        lab.bring_up();
        let routes = lab.in_domain("ip -4 route show type unreachable");
        assert!(routes.contains("10.40.0.0/13"), "{routes}");
        assert_eq!(lab.in_domain("ip nexthop"), "");
        lab.view.members.truncate(1);
        lab.bring_up();
        assert!(!lab.in_domain("ip -4 route").contains("10.40.0.0/13"));
        assert!(!lab.in_domain("ip rule").contains("fwmark 0x1/0xfff"));
        lab.view.members.push(member(2, 1, &["10.32.0.0/12"]));
        lab.bring_up();
        let routes = lab.in_domain("ip -4 route show 10.32.0.0/12");
        assert!(
            routes.contains("nhid") && routes.contains("blackhole"),
            "{routes}"
        );
    });
}

#[test]
fn what_a_stranger_changed_is_put_back() {
    on_a_host(|lab| {
        fake_carrier(lab);
        lab.bring_up();
        let before = lab.in_domain("ip route; ip rule; ip nexthop; ip neigh show nud permanent");
        lab.in_domain("ip nexthop flush; ip rule del pref 10000; ip neigh flush nud permanent; ip route flush proto 119");
        sh(
            "ip rule del pref 6783; ip route flush table 6783; ip addr flush dev weft0 scope global",
        );
        lab.bring_up();
        let after = lab.in_domain("ip route; ip rule; ip nexthop; ip neigh show nud permanent");
        assert_eq!(sorted(&before), sorted(&after));
        assert!(sh("ip rule").contains("lookup 6783"));
        assert!(sh("ip route show table 6783").contains("10.32.0.0/12 via 169.254.1.1 dev weft0"));
        assert!(sh("ip addr show weft0").contains("10.32.0.1/32"));
    });
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn the_end_of_a_container_and_a_flushed_ruleset_are_heard() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        let (tell, heard) = mpsc::channel();
        let watching = watch(&lab.host, lab.domain(), move |event| {
            let _ = tell.send(event);
        })
        .unwrap();
        a.run("ip link del eth0");
        let wait_for = |wanted: KernelEvent| {
            let mut seen = vec![];
            while seen.last() != Some(&wanted) {
                let event = heard.recv_timeout(Duration::from_secs(5));
                seen.push(event.unwrap_or_else(|_| panic!("{wanted:?} not in {seen:?}")));
            }
        };
        wait_for(KernelEvent::LegGone(leg_name(&a.id)));
        sh("nft flush ruleset");
        wait_for(KernelEvent::HostRules);
        sh("ip rule del pref 6783");
        wait_for(KernelEvent::Host);
        sh("ip addr add 192.0.2.77/32 dev lo");
        wait_for(KernelEvent::HostAddresses);
        sh("ip addr del 192.0.2.77/32 dev lo");
        wait_for(KernelEvent::HostAddresses);
        drop(watching);
    });
}

/// A container may end at any moment: what is put for the others meanwhile succeeds.
#[test]
fn legs_that_go_while_they_are_looked_after_are_no_failure() {
    on_a_host(|lab| {
        let ips = (10..18).map(|last| [10, 32, 0, last]);
        let ids = ips
            .clone()
            .map(|[_, b, c, d]| EndpointId([b, c, d, 4, 5, 6, 7, 8]));
        let legs = ips
            .zip(ids.clone())
            .map(|(ip, id)| LocalLeg { id, ip: ip.into() });
        lab.local.legs = legs.collect();
        lab.bring_up();
        let plan = plan_domain(&lab.view, &lab.local);
        let batch = |lines: &dyn Fn(&str) -> String| {
            let lines: String = ids.clone().map(|id| lines(&leg_name(&id))).collect();
            format!("printf '{lines}' | ip -batch -")
        };
        let far = |leg: &str| leg.replacen("wv", "far", 1);
        let make = batch(&|leg| {
            let far = far(leg);
            format!("link add {leg} up type veth peer name {far}\\nlink set {far} up\\n")
        });
        let end = batch(&|leg| format!("link del {leg}\\n"));
        for _ in 0..20 {
            lab.in_domain(&make);
            std::thread::scope(|scope| {
                let ending = scope.spawn(|| lab.in_domain(&end));
                while !ending.is_finished() {
                    let report = lab.domain().reconcile(&plan).unwrap();
                    assert!(report.failures.is_empty(), "{:?}", report.failures);
                }
            });
        }
    });
}

#[test]
fn connections_of_what_is_gone_are_forgotten() {
    on_a_host(|lab| {
        let (a, b) = (lab.container([10, 32, 0, 2]), lab.container([10, 32, 0, 3]));
        lab.attach(&a).unwrap();
        lab.attach(&b).unwrap();
        lab.bring_up();
        assert!(a.pings(b.ip) && a.pings("10.32.0.1"));
        let forgotten = lab.domain().forget_connections(&[b.ip.into()]).unwrap();
        assert_eq!(forgotten, 1);
        assert_eq!(lab.domain().forget_connections(&[b.ip.into()]).unwrap(), 0);
    });
}

fn refusal(target: Target) -> Refusal {
    match open_netns(&target) {
        Err(KernelError::Target { why, .. }) => why,
        other => panic!("{target:?}: {other:?}"),
    }
}

#[test]
fn only_network_namespaces_of_others_can_be_attached() {
    on_a_host(|lab| {
        let path = |text: &str| Target::Netns(text.to_owned());
        let folder = std::env::temp_dir().join(&lab.name);
        fs::create_dir(&folder).unwrap();
        let file = folder.join("file");
        fs::write(&file, "").unwrap();
        let link = folder.join("link");
        let netns = lab.namespace();
        std::os::unix::fs::symlink(format!("/run/netns/{netns}"), &link).unwrap();

        assert_eq!(refusal(path("../x")), Refusal::Path);
        assert_eq!(refusal(path("/run/netns/../netns/x")), Refusal::Path);
        assert_eq!(refusal(path(file.to_str().unwrap())), Refusal::NotNetns);
        assert_eq!(refusal(path(link.to_str().unwrap())), Refusal::Link);
        assert_eq!(refusal(path("/dev/zero")), Refusal::NotNetns);
        assert_eq!(refusal(path("/proc/self/ns/mnt")), Refusal::NotNetns);
        // Some sandboxes deny even root a look at process 1.
        let first = [refusal(path("/proc/1/ns/net")), refusal(Target::Pid(1))];
        for why in first {
            assert!(matches!(why, Refusal::Host | Refusal::Open(_)), "{why}");
        }
        let mut here = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .unwrap();
        assert_eq!(refusal(Target::Pid(here.id())), Refusal::Host);
        here.kill().unwrap();
        here.wait().unwrap();
        assert_eq!(refusal(path("/proc/thread-self/ns/net")), Refusal::Host);
        assert!(matches!(refusal(path("/nowhere")), Refusal::Open(_)));
        let domain = format!("/run/netns/{}", lab.name);
        assert_eq!(refusal(path(&domain)), Refusal::Domain);
        assert_eq!(refusal(Target::Pid(0)), Refusal::NoProcess);
        assert_eq!(refusal(Target::Pid(u32::MAX)), Refusal::NoProcess);
        open_netns(&path(&format!("/run/netns/{netns}"))).unwrap();
        let mut child = std::process::Command::new("unshare")
            .args(["-n", "sleep", "30"])
            .spawn()
            .unwrap();
        eventually("a process in a namespace of its own", || {
            open_netns(&Target::Pid(child.id())).is_ok()
        });
        open_netns(&path(&format!("/proc/{}/ns/net", child.id()))).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(refusal(Target::Pid(child.id())), Refusal::NoProcess);
        fs::remove_dir_all(folder).unwrap();
    });
}

#[test]
fn nothing_is_left_behind() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        let before = snapshot();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        fake_carrier(lab);
        let (_, host) = lab.bring_up();
        assert!(host.host_changes.iter().any(|l| l.contains("ip_forward")));
        assert_ne!(snapshot(), before);
        let failures = lab.teardown();
        assert!(failures.is_empty(), "{failures:?}");
        assert_eq!(snapshot(), before);
        assert!(!fs::exists(format!("/run/netns/{}", lab.name)).unwrap());
        let links = String::from_utf8(a.run("ip -br link").stdout).unwrap();
        assert!(!links.contains("eth0"), "{links}");
        let failures = lab.teardown();
        assert!(failures.is_empty(), "again: {failures:?}");
    });
}

#[test]
fn a_foreign_domain_and_its_weft0_are_left_alone() {
    on_a_host(|lab| {
        lab.bring_up();
        let other = format!("{}b", lab.name);
        let (second, _) = Domain::open_or_create(&other).unwrap();
        let taken = second.ensure_host_leg(&lab.host).unwrap_err();
        assert!(matches!(taken, KernelError::HostLegTaken(_)), "{taken}");
        drop(second);
        let mut nothing = weft_kernel::HostState::default();
        let failures = lab.host.teardown(&other, &mut nothing);
        assert!(failures.is_empty(), "{failures:?}");
        assert!(sh("ip rule").contains("lookup 6783"));
        sh("ping -n -c1 -W2 10.47.0.1");
    });
}

#[test]
fn the_plan_is_what_the_kernel_then_holds_for_many_peers() {
    on_a_host(|lab| {
        fake_carrier(lab);
        for number in 2..60u16 {
            let id = u8::try_from(number + 1).unwrap();
            let net = format!("10.40.{number}.0/24");
            lab.view.members.push(member(id, number, &[&net]));
        }
        lab.bring_up();
        let plan = plan_domain(&lab.view, &lab.local);
        let again = lab.domain().reconcile(&plan).unwrap();
        assert_eq!((again.changes, again.failures.len()), (0, 0), "{again:?}");
    });
}

/// A peer behind the carrier: its far end in a namespace that has these addresses.
fn fake_peer(lab: &mut crate::lab::Lab, addresses: &[&str]) -> String {
    let peer = lab.namespace();
    let mac = mac_text(peer_mac(PeerNumber(1)));
    let own = mac_text(UDP_CARRIER_MAC);
    lab.in_domain(&format!(
        "ip link add wu0 address {own} mtu 9000 type veth peer name wuf address {mac} mtu 9000 netns {peer} && ip link set wu0 up"
    ));
    sh(&format!(
        "ip -n {peer} link set wuf up; ip -n {peer} link set lo up"
    ));
    for address in addresses {
        let at_once = if address.contains(':') { "nodad" } else { "" };
        sh(&format!(
            "ip -n {peer} addr add {address} dev wuf {at_once}"
        ));
    }
    sh(&format!(
        "ip -n {peer} neigh add 169.254.9.9 lladdr {own} dev wuf nud permanent && ip -n {peer} neigh add fe80::9 lladdr {own} dev wuf nud permanent"
    ));
    sh(&format!(
        "ip -n {peer} route add default via 169.254.9.9 dev wuf onlink && ip -n {peer} route add default via fe80::9 dev wuf"
    ));
    peer
}

#[test]
fn from_a_peer_comes_only_what_concerns_this_host() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        let theirs = lab.view.plan.v6([10, 32, 128, 5].into());
        let address6 = format!("{theirs}/128");
        let peer = fake_peer(
            lab,
            &[
                "10.32.128.5/32",
                "198.51.100.9/32",
                "10.40.0.5/32",
                &address6,
            ],
        );
        lab.bring_up();
        let ping = |what: &str| {
            run(&format!(
                "ip netns exec {peer} ping -n -c2 -i0.1 -W1 {what}"
            ))
            .status
            .success()
        };
        assert!(ping("-I 10.32.128.5 10.32.0.2"), "a container");
        assert!(ping("-I 10.32.128.5 10.32.0.1"), "the host's leg");
        let a6 = lab.view.plan.v6(a.ip);
        assert!(ping(&format!("-I {theirs} {a6}")), "IPv6");
        assert!(a.pings("10.32.128.5") && a.pings(theirs), "and back");
        assert!(a.pings_in_vain("10.40.0.5"), "another network");
        let mut far = lab.view.endpoints[0].clone();
        (far.node, far.ip) = (lab.view.members[1].id, [10, 40, 0, 5].into());
        lab.view.endpoints.push(far);
        lab.bring_up();
        assert!(a.pings("10.40.0.5"), "a host's leg is everybody's");
        assert!(!ping("-I 198.51.100.9 10.32.0.2"), "a stranger's source");
        assert!(!ping("-I 10.32.128.5 10.47.0.1"), "the domain itself");
        assert!(!ping("-I 10.32.128.5 10.40.0.9"), "transit");
        assert!(!ping("-I 10.32.128.5 10.32.0.77"), "nobody");
    });
}

#[test]
fn a_strangers_source_reaches_published_targets_and_nothing_else() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        let peer = fake_peer(lab, &["198.51.100.9/32"]);
        lab.bring_up();
        let published = "set published4 { type ipv4_addr . inet_proto . inet_service; elements = { 10.32.0.2 . udp . 7 }; }
set published6 { type ipv6_addr . inet_proto . inet_service; }";
        let base = weft_kernel::filter::domain_filter(&lab.view, &lab.local, None);
        nft::apply(Where::Domain(lab.domain()), &[published, &base]).unwrap();
        let open = |port: u16| a_udp_socket(&a, port);
        let (seven, eight) = (open(7), open(8));
        let target = Target::Netns(format!("/run/netns/{peer}"));
        let fd = open_netns(&target).unwrap();
        let client = inside(fd.as_fd(), || {
            let socket = UdpSocket::bind("198.51.100.9:0").unwrap();
            socket.send_to(b"no", "10.32.0.2:8").unwrap();
            socket.send_to(b"yes", "10.32.0.2:7").unwrap();
            socket.local_addr().unwrap()
        })
        .unwrap();
        let mut buffer = [0; 16];
        let (length, from) = seven.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"yes"[..], client));
        eight.set_nonblocking(true).unwrap();
        assert!(
            eight.recv_from(&mut buffer).is_err(),
            "the first was dropped"
        );
    });
}

fn a_udp_socket(container: &crate::lab::Container, port: u16) -> UdpSocket {
    let bind = || UdpSocket::bind(("0.0.0.0", port)).unwrap();
    let socket = inside(container.fd.as_fd(), bind).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

#[test]
fn too_large_packets_learn_the_paths_mtu() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        let theirs = lab.view.plan.v6([10, 32, 128, 5].into());
        fake_peer(lab, &["10.32.128.5/32", &format!("{theirs}/128")]);
        lab.bring_up();
        for to in ["10.32.128.5".to_owned(), theirs.to_string()] {
            a.run(&format!("ping -n -c1 -W1 -M do -s 3000 {to}"));
            let route = String::from_utf8(a.run(&format!("ip route get {to}")).stdout).unwrap();
            assert!(route.contains("mtu 1400"), "{route}");
        }
    });
}

#[test]
fn queries_to_the_hosts_resolvers_are_turned_to_weft() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.local.resolvers = vec![
            "192.0.2.53".parse().unwrap(),
            "127.0.0.53".parse().unwrap(),
            "2001:db8::53".parse().unwrap(),
        ];
        lab.attach(&a).unwrap();
        let server = lab
            .domain()
            .run(|| UdpSocket::bind("10.47.0.1:53").unwrap())
            .unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let client = a_udp_socket(&a, 0);
        client.send_to(b"query", "192.0.2.53:53").unwrap();
        let mut buffer = [0; 16];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip().to_string(), "10.32.0.2");
        server.send_to(&buffer[..length], from).unwrap();
        let (_, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(
            from.to_string(),
            "192.0.2.53:53",
            "as if it had answered itself"
        );
    });
}

#[test]
fn without_ipv6_peers_are_reached_by_ipv4_next_hops() {
    on_a_host(|lab| {
        lab.local.ipv6 = false;
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        fake_peer(lab, &["10.32.128.5/32"]);
        lab.bring_up();
        let (report, _) = lab.bring_up();
        assert_eq!(report.changes, 0, "{report:?}");
        let hops = lab.in_domain("ip nexthop");
        assert!(
            hops.contains("via 169.254.16.1 dev wu0") && hops.contains("onlink"),
            "{hops}"
        );
        assert!(a.pings("10.32.128.5"));
    });
}

#[test]
fn weft_has_ipv6_where_the_host_and_the_container_switched_it_off_by_default() {
    on_a_host(|lab| {
        sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        let a = lab.container([10, 32, 0, 2]);
        a.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        lab.attach(&a).unwrap();
        lab.bring_up();
        assert!(a.pings(lab.view.plan.v6([10, 32, 0, 1].into())));
    });
}
