//! Doors for the fuzz targets in `tests/fuzz`, and for nothing else: what sockets would bring, without sockets.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use hickory_proto::op::{Message, MessageType};
use hickory_proto::rr::Record;
use hickory_proto::serialize::binary::BinEncoder;
use hickory_server::net::NetError;
use hickory_server::net::runtime::TokioTime;
use hickory_server::net::xfer::Protocol;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponse;
use weft_core::model::AddressPlan;

use crate::forward::{self, Upstreams};
use crate::limits::Limits;
use crate::reply;
use crate::resolve::{Resolver, ViewSource};
use crate::server::Handler;

/// Takes queries as hickory's server does, and has no resolver of a host to ask.
pub struct Server(Handler);

impl Server {
    /// Answers from this view.
    pub fn new(view: ViewSource, limits: Limits) -> Self {
        let upstreams = Upstreams::default();
        Self(Handler(Arc::new(Resolver::new(
            view, true, upstreams, limits,
        ))))
    }

    /// A datagram came: what hickory decodes it to, our handler answers, and hickory encodes. `None` for silence and for
    /// what hickory refuses by itself.
    pub async fn udp(&self, bytes: &[u8], from: SocketAddr) -> Option<Vec<u8>> {
        let request = Request::from_bytes(bytes.to_vec(), from, Protocol::Udp).ok()?;
        if request.metadata.message_type == MessageType::Response {
            return None;
        }
        let captured = Captured::default();
        self.0
            .handle_request::<_, TokioTime>(&request, captured.clone())
            .await;
        captured
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// A message came over TCP, its length read already. The answer to what is no query is a bare header.
    pub async fn tcp(&self, bytes: &[u8], from: SocketAddr) -> Option<Vec<u8>> {
        let Some(request) = reply::read(bytes) else {
            return reply::form_error(bytes);
        };
        let reply = self.0.0.answer(&request, from.ip()).await?;
        let reply = reply::fit(reply, usize::from(u16::MAX)).ok()?;
        reply.to_vec().ok()
    }
}

/// Keeps the reply in place of a socket.
#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Option<Vec<u8>>>>);

#[async_trait]
impl ResponseHandler for Captured {
    async fn send_response<'a>(
        &mut self,
        response: MessageResponse<
            '_,
            'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
            impl Iterator<Item = &'a Record> + Send + 'a,
        >,
    ) -> Result<ResponseInfo, NetError> {
        let limit = response.edns().map_or(512, |edns| edns.max_payload());
        let mut bytes = Vec::new();
        let mut encoder = BinEncoder::new(&mut bytes);
        encoder.set_max_size(limit);
        let info = response.destructive_emit(&mut encoder)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
        Ok(info)
    }
}

/// What the host's resolver is asked for a client's query, and what the client gets of the octets that come back, put
/// into at most `limit`. `answer` sees the question, because an answer must repeat its number.
pub fn forwarded(
    query: &[u8],
    answer: impl FnOnce(&[u8]) -> Vec<u8>,
    plan: &AddressPlan,
    limit: usize,
) -> Option<Vec<u8>> {
    let request: Message = reply::read(query)?;
    let question = forward::question(&request);
    let answer = forward::matching(&question, &answer(&question.to_vec().ok()?))?;
    let reply = forward::pass_on(&request, answer, plan).reply?;
    reply::fit(reply, limit).ok()?.to_vec().ok()
}
