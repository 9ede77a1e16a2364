//! Datagrams as QUIC sends and takes them: a run of equal ones at a time, which the kernel cuts (GSO) and joins (GRO).

use std::io::{ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, setsockopt, sockopt};
use socket2::{SockRef, Type};

use super::{Result, dual_stack, say};

/// Octets of a run: less than an IPv4 packet holds.
const RUN: usize = 64_000;
/// A question how many have come is one octet, which the answer repeats; no other datagram is so short.
const QUESTION: usize = 1;
/// An answer may be behind all that is still under way.
const PATIENCE: Duration = Duration::from_millis(300);
const QUESTIONS: u32 = 30;
/// Room for what comes while the reader does not run.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Sends datagrams of `length` octets as fast as it can for `millis`, and says how many were sent and how many came.
pub(super) fn send(to: SocketAddr, length: u16, millis: u64) -> Result<()> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut number = 0;
    let before = ask(&socket, &mut number)?;
    let in_one = RUN / usize::from(length);
    let run = vec![0; in_one * usize::from(length)];
    setsockopt(&socket, sockopt::UdpGsoSegment, &length.into())?;
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(millis) {
        socket.send(&run)?;
        sent += in_one as u64;
    }
    let took = start.elapsed();
    let came = settled(&socket, &mut number)? - before;
    say(&format!(
        "sent {sent} came {came} millis {}",
        took.as_millis()
    ));
    Ok(())
}

/// The number when nothing more comes.
fn settled(socket: &UdpSocket, number: &mut u8) -> Result<u64> {
    let mut last = ask(socket, number)?;
    loop {
        let now = ask(socket, number)?;
        if now == last {
            return Ok(now);
        }
        last = now;
    }
}

/// How many have come by now.
fn ask(socket: &UdpSocket, number: &mut u8) -> Result<u64> {
    let mut answer = [0; 8 + QUESTION];
    for _ in 0..QUESTIONS {
        *number = number.wrapping_add(1);
        let question = [*number];
        socket.send(&question)?;
        match socket.recv(&mut answer) {
            Ok(_) if answer[8..] == question => {
                let [count @ .., _] = answer;
                return Ok(u64::from_be_bytes(count));
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err("no answer".into())
}

/// Counts what [`send`] sends, for ever.
pub(super) fn take(port: u16) -> Result<()> {
    let socket = dual_stack(Type::DGRAM, port)?;
    SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER)?;
    setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
    let socket = UdpSocket::from(socket);
    say("ready");
    let mut buffer = vec![0; 65_536];
    let mut room = nix::cmsg_space!(i32);
    let mut count = 0u64;
    loop {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::empty();
        let message =
            recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut slices, Some(&mut room), flags)?;
        let length = message.bytes;
        let joined = message.cmsgs()?.find_map(|cmsg| match cmsg {
            ControlMessageOwned::UdpGroSegments(of) => usize::try_from(of).ok(),
            _ => None,
        });
        let from = message.address;
        if length == QUESTION {
            let from: std::net::SocketAddrV6 = from.ok_or("from nowhere")?.into();
            let answer = [&count.to_be_bytes()[..], &buffer[..QUESTION]].concat();
            socket.send_to(&answer, from)?;
        } else {
            count += length.div_ceil(joined.unwrap_or(length).max(1)) as u64;
        }
    }
}
