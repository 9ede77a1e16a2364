//! Services, networks and names: checks on this host, then the core's word, then the rules.

use weft_core::control::{
    ErrorKind, NameRow, NameSpec, NetworkRow, NetworkSpec, ServiceRow, ServiceSpec,
};
use weft_core::model::Label;
use weft_core::node::{Command, Reply};
use weft_core::view::Service;

use super::api::ApiError;
use super::publish::{self, Place};
use super::{Daemon, rows, unexpected};

impl Daemon {
    pub(crate) async fn create_service(&self, spec: ServiceSpec) -> Result<ServiceRow, ApiError> {
        self.check_ports(&spec).await?;
        let reply = self.core.command(Command::CreateService(spec)).await?;
        self.finish_service(reply).await
    }

    pub(crate) async fn update_service(&self, spec: ServiceSpec) -> Result<ServiceRow, ApiError> {
        self.check_ports(&spec).await?;
        let reply = self.core.command(Command::UpdateService(spec)).await?;
        self.finish_service(reply).await
    }

    pub(crate) async fn remove_service(&self, name: Label) -> Result<(), ApiError> {
        self.core.command(Command::RemoveService(name)).await?;
        self.serve_published().await
    }

    pub(crate) async fn create_network(&self, spec: NetworkSpec) -> Result<NetworkRow, ApiError> {
        match self.core.command(Command::CreateNetwork(spec)).await? {
            Reply::Network(network) => Ok(rows::network_row(&*self.view()?, &network)),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn remove_network(&self, name: Label) -> Result<(), ApiError> {
        self.core.command(Command::RemoveNetwork(name)).await?;
        Ok(())
    }

    pub(crate) async fn add_name(&self, spec: NameSpec) -> Result<NameRow, ApiError> {
        self.core.command(Command::AddName(spec.clone())).await?;
        Ok(spec)
    }

    pub(crate) async fn remove_name(&self, name: Label) -> Result<(), ApiError> {
        self.core.command(Command::RemoveName(name)).await?;
        Ok(())
    }

    /// Binds and releases placeholders after the newest view, tells the others what can't be served here, and waits
    /// until the rules are in place.
    pub(crate) async fn serve_published(&self) -> Result<(), ApiError> {
        self.follow_published().await?;
        self.kernel
            .apply()
            .await
            .map_err(|error| ApiError::new(ErrorKind::Internal, error))
    }

    /// The same without waiting for the rules.
    pub(crate) async fn follow_published(&self) -> Result<(), ApiError> {
        let view = self.view()?;
        let mut placeholders = self.placeholders.lock().await;
        placeholders.follow(&view);
        let published = placeholders.published();
        let conflicts = placeholders.conflicts();
        drop(placeholders);
        self.core.tell(super::Message::Conflicts(conflicts));
        self.kernel.change(|around| around.published = published);
        Ok(())
    }

    async fn check_ports(&self, spec: &ServiceSpec) -> Result<(), ApiError> {
        let places = places(spec);
        publish::refuse_reserved(&places, self.port, self.tcp_port)
            .map_err(|error| ApiError::new(ErrorKind::Invalid, error))?;
        if let Some(owner) = self.placeholders.lock().await.owner_of(&places) {
            let ports: Vec<String> = places
                .iter()
                .map(|(proto, _, port)| format!("{port}/{proto}"))
                .collect();
            let text = format!(
                "can't publish {}: held on this host, {}, by {owner}; choose another port or stop it",
                ports.join(", "),
                self.name()?
            );
            return Err(ApiError::new(ErrorKind::Conflict, text));
        }
        Ok(())
    }

    fn name(&self) -> Result<Label, ApiError> {
        let view = self.view()?;
        Ok(rows::node_name(&view, &view.me))
    }

    async fn finish_service(&self, reply: Reply) -> Result<ServiceRow, ApiError> {
        let Reply::Service(service) = reply else {
            return Err(unexpected(&reply));
        };
        self.serve_published().await?;
        self.row_of(&service)
    }

    fn row_of(&self, service: &Service) -> Result<ServiceRow, ApiError> {
        Ok(rows::service_row(&*self.view()?, service))
    }
}

fn places(spec: &ServiceSpec) -> Vec<Place> {
    let of_port = |port: &weft_core::view::ServicePort| {
        let proto = port.proto;
        port.publish
            .iter()
            .map(move |publish| (proto, publish.addr, publish.port))
            .collect::<Vec<_>>()
    };
    spec.ports.iter().flat_map(of_port).collect()
}
