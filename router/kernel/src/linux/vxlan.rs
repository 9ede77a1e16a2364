//! The `vxlan` carrier's device, `wx0`: in the domain, with its outer side in the host's namespace.
//!
//! It is up only while the host's filter stands: whoever can send to the host's port 6784 could otherwise speak for any
//! peer.

use std::io;
use std::os::fd::AsFd;

use weft_core::layout::{DEVICE_MTU, VXLAN_CARRIER, VXLAN_PORT, VXLAN_VNI};

use super::domain::Domain;
use super::host::Host;
use super::nft;
use super::rtnl::{Link, Vxlan};
use crate::error::{Doing, KernelError, Result};

const WANTED: Vxlan = Vxlan {
    vni: VXLAN_VNI,
    port: VXLAN_PORT,
    learns: false,
};

impl Domain {
    /// Makes the device unless it is there as it should be, and sets it up; its index. Put the filter in place before, in
    /// both namespaces. Addresses, neighbours, its forwarding database and routes are the plan's.
    ///
    /// # Errors
    /// [`KernelError::VxlanTaken`] when another device of this machine, perhaps in a leftover domain, has the network
    /// identifier or another program the port.
    pub fn ensure_vxlan(&self, host: &Host, mac: [u8; 6]) -> Result<u32> {
        let doing = || format!("make {VXLAN_CARRIER}");
        let mut link = self.vxlan()?;
        if link.as_ref().is_some_and(|link| !is_as_wanted(link, mac)) {
            self.remove_vxlan()?;
            link = None;
        }
        if link.is_none() {
            let namespace = self.fd()?;
            let made = host.with(|ns| {
                let rtnl = &ns.rtnl;
                Ok(rtnl.add_vxlan(VXLAN_CARRIER, mac, DEVICE_MTU, WANTED, namespace.as_fd()))
            })?;
            taken_or(made)?.doing(doing)?;
            link = self.vxlan()?;
        }
        let link = link
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
            .doing(doing)?;
        if !link.up {
            let up = self.with(|ns| Ok(ns.rtnl.set_up(link.index)))?;
            taken_or(up)?.doing(|| format!("set {VXLAN_CARRIER} up"))?;
        }
        Ok(link.index)
    }

    /// Sets the device down, if it is there: from then on the host takes no VXLAN. Its next hops and their routes go with
    /// it.
    pub fn close_vxlan(&self) -> Result<()> {
        match self.vxlan()? {
            Some(link) if link.up => self.with(|ns| {
                let down = ns.rtnl.set_down(link.index);
                down.doing(|| format!("set {VXLAN_CARRIER} down"))
            }),
            _ => Ok(()),
        }
    }

    /// Sets the device down if none of its filters stands, so that nothing forged comes in while they are put back.
    pub fn close_unguarded_vxlan(&self, host: &Host) -> Result<()> {
        match nft::guards_vxlan(host) {
            _ if host.has_shield() => Ok(()),
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => self.close_vxlan(),
        }
    }

    /// Deletes the device; that it is gone already is no error.
    pub fn remove_vxlan(&self) -> Result<()> {
        self.with(|ns| {
            let gone = ns.rtnl.delete_link(VXLAN_CARRIER);
            gone.doing(|| format!("delete {VXLAN_CARRIER}"))
        })
    }

    fn vxlan(&self) -> Result<Option<Link>> {
        self.with(|ns| {
            let found = ns.rtnl.link(VXLAN_CARRIER);
            found.doing(|| format!("find {VXLAN_CARRIER}"))
        })
    }
}

fn is_as_wanted(link: &Link, mac: [u8; 6]) -> bool {
    link.vxlan == Some(WANTED) && link.mac == mac
}

/// The kernel's word for a network identifier or port that somebody else has, or any other outcome.
fn taken_or(outcome: io::Result<()>) -> Result<io::Result<()>> {
    match outcome {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EADDRINUSE)) => {
            Err(KernelError::VxlanTaken)
        }
        other => Ok(other),
    }
}
