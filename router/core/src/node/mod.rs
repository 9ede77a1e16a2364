//! One node of a cluster: composes sessions, roster, catalog, sync, ring and membership. The daemon and the simulator
//! call nothing else.
//!
//! ```text
//!            start()                Persisted(generation)
//!   Unborn ----------> Starting ------------------------> Member   (found, resume)
//!                          |                                 ^
//!                          +--> Joining --- Welcome, Persisted+
//!                                  |
//!                                  +--> Dead (refused, no answer)
//! ```
//!
//! What the shell must respect: outputs are carried out in order; `Persist` may be slow, everything that depends on it
//! is held back here until [`Input::Persisted`]; `handle` and `expire` are cheap and never wait.

mod addresses;
mod asks;
mod carriers;
mod cluster;
mod commands;
#[cfg(feature = "deviations")]
mod deviate;
mod door;
mod durable;
mod events;
mod follow;
mod gifts;
pub(crate) mod io;
mod joining;
mod meta;
mod networks;
mod numbers;
mod picture;
mod refused;
mod removal;
mod repair;
mod space;
mod tokens;
mod upkeep;
mod vips;

use std::sync::Arc;

#[cfg(feature = "deviations")]
pub use deviate::Deviation;
pub use io::{Command, CommandError, Input, JoinFailure, NodeConfig, Output, Reply, Start, Tunnel};
pub use meta::{MetaError, cluster_of, range_of};

pub(crate) use io::{Answer, Ask};
pub(crate) use meta::{Meta, Row, Welcome};
pub(crate) use tokens::Uses;

use crate::catalog::Catalog;
use crate::crypto::Random;
use crate::identity::Identity;
use crate::ipam::Ring;
use crate::model::{AddressPlan, ClusterId, Generation, NodeId, Now, WallMicros};
use crate::roster::Roster;
use crate::session::guard::Guard;
use crate::store::Stored;
use crate::view::{PeerView, View};

use cluster::Cluster;
use joining::Joining;

/// Wall clock time between two readings of it: the last reading plus what has passed since.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wall {
    read: WallMicros,
    at: Now,
}

impl Wall {
    pub(crate) fn new(read: WallMicros, at: Now) -> Self {
        Self { read, at }
    }

    pub(crate) fn micros(self, now: Now) -> WallMicros {
        let passed = u64::try_from(now.since(self.at).as_micros()).unwrap_or(u64::MAX);
        WallMicros(self.read.0.saturating_add(passed))
    }

    pub(crate) fn seconds(self, now: Now) -> u64 {
        self.micros(now).0 / 1_000_000
    }
}

enum Phase {
    /// Before `start`.
    Unborn { start: Start, stored: Stored },
    /// The generation is on its way to the disk.
    Starting {
        start: Start,
        stored: Stored,
        waits_for: u64,
    },
    /// Asking members to be let in.
    Joining(Box<Joining>),
    /// Let in; what makes us a member is on its way to the disk.
    Entering { meta: Box<Meta>, waits_for: u64 },
    /// One of them.
    Member(Box<Cluster>),
    /// The join failed.
    Dead,
}

/// One node. See the module's documentation.
pub struct Node {
    me: NodeId,
    identity: Identity,
    config: NodeConfig,
    generation: Generation,
    random: Random,
    wall: Wall,
    next_persist: u64,
    phase: Phase,
}

impl Node {
    /// A node that has not begun yet. `seed` is all the randomness it will ever have.
    pub fn new(
        identity: Identity,
        config: NodeConfig,
        start: Start,
        stored: Stored,
        seed: [u8; 32],
    ) -> Self {
        Self {
            me: identity.id(),
            identity,
            config,
            generation: Generation::default(),
            random: Random::from_seed(seed),
            wall: Wall::default(),
            next_persist: 1,
            phase: Phase::Unborn { start, stored },
        }
    }

    /// Begins: chooses the generation and writes it down before anybody hears of it.
    pub fn start(&mut self, now: Now, wall: WallMicros, out: &mut Vec<Output>) {
        self.wall = Wall::new(wall, now);
        let Phase::Unborn { start, stored } = std::mem::replace(&mut self.phase, Phase::Dead)
        else {
            return;
        };
        let Some(generation) = meta::next_generation(&stored, wall) else {
            let why = "the state directory can't be read: the number of starts is damaged";
            let failure = JoinFailure::Refused(why.to_owned());
            return out.push(Output::JoinFailed(failure));
        };
        self.generation = generation;
        let waits_for = self.next_persist;
        self.next_persist += 1;
        out.push(Output::Persist(
            waits_for,
            meta::generation_batch(self.generation),
        ));
        self.phase = Phase::Starting {
            start,
            stored,
            waits_for,
        };
    }

    /// Something happened. Effects are appended to `out`; none has happened yet.
    pub fn handle(&mut self, now: Now, input: Input<'_>, out: &mut Vec<Output>) {
        match input {
            Input::Wall(wall) => {
                self.wall = Wall::new(wall, now);
                if let Phase::Member(cluster) = &mut self.phase {
                    cluster.set_wall(self.wall);
                }
            }
            Input::Persisted(id) if self.is_waiting_for(id) => self.on_begun(now, out),
            Input::HostAddrs { host, underlay } => {
                self.config.host_addrs.clone_from(&host);
                self.config.underlay.clone_from(&underlay);
                if let Phase::Member(cluster) = &mut self.phase {
                    cluster.set_host_addrs(now, host, underlay, out);
                }
            }
            input => match &mut self.phase {
                Phase::Member(cluster) => cluster.handle(now, input, out),
                Phase::Joining(joining) => {
                    joining.handle(now, input, out);
                    self.on_joining(now, out);
                }
                _ => refuse(input, out),
            },
        }
    }

    /// Time passed. Harmless when called early, late or twice.
    pub fn expire(&mut self, now: Now, out: &mut Vec<Output>) {
        match &mut self.phase {
            Phase::Member(cluster) => cluster.expire(now, out),
            Phase::Joining(joining) => {
                joining.expire(now, out);
                self.on_joining(now, out);
            }
            _ => {}
        }
    }

    /// When to call `expire` next.
    pub fn deadline(&self) -> Option<Now> {
        match &self.phase {
            Phase::Member(cluster) => cluster.deadline(),
            Phase::Joining(joining) => joining.deadline(),
            _ => None,
        }
    }

    /// What is visible; `None` before the node is a member.
    pub fn view(&mut self) -> Option<View> {
        match &mut self.phase {
            Phase::Member(cluster) => Some(cluster.view()),
            _ => None,
        }
    }

    /// Sessions and paths for the carrier.
    pub fn tunnels(&self) -> Vec<Tunnel> {
        match &self.phase {
            Phase::Member(cluster) => cluster.tunnels(),
            _ => Vec::new(),
        }
    }

    /// Indices of the sessions of those who are joining.
    pub fn guests(&self) -> Vec<u32> {
        match &self.phase {
            Phase::Member(cluster) => cluster.guests(),
            _ => Vec::new(),
        }
    }

    /// What tells strangers' handshakes, once there is a cluster to be a stranger to.
    pub fn guard(&self) -> Option<Arc<Guard>> {
        match &self.phase {
            Phase::Member(cluster) => Some(cluster.guard()),
            _ => None,
        }
    }

    /// What `weft peers` shows.
    pub fn peers(&self, now: Now) -> Vec<PeerView> {
        match &self.phase {
            Phase::Member(cluster) => cluster.peers(now),
            _ => Vec::new(),
        }
    }

    /// The layout of addresses, once the cluster is known.
    pub fn plan(&self) -> Option<AddressPlan> {
        match &self.phase {
            Phase::Member(cluster) => Some(cluster.plan()),
            _ => None,
        }
    }

    /// The cluster, once it is known.
    pub fn cluster(&self) -> Option<ClusterId> {
        match &self.phase {
            Phase::Member(cluster) => Some(cluster.id()),
            _ => None,
        }
    }

    /// Roll-up of all that is replicated: equal on nodes that know the same.
    pub fn digest(&self) -> Option<u64> {
        match &self.phase {
            Phase::Member(cluster) => Some(cluster.digest()),
            _ => None,
        }
    }

    /// How far the log of `writer` is known here: what it wrote under this sequence and before is held.
    pub fn known_of(&self, writer: &NodeId) -> u64 {
        let catalog = self.catalog();
        catalog.map_or(0, |catalog| catalog.state_of(writer).complete)
    }

    /// All records that it knows, once it is a member.
    pub fn catalog(&self) -> Option<&Catalog> {
        self.member().map(|cluster| &cluster.catalog)
    }

    /// Who belongs to the cluster, as far as it knows.
    pub fn roster(&self) -> Option<&Roster> {
        self.member().map(|cluster| cluster.roster())
    }

    /// Who owns which part of the range, as far as it knows.
    pub fn ring(&self) -> Option<&Ring> {
        self.member().map(|cluster| &cluster.ring)
    }

    /// Its start.
    pub fn generation(&self) -> Generation {
        match &self.phase {
            Phase::Member(cluster) => cluster.generation,
            _ => self.generation,
        }
    }

    /// What it keeps and could be made to keep more of: each with the most that it may come to.
    pub fn sizes(&self) -> Vec<(&'static str, usize, usize)> {
        self.member().map(Cluster::sizes).unwrap_or_default()
    }

    fn member(&self) -> Option<&Cluster> {
        match &self.phase {
            Phase::Member(cluster) => Some(cluster),
            _ => None,
        }
    }

    /// Who this is.
    pub fn id(&self) -> NodeId {
        self.me
    }

    /// Does it pass on what members have for each other?
    pub fn relays(&self) -> bool {
        match &self.phase {
            Phase::Member(cluster) => cluster.relays(),
            _ => false,
        }
    }

    fn is_waiting_for(&self, id: u64) -> bool {
        match &self.phase {
            Phase::Starting { waits_for, .. } | Phase::Entering { waits_for, .. } => {
                *waits_for == id
            }
            _ => false,
        }
    }

    fn on_begun(&mut self, now: Now, out: &mut Vec<Output>) {
        match std::mem::replace(&mut self.phase, Phase::Dead) {
            Phase::Starting {
                start: Start::Found { range },
                ..
            } => {
                let meta = Meta::found(&self.identity, &self.config, range, &mut self.random);
                self.enter(meta, out);
            }
            Phase::Starting {
                start: Start::Join { token },
                ..
            } => {
                let random = self.random.fork();
                let joining = Joining::new(
                    &self.identity,
                    &self.config,
                    *token,
                    self.generation,
                    random,
                    now,
                );
                self.phase = Phase::Joining(Box::new(joining));
                self.expire(now, out);
            }
            Phase::Starting {
                start: Start::Resume,
                stored,
                ..
            } => match Meta::restore(&stored) {
                Ok(meta) => self.become_member(now, meta, &stored, out),
                Err(error) => {
                    let why = format!("the state directory can't be read: {error}");
                    out.push(Output::JoinFailed(JoinFailure::Refused(why)));
                }
            },
            Phase::Entering { meta, .. } => self.become_member(now, *meta, &Stored::default(), out),
            other => self.phase = other,
        }
    }

    fn on_joining(&mut self, _now: Now, out: &mut Vec<Output>) {
        let Phase::Joining(joining) = &mut self.phase else {
            return;
        };
        match joining.take_outcome() {
            None => {}
            Some(Ok(meta)) => self.enter(meta, out),
            Some(Err(failure)) => {
                out.push(Output::JoinFailed(failure));
                self.phase = Phase::Dead;
            }
        }
    }

    /// Writes down what makes us a member; becomes one when that can't be lost.
    fn enter(&mut self, meta: Meta, out: &mut Vec<Output>) {
        let waits_for = self.next_persist;
        self.next_persist += 1;
        out.push(Output::Persist(waits_for, meta.batch()));
        self.phase = Phase::Entering {
            meta: Box::new(meta),
            waits_for,
        };
    }

    fn become_member(&mut self, now: Now, meta: Meta, stored: &Stored, out: &mut Vec<Output>) {
        if !meta.roster.is_member(&self.me) {
            let why = "this node was removed from its cluster, or left it; to join one anew run: weft reset, then weft up \
                       --join TOKEN";
            return out.push(Output::JoinFailed(JoinFailure::Refused(why.to_owned())));
        }
        let cluster = Cluster::new(
            self.identity.clone(),
            self.config.clone(),
            self.generation,
            meta,
            stored,
            self.random.fork(),
            (self.wall, self.next_persist, now),
            out,
        );
        match cluster {
            Ok(cluster) => {
                self.phase = Phase::Member(Box::new(cluster));
                out.extend([Output::Tunnels, Output::View]);
                self.expire(now, out);
            }
            Err(error) => {
                let why = format!("the cluster's records on disk are damaged: {error}");
                out.push(Output::JoinFailed(JoinFailure::Refused(why)));
            }
        }
    }
}

/// Commands get an answer in every phase; the rest is of no use yet.
fn refuse(input: Input<'_>, out: &mut Vec<Output>) {
    use crate::control::ErrorKind::Unavailable;
    match input {
        Input::Command(id, _) => {
            let error = CommandError::new(
                Unavailable,
                "this host is not a member of a cluster yet; try again shortly",
            );
            out.push(Output::Reply(id, Err(error)));
        }
        Input::Leave => out.push(Output::Left),
        _ => {}
    }
}
