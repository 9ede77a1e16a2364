//! Asking the host's own resolvers: the question alone, rewritten, over a socket and with a number of its own each time;
//! the answer with its RCODE unchanged, less what points into the cluster.
//!
//! The sockets belong to the namespace of the threads that run the server: that must be the host's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::SVCB;
use hickory_proto::rr::rdata::svcb::SvcParamValue;
use hickory_proto::rr::{RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use weft_core::model::AddressPlan;

use crate::reply::{self, MAX_UDP};

/// How many resolvers of the host are used; the C library stops at three.
const MAX_UPSTREAMS: usize = 4;

/// The host's resolvers, shared and replaceable at any time.
#[derive(Clone, Debug, Default)]
pub struct Upstreams(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    list: RwLock<Vec<SocketAddr>>,
    /// Position of the one that answered last: the next query begins there, so that a dead one delays few.
    last_good: AtomicUsize,
}

impl Upstreams {
    /// Begins with these.
    pub fn new(list: Vec<SocketAddr>) -> Self {
        let upstreams = Self::default();
        upstreams.set(list);
        upstreams
    }

    /// Replaces them, when `/etc/resolv.conf` changed.
    pub fn set(&self, mut list: Vec<SocketAddr>) {
        list.truncate(MAX_UPSTREAMS);
        let mut held = self.0.list.write().unwrap_or_else(PoisonError::into_inner);
        if *held != list {
            *held = list;
            self.0.last_good.store(0, Relaxed);
        }
    }

    /// Those in use.
    pub fn list(&self) -> Vec<SocketAddr> {
        let held = self.0.list.read().unwrap_or_else(PoisonError::into_inner);
        held.clone()
    }

    /// In the order to try them. Addresses of the overlay are left out: a host may well resolve through weft, and then
    /// would be asked for what it just asked us.
    fn in_order(&self, plan: &AddressPlan) -> Vec<(usize, SocketAddr)> {
        let mut list: Vec<(usize, SocketAddr)> = self.list().into_iter().enumerate().collect();
        if !list.is_empty() {
            let first = self.0.last_good.load(Relaxed) % list.len();
            list.rotate_left(first);
        }
        list.retain(|(_, addr)| !in_overlay(addr.ip(), plan));
        list
    }
}

/// Reads the `nameserver` lines of a `resolv.conf`. Link-local addresses with an interface are left out: a bare address
/// can't name the interface.
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let ip = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        let addr = ip.map(|ip| SocketAddr::new(ip, 53));
        found.extend(addr.filter(|a| !found.contains(a)));
    }
    found.truncate(MAX_UPSTREAMS);
    found
}

/// What came of a forwarded query.
pub(crate) struct Forwarded {
    /// The reply for the client, or nothing when no resolver answered.
    pub(crate) reply: Option<Message>,
    /// Records left out.
    pub(crate) dropped: u64,
}

/// Asks one resolver after another; SERVFAIL and REFUSED are passed on only when none says better.
pub(crate) async fn forward(
    upstreams: &Upstreams,
    request: &Message,
    plan: &AddressPlan,
    patience: Duration,
) -> Forwarded {
    let mut best = None;
    for (position, upstream) in upstreams.in_order(plan) {
        let Ok(answer) = ask(upstream, request, patience).await else {
            continue;
        };
        let poor = matches!(
            answer.metadata.response_code,
            ResponseCode::ServFail | ResponseCode::Refused
        );
        if !poor {
            upstreams.0.last_good.store(position, Relaxed);
            best = Some(answer);
            break;
        }
        best.get_or_insert(answer);
    }
    match best {
        Some(answer) => pass_on(request, answer, plan),
        None => Forwarded {
            reply: None,
            dropped: 0,
        },
    }
}

async fn ask(upstream: SocketAddr, request: &Message, patience: Duration) -> io::Result<Message> {
    let question = question(request);
    let bytes = question.to_vec().map_err(io::Error::other)?;
    let answer = timeout(patience, over_udp(upstream, &question, &bytes)).await??;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    // What a resolver cut short is still better than nothing when its TCP is closed.
    match timeout(patience, over_tcp(upstream, &question, &bytes)).await {
        Ok(Ok(whole)) => Ok(whole),
        _ => Ok(answer),
    }
}

/// The client's question under a new random number, with our own EDNS: none of its options go further.
pub(crate) fn question(request: &Message) -> Message {
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.metadata.checking_disabled = request.metadata.checking_disabled;
    question.metadata.authentic_data = request.metadata.authentic_data;
    question.queries.clone_from(&request.queries);
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP);
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        question.set_edns(edns);
    }
    question
}

/// A fresh socket each time: its port, which the kernel draws at random, is half of what a forger must guess
/// (RFC 5452 §9.2).
async fn over_udp(upstream: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = matching(question, &buffer[..length]) {
            return Ok(answer);
        }
    }
}

async fn over_tcp(upstream: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(length)];
    stream.read_exact(&mut buffer).await?;
    matching(question, &buffer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The answer to this very question; a resolver that refuses may leave the question out.
pub(crate) fn matching(question: &Message, bytes: &[u8]) -> Option<Message> {
    let asked = question.queries.first()?;
    if bytes.get(..2)? != question.metadata.id.to_be_bytes() || reply::questions(bytes)? > 1 {
        return None;
    }
    let answer = Message::from_vec(bytes).ok()?;
    let is_answer = answer.metadata.message_type == MessageType::Response
        && answer.metadata.op_code == OpCode::Query;
    let same = match answer.queries.first() {
        Some(echoed) => same_question(echoed, asked),
        None => answer.metadata.response_code != ResponseCode::NoError && answer.answers.is_empty(),
    };
    (is_answer && same).then_some(answer)
}

fn same_question(a: &Query, b: &Query) -> bool {
    a.name() == b.name() && a.query_type() == b.query_type() && a.query_class() == b.query_class()
}

/// The answer in the client's own frame, without records that point into the cluster or to loopback: a page from
/// outside must not make a browser inside talk to what is inside ("DNS rebinding").
pub(crate) fn pass_on(request: &Message, mut answer: Message, plan: &AddressPlan) -> Forwarded {
    let mut dropped = 0;
    let mut harmless = |records: &mut Vec<Record>| {
        let before = records.len();
        records.retain(|r| !leads_inside(&r.data, plan));
        dropped += (before - records.len()) as u64;
    };
    harmless(&mut answer.answers);
    harmless(&mut answer.authorities);
    harmless(&mut answer.additionals);
    let mut reply = reply::bare(request, answer.metadata.response_code);
    reply.metadata.authoritative = answer.metadata.authoritative;
    reply.metadata.authentic_data = answer.metadata.authentic_data;
    reply.metadata.recursion_available = answer.metadata.recursion_available;
    reply.metadata.truncation = answer.metadata.truncation;
    reply.answers = answer.answers;
    reply.authorities = answer.authorities;
    reply.additionals = answer.additionals;
    Forwarded {
        reply: Some(reply),
        dropped,
    }
}

fn leads_inside(data: &RData, plan: &AddressPlan) -> bool {
    match data {
        RData::A(ip) => is_inside(ip.0.into(), plan),
        RData::AAAA(ip) => is_inside(ip.0.into(), plan),
        RData::SVCB(svcb) => hints_inside(svcb, plan),
        RData::HTTPS(https) => hints_inside(&https.0, plan),
        _ => false,
    }
}

/// RFC 9460 §7.3: such a record may carry addresses of its own.
fn hints_inside(svcb: &SVCB, plan: &AddressPlan) -> bool {
    svcb.svc_params.iter().any(|(_, value)| match value {
        SvcParamValue::Ipv4Hint(hint) => hint.0.iter().any(|ip| is_inside(ip.0.into(), plan)),
        SvcParamValue::Ipv6Hint(hint) => hint.0.iter().any(|ip| is_inside(ip.0.into(), plan)),
        _ => false,
    })
}

fn is_inside(ip: IpAddr, plan: &AddressPlan) -> bool {
    let ip = ip.to_canonical();
    let this_host = match ip {
        // 0.0.0.0/8 is "this host" to many a program.
        IpAddr::V4(v4) => v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.is_unspecified(),
    };
    ip.is_loopback() || this_host || in_overlay(ip, plan)
}

fn in_overlay(ip: IpAddr, plan: &AddressPlan) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => plan.range.contains(&v4),
        IpAddr::V6(v6) => plan.range6().contains(&v6),
    }
}

#[cfg(test)]
mod tests {
    use weft_core::model::ClusterId;

    use super::*;

    #[test]
    fn resolv_conf_is_read_as_the_c_library_does() {
        let text = "# x\nsearch a.b\nnameserver 192.0.2.1\n\tnameserver  2001:db8::1 # c\nnameserver 192.0.2.1\n\
                    nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\noptions ndots:5\n";
        let list = parse_resolv_conf(text);
        assert_eq!(
            list,
            [
                "192.0.2.1:53".parse().unwrap(),
                "[2001:db8::1]:53".parse().unwrap()
            ]
        );
        assert!(parse_resolv_conf("").is_empty());
    }

    #[test]
    fn addresses_that_lead_inside_are_known_in_every_dress() {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0xab; 16])).unwrap();
        let inside = [
            "10.32.0.1",
            "10.47.255.255",
            "127.0.0.53",
            "0.0.0.0",
            "::1",
            "::",
            "::ffff:10.32.0.1",
            "::ffff:127.0.0.1",
            "fdab:abab:abab::1",
        ];
        for ip in inside {
            assert!(is_inside(ip.parse().unwrap(), &plan), "{ip}");
        }
        for ip in ["10.48.0.1", "192.168.1.1", "2001:db8::1", "fd00::1"] {
            assert!(!is_inside(ip.parse().unwrap(), &plan), "{ip}");
        }
    }

    #[test]
    fn a_host_that_resolves_through_weft_is_not_asked_back() {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0xab; 16])).unwrap();
        let upstreams = Upstreams::new(parse_resolv_conf(
            "nameserver 10.47.0.1\nnameserver 192.0.2.1\n",
        ));
        let order = upstreams.in_order(&plan);
        assert_eq!(order, [(1, "192.0.2.1:53".parse().unwrap())]);
    }
}
