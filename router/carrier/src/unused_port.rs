//! Ports for tests that bind a certain one, or that need one at which nobody is.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

/// Below what Linux hands out to whoever asks for any port (32768 to 60999, `ip_local_port_range`): a port that was just
/// let go would soon be another test's.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port of UDP and TCP that nobody has, and that no other test of this process is given.
pub(crate) fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(step < COUNT, "no port is free");
        let port = FIRST + (start + step) % COUNT;
        if is_unused(port) {
            return port;
        }
    }
}

fn is_unused(port: u16) -> bool {
    let (v4, v6) = ((Ipv4Addr::LOCALHOST, port), (Ipv6Addr::LOCALHOST, port));
    let is_taken = |bound: std::io::Result<()>| {
        bound.is_err_and(|err| err.kind() == std::io::ErrorKind::AddrInUse)
    };
    let all = [
        UdpSocket::bind(v4).map(drop),
        UdpSocket::bind(v6).map(drop),
        TcpListener::bind(v4).map(drop),
        TcpListener::bind(v6).map(drop),
    ];
    !all.into_iter().any(is_taken)
}
