//! Taking what came: roster records before data, each checked, news passed on.

use super::frame::Frame;
use super::{SMALL, Stores, Sync, SyncEvent, push_records};
use crate::catalog::DropReason;
use crate::model::{NodeId, Now};
use crate::record::Record;
use crate::roster::{Roster, RosterError};
use crate::store::Batch;

/// News of others are passed on to so many in larger clusters.
const PASS_ON: usize = 3;

impl Sync {
    pub(super) fn take_roster(
        &mut self,
        from: NodeId,
        records: &[Vec<u8>],
        stores: &mut Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        let (mut admitted, mut revoked) = (Vec::new(), Vec::new());
        let mut batch = Batch::new();
        let mut news = Vec::new();
        let mut admissions_only = true;
        let told = stores.roster.forks().len();
        for record in records {
            match stores.roster.insert(record, stores.wall) {
                Ok(inserted) if inserted.known => {}
                Ok(inserted) => {
                    news.push(record.as_slice());
                    batch.append(inserted.batch);
                    admissions_only &= !inserted.admitted.is_empty() && inserted.revoked.is_empty();
                    admitted.extend(inserted.admitted);
                    revoked.extend(inserted.revoked);
                }
                Err(RosterError::Forked { .. }) => {}
                Err(e @ RosterError::OtherKeys { .. }) => self.alarm(e.to_string(), out),
                Err(RosterError::Gap) => self.drop_for("roster record out of order"),
                Err(RosterError::TooMany(_)) => self.drop_for("too many admissions"),
                Err(_) => self.drop_for("bad roster record"),
            }
        }
        self.on_forks(told, stores.roster, out);
        if news.is_empty() {
            return;
        }
        let revision = stores.catalog.revision();
        batch.append(stores.catalog.prune(stores.roster));
        let others: Vec<NodeId> = self.peers.keys().copied().filter(|p| *p != from).collect();
        // A removal must get around, whoever falls silent meanwhile: to everybody, once. Newcomers the one that let them in
        // told everybody of.
        let to = match admissions_only && others.len() > SMALL {
            true => self.choose_few(others),
            false => others,
        };
        push_records(news, &to, Frame::Roster, out);
        for id in &revoked {
            self.peers.remove(id);
        }
        out.push(SyncEvent::RosterChanged { admitted, revoked });
        self.finish(revision, batch, stores, out);
    }

    /// Takes records; those that were new. `None` if one was refused, so that what they claim to complete is not.
    pub(super) fn take_records(
        &mut self,
        now: Now,
        from: NodeId,
        records: &[Vec<u8>],
        stores: &mut Stores<'_>,
        batch: &mut Batch,
        out: &mut Vec<SyncEvent>,
    ) -> Option<Vec<Record>> {
        let intake = self
            .peers
            .get_mut(&from)
            .map(|p| p.intake.take(now, records.len() as u64));
        if intake != Some(true) {
            self.drop_for("too many records a second");
            return None;
        }
        let mut news = Vec::new();
        let mut whole = true;
        for bytes in records {
            let Ok(record) = Record::parse(bytes) else {
                self.drop_for("garbled record");
                whole = false;
                continue;
            };
            match stores.catalog.insert(&record, stores.roster, stores.wall) {
                Ok(applied) => {
                    batch.append(applied.batch);
                    if applied.held {
                        news.push(record);
                    }
                    if let Some(text) = applied.alarm {
                        self.alarm(text, out);
                    }
                }
                Err(DropReason::Known | DropReason::Superseded) => {}
                // The one that stays of the two is held: nothing is missing there.
                Err(reason @ DropReason::Clone(_)) => self.refuse(&reason, out),
                Err(reason) => {
                    whole = false;
                    self.refuse(&reason, out);
                }
            }
        }
        whole.then_some(news)
    }

    pub(super) fn refuse(&mut self, reason: &DropReason, out: &mut Vec<SyncEvent>) {
        match reason {
            DropReason::Clone(_) => self.alarm(reason.to_string(), out),
            DropReason::Known => self.drop_for("known"),
            DropReason::Superseded => self.drop_for("superseded"),
            DropReason::UnknownWriter => self.drop_for("unknown writer"),
            DropReason::Revoked => self.drop_for("revoked writer"),
            DropReason::NoRight => self.drop_for("no right to write this"),
            DropReason::BadSignature => self.drop_for("bad signature"),
            DropReason::Limit => self.drop_for("writer has too many records"),
        }
    }

    pub(super) fn finish(
        &mut self,
        revision: u64,
        batch: Batch,
        stores: &Stores<'_>,
        out: &mut Vec<SyncEvent>,
    ) {
        if !batch.is_empty() {
            out.push(SyncEvent::Persist(batch));
        }
        if stores.catalog.revision() != revision {
            out.push(SyncEvent::Changed);
            if self.own_target > 0 {
                self.check_own_log(stores);
            }
        }
    }

    /// The roster found forks beyond the first `told`: people hear of them here, and the peers in whole.
    pub fn on_forks(&mut self, told: usize, roster: &Roster, out: &mut Vec<SyncEvent>) {
        if roster.forks().len() <= told {
            return;
        }
        for fork in roster.forks().iter().skip(told) {
            let (issuer, index) = (fork.issuer, fork.index);
            self.alarm(RosterError::Forked { issuer, index }.to_string(), out);
        }
        out.push(SyncEvent::Persist(roster.fork_rows(told)));
        let all: Vec<NodeId> = self.peers.keys().copied().collect();
        tell_forks(roster, told, &all, out);
    }

    pub(super) fn pass_on(
        &mut self,
        now: Now,
        from: NodeId,
        news: &[Record],
        out: &mut Vec<SyncEvent>,
    ) {
        self.rumours.note(now, news.iter().map(Record::writer));
        let others: Vec<NodeId> = self.peers.keys().copied().filter(|p| *p != from).collect();
        // In a small cluster the writer told everybody itself.
        if others.len() >= SMALL {
            let to = self.choose(others, PASS_ON);
            push_records(news.iter().map(Record::bytes), &to, Frame::Records, out);
        }
    }
}

/// Tells of the forks that were found beyond the first `told`: who holds one branch only sees nothing wrong with it.
pub(super) fn tell_forks(roster: &Roster, told: usize, to: &[NodeId], out: &mut Vec<SyncEvent>) {
    for fork in roster.forks().iter().skip(told) {
        push_records(roster.proof_of(fork), to, Frame::Roster, out);
    }
}
