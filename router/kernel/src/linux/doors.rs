//! Where another firewall would drop `weft0`'s north-south traffic: one marked pair of accepts in its documented place.
//!
//! Docker's place is `DOCKER-USER`; where there is none but `FORWARD` drops by policy (ufw, hand-made rules), its head.
//! Both are looked for in the tables that iptables-nft makes. They are put again when their owner reloads, and removed
//! with the mark alone to know them by.

use std::io;

use weft_core::layout::HOST_LEG;

use super::nfnetlink::{self, Chain, Hook, TableFamily};
use super::nft;
use crate::error::{Doing, Result};

const MARK: &str = "weft";
const PLACES: [&str; 2] = ["DOCKER-USER", "FORWARD"];
const TABLE: &str = "filter";

/// What weft has put into others' tables, one line each.
pub(crate) fn open(wanted: bool) -> Result<Vec<String>> {
    let chains = nfnetlink::chains().doing(|| "read the host's nft chains".into())?;
    let mut text = String::new();
    let mut opened = Vec::new();
    for family in [TableFamily::Ip, TableFamily::Ip6] {
        let place = if wanted { place(&chains, family) } else { None };
        for chain in PLACES {
            let marked = marked(family, chain).doing(|| format!("read the chain {chain}"))?;
            let here = place == Some(chain);
            if here {
                let family = family.word();
                opened.push(format!(
                    "two accepts for {HOST_LEG} in nft chain {family} {TABLE} {chain} (iptables shows them too)"
                ));
            }
            if marked.len() != if here { 2 } else { 0 } {
                replace(&mut text, family, chain, &marked, here);
            }
        }
    }
    if !text.is_empty() {
        nft::feed(&text)?;
    }
    Ok(opened)
}

fn place(chains: &[Chain], family: TableFamily) -> Option<&'static str> {
    let find = |name: &str| {
        chains
            .iter()
            .find(|c| c.family == family && c.table == TABLE && c.name == name)
    };
    if find(PLACES[0]).is_some() {
        return Some(PLACES[0]);
    }
    find(PLACES[1])
        .filter(|c| c.hook == Some(Hook::Forward) && c.drops)
        .map(|_| PLACES[1])
}

fn marked(family: TableFamily, chain: &str) -> io::Result<Vec<u64>> {
    let rules = nfnetlink::rules(family, TABLE, Some(chain))?;
    Ok(rules
        .into_iter()
        .filter(|r| r.comment.as_deref() == Some(MARK))
        .map(|r| r.handle)
        .collect())
}

fn replace(text: &mut String, family: TableFamily, chain: &str, marked: &[u64], here: bool) {
    let family = family.word();
    for handle in marked {
        text.push_str(&format!(
            "delete rule {family} {TABLE} {chain} handle {handle}\n"
        ));
    }
    if here {
        for side in ["iifname", "oifname"] {
            text.push_str(&format!(
                "insert rule {family} {TABLE} {chain} {side} \"{HOST_LEG}\" counter accept comment \"{MARK}\"\n"
            ));
        }
    }
}

/// What weft can't do anything about, one line each.
pub(crate) fn warnings() -> Vec<String> {
    let chains = nfnetlink::chains().unwrap_or_default();
    let mut found = Vec::new();
    let firewalld = chains
        .iter()
        .any(|c| c.family == TableFamily::Inet && c.table == "firewalld");
    if firewalld {
        found.push(format!(
            "firewalld is active: published ports and containers' way out need `firewall-cmd --permanent --zone=trusted --add-interface={HOST_LEG} && firewall-cmd --reload`"
        ));
    }
    let legacy =
        std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    if legacy.lines().any(|table| table == TABLE) {
        found.push(format!(
            "legacy iptables has a filter table: if its FORWARD chain drops, allow {HOST_LEG} with `iptables-legacy -I FORWARD -i {HOST_LEG} -j ACCEPT` and the same with -o"
        ));
    }
    found
}
