//! VXLAN devices and their forwarding databases.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, VxlanDf,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{ADD, Rtnl, SET};
use crate::state::Family;

/// What a VXLAN device is made with, and was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vxlan {
    /// Network identifier.
    pub(crate) vni: u32,
    /// UDP port of both sides.
    pub(crate) port: u16,
    /// MACs of senders are learnt from what comes.
    pub(crate) learns: bool,
}

impl Rtnl {
    /// Makes a VXLAN device whose outer side is in this socket's namespace and which itself is born in `namespace`, with its
    /// final name and MAC. It knows nobody and learns nothing; its outer packets, of this version, are never cut into
    /// fragments. Which version a device was made for the kernel does not tell; it has no two of one for the same network.
    pub(crate) fn add_vxlan(
        &self,
        name: &str,
        mac: [u8; 6],
        mtu: u32,
        (vxlan, outer): (Vxlan, Family),
        namespace: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut data = vec![
            InfoVxlan::Id(vxlan.vni),
            InfoVxlan::Port(vxlan.port),
            InfoVxlan::Learning(vxlan.learns),
            InfoVxlan::Df(VxlanDf::Set),
        ];
        if outer == Family::V6 {
            data.push(InfoVxlan::Local6(Ipv6Addr::UNSPECIFIED));
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vxlan),
                LinkInfo::Data(InfoData::Vxlan(data)),
            ]),
        ];
        self.act(RouteNetlinkMessage::NewLink(message), ADD)
    }

    /// Entries of VXLAN devices' forwarding databases that lead to a host, as (device, MAC, host).
    pub(crate) fn forwarding(&self) -> io::Result<Vec<(u32, [u8; 6], IpAddr)>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let answers = self.talk(RouteNetlinkMessage::GetNeighbour(message), NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|m| match m {
                RouteNetlinkMessage::NewNeighbour(entry) => read_entry(&entry),
                _ => None,
            })
            .collect())
    }

    pub(crate) fn set_forwarding(&self, device: u32, mac: [u8; 6], to: IpAddr) -> io::Result<()> {
        let mut message = entry(device, mac);
        message.header.state = NeighbourState::Permanent;
        let to = match to {
            IpAddr::V4(to) => NeighbourAddress::Inet(to),
            IpAddr::V6(to) => NeighbourAddress::Inet6(to),
        };
        message.attributes.push(NeighbourAttribute::Destination(to));
        self.act(RouteNetlinkMessage::NewNeighbour(message), SET)
    }

    pub(crate) fn delete_forwarding(&self, device: u32, mac: [u8; 6]) -> io::Result<()> {
        let message = entry(device, mac);
        match self.act(RouteNetlinkMessage::DelNeighbour(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

fn entry(device: u32, mac: [u8; 6]) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = device;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message
}

fn read_entry(message: &NeighbourMessage) -> Option<(u32, [u8; 6], IpAddr)> {
    let (mut mac, mut to) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(octets) => mac = octets.as_slice().try_into().ok(),
            NeighbourAttribute::Destination(address) => to = ip(address),
            _ => {}
        }
    }
    Some((message.header.ifindex, mac?, to?))
}

/// In this family the library leaves addresses as they are.
fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some((*ip).into()),
        NeighbourAddress::Inet6(ip) => Some((*ip).into()),
        NeighbourAddress::Other(octets) => match octets.as_slice() {
            v4 @ [_, _, _, _] => <[u8; 4]>::try_from(v4).ok().map(IpAddr::from),
            v6 => <[u8; 16]>::try_from(v6).ok().map(IpAddr::from),
        },
        _ => None,
    }
}

/// What a device was made with, if it is a VXLAN device.
pub(super) fn read_vxlan(info: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan {
        vni: 0,
        port: 0,
        learns: false,
    };
    for attribute in info {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Learning(learns) => vxlan.learns = *learns,
            _ => {}
        }
    }
    vxlan
}
