//! What two hosts say to each other about carriers, inside their session.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::Ends;
use crate::view::Seal;

/// What one takes, and knows of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Opening<A> {
    pub(super) yours: A,
    pub(super) mine: A,
    pub(super) spi: Option<u32>,
    /// I know that you do, too,
    pub(super) confirmed: bool,
    /// and under which SPI.
    pub(super) knows: Option<u32>,
}

impl<A> Opening<A> {
    /// The same between addresses of another kind.
    pub(super) fn between<B>(self, yours: B, mine: B) -> Opening<B> {
        Opening {
            yours,
            mine,
            spi: self.spi,
            confirmed: self.confirmed,
            knows: self.knows,
        }
    }
}

impl<A: Copy + Into<IpAddr>> Opening<A> {
    pub(super) fn any(self) -> Opening<IpAddr> {
        self.between(self.yours.into(), self.mine.into())
    }
}

impl Opening<IpAddr> {
    /// The way, as who hears this calls its ends.
    pub(super) fn ends(&self) -> Ends {
        Ends {
            mine: self.yours,
            theirs: self.mine,
            seal: self.spi.map_or(Seal::Plain, |_| Seal::Esp),
        }
    }
}

/// What two hosts say to each other about it. A weft that does not know one of these words does not hear it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Word {
    /// I take VXLAN from you, between your address and mine: in the clear, or under this SPI.
    Open(Opening<Ipv4Addr>),
    /// I take none from you.
    Shut,
    /// I sent you this over VXLAN; did it come?
    Sent(u64),
    /// This came over VXLAN.
    Came(u64),
    /// This did not.
    Missed(u64),
    /// As [`Word::Open`].
    Open6(Opening<Ipv6Addr>),
}

impl Word {
    pub(super) fn open(opening: Opening<IpAddr>) -> Self {
        match (opening.yours, opening.mine) {
            (IpAddr::V4(yours), IpAddr::V4(mine)) => Word::Open(opening.between(yours, mine)),
            (yours, mine) => Word::Open6(opening.between(v6(yours), v6(mine))),
        }
    }
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}
