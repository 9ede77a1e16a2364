//! Whole nodes in the world, as the daemon would run them: a key, a disk, a wall clock that is a little wrong.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use ipnet::Ipv4Net;
use weft_core::crypto::{Cipher, Random, Secret};
use weft_core::identity::Identity;
use weft_core::model::{Label, NodeId, Now, WallMicros};
use weft_core::node::{
    Command, CommandError, Input, JoinFailure, Node, NodeConfig, Output, Reply, Start, cluster_of,
};
use weft_core::store::{Batch, Stored};
use weft_core::token::Token;
use weft_core::view::View;

use crate::net::address_of;
use crate::strange;
use crate::world::{Boot, Effects, Key, Machine, Strange, World};

/// The shell tells the time so often.
const WALL_EVERY: Duration = Duration::from_secs(2);
/// A wall clock that is set by more than this makes the shell ask for new keys.
const CLOCK_JUMP: Duration = Duration::from_secs(5);
/// Wall clocks differ by up to this, either way.
const WALL_SKEW: u64 = 2_000_000;

/// The invitations that whoever is no member yet comes with.
#[derive(Default)]
pub struct Invitations {
    /// For everybody,
    pub common: Option<String>,
    /// but for these hosts.
    pub special: BTreeMap<usize, String>,
}

/// They are shared by all hosts, as by a chat among people.
pub type Invitation = Rc<RefCell<Invitations>>;

/// The key in the world of `seed` of a host, and of who it is after it lost its disk so many times.
pub fn identity_of(seed: u64, (host, lost): Key) -> Identity {
    let mut bytes = [0x1d; 32];
    bytes[..8].copy_from_slice(&seed.to_be_bytes());
    bytes[8..16].copy_from_slice(&(host as u64).to_be_bytes());
    bytes[16..24].copy_from_slice(&lost.to_be_bytes());
    let mut random = Random::from_seed(bytes);
    Identity::from_bytes(&Secret::new(random.bytes()))
}

/// One node and the shell around it.
pub struct Shell {
    node: Node,
    /// Wall clock at time zero of the world.
    epoch: WallMicros,
    started: bool,
    tell_wall: Now,
    /// It may be asked for things.
    pub ready: bool,
    /// It could not join; it does nothing any more.
    pub failed: Option<JoinFailure>,
    /// What a person would have been told.
    pub alarms: Vec<String>,
    replies: BTreeMap<u64, Result<Reply, CommandError>>,
    random: Random,
    /// Something that people see changed since it was last asked.
    changed: bool,
    /// When it started.
    pub since: Now,
}

impl Shell {
    fn boot(boot: Boot<'_, Batch>, seed: u64, range: Ipv4Net, invitation: &Invitation) -> Self {
        let mut stored = Stored::default();
        boot.disk.iter().for_each(|batch| stored.apply(batch));
        let token = {
            let invitations = invitation.borrow();
            let special = invitations.special.get(&boot.host);
            special
                .or(invitations.common.as_ref())
                .map(|text| Token::parse(text))
        };
        let start = match token {
            _ if cluster_of(&stored).is_some() => Start::Resume,
            Some(Ok(token)) => Start::Join {
                token: Box::new(token),
            },
            _ => Start::Found { range },
        };
        let address = address_of(boot.host);
        let name =
            Label::parse(&format!("host-{}", boot.key.0)).expect("letters, digits and a hyphen");
        let config = NodeConfig {
            name,
            rename: true,
            cipher: Cipher::ChaCha20Poly1305,
            host_addrs: vec![address.ip()],
            underlay: vec![address],
            tcp_port: None,
            relay: true,
            trusted_subnets: Vec::new(),
            esp: weft_core::carriers::Esp::Unasked,
        };
        let mut random = boot.random;
        let skew = random.range(2 * WALL_SKEW);
        let passed = u64::try_from(boot.now.0.as_micros()).unwrap_or(u64::MAX);
        let epoch = WallMicros((boot.wall.0 + skew).saturating_sub(WALL_SKEW + passed));
        let identity = identity_of(seed, boot.key);
        Self {
            node: Node::new(identity, config, start, stored, random.bytes()),
            epoch,
            started: false,
            tell_wall: boot.now.plus(WALL_EVERY),
            ready: false,
            failed: None,
            alarms: Vec::new(),
            replies: BTreeMap::new(),
            random,
            changed: true,
            since: boot.now,
        }
    }

    /// Its wall clock.
    pub fn wall(&self, now: Now) -> WallMicros {
        let passed = u64::try_from(now.0.as_micros()).unwrap_or(u64::MAX);
        WallMicros(self.epoch.0.saturating_add(passed))
    }

    fn input(&mut self, now: Now, input: Input<'_>, fx: &mut Effects<Batch>) {
        let mut out = Vec::new();
        self.node.handle(now, input, &mut out);
        self.carry_out(now, out, fx);
    }

    fn carry_out(&mut self, now: Now, outputs: Vec<Output>, fx: &mut Effects<Batch>) {
        for output in outputs {
            match output {
                Output::Send { to, datagram } => {
                    let to = to.udp().expect("no host here listens for connections");
                    fx.sends.push((to, datagram));
                }
                Output::Persist(id, batch) => {
                    fx.notes
                        .push(format!("persist {id}, {} rows", batch.0.len()));
                    fx.persists.push((id, batch));
                }
                // No host here trusts its network with plain packets.
                Output::Tunnels | Output::VxlanProbe { .. } => {}
                Output::View => self.changed = true,
                Output::Reply(id, reply) => {
                    let line = match &reply {
                        Ok(Reply::Attached(endpoint)) => {
                            format!("has {} at {}", endpoint.id, endpoint.ip)
                        }
                        // Replies may hold secrets; traces are pasted into reports.
                        Ok(_) => "done".to_owned(),
                        Err(error) => error.text.clone(),
                    };
                    fx.notes.push(format!("reply {id}: {line}"));
                    self.replies.insert(id, reply);
                }
                Output::CheckPublish { ask, .. } => {
                    let input = Input::PublishChecked { ask, owner: None };
                    self.input(now, input, fx);
                }
                Output::Ready => {
                    fx.notes.push("ready".to_owned());
                    self.ready = true;
                }
                Output::JoinFailed(failure) => {
                    fx.notes.push(format!("could not join: {failure:?}"));
                    self.failed = Some(failure);
                }
                Output::Alarm(text) => {
                    fx.notes.push(format!("alarm: {text}"));
                    self.alarms.push(text);
                }
                Output::Left => fx.notes.push("left".to_owned()),
            }
        }
    }

    /// Asks it for something; the answer will be under `id`.
    pub fn command(&mut self, now: Now, id: u64, command: Command, fx: &mut Effects<Batch>) {
        self.input(now, Input::Command(id, command), fx);
    }

    /// The answer to a command, once.
    pub fn take_reply(&mut self, id: u64) -> Option<Result<Reply, CommandError>> {
        self.replies.remove(&id)
    }

    /// Has it answered anything that nobody took?
    pub fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Did anything that people see change since this was last asked?
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// What it shows.
    pub fn view(&mut self) -> Option<View> {
        self.node.view()
    }

    /// Roll-up of all it knows.
    pub fn digest(&self) -> Option<u64> {
        self.node.digest()
    }

    /// How far the log of `writer` is known to it.
    pub fn known_of(&self, writer: &NodeId) -> u64 {
        self.node.known_of(writer)
    }

    /// Who it is.
    pub fn id(&self) -> NodeId {
        self.node.id()
    }
}

impl Machine for Shell {
    type Batch = Batch;

    fn deliver(&mut self, now: Now, from: SocketAddr, bytes: &mut [u8], fx: &mut Effects<Batch>) {
        let from = from.into();
        self.input(now, Input::Datagram { from, bytes }, fx);
    }

    fn persisted(&mut self, now: Now, id: u64, fx: &mut Effects<Batch>) {
        self.input(now, Input::Persisted(id), fx);
    }

    fn expire(&mut self, now: Now, fx: &mut Effects<Batch>) {
        let mut out = Vec::new();
        if !self.started {
            self.started = true;
            let wall = self.wall(now);
            self.node.start(now, wall, &mut out);
        }
        if now >= self.tell_wall {
            self.tell_wall = now.plus(WALL_EVERY);
            let wall = self.wall(now);
            self.node.handle(now, Input::Wall(wall), &mut out);
        }
        self.node.expire(now, &mut out);
        self.carry_out(now, out, fx);
    }

    fn set_clock(&mut self, now: Now, micros: i64, fx: &mut Effects<Batch>) {
        self.epoch = WallMicros(self.epoch.0.saturating_add_signed(micros));
        self.input(now, Input::Wall(self.wall(now)), fx);
        // As the daemon does: this may be a copy of a machine that goes on elsewhere.
        if Duration::from_micros(micros.unsigned_abs()) > CLOCK_JUMP {
            let seed = self.random.bytes();
            self.input(now, Input::Snapshot(seed), fx);
        }
    }

    fn leave(&mut self, now: Now, fx: &mut Effects<Batch>) {
        self.input(now, Input::Leave, fx);
    }

    fn deviate(&mut self, now: Now, what: Strange, fx: &mut Effects<Batch>) {
        for deviation in strange::deviations(&mut self.node, what) {
            let mut out = Vec::new();
            self.node.deviate(now, deviation, &mut out);
            self.carry_out(now, out, fx);
        }
    }

    fn deadline(&self) -> Option<Now> {
        let node = self.node.deadline().unwrap_or(self.tell_wall);
        Some(node.min(self.tell_wall))
    }
}

/// A world of whole nodes, all off. Who starts without an invitation there founds a cluster over `range`.
pub fn world(
    seed: u64,
    hosts: usize,
    range: Ipv4Net,
    invitation: Invitation,
    keep_trace: bool,
) -> World<Shell> {
    let maker = move |boot: Boot<'_, Batch>| Shell::boot(boot, seed, range, &invitation);
    World::new(seed, hosts, keep_trace, Box::new(maker))
}

/// An address of a host, for names.
pub fn some_address(number: u64) -> IpAddr {
    let [high, low] = ((number % 65_536) as u16).to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(198, 18, high, low))
}
