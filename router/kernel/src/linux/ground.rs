//! Two hosts in miniature: namespaces that nobody else sees, with a cable between them. What this machine can do, and how
//! fast, is tried there before anything depends on it. All of it is gone with the descriptors.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ipnet::{IpNet, Ipv4Net};
use nix::sched::{CloneFlags, unshare};
use weft_core::crypto::Secret;
use weft_core::layout::{GATEWAY_MAC, HOST_LEG_MAC, VXLAN_CARRIER, VXLAN_PORT, VXLAN_VNI};
use weft_core::view::PeerNumber;

use super::netns::{OWN, alone, inside};
use super::rtnl::{Rtnl, VethEnd, Vxlan};
use super::xfrm::Xfrm;
use crate::error::{Doing, Result};
use crate::esp::{Policy, Sa, SaKey};
use crate::state::Family;

const CABLE: &str = "cable";
/// Octets of the longest packet that the cable takes: Ethernet's.
pub const CABLE_MTU: u32 = 1500;
/// No key of a trial is used for so many packets.
const LAST_PACKET: u64 = u32::MAX as u64;

/// One end of the cable.
#[derive(Debug)]
pub struct End {
    namespace: OwnedFd,
    /// Its address there (RFC 5737's example network).
    pub underlay: Ipv4Addr,
    mac: [u8; 6],
}

/// Both of them.
#[derive(Debug)]
pub struct Ground {
    /// Where questions come from.
    pub near: End,
    /// Where they go.
    pub far: End,
}

impl Ground {
    /// Makes both and lays the cable.
    ///
    /// # Errors
    /// What the kernel said to it.
    pub fn lay() -> Result<Self> {
        lay().doing(|| "lay a cable between two namespaces".into())
    }

    /// A device of the `vxlan` carrier at both ends, as between hosts that seal: with policies, and keys that protect nothing.
    /// Each end has its address, and all of that network lies behind the device.
    ///
    /// # Errors
    /// What the kernel said to it.
    pub fn lay_sealed_vxlan(&self, mtu: u32, [near, far]: [Ipv4Net; 2]) -> Result<()> {
        lay_sealed_vxlan((&self.near, &self.far), mtu, (near, far))
            .and_then(|()| lay_sealed_vxlan((&self.far, &self.near), mtu, (far, near)))
            .doing(|| "lay sealed VXLAN between two namespaces".into())
    }
}

fn lay() -> io::Result<Ground> {
    let near = End::make(Ipv4Addr::new(192, 0, 2, 1), GATEWAY_MAC)?;
    let far = End::make(Ipv4Addr::new(192, 0, 2, 2), HOST_LEG_MAC)?;
    let plug = |mac, namespace| VethEnd {
        name: CABLE,
        mac,
        namespace,
    };
    let ends = (plug(near.mac, None), plug(far.mac, Some(far.namespace())));
    near.with(|rtnl| rtnl.add_veth(&ends.0, &ends.1, CABLE_MTU))?;
    for end in [&near, &far] {
        end.with(|rtnl| put(rtnl, CABLE, Ipv4Net::new_assert(end.underlay, 24)))?;
    }
    Ok(Ground { near, far })
}

fn lay_sealed_vxlan(
    (end, other): (&End, &End),
    mtu: u32,
    (own, theirs): (Ipv4Net, Ipv4Net),
) -> io::Result<()> {
    end.inside(|| seal(end.underlay, other.underlay))??;
    let wanted = Vxlan {
        vni: VXLAN_VNI,
        port: VXLAN_PORT,
        learns: false,
    };
    end.with(|rtnl| {
        let (mac, namespace) = (end.mac, end.namespace());
        rtnl.add_vxlan(VXLAN_CARRIER, mac, mtu, (wanted, Family::V4), namespace)?;
        let device = put(rtnl, VXLAN_CARRIER, own)?;
        rtnl.set_neighbour(device, theirs.addr().into(), other.mac)?;
        rtnl.set_forwarding(device, other.mac, other.underlay.into())
    })
}

impl End {
    fn make(underlay: Ipv4Addr, mac: [u8; 6]) -> io::Result<Self> {
        let namespace = alone(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(OwnedFd::from(std::fs::File::open(OWN)?))
        })?;
        Ok(Self {
            namespace,
            underlay,
            mac,
        })
    }

    /// Its namespace.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Gives a device that stands there its address, behind which all of that network lies, and the one neighbour it has.
    ///
    /// # Errors
    /// What the kernel said to it.
    pub fn lead(&self, device: &str, own: Ipv4Net, neighbour: (Ipv4Addr, [u8; 6])) -> Result<()> {
        let (ip, mac) = neighbour;
        self.with(|rtnl| {
            let index = put(rtnl, device, own)?;
            rtnl.set_neighbour(index, ip.into(), mac)
        })
        .doing(|| format!("give {device} an address"))
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        inside(self.namespace(), work)
    }

    fn with<T: Send>(&self, work: impl FnOnce(&Rtnl) -> io::Result<T> + Send) -> io::Result<T> {
        self.inside(|| work(&Rtnl::open()?))?
    }
}

/// Gives the device an address and sets it up; its index.
fn put(rtnl: &Rtnl, device: &str, net: Ipv4Net) -> io::Result<u32> {
    let link = rtnl.link(device)?.ok_or(io::ErrorKind::NotFound)?;
    rtnl.add_address(link.index, IpNet::V4(net))?;
    rtnl.set_up(link.index)?;
    Ok(link.index)
}

/// Policies and keys of the calling thread's namespace: what goes to `to` and comes from it is sealed.
fn seal(own: Ipv4Addr, other: Ipv4Addr) -> io::Result<()> {
    let xfrm = Xfrm::open()?;
    let peer = PeerNumber(1);
    for (from, to, outbound) in [(own, other, true), (other, own, false)] {
        // Both ends name and make a direction's key alike: of its sender's address.
        let [.., sender] = from.octets();
        let (from, to) = (from.into(), to.into());
        let key = SaKey {
            peer,
            from,
            to,
            spi: 0x7765_0000 | u32::from(sender),
        };
        let sa = Sa {
            seals: outbound,
            udp: None,
            key: Secret::new([sender; 36]),
            last_packet: LAST_PACKET,
        };
        let policy = Policy {
            peer,
            from,
            to,
            outbound,
        };
        xfrm.put_policy(&policy)?;
        xfrm.add_key(&key, &sa)?;
    }
    Ok(())
}
