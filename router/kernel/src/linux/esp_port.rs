//! The UDP port by which ESP comes through NATs: the kernel takes out by itself what comes there (RFC 3948).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use weft_core::layout::ESP_UDP_PORT;

use super::host::Host;
use super::{sys, sysctl};
use crate::error::{Doing, Result};

/// It is open while this is there.
#[derive(Debug)]
pub struct EspPort {
    _sockets: Vec<OwnedFd>,
}

impl Host {
    /// Opens it, beside that of a daemon that this one follows.
    ///
    /// # Errors
    /// Another program has it.
    pub fn open_esp_port(&self) -> Result<EspPort> {
        let sockets = self.run(open_all)?;
        let sockets = sockets.doing(|| format!("open UDP port {ESP_UDP_PORT} for ESP"))?;
        Ok(EspPort { _sockets: sockets })
    }
}

/// One for each IP version that the kernel has.
fn open_all() -> io::Result<Vec<OwnedFd>> {
    let (v4, v6) = (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
    let v6 = sysctl::ipv6_available().then_some(v6.into());
    [Some(v4.into()), v6]
        .into_iter()
        .flatten()
        .map(open)
        .collect()
}

fn open(any: IpAddr) -> io::Result<OwnedFd> {
    let any = SocketAddr::new(any, ESP_UDP_PORT);
    let socket = Socket::new(Domain::for_address(any), Type::DGRAM, Some(Protocol::UDP))?;
    if any.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Of the same user alone (socket(7)).
    socket.set_reuse_port(true)?;
    // Nobody reads what is not ESP.
    socket.set_recv_buffer_size(0)?;
    sys::encapsulate_esp(socket.as_fd())?;
    socket.bind(&SockAddr::from(any))?;
    Ok(socket.into())
}
