//! What must hold after every step of a node, looked at when what it shows has changed.

mod heirs;
mod logs;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use weft_core::catalog::Catalog;
use weft_core::model::{EndpointId, Label, NodeId, Now, WallMicros};
use weft_core::value::{Kind, Object, endpoint_key, label_key};
use weft_core::wire::MAX_DATAGRAM;

use crate::nodes::Shell;
use crate::promises::Ledger;
use crate::world::World;
use logs::{Newest, Start};

/// No honest clock is ahead by more, microseconds.
const FAR_AHEAD: u64 = 3_600_000_000;

/// What a ready node believes to own, first and last address of each part.
struct Owned {
    boots: u64,
    parts: Vec<(u32, u32)>,
}

/// What one start of a host has seen: of endpoints that were given back, of all logs, and of its own.
#[derive(Default)]
struct Seen {
    live: BTreeSet<EndpointId>,
    gone: BTreeSet<EndpointId>,
    newest: Newest,
    own: Option<u64>,
}

/// Looks at one node after the other.
#[derive(Default)]
pub struct Watch {
    owned: BTreeMap<usize, Owned>,
    seen: BTreeMap<(usize, u64), Seen>,
    /// The last start of each host that was seen.
    starts: BTreeMap<usize, Start>,
}

impl Watch {
    /// A host did something: what is wrong now?
    pub fn look(
        &mut self,
        world: &mut World<Shell>,
        host: usize,
        ledger: &mut Ledger,
    ) -> Vec<String> {
        let mut lines = Vec::new();
        let (now, boots) = (world.now, world.hosts[host].boots());
        let (key, turns) = (world.hosts[host].key(), world.hosts[host].turns());
        let Some(shell) = world.hosts[host].machine.as_mut() else {
            return lines;
        };
        if !shell.ready || ledger.evicted.contains(&host) {
            return lines;
        }
        let changed = shell.take_changed();
        let shell = &*shell;
        let seen = self.seen.entry((host, boots)).or_default();
        let owned = self.owned.get(&host).filter(|owned| owned.boots == boots);
        let had = owned.map_or(&[][..], |owned| &owned.parts);
        heirs::inherits_by_right(host, shell, ledger, had, &mut seen.own, &mut lines);
        if !changed {
            return lines;
        }
        // A disk that is again what it was has forgotten how often it was started.
        let (disk, number) = ((key, turns), shell.node().generation());
        let before = self.starts.insert(host, (disk, boots, number));
        logs::counts_on(host, before, (disk, boots, number), &mut lines);
        logs::keeps_the_newest(host, shell, ledger, &mut seen.newest, &mut lines);
        knows_no_removed(host, shell, now, &mut lines);
        keeps_its_word(host, shell, ledger, now, &mut lines);
        let Some(ring) = shell.node().ring() else {
            return lines;
        };
        nothing_returns(host, shell, ledger, seen, &mut lines);
        let parts = ring.parts(&shell.id());
        let known = self.owned.get(&host);
        if known.is_none_or(|known| known.boots != boots || known.parts != parts) {
            self.owned.insert(host, Owned { boots, parts });
            self.owns_alone(world, host, ledger, &mut lines);
        }
        lines
    }

    /// No two nodes that run believe to own one address.
    fn owns_alone(
        &self,
        world: &World<Shell>,
        host: usize,
        ledger: &Ledger,
        lines: &mut Vec<String>,
    ) {
        let present = |host: &usize, owned: &Owned| {
            let there = &world.hosts[*host];
            let shell = there.machine.as_ref()?;
            (there.boots() == owned.boots).then(|| shell.id())
        };
        let Some((mine, me)) = self
            .owned
            .get(&host)
            .and_then(|owned| Some((owned, present(&host, owned)?)))
        else {
            return;
        };
        for (other, owned) in &self.owned {
            if present(other, owned).is_none_or(|id| id == me) {
                continue;
            }
            let both = overlap(&mine.parts, &owned.parts);
            // What a removed node was given in its last moment is taken by force only when it is heard of.
            let forced = |host: &usize, ip: u32| {
                let shell = world.hosts[*host].machine.as_ref();
                let ring = shell.and_then(|shell| shell.node().ring());
                ring.is_some_and(|ring| ring.was_forced(ip.into()))
            };
            let disputed = |ip: u32| {
                ledger.is_disputed(ip)
                    || (ledger.in_dispute() && (forced(&host, ip) || forced(other, ip)))
            };
            let excused = |ip: &u32| ledger.is_tainted(*ip) || disputed(*ip);
            let they = present(other, owned);
            let lies = |id: &NodeId| ledger.liars.contains(id);
            let void = ledger.divided
                || ledger.evicted.contains(other)
                || lies(&me)
                || they.as_ref().is_some_and(lies);
            if let Some(ip) = both.filter(|ip| !void && !excused(ip)) {
                let told = |host: &usize| {
                    let catalog = world.hosts[*host].machine.as_ref()?.node().catalog()?;
                    Some(history(catalog, ip))
                };
                let grants = [&host, other].map(told);
                let ip = Ipv4Addr::from(ip);
                lines.push(format!(
                    "{host} and {other} both believe to own {ip}: {grants:?}"
                ));
            }
        }
    }
}

/// What a node acknowledged it still shows, and it lies in its own part of the range.
fn keeps_its_word(
    host: usize,
    shell: &Shell,
    ledger: &mut Ledger,
    now: Now,
    lines: &mut Vec<String>,
) {
    let node = shell.node();
    let (Some(catalog), Some(ring), Some(roster)) = (node.catalog(), node.ring(), node.roster())
    else {
        return;
    };
    let me = shell.id();
    for id in ledger.of_host(host) {
        let Some((_, ip)) = ledger.endpoints.get(&id).copied() else {
            continue;
        };
        let tainted = ledger.is_tainted(ip.into());
        let owner = ring.owner(ip);
        // A member may take over a removed node's space and lie about the votes: whoever has that knows in the end.
        let stolen = owner.is_some_and(|owner| ledger.liars.contains(&owner));
        let excused = tainted
            || stolen
            || ledger.divided
            || ledger.lying.contains(&host)
            || ledger.is_disputed(ip.into());
        match catalog.endpoint(&me, &endpoint_key(&id)) {
            Some(endpoint) if endpoint.ip == ip => {}
            Some(endpoint) if excused => ledger.readdressed(&id, endpoint.ip),
            _ if tainted => {}
            _ => lines.push(format!("{host} lost {id} at {ip}, which it acknowledged")),
        }
        // What a removed node gave at last may be void; whoever has it takes it over, which takes a write.
        let void = owner.is_some_and(|owner| roster.revoked().contains_key(&owner));
        if owner != Some(me) && !void && !excused {
            let grants = history(catalog, ip.into());
            lines.push(format!("{host} gave {ip}, which is not its own: {grants}"));
        }
    }
    // Its own clock may hide what it holds, and nobody's clock is that far ahead but a liar's.
    let wall = WallMicros(crate::world::true_wall(now).0 + FAR_AHEAD);
    let mut overruled = Vec::new();
    for (name, (_, vip)) in ledger
        .services
        .iter()
        .filter(|(_, (maker, _))| *maker == host)
    {
        let shown = shown_vip(catalog, name, wall);
        let kept = shown.is_some_and(|shown| shown == *vip || ledger.had(name, shown));
        // A liar's word from the future, which it said once more.
        let lied = !ledger.liars.is_empty()
            && shown == node.plan().map(|plan| plan.dns4())
            && !is_from_the_future(catalog, name, wall);
        // Of two copies the one that parted it may be gone before it told anybody.
        let of_twins = shown.is_some() && ledger.is_tainted((*vip).into());
        if lied || (of_twins && !kept) {
            overruled.push(name.clone());
        } else if !kept && !ledger.is_loose(name) {
            lines.push(format!(
                "{host} shows {name} at {shown:?}, which it acknowledged at {vip}"
            ));
        }
    }
    overruled.iter().for_each(|name| ledger.loosen(name));
}

/// All grants of an address, in the order in which they count.
pub(crate) fn history(catalog: &Catalog, ip: u32) -> String {
    let mut grants = catalog.grants();
    grants.retain(|(_, grant)| (grant.start..=grant.last).contains(&ip));
    grants.sort_by_key(|(_, grant)| (grant.epoch, grant.version));
    let texts = grants.iter().map(|(writer, grant)| {
        let (first, last) = grant.addresses();
        let (epoch, version, to) = (grant.epoch, grant.version, grant.to);
        format!("{writer} gave {first}-{last} to {to} ({epoch}, {version})")
    });
    texts.collect::<Vec<_>>().join("; ")
}

/// What a node has seen gone it never shows again.
fn nothing_returns(
    host: usize,
    shell: &Shell,
    ledger: &Ledger,
    seen: &mut Seen,
    lines: &mut Vec<String>,
) {
    let node = shell.node();
    let (Some(catalog), Some(roster)) = (node.catalog(), node.roster()) else {
        return;
    };
    for (id, writer) in &ledger.gone {
        // What a removed node said at last may be void; nobody shows anything of it.
        if ledger.cloned.contains(writer) || roster.revoked().contains_key(writer) {
            continue;
        }
        let held = catalog.endpoint(writer, &endpoint_key(id));
        match held {
            None => {
                if seen.live.remove(id) {
                    seen.gone.insert(*id);
                }
            }
            Some(_) if seen.gone.remove(id) => {
                lines.push(format!("{host} saw {id} go, and shows it again"));
            }
            Some(_) => {
                seen.live.insert(*id);
            }
        }
    }
}

/// Who has heard that a key is void has no session with it and holds no later word of it.
fn knows_no_removed(host: usize, shell: &Shell, now: Now, lines: &mut Vec<String>) {
    let (Some(catalog), Some(roster)) = (shell.node().catalog(), shell.node().roster()) else {
        return;
    };
    if roster.revoked().is_empty() || !roster.is_member(&shell.id()) {
        return;
    }
    for peer in shell.node().peers(now) {
        if !roster.is_member(&peer.id) {
            let id = peer.id;
            lines.push(format!(
                "{host} has a session with {id}, which is no member"
            ));
        }
    }
    for (id, revoked) in roster.revoked() {
        if !catalog.records_after(id, revoked.last_sequence).is_empty() {
            lines.push(format!("{host} took words of {id} after its removal"));
        }
    }
}

/// Does a record count that no clock has come to?
fn is_from_the_future(catalog: &Catalog, name: &Label, wall: WallMicros) -> bool {
    let key = label_key(name);
    let Some(writer) = catalog.shared_writer(Kind::SERVICE, &key, wall) else {
        return false;
    };
    let records = catalog.records_after(&writer, 0);
    let mut records = records
        .iter()
        .filter(|r| r.kind() == Kind::SERVICE && r.key() == key);
    records.any(|record| record.stamp().wall() > wall)
}

fn shown_vip(catalog: &Catalog, name: &Label, wall: WallMicros) -> Option<Ipv4Addr> {
    match catalog.shared_object(Kind::SERVICE, &label_key(name), wall) {
        Some(Object::Service(service)) => Some(service.vip),
        _ => None,
    }
}

/// What every node keeps stays within its bounds, and so do the datagrams.
pub fn sizes(world: &World<Shell>) -> Vec<String> {
    let mut lines = Vec::new();
    for (host, shell) in world.running() {
        let over = shell.node().sizes().into_iter();
        let over = over.filter(|(_, size, most)| size > most);
        lines.extend(
            over.map(|(what, size, most)| format!("{host}: {size} {what}, at most {most}")),
        );
    }
    if world.largest > MAX_DATAGRAM {
        lines.push(format!("a datagram of {} octets", world.largest));
    }
    lines
}

/// The first address that is in both lists.
fn overlap(a: &[(u32, u32)], b: &[(u32, u32)]) -> Option<u32> {
    let shared = |(start, last): &(u32, u32)| {
        let others = b.iter();
        let common = others.map(|(s, l)| ((*start).max(*s), (*last).min(*l)));
        common
            .filter(|(start, last)| start <= last)
            .map(|(start, _)| start)
            .min()
    };
    a.iter().filter_map(shared).min()
}
