//! Handing on what the machines say to each other, until all buffers are empty.

use super::cluster::{Buffers, Cluster};
use super::io::Output;
use crate::membership::MembershipEvent;
use crate::model::{NodeId, Now};
#[cfg(feature = "mutations")]
use crate::mutation::{self, Mutation};
use crate::session::SessionEvent;
use crate::sync::{Stores, SyncEvent};
use crate::wire::Message;

impl Cluster {
    /// Hands events on until there are none.
    pub(super) fn pump(&mut self, now: Now, out: &mut Vec<Output>) {
        // Two sets of buffers change places, so that neither has to grow anew for each event.
        let mut events = std::mem::take(&mut self.spare);
        loop {
            while !self.buffers.is_empty() {
                std::mem::swap(&mut events, &mut self.buffers);
                self.hand_on(now, &mut events, out);
            }
            // Sessions or paths changed: what follows from that for the carriers may have more to say.
            if !self.carriers.is_on() || !self.show_tunnels(out) {
                break;
            }
            self.follow_paths(now);
        }
        self.spare = events;
        self.become_ready(now, out);
        self.show_changes(out);
    }

    fn hand_on(&mut self, now: Now, events: &mut Buffers, out: &mut Vec<Output>) {
        for event in events.sessions.drain(..) {
            self.on_session(now, event, out);
        }
        for event in events.door.drain(..) {
            self.on_door(now, event, out);
        }
        for event in events.membership.drain(..) {
            self.on_membership(now, event, out);
        }
        for event in events.sync.drain(..) {
            self.on_sync(now, event, out);
        }
        for event in events.carriers.drain(..) {
            self.on_carrier(now, event, out);
        }
    }

    pub(super) fn on_session(&mut self, now: Now, event: SessionEvent, out: &mut Vec<Output>) {
        match event {
            SessionEvent::Send { to, datagram } => out.push(Output::Send { to, datagram }),
            SessionEvent::Relay { by, to, datagram } => {
                self.sessions
                    .relay(now, &by, &to, &datagram, &mut self.buffers.sessions);
            }
            SessionEvent::SeenAt { peer, addr } => self.on_seen_at(now, peer, addr, out),
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
                self.heard = true;
                self.on_roster(now, out);
                self.membership
                    .on_proven(now, peer, generation, &mut self.buffers.membership);
                self.meet(now, peer);
            }
            SessionEvent::Retired { local_index } => {
                self.receivers.remove(&local_index);
                self.tunnels_changed = true;
            }
            SessionEvent::Mtu { .. } => self.tunnels_changed = true,
            SessionEvent::Path { peer, path } => {
                self.tunnels_changed = true;
                self.on_path(now, peer, path, out);
            }
            SessionEvent::Lost { peer } => {
                self.forget_seen(&peer);
                self.sessions
                    .lose_relay(now, &peer, &mut self.buffers.sessions);
                // Nothing tells any more whether it answers; membership goes on by itself.
                self.view_changed |= self.silent.remove(&peer);
                self.tunnels_changed = true;
            }
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
            SessionEvent::Refused { peer, refusal } => self.on_refused(now, peer, &refusal, out),
            SessionEvent::CloneSuspected { peer } => {
                let text = format!(
                    "node {peer} seems to run twice (a copied disk or virtual machine): stop one of them and run \
                     `weft reset` there"
                );
                self.tell_once(text, out);
            }
        }
    }

    pub(super) fn meet(&mut self, now: Now, peer: NodeId) {
        let wall = self.wall.micros(now);
        let stores = Stores {
            catalog: &mut self.catalog,
            roster: &mut self.meta.roster,
            wall,
        };
        self.sync
            .on_peer_up(now, peer, &stores, &mut self.buffers.sync);
    }

    pub(super) fn on_message(
        &mut self,
        now: Now,
        peer: NodeId,
        message: Message,
        out: &mut Vec<Output>,
    ) {
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
            Message::Carrier(word) => {
                self.carriers
                    .on_word(now, peer, &word, &mut self.buffers.carriers);
            }
            Message::Bye => self.sessions.drop_peer(&peer, &mut self.buffers.sessions),
        }
    }

    pub(super) fn on_membership(
        &mut self,
        now: Now,
        event: MembershipEvent,
        _out: &mut Vec<Output>,
    ) {
        match event {
            MembershipEvent::Send { to, bytes } => self.send(now, &to, &Message::Membership(bytes)),
            MembershipEvent::Up { id, .. } => {
                self.view_changed = true;
                self.space.wake(now);
                self.meet(now, id);
            }
            MembershipEvent::Down { id } => {
                self.view_changed = true;
                self.space.wake(now);
                self.silent.remove(&id);
                self.sync.on_peer_down(&id);
                #[cfg(feature = "mutations")]
                if mutation::is_on(Mutation::EraseDown) {
                    self.catalog.erase_all_of(&id);
                }
            }
        }
    }

    pub(super) fn on_sync(&mut self, now: Now, event: SyncEvent, out: &mut Vec<Output>) {
        match event {
            SyncEvent::Send { to, bytes } => self.send(now, &to, &Message::Sync(bytes)),
            SyncEvent::Persist(batch) => self.persist(now, batch, Vec::new(), out),
            SyncEvent::Changed => {
                self.repair(now, out);
                self.on_catalog(now, out);
            }
            SyncEvent::RosterChanged { .. } => self.on_members_changed(now, out),
            SyncEvent::Alarm(text) => out.push(Output::Alarm(text)),
        }
    }
}
