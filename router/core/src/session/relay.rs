//! Datagrams that go through a member between: given to it inside the session with it, and passed on inside the one that
//! it has with the peer. What it carries is sealed for the two ends; it sees who talks to whom and how much, and no more.
//!
//! One member stands between; two where no single one reaches both: the first passes on to the one through which it
//! reaches the peer itself. Never more, whatever the paths of others say.

use super::drops::DropReason;
use super::link::Link;
use super::{SessionEvent, Sessions, Trust};
use crate::model::{NodeId, Now};
use crate::path::Path;
use crate::wire::{FrameKind, RelayHead};

impl Sessions {
    /// Carries out [`SessionEvent::Relay`].
    pub fn relay(
        &mut self,
        now: Now,
        by: &NodeId,
        to: &NodeId,
        datagram: &[u8],
        out: &mut Vec<SessionEvent>,
    ) {
        let head = RelayHead::first(to);
        if !self.pass(now, by, head, datagram, out) {
            self.desk.drops.count(DropReason::Unsendable);
        }
    }

    /// Seals what is to be passed on for `next`, which must be reached without anybody between.
    fn pass(
        &mut self,
        now: Now,
        next: &NodeId,
        head: RelayHead,
        datagram: &[u8],
        out: &mut Vec<SessionEvent>,
    ) -> bool {
        let Some(link) = self.links.get_mut(next) else {
            return false;
        };
        let is_direct = link
            .paths
            .current()
            .is_some_and(|path| path.direct().is_some());
        is_direct
            && link.send_frame(
                now,
                FrameKind::Relay,
                &head.with(datagram),
                &mut self.desk,
                out,
            )
    }

    /// A member gave us something that is for us, or for somebody else.
    pub(super) fn on_relayed(
        &mut self,
        now: Now,
        via: NodeId,
        body: &[u8],
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let (head, datagram) = RelayHead::split(body).ok_or(DropReason::BadFrame)?;
        if head.is_for(&self.desk.me) {
            let mut datagram = datagram.to_vec();
            self.handle_datagram(now, Path::Relayed(via), &mut datagram, trust, out);
            return Ok(());
        }
        let to = self
            .linked()
            .find(|peer| head.is_for(peer))
            .filter(|_| self.config.relay && trust.may_relay(&self.desk.me))
            .ok_or(DropReason::NotRelayed)?;
        let path = self.links.get(&to).and_then(|link| {
            link.current.as_ref()?;
            link.paths.current()
        });
        let Some(path) = path else {
            self.want(now, &to, trust, out);
            return Err(DropReason::NotRelayed);
        };
        let next = path.onward(to, head, &via).ok_or(DropReason::NotRelayed)?;
        match self.pass(now, &next, head.next(), datagram, out) {
            true => Ok(()),
            false => Err(DropReason::Unsendable),
        }
    }

    /// May something have come this way? Not through a member that has no right to stand between others: then it is dropped,
    /// and no answer takes that way.
    pub(super) fn is_open_way(&mut self, from: Path, trust: &impl Trust) -> bool {
        let is_open = from.relay().is_none_or(|by| trust.may_relay(&by));
        if !is_open {
            self.desk.drops.count(DropReason::NotRelayed);
        }
        is_open
    }

    /// Members through which others may be reached: those that have the right and are reached themselves, the nearest first.
    pub(super) fn relays_for(&self, peer: &NodeId, trust: &impl Trust) -> Vec<NodeId> {
        let mut relays: Vec<_> = self
            .links
            .values()
            .filter(|link| link.peer != *peer && !link.silent && trust.may_relay(&link.peer))
            .filter(|link| {
                link.current
                    .as_ref()
                    .is_some_and(|live| live.capabilities.relay)
            })
            .filter(|link| {
                link.paths
                    .current()
                    .is_some_and(|path| path.direct().is_some())
            })
            .map(|link| (link.rtt(), link.peer))
            .collect();
        relays.sort();
        relays.into_iter().map(|(_, peer)| peer).collect()
    }

    /// What a member passes on is no longer than what gets to that member.
    pub(super) fn measure_relayed(&mut self, out: &mut Vec<SessionEvent>) {
        let relayed: Vec<(NodeId, NodeId)> = self
            .links
            .values()
            .filter_map(|link| Some((link.peer, link.paths.current()?.relay()?)))
            .collect();
        for (peer, by) in relayed {
            let datagram = self.links.get(&by).and_then(Link::passes_on);
            let path = Path::Relayed(by);
            if let (Some(datagram), Some(link)) = (datagram, self.links.get_mut(&peer)) {
                link.set_ceiling(path, datagram.saturating_add(path.headers()), out);
            }
        }
    }

    /// Offers members that may relay to the links that want one.
    pub(super) fn offer_relays(&mut self, now: Now, trust: &impl Trust) {
        let wanting: Vec<NodeId> = self
            .links
            .values()
            .filter(|link| link.wants_relay(now))
            .map(|link| link.peer)
            .collect();
        for peer in wanting {
            let relays = self.relays_for(&peer, trust);
            if let Some(link) = self.links.get_mut(&peer) {
                link.offer_relays(now, relays, &mut self.desk);
            }
        }
    }
}
