//! How the packet path uses the host's kernel and what it shows to the underlay: nouns that command line, carrier and
//! control socket share.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a host takes datagrams, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum UnderlayAddr {
    /// As they are.
    Udp(SocketAddr),
    /// One behind the other in a TCP connection: for networks that let nothing else out.
    Tcp(SocketAddr),
}

impl UnderlayAddr {
    /// Address and port, whichever it is.
    pub fn socket(self) -> SocketAddr {
        match self {
            UnderlayAddr::Udp(addr) | UnderlayAddr::Tcp(addr) => addr,
        }
    }

    /// The address alone.
    pub fn ip(self) -> IpAddr {
        self.socket().ip()
    }

    /// Where UDP datagrams go.
    pub fn udp(self) -> Option<SocketAddr> {
        match self {
            UnderlayAddr::Udp(addr) => Some(addr),
            UnderlayAddr::Tcp(_) => None,
        }
    }

    /// The far end of a connection.
    pub fn tcp(self) -> Option<SocketAddr> {
        match self {
            UnderlayAddr::Udp(_) => None,
            UnderlayAddr::Tcp(addr) => Some(addr),
        }
    }
}

/// Where a host that listens on this port takes connections: wherever it takes datagrams, each address once.
pub(crate) fn listening(addresses: &[SocketAddr], port: Option<NonZeroU16>) -> Vec<UnderlayAddr> {
    let mut found = Vec::new();
    for addr in addresses {
        let at = port.map(|port| UnderlayAddr::Tcp((addr.ip(), port.get()).into()));
        found.extend(at.filter(|at| !found.contains(at)));
    }
    found
}

impl From<SocketAddr> for UnderlayAddr {
    fn from(addr: SocketAddr) -> Self {
        UnderlayAddr::Udp(addr)
    }
}

impl fmt::Display for UnderlayAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnderlayAddr::Udp(addr) => addr.fmt(f),
            UnderlayAddr::Tcp(addr) => write!(f, "tcp {addr}"),
        }
    }
}

/// Work that the packet path leaves to the kernel or the card. Each can be done without, at a price
/// (`docs/performance.md`), because kernels and drivers with broken ones exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// Cutting one send into many datagrams (UDP GSO).
    Gso,
    /// Joining received datagrams of one sender (UDP GRO).
    Gro,
    /// TCP super-packets from and to the domain.
    Tso,
    /// The same for UDP; Linux 6.2 or later.
    Uso,
    /// Checksums of inner packets; super-packets can't be had without it.
    Csum,
}

impl Offload {
    /// All of them, in the order of their numbers.
    pub const ALL: [Offload; 5] = [
        Offload::Gso,
        Offload::Gro,
        Offload::Tso,
        Offload::Uso,
        Offload::Csum,
    ];

    /// What it is called on the command line and in output.
    pub fn name(self) -> &'static str {
        match self {
            Offload::Gso => "gso",
            Offload::Gro => "gro",
            Offload::Tso => "tso",
            Offload::Uso => "uso",
            Offload::Csum => "csum",
        }
    }
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of an offload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no offload; there are gso, gro, tso, uso and csum")]
pub struct UnknownOffload(String);

impl FromStr for Offload {
    type Err = UnknownOffload;

    fn from_str(text: &str) -> Result<Self, UnknownOffload> {
        let found = Self::ALL.into_iter().find(|o| o.name() == text);
        found.ok_or_else(|| UnknownOffload(text.to_owned()))
    }
}

/// Whether an offload is used, and why not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffloadState {
    /// It is.
    #[default]
    On,
    /// A person switched it off.
    SwitchedOff,
    /// The kernel has none.
    Absent,
    /// The kernel or a device refused it at run time.
    Refused,
    /// What it did did not arrive, or not as it was sealed.
    Failing,
}

impl OffloadState {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            OffloadState::On => "on",
            OffloadState::SwitchedOff => "switched off",
            OffloadState::Absent => "absent",
            OffloadState::Refused => "refused",
            OffloadState::Failing => "failing",
        }
    }
}

/// What becomes of the class of service (DSCP) of an inner packet in the outer header (RFC 2983 §3). The inner header keeps
/// its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dscp {
    /// The underlay sees none: what is inside is nobody's affair, and many networks treat foreign classes badly.
    #[default]
    Clear,
    /// The underlay sees the inner packet's.
    Copy,
}

/// Neither of the two.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is neither clear nor copy")]
pub struct UnknownDscp(String);

impl FromStr for Dscp {
    type Err = UnknownDscp;

    fn from_str(text: &str) -> Result<Self, UnknownDscp> {
        match text {
            "clear" => Ok(Dscp::Clear),
            "copy" => Ok(Dscp::Copy),
            other => Err(UnknownDscp(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (number, offload) in Offload::ALL.into_iter().enumerate() {
            assert_eq!(offload.name().parse(), Ok(offload));
            assert_eq!(offload as usize, number);
        }
        assert!("GSO".parse::<Offload>().is_err());
        assert_eq!("copy".parse(), Ok(Dscp::Copy));
        assert!("".parse::<Dscp>().is_err());
    }
}
