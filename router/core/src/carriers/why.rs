//! Why a peer is reached by the carrier that it is, in words for people.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// The reason. All but one are for `udp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// `vxlan`, because both hosts trust the network between them.
    BothTrust,
    /// There is no session, or no address yet.
    NoPath,
    /// This host lists none.
    NoTrustedSubnet,
    /// The peer lists none.
    PeerListsNone,
    /// One device serves IPv4 pairs alone.
    NotIpv4,
    /// This address of the pair lies in none of this host's.
    OutsideTrusted(Ipv4Addr),
    /// Another node, known here for longer, has its MAC.
    MacTaken,
    /// The peer has not said that it takes VXLAN from this host.
    PeerNotOpen,
    /// It takes it between other addresses than this host sees.
    OtherEnds,
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
            Why::NoPath => write!(f, "no session yet"),
            Why::NoTrustedSubnet => write!(f, "this host lists no trusted subnet"),
            Why::PeerListsNone => write!(f, "the peer lists no trusted subnet"),
            Why::NotIpv4 => write!(f, "the path is not IPv4"),
            Why::OutsideTrusted(ip) => write!(f, "{ip} is in no trusted subnet of this host"),
            Why::MacTaken => write!(f, "another node has the same MAC on VXLAN"),
            Why::PeerNotOpen => {
                write!(f, "the peer does not take plain VXLAN from this host")
            }
            Why::OtherEnds => {
                write!(
                    f,
                    "the hosts see each other under other addresses (is there a NAT?)"
                )
            }
            Why::Device(trouble) => write!(f, "VXLAN is not up on this host: {trouble}"),
            Why::Trying => write!(f, "trying VXLAN"),
            Why::NoAnswer => write!(f, "VXLAN does not get through (is UDP port 6784 blocked?)"),
        }
    }
}
