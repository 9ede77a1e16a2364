//! Load: a stream as fast as it goes, and strangers' datagrams at a steady rate beside it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Dice, Result, connect, dual_stack, say};

/// Octets written or read at a time.
const BLOCK: usize = 128 * 1024;
const SAY_EVERY: Duration = Duration::from_millis(10);
/// Datagrams go out in bursts this far apart, so that the sender sleeps most of the time.
const BURST: Duration = Duration::from_millis(2);
/// Different datagrams of a flood, before they are altered.
const STOCK: usize = 1024;
/// So long it goes to one port, then to the other.
const TURN: Duration = Duration::from_millis(300);
/// `struct udphdr` behind an IPv4 header without options.
const HEADERS: usize = 28;

/// One TCP connection, filled as fast as it takes it for `millis`.
pub(super) fn gush(to: SocketAddr, millis: u64) -> Result<()> {
    let mut stream = connect(to, None, Duration::from_secs(10))?;
    let block = vec![0x55; BLOCK];
    let end = Instant::now() + Duration::from_millis(millis);
    while Instant::now() < end {
        stream.write_all(&block)?;
    }
    Ok(())
}

/// Takes the streams of [`gush`], one after the other, and says all the time how much has come by when.
pub(super) fn gulp(port: u16) -> Result<()> {
    let listener = dual_stack(Type::STREAM, port)?;
    listener.listen(8)?;
    let listener = TcpListener::from(listener);
    say("ready");
    let mut octets = 0;
    for stream in listener.incoming() {
        if let Err(error) = swallow(stream?, &mut octets) {
            eprintln!("gulp: {error}");
        }
    }
    Ok(())
}

fn swallow(mut stream: TcpStream, octets: &mut u64) -> Result<()> {
    let mut block = vec![0; BLOCK];
    let mut said = Instant::now();
    loop {
        match stream.read(&mut block)? {
            0 => return Ok(()),
            length => *octets += length as u64,
        }
        if said.elapsed() >= SAY_EVERY {
            said = Instant::now();
            say(&format!("at {} octets {octets}", micros()?));
        }
    }
}

/// Opens connections one after the other for `millis`, waits for the end of each, and prints how many there were.
pub(super) fn visit(to: SocketAddr, millis: u64) -> Result<()> {
    let end = Instant::now() + Duration::from_millis(millis);
    let mut visits = 0u64;
    while Instant::now() < end {
        let mut stream = connect(to, None, Duration::from_secs(3))?;
        stream.read_to_end(&mut Vec::new())?;
        visits += 1;
    }
    say(&visits.to_string());
    Ok(())
}

/// Ends every connection as soon as it is there, so that the visitor's ports are free again at once.
pub(super) fn host(port: u16) -> Result<()> {
    let listener = dual_stack(Type::STREAM, port)?;
    listener.listen(128)?;
    say("ready");
    loop {
        drop(listener.accept()?);
    }
}

/// What all processes of this machine agree on.
fn micros() -> Result<u128> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())
}

/// What strangers send: each of them what somebody can make who does not know the cluster's secret.
#[derive(Clone, Copy)]
enum Kind {
    /// A first message between members.
    Init,
    /// A newcomer's first message.
    Join,
    /// "Prove your address."
    Cookie,
    /// A sealed frame.
    Data,
    /// Noise.
    Junk,
}

impl Kind {
    fn parse(word: &str) -> Result<Vec<Self>> {
        Ok(match word {
            "init" => vec![Self::Init],
            "join" => vec![Self::Join],
            "cookie" => vec![Self::Cookie],
            "data" => vec![Self::Data],
            "junk" => vec![Self::Junk],
            "all" => vec![Self::Init, Self::Join, Self::Cookie, Self::Data, Self::Junk],
            _ => return Err("a flood is of init, join, cookie, data, junk or all".into()),
        })
    }

    /// `router/core/src/wire.rs` has the layouts: all is as long as the real one and random where that has keys and seals.
    fn datagram(self, dice: &mut Dice) -> Vec<u8> {
        let (head, length) = match self {
            Self::Init => (Some(1), 330),
            Self::Join => (Some(5), 520),
            Self::Cookie => (Some(3), 68),
            Self::Data => (Some(4), 200),
            Self::Junk => (None, 200),
        };
        let mut bytes = dice.bytes(length);
        if let Some(kind) = head {
            bytes[..4].copy_from_slice(&[kind, 1, 0, 0]);
        }
        if let Self::Join = self {
            // The invitation's signed body, in clear.
            bytes[8..10].copy_from_slice(&190u16.to_le_bytes());
        }
        bytes
    }
}

/// An address of the network `from`, which may be a single address.
fn source(from: (Ipv4Addr, u32), dice: &mut Dice) -> Ipv4Addr {
    let (network, length) = from;
    let hosts = u32::MAX.checked_shr(length).unwrap_or(0);
    Ipv4Addr::from(u32::from(network) & !hosts | dice.next() as u32 & hosts)
}

fn network(text: &str) -> Result<(Ipv4Addr, u32)> {
    let (address, length) = text.split_once('/').unwrap_or((text, "32"));
    Ok((address.parse()?, length.parse()?))
}

/// What is sent, how often and for how long.
pub(super) struct Flood<'a> {
    pub(super) kind: &'a str,
    /// An address or a network: each datagram is from a random one of it, and from a random port.
    pub(super) from: &'a str,
    /// Datagrams a second.
    pub(super) rate: u64,
    pub(super) millis: u64,
}

/// Goes to `to`, and in turn to another port of the same host if there is one: says when it turns. Prints how many went out.
pub(super) fn flood(to: SocketAddrV4, aside: Option<u16>, flood: &Flood<'_>) -> Result<()> {
    let Flood { rate, millis, .. } = *flood;
    let (kinds, from) = (Kind::parse(flood.kind)?, network(flood.from)?);
    let ports = [aside.unwrap_or(to.port()), to.port()];
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
    socket.set_header_included_v4(true)?;
    let address = SockAddr::from(SocketAddr::from((*to.ip(), 0)));
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id()));
    // Made beforehand: what the sender computes is taken from those that it floods.
    let mut stock: Vec<Vec<u8>> = (0..STOCK)
        .map(|n| packet(to, &kinds[n % kinds.len()].datagram(&mut dice)))
        .collect();
    let (begun, mut sent) = (Instant::now(), 0);
    let mut turns = 0;
    while begun.elapsed() < Duration::from_millis(millis) {
        let port = ports[turns % 2];
        if begun.elapsed() >= TURN * turns as u32 {
            turns += 1;
            say(&format!("at {} port {}", micros()?, ports[turns % 2]));
            continue;
        }
        let due = begun.elapsed().as_micros() as u64 * rate / 1_000_000;
        for n in sent..due {
            let packet = &mut stock[n as usize % STOCK];
            packet[22..24].copy_from_slice(&port.to_be_bytes());
            packet[12..16].copy_from_slice(&source(from, &mut dice).octets());
            packet[20..22].copy_from_slice(&(1024 + (dice.next() as u16 >> 1)).to_be_bytes());
            // Other keys and indices each time.
            let noise = dice.next().to_be_bytes();
            packet[HEADERS + 4..HEADERS + 8].copy_from_slice(&noise[..4]);
            packet[HEADERS + 40..HEADERS + 48].copy_from_slice(&noise);
            socket.send_to(packet, &address)?;
        }
        sent = due;
        std::thread::sleep(BURST);
    }
    say(&sent.to_string());
    Ok(())
}

/// Headers before the payload. The kernel fills in the header's checksum and length, and none is as good for UDP (RFC 768).
fn packet(to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; HEADERS];
    packet[0] = 0x45;
    packet[8] = 64;
    packet[9] = 17;
    packet[16..20].copy_from_slice(&to.ip().octets());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[24..26].copy_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    packet.extend(payload);
    packet
}
