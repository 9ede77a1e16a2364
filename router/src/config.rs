//! What `weft up` was asked to be: flags over environment over `/etc/weft/weft.toml` over defaults, checked once.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use weft_carrier::MAX_SOURCE_PORTS;
use weft_core::model::{AddressPlan, ClusterId, Label, NodeName};
use weft_core::underlay::{Dscp, Offload};

use crate::esp::EspUse;

/// Where the file is looked for when nobody says otherwise.
pub(crate) const DEFAULT_FILE: &str = "/etc/weft/weft.toml";
/// Where what must outlive a reboot is kept.
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/weft";
/// Where the socket and the log are.
pub(crate) const DEFAULT_RUN_DIR: &str = "/run/weft";
/// The port of everything but VXLAN.
pub(crate) const DEFAULT_PORT: u16 = 6783;
/// `tracing` directives: hickory writes two lines for every question.
pub(crate) const DEFAULT_LOG: &str = "info,hickory_server=warn,hickory_proto=warn";
/// No invitation is longer; nobody shall feed us a disk image.
const MAX_TOKEN: u64 = 16 * 1024;
/// The same for the configuration file.
const MAX_FILE: u64 = 256 * 1024;

/// An invitation as a person gave it. It is a secret: neither `Debug` nor any error prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Token(String);

impl Token {
    /// The text itself, for the one who decodes it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// Everything the daemon needs to know to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UpConfig {
    /// The invitation to use when this host has no cluster yet.
    pub(crate) join: Option<Token>,
    /// The name a person asked for.
    pub(crate) name: Option<NodeName>,
    /// The name to take otherwise: from the host's own.
    pub(crate) hostname: NodeName,
    /// Underlay port.
    pub(crate) port: u16,
    /// Take connections on this TCP port, too.
    pub(crate) tcp_port: Option<u16>,
    /// Addresses to tell the others, before those found on the interfaces.
    pub(crate) advertise: Vec<SocketAddr>,
    /// The range asked for; the default when founding, and must agree with the cluster's otherwise.
    pub(crate) range: Option<Ipv4Net>,
    /// Pass on datagrams between members that don't reach each other.
    pub(crate) relay: bool,
    /// Underlay subnets where plain VXLAN is used towards peers that list theirs, too.
    pub(crate) trusted_subnets: Vec<IpNet>,
    /// Whether the kernel seals.
    pub(crate) esp: EspUse,
    /// What the underlay sees of the packets' classes of service.
    pub(crate) dscp: Dscp,
    /// Offloads that are not to be used.
    pub(crate) no_offload: Vec<Offload>,
    /// Source ports that flows to a peer are spread over, the port itself among them.
    pub(crate) source_ports: u8,
    /// Accept a state directory that was made on another machine.
    pub(crate) rebind: bool,
    /// Identity and store.
    pub(crate) state_dir: PathBuf,
    /// Socket and log.
    pub(crate) run_dir: PathBuf,
    /// Stay in the foreground.
    pub(crate) foreground: bool,
    /// Which log lines (`tracing` directives).
    pub(crate) log: String,
    /// Log lines as JSON.
    pub(crate) log_json: bool,
    /// Take the place of the daemon that runs.
    pub(crate) take_over: bool,
    /// What this was made of beside the configuration file, for whoever starts it again.
    pub(crate) asked: RawUp,
}

impl UpConfig {
    /// The range to found a cluster with.
    pub(crate) fn founding_range(&self) -> Ipv4Net {
        self.range.unwrap_or(AddressPlan::DEFAULT_RANGE)
    }
}

/// `weft up`'s flags and environment as clap left them: `None` and empty mean "not said". A later version may know more of
/// them, an earlier one fewer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RawUp {
    /// `--config`.
    pub(crate) file: Option<PathBuf>,
    /// `--join`. A secret, and of use once only: it is not told.
    #[serde(skip)]
    pub(crate) join: Option<String>,
    /// `--name`.
    pub(crate) name: Option<NodeName>,
    /// `--port`.
    pub(crate) port: Option<u16>,
    /// `--tcp-port`.
    pub(crate) tcp_port: Option<u16>,
    /// `--advertise`.
    pub(crate) advertise: Vec<String>,
    /// `--range`.
    pub(crate) range: Option<Ipv4Net>,
    /// `--no-relay`.
    pub(crate) no_relay: bool,
    /// `--trusted-subnet`.
    pub(crate) trusted_subnets: Vec<IpNet>,
    /// `--esp`.
    pub(crate) esp: Option<EspUse>,
    /// `--dscp`.
    pub(crate) dscp: Option<Dscp>,
    /// `--no-offload`.
    pub(crate) no_offload: Vec<Offload>,
    /// `--source-ports`.
    pub(crate) source_ports: Option<u8>,
    /// `--rebind`.
    pub(crate) rebind: bool,
    /// `--state-dir`.
    pub(crate) state_dir: Option<PathBuf>,
    /// `--run-dir`.
    pub(crate) run_dir: Option<PathBuf>,
    /// `--foreground`.
    pub(crate) foreground: bool,
    /// `--log`.
    pub(crate) log: Option<String>,
    /// `--log-json`.
    pub(crate) log_json: bool,
}

/// The configuration file. It holds no secrets: an invitation has no key here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct FileConfig {
    name: Option<String>,
    port: Option<u16>,
    tcp_port: Option<u16>,
    advertise: Vec<String>,
    range: Option<Ipv4Net>,
    relay: Option<bool>,
    trusted_subnets: Vec<IpNet>,
    esp: Option<EspUse>,
    dscp: Option<Dscp>,
    no_offload: Vec<Offload>,
    source_ports: Option<u8>,
    /// As in the flags.
    pub(crate) state_dir: Option<PathBuf>,
    /// As in the flags.
    pub(crate) run_dir: Option<PathBuf>,
    log: Option<String>,
    log_json: Option<bool>,
}

impl FileConfig {
    /// Reads `path`; with none given the default one, which may be absent.
    pub(crate) fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let file = path.unwrap_or(Path::new(DEFAULT_FILE));
        let opened = match std::fs::File::open(file) {
            Err(e) if e.kind() == ErrorKind::NotFound && path.is_none() => {
                return Ok(Self::default());
            }
            opened => opened
                .with_context(|| format!("can't read the configuration {}", file.display()))?,
        };
        let text = read_bounded(opened, MAX_FILE)
            .with_context(|| format!("can't read the configuration {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("configuration {}", file.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        toml::from_str(text).map_err(|e| {
            let line = e
                .span()
                .map_or(1, |s| text[..s.start].matches('\n').count() + 1);
            anyhow::anyhow!("line {line}: {}", e.message())
        })
    }
}

impl RawUp {
    /// Lays the flags over the file over the defaults, and checks it all.
    pub(crate) fn check(self, file: FileConfig, hostname: &str) -> anyhow::Result<UpConfig> {
        let mut asked = RawUp {
            join: None,
            rebind: false,
            ..self.clone()
        };
        let name = match (self.name, file.name) {
            (Some(name), _) => Some(name),
            (None, Some(text)) => Some(Label::parse(&text).context("name")?),
            (None, None) => None,
        };
        let port = self.port.or(file.port).unwrap_or(DEFAULT_PORT);
        if port == 0 {
            bail!("the port must be from 1 to 65535");
        }
        let tcp_port = self.tcp_port.or(file.tcp_port);
        if tcp_port == Some(0) {
            bail!("the TCP port must be from 1 to 65535");
        }
        let source_ports = self.source_ports.or(file.source_ports).unwrap_or(1);
        if !(1..=MAX_SOURCE_PORTS).contains(&source_ports) {
            bail!("there may be 1 to {MAX_SOURCE_PORTS} source ports, not {source_ports}");
        }
        let advertise = first_said(self.advertise, file.advertise)
            .iter()
            .map(|text| parse_advertise(text, port))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let range = self.range.or(file.range);
        if let Some(range) = range {
            check_range(range)?;
        }
        let trusted_subnets = first_said(self.trusted_subnets, file.trusted_subnets);
        for subnet in &trusted_subnets {
            check_subnet(subnet)?;
        }
        let state_dir = directory(self.state_dir.or(file.state_dir), DEFAULT_STATE_DIR)?;
        let run_dir = directory(self.run_dir.or(file.run_dir), DEFAULT_RUN_DIR)?;
        // Whoever starts it again may do so from another directory, and must find the same ones.
        asked.state_dir = Some(state_dir.clone());
        asked.run_dir = Some(run_dir.clone());
        Ok(UpConfig {
            join: self.join.as_deref().map(resolve_token).transpose()?,
            name,
            hostname: node_name_from(hostname),
            port,
            tcp_port,
            advertise,
            range,
            relay: !self.no_relay && file.relay.unwrap_or(true),
            trusted_subnets,
            esp: self.esp.or(file.esp).unwrap_or_default(),
            dscp: self.dscp.or(file.dscp).unwrap_or_default(),
            no_offload: first_said(self.no_offload, file.no_offload),
            source_ports,
            rebind: self.rebind,
            state_dir,
            run_dir,
            foreground: self.foreground,
            log: self
                .log
                .or(file.log)
                .unwrap_or_else(|| DEFAULT_LOG.to_owned()),
            log_json: self.log_json || file.log_json.unwrap_or(false),
            take_over: false,
            asked,
        })
    }
}

fn first_said<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
    if flags.is_empty() { file } else { flags }
}

/// An absolute path, because the daemon's working directory is not the caller's.
pub(crate) fn directory(asked: Option<PathBuf>, default: &str) -> anyhow::Result<PathBuf> {
    let path = asked.unwrap_or_else(|| PathBuf::from(default));
    std::path::absolute(&path)
        .with_context(|| format!("\"{}\" is not a usable directory", path.display()))
}

/// The host's name as the kernel has it.
pub(crate) fn kernel_hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default()
}

/// The first label of the host's name, with what a label can't hold replaced.
fn node_name_from(hostname: &str) -> NodeName {
    let first = hostname.trim().split('.').next().unwrap_or_default();
    let mapped: String = first
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(63)
        .collect();
    Label::parse(mapped.trim_matches('-'))
        .unwrap_or_else(|_| Label::parse("node").expect("\"node\" is a label"))
}

fn check_range(range: Ipv4Net) -> anyhow::Result<()> {
    // Which cluster it is has no bearing on whether the range can be laid out.
    AddressPlan::new(range, &ClusterId([0; 16]))?;
    Ok(())
}

fn check_subnet(subnet: &IpNet) -> anyhow::Result<()> {
    if subnet.addr() != subnet.network() {
        bail!(
            "trusted subnet {subnet} has host bits set; did you mean {}?",
            subnet.trunc()
        );
    }
    Ok(())
}

/// `ADDR`, `ADDR:PORT` or `[ADDR6]:PORT`.
fn parse_advertise(text: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let addr = match text.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port),
        Err(_) => text.parse().map_err(|_| {
            anyhow::anyhow!(
                "\"{text}\" can't be advertised: give an IP address, or ADDR:PORT ([ADDR]:PORT for IPv6)"
            )
        })?,
    };
    let ip = addr.ip();
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || addr.port() == 0 {
        bail!("\"{text}\" can't be advertised: other hosts could not reach it");
    }
    Ok(addr)
}

/// `TOKEN`, `@FILE` or `-` for standard input.
fn resolve_token(source: &str) -> anyhow::Result<Token> {
    let text = if source == "-" {
        read_bounded(std::io::stdin().lock(), MAX_TOKEN)
            .context("can't read the token from standard input")?
    } else if let Some(path) = source.strip_prefix('@') {
        let file = std::fs::File::open(path)
            .with_context(|| format!("can't read the token from {path}"))?;
        read_bounded(file, MAX_TOKEN)
            .with_context(|| format!("can't read the token from {path}"))?
    } else {
        source.to_owned()
    };
    let token = text.trim();
    if token.is_empty() {
        bail!("the token is empty; get one on a member with: weft token");
    }
    if token.len() as u64 > MAX_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("this is no token; get one on a member with: weft token");
    }
    Ok(Token(token.to_owned()))
}

fn read_bounded(from: impl Read, limit: u64) -> anyhow::Result<String> {
    let mut text = String::new();
    from.take(limit + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limit {
        bail!("it is larger than {limit} bytes");
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
