//! Whole nodes without faults, for measuring.

use std::collections::BTreeMap;
use std::time::Duration;

use weft_core::control::{NameSpec, TokenRequest};
use weft_core::crypto::memo;
use weft_core::model::{AddressPlan, Label, NodeId, Now};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::view::EndpointKind;

use crate::faults::Action;
use crate::net::Weather;
use crate::nodes::{self, Invitation, Shell, some_address};
use crate::world::World;

/// IPv4 or IPv6 header and UDP header, octets: what a datagram costs on the wire beside itself.
pub(super) const IPV4: u64 = 28;
pub(super) const IPV6: u64 = 48;
/// Time is looked at in these steps.
const STEP: Duration = Duration::from_millis(5);
/// Newcomers knock one after another.
const BETWEEN_JOINS: Duration = Duration::from_millis(40);

/// So many come in by one member: nobody believes that one admits more than 64 an hour.
const PER_DOOR: usize = 40;

/// A cluster of whole nodes: the first founds it, the others join.
pub struct Cluster {
    /// Where they live.
    pub world: World<Shell>,
    invitation: Invitation,
    next: u64,
}

/// A change that was made and is on its way.
pub struct Change {
    writer: NodeId,
    sequence: u64,
    since: Now,
}

impl Cluster {
    /// All joined, all know the same, and nothing happened for a while; `None` if that never came.
    pub fn settled(seed: u64, hosts: usize) -> Option<Self> {
        memo::enable_for_this_thread();
        let invitation = Invitation::default();
        let range = AddressPlan::DEFAULT_RANGE;
        let mut world = nodes::world(seed, hosts, range, invitation.clone(), false);
        world.take_no_notes();
        world.net.set_latency(super::membership::NEAR);
        let mut cluster = Self {
            world,
            invitation,
            next: 1,
        };
        cluster.join_all()?;
        cluster.until(Duration::from_secs(120), |cluster| cluster.agrees())?;
        cluster.world.run_for(Duration::from_secs(5));
        Some(cluster)
    }

    fn join_all(&mut self) -> Option<()> {
        let hosts = self.world.hosts.len();
        self.world.act(Action::Boot(0));
        self.until(Duration::from_secs(10), |cluster| cluster.is_ready(0))?;
        for first in (1..hosts).step_by(PER_DOOR) {
            let end = hosts.min(first + PER_DOOR);
            self.invite(first / PER_DOOR)?;
            for host in first..end {
                self.world.act(Action::Boot(host));
                self.world.run_for(BETWEEN_JOINS);
            }
            self.until(Duration::from_secs(120), |cluster| {
                (first..end).all(|host| cluster.is_ready(host))
            })?;
            if hosts > PER_DOOR {
                super::progress(&format!("  {end} of {hosts} nodes are in"));
            }
        }
        Some(())
    }

    /// Who comes now comes with an invitation of this host.
    fn invite(&mut self, host: usize) -> Option<()> {
        self.invitation.borrow_mut().common = None;
        let request = TokenRequest {
            ttl_secs: 36_000,
            uses: 1,
            reusable: true,
        };
        let Ok(Reply::Token(token)) = self.ask(host, Command::MintToken(request))? else {
            return None;
        };
        self.invitation.borrow_mut().common = Some(token);
        Some(())
    }

    fn is_ready(&self, host: usize) -> bool {
        let shell = self.world.hosts[host].machine.as_ref();
        shell.is_some_and(|shell| shell.ready)
    }

    /// Is the roll-up of all that is replicated the same everywhere?
    pub fn agrees(&self) -> bool {
        let mut digests = self.world.running().map(|(_, shell)| shell.digest());
        let first = digests.next().flatten();
        first.is_some() && digests.all(|digest| digest == first)
    }

    /// Lets time pass until it holds; how long that took.
    pub fn until(&mut self, limit: Duration, holds: impl Fn(&Self) -> bool) -> Option<Duration> {
        let start = self.world.now;
        while !holds(self) {
            if self.world.now.since(start) >= limit {
                return None;
            }
            self.world.run_for(STEP);
        }
        Some(self.world.now.since(start))
    }

    /// Gives a command without waiting for the answer.
    pub fn tell(&mut self, host: usize, command: Command) -> u64 {
        let id = self.next;
        self.next += 1;
        self.world
            .with(host, |shell, now, fx| shell.command(now, id, command, fx));
        id
    }

    /// Gives a command and waits for the answer.
    pub fn ask(&mut self, host: usize, command: Command) -> Option<Result<Reply, CommandError>> {
        let id = self.tell(host, command);
        for _ in 0..2_000 {
            if let Some(reply) = self.take_reply(host, id) {
                return Some(reply);
            }
            self.world.run_for(STEP);
        }
        None
    }

    fn take_reply(&mut self, host: usize, id: u64) -> Option<Result<Reply, CommandError>> {
        let shell = self.world.hosts[host].machine.as_mut()?;
        shell.take_reply(id)
    }

    /// One node attaches an endpoint, or binds a name. It counts from the moment the command was given.
    pub fn change(&mut self, host: usize) -> Option<Change> {
        let since = self.world.now;
        let writer = self.id_of(host)?;
        let sequence = self.known(host, &writer) + 1;
        let number = self.next;
        let command = match number % 2 {
            0 => attach(number),
            _ => Command::AddName(NameSpec {
                name: label(&format!("name-{number}")),
                ip: some_address(number),
            }),
        };
        self.tell(host, command);
        Some(Change {
            writer,
            sequence,
            since,
        })
    }

    /// Does every node that runs know of it?
    pub fn is_known(&self, change: &Change) -> bool {
        let mut nodes = self.world.running();
        nodes.all(|(_, shell)| shell.known_of(&change.writer) >= change.sequence)
    }

    /// How long it took until now.
    pub fn age(&self, change: &Change) -> Duration {
        self.world.now.since(change.since)
    }

    fn id_of(&self, host: usize) -> Option<NodeId> {
        self.world.hosts[host].machine.as_ref().map(Shell::id)
    }

    fn known(&self, host: usize, writer: &NodeId) -> u64 {
        let shell = self.world.hosts[host].machine.as_ref();
        shell.map_or(0, |shell| shell.known_of(writer))
    }

    /// Some host.
    pub fn any_host(&mut self) -> usize {
        let hosts = self.world.hosts.len() as u64;
        self.world.random().range(hosts) as usize
    }

    /// From now on so many of a thousand datagrams are lost.
    pub fn lose(&mut self, loss: u64) {
        self.world.net.weather = Weather {
            loss,
            ..Weather::default()
        };
    }

    /// Octets that all nodes sent until now, with IP and UDP headers of `header` octets.
    pub fn octets(&self, header: u64) -> u64 {
        self.world.octets + self.world.datagrams * header
    }

    /// Attaches so many endpoints more, spread over all nodes, and lets them become known.
    pub fn fill(&mut self, endpoints: usize) -> Option<()> {
        let hosts = self.world.hosts.len();
        for number in 0..endpoints {
            let command = attach(number as u64);
            self.tell(number % hosts, command);
            if number % (hosts * 4) == 0 {
                self.world.run_for(Duration::from_millis(100));
            }
        }
        self.until(Duration::from_secs(600), |cluster| cluster.agrees())?;
        self.world.run_for(Duration::from_secs(15));
        Some(())
    }
}

fn attach(number: u64) -> Command {
    Command::Attach {
        kind: EndpointKind::Container,
        names: vec![label(&format!("app-{number}"))],
        network: label("default"),
        ip: None,
        labels: BTreeMap::new(),
    }
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("letters, digits and hyphens")
}
