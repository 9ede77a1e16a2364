//! The TAP: a persistent device in the domain, made or adopted by a thread that has gone inside.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};
use weft_core::layout::{self, UDP_CARRIER_MAC};
use weft_core::underlay::{Offload, OffloadState};

use crate::descriptors::lives_in;
use crate::error::CarrierError;
use crate::offload::Offloads;
use crate::sys::{self, NamespaceOf};
use crate::vnet::VNET_LEN;

/// How long a start waits for the kernel, or for a predecessor to let go.
const PATIENCE: Duration = Duration::from_secs(2);

/// The TAP, read and written by any thread.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
}

impl Tap {
    /// Opens the TAP `name` in the namespace `domain`; one that is there already goes on as it is. With `given`, the queue
    /// of a predecessor, the device never loses its carrier, and what waits in the queue is not lost; a queue of anything
    /// else is let go.
    pub(crate) fn open(
        domain: &OwnedFd,
        name: &str,
        mtu: u32,
        given: Option<OwnedFd>,
    ) -> Result<Self, CarrierError> {
        let given = given
            .filter(|fd| sys::is_tap(fd.as_fd(), name))
            .filter(|fd| lives_in(fd.as_fd(), NamespaceOf::Tap, domain.as_fd()));
        // A namespace belongs to a thread, so the caller's stays where it is. A device that is opened outside would not
        // fail: it would be made a second time, there.
        std::thread::scope(|scope| {
            let inside = std::thread::Builder::new()
                .name("weft-tap".to_owned())
                .spawn_scoped(scope, || {
                    setns(domain, CloneFlags::CLONE_NEWNET)
                        .map_err(|errno| CarrierError::Domain(errno.into()))?;
                    open_here(name, mtu, given)
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

    /// Says which work is taken over from the kernel: what is on, as far as this one has it.
    pub(crate) fn use_offloads(&self, offloads: &Offloads) -> Result<(), CarrierError> {
        // From what came last to what was there first; those that need each other go together.
        for absent in [Offload::Uso, Offload::Tso, Offload::Csum] {
            if sys::set_offloads(self.as_fd(), flags(offloads)).is_ok() {
                return Ok(());
            }
            offloads.step_down(absent, OffloadState::Absent);
        }
        sys::set_offloads(self.as_fd(), 0).map_err(|source| CarrierError::Tap {
            name: layout::UDP_CARRIER.to_owned(),
            step: "offloads",
            source,
        })
    }
}

impl Tap {
    /// The queue once more.
    pub(crate) fn queue(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

/// The kernel's names for what is on.
fn flags(offloads: &Offloads) -> libc::c_uint {
    let tso = libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let all = [
        (Offload::Csum, libc::TUN_F_CSUM),
        (Offload::Tso, tso),
        (Offload::Uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let used = all
        .into_iter()
        .filter(|(offload, _)| offloads.is_on(*offload));
    used.fold(0, |flags, (_, flag)| flags | flag)
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open_here(name: &str, mtu: u32, given: Option<OwnedFd>) -> Result<Tap, CarrierError> {
    let failed = |step: &'static str| {
        move |source: io::Error| CarrierError::Tap {
            name: name.to_owned(),
            step,
            source,
        }
    };
    let file = match given {
        Some(queue) => File::from(queue),
        None => {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .map_err(CarrierError::NoTun)?;
            attach(&file, name).map_err(failed("attach: does another weft use it?"))?;
            file
        }
    };
    sys::set_persistent(file.as_fd()).map_err(failed("make persistent"))?;
    sys::set_vnet_length(file.as_fd(), VNET_LEN as libc::c_int).map_err(failed("header length"))?;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).map_err(failed("socket"))?;
    // The kernel forgets all neighbours of a device that is given a MAC, even the one it has.
    if !sys::has_mac(socket.as_fd(), name, UDP_CARRIER_MAC).map_err(failed("MAC"))? {
        sys::set_mac(socket.as_fd(), name, UDP_CARRIER_MAC).map_err(failed("MAC"))?;
    }
    sys::set_mtu(socket.as_fd(), name, mtu).map_err(failed("MTU"))?;
    sys::set_up(socket.as_fd(), name).map_err(failed("up"))?;
    // A little later than the link: until then the kernel drops what is routed over it.
    until(|| sys::is_running(socket.as_fd(), name)).map_err(failed("run"))?;
    Ok(Tap { file })
}

/// Busy while another process reads it: one queue only, so that a daemon that is still going down can't take packets into
/// the grave with it.
fn attach(tun: &File, name: &str) -> io::Result<()> {
    until(|| match sys::attach_tap(tun.as_fd(), name) {
        Err(err) if err.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        other => other.map(|()| true),
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
