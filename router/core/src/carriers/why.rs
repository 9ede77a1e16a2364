//! Why a peer is reached by the carrier that it is, in words for people.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::layout::IPV6_MIN_MTU;

/// The reason. All but the first three are for `udp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// `vxlan`, because both hosts trust the network between them.
    BothTrust,
    /// `esp`, because both hosts asked for it.
    BothSeal,
    /// The same through a NAT, inside UDP.
    BothSealThroughNat,
    /// There is no session, or no address yet.
    NoPath,
    /// This host lists none.
    NoTrustedSubnet,
    /// The peer lists none.
    PeerListsNone,
    /// This address of the pair is good on one link alone (IPv6's fe80::/10).
    LinkLocal(IpAddr),
    /// This address of the pair lies in none of this host's.
    OutsideTrusted(IpAddr),
    /// Another node, known here for longer, has its MAC.
    MacTaken,
    /// Another peer is reached under this address, and has the kernel's policies for it: both are behind one NAT.
    AddressTaken(IpAddr),
    /// Inside the kernel's tunnel there would be less than the 1,280 octets that IPv6 asks for (RFC 8200 §5): this many.
    SmallPath(u16),
    /// The peer has not said that it takes VXLAN from this host.
    PeerNotOpen,
    /// It takes it between other addresses than this host sees.
    OtherEnds,
    /// This host's kernel can't do ESP; why.
    NoEsp(String),
    /// The peer does not do ESP.
    PeerLacksEsp,
    /// The kernel refused keys or a policy; what it said.
    EspRefused(String),
    /// The keys for ESP are gone from the kernel or belong to another way; new ones are being agreed.
    EspKeys,
    /// The device is not up; why.
    Device(String),
    /// No probe has been answered yet.
    Trying,
    /// Probes do not reach the peer.
    NoAnswer,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::BothTrust => write!(
                f,
                "not encrypted, because both hosts list the network between them as trusted"
            ),
            Why::BothSeal => write!(
                f,
                "encrypted by the kernel (ESP), which both hosts asked for"
            ),
            Why::BothSealThroughNat => write!(
                f,
                "encrypted by the kernel (ESP, inside UDP because of a NAT), which both hosts asked for"
            ),
            Why::NoPath => write!(f, "no session yet"),
            Why::NoTrustedSubnet => write!(f, "this host lists no trusted subnet"),
            Why::PeerListsNone => write!(f, "the peer lists no trusted subnet"),
            Why::LinkLocal(ip) => write!(
                f,
                "{ip} is a link's own address, and VXLAN is not told of links"
            ),
            Why::OutsideTrusted(ip) => write!(f, "{ip} is in no trusted subnet of this host"),
            Why::MacTaken => write!(f, "another node has the same MAC on VXLAN"),
            Why::AddressTaken(ip) => write!(
                f,
                "another peer is reached under {ip}, too (are both behind one NAT?)"
            ),
            Why::SmallPath(octets) => write!(
                f,
                "the path is too small for VXLAN: {octets} octets would be left, and IPv6 needs {IPV6_MIN_MTU}"
            ),
            Why::PeerNotOpen => {
                write!(f, "the peer does not take VXLAN from this host")
            }
            Why::OtherEnds => {
                write!(
                    f,
                    "the hosts see each other under other addresses (is there a NAT?)"
                )
            }
            Why::NoEsp(trouble) => write!(f, "this host's kernel has no ESP: {trouble}"),
            Why::PeerLacksEsp => write!(f, "the peer does not use the kernel's ESP"),
            Why::EspRefused(trouble) => write!(f, "the kernel refuses ESP: {trouble}"),
            Why::EspKeys => write!(f, "new keys for ESP are being agreed"),
            Why::Device(trouble) => write!(f, "VXLAN is not up on this host: {trouble}"),
            Why::Trying => write!(f, "trying VXLAN"),
            Why::NoAnswer => write!(
                f,
                "VXLAN does not get through (is UDP port 6784, ESP, or behind a NAT UDP port 6785, blocked?)"
            ),
        }
    }
}
