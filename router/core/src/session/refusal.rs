//! Answers to those who get no session and should know why: a node that was removed while it was off, one that was let in
//! by a removed node, one whose start is not its last. Everybody else who gets none hears nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use super::handshake::{Arrived, Refusal};
use super::{SessionEvent, Sessions};
use crate::model::{NodeId, Now};
use crate::path::Path;

/// One node is refused aloud at most so often,
const GAP: Duration = Duration::from_secs(10);
/// and so many within that time.
const MAX_REFUSED: usize = 64;

/// Who was refused when.
#[derive(Debug, Default)]
pub(super) struct Refused(BTreeMap<NodeId, Now>);

impl Refused {
    /// Is it time to tell this one? Notes that it was told.
    fn is_due(&mut self, now: Now, caller: NodeId) -> bool {
        self.0.retain(|_, told| now.since(*told) < GAP);
        let due = self.0.len() < MAX_REFUSED && !self.0.contains_key(&caller);
        if due {
            self.0.insert(caller, now);
        }
        due
    }
}

impl Sessions {
    /// Answers a first message with why there is no session; nothing is kept of it.
    pub(super) fn refuse(
        &mut self,
        now: Now,
        from: Path,
        arrived: Arrived,
        refusal: Refusal,
        out: &mut Vec<SessionEvent>,
    ) {
        if !self.refused.is_due(now, arrived.payload.node) {
            return;
        }
        let caller = arrived.payload.node;
        let payload = self.response(Some(refusal));
        // No session has index 0.
        if let Some((datagram, _)) = self.context.answer(arrived, 0, &payload) {
            out.push(SessionEvent::send(from, caller, datagram));
        }
    }
}
