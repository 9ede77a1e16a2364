//! Cuts what a peer lacks into frames.

use crate::catalog::Catalog;
use crate::record::Record;

use super::Stores;
use super::frame::{Frame, MAX_BODY, What, pack};
use super::peer::Job;

/// The next frame of a job, which is moved on behind it; `None` when it is done.
pub(super) fn next_burst(job: &mut Job, stores: &Stores<'_>) -> Option<Frame> {
    match job.what {
        What::Chain => {
            let index = u32::try_from(job.at).ok()?;
            let records = pack(stores.roster.records_to_tell(&job.id, index), 1);
            job.at += records.len() as u64;
            (!records.is_empty()).then_some(Frame::Roster(records))
        }
        What::Whole => {
            let mut all = stores.catalog.records_that_count(&job.id);
            all.retain(|record| stores.catalog.may_be_told(record));
            let rest = all.iter().skip(job.at as usize).map(Record::bytes);
            let records = pack(rest, 1);
            job.at += records.len() as u64;
            (!records.is_empty()).then_some(Frame::Records(records))
        }
        What::Log => next_delta(job, stores.catalog),
    }
}

fn next_delta(job: &mut Job, catalog: &Catalog) -> Option<Frame> {
    // More than one frame holds, so that the last of them is never taken for the log's last.
    let rest = catalog.next_records(&job.id, job.at, MAX_BODY / 100);
    let records = pack(rest.iter().map(Record::bytes), 49);
    let complete = catalog.complete_to_tell(&job.id);
    let last = match records.len().checked_sub(1) {
        Some(last) => rest.get(last)?.sequence(),
        // The end of a revoked writer's log may be void, and nothing to send of it but that it is so.
        None if complete > job.at => complete,
        None => return None,
    };
    // Behind the last record nothing is missing up to where we know the log ourselves.
    let upto = if records.len() == rest.len() {
        complete
    } else {
        last.min(complete)
    };
    let frame = Frame::Delta {
        writer: job.id,
        from: job.at,
        upto,
        records,
    };
    job.at = last;
    Some(frame)
}

/// Where the job stood before this frame.
pub(super) fn start_of(frame: &Frame, job: &Job) -> u64 {
    match frame {
        Frame::Delta { from, .. } => *from,
        Frame::Roster(records) | Frame::Records(records) => job.at - records.len() as u64,
        _ => job.at,
    }
}
