//! The server around the resolver; the one file that names hickory-server.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use async_trait::async_trait;
use hickory_proto::op::{Header, HeaderCounts, Metadata, OpCode, ResponseCode};
use hickory_proto::serialize::binary::BinDecoder;
use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::{MessageResponseBuilder, Queries};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::counters::{Counters, Snapshot, count};
use crate::forward::Upstreams;
use crate::limits::{Limits, Slots};
use crate::reply;
use crate::resolve::{Resolver, ViewSource};
use crate::tcp;

/// Why the server can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket can't be bound.
    #[error("can't listen on {addr} for DNS: {source}")]
    Bind {
        /// Where.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A socket can't be handed to the runtime. None is served.
    #[error("can't use a DNS socket: {0}")]
    Socket(#[source] io::Error),
}

/// Listening sockets.
#[derive(Debug, Default)]
pub struct Sockets {
    /// UDP, each bound to one address: a reply must leave from the address that was asked.
    pub udp: Vec<UdpSocket>,
    /// TCP.
    pub tcp: Vec<TcpListener>,
}

impl Sockets {
    /// Binds UDP and TCP on each address. The caller's thread must be inside the domain, where the addresses are.
    pub fn bind(addrs: &[IpAddr], port: u16) -> Result<Self, ServeError> {
        let mut sockets = Self::default();
        for ip in addrs {
            let addr = SocketAddr::new(*ip, port);
            let failed = |source| ServeError::Bind { addr, source };
            let udp = UdpSocket::bind(addr).map_err(failed)?;
            // With port 0 (tests) TCP goes to the port that UDP got.
            let addr = udp.local_addr().map_err(failed)?;
            sockets.tcp.push(TcpListener::bind(addr).map_err(failed)?);
            sockets.udp.push(udp);
        }
        Ok(sockets)
    }
}

/// What a server needs.
pub struct Config {
    /// Where it listens.
    pub sockets: Sockets,
    /// What it knows.
    pub view: ViewSource,
    /// Whom it asks for the rest.
    pub upstreams: Upstreams,
    /// Its bounds.
    pub limits: Limits,
    /// Has the domain IPv6? Without it no AAAA is given for overlay addresses.
    pub ipv6: bool,
}

/// A running server. Dropping it stops it too, only without waiting.
#[derive(Debug)]
pub struct Handle {
    counters: Arc<Counters>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Handle {
    /// What it did so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// The live counters, for readers elsewhere.
    pub fn shared_counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Stops and waits until all sockets are closed.
    pub async fn shutdown(mut self) {
        // Without receivers there is nobody left to tell.
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Waits until a part of the server ended by itself, which only happens when its socket broke: bind and serve anew.
    ///
    /// Cancel safety: nothing is lost when the future is dropped.
    pub async fn failed(&mut self) {
        self.tasks.join_next().await;
    }
}

/// Begins to serve. Must be called inside a tokio runtime whose threads are in the *host's* namespace: queries to the
/// host's resolvers leave from there, while `config.sockets` belong to the domain.
///
/// hickory-server logs two lines per query at level `info`: filter `hickory_server=warn`.
pub fn serve(config: Config) -> Result<Handle, ServeError> {
    let resolver = Arc::new(Resolver::new(
        config.view,
        config.ipv6,
        config.upstreams,
        config.limits,
    ));
    let (stop, stopping) = watch::channel(false);
    let mut udp = Server::new(Handler(resolver.clone()));
    for socket in config.sockets.udp {
        socket.set_nonblocking(true).map_err(ServeError::Socket)?;
        let socket = tokio::net::UdpSocket::from_std(socket).map_err(ServeError::Socket)?;
        udp.register_socket(socket);
    }
    let mut tasks = JoinSet::new();
    let slots = Slots::new(config.limits.tcp, config.limits.tcp_per_client);
    for listener in config.sockets.tcp {
        listener.set_nonblocking(true).map_err(ServeError::Socket)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(ServeError::Socket)?;
        tasks.spawn(tcp::listen(
            listener,
            resolver.clone(),
            slots.clone(),
            config.limits,
            stopping.clone(),
        ));
    }
    tasks.spawn(run_udp(udp, stopping));
    Ok(Handle {
        counters: resolver.counters.clone(),
        stop,
        tasks,
    })
}

async fn run_udp(mut server: Server<Handler>, mut stop: watch::Receiver<bool>) {
    let ended = tokio::select! {
        _ = stop.wait_for(|stop| *stop) => None,
        ended = server.block_until_done() => Some(ended),
    };
    match ended {
        Some(Err(error)) => tracing::warn!(%error, "the DNS server's UDP socket broke"),
        Some(Ok(())) => {}
        None => {
            // It ends by being told to; there is nothing left to do about an error then.
            let _ = server.shutdown_gracefully().await;
        }
    }
}

pub(crate) struct Handler(pub(crate) Arc<Resolver>);

#[async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut responder: R,
    ) -> ResponseInfo {
        let Some(query) = reply::read(request.as_slice()) else {
            count(&self.0.counters.rejected);
            // A bare header: what can't be read can't be repeated so that others read it.
            let none =
                Queries::read(&mut BinDecoder::new(&[]), 0).expect("none are read of nothing");
            let builder = MessageResponseBuilder::new(&none, None);
            let error = builder.error_msg(&request.metadata, ResponseCode::FormErr);
            return sent(responder.send_response(error).await, &request.metadata);
        };
        let from = request.src().ip().to_canonical();
        let Some(reply) = self.0.answer(&query, from).await else {
            return silence(&request.metadata);
        };
        // hickory repeats the question as it came, out of reach of name compression: the name stands twice.
        let twice = query.queries.first().map_or(0, |q| q.name().len());
        let limit = reply::udp_limit(&reply) - twice;
        let Ok(reply) = reply::fit(reply, limit) else {
            return silence(&request.metadata);
        };
        let mut builder = MessageResponseBuilder::from_message_request(request);
        if let Some(edns) = &reply.edns {
            builder.edns(edns);
        }
        let response = builder.build(
            reply.metadata,
            &reply.answers,
            &reply.authorities,
            [],
            &reply.additionals,
        );
        sent(responder.send_response(response).await, &request.metadata)
    }
}

/// A reply that can't be sent is lost like any datagram: the client asks again.
fn sent<E>(result: Result<ResponseInfo, E>, request: &Metadata) -> ResponseInfo {
    result.unwrap_or_else(|_| silence(request))
}

/// hickory wants to be told of a reply even where there was none.
fn silence(request: &Metadata) -> ResponseInfo {
    let mut metadata = Metadata::response_from_request(request);
    metadata.op_code = OpCode::Query;
    ResponseInfo::from(Header {
        metadata,
        counts: HeaderCounts::default(),
    })
}
