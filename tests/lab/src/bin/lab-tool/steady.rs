//! Traffic that never stops, counted at its other end: what a restart under it costs.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use socket2::Type;

use super::{Result, connect, dual_stack, say, udp_socket};

/// Octets of a stream written or checked at a time.
const BLOCK: usize = 32 * 1024;

/// Numbered datagrams, one every `millis`, for ever. One that the kernel refuses is lost like any other.
pub(super) fn tick(to: SocketAddr, millis: u64) -> Result<()> {
    let socket = udp_socket(to, None)?;
    let begun = Instant::now();
    for n in 0u32.. {
        let _ = socket.send_to(&n.to_be_bytes(), to);
        // By the clock, so that a late one does not make all later ones late.
        let next = Duration::from_millis(millis) * (n + 1);
        std::thread::sleep(next.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// Takes those of [`tick`] and says after each which numbers below the highest have not come.
pub(super) fn tally(port: u16) -> Result<()> {
    let socket = UdpSocket::from(dual_stack(Type::DGRAM, port)?);
    say("ready");
    let mut missing = BTreeSet::new();
    let mut next = None;
    let mut buffer = [0; 64];
    loop {
        let length = socket.recv(&mut buffer)?;
        let number = u32::from_be_bytes(buffer[..length].try_into()?);
        // It may have been started before this one was ready.
        let gap = next.unwrap_or(number)..number;
        if !gap.is_empty() {
            say(&format!("gap {gap:?}"));
        }
        missing.extend(gap);
        missing.remove(&number);
        next = Some(next.unwrap_or(number).max(number + 1));
        say(&format!("number {number} missing {}", missing.len()));
    }
}

/// Octet `at` of the stream that flows.
fn drop_of(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn block(at: u64) -> Vec<u8> {
    (at..at + BLOCK as u64).map(drop_of).collect()
}

/// One TCP connection, filled as fast as it takes it, for ever.
pub(super) fn flow(to: SocketAddr) -> Result<()> {
    let mut stream = connect(to, None, Duration::from_secs(10))?;
    let mut at = 0;
    loop {
        stream.write_all(&block(at))?;
        at += BLOCK as u64;
        // Some 15 MB/s: the scenario is about the connection's life, not the machine's speed.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Takes one connection of [`flow`], checks every octet of it, and says how far it is.
pub(super) fn follow(port: u16) -> Result<()> {
    let listener = TcpListener::from({
        let socket = dual_stack(Type::STREAM, port)?;
        socket.listen(1)?;
        socket
    });
    say("ready");
    let (mut stream, _) = listener.accept()?;
    let mut at = 0;
    let mut buffer = vec![0; BLOCK];
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Err("the stream ended".into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        };
        let right = (at..).zip(&buffer[..length]);
        if let Some((place, _)) = { right }.find(|(place, octet)| drop_of(*place) != **octet) {
            return Err(format!("octet {place} is not what was sent").into());
        }
        at += length as u64;
        say(&format!("octets {at}"));
    }
}
