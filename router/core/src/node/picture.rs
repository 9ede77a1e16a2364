//! The view and the table of tunnels: what the edges plan from, computed from the machines' states.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::cluster::Cluster;
use super::io::Tunnel;
use crate::layout::IPV6_MIN_MTU;
use crate::model::{NodeId, Now};
use crate::path::Path;
use crate::session::guard::Guard;
use crate::session::{SessionInfo, Trust};
use crate::view::{Blocked, Endpoint, Liveness, Member, PeerNumber, PeerView, View};
use crate::wire;

impl Cluster {
    pub(super) fn view(&self) -> View {
        let hidden = self.hidden();
        View {
            revision: self.revision,
            me: self.me,
            cluster: self.meta.cluster,
            plan: self.plan,
            members: self.members(),
            endpoints: self.endpoints(&hidden),
            services: self.services(),
            names: self.catalog.names(self.wall_now()),
            conflicts: self.catalog.conflicts(&hidden),
            networks: self.networks(),
            blocked: self.blocked(),
            vxlan: self.carriers.view(),
        }
    }

    fn blocked(&self) -> Vec<Blocked> {
        let removed = self.removed().into_iter();
        removed
            .map(|id| Blocked {
                id,
                name: self.name_of(&id),
                prefixes: self.ring.prefixes(&id, &self.plan),
            })
            .filter(|blocked| !blocked.prefixes.is_empty())
            .collect()
    }

    pub(super) fn relays(&self) -> bool {
        self.config.relay && self.roster().may_relay(&self.me)
    }

    pub(super) fn guests(&self) -> Vec<u32> {
        self.door.indices().collect()
    }

    pub(super) fn guard(&self) -> Arc<Guard> {
        self.guard.clone()
    }

    pub(super) fn tunnels(&self) -> Vec<Tunnel> {
        let sessions: Vec<SessionInfo> = self.sessions.peers().collect();
        self.roster()
            .members()
            .filter(|member| member.id != self.me)
            .filter_map(|member| {
                let session = sessions.iter().find(|session| session.peer == member.id);
                Some(Tunnel {
                    peer: member.id,
                    number: self.numbers.of(&member.id)?,
                    path: session.and_then(|s| s.path),
                    transport: session.map(|s| s.transport.clone()),
                    receivers: self
                        .receivers
                        .values()
                        .filter(|t| t.peer() == member.id)
                        .cloned()
                        .collect(),
                    prefixes: self.ring.prefixes(&member.id, &self.plan),
                    mtu: session.and_then(inner_mtu),
                })
            })
            .collect()
    }

    pub(super) fn peers(&self, now: Now) -> Vec<PeerView> {
        let sessions: Vec<SessionInfo> = self.sessions.peers().collect();
        self.sessions
            .linked()
            .map(|id| {
                let session = sessions.iter().find(|session| session.peer == id);
                let (carrier, why, mtu) = self.carriers.of(&id);
                PeerView {
                    id,
                    carrier: session.map(|_| carrier),
                    why,
                    path: session.and_then(|session| session.path),
                    rtt_micros: session
                        .and_then(|session| session.rtt)
                        .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                    handshake_age_millis: session.and_then(|session| {
                        u64::try_from(session.handshake_age(now).as_millis()).ok()
                    }),
                    mtu: session.and_then(|session| mtu.or_else(|| inner_mtu(session))),
                    paths: self.sessions.paths(&id),
                }
            })
            .collect()
    }

    /// Endpoints with addresses of their nodes' own: nobody takes another's by saying so. This node sees its own whatever
    /// has become of their addresses, so that it can take them back.
    fn endpoints(&self, hidden: &BTreeSet<NodeId>) -> Vec<Endpoint> {
        let mut endpoints = self.catalog.endpoints(hidden);
        endpoints.retain(|endpoint| {
            endpoint.node == self.me || self.ring.owner(endpoint.ip) == Some(endpoint.node)
        });
        endpoints
    }

    /// Nodes whose records are hidden: those that are Down, and those that were revoked.
    fn hidden(&self) -> BTreeSet<NodeId> {
        let writers = self.catalog.nodes().into_keys();
        let gone = |id: &NodeId| {
            *id != self.me && (!self.roster().is_member(id) || self.liveness(id) == Liveness::Down)
        };
        writers
            .chain(self.roster().members().map(|m| m.id))
            .filter(gone)
            .collect()
    }

    fn members(&self) -> Vec<Member> {
        let nodes = self.catalog.nodes();
        let sessions: Vec<SessionInfo> = self.sessions.peers().collect();
        let mut members: Vec<Member> = self
            .roster()
            .members()
            .map(|member| {
                let info = nodes.get(&member.id);
                let session = sessions.iter().find(|session| session.peer == member.id);
                let generation = match member.id == self.me {
                    true => self.generation,
                    false => session.map(|s| s.generation).unwrap_or_default(),
                };
                Member {
                    id: member.id,
                    name: info.map_or_else(|| member.name.clone(), |info| info.name.clone()),
                    generation,
                    liveness: self.liveness(&member.id),
                    number: self.numbers.of(&member.id).unwrap_or(PeerNumber(0)),
                    prefixes: self.ring.prefixes(&member.id, &self.plan),
                    host_addrs: info.map(|info| info.host_addrs.clone()).unwrap_or_default(),
                    mtu: session.and_then(inner_mtu),
                }
            })
            .collect();
        members.sort_by_key(|member| member.id);
        members
    }
}

/// The largest inner packet that fits into one datagram.
fn inner_mtu(session: &SessionInfo) -> Option<u16> {
    let path = session.path?;
    Some(session.mtu.unwrap_or(match path {
        Path::Direct(_) => IPV6_MIN_MTU,
        Path::Relayed(_) => IPV6_MIN_MTU - wire::RELAY_OVERHEAD as u16,
    }))
}
