//! What changed since it was last asked for, so that whoever follows the catalog does again only what follows from that:
//! with ten thousand endpoints one more must not cost a look at all of them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::Catalog;
use super::log::slot_of;
use crate::model::{EndpointName, NodeId};
use crate::record::Record;
use crate::value::{Kind, NodeInfo, Object, Scope};

/// What changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// What these nodes say of themselves.
    pub(crate) nodes: BTreeSet<NodeId>,
    /// Endpoints of these nodes, by their keys.
    pub(crate) endpoints: BTreeSet<(NodeId, Vec<u8>)>,
    /// Endpoints have these addresses, or had them.
    pub(crate) addresses: BTreeSet<Ipv4Addr>,
    /// Cluster-wide objects under these kinds and keys.
    pub(crate) shared: BTreeSet<(Kind, Vec<u8>)>,
    /// Some of those came into force by time alone.
    pub(crate) due: bool,
}

impl Changes {
    /// May cluster-wide objects of this kind have changed?
    pub(crate) fn touch(&self, kind: Kind) -> bool {
        self.due || self.shared.iter().any(|(touched, _)| *touched == kind)
    }
}

/// Is a record put into its slot, or taken out?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Account {
    In,
    Out,
}

/// Follows what goes in and out.
#[derive(Clone, Debug, Default)]
pub(super) struct Tracker {
    changes: Changes,
    /// How many endpoints of a node have an address.
    holders: BTreeMap<(Ipv4Addr, NodeId), u32>,
    /// How many endpoints answer to a name.
    named: BTreeMap<EndpointName, u32>,
}

impl Tracker {
    pub(super) fn note(&mut self, record: &Record, account: Account) {
        let kind = record.kind();
        if kind.scope() == Scope::Shared {
            self.changes.shared.insert(slot_of(record));
        }
        if kind == Kind::NODE_INFO {
            self.changes.nodes.insert(record.writer());
        }
        let endpoint = match record.object() {
            Some((Object::Endpoint(endpoint), _)) if kind == Kind::ENDPOINT => endpoint,
            _ => return,
        };
        self.changes.addresses.insert(endpoint.ip);
        let of = (record.writer(), record.key().to_vec());
        self.changes.endpoints.insert(of);
        tally(&mut self.holders, (endpoint.ip, record.writer()), account);
        for name in &endpoint.names {
            tally(&mut self.named, name.clone(), account);
        }
    }
}

/// One more of them, or one less; what there is none of is not kept.
fn tally<K: Ord>(counts: &mut BTreeMap<K, u32>, key: K, account: Account) {
    match (counts.entry(key), account) {
        (entry, Account::In) => *entry.or_default() += 1,
        (Entry::Occupied(entry), Account::Out) if *entry.get() == 1 => {
            entry.remove();
        }
        (Entry::Occupied(mut entry), Account::Out) => *entry.get_mut() -= 1,
        (Entry::Vacant(_), Account::Out) => {}
    }
}

impl Catalog {
    /// What changed since the last call.
    pub(crate) fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.tracker.changes)
    }

    /// A cluster-wide object came into force by time alone.
    pub(crate) fn note_due(&mut self) {
        self.tracker.changes.due = true;
    }

    /// Does an endpoint of a node that is not in `removed` have this address?
    pub(crate) fn is_held(&self, ip: Ipv4Addr, removed: &BTreeSet<NodeId>) -> bool {
        let all = (ip, NodeId([0; 32]))..=(ip, NodeId([0xff; 32]));
        let mut holders = self.tracker.holders.range(all);
        holders.any(|((_, node), _)| !removed.contains(node))
    }

    /// Does an endpoint of any node answer to this name?
    pub(crate) fn is_endpoint_name(&self, name: &EndpointName) -> bool {
        self.tracker.named.contains_key(name)
    }

    /// What a node says of itself.
    pub(crate) fn node(&self, id: &NodeId) -> Option<&NodeInfo> {
        let mut infos = self.logs.get(id)?.of_kind(Kind::NODE_INFO);
        infos.find_map(|record| match record.object() {
            Some((Object::NodeInfo(info), _)) => Some(info),
            _ => None,
        })
    }
}
