//! Puts the fast path (`filter/fastpath.rs`) on the domain's devices that are there.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use weft_core::layout::VXLAN_CARRIER;
use weft_core::model::Proto;

use super::bpf::{Classifier, Map, MapKind};
use super::domain::Domain;
use super::nfnetlink::{self, TableFamily};
use super::nft::{feed, removing, replacing};
use super::rtnl::Rtnl;
use crate::error::{Doing, Result};
use crate::filter::fastpath::program::{
    self, BACKEND_LEN, HomeValue, LegValue, Maps, OwnerValue, PREFIX_LEN, Setting, counter,
};
use crate::filter::fastpath::{Backend, FastMemory, FastPath, TABLE, TRANSLATED, WIDEST};
use crate::filter::vxlan::VxlanTraffic;

/// Peers whose traffic is counted at a time.
const MAX_PEERS: usize = 8192;
/// Octets of a device's index, and of an address.
const WORD: usize = 4;

/// The fast path of one domain, as far as this process knows it.
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

/// What it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ground {
    plan: FastPath,
    /// The indices of its devices.
    devices: BTreeMap<String, u32>,
}

#[derive(Debug)]
struct Laid {
    ground: Ground,
    /// By device the kernel's number of the program.
    programs: BTreeMap<u32, u32>,
}

/// What has taken it since this process began.
#[derive(Debug, Default)]
pub(super) struct FastCounters {
    map: OnceLock<Map>,
    /// Everybody's place in the map. Nobody loses it.
    places: Mutex<BTreeMap<[u8; 6], u32>>,
    is_laid: AtomicBool,
}

impl FastCounters {
    fn map(&self) -> io::Result<&Map> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let sizes = (WORD, counter::LEN);
        let map = Map::new(MapKind::Array, "weft_traffic", sizes, MAX_PEERS)?;
        Ok(self.map.get_or_init(|| map))
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<[u8; 6], u32>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a peer is counted. Beyond the last place nobody is.
    fn place_of(&self, peer: [u8; 6]) -> u32 {
        let mut places = self.places();
        let next = places.len() as u32;
        *places.entry(peer).or_insert(next)
    }

    fn read(&self) -> BTreeMap<[u8; 6], VxlanTraffic> {
        let places = self.places();
        let traffic = |(peer, place): (&[u8; 6], &u32)| {
            let value = self.map.get()?.get(&place.to_ne_bytes()).ok()?;
            Some((*peer, counter::read(&value)))
        };
        places.iter().filter_map(traffic).collect()
    }
}

impl Domain {
    /// What took the fast path to and from each MAC since this process began.
    pub fn fast_traffic(&self) -> BTreeMap<[u8; 6], VxlanTraffic> {
        self.fast.read()
    }

    /// Is there one?
    pub fn has_fast_path(&self) -> bool {
        self.fast.is_laid.load(Ordering::Relaxed)
    }

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
    /// Takes it away unless it is this one. For before anything else is changed in the domain.
    ///
    /// # Errors
    /// The kernel can't be asked: it stands.
    pub fn withdraw_unless(&mut self, domain: &Domain, wanted: Option<&FastPath>) -> Result<()> {
        match &self.state {
            State::Laid(laid) if Some(&laid.ground.plan) == wanted => return Ok(()),
            State::Absent | State::Refused(_) => return Ok(()),
            State::Laid(_) | State::Unknown => {}
        }
        domain.withdraw_fast_path()?;
        self.state = State::Absent;
        Ok(())
    }

    /// Lays it on those of its devices that are there, unless it stands there. For once all else stands.
    ///
    /// # Errors
    /// The kernel refuses it, perhaps for want of `cls_bpf`; it is not tried again before something changes.
    pub fn lay(&mut self, domain: &Domain, wanted: &FastPath) -> Result<()> {
        let ground = Ground {
            plan: wanted.clone(),
            devices: domain.devices_of(wanted)?,
        };
        match &self.state {
            State::Refused(before) if *before == ground => return Ok(()),
            State::Laid(laid) if laid.ground == ground && domain.fast_path_stands(laid)? => {
                return domain.keep_fast_memory(&wanted.memory);
            }
            _ => {}
        }
        if ground.devices.len() < 2 || !ground.devices.contains_key(VXLAN_CARRIER) {
            return self.withdraw_unless(domain, None);
        }
        // Forgotten until it is done.
        self.state = State::Unknown;
        match domain.lay_fast_path(&ground) {
            Ok(programs) => {
                self.state = State::Laid(Laid { ground, programs });
                Ok(())
            }
            Err(error) => {
                self.withdraw_unless(domain, None)?;
                self.state = State::Refused(ground);
                Err(error)
            }
        }
    }
}

impl Domain {
    fn devices_of(&self, plan: &FastPath) -> Result<BTreeMap<String, u32>> {
        let links = self.with(|ns| ns.rtnl.links().doing(|| "list the devices".into()))?;
        let of_it = links.into_iter().filter(|link| plan.has_device(&link.name));
        Ok(of_it.map(|link| (link.name, link.index)).collect())
    }

    /// Whoever laid it: nobody else puts anything on the domain's devices. Once it was rules, in the table of the memory.
    fn withdraw_fast_path(&self) -> Result<()> {
        self.with(|ns| {
            for link in ns.rtnl.links().doing(|| "list the devices".into())? {
                let removed = ns.rtnl.remove_classifier(link.index);
                removed.doing(|| format!("take the fast path off {}", link.name))?;
            }
            let rules = nfnetlink::handles(TableFamily::Netdev, TABLE);
            if !rules
                .doing(|| "read the fast path's table".into())?
                .is_empty()
            {
                feed(&removing(&format!("netdev {TABLE}")))?;
            }
            Ok(())
        })?;
        self.fast.is_laid.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn fast_path_stands(&self, laid: &Laid) -> Result<bool> {
        self.with(|ns| {
            for (device, program) in &laid.programs {
                let there = ns.rtnl.classifier(*device);
                if there.doing(|| "read the fast path".into())? != Some(*program) {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// For the next daemon. It stands before anything takes the fast path.
    fn keep_fast_memory(&self, memory: &FastMemory) -> Result<()> {
        if self.fast_memory()? != *memory {
            self.run(|| feed(&replacing(&format!("netdev {TABLE}"), &memory.table())))??;
        }
        Ok(())
    }

    fn lay_fast_path(&self, ground: &Ground) -> Result<BTreeMap<u32, u32>> {
        self.keep_fast_memory(&ground.plan.memory)?;
        let programs = Programs::load(ground, &self.fast);
        let programs = programs.doing(|| "load the fast path".into())?;
        let put = self.with(|ns| {
            let put = programs.put(&ns.rtnl, &ground.devices);
            put.doing(|| "put the fast path on its devices".into())
        })?;
        self.fast.is_laid.store(true, Ordering::Relaxed);
        Ok(put)
    }
}

/// Both programs. Their maps are theirs once they are loaded.
struct Programs {
    from_legs: Classifier,
    from_peers: Classifier,
}

impl Programs {
    fn load(Ground { plan, devices }: &Ground, counters: &FastCounters) -> io::Result<Self> {
        let present = || {
            let legs = plan.legs.iter();
            legs.filter_map(|(name, leg)| Some((*devices.get(name)?, *leg)))
        };
        let legs = filled(
            "weft_legs",
            (WORD, LegValue::LEN),
            present().map(|(device, leg)| (device.to_ne_bytes().to_vec(), leg.octets())),
        )?;
        let homes = filled(
            "weft_homes",
            (WORD, HomeValue::LEN),
            present().map(|(device, leg)| {
                (leg.ip.octets().to_vec(), HomeValue { device, leg }.octets())
            }),
        )?;
        let owners = Map::new(
            MapKind::LpmTrie,
            "weft_owners",
            (PREFIX_LEN, OwnerValue::LEN),
            plan.owners.len(),
        )?;
        for (net, owner) in &plan.owners {
            let value = owner.octets(counters.place_of(owner.mac));
            owners.put(&program::prefix(net.prefix_len(), net.network()), &value)?;
        }
        let translated = &plan.memory.translated;
        let backends = translated.iter();
        let backends = backends.map(|backend| (program::backend(*backend), vec![1]));
        let translated = (!translated.is_empty())
            .then(|| filled("weft_backends", (BACKEND_LEN, 1), backends))
            .transpose()?;
        let setting = Setting {
            ula: plan.ula,
            carrier: (devices.get(VXLAN_CARRIER).copied().unwrap_or(0), plan.mac),
            mtu: plan.mtu,
            maps: Maps {
                legs: legs.descriptor(),
                homes: homes.descriptor(),
                owners: owners.descriptor(),
                translated: translated.as_ref().map(Map::descriptor),
                traffic: counters.map()?.descriptor(),
            },
        };
        Ok(Self {
            from_legs: Classifier::load("weft_from_legs", &program::from_legs(&setting))?,
            from_peers: Classifier::load("weft_from_peers", &program::from_peers(&setting))?,
        })
    }

    /// Gives by device the kernel's number of its program.
    fn put(&self, rtnl: &Rtnl, devices: &BTreeMap<String, u32>) -> io::Result<BTreeMap<u32, u32>> {
        let mut programs = BTreeMap::new();
        for (name, device) in devices {
            let (program, shown) = match name == VXLAN_CARRIER {
                true => (&self.from_peers, "from_peers"),
                false => (&self.from_legs, "from_legs"),
            };
            rtnl.set_classifier(*device, shown, program.descriptor())?;
            programs.insert(*device, program.id()?);
        }
        Ok(programs)
    }
}

fn filled(
    name: &str,
    sizes: (usize, usize),
    elements: impl Iterator<Item = (Vec<u8>, Vec<u8>)>,
) -> io::Result<Map> {
    let elements: Vec<_> = elements.collect();
    let map = Map::new(MapKind::Hash, name, sizes, elements.len())?;
    for (key, value) in &elements {
        map.put(key, value)?;
    }
    Ok(map)
}

#[cfg(test)]
mod tests;
