//! What a member does unasked: becomes ready, says what it is, keeps its records and the roster in good order, and tells
//! people what only they can settle.

use std::collections::BTreeSet;
use std::time::Duration;

use super::cluster::Cluster;
use super::io::Output;
use crate::catalog::Duplicate;
use crate::model::{Now, Proto};
use crate::value::{Kind, NodeInfo, Object, conflict_key};

/// What the member that welcomed this node gave it comes as records, a moment later.
const ON_ITS_WAY: Duration = Duration::from_millis(500);
/// For so long a first part of the default network is asked for.
const SPACE_PATIENCE: Duration = Duration::from_secs(8);
/// What follows from the whole of the catalog is looked at so often while it changes.
const LOOK_AGAIN_EVERY: Duration = Duration::from_secs(1);
pub(super) const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// Things that people were told once; more would be a flood.
pub(super) const MAX_TOLD: usize = 256;

impl Cluster {
    /// What needs doing from time to time: forget what all have forgotten, bring near who was admitted by too many hands.
    pub(super) fn keep_house(&mut self, now: Now, out: &mut Vec<Output>) {
        if now < self.housekeeping || !self.ready {
            return;
        }
        self.housekeeping = now.plus(HOUSEKEEPING);
        let settled = self.sync.settled(&self.catalog, &self.meta.roster);
        let collected = self.catalog.collect(self.wall.micros(now), settled);
        self.persist(now, collected, Vec::new(), out);
        self.flatten_chains(now, out);
        self.part_services(now, out);
        // Who was to say that it heard of a removal may be gone.
        self.space.witnessed = None;
        // Attachments come and go, and with them what voters should guard.
        self.space.wake(now);
    }

    /// Something changed: what follows from the whole of the catalog is looked at soon.
    pub(super) fn look_again_soon(&mut self, now: Now) {
        self.look_again_at.get_or_insert(now.plus(LOOK_AGAIN_EVERY));
    }

    /// Looks at it.
    pub(super) fn look_again(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready || self.look_again_at.is_none_or(|at| now < at) {
            return;
        }
        self.look_again_at = None;
        // A copy of this node, or the log that it had lost, may have said something else.
        self.write_node_info(now, out);
        self.count_space(out);
    }

    /// Handshakes carry at most three links of an admission; who hangs deeper is admitted anew by a member further up.
    pub(super) fn flatten_chains(&mut self, now: Now, out: &mut Vec<Output>) {
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
                self.publish_roster(now, issued, Vec::new(), out);
            }
        }
    }

    /// Records from a clock ahead of ours are applied when their time has come.
    pub(super) fn apply_due(&mut self, now: Now) {
        let wall = self.wall.micros(now);
        self.catalog.move_on(wall);
        if self.next_due.is_some_and(|due| wall >= due) {
            self.next_due = self.catalog.next_due(wall);
            self.catalog.note_due();
            self.view_changed = true;
        }
    }

    /// Two objects created under one name during a split: one holds, and a person must hear of the other.
    pub(super) fn tell_duplicates(&mut self, all: Vec<Duplicate>, out: &mut Vec<Output>) {
        for duplicate in all {
            let text = format!(
                "{} was created twice while the nodes did not hear each other: the one of node {} holds, the one of \
                 node {} does not; update or remove it to settle this",
                object_text(&duplicate.object),
                self.name_of(&duplicate.kept),
                self.name_of(&duplicate.lost)
            );
            self.tell_once(text, out);
        }
    }

    pub(super) fn tell_once(&mut self, text: String, out: &mut Vec<Output>) {
        if self.told.len() < MAX_TOLD && self.told.insert(text.clone()) {
            out.push(Output::Alarm(text));
        }
    }

    pub(super) fn become_ready(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready {
            if !self.sync.ready(now, &self.meta.roster) || self.overtakes_own_log(now, out) {
                return;
            }
            self.ready = true;
            let closed = self.catalog.close_own_log();
            self.persist(now, closed, Vec::new(), out);
            // Its voters are recorded as soon as it may write.
            self.space.wake(now);
            self.write_node_info(now, out);
            self.write_conflicts(now, out);
        }
        if !self.announced_ready {
            if self.waits_for_space(now) {
                return;
            }
            self.announced_ready = true;
            self.view_changed = true;
            self.show_changes(out);
            out.push(Output::Ready);
        }
    }

    /// A part of the default network comes with the welcome, or is asked for; a cluster whose default network is full lets
    /// this node in all the same, after a while.
    fn waits_for_space(&mut self, now: Now) -> bool {
        if self.has_default_space() {
            return false;
        }
        let since = *self.space.waits_since.get_or_insert(now);
        let waited = now.since(since);
        if waited < ON_ITS_WAY {
            self.space.wake(since.plus(ON_ITS_WAY));
            return true;
        }
        let gives_up = waited >= SPACE_PATIENCE && !self.ring.parts(&self.me).is_empty();
        if !gives_up {
            if waited < SPACE_PATIENCE {
                self.space.wake(since.plus(SPACE_PATIENCE));
            }
            self.ask_for_first_space(now);
        }
        !gives_up
    }

    /// Does this node own anything of the default network?
    pub(super) fn has_default_space(&self) -> bool {
        let net = self.plan.default_network();
        !self.ring.parts_in(&self.me, &net).is_empty()
    }

    pub(super) fn write_node_info(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.ready || self.leaving {
            return;
        }
        let info = NodeInfo {
            name: self.config.name.clone(),
            host_addrs: self.config.host_addrs.iter().copied().take(8).collect(),
            underlay: self.own_addresses(),
            tcp_port: self.config.tcp_port,
            caps: 0,
        };
        // It always fits: eight addresses of each kind, two that others see, and one name.
        let _ = self.put(now, &Object::NodeInfo(info), Vec::new(), out);
    }

    pub(super) fn set_conflicts(
        &mut self,
        now: Now,
        list: Vec<(Proto, u16, String)>,
        out: &mut Vec<Output>,
    ) {
        if list != self.conflicts {
            self.conflicts = list;
            self.write_conflicts(now, out);
        }
    }

    pub(super) fn write_conflicts(&mut self, now: Now, out: &mut Vec<Output>) {
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
            .map(|conflict| conflict_key(conflict.proto, conflict.port))
            .collect();
        for key in stale {
            let _ = self.remove(now, Kind::PUBLISH_CONFLICT, &key, Vec::new(), out);
        }
        for conflict in wanted.into_values() {
            // Too many conflicts for the log are not worth an error: the host's own `service ls` still shows them.
            let _ = self.put(now, &Object::PublishConflict(conflict), Vec::new(), out);
        }
    }
}

fn object_text(object: &Object) -> String {
    match object {
        Object::Service(service) => format!("service \"{}\"", service.name),
        Object::Name(name) => format!("name \"{}\"", name.name),
        Object::Network(network) => format!("network \"{}\"", network.name),
        _ => "an object".to_owned(),
    }
}
