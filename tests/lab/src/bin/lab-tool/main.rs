//! What runs inside the lab's hosts and containers: a server that says whom it sees, clients that choose their own
//! source port, senders of bad datagrams, a resolver that knows two names. One small program, so that the lab needs no
//! interpreter and no netcat dialect.

mod load;
mod manager;
mod runs;
mod steady;
mod strangers;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Error, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage:
  lab-tool serve --name NAME [--port PORT]      TCP and UDP: answers `NAME CLIENT PORT text`, HTTP too
  lab-tool ask tcp|udp ADDR:PORT [--from ADDR:PORT] [--text T] [--wait SECS]
  lab-tool hold ADDR:PORT [--from ADDR:PORT]    one TCP connection, a question every 100 ms, for ever
  lab-tool count ADDR:PORT N [--text T]         N numbered datagrams, no answer awaited
  lab-tool throw ADDR:PORT N                    N datagrams of all lengths, some in a row of one length
  lab-tool catch PORT N                         takes those of `throw`; prints `N whole, B broken, late: [], lost: []`
  lab-tool pour ADDR:PORT MIB                   so much over one TCP connection; prints what `drain` says
  lab-tool drain PORT                           takes it, connection after connection; says `N octets, whole`
  lab-tool tick ADDR:PORT MILLIS                numbered datagrams, one every so often, for ever
  lab-tool tally PORT                           takes those of `tick`; after each `number N missing M`
  lab-tool flow ADDR:PORT                       one TCP connection, written to without a pause, for ever
  lab-tool follow PORT                          takes that of `flow` and checks it; prints `octets N` as it goes
  lab-tool gush ADDR:PORT MILLIS                one TCP connection, filled for so long
  lab-tool gulp PORT                            takes those of `gush`; prints `at MICROS octets N` as it goes
  lab-tool visit ADDR:PORT MILLIS               TCP connections, one after the other; prints how many
  lab-tool host PORT                            takes those of `visit` and ends each at once
  lab-tool runs ADDR:PORT LENGTH MILLIS         datagrams of that length, many a call (GSO); prints `sent N came M millis T`
  lab-tool take-runs PORT                       counts those of `runs`
  lab-tool flood ADDR:PORT init|join|cookie|data|junk|all FROM[/LEN] RATE MILLIS [--aside PORT]
                                                strangers' datagrams from addresses of that network, so many a second;
                                                in turn to the other port; prints `at MICROS port PORT` when it turns
  lab-tool strangers ADDR:PORT N idle|junk|slow TCP connections; says when they are open and when all are closed
  lab-tool manage SOCKET CMD...                 runs CMD as systemd runs a service that is told of and keeps descriptors
  lab-tool garbage ADDR:PORT N SEED             N random datagrams; prints how many answers came back
  lab-tool replay FILE [--flip|--exact]         sends recorded IPv4 packets (with --exact IPv6, too) again without their UDP checksums, with one bit
                                                changed, or to the last octet as they are
  lab-tool payload FILE ADDR:PORT N             the file's octets in one datagram, N times, as any user may
  lab-tool dns ADDR:PORT                        a resolver: nx* does not exist, all else is 198.18.0.1";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lab-tool: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", rest @ ..] => serve(
            flag(rest, "--name").unwrap_or("server"),
            flag(rest, "--port").unwrap_or("80").parse()?,
        ),
        ["ask", proto, to, rest @ ..] => ask(proto, to.parse()?, rest),
        ["hold", to, rest @ ..] => hold(to.parse()?, from(rest)?),
        ["count", to, n, rest @ ..] => {
            count(to.parse()?, n.parse()?, flag(rest, "--text").unwrap_or("n"))
        }
        ["throw", to, n] => throw(to.parse()?, n.parse()?),
        ["catch", port, n] => catch(port.parse()?, n.parse()?),
        ["pour", to, mib] => pour(to.parse()?, mib.parse()?),
        ["drain", port] => drain(port.parse()?),
        ["tick", to, millis] => steady::tick(to.parse()?, millis.parse()?),
        ["tally", port] => steady::tally(port.parse()?),
        ["flow", to] => steady::flow(to.parse()?),
        ["follow", port] => steady::follow(port.parse()?),
        ["gush", to, millis] => load::gush(to.parse()?, millis.parse()?),
        ["gulp", port] => load::gulp(port.parse()?),
        ["visit", to, millis] => load::visit(to.parse()?, millis.parse()?),
        ["runs", to, length, millis] => runs::send(to.parse()?, length.parse()?, millis.parse()?),
        ["take-runs", port] => runs::take(port.parse()?),
        ["host", port] => load::host(port.parse()?),
        ["flood", to, kind, from, rate, millis, rest @ ..] => {
            let aside = flag(rest, "--aside").map(str::parse).transpose()?;
            let (rate, millis) = (rate.parse()?, millis.parse()?);
            let flood = load::Flood {
                kind,
                from,
                rate,
                millis,
            };
            load::flood(to.parse()?, aside, &flood)
        }
        ["strangers", to, n, manner] => strangers::strangers(to.parse()?, n.parse()?, manner),
        ["manage", socket, command @ ..] => manager::manage(socket, command),
        ["garbage", to, n, seed] => garbage(to.parse()?, n.parse()?, seed.parse()?),
        ["replay", file, rest @ ..] => replay(file, rest),
        ["payload", file, to, n] => payload(file, to.parse()?, n.parse()?),
        ["dns", at] => dns(at.parse()?),
        _ => Err(USAGE.into()),
    }
}

fn flag<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    let at = words.iter().position(|w| *w == name)?;
    words.get(at + 1).copied()
}

fn from(words: &[&str]) -> Result<Option<SocketAddr>> {
    Ok(flag(words, "--from").map(str::parse).transpose()?)
}

/// An address as the wire has it: `::ffff:192.0.2.1` is an IPv4 client of a dual-stack socket.
fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn dual_stack(kind: Type, port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, kind, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(SocketAddr::from((
        Ipv6Addr::UNSPECIFIED,
        port,
    ))))?;
    Ok(socket)
}

fn serve(name: &str, port: u16) -> Result<()> {
    let listener = dual_stack(Type::STREAM, port)?;
    listener.listen(128)?;
    let listener = TcpListener::from(listener);
    let datagrams = UdpSocket::from(dual_stack(Type::DGRAM, port)?);
    let owned = name.to_owned();
    std::thread::spawn(move || serve_udp(&owned, &datagrams));
    say("ready");
    loop {
        let (stream, _) = listener.accept()?;
        let owned = name.to_owned();
        std::thread::spawn(move || {
            if let Err(e) = serve_tcp(&owned, stream) {
                eprintln!("connection: {e}");
            }
        });
    }
}

fn serve_udp(name: &str, socket: &UdpSocket) {
    let mut buffer = [0u8; 65536];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        let peer = plain(client);
        let text = String::from_utf8_lossy(&buffer[..length])
            .trim_end()
            .to_owned();
        say(&format!("udp {} {} {text}", peer.ip(), peer.port()));
        let answer = format!("{name} {} {} {text}\n", peer.ip(), peer.port());
        if let Err(e) = socket.send_to(answer.as_bytes(), client) {
            eprintln!("udp answer to {client}: {e}");
        }
    }
}

fn serve_tcp(name: &str, stream: TcpStream) -> Result<()> {
    let peer = plain(stream.peer_addr()?);
    let mut writer = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let line = line.trim_end();
        say(&format!("tcp {} {} {line}", peer.ip(), peer.port()));
        if let Some(request) = line.strip_prefix("GET ") {
            return serve_http(name, peer, request, &mut writer);
        }
        writeln!(writer, "{name} {} {} {line}", peer.ip(), peer.port())?;
    }
    Ok(())
}

fn serve_http(name: &str, peer: SocketAddr, request: &str, writer: &mut TcpStream) -> Result<()> {
    let path = request.split(' ').next().unwrap_or("/");
    let body = match path.strip_prefix("/bytes/") {
        Some(n) => vec![b'x'; n.parse()?],
        None => format!("{name} {} {}\n", peer.ip(), peer.port()).into_bytes(),
    };
    write!(
        writer,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    writer.write_all(&body)?;
    writer.shutdown(std::net::Shutdown::Write)?;
    // The client's headers are read to the end: closing with unread octets would reset the connection.
    writer.set_read_timeout(Some(Duration::from_secs(5)))?;
    std::io::copy(writer, &mut std::io::sink())?;
    Ok(())
}

fn ask(proto: &str, to: SocketAddr, rest: &[&str]) -> Result<()> {
    let text = flag(rest, "--text").unwrap_or("hello");
    let wait = Duration::from_secs(flag(rest, "--wait").unwrap_or("5").parse()?);
    let answer = match proto {
        "tcp" => ask_tcp(to, from(rest)?, text, wait)?,
        "udp" => ask_udp(to, from(rest)?, text, wait)?,
        other => return Err(format!("{other} is neither tcp nor udp").into()),
    };
    say(answer.trim_end());
    Ok(())
}

fn connect(to: SocketAddr, from: Option<SocketAddr>, wait: Duration) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(from) = from {
        // Two connections to different servers from one port is what some scenarios are about.
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(from))?;
    }
    socket.connect_timeout(&SockAddr::from(to), wait)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(wait))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn ask_tcp(to: SocketAddr, from: Option<SocketAddr>, text: &str, wait: Duration) -> Result<String> {
    let mut stream = connect(to, from, wait)?;
    writeln!(stream, "{text}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if answer.is_empty() {
        Err("closed without an answer".into())
    } else {
        Ok(answer)
    }
}

fn udp_socket(to: SocketAddr, from: Option<SocketAddr>) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    let any = match to.ip() {
        IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SockAddr::from(from.unwrap_or(any)))?;
    Ok(UdpSocket::from(socket))
}

/// Sends again every half second: the network may lose a datagram, the scenario is not about that. Nor is it that a first
/// datagram is larger than the way: the kernel has been told by then, and cuts the next.
fn ask_udp(to: SocketAddr, from: Option<SocketAddr>, text: &str, wait: Duration) -> Result<String> {
    let socket = udp_socket(to, from)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let end = Instant::now() + wait;
    let mut buffer = [0u8; 65536];
    while Instant::now() < end {
        let answer = match socket.send(text.as_bytes()) {
            Ok(_) => socket.recv(&mut buffer),
            Err(e) => Err(e),
        };
        match answer {
            Ok(length) => return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned()),
            Err(e) if would_block(&e) || is_too_long(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(format!("no answer within {wait:?}").into())
}

fn is_too_long(e: &Error) -> bool {
    // EMSGSIZE
    e.raw_os_error() == Some(90)
}

fn would_block(e: &Error) -> bool {
    matches!(
        e.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
    )
}

fn hold(to: SocketAddr, from: Option<SocketAddr>) -> Result<()> {
    let mut stream = connect(to, from, Duration::from_secs(10))?;
    // Longer than any restart in a scenario: TCP's own retransmissions carry the connection over it.
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    for n in 1u64.. {
        writeln!(stream, "{n}")?;
        let mut answer = String::new();
        reader.read_line(&mut answer)?;
        if !answer.trim_end().ends_with(&format!(" {n}")) {
            return Err(format!("wanted the echo of {n}, got \"{}\"", answer.trim_end()).into());
        }
        say(&format!("ok {n} {}", answer.trim_end()));
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn count(to: SocketAddr, n: u32, text: &str) -> Result<()> {
    let socket = udp_socket(to, None)?;
    for i in 0..n {
        socket.send_to(format!("{text}-{i}").as_bytes(), to)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Datagram `n` of those that are thrown: its number, then octets that no other one has. Seven in a row are of one length,
/// from one that shares its packet with others to one that nearly fills it, on either underlay (a longer one the kernel would
/// send in fragments, which overtake others).
fn ball(n: u32) -> Vec<u8> {
    let length = 4 + (n / 7).wrapping_mul(389) % 1360;
    let fill = (4..length).map(|at| (n.wrapping_mul(31) ^ at.wrapping_mul(7)) as u8);
    n.to_be_bytes().into_iter().chain(fill).collect()
}

fn throw(to: SocketAddr, n: u32) -> Result<()> {
    let socket = udp_socket(to, None)?;
    for i in 0..n {
        socket.send_to(&ball(i), to)?;
        // As fast as they go, but no more than a receiver's buffer holds.
        if i % 32 == 31 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

fn catch(port: u16, n: u32) -> Result<()> {
    let socket = UdpSocket::from(dual_stack(Type::DGRAM, port)?);
    // What is lost shall be the network's fault, not that of a machine too busy to let this program run.
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
    say("ready");
    let (mut whole, mut late) = (BTreeSet::new(), Vec::new());
    let (mut broken, mut next) = (0, 0);
    let mut buffer = [0u8; 65536];
    while whole.len() < usize::try_from(n)? {
        let length = match socket.recv(&mut buffer) {
            Err(e) if would_block(&e) => break,
            other => other?,
        };
        // From the first one on; how long that takes is the scenario's affair.
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        let number = buffer[..length]
            .first_chunk()
            .map(|b| u32::from_be_bytes(*b));
        let Some(number) = number.filter(|number| buffer[..length] == ball(*number)) else {
            broken += 1;
            continue;
        };
        whole.insert(number);
        if number < next {
            late.push(number);
        }
        next = number + 1;
    }
    let lost: Vec<u32> = (0..n).filter(|number| !whole.contains(number)).collect();
    let count = whole.len();
    say(&format!(
        "{count} whole, {broken} broken, late: {late:?}, lost: {lost:?}"
    ));
    Ok(())
}

/// The octet at a place of what is poured: no two stretches are alike, whatever they are cut into.
fn drop_of(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16).wrapping_mul(0x9d) as u8
}

fn pour(to: SocketAddr, mib: usize) -> Result<()> {
    let mut stream = connect(to, None, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let total = mib << 20;
    for start in (0..total).step_by(1 << 16) {
        let octets: Vec<u8> = (start..start + (1 << 16)).map(drop_of).collect();
        stream.write_all(&octets)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    say(answer.trim_end());
    Ok(())
}

fn drain(port: u16) -> Result<()> {
    let listener = dual_stack(Type::STREAM, port)?;
    listener.listen(128)?;
    let listener = TcpListener::from(listener);
    say("ready");
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || {
            let answer = match drained(&mut stream) {
                Ok(answer) => answer,
                Err(error) => error.to_string(),
            };
            // Whoever is gone does not wait for it.
            let _ = writeln!(stream, "{answer}");
        });
    }
    Ok(())
}

fn drained(stream: &mut TcpStream) -> Result<String> {
    let (mut at, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(format!("{at} octets, whole"));
        }
        let wrong = (0..length).find(|n| buffer[*n] != drop_of(at + n));
        if let Some(wrong) = wrong {
            return Ok(format!("broken at {}", at + wrong));
        }
        at += length;
    }
}

/// xorshift64*: bad datagrams must be the same ones in each run.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

fn garbage(to: SocketAddr, n: u32, seed: u64) -> Result<()> {
    let mut dice = Dice(seed | 1);
    let socket = udp_socket(to, None)?;
    for i in 0..n {
        let length = usize::try_from(dice.next() % 1400)?;
        let mut bytes = dice.bytes(length);
        // Half of them begin as weft's own might: every value of the first octet, the rest noise.
        if let Some(first) = bytes.first_mut().filter(|_| i % 2 == 0) {
            *first = i.to_be_bytes()[3];
        }
        socket.send_to(&bytes, to)?;
        if i % 64 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    say(&answers(&socket, Duration::from_secs(2))?.to_string());
    Ok(())
}

fn answers(socket: &UdpSocket, wait: Duration) -> Result<u32> {
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (end, mut heard) = (Instant::now() + wait, 0);
    let mut buffer = [0u8; 2048];
    while Instant::now() < end {
        match socket.recv_from(&mut buffer) {
            Ok(_) => heard += 1,
            Err(e) if would_block(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(heard)
}

/// The file holds packets one after the other, each behind its length in two octets.
fn replay(file: &str, flags: &[&str]) -> Result<()> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.read_to_end(&mut bytes)?;
    // Who opens one of this protocol lays the IP header, too (raw(7); RFC 3542 §3 leaves that to the system).
    let [v4, v6] = [Domain::IPV4, Domain::IPV6]
        .map(|domain| Socket::new(domain, Type::RAW, Some(Protocol::from(255))));
    let (v4, v6) = (v4?, v6?);
    let mut dice = Dice(7);
    let (mut rest, mut sent) = (&bytes[..], 0);
    while let Some((head, body)) = rest.split_at_checked(2) {
        let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
        let (packet, next) = body.split_at_checked(length).ok_or("a torn file")?;
        rest = next;
        let mut packet = packet.to_vec();
        if !flags.contains(&"--exact") {
            // Recorded before a card would have filled it in; none at all is as good (RFC 768), and it must arrive.
            packet.get_mut(26..28).ok_or("a short packet")?.fill(0);
        }
        if flags.contains(&"--flip") {
            flip_one_bit(&mut packet, &mut dice)?;
        }
        let (socket, to) = match packet.first().map(|first| first >> 4) {
            Some(6) => {
                let to: [u8; 16] = packet.get(24..40).ok_or("a short packet")?.try_into()?;
                (&v6, IpAddr::from(to))
            }
            _ => {
                let to: [u8; 4] = packet.get(16..20).ok_or("a short packet")?.try_into()?;
                (&v4, IpAddr::from(to))
            }
        };
        socket.send_to(&packet, &SockAddr::from(SocketAddr::new(to, 0)))?;
        sent += 1;
    }
    say(&sent.to_string());
    Ok(())
}

fn payload(file: &str, to: SocketAddr, n: u32) -> Result<()> {
    let bytes = std::fs::read(file)?;
    let socket = udp_socket(to, None)?;
    let mut sent = 0;
    for _ in 0..n {
        // The host's filter answers some with an error; that is what the scenario is about.
        sent += u32::from(socket.send_to(&bytes, to).is_ok());
        std::thread::sleep(Duration::from_millis(1));
    }
    say(&sent.to_string());
    Ok(())
}

/// Changes one bit of the UDP payload.
fn flip_one_bit(packet: &mut [u8], dice: &mut Dice) -> Result<()> {
    let payload = 28;
    if packet.len() <= payload {
        return Ok(());
    }
    let at = payload + usize::try_from(dice.next() % u64::try_from(packet.len() - payload)?)?;
    packet[at] ^= 1 << (dice.next() % 8);
    Ok(())
}

/// A resolver of the outside: RFC 1035 §4.1, one question, A records only.
fn dns(at: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(at)?;
    say("ready");
    let mut buffer = [0u8; 1500];
    loop {
        let (length, client) = socket.recv_from(&mut buffer)?;
        if let Some(answer) = dns_answer(&buffer[..length]) {
            socket.send_to(&answer, client)?;
        }
    }
}

fn dns_answer(query: &[u8]) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut name = String::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        name.push_str(&String::from_utf8_lossy(query.get(at..at + length)?));
        name.push('.');
        at += length;
    }
    let question = query.get(12..at + 4)?;
    let is_a = query.get(at..at + 2)? == [0, 1];
    say(&format!("asked {}", name.to_ascii_lowercase()));
    let missing = name.to_ascii_lowercase().starts_with("nx");
    let found = is_a && !missing;
    let mut answer = query.get(..2)?.to_vec();
    answer.extend([
        0x81,
        if missing { 0x83 } else { 0x80 },
        0,
        1,
        0,
        u8::from(found),
        0,
        0,
        0,
        0,
    ]);
    answer.extend(question);
    if found {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 198, 18, 0, 1]);
    }
    Some(answer)
}

/// Prints and flushes: the reader follows a file.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // A closed output is the reader's choice; the server goes on.
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}
