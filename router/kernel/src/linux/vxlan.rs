//! The `vxlan` carrier's devices, `wx0` and `wx6`: in the domain, with their outer sides in the host's namespace.
//!
//! They are up only while the host's filter stands: whoever can send to the host's port 6784 could otherwise speak for any
//! peer.

use std::io;
use std::os::fd::AsFd;

use weft_core::layout::{DEVICE_MTU, VXLAN_CARRIER6, VXLAN_CARRIERS, VXLAN_PORT, VXLAN_VNI};

use super::domain::Domain;
use super::host::Host;
use super::nft;
use super::rtnl::{Link, Vxlan};
use crate::error::{Doing, KernelError, Result};
use crate::state::Family;

const WANTED: Vxlan = Vxlan {
    vni: VXLAN_VNI,
    port: VXLAN_PORT,
    learns: false,
};

impl Domain {
    /// Makes this one of the devices unless it is there as it should be, and sets it up; its index. Put the filter in place
    /// before, in both namespaces. Addresses, neighbours, its forwarding database and routes are the plan's.
    ///
    /// # Errors
    /// [`KernelError::VxlanTaken`] when another device of this machine, perhaps in a leftover domain, has the network
    /// identifier or another program the port.
    pub fn ensure_vxlan(&self, host: &Host, device: &str, mac: [u8; 6]) -> Result<u32> {
        let doing = || format!("make {device}");
        let mut link = self.vxlan(device)?;
        if link.as_ref().is_some_and(|link| !is_as_wanted(link, mac)) {
            self.remove_vxlan(device)?;
            link = None;
        }
        if link.is_none() {
            let namespace = self.fd()?;
            let made = host.with(|ns| {
                let rtnl = &ns.rtnl;
                let wanted = (WANTED, outer(device));
                Ok(rtnl.add_vxlan(device, mac, DEVICE_MTU, wanted, namespace.as_fd()))
            })?;
            taken_or(made)?.doing(doing)?;
            link = self.vxlan(device)?;
        }
        let link = link
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
            .doing(doing)?;
        if !link.up {
            let up = self.with(|ns| Ok(ns.rtnl.set_up(link.index)))?;
            taken_or(up)?.doing(|| format!("set {device} up"))?;
        }
        Ok(link.index)
    }

    /// Sets the device down, if it is there: from then on the host takes no VXLAN by it. Its next hops and their routes go
    /// with it.
    pub fn close_vxlan(&self, device: &str) -> Result<()> {
        match self.vxlan(device)? {
            Some(link) if link.up => self.with(|ns| {
                let down = ns.rtnl.set_down(link.index);
                down.doing(|| format!("set {device} down"))
            }),
            _ => Ok(()),
        }
    }

    /// Sets the devices down if none of their filters stands, so that nothing forged comes in while they are put back.
    pub fn close_unguarded_vxlan(&self, host: &Host) -> Result<()> {
        match nft::guards_vxlan(host) {
            _ if host.has_shield() => Ok(()),
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                let closed = VXLAN_CARRIERS.map(|device| self.close_vxlan(device));
                closed.into_iter().collect()
            }
        }
    }

    /// Deletes the device; that it is gone already is no error.
    pub fn remove_vxlan(&self, device: &str) -> Result<()> {
        self.with(|ns| {
            let gone = ns.rtnl.delete_link(device);
            gone.doing(|| format!("delete {device}"))
        })
    }

    fn vxlan(&self, device: &str) -> Result<Option<Link>> {
        self.with(|ns| {
            let found = ns.rtnl.link(device);
            found.doing(|| format!("find {device}"))
        })
    }
}

fn outer(device: &str) -> Family {
    match device {
        VXLAN_CARRIER6 => Family::V6,
        _ => Family::V4,
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
