//! What the runtime says: the network configuration on standard input and the CNI_ variables, checked.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use weft_core::control::SOCKET;
use weft_core::model::{Label, NetworkName};

use crate::error::{CniError, Code};

/// CNI versions this plugin speaks, in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// 0.3.1.
    V031,
    /// 0.4.0: CHECK.
    V040,
    /// 1.0.0: no `version` in addresses.
    V100,
    /// 1.1.0: GC, STATUS, `mtu`.
    V110,
}

impl Version {
    /// The newest.
    pub(crate) const NEWEST: Self = Self::V110;
    const ALL: [Self; 4] = [Self::V031, Self::V040, Self::V100, Self::V110];

    /// As the specification writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// All of them.
    pub(crate) fn names() -> Vec<&'static str> {
        Self::ALL.iter().map(|v| v.name()).collect()
    }

    /// `None` for those we don't speak.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.name() == text)
    }
}

/// The network configuration, as far as it is ours. Keys of others are none of our business.
#[derive(Debug)]
pub(crate) struct NetConf {
    /// Of configuration and result.
    pub(crate) version: Version,
    /// The configuration's own name.
    pub(crate) name: String,
    /// The daemon's socket.
    pub(crate) socket: PathBuf,
    /// weft's network.
    pub(crate) network: Option<NetworkName>,
    /// Of the plugins before us in a chain, or of our own ADD.
    pub(crate) previous: Option<Value>,
    /// Aliases that the runtime gives the container in this network.
    aliases: Vec<String>,
    /// Addresses asked for in the configuration.
    ips: Vec<String>,
    /// Was a MAC asked for?
    mac: bool,
    /// Ports that the runtime wants published for this container.
    has_port_mappings: bool,
    /// What is still attached, for GC.
    pub(crate) valid: Option<Vec<(String, String)>>,
    /// `args.cni.K8S_POD_NAME` or the like.
    pod_name: Option<String>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "cniVersion", default)]
    version: Option<String>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    network: Option<String>,
    #[serde(default)]
    socket: Option<PathBuf>,
    #[serde(rename = "prevResult", default)]
    previous: Option<Value>,
    #[serde(rename = "runtimeConfig", default, deserialize_with = "or_null")]
    runtime: RawRuntime,
    #[serde(default, deserialize_with = "or_null")]
    args: RawArgs,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid: Option<Vec<RawAttachment>>,
}

#[derive(Default, Deserialize)]
struct RawRuntime {
    #[serde(default, deserialize_with = "or_null")]
    aliases: BTreeMap<String, Vec<String>>,
    #[serde(default, deserialize_with = "or_null")]
    ips: Vec<String>,
    #[serde(default)]
    mac: Option<String>,
    #[serde(rename = "portMappings", default)]
    port_mappings: Option<Vec<Value>>,
}

#[derive(Default, Deserialize)]
struct RawArgs {
    #[serde(default, deserialize_with = "or_null")]
    cni: RawArgsCni,
}

#[derive(Default, Deserialize)]
struct RawArgsCni {
    #[serde(default, deserialize_with = "or_null")]
    ips: Vec<String>,
    #[serde(default)]
    mac: Option<String>,
    #[serde(rename = "K8S_POD_NAME", default)]
    pod_name: Option<String>,
}

/// Runtimes written in Go write `null` for what is empty.
fn or_null<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

#[derive(Deserialize)]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

impl NetConf {
    /// Decodes and checks. `told` becomes the configuration's version as soon as that is known.
    pub(crate) fn parse(input: &[u8], told: &mut Version) -> Result<Self, CniError> {
        let raw: Raw = serde_json::from_slice(input).map_err(|e| {
            CniError::new(
                Code::Decode,
                format!("the network configuration can't be decoded: {e}"),
            )
        })?;
        // The specification: a configuration without a version is one of 0.1.0.
        let asked = raw.version.as_deref().unwrap_or("0.1.0");
        let version = Version::parse(asked).ok_or_else(|| {
            CniError::new(
                Code::Version,
                format!(
                    "CNI version {asked:.20} is not one of {}",
                    Version::names().join(", ")
                ),
            )
        })?;
        *told = version;
        if !is_identifier(&raw.name) {
            return Err(bad_config(
                "\"name\" must begin with a letter or digit and hold only those and _.-",
            ));
        }
        let network = raw
            .network
            .filter(|n| !n.is_empty())
            .map(|n| Label::parse(&n).map_err(|e| bad_config(format!("\"network\": {e}"))))
            .transpose()?;
        let valid = raw
            .valid
            .map(|list| list.into_iter().map(|a| (a.container, a.ifname)).collect());
        let mut ips = raw.runtime.ips;
        ips.extend(raw.args.cni.ips);
        Ok(Self {
            version,
            socket: socket(raw.socket)?,
            network,
            previous: raw.previous.filter(|p| !p.is_null()),
            aliases: raw
                .runtime
                .aliases
                .get(&raw.name)
                .cloned()
                .unwrap_or_default(),
            name: raw.name,
            ips,
            mac: raw
                .runtime
                .mac
                .or(raw.args.cni.mac)
                .is_some_and(|m| !m.is_empty()),
            has_port_mappings: raw.runtime.port_mappings.is_some_and(|p| !p.is_empty()),
            valid,
            pod_name: raw.args.cni.pod_name,
        })
    }

    /// The key under which the daemon keeps an attachment. Container ids hold no slash, so configurations never meet.
    pub(crate) fn key(&self, container: &str) -> String {
        format!("{}/{container}", self.name)
    }

    /// What of the configuration weft can't do.
    pub(crate) fn check_wishes(&self, args: &CniArgs) -> Result<(), CniError> {
        if self.mac || args.mac {
            return Err(bad_config(
                "weft gives an interface its MAC by its address; don't ask for one",
            ));
        }
        if self.has_port_mappings {
            return Err(bad_config(
                "weft publishes services, not single containers: use `weft service create NAME --port P --publish P:P`, \
                 or put the portmap plugin behind weft-cni and take \"portMappings\" out of its capabilities",
            ));
        }
        Ok(())
    }

    /// The one IPv4 address asked for, wherever it was.
    pub(crate) fn address(&self, args: &CniArgs) -> Result<Option<Ipv4Addr>, CniError> {
        let mut found: Option<Ipv4Addr> = None;
        for text in self.ips.iter().chain(&args.ips) {
            let ip = parse_address(text)?;
            if found.is_some_and(|other| other != ip) {
                return Err(bad_config(
                    "weft gives an interface one address; ask for one",
                ));
            }
            found = Some(ip);
        }
        Ok(found)
    }

    /// The container's names: the pod's first, then aliases. What can't be a name in DNS is left out, because the
    /// runtime's own rules for names are wider and the container should run all the same. The other half says what.
    pub(crate) fn names(&self, args: &CniArgs) -> (Vec<Label>, Vec<String>) {
        const MOST: usize = 16;
        let mut names = Vec::new();
        let mut left_out = Vec::new();
        let said = args
            .pod_name
            .iter()
            .chain(&self.pod_name)
            .chain(&self.aliases);
        for text in said {
            match Label::parse(text) {
                Ok(name) if names.contains(&name) => {}
                Ok(name) if names.len() < MOST => names.push(name),
                Ok(name) => left_out.push(format!("more than {MOST} names; {name} is left out")),
                Err(error) => left_out.push(format!("left out as a name: {error}")),
            }
        }
        (names, left_out)
    }
}

fn socket(configured: Option<PathBuf>) -> Result<PathBuf, CniError> {
    match configured {
        Some(path) if path.is_absolute() => Ok(path),
        Some(_) => Err(bad_config("\"socket\" must be an absolute path")),
        None => {
            let dir = std::env::var_os("WEFT_RUN_DIR").unwrap_or_else(|| "/run/weft".into());
            Ok(PathBuf::from(dir).join(SOCKET))
        }
    }
}

/// `10.32.0.7` or `10.32.0.7/16`: runtimes write both.
fn parse_address(text: &str) -> Result<Ipv4Addr, CniError> {
    let bare = text.split_once('/').map_or(text, |(ip, _)| ip).trim();
    match bare.parse() {
        Ok(IpAddr::V4(ip)) => Ok(ip),
        Ok(IpAddr::V6(_)) => Err(bad_config(
            "weft derives the IPv6 address from the IPv4 one; ask for that",
        )),
        Err(_) => Err(bad_config(format!("\"{bare:.40}\" is not an IPv4 address"))),
    }
}

fn bad_config(text: impl Into<String>) -> CniError {
    CniError::new(Code::Config, text)
}

/// CNI_ARGS, as far as it is ours.
#[derive(Debug, Default)]
pub(crate) struct CniArgs {
    ips: Vec<String>,
    mac: bool,
    pod_name: Option<String>,
}

/// The CNI_ variables as they came.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    container: String,
    netns: String,
    ifname: String,
    args: String,
}

impl Environment {
    /// Of this process. What is not UTF-8 fails the checks below.
    pub(crate) fn from_process() -> Self {
        let variable = |name| {
            std::env::var_os(name)
                .map(|value| value.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        Self {
            container: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            ifname: variable("CNI_IFNAME"),
            args: variable("CNI_ARGS"),
        }
    }

    /// Of CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME and CNI_ARGS.
    pub(crate) fn new([container, netns, ifname, args]: [&str; 4]) -> Self {
        Self {
            container: container.to_owned(),
            netns: netns.to_owned(),
            ifname: ifname.to_owned(),
            args: args.to_owned(),
        }
    }

    /// CNI_CONTAINERID.
    pub(crate) fn container(&self) -> Result<&str, CniError> {
        if is_identifier(&self.container) {
            return Ok(&self.container);
        }
        Err(bad_environment(
            "CNI_CONTAINERID must begin with a letter or digit and hold only those and _.-",
        ))
    }

    /// CNI_IFNAME: what the kernel takes (dev_valid_name).
    pub(crate) fn ifname(&self) -> Result<&str, CniError> {
        let name = self.ifname.as_str();
        let fine = (1..=15).contains(&name.len())
            && name != "."
            && name != ".."
            && name
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        if fine {
            return Ok(name);
        }
        Err(bad_environment(
            "CNI_IFNAME must be an interface's name of 1 to 15 characters",
        ))
    }

    /// CNI_NETNS, which must be there.
    pub(crate) fn netns(&self) -> Result<&str, CniError> {
        if self.netns.starts_with('/') {
            return Ok(&self.netns);
        }
        Err(bad_environment(
            "CNI_NETNS must be the path of the container's network namespace",
        ))
    }

    /// For DEL: is there still a namespace to detach from?
    pub(crate) fn netns_exists(&self) -> bool {
        !self.netns.is_empty() && std::path::Path::new(&self.netns).exists()
    }

    /// CNI_ARGS.
    pub(crate) fn args(&self) -> Result<CniArgs, CniError> {
        let mut args = CniArgs::default();
        let mut unknown = None;
        let mut ignore_unknown = false;
        for pair in self.args.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                bad_environment(format!("CNI_ARGS: \"{pair:.40}\" is not KEY=VALUE"))
            })?;
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True");
                }
                "IP" => args.ips.extend(value.split(',').map(str::to_owned)),
                "MAC" => args.mac = true,
                "K8S_POD_NAME" => args.pod_name = Some(value.to_owned()),
                _ if key.starts_with("K8S_POD_") => {}
                _ => unknown = Some(key.to_owned()),
            }
        }
        match unknown {
            Some(key) if !ignore_unknown => Err(bad_environment(format!(
                "CNI_ARGS: weft-cni knows no {key:.40} (and IgnoreUnknown is not set)"
            ))),
            _ => Ok(args),
        }
    }
}

fn bad_environment(text: impl Into<String>) -> CniError {
    CniError::new(Code::Environment, text)
}

/// The specification's rule for container ids and network names: `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`.
fn is_identifier(text: &str) -> bool {
    text.len() <= 256
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}
