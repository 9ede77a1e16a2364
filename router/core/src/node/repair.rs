//! Own records that came back though this start had written over their places, lost by an old disk or written by another copy
//! of this node: what this start wrote is written once more, above them. A copy does the same in turn, so it is not done at
//! once each time: until people stop one of the two, both would flood the cluster with all that they have.

use std::time::Duration;

use super::cluster::Cluster;
use super::io::Output;
use crate::model::Now;

/// From one time to the next, at first and at most; each time that follows soon takes twice as long.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(16);

#[derive(Default)]
pub(super) struct Repairs {
    /// Not before this time.
    due: Now,
    pause: Duration,
}

impl Repairs {
    fn put_off(&mut self, now: Now) {
        self.pause = match now.since(self.due) < self.pause {
            true => (self.pause * 2).min(LONGEST_PAUSE),
            false => PAUSE,
        };
        self.due = now.plus(self.pause);
    }
}

impl Cluster {
    pub(super) fn repair(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.repair_deadline().is_none_or(|due| now < due) {
            return;
        }
        self.repairs.put_off(now);
        let wall = self.wall.micros(now);
        match self.catalog.repair(&self.identity, wall) {
            Ok(written) => self.publish(now, written, Vec::new(), out),
            Err(error) => out.push(Output::Alarm(format!(
                "own records could not be written again: {error}"
            ))),
        }
    }

    pub(super) fn repair_deadline(&self) -> Option<Now> {
        self.catalog.needs_repair().then_some(self.repairs.due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_copies_that_write_over_each_other_do_so_ever_more_seldom() {
        let mut repairs = Repairs::default();
        let start = Now::default().plus(Duration::from_secs(100));
        let mut times = Vec::new();
        let mut now = start;
        while now.since(start) < Duration::from_secs(120) {
            if now >= repairs.due {
                repairs.put_off(now);
                times.push(now.since(start).as_secs());
            }
            now = now.plus(Duration::from_millis(80));
        }
        assert_eq!(times[..6], [0, 1, 3, 7, 15, 31]);
        assert_eq!(times.len(), 11, "{times:?}");
        // Long after that a single one is nothing to wait for.
        now = now.plus(Duration::from_secs(60));
        repairs.put_off(now);
        assert_eq!(repairs.due, now.plus(PAUSE));
    }
}
