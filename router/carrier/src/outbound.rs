//! From the TAP to the wire: whose packet it is, cut and completed, into that peer's batch. Without I/O of its own.

use std::time::Instant;

use weft_core::layout;

use crate::batch::{Batch, Packet, Way, Wire};
use crate::counters::Dropped;
use crate::ecn;
use crate::inner::{self, Inner};
use crate::segment::{self, Prepared};
use crate::shared::{CarrierEvent, Shared};
use crate::table::{Peer, Table};
use crate::vnet::{FRAME_HEAD, VNET_LEN, VnetHeader, ether_type};
use crate::waiting::Waiting;

/// Peers whose packets are gathered at a time; for one more, the batch that was begun first is sent.
const MAX_BATCHES: usize = 8;

/// Packets up to this long are not marked or dropped for a queue that is too long: others make it.
const SPARED: usize = 256;

struct Slot {
    /// Whose packets are in the batch.
    whose: Option<Whose>,
    batch: Batch,
}

/// A peer, by its place in the table, and the source port that the packets leave by.
type Whose = (usize, u8);

/// One reader of the TAP.
///
/// INVARIANT: between two rounds all batches are empty, so a table may change then and only then.
pub(crate) struct Outbound {
    slots: Vec<Slot>,
    next_victim: usize,
    waiting: Waiting,
}

impl Outbound {
    pub(crate) fn new() -> Self {
        let slots = (0..MAX_BATCHES).map(|_| Slot {
            whose: None,
            batch: Batch::new(),
        });
        Self {
            slots: slots.collect(),
            next_victim: 0,
            waiting: Waiting::default(),
        }
    }

    /// Takes one frame as the TAP gave it. What it leaves in batches goes out with [`Self::flush`].
    pub(crate) fn handle_frame(
        &mut self,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        frame: &mut [u8],
    ) {
        let (vnet, place) = match addressee(table, frame) {
            Ok(found) => found,
            Err(reason) => return shared.drops.count(reason),
        };
        if let Err(reason) = self.frame_for(place, table, shared, wire, &vnet, frame) {
            shared.drop_of(&table.peers[place], reason, 1);
        }
    }

    fn frame_for(
        &mut self,
        place: usize,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
        vnet: &VnetHeader,
        frame: &mut [u8],
    ) -> Result<(), Dropped> {
        let peer = &table.peers[place];
        let inner = inner::parse(&frame[FRAME_HEAD..])?;
        if !inner.addresses.are_routable() {
            return Err(Dropped::NotRoutable);
        }
        let Some(way) = Way::to(peer) else {
            return self.wait(peer, shared, frame);
        };
        let packet = &mut frame[FRAME_HEAD..FRAME_HEAD + inner.len];
        let way = match way.is_direct_udp() {
            true => way.leaving_by(peer.state.source_ports.pick(|| inner.flow(packet))),
            false => way,
        };
        let prepared = segment::prepare(vnet, packet, &inner)?;
        let (tos, lost) = if packet.len() > SPARED && wire.take_congestion(way.lane) {
            slow_down(peer, shared, packet, &inner)
        } else {
            (inner.tos, 0)
        };
        let tos = ecn::outer(shared.dscp, tos);
        let batch = self.batch_for((place, way.lane.source), table, shared, wire);
        match prepared {
            Prepared::Single { .. } if lost > 0 => {}
            Prepared::Single { partial } => {
                let len = packet.len();
                batch.add(way, shared, wire, Packet { len, partial, tos }, |out| {
                    out.copy_from_slice(packet);
                });
            }
            Prepared::Super(cut) => {
                for n in lost..cut.count() {
                    let slice = Packet {
                        len: cut.length(n),
                        partial: cut.is_partial(),
                        tos,
                    };
                    batch.add(way, shared, wire, slice, |out| cut.write(packet, n, out));
                }
            }
        }
        Ok(())
    }

    fn batch_for(
        &mut self,
        whose: Whose,
        table: &Table,
        shared: &Shared,
        wire: &impl Wire,
    ) -> &mut Batch {
        let found = self
            .slots
            .iter()
            .position(|slot| slot.whose == Some(whose))
            .or_else(|| self.slots.iter().position(|slot| slot.whose.is_none()));
        let index = found.unwrap_or_else(|| {
            let victim = self.next_victim;
            self.next_victim = (victim + 1) % MAX_BATCHES;
            self.slots[victim].flush(table, shared, wire);
            victim
        });
        let slot = &mut self.slots[index];
        slot.whose = Some(whose);
        &mut slot.batch
    }

    fn wait(&mut self, peer: &Peer, shared: &Shared, frame: &[u8]) -> Result<(), Dropped> {
        want(peer, shared);
        if self.waiting.keep(peer.number, frame, Instant::now()) {
            Ok(())
        } else {
            Err(Dropped::QueueFull)
        }
    }

    /// Sends what is gathered.
    pub(crate) fn flush(&mut self, table: &Table, shared: &Shared, wire: &impl Wire) {
        for slot in &mut self.slots {
            slot.flush(table, shared, wire);
        }
    }

    /// Does anything wait for a session?
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends what waited for a session that is there now, drops what waited too long, and asks again for the rest.
    pub(crate) fn release_waiting(&mut self, table: &Table, shared: &Shared, wire: &impl Wire) {
        for (number, expired) in self.waiting.expire(Instant::now()) {
            match table.place(number) {
                Some(place) => {
                    shared.drop_of(&table.peers[place], Dropped::NoSession, expired);
                }
                None => shared.drops.count_many(Dropped::NoSession, expired),
            }
        }
        let peers: Vec<_> = self.waiting.peers().collect();
        for number in peers {
            let Some(place) = table.place(number) else {
                continue;
            };
            let peer = &table.peers[place];
            if peer.route().is_none() {
                want(peer, shared);
                continue;
            }
            for mut frame in self.waiting.take(number) {
                self.handle_frame(table, shared, wire, &mut frame);
            }
        }
    }
}

/// Whose frame it is: a place in the table.
fn addressee(table: &Table, frame: &[u8]) -> Result<(VnetHeader, usize), Dropped> {
    let vnet = VnetHeader::parse(frame).ok_or(Dropped::Malformed)?;
    let first = *frame.get(FRAME_HEAD).ok_or(Dropped::Malformed)?;
    let version_fits = first >> 4 == 4 || first >> 4 == 6;
    if frame[FRAME_HEAD - 2..FRAME_HEAD] != ether_type(first) || !version_fits {
        return Err(Dropped::NotIp);
    }
    let mut mac = [0; 6];
    mac.copy_from_slice(&frame[VNET_LEN..VNET_LEN + 6]);
    let place = layout::peer_of_mac(mac)
        .and_then(|number| table.place(number))
        .ok_or(Dropped::NotAPeer)?;
    Ok((vnet, place))
}

/// Tells the sender of `packet` that too much waits: by a mark, or by the loss of what it is cut to first. Gives the octet
/// that the packet has then, and how much is lost.
fn slow_down(peer: &Peer, shared: &Shared, packet: &mut [u8], inner: &Inner) -> (u8, usize) {
    match ecn::mark(packet, inner) {
        Some(tos) => (tos, 0),
        None => {
            shared.drop_of(peer, Dropped::Congested, 1);
            (inner.tos, 1)
        }
    }
}

fn want(peer: &Peer, shared: &Shared) {
    if peer.state.wanted.is_due(shared.now_ms()) {
        shared.tell(CarrierEvent::Wanted(peer.number));
    }
}

impl Slot {
    fn flush(&mut self, table: &Table, shared: &Shared, wire: &impl Wire) {
        let way = self
            .whose
            .take()
            .and_then(|(place, source)| Some(Way::to(&table.peers[place])?.leaving_by(source)));
        if let Some(way) = way {
            self.batch.flush(way, shared, wire);
        }
    }
}

#[cfg(test)]
mod tests;
