//! The TAP: a persistent device in the domain, made or adopted by a thread that has gone inside.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};
use weft_core::layout::UDP_CARRIER_MAC;

use crate::error::CarrierError;
use crate::sys;
use crate::vnet::VNET_LEN;

/// How long a start waits for the kernel, or for a predecessor to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// The TAP, read and written by any thread.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
    takes_datagrams: bool,
}

impl Tap {
    /// Opens the TAP `name` in the namespace `domain`; one that is there already goes on as it is.
    pub(crate) fn open(domain: &OwnedFd, name: &str, mtu: u32) -> Result<Self, CarrierError> {
        // A namespace belongs to a thread, so the caller's stays where it is. A device that is opened outside would not
        // fail: it would be made a second time, there.
        std::thread::scope(|scope| {
            let inside = std::thread::Builder::new()
                .name("weft-tap".to_owned())
                .spawn_scoped(scope, || {
                    setns(domain, CloneFlags::CLONE_NEWNET)
                        .map_err(|errno| CarrierError::Domain(errno.into()))?;
                    open_here(name, mtu)
                })
                .map_err(CarrierError::Threads)?;
            inside.join().unwrap_or_else(|panic| {
                std::panic::resume_unwind(panic);
            })
        })
    }

    /// Reads one frame with its virtio header.
    pub(crate) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    /// Writes one frame, virtio header first.
    pub(crate) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.file).write_vectored(pieces)
    }

    /// Does it take and give several UDP datagrams of one flow as one frame?
    pub(crate) fn takes_datagrams(&self) -> bool {
        self.takes_datagrams
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open_here(name: &str, mtu: u32) -> Result<Tap, CarrierError> {
    let failed = |step: &'static str| {
        move |source: io::Error| CarrierError::Tap {
            name: name.to_owned(),
            step,
            source,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(CarrierError::NoTun)?;
    // Busy while another process reads it: one queue only, so that a daemon that is still going down can't take packets
    // into the grave with it.
    until(|| match sys::attach_tap(file.as_fd(), name) {
        Err(err) if err.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        other => other.map(|()| true),
    })
    .map_err(failed("attach: does another weft use it?"))?;
    sys::set_persistent(file.as_fd()).map_err(failed("make persistent"))?;
    sys::set_vnet_length(file.as_fd(), VNET_LEN as libc::c_int).map_err(failed("header length"))?;
    let takes_datagrams = set_offloads(file.as_fd()).map_err(failed("offloads"))?;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).map_err(failed("socket"))?;
    sys::set_mac(socket.as_fd(), name, UDP_CARRIER_MAC).map_err(failed("MAC"))?;
    sys::set_mtu(socket.as_fd(), name, mtu).map_err(failed("MTU"))?;
    sys::set_up(socket.as_fd(), name).map_err(failed("up"))?;
    // A little later than the link: until then the kernel drops what is routed over it.
    until(|| sys::is_running(socket.as_fd(), name)).map_err(failed("run"))?;
    Ok(Tap {
        file,
        takes_datagrams,
    })
}

/// Asks until the answer is yes, for [`PATIENCE`] and no longer.
fn until(mut done: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        if Instant::now() > end {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Is UDP segmentation among them? It came with Linux 6.2, both versions of IP or none.
fn set_offloads(tap: BorrowedFd<'_>) -> io::Result<bool> {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    if sys::set_offloads(tap, tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok() {
        return Ok(true);
    }
    sys::set_offloads(tap, tcp).map(|()| false)
}
