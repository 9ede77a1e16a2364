//! The host's own namespace: `weft0`, weft's table and rule, forwarding, and the way back to how it was.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use weft_core::layout::{HOST_LEG, NFT_TABLE};
use weft_core::view::VxlanView;

use super::apply::{Namespace, Place, Report};
use super::domain::{self, Domain, is_domain_name};
use super::forwarding::{self, HostState, SwitchError};
use super::netns::{OWN, inside};
use super::shield::{Senders, Shield};
use super::{doors, nfnetlink, nft, sys};
use crate::error::{Doing, KernelError, Result};
use crate::esp::EspPlan;
use crate::filter::Guard;
use crate::plan::HostPlan;
use crate::state::{Family, Kernel};

/// How long a teardown waits for devices to be gone. The kernel frees 300 of them in a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// The namespace that plays the host: the one of the thread that made this.
#[derive(Debug)]
pub struct Host {
    namespace: OwnedFd,
    /// The second filter of the `vxlan` carrier.
    shields: Mutex<Shields>,
}

#[derive(Debug, Default)]
struct Shields {
    own: Option<Shield>,
    /// The socket of another process's, which stands until this one has its own.
    former: Option<OwnedFd>,
}

/// What a reconciliation of the host did and what stands there now.
#[derive(Debug, Default)]
pub struct HostReport {
    /// Routes, rules, addresses.
    pub report: Report,
    /// Everything on the host beside `weft0` and weft's own tables, one line each.
    pub host_changes: Vec<String>,
    /// What a person should do because weft can't, one line each.
    pub warnings: Vec<String>,
}

impl Host {
    /// The calling thread's namespace.
    pub fn current() -> Result<Self> {
        let namespace = open(OWN, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .doing(|| format!("open {OWN}"))?;
        let shields = Mutex::default();
        Ok(Self { namespace, shields })
    }

    /// Runs `work` on a thread of its own inside the host's namespace, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        inside(self.namespace.as_fd(), work).doing(|| "enter the host's namespace".into())
    }

    pub(crate) fn with<T: Send>(
        &self,
        work: impl FnOnce(&Namespace) -> Result<T> + Send,
    ) -> Result<T> {
        self.run(|| work(&Namespace::open().doing(|| "open netlink in the host".into())?))?
    }

    /// Filters for the `vxlan` carrier in a table, too, that nobody can take away while this process lives: it stands from
    /// then on, and lets in what the peers of `vxlan` send. True if it is a new one.
    ///
    /// # Errors
    /// On kernels before Linux 5.12. There is no such table then, not even the one of before.
    pub fn raise_shield(&self, vxlan: &VxlanView) -> Result<bool> {
        let senders = Senders::of(vxlan);
        let mut shields = self.lock_shields();
        let is_new = shields.own.is_none();
        let raised = match shields.own.take() {
            Some(mut shield) => shield.let_in(&senders).map(|()| shield),
            None => self.run(|| Shield::raise(&senders))?,
        };
        shields.own = Some(raised.doing(|| "make a table of weft's own".into())?);
        shields.former = None;
        Ok(is_new)
    }

    /// Takes it away.
    pub fn lower_shield(&self) {
        *self.lock_shields() = Shields::default();
    }

    /// Is it there?
    pub fn has_shield(&self) -> bool {
        let shields = self.lock_shields();
        shields.own.is_some() || shields.former.is_some()
    }

    /// What it stands by, once more: while somebody has this open the table stands, as it is.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn shield_socket(&self) -> std::io::Result<Option<OwnedFd>> {
        let shields = self.lock_shields();
        let former = || shields.former.as_ref().map(OwnedFd::as_fd);
        let socket = shields.own.as_ref().map(Shield::socket).or_else(former);
        socket.map(|socket| socket.try_clone_to_owned()).transpose()
    }

    /// Keeps another process's table, until this one has made its own.
    pub fn keep_shield(&self, socket: OwnedFd) {
        self.lock_shields().former = Some(socket);
    }

    fn lock_shields(&self) -> MutexGuard<'_, Shields> {
        self.shields.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the host's filter needs the guard. Ask, and apply the filter, *before* [`Self::reconcile`] switches
    /// forwarding on: so there is no moment in which the host forwards for strangers.
    pub fn guard(&self, plan: &HostPlan, state: &HostState) -> Result<Guard> {
        self.run(|| forwarding::guard(plan.forward, plan.ipv6, state))?
            .doing(|| "find out who forwards on this host".into())
    }

    /// Brings the host to the plan. `save` keeps the state durably; it is called before anything is done that only the
    /// state can undo.
    pub fn reconcile(
        &self,
        plan: &HostPlan,
        state: &mut HostState,
        save: &mut (dyn FnMut(&HostState) -> std::io::Result<()> + Send),
    ) -> Result<HostReport> {
        self.with(|ns| {
            let mut report = ns.reconcile(&plan.kernel, Place::Host)?;
            if plan.forward {
                let families: &[Family] = if plan.ipv6 {
                    &[Family::V4, Family::V6]
                } else {
                    &[Family::V4]
                };
                for family in families {
                    match forwarding::switch_on(&ns.rtnl, *family, state, &mut *save) {
                        Ok(changed) => report.changes += usize::from(changed),
                        Err(error) => report.failures.push(switch_failure(error)),
                    }
                }
            }
            let mut host_changes = state.describe();
            match doors::open(plan.forward) {
                Ok(opened) => host_changes.extend(opened),
                Err(error) => report.failures.push(error),
            }
            let warnings = if plan.forward {
                doors::warnings()
            } else {
                Vec::new()
            };
            Ok(HostReport {
                report,
                host_changes,
                warnings,
            })
        })
    }

    /// Removes all of weft from the host and the domain itself: devices first, then, once they are gone, the
    /// namespace's name. Goes on after failures and returns them all; doing it again is harmless.
    ///
    /// The caller has ended the carrier and dropped its [`Domain`]: whatever still holds a descriptor in the namespace
    /// keeps it alive without a name.
    pub fn teardown(&self, name: &str, state: &mut HostState) -> Vec<KernelError> {
        let mut failures = Vec::new();
        let mut note = |result: Result<()>| failures.extend(result.err());
        if !is_domain_name(name) {
            note(Err(KernelError::DomainName(name.to_owned())));
            return failures;
        }
        if domain::path_of(name).exists() {
            match Domain::open(name) {
                Ok(domain) => {
                    if owns_host_leg(&domain) {
                        note(self.delete_host_leg());
                    }
                    note(empty(&domain));
                }
                Err(error) => note(Err(error)),
            }
        }
        note(self.without_domain(name));
        note(self.remove_stray_esp(&EspPlan::default()));
        note(self.run(|| doors::open(false).map(drop)).and_then(|r| r));
        for family in [Family::V4, Family::V6] {
            let off = self.run(|| forwarding::switch_off(family, state));
            note(off.and_then(|r| r.doing(|| "put the forwarding switches back".into())));
        }
        note(domain::forget(name).doing(|| format!("remove the namespace {name}")));
        failures
    }

    fn delete_host_leg(&self) -> Result<()> {
        self.with(|ns| {
            ns.rtnl
                .delete_link(HOST_LEG)
                .doing(|| format!("delete {HOST_LEG}"))
        })
    }

    /// Routes, rule and table, unless `weft0` is still there and so somebody else's.
    fn without_domain(&self, name: &str) -> Result<()> {
        let leg = self.with(|ns| ns.rtnl.link(HOST_LEG).doing(|| format!("find {HOST_LEG}")))?;
        if leg.is_some() {
            tracing::warn!(name, "{HOST_LEG} belongs to another domain; left as it is");
            return Ok(());
        }
        let report = self.with(|ns| ns.reconcile(&Kernel::default(), Place::Host))?;
        if self.has_table()? {
            nft::remove(nft::Where::Host(self))?;
        }
        report.failures.into_iter().next().map_or(Ok(()), Err)
    }

    fn has_table(&self) -> Result<bool> {
        let chains = self.run(nfnetlink::chains)?;
        Ok(chains
            .doing(|| "read the host's nft chains".into())?
            .iter()
            .any(|c| c.family == nfnetlink::TableFamily::Inet && c.table == NFT_TABLE))
    }
}

fn switch_failure(error: SwitchError) -> KernelError {
    match error {
        SwitchError::Kernel(source) => KernelError::System {
            doing: "switch forwarding on".into(),
            source,
        },
        SwitchError::Save(source) => KernelError::Save(source),
    }
}

fn owns_host_leg(domain: &Domain) -> bool {
    let far = domain.with(|ns| {
        ns.rtnl
            .link(weft_core::layout::HOST_LEG_FAR)
            .doing(|| "find wh0".into())
    });
    matches!(far, Ok(Some(_)))
}

/// Deletes every device of a domain and waits until the kernel says they are gone.
fn empty(domain: &Domain) -> Result<()> {
    domain.with(|ns| {
        let doing = || "delete the domain's devices".to_owned();
        let others = || -> Result<Vec<String>> {
            let links = ns.rtnl.links().doing(doing)?;
            Ok(links
                .into_iter()
                .filter(|l| !l.loopback)
                .map(|l| l.name)
                .collect())
        };
        for name in others()? {
            ns.rtnl.delete_link(&name).doing(doing)?;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = others()?;
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(KernelError::StillThere(PATIENCE.as_secs(), left.join(", ")));
            }
            let _ = sys::readable(&[], Some(Duration::from_millis(5)));
        }
    })
}
