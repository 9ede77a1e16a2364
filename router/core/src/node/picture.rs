//! The view and the table of tunnels: what the edges plan from, computed from the machines' states.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::cluster::Cluster;
use super::io::Tunnel;
use crate::model::{NodeId, Now};
use crate::session::SessionInfo;
use crate::view::{Blocked, Carrier, Endpoint, Liveness, Member, PeerNumber, PeerView, View};
use crate::wire;

/// RFC 791 and RFC 8200 headers, RFC 768 header.
const IPV4_HEADER: u16 = 20;
const IPV6_HEADER: u16 = 40;
const UDP_HEADER: u16 = 8;
/// Assumed until the kernel says otherwise: the smallest that any IPv6 link carries.
const CAUTIOUS_MTU: u16 = 1280 + 33 + IPV6_HEADER + UDP_HEADER;

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
                    mtu: session
                        .and_then(|s| s.path)
                        .map(|path| self.inner_mtu(path)),
                })
            })
            .collect()
    }

    pub(super) fn peers(&self, now: Now) -> Vec<PeerView> {
        self.sessions
            .peers()
            .map(|session| PeerView {
                id: session.peer,
                carrier: Some(Carrier::Udp),
                path: session.path,
                rtt_micros: session
                    .rtt
                    .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                handshake_age_millis: u64::try_from(session.handshake_age(now).as_millis()).ok(),
                mtu: session.path.map(|path| self.inner_mtu(path)),
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
                    mtu: session
                        .and_then(|s| s.path)
                        .map(|path| self.inner_mtu(path)),
                }
            })
            .collect();
        members.sort_by_key(|member| member.id);
        members
    }

    /// The largest inner packet that fits into one datagram on this path.
    fn inner_mtu(&self, path: SocketAddr) -> u16 {
        let outer = self.path_mtu.get(&path).copied().unwrap_or(CAUTIOUS_MTU);
        let ip = if path.is_ipv6() {
            IPV6_HEADER
        } else {
            IPV4_HEADER
        };
        outer.saturating_sub(ip + UDP_HEADER + wire::OVERHEAD as u16)
    }
}
