//! What the daemon reads of its host: the addresses by which others reach it.

use std::net::{IpAddr, SocketAddr};

use weft_kernel::Host;

use crate::config::UpConfig;

/// The host's own addresses; none where they can't be read, which the next look around mends.
pub(super) fn addresses(host: &Host) -> Vec<IpAddr> {
    host.addresses().unwrap_or_default()
}

/// Where peers may reach this host: what a person said first, then what the interfaces have.
pub(super) fn underlay(config: &UpConfig, host: &Host) -> Vec<SocketAddr> {
    let mut found = config.advertise.clone();
    for ip in addresses(host) {
        let addr = SocketAddr::new(ip, config.port);
        if !found.contains(&addr) {
            found.push(addr);
        }
    }
    found
}
