//! What a node acknowledged it still shows.

use std::net::Ipv4Addr;

use weft_core::catalog::Catalog;
use weft_core::model::{Label, Now, WallMicros};
use weft_core::value::{Kind, Object, endpoint_key, label_key};

use super::{Known, history};
use crate::promises::Ledger;

/// No honest clock is ahead by more, microseconds.
const FAR_AHEAD: u64 = 3_600_000_000;

/// Endpoints, each in the node's own part of the range.
pub(super) fn keeps_endpoints(known: Known<'_>, ledger: &mut Ledger, lines: &mut Vec<String>) {
    let Known {
        host, me, catalog, ..
    } = known;
    for id in ledger.of_host(host) {
        let Some((_, ip)) = ledger.endpoints.get(&id).copied() else {
            continue;
        };
        let owner = known.ring.owner(ip);
        // A member may take over a removed node's space and lie about the votes: whoever has that knows in the end.
        let stolen = owner.is_some_and(|owner| ledger.liars.contains(&owner));
        let excused = ledger.excuses(ip) || stolen || ledger.lying.contains(&host);
        match catalog.endpoint(&me, &endpoint_key(&id)) {
            Some(endpoint) if endpoint.ip == ip => {}
            Some(endpoint) if excused => ledger.readdressed(&id, endpoint.ip),
            _ if ledger.is_tainted(ip) => {}
            _ => lines.push(format!("{host} lost {id} at {ip}, which it acknowledged")),
        }
        // What a removed node gave at last may be void; whoever has it takes it over, which takes a write.
        let void = owner.is_some_and(|owner| known.roster.revoked().contains_key(&owner));
        if owner != Some(me) && !void && !excused {
            let grants = history(catalog, ip.into());
            lines.push(format!(
                "{host} gave {ip}, which is not its own but {owner:?}'s: {grants}"
            ));
        }
    }
}

/// Services, each at its address.
pub(super) fn keeps_services(
    known: Known<'_>,
    ledger: &mut Ledger,
    now: Now,
    lines: &mut Vec<String>,
) {
    let Known { host, catalog, .. } = known;
    // Its own clock may hide what it holds, and nobody's clock is that far ahead but a liar's.
    let wall = WallMicros(crate::world::true_wall(now).0 + FAR_AHEAD);
    let mut overruled = Vec::new();
    let made = ledger.services.iter();
    for (name, (_, vip)) in made.filter(|(_, (maker, _))| *maker == host) {
        let shown = shown_vip(catalog, name, wall);
        let kept = shown.is_some_and(|shown| shown == *vip || ledger.had(name, shown));
        // A liar's word from the future, which it said once more.
        let lied = !ledger.liars.is_empty()
            && shown == known.node.plan().map(|plan| plan.dns4())
            && !is_from_the_future(catalog, name, wall);
        // Of two copies the one that parted it may be gone before it told anybody.
        let of_twins = shown.is_some() && ledger.is_tainted(*vip);
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
