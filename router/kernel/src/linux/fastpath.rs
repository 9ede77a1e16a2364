//! Lays the fast path (`filter/fastpath.rs`) in the domain, on the devices that are there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

use weft_core::model::Proto;

use super::domain::Domain;
use super::nfnetlink::{self, TableFamily};
use super::nft::{feed, removing, replacing};
use crate::error::{Doing, Result};
use crate::filter::fastpath::{Backend, FastMemory, FastPath, TABLE, TRANSLATED, WIDEST};

/// The table of one domain, as far as this process knows it.
#[derive(Debug, Default)]
pub struct FastTable {
    state: State,
}

#[derive(Debug, Default)]
enum State {
    /// There may be one of an earlier process.
    #[default]
    Unknown,
    Absent,
    Laid(Laid),
    /// Not tried again before something changes.
    Refused(Ground),
}

/// What a table stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ground {
    plan: FastPath,
    /// The indices of its devices.
    devices: BTreeMap<String, u32>,
}

#[derive(Debug)]
struct Laid {
    ground: Ground,
    /// Its rules' ([`nfnetlink::handles`]).
    handles: Vec<u64>,
}

impl Domain {
    /// What an earlier process knew, as its table holds it.
    ///
    /// # Errors
    /// The kernel's tables can't be read.
    pub fn fast_memory(&self) -> Result<FastMemory> {
        let keys = |set| nfnetlink::keys(TableFamily::Netdev, TABLE, set);
        let read = self.run(|| Ok((keys(TRANSLATED)?, keys(WIDEST)?)))?;
        let (translated, widest) = read
            .map_err(|error: io::Error| error)
            .doing(|| "read the fast path's memory".into())?;
        Ok(FastMemory {
            translated: translated.iter().filter_map(|key| backend(key)).collect(),
            widest: widest.iter().filter_map(|key| width(key)).collect(),
        })
    }
}

/// Each part of a key begins at a multiple of four octets.
fn backend(key: &[u8]) -> Option<Backend> {
    let ip: [u8; 4] = *key.first_chunk()?;
    let proto = match *key.get(4)? {
        6 => Proto::Tcp,
        17 => Proto::Udp,
        _ => return None,
    };
    let port = u16::from_be_bytes(*key.get(8..)?.first_chunk()?);
    Some(Backend {
        ip: Ipv4Addr::from(ip),
        proto,
        port,
    })
}

fn width(key: &[u8]) -> Option<([u8; 6], u16)> {
    let mtu = u16::from_be_bytes(*key.get(8..)?.first_chunk()?);
    Some((*key.first_chunk()?, mtu))
}

impl FastTable {
    /// Takes the table away unless it is this one. For before anything else is changed in the domain.
    ///
    /// # Errors
    /// nft can't be run: the table stands.
    pub fn withdraw_unless(&mut self, domain: &Domain, wanted: Option<&FastPath>) -> Result<()> {
        match &self.state {
            State::Laid(laid) if Some(&laid.ground.plan) == wanted => return Ok(()),
            State::Absent | State::Refused(_) => return Ok(()),
            State::Laid(_) | State::Unknown => {}
        }
        domain.run(|| -> Result<()> {
            if !handles()?.is_empty() {
                feed(&removing(&format!("netdev {TABLE}")))?;
            }
            Ok(())
        })??;
        self.state = State::Absent;
        Ok(())
    }

    /// Lays it on those of its devices that are there, unless it stands there. For once all else stands.
    ///
    /// # Errors
    /// The kernel refuses it, perhaps for want of `nft_fwd_netdev`; it is not tried again before something changes.
    pub fn lay(&mut self, domain: &Domain, wanted: &FastPath) -> Result<()> {
        let ground = Ground {
            plan: wanted.clone(),
            devices: domain.devices_of(wanted)?,
        };
        match &self.state {
            State::Refused(before) if *before == ground => return Ok(()),
            State::Laid(laid) if laid.ground == ground => {
                let now = domain.run(handles)??;
                if now == laid.handles {
                    return Ok(());
                }
            }
            _ => {}
        }
        let present: BTreeSet<&str> = ground.devices.keys().map(String::as_str).collect();
        let Some(body) = wanted.table(&present) else {
            return self.withdraw_unless(domain, None);
        };
        let text = replacing(&format!("netdev {TABLE}"), &body);
        // Forgotten until it is done.
        self.state = State::Unknown;
        match domain.run(|| feed(&text))? {
            Ok(()) => {
                let handles = domain.run(handles)??;
                self.state = State::Laid(Laid { ground, handles });
                Ok(())
            }
            Err(error) => {
                self.withdraw_unless(domain, None)?;
                self.state = State::Refused(ground);
                Err(error.into())
            }
        }
    }
}

fn handles() -> Result<Vec<u64>> {
    let handles = nfnetlink::handles(TableFamily::Netdev, TABLE);
    handles.doing(|| format!("read the nft table netdev {TABLE}"))
}

impl Domain {
    fn devices_of(&self, plan: &FastPath) -> Result<BTreeMap<String, u32>> {
        let links = self.with(|ns| ns.rtnl.links().doing(|| "list the devices".into()))?;
        let of_it = links.into_iter().filter(|link| plan.has_device(&link.name));
        Ok(of_it.map(|link| (link.name, link.index)).collect())
    }
}
