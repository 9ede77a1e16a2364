//! The thread that keeps the kernel as it should be: plans from the newest view and the local attachments, compares,
//! applies; on every change, when somebody asks and waits for it, and every few seconds in case others changed
//! something.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{debug, warn};
use weft_core::model::EndpointId;
use weft_core::view::{Liveness, View};
use weft_kernel::{
    Domain, Gatherer, Host, HostPlan, HostState, LocalFacts, Rules, filter, nft, plan_domain,
    plan_host,
};
use weft_lb::Published;

use super::core_thread::Core;
use super::shortcut::Shortcut;
use super::vxlan::VxlanDevices;

/// A look at everything although nothing seems to have changed.
const ROUTINE: Duration = Duration::from_secs(3);
/// Changes that come within this time are applied together.
const SETTLE: Duration = Duration::from_millis(5);

/// What the thread is told.
enum Job {
    /// Something may have changed; answer when it is applied.
    Apply(Option<oneshot::Sender<Result<(), String>>>),
    /// End.
    Stop,
}

/// What the daemon knows beside the view.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    /// The host's own addresses.
    pub(crate) host_addrs: Vec<IpAddr>,
    /// The host's resolvers, weft's own left out.
    pub(crate) resolvers: Vec<IpAddr>,
    /// Published ports that this host serves.
    pub(crate) published: BTreeSet<Published>,
    /// Legs whose removal is under way: no longer to be served although the view still has them.
    pub(crate) leaving: BTreeSet<EndpointId>,
}

/// Handle to the thread.
#[derive(Clone)]
pub(crate) struct Kernel {
    jobs: Sender<Job>,
    surroundings: Arc<Mutex<Surroundings>>,
    findings: Arc<Mutex<Findings>>,
}

/// What the last pass found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings {
    /// Why the kernel is not as it should be, if so.
    pub(crate) trouble: Option<String>,
    /// What stands on the host beside weft's own, one line each.
    pub(crate) host_changes: Vec<String>,
    /// What a person should do because weft can't, one line each.
    pub(crate) warnings: Vec<String>,
}

/// Keeps the host's state durably.
pub(crate) type Save = Box<dyn FnMut(&HostState) -> std::io::Result<()> + Send>;

/// How the host was before weft changed it, and how that is kept.
pub(crate) struct HostRecord {
    pub(crate) state: HostState,
    pub(crate) save: Save,
}

impl Kernel {
    /// Starts the thread.
    pub(crate) fn start(
        domain: Arc<Domain>,
        host: Arc<Host>,
        record: HostRecord,
        core: Core,
    ) -> anyhow::Result<(Self, std::thread::JoinHandle<HostState>)> {
        let (jobs, queue) = channel();
        let kernel = Self {
            jobs,
            surroundings: Arc::default(),
            findings: Arc::default(),
        };
        let ipv6 = weft_kernel::ipv6_available();
        let worker = Worker {
            vxlan: VxlanDevices::new(domain.clone(), host.clone(), core.clone()),
            fast: Shortcut::new(domain.clone()),
            _gatherer: domain.gather()?,
            domain,
            host,
            record,
            core,
            kernel: kernel.clone(),
            ipv6,
            domain_table: Rules::default(),
            host_table: Rules::default(),
        };
        let thread = std::thread::Builder::new()
            .name("weft-kernel".to_owned())
            .spawn(move || worker.run(&queue))?;
        Ok((kernel, thread))
    }

    /// Applies what is known now and waits until it is in place.
    pub(crate) async fn apply(&self) -> Result<(), String> {
        let (sender, done) = oneshot::channel();
        let _ = self.jobs.send(Job::Apply(Some(sender)));
        done.await
            .unwrap_or_else(|_| Err("the daemon is stopping".to_owned()))
    }

    /// Something may have changed.
    pub(crate) fn poke(&self) {
        let _ = self.jobs.send(Job::Apply(None));
    }

    /// Ends the thread after what is queued.
    pub(crate) fn stop(&self) {
        let _ = self.jobs.send(Job::Stop);
    }

    /// Changes what is known beside the view.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Surroundings)) {
        change(
            &mut self
                .surroundings
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// What the last pass found.
    pub(crate) fn findings(&self) -> Findings {
        self.findings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Puts the routes to those peers that are heard back into a domain that an earlier daemon left, until `enough`: a start
/// may have to wait for others before it may speak for itself, and the connections of the containers can't.
/// Peers that are not heard yet stay out of the plan: their packets end in the blackhole, not in an error.
pub(crate) async fn readopt(domain: Arc<Domain>, core: Core, mut enough: oneshot::Receiver<()>) {
    let mut views = core.watch();
    let mut heard = Vec::new();
    loop {
        tokio::select! {
            _ = &mut enough => return,
            changed = views.changed() => if changed.is_err() { return },
        }
        let Some(mut view) = views.borrow_and_update().as_deref().cloned() else {
            continue;
        };
        view.members
            .retain(|member| member.liveness != Liveness::Down || member.id == view.me);
        let now: Vec<_> = view.members.iter().map(|m| (m.id, m.mtu)).collect();
        if now.len() < 2 || now == heard {
            continue;
        }
        heard = now;
        let domain = domain.clone();
        let mut facts = LocalFacts::from_view(&view);
        facts.ipv6 = weft_kernel::ipv6_available();
        let put =
            tokio::task::spawn_blocking(move || domain.reconcile(&plan_domain(&view, &facts)));
        if let Ok(Err(error)) = put.await {
            warn!(%error, "can't put the routes back yet");
        }
    }
}

struct Worker {
    domain: Arc<Domain>,
    host: Arc<Host>,
    record: HostRecord,
    core: Core,
    vxlan: VxlanDevices,
    fast: Shortcut,
    /// Lets what busy legs send be gathered, as long as the thread runs.
    _gatherer: Gatherer,
    kernel: Kernel,
    ipv6: bool,
    domain_table: Rules,
    host_table: Rules,
}

impl Worker {
    fn run(mut self, queue: &Receiver<Job>) -> HostState {
        let mut next = Instant::now();
        loop {
            let mut waiting = Vec::new();
            match queue.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Job::Apply(sender)) => waiting.extend(sender),
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => return self.record.state,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !gather(queue, &mut waiting) {
                return self.record.state;
            }
            next = Instant::now() + ROUTINE;
            let outcome = self.reconcile();
            self.remember(&outcome);
            for sender in waiting {
                let _ = sender.send(outcome.clone());
            }
        }
    }

    fn reconcile(&mut self) -> Result<(), String> {
        let Some(view) = self.core.view() else {
            return Ok(());
        };
        let around = self
            .kernel
            .surroundings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        self.vxlan.guard(&view);
        let mut facts = self.facts(&view, &around);
        let balance = weft_lb::plan(
            &view,
            &weft_lb::LocalFacts {
                host_addrs: around.host_addrs,
                published_here: around.published,
                // The base filter turns queries to the host's resolvers already.
                resolvers: Vec::new(),
                ipv6: self.ipv6,
            },
        );
        self.fast.prepare(&view, &facts, &balance);
        // The filter first: an address must not work before it is policed, and nothing is forwarded unguarded.
        let domain_rules = self.domain_rules(&view, &facts, &balance);
        let host_plan = plan_host(&view, &facts);
        let host_rules = self.host_rules(&view, &facts, &host_plan, &balance);
        let rules = domain_rules.clone().and(host_rules.clone());
        self.vxlan.put_keys(&view);
        facts.vxlan = self.vxlan.keep(&view, rules);
        let domain = self.reconcile_domain(&view, &facts);
        if domain.is_ok() {
            self.vxlan.remove_strays(&view);
        }
        let may_be_fast = domain_rules.is_ok() && domain.is_ok();
        let by_vxlan = match self.vxlan.is_counted() {
            true => facts.vxlan.clone(),
            false => BTreeSet::new(),
        };
        self.fast.finish(&view, &facts, (may_be_fast, by_vxlan));
        let host = self.reconcile_host(&host_plan);
        domain_rules.and(domain).and(host_rules).and(host)
    }

    fn facts(&self, view: &View, around: &Surroundings) -> LocalFacts {
        let mut facts = LocalFacts::from_view(view);
        facts.ipv6 = self.ipv6;
        facts.resolvers.clone_from(&around.resolvers);
        facts.published = !around.published.is_empty();
        facts.legs.retain(|leg| !around.leaving.contains(&leg.id));
        facts
    }

    fn reconcile_domain(&self, view: &View, facts: &LocalFacts) -> Result<(), String> {
        self.domain
            .ensure_host_leg(&self.host)
            .map_err(|error| error.to_string())?;
        let report = self
            .domain
            .reconcile(&plan_domain(view, facts))
            .map_err(|error| error.to_string())?;
        first_failure(&report.failures)
    }

    fn reconcile_host(&mut self, plan: &HostPlan) -> Result<(), String> {
        let HostRecord { state, save } = &mut self.record;
        let done = self
            .host
            .reconcile(plan, state, &mut **save)
            .map_err(|error| error.to_string())?;
        let mut findings = self
            .kernel
            .findings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        findings.host_changes = done.host_changes;
        findings.warnings = done.warnings;
        findings.warnings.extend(self.vxlan.trouble());
        first_failure(&done.report.failures)
    }

    fn domain_rules(
        &mut self,
        view: &View,
        facts: &LocalFacts,
        balance: &weft_lb::LbPlan,
    ) -> Result<(), String> {
        let text = [
            filter::domain_filter(view, facts, self.fast.memory()),
            weft_lb::domain_fragment(balance),
        ];
        self.domain_table
            .keep(nft::Where::Domain(&self.domain), &[&text[0], &text[1]])
            .map_err(|error| format!("the domain's rules: {error}"))
    }

    fn host_rules(
        &mut self,
        view: &View,
        facts: &LocalFacts,
        plan: &HostPlan,
        balance: &weft_lb::LbPlan,
    ) -> Result<(), String> {
        let guard = self
            .host
            .guard(plan, &self.record.state)
            .map_err(|error| error.to_string())?;
        let text = [
            filter::host_filter(view, facts, guard),
            weft_lb::host_fragment(balance),
        ];
        self.host_table
            .keep(nft::Where::Host(&self.host), &[&text[0], &text[1]])
            .map_err(|error| format!("the host's rules: {error}"))
    }

    /// Logs trouble when it begins, changes or ends, not every few seconds.
    fn remember(&self, outcome: &Result<(), String>) {
        let now = outcome.as_ref().err().cloned();
        let mut findings = self
            .kernel
            .findings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if findings.trouble != now {
            match &now {
                Some(error) => warn!(%error, "the kernel is not as it should be; trying again"),
                None => debug!("the kernel is as it should be"),
            }
        }
        findings.trouble = now;
    }
}

/// One of the steps that did not work; all others were done.
fn first_failure(failures: &[weft_kernel::KernelError]) -> Result<(), String> {
    failures
        .first()
        .map_or(Ok(()), |error| Err(error.to_string()))
}

/// Takes the jobs that come within a moment; false when one of them is the last.
fn gather(queue: &Receiver<Job>, waiting: &mut Vec<oneshot::Sender<Result<(), String>>>) -> bool {
    let until = Instant::now() + SETTLE;
    loop {
        match queue.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Job::Apply(sender)) => waiting.extend(sender),
            Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => return true,
        }
    }
}
