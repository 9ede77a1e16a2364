//! Who seals faster on this machine, the kernel (ESP around VXLAN) or weft: both carry streams in turn between two namespaces
//! of their own. Both ends run on this machine then, so what is compared is the work that an octet makes.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ipnet::Ipv4Net;
use socket2::SockRef;
use weft_carrier::{Carrier, CarrierConfig, PeerEntry, PeerTable};
use weft_core::crypto::{Cipher, Secret};
use weft_core::layout::{UDP_CARRIER, peer_mac};
use weft_core::model::{AddressPlan, ClusterId, NodeId};
use weft_core::session::transport::{Transport, TransportKeys};
use weft_core::view::PeerNumber;
use weft_core::wire::OVERHEAD;
use weft_kernel::{CABLE_MTU, End, Ground, inside};

use super::Speeds;

/// Streams of each; the medians count.
const TURNS: usize = 3;
/// A stream finds its speed before it is measured.
const WARM_UP: Duration = Duration::from_millis(60);
const MEASURED: Duration = Duration::from_millis(140);
/// What does not come within this does not come.
const PATIENCE: Duration = Duration::from_secs(5);
/// Octets written or read at a time.
const BLOCK: usize = 128 << 10;
const PORT: u16 = 6783;
/// The headers of IPv4 and UDP.
const OUTER: u32 = 28;
/// Outer headers, ESP with all its padding, VXLAN and inner Ethernet.
const SEALED: u32 = 84;
/// By what each end calls the other.
const NUMBERS: [PeerNumber; 2] = [PeerNumber(1), PeerNumber(2)];
const OWN: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 32, 0, 1), Ipv4Addr::new(10, 33, 0, 1)];
const KERNEL: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 64, 0, 1), Ipv4Addr::new(10, 64, 0, 2)];

/// Octets a second of one TCP connection by either, weft's sealed by `cipher`.
///
/// # Errors
/// The kernel does not let it be tried, or one of them carries nothing.
pub(super) fn run(cipher: Cipher) -> Result<Speeds> {
    let ground = Ground::lay()?;
    let kernel = KERNEL.map(|ip| Ipv4Net::new_assert(ip, 24));
    ground.lay_sealed_vxlan(CABLE_MTU - SEALED, kernel)?;
    let _carriers = start_carriers(&ground, cipher)?;
    let mut kernel = Vec::new();
    let mut own = Vec::new();
    for _ in 0..TURNS {
        kernel.push(stream(&ground, KERNEL[1]).context("the kernel's ESP carries nothing")?);
        own.push(stream(&ground, OWN[1]).context("weft's own tunnel carries nothing")?);
    }
    Ok(Speeds {
        kernel: median(kernel),
        own: median(own),
    })
}

fn median(mut of: Vec<u64>) -> u64 {
    of.sort_unstable();
    of[of.len() / 2]
}

/// weft's own tunnel between the two.
fn start_carriers(ground: &Ground, cipher: Cipher) -> Result<[Carrier; 2]> {
    let keys = |send, receive| TransportKeys {
        cipher,
        send: Secret::new([send; 32]),
        receive: Secret::new([receive; 32]),
        esp: None,
    };
    let ids = [NodeId([1; 32]), NodeId([2; 32])];
    let near = Transport::new(ids[1], 1, 2, &keys(1, 2));
    let far = Transport::new(ids[0], 2, 1, &keys(2, 1));
    let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0; 16]))?;
    let mtu = CABLE_MTU - OUTER - OVERHEAD as u32;
    let start = |end: &End, place: usize, to: &End, transport: Transport| -> Result<Carrier> {
        let carrier = start_carrier(end.namespace(), mtu)?;
        let other = 1 - place;
        let neighbour = (OWN[other], peer_mac(NUMBERS[place]));
        let own = Ipv4Net::new(OWN[place], plan.range.prefix_len())?;
        end.lead(UDP_CARRIER, own, neighbour)?;
        let transport = Arc::new(transport);
        carrier.set_table(PeerTable {
            me: ids[place],
            relays: false,
            plan,
            peers: vec![PeerEntry {
                number: NUMBERS[place],
                id: ids[other],
                transport: Some(transport.clone()),
                path: Some(SocketAddr::from((to.underlay, PORT)).into()),
                prefixes: vec![Ipv4Net::new(OWN[other], 16)?.trunc()],
                mtu: u16::try_from(mtu).ok(),
            }],
            receivers: vec![transport],
            guests: Vec::new(),
            guard: None,
        });
        Ok(carrier)
    };
    Ok([
        start(&ground.near, 0, &ground.far, near)?,
        start(&ground.far, 1, &ground.near, far)?,
    ])
}

/// Its threads live where it is started.
fn start_carrier(namespace: BorrowedFd<'_>, mtu: u32) -> Result<Carrier> {
    let config = CarrierConfig {
        mtu,
        ..CarrierConfig::new(namespace.try_clone_to_owned()?, PORT)
    };
    Ok(inside(namespace, || {
        Carrier::start(config, Box::new(drop))
    })??)
}

/// Octets a second from the near end to this address of the far one.
fn stream(ground: &Ground, to: Ipv4Addr) -> io::Result<u64> {
    let listen = || TcpListener::bind((to, 0));
    let listener = inside(ground.far.namespace(), listen)??;
    let to = listener.local_addr()?;
    std::thread::scope(|scope| {
        let near = ground.near.namespace();
        let sender = scope.spawn(move || inside(near, || fill(to))?);
        let taken = accept(&listener).and_then(swallow);
        let sent = sender.join().unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic);
        });
        taken.or_else(|taken| sent.and(Err(taken)))
    })
}

fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    // For accept(2), too: socket(7).
    SockRef::from(listener).set_read_timeout(Some(PATIENCE))?;
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends until the far end has enough.
fn fill(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let block = vec![0; BLOCK];
    loop {
        match stream.write_all(&block) {
            Err(error) if is_end(&error) => return Ok(()),
            other => other?,
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
    kinds.contains(&error.kind())
}

/// Octets a second once it flows.
fn swallow(mut stream: TcpStream) -> io::Result<u64> {
    let mut block = vec![0; BLOCK];
    let (begun, mut octets) = (Instant::now(), 0);
    loop {
        let read = stream.read(&mut block)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let measured = begun.elapsed().saturating_sub(WARM_UP);
        if !measured.is_zero() {
            octets += read as u64;
        }
        if measured >= MEASURED {
            return Ok((octets as f64 / measured.as_secs_f64()) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weft_carries_a_stream_between_two_namespaces() {
        let ground = Ground::lay().unwrap();
        let _carriers = start_carriers(&ground, Cipher::Aes256Gcm).unwrap();
        assert!(stream(&ground, OWN[1]).unwrap() > 0);
        // Nobody has that address: it is said, and nothing waits for ever.
        assert!(stream(&ground, KERNEL[1]).is_err());
    }

    #[test]
    fn the_kernel_is_measured_where_it_has_esp() {
        match (weft_kernel::esp_available(), run(Cipher::Aes256Gcm)) {
            (Ok(()), Ok(speeds)) => assert!(speeds.kernel > 0 && speeds.own > 0, "{speeds:?}"),
            (Err(_), Err(_)) => {}
            (available, ran) => panic!("{available:?}, {ran:?}"),
        }
    }
}
