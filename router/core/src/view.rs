//! What a node knows, as plain data: the one thing the edges (kernel, balancer, DNS, control API) plan from.
//!
//! The core makes a new [`View`] whenever something in it changed. It holds what is *visible*: records of nodes that
//! are Down are hidden, not erased, and so are those of revoked nodes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::carriers::Why;
use crate::crypto::Secret;
use crate::model::{
    AddressPlan, ClusterId, EndpointId, EndpointName, Generation, Label, NetworkName, NodeId,
    NodeName, Proto, ServiceName,
};
use crate::path::{Path, PathInfo};

/// A number this host gave to a peer: 1 to 4094. Names the peer in MACs, next hops, marks and conntrack zones; kept on
/// disk because established connections carry it. The host itself is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerNumber(pub u16);

/// Whether a node answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Gossip holds it for alive.
    Alive,
    /// Gossip still holds it for alive, but it has been silent towards *this* host for more than a second: no new
    /// connections are sent to its backends.
    Silent,
    /// Gossip agreed that it is gone; its records are hidden until it is back.
    Down,
}

/// One node of the cluster, this one included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its key.
    pub id: NodeId,
    /// Its name for people.
    pub name: NodeName,
    /// Its present start.
    pub generation: Generation,
    /// Does it answer?
    pub liveness: Liveness,
    /// This host's number for it; 0 for the host itself.
    pub number: PeerNumber,
    /// Parts of the range that it owns, as prefixes in ascending order: where packets for them are sent.
    pub prefixes: Vec<Ipv4Net>,
    /// The addresses of the host, for published ports (its own local addresses, not overlay ones).
    pub host_addrs: Vec<IpAddr>,
    /// Largest inner packet (octets, IP header included) the sealed path to it carries; `None` for the host itself or
    /// while there is no path.
    pub mtu: Option<u16>,
}

/// Who stands behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointKind {
    /// A container or a plain process in a namespace of its own.
    Container,
    /// A host's own leg (`weft0`): it has an address, no names.
    Host,
}

/// One attachment to the overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Unique in the cluster.
    pub id: EndpointId,
    /// The node that it is attached to.
    pub node: NodeId,
    /// Container or host.
    pub kind: EndpointKind,
    /// Names it answers to.
    pub names: Vec<EndpointName>,
    /// Its network.
    pub network: NetworkName,
    /// Its address; the IPv6 one is derived ([`AddressPlan::v6`]).
    pub ip: Ipv4Addr,
    /// Free labels, for selectors.
    pub labels: BTreeMap<String, String>,
}

/// How new connections are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// A consistent hash (Eisenbud et al., NSDI 2016) over the client's address and port, computed alike by every node.
    #[default]
    Maglev,
}

/// One published port: where every node listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Publish {
    /// Only on this address; every address of every node when absent.
    pub addr: Option<IpAddr>,
    /// The port on the hosts.
    pub port: u16,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// Protocol of both sides.
    pub proto: Proto,
    /// The port on the VIP.
    pub port: u16,
    /// The port on the backends.
    pub target: u16,
    /// Where the hosts listen for it.
    pub publish: Vec<Publish>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name, which resolves to the VIP.
    pub name: ServiceName,
    /// Its virtual address; the IPv6 one is derived.
    pub vip: Ipv4Addr,
    /// Its ports, at least one.
    pub ports: Vec<ServicePort>,
    /// Labels that backends must have; empty = endpoints named like the service.
    pub selector: BTreeMap<String, String>,
    /// How it spreads.
    pub method: Method,
}

impl Service {
    /// Is `endpoint` one of its backends?
    pub fn selects(&self, endpoint: &Endpoint) -> bool {
        if endpoint.kind != EndpointKind::Container {
            return false;
        }
        if self.selector.is_empty() {
            return endpoint.names.contains(&self.name);
        }
        self.selector
            .iter()
            .all(|(k, v)| endpoint.labels.get(k) == Some(v))
    }
}

/// A network: who is in one reaches all others in it directly, and those of other networks only through services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// Its name.
    pub name: NetworkName,
    /// Its addresses.
    pub net: Ipv4Net,
    /// Addresses of others that were made under the same name during a split, and lost it: who is there belongs to this
    /// network, but nobody gets an address there any more.
    pub also: Vec<Ipv4Net>,
    /// How many endpoints it can hold.
    pub size: u64,
    /// How many addresses are in use, as far as is known here, those of nodes that are Down included.
    pub used: u64,
    /// How many addresses this node can hand out without asking another one.
    pub free_here: u64,
    /// Less than a tenth is free.
    pub low: bool,
}

impl NetworkView {
    /// All its addresses.
    pub fn blocks(&self) -> impl Iterator<Item = Ipv4Net> {
        std::iter::once(self.net).chain(self.also.iter().copied())
    }

    /// What people are told once when little is left.
    pub fn warning(&self) -> String {
        format!("network \"{}\" ({}) {NEARLY_FULL}", self.name, self.net)
    }
}

/// How [`NetworkView::warning`] ends.
pub const NEARLY_FULL: &str = "is nearly full, less than a tenth of its addresses is free: detach what is not needed, or \
                               make a larger one with weft network create";

/// A name that a person bound to an address (`weft dns add`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManualName {
    /// The label under `weft.internal`.
    pub name: Label,
    /// IPv4 or IPv6.
    pub ip: IpAddr,
}

/// A node that can't serve a published port because somebody else listens there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishConflict {
    /// On this node,
    pub node: NodeId,
    /// this protocol
    pub proto: Proto,
    /// and port
    pub port: u16,
    /// are held by this (`nginx (pid 812)`).
    pub owner: String,
}

/// How packets reach a peer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// Sealed datagrams over UDP.
    Udp,
    /// The kernel's VXLAN, in the clear: between hosts that both trust the network between them.
    Vxlan,
    /// The same, sealed by the kernel's ESP: between hosts that both asked for it.
    Esp,
}

/// How VXLAN goes between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seal {
    /// In the clear.
    Plain,
    /// Inside ESP, and in no other way.
    Esp,
}

/// A key in the kernel and its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EspSa {
    /// Its security parameters index: the receiver's index of the session.
    pub spi: u32,
    /// AES-256-GCM's key and the salt behind it.
    pub key: Secret<36>,
}

/// What the kernel needs to seal VXLAN to a peer, and to open what comes from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EspPeer {
    /// This host's number for it.
    pub number: PeerNumber,
    /// This host's address.
    pub mine: IpAddr,
    /// The peer's, of the same version.
    pub theirs: IpAddr,
    /// There is a NAT on the way, so it goes inside UDP: the peer's port for that, as this host sees it.
    pub udp: Option<u16>,
    /// Each opens what comes under its number.
    pub inbound: Vec<EspSa>,
    /// The first seals what goes, once it stands; those behind it do until then.
    pub outbound: Vec<EspSa>,
    /// Packets are longer than 2 KiB, and wear a key out sooner.
    pub large: bool,
}

/// A peer from which this host takes VXLAN, because both ends agreed on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanPeer {
    /// Who.
    pub id: NodeId,
    /// This host's number for it.
    pub number: PeerNumber,
    /// Its MAC on the carrier.
    pub mac: [u8; 6],
    /// Its address on the underlay: the carrier has a device for each IP version.
    pub addr: IpAddr,
    /// How.
    pub seal: Seal,
    /// Packets to it go this way, too. Otherwise they go by `udp`.
    pub carries: bool,
    /// Largest inner packet, octets.
    pub mtu: u16,
}

/// The `vxlan` carrier of a host that has trusted subnets, or does ESP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanView {
    /// The host's own MAC on it.
    pub mac: [u8; 6],
    /// Who it takes packets from, in the order of their ids; their MACs differ.
    pub peers: Vec<VxlanPeer>,
    /// What the kernel needs for those that are sealed, in the same order.
    pub esp: Vec<EspPeer>,
}

/// One peer as `weft peers` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerView {
    /// Who.
    pub id: NodeId,
    /// Over what; `None` while there is no session.
    pub carrier: Option<Carrier>,
    /// Why that one.
    pub why: Why,
    /// How it is reached.
    pub path: Option<Path>,
    /// Smoothed round-trip time, microseconds.
    pub rtt_micros: Option<u64>,
    /// Since the last handshake, milliseconds.
    pub handshake_age_millis: Option<u64>,
    /// Largest inner packet, octets.
    pub mtu: Option<u16>,
    /// All ways that were found and what became of them.
    pub paths: Vec<PathInfo>,
}

/// Everything visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Grows with every change.
    pub revision: u64,
    /// This node.
    pub me: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// The layout of addresses.
    pub plan: AddressPlan,
    /// All admitted nodes, in the order of their ids; the first line of defence when a prefix has no live owner is the
    /// range's own `unreachable` route.
    pub members: Vec<Member>,
    /// Endpoints of nodes that are not Down, in the order of their ids.
    pub endpoints: Vec<Endpoint>,
    /// Services in the order of their names.
    pub services: Vec<Service>,
    /// Manual names in the order of names.
    pub names: Vec<ManualName>,
    /// Networks, `default` first, the others in the order of their names.
    pub networks: Vec<NetworkView>,
    /// Conflicts of published ports.
    pub conflicts: Vec<PublishConflict>,
    /// Removed nodes whose addresses are not back yet.
    pub blocked: Vec<Blocked>,
    /// The `vxlan` carrier; `None` where this host lists no trusted subnet and does no ESP.
    pub vxlan: Option<VxlanView>,
}

/// A removed node's part of the range that nobody may use yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Who was removed.
    pub id: NodeId,
    /// Its name for people.
    pub name: String,
    /// Its part outside the VIPs.
    pub prefixes: Vec<Ipv4Net>,
}

impl View {
    /// What a node sees before it knows of anything: where tests begin that look at a part of it.
    pub fn empty(me: NodeId, cluster: ClusterId, plan: AddressPlan) -> Self {
        Self {
            revision: 0,
            me,
            cluster,
            plan,
            members: Vec::new(),
            endpoints: Vec::new(),
            services: Vec::new(),
            names: Vec::new(),
            networks: Vec::new(),
            conflicts: Vec::new(),
            blocked: Vec::new(),
            vxlan: None,
        }
    }

    /// This node's own entry.
    pub fn me(&self) -> Option<&Member> {
        self.member(&self.me)
    }

    /// What the `vxlan` carrier knows of a peer, if anything.
    pub fn vxlan_peer(&self, id: &NodeId) -> Option<&VxlanPeer> {
        let peers = self.vxlan.iter().flat_map(|vxlan| &vxlan.peers);
        peers.into_iter().find(|peer| peer.id == *id)
    }

    /// The member with this id.
    pub fn member(&self, id: &NodeId) -> Option<&Member> {
        self.members.iter().find(|m| m.id == *id)
    }

    /// Backends of `service` that may get new connections, ordered by address: the order every node computes alike.
    pub fn backends(&self, service: &Service) -> Vec<&Endpoint> {
        let mut found: Vec<&Endpoint> = self
            .endpoints
            .iter()
            .filter(|e| service.selects(e))
            .collect();
        found.sort_by_key(|e| e.ip);
        let answering: Vec<&Endpoint> = found
            .iter()
            .copied()
            .filter(|e| self.answers(&e.node))
            .collect();
        if answering.is_empty() {
            found
        } else {
            answering
        }
    }

    fn answers(&self, node: &NodeId) -> bool {
        self.member(node)
            .is_some_and(|m| m.liveness == Liveness::Alive)
    }
}

/// How long a freed address rests before it is handed out again, so that nobody's cache points at a stranger.
pub const ADDRESS_REST: Duration = Duration::from_secs(60);
