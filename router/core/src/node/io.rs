//! What goes into a [`super::Node`] and what comes out.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use crate::carriers::{Devices, Esp, EspState};
use crate::control::{ErrorKind, NameSpec, NetworkSpec, ServiceSpec, TokenRequest};
use crate::crypto::Cipher;
use crate::model::{
    EndpointId, EndpointName, Label, NetworkName, NodeId, NodeName, Proto, ServiceName, WallMicros,
};
use crate::path::Path;
use crate::store::Batch;
use crate::token::Token;
use crate::underlay::UnderlayAddr;
use crate::view::{Endpoint, EndpointKind, NetworkView, PeerNumber, PublishConflict, Service};

/// What a node is told at birth.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its name for people when it has none yet.
    pub name: NodeName,
    /// The name was asked for: it replaces the one that the node had.
    pub rename: bool,
    /// The AEAD it prefers (the shell knows whether the CPU has AES).
    pub cipher: Cipher,
    /// Addresses of the host for published ports.
    pub host_addrs: Vec<IpAddr>,
    /// Where peers may reach it, best first.
    pub underlay: Vec<SocketAddr>,
    /// The port at those addresses where it listens for TCP connections.
    pub tcp_port: Option<NonZeroU16>,
    /// It passes on datagrams between members that don't reach each other.
    pub relay: bool,
    /// Networks of the underlay that this host trusts with plain packets.
    pub trusted_subnets: Vec<IpNet>,
    /// Whether its kernel may seal VXLAN.
    pub esp: Esp,
}

/// How a node comes into its cluster.
#[derive(Debug)]
pub enum Start {
    /// It founds one over this range.
    Found {
        /// All addresses of the cluster.
        range: Ipv4Net,
    },
    /// It was invited.
    Join {
        /// The invitation.
        token: Box<Token>,
    },
    /// It is a member already: all is in what was stored.
    Resume,
}

/// Something happened.
#[derive(Debug)]
pub enum Input<'a> {
    /// A datagram of any type came. Sealed ones may come this way too (the simulator has no carrier).
    Datagram {
        /// How it came.
        from: Path,
        /// Its octets, opened in place.
        bytes: &'a mut [u8],
    },
    /// The carrier opened a frame that is not a packet.
    Opened {
        /// The session's index on this side.
        local_index: u32,
        /// How it came.
        from: Path,
        /// The frame's kind.
        kind: u8,
        /// The frame's body.
        body: &'a [u8],
    },
    /// The carrier has packets for a peer and no session to seal them with.
    Wanted(PeerNumber),
    /// Authenticated packets came by another way than the session's path.
    Moved {
        /// The session's index on this side.
        local_index: u32,
        /// How they came.
        from: Path,
    },
    /// The connection with this far end, along which something authentic had come, is gone.
    ConnectionLost(SocketAddr),
    /// The batch with this id is on stable storage.
    Persisted(u64),
    /// The wall clock's reading now; the shell gives it at least every few seconds.
    Wall(WallMicros),
    /// This may be a copy of a machine that goes on elsewhere (a snapshot resumed, a clock that jumped): all keys and
    /// the generator are made anew from this seed before anything else is sent.
    Snapshot([u8; 32]),
    /// The host's addresses changed.
    HostAddrs {
        /// For published ports.
        host: Vec<IpAddr>,
        /// For peers, best first.
        underlay: Vec<SocketAddr>,
    },
    /// The largest IP packet that the host sends to this address in one piece, octets.
    PathMtu {
        /// A peer's address.
        addr: SocketAddr,
        /// Octets, IP header included.
        mtu: u16,
    },
    /// The host's own address from which it sends to this one.
    PathSource {
        /// A peer's address.
        addr: SocketAddr,
        /// The host's.
        source: IpAddr,
    },
    /// The `vxlan` carrier's devices are up behind their filter, or why not.
    VxlanDevices(Devices),
    /// What the kernel has of the keys for ESP.
    Esp(EspState),
    /// The kernel opened ESP of this peer's that a NAT sent from another port than was known.
    EspPort {
        /// Whose.
        peer: PeerNumber,
        /// From where it came.
        from: (IpAddr, u16),
    },
    /// A probe came over it.
    VxlanProbe {
        /// The MAC that the frame says it is from.
        from: [u8; 6],
        /// What it carries.
        nonce: u64,
    },
    /// A person or a program asks; the answer comes as [`Output::Reply`] under the same number.
    Command(u64, Command),
    /// The answer to [`Output::CheckPublish`]: who holds the port, if anybody.
    PublishChecked {
        /// The number of the question.
        ask: u64,
        /// The owner.
        owner: Option<String>,
    },
    /// Published ports that this host can't serve.
    Conflicts(Vec<(Proto, u16, String)>),
    /// Go: tell the peers, then [`Output::Left`].
    Leave,
}

/// An effect that the shell carries out. Nothing has happened yet.
#[derive(Debug)]
pub enum Output {
    /// Send this datagram as it is.
    Send {
        /// Where.
        to: UnderlayAddr,
        /// What.
        datagram: Vec<u8>,
    },
    /// Write this batch and say [`Input::Persisted`] when it can't be lost any more.
    Persist(u64, Batch),
    /// Send a probe over the `vxlan` carrier.
    VxlanProbe {
        /// The peer's address, whose version says by which device.
        host: IpAddr,
        /// The peer's MAC there.
        to: [u8; 6],
        /// This host's.
        from: [u8; 6],
        /// What it carries.
        nonce: u64,
        /// How long the frame is, Ethernet header included, octets.
        length: u16,
    },
    /// The table of sessions and paths changed: see [`super::Node::tunnels`].
    Tunnels,
    /// What is visible changed: see [`super::Node::view`].
    View,
    /// The answer to a command.
    Reply(u64, Result<Reply, CommandError>),
    /// Is one of these ports free on this host? Answer with [`Input::PublishChecked`].
    CheckPublish {
        /// The number of the question.
        ask: u64,
        /// Protocol, address, port.
        ports: Vec<(Proto, Option<IpAddr>, u16)>,
    },
    /// The node is a member and may allocate.
    Ready,
    /// The node could not join; it is dead.
    JoinFailed(JoinFailure),
    /// Something a person must know: a clone, a forked roster. One line.
    Alarm(String),
    /// The peers have been told; the shell may stop.
    Left,
}

/// Why joining failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinFailure {
    /// A member said so, under the token's secret.
    Refused(String),
    /// Nobody answered at these addresses.
    NoAnswer {
        /// All that were tried.
        tried: Vec<UnderlayAddr>,
        /// For how long.
        after: Duration,
    },
}

/// What people and programs ask of a node.
#[derive(Clone, Debug)]
pub enum Command {
    /// Give an address and a name to an attachment.
    Attach {
        /// Container or host.
        kind: EndpointKind,
        /// Names.
        names: Vec<EndpointName>,
        /// The network.
        network: NetworkName,
        /// This address and no other.
        ip: Option<Ipv4Addr>,
        /// Labels for selectors.
        labels: BTreeMap<String, String>,
    },
    /// Take back what `Attach` gave. Asking twice is fine.
    Release(EndpointId),
    /// Make a service.
    CreateService(ServiceSpec),
    /// Change one.
    UpdateService(ServiceSpec),
    /// Remove one.
    RemoveService(ServiceName),
    /// Bind a name.
    AddName(NameSpec),
    /// Unbind it.
    RemoveName(Label),
    /// Make a network.
    CreateNetwork(NetworkSpec),
    /// Remove one that nothing is in.
    RemoveNetwork(NetworkName),
    /// Make an invitation.
    MintToken(TokenRequest),
    /// Remove a member for good.
    RemoveNode {
        /// Its name or its id.
        node: String,
        /// It is destroyed: its addresses come back whoever agrees.
        force: bool,
    },
    /// Leave for good. Everything but the reply stops.
    LeaveForGood,
}

/// What they get.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Of `Attach`.
    Attached(Endpoint),
    /// Of `CreateService` and `UpdateService`.
    Service(Service),
    /// Of `CreateNetwork`.
    Network(NetworkView),
    /// Of `MintToken`: the text. It is a secret.
    Token(String),
    /// Of `RemoveNode`: all its addresses are back.
    Removed {
        /// Who.
        node: NodeId,
        /// What people called it.
        name: String,
    },
    /// Of the rest.
    Done,
}

/// Why a command failed. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct CommandError {
    /// What sort.
    pub kind: ErrorKind,
    /// One line that says what to do.
    pub text: String,
}

impl CommandError {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }
}

/// Questions between members, inside `Message::Ask`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Ask {
    /// Give me this address of yours.
    Address(Ipv4Addr),
    /// Give me some free space: of the VIPs or of the default network.
    Space {
        /// Of the VIPs.
        vips: bool,
    },
    /// Count one use of a token you issued.
    CountUse {
        /// Its id.
        token: [u8; 16],
        /// When it ends, seconds since 1970.
        expiry: u64,
        /// Who used it.
        joiner: NodeId,
        /// How many uses it is good for.
        uses: u32,
    },
    /// Can you serve these published ports?
    Publish(Vec<(Proto, Option<IpAddr>, u16)>),
    /// I leave for good: the roster record that says so.
    Farewell(Vec<u8>),
    /// Give me some free space of this network.
    SpaceIn(Ipv4Net),
    /// Give me all that you own of this block, so that I can make a network of it.
    Block(Ipv4Net),
}

/// Their answers, inside `Message::Answer`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Answer {
    /// Done; what was given follows as records.
    Granted,
    /// No, and why.
    No(String),
    /// Your port is held by somebody here.
    Held(String),
}

/// What [`super::Node::tunnels`] says of one peer.
#[derive(Clone, Debug)]
pub struct Tunnel {
    /// Who.
    pub peer: NodeId,
    /// This host's number for it.
    pub number: PeerNumber,
    /// How to send.
    pub path: Option<Path>,
    /// The newest session, to seal with.
    pub transport: Option<std::sync::Arc<crate::session::transport::Transport>>,
    /// All sessions that may still be received on.
    pub receivers: Vec<std::sync::Arc<crate::session::transport::Transport>>,
    /// Inner sources it may use.
    pub prefixes: Vec<Ipv4Net>,
    /// Largest inner packet the path takes, octets.
    pub mtu: Option<u16>,
}

/// A conflict as it is stored per node.
pub(crate) type ConflictKey = (Proto, u16);

/// Turns the shell's list into records' values.
pub(crate) fn conflicts_of(
    node: NodeId,
    list: &[(Proto, u16, String)],
) -> BTreeMap<ConflictKey, PublishConflict> {
    list.iter()
        .map(|(proto, port, owner)| {
            (
                (*proto, *port),
                PublishConflict {
                    node,
                    proto: *proto,
                    port: *port,
                    owner: owner.clone(),
                },
            )
        })
        .collect()
}
