//! The order in which a daemon comes up, and what it takes back when it can't.
//!
//! ```text
//! preflight -> descriptors of a predecessor -> state and its lock -> identity -> disk -> domain -> carrier
//!   -> core (found, join, resume)
//!   -> member: range check -> host's own address -> kernel as it should be -> DNS -> API -> up
//! ```

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;
use weft_carrier::{Carrier, CarrierConfig, CarrierError, Descriptors};
use weft_core::carriers::Esp;
use weft_core::control::SOCKET;
use weft_core::crypto::{Cipher, Random};
use weft_core::model::{Label, NodeName};
use weft_core::node::{self, Command, JoinFailure, Node, NodeConfig, Reply, Start};
use weft_core::store::Stored;
use weft_core::token::Token;
use weft_core::view::{EndpointKind, Liveness, Member, View};
use weft_dns::Upstreams;
use weft_kernel::{Domain, Host, HostState};

use super::attachments::Attachments;
use super::core_thread::{Clock, Core, Inbox, Notice};
use super::disk::Disk;
use super::handover::{Inheritance, Predecessor};
use super::host_facts::{addresses, underlay};
use super::kernel_thread::{self, HostRecord, Kernel};
use super::publish::Placeholders;
use super::serve::Running;
use super::state::{PREDECESSOR, StateDir};
use super::stop::{self, Underway, domain_name};
use super::{Daemon, Stop, api, dns, service_manager};
use crate::background::{Origin, Ready, Summary};
use crate::config::UpConfig;
use crate::esp;

/// A join takes this long at most: the joiner itself gives up sooner and says why.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);
/// Membership greets every fifth of a second.
const GREETINGS: Duration = Duration::from_secs(1);

/// What is there before anything of the kernel was touched.
pub(super) struct Begun {
    identity: weft_core::identity::Identity,
    random: Random,
    inbox: Inbox,
    disk: Arc<Disk>,
    stored: Stored,
    start: Start,
    origin: Origin,
    pub(super) domain_name: String,
    /// No domain was left by an earlier daemon.
    pub(super) fresh: bool,
}

pub(super) fn prepare(config: &UpConfig, state: &StateDir, host: &Host) -> Result<Begun> {
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

pub(super) async fn bring_up(
    config: &UpConfig,
    ready: &Ready,
    host: Arc<Host>,
    begun: Begun,
    (mut inheritance, predecessor): (Inheritance, Option<&mut Predecessor>),
    underway: &mut Underway,
) -> Result<Running> {
    let esp = esp_ability(config, ready).await?;
    let has_vxlan = !config.trusted_subnets.is_empty() || esp == Esp::Ready;
    ready.progress("preparing the network namespace of the mesh");
    let (domain, _) = Domain::open_or_create(&begun.domain_name)?;
    let domain = Arc::new(domain);
    let taken_over = predecessor.is_some();
    if let Some(predecessor) = predecessor {
        predecessor.take().await?;
    }
    let given = std::mem::take(&mut inheritance.carrier);
    let name_server = inheritance.name_server();
    // With the queue of the one before the kernel has kept all next hops.
    let routes_are_gone = !begun.fresh && given.tap.is_none();
    let carrier = Arc::new(start_carrier(config, &domain, &begun.inbox, given)?);
    service_manager::keep(&carrier.descriptors()?);
    if let Some(shield) = inheritance.shield.take() {
        service_manager::keep_shield(Some(&shield));
        host.keep_shield(shield);
    }
    let cipher = fast_cipher();
    let node_config = NodeConfig {
        name: node_name(config),
        rename: config.name.is_some(),
        cipher,
        host_addrs: addresses(&host),
        underlay: underlay(config, &host),
        tcp_port: config.tcp_port.and_then(NonZeroU16::new),
        relay: config.relay,
        trusted_subnets: config.trusted_subnets.clone(),
        esp,
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
    let (enough, until) = oneshot::channel();
    let readopting = routes_are_gone
        .then(|| tokio::spawn(kernel_thread::readopt(domain.clone(), core.clone(), until)));
    wait_until_member(&mut notices).await?;
    drop(enough);
    if let Some(readopting) = readopting {
        // The kernel thread is the only one from here on.
        let _ = readopting.await;
    }
    if origin == Origin::Returned {
        wait_until_greeted(&core).await;
    }
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
    // Before the rules, which are replaced whole: without the published ports in them a client's address would be lost.
    let mut placeholders = Placeholders::with(inheritance.placeholders, inheritance.relays);
    placeholders.follow(&view);
    kernel.change(|around| {
        around.published = placeholders.published();
        around.host_addrs = addresses(&host);
        around.resolvers = upstreams.list().iter().map(SocketAddr::ip).collect();
    });
    kernel
        .apply()
        .await
        .map_err(|error| anyhow!("can't set up the kernel: {error}"))?;
    let sockets = dns::sockets(&domain, &view.plan, name_server)?;
    let name_sockets = dns::again(&sockets)?;
    let name_server = dns::follow(sockets, &core, &view, &upstreams)?;
    let socket = config.run_dir.join(SOCKET);
    let listener = api::listen(&socket, inheritance.control.take())?;
    let door = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
    // Until then it is the predecessor's.
    if !taken_over {
        underway.socket = Some(socket);
    }
    let daemon = Arc::new(Daemon {
        core,
        kernel,
        domain,
        host,
        carrier: Mutex::new(Some(carrier)),
        disk,
        attachments: Mutex::new(attachments),
        attaching: tokio::sync::Mutex::new(()),
        placeholders: tokio::sync::Mutex::new(placeholders),
        stop: Stop::default(),
        started: Instant::now(),
        port: config.port,
        tcp_port: config.tcp_port,
        netns: domain_name.clone(),
        cipher: cipher.name(),
        warnings: warnings.clone(),
        state_dir: config.state_dir.clone(),
        asked: config.asked.clone(),
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
        tcp_port: config.tcp_port,
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
        door,
        name_server,
        name_sockets,
        upstreams,
        run_config: config.clone(),
        has_vxlan,
    })
}

fn start_carrier(
    config: &UpConfig,
    domain: &Domain,
    inbox: &Inbox,
    given: Descriptors,
) -> Result<Carrier> {
    let begun = Instant::now();
    // For the first try only: what does not fit must be closed before it can be opened anew.
    let mut given = given;
    loop {
        let carrier = CarrierConfig {
            tcp_port: config.tcp_port,
            dscp: config.dscp,
            no_offload: config.no_offload.clone(),
            source_ports: config.source_ports,
            given: std::mem::take(&mut given),
            ..CarrierConfig::new(domain.fd()?, config.port)
        };
        match Carrier::start(carrier, inbox.carrier()) {
            Ok(carrier) => return Ok(carrier),
            // A daemon that was just killed may still hold it.
            Err(CarrierError::PortTaken { .. } | CarrierError::TcpPortTaken { .. })
                if begun.elapsed() < PREDECESSOR =>
            {
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

/// Whoever has made a session with this node is there, though membership may have to greet it yet. Its routes stand from
/// before, and must not turn into errors for that moment.
async fn wait_until_greeted(core: &Core) {
    let greeted = |member: &Member| member.mtu.is_none() || member.liveness != Liveness::Down;
    let mut views = core.watch();
    let all = views.wait_for(|view| view.as_ref().is_some_and(|v| v.members.iter().all(greeted)));
    let _ = tokio::time::timeout(GREETINGS, all).await;
}

fn join_error(failure: &JoinFailure) -> anyhow::Error {
    match failure {
        JoinFailure::Refused(why) => anyhow!("{why}"),
        JoinFailure::NoAnswer { tried, after } => {
            let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
            anyhow!(
                "no answer from {} within {} s; possible causes: a firewall drops UDP to that port (where it has to, invite \
                 from members that run with --tcp-port), the host is down or has another address now, the token was made \
                 by another cluster or garbled on the way, \
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

/// Found out before anything stands still for it.
async fn esp_ability(config: &UpConfig, ready: &Ready) -> Result<Esp> {
    let (wanted, state_dir, ready) = (config.esp, config.state_dir.clone(), ready.clone());
    let find = move || {
        esp::ability(wanted, fast_cipher(), &state_dir, |what| {
            ready.progress(what);
        })
    };
    Ok(tokio::task::spawn_blocking(find).await?)
}
