//! A daemon that is up: follows the view, the kernel and its surroundings until it is asked to end, and then ends in
//! order.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::{Notify, mpsc};
use tracing::{error, info, warn};
use weft_carrier::Carrier;
use weft_dns::Upstreams;
use weft_kernel::{KernelEvent, Watch};

use super::core_thread::{Message, Notice};
use super::handover::{Handing, Inheritance};
use super::host_facts::{addresses, underlay};
use super::publish::Placeholders;
use super::stop::{self, Signals, Underway};
use super::{Daemon, api, dns, service_manager, vxlan};
use crate::background::{Ready, Summary};
use crate::config::UpConfig;

/// How often the host's addresses and resolvers are read anew.
const LOOK_AROUND: Duration = Duration::from_secs(5);
/// Whoever gives the host another address does so in several steps.
const SETTLING: Duration = Duration::from_millis(200);

/// Before a handover what is being attached may take so long to be done.
const QUIET_PATIENCE: Duration = Duration::from_secs(5);

/// A daemon that is up, with what only its end needs.
pub(super) struct Running {
    pub(super) daemon: Arc<Daemon>,
    pub(super) notices: mpsc::UnboundedReceiver<Notice>,
    pub(super) summary: Summary,
    pub(super) listener: UnixListener,
    /// The same, for whoever answers.
    pub(super) door: tokio::net::UnixListener,
    pub(super) name_server: weft_dns::Handle,
    /// The same that the name server has.
    pub(super) name_sockets: weft_dns::Sockets,
    pub(super) upstreams: Upstreams,
    pub(super) run_config: UpConfig,
    /// This host may take VXLAN, plain or sealed.
    pub(super) has_vxlan: bool,
}

/// How a life ended.
pub(super) enum End {
    /// For good, or until somebody starts it again.
    Stopped,
    /// With another daemon in its place, or about to be.
    HandedOver(Box<Handing>),
}

/// Serves until a signal, `weft down`, or a successor.
pub(super) async fn serve(
    running: Running,
    underway: Underway,
    signals: &mut Signals,
    ready: &Ready,
) -> Result<End> {
    let Running {
        daemon,
        mut notices,
        summary,
        listener,
        door,
        mut name_server,
        mut name_sockets,
        upstreams,
        run_config,
        has_vxlan,
    } = running;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(api::serve(door, daemon.clone()));
    tasks.spawn(follow_view(daemon.clone()));
    if has_vxlan {
        tasks.spawn(vxlan::follow_traffic(daemon.clone()));
    }
    let around = Arc::new(Notify::new());
    let looks = look_around(
        daemon.clone(),
        upstreams.clone(),
        run_config,
        around.clone(),
    );
    tasks.spawn(looks);
    let (heard, events) = mpsc::unbounded_channel();
    let watch = watch_kernel(&daemon, has_vxlan, around, heard);
    tasks.spawn(follow_kernel(daemon.clone(), events));
    info!(node = %summary.node, cluster = %summary.cluster, "up");
    service_manager::ready();
    ready.up(summary);
    let mut failure = None;
    let mut successor = None;
    loop {
        tokio::select! {
            () = signals.heard() => break,
            () = daemon.stop.asked.notified() => {
                let Some(asking) = daemon.take_successor() else { break };
                match bequeath(&daemon, &listener, &name_sockets).await {
                    Ok(inheritance) => {
                        successor = Some((asking, inheritance));
                        break;
                    }
                    Err(error) => warn!(%error, "can't hand over to another daemon"),
                }
            }
            () = name_server.failed() => {
                warn!("the name server broke; starting it anew");
                // Its addresses are taken as long as anybody holds a socket there.
                drop(std::mem::take(&mut name_sockets));
                match restart_name_server(&daemon, &upstreams) {
                    Ok((server, sockets)) => (name_server, name_sockets) = (server, sockets),
                    Err(error) => {
                        failure = Some(format!("the name server can't be started again: {error:#}"));
                        break;
                    }
                }
            }
            notice = notices.recv() => match notice {
                Some(Notice::CheckPublish(ask, ports)) => {
                    let owner = daemon.placeholders.lock().await.owner_of(&ports);
                    daemon.core.tell(Message::PublishChecked(ask, owner));
                }
                Some(Notice::Fatal(text)) => {
                    failure = Some(text);
                    break;
                }
                Some(Notice::Ready | Notice::JoinFailed(_) | Notice::Left) => {}
                None => {
                    failure = Some("the core ended".to_owned());
                    break;
                }
            },
        }
    }
    drop(watch);
    drop((listener, name_sockets));
    if let Some((successor, inheritance)) = successor {
        info!("another daemon takes over");
        let (carrier, placeholders) = let_go(&daemon, tasks, underway).await;
        return Ok(End::HandedOver(Box::new(Handing {
            netns: daemon.netns.clone(),
            successor,
            inheritance,
            carrier,
            name_server,
            placeholders,
        })));
    }
    service_manager::stopping();
    finish(daemon, notices, tasks, underway, name_server).await;
    match failure {
        Some(text) => {
            error!("{text}");
            Err(anyhow!(text))
        }
        None => Ok(End::Stopped),
    }
}

fn restart_name_server(
    daemon: &Daemon,
    upstreams: &Upstreams,
) -> Result<(weft_dns::Handle, weft_dns::Sockets)> {
    let view = daemon.core.view().context("a member has a view")?;
    let sockets = dns::sockets(&daemon.domain, &view.plan, weft_dns::Sockets::default())?;
    let again = dns::again(&sockets)?;
    let server = dns::follow(sockets, &daemon.core, &view, upstreams)?;
    Ok((server, again))
}

/// What a successor gets, once more: this daemon keeps its own until the other one is up.
async fn bequeath(
    daemon: &Daemon,
    listener: &UnixListener,
    name_sockets: &weft_dns::Sockets,
) -> Result<Inheritance> {
    let carrier = daemon
        .carrier()
        .context("a daemon that is up has a carrier")?;
    let weft_dns::Sockets { udp, tcp } = dns::again(name_sockets)?;
    let placeholders = daemon.placeholders.lock().await;
    Ok(Inheritance {
        carrier: carrier.descriptors()?,
        control: Some(listener.try_clone()?.into()),
        dns_udp: udp.into_iter().map(Into::into).collect(),
        dns_tcp: tcp.into_iter().map(Into::into).collect(),
        placeholders: placeholders.descriptors()?,
        shield: daemon.host.shield_socket()?,
        relays: placeholders.relays(),
    })
}

/// Ends everything but what moves packets, listens and answers names; clients wait at the door for the successor.
async fn let_go(
    daemon: &Daemon,
    mut tasks: tokio::task::JoinSet<()>,
    mut underway: Underway,
) -> (Option<Arc<Carrier>>, Placeholders) {
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    // What waits for this lock hears afterwards that the daemon is stopping.
    let quiet = tokio::time::timeout(QUIET_PATIENCE, daemon.attaching.lock()).await;
    let placeholders = std::mem::take(&mut *daemon.placeholders.lock().await);
    // The socket's file goes on to the successor.
    underway.socket = None;
    underway.end().await;
    daemon.disk.close();
    drop(quiet);
    let carrier = daemon
        .carrier
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    (carrier, placeholders)
}

async fn finish(
    daemon: Arc<Daemon>,
    mut notices: mpsc::UnboundedReceiver<Notice>,
    mut tasks: tokio::task::JoinSet<()>,
    mut underway: Underway,
    name_server: weft_dns::Handle,
) {
    let down = daemon
        .stop
        .down
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if down.is_some() {
        let left = async { while !matches!(notices.recv().await, Some(Notice::Left) | None) {} };
        let _ = tokio::time::timeout(stop::FAREWELL, left).await;
    }
    underway.close_door();
    name_server.shutdown().await;
    let state = underway.end().await;
    *daemon.placeholders.lock().await = Placeholders::default();
    // The last handle of the carrier: its threads end and the TAP is let go.
    drop(
        daemon
            .carrier
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(),
    );
    if let Some(answer) = down {
        let mut state = stop::known_host_state(state, &daemon.state_dir);
        let (name, host) = (daemon.netns.clone(), daemon.host.clone());
        service_manager::forget();
        let errors = tokio::task::spawn_blocking(move || host.teardown(&name, &mut state))
            .await
            .unwrap_or_default();
        if errors.is_empty() {
            let _ = fs::remove_file(daemon.state_dir.join(stop::HOST_STATE));
        }
        let _ = answer.send(errors.iter().map(ToString::to_string).collect());
        // The answer is on its way through the API's task; let it out before the tasks end.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    info!("stopped");
}

/// Every change of the view goes to placeholders and kernel.
async fn follow_view(daemon: Arc<Daemon>) {
    let mut views = daemon.core.watch();
    let mut published = None;
    while views.changed().await.is_ok() {
        let Some(view) = views.borrow_and_update().clone() else {
            continue;
        };
        daemon.follow_addresses(&view).await;
        if !daemon.orphans(&view).is_empty() {
            // It waits until nothing is being attached, which this must not.
            let daemon = daemon.clone();
            tokio::spawn(async move { daemon.drop_orphans().await });
        }
        let services = view.services.clone();
        if published.as_ref() != Some(&services)
            && let Ok(()) = daemon.follow_published().await
        {
            published = Some(services);
        }
        daemon.kernel.poke();
    }
}

/// The host's addresses and resolvers may change at any time, and a conflict over a port may end.
async fn look_around(
    daemon: Arc<Daemon>,
    upstreams: Upstreams,
    config: UpConfig,
    changed: Arc<Notify>,
) {
    let mut known = (addresses(&daemon.host), underlay(&config, &daemon.host));
    let mut ticks = tokio::time::interval(LOOK_AROUND);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = changed.notified() => tokio::time::sleep(SETTLING).await,
        }
        let now = (addresses(&daemon.host), underlay(&config, &daemon.host));
        if now != known {
            info!(addresses = ?now.0, "the host's addresses changed");
            known.clone_from(&now);
            daemon
                .kernel
                .change(|around| around.host_addrs.clone_from(&now.0));
            daemon.core.tell(Message::HostAddrs(now.0, now.1));
            daemon.kernel.poke();
        }
        if let Ok(view) = daemon.view() {
            let resolvers = dns::resolvers(&view.plan);
            if resolvers != upstreams.list() {
                daemon.kernel.change(|around| {
                    around.resolvers = resolvers.iter().map(SocketAddr::ip).collect()
                });
                upstreams.set(resolvers);
                daemon.kernel.poke();
            }
        }
        if let Err(error) = daemon.follow_published().await {
            warn!(error = %error.0, "published ports");
        }
    }
}

/// What the kernel tells of changes; without its word the routine pass still finds them. `has_vxlan`: this host
/// takes VXLAN from others, and must not without its filter. `around`: whoever looks around is to do so now.
fn watch_kernel(
    daemon: &Daemon,
    has_vxlan: bool,
    around: Arc<Notify>,
    heard: mpsc::UnboundedSender<KernelEvent>,
) -> Option<Watch> {
    let (domain, host) = (daemon.domain.clone(), daemon.host.clone());
    let (core, carrier) = (daemon.core.clone(), daemon.carrier());
    let watch = weft_kernel::watch(&daemon.host, &daemon.domain, move |event| {
        match event {
            KernelEvent::EspPort(peer, from) => return core.tell(Message::EspPort(peer, from)),
            KernelEvent::HostAddresses => return around.notify_one(),
            KernelEvent::Host => carrier.iter().for_each(|carrier| carrier.follow_routes()),
            KernelEvent::HostRules if has_vxlan => vxlan::close_unguarded(&domain, &host),
            _ => {}
        }
        // Fails only while the daemon stops.
        let _ = heard.send(event);
    });
    match watch {
        Ok(watch) => Some(watch),
        Err(error) => {
            warn!(%error, "can't watch the kernel; changes by others are found every few seconds only");
            None
        }
    }
}

async fn follow_kernel(daemon: Arc<Daemon>, mut events: mpsc::UnboundedReceiver<KernelEvent>) {
    while let Some(first) = events.recv().await {
        let mut leg_gone = matches!(first, KernelEvent::LegGone(_));
        while let Ok(more) = events.try_recv() {
            leg_gone |= matches!(more, KernelEvent::LegGone(_));
        }
        if leg_gone {
            daemon.drop_vanished().await;
        }
        daemon.kernel.poke();
    }
}
