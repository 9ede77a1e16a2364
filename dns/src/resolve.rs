//! The way of one query: bounds, the cluster's own names, or the host's resolvers.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use weft_core::view::View;

use crate::counters::{Counters, count};
use crate::forward::{Forwarded, Upstreams, forward};
use crate::limits::{Limits, Rate, Slots};
use crate::reply;
use crate::zone::Zone;

/// Where the present view comes from; called for every query, so it must be cheap and never block.
pub type ViewSource = Arc<dyn Fn() -> Arc<View> + Send + Sync>;

/// Answers queries, whatever they came over.
pub(crate) struct Resolver {
    view: ViewSource,
    ipv6: bool,
    indexed: Mutex<Option<(Arc<View>, Arc<Zone>)>>,
    upstreams: Upstreams,
    limits: Limits,
    rate: Mutex<Rate>,
    waiting: Arc<Slots>,
    started: Instant,
    shuffle: AtomicU64,
    pub(crate) counters: Arc<Counters>,
}

impl Resolver {
    pub(crate) fn new(view: ViewSource, ipv6: bool, upstreams: Upstreams, limits: Limits) -> Self {
        Self {
            view,
            ipv6,
            indexed: Mutex::new(None),
            upstreams,
            limits,
            rate: Mutex::new(Rate::new(limits.per_client_rate)),
            waiting: Slots::new(limits.in_flight, limits.in_flight_per_client),
            started: Instant::now(),
            shuffle: AtomicU64::new(RandomState::new().build_hasher().finish()),
            counters: Arc::default(),
        }
    }

    /// The reply, or `None` when there must be none.
    pub(crate) async fn answer(&self, request: &Message, from: IpAddr) -> Option<Message> {
        if request.metadata.message_type == MessageType::Response {
            return None;
        }
        count(&self.counters.queries);
        if !self.within_rate(from) {
            count(&self.counters.rate_dropped);
            return None;
        }
        if let Some(code) = reply::objection(request) {
            count(&self.counters.rejected);
            return Some(reply::bare(request, code));
        }
        if let Some(reply) = self.own(request, from) {
            count(&self.counters.local);
            return Some(reply);
        }
        Some(self.others(request, from).await)
    }

    fn within_rate(&self, from: IpAddr) -> bool {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        rate.allow(from, self.started.elapsed())
    }

    fn own(&self, request: &Message, from: IpAddr) -> Option<Message> {
        let query = request.queries.first()?;
        let labels: Vec<&[u8]> = query.name().iter().collect();
        let zone = self.zone();
        let seed = self.shuffle.fetch_add(1, Relaxed);
        let answer = zone.answer(&zone.sight(from), &labels, reply::kind(query), seed);
        reply::from_zone(request, answer, zone.revision())
    }

    /// The index of the present view, made anew only when the view is another one.
    fn zone(&self) -> Arc<Zone> {
        let view = (self.view)();
        let mut indexed = self.indexed.lock().unwrap_or_else(PoisonError::into_inner);
        match &*indexed {
            Some((of, zone)) if Arc::ptr_eq(of, &view) => zone.clone(),
            _ => {
                let zone = Arc::new(Zone::new(&view, self.ipv6));
                *indexed = Some((view, zone.clone()));
                zone
            }
        }
    }

    async fn others(&self, request: &Message, from: IpAddr) -> Message {
        // RFC 1034 §4.3.1: recursion is for those who ask for it.
        if !request.metadata.recursion_desired {
            count(&self.counters.rejected);
            return reply::bare(request, ResponseCode::Refused);
        }
        let Some(_slot) = self.waiting.take(from) else {
            count(&self.counters.busy);
            return reply::bare(request, ResponseCode::ServFail);
        };
        let plan = (self.view)().plan;
        let patience = self.limits.upstream_timeout;
        let Forwarded { reply, dropped } = forward(&self.upstreams, request, &plan, patience).await;
        self.counters.rebinding_dropped.fetch_add(dropped, Relaxed);
        match reply {
            Some(reply) => {
                count(&self.counters.forwarded);
                reply
            }
            None => {
                count(&self.counters.upstream_failed);
                reply::bare(request, ResponseCode::ServFail)
            }
        }
    }
}
