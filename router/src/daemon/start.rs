//! The order in which a daemon comes up, and what it takes back when it can't.
//!
//! ```text
//! preflight -> state and its lock -> identity -> disk -> domain -> carrier -> core (found, join, resume)
//!   -> member: range check -> host's own address -> kernel as it should be -> DNS -> API -> up
//! ```

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::mpsc;
use tracing::warn;
use weft_carrier::{Carrier, CarrierConfig, CarrierError};
use weft_core::control::SOCKET;
use weft_core::crypto::{Cipher, Random};
use weft_core::model::{Label, NodeName};
use weft_core::node::{self, Command, JoinFailure, Node, NodeConfig, Reply, Start};
use weft_core::store::Stored;
use weft_core::token::Token;
use weft_core::view::{EndpointKind, View};
use weft_dns::Upstreams;
use weft_kernel::{Domain, Host, HostState};

use super::attachments::Attachments;
use super::core_thread::{Clock, Core, Inbox, Notice};
use super::disk::Disk;
use super::host_facts::{addresses, underlay};
use super::kernel_thread::{HostRecord, Kernel};
use super::publish::Placeholders;
use super::serve::{self, Running};
use super::state::{PREDECESSOR, StateDir};
use super::stop::{self, Signals, Underway, domain_name};
use super::{Daemon, Stop, api, dns};
use crate::background::{Origin, Ready, Summary};
use crate::config::UpConfig;

/// A join takes this long at most: the joiner itself gives up sooner and says why.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// Runs a daemon until it is asked to stop.
pub(crate) fn run(config: UpConfig, ready: Ready) -> Result<()> {
    keep_memory_private()?;
    let missing = weft_kernel::preflight();
    if !missing.is_empty() {
        let lines: Vec<String> = missing
            .iter()
            .map(|m| format!("{} ({}): {}", m.what, m.found, m.remedy))
            .collect();
        bail!("this host lacks what weft needs: {}", lines.join("; "));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("weft")
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let outcome = runtime.block_on(live(config, ready));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

/// Keys are in this process's memory: it must not end in a core file, and no other process may look into it.
fn keep_memory_private() -> Result<()> {
    nix::sys::prctl::set_dumpable(false)
        .context("can't keep other processes out of the daemon's memory")?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)
        .context("can't switch core files off")
}

async fn live(config: UpConfig, ready: Ready) -> Result<()> {
    // Before anything is made: a signal ends a start in order too, instead of killing it half-way.
    let mut signals = Signals::listen()?;
    let host = Arc::new(Host::current()?);
    // Locked until all is taken back: who starts next must not find half of it.
    let state = StateDir::open(&config.state_dir)?;
    let begun = prepare(&config, &state, &host)?;
    let (name, fresh) = (begun.domain_name.clone(), begun.fresh);
    let mut underway = Underway::default();
    let outcome = tokio::select! {
        outcome = bring_up(&config, &ready, host.clone(), begun, &mut underway) => outcome,
        () = signals.heard() => Err(anyhow!("interrupted while it was starting; nothing of it is left running")),
    };
    match outcome {
        Ok(running) => serve::serve(running, underway, signals, &ready).await,
        Err(error) => {
            let known = underway.end().await;
            if fresh {
                take_back(&config, &host, &name, known);
            }
            Err(error)
        }
    }
}

fn take_back(config: &UpConfig, host: &Host, name: &str, known: Option<HostState>) {
    let mut state = stop::known_host_state(known, &config.state_dir);
    let troubles = host.teardown(name, &mut state);
    for trouble in &troubles {
        warn!(%trouble, "could not take back what was begun");
    }
    // `weft down` needs it for what is left.
    if troubles.is_empty() {
        let _ = fs::remove_file(config.state_dir.join(stop::HOST_STATE));
    }
}

/// What is there before anything of the kernel was touched.
struct Begun {
    identity: weft_core::identity::Identity,
    random: Random,
    inbox: Inbox,
    disk: Arc<Disk>,
    stored: Stored,
    start: Start,
    origin: Origin,
    domain_name: String,
    /// No domain was left by an earlier daemon.
    fresh: bool,
}

fn prepare(config: &UpConfig, state: &StateDir, host: &Host) -> Result<Begun> {
    let mut random = Random::from_seed(os_seed()?);
    let identity = state.identity(&mut random, config.rebind)?;
    let inbox = Inbox::new();
    let (disk, stored) = Disk::open(&state.database(), inbox.durable())?;
    let (start, origin) = choose_start(config, host, &stored)?;
    let domain_name = domain_name(&identity.id());
    let fresh = !Path::new("/run/netns").join(&domain_name).exists();
    Ok(Begun {
        identity,
        random,
        inbox,
        disk: Arc::new(disk),
        stored,
        start,
        origin,
        domain_name,
        fresh,
    })
}

pub(super) fn os_seed() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut seed))
        .context("can't read /dev/urandom")?;
    Ok(seed)
}

fn choose_start(config: &UpConfig, host: &Host, stored: &Stored) -> Result<(Start, Origin)> {
    let token = config
        .join
        .as_ref()
        .map(|token| Token::parse(token.expose()))
        .transpose()?;
    let mine = node::cluster_of(stored);
    match (mine, token) {
        (Some(mine), Some(token)) if token.body().cluster != mine => bail!(
            "this host belongs to another cluster, {mine}; the token is for {}; to leave the old one first: weft reset",
            token.body().cluster
        ),
        (Some(_), _) => {
            let range = node::range_of(stored);
            if let (Some(asked), Some(range)) = (config.range, range)
                && asked != range
            {
                bail!(
                    "the cluster's range is {range}, not {asked}; a range can't be changed later: drop --range"
                );
            }
            Ok((Start::Resume, Origin::Returned))
        }
        (None, Some(token)) => Ok((
            Start::Join {
                token: Box::new(token),
            },
            Origin::Joined,
        )),
        (None, None) => {
            let range = config.founding_range();
            check_range(host, range, &[])?;
            Ok((Start::Found { range }, Origin::Founded))
        }
    }
}

/// Refuses a range that would cut the host off; returns what containers will not reach.
fn check_range(host: &Host, range: ipnet::Ipv4Net, peers: &[IpAddr]) -> Result<Vec<String>> {
    let (fatal, mild): (Vec<_>, Vec<_>) = host
        .range_conflicts(range, peers)?
        .into_iter()
        .partition(|overlap| overlap.fatal);
    if let Some(overlap) = fatal.first() {
        bail!(
            "the range {range} overlaps {} ({}); choose another with --range",
            overlap.net,
            overlap.why
        );
    }
    Ok(mild
        .iter()
        .map(|o| {
            format!(
                "containers will not reach {}: it lies in weft's range ({})",
                o.net, o.why
            )
        })
        .collect())
}

async fn bring_up(
    config: &UpConfig,
    ready: &Ready,
    host: Arc<Host>,
    begun: Begun,
    underway: &mut Underway,
) -> Result<Running> {
    ready.progress("preparing the network namespace of the mesh");
    let (domain, _) = Domain::open_or_create(&begun.domain_name)?;
    let domain = Arc::new(domain);
    let carrier = Arc::new(start_carrier(config, &domain, &begun.inbox)?);
    let cipher = fast_cipher();
    let node_config = NodeConfig {
        name: node_name(config),
        rename: config.name.is_some(),
        cipher,
        host_addrs: addresses(&host),
        underlay: underlay(config, &host),
    };
    let Begun {
        identity,
        mut random,
        inbox,
        disk,
        stored,
        start,
        origin,
        domain_name,
        ..
    } = begun;
    let me = identity.id();
    let attachments = Attachments::restore(&stored);
    let node = Node::new(identity, node_config, start, stored, random.bytes());
    let (notify, mut notices) = mpsc::unbounded_channel();
    say_what_happens(ready, origin);
    let (core, core_thread) = Core::start(
        inbox,
        node,
        Clock::new(),
        disk.clone(),
        carrier.clone(),
        notify,
    )?;
    underway.core = Some((core.clone(), core_thread));
    wait_until_member(&mut notices).await?;
    let view = core.view().context("a member has a view")?;
    let peers: Vec<IpAddr> = view
        .members
        .iter()
        .flat_map(|member| member.host_addrs.iter().copied())
        .collect();
    let warnings = check_range(&host, view.plan.range, &peers)?;
    ready.progress("setting up routes, rules and names");
    let host_ip = host_address(&core, &view).await?;
    let state_path = config.state_dir.join(stop::HOST_STATE);
    let record = HostRecord {
        state: stop::load_host_state(&config.state_dir)?,
        save: Box::new(move |state| save_host_state(&state_path, state)),
    };
    let (kernel, kernel_thread) =
        Kernel::start(domain.clone(), host.clone(), record, core.clone())?;
    underway.kernel = Some((kernel.clone(), kernel_thread));
    let upstreams = Upstreams::new(dns::resolvers(&view.plan));
    kernel.change(|around| {
        around.host_addrs = addresses(&host);
        around.resolvers = upstreams.list().iter().map(SocketAddr::ip).collect();
    });
    kernel
        .apply()
        .await
        .map_err(|error| anyhow!("can't set up the kernel: {error}"))?;
    let name_server = dns::follow(&domain, &core, &view, &upstreams)?;
    let socket = config.run_dir.join(SOCKET);
    let listener = api::listen(&socket)?;
    underway.socket = Some(socket);
    let daemon = Arc::new(Daemon {
        core,
        kernel,
        domain,
        host,
        carrier: Mutex::new(Some(carrier)),
        disk,
        attachments: Mutex::new(attachments),
        attaching: tokio::sync::Mutex::new(()),
        placeholders: tokio::sync::Mutex::new(Placeholders::default()),
        stop: Stop::default(),
        started: Instant::now(),
        port: config.port,
        netns: domain_name.clone(),
        cipher: cipher.name(),
        warnings: warnings.clone(),
        state_dir: config.state_dir.clone(),
    });
    daemon.drop_orphans().await;
    daemon.drop_vanished().await;
    if let Err(error) = daemon.serve_published().await {
        warn!(error = %error.0, "published ports are not served yet");
    }
    let summary = Summary {
        name: super::rows::node_name(&view, &me),
        node: me.short(),
        cluster: view.cluster.to_string(),
        origin,
        host_ip: Some(host_ip),
        port: config.port,
        range: view.plan.range,
        dns: view.plan.dns4(),
        netns: domain_name,
        pid: std::process::id(),
        warnings,
    };
    Ok(Running {
        daemon,
        notices,
        summary,
        listener,
        name_server,
        upstreams,
        run_config: config.clone(),
    })
}

fn start_carrier(config: &UpConfig, domain: &Domain, inbox: &Inbox) -> Result<Carrier> {
    let begun = Instant::now();
    loop {
        match Carrier::start(
            CarrierConfig::new(domain.fd()?, config.port),
            inbox.carrier(),
        ) {
            Ok(carrier) => return Ok(carrier),
            // A daemon that was just killed may still hold it.
            Err(CarrierError::PortTaken { .. }) if begun.elapsed() < PREDECESSOR => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// AES-GCM where the CPU has instructions for it; without them ChaCha20-Poly1305 is faster and leaks no timing.
fn fast_cipher() -> Cipher {
    #[cfg(target_arch = "x86_64")]
    let aes = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    let aes = std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let aes = false;
    if aes {
        Cipher::Aes256Gcm
    } else {
        Cipher::ChaCha20Poly1305
    }
}

fn say_what_happens(ready: &Ready, origin: Origin) {
    ready.progress(match origin {
        Origin::Founded => "founding a new cluster",
        Origin::Joined => "asking the cluster's members to let this host in",
        Origin::Returned => "returning to the cluster",
    });
}

fn node_name(config: &UpConfig) -> NodeName {
    config
        .name
        .clone()
        .unwrap_or_else(|| config.hostname.clone())
}

async fn wait_until_member(notices: &mut mpsc::UnboundedReceiver<Notice>) -> Result<()> {
    let wait = async {
        while let Some(notice) = notices.recv().await {
            match notice {
                Notice::Ready => return Ok(()),
                Notice::JoinFailed(why) => return Err(join_error(&why)),
                Notice::Fatal(text) => bail!(text),
                Notice::CheckPublish(..) | Notice::Left => {}
            }
        }
        bail!("the core ended while it started; see the log")
    };
    match tokio::time::timeout(JOIN_PATIENCE, wait).await {
        Ok(outcome) => outcome,
        Err(_) => bail!(
            "no member could be reached within {} s; check that UDP is open between the hosts (weft's port in both \
             directions) and that at least one other member is up",
            JOIN_PATIENCE.as_secs()
        ),
    }
}

fn join_error(failure: &JoinFailure) -> anyhow::Error {
    match failure {
        JoinFailure::Refused(why) => anyhow!("{why}"),
        JoinFailure::NoAnswer { tried, after } => {
            let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
            anyhow!(
                "no answer from {} within {} s; possible causes: a firewall drops UDP to that port, the host is down \
                 or has another address now, the token was made by another cluster or garbled on the way, \
                 or the members' clocks say that it was never valid; make a new one there with: weft token",
                tried.join(", "),
                after.as_secs()
            )
        }
    }
}

/// The host's own overlay address: kept from the last time, or given now.
async fn host_address(core: &Core, view: &View) -> Result<std::net::Ipv4Addr> {
    let own = |e: &&weft_core::view::Endpoint| e.node == view.me && e.kind == EndpointKind::Host;
    if let Some(endpoint) = view.endpoints.iter().find(own) {
        return Ok(endpoint.ip);
    }
    let command = Command::Attach {
        kind: EndpointKind::Host,
        names: Vec::new(),
        network: Label::parse("default")?,
        ip: None,
        labels: std::collections::BTreeMap::new(),
    };
    match core.command(command).await? {
        Reply::Attached(endpoint) => Ok(endpoint.ip),
        other => bail!("the core answered something else: {other:?}"),
    }
}

fn save_host_state(path: &Path, state: &HostState) -> io::Result<()> {
    let bytes = serde_json::to_vec(state).map_err(io::Error::other)?;
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&bytes)?;
    file.sync_all()
}
