//! What a record of another issuer must pass before it is taken.

use super::link::{Admission, Body, Link};
use super::{Intake, Roster, RosterError};
use crate::model::{ClusterId, WallMicros};

/// Records taken of a revoked issuer beyond its last valid one: they are void, but may be the other half of two
/// revocations that crossed, which all must judge alike.
const MAX_LATE_LINKS: u32 = 16;
/// Most records taken of one issuer.
const MAX_LINKS: u32 = 4096;
/// New nodes taken of one other issuer per hour, or as many as there are members if that is more: a stolen key can't
/// flood the cluster with members before somebody notices.
const ADMITS_PER_HOUR: usize = 64;
pub(super) const HOUR_MICROS: u64 = 3_600_000_000;

impl Roster {
    /// May this record stand next in its issuer's chain?
    pub(super) fn check(&mut self, link: &Link) -> Result<(), RosterError> {
        if matches!(link.body, Body::Found(..)) {
            return Err(RosterError::NotFounding);
        }
        let length = self.chain_len(&link.issuer);
        if link.index < length {
            return Err(self.check_fork(link));
        }
        if self.is_void_branch(link) {
            return Err(RosterError::Forked {
                issuer: link.issuer,
                index: link.index,
            });
        }
        if link.index > length || !self.follows(link) {
            self.note_astray(link);
            return Err(RosterError::Gap);
        }
        if !link.verify(&self.cluster) {
            return Err(RosterError::Bad);
        }
        let late = self.verdict.revoked.get(&link.issuer).map(|r| {
            r.known_links
                .max(r.tip.length)
                .saturating_add(MAX_LATE_LINKS)
        });
        if length >= late.unwrap_or(MAX_LINKS).min(MAX_LINKS) {
            return Err(RosterError::TooMany(link.issuer));
        }
        match &link.body {
            Body::Admit(a) if self.has_other_keys(a) => Err(RosterError::OtherKeys {
                issuer: link.issuer,
                subject: a.id,
            }),
            _ => Ok(()),
        }
    }

    pub(super) fn follows(&self, link: &Link) -> bool {
        if let Some(last) = self.chains.get(&link.issuer).and_then(|c| c.last()) {
            return last.hash == link.previous;
        }
        self.chains
            .values()
            .flatten()
            .chain(self.loose.values())
            .any(|l| l.hash == link.previous && l.admission().is_some_and(|a| a.id == link.issuer))
    }

    pub(super) fn has_other_keys(&self, admission: &Admission) -> bool {
        let known = self.verdict.admitted.get(&admission.id);
        known.is_some_and(|m| m.noise != admission.noise)
    }

    pub(super) fn check_intake(
        &mut self,
        link: &Link,
        wall: WallMicros,
    ) -> Result<(), RosterError> {
        let Some(admission) = link.admission() else {
            return Ok(());
        };
        if self.verdict.admitted.contains_key(&admission.id) {
            return Ok(());
        }
        let fresh = Intake {
            since: wall,
            left: ADMITS_PER_HOUR.max(self.verdict.admitted.len()),
        };
        let intake = self.intake.entry(link.issuer).or_insert(fresh);
        if wall.0.abs_diff(intake.since.0) > HOUR_MICROS {
            *intake = fresh;
        }
        intake.left = intake
            .left
            .checked_sub(1)
            .ok_or(RosterError::TooMany(link.issuer))?;
        Ok(())
    }

    pub(super) fn signed_for(&self, link: &Link) -> ClusterId {
        if link.is_founding(&self.cluster) {
            ClusterId([0; 16])
        } else {
            self.cluster
        }
    }
}
