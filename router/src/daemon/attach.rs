//! Attaching and detaching namespaces: the core gives address and name, the kernel gets leg and rules, the disk keeps
//! it, and only then the caller hears of it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use tracing::{info, warn};
use weft_core::control::{AttachRequest, Attached, Detached, ErrorKind, Which};
use weft_core::layout;
use weft_core::model::{AddressPlan, EndpointId, Label};
use weft_core::node::{Command, CommandError, Reply};
use weft_core::store::Batch;
use weft_core::view::{Endpoint, EndpointKind, View};
use weft_kernel::{Domain, LegSpec};

use super::api::ApiError;
use super::attachments::Attachment;
use super::core_thread::OWN_ROWS;
use super::{Daemon, unexpected};

/// Linux: IFNAMSIZ less the final zero.
const MAX_IFNAME: usize = 15;
/// Names one endpoint may have.
const MAX_NAMES: usize = 16;
/// Labels one endpoint may have, and the length of each part.
const MAX_LABELS: usize = 16;
const MAX_LABEL_PART: usize = 63;

impl Daemon {
    pub(crate) async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError> {
        check_request(&request)?;
        let _one_at_a_time = self.attaching.lock().await;
        let netns = weft_kernel::open_netns(&request.target)
            .map_err(|error| ApiError::new(ErrorKind::Invalid, error.to_string()))?;
        let endpoint = self.allocate(&request).await?;
        match self.connect(&request, &endpoint, netns).await {
            Ok(attached) => {
                info!(endpoint = %endpoint.id, ip = %endpoint.ip, "attached");
                Ok(attached)
            }
            Err(error) => {
                self.release(endpoint.id).await;
                Err(error)
            }
        }
    }

    pub(crate) async fn detach(&self, which: Which) -> Result<Detached, ApiError> {
        let _one_at_a_time = self.attaching.lock().await;
        let found = self.find(&which);
        for attachment in &found {
            self.disconnect(attachment.attached.id).await?;
        }
        let ids = found
            .iter()
            .map(|attachment| attachment.attached.id)
            .collect();
        Ok(Detached { ids })
    }

    pub(crate) async fn check(&self, which: Which) -> Result<Attached, ApiError> {
        let Some(attachment) = self.find(&which).into_iter().next() else {
            return Err(ApiError::new(
                ErrorKind::NotFound,
                "no such attachment on this host; see `weft ps`",
            ));
        };
        let netns = weft_kernel::open_netns(&attachment.target).map_err(|error| {
            ApiError::new(
                ErrorKind::Conflict,
                format!("its namespace is gone: {error}"),
            )
        })?;
        let view = self.view()?;
        if !view
            .endpoints
            .iter()
            .any(|e| e.id == attachment.attached.id)
        {
            return Err(ApiError::new(
                ErrorKind::Conflict,
                "its endpoint is not known to the cluster any more",
            ));
        }
        let (attached, plan) = (attachment.attached.clone(), view.plan);
        blocking(self.domain.clone(), move |domain| {
            domain.check(&leg_spec(&attached, &plan, &netns))
        })
        .await
        .map_err(|error| ApiError::new(ErrorKind::Conflict, error))?;
        Ok(attachment.attached)
    }

    /// Lets go of attachments whose legs vanished: the namespace died, its container ended without a word.
    pub(crate) async fn drop_vanished(&self) {
        let _one_at_a_time = self.attaching.lock().await;
        let Ok(legs) = blocking(self.domain.clone(), Domain::legs).await else {
            return;
        };
        let gone: Vec<EndpointId> = self
            .attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .all()
            .filter(|attachment| !legs.iter().any(|leg| leg.name == attachment.attached.leg))
            .map(|attachment| attachment.attached.id)
            .collect();
        for id in gone {
            info!(endpoint = %id, "its namespace is gone; detached");
            if let Err(error) = self.disconnect(id).await {
                warn!(endpoint = %id, error = %error.0, "could not detach");
            }
        }
    }

    /// Attachments whose addresses had to change, because another node owns the old ones now, are attached anew.
    pub(crate) async fn follow_addresses(&self, view: &View) {
        let moved: Vec<(Attachment, Endpoint)> = {
            let attachments = self
                .attachments
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let with_endpoint = |attachment: &Attachment| {
                let id = attachment.attached.id;
                let endpoint = view.endpoints.iter().find(|endpoint| endpoint.id == id)?;
                (endpoint.ip != attachment.attached.ip)
                    .then(|| (attachment.clone(), endpoint.clone()))
            };
            attachments.all().filter_map(with_endpoint).collect()
        };
        if moved.is_empty() {
            return;
        }
        let _one_at_a_time = self.attaching.lock().await;
        for (attachment, endpoint) in moved {
            let (id, old) = (attachment.attached.id, attachment.attached.ip);
            match self.move_to(&attachment, &endpoint).await {
                Ok(()) => warn!(endpoint = %id, %old, ip = %endpoint.ip, "its address changed"),
                Err(error) => {
                    warn!(endpoint = %id, error = %error.0, "can't follow its new address; detached");
                    if let Err(error) = self.disconnect(id).await {
                        warn!(endpoint = %id, error = %error.0, "could not detach");
                    }
                }
            }
        }
    }

    async fn move_to(&self, attachment: &Attachment, endpoint: &Endpoint) -> Result<(), ApiError> {
        let netns = weft_kernel::open_netns(&attachment.target)
            .map_err(|error| ApiError::new(ErrorKind::Conflict, error.to_string()))?;
        let (id, gone) = (endpoint.id, self.addresses_of(endpoint.id));
        blocking(self.domain.clone(), move |domain| {
            domain.detach(&id)?;
            domain.forget_connections(&gone)
        })
        .await
        .map_err(internal)?;
        let request = AttachRequest {
            target: attachment.target.clone(),
            names: endpoint.names.clone(),
            network: Some(endpoint.network.clone()),
            ip: Some(endpoint.ip),
            ifname: attachment.attached.ifname.clone(),
            labels: endpoint.labels.clone(),
            container_id: attachment.container_id.clone(),
        };
        self.connect(&request, endpoint, netns).await.map(drop)
    }

    /// Lets go of endpoints that this host announces but has no attachment for: the daemon died while it made them, or its
    /// disk is a backup and others remembered what it had forgotten.
    pub(crate) async fn drop_orphans(&self) {
        let _one_at_a_time = self.attaching.lock().await;
        let Ok(view) = self.view() else { return };
        for orphan in self.orphans(&view) {
            info!(endpoint = %orphan, "announced, and not there; released");
            self.release(orphan).await;
        }
    }

    /// Endpoints of this host without an attachment: also those that are just being attached.
    pub(crate) fn orphans(&self, view: &View) -> Vec<EndpointId> {
        let attachments = self
            .attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let kept: BTreeSet<EndpointId> = attachments.all().map(|a| a.attached.id).collect();
        let mine = |e: &&Endpoint| e.node == view.me && e.kind == EndpointKind::Container;
        let mine = view.endpoints.iter().filter(mine).map(|e| e.id);
        mine.filter(|id| !kept.contains(id)).collect()
    }

    async fn allocate(&self, request: &AttachRequest) -> Result<Endpoint, ApiError> {
        let network = match &request.network {
            Some(network) => network.clone(),
            None => Label::parse("default")
                .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?,
        };
        let command = Command::Attach {
            kind: EndpointKind::Container,
            names: request.names.clone(),
            network,
            ip: request.ip,
            labels: request.labels.clone(),
        };
        match self.core.command(command).await? {
            Reply::Attached(endpoint) => Ok(endpoint),
            other => Err(unexpected(&other)),
        }
    }

    async fn connect(
        &self,
        request: &AttachRequest,
        endpoint: &Endpoint,
        netns: OwnedFd,
    ) -> Result<Attached, ApiError> {
        // The rules that police the address come before the leg that bears it.
        self.kernel.apply().await.map_err(internal)?;
        let attached = self.describe(request, endpoint)?;
        let (wanted, plan) = (attached.clone(), self.view()?.plan);
        blocking(self.domain.clone(), move |domain| {
            domain.attach(&leg_spec(&wanted, &plan, &netns)).map(drop)
        })
        .await
        .map_err(internal)?;
        let attachment = Attachment {
            attached: attached.clone(),
            target: request.target.clone(),
            container_id: request.container_id.clone(),
        };
        let batch = self
            .attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(attachment);
        self.keep(batch);
        self.kernel.apply().await.map_err(internal)?;
        Ok(attached)
    }

    async fn disconnect(&self, id: EndpointId) -> Result<(), ApiError> {
        self.kernel.change(|around| {
            around.leaving.insert(id);
        });
        let gone = self.addresses_of(id);
        let removed = blocking(self.domain.clone(), move |domain| {
            domain.detach(&id)?;
            domain.forget_connections(&gone)
        })
        .await;
        let batch = self
            .attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        self.keep(batch);
        self.release(id).await;
        let applied = self.kernel.apply().await;
        self.kernel.change(|around| {
            around.leaving.remove(&id);
        });
        removed.map(drop).and(applied).map_err(internal)
    }

    fn addresses_of(&self, id: EndpointId) -> Vec<IpAddr> {
        let attachments = self
            .attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let found = attachments.find(&Which::Id(id));
        found
            .iter()
            .flat_map(|a| [IpAddr::V4(a.attached.ip), IpAddr::V6(a.attached.ip6)])
            .collect()
    }

    async fn release(&self, id: EndpointId) {
        if let Err(error) = self.core.command(Command::Release(id)).await {
            warn!(endpoint = %id, %error, "could not release the address");
        }
    }

    fn find(&self, which: &Which) -> Vec<Attachment> {
        self.attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .find(which)
    }

    fn keep(&self, batch: Batch) {
        self.disk.write(OWN_ROWS, batch);
    }

    fn describe(&self, request: &AttachRequest, endpoint: &Endpoint) -> Result<Attached, ApiError> {
        let plan = self.view()?.plan;
        Ok(Attached {
            id: endpoint.id,
            ip: endpoint.ip,
            ip6: plan.v6(endpoint.ip),
            gateway: layout::GATEWAY4,
            gateway6: layout::GATEWAY6,
            ifname: request.ifname.clone(),
            mac: layout::mac_text(layout::container_mac(endpoint.ip)),
            leg: weft_kernel::leg_name(&endpoint.id),
            mtu: layout::DEVICE_MTU,
            dns: plan.dns4(),
            domain: "weft.internal".to_owned(),
            names: endpoint.names.clone(),
            network: endpoint.network.clone(),
        })
    }
}

fn leg_spec<'a>(
    attached: &'a Attached,
    addresses: &'a AddressPlan,
    target: &'a OwnedFd,
) -> LegSpec<'a> {
    LegSpec {
        id: attached.id,
        ip: attached.ip,
        target: target.as_fd(),
        ifname: &attached.ifname,
        addresses,
    }
}

/// Kernel work waits on the kernel; it goes to a thread that may.
async fn blocking<T: Send + 'static, E: std::fmt::Display>(
    domain: Arc<Domain>,
    work: impl FnOnce(&Domain) -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(move || work(&domain).map_err(|error| error.to_string()))
        .await
    {
        Ok(outcome) => outcome,
        Err(error) => Err(format!("the work was cut short: {error}")),
    }
}

fn internal(error: String) -> ApiError {
    ApiError::new(ErrorKind::Internal, error)
}

fn check_request(request: &AttachRequest) -> Result<(), ApiError> {
    let bad = |text: &str| {
        Err(ApiError(CommandError {
            kind: ErrorKind::Invalid,
            text: text.to_owned(),
        }))
    };
    let ifname = &request.ifname;
    let unfit = |b: u8| {
        b == b'/' || b == b':' || b == b'%' || b.is_ascii_whitespace() || !b.is_ascii_graphic()
    };
    if ifname.is_empty()
        || ifname.len() > MAX_IFNAME
        || ifname == "."
        || ifname == ".."
        || ifname.bytes().any(unfit)
    {
        return bad("an interface name has 1 to 15 printable characters and none of / : %");
    }
    if ifname == "lo" || ifname == "all" || ifname == "default" {
        return bad("that interface name means something to the kernel; use eth0 or the like");
    }
    if request.names.len() > MAX_NAMES {
        return bad("an endpoint has at most 16 names");
    }
    let long = |(key, value): (&String, &String)| {
        key.len() > MAX_LABEL_PART || value.len() > MAX_LABEL_PART
    };
    if request.labels.len() > MAX_LABELS || request.labels.iter().any(long) {
        return bad("an endpoint has at most 16 labels, each part of at most 63 characters");
    }
    Ok(())
}
