//! The ways by which datagrams reach a peer, and which of them is taken.
//!
//! Each pair finds out for itself: `Paths` holds the addresses that the peer's record names, those it was
//! seen at and the members that may relay; asks for a sealed echo along each of them, again and again; and takes the best
//! of those that answer. The two ends choose each for itself. Nobody believes an address: a path counts only from the
//! first echo on that was asked for along it, or from a whole handshake that went through it.

pub(crate) mod mtu;
pub(crate) mod paths;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::NodeId;
use crate::wire::{RELAY_OVERHEAD, RelayHead};

/// RFC 791, RFC 8200, RFC 768.
const IPV4_HEADER: u16 = 20;
const IPV6_HEADER: u16 = 40;
const UDP_HEADER: u16 = 8;

/// One way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Path {
    /// UDP datagrams to this address.
    Direct(SocketAddr),
    /// Through this member, inside the session with it.
    Relayed(NodeId),
}

/// What is known of one path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// Which.
    pub path: Path,
    /// It is the one that is taken.
    pub in_use: bool,
    /// Smoothed round trip, microseconds; `None` until it was measured.
    pub rtt_micros: Option<u64>,
    /// Questions along it since the last answer.
    pub unanswered: u32,
    /// It has answered, since it became known.
    pub answered: bool,
}

/// How good a path is before anybody has measured it; the lower the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// An address in a network that this host trusts: plain VXLAN may go there.
    Trusted,
    /// An address of a private network (RFC 1918, RFC 4193, RFC 6598): it costs nothing and leaves nothing.
    Private,
    /// Any other.
    Public,
    /// Through somebody else.
    Relayed,
}

impl Path {
    /// The address, where there is nobody between.
    pub fn direct(self) -> Option<SocketAddr> {
        match self {
            Path::Direct(addr) => Some(addr),
            Path::Relayed(_) => None,
        }
    }

    /// The member between.
    pub fn relay(self) -> Option<NodeId> {
        match self {
            Path::Direct(_) => None,
            Path::Relayed(by) => Some(by),
        }
    }

    /// To whom a member gives what it got from `from` for `to`, whom it reaches along this path: to itself; or, unless
    /// somebody has passed it on before, to the one between. `None` where it goes no further.
    pub fn onward(self, to: NodeId, head: RelayHead, from: &NodeId) -> Option<NodeId> {
        match self {
            Path::Direct(_) => Some(to),
            Path::Relayed(by) => (head.is_first() && by != *from).then_some(by),
        }
    }

    /// Octets around a datagram, the IP header included. Where somebody is between, as though it were IPv6: what is around
    /// it there is counted where it is known.
    pub(crate) fn headers(self) -> u16 {
        let ip = match self {
            Path::Direct(SocketAddr::V4(_)) => IPV4_HEADER,
            Path::Direct(SocketAddr::V6(_)) | Path::Relayed(_) => IPV6_HEADER,
        };
        ip + UDP_HEADER
    }

    /// What it takes for sure, headers included.
    fn base(self) -> u16 {
        match self {
            Path::Direct(_) => mtu::BASE,
            Path::Relayed(_) => mtu::BASE - RELAY_OVERHEAD as u16,
        }
    }

    /// As seen by a host that trusts these networks.
    pub(crate) fn class(self, trusted: &[IpNet]) -> Class {
        match self {
            Path::Direct(addr) if trusted.iter().any(|net| net.contains(&addr.ip())) => {
                Class::Trusted
            }
            Path::Direct(addr) if is_private(addr.ip()) => Class::Private,
            Path::Direct(_) => Class::Public,
            Path::Relayed(_) => Class::Relayed,
        }
    }
}

impl From<SocketAddr> for Path {
    fn from(addr: SocketAddr) -> Self {
        Path::Direct(addr)
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Path::Direct(addr) => addr.fmt(f),
            Path::Relayed(by) => write!(f, "through {by}"),
        }
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            ip.is_private() || ip.is_link_local() || (a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_goes_before_public_and_direct_before_relayed() {
        let class = |text: &str| Path::Direct(text.parse().unwrap()).class(&[]);
        for private in [
            "10.1.2.3:1",
            "172.31.0.1:1",
            "192.168.0.1:1",
            "100.127.0.1:1",
            "[fd00::1]:1",
        ] {
            assert_eq!(class(private), Class::Private, "{private}");
        }
        for public in [
            "172.32.0.1:1",
            "100.128.0.1:1",
            "192.0.2.1:1",
            "[2001:db8::1]:1",
        ] {
            assert_eq!(class(public), Class::Public, "{public}");
        }
        assert!(Class::Private < Class::Public && Class::Public < Class::Relayed);
        assert_eq!(Path::Relayed(NodeId([1; 32])).class(&[]), Class::Relayed);
        let trusted = ["192.0.2.0/24".parse().unwrap()];
        let lan = Path::Direct("192.0.2.1:1".parse().unwrap());
        assert_eq!(lan.class(&trusted), Class::Trusted);
        assert!(Class::Trusted < Class::Private);
    }
}
