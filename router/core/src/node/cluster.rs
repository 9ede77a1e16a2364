//! A member: wires its machines to each other. Each machine appends events to a buffer of its own; `pump` hands them on
//! until all buffers are empty, so no machine ever calls another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::Ipv4Net;

use super::Wall;
use super::addresses::Reflexive;
use super::asks::{Asks, MAX_CHECKS, MAX_WAITING};
use super::durable::Then;
use super::follow::ring_of;
use super::io::{Input, NodeConfig, Output};
use super::meta::{Meta, MetaError};
use super::numbers::Numbers;
use super::removal::Removing;
use super::repair::Repairs;
use super::space::Space;
use super::tokens::Tokens;
use super::upkeep::{HOUSEKEEPING, MAX_TOLD};
use crate::carriers::{self, Carriers, Esp};
use crate::catalog::Catalog;
use crate::crypto::Random;
use crate::identity::Identity;
use crate::ipam::{Allocator, Ring};
use crate::membership::{Membership, MembershipEvent};
use crate::model::{
    AddressPlan, ClusterId, Generation, NetworkName, NodeId, NodeName, Now, WallMicros,
};
use crate::path::Path;
use crate::roster::Roster;
use crate::session::guard::Guard;
use crate::session::join::{JoinEvent, JoinResponder, is_join_index};
use crate::session::transport::Transport;
use crate::session::{MAX_HALF_OPEN, MAX_SESSIONS, SessionConfig, SessionEvent, Sessions};
use crate::store::Stored;
use crate::sync::{MAX_JOBS, Stores, Sync, SyncEvent};
use crate::underlay::UnderlayAddr;
use crate::view::Liveness;
use crate::wire::{DataHeader, DatagramType, Message};

#[derive(Default)]
pub(super) struct Buffers {
    pub(super) sessions: Vec<SessionEvent>,
    pub(super) membership: Vec<MembershipEvent>,
    pub(super) sync: Vec<SyncEvent>,
    pub(super) door: Vec<JoinEvent>,
    pub(super) carriers: Vec<carriers::Event>,
}

impl Buffers {
    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
            && self.membership.is_empty()
            && self.sync.is_empty()
            && self.door.is_empty()
            && self.carriers.is_empty()
    }
}

/// See the module's documentation.
pub(super) struct Cluster {
    pub(super) me: NodeId,
    pub(super) identity: Identity,
    pub(super) config: NodeConfig,
    pub(super) plan: AddressPlan,
    pub(super) meta: Meta,
    pub(super) catalog: Catalog,
    pub(super) sync: Sync,
    pub(super) membership: Membership,
    pub(super) sessions: Sessions,
    pub(super) guard: Arc<Guard>,
    pub(super) door: JoinResponder,
    pub(super) carriers: Carriers,
    pub(super) numbers: Numbers,
    pub(super) tokens: Tokens,
    pub(super) asks: Asks,
    pub(super) ring: Ring,
    /// The ring for which this node has kept what was its own; at first what was on disk.
    pub(super) kept_ring: Ring,
    pub(super) space: Space,
    pub(super) removing: Vec<Removing>,
    /// Revision of the catalog's grants and votes, and the roster's digest, for which the ring was computed.
    pub(super) seen_space: Option<(u64, u64)>,
    pub(super) allocator: Allocator,
    /// Revision of the catalog's grants, and the roster's digest, for which the ring was computed,
    pub(super) seen_grants: Option<(u64, u64)>,
    /// and of its votes by force, for which the destroyed nodes were read.
    pub(super) seen_forced_votes: Option<u64>,
    /// No two services had one address when that was last looked at.
    pub(super) services_apart: bool,
    /// Whose endpoints' addresses did not count when those in use were last looked at as a whole.
    pub(super) counted_without: Option<BTreeSet<NodeId>>,
    pub(super) random: Random,
    pub(super) wall: Wall,
    pub(super) generation: Generation,
    /// Somebody has made a session with this start.
    pub(super) heard: bool,
    /// The last start in this node's own log, which this one is about to overtake.
    pub(super) overtaking: Option<Generation>,
    pub(super) buffers: Buffers,
    /// Empty ones.
    pub(super) spare: Buffers,
    /// What waits for which batch.
    pub(super) held: BTreeMap<u64, Vec<Then>>,
    pub(super) next_persist: u64,
    /// Sessions that may still be received on.
    pub(super) receivers: BTreeMap<u32, Arc<Transport>>,
    pub(super) silent: BTreeSet<NodeId>,
    /// The host's own address from which it sends to each path's; of `vxlan` alone.
    pub(super) path_source: BTreeMap<SocketAddr, IpAddr>,
    /// It may write and allocate.
    pub(super) ready: bool,
    pub(super) announced_ready: bool,
    pub(super) revision: u64,
    pub(super) seen_revision: Option<u64>,
    pub(super) conflicts: Vec<(crate::model::Proto, u16, String)>,
    pub(super) view_changed: bool,
    pub(super) tunnels_changed: bool,
    pub(super) leaving: bool,
    pub(super) last_now: Now,
    pub(super) housekeeping: Now,
    pub(super) next_due: Option<WallMicros>,
    pub(super) told: BTreeSet<String>,
    /// Networks that people were told are nearly full.
    pub(super) low: BTreeSet<NetworkName>,
    /// The networks for which it was looked whether this node's endpoints are in any,
    pub(super) housed: Option<Vec<(NetworkName, Ipv4Net)>>,
    /// and those that changed since, by their keys.
    pub(super) to_house: BTreeSet<Vec<u8>>,
    pub(super) look_again_at: Option<Now>,
    pub(super) repairs: Repairs,
    pub(super) reflexive: Reflexive,
}

impl Cluster {
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, by the node that takes itself apart for it"
    )]
    pub(super) fn new(
        identity: Identity,
        config: NodeConfig,
        generation: Generation,
        meta: Meta,
        stored: &Stored,
        mut random: Random,
        (wall, next_persist, now): (Wall, u64, Now),
        out: &mut Vec<Output>,
    ) -> Result<Self, MetaError> {
        let me = identity.id();
        let plan = AddressPlan::new(meta.range, &meta.cluster).map_err(|_| MetaError::Damaged)?;
        let mut catalog = Catalog::new(me, meta.cluster, plan, generation);
        catalog.restore(stored, wall.micros(now));
        let config = NodeConfig {
            name: own_name(&config, &catalog, &meta, &me),
            ..config
        };
        let session_config = SessionConfig {
            cluster: meta.cluster,
            cluster_secret: meta.secret.clone(),
            cipher: config.cipher,
            generation,
            relay: config.relay,
            trusted_subnets: config.trusted_subnets.clone(),
            esp: config.esp == Esp::Ready,
        };
        let guard = Arc::new(Guard::new(&meta.secret));
        let sessions = Sessions::new(identity.clone(), session_config, random.fork(), now);
        let door = JoinResponder::new(
            identity.clone(),
            meta.cluster,
            config.cipher,
            random.fork(),
            now,
        );
        let carriers = Carriers::new(
            me,
            config.trusted_subnets.clone(),
            config.esp.clone(),
            carriers_random(&config, &mut random),
        );
        let membership = Membership::new(me, generation, random.fork(), now);
        let sync = Sync::new(me, random.fork(), now);
        let ring = ring_of(&meta, &catalog);
        let allocator = Allocator::new(me, plan, ring.clone(), stored, now);
        let mut cluster = Self {
            me,
            identity,
            config,
            plan,
            meta,
            catalog,
            sync,
            membership,
            sessions,
            guard,
            door,
            carriers,
            numbers: Numbers::restore(stored),
            tokens: Tokens::restore(stored),
            asks: Asks::default(),
            kept_ring: ring.clone(),
            ring,
            space: Space::default(),
            removing: Vec::new(),
            seen_space: None,
            seen_grants: None,
            seen_forced_votes: None,
            services_apart: false,
            allocator,
            counted_without: None,
            random,
            wall,
            generation,
            heard: false,
            overtaking: None,
            buffers: Buffers::default(),
            spare: Buffers::default(),
            held: BTreeMap::new(),
            next_persist,
            receivers: BTreeMap::new(),
            silent: BTreeSet::new(),
            path_source: BTreeMap::new(),
            ready: false,
            announced_ready: false,
            revision: 0,
            seen_revision: None,
            conflicts: Vec::new(),
            view_changed: true,
            tunnels_changed: true,
            leaving: false,
            last_now: now,
            housekeeping: now.plus(HOUSEKEEPING),
            next_due: None,
            told: BTreeSet::new(),
            low: BTreeSet::new(),
            housed: None,
            to_house: BTreeSet::new(),
            look_again_at: None,
            repairs: Repairs::default(),
            reflexive: Reflexive::default(),
        };
        for peer in cluster.meta.remembered_peers() {
            cluster.tell_addresses(now, peer);
        }
        let pruned = cluster.catalog.prune(&cluster.meta.roster);
        cluster.persist(now, pruned, Vec::new(), out);
        cluster.on_roster(now, out);
        cluster.on_catalog(now, out);
        Ok(cluster)
    }

    pub(super) fn id(&self) -> ClusterId {
        self.meta.cluster
    }

    pub(super) fn plan(&self) -> AddressPlan {
        self.plan
    }

    pub(super) fn digest(&self) -> u64 {
        self.catalog.digest() ^ self.meta.roster.digest().rotate_left(17)
    }

    pub(super) fn roster(&self) -> &Roster {
        &self.meta.roster
    }

    pub(super) fn sizes(&self) -> Vec<(&'static str, usize, usize)> {
        let members = self.roster().members().count();
        let (waiting, checks) = self.asks.sizes();
        let (links, half_open) = self.sessions.sizes();
        vec![
            ("questions that wait", waiting, MAX_WAITING),
            ("questions to the shell", checks, MAX_CHECKS),
            ("links", links, members),
            ("handshakes under way", half_open, MAX_HALF_OPEN),
            (
                "sessions received on",
                self.receivers.len(),
                members * MAX_SESSIONS,
            ),
            ("things told", self.told.len(), MAX_TOLD),
            ("peers of sync", self.sync.peers_known(), members),
            (
                "work queued for peers",
                self.sync.queued(),
                members * MAX_JOBS,
            ),
        ]
    }

    pub(super) fn set_wall(&mut self, wall: Wall) {
        self.wall = wall;
    }

    pub(super) fn leaving(&self) -> bool {
        self.leaving
    }

    pub(super) fn handle(&mut self, now: Now, input: Input<'_>, out: &mut Vec<Output>) {
        self.last_now = now;
        match input {
            Input::Datagram { from, bytes } => self.on_datagram(now, from, bytes, out),
            Input::Opened {
                local_index,
                from,
                kind,
                body,
            } => {
                self.sessions.handle_opened(
                    now,
                    local_index,
                    from,
                    (kind, body),
                    &mut self.meta.roster,
                    &mut self.buffers.sessions,
                );
            }
            Input::Wanted(number) => {
                if let Some(peer) = self.numbers.peer(number) {
                    self.sessions
                        .want(now, &peer, &self.meta.roster, &mut self.buffers.sessions);
                }
            }
            Input::Moved { local_index, from } => {
                self.sessions.handle_moved(
                    now,
                    local_index,
                    from,
                    &self.meta.roster,
                    &mut self.buffers.sessions,
                );
            }
            Input::Persisted(id) => self.on_persisted(now, id, out),
            Input::PathMtu { addr, mtu } => {
                self.sessions
                    .set_ceiling(addr, mtu, &mut self.buffers.sessions);
            }
            Input::ConnectionLost(with) => {
                self.sessions
                    .lose_connection(now, with, &mut self.buffers.sessions)
            }
            Input::PathSource { addr, source } => self.set_path_source(addr, source),
            Input::VxlanDevices(devices) => {
                self.carriers
                    .set_devices(now, devices, &mut self.buffers.carriers)
            }
            Input::Esp(state) => self
                .carriers
                .set_esp(now, state, &mut self.buffers.carriers),
            Input::EspPort { peer, from } => {
                self.carriers
                    .set_esp_port(now, peer, from, &mut self.buffers.carriers)
            }
            Input::VxlanProbe { from, nonce } => {
                self.carriers
                    .on_probe(now, from, nonce, &mut self.buffers.carriers);
            }
            Input::Command(id, command) => self.on_command(now, id, command, out),
            Input::PublishChecked { ask, owner } => self.on_publish_checked(now, ask, owner),
            Input::Conflicts(list) => self.set_conflicts(now, list, out),
            Input::Leave => self.leave(now, out),
            Input::Snapshot(seed) => self.rekey(now, seed),
            Input::Wall(_) | Input::HostAddrs { .. } => {}
        }
        self.pump(now, out);
    }

    pub(super) fn expire(&mut self, now: Now, out: &mut Vec<Output>) {
        self.last_now = now;
        self.sessions
            .expire(now, &self.meta.roster, &mut self.buffers.sessions);
        self.door.expire(now, &mut self.buffers.door);
        self.membership.expire(now, &mut self.buffers.membership);
        self.carriers.expire(now, &mut self.buffers.carriers);
        let wall = self.wall.micros(now);
        let stores = Stores {
            catalog: &mut self.catalog,
            roster: &mut self.meta.roster,
            wall,
        };
        self.sync.expire(now, &stores, &mut self.buffers.sync);
        self.tend_space_when_due(now, out);
        self.answer_removals(now, out);
        let rested = self.allocator.expire(now);
        self.persist(now, rested, Vec::new(), out);
        self.expire_asks(now, out);
        self.apply_due(now);
        self.keep_house(now, out);
        self.repair(now, out);
        self.look_again(now, out);
        self.pump(now, out);
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        [
            self.sessions.deadline(),
            self.door.deadline(),
            self.membership.deadline(),
            self.carriers.deadline(),
            self.sync.deadline(),
            self.asks.deadline(),
            self.allocator.deadline(),
            self.space.due,
            self.removals_deadline(),
            self.look_again_at.filter(|_| self.ready),
            self.repair_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub(super) fn set_host_addrs(
        &mut self,
        now: Now,
        host: Vec<IpAddr>,
        underlay: Vec<SocketAddr>,
        out: &mut Vec<Output>,
    ) {
        self.config.host_addrs = host;
        if std::mem::replace(&mut self.config.underlay, underlay) != self.config.underlay {
            self.sessions.on_moved(now, &mut self.buffers.sessions);
        }
        self.write_node_info(now, out);
        self.pump(now, out);
    }

    fn on_datagram(&mut self, now: Now, from: Path, bytes: &mut [u8], out: &mut Vec<Output>) {
        match (DatagramType::of(bytes), from) {
            (Some(DatagramType::JoinInit), Path::Direct(addr)) => self.knock(now, addr, bytes),
            (Some(DatagramType::Data), Path::Direct(addr))
                if DataHeader::parse(bytes).is_some_and(|h| is_join_index(h.receiver)) =>
            {
                self.knock(now, addr, bytes);
            }
            _ => self.on_session_datagram(now, from, bytes, out),
        }
    }

    /// A handshake among them may show a chain that lets in somebody, or that forks one known here.
    fn on_session_datagram(
        &mut self,
        now: Now,
        from: Path,
        bytes: &mut [u8],
        out: &mut Vec<Output>,
    ) {
        let told = self.meta.roster.forks().len();
        self.sessions.handle_datagram(
            now,
            from,
            bytes,
            &mut self.meta.roster,
            &mut self.buffers.sessions,
        );
        self.sync
            .on_forks(told, &self.meta.roster, &mut self.buffers.sync);
        if let Some(mut batch) = self.meta.roster.take_news() {
            batch.append(self.catalog.prune(&self.meta.roster));
            self.persist(now, batch, Vec::new(), out);
            self.on_members_changed(now, out);
            self.on_catalog(now, out);
        }
    }

    fn rekey(&mut self, now: Now, seed: [u8; 32]) {
        self.random = Random::from_seed(seed);
        let fresh = self.random.fork();
        self.sessions
            .rekey_all(now, fresh, &self.meta.roster, &mut self.buffers.sessions);
    }

    fn knock(&mut self, now: Now, from: UnderlayAddr, bytes: &mut [u8]) {
        let seconds = self.wall.seconds(now);
        self.door.handle(
            now,
            seconds,
            from,
            bytes,
            &self.meta.secret,
            &mut self.buffers.door,
        );
    }

    pub(super) fn send(&mut self, now: Now, to: &NodeId, message: &Message) {
        if self.meta.roster.is_member(to) {
            self.sessions.send(
                now,
                to,
                message,
                &self.meta.roster,
                &mut self.buffers.sessions,
            );
        }
    }

    fn leave(&mut self, now: Now, out: &mut Vec<Output>) {
        self.leaving = true;
        self.membership.leave(&mut self.buffers.membership);
        self.pump(now, out);
        out.push(Output::Left);
    }

    pub(super) fn show_changes(&mut self, out: &mut Vec<Output>) {
        self.show_tunnels(out);
        if std::mem::take(&mut self.view_changed) {
            self.revision += 1;
            out.push(Output::View);
        }
    }

    /// True if they changed.
    pub(super) fn show_tunnels(&mut self, out: &mut Vec<Output>) -> bool {
        let changed = std::mem::take(&mut self.tunnels_changed);
        if changed {
            self.view_changed = true;
            out.push(Output::Tunnels);
        }
        changed
    }

    pub(super) fn liveness(&self, id: &NodeId) -> Liveness {
        match self.membership.liveness(id) {
            Liveness::Alive if self.silent.contains(id) => Liveness::Silent,
            liveness => liveness,
        }
    }
}

/// Only where it is needed: what all else draws stays the same.
fn carriers_random(config: &NodeConfig, random: &mut Random) -> Random {
    match config.trusted_subnets.is_empty() && config.esp != Esp::Ready {
        true => Random::from_seed([0; 32]),
        false => random.fork(),
    }
}

/// A name stays until a person asks for another one.
fn own_name(config: &NodeConfig, catalog: &Catalog, meta: &Meta, me: &NodeId) -> NodeName {
    if config.rename {
        return config.name.clone();
    }
    let written = catalog.nodes().remove(me).map(|info| info.name);
    let admitted = || meta.roster.member(me).map(|member| member.name.clone());
    written
        .or_else(admitted)
        .unwrap_or_else(|| config.name.clone())
}
