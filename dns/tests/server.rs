//! The real server on loopback, asked with real messages; the resolver it forwards to is a small real one too.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use weft_core::model::{AddressPlan, ClusterId, EndpointId, Generation, Label, NodeId};
use weft_core::view::{
    Endpoint, EndpointKind, Liveness, Member, Method, PeerNumber, Service, View,
};
use weft_dns::{Config, Handle, Limits, Sockets, Upstreams, serve};

const SOON: Duration = Duration::from_secs(5);

fn label(text: &str) -> Label {
    Label::parse(text).unwrap()
}

/// A hundred endpoints `many`, one `db`, one service `web`.
fn view() -> View {
    let cluster = ClusterId([0xab; 16]);
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &cluster).unwrap();
    let me = NodeId([1; 32]);
    let endpoint = |name: &str, n: u8| Endpoint {
        id: EndpointId([n; 8]),
        node: me,
        kind: EndpointKind::Container,
        names: vec![label(name)],
        network: label("default"),
        ip: Ipv4Addr::new(10, 32, 1, n),
        labels: BTreeMap::new(),
    };
    let mut endpoints: Vec<Endpoint> = (1..=100).map(|n| endpoint("many", n)).collect();
    endpoints.push(endpoint("db", 200));
    View {
        revision: 7,
        members: vec![Member {
            id: me,
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
        ..View::empty(me, cluster, plan)
    }
}

struct Rig {
    addr: SocketAddr,
    handle: Handle,
}

fn start(upstreams: Vec<SocketAddr>, limits: Limits) -> Rig {
    let sockets = Sockets::bind(&[IpAddr::from([127, 0, 0, 1])], 0).unwrap();
    let addr = sockets.udp[0].local_addr().unwrap();
    let view = Arc::new(view());
    let handle = serve(Config {
        sockets,
        view: Arc::new(move || view.clone()),
        upstreams: Upstreams::new(upstreams),
        limits,
        ipv6: true,
    })
    .unwrap();
    Rig { addr, handle }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    message.set_edns(edns);
    message
}

async fn udp_bytes(addr: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(bytes, addr).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let (length, _) = timeout(SOON, socket.recv_from(&mut buffer))
        .await
        .ok()?
        .unwrap();
    buffer.truncate(length);
    Some(buffer)
}

async fn udp(addr: SocketAddr, message: &Message) -> Message {
    let bytes = udp_bytes(addr, &message.to_vec().unwrap())
        .await
        .expect("a reply in time");
    let reply = Message::from_vec(&bytes).unwrap();
    assert_eq!(reply.metadata.id, message.metadata.id);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    reply
}

async fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length, bytes].concat()).await.ok()?;
    let length = timeout(SOON, stream.read_u16())
        .await
        .expect("a reply or the end")
        .ok()?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await.ok()?;
    Some(reply)
}

async fn tcp(addr: SocketAddr, message: &Message) -> Message {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let reply = exchange(&mut stream, &message.to_vec().unwrap())
        .await
        .unwrap();
    Message::from_vec(&reply).unwrap()
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

/// Answers after the first label of the name; counts nothing, keeps nothing.
async fn upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let listener = TcpListener::bind(addr).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let request = Message::from_vec(&buffer[..length]).unwrap();
            for reply in upstream_replies(&request, false) {
                socket
                    .send_to(&reply.to_vec().unwrap(), from)
                    .await
                    .unwrap();
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut buffer = vec![0; usize::from(length)];
            stream.read_exact(&mut buffer).await.unwrap();
            let request = Message::from_vec(&buffer).unwrap();
            let reply = upstream_replies(&request, true).remove(0).to_vec().unwrap();
            let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
            stream
                .write_all(&[&length[..], &reply].concat())
                .await
                .unwrap();
        }
    });
    addr
}

fn upstream_replies(request: &Message, tcp: bool) -> Vec<Message> {
    let name = request.queries[0].name().clone();
    let first = String::from_utf8(name.iter().next().unwrap_or_default().to_vec()).unwrap();
    let mut reply = Message::response(request.metadata.id, OpCode::Query);
    reply.metadata.recursion_available = true;
    reply.queries = request.queries.clone();
    let a = |ip: [u8; 4]| Record::from_rdata(name.clone(), 60, RData::A(A(ip.into())));
    match first.as_str() {
        "refused" => reply.metadata.response_code = ResponseCode::Refused,
        "servfail" => reply.metadata.response_code = ResponseCode::ServFail,
        "nothing" => reply.metadata.response_code = ResponseCode::NXDomain,
        "rebind" => reply.answers = vec![a([10, 32, 1, 1]), a([127, 0, 0, 1]), a([192, 0, 2, 1])],
        "large" if !tcp => reply.metadata.truncation = true,
        "large" => reply.answers = (0..200).map(|n| a([192, 0, 2, n])).collect(),
        "silent" => return Vec::new(),
        "forged" => {
            // Wrong number and wrong question come first and must be overlooked.
            let mut other_id = reply.clone();
            other_id.metadata.id ^= 1;
            other_id.answers = vec![a([203, 0, 113, 66])];
            let mut other_name = reply.clone();
            other_name.queries[0].set_name(Name::from_ascii("evil.example.").unwrap());
            other_name.answers = vec![a([203, 0, 113, 66])];
            reply.answers = vec![a([192, 0, 2, 2])];
            return vec![other_id, other_name, reply];
        }
        "text" => {
            let txt = TXT::new(vec!["hello".to_owned()]);
            reply.answers = vec![Record::from_rdata(name, 60, RData::TXT(txt))];
        }
        _ => reply.answers = vec![a([192, 0, 2, 1])],
    }
    vec![reply]
}

#[tokio::test]
async fn own_names_are_answered_with_authority_over_udp_and_tcp() {
    let rig = start(Vec::new(), Limits::default());
    for name in ["web.weft.internal.", "web.", "WeB.wEfT.internal."] {
        let request = question(name, RecordType::A);
        for reply in [udp(rig.addr, &request).await, tcp(rig.addr, &request).await] {
            assert_eq!(data(&reply), ["10.47.0.9"], "{name}");
            assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
            assert!(reply.metadata.recursion_desired);
            assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
            // The spelling of the question is kept (draft-vixie-dnsext-dns0x20).
            assert_eq!(reply.queries[0].name().to_ascii(), name);
            assert_eq!(reply.answers[0].ttl, 5);
        }
    }
    let reply = udp(rig.addr, &question("web.", RecordType::AAAA)).await;
    assert_eq!(data(&reply), ["fdab:abab:abab:f0::a2f:9"]);
    let reply = udp(
        rig.addr,
        &question("200.1.32.10.in-addr.arpa.", RecordType::PTR),
    )
    .await;
    assert_eq!(data(&reply), ["db.weft.internal."]);
    let reply = udp(rig.addr, &question("db.weft.internal.", RecordType::ANY)).await;
    assert_eq!(reply.answers.len(), 2);
    assert_eq!(rig.handle.counters().local, 9);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn negative_answers_carry_the_soa_of_their_zone() {
    let rig = start(Vec::new(), Limits::default());
    let cases = [
        (
            "nobody.weft.internal.",
            RecordType::A,
            ResponseCode::NXDomain,
            "weft.internal.",
        ),
        (
            "db.weft.internal.",
            RecordType::MX,
            ResponseCode::NoError,
            "weft.internal.",
        ),
        (
            "db.weft.internal.",
            RecordType::Unknown(65_400),
            ResponseCode::NoError,
            "weft.internal.",
        ),
        (
            "weft.internal.",
            RecordType::A,
            ResponseCode::NoError,
            "weft.internal.",
        ),
        (
            "9.9.33.10.in-addr.arpa.",
            RecordType::PTR,
            ResponseCode::NXDomain,
            "33.10.in-addr.arpa.",
        ),
    ];
    for (name, kind, code, zone) in cases {
        let reply = udp(rig.addr, &question(name, kind)).await;
        assert_eq!(reply.metadata.response_code, code, "{name} {kind}");
        assert!(reply.metadata.authoritative && reply.answers.is_empty());
        assert_eq!(reply.authorities.len(), 1);
        assert_eq!(reply.authorities[0].name.to_ascii(), zone);
        assert!(
            matches!(&reply.authorities[0].data, RData::SOA(soa) if soa.minimum == 5 && soa.serial == 7)
        );
    }
    let reply = udp(rig.addr, &question("nobody.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn large_answers_are_cut_over_udp_and_whole_over_tcp() {
    let rig = start(Vec::new(), Limits::default());
    let plain = question("many.weft.internal.", RecordType::A);
    let cases = [
        (plain.clone(), 512),
        (with_edns(plain.clone(), 900), 900),
        (with_edns(plain.clone(), 65_000), 1232),
    ];
    for (request, limit) in cases {
        let bytes = udp_bytes(rig.addr, &request.to_vec().unwrap())
            .await
            .unwrap();
        assert!(bytes.len() <= limit, "{} > {limit}", bytes.len());
        let reply = Message::from_vec(&bytes).unwrap();
        assert!(reply.metadata.truncation && reply.answers.len() > 20);
        assert_eq!(reply.edns.is_some(), request.edns.is_some(), "OPT is kept");
    }
    let whole = tcp(rig.addr, &with_edns(plain, 900)).await;
    assert!(!whole.metadata.truncation && whole.edns.is_some());
    assert_eq!(whole.answers.len(), 100);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn queries_we_do_not_answer_are_refused_by_their_proper_codes() {
    let rig = start(Vec::new(), Limits::default());
    let mut update = question("weft.internal.", RecordType::SOA);
    update.metadata.op_code = OpCode::Status;
    let mut chaos = question("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    let mut edns1 = with_edns(question("web.", RecordType::A), 1232);
    edns1.edns.as_mut().unwrap().set_version(1);
    let mut alone = question("example.com.", RecordType::A);
    alone.metadata.recursion_desired = false;
    let cases = [
        (update, ResponseCode::NotImp),
        (chaos, ResponseCode::Refused),
        (
            question("weft.internal.", RecordType::AXFR),
            ResponseCode::Refused,
        ),
        (edns1, ResponseCode::BADVERS),
        (alone, ResponseCode::Refused),
        (
            question("example.com.", RecordType::A),
            ResponseCode::ServFail,
        ),
    ];
    for (request, code) in cases {
        // As numbers: 16 is BADVERS and BADSIG.
        let got = udp(rig.addr, &request).await.metadata.response_code;
        assert_eq!(u16::from(got), u16::from(code), "{request}");
    }
    assert_eq!(rig.handle.counters().upstream_failed, 1);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn other_names_are_asked_of_the_hosts_resolvers_and_their_codes_passed_on() {
    let rig = start(vec![upstream().await], Limits::default());
    let cases = [
        ("example.com.", ResponseCode::NoError, 1),
        ("refused.example.com.", ResponseCode::Refused, 0),
        ("servfail.example.com.", ResponseCode::ServFail, 0),
        ("nothing.example.com.", ResponseCode::NXDomain, 0),
        ("large.example.com.", ResponseCode::NoError, 200),
    ];
    for (name, code, answers) in cases {
        let request = question(name, RecordType::A);
        let reply = tcp(rig.addr, &request).await;
        assert_eq!(reply.metadata.id, request.metadata.id);
        assert_eq!(reply.metadata.response_code, code, "{name}");
        assert_eq!(reply.answers.len(), answers, "{name}");
    }
    let cut = udp(rig.addr, &question("large.example.com.", RecordType::A)).await;
    assert!(cut.metadata.truncation && cut.answers.len() < 200);
    let text = udp(rig.addr, &question("text.example.com.", RecordType::TXT)).await;
    assert_eq!(data(&text), ["hello"]);
    let genuine = udp(rig.addr, &question("forged.example.com.", RecordType::A)).await;
    assert_eq!(data(&genuine), ["192.0.2.2"]);
    assert_eq!(rig.handle.counters().forwarded, 8);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn answers_that_lead_into_the_cluster_are_dropped() {
    let rig = start(vec![upstream().await], Limits::default());
    let reply = udp(rig.addr, &question("rebind.example.com.", RecordType::A)).await;
    assert_eq!(data(&reply), ["192.0.2.1"]);
    assert_eq!(rig.handle.counters().rebinding_dropped, 2);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn internal_and_short_names_never_leave_the_host() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let rig = start(vec![upstream.local_addr().unwrap()], Limits::default());
    for (name, kind) in [
        ("nobody.weft.internal.", RecordType::A),
        ("a.b.c.weft.internal.", RecordType::TXT),
        ("nobody.", RecordType::A),
        ("9.9.32.10.in-addr.arpa.", RecordType::PTR),
    ] {
        udp(rig.addr, &question(name, kind)).await;
    }
    let mut buffer = [0; 512];
    assert!(upstream.try_recv(&mut buffer).is_err(), "nothing was asked");
    assert_eq!(rig.handle.counters().local, 4);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn a_dead_resolver_is_passed_over_and_remembered() {
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let limits = Limits {
        upstream_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    let rig = start(vec![dead.local_addr().unwrap(), upstream().await], limits);
    for _ in 0..3 {
        let reply = udp(rig.addr, &question("example.com.", RecordType::A)).await;
        assert_eq!(data(&reply), ["192.0.2.1"]);
    }
    let mut buffer = [0; 512];
    assert!(dead.try_recv(&mut buffer).is_ok());
    assert!(
        dead.try_recv(&mut buffer).is_err(),
        "asked once, then no more"
    );
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn a_flood_of_forwarded_queries_is_bounded_and_own_names_go_on() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let limits = Limits {
        in_flight_per_client: 5,
        ..Limits::default()
    };
    let rig = start(vec![silent.local_addr().unwrap()], limits);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..20 {
        let request = question(&format!("silent{n}.example.com."), RecordType::A);
        socket
            .send_to(&request.to_vec().unwrap(), rig.addr)
            .await
            .unwrap();
    }
    let mut buffer = [0; 512];
    for _ in 0..15 {
        let (length, _) = timeout(SOON, socket.recv_from(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        let reply = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(rig.handle.counters().busy, 15);
    let asked = std::time::Instant::now();
    assert_eq!(
        data(&udp(rig.addr, &question("web.", RecordType::A)).await),
        ["10.47.0.9"]
    );
    assert!(asked.elapsed() < Duration::from_millis(500));
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn a_client_that_asks_too_often_is_not_heard() {
    let rig = start(
        Vec::new(),
        Limits {
            per_client_rate: 10,
            ..Limits::default()
        },
    );
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let request = question("web.", RecordType::A).to_vec().unwrap();
    for _ in 0..100 {
        socket.send_to(&request, rig.addr).await.unwrap();
    }
    let counters = rig.handle.shared_counters();
    timeout(SOON, async {
        while counters.snapshot().queries < 100 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(rig.handle.counters().rate_dropped >= 80);
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn tcp_connections_are_bounded_and_idle_ones_end() {
    let limits = Limits {
        tcp_per_client: 2,
        tcp_idle: Duration::from_millis(300),
        ..Limits::default()
    };
    let rig = start(Vec::new(), limits);
    let request = question("web.", RecordType::A).to_vec().unwrap();
    let mut first = TcpStream::connect(rig.addr).await.unwrap();
    let mut second = TcpStream::connect(rig.addr).await.unwrap();
    // Several queries on one connection (RFC 7766 §6.2.1).
    assert!(exchange(&mut first, &request).await.is_some());
    assert!(exchange(&mut first, &request).await.is_some());
    assert!(exchange(&mut second, &request).await.is_some());
    let mut third = TcpStream::connect(rig.addr).await.unwrap();
    assert!(exchange(&mut third, &request).await.is_none());
    assert_eq!(rig.handle.counters().tcp_refused, 1);
    let mut rest = Vec::new();
    timeout(SOON, first.read_to_end(&mut rest))
        .await
        .expect("an idle connection ends")
        .unwrap();
    assert!(
        exchange(&mut TcpStream::connect(rig.addr).await.unwrap(), &request)
            .await
            .is_some()
    );
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn garbage_hurts_nobody() {
    let rig = start(
        Vec::new(),
        Limits {
            per_client_rate: 1_000_000,
            ..Limits::default()
        },
    );
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let good = question("web.weft.internal.", RecordType::A)
        .to_vec()
        .unwrap();
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize
    };
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..=random() % 4 {
            let at = random() % bytes.len();
            bytes[at] = random() as u8;
        }
        bytes.truncate(random() % (bytes.len() + 1));
        socket.send_to(&bytes, rig.addr).await.unwrap();
        tokio::task::yield_now().await;
    }
    for bytes in [
        vec![],
        vec![0; 1],
        vec![0xff; 12],
        vec![0xff; 4096],
        vec![0xc0; 600],
    ] {
        socket.send_to(&bytes, rig.addr).await.unwrap();
        let mut stream = TcpStream::connect(rig.addr).await.unwrap();
        exchange(&mut stream, &bytes).await;
    }
    let mut twice = question("web.", RecordType::A);
    twice.add_query(Query::query(
        Name::from_ascii("db.").unwrap(),
        RecordType::A,
    ));
    let reply = udp_bytes(rig.addr, &twice.to_vec().unwrap()).await.unwrap();
    assert_eq!(reply[3] & 15, 1, "FORMERR");
    assert_eq!(
        data(&udp(rig.addr, &question("web.", RecordType::A)).await),
        ["10.47.0.9"]
    );
    assert_eq!(
        data(&tcp(rig.addr, &question("web.", RecordType::A)).await),
        ["10.47.0.9"]
    );
    rig.handle.shutdown().await;
}

#[tokio::test]
async fn after_shutdown_the_addresses_are_free_again() {
    let rig = start(Vec::new(), Limits::default());
    assert!(rig.addr.port() > 0);
    tcp(rig.addr, &question("web.", RecordType::A)).await;
    let addr = rig.addr;
    rig.handle.shutdown().await;
    Sockets::bind(&[addr.ip()], addr.port()).unwrap();
}
