//! Nodes that go for good: removed, removed by force, on both sides of a split, and leaving.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use weft_core::control::TokenRequest;
use weft_core::model::{AddressPlan, Label};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::view::{Endpoint, EndpointKind};
use weft_sim::faults::Action;
use weft_sim::nodes::{self, Invitation, Shell};
use weft_sim::world::World;

struct Hosts {
    world: World<Shell>,
    next: u64,
}

impl Hosts {
    /// `count` hosts that are members and have settled.
    fn new(seed: u64, count: usize) -> Self {
        let invitation = Invitation::default();
        let range = AddressPlan::DEFAULT_RANGE;
        let world = nodes::world(seed, count, range, invitation.clone(), false);
        let mut hosts = Self { world, next: 1 };
        hosts.world.act(Action::Boot(0));
        hosts.run(2);
        let request = TokenRequest {
            ttl_secs: 86_400,
            uses: 0,
            reusable: true,
        };
        match hosts.ask(0, Command::MintToken(request)) {
            Ok(Reply::Token(text)) => invitation.borrow_mut().common = Some(text),
            other => panic!("{other:?}"),
        }
        for host in 1..count {
            hosts.world.act(Action::Boot(host));
            hosts.run(1);
        }
        hosts.run(15);
        hosts
    }

    fn run(&mut self, seconds: u64) {
        self.world.run_for(Duration::from_secs(seconds));
    }

    fn ask(&mut self, host: usize, command: Command) -> Result<Reply, CommandError> {
        let id = self.next;
        self.next += 1;
        self.world
            .with(host, |shell, now, fx| shell.command(now, id, command, fx))
            .expect("the host is on");
        for _ in 0..300 {
            let machine = self.world.hosts[host].machine.as_mut().expect("it is on");
            if let Some(reply) = machine.take_reply(id) {
                return reply;
            }
            self.world.run_for(Duration::from_millis(100));
        }
        panic!("host {host} does not answer");
    }

    fn remove(&mut self, by: usize, host: usize, force: bool) -> Result<Reply, CommandError> {
        let node = format!("host-{host}");
        self.ask(by, Command::RemoveNode { node, force })
    }

    fn attach(&mut self, host: usize) -> Endpoint {
        self.attach_at(host, None)
    }

    fn attach_at(&mut self, host: usize, ip: Option<Ipv4Addr>) -> Endpoint {
        let command = Command::Attach {
            kind: EndpointKind::Container,
            names: vec![Label::parse("app").expect("letters")],
            network: Label::parse("default").expect("letters"),
            ip,
            labels: BTreeMap::new(),
        };
        match self.ask(host, command) {
            Ok(Reply::Attached(endpoint)) => endpoint,
            other => panic!("{other:?}"),
        }
    }

    fn cut(&mut self, sides: [&[usize]; 2], action: fn(usize, usize) -> Action) {
        for a in sides[0] {
            for b in sides[1] {
                self.world.act(action(*a, *b));
                self.world.act(action(*b, *a));
            }
        }
    }

    /// Addresses of the range outside the VIPs that no member owns, as `host` sees it.
    fn unowned(&mut self, host: usize) -> u64 {
        let machine = self.world.hosts[host].machine.as_mut().expect("it is on");
        let view = machine.view().expect("it is a member");
        let size = |len: u8| 1u64 << (32 - len);
        let owned: u64 = view
            .members
            .iter()
            .flat_map(|member| &member.prefixes)
            .map(|net| size(net.prefix_len()))
            .sum();
        size(view.plan.range.prefix_len()) - size(view.plan.vips().prefix_len()) - owned
    }

    fn members(&mut self, host: usize) -> usize {
        let machine = self.world.hosts[host].machine.as_mut().expect("it is on");
        machine.view().expect("it is a member").members.len()
    }

    fn addresses(&mut self, host: usize) -> Vec<Ipv4Addr> {
        let machine = self.world.hosts[host].machine.as_mut().expect("it is on");
        let view = machine.view().expect("it is a member");
        let own = view.endpoints.iter().filter(|e| e.node == view.me);
        own.map(|e| e.ip).collect()
    }
}

#[test]
fn a_dead_node_is_removed_and_all_its_addresses_come_back() {
    for seed in 0..10 {
        for count in [3, 5] {
            let mut hosts = Hosts::new(seed, count);
            hosts.attach(count - 1);
            hosts.world.act(Action::Crash(count - 1));
            hosts.run(10);
            let reply = hosts.remove(0, count - 1, false);
            assert!(matches!(reply, Ok(Reply::Removed { .. })), "{reply:?}");
            hosts.run(3);
            for host in 0..count - 1 {
                assert_eq!(hosts.unowned(host), 0, "seed {seed}, {count} hosts");
                assert_eq!(hosts.members(host), count - 1);
            }
        }
    }
}

#[test]
fn of_two_nodes_one_removes_the_other_s_addresses_only_by_force() {
    let mut hosts = Hosts::new(1, 2);
    hosts.world.act(Action::Crash(0));
    hosts.run(10);
    let error = hosts.remove(1, 0, false).unwrap_err();
    assert!(error.text.contains("--force"), "{error}");
    assert_eq!(hosts.members(1), 1);
    assert_ne!(hosts.unowned(1), 0);
    let reply = hosts.remove(1, 0, true);
    assert!(matches!(reply, Ok(Reply::Removed { .. })), "{reply:?}");
    assert_eq!(hosts.unowned(1), 0);
    hosts.attach(1);
}

#[test]
fn only_the_larger_half_of_a_split_gets_a_dead_node_s_addresses_back() {
    for seed in 0..10 {
        let mut hosts = Hosts::new(seed, 6);
        hosts.world.act(Action::Crash(5));
        hosts.run(10);
        hosts.cut([&[0, 1], &[2, 3, 4]], Action::Block);
        hosts.run(10);
        assert!(hosts.remove(0, 5, false).is_err());
        // Four of six are a majority; three are not.
        assert!(hosts.remove(3, 5, false).is_err());
        assert_ne!(hosts.unowned(0), 0);
        assert_ne!(hosts.unowned(3), 0);
        hosts.cut([&[0, 1], &[2, 3, 4]], Action::Unblock);
        hosts.run(30);
        for host in 0..5 {
            assert_eq!(hosts.unowned(host), 0, "seed {seed}");
        }
    }
}

#[test]
fn both_sides_of_a_split_take_one_node_by_force_and_the_loser_moves() {
    for seed in 0..10 {
        let mut hosts = Hosts::new(seed, 5);
        let taken = hosts.attach(4).ip;
        let next = Ipv4Addr::from(u32::from(taken) + 1);
        hosts.world.act(Action::Crash(4));
        hosts.run(10);
        hosts.cut([&[0, 1], &[2, 3]], Action::Block);
        hosts.run(10);
        for host in [0, 2] {
            let reply = hosts.remove(host, 4, true);
            assert!(matches!(reply, Ok(Reply::Removed { .. })), "{reply:?}");
            assert_eq!(hosts.unowned(host), 0);
        }
        // What was in use there rests.
        hosts.run(65);
        for host in [0, 2] {
            hosts.attach_at(host, Some(taken));
            hosts.attach_at(host, Some(next));
        }
        hosts.cut([&[0, 1], &[2, 3]], Action::Unblock);
        hosts.run(30);
        let moved = |host: usize| hosts.world.hosts[host].machine.as_ref().unwrap();
        let losers = [0, 2].map(|host| {
            let alarms = moved(host).alarms.iter();
            alarms.filter(|line| line.contains("from now on")).count()
        });
        assert!(losers == [0, 2] || losers == [2, 0], "{losers:?}");
        let mut all: Vec<Ipv4Addr> = (0..4).flat_map(|host| hosts.addresses(host)).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count, "seed {seed}: one address twice");
        for host in 0..4 {
            assert_eq!(hosts.unowned(host), 0, "seed {seed}");
        }
    }
}

/// Whoever removes the giver has not heard of the gift, and whom it was given to is off until then: it hears of the
/// removal before it is ready to write.
#[test]
fn what_a_dead_node_gave_at_last_stays_with_whom_it_was_given_to() {
    for seed in 0..5 {
        let mut hosts = Hosts::new(seed, 3);
        hosts.cut([&[0], &[1, 2]], Action::Block);
        let near = hosts.attach(2).ip;
        let gift = Ipv4Addr::from(u32::from(near) + 50);
        assert_eq!(hosts.attach_at(1, Some(gift)).ip, gift);
        for host in [1, 2] {
            hosts.world.act(Action::Crash(host));
        }
        hosts.cut([&[0], &[1, 2]], Action::Unblock);
        hosts.run(10);
        assert!(hosts.remove(0, 2, false).is_err(), "it has no majority");
        hosts.world.act(Action::Boot(1));
        hosts.run(90);
        assert_eq!(hosts.addresses(1), vec![gift], "seed {seed}");
        // Who decided about the rest in the end the dead node had told nobody else.
        assert!(hosts.remove(0, 2, true).is_ok());
        hosts.run(90);
        assert_eq!(hosts.addresses(1), vec![gift], "seed {seed}");
        assert_eq!(hosts.unowned(0), 0, "seed {seed}");
    }
}

#[test]
fn who_leaves_for_good_gives_all_back() {
    for seed in 0..10 {
        for (count, leaver) in [(2, 1), (2, 0), (4, 0), (4, 3)] {
            let mut hosts = Hosts::new(seed, count);
            let reply = hosts.ask(leaver, Command::LeaveForGood);
            assert!(matches!(reply, Ok(Reply::Done)), "{reply:?}");
            hosts.world.act(Action::Crash(leaver));
            hosts.run(15);
            for host in (0..count).filter(|host| *host != leaver) {
                assert_eq!(
                    hosts.unowned(host),
                    0,
                    "seed {seed}: {leaver} of {count} left"
                );
                assert_eq!(hosts.members(host), count - 1);
            }
        }
    }
}

#[test]
fn who_is_removed_while_it_lives_hears_of_it() {
    let mut hosts = Hosts::new(3, 3);
    let reply = hosts.remove(0, 2, false);
    assert!(matches!(reply, Ok(Reply::Removed { .. })), "{reply:?}");
    hosts.run(2);
    let removed = hosts.world.hosts[2].machine.as_mut().unwrap();
    assert!(
        removed
            .alarms
            .iter()
            .any(|line| line.contains("removed from the cluster by host-0"))
    );
}
