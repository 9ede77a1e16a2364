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
use crate::underlay::UnderlayAddr;
use crate::wire::{MAX_STREAMED, RELAY_OVERHEAD, RelayHead, STREAM_HEAD};

/// RFC 791, RFC 8200, RFC 768.
const IPV4_HEADER: u16 = 20;
const IPV6_HEADER: u16 = 40;
const UDP_HEADER: u16 = 8;

/// One way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Path {
    /// To this address, with nobody between.
    Direct(UnderlayAddr),
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
    /// A TCP connection: for pairs that no UDP gets through between. Still before a member between, which may have to be
    /// paid for and sees who talks to whom; however much faster that one is.
    Tcp,
    /// Through somebody else.
    Relayed,
}

impl Path {
    /// The address, where there is nobody between.
    pub fn direct(self) -> Option<UnderlayAddr> {
        match self {
            Path::Direct(addr) => Some(addr),
            Path::Relayed(_) => None,
        }
    }

    /// Where UDP datagrams go along it, where there is nobody between.
    pub fn udp(self) -> Option<SocketAddr> {
        self.direct()?.udp()
    }

    /// The far end of the connection that it is.
    pub fn tcp(self) -> Option<SocketAddr> {
        self.direct()?.tcp()
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

    /// Octets around a datagram, the IP header included; in a connection its length alone, as the rest is the kernels' affair. Where somebody is between, as though it were IPv6: what is around
    /// it there is counted where it is known.
    pub(crate) fn headers(self) -> u16 {
        match self {
            Path::Direct(UnderlayAddr::Udp(SocketAddr::V4(_))) => IPV4_HEADER + UDP_HEADER,
            Path::Direct(UnderlayAddr::Tcp(_)) => STREAM_HEAD as u16,
            Path::Direct(UnderlayAddr::Udp(SocketAddr::V6(_))) | Path::Relayed(_) => {
                IPV6_HEADER + UDP_HEADER
            }
        }
    }

    /// What is known of the sizes that it takes before anybody has asked: of a connection everything.
    fn mtu(self) -> mtu::Mtu {
        match self {
            Path::Direct(UnderlayAddr::Udp(_)) => mtu::Mtu::new(mtu::BASE),
            Path::Direct(UnderlayAddr::Tcp(_)) => {
                mtu::Mtu::fixed((STREAM_HEAD + MAX_STREAMED) as u16)
            }
            Path::Relayed(_) => mtu::Mtu::new(mtu::BASE - RELAY_OVERHEAD as u16),
        }
    }

    /// As seen by a host that trusts these networks.
    pub(crate) fn class(self, trusted: &[IpNet]) -> Class {
        match self {
            Path::Direct(UnderlayAddr::Tcp(_)) => Class::Tcp,
            Path::Direct(addr) if trusted.iter().any(|net| net.contains(&addr.ip())) => {
                Class::Trusted
            }
            Path::Direct(addr) if is_private(addr.ip()) => Class::Private,
            Path::Direct(_) => Class::Public,
            Path::Relayed(_) => Class::Relayed,
        }
    }
}

impl From<UnderlayAddr> for Path {
    fn from(addr: UnderlayAddr) -> Self {
        Path::Direct(addr)
    }
}

impl From<SocketAddr> for Path {
    fn from(addr: SocketAddr) -> Self {
        Path::Direct(addr.into())
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
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        let class = |text: &str| Path::from(addr(text)).class(&[]);
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
        assert!(Class::Private < Class::Public && Class::Public < Class::Tcp);
        assert!(Class::Tcp < Class::Relayed);
        let tcp = Path::Direct(UnderlayAddr::Tcp(addr("10.1.2.3:443")));
        assert_eq!(tcp.class(&["10.0.0.0/8".parse().unwrap()]), Class::Tcp);
        assert_eq!(Path::Relayed(NodeId([1; 32])).class(&[]), Class::Relayed);
        let trusted = ["192.0.2.0/24".parse().unwrap()];
        let lan = Path::from(addr("192.0.2.1:1"));
        assert_eq!(lan.class(&trusted), Class::Trusted);
        assert!(Class::Trusted < Class::Private);
    }
}
