//! Which carrier takes packets to whom: what sessions, paths and members mean for [`crate::carriers`], and what comes of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::cluster::Cluster;
use super::io::Output;
use crate::carriers::{Event, Facts, SessionKeys};
use crate::layout::vxlan_mac;
use crate::model::{NodeId, Now};
use crate::path::Path;
use crate::view::PeerNumber;
use crate::wire::{self, Message};

impl Cluster {
    pub(super) fn set_path_source(&mut self, addr: SocketAddr, source: IpAddr) {
        if self.carriers.is_on() && self.path_source.insert(addr, source) != Some(source) {
            self.tunnels_changed = true;
        }
    }

    /// Sessions, paths or members changed.
    pub(super) fn follow_paths(&mut self, now: Now) {
        let members = self.roster().members();
        let peers = members.filter(|member| member.id != self.me);
        let numbered = peers.filter_map(|peer| Some((self.numbers.of(&peer.id)?, peer.id)));
        let owners = mac_owners(self.me, numbered.collect(), vxlan_mac);
        let facts: Vec<Facts> = self
            .sessions
            .peers()
            .filter_map(|session| {
                let path = session.path.and_then(Path::udp);
                Some(Facts {
                    peer: session.peer,
                    number: self.numbers.of(&session.peer)?,
                    generation: session.generation,
                    consents: session.capabilities.plain_vxlan,
                    esp: session.capabilities.esp,
                    keys: session.transport.esp().map(|keys| SessionKeys {
                        inbound: session.transport.local_index(),
                        outbound: session.transport.remote_index(),
                        keys: keys.clone(),
                    }),
                    path,
                    source: path.and_then(|p| self.path_source.get(&p).copied()),
                    path_mtu: session.path_mtu,
                    mac_taken: owners.get(&vxlan_mac(&session.peer)) != Some(&session.peer),
                })
            })
            .filter(|facts| self.roster().is_member(&facts.peer))
            .collect();
        let paths: Vec<SocketAddr> = facts.iter().filter_map(|facts| facts.path).collect();
        self.path_source.retain(|addr, _| paths.contains(addr));
        self.carriers
            .set_peers(now, facts, &mut self.buffers.carriers);
    }

    pub(super) fn on_carrier(&mut self, now: Now, event: Event, out: &mut Vec<Output>) {
        match event {
            Event::Say { to, word } => {
                self.send(now, &to, &Message::Carrier(wire::encode(&word)));
            }
            Event::Probe {
                host,
                to,
                nonce,
                length,
            } => out.push(Output::VxlanProbe {
                host,
                to,
                from: vxlan_mac(&self.me),
                nonce,
                length,
            }),
            Event::Renew { peer } => self.sessions.renew(now, &peer),
            Event::Changed => self.view_changed = true,
        }
    }
}

/// Who has which MAC on VXLAN: this host first, then whom it has known longest. Somebody may have looked for a key with the
/// MAC of another; whoever comes later gets none.
fn mac_owners(
    me: NodeId,
    mut peers: Vec<(PeerNumber, NodeId)>,
    mac: impl Fn(&NodeId) -> [u8; 6],
) -> BTreeMap<[u8; 6], NodeId> {
    peers.sort_unstable();
    let mut owners = BTreeMap::from([(mac(&me), me)]);
    for (_, id) in peers {
        owners.entry(mac(&id)).or_insert(id);
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_belongs_to_whom_this_host_has_known_longest() {
        let id = |n: u8| NodeId([n; 32]);
        // Nodes 1 and 4 share one, and so do 2 and 3.
        let mac = |id: &NodeId| match id.0[0] {
            1 | 4 => [6, 0, 0, 0, 0, 1],
            2 | 3 => [6, 0, 0, 0, 0, 2],
            n => [6, 0, 0, 0, 1, n],
        };
        let peers = vec![
            (PeerNumber(9), id(2)),
            (PeerNumber(1), id(4)),
            (PeerNumber(7), id(3)),
            (PeerNumber(8), id(5)),
        ];
        let owners = mac_owners(id(1), peers, mac);
        let owns = |n: u8| owners.get(&mac(&id(n))) == Some(&id(n));
        assert_eq!([1, 2, 3, 4, 5].map(owns), [true, false, true, false, true]);
    }
}
