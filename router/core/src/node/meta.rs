//! What makes a node a member: the cluster, its secret, its range and its roster, as kept on disk and as handed to a
//! newcomer.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::io::NodeConfig;
use crate::crypto::{Random, Secret};
use crate::identity::Identity;
use crate::model::{ClusterId, Generation, NodeId, WallMicros};
use crate::mutation::{self, Mutation};
use crate::roster::{Roster, RosterError};
use crate::store::{Batch, Stored, Table};
use crate::underlay::UnderlayAddr;
use crate::wire;

const GENERATION: &[u8] = b"generation";
const CLUSTER: &[u8] = b"cluster";

/// Why the stored cluster can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// There is none.
    #[error("no cluster is stored")]
    Missing,
    /// The row does not decode.
    #[error("the cluster's row is damaged")]
    Damaged,
    /// The roster does not hold together.
    #[error(transparent)]
    Roster(#[from] RosterError),
}

/// The cluster's row on disk.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    version: u8,
    cluster: ClusterId,
    secret: [u8; 32],
    range: Ipv4Net,
    seeds: Vec<(NodeId, Vec<UnderlayAddr>)>,
}

/// What a member tells a newcomer, inside their session.
#[derive(Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(super) cluster: ClusterId,
    pub(super) secret: [u8; 32],
    pub(super) range: Ipv4Net,
    /// Roster records, the founding one first.
    pub(super) roster: Vec<Vec<u8>>,
    /// Where members may be reached.
    pub(super) seeds: Vec<(NodeId, Vec<UnderlayAddr>)>,
}

/// A member's knowledge of its cluster.
pub(crate) struct Meta {
    pub(super) cluster: ClusterId,
    pub(super) secret: Secret<32>,
    pub(super) range: Ipv4Net,
    pub(super) roster: Roster,
    /// What of the roster is not on disk yet.
    unwritten: Batch,
    /// Where members may be reached when no record says better.
    pub(super) seeds: Vec<(NodeId, Vec<UnderlayAddr>)>,
}

impl Meta {
    /// A new cluster with one member.
    pub(super) fn found(
        identity: &Identity,
        config: &NodeConfig,
        range: Ipv4Net,
        random: &mut Random,
    ) -> Self {
        let (roster, unwritten) = Roster::found(identity, config.name.clone(), random);
        let secret = Secret::generate(random);
        Self {
            cluster: roster.cluster(),
            secret,
            range,
            roster,
            unwritten,
            seeds: Vec::new(),
        }
    }

    /// From a member's welcome. `me` must be admitted in it.
    pub(crate) fn welcomed(welcome: Welcome, me: &NodeId) -> Result<Self, MetaError> {
        let (roster, unwritten) =
            Roster::join(welcome.cluster, welcome.roster.iter().map(Vec::as_slice))?;
        if !roster.is_member(me) {
            return Err(MetaError::Missing);
        }
        Ok(Self {
            cluster: welcome.cluster,
            secret: Secret::new(welcome.secret),
            range: welcome.range,
            roster,
            unwritten,
            seeds: welcome.seeds,
        })
    }

    /// From disk.
    pub(super) fn restore(stored: &Stored) -> Result<Self, MetaError> {
        let row = stored
            .get(Table::Cluster, &[CLUSTER])
            .ok_or(MetaError::Missing)?;
        let row: Row = wire::decode_long(row).map_err(|_| MetaError::Damaged)?;
        let roster = Roster::restore(row.cluster, stored)?;
        Ok(Self {
            cluster: row.cluster,
            secret: Secret::new(row.secret),
            range: row.range,
            roster,
            unwritten: Batch::new(),
            seeds: row.seeds,
        })
    }

    /// Where `peer` was reached before, whatever its record says.
    pub(super) fn remembered(&self, peer: &NodeId) -> &[UnderlayAddr] {
        let found = self.seeds.iter().find(|(id, _)| id == peer);
        found.map_or(&[], |(_, addresses)| addresses)
    }

    /// Of whom there is something to remember.
    pub(super) fn remembered_peers(&self) -> Vec<NodeId> {
        self.seeds.iter().map(|(id, _)| *id).collect()
    }

    /// Remembers where `peer` was reached, and nothing any more of those who are no members.
    pub(super) fn remember(&mut self, peer: NodeId, addresses: Vec<UnderlayAddr>) -> Batch {
        let roster = &self.roster;
        self.seeds
            .retain(|(id, _)| *id != peer && roster.is_member(id));
        self.seeds.push((peer, addresses));
        self.row()
    }

    /// All of it, to write down at once.
    pub(crate) fn batch(&self) -> Batch {
        let mut batch = self.unwritten.clone();
        batch.append(self.row());
        batch
    }

    fn row(&self) -> Batch {
        let row = Row {
            version: 1,
            cluster: self.cluster,
            secret: *self.secret.expose(),
            range: self.range,
            seeds: self.seeds.clone(),
        };
        let mut batch = Batch::new();
        batch.put(Table::Cluster.key(&[CLUSTER]), wire::encode(&row));
        batch
    }
}

/// The cluster that a stored state belongs to, if any.
pub fn cluster_of(stored: &Stored) -> Option<ClusterId> {
    row_of(stored).map(|row| row.cluster)
}

/// The range of the cluster that a stored state belongs to.
pub fn range_of(stored: &Stored) -> Option<Ipv4Net> {
    row_of(stored).map(|row| row.range)
}

fn row_of(stored: &Stored) -> Option<Row> {
    wire::decode_long(stored.get(Table::Cluster, &[CLUSTER])?).ok()
}

/// `max(stored + 1, unix seconds)`: grows even where the clock went back, and a fresh disk does not begin at 1 again.
/// `None` when what is stored leaves no later one: nobody counts so far.
pub(super) fn next_generation(stored: &Stored, wall: WallMicros) -> Option<Generation> {
    let last = stored
        .get(Table::Cluster, &[GENERATION])
        .and_then(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?)));
    if mutation::is_on(Mutation::ReuseGeneration) {
        return Some(Generation(last.unwrap_or(wall.0 / 1_000_000)));
    }
    let next = last.unwrap_or(0).checked_add(1)?;
    Some(Generation(next.max(wall.0 / 1_000_000)))
}

pub(super) fn generation_batch(generation: Generation) -> Batch {
    Batch(vec![(
        Table::Cluster.key(&[GENERATION]),
        Some(generation.0.to_be_bytes().to_vec()),
    )])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Label;
    use crate::roster::Rights;
    use crate::session::join::MAX_WELCOME;

    fn identity(number: u16) -> Identity {
        let mut seed = [7; 64];
        seed[..2].copy_from_slice(&number.to_be_bytes());
        Identity::from_bytes(&Secret::new(seed))
    }

    fn name(number: u16) -> Label {
        Label::parse(&format!("a-host-with-a-longer-name-{number}")).unwrap()
    }

    #[test]
    fn a_cluster_of_hundreds_lets_in_one_more_and_is_read_from_disk() {
        let (founder, hosts) = (identity(0), 600);
        let mut random = Random::from_seed([1; 32]);
        let (mut roster, _) = Roster::found(&founder, name(0), &mut random);
        for number in 1..=hosts {
            let host = identity(number);
            let noise = host.noise_public();
            let admitted = roster.admit(&founder, host.id(), noise, name(number), Rights::ALL);
            admitted.unwrap();
        }
        let address = UnderlayAddr::Udp("[2001:db8:1:2:3:4:5:6]:6783".parse().unwrap());
        let seeds = (0..=hosts).map(|number| (identity(number).id(), vec![address; 8]));
        let welcome = Welcome {
            cluster: roster.cluster(),
            secret: [9; 32],
            range: "10.32.0.0/12".parse().unwrap(),
            roster: roster.records().into_iter().map(<[u8]>::to_vec).collect(),
            seeds: seeds.collect(),
        };
        let bytes = wire::encode(&welcome);
        assert!(wire::MAX_DECODE < bytes.len() && bytes.len() < MAX_WELCOME);

        let welcome = wire::decode_long(&bytes).unwrap();
        let meta = Meta::welcomed(welcome, &identity(hosts).id()).unwrap();
        assert_eq!(meta.roster.members().count(), usize::from(hosts) + 1);

        let mut stored = Stored::default();
        stored.apply(&meta.batch());
        let restored = Meta::restore(&stored).unwrap();
        assert_eq!(restored.seeds.len(), usize::from(hosts) + 1);
        assert_eq!(cluster_of(&stored), Some(meta.cluster));
    }
}
