//! Networks among whole nodes: made, filled, split and removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use weft_core::control::{ErrorKind, NetworkSpec, TokenRequest};
use weft_core::crypto::Random;
use weft_core::model::{AddressPlan, EndpointId, Label};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::view::{Endpoint, EndpointKind, NEARLY_FULL, NetworkView, View};
use weft_sim::faults::Action;
use weft_sim::nodes::{self, Invitation, Shell};
use weft_sim::world::World;

const SMALL: &str = "10.9.0.0/22";

/// A cluster that is whole, and a person who types one command after the other.
struct Cluster {
    world: World<Shell>,
    next: u64,
}

impl Cluster {
    fn new(seed: u64, hosts: usize, range: &str) -> Self {
        let invitation = Invitation::default();
        let world = nodes::world(seed, hosts, net(range), invitation.clone(), false);
        let mut cluster = Self { world, next: 1 };
        cluster.world.act(Action::Boot(0));
        cluster.until(|c| c.shell(0).ready);
        let request = TokenRequest {
            ttl_secs: 3600,
            uses: 1,
            reusable: true,
        };
        match cluster.ask(0, Command::MintToken(request)) {
            Ok(Reply::Token(token)) => invitation.borrow_mut().common = Some(token),
            other => panic!("no token: {other:?}"),
        }
        for host in 1..hosts {
            cluster.world.act(Action::Boot(host));
            cluster.until(|c| c.shell(host).ready);
        }
        cluster.settle();
        cluster
    }

    fn shell(&mut self, host: usize) -> &mut Shell {
        self.world.hosts[host].machine.as_mut().expect("it is on")
    }

    fn view(&mut self, host: usize) -> View {
        self.shell(host).view().expect("it is a member")
    }

    fn until(&mut self, done: impl Fn(&mut Self) -> bool) {
        for _ in 0..1200 {
            if done(self) {
                return;
            }
            self.world.run_for(Duration::from_millis(50));
        }
        panic!("it did not happen within a minute");
    }

    /// All who are on know the same.
    fn settle(&mut self) {
        self.world.run_for(Duration::from_secs(2));
        self.until(|c| {
            let digests: BTreeSet<_> = c.world.running().map(|(_, shell)| shell.digest()).collect();
            digests.len() == 1
        });
    }

    fn send(&mut self, host: usize, command: Command) -> u64 {
        self.next += 1;
        let id = self.next;
        self.world
            .with(host, |shell, now, fx| shell.command(now, id, command, fx));
        id
    }

    fn ask(&mut self, host: usize, command: Command) -> Result<Reply, CommandError> {
        let id = self.send(host, command);
        for _ in 0..1200 {
            if let Some(reply) = self.shell(host).take_reply(id) {
                return reply;
            }
            self.world.run_for(Duration::from_millis(50));
        }
        panic!("no answer within a minute");
    }

    fn create(
        &mut self,
        host: usize,
        name: &str,
        spec: impl Into<Spec>,
    ) -> Result<NetworkView, CommandError> {
        match self.ask(host, create(name, spec))? {
            Reply::Network(network) => Ok(network),
            other => panic!("{other:?}"),
        }
    }

    fn remove(&mut self, host: usize, name: &str) -> Result<(), CommandError> {
        self.ask(host, Command::RemoveNetwork(label(name)))
            .map(drop)
    }

    fn attach(
        &mut self,
        host: usize,
        network: &str,
        ip: Option<&str>,
    ) -> Result<Endpoint, CommandError> {
        let command = Command::Attach {
            kind: EndpointKind::Container,
            names: vec![label("web")],
            network: label(network),
            ip: ip.map(|ip| ip.parse().expect("an address")),
            labels: BTreeMap::new(),
        };
        match self.ask(host, command)? {
            Reply::Attached(endpoint) => Ok(endpoint),
            other => panic!("{other:?}"),
        }
    }

    fn network(&mut self, host: usize, name: &str) -> Option<NetworkView> {
        let networks = self.view(host).networks;
        networks.into_iter().find(|n| n.name.as_str() == name)
    }

    /// Nothing passes between the first hosts and the others any more, or everything again.
    fn split(&mut self, first: usize, act: impl Fn(usize, usize) -> Action) {
        for one in 0..first {
            for other in first..self.world.hosts.len() {
                self.world.act(act(one, other));
                self.world.act(act(other, one));
            }
        }
    }

    fn alarms(&mut self, host: usize, part: &str) -> usize {
        let alarms = &self.shell(host).alarms;
        alarms.iter().filter(|text| text.contains(part)).count()
    }
}

/// What `weft network create` takes beside the name.
#[derive(Clone, Copy)]
enum Spec {
    Any,
    Size(u8),
    Subnet(Ipv4Net),
}

impl From<()> for Spec {
    fn from((): ()) -> Self {
        Spec::Any
    }
}

impl From<u8> for Spec {
    fn from(size: u8) -> Self {
        Spec::Size(size)
    }
}

impl From<&str> for Spec {
    fn from(subnet: &str) -> Self {
        Spec::Subnet(net(subnet))
    }
}

fn create(name: &str, spec: impl Into<Spec>) -> Command {
    let (prefix_len, subnet) = match spec.into() {
        Spec::Any => (None, None),
        Spec::Size(size) => (Some(size), None),
        Spec::Subnet(net) => (None, Some(net)),
    };
    Command::CreateNetwork(NetworkSpec {
        name: label(name),
        prefix_len,
        subnet,
    })
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("a label")
}

fn net(text: &str) -> Ipv4Net {
    text.parse().expect("a network")
}

fn default_range() -> String {
    AddressPlan::DEFAULT_RANGE.to_string()
}

#[test]
fn a_network_made_anywhere_is_there_for_all_and_outlives_its_maker() {
    let mut cluster = Cluster::new(1, 4, &default_range());
    // Host 1 owns nothing outside "default": the founder hands over a block.
    let blue = cluster.create(1, "blue", ()).unwrap();
    assert_eq!((blue.net.prefix_len(), blue.size), (20, 4094));
    let green = cluster.create(2, "green", 16).unwrap();
    assert_eq!(green.net.prefix_len(), 16);
    assert!(!green.net.contains(&blue.net));
    let red = cluster.create(0, "red", "10.40.16.0/20").unwrap();
    assert_eq!(red.net, net("10.40.16.0/20"));
    cluster.settle();
    for host in 0..4 {
        let names: Vec<String> = cluster
            .view(host)
            .networks
            .iter()
            .map(|n| n.name.to_string())
            .collect();
        assert_eq!(names, ["default", "blue", "green", "red"]);
    }
    // Host 3 owns nothing of it: its maker gives some.
    let there = cluster.attach(3, "blue", None).unwrap();
    assert!(blue.net.contains(&there.ip), "{}", there.ip);
    let ip = Ipv4Addr::from(u32::from(blue.net.network()) + 77);
    let asked = cluster.attach(2, "blue", Some(&ip.to_string())).unwrap();
    assert_eq!(asked.ip, ip);
    let error = cluster
        .attach(2, "green", Some(&ip.to_string()))
        .unwrap_err();
    let said = format!("{ip} is no address for an endpoint of {}", green.net);
    assert!(error.text.contains(&said), "{error}");
    cluster.settle();
    assert_eq!(cluster.network(0, "blue").unwrap().used, 2);
    // All lose power; what was said holds.
    for host in 0..4 {
        cluster.world.act(Action::Crash(host));
    }
    for host in [3, 0, 2] {
        cluster.world.act(Action::Boot(host));
    }
    cluster.until(|c| [3, 0, 2].iter().all(|host| c.shell(*host).ready));
    cluster.settle();
    assert_eq!(cluster.network(3, "blue").unwrap().net, blue.net);
    let more = cluster.attach(3, "blue", None).unwrap();
    assert!(blue.net.contains(&more.ip) && more.ip != there.ip);
}

#[test]
fn what_cant_be_is_refused_with_the_reason() {
    let mut cluster = Cluster::new(2, 3, &default_range());
    cluster.create(0, "blue", "10.33.0.0/18").unwrap();
    cluster.settle();
    let cases: [(Spec, ErrorKind, &str); 10] = [
        (24.into(), ErrorKind::Invalid, "a /16 to a /20, not a /24"),
        (12.into(), ErrorKind::Invalid, "a /16 to a /20"),
        ("10.33.0.0/24".into(), ErrorKind::Invalid, "not a /24"),
        (
            "10.33.0.1/20".into(),
            ErrorKind::Invalid,
            "did you mean 10.33.0.0/20?",
        ),
        (
            "192.168.0.0/20".into(),
            ErrorKind::Invalid,
            "not in this cluster's range, 10.32.0.0/12",
        ),
        (
            "10.32.16.0/20".into(),
            ErrorKind::Conflict,
            "overlaps network \"default\", 10.32.0.0/16",
        ),
        (
            "10.47.16.0/20".into(),
            ErrorKind::Conflict,
            "overlaps the services' virtual addresses",
        ),
        (
            "10.33.16.0/20".into(),
            ErrorKind::Conflict,
            "overlaps network \"blue\", 10.33.0.0/18",
        ),
        (
            "10.33.0.0/16".into(),
            ErrorKind::Conflict,
            "overlaps network \"blue\", 10.33.0.0/18",
        ),
        (
            "10.33.0.0/18".into(),
            ErrorKind::Conflict,
            "overlaps network \"blue\"",
        ),
    ];
    for (spec, kind, part) in cases {
        for host in [0, 1] {
            let error = cluster.create(host, "new", spec).unwrap_err();
            assert!(error.kind == kind && error.text.contains(part), "{error:?}");
        }
    }
    for taken in ["blue", "default"] {
        let error = cluster.create(1, taken, ()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
        assert!(error.text.contains("already"), "{error}");
    }
    let error = cluster.attach(1, "nowhere", None).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(
        error.text.contains("weft network create nowhere"),
        "{error}"
    );
    assert_eq!(
        cluster.remove(1, "default").unwrap_err().kind,
        ErrorKind::Conflict
    );
    assert_eq!(
        cluster.remove(1, "nowhere").unwrap_err().kind,
        ErrorKind::NotFound
    );
    // The founder is away, and with it whoever could give the space.
    cluster.world.act(Action::Crash(0));
    cluster.until(|c| {
        let view = c.view(1);
        view.members
            .iter()
            .filter(|m| m.liveness == weft_core::view::Liveness::Down)
            .count()
            == 1
    });
    let error = cluster.create(1, "new", "10.40.0.0/20").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(
        error.text.contains("10.40.0.0/20 belongs to host-0"),
        "{error}"
    );
    let error = cluster.create(1, "new", ()).unwrap_err();
    assert!(
        error.text.contains("no free block of a /20 is left"),
        "{error}"
    );
}

#[test]
fn a_network_goes_when_nothing_is_in_it_and_its_space_makes_another() {
    let mut cluster = Cluster::new(3, 3, SMALL);
    // All that there is besides "default" and the VIPs: 14 of 64.
    for index in 0..14 {
        cluster
            .create(index % 3, &format!("net-{index}"), 26)
            .unwrap();
        cluster.settle();
    }
    let error = cluster.create(1, "more", 30).unwrap_err();
    assert!(error.text.contains("no free block of a /30"), "{error}");
    let ends: Vec<Endpoint> = (0..3)
        .map(|host| cluster.attach(host, "net-5", None).unwrap())
        .collect();
    cluster.settle();
    let error = cluster.remove(1, "net-5").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict);
    assert!(
        error
            .text
            .contains(&format!("web ({}, on host-2)", ends[2].ip)),
        "{error}"
    );
    for (host, end) in ends.iter().enumerate() {
        cluster.ask(host, Command::Release(end.id)).unwrap();
    }
    cluster.settle();
    cluster.remove(1, "net-5").unwrap();
    cluster.settle();
    assert!((0..3).all(|host| cluster.network(host, "net-5").is_none()));
    // Its addresses rest; then three hosts hand their parts over to the one that wants them.
    assert!(cluster.create(1, "more", 26).is_err());
    cluster.world.run_for(Duration::from_secs(61));
    let more = cluster.create(1, "more", 26).unwrap();
    assert!(more.net.contains(&ends[0].ip));
    cluster.settle();
    for host in 0..3 {
        let end = cluster.attach(host, "more", None).unwrap();
        assert!(more.net.contains(&end.ip));
    }
}

#[test]
fn a_full_network_is_warned_of_once_and_then_says_what_to_do() {
    let mut cluster = Cluster::new(4, 3, SMALL);
    let tiny = cluster.create(1, "tiny", 28).unwrap();
    cluster.settle();
    assert_eq!(tiny.size, 14);
    let mut got: BTreeMap<Ipv4Addr, (usize, EndpointId)> = BTreeMap::new();
    for turn in 0..12 {
        let end = cluster.attach(turn % 3, "tiny", None).unwrap();
        assert!(got.insert(end.ip, (turn % 3, end.id)).is_none());
        cluster.settle();
    }
    assert_eq!(cluster.alarms(0, NEARLY_FULL), 0);
    for turn in 12..14 {
        let end = cluster.attach(turn % 3, "tiny", None).unwrap();
        got.insert(end.ip, (turn % 3, end.id));
        cluster.settle();
        for host in 0..3 {
            assert_eq!(cluster.alarms(host, NEARLY_FULL), 1, "host {host}");
            assert!(cluster.network(host, "tiny").unwrap().low);
        }
    }
    assert_eq!(got.len(), 14);
    for host in 0..3 {
        let error = cluster.attach(host, "tiny", None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        let said = format!(
            "network \"tiny\" ({}) is full: all its 14 addresses are in use; detach",
            tiny.net
        );
        assert!(error.text.starts_with(&said), "{error}");
    }
    // One more is free, and still few: nobody is told again.
    let (ip, (host, id)) = got.pop_first().unwrap();
    cluster.ask(host, Command::Release(id)).unwrap();
    cluster.settle();
    assert!(cluster.network(0, "tiny").unwrap().low);
    let error = cluster.attach(host, "tiny", None).unwrap_err();
    assert!(error.text.contains("13 of 14 are in use"), "{error}");
    cluster.world.run_for(Duration::from_secs(61));
    let other = (host + 1) % 3;
    assert_eq!(cluster.attach(other, "tiny", None).unwrap().ip, ip);
    for (_, (host, id)) in got {
        cluster.ask(host, Command::Release(id)).unwrap();
    }
    cluster.settle();
    assert!(!cluster.network(0, "tiny").unwrap().low);
    assert_eq!(cluster.alarms(0, NEARLY_FULL), 1);
}

#[test]
fn one_name_made_on_both_sides_of_a_split_settles_as_one_network() {
    let mut cluster = Cluster::new(5, 4, &default_range());
    // The other side owns a block of its own, from a network that is no more.
    let seed = cluster.create(2, "seed", ()).unwrap().net;
    cluster.settle();
    cluster.remove(2, "seed").unwrap();
    cluster.settle();
    cluster.split(2, Action::Block);
    cluster.world.run_for(Duration::from_secs(10));
    let here = cluster.create(1, "blue", ()).unwrap().net;
    let there = cluster.create(2, "blue", ()).unwrap().net;
    assert_eq!(there, seed);
    assert_ne!(here, there);
    let lost_or_kept = [
        cluster.attach(1, "blue", None).unwrap(),
        cluster.attach(3, "blue", None).unwrap(),
    ];
    cluster.split(2, Action::Unblock);
    cluster.world.run_for(Duration::from_secs(10));
    cluster.settle();
    let first = cluster.network(0, "blue").unwrap();
    let both = BTreeSet::from([here, there]);
    assert_eq!(first.blocks().collect::<BTreeSet<_>>(), both);
    for host in 0..4 {
        let blue = cluster.network(host, "blue").unwrap();
        assert_eq!(
            blue.blocks().collect::<Vec<_>>(),
            first.blocks().collect::<Vec<_>>()
        );
        assert_eq!(
            cluster.alarms(host, "network \"blue\" was created twice"),
            1
        );
        // Neither block becomes another network meanwhile.
        for block in [here, there] {
            let error = cluster
                .create(host, "other", Spec::Subnet(block))
                .unwrap_err();
            assert!(error.text.contains("overlaps network \"blue\""), "{error}");
        }
    }
    let new = cluster.attach(0, "blue", None).unwrap();
    assert!(first.net.contains(&new.ip));
    // Who was there stays where it was, and removing settles it.
    assert!(
        cluster
            .remove(0, "blue")
            .unwrap_err()
            .text
            .contains("is in use by web")
    );
    for (host, end) in [(1, &lost_or_kept[0]), (3, &lost_or_kept[1]), (0, &new)] {
        cluster.ask(host, Command::Release(end.id)).unwrap();
    }
    cluster.settle();
    cluster.remove(3, "blue").unwrap();
    cluster.world.run_for(Duration::from_secs(61));
    cluster.settle();
    for host in 0..4 {
        assert!(cluster.network(host, "blue").is_none());
    }
    cluster.create(0, "other", Spec::Subnet(there)).unwrap();
}

#[test]
fn who_attaches_while_the_other_side_removes_the_network_hears_of_it() {
    let mut cluster = Cluster::new(6, 3, &default_range());
    let blue = cluster.create(2, "blue", ()).unwrap();
    cluster.settle();
    cluster.split(2, Action::Block);
    cluster.world.run_for(Duration::from_secs(10));
    let end = cluster.attach(2, "blue", None).unwrap();
    cluster.remove(0, "blue").unwrap();
    cluster.split(2, Action::Unblock);
    cluster.world.run_for(Duration::from_secs(10));
    cluster.settle();
    assert_eq!(
        cluster.alarms(2, "which was removed while this host did not hear of it"),
        1
    );
    // Nobody makes another network of a block that somebody is in.
    let error = cluster
        .create(0, "new", Spec::Subnet(blue.net))
        .unwrap_err();
    assert!(
        error
            .text
            .contains(&format!("in use by web ({}, on host-2)", end.ip)),
        "{error}"
    );
}

/// People make, fill and remove networks on both sides of splits and across crashes. Whatever they do: networks never
/// overlap, no address is had twice, and in the end all agree.
#[test]
fn networks_never_overlap_whatever_people_do_where() {
    for seed in 0..30 {
        live(seed);
    }
}

fn live(seed: u64) {
    let hosts = 3 + seed as usize % 3;
    let mut cluster = Cluster::new(100 + seed, hosts, SMALL);
    let mut random = Random::from_seed([seed as u8; 32]);
    let mut pick = move |below: usize| random.range(below as u64) as usize;
    let mut split = 0;
    for turn in 0..120 {
        let host = pick(hosts);
        if cluster.world.hosts[host].machine.is_none() {
            cluster.world.act(Action::Boot(host));
            continue;
        }
        let name = format!("n{}", pick(4));
        match pick(16) {
            0..4 => drop(cluster.send(host, create(&name, 26 + pick(5) as u8))),
            4..6 => drop(cluster.send(host, Command::RemoveNetwork(label(&name)))),
            6..11 => {
                let command = Command::Attach {
                    kind: EndpointKind::Container,
                    names: vec![label(&format!("e{turn}"))],
                    network: label(&name),
                    ip: None,
                    labels: BTreeMap::new(),
                };
                cluster.send(host, command);
            }
            11..13 => {
                let view = cluster.shell(host).view();
                let mine = view
                    .into_iter()
                    .flat_map(|v| v.endpoints.into_iter().filter(move |e| e.node == v.me));
                let ids: Vec<EndpointId> = mine.map(|e| e.id).collect();
                if !ids.is_empty() {
                    cluster.send(host, Command::Release(ids[pick(ids.len())]));
                }
            }
            13 if split == 0 => {
                split = 1 + pick(hosts - 1);
                cluster.split(split, Action::Block);
            }
            13 | 14 if split > 0 => {
                cluster.split(split, Action::Unblock);
                split = 0;
            }
            15 => cluster.world.act(Action::Crash(host)),
            _ => {}
        }
        cluster
            .world
            .run_for(Duration::from_millis(pick(3000) as u64));
        for host in 0..hosts {
            if let Some(view) = cluster.world.hosts[host]
                .machine
                .as_mut()
                .and_then(Shell::view)
            {
                check_addresses(seed, &view);
            }
        }
    }
    if split > 0 {
        cluster.split(split, Action::Unblock);
    }
    (0..hosts).for_each(|host| cluster.world.act(Action::Boot(host)));
    cluster.world.run_for(Duration::from_secs(40));
    cluster.until(|c| (0..c.world.hosts.len()).all(|host| c.shell(host).ready));
    cluster.settle();
    for host in 0..hosts {
        let view = cluster.view(host);
        check_addresses(seed, &view);
        for stray in check_blocks(seed, &view) {
            let node = view
                .members
                .iter()
                .position(|m| m.id == stray.node)
                .expect("a member");
            let name = view.members[node].name.to_string();
            let host: usize = name.trim_start_matches("host-").parse().expect("a number");
            let told = cluster.alarms(host, &format!("({}, on {name})", stray.ip));
            assert_eq!(told, 1, "seed {seed}: nobody heard of {}", stray.ip);
        }
    }
}

/// No address is had twice, by anybody, as far as one node knows.
fn check_addresses(seed: u64, view: &View) {
    let mut seen = BTreeSet::new();
    for end in &view.endpoints {
        assert!(seen.insert(end.ip), "seed {seed}: {} twice", end.ip);
    }
}

/// Networks don't overlap. Returns endpoints whose network was removed while their host did not hear of it.
fn check_blocks(seed: u64, view: &View) -> Vec<Endpoint> {
    let blocks: Vec<(Label, Ipv4Net)> = view
        .networks
        .iter()
        .flat_map(|n| n.blocks().map(|block| (n.name.clone(), block)))
        .collect();
    for (index, (name, block)) in blocks.iter().enumerate() {
        for (other, net) in &blocks[index + 1..] {
            let apart = !block.contains(net) && !net.contains(block);
            assert!(
                apart,
                "seed {seed}: {name} {block} and {other} {net} overlap"
            );
        }
    }
    let mut strays = view.endpoints.clone();
    strays.retain(|end| {
        let mut own = view.networks.iter().filter(|n| n.name == end.network);
        !own.any(|n| n.blocks().any(|block| block.contains(&end.ip)))
    });
    strays
}
