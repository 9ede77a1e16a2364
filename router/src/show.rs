//! How things look to people: aligned tables, units, and `--json` beside each.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;

use serde::Serialize;
use weft_core::carriers::Why;
use weft_core::control::{
    Attached, EndpointRow, NameRow, NetworkRow, NodeRow, PeerRow, ServiceRow, Status,
};
use weft_core::model::Label;
use weft_core::underlay::{Offload, OffloadState, UnderlayAddr};
use weft_core::view::{EndpointKind, Liveness};

use crate::background::{Origin, Summary};

/// Prints a line on standard output. A reader that went away (`weft ps | head`) is no failure.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints `value` as JSON, or what `words` makes of it.
pub(crate) fn data<T: Serialize>(json: bool, value: &T, words: impl FnOnce(&T) -> String) {
    if json {
        line(&serde_json::to_string_pretty(value).expect("plain structs with string keys"));
    } else {
        line(words(value).trim_end());
    }
}

/// `weft up` succeeded.
pub(crate) fn up(summary: &Summary, json: bool) {
    data(json, summary, up_text);
}

fn up_text(summary: &Summary) -> String {
    let did = match summary.origin {
        Origin::Founded => "founded cluster",
        Origin::Joined => "joined cluster",
        Origin::Returned => "is back in cluster",
    };
    let mut text = format!("weft is up: {} {did} {}\n\n", summary.name, summary.cluster);
    text += &facts(&[
        ("node", format!("{} ({})", summary.name, summary.node)),
        (
            "address",
            summary.host_ip.map_or("-".to_owned(), |ip| ip.to_string()),
        ),
        ("range", summary.range.to_string()),
        ("names", format!("weft.internal, served at {}", summary.dns)),
        ("port", own_ports(summary.port, summary.tcp_port)),
    ]);
    text += &warnings(&summary.warnings);
    text += match summary.origin {
        Origin::Founded => {
            "\nNext:\n  weft token                       an invitation for another host: weft up --join TOKEN\n  weft run --name web -- CMD...    a process on the network, by the name web\n"
        }
        Origin::Joined | Origin::Returned => {
            "\nNext:\n  weft peers                       the other nodes\n  weft run --name web -- CMD...    a process on the network, by the name web\n"
        }
    };
    text
}

/// `weft status`.
pub(crate) fn status(status: &Status) -> String {
    let mut text = facts(&[
        ("node", format!("{} ({})", status.name, status.node)),
        ("cluster", status.cluster.clone()),
        (
            "nodes",
            format!("{} alive of {}", status.nodes_alive, status.nodes),
        ),
        (
            "address",
            status.host_ip.map_or("-".to_owned(), |ip| ip.to_string()),
        ),
        ("range", status.range.to_string()),
        ("names", format!("weft.internal, served at {}", status.dns)),
        (
            "endpoints",
            format!(
                "{} here, {} in all",
                status.endpoints_local, status.endpoints
            ),
        ),
        ("services", status.services.to_string()),
        (
            "tunnels",
            format!(
                "{} on {}",
                status.cipher,
                own_ports(status.port, status.tcp_port)
            ),
        ),
        ("domain", format!("/run/netns/{}", status.netns)),
        (
            "daemon",
            format!(
                "version {}, pid {}, up {}",
                status.version,
                status.pid,
                duration(status.uptime_secs as f64)
            ),
        ),
    ]);
    for (index, change) in status.host_changes.iter().enumerate() {
        let label = if index == 0 { "on this host" } else { "" };
        text += &format!("{label:<14}{change}\n");
    }
    text + &warnings(&status.warnings)
}

/// `weft peers`.
pub(crate) fn peers(rows: &[PeerRow]) -> String {
    let head = [
        "NAME",
        "NODE",
        "STATE",
        "CARRIER",
        "PATH",
        "RTT",
        "HANDSHAKE",
        "MTU",
        "SENT",
        "RECEIVED",
        "DROPPED",
        "OFFLOADS",
    ];
    let cells = rows.iter().map(|row| {
        vec![
            row.name.to_string(),
            row.node.clone(),
            liveness(row.liveness).to_owned(),
            row.carrier.clone(),
            way(row.relay.as_ref(), row.tcp, row.path),
            row.rtt_ms
                .map_or("-".to_owned(), |ms| format!("{ms:.1} ms")),
            row.handshake_age_secs
                .map_or("-".to_owned(), |age| format!("{} ago", duration(age))),
            or_dash(row.mtu),
            octets(row.tx_bytes),
            octets(row.rx_bytes),
            row.drops.values().sum::<u64>().to_string(),
            offloads(&row.offloads) + &source_ports(row.source_ports),
        ]
    });
    let Some(text) = table(&head, cells) else {
        return "no other nodes yet; invite one with: weft token".to_owned();
    };
    let reasons: String = rows.iter().filter_map(why_not_better).collect();
    let reasons = reasons + &carriers(rows);
    match reasons.is_empty() {
        true => text,
        false => format!("{text}\n{reasons}"),
    }
}

/// Why a peer is reached by TCP or through somebody else, or not at all.
fn why_not_better(row: &PeerRow) -> Option<String> {
    let is_best = row.path.is_some() && !row.tcp;
    if is_best || row.paths.is_empty() {
        return None;
    }
    let name = &row.name;
    let what = match &row.relay {
        Some(relay) => format!("{name} is reached through {relay}"),
        None if row.tcp => format!("{name} is reached by TCP: UDP does not answer"),
        None => format!("{name} is not reached"),
    };
    let tried: Vec<String> = row
        .paths
        .iter()
        .filter(|path| !path.in_use)
        .map(|path| {
            let way = way(path.relay.as_ref(), path.tcp, path.path);
            let outcome = match (path.unanswered, path.answered) {
                (0, true) => "answers".to_owned(),
                (0, false) => "not tried yet".to_owned(),
                (n, _) => format!("{n} times no answer"),
            };
            format!("{way} ({outcome})")
        })
        .collect();
    match tried.is_empty() {
        true if row.tcp => Some(format!("{what}\n")),
        true => Some(format!("{what}: nobody knows an address of it\n")),
        false => Some(format!("{what}; also tried: {}\n", tried.join(", "))),
    }
}

/// How a peer is, or may be, reached.
fn way(relay: Option<&Label>, tcp: bool, addr: Option<SocketAddr>) -> String {
    match (relay, addr) {
        (Some(relay), _) => format!("through {relay}"),
        (None, Some(addr)) if tcp => UnderlayAddr::Tcp(addr).to_string(),
        (None, addr) => or_dash(addr),
    }
}

fn own_ports(udp: u16, tcp: Option<u16>) -> String {
    let tcp = tcp.map(|port| format!(", {port}/tcp"));
    format!("{udp}/udp{}", tcp.unwrap_or_default())
}

/// `all`, or those that are not in use and why.
fn offloads(states: &BTreeMap<Offload, OffloadState>) -> String {
    let off = states
        .iter()
        .filter(|(_, state)| **state != OffloadState::On);
    let off: Vec<String> = off
        .map(|(offload, state)| format!("no {offload} ({})", state.name()))
        .collect();
    match (states.is_empty(), off.is_empty()) {
        (true, _) => "-".to_owned(),
        (false, true) => "all".to_owned(),
        (false, false) => off.join(", "),
    }
}

fn source_ports(count: u8) -> String {
    match count {
        0 | 1 => String::new(),
        _ => format!(", {count} source ports"),
    }
}

/// Why each peer has the carrier that it has; nothing where `udp` is the only one that this host would use.
fn carriers(rows: &[PeerRow]) -> String {
    let alone = Why::NoTrustedSubnet.to_string();
    let told = rows
        .iter()
        .filter(|row| row.carrier != "-" && row.carrier_why != alone);
    told.map(|row| format!("{}: {}, {}\n", row.name, row.carrier, row.carrier_why))
        .collect()
}

/// `weft ps`.
pub(crate) fn endpoints(rows: &[EndpointRow]) -> String {
    let head = ["ENDPOINT", "NAMES", "ADDRESS", "NETWORK", "NODE", "LABELS"];
    let cells = rows.iter().map(|row| {
        let names = match row.kind {
            EndpointKind::Host => "(host)".to_owned(),
            EndpointKind::Container => list(&row.names),
        };
        let here = if row.local { " *" } else { "" };
        vec![
            row.id.to_string(),
            names,
            row.ip.to_string(),
            row.network.to_string(),
            format!("{}{here}", row.node),
            pairs(row.labels.iter()),
        ]
    });
    table(&head, cells)
        .unwrap_or_else(|| "nothing is attached; try: weft run --name web -- CMD...".to_owned())
}

/// `weft node ls`.
pub(crate) fn nodes(rows: &[NodeRow]) -> String {
    let head = ["NAME", "NODE", "STATE", "HOST ADDRESSES", "OWNS"];
    let cells = rows.iter().map(|row| {
        let me = if row.me { " *" } else { "" };
        vec![
            format!("{}{me}", row.name),
            row.node.clone(),
            liveness(row.liveness).to_owned(),
            list(&row.host_addrs),
            list(&row.prefixes),
        ]
    });
    table(&head, cells).unwrap_or_else(|| "no nodes".to_owned())
}

/// `weft service ls`.
pub(crate) fn services(rows: &[ServiceRow]) -> String {
    let head = [
        "NAME",
        "ADDRESS",
        "PORTS",
        "PUBLISHED",
        "BACKENDS",
        "CONFLICTS",
    ];
    let cells = rows.iter().map(|row| {
        vec![
            row.spec.name.to_string(),
            row.vip.to_string(),
            ports(row),
            published(row),
            row.backends.len().to_string(),
            if row.conflicts.is_empty() {
                "-".to_owned()
            } else {
                row.conflicts.join("; ")
            },
        ]
    });
    table(&head, cells).unwrap_or_else(|| {
        "no services; make one with: weft service create NAME --port P".to_owned()
    })
}

/// `weft service inspect`, and what `create` and `update` answer.
pub(crate) fn service(row: &ServiceRow) -> String {
    let selector = if row.spec.selector.is_empty() {
        format!("endpoints named {}", row.spec.name)
    } else {
        format!("endpoints with {}", pairs(row.spec.selector.iter()))
    };
    let mut text = facts(&[
        ("service", row.spec.name.to_string()),
        ("name", format!("{}.weft.internal", row.spec.name)),
        ("address", format!("{}, {}", row.vip, row.vip6)),
        ("ports", ports(row)),
        ("published", published(row)),
        ("selects", selector),
        ("backends", list(&row.backends)),
    ]);
    for conflict in &row.conflicts {
        text += &format!("warning: {conflict}\n");
    }
    text
}

/// `weft network create`.
pub(crate) fn network(row: &NetworkRow) -> String {
    let network = &row.network;
    facts(&[
        ("network", network.name.to_string()),
        ("addresses", format!("{}, {}", network.net, row.net6)),
        ("room for", format!("{} endpoints", network.size)),
    ])
}

/// `weft network ls`.
pub(crate) fn networks(rows: &[NetworkRow]) -> String {
    let head = [
        "NAME",
        "ADDRESSES",
        "IPV6",
        "ENDPOINTS",
        "USED",
        "FREE HERE",
        "",
    ];
    let cells = rows.iter().map(|row| {
        let network = &row.network;
        let blocks: Vec<_> = network.blocks().collect();
        vec![
            network.name.to_string(),
            list(&blocks),
            row.net6.to_string(),
            row.endpoints.to_string(),
            format!("{} of {}", network.used, network.size),
            network.free_here.to_string(),
            if network.low { "nearly full" } else { "" }.to_owned(),
        ]
    });
    table(&head, cells).unwrap_or_else(|| "no networks".to_owned())
}

/// `weft dns add`.
pub(crate) fn name(row: &NameRow) -> String {
    format!("{}.weft.internal is {}", row.name, row.ip)
}

/// `weft dns ls`.
pub(crate) fn names(rows: &[NameRow]) -> String {
    let cells = rows
        .iter()
        .map(|row| vec![format!("{}.weft.internal", row.name), row.ip.to_string()]);
    table(&["NAME", "ADDRESS"], cells)
        .unwrap_or_else(|| "no names; bind one with: weft dns add NAME IP".to_owned())
}

/// `weft dns lookup`.
pub(crate) fn looked_up(found: &crate::lookup::Found) -> String {
    let mut lines: Vec<String> = found.addresses.iter().map(ToString::to_string).collect();
    lines.extend(found.names.iter().cloned());
    if lines.is_empty() {
        return format!("{} exists and has no address", found.name);
    }
    lines.join("\n")
}

/// `weft attach`.
pub(crate) fn attached(attached: &Attached) -> String {
    facts(&[
        ("endpoint", attached.id.to_string()),
        ("names", list(&attached.names)),
        ("address", format!("{}, {}", attached.ip, attached.ip6)),
        ("network", attached.network.to_string()),
        (
            "interface",
            format!(
                "{} ({}, MTU {})",
                attached.ifname, attached.mac, attached.mtu
            ),
        ),
        (
            "names from",
            format!("nameserver {}, search {}", attached.dns, attached.domain),
        ),
    ])
}

fn ports(row: &ServiceRow) -> String {
    let texts = row.spec.ports.iter().map(|p| {
        if p.port == p.target {
            format!("{}/{}", p.port, p.proto)
        } else {
            format!("{}:{}/{}", p.port, p.target, p.proto)
        }
    });
    texts.collect::<Vec<_>>().join(" ")
}

fn published(row: &ServiceRow) -> String {
    let mut texts = Vec::new();
    for port in &row.spec.ports {
        for publish in &port.publish {
            let at = match publish.addr {
                Some(ip) => SocketAddr::new(ip, publish.port).to_string(),
                None => publish.port.to_string(),
            };
            texts.push(format!("{at}:{}/{}", port.port, port.proto));
        }
    }
    if texts.is_empty() {
        "-".to_owned()
    } else {
        texts.join(" ")
    }
}

fn liveness(state: Liveness) -> &'static str {
    match state {
        Liveness::Alive => "alive",
        Liveness::Silent => "silent",
        Liveness::Down => "down",
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or("-".to_owned(), |v| v.to_string())
}

fn list<T: ToString>(items: &[T]) -> String {
    if items.is_empty() {
        return "-".to_owned();
    }
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

fn pairs<'a>(pairs: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    let texts: Vec<String> = pairs.map(|(k, v)| format!("{k}={v}")).collect();
    list(&texts)
}

fn warnings(lines: &[String]) -> String {
    lines.iter().map(|w| format!("warning: {w}\n")).collect()
}

fn facts(facts: &[(&str, String)]) -> String {
    facts
        .iter()
        .map(|(what, value)| format!("{what:<14}{value}\n"))
        .collect()
}

/// Octets in powers of 1024.
fn octets(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// The two largest units that are not zero.
fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{:.0} s", seconds.max(0.0).floor());
    }
    let whole = seconds as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3_600 % 24, whole / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes} min {} s", whole % 60),
        (0, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// Columns as wide as their widest cell; `None` without rows.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Option<String> {
    let mut all = vec![head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()];
    all.extend(rows);
    if all.len() == 1 {
        return None;
    }
    let widths: Vec<usize> = (0..head.len())
        .map(|i| {
            all.iter()
                .map(|row| row[i].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &all {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("   ").trim_end());
        text.push('\n');
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["a".to_owned(), "long value".to_owned(), "x".to_owned()],
            vec!["longer".to_owned(), "b".to_owned(), "-".to_owned()],
        ];
        assert_eq!(
            table(&["A", "B", "C"], rows.into_iter()).unwrap(),
            "A        B            C\na        long value   x\nlonger   b            -\n"
        );
    }

    #[test]
    fn empty_lists_say_so() {
        assert!(peers(&[]).contains("weft token"));
        assert!(endpoints(&[]).contains("nothing is attached"));
        assert!(services(&[]).contains("no services"));
        assert!(nodes(&[]).contains("no nodes"));
    }

    #[test]
    fn offloads_that_are_not_in_use_are_named_with_the_reason() {
        let mut states: BTreeMap<_, _> = Offload::ALL.map(|o| (o, OffloadState::On)).into();
        assert_eq!(offloads(&states), "all");
        states.insert(Offload::Gso, OffloadState::Failing);
        states.insert(Offload::Uso, OffloadState::SwitchedOff);
        assert_eq!(offloads(&states), "no gso (failing), no uso (switched off)");
    }

    #[test]
    fn quantities_have_units() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1.0 MiB"),
            (5_368_709_120, "5.0 GiB"),
        ] {
            assert_eq!(octets(count), text);
        }
        for (seconds, text) in [
            (0.4, "0 s"),
            (59.9, "59 s"),
            (61.0, "1 min 1 s"),
            (3_700.0, "1 h 1 min"),
            (90_000.0, "1 d 1 h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
