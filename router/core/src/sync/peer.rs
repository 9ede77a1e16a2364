//! What is kept of one peer: its queue and its pace.

use std::collections::{BTreeMap, VecDeque};

use crate::model::{NodeId, Now};

use super::frame::What;

/// Octets per second and octets at once of bulk towards one peer.
pub(super) const BULK_RATE: u64 = 64 << 10;
pub(super) const BULK_BURST: u64 = 32 << 10;
/// Records per second taken of one peer: a signature costs some 70 µs.
pub(super) const INTAKE_RATE: u64 = 2000;
/// Bursts that may wait, and whole logs that were sent lately.
pub(crate) const MAX_JOBS: usize = 1024;

#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) jobs: VecDeque<Job>,
    pub(super) bulk: Bucket,
    /// Octets of the burst that could not go when it was last tried.
    pub(super) held_up: u64,
    pub(super) intake: Bucket,
    pub(super) summary_at: Option<Now>,
    pub(super) differing: BTreeMap<(What, NodeId), Differing>,
    pub(super) whole_sent: BTreeMap<NodeId, Now>,
    /// By how much its clock is ahead of ours, microseconds.
    pub(super) ahead: Option<i64>,
}

/// Something that is sent in bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) what: What,
    pub(super) id: NodeId,
    /// Sequence, index, or position: what comes after is to be sent.
    pub(super) at: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Differing {
    pub(super) sums: (u64, u64),
    pub(super) since: Now,
    pub(super) asked: Option<Now>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    rate: u64,
    size: u64,
    level: u64,
    at: Now,
}

impl Bucket {
    pub(super) fn full(rate: u64, size: u64, at: Now) -> Self {
        Self {
            rate,
            size,
            level: size,
            at,
        }
    }

    fn refill(&mut self, now: Now) {
        let gained = now.since(self.at).as_millis() as u64 * self.rate / 1000;
        if gained > 0 {
            self.level = (self.level + gained).min(self.size);
            self.at = now;
        }
    }

    /// Is so much left?
    pub(super) fn has(&mut self, now: Now, amount: u64) -> bool {
        self.refill(now);
        self.level >= amount
    }

    pub(super) fn take(&mut self, now: Now, amount: u64) -> bool {
        let enough = self.has(now, amount);
        if enough {
            self.level -= amount;
        }
        enough
    }
}

impl Peer {
    pub(super) fn new(now: Now) -> Self {
        Self {
            jobs: VecDeque::new(),
            bulk: Bucket::full(BULK_RATE, BULK_BURST, now),
            held_up: 0,
            intake: Bucket::full(INTAKE_RATE, INTAKE_RATE, now),
            summary_at: None,
            differing: BTreeMap::new(),
            whole_sent: BTreeMap::new(),
            ahead: None,
        }
    }

    pub(super) fn queue(&mut self, job: Job) {
        let known = self
            .jobs
            .iter()
            .any(|j| j.what == job.what && j.id == job.id);
        if known || self.jobs.len() >= MAX_JOBS {
            return;
        }
        // Roster records go before data: without them the data is refused.
        match job.what {
            What::Chain => {
                self.jobs.push_front(job);
                self.held_up = 0;
            }
            What::Log | What::Whole => self.jobs.push_back(job),
        }
    }
}
