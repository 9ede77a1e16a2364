//! Puts the fast path (`filter/fastpath.rs`) on the domain's devices that are there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use weft_core::model::Proto;

use super::bpf::{Classifier, Map, MapKind};
use super::domain::Domain;
use super::nfnetlink::{self, TableFamily};
use super::nft::{feed, removing, replacing};
use super::rtnl::Rtnl;
use crate::error::{Doing, Result};
use crate::filter::fastpath::program::{
    self, BACKEND_LEN, HomeValue, LegValue, OwnerValue, PREFIX_LEN, Setting, WayValue, counter,
};
use crate::filter::fastpath::{Backend, FastMemory, FastPath, Owner, TABLE, TRANSLATED};
use crate::filter::vxlan::CarrierTraffic;

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

impl Ground {
    /// A leg is there, and a carrier.
    fn leads_anywhere(&self) -> bool {
        let (legs, carriers) = (&self.plan.legs, &self.plan.carriers);
        legs.keys().any(|leg| self.devices.contains_key(leg))
            && carriers.keys().any(|c| self.devices.contains_key(*c))
    }
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
    /// The peers to whom it leads now.
    led_to: Mutex<BTreeSet<[u8; 6]>>,
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

    fn led_to(&self) -> MutexGuard<'_, BTreeSet<[u8; 6]>> {
        self.led_to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a peer is counted. Beyond the last place nobody is.
    fn place_of(&self, peer: [u8; 6]) -> u32 {
        let mut places = self.places();
        let next = places.len() as u32;
        *places.entry(peer).or_insert(next)
    }

    fn read(&self) -> BTreeMap<[u8; 6], CarrierTraffic> {
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
    pub fn fast_traffic(&self) -> BTreeMap<[u8; 6], CarrierTraffic> {
        self.fast.read()
    }

    /// The MACs of those to whom packets of containers take the fast path.
    pub fn fast_peers(&self) -> BTreeSet<[u8; 6]> {
        self.fast.led_to().clone()
    }

    /// What an earlier process knew, as its table holds it.
    ///
    /// # Errors
    /// The kernel's tables can't be read.
    pub fn fast_memory(&self) -> Result<FastMemory> {
        let read = self.run(|| nfnetlink::keys(TableFamily::Netdev, TABLE, TRANSLATED))?;
        let translated = read.doing(|| "read the fast path's memory".into())?;
        Ok(FastMemory {
            translated: translated.iter().filter_map(|key| backend(key)).collect(),
        })
    }

    /// Keeps it for the next daemon. Call it before anything goes untracked for it, on the fast path or beside it.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn keep_fast_memory(&self, memory: &FastMemory) -> Result<()> {
        if self.fast_memory()? != *memory {
            self.run(|| feed(&replacing(&format!("netdev {TABLE}"), &memory.table())))??;
        }
        Ok(())
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
                return Ok(());
            }
            _ => {}
        }
        // Some device of before may be none of this one's.
        self.withdraw_unless(domain, None)?;
        if !ground.leads_anywhere() {
            return Ok(());
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
        self.fast.led_to().clear();
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

    fn lay_fast_path(&self, ground: &Ground) -> Result<BTreeMap<u32, u32>> {
        let programs = Programs::load(ground, &self.fast);
        let programs = programs.doing(|| "load the fast path".into())?;
        let put = self.with(|ns| {
            let put = programs.put(&ns.rtnl, &ground.devices);
            put.doing(|| "put the fast path on its devices".into())
        })?;
        let ways = ground.plan.ways.iter().map(|(_, way)| way);
        let there = ways.filter(|way| ground.devices.contains_key(way.carrier));
        *self.fast.led_to() = there.map(|way| way.owner.mac).collect();
        Ok(put)
    }
}

/// All programs. Their maps are theirs once they are loaded.
struct Programs {
    from_legs: Classifier,
    /// By carrier.
    from_peers: BTreeMap<&'static str, Classifier>,
}

impl Programs {
    fn load(ground: &Ground, counters: &FastCounters) -> io::Result<Self> {
        let plan = &ground.plan;
        let translated = &plan.memory.translated;
        let backends = translated.iter();
        let backends = backends.map(|backend| (program::backend(*backend), vec![1]));
        let translated = (!translated.is_empty())
            .then(|| filled(MapKind::Hash, "weft_backends", (BACKEND_LEN, 1), backends))
            .transpose()?;
        let setting = Setting {
            ula: plan.ula,
            translated: translated.as_ref().map(Map::descriptor),
            traffic: counters.map()?.descriptor(),
        };
        let from_legs = from_legs(ground, &setting, counters)?;
        let homes = filled(
            MapKind::Hash,
            "weft_homes",
            (WORD, HomeValue::LEN),
            present_legs(ground).map(|(device, leg)| {
                (leg.ip.octets().to_vec(), HomeValue { device, leg }.octets())
            }),
        )?;
        let mut from_peers = BTreeMap::new();
        for (carrier, segment) in &plan.carriers {
            let owners = segment.owners.iter().map(|(net, owner)| {
                let value = counted(owner, counters).octets();
                (program::prefix(net.prefix_len(), net.network()), value)
            });
            let sizes = (PREFIX_LEN, OwnerValue::LEN);
            let owners = filled(MapKind::LpmTrie, "weft_owners", sizes, owners)?;
            let program = program::from_peers(&setting, homes.descriptor(), owners.descriptor());
            from_peers.insert(*carrier, Classifier::load("weft_from_peers", &program)?);
        }
        Ok(Self {
            from_legs,
            from_peers,
        })
    }

    /// Gives by device the kernel's number of its program.
    fn put(&self, rtnl: &Rtnl, devices: &BTreeMap<String, u32>) -> io::Result<BTreeMap<u32, u32>> {
        let mut programs = BTreeMap::new();
        for (name, device) in devices {
            let (program, shown) = match self.from_peers.get(name.as_str()) {
                Some(program) => (program, "from_peers"),
                None => (&self.from_legs, "from_legs"),
            };
            rtnl.set_classifier(*device, shown, program.descriptor())?;
            programs.insert(*device, program.id()?);
        }
        Ok(programs)
    }
}

fn from_legs(
    ground: &Ground,
    setting: &Setting,
    counters: &FastCounters,
) -> io::Result<Classifier> {
    let legs = filled(
        MapKind::Hash,
        "weft_legs",
        (WORD, LegValue::LEN),
        present_legs(ground).map(|(device, leg)| (device.to_ne_bytes().to_vec(), leg.octets())),
    )?;
    let ways = ground.plan.ways.iter().filter_map(|(net, way)| {
        let value = WayValue {
            owner: counted(&way.owner, counters),
            device: *ground.devices.get(way.carrier)?,
            mac: ground.plan.carriers.get(way.carrier)?.mac,
            mtu: way.mtu,
        };
        let key = program::prefix(net.prefix_len(), net.network());
        Some((key, value.octets()))
    });
    let sizes = (PREFIX_LEN, WayValue::LEN);
    let ways = filled(MapKind::LpmTrie, "weft_ways", sizes, ways)?;
    let program = program::from_legs(setting, legs.descriptor(), ways.descriptor());
    Classifier::load("weft_from_legs", &program)
}

fn present_legs(Ground { plan, devices }: &Ground) -> impl Iterator<Item = (u32, LegValue)> {
    let legs = plan.legs.iter();
    legs.filter_map(|(name, leg)| Some((*devices.get(name)?, *leg)))
}

fn counted(owner: &Owner, counters: &FastCounters) -> OwnerValue {
    OwnerValue {
        mac: owner.mac,
        place: owner.place,
        counter: counters.place_of(owner.mac),
    }
}

fn filled(
    kind: MapKind,
    name: &str,
    sizes: (usize, usize),
    elements: impl Iterator<Item = (Vec<u8>, Vec<u8>)>,
) -> io::Result<Map> {
    let elements: Vec<_> = elements.collect();
    let map = Map::new(kind, name, sizes, elements.len())?;
    for (key, value) in &elements {
        map.put(key, value)?;
    }
    Ok(map)
}

#[cfg(test)]
mod tests;
