//! What members have for each other and this node passes on: taken out of the one's session, put into the other's.

use weft_core::wire::RelayHead;

use crate::batch::{Batch, Way, Wire};
use crate::counters::Dropped;
use crate::shared::{CarrierEvent, Shared};
use crate::table::{Peer, Table};

/// A datagram for somebody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Relayed<'a> {
    pub(crate) head: RelayHead,
    pub(crate) datagram: &'a [u8],
    /// What its outer header said and the next one shall say: a congestion mark holds for the whole way (RFC 6040).
    pub(crate) tos: u8,
}

/// What is on its way to one peer. One at a time: what comes in a row mostly goes to one.
///
/// INVARIANT: between two rounds it is empty, so a table may change then and only then.
#[derive(Default)]
pub(crate) struct Passing {
    next: Option<usize>,
    batch: Option<Batch>,
}

impl Passing {
    /// Takes a datagram that came from `from` behind this head.
    pub(crate) fn pass(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        from: &Peer,
        relayed: Relayed<'_>,
    ) -> Result<(), Dropped> {
        let next = next(table, shared, from, relayed.head)?;
        if self.next != Some(next) {
            self.flush(table, shared, wire);
        }
        let way = Way::to(&table.peers[next])
            .filter(Way::is_direct)
            .ok_or(Dropped::NotRelayed)?;
        self.next = Some(next);
        let batch = self.batch.get_or_insert_with(Batch::new);
        let head = relayed.head.next();
        batch.pass_on(way, shared, wire, Relayed { head, ..relayed });
        Ok(())
    }

    /// Sends what is gathered.
    pub(crate) fn flush(&mut self, table: &Table, shared: &Shared, wire: &impl Wire) {
        let way = self
            .next
            .take()
            .and_then(|place| Way::to(&table.peers[place]));
        if let (Some(way), Some(batch)) = (way, &mut self.batch) {
            batch.flush(way, shared, wire);
        }
    }
}

/// To whom next: to the peer itself, or, unless somebody has passed it on before, to the one through which we reach it.
fn next(table: &Table, shared: &Shared, from: &Peer, head: RelayHead) -> Result<usize, Dropped> {
    let place = table
        .named(head)
        .filter(|_| table.relays)
        .ok_or(Dropped::NotRelayed)?;
    let peer = &table.peers[place];
    let Some(path) = peer.path.filter(|_| peer.transport.is_some()) else {
        if peer.state.wanted.is_due(shared.now_ms()) {
            shared.tell(CarrierEvent::Wanted(peer.number));
        }
        return Err(Dropped::NotRelayed);
    };
    path.onward(peer.id, head, &from.id)
        .and_then(|next| table.with_id(&next))
        .ok_or(Dropped::NotRelayed)
}

#[cfg(test)]
mod tests;
