//! The command line as people type it. What the flags come to is decided in the modules below.

pub(crate) mod commands;
pub(crate) mod service;
pub(crate) mod target;

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ipnet::{IpNet, Ipv4Net};
use weft_core::model::{EndpointId, Label, NetworkName, NodeName, ServiceName};
use weft_core::underlay::{Dscp, Offload};

use crate::esp::EspUse;

const OVERVIEW: &str = "\
Getting started:
  host one     weft up                       found a cluster
               weft token                    print an invitation
  the others   weft up --join TOKEN
  anywhere     weft run --name web -- python3 -m http.server 80
               weft service create web --port 80 --publish 8080:80
               curl http://localhost:8080    on every host

Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage.";

/// One encrypted network with names, virtual addresses and published ports for containers on several hosts.
#[derive(Debug, Parser)]
#[command(name = "weft", version, after_help = OVERVIEW, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Where the daemon's socket and log are [default: /run/weft]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "WEFT_RUN_DIR",
        hide_env_values = true
    )]
    pub(crate) run_dir: Option<PathBuf>,
    /// Configuration file [default: /etc/weft/weft.toml, which may be absent]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "WEFT_CONFIG",
        hide_env_values = true
    )]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start weft on this host: found a cluster, join one, or return to one
    Up(Box<UpArgs>),
    /// Replace the running daemon by a new one, this program: for an upgrade, or to read the configuration again
    Restart(RestartArgs),
    /// Stop weft and remove everything it made in the kernel; its state is kept
    Down(StateArgs),
    /// Leave the cluster for good: its addresses go to the others, everything weft made is removed, its state forgotten
    Reset(StateArgs),
    /// Print an invitation for another host
    Token(TokenArgs),
    /// Show how this node is
    Status(JsonFlag),
    /// Show the other nodes and the tunnels to them
    Peers(JsonFlag),
    /// List what is attached to the network, on all nodes
    Ps(PsArgs),
    /// Attach a network namespace, a process or a container
    Attach(AttachArgs),
    /// Detach what was attached
    Detach(DetachArgs),
    /// Run a command in a network namespace of its own on the network
    Run(RunArgs),
    /// Run a command inside weft's own network namespace
    Exec(ExecArgs),
    /// Services: a virtual address balanced over all live backends
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Networks: who is in one reaches directly only who is in the same
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Names in weft.internal
    #[command(subcommand)]
    Dns(DnsCommand),
    /// The nodes of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show weft at work on this one machine, with three hosts made of namespaces
    Demo(DemoArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// The daemon, as `weft up` starts it.
    #[command(name = crate::background::COMMAND, hide = true)]
    Background,
    /// The demo's own small programs: a web server, its client.
    #[command(name = crate::demo::PART, hide = true, subcommand)]
    DemoPart(crate::demo::Part),
    /// The half of `weft run` inside the new namespace.
    #[command(name = crate::run::INSIDE, hide = true)]
    RunInside(crate::run::InsideArgs),
}

/// For commands that print data.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct JsonFlag {
    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft up                                  found a cluster, or return to the one this host is in
  weft up --join weft1_...                 join with a token printed by `weft token`
  weft up --join @/root/token              read the token from a file; `-` reads standard input
  weft up --trusted-subnet 10.9.0.0/24     plain VXLAN, not encrypted, to hosts there that say the same
  weft up --advertise 203.0.113.7          be found at this address, for example behind a port forward
  weft up --tcp-port 443                   also let in hosts whose network lets out nothing but TCP to 443
  weft up --foreground                     for a service manager or a container

Every flag but --join can stand in /etc/weft/weft.toml (port = 6783, advertise = [\"...\"], ...) or in the
environment; a flag wins over the environment, and that over the file.")]
pub(crate) struct UpArgs {
    /// Join with an invitation: the token itself, @FILE, or - for standard input
    #[arg(long, value_name = "TOKEN|@FILE|-")]
    pub(crate) join: Option<String>,
    /// This node's name [default: the host's name]
    #[arg(long, value_name = "NAME", env = "WEFT_NAME", hide_env_values = true)]
    pub(crate) name: Option<NodeName>,
    /// UDP port for everything between nodes [default: 6783]
    #[arg(long, value_name = "PORT", env = "WEFT_PORT", hide_env_values = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// Take TCP connections on this port, too, from hosts whose network lets no UDP out; they join by the same tokens
    #[arg(long, value_name = "PORT", env = "WEFT_TCP_PORT", hide_env_values = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) tcp_port: Option<u16>,
    /// Address the others should try first: ADDR or ADDR:PORT (may be repeated)
    #[arg(
        long,
        value_name = "ADDR",
        env = "WEFT_ADVERTISE",
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub(crate) advertise: Vec<String>,
    /// Range of the containers' addresses, when founding [default: 10.32.0.0/12]
    #[arg(long, value_name = "CIDR", env = "WEFT_RANGE", hide_env_values = true)]
    pub(crate) range: Option<Ipv4Net>,
    /// Pass nothing on between members that can't reach each other directly
    #[arg(long)]
    pub(crate) no_relay: bool,
    /// Underlay network that nobody else can reach: to hosts that list theirs, too, packets go NOT ENCRYPTED, as VXLAN (may be repeated)
    #[arg(
        long = "trusted-subnet",
        value_name = "CIDR",
        env = "WEFT_TRUSTED_SUBNET",
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub(crate) trusted_subnets: Vec<IpNet>,
    /// Let the kernel encrypt (ESP, AES-GCM) what goes to hosts that do so, too: `never`, `auto` (if it is faster here than weft) or `always` [default: auto]
    #[arg(
        long,
        value_name = "never|auto|always",
        env = "WEFT_ESP",
        hide_env_values = true
    )]
    pub(crate) esp: Option<EspUse>,
    /// What the underlay sees of the packets' classes of service: `clear` or `copy` [default: clear]
    #[arg(
        long,
        value_name = "clear|copy",
        env = "WEFT_DSCP",
        hide_env_values = true
    )]
    pub(crate) dscp: Option<Dscp>,
    /// Do without offloads that this host's kernel or card has broken: gso, gro, tso, uso, csum (may be repeated)
    #[arg(
        long = "no-offload",
        value_name = "OFFLOAD",
        env = "WEFT_NO_OFFLOAD",
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub(crate) no_offload: Vec<Offload>,
    /// Spread flows to each peer over so many source ports, 1 to 4, where the network caps what one pair of addresses and
    /// ports may carry [default: 1]
    #[arg(
        long = "source-ports",
        value_name = "N",
        env = "WEFT_SOURCE_PORTS",
        hide_env_values = true
    )]
    pub(crate) source_ports: Option<u8>,
    /// Accept a state directory that was made on another machine, because this one replaces it
    #[arg(long)]
    pub(crate) rebind: bool,
    #[command(flatten)]
    pub(crate) state: StateArgs,
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Which log lines, as `info` or `weft=debug,info`
    #[arg(long, value_name = "FILTER", env = "WEFT_LOG", hide_env_values = true)]
    pub(crate) log: Option<String>,
    /// Log lines as JSON
    #[arg(long)]
    pub(crate) log_json: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The new daemon takes over what the running one has open: no connection of the network breaks, and hardly a packet is lost.
It starts with the flags and the environment that the running one was started with, and the configuration file as it is
now. If it does not come up, the old one goes on.

What runs under a service manager is restarted there (systemctl restart weft), with the same effect where the unit has
FileDescriptorStoreMax=, as examples/weft.service does.

Examples:
  install weft-new /usr/local/bin/weft && weft restart")]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StateArgs {
    /// Where identity and store are kept [default: /var/lib/weft]
    #[arg(
        long,
        value_name = "DIR",
        env = "WEFT_STATE_DIR",
        hide_env_values = true
    )]
    pub(crate) state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft token                       one host may join within the hour
  weft token --uses 5 --ttl 1day   five hosts may
  weft token --reusable --ttl 10m  any number may, for ten minutes
  ssh host2 weft up --join - <<<\"$(weft token)\"")]
pub(crate) struct TokenArgs {
    /// How long it stays valid, as 30m, 1h or 2days
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_ttl)]
    pub(crate) ttl: Duration,
    /// How many hosts may join with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) uses: u32,
    /// Any number of hosts may join until it expires
    #[arg(long, conflicts_with = "uses")]
    pub(crate) reusable: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Only what is attached on this host
    #[arg(long)]
    pub(crate) local: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

/// What is attached, or detached.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct TargetArgs {
    /// A namespace: its file, or its name in /run/netns
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: Option<String>,
    /// The namespace of a process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pid: Option<u32>,
    /// The namespace of a running docker or podman container
    #[arg(long, value_name = "ID")]
    pub(crate) container: Option<String>,
}

/// What an endpoint is to be.
#[derive(Debug, Args)]
pub(crate) struct EndpointArgs {
    /// A name it answers to (may be repeated)
    #[arg(long = "name", value_name = "NAME")]
    pub(crate) names: Vec<Label>,
    /// The network, from `weft network ls` [default: default]
    #[arg(long, value_name = "NET")]
    pub(crate) network: Option<NetworkName>,
    /// This IPv4 address and no other
    #[arg(long, value_name = "IP")]
    pub(crate) ip: Option<Ipv4Addr>,
    /// A label for `weft service create --select` (may be repeated)
    #[arg(long = "label", value_name = "K=V", value_parser = parse_pair)]
    pub(crate) labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft attach --netns blue --name web
  weft attach --pid 4711 --name db --ip 10.32.0.50
  weft attach --container $(docker run -d --network none nginx) --name web")]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) endpoint: EndpointArgs,
    /// Name of the interface inside
    #[arg(long, value_name = "IFNAME", default_value = "eth0", value_parser = parse_ifname)]
    pub(crate) ifname: String,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft detach 8a6f3c21d0be9475     the endpoint's id, from `weft ps`
  weft detach --netns blue")]
pub(crate) struct DetachArgs {
    /// The endpoint's id
    #[arg(value_name = "ENDPOINT", conflicts_with_all = ["netns", "pid", "container"])]
    pub(crate) id: Option<EndpointId>,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Name of the interface inside
    #[arg(long, value_name = "IFNAME", default_value = "eth0", value_parser = parse_ifname)]
    pub(crate) ifname: String,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The command sees one interface (eth0), its own name server and everything else of the host as it is. Signals go
through to it, and its exit status comes back (128 + number if a signal ended it).

Examples:
  weft run --name web -- python3 -m http.server 80
  weft run -- curl http://web/
  weft run --name db -e PGDATA=/srv/db -- postgres")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) endpoint: EndpointArgs,
    /// Set an environment variable (may be repeated)
    #[arg(short = 'e', long = "env", value_name = "K=V", value_parser = parse_env)]
    pub(crate) env: Vec<(String, String)>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft exec -- tcpdump -ni wu0     what goes to the other nodes, before it is encrypted
  weft exec -- ip route
  weft exec -- nft list table inet weft")]
pub(crate) struct ExecArgs {
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<std::ffi::OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// Create a service
    Create(ServiceArgs),
    /// List the services
    Ls(JsonFlag),
    /// Show one service
    Inspect {
        /// Its name
        name: ServiceName,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// Replace parts of a service; what is not given stays
    Update(ServiceUpdateArgs),
    /// Remove a service
    Rm {
        /// Its name
        name: ServiceName,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Backends are all live endpoints named like the service, or those with the labels given by --select.

Examples:
  weft service create web --port 80                          the name web and one address for all of them
  weft service create web --port 80:8000                     the backends listen on 8000
  weft service create web --port 80 --publish 8080:80        and port 8080 on every host
  weft service create dns --port 53/udp --publish 192.0.2.1:53:53/udp
  weft service create api --port 443 --select tier=front --select ring=2")]
pub(crate) struct ServiceArgs {
    /// Its name
    pub(crate) name: ServiceName,
    /// A port, where the backends listen if elsewhere, and the protocol if not TCP (may be repeated)
    #[arg(long = "port", value_name = "P[:TARGET][/udp]", required = true, value_parser = service::port)]
    pub(crate) ports: Vec<service::Port>,
    /// Answer for one of its ports on every host (may be repeated)
    #[arg(long = "publish", value_name = "[ADDR:]P:PORT[/udp]", value_parser = service::publication)]
    pub(crate) publish: Vec<service::Publication>,
    /// Backends must have this label (may be repeated)
    #[arg(long = "select", value_name = "K=V", value_parser = parse_pair)]
    pub(crate) select: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft service update web --publish 8081:80      published on 8081 and nowhere else
  weft service update web --no-publish           reached by name only
  weft service update web --port 80:9000         other ports; publications of ports that stay are kept")]
pub(crate) struct ServiceUpdateArgs {
    /// Its name
    pub(crate) name: ServiceName,
    /// Replaces all its ports
    #[arg(long = "port", value_name = "P[:TARGET][/udp]", value_parser = service::port)]
    pub(crate) ports: Vec<service::Port>,
    /// Replaces all its publications
    #[arg(long = "publish", value_name = "[ADDR:]P:PORT[/udp]", value_parser = service::publication)]
    pub(crate) publish: Vec<service::Publication>,
    /// Publish it nowhere
    #[arg(long, conflicts_with = "publish")]
    pub(crate) no_publish: bool,
    /// Replaces all labels that backends must have
    #[arg(long = "select", value_name = "K=V", value_parser = parse_pair)]
    pub(crate) select: Vec<(String, String)>,
    /// Backends by name again
    #[arg(long, conflicts_with = "select")]
    pub(crate) no_select: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Create a network
    Create(NetworkArgs),
    /// List the networks
    Ls(JsonFlag),
    /// Remove a network that nothing is in
    Rm {
        /// Its name
        name: NetworkName,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Containers of one network reach each other by address and by name. Those of other networks they reach only through
services and published ports; the hosts themselves reach all. What names no network is in \"default\".

Examples:
  weft network create blue                          4,094 addresses in the default range
  weft network create big --size /16                65,534
  weft network create lab --subnet 10.40.0.0/20     these and no others
  weft run --network blue --name web -- CMD...")]
pub(crate) struct NetworkArgs {
    /// Its name
    pub(crate) name: NetworkName,
    /// Its size as a prefix length, a sixteenth to a 256th of the range: /16 to /20 in the default one [default: the
    /// smallest]
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) size: Option<u8>,
    /// These addresses and no others
    #[arg(long, value_name = "CIDR", conflicts_with = "size")]
    pub(crate) subnet: Option<Ipv4Net>,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DnsCommand {
    /// Bind a name in weft.internal to an address
    Add {
        /// The name, with or without .weft.internal
        #[arg(value_parser = parse_internal_name)]
        name: Label,
        /// Its IPv4 or IPv6 address
        ip: IpAddr,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// List the names bound with `weft dns add`
    Ls(JsonFlag),
    /// Remove a name that was bound with `weft dns add`
    Rm {
        /// The name
        #[arg(value_parser = parse_internal_name)]
        name: Label,
    },
    /// Ask weft's name server, as a container would
    Lookup {
        /// A name, or an address for its name
        name: String,
        #[command(flatten)]
        json: JsonFlag,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes
    Ls(JsonFlag),
    /// Remove a node for good: its key is void at once, its addresses come back
    Rm(NodeRmArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
The other nodes stop talking to it within seconds of hearing this. Its addresses come back once a majority of the nodes
that it recorded as its voters agree, which live nodes do by themselves; so the smaller half of a split gets nothing, and
neither does one of two nodes. When the node is destroyed and that majority can't be had, --force takes the addresses
back all the same. If the other half of a split did so too, one of them holds in the end, and the containers of the
other get new addresses.

Examples:
  weft node rm old-server             it is gone, or must be kept out
  weft node rm old-server --force     it is destroyed, and too few others are left to agree

To leave for good from the node itself, run `weft reset` there.")]
pub(crate) struct NodeRmArgs {
    /// Its name or its id, from `weft node ls`
    pub(crate) node: String,
    /// It is destroyed and will never come back: take its addresses back whoever agrees
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Leave it running at the end, until ctrl-C
    #[arg(long)]
    pub(crate) keep: bool,
    #[command(flatten)]
    pub(crate) json: JsonFlag,
}

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(text)
        .map_err(|e| format!("{e}; write it as 30m, 1h or 2days"))?;
    if ttl < Duration::from_secs(1) || ttl > Duration::from_secs(366 * 86_400) {
        return Err("from one second to one year".to_owned());
    }
    Ok(ttl)
}

/// A prefix length, with or without its slash.
fn parse_size(text: &str) -> Result<u8, String> {
    match text.strip_prefix('/').unwrap_or(text).parse() {
        Ok(size @ 8..=30) => Ok(size),
        _ => Err("write it as a prefix length: /20 is 4,094 addresses, /16 is 65,534".to_owned()),
    }
}

/// `K=V` for labels: printable, short, and nothing that would need quoting.
fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| "write it as key=value".to_owned())?;
    let fine = |s: &str| {
        s.len() <= 63
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
    };
    if key.is_empty() || !fine(key) || !fine(value) {
        return Err("letters, digits and -_./ only, at most 63 on each side of the =".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as NAME=value".to_owned()),
    }
}

/// What the kernel takes as an interface's name (dev_valid_name), less what would confuse a shell.
fn parse_ifname(text: &str) -> Result<String, String> {
    let fine = (1..=15).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !text.starts_with(['-', '.'])
        && text != "lo";
    if fine {
        Ok(text.to_owned())
    } else {
        Err("an interface's name has 1 to 15 letters, digits or -_. and is not lo".to_owned())
    }
}

fn parse_internal_name(text: &str) -> Result<Label, String> {
    let trimmed = text.trim_end_matches('.');
    let label = trimmed.strip_suffix(".weft.internal").unwrap_or(trimmed);
    Label::parse(label).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests;
