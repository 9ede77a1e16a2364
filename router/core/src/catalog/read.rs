//! What the records say, decoded.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::hlc::Stamp;
use crate::model::{NodeId, ServiceName, WallMicros};
use crate::mutation::{self, Mutation};
use crate::record::Record;
use crate::value::{Grant, Kind, Lineage, Network, NodeInfo, Object, Scope, Vote, Voters};
use crate::view::{Endpoint, ManualName, PublishConflict, Service};
use crate::voters::Electorate;

use super::log::Slot;
use super::{Catalog, rank};

/// Two different objects were created under one name while their writers did not hear of each other: one is applied,
/// this one is not. Writing or removing the name settles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// Who wrote the one that is applied.
    pub kept: NodeId,
    /// Who wrote this one.
    pub lost: NodeId,
    /// What is not applied.
    pub object: Object,
}

impl Catalog {
    /// What nodes say of themselves.
    pub fn nodes(&self) -> BTreeMap<NodeId, NodeInfo> {
        self.own_objects(Kind::NODE_INFO)
            .filter_map(|(writer, object)| match object {
                Object::NodeInfo(info) => Some((writer, info.clone())),
                _ => None,
            })
            .collect()
    }

    /// Endpoints in the order of their ids, but for those of `hidden` nodes.
    pub fn endpoints(&self, hidden: &BTreeSet<NodeId>) -> Vec<Endpoint> {
        let mut endpoints: Vec<Endpoint> = self
            .own_objects(Kind::ENDPOINT)
            .filter(|(writer, _)| !hidden.contains(writer))
            .filter_map(|(_, object)| match object {
                Object::Endpoint(endpoint) => Some(endpoint.clone()),
                _ => None,
            })
            .collect();
        endpoints.sort_by_key(|e| (e.id, e.node));
        endpoints
    }

    /// One node's endpoints.
    pub fn endpoints_of(&self, node: &NodeId) -> impl Iterator<Item = &Endpoint> {
        let log = self.logs.get(node).into_iter();
        log.flat_map(|log| log.slots.range(slots_of(Kind::ENDPOINT)))
            .filter_map(|(_, held)| match &decode(&held.record)?.0 {
                Object::Endpoint(endpoint) => Some(endpoint),
                _ => None,
            })
    }

    /// The endpoint that a node's record under this key tells of.
    pub fn endpoint(&self, node: &NodeId, key: &[u8]) -> Option<&Endpoint> {
        let record = self.held(node, &(Kind::ENDPOINT, key.to_vec()))?;
        match &decode(record)?.0 {
            Object::Endpoint(endpoint) => Some(endpoint),
            _ => None,
        }
    }

    /// All grants with their writers: what the ring is computed from.
    pub fn grants(&self) -> Vec<(NodeId, Grant)> {
        self.own_objects(Kind::GRANT)
            .filter_map(|(writer, object)| match object {
                Object::Grant(grant) => Some((writer, *grant)),
                _ => None,
            })
            .collect()
    }

    /// Those who decide about a node's space.
    pub fn electorate(
        &self,
        owner: &NodeId,
        destroyed: &BTreeSet<NodeId>,
    ) -> Option<Electorate<'_>> {
        let [even, odd] = [[0], [1]].map(|key| self.set_of_voters(owner, &key));
        Electorate::new(*owner, even.into_iter().chain(odd), destroyed)
    }

    fn set_of_voters(&self, owner: &NodeId, key: &[u8]) -> Option<&Voters> {
        let record = self.held(owner, &(Kind::VOTERS, key.to_vec()))?;
        match &decode(record)?.0 {
            Object::Voters(voters) => Some(voters),
            _ => None,
        }
    }

    /// All recorded sets of voters, with their owners.
    pub fn sets_of_voters(&self) -> impl Iterator<Item = (NodeId, &Voters)> {
        self.own_objects(Kind::VOTERS)
            .filter_map(|(owner, object)| match object {
                Object::Voters(voters) => Some((owner, voters)),
                _ => None,
            })
    }

    /// Nodes of which a member said that they are destroyed.
    pub fn destroyed(&self) -> BTreeSet<NodeId> {
        let votes = self.own_objects(Kind::VOTE);
        votes.filter_map(|(_, vote)| forced(vote)).collect()
    }

    /// Who wrote the cluster-wide object that is applied under a key.
    pub fn shared_writer(&self, kind: Kind, key: &[u8], wall: WallMicros) -> Option<NodeId> {
        self.winner(&(kind, key.to_vec()), Some(wall))
            .map(Record::writer)
    }

    /// What a voter said about a node's space. Only words that nothing is missing before count: what the voter wrote
    /// first must be known first.
    pub fn vote(&self, voter: &NodeId, subject: &NodeId) -> Option<Vote> {
        let log = self.logs.get(voter)?;
        let record = log.record(&(Kind::VOTE, subject.0.to_vec()))?;
        if record.sequence() > log.complete {
            return None;
        }
        match decode(record)?.0 {
            Object::Vote(vote) => Some(vote),
            _ => None,
        }
    }

    /// Published ports that nodes can't serve, but for those of `hidden` nodes.
    pub fn conflicts(&self, hidden: &BTreeSet<NodeId>) -> Vec<PublishConflict> {
        self.own_objects(Kind::PUBLISH_CONFLICT)
            .filter(|(writer, _)| !hidden.contains(writer))
            .filter_map(|(_, object)| match object {
                Object::PublishConflict(conflict) => Some(conflict.clone()),
                _ => None,
            })
            .collect()
    }

    /// Services in the order of their names.
    pub fn services(&self, wall: WallMicros) -> Vec<Service> {
        self.shared_objects(Kind::SERVICE, wall)
            .filter_map(|object| match object {
                Object::Service(service) => Some(service.clone()),
                _ => None,
            })
            .collect()
    }

    /// Services that have the virtual address of another one that was born before, whose name is given.
    pub fn services_in_common(&self, wall: WallMicros) -> Vec<(ServiceName, Service)> {
        let slots = self.shared.range(slots_of(Kind::SERVICE));
        let winners = slots.filter_map(|(slot, _)| decode(self.winner(slot, Some(wall))?));
        let mut services: Vec<(&Lineage, &Service)> = winners
            .filter_map(|(object, lineage)| match object {
                Object::Service(service) => Some((lineage, service)),
                _ => None,
            })
            .collect();
        services.sort_by_key(|(lineage, service)| (lineage.born, &service.name));
        let mut first = BTreeMap::new();
        let mut later = Vec::new();
        for (_, service) in services {
            let holder = first.entry(service.vip).or_insert(&service.name);
            if *holder != &service.name {
                later.push(((*holder).clone(), service.clone()));
            }
        }
        later
    }

    /// Manual names in their order.
    pub fn names(&self, wall: WallMicros) -> Vec<ManualName> {
        self.shared_objects(Kind::NAME, wall)
            .filter_map(|object| match object {
                Object::Name(name) => Some(name.clone()),
                _ => None,
            })
            .collect()
    }

    /// Networks besides `default`, in the order of their names.
    pub fn networks(&self, wall: WallMicros) -> Vec<Network> {
        self.shared_objects(Kind::NETWORK, wall)
            .filter_map(|object| match object {
                Object::Network(network) => Some(network.clone()),
                _ => None,
            })
            .collect()
    }

    /// Objects that lost their name to another one created in a split.
    pub fn duplicates(&self, wall: WallMicros) -> Vec<Duplicate> {
        self.duplicates_under(self.shared.keys(), wall)
    }

    /// Networks among them.
    pub(crate) fn lost_networks(&self, wall: WallMicros) -> Vec<Network> {
        let slots = self.shared.range(slots_of(Kind::NETWORK));
        let lost = self.duplicates_under(slots.map(|(slot, _)| slot), wall);
        lost.into_iter()
            .filter_map(|lost| match lost.object {
                Object::Network(network) => Some(network),
                _ => None,
            })
            .collect()
    }

    /// Those under these names.
    pub(crate) fn duplicates_under<'a>(
        &self,
        slots: impl IntoIterator<Item = &'a Slot>,
        wall: WallMicros,
    ) -> Vec<Duplicate> {
        slots
            .into_iter()
            .flat_map(|slot| self.duplicates_of(slot, wall))
            .collect()
    }

    /// Every address that an endpoint or a service holds, also of nodes that are Down, but not the endpoints of `removed`
    /// ones: those are gone for good. A service counts from its record on until it is removed, whatever any clock says:
    /// one that is not due yet, or lost its name to another, has its address all the same.
    pub fn used_addresses(&self, removed: &BTreeSet<NodeId>) -> BTreeSet<Ipv4Addr> {
        let endpoints = self
            .own_objects(Kind::ENDPOINT)
            .filter(|(writer, _)| !removed.contains(writer))
            .filter_map(|(_, object)| match object {
                Object::Endpoint(endpoint) => Some(endpoint.ip),
                _ => None,
            });
        let slots = self.shared.range(slots_of(Kind::SERVICE));
        let vips = slots.flat_map(|(slot, _)| self.vips_under(slot));
        // Numbers are sorted faster than addresses; a set is then made of them in one go.
        let mut all: Vec<u32> = endpoints.chain(vips).map(u32::from).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter().map(Ipv4Addr::from).collect()
    }

    fn vips_under(&self, slot: &Slot) -> Vec<Ipv4Addr> {
        let held: Vec<&Record> = self.all_in(slot).collect();
        let graves = held.iter().filter(|record| record.is_tombstone());
        let removed = graves.map(|record| rank(record)).max();
        held.iter()
            .filter(|record| removed.is_none_or(|removed| rank(record) > removed))
            .filter_map(|record| match decode(record)? {
                (Object::Service(service), _) => Some(service.vip),
                _ => None,
            })
            .collect()
    }

    /// When the next record that is kept but not applied becomes due.
    pub fn next_due(&self, wall: WallMicros) -> Option<WallMicros> {
        self.next_due_under(self.shared.keys(), wall)
    }

    /// When the next of those under these names does.
    pub(crate) fn next_due_under<'a>(
        &self,
        slots: impl IntoIterator<Item = &'a Slot>,
        wall: WallMicros,
    ) -> Option<WallMicros> {
        slots
            .into_iter()
            .flat_map(|slot| self.all_in(slot))
            .map(Record::stamp)
            .filter(|stamp| !stamp.is_due(wall))
            .map(Stamp::due_at)
            .min()
    }

    /// A writer's own object under a key.
    pub fn own_object(&self, writer: &NodeId, kind: Kind, key: &[u8]) -> Option<Object> {
        decode(self.held(writer, &(kind, key.to_vec()))?).map(|(object, _)| object.clone())
    }

    /// The cluster-wide object that is applied under a key.
    pub fn shared_object(&self, kind: Kind, key: &[u8], wall: WallMicros) -> Option<Object> {
        decode(self.winner(&(kind, key.to_vec()), Some(wall))?).map(|(object, _)| object.clone())
    }

    fn own_objects(&self, kind: Kind) -> impl Iterator<Item = (NodeId, &Object)> {
        debug_assert_eq!(kind.scope(), Scope::Own);
        self.logs.iter().flat_map(move |(writer, log)| {
            log.slots
                .range(slots_of(kind))
                .filter_map(move |(_, held)| Some((*writer, &decode(&held.record)?.0)))
        })
    }

    fn shared_objects(&self, kind: Kind, wall: WallMicros) -> impl Iterator<Item = &Object> {
        self.shared
            .range(slots_of(kind))
            .filter_map(move |(slot, _)| Some(&decode(self.winner(slot, Some(wall))?)?.0))
    }

    fn duplicates_of(&self, slot: &Slot, wall: WallMicros) -> Vec<Duplicate> {
        let Some(kept) = self.winner(slot, Some(wall)) else {
            return Vec::new();
        };
        let Some((_, lineage)) = decode(kept) else {
            return Vec::new();
        };
        self.all_in(slot)
            .filter(|r| r.writer() != kept.writer() && r.stamp().is_due(wall))
            .filter(|r| !is_covered(r, lineage))
            .filter_map(|lost| {
                let (object, other) = decode(lost)?;
                (other.born != lineage.born).then_some(Duplicate {
                    kept: kept.writer(),
                    lost: lost.writer(),
                    object: object.clone(),
                })
            })
            .collect()
    }

    /// The record that wins a cluster-wide slot: among those due at `wall`, or among all.
    pub(super) fn winner(&self, slot: &Slot, wall: Option<WallMicros>) -> Option<&Record> {
        self.all_in(slot)
            .filter(|r| wall.is_none_or(|wall| r.stamp().is_due(wall)))
            .max_by_key(|r| match mutation::is_on(Mutation::LastComerWins) {
                true => (self.since(r, slot), rank(r)),
                false => (0, rank(r)),
            })
    }

    /// When a held record came.
    fn since(&self, record: &Record, slot: &Slot) -> u64 {
        let log = self.logs.get(&record.writer());
        let held = log.and_then(|log| log.slots.get(slot));
        held.map_or(0, |held| held.since)
    }

    pub(super) fn held(&self, writer: &NodeId, slot: &Slot) -> Option<&Record> {
        self.logs.get(writer)?.record(slot)
    }
}

/// All slots of one kind.
fn slots_of(kind: Kind) -> std::ops::Range<Slot> {
    (kind, Vec::new())..(Kind(kind.0 + 1), Vec::new())
}

pub(super) fn decode(record: &Record) -> Option<&(Object, Lineage)> {
    record.object()
}

/// The node of which this vote says that it is destroyed.
pub(super) fn forced(object: &Object) -> Option<NodeId> {
    match object {
        Object::Vote(vote) if vote.gone == Some(Vote::BY_FORCE) => Some(vote.subject),
        _ => None,
    }
}

/// Did the writer of `lineage` know this record?
fn is_covered(record: &Record, lineage: &Lineage) -> bool {
    let writer = record.writer();
    lineage
        .covers
        .iter()
        .any(|(short, sequence)| *short == writer.0[..8] && record.sequence() <= *sequence)
}
