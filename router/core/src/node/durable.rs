//! Writing comes first: what depends on a batch waits here until the shell says that it can't be lost any more.

use super::CommandError;
use super::cluster::Cluster;
use super::io::{Answer, Output, Reply};
use crate::catalog::Written;
use crate::control::ErrorKind;
use crate::model::{Generation, NodeId, Now};
use crate::mutation::{self, Mutation};
use crate::record::Record;
use crate::roster::Issued;
use crate::session::join::{JoinHandle, Verdict};
use crate::store::Batch;
use crate::value::{Kind, Object};

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
    Answer(NodeId, u64, Answer),
    /// Go on as a later start.
    BecomeLater(Generation),
}

impl Cluster {
    /// Queues a batch; what is in `then` happens when it is durable. An empty batch is durable at once.
    pub(super) fn persist(
        &mut self,
        now: Now,
        batch: Batch,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) {
        let pending = self.held.keys().next_back().copied();
        if mutation::is_on(Mutation::ActBeforePersisted) && !batch.is_empty() {
            let id = self.next_persist;
            self.next_persist += 1;
            out.push(Output::Persist(id, batch));
            return self.perform(now, then, out);
        }
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
        let written = self.write(now, object)?;
        self.publish(now, written, then, out);
        Ok(())
    }

    /// Writes an object, to be published.
    pub(super) fn write(&mut self, now: Now, object: &Object) -> Result<Written, CommandError> {
        let wall = self.wall.micros(now);
        let mut written = self
            .catalog
            .put(object, &self.identity, wall)
            .map_err(|error| CommandError::new(ErrorKind::Conflict, error.to_string()))?;
        if mutation::is_on(Mutation::ForgetGrants) && matches!(object, Object::Grant(_)) {
            written.batch = Batch::new();
        }
        Ok(written)
    }

    /// Removes an object likewise.
    pub(super) fn remove(
        &mut self,
        now: Now,
        kind: Kind,
        key: &[u8],
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) -> Result<(), CommandError> {
        let wall = self.wall.micros(now);
        let written = self
            .catalog
            .remove(kind, key, &self.identity, wall)
            .map_err(|error| CommandError::new(ErrorKind::Conflict, error.to_string()))?;
        self.publish(now, written, then, out);
        Ok(())
    }

    pub(super) fn publish(
        &mut self,
        now: Now,
        written: Written,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) {
        self.hold_back(&written);
        let mut all = vec![Then::Publish(written.records)];
        all.extend(then);
        self.persist(now, written.batch, all, out);
    }

    fn hold_back(&mut self, written: &Written) {
        if !mutation::is_on(Mutation::TellBeforeSynced) {
            self.catalog.hold_back(&written.records);
        }
    }

    /// Queues a roster record that lets a newcomer in, and what it is given: both or nothing. What was given to somebody who
    /// was not let in, because the power failed in between, would be nobody's for ever.
    pub(super) fn publish_admission(
        &mut self,
        now: Now,
        mut admission: Issued,
        gifts: Vec<Written>,
        then: Then,
        out: &mut Vec<Output>,
    ) {
        let mut all = Vec::new();
        for gift in gifts {
            self.hold_back(&gift);
            admission.change.batch.append(gift.batch);
            all.push(Then::Publish(gift.records));
        }
        all.push(then);
        self.publish_roster(now, admission, all, out);
    }

    /// Queues a roster record that this node issued; others hear of it when it is durable.
    pub(super) fn publish_roster(
        &mut self,
        now: Now,
        issued: Issued,
        then: Vec<Then>,
        out: &mut Vec<Output>,
    ) {
        self.meta.roster.hold_back(&issued.bytes);
        let mut all = vec![Then::PublishRoster(issued.bytes)];
        all.extend(then);
        self.persist(now, issued.change.batch, all, out);
    }

    pub(super) fn on_persisted(&mut self, now: Now, id: u64, out: &mut Vec<Output>) {
        if let Some(then) = self.held.remove(&id) {
            self.perform(now, then, out);
        }
    }

    pub(super) fn perform(&mut self, now: Now, then: Vec<Then>, out: &mut Vec<Output>) {
        for step in then {
            match step {
                Then::Publish(records) => {
                    if let Some(last) = records.last() {
                        self.catalog.on_synced(last);
                    }
                    self.sync.on_local(now, &records, &mut self.buffers.sync);
                    self.on_catalog(now, out);
                }
                Then::Reply(id, reply) => {
                    self.show_changes(out);
                    out.push(Output::Reply(id, Ok(reply)));
                }
                Then::Welcome(handle) => self.welcome(handle),
                Then::LetIn(handle) => self.let_in(now, handle, Verdict::Accepted),
                Then::PublishRoster(record) => {
                    self.meta.roster.on_synced(&record);
                    self.sync.on_roster(&record, &mut self.buffers.sync);
                }
                Then::Answer(to, id, answer) => self.answer(now, &to, id, &answer),
                Then::BecomeLater(generation) => self.become_later(now, generation, out),
            }
        }
    }
}
