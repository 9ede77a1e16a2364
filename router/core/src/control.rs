//! Messages of the local control socket: what `weft`'s own subcommands and `weft-cni` say to the daemon, as JSON bodies
//! of HTTP requests under `/v1`.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | GET `/v1/status` | - | [`Status`] |
//! | GET `/v1/peers` | - | `[PeerRow]` |
//! | GET `/v1/endpoints` | - | `[EndpointRow]` |
//! | GET `/v1/services` | - | `[ServiceRow]` |
//! | GET `/v1/nodes` | - | `[NodeRow]` |
//! | GET `/v1/names` | - | `[NameRow]` |
//! | GET `/v1/networks` | - | `[NetworkRow]` |
//! | POST `/v1/token` | [`TokenRequest`] | [`TokenReply`] |
//! | POST `/v1/attach` | [`AttachRequest`] | [`Attached`] |
//! | POST `/v1/detach` | [`DetachRequest`] | [`Detached`] |
//! | POST `/v1/check` | [`CheckRequest`] | [`Attached`] |
//! | POST `/v1/services` | [`ServiceSpec`] | [`ServiceRow`] |
//! | PUT `/v1/services/{name}` | [`ServiceSpec`] | [`ServiceRow`] |
//! | DELETE `/v1/services/{name}` | - | `{}` |
//! | POST `/v1/names` | [`NameSpec`] | [`NameRow`] |
//! | DELETE `/v1/names/{name}` | - | `{}` |
//! | POST `/v1/networks` | [`NetworkSpec`] | [`NetworkRow`] |
//! | DELETE `/v1/networks/{name}` | - | `{}` |
//! | POST `/v1/nodes/remove` | [`RemoveRequest`] | [`Removed`] |
//! | POST `/v1/leave` | - | `{}`, once another node has heard it |
//! | POST `/v1/down` | - | `{}`, once all is removed |
//! | GET `/v1/asked` | - | flags and environment of `weft up`, for `weft restart` |
//! | POST `/v1/handover` | - | 101, an upgrade to `weft-handover`, between two daemons only |
//!
//! Errors come with a fitting HTTP status and an [`ErrorBody`]. A body is at most [`MAX_BODY`] octets.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::model::{EndpointId, Label, NetworkName, Proto, ServiceName};
use crate::underlay::{Offload, OffloadState};
use crate::view::{EndpointKind, Liveness, Method, NetworkView, ServicePort};

/// Largest body either side reads, octets.
pub const MAX_BODY: usize = 1 << 20;
/// The socket's name in the run directory.
pub const SOCKET: &str = "weft.sock";

/// One clear line that says what is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorBody {
    /// For people.
    pub error: String,
    /// For programs.
    pub kind: ErrorKind,
}

/// What sort of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong (HTTP 400).
    Invalid,
    /// Nothing by that name (404).
    NotFound,
    /// Taken, in use, or in the wrong state (409).
    Conflict,
    /// Not now: try again later (503).
    Unavailable,
    /// The kernel or the disk refused (500).
    Internal,
}

/// Asks for an invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Seconds that it stays valid.
    pub ttl_secs: u64,
    /// How many hosts may join with it; ignored when `reusable`.
    pub uses: u32,
    /// Any number of hosts until it expires.
    pub reusable: bool,
}

/// An invitation.
#[derive(Clone, Serialize, Deserialize)]
pub struct TokenReply {
    /// The text to hand to `weft up --join`.
    pub token: String,
}

/// Removes a node for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveRequest {
    /// Its name or its id.
    pub node: String,
    /// It is destroyed: its addresses come back whoever agrees.
    #[serde(default)]
    pub force: bool,
}

/// A node was removed, and its addresses are back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Short id.
    pub node: String,
    /// What it was called.
    pub name: String,
}

/// How to find the network namespace to attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// A namespace file, such as `/run/netns/blue`.
    Netns(String),
    /// The namespace of a process.
    Pid(u32),
}

/// Attaches one network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Which namespace.
    pub target: Target,
    /// Names; the first is shown as the endpoint's.
    #[serde(default)]
    pub names: Vec<Label>,
    /// Network, `default` when absent.
    #[serde(default)]
    pub network: Option<NetworkName>,
    /// This address and no other.
    #[serde(default)]
    pub ip: Option<Ipv4Addr>,
    /// Interface inside.
    #[serde(default = "default_ifname")]
    pub ifname: String,
    /// Labels for selectors.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The container's id where a runtime gave one (CNI): the key for `detach`, `check` and garbage collection.
    #[serde(default)]
    pub container_id: Option<String>,
}

fn default_ifname() -> String {
    "eth0".to_owned()
}

/// What an attachment got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The endpoint.
    pub id: EndpointId,
    /// Its addresses; /32 and /128 inside.
    pub ip: Ipv4Addr,
    /// The derived IPv6 address.
    pub ip6: Ipv6Addr,
    /// Link-local default gateway.
    pub gateway: Ipv4Addr,
    /// The same for IPv6.
    pub gateway6: Ipv6Addr,
    /// Interface inside.
    pub ifname: String,
    /// Its MAC.
    pub mac: String,
    /// The host side's name, in the domain.
    pub leg: String,
    /// MTU of the interface.
    pub mtu: u32,
    /// The name server to use.
    pub dns: Ipv4Addr,
    /// The search domain.
    pub domain: String,
    /// Names it answers to.
    pub names: Vec<Label>,
    /// The network.
    pub network: NetworkName,
}

/// Which attachment is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    /// By endpoint.
    Id(EndpointId),
    /// By namespace or process, and interface.
    Target(Target, String),
    /// By container id and interface, as CNI does.
    Container(String, String),
    /// All of this host's whose container id begins with the first text and whose (container id, interface) is not in
    /// the list: CNI's GC, which speaks for one network configuration only.
    AllContainersBut(String, Vec<(String, String)>),
}

/// Detaches. Asking for what is already gone succeeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachRequest {
    /// Which.
    pub which: Which,
}

/// What was detached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// The endpoints that went.
    pub ids: Vec<EndpointId>,
}

/// Checks that an attachment is still as it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// Which (one attachment).
    pub which: Which,
}

/// A service as a person describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Its name.
    pub name: ServiceName,
    /// Its ports with what is published.
    pub ports: Vec<ServicePort>,
    /// Labels that backends must have; empty = by name.
    #[serde(default)]
    pub selector: BTreeMap<String, String>,
    /// How it spreads.
    #[serde(default)]
    pub method: Method,
}

/// One row of `weft service ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRow {
    /// As described.
    #[serde(flatten)]
    pub spec: ServiceSpec,
    /// Virtual address.
    pub vip: Ipv4Addr,
    /// Virtual IPv6 address.
    pub vip6: Ipv6Addr,
    /// Live backends.
    pub backends: Vec<Ipv4Addr>,
    /// `node: port/proto is held by owner`.
    pub conflicts: Vec<String>,
}

/// A network as a person describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name.
    pub name: NetworkName,
    /// Its size as a prefix length; a 256th of the range when absent.
    #[serde(default)]
    pub prefix_len: Option<u8>,
    /// These addresses and no others; excludes `prefix_len`.
    #[serde(default)]
    pub subnet: Option<Ipv4Net>,
}

/// One row of `weft network ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRow {
    /// As the node sees it.
    #[serde(flatten)]
    pub network: NetworkView,
    /// Its IPv6 addresses.
    pub net6: Ipv6Net,
    /// Live endpoints in it, on all nodes.
    pub endpoints: usize,
}

/// Binds a name to an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameSpec {
    /// The label under `weft.internal`.
    pub name: Label,
    /// The address.
    pub ip: IpAddr,
}

/// One bound name.
pub type NameRow = NameSpec;

/// `weft status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// This node's short id.
    pub node: String,
    /// Its name.
    pub name: Label,
    /// The cluster.
    pub cluster: String,
    /// The daemon's process.
    pub pid: u32,
    /// Seconds since it is up.
    pub uptime_secs: u64,
    /// Underlay port.
    pub port: u16,
    /// The port where TCP connections are taken, if any are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_port: Option<u16>,
    /// The range.
    pub range: Ipv4Net,
    /// The host's own overlay address.
    pub host_ip: Option<Ipv4Addr>,
    /// DNS.
    pub dns: Ipv4Addr,
    /// The domain's namespace name.
    pub netns: String,
    /// Alive members, this one included.
    pub nodes_alive: usize,
    /// All members.
    pub nodes: usize,
    /// Local attachments.
    pub endpoints_local: usize,
    /// All visible endpoints.
    pub endpoints: usize,
    /// Services.
    pub services: usize,
    /// Which cipher the tunnels use.
    pub cipher: String,
    /// Packets and datagrams that the packet path dropped, by reason, those of peers included.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
    /// What was added on the host beside weft's own table (docker's chain, sysctls …), one line each.
    pub host_changes: Vec<String>,
    /// What a person should know, one line each; empty when all is well.
    pub warnings: Vec<String>,
}

/// One row of `weft peers`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerRow {
    /// Short id.
    pub node: String,
    /// Name.
    pub name: Label,
    /// State.
    pub liveness: Liveness,
    /// `udp`, `vxlan` or `esp`, or `-` while there is none.
    pub carrier: String,
    /// Why that one, in words.
    pub carrier_why: String,
    /// Address in use; none where a member stands between.
    pub path: Option<SocketAddr>,
    /// It is the far end of a TCP connection; otherwise it is sent to by UDP.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tcp: bool,
    /// The name of the member that stands between, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Label>,
    /// Milliseconds.
    pub rtt_ms: Option<f64>,
    /// Seconds.
    pub handshake_age_secs: Option<f64>,
    /// Packets sent inside the tunnel.
    #[serde(default)]
    pub tx_packets: u64,
    /// Their octets.
    pub tx_bytes: u64,
    /// Packets received inside the tunnel.
    #[serde(default)]
    pub rx_packets: u64,
    /// Their octets.
    pub rx_bytes: u64,
    /// How many of them the kernel sent straight on between a container and a carrier, while it does so at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fast_path: Option<FastRow>,
    /// Packets and datagrams to it or from it that were dropped, by reason.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
    /// Largest inner packet.
    pub mtu: Option<u16>,
    /// All ways to it that were found, in the order in which they are called.
    #[serde(default)]
    pub paths: Vec<PathRow>,
    /// Which offloads are in use for it, and why others are not.
    #[serde(default)]
    pub offloads: BTreeMap<Offload, OffloadState>,
    /// Source ports that flows to it are spread over (`--source-ports`, as far as they reach it).
    #[serde(default)]
    pub source_ports: u8,
}

/// What took the fast path; a super-packet is one packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FastRow {
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets received.
    pub rx_packets: u64,
}

/// One way to a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathRow {
    /// An address, or
    pub path: Option<SocketAddr>,
    /// (of a TCP connection, if this is set)
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tcp: bool,
    /// the name of a member that would stand between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Label>,
    /// It is the one that is taken.
    pub in_use: bool,
    /// It has answered.
    pub answered: bool,
    /// Questions since the last answer.
    pub unanswered: u32,
    /// Milliseconds.
    pub rtt_ms: Option<f64>,
}

/// One row of `weft ps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// Endpoint.
    pub id: EndpointId,
    /// Names.
    pub names: Vec<Label>,
    /// Container or host.
    pub kind: EndpointKind,
    /// IPv4.
    pub ip: Ipv4Addr,
    /// IPv6.
    pub ip6: Ipv6Addr,
    /// Network.
    pub network: NetworkName,
    /// The node's name.
    pub node: Label,
    /// Short id of the node.
    pub node_id: String,
    /// Is it on this host?
    pub local: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// One row of `weft node ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Short id.
    pub node: String,
    /// Whole key, hexadecimal.
    pub key: String,
    /// Name.
    pub name: Label,
    /// State.
    pub liveness: Liveness,
    /// This host?
    pub me: bool,
    /// Parts of the range it owns.
    pub prefixes: Vec<Ipv4Net>,
    /// Addresses of the host.
    pub host_addrs: Vec<IpAddr>,
}

/// Parses `P[:TARGET][/udp]`, as `weft service create --port` takes it: (port, target, protocol).
pub fn parse_port(text: &str) -> Result<(u16, u16, Proto), String> {
    let (numbers, proto) = split_proto(text)?;
    let (port, target) = numbers.split_once(':').unwrap_or((numbers, numbers));
    Ok((port_number(port, text)?, port_number(target, text)?, proto))
}

/// Parses `[ADDR:]P:PORT[/udp]`, as `--publish` takes it: (address, host port, service port, protocol). An IPv6 address
/// stands in brackets.
pub fn parse_publish(text: &str) -> Result<(Option<IpAddr>, u16, u16, Proto), String> {
    let (rest, proto) = split_proto(text)?;
    let mut parts = rest.rsplitn(3, ':');
    let port = parts.next().unwrap_or_default();
    let host_port = parts
        .next()
        .ok_or_else(|| format!("\"{text}\": want [ADDR:]HOSTPORT:PORT[/udp], such as 8080:80"))?;
    let addr = parts.next().map(|a| parse_addr(a, text)).transpose()?;
    Ok((
        addr,
        port_number(host_port, text)?,
        port_number(port, text)?,
        proto,
    ))
}

fn parse_addr(addr: &str, text: &str) -> Result<IpAddr, String> {
    let bare = addr
        .strip_prefix('[')
        .and_then(|a| a.strip_suffix(']'))
        .unwrap_or(addr);
    bare.parse()
        .map_err(|_| format!("\"{text}\": \"{addr}\" is not an IP address"))
}

fn split_proto(text: &str) -> Result<(&str, Proto), String> {
    match text.split_once('/') {
        None => Ok((text, Proto::Tcp)),
        Some((rest, "tcp")) => Ok((rest, Proto::Tcp)),
        Some((rest, "udp")) => Ok((rest, Proto::Udp)),
        Some((_, other)) => Err(format!("\"{text}\": \"{other}\" is neither tcp nor udp")),
    }
}

fn port_number(port: &str, text: &str) -> Result<u16, String> {
    match port.parse::<u16>() {
        Ok(0) | Err(_) => Err(format!(
            "\"{text}\": \"{port}\" is not a port from 1 to 65535"
        )),
        Ok(number) => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_publications_are_read_as_the_contract_writes_them() {
        assert_eq!(parse_port("80"), Ok((80, 80, Proto::Tcp)));
        assert_eq!(parse_port("80:8000/udp"), Ok((80, 8000, Proto::Udp)));
        assert_eq!(parse_publish("8080:80"), Ok((None, 8080, 80, Proto::Tcp)));
        assert_eq!(
            parse_publish("192.0.2.1:53:53/udp"),
            Ok((Some("192.0.2.1".parse().unwrap()), 53, 53, Proto::Udp))
        );
        assert_eq!(
            parse_publish("[2001:db8::1]:1:2"),
            Ok((Some("2001:db8::1".parse().unwrap()), 1, 2, Proto::Tcp))
        );
        for bad in ["", "0", "70000", "80/sctp", "a:b", "80:"] {
            assert!(parse_port(bad).is_err(), "{bad}");
        }
        for bad in ["", "80", "x:80:80", "80:0", "1.2.3:80:80"] {
            assert!(parse_publish(bad).is_err(), "{bad}");
        }
    }
}
