//! DNS: queries as hickory's server takes them, and answers of a host's resolver.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};

use futures_util::FutureExt;
use hickory_proto::op::{Message, MessageType, Query};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use weft_core::model::{AddressPlan, ClusterId, EndpointId, Generation, NodeId};
use weft_core::view::{
    Endpoint, EndpointKind, Liveness, ManualName, Member, Method, PeerNumber, Service, View,
};
use weft_dns::Limits;
use weft_dns::fuzz::{Server, forwarded};

use super::Seen;
use crate::pieces::{cut, join, marked};
use crate::scene::label;

static VIEW: LazyLock<Arc<View>> = LazyLock::new(|| Arc::new(view()));

fn view() -> View {
    let (node, cluster) = (NodeId([1; 32]), ClusterId([0xab; 16]));
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).expect("the default");
    let endpoint = |last: u8, names: &[&str]| Endpoint {
        id: EndpointId([last; 8]),
        node,
        kind: EndpointKind::Container,
        names: names.iter().map(|name| label(name)).collect(),
        network: label("default"),
        ip: Ipv4Addr::new(10, 32, 0, last),
        labels: BTreeMap::new(),
    };
    let mut endpoints = vec![endpoint(1, &["db", "store"]), endpoint(2, &["web"])];
    // More than fit a reply without EDNS.
    endpoints.extend((10..110).map(|last| endpoint(last, &["many"])));
    View {
        members: vec![Member {
            id: node,
            name: label("alpha"),
            generation: Generation(1),
            liveness: Liveness::Alive,
            number: PeerNumber(0),
            prefixes: Vec::new(),
            host_addrs: Vec::new(),
            mtu: None,
        }],
        endpoints,
        services: vec![Service {
            name: label("web"),
            vip: Ipv4Addr::new(10, 47, 0, 9),
            ports: Vec::new(),
            selector: BTreeMap::new(),
            method: Method::Maglev,
        }],
        names: vec![ManualName {
            name: label("printer"),
            ip: "2001:db8::7".parse().expect("an address"),
        }],
        ..View::empty(node, cluster, plan)
    }
}

/// Mark 0: a datagram. 1: a message over TCP. 2: a query and, as a second piece, what a resolver answers but for the
/// number, which is made right.
pub(super) fn dns(data: &[u8]) -> Seen {
    let Some((mark, rest)) = data.split_first() else {
        return Seen::Refused;
    };
    let from = SocketAddr::from(([10, 32, 0, 2], 4000));
    let source = Arc::new(|| VIEW.clone());
    let server = Server::new(source, Limits::default());
    // With no resolver to ask nothing is ever waited for.
    let reply = match mark % 3 {
        0 => server.udp(rest, from).now_or_never().flatten(),
        1 => server.tcp(rest, from).now_or_never().flatten(),
        _ => return forward(rest),
    };
    let Some(reply) = reply else {
        return Seen::Refused;
    };
    assert_eq!(reply[..2], rest[..2], "another query's number");
    assert!(reply[2] & 0x80 != 0, "a reply");
    if reply.len() == 12 {
        return Seen::Refused;
    }
    let read = Message::from_vec(&reply).expect("what is sent can be read");
    if mark % 3 == 0 {
        let most = read.edns.as_ref().map_or(512, |edns| edns.max_payload());
        assert!(
            reply.len() <= usize::from(most.min(1232)),
            "{} octets",
            reply.len()
        );
    }
    Seen::Taken
}

fn forward(data: &[u8]) -> Seen {
    let pieces = cut(data, 2);
    let [query, answer] = pieces[..] else {
        return Seen::Refused;
    };
    let numbered = |question: &[u8]| {
        let mut answer = answer.to_vec();
        if answer.len() >= 2 {
            answer[..2].copy_from_slice(&question[..2]);
        }
        answer
    };
    let Some(reply) = forwarded(query, numbered, &VIEW.plan, 1232) else {
        return Seen::Refused;
    };
    assert_eq!(reply[..2], query[..2], "another query's number");
    let read = Message::from_vec(&reply).expect("what is sent can be read");
    assert_eq!(read.metadata.message_type, MessageType::Response);
    let all = [&read.answers, &read.authorities, &read.additionals];
    for record in all.into_iter().flatten() {
        let ip: IpAddr = match &record.data {
            RData::A(A(ip)) => (*ip).into(),
            RData::AAAA(AAAA(ip)) => (*ip).into(),
            _ => continue,
        };
        let ip = ip.to_canonical();
        let inside = match ip {
            IpAddr::V4(ip) => VIEW.plan.range.contains(&ip),
            IpAddr::V6(ip) => VIEW.plan.range6().contains(&ip),
        };
        assert!(!inside && !ip.is_loopback(), "{ip} leads inside");
    }
    Seen::Taken
}

fn query(name: &str, kind: RecordType, edns: bool) -> Message {
    let mut query = Message::query();
    query.metadata.id = 7;
    query.metadata.recursion_desired = true;
    let name = Name::from_ascii(name).expect("a name");
    query.add_query(Query::query(name, kind));
    if edns {
        let mut edns = hickory_proto::op::Edns::new();
        edns.set_max_payload(1232);
        query.set_edns(edns);
    }
    query
}

fn octets(message: &Message) -> Vec<u8> {
    message.to_vec().expect("a message")
}

pub(super) fn dns_seeds() -> Vec<Vec<u8>> {
    let own = [
        ("web.weft.internal.", RecordType::A, false),
        ("many.weft.internal.", RecordType::A, true),
        ("many.weft.internal.", RecordType::A, false),
        ("db.", RecordType::AAAA, true),
        ("nobody.weft.internal.", RecordType::A, true),
        ("weft.internal.", RecordType::SOA, false),
        ("weft.internal.", RecordType::ANY, false),
        ("1.0.32.10.in-addr.arpa.", RecordType::PTR, false),
        ("example.org.", RecordType::A, true),
    ];
    let mut seeds = Vec::new();
    for (name, kind, edns) in own {
        let query = octets(&query(name, kind, edns));
        seeds.extend([marked(0, &query), marked(1, &query)]);
    }
    let asked = query("example.org.", RecordType::A, true);
    let name = Name::from_ascii("example.org.").expect("a name");
    let mut answer = Message::response(7, hickory_proto::op::OpCode::Query);
    answer.queries.clone_from(&asked.queries);
    let data = [
        RData::CNAME(CNAME(Name::from_ascii("www.example.org.").expect("a name"))),
        RData::A(A(Ipv4Addr::new(198, 51, 100, 7))),
        RData::A(A(Ipv4Addr::new(10, 32, 0, 7))),
        RData::AAAA(AAAA("2001:db8::1".parse().expect("an address"))),
        RData::TXT(TXT::new(vec!["some text".to_owned()])),
    ];
    answer.answers = data
        .into_iter()
        .map(|data| Record::from_rdata(name.clone(), 60, data))
        .collect();
    seeds.push(marked(2, &join([octets(&asked), octets(&answer)])));
    seeds
}
