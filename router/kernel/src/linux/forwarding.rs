//! The host's forwarding switches: what weft switches on, how it is undone, and who else relies on it by then.
//!
//! *Somebody else relies on it* means: since weft switched it on, a chain appeared in a table that hooks forwarding or
//! source NAT (Docker, libvirt, firewalld, ufw and `iptables -t nat` all make one), or a legacy iptables table did.
//! Chains that were there before don't count: nothing was forwarded then, and nobody missed it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

use netlink_packet_route::route::RouteProtocol;
use serde::{Deserialize, Serialize};
use weft_core::layout::{HOST_LEG, NFT_TABLE};

use super::nfnetlink::{self, Hook, TableFamily};
use super::rtnl::Rtnl;
use super::sysctl;
use crate::filter::Guard;
use crate::state::Family;

const FORWARD4: &str = "net/ipv4/ip_forward";
const FORWARD6: &str = "net/ipv6/conf/all/forwarding";
const REDIRECTS4: &str = "net/ipv4/conf/all/accept_redirects";

/// What must outlive the daemon so that `down`, or the next start, can put the host back as it was. The caller keeps it
/// in the state directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The boot that it speaks of: switches don't outlive one.
    boot: String,
    v4: Option<Switched>,
    v6: Option<Switched>,
}

/// One family's switch, which weft turned on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Switched {
    /// The values before, by name.
    before: BTreeMap<String, String>,
    /// Who could have been forwarding before.
    forwarders: BTreeSet<String>,
}

impl HostState {
    fn of(&self, family: Family) -> Option<&Switched> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    fn slot(&mut self, family: Family) -> &mut Option<Switched> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Forgets what an earlier boot left.
    fn of_this_boot(&mut self) {
        let boot = boot_id();
        if self.boot != boot {
            *self = HostState {
                boot,
                ..HostState::default()
            };
        }
    }

    /// What weft switched on, for people.
    pub(crate) fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (family, name) in [(Family::V4, FORWARD4), (Family::V6, FORWARD6)] {
            let Some(switched) = self.of(family) else {
                continue;
            };
            let dotted = name.replace('/', ".");
            lines.push(format!("{dotted} = 1 (was 0)"));
            let advertised = switched.before.keys().filter(|k| k.ends_with("accept_ra"));
            lines.extend(advertised.map(|k| format!("{} = 2 (was 1)", k.replace('/', "."))));
        }
        lines
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim_end().to_owned())
        .unwrap_or_default()
}

fn switch(family: Family) -> &'static str {
    match family {
        Family::V4 => FORWARD4,
        Family::V6 => FORWARD6,
    }
}

fn forwards(family: Family) -> io::Result<bool> {
    Ok(sysctl::read(switch(family))?.is_some_and(|v| v != "0"))
}

/// Keeps the state before a step that needs it to be undone.
pub(crate) type Save<'a> = &'a mut (dyn FnMut(&HostState) -> io::Result<()> + Send);

/// Why a switch was not turned on.
pub(crate) enum SwitchError {
    Kernel(io::Error),
    Save(io::Error),
}

impl From<io::Error> for SwitchError {
    fn from(error: io::Error) -> Self {
        SwitchError::Kernel(error)
    }
}

/// Switches forwarding on; what was before is saved first. Says whether it changed anything.
pub(crate) fn switch_on(
    rtnl: &Rtnl,
    family: Family,
    state: &mut HostState,
    save: Save<'_>,
) -> Result<bool, SwitchError> {
    state.of_this_boot();
    if forwards(family)? {
        return Ok(false);
    }
    if state.of(family).is_none() {
        let switched = Switched {
            before: settings(rtnl, family)?,
            forwarders: forwarders(family)?,
        };
        let mut next = state.clone();
        *next.slot(family) = Some(switched);
        save(&next).map_err(SwitchError::Save)?;
        *state = next;
    }
    if family == Family::V6 {
        // First of all: a host that forwards believes no router advertisement, unless told so, and would lose its own
        // default route.
        let before = state
            .of(family)
            .map(|s| s.before.clone())
            .unwrap_or_default();
        for name in before.keys().filter(|name| name.ends_with("accept_ra")) {
            sysctl::ensure(name, "2")?;
        }
    }
    sysctl::write(switch(family), "1")?;
    Ok(true)
}

/// Everything that the switch changes along with itself.
fn settings(rtnl: &Rtnl, family: Family) -> io::Result<BTreeMap<String, String>> {
    let mut names = vec![];
    match family {
        Family::V4 => {
            names.push(REDIRECTS4.to_owned());
            names.push("net/ipv4/conf/default/forwarding".to_owned());
            for device in sysctl::devices("ipv4")? {
                names.push(format!("net/ipv4/conf/{device}/forwarding"));
            }
        }
        Family::V6 => {
            names.push("net/ipv6/conf/default/forwarding".to_owned());
            for device in sysctl::devices("ipv6")? {
                names.push(format!("net/ipv6/conf/{device}/forwarding"));
            }
            for device in advertised_uplinks(rtnl)? {
                names.push(format!("net/ipv6/conf/{device}/accept_ra"));
            }
        }
    }
    let mut found = BTreeMap::new();
    for name in names {
        let ours = name.contains(&format!("/{HOST_LEG}/"));
        if let (false, Some(value)) = (ours, sysctl::read(&name)?) {
            found.insert(name, value);
        }
    }
    Ok(found)
}

/// Uplinks whose default route came by router advertisement and would go with it.
fn advertised_uplinks(rtnl: &Rtnl) -> io::Result<BTreeSet<String>> {
    let links = rtnl.links()?;
    let mut found = BTreeSet::new();
    for route in rtnl.routes(Family::V6)? {
        let by_router = route.to.prefix_len() == 0 && route.protocol == RouteProtocol::Ra;
        let link = links.iter().find(|l| Some(l.index) == route.device);
        if let (true, Some(link)) = (by_router, link) {
            let name = format!("net/ipv6/conf/{}/accept_ra", link.name);
            if sysctl::read(&name)?.as_deref() == Some("1") {
                found.insert(link.name.clone());
            }
        }
    }
    Ok(found)
}

/// Everybody who has a say in forwarding or source NAT, as `family table chain`.
fn forwarders(family: Family) -> io::Result<BTreeSet<String>> {
    let own = match family {
        Family::V4 => TableFamily::Ip,
        Family::V6 => TableFamily::Ip6,
    };
    let chains: Vec<_> = nfnetlink::chains()?
        .into_iter()
        .filter(|c| c.family == own || c.family == TableFamily::Inet)
        .filter(|c| !(c.family == TableFamily::Inet && c.table == NFT_TABLE))
        .collect();
    let tables: BTreeSet<_> = chains
        .iter()
        .filter(|c| matches!(c.hook, Some(Hook::Forward | Hook::NatPostrouting)))
        .map(|c| (c.family, c.table.clone()))
        .collect();
    let mut found: BTreeSet<String> = chains
        .iter()
        .filter(|c| tables.contains(&(c.family, c.table.clone())))
        .map(|c| format!("{} {} {}", c.family.word(), c.table, c.name))
        .collect();
    let legacy = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let names = fs::read_to_string(legacy).unwrap_or_default();
    found.extend(names.lines().map(|table| format!("legacy {table}")));
    Ok(found)
}

fn newcomers(family: Family, switched: &Switched) -> io::Result<Vec<String>> {
    Ok(forwarders(family)?
        .difference(&switched.forwarders)
        .cloned()
        .collect())
}

/// Should forwards that are not weft's be dropped? Yes where weft alone made (or is about to make) this host forward.
pub(crate) fn guard(wanted: bool, ipv6: bool, state: &HostState) -> io::Result<Guard> {
    let mut state = state.clone();
    state.of_this_boot();
    let one = |family| -> io::Result<bool> {
        match state.of(family) {
            Some(switched) => Ok(newcomers(family, switched)?.is_empty()),
            None => Ok(wanted && !forwards(family)?),
        }
    };
    Ok(Guard {
        v4: one(Family::V4)?,
        v6: ipv6 && one(Family::V6)?,
    })
}

/// Puts a family's switches back, unless somebody else relies on them by now.
pub(crate) fn switch_off(family: Family, state: &mut HostState) -> io::Result<()> {
    state.of_this_boot();
    let Some(switched) = state.of(family).cloned() else {
        return Ok(());
    };
    let newcomers = newcomers(family, &switched)?;
    if newcomers.is_empty() {
        sysctl::write(switch(family), "0")?;
        for (name, value) in &switched.before {
            put_back(name, value)?;
        }
    } else {
        tracing::info!(
            ?newcomers,
            ?family,
            "forwarding stays on: others rely on it by now"
        );
    }
    *state.slot(family) = None;
    Ok(())
}

fn put_back(name: &str, value: &str) -> io::Result<()> {
    // Somebody who has changed it again since meant it.
    if name.ends_with("accept_ra") && sysctl::read(name)?.as_deref() != Some("2") {
        return Ok(());
    }
    sysctl::ensure(name, value).map(drop)
}
