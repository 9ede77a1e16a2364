//! The whole packet path on the real kernel: two carriers, two domains, one cable.

#![allow(clippy::unwrap_used)]

mod pair;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use pair::{PATIENCE, PORT, Pair, Under};
use socket2::{Domain, Protocol, Socket, Type};
use weft_carrier::{Carrier, CarrierConfig, CarrierError, CarrierEvent, Dropped};
use weft_core::underlay::{Offload, OffloadState};
use weft_core::wire::{ECHO_REPLY, ECHO_REQUEST, FrameKind};

/// Sends `text` from A's domain to B's and waits for it there.
fn pass(from: &UdpSocket, to: &UdpSocket, text: &[u8]) {
    from.send_to(text, to.local_addr().unwrap()).unwrap();
    assert!(receive(to) == text);
}

/// The next datagram.
fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = vec![0; 65536];
    loop {
        match socket.recv(&mut buffer) {
            Ok(len) => return buffer[..len].to_vec(),
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => panic!("it did not arrive: {err}"),
        }
    }
}

fn sockets(pair: &Pair) -> (UdpSocket, UdpSocket) {
    (
        pair.a.domain.udp(&format!("{}:0", pair.a.overlay)),
        pair.b.domain.udp(&format!("{}:7000", pair.b.overlay)),
    )
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Sends `bytes` each way over one TCP connection.
fn exchange(pair: &Pair, to: SocketAddr, bytes: &[u8]) {
    let listener = pair.b.domain.run(|| TcpListener::bind(to)).unwrap();
    let to = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got).unwrap();
            got
        });
        let connect = || TcpStream::connect_timeout(&to, PATIENCE);
        let mut stream = pair.a.domain.run(connect).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(server.join().unwrap() == bytes, "garbled on the way there");
        assert!(back == bytes, "garbled on the way back");
    });
}

#[test]
fn tcp_and_udp_of_both_versions_cross_both_underlays() {
    for under in [Under::V4, Under::V6] {
        let mut pair = Pair::new(under);
        pair.connect();
        let (from, to) = sockets(&pair);
        // 9,000 octets leave as fragments of the route's MTU, and 1 as itself.
        for len in [1, 500, 1352, 9000] {
            pass(&from, &to, &payload(len));
        }
        let v4 = SocketAddr::from((pair.b.overlay, 7001));
        let v6 = SocketAddr::from((pair.plan.v6(pair.b.overlay), 7001));
        exchange(&pair, v4, &payload(20_000_000));
        exchange(&pair, v6, &payload(20_000_000));
        for side in [&pair.a, &pair.b] {
            let counters = side.carrier().counters();
            let traffic = counters.peers[0].clone();
            assert!(traffic.tx_bytes > 40_000_000 && traffic.rx_bytes > 40_000_000);
            let unwanted: Vec<_> = counters
                .drops
                .iter()
                // B begins to try what the path takes a moment before A knows the session.
                .filter(|(reason, _)| {
                    let harmless = [Dropped::NotAPeer, Dropped::NotIp, Dropped::UnknownSession];
                    !harmless.contains(reason)
                })
                .collect();
            assert!(unwanted.is_empty(), "{unwanted:?}");
        }
    }
}

#[test]
fn datagrams_that_the_sender_leaves_to_be_cut_arrive_one_by_one() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let (from, to) = sockets(&pair);
    throw(&from, &to);
}

/// Thirty datagrams and a shorter one, given to the kernel as one.
fn throw(from: &UdpSocket, to: &UdpSocket) {
    let state = quinn_udp::UdpSocketState::new(from.into()).unwrap();
    let contents = payload(30_500);
    let transmit = quinn_udp::Transmit {
        destination: to.local_addr().unwrap(),
        ecn: None,
        contents: &contents,
        segment_size: Some(1000),
        src_ip: None,
    };
    state.try_send(from.into(), &transmit).unwrap();
    // quinn-udp leaves both sockets as it wants them.
    from.set_nonblocking(false).unwrap();
    for expected in contents.chunks(1000) {
        assert!(receive(to) == expected);
    }
}

/// A side that does without these from now on; its routes went with the TAP's last descriptor.
fn restart_without(pair: &mut Pair, without: &[Offload]) {
    pair.a.no_offload = without.to_vec();
    pair.a.start();
    pair.a.route_to(pair.b.overlay, &pair.plan, 1380);
    pair.connect();
}

#[test]
fn every_rung_of_the_ladder_carries_everything() {
    let single = Offload::ALL.map(|offload| vec![offload]);
    let rungs = single.into_iter().chain([Offload::ALL.to_vec()]);
    let mut pair = Pair::new(Under::V4);
    for without in rungs {
        restart_without(&mut pair, &without);
        let counters = pair.a.carrier().counters();
        for (offload, state) in &counters.offloads {
            let needs =
                without.contains(&Offload::Csum) && matches!(offload, Offload::Tso | Offload::Uso);
            let expected = match without.contains(offload) || needs {
                true => OffloadState::SwitchedOff,
                false => OffloadState::On,
            };
            assert_eq!(*state, expected, "{offload} without {without:?}");
        }
        let (from, to) = sockets(&pair);
        for len in [1, 100, 1352, 5000] {
            pass(&from, &to, &payload(len));
            to.send_to(&payload(len), from.local_addr().unwrap())
                .unwrap();
            assert!(receive(&from) == payload(len), "{without:?}");
        }
        let fresh = |side: &pair::Side| side.domain.udp(&format!("{}:0", side.overlay));
        throw(&fresh(&pair.a), &to);
        throw(&fresh(&pair.b), &from);
        for ip in [
            pair.b.overlay.into(),
            IpAddr::from(pair.plan.v6(pair.b.overlay)),
        ] {
            exchange(&pair, SocketAddr::new(ip, 0), &payload(3_000_000));
        }
        let drops = pair.a.carrier().counters().drops;
        // B went on trying what A's last session takes.
        let harmless = [Dropped::NotAPeer, Dropped::NotIp, Dropped::UnknownSession];
        let unwanted = |reason| !harmless.contains(&reason);
        assert!(
            !drops.iter().any(|(reason, _)| unwanted(*reason)),
            "{without:?}: {drops:?}"
        );
    }
}

/// Answers echo requests, as B's core would, until `done`.
fn answer_until(pair: &Pair, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "not in time");
        let Ok(event) = pair.b.events.recv_timeout(Duration::from_millis(10)) else {
            continue;
        };
        let CarrierEvent::Frame {
            from,
            kind,
            mut body,
            ..
        } = event
        else {
            continue;
        };
        if kind == FrameKind::Probe as u8 && body[0] == ECHO_REQUEST {
            body[0] = ECHO_REPLY;
            let mut datagram = Vec::new();
            let transport = pair.b.transport.as_ref().unwrap();
            transport
                .seal(FrameKind::Probe, &body[..9], &mut datagram)
                .unwrap();
            pair.b
                .carrier()
                .send(from.direct().unwrap(), &datagram)
                .unwrap();
        }
    }
}

#[test]
fn where_runs_vanish_on_the_way_they_are_given_up_and_taken_up_again() {
    let mut pair = Pair::new(Under::V4);
    // What a broken card does: the run is taken, and nothing of it arrives.
    let swallow = "add table netdev broken { chain in { type filter hook ingress device \"cable\" priority 0; \
                   meta length > 2000 drop; }; }";
    let nft = |pair: &Pair, rules: &str| {
        let output = pair.b.host.run(|| Command::new("nft").arg(rules).output());
        let output = output.expect("these tests need nftables");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "nft {rules}: {error}");
    };
    nft(&pair, swallow);
    pair.connect();
    // It is tried once there is something to send.
    let (from, there) = sockets(&pair);
    let begin = || from.send_to(b"first", there.local_addr().unwrap()).unwrap();
    begin();
    let gso = |pair: &Pair| pair.a.carrier().counters().peers[0].gso;
    answer_until(&pair, || gso(&pair) == OffloadState::Failing);
    let to = SocketAddr::from((pair.b.overlay, 0));
    exchange(&pair, to, &payload(1_000_000));
    nft(&pair, "delete table netdev broken");
    pair.connect();
    begin();
    answer_until(&pair, || gso(&pair) == OffloadState::On);
    exchange(&pair, to, &payload(1_000_000));
}

#[test]
fn a_first_packet_waits_for_the_session() {
    let mut pair = Pair::new(Under::V4);
    let (from, to) = sockets(&pair);
    pair.know();
    from.send_to(b"first", to.local_addr().unwrap()).unwrap();
    let wanted = CarrierEvent::Wanted(pair.a.number);
    pair.a.event(|event| *event == wanted);
    pair.connect();
    assert_eq!(receive(&to), b"first");
}

#[test]
fn what_waits_in_vain_is_counted() {
    let pair = Pair::new(Under::V4);
    let (from, to) = sockets(&pair);
    pair.know();
    for _ in 0..100 {
        from.send_to(b"nobody", to.local_addr().unwrap()).unwrap();
    }
    let counted = |reason| pair.a.carrier().counters().dropped(reason);
    until("the queue has a bound", || {
        counted(Dropped::QueueFull) == 36
    });
    until("nothing waits for ever", || {
        counted(Dropped::NoSession) == 64
    });
}

/// Everything that crosses the cable at B's end.
fn capture(pair: &Pair) -> Socket {
    // ETH_P_ALL in network order.
    let all = Protocol::from(i32::from(0x0003u16.to_be()));
    let socket = pair
        .b
        .host
        .run(|| Socket::new(Domain::PACKET, Type::RAW, Some(all)))
        .unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The next UDP payload that B's port gets, as captured.
fn captured_datagram(capture: &Socket) -> Vec<u8> {
    let mut frame = vec![0; 65536];
    loop {
        let len = (&*capture).read(&mut frame).expect("nothing captured");
        let frame = &frame[..len];
        // Trials of what the path takes are full-sized.
        let is_ours = (42..1000).contains(&len)
            && frame[12..14] == [8, 0]
            && frame[23] == 17
            && frame[36..38] == PORT.to_be_bytes();
        if is_ours {
            return frame[42..].to_vec();
        }
    }
}

#[test]
fn forged_and_replayed_datagrams_get_nothing_through_and_nothing_is_in_clear() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let (from, to) = sockets(&pair);
    let capture = capture(&pair);
    let secret = b"the quick brown fox jumps over the lazy dog";
    pass(&from, &to, secret);
    let datagram = captured_datagram(&capture);
    assert_eq!(datagram[0], 4, "a data datagram");
    for part in [
        &secret[..8],
        &pair.a.overlay.octets(),
        &pair.b.overlay.octets(),
    ] {
        assert!(!datagram.windows(part.len()).any(|window| window == part));
    }
    let attacker = pair.a.host.udp("0.0.0.0:0");
    let victim = pair.b.addr(Under::V4);
    let forgeries = datagram.len();
    for place in 0..forgeries {
        let mut forged = datagram.clone();
        forged[place] ^= 0x40;
        attacker.send_to(&forged, victim).unwrap();
        attacker.send_to(&datagram, victim).unwrap();
        attacker.send_to(&datagram[..place], victim).unwrap();
    }
    let counters = || pair.b.carrier().counters();
    until("all replays are counted", || {
        counters().dropped(Dropped::Replayed) == forgeries as u64
    });
    until("all forgeries are counted", || {
        let seen: u64 = [
            Dropped::Forged,
            Dropped::UnknownSession,
            Dropped::UnknownDatagram,
        ]
        .map(|reason| counters().dropped(reason))
        .iter()
        .sum();
        // One of the cut ones is empty, and nothing to count.
        seen == 2 * forgeries as u64 - 1
    });
    assert_eq!(counters().peers[0].rx_packets, 1);
    to.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert!(to.recv(&mut [0; 100]).is_err());
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    pass(&from, &to, b"and the session is none the worse");
}

#[test]
fn a_peer_can_send_only_from_its_own_addresses() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let foreign = ["10.34.0.1", "10.33.0.99"];
    let (_, to) = sockets(&pair);
    for (done, address) in foreign.iter().enumerate() {
        pair.a.domain.ip(&format!("addr add {address}/32 dev lo"));
        let from = pair.a.domain.udp(&format!("{address}:0"));
        from.send_to(b"spoofed", to.local_addr().unwrap()).unwrap();
        until("the spoofed packet is counted", || {
            pair.b.carrier().counters().dropped(Dropped::ForeignSource) == done as u64 + 1
        });
    }
    // A client of a published port keeps its address; whom it reaches is for the domain's rules to say.
    pair.a.domain.ip("addr add 198.51.100.7/32 dev lo");
    let from = pair.a.domain.udp("198.51.100.7:0");
    pass(&from, &to, b"from outside");
}

#[test]
fn a_restart_adopts_the_device_and_goes_on() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let (from, to) = sockets(&pair);
    pass(&from, &to, b"before");
    let index = |pair: &Pair| {
        pair.a
            .domain
            .run(|| nix::net::if_::if_nametoindex("wu0"))
            .unwrap()
    };
    let before = index(&pair);
    pair.a.start();
    assert_eq!(index(&pair), before);
    // The kernel took the routes along when the last descriptor went.
    pair.a.route_to(pair.b.overlay, &pair.plan, 1380);
    pair.connect();
    pass(&from, &to, b"after");
    let link = pair.a.domain.ip("link show wu0");
    assert!(
        link.contains("mtu 9000") && link.contains("02:77:00:00:00:00"),
        "{link}"
    );
}

#[test]
fn the_core_gets_handshakes_and_frames_and_hears_of_other_addresses() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let hello: Vec<u8> = [1, 1, 0, 0].into_iter().chain([9; 200]).collect();
    pair.a
        .carrier()
        .send(pair.b.addr(Under::V4).into(), &hello)
        .unwrap();
    let from = pair.a.addr(Under::V4);
    let expected = CarrierEvent::Handshake {
        from: from.into(),
        bytes: hello,
    };
    pair.b.event(|event| *event == expected);
    // The same session from another address of A's host.
    pair.a.host.ip("addr add 192.0.2.77/24 dev cable");
    pair.a
        .host
        .ip("route change 192.0.2.0/24 dev cable src 192.0.2.77");
    let carrier = pair.a.carrier();
    pair.a.host.run(|| carrier.follow_routes());
    let (from, to) = sockets(&pair);
    pass(&from, &to, b"moved");
    let moved = pair
        .b
        .event(|event| matches!(event, CarrierEvent::Moved { .. }));
    let elsewhere: SocketAddr = format!("192.0.2.77:{PORT}").parse().unwrap();
    assert!(
        matches!(moved, CarrierEvent::Moved { local_index: 101, from } if from == elsewhere.into())
    );
}

#[test]
fn a_narrow_path_is_reported_and_its_mtu_known() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let (from, to) = sockets(&pair);
    let path = pair.b.addr(Under::V4);
    assert_eq!(pair.a.carrier().path_mtu(path), Some(1500));
    pair.a.host.ip("link set cable mtu 1300");
    assert_eq!(pair.a.carrier().path_mtu(path), Some(1300));
    from.send_to(&payload(1352), to.local_addr().unwrap())
        .unwrap();
    let number = pair.a.number;
    let too_big = CarrierEvent::TooBig { number, to: path };
    pair.a.event(|event| *event == too_big);
    pair.a.route_to(pair.b.overlay, &pair.plan, 1300 - 28 - 33);
    pass(&from, &to, &payload(1200));
    assert_eq!(pair.a.carrier().counters().dropped(Dropped::TooBig), 1);
}

#[test]
fn a_successor_s_first_packets_are_those_that_nobody_read() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    let (from, to) = sockets(&pair);
    pass(&from, &to, b"before");
    let neighbours = |pair: &Pair| pair.a.domain.ip("neigh show dev wu0 nud permanent");
    let before = neighbours(&pair);
    assert!(before.contains("PERMANENT"), "{before}");

    let given = pair.a.carrier().descriptors().unwrap();
    pair.a.carrier = None;
    from.send_to(b"meanwhile", to.local_addr().unwrap())
        .unwrap();
    pair.a.start_with(given);
    // It reads nothing before it is told whose it is.
    from.send_to(b"too early", to.local_addr().unwrap())
        .unwrap();
    pair.connect();
    assert_eq!(receive(&to), b"meanwhile");
    assert_eq!(receive(&to), b"too early");
    pass(&from, &to, b"after");
    // Next hops, routes and neighbours are as they were: the device has never lost its carrier.
    assert_eq!(neighbours(&pair), before);
}

#[test]
fn a_queue_of_another_device_is_not_taken() {
    let mut pair = Pair::new(Under::V4);
    let other = Pair::new(Under::V4);
    let foreign = other.a.carrier().descriptors().unwrap();
    pair.a.start_with(foreign);
    pair.a.route_to(pair.b.overlay, &pair.plan, 1380);
    pair.connect();
    let (from, to) = sockets(&pair);
    pass(&from, &to, b"through its own");
}

#[test]
fn a_device_in_use_is_not_shared() {
    let pair = Pair::new(Under::V4);
    let config = CarrierConfig::new(pair.a.domain.fd(), 0);
    let again = pair.a.host.run(|| Carrier::start(config, Box::new(drop)));
    let error = again.expect_err("two readers would each get half of the packets");
    assert!(matches!(error, CarrierError::Tap { .. }), "{error}");
}

#[test]
fn a_removed_device_is_reported() {
    let pair = Pair::new(Under::V4);
    pair.a.domain.ip("link del wu0");
    pair.a.event(|event| *event == CarrierEvent::TapLost);
}

#[test]
fn a_taken_port_is_an_error_that_says_so() {
    let pair = Pair::new(Under::V4);
    let domain = pair.a.domain.fd();
    let again = pair
        .a
        .host
        .run(|| Carrier::start(CarrierConfig::new(domain, PORT), Box::new(drop)));
    assert!(matches!(again, Err(CarrierError::PortTaken { port: PORT })));
}

#[test]
fn a_host_without_ipv6_goes_on_with_ipv4() {
    let (host, domain) = (pair::Netns::new(), pair::Netns::new());
    host.sysctl("ipv6/conf/all/disable_ipv6", "1");
    let config = CarrierConfig {
        bind_v6: "::1".parse().unwrap(),
        ..CarrierConfig::new(domain.fd(), PORT)
    };
    let carrier = host.run(|| Carrier::start(config, Box::new(drop))).unwrap();
    assert!(!carrier.has_v6());
    assert_eq!(carrier.port(), PORT);
    carrier.stop();
}

/// One stream for three seconds each way of doing it; run by hand with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    for streams in [1, 4] {
        println!("{streams} streams: {:.2} Gbit/s", measure(&pair, streams));
    }
    println!("{:?}", pair.a.carrier().counters());
    println!("{:?}", pair.b.carrier().counters());
}

fn measure(pair: &Pair, streams: usize) -> f64 {
    let to = SocketAddr::from((pair.b.overlay, 7002));
    let listener = pair.b.domain.run(|| TcpListener::bind(to)).unwrap();
    let start = Instant::now();
    let bytes: usize = std::thread::scope(|scope| {
        for _ in 0..streams {
            let mut stream = pair.a.domain.run(|| TcpStream::connect(to)).unwrap();
            scope.spawn(move || {
                let block = vec![7; 1 << 20];
                while start.elapsed() < Duration::from_secs(3) {
                    stream.write_all(&block).unwrap();
                }
            });
        }
        let readers: Vec<_> = (0..streams)
            .map(|_| {
                let (mut stream, _) = listener.accept().unwrap();
                scope.spawn(move || {
                    let mut block = vec![0; 1 << 20];
                    let mut total = 0;
                    while let Ok(len @ 1..) = stream.read(&mut block) {
                        total += len;
                    }
                    total
                })
            })
            .collect();
        readers.into_iter().map(|r| r.join().unwrap()).sum()
    });
    bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
}
