//! The UDP port by which ESP comes through NATs: the kernel takes out by itself what comes there (RFC 3948).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use weft_core::layout::ESP_UDP_PORT;

use super::host::Host;
use super::sys;
use crate::error::{Doing, Result};

/// It is open while this is there.
#[derive(Debug)]
pub struct EspPort {
    _socket: OwnedFd,
}

impl Host {
    /// Opens it, beside that of a daemon that this one follows.
    ///
    /// # Errors
    /// Another program has it.
    pub fn open_esp_port(&self) -> Result<EspPort> {
        let socket = self.run(open)?;
        let socket = socket.doing(|| format!("open UDP port {ESP_UDP_PORT} for ESP"))?;
        Ok(EspPort { _socket: socket })
    }
}

fn open() -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // Of the same user alone (socket(7)).
    socket.set_reuse_port(true)?;
    // Nobody reads what is not ESP.
    socket.set_recv_buffer_size(0)?;
    sys::encapsulate_esp(socket.as_fd())?;
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, ESP_UDP_PORT);
    socket.bind(&SockAddr::from(any))?;
    Ok(socket.into())
}
