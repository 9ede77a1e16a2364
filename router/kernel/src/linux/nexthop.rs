//! Next-hop objects (`ip nexthop`), which rtnetlink has no messages for.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use super::raw::{ACK, CREATE, DUMP, REPLACE, RawSocket, attribute, push};
use crate::state::{Family, NextHop, ROUTE_PROTOCOL};

const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
/// `struct nhmsg`: family, scope, protocol, a reserved octet, flags.
const HEADER: usize = 8;
const RTNH_F_ONLINK: u32 = 4;

fn header(family: u8, protocol: u8, flags: u32) -> Vec<u8> {
    let mut body = vec![family, 0, protocol, 0];
    body.extend_from_slice(&flags.to_ne_bytes());
    body
}

fn family_number(family: Family) -> u8 {
    // Both constants fit in an octet.
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// Adds or replaces one.
pub(crate) fn set(socket: &RawSocket, id: u32, hop: &NextHop, device: u32) -> io::Result<()> {
    let family = Family::of(&hop.gateway);
    // IPv4 gateways here lie on no subnet of the device.
    let flags = match family {
        Family::V4 => RTNH_F_ONLINK,
        Family::V6 => 0,
    };
    let mut body = header(family_number(family), ROUTE_PROTOCOL, flags);
    push(&mut body, NHA_ID, &id.to_ne_bytes());
    push(&mut body, NHA_OIF, &device.to_ne_bytes());
    match hop.gateway {
        IpAddr::V4(ip) => push(&mut body, NHA_GATEWAY, &ip.octets()),
        IpAddr::V6(ip) => push(&mut body, NHA_GATEWAY, &ip.octets()),
    }
    socket
        .request(RTM_NEWNEXTHOP, ACK | CREATE | REPLACE, &body)
        .map(drop)
}

/// Deletes one and the routes that name it. That it is gone already is no error.
pub(crate) fn delete(socket: &RawSocket, id: u32) -> io::Result<()> {
    let mut body = header(0, 0, 0);
    push(&mut body, NHA_ID, &id.to_ne_bytes());
    match socket.request(RTM_DELNEXTHOP, ACK, &body) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(drop),
    }
}

/// Weft's own, by id. `name` tells the name of a device by its index.
pub(crate) fn list(
    socket: &RawSocket,
    name: impl Fn(u32) -> Option<String>,
) -> io::Result<BTreeMap<u32, NextHop>> {
    let answers = socket.request(RTM_GETNEXTHOP, DUMP, &header(0, 0, 0))?;
    Ok(answers
        .iter()
        .filter(|m| m.kind == RTM_NEWNEXTHOP && m.body.get(2) == Some(&ROUTE_PROTOCOL))
        .filter_map(|m| read(&m.body, &name))
        .collect())
}

fn read(body: &[u8], name: &impl Fn(u32) -> Option<String>) -> Option<(u32, NextHop)> {
    let attributes = body.get(HEADER..)?;
    let number = |kind| {
        let value = attribute(attributes, kind)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    };
    let gateway = attribute(attributes, NHA_GATEWAY)?;
    let gateway = match <[u8; 4]>::try_from(gateway) {
        Ok(octets) => IpAddr::from(octets),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(gateway).ok()?),
    };
    let device = name(number(NHA_OIF)?)?;
    Some((number(NHA_ID)?, NextHop { device, gateway }))
}
