//! What must hold after every step of a node, looked at when what it shows has changed.

mod heirs;
mod logs;
mod word;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use weft_core::catalog::Catalog;
use weft_core::ipam::Ring;
use weft_core::model::{EndpointId, NodeId, Now};
use weft_core::node::Node;
use weft_core::roster::Roster;
use weft_core::value::endpoint_key;
use weft_core::wire::MAX_DATAGRAM;

use crate::nodes::Shell;
use crate::promises::Ledger;
use crate::world::World;
use logs::{Newest, Start};

/// No node has that much to say of others within one world, unless nodes provoke each other without end.
const MAX_CHAIN: u32 = 300;

/// A member, and what it knows.
#[derive(Clone, Copy)]
struct Known<'a> {
    host: usize,
    me: NodeId,
    node: &'a Node,
    catalog: &'a Catalog,
    ring: &'a Ring,
    roster: &'a Roster,
}

impl<'a> Known<'a> {
    fn of(host: usize, shell: &'a Shell) -> Option<Self> {
        let node = shell.node();
        Some(Self {
            host,
            me: shell.id(),
            node,
            catalog: node.catalog()?,
            ring: node.ring()?,
            roster: node.roster()?,
        })
    }
}

/// What a ready node believes to own, first and last address of each part.
struct Owned {
    boots: u64,
    parts: Vec<(u32, u32)>,
}

/// What one start of a host has seen: of endpoints that were given back, of all logs, of its own, and of removals.
#[derive(Default)]
struct Seen {
    live: BTreeSet<EndpointId>,
    gone: BTreeSet<EndpointId>,
    newest: Newest,
    own: Option<u64>,
    removed: BTreeSet<NodeId>,
    /// What was its own by what its disk said, before it heard anything.
    at_start: Option<Vec<(u32, u32)>>,
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
        let seen = self.seen.entry((host, boots)).or_default();
        if seen.at_start.is_none() {
            seen.at_start = Known::of(host, shell).map(|known| known.ring.parts(&known.me));
        }
        if !shell.ready || ledger.evicted.contains(&host) {
            return lines;
        }
        let changed = shell.take_changed();
        let Some(known) = Known::of(host, shell) else {
            return lines;
        };
        let disk = (key, turns);
        let owned = self.owned.get(&host).filter(|owned| owned.boots == boots);
        let had = [
            seen.at_start.as_deref().unwrap_or_default(),
            owned.map_or(&[], |owned| &owned.parts),
        ];
        heirs::inherits_by_right(known, ledger, had, &mut seen.own, &mut lines);
        if !changed {
            return lines;
        }
        // A disk that is again what it was has forgotten how often it was started.
        let number = known.node.generation();
        let before = self.starts.insert(host, (disk, boots, number));
        logs::counts_on(host, before, (disk, boots, number), &mut lines);
        logs::keeps_the_newest(known, ledger, &mut seen.newest, &mut lines);
        knows_no_removed(known, now, &mut lines);
        stays_removed(known, ledger, &mut seen.removed, &mut lines);
        // What one of two copies wrote over the other writes once more, after a while.
        if !(ledger.cloned.contains(&known.me) && known.catalog.needs_repair()) {
            word::keeps_endpoints(known, ledger, &mut lines);
            word::keeps_services(known, ledger, now, &mut lines);
        }
        nothing_returns(known, ledger, seen, &mut lines);
        let parts = known.ring.parts(&known.me);
        let before = self.owned.get(&host);
        if before.is_none_or(|before| before.parts != parts) {
            ledger.steal(gifts_of_liars(known, ledger));
        }
        if before.is_none_or(|before| before.boots != boots || before.parts != parts) {
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
        let Some((me, mine)) = self.present(world, host) else {
            return;
        };
        for other in self.owned.keys().copied() {
            let Some((they, theirs)) = self.present(world, other) else {
                continue;
            };
            let ids = [me.me, they.me];
            let void =
                ledger.evicted.contains(&other) || ids.iter().any(|id| ledger.liars.contains(id));
            if me.me == they.me || void {
                continue;
            }
            let both = overlap(mine, theirs).map(Ipv4Addr::from);
            if let Some(ip) = both.filter(|ip| !may_both_own(ledger, *ip, [me, they])) {
                let grants = [me, they].map(|known| history(known.catalog, ip.into()));
                lines.push(format!(
                    "{host} and {other} both believe to own {ip}: {grants:?}"
                ));
            }
        }
    }

    /// What a host believes to own, if it still runs.
    fn present<'a>(
        &'a self,
        world: &'a World<Shell>,
        host: usize,
    ) -> Option<(Known<'a>, &'a [(u32, u32)])> {
        let owned = self.owned.get(&host)?;
        let there = &world.hosts[host];
        let known = Known::of(host, there.machine.as_ref()?)?;
        (there.boots() == owned.boots).then_some((known, &owned.parts))
    }
}

/// What liars gave to a node of what a removed one had had: to have taken that over counts once the node is removed.
fn gifts_of_liars(known: Known<'_>, ledger: &Ledger) -> Vec<(u32, u32)> {
    let removed = known.roster.revoked();
    if ledger.liars.is_empty() || removed.is_empty() {
        return Vec::new();
    }
    let grants = known.catalog.grants();
    let was_removed_s = |address: u32| {
        grants.iter().any(|(_, grant)| {
            (grant.start..=grant.last).contains(&address) && removed.contains_key(&grant.to)
        })
    };
    let gifts = grants
        .iter()
        .filter(|(by, grant)| grant.to == known.me && ledger.liars.contains(by));
    gifts
        .map(|(_, grant)| (grant.start, grant.last))
        .filter(|(start, _)| was_removed_s(*start))
        .collect()
}

/// What a removed node was given in its last moment is taken by force only when it is heard of.
fn may_both_own(ledger: &Ledger, ip: Ipv4Addr, both: [Known<'_>; 2]) -> bool {
    let forced = || both.iter().any(|known| known.ring.was_forced(ip));
    ledger.excuses(ip) || (ledger.in_dispute() && forced())
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
fn nothing_returns(known: Known<'_>, ledger: &Ledger, seen: &mut Seen, lines: &mut Vec<String>) {
    let Known {
        host,
        catalog,
        roster,
        ..
    } = known;
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
fn knows_no_removed(known: Known<'_>, now: Now, lines: &mut Vec<String>) {
    let Known {
        host,
        catalog,
        roster,
        ..
    } = known;
    if roster.revoked().is_empty() || !roster.is_member(&known.me) {
        return;
    }
    for peer in known.node.peers(now) {
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

/// A removal that counted once counts for ever, whoever else is removed or let in. But it waits once more when one who
/// approved what it waited for is removed by somebody who had not heard of that, until another approves.
fn stays_removed(
    known: Known<'_>,
    ledger: &Ledger,
    seen: &mut BTreeSet<NodeId>,
    lines: &mut Vec<String>,
) {
    let Known { host, roster, .. } = known;
    let revoked = roster.revoked();
    if !ledger.divided {
        let waits = |id: &NodeId| roster.pending().iter().any(|p| p.subject == *id);
        let back = seen
            .iter()
            .filter(|id| !revoked.contains_key(*id) && !waits(id));
        lines.extend(back.map(|id| format!("{host} knew that {id} was removed, and not any more")));
    }
    seen.extend(revoked.keys().copied());
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
    let rosters = world
        .running()
        .filter_map(|(_, shell)| shell.node().roster());
    let longest = rosters.flat_map(|roster| roster.heads().into_values().map(|head| head.length));
    if let Some(length) = longest.max().filter(|length| *length > MAX_CHAIN) {
        lines.push(format!("a chain of {length} roster records"));
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
