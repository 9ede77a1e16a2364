//! Probes over the `vxlan` carrier: frames of their own kind, in the clear, by which two hosts find out whether packets
//! would get through. The answer goes through the session, so a forged probe achieves nothing but an answer.
//!
//! ```text
//! destination MAC (6), source MAC (6), EtherType (2) | "weft" (4), nonce (8), zeroes up to the length wanted
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};
use weft_core::layout::VXLAN_PROBE;

use crate::limit::ProbeGate;
use crate::sys;
use crate::threads::Waker;

const MARK: &[u8; 4] = b"weft";
const ETHERNET: usize = 14;
/// What a probe is at least: header, mark and nonce; Ethernet's own minimum is more.
const SHORTEST: usize = 60;
/// Nothing behind the nonce is read.
const BUFFER: usize = ETHERNET + 4 + 8;

/// Sends probes, and hears those of others. Dropping it ends its thread.
#[derive(Debug)]
pub struct VxlanProbes {
    socket: Arc<File>,
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl VxlanProbes {
    /// Opens a socket on the device with this index in `domain`. `heard` is called with the sender's MAC, as the frame says
    /// it, and the nonce: it must not block. At most a thousand a second of them.
    pub fn start(
        domain: &OwnedFd,
        device: u32,
        heard: impl Fn([u8; 6], u64) + Send + 'static,
    ) -> io::Result<Self> {
        let socket = Arc::new(File::from(open(domain, device)?));
        let (stop, waker) = (Arc::new(AtomicBool::new(false)), Arc::new(Waker::new()?));
        let thread = {
            let (socket, stop, waker) = (socket.clone(), stop.clone(), waker.clone());
            std::thread::Builder::new()
                .name("weft-probes".to_owned())
                .spawn(move || listen(&socket, &stop, &waker, &heard))?
        };
        Ok(Self {
            socket,
            stop,
            waker,
            thread: Some(thread),
        })
    }

    /// Sends one of `length` octets, Ethernet header included, or a little more.
    pub fn send(&self, to: [u8; 6], from: [u8; 6], nonce: u64, length: usize) -> io::Result<()> {
        let mut frame = Vec::with_capacity(length.max(SHORTEST));
        frame.extend_from_slice(&to);
        frame.extend_from_slice(&from);
        frame.extend_from_slice(&VXLAN_PROBE.to_be_bytes());
        frame.extend_from_slice(MARK);
        frame.extend_from_slice(&nonce.to_be_bytes());
        frame.resize(length.max(SHORTEST), 0);
        (&*self.socket).write_all(&frame)
    }
}

impl Drop for VxlanProbes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A namespace belongs to a thread, so the caller's stays where it is.
fn open(domain: &OwnedFd, device: u32) -> io::Result<OwnedFd> {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(domain, CloneFlags::CLONE_NEWNET)?;
            sys::packet_socket(VXLAN_PROBE, device)
        });
        match inside.join() {
            Ok(socket) => socket,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn listen(socket: &File, stop: &AtomicBool, waker: &Waker, heard: &impl Fn([u8; 6], u64)) {
    let mut gate = ProbeGate::new();
    let mut buffer = [0; BUFFER];
    while !stop.load(Ordering::Relaxed) {
        if sys::wait_readable([socket.as_fd(), waker.as_fd()], -1).is_err() {
            return;
        }
        // A longer frame is cut. A device that goes down is an error once, and then there is nothing to read.
        while let Ok(length) = (&*socket).read(&mut buffer) {
            if let Some((from, nonce)) = parse(&buffer[..length])
                && gate.admits()
            {
                heard(from, nonce);
            }
        }
    }
}

fn parse(frame: &[u8]) -> Option<([u8; 6], u64)> {
    let from = *frame.get(6..12)?.first_chunk()?;
    let (kind, body) = frame.get(12..)?.split_first_chunk()?;
    let (mark, rest) = body.split_first_chunk()?;
    let is_probe = *kind == VXLAN_PROBE.to_be_bytes() && mark == MARK;
    is_probe.then_some((from, u64::from_be_bytes(*rest.first_chunk()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_probes_are_read() {
        let mut frame = [[1; 6], [2; 6]].concat();
        frame.extend_from_slice(&VXLAN_PROBE.to_be_bytes());
        frame.extend_from_slice(b"weft");
        frame.extend_from_slice(&7u64.to_be_bytes());
        assert_eq!(parse(&frame), Some(([2; 6], 7)));
        for cut in 0..frame.len() {
            assert_eq!(parse(&frame[..cut]), None, "{cut}");
        }
        for at in 12..18 {
            let mut other = frame.clone();
            other[at] ^= 1;
            assert_eq!(parse(&other), None, "{at}");
        }
    }
}
