//! A member: wires its machines to each other. Each machine appends events to a buffer of its own; `pump` hands them on
//! until all buffers are empty, so no machine ever calls another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::asks::Asks;
use super::io::{Input, NodeConfig, Output, Reply};
use super::meta::{Meta, MetaError};
use super::numbers::Numbers;
use super::tokens::Tokens;
use super::{CommandError, Wall};
use crate::catalog::Catalog;
use crate::crypto::Random;
use crate::identity::Identity;
use crate::ipam::{Allocator, Ring};
use crate::membership::{Membership, MembershipEvent};
use crate::model::{AddressPlan, ClusterId, Generation, NodeId, NodeName, Now, WallMicros};
use crate::record::Record;
use crate::roster::Roster;
use crate::session::join::{JoinEvent, JoinHandle, JoinResponder, Verdict, is_join_index};
use crate::session::transport::Transport;
use crate::session::{SessionConfig, SessionEvent, Sessions};
use crate::store::{Batch, Stored};
use crate::sync::{Stores, Sync, SyncEvent};
use crate::value::{NodeInfo, Object};
use crate::view::Liveness;
use crate::wire::{DataHeader, DatagramType, Message};

const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// Things that people were told once; more would be a flood.
const MAX_TOLD: usize = 256;

/// What happens once a batch can't be lost any more.
pub(super) enum Then {
    /// Tell the others.
    Publish(Vec<Record>),
    /// Answer a command.
    Reply(u64, Reply),
    /// Let a newcomer in: its admission is on disk.
    Welcome(JoinHandle),
    /// A use of an invitation is counted.
    LetIn(JoinHandle),
    /// Tell the others of a roster record.
    PublishRoster(Vec<u8>),
    /// Answer another member's question.
    Answer(NodeId, u64, super::io::Answer),
}

#[derive(Default)]
pub(super) struct Buffers {
    pub(super) sessions: Vec<SessionEvent>,
    pub(super) membership: Vec<MembershipEvent>,
    pub(super) sync: Vec<SyncEvent>,
    pub(super) door: Vec<JoinEvent>,
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
    pub(super) door: JoinResponder,
    pub(super) numbers: Numbers,
    pub(super) tokens: Tokens,
    pub(super) asks: Asks,
    pub(super) ring: Ring,
    pub(super) allocator: Allocator,
    pub(super) random: Random,
    pub(super) wall: Wall,
    pub(super) generation: Generation,
    pub(super) buffers: Buffers,
    /// What waits for which batch.
    held: BTreeMap<u64, Vec<Then>>,
    next_persist: u64,
    /// Sessions that may still be received on.
    pub(super) receivers: BTreeMap<u32, Arc<Transport>>,
    pub(super) silent: BTreeSet<NodeId>,
    pub(super) path_mtu: BTreeMap<SocketAddr, u16>,
    /// It may write and allocate.
    pub(super) ready: bool,
    announced_ready: bool,
    pub(super) revision: u64,
    seen_revision: Option<u64>,
    conflicts: Vec<(crate::model::Proto, u16, String)>,
    view_changed: bool,
    tunnels_changed: bool,
    leaving: bool,
    pub(super) last_now: Now,
    housekeeping: Now,
    next_due: Option<WallMicros>,
    told: BTreeSet<String>,
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
            plain_vxlan: false,
            relay: false,
        };
        let sessions = Sessions::new(identity.clone(), session_config, random.fork(), now);
        let door = JoinResponder::new(
            identity.clone(),
            meta.cluster,
            config.cipher,
            random.fork(),
            now,
        );
        let membership = Membership::new(me, generation, random.fork(), now);
        let sync = Sync::new(me, random.fork(), now);
        let ring = Ring::compute(meta.roster.founder(), meta.range, &catalog.grants());
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
            door,
            numbers: Numbers::restore(stored),
            tokens: Tokens::restore(stored),
            asks: Asks::default(),
            ring,
            allocator,
            random,
            wall,
            generation,
            buffers: Buffers::default(),
            held: BTreeMap::new(),
            next_persist,
            receivers: BTreeMap::new(),
            silent: BTreeSet::new(),
            path_mtu: BTreeMap::new(),
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
        };
        let seeds = cluster.meta.seeds.clone();
        for (peer, addresses) in seeds {
            cluster.sessions.set_addresses(now, peer, addresses);
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

    pub(super) fn set_wall(&mut self, wall: Wall) {
        self.wall = wall;
    }

    pub(super) fn leaving(&self) -> bool {
        self.leaving
    }

    pub(super) fn handle(&mut self, now: Now, input: Input<'_>, out: &mut Vec<Output>) {
        self.last_now = now;
        match input {
            Input::Datagram { from, bytes } => self.on_datagram(now, from, bytes),
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
                self.sessions
                    .handle_moved(now, local_index, from, &mut self.buffers.sessions);
            }
            Input::Persisted(id) => self.on_persisted(now, id, out),
            Input::PathMtu { addr, mtu } => {
                if self.path_mtu.insert(addr, mtu) != Some(mtu) {
                    self.tunnels_changed = true;
                }
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
        let wall = self.wall.micros(now);
        let stores = Stores {
            catalog: &mut self.catalog,
            roster: &mut self.meta.roster,
            wall,
        };
        self.sync.expire(now, &stores, &mut self.buffers.sync);
        let rested = self.allocator.expire(now);
        self.persist(now, rested, Vec::new(), out);
        self.expire_asks(now, out);
        self.apply_due(now);
        self.keep_house(now, out);
        self.pump(now, out);
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        [
            self.sessions.deadline(),
            self.door.deadline(),
            self.membership.deadline(),
            self.sync.deadline(),
            self.asks.deadline(),
            self.allocator.deadline(),
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
        self.config.underlay = underlay;
        self.write_node_info(now, out);
        self.pump(now, out);
    }

    /// Queues a batch; what is in `then` happens when it is durable. An empty batch is durable at once.
    pub(super) fn persist(
        &mut self,
        now: Now,
        batch: Batch,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) {
        let pending = self.held.keys().next_back().copied();
        if batch.is_empty() {
            // Nothing to write, but what was queued before must not be overtaken.
            match pending {
                Some(last) => self.held.entry(last).or_default().extend(then),
                None => self.perform(now, then, out),
            }
            return;
        }
        let id = self.next_persist;
        self.next_persist += 1;
        self.held.insert(id, then);
        out.push(Output::Persist(id, batch));
    }

    /// Writes an object and does `then` once it is durable and published.
    pub(super) fn put(
        &mut self,
        now: Now,
        object: &Object,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) -> Result<(), CommandError> {
        let wall = self.wall.micros(now);
        let written = self
            .catalog
            .put(object, &self.identity, wall)
            .map_err(|error| {
                CommandError::new(crate::control::ErrorKind::Conflict, error.to_string())
            })?;
        self.publish(now, written, then, out);
        Ok(())
    }

    /// Removes an object likewise.
    pub(super) fn remove(
        &mut self,
        now: Now,
        kind: crate::value::Kind,
        key: &[u8],
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) -> Result<(), CommandError> {
        let wall = self.wall.micros(now);
        let written = self
            .catalog
            .remove(kind, key, &self.identity, wall)
            .map_err(|error| {
                CommandError::new(crate::control::ErrorKind::Conflict, error.to_string())
            })?;
        self.publish(now, written, then, out);
        Ok(())
    }

    fn publish(
        &mut self,
        now: Now,
        written: crate::catalog::Written,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) {
        let mut all = vec![Then::Publish(written.records)];
        all.extend(then);
        self.persist(now, written.batch, all, out);
    }

    fn on_persisted(&mut self, now: Now, id: u64, out: &mut Vec<Output>) {
        if let Some(then) = self.held.remove(&id) {
            self.perform(now, then, out);
        }
    }

    fn perform(&mut self, now: Now, then: Vec<Then>, out: &mut Vec<Output>) {
        for step in then {
            match step {
                Then::Publish(records) => {
                    self.sync.on_local(&records, &mut self.buffers.sync);
                    self.on_catalog(now, out);
                }
                Then::Reply(id, reply) => {
                    self.show_changes(out);
                    out.push(Output::Reply(id, Ok(reply)));
                }
                Then::Welcome(handle) => self.welcome(handle),
                Then::LetIn(handle) => self.let_in(now, handle, Verdict::Accepted),
                Then::PublishRoster(record) => self.sync.on_roster(&record, &mut self.buffers.sync),
                Then::Answer(to, id, answer) => self.answer(now, &to, id, &answer),
            }
        }
    }

    fn on_datagram(&mut self, now: Now, from: SocketAddr, bytes: &mut [u8]) {
        match DatagramType::of(bytes) {
            Some(DatagramType::JoinInit) => self.knock(now, from, bytes),
            Some(DatagramType::Data)
                if DataHeader::parse(bytes).is_some_and(|h| is_join_index(h.receiver)) =>
            {
                self.knock(now, from, bytes);
            }
            _ => {
                self.sessions.handle_datagram(
                    now,
                    from,
                    bytes,
                    &mut self.meta.roster,
                    &mut self.buffers.sessions,
                );
            }
        }
    }

    fn rekey(&mut self, now: Now, seed: [u8; 32]) {
        self.random = Random::from_seed(seed);
        let fresh = self.random.fork();
        self.sessions
            .rekey_all(now, fresh, &self.meta.roster, &mut self.buffers.sessions);
    }

    fn knock(&mut self, now: Now, from: SocketAddr, bytes: &mut [u8]) {
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

    /// Hands events on until there are none.
    pub(super) fn pump(&mut self, now: Now, out: &mut Vec<Output>) {
        loop {
            let events = std::mem::take(&mut self.buffers);
            if events.sessions.is_empty()
                && events.membership.is_empty()
                && events.sync.is_empty()
                && events.door.is_empty()
            {
                break;
            }
            for event in events.sessions {
                self.on_session(now, event, out);
            }
            for event in events.door {
                self.on_door(now, event, out);
            }
            for event in events.membership {
                self.on_membership(now, event, out);
            }
            for event in events.sync {
                self.on_sync(now, event, out);
            }
        }
        self.become_ready(now, out);
        self.show_changes(out);
    }

    fn on_session(&mut self, now: Now, event: SessionEvent, out: &mut Vec<Output>) {
        match event {
            SessionEvent::Send { to, datagram } => out.push(Output::Send { to, datagram }),
            SessionEvent::Accepting { transport, .. } => {
                self.receivers.insert(transport.local_index(), transport);
                self.tunnels_changed = true;
            }
            SessionEvent::Established {
                peer,
                transport,
                generation,
            } => {
                self.receivers.insert(transport.local_index(), transport);
                self.tunnels_changed = true;
                self.on_roster(now, out);
                self.membership
                    .on_proven(now, peer, generation, &mut self.buffers.membership);
                self.meet(now, peer);
            }
            SessionEvent::Retired { local_index } => {
                self.receivers.remove(&local_index);
                self.tunnels_changed = true;
            }
            SessionEvent::Path { .. } | SessionEvent::Lost { .. } => self.tunnels_changed = true,
            SessionEvent::Frame { peer, message } => self.on_message(now, peer, message, out),
            // Only a shell without a carrier sees packets here.
            SessionEvent::Packet { .. } => {}
            SessionEvent::Heard { peer } => {
                self.membership
                    .heard(now, peer, &mut self.buffers.membership)
            }
            SessionEvent::Rtt { .. } => {
                let slowest = self
                    .sessions
                    .peers()
                    .filter_map(|peer| peer.rtt)
                    .max()
                    .unwrap_or_default();
                self.membership
                    .set_rtt(now, slowest, &mut self.buffers.membership);
            }
            SessionEvent::Silent { peer } => self.view_changed |= self.silent.insert(peer),
            SessionEvent::Answering { peer } => self.view_changed |= self.silent.remove(&peer),
            SessionEvent::CloneSuspected { peer } => {
                out.push(Output::Alarm(format!(
                    "node {peer} seems to run twice (a copied disk or virtual machine): stop one of them and run \
                     `weft reset` there"
                )));
            }
        }
    }

    fn meet(&mut self, now: Now, peer: NodeId) {
        let wall = self.wall.micros(now);
        let stores = Stores {
            catalog: &mut self.catalog,
            roster: &mut self.meta.roster,
            wall,
        };
        self.sync
            .on_peer_up(now, peer, &stores, &mut self.buffers.sync);
    }

    fn on_message(&mut self, now: Now, peer: NodeId, message: Message, out: &mut Vec<Output>) {
        match message {
            Message::Membership(bytes) => {
                self.membership
                    .handle(now, peer, &bytes, &mut self.buffers.membership);
            }
            Message::Sync(bytes) => {
                let wall = self.wall.micros(now);
                let mut stores = Stores {
                    catalog: &mut self.catalog,
                    roster: &mut self.meta.roster,
                    wall,
                };
                self.sync
                    .handle(now, peer, &bytes, &mut stores, &mut self.buffers.sync);
            }
            Message::Ask { id, body } => self.on_ask(now, peer, id, &body, out),
            Message::Answer { id, body } => self.on_answer(now, peer, id, &body, out),
            Message::Bye => self.sessions.drop_peer(&peer, &mut self.buffers.sessions),
        }
    }

    fn on_membership(&mut self, now: Now, event: MembershipEvent, _out: &mut Vec<Output>) {
        match event {
            MembershipEvent::Send { to, bytes } => self.send(now, &to, &Message::Membership(bytes)),
            MembershipEvent::Up { id, .. } => {
                self.view_changed = true;
                self.meet(now, id);
            }
            MembershipEvent::Down { id } => {
                self.view_changed = true;
                self.silent.remove(&id);
                self.sync.on_peer_down(&id);
            }
        }
    }

    fn on_sync(&mut self, now: Now, event: SyncEvent, out: &mut Vec<Output>) {
        match event {
            SyncEvent::Send { to, bytes } => self.send(now, &to, &Message::Sync(bytes)),
            SyncEvent::Persist(batch) => self.persist(now, batch, Vec::new(), out),
            SyncEvent::Changed => {
                self.repair(now, out);
                self.on_catalog(now, out);
            }
            SyncEvent::RosterChanged { .. } => {
                self.on_roster(now, out);
                self.view_changed = true;
                self.tunnels_changed = true;
            }
            SyncEvent::Alarm(text) => out.push(Output::Alarm(text)),
        }
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

    /// The roster may have changed: newcomers are greeted, the revoked are cut off.
    pub(super) fn on_roster(&mut self, now: Now, out: &mut Vec<Output>) {
        let members: Vec<NodeId> = self.meta.roster.members().map(|member| member.id).collect();
        let me = self.me;
        for id in members.iter().filter(|id| **id != me) {
            self.membership.add_seed(*id);
            match self.numbers.assign(*id) {
                Some((_, Some(batch))) => {
                    self.persist(now, batch, Vec::new(), out);
                    self.tunnels_changed = true;
                    self.view_changed = true;
                }
                Some((_, None)) => {}
                None => out.push(Output::Alarm(
                    "this host has no number left for more than 4,094 peers".to_owned(),
                )),
            }
        }
        let revoked: Vec<NodeId> = self.meta.roster.revoked().keys().copied().collect();
        for id in revoked {
            self.membership
                .remove(now, id, &mut self.buffers.membership);
            self.sessions.drop_peer(&id, &mut self.buffers.sessions);
        }
    }

    /// The catalog may have changed: addresses, ring and picture follow.
    pub(super) fn on_catalog(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.seen_revision == Some(self.catalog.revision()) {
            return;
        }
        self.seen_revision = Some(self.catalog.revision());
        for (peer, info) in self.catalog.nodes() {
            if peer != self.me {
                self.sessions.set_addresses(now, peer, info.underlay);
            }
        }
        self.ring = Ring::compute(
            self.meta.roster.founder(),
            self.meta.range,
            &self.catalog.grants(),
        );
        let used = self.catalog.used_addresses(self.wall.micros(now));
        let resting = self.allocator.update(now, self.ring.clone(), &used, &[]);
        self.persist(now, resting, Vec::new(), out);
        self.next_due = self.catalog.next_due(self.wall.micros(now));
        self.tell_duplicates(now, out);
        self.view_changed = true;
        self.tunnels_changed = true;
        self.retry_waiting(now, out);
    }

    /// Own records came back that this start has written over: what it wrote is written once more, above them.
    fn repair(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.catalog.needs_repair() {
            return;
        }
        let wall = self.wall.micros(now);
        match self.catalog.repair(&self.identity, wall) {
            Ok(written) => self.publish(now, written, Vec::new(), out),
            Err(error) => out.push(Output::Alarm(format!(
                "own records could not be written again: {error}"
            ))),
        }
    }

    /// What needs doing from time to time: forget what all have forgotten, bring near who was admitted by too many hands.
    fn keep_house(&mut self, now: Now, out: &mut Vec<Output>) {
        if now < self.housekeeping || !self.ready {
            return;
        }
        self.housekeeping = now.plus(HOUSEKEEPING);
        let settled = self.sync.settled(&self.catalog, &self.meta.roster);
        let collected = self.catalog.collect(self.wall.micros(now), settled);
        self.persist(now, collected, Vec::new(), out);
        self.flatten_chains(now, out);
    }

    /// Handshakes carry at most three links of an admission; who hangs deeper is admitted anew by a member further up.
    fn flatten_chains(&mut self, now: Now, out: &mut Vec<Output>) {
        let near = self
            .meta
            .roster
            .member(&self.me)
            .is_some_and(|me| me.depth < 2);
        let deep: Vec<_> = match near {
            true => self.meta.roster.too_deep().into_iter().cloned().collect(),
            false => Vec::new(),
        };
        for member in deep {
            let issued = self.meta.roster.admit(
                &self.identity,
                member.id,
                member.noise,
                member.name.clone(),
                member.rights,
            );
            if let Ok(issued) = issued {
                self.persist(
                    now,
                    issued.change.batch,
                    vec![Then::PublishRoster(issued.bytes)],
                    out,
                );
            }
        }
    }

    /// Records from a clock ahead of ours are applied when their time has come.
    fn apply_due(&mut self, now: Now) {
        let wall = self.wall.micros(now);
        if self.next_due.is_some_and(|due| wall >= due) {
            self.next_due = self.catalog.next_due(wall);
            self.view_changed = true;
        }
    }

    /// Two objects created under one name during a split: one holds, and a person must hear of the other.
    fn tell_duplicates(&mut self, now: Now, out: &mut Vec<Output>) {
        for duplicate in self.catalog.duplicates(self.wall.micros(now)) {
            let text = format!(
                "{} was created twice while the nodes did not hear each other: the one of node {} holds, the one of \
                 node {} does not; update or remove it to settle this",
                object_text(&duplicate.object),
                self.name_of(&duplicate.kept),
                self.name_of(&duplicate.lost)
            );
            if self.told.len() < MAX_TOLD && self.told.insert(text.clone()) {
                out.push(Output::Alarm(text));
            }
        }
    }

    fn become_ready(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready {
            if !self.sync.ready(now, &self.meta.roster) {
                return;
            }
            self.ready = true;
            self.write_node_info(now, out);
            self.write_conflicts(now, out);
        }
        if !self.announced_ready {
            if self.ring.parts(&self.me).is_empty() {
                self.ask_for_first_space(now);
                return;
            }
            self.announced_ready = true;
            self.view_changed = true;
            self.show_changes(out);
            out.push(Output::Ready);
        }
    }

    fn write_node_info(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready || self.leaving {
            return;
        }
        let info = NodeInfo {
            name: self.config.name.clone(),
            host_addrs: self.config.host_addrs.iter().copied().take(8).collect(),
            underlay: self.config.underlay.iter().copied().take(8).collect(),
            caps: 0,
        };
        // It always fits: eight addresses of each kind and one name.
        let _ = self.put(now, &Object::NodeInfo(info), Vec::new(), out);
    }

    fn set_conflicts(
        &mut self,
        now: Now,
        list: Vec<(crate::model::Proto, u16, String)>,
        out: &mut Vec<Output>,
    ) {
        if list != self.conflicts {
            self.conflicts = list;
            self.write_conflicts(now, out);
        }
    }

    fn write_conflicts(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready {
            return;
        }
        let wanted = super::io::conflicts_of(self.me, &self.conflicts);
        let none = BTreeSet::new();
        let stale: Vec<Vec<u8>> = self
            .catalog
            .conflicts(&none)
            .into_iter()
            .filter(|conflict| {
                conflict.node == self.me && !wanted.contains_key(&(conflict.proto, conflict.port))
            })
            .map(|conflict| crate::value::conflict_key(conflict.proto, conflict.port))
            .collect();
        for key in stale {
            let _ = self.remove(
                now,
                crate::value::Kind::PUBLISH_CONFLICT,
                &key,
                Vec::new(),
                out,
            );
        }
        for conflict in wanted.into_values() {
            // Too many conflicts for the log are not worth an error: the host's own `service ls` still shows them.
            let _ = self.put(now, &Object::PublishConflict(conflict), Vec::new(), out);
        }
    }

    fn leave(&mut self, now: Now, out: &mut Vec<Output>) {
        self.leaving = true;
        self.membership.leave(&mut self.buffers.membership);
        self.pump(now, out);
        out.push(Output::Left);
    }

    pub(super) fn show_changes(&mut self, out: &mut Vec<Output>) {
        if std::mem::take(&mut self.tunnels_changed) {
            self.view_changed = true;
            out.push(Output::Tunnels);
        }
        if std::mem::take(&mut self.view_changed) {
            self.revision += 1;
            out.push(Output::View);
        }
    }

    pub(super) fn liveness(&self, id: &NodeId) -> Liveness {
        match self.membership.liveness(id) {
            Liveness::Alive if self.silent.contains(id) => Liveness::Silent,
            liveness => liveness,
        }
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

fn object_text(object: &Object) -> String {
    match object {
        Object::Service(service) => format!("service \"{}\"", service.name),
        Object::Name(name) => format!("name \"{}\"", name.name),
        Object::Network(network) => format!("network \"{}\"", network.name),
        _ => "an object".to_owned(),
    }
}
