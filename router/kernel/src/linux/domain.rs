//! The domain: one network namespace per host in which all of the mesh lives.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use weft_core::layout::{DEVICE_MTU, GATEWAY_MAC, HOST_LEG, HOST_LEG_FAR, HOST_LEG_MAC};

use super::apply::{Namespace, Place, Report, set_sysctls};
use super::fastpath::FastCounters;
use super::host::Host;
use super::netns::{NETNS_DIR, OWN, inside, is_own};
use super::rtnl::{Rtnl, VethEnd};
use super::sysctl;
use crate::error::{Doing, KernelError, Result};
use crate::plan::{DomainPlan, domain_sysctls};

/// Whether the domain was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Left by an earlier run: containers may be attached and connections alive in it.
    Adopted,
    /// Just made.
    Fresh,
}

/// A handle to the domain. Dropping it leaves the domain as it is.
#[derive(Debug)]
pub struct Domain {
    name: String,
    namespace: OwnedFd,
    pub(super) fast: FastCounters,
}

/// `weft-` and one to twenty letters or digits.
pub(crate) fn is_domain_name(name: &str) -> bool {
    name.strip_prefix("weft-").is_some_and(|id| {
        (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

impl Domain {
    /// Opens `/run/netns/<name>`, or makes it as `ip netns add` does. Call it from a thread in the host's namespace.
    pub fn open_or_create(name: &str) -> Result<(Self, Origin)> {
        if !is_domain_name(name) {
            return Err(KernelError::DomainName(name.to_owned()));
        }
        let path = path_of(name);
        let lock = prepare_directory()?;
        let origin = if is_namespace(&path) {
            Origin::Adopted
        } else {
            create(&path).doing(|| format!("make the namespace {}", path.display()))?;
            Origin::Fresh
        };
        drop(lock);
        let domain = Self::open(name)?;
        domain.prepare()?;
        Ok((domain, origin))
    }

    /// Opens an existing one.
    pub fn open(name: &str) -> Result<Self> {
        if !is_domain_name(name) {
            return Err(KernelError::DomainName(name.to_owned()));
        }
        let path = path_of(name);
        let file = fs::File::open(&path).doing(|| format!("open {}", path.display()))?;
        let namespace = OwnedFd::from(file);
        if is_own(&namespace) {
            return Err(KernelError::DomainIsHost(path.display().to_string()));
        }
        Ok(Self {
            name: name.to_owned(),
            namespace,
            fast: FastCounters::default(),
        })
    }

    /// Its name below `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// A descriptor of its own, for the carrier and for DNS sockets.
    pub fn fd(&self) -> Result<OwnedFd> {
        self.namespace
            .try_clone()
            .doing(|| "duplicate the domain's descriptor".into())
    }

    /// Runs `work` on a thread of its own inside the domain, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        inside(self.namespace.as_fd(), work)
            .doing(|| format!("enter the namespace {}", self.path().display()))
    }

    /// Opens sockets to the domain's kernel on a thread inside and works with them there.
    pub(crate) fn with<T: Send>(
        &self,
        work: impl FnOnce(&Namespace) -> Result<T> + Send,
    ) -> Result<T> {
        self.run(|| work(&Namespace::open().doing(|| "open netlink in the domain".into())?))?
    }

    /// Switches before devices: they inherit `default`.
    fn prepare(&self) -> Result<()> {
        self.with(|ns| {
            let mut report = Report::default();
            set_sysctls(&domain_sysctls(sysctl::ipv6_available()), &mut report);
            let lo = ns.rtnl.link("lo").doing(|| "find lo".into())?;
            if let Some(lo) = lo.filter(|lo| !lo.up) {
                ns.rtnl.set_up(lo.index).doing(|| "set lo up".into())?;
            }
            report.failures.into_iter().next().map_or(Ok(()), Err)
        })
    }

    /// Makes the host's own leg, `weft0` here and `wh0` in the domain, unless it is there; says whether it made it.
    /// Addresses, neighbours and routes are the plans'.
    pub fn ensure_host_leg(&self, host: &Host) -> Result<bool> {
        let doing = || format!("make {HOST_LEG}");
        let far = self.with(|ns| ns.rtnl.link(HOST_LEG_FAR).doing(doing))?;
        let near = host.with(|ns| ns.rtnl.link(HOST_LEG).doing(doing))?;
        let made = match (near, far) {
            (Some(near), Some(_)) if near.mac == HOST_LEG_MAC => false,
            (Some(_), _) => return Err(KernelError::HostLegTaken(HOST_LEG)),
            (None, far) => {
                if far.is_some() {
                    self.with(|ns| ns.rtnl.delete_link(HOST_LEG_FAR).doing(doing))?;
                }
                host.with(|ns| self.make_host_leg(&ns.rtnl).doing(doing))?;
                true
            }
        };
        host.with(|ns| host_leg_up(&ns.rtnl, HOST_LEG).doing(doing))?;
        self.with(|ns| {
            host_leg_up(&ns.rtnl, HOST_LEG_FAR).doing(doing)?;
            Ok(())
        })?;
        if made {
            host.with(|ns| ns.rtnl.wait_running(HOST_LEG).doing(doing))?;
            self.with(|ns| ns.rtnl.wait_running(HOST_LEG_FAR).doing(doing))?;
        }
        Ok(made)
    }

    fn make_host_leg(&self, rtnl: &Rtnl) -> io::Result<()> {
        let near = VethEnd {
            name: HOST_LEG,
            mac: HOST_LEG_MAC,
            namespace: None,
        };
        let far = VethEnd {
            name: HOST_LEG_FAR,
            mac: GATEWAY_MAC,
            namespace: Some(self.namespace.as_fd()),
        };
        rtnl.add_veth(&near, &far, DEVICE_MTU)
    }

    /// Brings the domain to the plan. What stands on devices that are not there yet (the TAP before the carrier runs,
    /// a leg whose container is gone) is left out and put by a later call.
    pub fn reconcile(&self, plan: &DomainPlan) -> Result<Report> {
        self.with(|ns| {
            let mut switches = Report::default();
            set_sysctls(&plan.sysctls, &mut switches);
            let mut report = ns.reconcile(&plan.kernel, Place::Domain)?;
            report.changes += switches.changes;
            report.failures.append(&mut switches.failures);
            Ok(report)
        })
    }
}

/// The host's own IPv6 switch may be off by default; on weft's leg it is needed. No router advertises there.
fn host_leg_up(rtnl: &Rtnl, name: &str) -> io::Result<()> {
    for (switch, value) in [
        ("disable_ipv6", "0"),
        ("accept_ra", "0"),
        ("accept_dad", "0"),
    ] {
        sysctl::ensure(&format!("net/ipv6/conf/{name}/{switch}"), value)?;
    }
    match rtnl.link(name)? {
        Some(link) if !link.up => rtnl.set_up(link.index),
        _ => Ok(()),
    }
}

fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == NSFS_MAGIC)
}

/// As ip-netns(8) does: the directory is a shared mount of its own, so that mounts in it are seen by mount namespaces
/// made before. Held locked, because two that mount it over itself at once would hide each other's namespaces.
fn prepare_directory() -> Result<Flock<fs::File>> {
    let doing = || format!("prepare {NETNS_DIR}");
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(NETNS_DIR)
        .doing(doing)?;
    let directory = fs::File::open(NETNS_DIR).doing(doing)?;
    let lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .doing(doing)?;
    let none: Option<&str> = None;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(none, NETNS_DIR, none, flags, none)
    };
    match share() {
        Err(Errno::EINVAL) => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(NETNS_DIR), NETNS_DIR, none, flags, none).doing(doing)?;
            share().doing(doing)?;
        }
        other => other.doing(doing)?,
    }
    Ok(lock)
}

fn create(path: &Path) -> io::Result<()> {
    // A crash between making the file and mounting on it leaves a plain file.
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o000)
        .open(path)?;
    let mounted = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let none: Option<&str> = None;
            mount(Some(OWN), path, none, MsFlags::MS_BIND, none)
        });
        worker.join().unwrap_or(Err(Errno::EIO))
    });
    if mounted.is_err() {
        let _ = fs::remove_file(path);
    }
    Ok(mounted?)
}

/// Unmounts and unlinks a domain's name. What still has a descriptor in it keeps it alive.
pub(crate) fn forget(name: &str) -> io::Result<()> {
    let path = path_of(name);
    while is_namespace(&path) {
        umount2(&path, MntFlags::MNT_DETACH)?;
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_domains_are_taken() {
        for good in ["weft-abcdefgh", "weft-t123"] {
            assert!(is_domain_name(good), "{good}");
        }
        for bad in [
            "weft-",
            "weft",
            "../weft-a",
            "weft-../x",
            "weft-a/b",
            "weft-a.b",
            "blue",
            "weft-0123456789012345678901",
        ] {
            assert!(!is_domain_name(bad), "{bad}");
            assert!(matches!(
                Domain::open_or_create(bad),
                Err(KernelError::DomainName(_))
            ));
        }
    }
}
