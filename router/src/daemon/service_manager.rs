//! systemd, or whoever speaks its protocol: it is told when the daemon is up, and it keeps the carrier's descriptors from
//! one process to the next (sd_notify(3), `FDSTORE=1`; sd_listen_fds(3)). Without `NOTIFY_SOCKET` all of this does nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use rustix::process::{ForeignRawFd, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use sd_notify::NotifyState;
use tracing::{debug, warn};
use weft_carrier::Descriptors;

use super::handover::Inheritance;

const TAP: &str = "weft-tap";
const UDP4: &str = "weft-udp4";
const UDP6: &str = "weft-udp6";
/// Listeners: both under one name.
const TCP: &str = "weft-tcp";
/// What the `vxlan` carrier's own table stands by.
const SHIELD: &str = "weft-shield";

/// What it kept for us.
pub(super) fn kept() -> Inheritance {
    let mut kept = Inheritance::default();
    let carrier = &mut kept.carrier;
    let listed = match sd_notify::listen_fds_with_names() {
        Ok(listed) => listed,
        Err(error) => {
            warn!(%error, "what the service manager kept can't be understood");
            return kept;
        }
    };
    for (number, name) in listed {
        match (own(number), name.as_str()) {
            (Ok(fd), TAP) => carrier.tap = Some(fd),
            (Ok(fd), UDP4) => carrier.v4 = Some(fd),
            (Ok(fd), UDP6) => carrier.v6 = Some(fd),
            (Ok(fd), TCP) => carrier.tcp.push(fd),
            (Ok(fd), SHIELD) => kept.shield = Some(fd),
            (Ok(_), name) => debug!(name, "the service manager passed something unknown"),
            (Err(error), name) => {
                warn!(%error, name, "what the service manager kept can't be used");
            }
        }
    }
    kept
}

/// Makes a descriptor that was there when the process began its own: it gets another number, and the old one is closed.
fn own(number: RawFd) -> Result<OwnedFd> {
    let me = pidfd_open(getpid(), PidfdFlags::empty()).context("can't open this process")?;
    let fd = pidfd_getfd(&me, number as ForeignRawFd, PidfdGetfdFlags::empty())?;
    nix::unistd::close(number)?;
    Ok(fd)
}

/// Has it keep these, and nothing else of an earlier start.
pub(super) fn keep(descriptors: &Descriptors) {
    forget();
    let Descriptors { tap, v4, v6, tcp } = descriptors;
    let single = [(TAP, tap), (UDP4, v4), (UDP6, v6)];
    let single = single
        .into_iter()
        .flat_map(|(name, fd)| Some((name, fd.as_ref()?)));
    for (name, fd) in single.chain(tcp.iter().map(|fd| (TCP, fd))) {
        store(name, fd);
    }
}

/// Has it keep this one, or none, in place of the one before: then what guards the `vxlan` carrier outlives a daemon that is
/// killed.
pub(super) fn keep_shield(socket: Option<&OwnedFd>) {
    remove(SHIELD);
    if let Some(socket) = socket {
        store(SHIELD, socket);
    }
}

fn store(name: &str, fd: &OwnedFd) {
    let state = [
        NotifyState::FdStore,
        NotifyState::FdName(name),
        // An ICMP error makes a socket look broken for a moment: no reason to drop it.
        NotifyState::Custom("FDPOLL=0"),
    ];
    let fds: [BorrowedFd<'_>; 1] = [fd.as_fd()];
    tell(sd_notify::notify_with_fds(&state, &fds));
}

/// Has it close what it keeps: all is taken down, or comes anew.
pub(super) fn forget() {
    for name in [TAP, UDP4, UDP6, TCP, SHIELD] {
        remove(name);
    }
}

fn remove(name: &str) {
    tell(sd_notify::notify(&[
        NotifyState::FdStoreRemove,
        NotifyState::FdName(name),
    ]));
}

/// The daemon is up.
pub(super) fn ready() {
    tell(sd_notify::notify(&[NotifyState::Ready]));
}

/// The daemon was asked to end.
pub(super) fn stopping() {
    tell(sd_notify::notify(&[NotifyState::Stopping]));
}

/// It is of help, and no more: the daemon runs without it.
fn tell(outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        debug!(%error, "the service manager can't be told");
    }
}
