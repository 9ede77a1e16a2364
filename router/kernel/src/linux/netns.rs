//! Network namespaces as descriptors: opened once, checked on the descriptor, entered by threads of their own.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, fstatfs};
use weft_core::control::Target;

use super::domain::is_domain_name;
use super::sys;
use crate::error::{KernelError, Refusal, Result};

/// Where named namespaces live, weft's domains among them.
pub const NETNS_DIR: &str = "/run/netns";

/// The thread's own namespace.
pub(crate) const OWN: &str = "/proc/thread-self/ns/net";

/// Runs `work` on a thread of its own inside a namespace, and waits for it.
///
/// A thread that has entered another namespace must never serve anything else afterwards; this one ends.
pub fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    alone(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })
}

/// Runs `work` on a thread that ends with it, and waits for it: whatever namespace it enters, nobody else is there.
pub(crate) fn alone<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Opens the namespace of a path or a process, and makes sure on the descriptor itself that it is a network namespace
/// that may be attached: not the host's (the calling thread's, or process 1's), not a domain of weft.
pub fn open_netns(target: &Target) -> Result<OwnedFd> {
    let (shown, opened) = match target {
        Target::Netns(path) => (path.clone(), open_path(path)),
        Target::Pid(pid) => (format!("process {pid}"), open_pid(*pid)),
    };
    opened
        .and_then(|fd| check_foreign(&fd).map(|()| fd))
        .map_err(|why| KernelError::Target { target: shown, why })
}

fn refused(error: impl Into<io::Error>) -> Refusal {
    Refusal::Open(error.into().to_string())
}

fn open_path(path: &str) -> Result<OwnedFd, Refusal> {
    let path = Path::new(path);
    let climbs = path.components().any(|c| c == Component::ParentDir);
    if !path.is_absolute() || climbs {
        return Err(Refusal::Path);
    }
    // O_PATH first: opening a device or a pipe that somebody put there must have no effect.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let mut found = open(path, flags, Mode::empty()).map_err(refused)?;
    if is_link(&found)? {
        // /proc/<pid>/ns/net is one that only the kernel can turn.
        if fstatfs(&found).map_err(refused)?.filesystem_type() != PROC_SUPER_MAGIC {
            return Err(Refusal::Link);
        }
        found = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(refused)?;
    }
    reopen(&found)
}

fn is_link(fd: &OwnedFd) -> Result<bool, Refusal> {
    let mode = fstat(fd).map_err(refused)?.st_mode;
    Ok(mode & libc::S_IFMT == libc::S_IFLNK)
}

/// From a path descriptor to one that setns(2) takes, of the very same file.
fn reopen(found: &OwnedFd) -> Result<OwnedFd, Refusal> {
    if fstatfs(found).map_err(refused)?.filesystem_type() != NSFS_MAGIC {
        return Err(Refusal::NotNetns);
    }
    use std::os::fd::AsRawFd as _;
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    let fd = open(
        again.as_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(refused)?;
    is_netns(&fd)?;
    Ok(fd)
}

fn is_netns(fd: &OwnedFd) -> Result<(), Refusal> {
    match sys::namespace_kind(fd.as_fd()) {
        Ok(libc::CLONE_NEWNET) => Ok(()),
        _ => Err(Refusal::NotNetns),
    }
}

fn open_pid(pid: u32) -> Result<OwnedFd, Refusal> {
    let process = sys::pidfd_open(pid).map_err(|_| Refusal::NoProcess)?;
    let path = format!("/proc/{pid}/ns/net");
    let fd = open(
        path.as_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| match errno {
        Errno::ENOENT | Errno::ESRCH => Refusal::NoProcess,
        other => refused(other),
    })?;
    // Still the process that we took hold of first, or its number may have gone to another in between.
    let ended = sys::readable(&[process.as_fd()], Some(Duration::ZERO)).map_err(refused)?;
    if ended.first() != Some(&false) {
        return Err(Refusal::NoProcess);
    }
    is_netns(&fd)?;
    Ok(fd)
}

/// Device and inode: two descriptors of one namespace share them.
type Identity = (u64, u64);

fn identity(fd: &OwnedFd) -> Result<Identity, Refusal> {
    let stat = fstat(fd).map_err(refused)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn identity_at(path: impl AsRef<Path>) -> Option<Identity> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Do a descriptor and the calling thread share their namespace?
pub(crate) fn is_own(fd: &OwnedFd) -> bool {
    identity(fd)
        .ok()
        .is_some_and(|id| identity_at(OWN) == Some(id))
}

fn check_foreign(fd: &OwnedFd) -> Result<(), Refusal> {
    let it = identity(fd)?;
    if identity_at(OWN) == Some(it) || identity_at("/proc/1/ns/net") == Some(it) {
        return Err(Refusal::Host);
    }
    let domains = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
    let is_domain = domains
        .filter(|entry| is_domain_name(&entry.file_name().to_string_lossy()))
        .any(|entry| identity_at(entry.path()) == Some(it));
    if is_domain {
        return Err(Refusal::Domain);
    }
    Ok(())
}
