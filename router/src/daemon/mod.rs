//! The daemon: starts everything in order, answers the API, stops everything in order. Decisions are made elsewhere.

mod api;
mod attach;
mod attachments;
mod core_thread;
mod disk;
mod dns;
mod handover;
mod host_facts;
mod kernel_thread;
mod life;
mod publish;
mod relays;
mod rows;
mod serve;
mod service_manager;
mod services;
mod shortcut;
mod start;
mod state;
mod stop;
mod vxlan;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tracing::warn;
use weft_carrier::{Carrier, Counters};
use weft_core::control::{
    EndpointRow, ErrorKind, NameRow, NetworkRow, NodeRow, PeerRow, RemoveRequest, Removed,
    ServiceRow, Status, TokenReply, TokenRequest,
};
use weft_core::node::{Command, Reply};
use weft_core::view::{EndpointKind, Liveness, NEARLY_FULL, NetworkView, View};
use weft_kernel::{Domain, Host, nft};

use api::ApiError;
use attachments::Attachments;
use core_thread::{Core, Message};
use disk::Disk;
use handover::Successor;
use kernel_thread::Kernel;
use publish::Placeholders;

use crate::config::RawUp;

pub(crate) use life::run;
pub(crate) use stop::{domain_of, forget, remove_leftovers};

/// All parts of a running daemon, as its API and its tasks see them.
pub(crate) struct Daemon {
    pub(crate) core: Core,
    pub(crate) kernel: Kernel,
    pub(crate) domain: Arc<Domain>,
    pub(crate) host: Arc<Host>,
    /// Taken out when the daemon ends, before the domain goes.
    pub(crate) carrier: Mutex<Option<Arc<Carrier>>>,
    pub(crate) disk: Arc<Disk>,
    pub(crate) attachments: Mutex<Attachments>,
    /// One at a time: two callers must not attach one namespace at once.
    pub(crate) attaching: tokio::sync::Mutex<()>,
    pub(crate) placeholders: tokio::sync::Mutex<Placeholders>,
    pub(crate) stop: Stop,
    pub(crate) started: Instant,
    pub(crate) port: u16,
    pub(crate) tcp_port: Option<u16>,
    pub(crate) netns: String,
    pub(crate) cipher: &'static str,
    pub(crate) warnings: Vec<String>,
    pub(crate) state_dir: PathBuf,
    /// How it was asked to start, for a successor.
    pub(crate) asked: RawUp,
}

/// How the daemon is asked to end.
#[derive(Default)]
pub(crate) struct Stop {
    /// `weft down` asks to remove everything; told when it is done.
    pub(crate) down: Mutex<Option<tokio::sync::oneshot::Sender<Vec<String>>>>,
    /// Another daemon asks to take its place.
    pub(crate) successor: Mutex<Option<Successor>>,
    pub(crate) asked: Notify,
}

impl Daemon {
    /// The newest view.
    pub(crate) fn view(&self) -> Result<Arc<View>, ApiError> {
        self.core.view().ok_or_else(|| {
            ApiError::new(
                ErrorKind::Unavailable,
                "the daemon is still starting; try again",
            )
        })
    }

    pub(crate) fn carrier(&self) -> Option<Arc<Carrier>> {
        self.carrier
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) async fn status(&self) -> Result<Status, ApiError> {
        let view = self.view()?;
        let mine = |kind| rows::own_endpoints(&view, kind);
        let mut warnings = self.warnings.clone();
        let findings = self.kernel.findings();
        warnings.extend(
            findings
                .trouble
                .map(|trouble| format!("the kernel is not as it should be: {trouble}")),
        );
        warnings.extend(findings.warnings);
        // An alarm is for the log and for ever; how full a network is, is a matter of the moment.
        let of_the_moment = |alarm: &String| alarm.ends_with(NEARLY_FULL);
        let alarms = self.core.alarms().into_iter();
        warnings.extend(alarms.filter(|alarm| !of_the_moment(alarm)));
        let low = view.networks.iter().filter(|network| network.low);
        warnings.extend(low.map(NetworkView::warning));
        warnings.extend(
            rows::services(&view)
                .into_iter()
                .flat_map(|service| service.conflicts),
        );
        warnings.extend(view.blocked.iter().map(rows::blocked));
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: view.me.short(),
            name: rows::node_name(&view, &view.me),
            cluster: view.cluster.to_string(),
            pid: std::process::id(),
            uptime_secs: self.started.elapsed().as_secs(),
            port: self.port,
            tcp_port: self.tcp_port,
            range: view.plan.range,
            host_ip: mine(EndpointKind::Host).first().map(|e| e.ip),
            dns: view.plan.dns4(),
            netns: self.netns.clone(),
            nodes_alive: view
                .members
                .iter()
                .filter(|m| m.liveness != Liveness::Down)
                .count(),
            nodes: view.members.len(),
            endpoints_local: mine(EndpointKind::Container).len(),
            endpoints: view
                .endpoints
                .iter()
                .filter(|e| e.kind == EndpointKind::Container)
                .count(),
            services: view.services.len(),
            cipher: self.cipher.to_owned(),
            drops: rows::drops(&self.counters().drops),
            host_changes: findings.host_changes,
            warnings,
        })
    }

    pub(crate) async fn peers(&self) -> Result<Vec<PeerRow>, ApiError> {
        let view = self.view()?;
        let known = self.core.peers().await;
        let mut rows = rows::peers(&view, &known, &self.counters());
        let (led_to, fast) = (self.domain.fast_peers(), self.domain.fast_traffic());
        rows::add_fast_path(&mut rows, &view, &led_to, &fast);
        if let Some(vxlan) = &view.vxlan {
            let domain = self.domain.clone();
            let read = tokio::task::spawn_blocking(move || nft::vxlan_traffic(&domain));
            let counted = read.await.map_err(anyhow::Error::from)?.unwrap_or_default();
            rows::add_vxlan(&mut rows, vxlan, &counted);
        }
        Ok(rows)
    }

    fn counters(&self) -> Counters {
        let carrier = self.carrier();
        carrier.map(|c| c.counters()).unwrap_or_default()
    }

    pub(crate) fn endpoints(&self) -> Result<Vec<EndpointRow>, ApiError> {
        Ok(rows::endpoints(&*self.view()?))
    }

    pub(crate) fn nodes(&self) -> Result<Vec<NodeRow>, ApiError> {
        Ok(rows::nodes(&*self.view()?))
    }

    pub(crate) fn services(&self) -> Result<Vec<ServiceRow>, ApiError> {
        Ok(rows::services(&*self.view()?))
    }

    pub(crate) fn names(&self) -> Result<Vec<NameRow>, ApiError> {
        Ok(rows::names(&*self.view()?))
    }

    pub(crate) fn networks(&self) -> Result<Vec<NetworkRow>, ApiError> {
        Ok(rows::networks(&*self.view()?))
    }

    pub(crate) async fn token(&self, request: TokenRequest) -> Result<TokenReply, ApiError> {
        match self.core.command(Command::MintToken(request)).await? {
            Reply::Token(token) => Ok(TokenReply { token }),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a node for good.
    pub(crate) async fn remove_node(&self, request: RemoveRequest) -> Result<Removed, ApiError> {
        let RemoveRequest { node, force } = request;
        match self
            .core
            .command(Command::RemoveNode { node, force })
            .await?
        {
            Reply::Removed { node, name } => Ok(Removed {
                node: node.short(),
                name,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Leaves the cluster for good; nothing but stopping makes sense afterwards.
    pub(crate) async fn leave(&self) -> Result<(), ApiError> {
        self.core.command(Command::LeaveForGood).await?;
        Ok(())
    }

    /// Another daemon asks to take this one's place: `upgrade` becomes the line to it.
    pub(crate) async fn hand_over(self: Arc<Self>, upgrade: hyper::upgrade::OnUpgrade) {
        match Successor::welcome(upgrade).await {
            Ok(successor) => {
                *self
                    .stop
                    .successor
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(successor);
                self.stop.asked.notify_one();
            }
            Err(error) => warn!(%error, "a client asked for a handover and did not begin it"),
        }
    }

    /// Whoever asked to take over, unless everything is to be taken down.
    fn take_successor(&self) -> Option<Successor> {
        let down = self.stop.down.lock();
        let is_down = down.unwrap_or_else(PoisonError::into_inner).is_some();
        let mut successor = self
            .stop
            .successor
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        successor.take().filter(|_| !is_down)
    }

    /// Removes everything and ends the daemon.
    pub(crate) async fn down(&self) -> Result<(), ApiError> {
        let (sender, done) = tokio::sync::oneshot::channel();
        *self
            .stop
            .down
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(sender);
        self.core.tell(Message::Leave);
        self.stop.asked.notify_one();
        let errors = done.await.map_err(|_| {
            ApiError::new(
                ErrorKind::Internal,
                "the daemon ended before all was removed",
            )
        })?;
        if errors.is_empty() {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorKind::Internal,
            format!("not everything could be removed: {}", errors.join("; ")),
        ))
    }
}

pub(crate) fn unexpected(reply: &Reply) -> ApiError {
    ApiError::new(
        ErrorKind::Internal,
        format!("the core answered something else: {reply:?}"),
    )
}
