//! What people and programs ask for. A command changes nothing until all of it is known to work; its answer comes when
//! the change is durable.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::asks::{Purpose, fail};
use super::cluster::Cluster;
use super::durable::Then;
use super::io::{Ask, Command, Output, Reply};
use super::networks::no_network;

use crate::control::{ErrorKind, NameSpec, ServiceSpec, TokenRequest};
use crate::ipam::ExactError;
use crate::model::{EndpointId, EndpointName, Label, NetworkName, Now, ServiceName, WallMicros};
use crate::token::{Token, TokenBody, TokenMember};
use crate::value::{Kind, Object, endpoint_key, label_key};
use crate::view::{Endpoint, EndpointKind, ManualName, Service};

/// Longest life of an invitation: thirty days.
const MAX_TTL_SECS: u64 = 30 * 24 * 3600;
/// Members and addresses named in an invitation; more would not fit into a handshake.
const TOKEN_MEMBERS: usize = 5;
const TOKEN_ADDRESSES: usize = 4;
/// Ports of one service.
const MAX_PORTS: usize = 16;

/// What an attachment asks for.
#[derive(Clone, Debug)]
pub(super) struct AttachRequest {
    pub(super) kind: EndpointKind,
    pub(super) names: Vec<EndpointName>,
    pub(super) network: NetworkName,
    pub(super) ip: Option<Ipv4Addr>,
    pub(super) labels: BTreeMap<String, String>,
}

/// Why there is no address now.
pub(super) enum NoAddress {
    NoNetwork,
    Exhausted(Ipv4Net),
    Exact(ExactError),
}

impl Cluster {
    pub(super) fn on_command(
        &mut self,
        now: Now,
        id: u64,
        command: Command,
        out: &mut Vec<Output>,
    ) {
        if !self.is_member() {
            let text = "this node was removed from its cluster; run `weft reset`, then join with a new token";
            return fail(id, ErrorKind::Conflict, text.to_owned(), out);
        }
        if !self.ready {
            let text =
                "this node still fetches its own records from the others; try again in a moment";
            return fail(id, ErrorKind::Unavailable, text.to_owned(), out);
        }
        let shared = matches!(
            command,
            Command::CreateService(_)
                | Command::UpdateService(_)
                | Command::RemoveService(_)
                | Command::AddName(_)
                | Command::RemoveName(_)
                | Command::CreateNetwork(_)
                | Command::RemoveNetwork(_)
        );
        if let Some(off) = self.sync.clock_error().filter(|_| shared) {
            let text = format!(
                "this host's clock is {} s off the other nodes': set it right (NTP) before changing services, names and networks",
                off.as_secs()
            );
            return fail(id, ErrorKind::Conflict, text, out);
        }
        match command {
            Command::Attach {
                kind,
                names,
                network,
                ip,
                labels,
            } => {
                self.attach(
                    now,
                    id,
                    AttachRequest {
                        kind,
                        names,
                        network,
                        ip,
                        labels,
                    },
                    out,
                );
            }
            Command::Release(endpoint) => self.release(now, id, &endpoint, out),
            Command::CreateService(spec) => self.create_service(now, id, spec, out),
            Command::UpdateService(spec) => self.update_service(now, id, spec, out),
            Command::RemoveService(name) => {
                self.remove_shared(now, id, Kind::SERVICE, "service", &name, out)
            }
            Command::AddName(spec) => self.add_name(now, id, &spec, out),
            Command::RemoveName(name) => {
                self.remove_shared(now, id, Kind::NAME, "name", &name, out)
            }
            Command::CreateNetwork(spec) => self.create_network(now, id, spec, out),
            Command::RemoveNetwork(name) => self.remove_network(now, id, &name, out),
            Command::MintToken(request) => self.mint(now, id, &request, out),
            Command::RemoveNode { node, force } => self.remove_node(now, id, &node, force, out),
            Command::LeaveForGood => self.leave_for_good(now, id, out),
        }
    }

    fn attach(&mut self, now: Now, id: u64, request: AttachRequest, out: &mut Vec<Output>) {
        match self.find_address(&request) {
            Ok(ip) => self.store_endpoint(now, id, request, ip, out),
            Err(NoAddress::NoNetwork) => {
                fail(id, ErrorKind::NotFound, no_network(&request.network), out);
            }
            Err(NoAddress::Exact(error)) => self.ask_owner(now, id, request, error, out),
            Err(NoAddress::Exhausted(net)) => self.ask_for_space(now, id, request, net, out),
        }
    }

    pub(super) fn find_address(&mut self, request: &AttachRequest) -> Result<Ipv4Addr, NoAddress> {
        let Some(net) = self.network(&request.network) else {
            return Err(NoAddress::NoNetwork);
        };
        match request.ip {
            None => self
                .allocator
                .allocate(&net)
                .map_err(|_| NoAddress::Exhausted(net)),
            Some(ip) => self
                .allocator
                .allocate_exact(ip, &net)
                .map(|()| ip)
                .map_err(NoAddress::Exact),
        }
    }

    pub(super) fn store_endpoint(
        &mut self,
        now: Now,
        id: u64,
        request: AttachRequest,
        ip: Ipv4Addr,
        out: &mut Vec<Output>,
    ) {
        let endpoint = Endpoint {
            id: EndpointId(self.random.bytes()),
            node: self.me,
            kind: request.kind,
            names: request.names,
            network: request.network,
            ip,
            labels: request.labels,
        };
        let then = vec![Then::Reply(id, Reply::Attached(endpoint.clone()))];
        if let Err(error) = self.put(now, &Object::Endpoint(endpoint), then, out) {
            let batch = self.allocator.release(ip, now);
            self.persist(now, batch, Vec::new(), out);
            out.push(Output::Reply(id, Err(error)));
        }
    }

    fn release(&mut self, now: Now, id: u64, endpoint: &EndpointId, out: &mut Vec<Output>) {
        let key = endpoint_key(endpoint);
        let ip = match self.catalog.own_object(&self.me, Kind::ENDPOINT, &key) {
            Some(Object::Endpoint(endpoint)) => Some(endpoint.ip),
            _ => None,
        };
        self.remove_freeing(now, id, (Kind::ENDPOINT, &key), ip, out);
    }

    /// Removes an object and lets its address rest, in one batch: no crash may come between the two.
    fn remove_freeing(
        &mut self,
        now: Now,
        id: u64,
        (kind, key): (Kind, &[u8]),
        ip: Option<Ipv4Addr>,
        out: &mut Vec<Output>,
    ) {
        let wall = self.wall.micros(now);
        match self.catalog.remove(kind, key, &self.identity, wall) {
            Ok(mut written) => {
                let resting = ip.map(|ip| self.allocator.release(ip, now));
                written.batch.append(resting.unwrap_or_default());
                self.publish(now, written, vec![Then::Reply(id, Reply::Done)], out);
            }
            Err(error) => fail(id, ErrorKind::Conflict, error.to_string(), out),
        }
    }

    fn create_service(&mut self, now: Now, id: u64, spec: ServiceSpec, out: &mut Vec<Output>) {
        if let Err(why) = self.check_service(&spec) {
            return fail(id, ErrorKind::Invalid, why, out);
        }
        if let Err(why) = self.check_free(&spec, None) {
            return fail(id, ErrorKind::Conflict, why, out);
        }
        let service = service_of(spec, Ipv4Addr::UNSPECIFIED);
        match self.allocator.allocate_vip() {
            Ok(vip) => self.check_everywhere(now, id, Service { vip, ..service }, out),
            Err(_) => {
                let donor = self.richest(self.plan.vips(), &BTreeSet::new());
                let tried = donor.into_iter().collect();
                let purpose = Purpose::Vip {
                    command: id,
                    service: Box::new(service),
                    tried,
                };
                if self
                    .ask(
                        now,
                        donor.into_iter().collect(),
                        &Ask::Space { vips: true },
                        purpose,
                    )
                    .is_err()
                {
                    let text = "no virtual address left on this host, and no other node is there to give any";
                    fail(id, ErrorKind::Unavailable, text.to_owned(), out);
                }
            }
        }
    }

    fn update_service(&mut self, now: Now, id: u64, spec: ServiceSpec, out: &mut Vec<Output>) {
        if let Err(why) = self.check_service(&spec) {
            return fail(id, ErrorKind::Invalid, why, out);
        }
        let Some(old) = self.service(now, &spec.name) else {
            return fail(id, ErrorKind::NotFound, no_such("service", &spec.name), out);
        };
        if let Err(why) = self.check_free(&spec, Some(&old.name)) {
            return fail(id, ErrorKind::Conflict, why, out);
        }
        self.check_everywhere(now, id, service_of(spec, old.vip), out);
    }

    /// Asks all live nodes whether they can serve what is published; without anything published there is no question.
    pub(super) fn check_everywhere(
        &mut self,
        now: Now,
        id: u64,
        service: Service,
        out: &mut Vec<Output>,
    ) {
        let ports: Vec<_> = service
            .ports
            .iter()
            .flat_map(|port| {
                port.publish
                    .iter()
                    .map(|publish| (port.proto, publish.addr, publish.port))
            })
            .collect();
        let peers = if ports.is_empty() {
            BTreeSet::new()
        } else {
            self.alive_peers()
        };
        let purpose = Purpose::Publish {
            command: id,
            service: Box::new(service),
        };
        if let Err(Purpose::Publish { service, .. }) =
            self.ask(now, peers, &Ask::Publish(ports), purpose)
        {
            self.store_service(now, id, *service, out);
        }
    }

    pub(super) fn store_service(
        &mut self,
        now: Now,
        id: u64,
        service: Service,
        out: &mut Vec<Output>,
    ) {
        let then = vec![Then::Reply(id, Reply::Service(service.clone()))];
        if let Err(error) = self.put(now, &Object::Service(service), then, out) {
            out.push(Output::Reply(id, Err(error)));
        }
    }

    fn check_service(&self, spec: &ServiceSpec) -> Result<(), String> {
        if spec.ports.is_empty() {
            return Err("a service needs at least one port: --port 80".to_owned());
        }
        if spec.ports.len() > MAX_PORTS {
            return Err(format!("a service has at most {MAX_PORTS} ports"));
        }
        let mut seen = BTreeSet::new();
        for port in &spec.ports {
            if port.port == 0
                || port.target == 0
                || port.publish.iter().any(|publish| publish.port == 0)
            {
                return Err("port 0 means nothing here; use 1 to 65535".to_owned());
            }
            if !seen.insert((port.proto, port.port)) {
                return Err(format!("port {}/{} is given twice", port.port, port.proto));
            }
        }
        let mut published = BTreeSet::new();
        for port in &spec.ports {
            for publish in &port.publish {
                if !published.insert((port.proto, publish.port, publish.addr)) {
                    return Err(format!(
                        "{}/{} is published twice",
                        publish.port, port.proto
                    ));
                }
            }
        }
        Ok(())
    }

    /// Is the name free, and does no other service publish the same port?
    fn check_free(&self, spec: &ServiceSpec, own: Option<&ServiceName>) -> Result<(), String> {
        let services = self.catalog.services(self.wall_now());
        if own.is_none() && services.iter().any(|service| service.name == spec.name) {
            return Err(format!(
                "there is a service \"{0}\" already; change it with: weft service update {0}",
                spec.name
            ));
        }
        let wanted: BTreeSet<_> = published(&spec.ports);
        for service in services.iter().filter(|service| Some(&service.name) != own) {
            if let Some((proto, port)) = published(&service.ports).intersection(&wanted).next() {
                return Err(format!(
                    "port {port}/{proto} is published by service \"{}\" already",
                    service.name
                ));
            }
        }
        Ok(())
    }

    fn service(&self, now: Now, name: &ServiceName) -> Option<Service> {
        match self
            .catalog
            .shared_object(Kind::SERVICE, &label_key(name), self.wall.micros(now))?
        {
            Object::Service(service) => Some(service),
            _ => None,
        }
    }

    fn add_name(&mut self, now: Now, id: u64, spec: &NameSpec, out: &mut Vec<Output>) {
        if let Some(holder) = self.holder_of(spec) {
            let text = format!(
                "the name \"{}\" is taken by {holder}; choose another, or remove it first",
                spec.name
            );
            return fail(id, ErrorKind::Conflict, text, out);
        }
        let name = ManualName {
            name: spec.name.clone(),
            ip: spec.ip,
        };
        let then = vec![Then::Reply(id, Reply::Done)];
        if let Err(error) = self.put(now, &Object::Name(name), then, out) {
            out.push(Output::Reply(id, Err(error)));
        }
    }

    /// What already answers to a name, but for the very same binding.
    fn holder_of(&self, spec: &NameSpec) -> Option<String> {
        let wall = self.wall_now();
        let key = label_key(&spec.name);
        let shared = |kind| self.catalog.shared_object(kind, &key, wall);
        if shared(Kind::SERVICE).is_some() {
            return Some("a service".to_owned());
        }
        if self.catalog.is_endpoint_name(&spec.name) {
            return Some("an endpoint".to_owned());
        }
        match shared(Kind::NAME)? {
            Object::Name(bound) if bound.ip != spec.ip => Some(bound.ip.to_string()),
            _ => None,
        }
    }

    pub(super) fn remove_shared(
        &mut self,
        now: Now,
        id: u64,
        kind: Kind,
        what: &str,
        name: &Label,
        out: &mut Vec<Output>,
    ) {
        let key = label_key(name);
        let vip = match self
            .catalog
            .shared_object(kind, &key, self.wall.micros(now))
        {
            None => return fail(id, ErrorKind::NotFound, no_such(what, name), out),
            Some(Object::Service(service)) => Some(service.vip),
            Some(_) => None,
        };
        self.remove_freeing(now, id, (kind, &key), vip, out);
    }

    fn mint(&mut self, now: Now, id: u64, request: &TokenRequest, out: &mut Vec<Output>) {
        if request.ttl_secs == 0 || request.ttl_secs > MAX_TTL_SECS {
            return fail(
                id,
                ErrorKind::Invalid,
                "--ttl must be between 1 second and 30 days".to_owned(),
                out,
            );
        }
        if !request.reusable && request.uses == 0 {
            return fail(
                id,
                ErrorKind::Invalid,
                "--uses must be at least 1".to_owned(),
                out,
            );
        }
        let issued_at = self.wall.seconds(now);
        let body = TokenBody {
            cluster: self.meta.cluster,
            id: self.random.bytes(),
            issuer: self.me,
            issued_at,
            expires_at: issued_at + request.ttl_secs,
            uses: if request.reusable { 0 } else { request.uses },
            members: self.token_members(),
        };
        if body
            .members
            .iter()
            .all(|member| member.addresses.is_empty())
        {
            let text = "this host has no address that others could reach; say one with: weft up --advertise ADDR";
            return fail(id, ErrorKind::Conflict, text.to_owned(), out);
        }
        match Token::issue(&self.identity, &self.meta.secret, body) {
            Ok(token) => out.push(Output::Reply(id, Ok(Reply::Token(token.text())))),
            Err(error) => fail(id, ErrorKind::Internal, error.to_string(), out),
        }
    }

    /// This node first, then live ones: whoever joins tries them in this order.
    fn token_members(&self) -> Vec<TokenMember> {
        let nodes = self.catalog.nodes();
        let alive = self.alive_peers();
        let member = |id, noise_key, addresses: &[std::net::SocketAddr], tcp_port| TokenMember {
            id,
            noise_key,
            addresses: addresses.iter().copied().take(TOKEN_ADDRESSES).collect(),
            tcp_port,
        };
        let mut members = vec![member(
            self.me,
            self.identity.noise_public(),
            &self.config.underlay,
            self.config.tcp_port,
        )];
        for keys in self
            .roster()
            .members()
            .filter(|keys| alive.contains(&keys.id))
            .take(TOKEN_MEMBERS - 1)
        {
            if let Some(info) = nodes.get(&keys.id) {
                members.push(member(keys.id, keys.noise, &info.underlay, info.tcp_port));
            }
        }
        members
    }

    pub(super) fn wall_now(&self) -> WallMicros {
        self.wall.micros(self.last_now)
    }
}

fn service_of(spec: ServiceSpec, vip: Ipv4Addr) -> Service {
    Service {
        name: spec.name,
        vip,
        ports: spec.ports,
        selector: spec.selector,
        method: spec.method,
    }
}

fn published(ports: &[crate::view::ServicePort]) -> BTreeSet<(crate::model::Proto, u16)> {
    ports
        .iter()
        .flat_map(|port| {
            port.publish
                .iter()
                .map(move |publish| (port.proto, publish.port))
        })
        .collect()
}

pub(super) fn published_text(service: &Service) -> String {
    let ports: Vec<String> = published(&service.ports)
        .iter()
        .map(|(proto, port)| format!("{port}/{proto}"))
        .collect();
    ports.join(", ")
}

pub(super) fn no_such(what: &str, name: &Label) -> String {
    format!("there is no {what} \"{name}\"")
}
