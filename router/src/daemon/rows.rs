//! The view as the API shows it: plain functions from a [`View`] to rows.

use std::collections::{BTreeMap, BTreeSet};

use weft_carrier::{Counters, Dropped, PeerTraffic};
use weft_core::carriers::Why;
use weft_core::control::{
    EndpointRow, FastRow, NameRow, NameSpec, NetworkRow, NodeRow, PathRow, PeerRow, ServiceRow,
    ServiceSpec,
};
use weft_core::layout::{peer_mac, vxlan_mac};
use weft_core::model::{Label, NodeId};
use weft_core::path::{Path, PathInfo};
use weft_core::underlay::{Offload, OffloadState, UnderlayAddr};
use weft_core::view::{
    Blocked, Carrier, Endpoint, EndpointKind, NetworkView, PeerView, Service, View, VxlanView,
};
use weft_kernel::CarrierTraffic;

/// This host's own endpoints of one kind.
pub(crate) fn own_endpoints(view: &View, kind: EndpointKind) -> Vec<&Endpoint> {
    view.endpoints
        .iter()
        .filter(|endpoint| endpoint.node == view.me && endpoint.kind == kind)
        .collect()
}

/// `weft ps`.
pub(crate) fn endpoints(view: &View) -> Vec<EndpointRow> {
    view.endpoints
        .iter()
        .map(|endpoint| endpoint_row(view, endpoint))
        .collect()
}

fn endpoint_row(view: &View, endpoint: &Endpoint) -> EndpointRow {
    EndpointRow {
        id: endpoint.id,
        names: endpoint.names.clone(),
        kind: endpoint.kind,
        ip: endpoint.ip,
        ip6: view.plan.v6(endpoint.ip),
        network: endpoint.network.clone(),
        node: node_name(view, &endpoint.node),
        node_id: endpoint.node.short(),
        local: endpoint.node == view.me,
        labels: endpoint.labels.clone(),
    }
}

/// `weft node ls`.
pub(crate) fn nodes(view: &View) -> Vec<NodeRow> {
    view.members
        .iter()
        .map(|member| NodeRow {
            node: member.id.short(),
            key: member.id.0.iter().map(|b| format!("{b:02x}")).collect(),
            name: member.name.clone(),
            liveness: member.liveness,
            me: member.id == view.me,
            prefixes: member.prefixes.clone(),
            host_addrs: member.host_addrs.clone(),
        })
        .collect()
}

/// What stands in `weft status` of a removed node whose addresses are not back.
pub(crate) fn blocked(blocked: &Blocked) -> String {
    let prefixes: Vec<String> = blocked.prefixes.iter().map(ToString::to_string).collect();
    let name = &blocked.name;
    format!(
        "{name} was removed, and {} can't be used until most of the nodes have agreed; if it is destroyed: weft node rm \
         {name} --force",
        prefixes.join(", ")
    )
}

/// `weft service ls`.
pub(crate) fn services(view: &View) -> Vec<ServiceRow> {
    view.services
        .iter()
        .map(|service| service_row(view, service))
        .collect()
}

/// One service.
pub(crate) fn service_row(view: &View, service: &Service) -> ServiceRow {
    let published = |conflict: &&weft_core::view::PublishConflict| {
        service.ports.iter().any(|port| {
            port.proto == conflict.proto
                && port
                    .publish
                    .iter()
                    .any(|publish| publish.port == conflict.port)
        })
    };
    ServiceRow {
        spec: ServiceSpec {
            name: service.name.clone(),
            ports: service.ports.clone(),
            selector: service.selector.clone(),
            method: service.method,
        },
        vip: service.vip,
        vip6: view.plan.v6(service.vip),
        backends: view
            .backends(service)
            .iter()
            .map(|endpoint| endpoint.ip)
            .collect(),
        conflicts: view
            .conflicts
            .iter()
            .filter(published)
            .map(|c| {
                format!(
                    "{}: {}/{} is held by {}",
                    node_name(view, &c.node),
                    c.port,
                    c.proto,
                    plain(&c.owner)
                )
            })
            .collect(),
    }
}

/// `weft network ls`.
pub(crate) fn networks(view: &View) -> Vec<NetworkRow> {
    view.networks
        .iter()
        .map(|network| network_row(view, network))
        .collect()
}

/// One network.
pub(crate) fn network_row(view: &View, network: &NetworkView) -> NetworkRow {
    NetworkRow {
        net6: view.plan.v6_cover(network.net),
        endpoints: view
            .endpoints
            .iter()
            .filter(|e| e.network == network.name)
            .count(),
        network: network.clone(),
    }
}

/// `weft dns` names.
pub(crate) fn names(view: &View) -> Vec<NameRow> {
    view.names
        .iter()
        .map(|name| NameSpec {
            name: name.name.clone(),
            ip: name.ip,
        })
        .collect()
}

/// `weft peers`: every other member, with what the core knows of the path and the carrier has counted.
pub(crate) fn peers(view: &View, known: &[PeerView], counters: &Counters) -> Vec<PeerRow> {
    view.members
        .iter()
        .filter(|member| member.id != view.me)
        .map(|member| {
            let peer = known.iter().find(|peer| peer.id == member.id);
            let path = peer.and_then(|peer| peer.path);
            let mut counted = counters.peers.iter();
            let traffic = counted.find(|traffic| traffic.number == member.number);
            let sum = |of: fn(&PeerTraffic) -> u64| traffic.map_or(0, of);
            let carrier = match peer.and_then(|p| p.carrier) {
                Some(Carrier::Udp) => "udp",
                Some(Carrier::Vxlan) => "vxlan",
                Some(Carrier::Esp) => "esp",
                None => "-",
            };
            let why = peer.map_or(Why::NoPath, |p| p.why.clone());
            PeerRow {
                node: member.id.short(),
                name: member.name.clone(),
                liveness: member.liveness,
                carrier: carrier.to_owned(),
                carrier_why: why.to_string(),
                path: path.and_then(Path::direct).map(UnderlayAddr::socket),
                tcp: path.and_then(Path::tcp).is_some(),
                relay: path.and_then(Path::relay).map(|by| node_name(view, &by)),
                rtt_ms: peer
                    .and_then(|p| p.rtt_micros)
                    .map(|micros| micros as f64 / 1000.0),
                handshake_age_secs: peer
                    .and_then(|p| p.handshake_age_millis)
                    .map(|millis| millis as f64 / 1000.0),
                tx_packets: sum(|t| t.tx_packets),
                tx_bytes: sum(|t| t.tx_bytes),
                rx_packets: sum(|t| t.rx_packets),
                rx_bytes: sum(|t| t.rx_bytes),
                fast_path: None,
                drops: traffic.map(|t| drops(&t.drops)).unwrap_or_default(),
                offloads: offloads(counters, traffic),
                source_ports: traffic.map_or(1, |t| t.source_ports),
                mtu: peer.and_then(|p| p.mtu),
                paths: peer.map(|p| paths(view, p)).unwrap_or_default(),
            }
        })
        .collect()
}

/// What took the fast path, by either carrier: of the peers to whom it leads now.
pub(crate) fn add_fast_path(
    rows: &mut [PeerRow],
    view: &View,
    led_to: &BTreeSet<[u8; 6]>,
    fast: &BTreeMap<[u8; 6], CarrierTraffic>,
) {
    for row in rows {
        let mut members = view.members.iter();
        let Some(member) = members.find(|member| member.id.short() == row.node) else {
            continue;
        };
        let macs = [peer_mac(member.number), vxlan_mac(&member.id)];
        if macs.iter().any(|mac| led_to.contains(mac)) {
            let taken = || macs.iter().filter_map(|mac| fast.get(mac));
            row.fast_path = Some(FastRow {
                tx_packets: taken().map(|fast| fast.tx_packets).sum(),
                rx_packets: taken().map(|fast| fast.rx_packets).sum(),
            });
        }
    }
}

/// What the kernel carried by itself counts like what went through weft.
pub(crate) fn add_vxlan(
    rows: &mut [PeerRow],
    vxlan: &VxlanView,
    counted: &BTreeMap<[u8; 6], CarrierTraffic>,
) {
    for row in rows {
        let peer = vxlan.peers.iter().find(|peer| peer.id.short() == row.node);
        let Some(traffic) = peer.and_then(|peer| counted.get(&peer.mac)) else {
            continue;
        };
        row.tx_packets += traffic.tx_packets;
        row.tx_bytes += traffic.tx_octets;
        row.rx_packets += traffic.rx_packets;
        row.rx_bytes += traffic.rx_octets;
    }
}

fn paths(view: &View, peer: &PeerView) -> Vec<PathRow> {
    let row = |known: &PathInfo| PathRow {
        path: known.path.direct().map(UnderlayAddr::socket),
        tcp: known.path.tcp().is_some(),
        relay: known.path.relay().map(|by| node_name(view, &by)),
        in_use: known.in_use,
        answered: known.answered,
        unanswered: known.unanswered,
        rtt_ms: known.rtt_micros.map(|micros| micros as f64 / 1000.0),
    };
    peer.paths.iter().map(row).collect()
}

/// Drops by the names of their reasons.
pub(crate) fn drops(drops: &[(Dropped, u64)]) -> BTreeMap<String, u64> {
    let named = |(reason, count): &(Dropped, u64)| (reason.name().to_owned(), *count);
    drops.iter().map(named).collect()
}

/// Those of the host, and whether datagrams are sent to this peer in runs.
fn offloads(counters: &Counters, traffic: Option<&PeerTraffic>) -> BTreeMap<Offload, OffloadState> {
    let mut offloads: BTreeMap<_, _> = counters.offloads.iter().copied().collect();
    let gso = offloads.get_mut(&Offload::Gso);
    if let (Some(state @ OffloadState::On), Some(traffic)) = (gso, traffic) {
        *state = traffic.gso;
    }
    offloads
}

/// A member's name, or its short id where the name has not arrived yet (a short id is a valid label).
pub(crate) fn node_name(view: &View, id: &NodeId) -> Label {
    match view.member(id) {
        Some(member) => member.name.clone(),
        None => Label::parse(&id.short()).expect("base32 in lower case is a label"),
    }
}

/// Another host's words, without what could steer a terminal.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(120).collect()
}
