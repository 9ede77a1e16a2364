//! What the `vxlan` carrier's devices are like.

use std::net::IpAddr;

/// The carrier's devices, one for each IP version of the hosts' addresses: what there is to say of one that is up behind its
/// filter, or why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices<T = ()> {
    /// `wx0`.
    pub v4: Result<T, String>,
    /// `wx6`, which is there while some peer wants it.
    pub v6: Result<T, String>,
}

impl<T> Default for Devices<T> {
    fn default() -> Self {
        let no = || Err("it is not up yet".to_owned());
        Self { v4: no(), v6: no() }
    }
}

impl<T> Devices<T> {
    /// That of packets to a host at this address.
    pub fn to(&self, host: IpAddr) -> &Result<T, String> {
        match host {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        }
    }

    /// Whether they are up alone.
    pub fn states(&self) -> Devices {
        let state = |device: &Result<T, String>| match device {
            Ok(_) => Ok(()),
            Err(why) => Err(why.clone()),
        };
        Devices {
            v4: state(&self.v4),
            v6: state(&self.v6),
        }
    }
}
