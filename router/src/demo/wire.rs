//! Looking at the wire: a packet socket on the router that counts what the hosts send each other.

use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use nix::sched::{CloneFlags, setns};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::demo::part::GREETING;

/// The port between nodes.
const WEFT_PORT: u16 = 6783;
/// Where weft's datagrams start with the TTL every Linux host gives; behind the router it is one less. Each packet
/// shows twice on a router's packet socket, and this tells the two apart.
const FRESH_TTL: u8 = 64;
const UDP: u8 = 17;
const TCP: u8 = 6;

/// What passed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Count {
    /// Sealed datagrams between nodes,
    pub(crate) datagrams: u64,
    /// and their octets, headers included.
    pub(crate) octets: u64,
    /// Those of them in which a word of the containers' conversation could be read.
    pub(crate) readable: u64,
    /// Packets between hosts that are neither weft's nor the outside client's.
    pub(crate) others: u64,
}

/// A running look.
pub(crate) struct Wire {
    count: Arc<Mutex<Count>>,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Starts counting in the router's namespace; packets from or to `outside` (a client that speaks plain HTTP) don't count.
    pub(crate) fn watch(router: &str, outside: &str) -> anyhow::Result<Self> {
        let file = std::fs::File::open(format!("/run/netns/{router}"))?;
        let outside: std::net::Ipv4Addr = outside.parse()?;
        let count = Arc::new(Mutex::new(Count::default()));
        let done = Arc::new(AtomicBool::new(false));
        let (shared, stop) = (Arc::clone(&count), Arc::clone(&done));
        let (ready, opened) = std::sync::mpsc::channel();
        // A thread of its own: the namespace is the thread's, and it never comes back.
        let thread = std::thread::spawn(move || match open(&file) {
            Ok(socket) => {
                // The receiver waits below.
                let _ = ready.send(Ok(()));
                follow(socket, outside.octets(), &shared, &stop);
            }
            Err(e) => drop(ready.send(Err(e))),
        });
        opened.recv().context("the watching thread ended")??;
        Ok(Self {
            count,
            done,
            thread: Some(thread),
        })
    }

    /// What passed so far.
    pub(crate) fn count(&self) -> Count {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It ends within its receive time-out; a panic there has been printed.
            let _ = thread.join();
        }
    }
}

fn open(netns: &std::fs::File) -> anyhow::Result<Socket> {
    setns(netns, CloneFlags::CLONE_NEWNET).context("can't enter the router's namespace")?;
    let all_protocols = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(
        Domain::PACKET,
        Type::RAW,
        Some(Protocol::from(all_protocols)),
    )
    .context("can't open a packet socket")?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    socket.set_recv_buffer_size(8 << 20)?;
    Ok(socket)
}

fn follow(mut socket: Socket, outside: [u8; 4], count: &Mutex<Count>, done: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    while !done.load(Ordering::Relaxed) {
        match socket.read(&mut buffer) {
            Ok(length) => {
                let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
                look(&buffer[..length], outside, &mut count);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(_) => return,
        }
    }
}

/// Counts one Ethernet frame.
fn look(frame: &[u8], outside: [u8; 4], count: &mut Count) {
    let Some(packet) = frame
        .get(14..)
        .filter(|p| frame[12..14] == [0x08, 0x00] && p.len() >= 20)
    else {
        return;
    };
    let foreign = packet[12..16] == outside || packet[16..20] == outside;
    if foreign || packet[8] != FRESH_TTL {
        return;
    }
    let header = usize::from(packet[0] & 0xf) * 4;
    let port = packet
        .get(header + 2..header + 4)
        .map(|p| u16::from_be_bytes([p[0], p[1]]));
    match (packet[9], port) {
        (UDP, Some(WEFT_PORT)) => {
            count.datagrams += 1;
            count.octets += packet.len() as u64;
            count.readable += u64::from(is_readable(packet));
        }
        (UDP | TCP, _) => count.others += 1,
        // ICMP of the underlay itself.
        _ => {}
    }
}

fn is_readable(packet: &[u8]) -> bool {
    let has = |needle: &[u8]| packet.windows(needle.len()).any(|w| w == needle);
    has(GREETING.as_bytes()) || has(b"GET / HTTP") || has(b"\x04weft\x08internal")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ttl: u8, port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend([
            0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, ttl, UDP, 0, 0, 192, 0, 2, 10, 203, 0, 113, 10,
        ]);
        frame.extend(port.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend([0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn datagrams_are_counted_once_and_read_where_they_can_be() {
        let mut count = Count::default();
        look(&frame(64, WEFT_PORT, b"\x8f\x01\x77"), [9; 4], &mut count);
        look(&frame(63, WEFT_PORT, b"\x8f\x01\x77"), [9; 4], &mut count);
        look(
            &frame(64, WEFT_PORT, b"..hello from web"),
            [9; 4],
            &mut count,
        );
        look(&frame(64, 80, b"GET / HTTP/1.1"), [9; 4], &mut count);
        look(
            &frame(64, 80, b"GET / HTTP/1.1"),
            [192, 0, 2, 10],
            &mut count,
        );
        look(&[0; 5], [9; 4], &mut count);
        assert_eq!((count.datagrams, count.readable, count.others), (2, 1, 1));
    }
}
