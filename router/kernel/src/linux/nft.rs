//! Runs nft: text on its standard input, no shell, no environment, whole tables in one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use weft_core::layout::NFT_TABLE;

use super::domain::Domain;
use super::host::Host;
use super::nfnetlink::{self, Counted, TableFamily};
use crate::error::{Doing, NftError, Result};
use crate::filter::vxlan::{self, CarrierTraffic};

/// Only these: `PATH` is whoever's started the daemon.
const BINARIES: [&str; 4] = [
    "/usr/sbin/nft",
    "/sbin/nft",
    "/usr/bin/nft",
    "/usr/local/sbin/nft",
];

/// Octets of an Ethernet header.
const ETHERNET: u64 = 14;

/// The namespace a table is in.
#[derive(Clone, Copy)]
pub enum Where<'a> {
    /// The host's.
    Host(&'a Host),
    /// The domain's.
    Domain(&'a Domain),
}

impl Where<'_> {
    pub(crate) fn run<T: Send>(self, work: impl FnOnce() -> T + Send) -> Result<T> {
        match self {
            Where::Host(host) => host.run(work),
            Where::Domain(domain) => domain.run(work),
        }
    }
}

/// Replaces the table `inet weft` by these fragments, in one transaction: packets meet the old rules or the new.
pub fn apply(place: Where<'_>, fragments: &[&str]) -> Result<()> {
    put(place, &fragments.join("\n"))
}

/// The same of what stands inside the table.
pub(crate) fn put(place: Where<'_>, body: &str) -> Result<()> {
    place.run(|| feed(&replacing(&format!("inet {NFT_TABLE}"), body)))??;
    Ok(())
}

/// Commands that leave nothing of a table, whether or not it was there.
pub(crate) fn removing(table: &str) -> String {
    format!("table {table}\ndelete table {table}\n")
}

/// Commands that leave a table with this in it and nothing else.
pub(crate) fn replacing(table: &str, body: &str) -> String {
    format!("{}table {table} {{\n{body}\n}}\n", removing(table))
}

/// Does the host's part of the `vxlan` carrier's filter stand, rule for rule? While it does not, the carrier must be down.
pub fn guards_vxlan(host: &Host) -> Result<bool> {
    // A list that is read while the table is being replaced may lack what stands before and after: look twice.
    host.run(|| Ok(vxlan_chains_stand()? || vxlan_chains_stand()?))?
        .map_err(|error: io::Error| error)
        .doing(|| "read the filter of the vxlan carrier".into())
}

fn vxlan_chains_stand() -> io::Result<bool> {
    for (chain, count) in vxlan::HOST_CHAINS {
        let rules = nfnetlink::rules(TableFamily::Inet, NFT_TABLE, Some(chain))?;
        if rules.len() != count {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many packets have come over the `vxlan` carrier from each MAC: all where that is counted ([`count_vxlan`]), which is
/// where there is a fast path; elsewhere since the domain's table was last replaced. What took the fast path is among them.
pub fn vxlan_received(domain: &Domain) -> Result<BTreeMap<[u8; 6], u64>> {
    let counted = domain.run(|| {
        let all = nfnetlink::counted(TableFamily::Netdev, NFT_TABLE, vxlan::RECEIVED)?;
        match all.is_empty() {
            true => nfnetlink::counted(TableFamily::Inet, NFT_TABLE, vxlan::PEERS),
            false => Ok(all),
        }
    })?;
    let counted = counted.doing(|| "read the counters of the vxlan carrier".into())?;
    let fast = domain.fast_traffic();
    let by_mac = counted.into_iter().filter_map(|(key, packets)| {
        let mac: [u8; 6] = *key.first_chunk()?;
        let fast = fast.get(&mac).map_or(0, |fast| fast.rx_packets);
        Some((mac, packets.packets + fast))
    });
    Ok(by_mac.collect())
}

/// Counts from now on what passes over the `vxlan` carrier to and from these MACs; what was counted for them stays. The
/// devices must be there. Wants a kernel that lets rules see what a device sends: Linux 5.16.
pub fn count_vxlan(
    domain: &Domain,
    devices: &BTreeSet<&'static str>,
    macs: &[[u8; 6]],
) -> Result<()> {
    domain.run(|| feed(&vxlan::counting(devices, macs)))??;
    Ok(())
}

/// What was counted. Nothing where nobody counts.
pub fn vxlan_traffic(domain: &Domain) -> Result<BTreeMap<[u8; 6], CarrierTraffic>> {
    let read = |set| nfnetlink::counted(TableFamily::Netdev, NFT_TABLE, set);
    let counted = domain.run(|| Ok((read(vxlan::SENT)?, read(vxlan::RECEIVED)?)))?;
    let (sent, received) = counted
        .map_err(|error: io::Error| error)
        .doing(|| "read the traffic of the vxlan carrier".into())?;
    let mut traffic: BTreeMap<[u8; 6], CarrierTraffic> = BTreeMap::new();
    for (key, Counted { packets, octets }) in sent {
        if let Some(mac) = key.first_chunk() {
            let of = traffic.entry(*mac).or_default();
            of.tx_packets = packets;
            of.tx_octets = octets.saturating_sub(packets * ETHERNET);
        }
    }
    for (key, Counted { packets, octets }) in received {
        if let Some(mac) = key.first_chunk() {
            let of = traffic.entry(*mac).or_default();
            (of.rx_packets, of.rx_octets) = (packets, octets);
        }
    }
    // What takes the fast path passes by that device, too, but by no hook of nftables there.
    for (mac, fast) in domain.fast_traffic() {
        let of = traffic.entry(mac).or_default();
        of.rx_packets += fast.rx_packets;
        of.rx_octets += fast.rx_octets;
        of.tx_packets += fast.tx_packets;
        of.tx_octets += fast.tx_octets;
    }
    Ok(traffic)
}

/// Removes the table; that it is gone already is no error.
pub fn remove(place: Where<'_>) -> Result<()> {
    place.run(|| feed(&removing(&format!("inet {NFT_TABLE}"))))??;
    Ok(())
}

/// Where the binary is.
pub(crate) fn binary() -> Option<&'static str> {
    BINARIES.into_iter().find(|path| Path::new(path).exists())
}

/// Runs nft over `text` in the calling thread's namespace.
pub(crate) fn feed(text: &str) -> Result<(), NftError> {
    let path = binary().ok_or(NftError::Missing)?;
    let failed = |source| NftError::Run { path, source };
    let mut child = Command::new(path)
        .args(["-f", "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // A broken pipe means that nft gave up; its own words, below, say why.
        match input.write_all(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => {}
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    Err(NftError::Refused(first_lines(&output.stderr)))
}

/// Enough to see what is wrong; nft repeats the text of each line it refused.
fn first_lines(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().take(3).map(str::trim).collect();
    lines.join(" | ").chars().take(400).collect()
}
