//! The host's side: egress, the guard, other firewalls, switches.

use crate::lab::{on_a_host, read, run, sh, snapshot};

const FORWARD4: &str = "/proc/sys/net/ipv4/ip_forward";

#[test]
fn containers_reach_the_lan_behind_the_hosts_address() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        assert!(a.pings("192.0.2.2"), "IPv4");
        assert!(a.pings("2001:db8::2"), "IPv6");
    });
}

#[test]
fn the_lan_reaches_no_container_and_the_host_forwards_for_nobody_else() {
    on_a_host(|lab| {
        let lan = lab.lan();
        let other = lab.namespace();
        sh(&format!(
            "ip link add dn0 type veth peer name dn1 netns {other}"
        ));
        sh("ip addr add 198.51.100.1/24 dev dn0 && ip link set dn0 up");
        sh(&format!(
            "ip -n {other} addr add 198.51.100.2/24 dev dn1 && ip -n {other} link set dn1 up && ip -n {other} route add default via 198.51.100.1"
        ));
        sh(&format!("ip -n {lan} route add default via 192.0.2.1"));
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        let (_, report) = lab.bring_up();
        assert_eq!(read(FORWARD4).unwrap(), "1\n", "{report:?}");
        let ping = |to: &str| run(&format!("ip netns exec {lan} ping -n -c2 -i0.1 -W1 {to}"));
        assert!(!ping("10.32.0.2").status.success(), "a container");
        assert!(!ping("10.32.0.1").status.success(), "the host's leg");
        assert!(!ping("198.51.100.2").status.success(), "through the host");
        assert!(ping("192.0.2.1").status.success(), "the host itself");
        // Somebody else begins to forward: the guard makes way.
        sh(
            "nft add table ip filter; nft 'add chain ip filter FORWARD { type filter hook forward priority 0; policy accept; }'",
        );
        lab.bring_up();
        assert!(
            ping("198.51.100.2").status.success(),
            "their forwarding works"
        );
        assert!(!ping("10.32.0.2").status.success(), "still no container");
    });
}

#[test]
fn the_overlay_reaches_the_host_by_echo_alone() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for ip in ["10.32.0.1", "192.0.2.1"] {
            let connect = format!("timeout 2 bash -c 'exec 3<>/dev/tcp/{ip}/{port}'");
            assert!(!a.run(&connect).status.success(), "{ip}");
            assert!(a.pings(ip));
        }
    });
}

#[test]
fn dockers_forward_drop_is_passed_by_a_marked_pair_of_accepts() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        docker_like();
        let before = snapshot();
        let (a, b) = (lab.container([10, 32, 0, 2]), lab.container([10, 32, 0, 3]));
        lab.attach(&a).unwrap();
        lab.attach(&b).unwrap();
        let (_, report) = lab.bring_up();
        assert!(
            report
                .host_changes
                .iter()
                .any(|l| l.contains("DOCKER-USER")),
            "{report:?}"
        );
        assert!(a.pings(b.ip), "never in doubt");
        assert!(a.pings("192.0.2.2"), "out through the host");
        let rules = sh("nft list chain ip filter DOCKER-USER");
        assert_eq!(rules.matches("comment \"weft\"").count(), 2, "{rules}");
        // Docker reloads.
        sh("nft flush chain ip filter DOCKER-USER");
        lab.bring_up();
        lab.bring_up();
        let rules = sh("nft list chain ip filter DOCKER-USER");
        assert_eq!(rules.matches("comment \"weft\"").count(), 2, "{rules}");
        assert!(lab.teardown().is_empty());
        assert_eq!(snapshot(), before);
    });
}

/// What Docker's iptables leave in nf_tables.
fn docker_like() {
    sh("nft -f - <<'E'
table ip filter {
  chain DOCKER-USER { }
  chain FORWARD { type filter hook forward priority filter; policy drop;
    jump DOCKER-USER
  }
}
table ip nat {
  chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept; }
}
E");
}

#[test]
fn a_forward_chain_that_drops_without_docker_is_passed_too() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        sh(
            "nft 'add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'",
        );
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        assert!(a.pings("192.0.2.2"));
        // Docker comes later: its own place is the better one.
        sh("nft 'add chain ip filter DOCKER-USER; insert rule ip filter FORWARD jump DOCKER-USER'");
        lab.bring_up();
        let rules = sh("nft list chain ip filter FORWARD");
        assert!(!rules.contains("weft"), "{rules}");
        assert!(a.pings("192.0.2.2"));
    });
}

#[test]
fn forwarding_stays_on_when_somebody_else_relies_on_it_by_then() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        assert_eq!(lab.saved.len(), 2, "one switch, one save, before it");
        docker_like();
        assert!(lab.teardown().is_empty());
        assert_eq!(read(FORWARD4).unwrap(), "1\n");
        let forward6 = read("/proc/sys/net/ipv6/conf/all/forwarding").unwrap();
        assert_eq!(forward6, "0\n", "nobody relies on IPv6");
    });
}

#[test]
fn a_host_that_forwarded_before_goes_on_and_gets_no_guard() {
    on_a_host(|lab| {
        sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let before = snapshot();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        assert!(lab.saved.is_empty());
        let rules = sh("nft list chain inet weft base_forward");
        assert!(!rules.contains("nfproto"), "{rules}");
        assert!(lab.teardown().is_empty());
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn an_idle_host_does_not_forward() {
    on_a_host(|lab| {
        lab.bring_up();
        assert_eq!(read(FORWARD4).unwrap(), "0\n");
        assert!(lab.saved.is_empty());
    });
}

#[test]
fn a_state_that_cant_be_kept_leaves_the_switch_alone() {
    on_a_host(|lab| {
        let a = lab.container([10, 32, 0, 2]);
        lab.local
            .legs
            .push(weft_kernel::LocalLeg { id: a.id, ip: a.ip });
        let plan = weft_kernel::plan_host(&lab.view, &lab.local);
        let full = |_: &weft_kernel::HostState| Err(std::io::ErrorKind::StorageFull.into());
        let report = lab
            .host
            .reconcile(&plan, &mut lab.state, &mut { full })
            .unwrap();
        assert_eq!(report.report.failures.len(), 2, "{report:?}");
        assert_eq!(read(FORWARD4).unwrap(), "0\n");
    });
}

#[test]
fn overlaps_are_fatal_only_where_the_cluster_itself_would_break() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        let range = "10.32.0.0/12".parse().unwrap();
        let found = lab.host.range_conflicts(range, &[]).unwrap();
        assert_eq!(found, vec![]);
        sh("ip route add 10.40.0.0/16 via 192.0.2.2");
        let found = lab.host.range_conflicts(range, &[]).unwrap();
        assert_eq!(found.len(), 1);
        assert!(!found[0].fatal && found[0].net.to_string() == "10.40.0.0/16");
        let peer = ["10.33.0.9".parse().unwrap()];
        assert!(lab.host.range_conflicts(range, &peer).unwrap()[0].fatal);
        sh("ip addr add 10.35.0.4/24 dev up0");
        assert!(lab.host.range_conflicts(range, &[]).unwrap()[0].fatal);
        let lan = "192.0.0.0/16".parse().unwrap();
        sh("ip route add default via 192.0.2.2");
        let found = lab.host.range_conflicts(lan, &[]).unwrap();
        let gateways = found.iter().filter(|o| o.why.contains("gateway"));
        assert_eq!(gateways.count(), 1, "{found:?}");
    });
}

#[test]
fn only_addresses_that_others_can_use_are_the_hosts() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        sh("ip link add br0 type bridge; ip addr add 172.17.0.1/16 dev br0; ip link set br0 up");
        lab.bring_up();
        let found: Vec<String> = lab
            .host
            .addresses()
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(found, ["192.0.2.1", "2001:db8::1"]);
        sh("ip route add default via 172.17.0.2");
        assert_eq!(lab.host.addresses().unwrap().len(), 3, "a bridge as uplink");
    });
}

#[test]
fn an_uplink_that_lives_on_router_advertisements_keeps_its_default_route() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        sh("sysctl -qw net.ipv6.conf.up0.accept_ra=1");
        sh("ip -6 route add default via fe80::99 dev up0 proto ra metric 1024");
        let before = snapshot();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        let (_, report) = lab.bring_up();
        let accept = "/proc/sys/net/ipv6/conf/up0/accept_ra";
        assert_eq!(read(accept).unwrap(), "2\n");
        assert!(
            report
                .host_changes
                .iter()
                .any(|l| l.contains("up0.accept_ra"))
        );
        assert!(sh("ip -6 route show default").contains("proto ra"));
        assert!(lab.teardown().is_empty());
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn a_start_after_a_crash_undoes_with_the_saved_state_alone() {
    on_a_host(|lab| {
        let _lan = lab.lan();
        let before = snapshot();
        let a = lab.container([10, 32, 0, 2]);
        lab.attach(&a).unwrap();
        lab.bring_up();
        // All that is left of a killed daemon is what it wrote to disk.
        let text = serde_json::to_string(lab.saved.last().unwrap()).unwrap();
        lab.state = serde_json::from_str(&text).unwrap();
        assert!(lab.teardown().is_empty());
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn with_ufw_like_tables_and_no_rules_of_weft_the_host_is_left_as_found() {
    on_a_host(|lab| {
        sh(
            "nft 'add table ip6 filter; add chain ip6 filter FORWARD { type filter hook forward priority 0; policy drop; }'",
        );
        let before = snapshot();
        lab.bring_up();
        assert!(
            !sh("nft list table ip6 filter").contains("weft"),
            "nothing is published, nobody goes out"
        );
        assert!(lab.teardown().is_empty());
        assert_eq!(snapshot(), before);
    });
}
