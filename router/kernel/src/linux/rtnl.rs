//! Links, addresses, routes, rules and neighbours by rtnetlink, in blocking steps.
//!
//! The one module that names rtnetlink, whose interface changes every few months. A [`Rtnl`] belongs to the namespace
//! of the thread that opened it and brings its own small runtime, so it must not be used on a thread of tokio's.

mod classifier;
mod route;
mod rule;
mod vxlan;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

pub(crate) use self::route::KernelRoute;
use self::route::{read_route, route_message};
use self::rule::{read_rule, rule_message};
pub(crate) use self::vxlan::Vxlan;
use super::sys;
use crate::state::{Family, Route, RouteKey, Rule};

const ADD: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// The queue that drops everything, until the kernel's worker for links puts the real one in its place.
const NO_QUEUE_YET: &str = "noop";
/// The kernel's worker for links runs at most once a second when it is pressed.
const PATIENCE: Duration = Duration::from_secs(3);
const SET: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: Vec<u8>,
    /// Administratively up.
    pub(crate) up: bool,
    /// Up, and the other side is there.
    pub(crate) carrier: bool,
    /// The kernel has noticed the carrier and lets packets out: before, they vanish in a queue that is none.
    pub(crate) running: bool,
    pub(crate) loopback: bool,
    pub(crate) kind: Option<InfoKind>,
    /// It is a port of a bridge, bond or VRF.
    pub(crate) enslaved: bool,
    /// It is a VXLAN device; how it was made.
    pub(crate) vxlan: Option<Vxlan>,
}

/// One address.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    pub(crate) device: u32,
    pub(crate) net: IpNet,
    pub(crate) flags: AddressFlags,
}

/// One end of a veth pair.
pub(crate) struct VethEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: [u8; 6],
    /// Born in this namespace; the socket's when absent.
    pub(crate) namespace: Option<BorrowedFd<'a>>,
}

pub(crate) struct Rtnl {
    runtime: tokio::runtime::Runtime,
    handle: rtnetlink::Handle,
}

impl Rtnl {
    /// Opens a socket in the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let entered = runtime.enter();
        let (connection, handle, _) = rtnetlink::new_connection()?;
        drop(entered);
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    fn talk(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut handle = self.handle.clone();
        self.runtime.block_on(async move {
            let mut answers = handle.request(request).map_err(io::Error::other)?;
            let mut found = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    _ => {}
                }
            }
            Ok(found)
        })
    }

    fn act(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.talk(message, NLM_F_ACK | flags).map(drop)
    }

    // Links

    pub(crate) fn links(&self) -> io::Result<Vec<Link>> {
        let answers = self.talk(
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            NLM_F_DUMP,
        )?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewLink(link) => read_link(link),
                _ => None,
            })
            .collect())
    }

    /// Asks for one device. Unlike the list of all, since Linux 6.8 the answer is given only after the kernel has acted
    /// on a carrier that just came.
    pub(crate) fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        let answers = match self.talk(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            other => other?,
        };
        Ok(answers.into_iter().find_map(|m| match m {
            RouteNetlinkMessage::NewLink(link) => read_link(link),
            _ => None,
        }))
    }

    /// Makes a veth pair, both ends with their final names, MACs and MTU: udev would rewrite a MAC set later.
    pub(crate) fn add_veth(
        &self,
        near: &VethEnd<'_>,
        far: &VethEnd<'_>,
        mtu: u32,
    ) -> io::Result<()> {
        let mut message = veth_end(near, mtu);
        let data = InfoData::Veth(InfoVeth::Peer(veth_end(far, mtu)));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(data),
        ]));
        self.act(RouteNetlinkMessage::NewLink(message), ADD)
    }

    pub(crate) fn set_up(&self, index: u32) -> io::Result<()> {
        self.set_flags(index, LinkFlags::Up)
    }

    pub(crate) fn set_down(&self, index: u32) -> io::Result<()> {
        self.set_flags(index, LinkFlags::empty())
    }

    fn set_flags(&self, index: u32, flags: LinkFlags) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = LinkFlags::Up;
        self.act(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Waits until a device whose both ends were just set up lets packets out. The kernel does that on a worker of its
    /// own, a moment after it has answered.
    pub(crate) fn wait_running(&self, name: &str) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.link(name)?.is_some_and(|l| l.running) {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sys::readable(&[], Some(Duration::from_millis(1)))?;
        }
        Ok(())
    }

    /// Deletes a device by name; that it is gone already is no error.
    pub(crate) fn delete_link(&self, name: &str) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        match self.act(RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    // Addresses

    pub(crate) fn addresses(&self) -> io::Result<Vec<Address>> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.talk(message, NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewAddress(address) => read_address(&address),
                _ => None,
            })
            .collect())
    }

    /// Adds an address at once usable: there is no duplicate to detect where each address has one owner.
    pub(crate) fn add_address(&self, device: u32, net: IpNet) -> io::Result<()> {
        let mut message = address_message(device, net);
        if matches!(net, IpNet::V6(_)) {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        match self.act(RouteNetlinkMessage::NewAddress(message), ADD) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn delete_address(&self, device: u32, net: IpNet) -> io::Result<()> {
        let message = address_message(device, net);
        match self.act(RouteNetlinkMessage::DelAddress(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    // Neighbours

    /// Permanent neighbours, as (device, address, MAC).
    pub(crate) fn neighbours(&self) -> io::Result<Vec<(u32, IpAddr, [u8; 6])>> {
        let message = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let answers = self.talk(message, NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewNeighbour(neighbour) => read_neighbour(&neighbour),
                _ => None,
            })
            .collect())
    }

    pub(crate) fn set_neighbour(&self, device: u32, ip: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = neighbour_message(device, ip);
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.act(RouteNetlinkMessage::NewNeighbour(message), SET)
    }

    pub(crate) fn delete_neighbour(&self, device: u32, ip: IpAddr) -> io::Result<()> {
        let message = neighbour_message(device, ip);
        match self.act(RouteNetlinkMessage::DelNeighbour(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    // Routes

    pub(crate) fn routes(&self, family: Family) -> io::Result<Vec<KernelRoute>> {
        let mut message = RouteMessage::default();
        message.header.address_family = address_family(family);
        let answers = self.talk(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewRoute(route) => read_route(route),
                _ => None,
            })
            .collect())
    }

    /// Adds or replaces a route; `device` is the index of the one that it names.
    pub(crate) fn set_route(
        &self,
        key: &RouteKey,
        route: &Route,
        device: Option<u32>,
    ) -> io::Result<()> {
        self.act(
            RouteNetlinkMessage::NewRoute(route_message(key, Some((route, device)))),
            SET,
        )
    }

    /// Adds a route where none is yet.
    pub(crate) fn add_route(
        &self,
        key: &RouteKey,
        route: &Route,
        device: Option<u32>,
    ) -> io::Result<()> {
        self.act(
            RouteNetlinkMessage::NewRoute(route_message(key, Some((route, device)))),
            ADD,
        )
    }

    pub(crate) fn delete_route(&self, key: &RouteKey) -> io::Result<()> {
        let message = RouteNetlinkMessage::DelRoute(route_message(key, None));
        match self.act(message, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    // Rules

    pub(crate) fn rules(&self, family: Family) -> io::Result<Vec<Rule>> {
        let mut message = RuleMessage::default();
        message.header.family = address_family(family);
        let answers = self.talk(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewRule(rule) => read_rule(family, &rule),
                _ => None,
            })
            .collect())
    }

    pub(crate) fn add_rule(&self, rule: &Rule) -> io::Result<()> {
        match self.act(RouteNetlinkMessage::NewRule(rule_message(rule)), ADD) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    pub(crate) fn delete_rule(&self, rule: &Rule) -> io::Result<()> {
        match self.act(RouteNetlinkMessage::DelRule(rule_message(rule)), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn read_link(message: LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        running: false,
        loopback: flags.contains(LinkFlags::Loopback),
        kind: None,
        enslaved: false,
        vxlan: None,
    };
    let (mut operational, mut queue) = (false, String::new());
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::OperState(state) => operational = state == State::Up,
            LinkAttribute::Qdisc(name) => queue = name,
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Controller(index) => link.enslaved = index != 0,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = Some(kind),
                        LinkInfo::Data(InfoData::Vxlan(data)) => {
                            link.vxlan = Some(vxlan::read_vxlan(&data));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // The flag IFF_RUNNING says yes also while the state is still unknown.
    link.running = link.carrier && operational && queue != NO_QUEUE_YET;
    (!link.name.is_empty()).then_some(link)
}

fn veth_end(end: &VethEnd<'_>, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(end.name.to_owned()),
        LinkAttribute::Address(end.mac.to_vec()),
        LinkAttribute::Mtu(mtu),
    ];
    if let Some(namespace) = end.namespace {
        message
            .attributes
            .push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    }
    message
}

fn address_message(device: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = address_family(Family::of_net(&net));
    message.header.index = device;
    message.header.prefix_len = net.prefix_len();
    message.header.scope = match net.addr() {
        IpAddr::V4(ip) if ip.is_link_local() => AddressScope::Link,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => AddressScope::Link,
        _ => AddressScope::Universe,
    };
    message.attributes = vec![
        AddressAttribute::Address(net.addr()),
        AddressAttribute::Local(net.addr()),
    ];
    message
}

fn read_address(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(wide) => flags |= *wide,
            _ => {}
        }
    }
    // On point-to-point links the address is the other side's.
    let ip = local.or(address)?;
    Some(Address {
        device: message.header.index,
        net: IpNet::new(ip, message.header.prefix_len).ok()?,
        flags,
    })
}

fn neighbour_message(device: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = address_family(Family::of(&ip));
    message.header.ifindex = device;
    let address = match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message
        .attributes
        .push(NeighbourAttribute::Destination(address));
    message
}

fn read_neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr, [u8; 6])> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
            NeighbourAttribute::LinkLayerAddress(octets) => mac = octets.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some((message.header.ifindex, ip?, mac?))
}
