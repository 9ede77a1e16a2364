//! Forgets tracked connections of addresses that are gone.

use std::io;
use std::net::IpAddr;

use nix::sys::socket::SockProtocol;

use super::raw::{ACK, DUMP, RawSocket, attribute, push};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_GET: u16 = 1;
const IPCTNL_MSG_CT_DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const NLA_F_NESTED: u16 = 0x8000;
/// `struct nfgenmsg`: family, version, resource id.
const HEADER: usize = 4;

fn kind(message: u16) -> u16 {
    NFNL_SUBSYS_CTNETLINK << 8 | message
}

/// Deletes every connection of the calling thread's namespace that has one of these addresses at any end.
pub(crate) fn forget(gone: &[IpAddr]) -> io::Result<usize> {
    if gone.is_empty() {
        return Ok(0);
    }
    let socket = RawSocket::open(SockProtocol::NetlinkNetFilter)?;
    let mut forgotten = 0;
    for message in socket.request(kind(IPCTNL_MSG_CT_GET), DUMP, &[0; HEADER])? {
        let Some(request) = deletion(&message.body, gone) else {
            continue;
        };
        match socket.request(kind(IPCTNL_MSG_CT_DELETE), ACK, &request) {
            Ok(_) => forgotten += 1,
            // It ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// The request that deletes this connection, if it concerns one of the addresses. The kernel's own attributes name it.
fn deletion(body: &[u8], gone: &[IpAddr]) -> Option<Vec<u8>> {
    let (family, attributes) = (*body.first()?, body.get(HEADER..)?);
    let original = attribute(attributes, CTA_TUPLE_ORIG)?;
    let reply = attribute(attributes, CTA_TUPLE_REPLY)?;
    let concerned = [original, reply]
        .into_iter()
        .flat_map(addresses)
        .any(|ip| gone.contains(&ip));
    if !concerned {
        return None;
    }
    let mut request = vec![family, 0, 0, 0];
    push(&mut request, CTA_TUPLE_ORIG | NLA_F_NESTED, original);
    for plain in [CTA_ID, CTA_ZONE] {
        if let Some(value) = attribute(attributes, plain) {
            push(&mut request, plain, value);
        }
    }
    Some(request)
}

fn addresses(tuple: &[u8]) -> Vec<IpAddr> {
    let ips = attribute(tuple, CTA_TUPLE_IP).unwrap_or_default();
    super::raw::attributes(ips)
        .filter_map(|(_, value)| match value.len() {
            4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
            _ => None,
        })
        .collect()
}
