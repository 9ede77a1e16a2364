//! What happens to a link as time passes: keepalives, silence, renewal of keys, forgetting.

use std::time::Duration;

use super::{Link, Wish};
use crate::model::Now;
use crate::session::SessionEvent;
use crate::session::desk::Desk;
use crate::session::timers::{
    BUSY_FOR, CALL_AFTER, GIVE_UP_AFTER, HALF_OPEN, IDLE_AFTER, KEEPALIVE_BUSY, LINGER,
    REKEY_AFTER, REKEY_GRACE, REKEY_QUIET, SILENT_AFTER, keepalive_nat,
};

impl Link {
    /// The regular look at counters and times.
    pub(in crate::session) fn poll(
        &mut self,
        now: Now,
        idle: Duration,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) -> Wish {
        self.look(now, desk, out);
        self.forget(now, desk, out);
        self.keep_alive(now, idle, desk, out);
        self.look_for_paths(now, desk, out);
        self.dial_if_due(now);
        let is_hopeless = self
            .dial
            .is_some_and(|dial| now.since(dial.since) >= GIVE_UP_AFTER);
        let is_idle = self.current.is_some() && now.since(self.last_used) >= IDLE_AFTER;
        match is_hopeless || is_idle {
            true => Wish::Close,
            false => Wish::Nothing,
        }
    }

    /// The carrier opens packets without telling: the counters do.
    fn look(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        let confirmed = self
            .pending
            .iter()
            .rev()
            .map(|p| &p.live.transport)
            .find(|transport| transport.counters().rx_datagrams > 0)
            .map(|transport| transport.local_index());
        if let Some(index) = confirmed {
            self.confirm(now, index, desk, out);
        }
        let (mut heard, mut packets) = (false, false);
        for former in &mut self.former {
            let (rx, traffic) = former.live.look();
            if rx {
                former.retire = now.plus(LINGER);
            }
            heard |= rx;
            packets |= traffic;
        }
        if let Some(live) = &mut self.current {
            let (rx, traffic) = live.look();
            heard |= rx;
            packets |= traffic;
        }
        if heard {
            self.on_heard(now, out);
        }
        if packets {
            self.on_wanted(now);
        }
    }

    fn forget(&mut self, now: Now, desk: &mut Desk, out: &mut Vec<SessionEvent>) {
        self.former.retain(|former| {
            let keep = now < former.retire && now.since(former.live.since) < REKEY_AFTER * 2;
            if !keep {
                desk.retire(&former.live, out);
            }
            keep
        });
        self.pending.retain(|pending| {
            let keep = now.since(pending.live.since) < HALF_OPEN;
            if !keep {
                desk.retire(&pending.live, out);
            }
            keep
        });
        self.attempts.retain(|attempt| {
            let keep = now.since(attempt.sent) < HALF_OPEN;
            if !keep {
                desk.release(attempt.index);
            }
            keep
        });
    }

    fn keep_alive(
        &mut self,
        now: Now,
        idle: Duration,
        desk: &mut Desk,
        out: &mut Vec<SessionEvent>,
    ) {
        if self.current.is_none() {
            return;
        }
        let overdue = self
            .unanswered
            .filter(|at| now.since(*at) >= KEEPALIVE_BUSY);
        let is_busy = self.is_carrying(now);
        self.fast_since = match (self.fast_since, overdue) {
            (Some(since), Some(_)) => Some(since),
            (since, _) if is_busy => Some(since.unwrap_or(now)),
            (_, overdue) => overdue,
        };
        let in_vain = self.unanswered.is_none()
            && self
                .hoping_since
                .is_some_and(|at| now.since(at) >= KEEPALIVE_BUSY);
        let due = match (self.fast_since, self.last_probe) {
            (_, None) => true,
            _ if in_vain => true,
            (Some(_), Some(probe)) => now.since(probe) >= KEEPALIVE_BUSY,
            // Whatever was heard is as good as an answer.
            (None, Some(probe)) => {
                let idle = if self.is_behind_nat() {
                    keepalive_nat()
                } else {
                    idle
                };
                now.since(probe.max(self.last_heard)) >= idle
            }
        };
        if due {
            self.probe(now, desk, out);
        }
        if !self.silent && self.silence(now) > SILENT_AFTER {
            self.silent = true;
            let peer = self.peer;
            out.push(SessionEvent::Silent { peer });
        }
    }

    /// Packets pass.
    pub(super) fn is_carrying(&self, now: Now) -> bool {
        self.last_packet.is_some_and(|at| now.since(at) < BUSY_FOR)
    }

    /// One of the two is reached where it does not say it is: only traffic keeps that way open.
    fn is_behind_nat(&self) -> bool {
        self.behind_nat || self.paths.is_off_record()
    }

    /// For how long the peer has owed an answer.
    fn silence(&self, now: Now) -> Duration {
        match (self.fast_since, self.unanswered) {
            (Some(since), Some(_)) => now
                .since(self.last_heard.max(since))
                .saturating_sub(self.paths.rtt().slack()),
            _ => Duration::ZERO,
        }
    }

    fn dial_if_due(&mut self, now: Now) {
        let Some(live) = &self.current else {
            return;
        };
        let carries = self.last_packet.is_some_and(|at| at > live.since);
        let lasts = if carries { REKEY_AFTER } else { REKEY_QUIET };
        let due = match live.initiated {
            true => lasts,
            false => lasts + REKEY_GRACE,
        };
        // The initiator sees its own counter only; ours may wear out first.
        let is_old = now.since(live.since) >= due || live.transport.is_worn();
        if is_old || self.silence(now) > CALL_AFTER {
            self.start_dial(now);
        }
    }
}
