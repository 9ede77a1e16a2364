//! Who the peers are and which sessions are open: what the core tells, laid out for looking up per packet.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ipnet::Ipv4Net;
use weft_core::layout;
use weft_core::model::{AddressPlan, NodeId};
use weft_core::path::Path;
use weft_core::session::guard::Guard;
use weft_core::session::join::is_join_index;
use weft_core::session::transport::Transport;
use weft_core::underlay::UnderlayAddr;
use weft_core::view::PeerNumber;
use weft_core::wire::RelayHead;

use crate::counters::Traffic;
use crate::halves::Numbers;
use crate::inner::Sources;
use crate::offload::Switch;
use crate::source_ports::Proven;
use crate::trial::Echoes;

/// Peers are numbered from 1 to 4094.
const NUMBERS: usize = 4096;
/// What a path takes until the core knows better: less the outer headers and the seal.
const CAUTIOUS_MTU: u16 = layout::IPV6_MIN_MTU - 48 - weft_core::wire::OVERHEAD as u16;
/// At most one event of a kind per peer in so many milliseconds.
const EVENT_GAP_MS: u64 = 100;

/// One peer.
#[derive(Clone, Debug)]
pub struct PeerEntry {
    /// This host's number for it: its MAC on the TAP.
    pub number: PeerNumber,
    /// Who it is.
    pub id: NodeId,
    /// The session that packets to it are sealed in; `None` while there is none (or it is not confirmed yet).
    pub transport: Option<Arc<Transport>>,
    /// How they are sent; without it they wait, as without a session.
    pub path: Option<Path>,
    /// Parts of the range that it owns: inner source addresses it may use. IPv6 follows from them.
    pub prefixes: Vec<Ipv4Net>,
    /// Largest inner packet the path takes, as in the peer's route; bundles are filled up to it.
    pub mtu: Option<u16>,
}

/// All peers and all sessions, replaced as a whole.
#[derive(Clone, Debug)]
pub struct PeerTable {
    /// This node.
    pub me: NodeId,
    /// It passes on what members have for each other.
    pub relays: bool,
    /// The cluster's addresses.
    pub plan: AddressPlan,
    /// The peers.
    pub peers: Vec<PeerEntry>,
    /// All sessions whose datagrams are still to be opened, old ones included.
    pub receivers: Vec<Arc<Transport>>,
    /// Indices of newcomers' sessions: what comes for them goes to the core unopened.
    pub guests: Vec<u32>,
    /// Tells strangers' handshakes, of which the core hears nothing.
    pub guard: Option<Arc<Guard>>,
}

/// What outlives a change of tables.
#[derive(Debug, Default)]
pub(crate) struct PeerState {
    pub(crate) traffic: Traffic,
    pub(crate) wanted: Gap,
    pub(crate) moved: Gap,
    pub(crate) too_big: Gap,
    /// May runs be sent to it?
    pub(crate) gso: Switch,
    pub(crate) echoes: Echoes,
    /// Those that its packets may leave by.
    pub(crate) source_ports: Proven,
    /// Something came along the path itself since it was last asked whether the peer has moved.
    pub(crate) on_path: AtomicBool,
    /// Of its packets that go in halves.
    pub(crate) numbers: Numbers,
}

/// Lets one event through, then none for a while.
#[derive(Debug, Default)]
pub(crate) struct Gap(AtomicU64);

impl Gap {
    /// Is it time, `now` milliseconds after the carrier's start? Says yes to one thread only.
    pub(crate) fn is_due(&self, now: u64) -> bool {
        // One later than the time, so that zero means never.
        let last = self.0.load(Ordering::Relaxed);
        let due = last == 0 || now + 1 >= last + EVENT_GAP_MS;
        due && self
            .0
            .compare_exchange(last, now + 1, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }
}

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) number: PeerNumber,
    pub(crate) mac: [u8; 6],
    pub(crate) id: NodeId,
    pub(crate) transport: Option<Arc<Transport>>,
    pub(crate) path: Option<Path>,
    /// Where its datagrams go first.
    hop: Option<Hop>,
    pub(crate) sources: Sources,
    pub(crate) mtu: usize,
    pub(crate) state: Arc<PeerState>,
}

/// The first step of a path.
#[derive(Clone, Debug)]
struct Hop {
    to: UnderlayAddr,
    /// The session with the member between.
    relay: Option<Arc<Transport>>,
}

/// How datagrams get to a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route<'a> {
    /// The session with the peer.
    pub(crate) transport: &'a Transport,
    /// Where they are sent.
    pub(crate) to: UnderlayAddr,
    /// The session with the member between, and what tells it for whom they are.
    pub(crate) relay: Option<(&'a Transport, RelayHead)>,
}

/// A session that datagrams come in.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) transport: Arc<Transport>,
    /// Whose packets they are: a place in [`Table::peers`]. `None` while it is no peer yet: then it has no packets.
    pub(crate) peer: Option<usize>,
}

/// The table as the threads use it.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) me: NodeId,
    pub(crate) relays: bool,
    pub(crate) plan: AddressPlan,
    pub(crate) peers: Vec<Peer>,
    /// Place in `peers` by number; `u16::MAX` where there is none.
    by_number: Vec<u16>,
    /// Places in `peers`, in the order of the ids.
    by_id: Vec<(NodeId, usize)>,
    /// In the order of their indices.
    receivers: Vec<(u32, Receiver)>,
    guests: Vec<u32>,
    guard: Option<Arc<Guard>>,
}

/// What is kept of peers, by number and key: a number may be given to another peer one day.
pub(crate) type States = BTreeMap<(PeerNumber, NodeId), Arc<PeerState>>;

impl Table {
    /// Lays out `table`, with the states of those peers that were there before; `states` then holds exactly those of now.
    pub(crate) fn new(table: PeerTable, states: &mut States) -> Self {
        let mut kept = States::new();
        let mut by_number = vec![u16::MAX; NUMBERS];
        let mut by_id = BTreeMap::new();
        let mut peers = Vec::with_capacity(table.peers.len());
        for entry in table.peers {
            let slot = match by_number.get_mut(usize::from(entry.number.0)) {
                Some(slot) if entry.number.0 != 0 && *slot == u16::MAX => slot,
                _ => continue,
            };
            *slot = peers.len() as u16;
            by_id.insert(entry.id, peers.len());
            let key = (entry.number, entry.id);
            let state = states.remove(&key).unwrap_or_default();
            kept.insert(key, state.clone());
            peers.push(Peer::new(entry, state));
        }
        *states = kept;
        find_hops(&mut peers);
        let mut receivers: Vec<_> = table
            .receivers
            .into_iter()
            .map(|transport| {
                let peer = by_id.get(&transport.peer()).copied();
                (transport.local_index(), Receiver { transport, peer })
            })
            .collect();
        receivers.sort_by_key(|(index, _)| *index);
        Self {
            me: table.me,
            relays: table.relays,
            plan: table.plan,
            peers,
            by_number,
            by_id: by_id.into_iter().collect(),
            receivers,
            guests: table.guests,
            guard: table.guard,
        }
    }

    /// A table without peers, before the core has spoken.
    pub(crate) fn empty() -> Self {
        Self {
            me: NodeId([0; 32]),
            relays: false,
            plan: AddressPlan {
                range: AddressPlan::DEFAULT_RANGE,
                ula: [0xfd, 0, 0, 0, 0, 0],
            },
            peers: Vec::new(),
            by_number: Vec::new(),
            by_id: Vec::new(),
            receivers: Vec::new(),
            guests: Vec::new(),
            guard: None,
        }
    }

    /// May the core be told of this handshake? Not if it is a stranger's. Before the core has spoken nobody can tell.
    pub(crate) fn is_known(&self, handshake: &[u8]) -> bool {
        let guard = self.guard.as_ref();
        guard.is_none_or(|guard| guard.knows(handshake))
    }

    /// Is it the index of a newcomer's session? This node may be one itself, before the core has spoken.
    pub(crate) fn is_guest(&self, index: u32) -> bool {
        match self.guard {
            None => is_join_index(index),
            Some(_) => self.guests.contains(&index),
        }
    }

    /// Where UDP datagrams go straight to peers.
    pub(crate) fn udp_addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.peers.iter().filter_map(|peer| peer.path?.udp())
    }

    /// Place of the peer that `number` names.
    pub(crate) fn place(&self, number: PeerNumber) -> Option<usize> {
        let place = *self.by_number.get(usize::from(number.0))?;
        (place != u16::MAX).then_some(usize::from(place))
    }

    /// Place of the peer that a datagram is to be passed on to.
    pub(crate) fn named(&self, head: RelayHead) -> Option<usize> {
        let place = self
            .by_id
            .binary_search_by_key(&head.to(), |(id, _)| id.prefix());
        place.ok().map(|place| self.by_id[place].1)
    }

    /// Place of this peer.
    pub(crate) fn with_id(&self, id: &NodeId) -> Option<usize> {
        let place = self.by_id.binary_search_by_key(id, |(id, _)| *id);
        place.ok().map(|place| self.by_id[place].1)
    }

    /// The session that datagrams with this index belong to.
    pub(crate) fn receiver(&self, index: u32) -> Option<&Receiver> {
        let place = self.receivers.binary_search_by_key(&index, |(i, _)| *i);
        place.ok().map(|place| &self.receivers[place].1)
    }
}

/// Who stands between is a peer, too, and is reached without anybody between.
fn find_hops(peers: &mut [Peer]) {
    let hops: Vec<Option<Hop>> = peers
        .iter()
        .map(|peer| match peer.path? {
            Path::Direct(to) => Some(Hop { to, relay: None }),
            Path::Relayed(by) => {
                let relay = peers.iter().find(|other| other.id == by)?;
                Some(Hop {
                    to: relay.path?.direct()?,
                    relay: Some(relay.transport.clone()?),
                })
            }
        })
        .collect();
    for (peer, hop) in peers.iter_mut().zip(hops) {
        peer.hop = hop;
    }
}

impl Peer {
    fn new(entry: PeerEntry, state: Arc<PeerState>) -> Self {
        Self {
            number: entry.number,
            id: entry.id,
            hop: None,
            mac: layout::peer_mac(entry.number),
            transport: entry.transport,
            path: entry.path,
            sources: Sources::new(&entry.prefixes),
            mtu: usize::from(entry.mtu.unwrap_or(CAUTIOUS_MTU)),
            state,
        }
    }

    /// Another address.
    #[cfg(test)]
    pub(crate) fn lead_to(&mut self, to: UnderlayAddr) {
        self.path = Some(Path::Direct(to));
        self.hop = Some(Hop { to, relay: None });
    }

    /// Session and address, when packets can be sent now.
    pub(crate) fn route(&self) -> Option<Route<'_>> {
        let hop = self.hop.as_ref()?;
        let relay = hop.relay.as_deref();
        Some(Route {
            transport: self.transport.as_deref()?,
            to: hop.to,
            relay: relay.map(|relay| (relay, RelayHead::first(&self.id))),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use weft_core::crypto::{Cipher, Secret};
    use weft_core::session::transport::TransportKeys;

    /// Both ends of a session between node 1 and node 2, which receive under 11 and 22.
    pub(crate) fn session() -> (Arc<Transport>, Arc<Transport>) {
        let keys = |send, receive| TransportKeys {
            esp: None,
            cipher: Cipher::Aes256Gcm,
            send: Secret::new([send; 32]),
            receive: Secret::new([receive; 32]),
        };
        (
            Arc::new(Transport::new(NodeId([2; 32]), 11, 22, &keys(5, 6))),
            Arc::new(Transport::new(NodeId([1; 32]), 22, 11, &keys(6, 5))),
        )
    }

    pub(crate) fn entry(number: u16, id: u8) -> PeerEntry {
        PeerEntry {
            number: PeerNumber(number),
            id: NodeId([id; 32]),
            transport: None,
            path: None,
            prefixes: vec![],
            mtu: None,
        }
    }

    pub(crate) fn table(peers: Vec<PeerEntry>, receivers: Vec<Arc<Transport>>) -> PeerTable {
        PeerTable {
            me: NodeId([99; 32]),
            relays: true,
            plan: crate::inner::tests::plan(),
            peers,
            receivers,
            guests: Vec::new(),
            guard: None,
        }
    }

    #[test]
    fn peers_are_found_by_number_and_sessions_by_index() {
        let (ours, _) = session();
        let peers = vec![entry(7, 2), entry(0, 3), entry(4096, 4), entry(7, 5)];
        let table = Table::new(table(peers, vec![ours]), &mut States::new());
        assert_eq!(table.peers.len(), 1);
        assert_eq!(table.place(PeerNumber(7)), Some(0));
        assert_eq!(table.place(PeerNumber(0)), None);
        assert_eq!(table.place(PeerNumber(4096)), None);
        assert_eq!(table.receiver(11).unwrap().peer, Some(0));
        assert!(table.receiver(12).is_none());
        assert!(Table::empty().place(PeerNumber(7)).is_none());
    }

    #[test]
    fn counters_outlive_a_change_but_not_a_change_of_owner() {
        let mut states = States::new();
        let first = Table::new(table(vec![entry(7, 2)], vec![]), &mut states);
        first.peers[0].state.traffic.sent(1, 100);
        let same = Table::new(table(vec![entry(7, 2)], vec![]), &mut states);
        let of = |table: &Table| table.peers[0].state.traffic.read(PeerNumber(7)).tx_bytes;
        assert_eq!(of(&same), 100);
        let other = Table::new(table(vec![entry(7, 3)], vec![]), &mut states);
        assert_eq!(of(&other), 0);
        assert_eq!(states.len(), 1);
    }

    #[test]
    fn events_keep_their_distance() {
        let gap = Gap::default();
        let due: Vec<_> = [0, 0, 99, 100, 150, 200].map(|now| gap.is_due(now)).into();
        assert_eq!(due, [true, false, false, true, false, true]);
    }
}
