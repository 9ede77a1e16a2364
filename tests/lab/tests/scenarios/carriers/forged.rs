//! VXLAN that nobody agreed on: from outside, from a neighbour, in fragments, from users of the host itself.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use weft_lab::{
    Container, Forged, Host, Lab, Spawned, TIMES, forged_file as file, goes_on, hold, signal,
    vxlan_mac as mac,
};

use crate::upgrade::hang_a_successor;

use super::{TRUSTED, VXLAN, ipv6, trusting, wait_carrier};

/// Where forged datagrams go.
const PORT: u16 = 80;

/// Two hosts on VXLAN, a container on each, and what a perfect forgery of the first one's packet to `b` looks like.
struct Scene {
    lab: Lab,
    hosts: [Host; 2],
    a: Container,
    b: Container,
    neighbour: Host,
    outside: Host,
    /// Where a host is, by the version that the carrier goes by.
    address: fn(&Host) -> IpAddr,
}

fn scene(name: &str) -> Scene {
    scene_by(name, trusting, |host| host.v4().into())
}

fn scene6(name: &str) -> Scene {
    scene_by(name, ipv6::trusting, |host| host.v6().into())
}

fn scene_by(name: &str, trusting: fn(&Lab) -> [Host; 2], address: fn(&Host) -> IpAddr) -> Scene {
    let lab = Lab::new(name);
    let hosts = trusting(&lab);
    let (a, b) = (hosts[0].serve("a", &[]), hosts[1].serve("b", &[]));
    let neighbour = lab.host("h3", hosts[0].network());
    let outside = lab.host("outside", &lab.subnet("o"));
    // Neighbours know each other, so that what is forged is not lost for want of an answer.
    for host in [&neighbour, &outside] {
        let ping = ["ping", "-c1", "-w3", &address(&hosts[1]).to_string()];
        host.run(&ping).ok();
    }
    Scene {
        lab,
        hosts,
        a,
        b,
        neighbour,
        outside,
        address,
    }
}

impl Scene {
    fn perfect<'a>(&self, text: &'a str) -> Forged<'a> {
        Forged {
            from: (self.address)(&self.hosts[0]),
            to: (self.address)(&self.hosts[1]),
            macs: (mac(&self.hosts[0]), mac(&self.hosts[1])),
            inner: (self.a.ip(), self.b.ip()),
            text,
        }
    }

    /// Sends from the host, as root and to the last octet.
    fn send(&self, from: &Host, name: &str, packets: &[Vec<u8>]) {
        let file = file(&self.lab, name, packets);
        let sent = from.tool(&["replay", &file, "--exact"]).ok();
        assert_eq!(sent, (TIMES * packets.len()).to_string());
    }

    /// The neighbour forges a thousand a second from its own address, until this is dropped.
    fn forges_all_the_time(&self, text: &str) -> Spawned {
        let own = Forged {
            from: (self.address)(&self.neighbour),
            ..self.perfect(text)
        };
        let path = self.lab.dir().join("forged-stream");
        std::fs::write(&path, own.payload()).unwrap();
        let to = self.carrier_of_the_second();
        let stream = ["payload", &path.to_string_lossy(), &to, "1000000"];
        self.neighbour.spawn_tool("stream", &stream)
    }

    fn carrier_of_the_second(&self) -> String {
        SocketAddr::new((self.address)(&self.hosts[1]), VXLAN).to_string()
    }

    /// Sends from the router, which can wear anybody's address.
    fn send_as_anybody(&self, name: &str, packets: &[Vec<u8>]) {
        let file = file(&self.lab, name, packets);
        let tool = Host::binary("lab-tool");
        let replay = [tool.as_str(), "replay", &file, "--exact"];
        self.lab.router().run(&replay).ok();
    }

    /// How often the container behind the second host was told this.
    fn heard(&self, text: &str) -> usize {
        let heard = self.b.heard();
        heard.lines().filter(|line| line.contains(text)).count()
    }

    /// What was sent before this has been dealt with: packets of one way do not overtake each other.
    fn settle(&self) {
        for host in [&self.neighbour, &self.outside, &self.hosts[0]] {
            let to = (self.address)(&self.hosts[1]).to_string();
            let ping = ["ping", "-c2", "-w5", &to];
            host.run(&ping).ok();
        }
        let to = format!("{}:{PORT}", self.b.ip());
        self.a.ask("udp", &to).ok();
    }
}

#[test]
fn forged_vxlan_gets_nothing_through() {
    gets_nothing_through(&scene("vxforged"));
}

#[test]
fn forged_vxlan_gets_nothing_through_by_ipv6_either() {
    gets_nothing_through(&scene6("vx6forged"));
}

fn gets_nothing_through(s: &Scene) {
    // Whoever can speak with the peer's address and its MAC gets in, and that is how far a trusted network is to be trusted:
    // so what follows is forged well enough, in pieces, too.
    s.send_as_anybody("perfect", &[s.perfect("perfect").packet()]);
    s.send_as_anybody("pieces", &s.perfect("pieces").fragments(32));
    s.lab
        .wait("a perfect forgery gets in, whole and in pieces", 10, || {
            ["perfect", "pieces"].map(|text| s.heard(text)) == [TIMES; 2]
        });
    for (sender, name) in [(&s.neighbour, "neighbour"), (&s.outside, "outside")] {
        let own = Forged {
            from: (s.address)(sender),
            ..s.perfect(name)
        };
        s.send(sender, name, &[own.packet()]);
        let mut all: Vec<_> = [8, 16, 24, 32, 48].map(|first| own.fragments(first)).into();
        all.extend(own.to.is_ipv6().then(|| own.behind_options()));
        for (at, pieces) in all.into_iter().enumerate() {
            s.send(sender, &format!("{name}-{at}"), &pieces);
            let turned: Vec<_> = pieces.into_iter().rev().collect();
            s.send(sender, &format!("{name}-{at}-turned"), &turned);
        }
    }
    // Another node's MAC, or none of any, from the peer's own address.
    for (name, from_mac) in [("own", mac(&s.hosts[1])), ("any", [2, 0, 0, 0, 0, 9])] {
        let text = format!("mac-{name}");
        let other = Forged {
            macs: (from_mac, mac(&s.hosts[1])),
            ..s.perfect(&text)
        };
        s.send_as_anybody(&text, &[other.packet()]);
    }
    s.settle();
    for text in ["neighbour", "outside", "mac-"] {
        assert_eq!(s.heard(text), 0, "{text}: {}", s.b.heard());
    }
}

#[test]
fn a_peer_speaks_for_its_own_containers_alone() {
    let s = scene("vxspoof");
    let c = s.hosts[1].serve("c", &[]);
    // As if the peer itself were taken over: its address, its MAC, other sources inside.
    for (name, source) in [
        ("of-the-other", c.ip()),
        ("of-nobody", Ipv4Addr::from(u32::from(c.ip()) + 100)),
        ("outside", Ipv4Addr::new(203, 0, 113, 9)),
        ("loopback", Ipv4Addr::new(127, 0, 0, 1)),
        ("link-local", Ipv4Addr::new(169, 254, 1, 1)),
    ] {
        let text = format!("spoofed-{name}");
        let forged = Forged {
            inner: (source, s.b.ip()),
            ..s.perfect(&text)
        };
        s.send_as_anybody(&text, &[forged.packet()]);
    }
    s.settle();
    assert_eq!(s.heard("spoofed"), 0, "{}", s.b.heard());
}

#[test]
fn users_of_the_host_itself_can_t_speak_as_the_carrier() {
    users_can_t_speak_as_the_carrier(&scene("vxuser"));
}

#[test]
fn users_of_the_host_itself_can_t_by_ipv6_either() {
    users_can_t_speak_as_the_carrier(&scene6("vx6user"));
}

fn users_can_t_speak_as_the_carrier(s: &Scene) {
    let to = s.carrier_of_the_second();
    let tool = Host::binary("lab-tool");
    let long = "user".repeat(600);
    for (name, text) in [("short", "user"), ("long", long.as_str())] {
        let path = s.lab.dir().join(name);
        std::fs::write(&path, s.perfect(text).payload()).unwrap();
        let path = path.to_string_lossy().into_owned();
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let setpriv = [&["setpriv"], &nobody[..]].concat();
        for user in [&setpriv[..], &[]] {
            let args = [user, &[tool.as_str(), "payload", &path, &to, "1000"]].concat();
            assert_eq!(s.hosts[0].run(&args).ok(), "0", "the host let them out");
            // To any other port they may.
            let other = to.replace("6784", "6785");
            let args = [user, &[tool.as_str(), "payload", &path, &other, "3"]].concat();
            assert_eq!(s.hosts[0].run(&args).ok(), "3");
        }
    }
    s.settle();
    assert_eq!(s.heard("user"), 0, "{}", s.b.heard());
}

/// A virtual machine or another runtime's container behind a host that masquerades for it would come from the host's own
/// address.
#[test]
fn what_a_host_forwards_for_others_is_no_vxlan() {
    let lab = Lab::new("vxforward");
    let subnet = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &subnet));
    // It forwards for others already, so weft does not guard that.
    hosts[0].space().sysctl("net.ipv4.ip_forward", "1");
    lab.cluster_with(&hosts, [&TRUSTED, &TRUSTED]);
    wait_carrier(&lab, &hosts, "vxlan");
    let [h1, h2] = &hosts;
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let guest = lab.space("guest");
    let pair = "link add vm0 type veth peer name eth0 netns";
    let pair: Vec<&str> = pair.split(' ').chain([guest.name()]).collect();
    h1.space().ip(&pair).ok();
    for (space, command) in [
        (h1.space(), "addr add 192.168.77.1/24 dev vm0"),
        (h1.space(), "link set vm0 up"),
        (&guest, "addr add 192.168.77.2/24 dev eth0"),
        (&guest, "link set eth0 up"),
        (&guest, "route add default via 192.168.77.1"),
    ] {
        space.ip(&command.split(' ').collect::<Vec<_>>()).ok();
    }
    h1.space().nft(
        "table ip lab {
            chain post { type nat hook postrouting priority 100; oifname \"eth0\" masquerade; }
        }
        ",
    );
    let mut server = h2.spawn_tool("server", &["serve", "--name", "server", "--port", "7000"]);
    server.wait_for("ready", Duration::from_secs(5));
    let forged = Forged {
        from: h1.v4().into(),
        to: h2.v4().into(),
        macs: (mac(h1), mac(h2)),
        inner: (a.ip(), b.ip()),
        text: "forwarded",
    };
    let path = lab.dir().join("forwarded");
    std::fs::write(&path, forged.payload()).unwrap();
    let path = path.to_string_lossy().into_owned();
    let tool = Host::binary("lab-tool");
    let payload = |port: u16| {
        let to = format!("{}:{port}", h2.v4());
        guest.run(&[&tool, "payload", &path, &to, "20"]).ok()
    };
    assert_eq!(payload(VXLAN), "20");
    assert_eq!(payload(7000), "20");
    // The way is open, and the guest comes from the host's own address.
    let from_host = format!("udp {} ", h1.v4());
    lab.wait("the guest is heard", 10, || {
        server.stdout().contains(&from_host)
    });
    a.ask("udp", &format!("{}:80", b.ip())).ok();
    assert!(!b.heard().contains("forwarded"), "{}", b.heard());
}

/// Somebody flushes the host's rules: weft puts them back, and meanwhile a table of which others can take nothing away lets
/// in nothing of what a neighbour forges at that very moment.
#[test]
fn somebody_who_flushes_the_host_s_rules_lets_nothing_in() {
    let s = scene("vxflush");
    let [h1, h2] = &s.hosts;
    let hold = hold(h1, [&s.a, &s.b], 10, 15);
    let _stream = s.forges_all_the_time("meanwhile");
    for damage in [
        "flush ruleset\n",
        "flush chain inet weft base_vxlan_in\n",
        "flush chain inet weft base_raw\n",
        "delete table inet weft\n",
        "insert rule inet weft base_vxlan_in accept\n",
        "flush ruleset\n",
    ] {
        let before = s.heard("meanwhile");
        let begun = Instant::now();
        h2.space().nft(damage);
        s.lab.wait("the filter stands again", 5, || {
            let chain = |name| {
                h2.run(&["nft", "list", "chain", "inet", "weft", name])
                    .stdout
            };
            let rules = chain("base_vxlan_in");
            let leads_there = chain("base_raw").contains("goto base_vxlan_in");
            leads_there && rules.contains("drop") && rules.matches("accept").count() == 4
        });
        let took = begun.elapsed();
        goes_on(&s.lab, &hold);
        wait_carrier(&s.lab, &s.hosts, "vxlan");
        let slipped = s.heard("meanwhile") - before;
        eprintln!("{}: back after {took:?}, {slipped} forged", damage.trim());
        assert!(took < Duration::from_secs(3), "{damage} {took:?}");
        assert_eq!(slipped, 0, "{damage} forged packets got in");
    }
    // Nor can anybody take that table itself, and it goes with the daemon.
    let own = |host: &Host| {
        let tables = host.run(&["nft", "list", "tables"]).stdout;
        let own = tables.lines().find(|line| line.contains("weft_vxlan_"));
        own.map(str::to_owned)
    };
    let table = own(h2).expect("a table of weft's own");
    h2.run(&["sh", "-c", &format!("nft delete {table}")])
        .fails_with(1);
    h2.run(&["nft", "list", "ruleset"]).ok();
    h2.weft(&["restart"]).ok();
    s.lab.wait("its successor has one of its own", 10, || {
        own(h2).is_some_and(|next| next != table)
    });
    h2.kill9();
    assert_eq!(own(h2), None);
}

/// While one daemon follows another nobody puts the rules back: the table goes on to the successor, and back.
#[test]
fn somebody_who_flushes_while_a_daemon_follows_another_lets_nothing_in() {
    let s = scene("vxrestart");
    let [h1, h2] = &s.hosts;
    let hold = hold(h1, [&s.a, &s.b], 10, 15);
    let _stream = s.forges_all_the_time("meanwhile");
    let (successor, restart) = hang_a_successor(h2);
    h2.space().nft("flush ruleset\n");
    signal(successor, Signal::SIGKILL);
    drop(restart);
    s.lab.wait("the old daemon goes on", 20, || h2.alive() == 2);
    wait_carrier(&s.lab, &s.hosts, "vxlan");
    goes_on(&s.lab, &hold);
    assert_eq!(s.heard("meanwhile"), 0, "forged packets got in");
}

/// A service manager keeps that table's socket, so the table outlives a daemon that is killed.
#[test]
fn somebody_who_flushes_while_a_killed_daemon_is_away_lets_nothing_in_where_there_is_a_service_manager()
 {
    let s = scene("vxmanager");
    let [h1, h2] = &s.hosts;
    h2.kill9();
    let path = h2.dir().join("notify");
    let weft = Host::binary("weft");
    let manage = [
        "manage",
        path.to_str().unwrap(),
        &weft,
        "up",
        "--foreground",
    ];
    let service = [&manage[..], &TRUSTED].concat();
    let mut manager = h2.spawn_tool("manager", &service);
    manager.wait_for("stores weft-shield", Duration::from_secs(30));
    wait_carrier(&s.lab, &s.hosts, "vxlan");
    let hold = hold(h1, [&s.a, &s.b], 10, 15);
    let _stream = s.forges_all_the_time("meanwhile");
    let starts = |manager: &Spawned| manager.stdout().matches("ready\n").count();
    let before = starts(&manager);
    h2.kill9();
    h2.space().nft("flush ruleset\n");
    s.lab
        .wait("it is up again", 30, || starts(&manager) > before);
    wait_carrier(&s.lab, &s.hosts, "vxlan");
    goes_on(&s.lab, &hold);
    assert_eq!(s.heard("meanwhile"), 0, "forged packets got in");
    h2.weft(&["down"]).ok();
    manager.wait_for("kept \n", Duration::from_secs(10));
    let tables = h2.run(&["nft", "list", "tables"]).stdout;
    assert!(!tables.contains("weft"), "{tables}");
}
