//! The fast path of this host's containers to those of others: away before anything changes that it stands on, and
//! laid again once all else stands.

use std::collections::BTreeSet;
use std::sync::Arc;

use tracing::{info, warn};
use weft_core::view::View;
use weft_kernel::{Backend, Domain, FastMemory, FastPath, FastTable, LocalFacts, plan_fast_path};
use weft_lb::LbPlan;

/// What the kernel's thread keeps of it.
pub(super) struct Shortcut {
    domain: Arc<Domain>,
    table: FastTable,
    /// `None` until it is read from what an earlier daemon left.
    memory: Option<FastMemory>,
    /// The next daemon will find it.
    is_kept: bool,
    wanted: Option<FastPath>,
    /// The devices of the `vxlan` carrier by which it may lead, as far as the last pass saw.
    by_vxlan: BTreeSet<&'static str>,
    trouble: Option<String>,
}

impl Shortcut {
    pub(super) fn new(domain: Arc<Domain>) -> Self {
        Self {
            domain,
            table: FastTable::default(),
            memory: None,
            is_kept: false,
            wanted: None,
            by_vxlan: BTreeSet::new(),
            trouble: None,
        }
    }

    /// The first thing of a pass: away with it, unless nothing changes.
    pub(super) fn prepare(&mut self, view: &View, facts: &LocalFacts, balance: &LbPlan) {
        if let Err(error) = self.remember(view, balance) {
            self.tell(Some(error));
        }
        self.wanted = self.plan(view, facts);
        self.withdraw_unless_wanted();
        // Behind that, which takes away what an older weft kept there.
        if let Err(error) = self.keep() {
            self.tell(Some(error));
        }
    }

    /// The last thing of a pass. All that it stands on is in place, or is not, and so is the `vxlan` carrier with its filter.
    pub(super) fn finish(
        &mut self,
        view: &View,
        facts: &LocalFacts,
        (may_stand, by_vxlan): (bool, BTreeSet<&'static str>),
    ) {
        if self.by_vxlan != by_vxlan {
            self.by_vxlan = by_vxlan;
            self.wanted = self.plan(view, facts);
        }
        if !may_stand || !self.is_kept {
            self.wanted = None;
        }
        match &self.wanted {
            Some(wanted) => {
                let laid = self.table.lay(&self.domain, wanted);
                self.tell(laid.err().map(|error| error.to_string()));
            }
            None => self.withdraw_unless_wanted(),
        }
    }

    /// Nothing while it is not known what an earlier daemon's was.
    fn plan(&self, view: &View, facts: &LocalFacts) -> Option<FastPath> {
        plan_fast_path(view, facts, self.memory.as_ref()?, &self.by_vxlan)
    }

    /// What is known of virtual addresses, as of [`Self::prepare`]. Nothing, while the next daemon would not know it.
    pub(super) fn memory(&self) -> Option<&FastMemory> {
        self.memory.as_ref().filter(|_| self.is_kept)
    }

    fn keep(&mut self) -> Result<(), String> {
        let kept = match &self.memory {
            Some(memory) => self.domain.keep_fast_memory(memory),
            None => return Ok(()),
        };
        self.is_kept = kept.is_ok();
        kept.map_err(|error| error.to_string())
    }

    fn remember(&mut self, view: &View, balance: &LbPlan) -> Result<(), String> {
        if self.memory.is_none() {
            let memory = self.domain.fast_memory();
            self.memory = Some(memory.map_err(|error| error.to_string())?);
        }
        let memory = self.memory.get_or_insert_default();
        memory.note(view, backends(balance));
        Ok(())
    }

    fn withdraw_unless_wanted(&mut self) {
        let wanted = self.wanted.as_ref();
        if let Err(error) = self.table.withdraw_unless(&self.domain, wanted) {
            warn!(%error, "the fast path stands, and should not");
        }
    }

    /// Once: all goes the long way then, as it does on a kernel that has none.
    fn tell(&mut self, trouble: Option<String>) {
        if self.trouble != trouble
            && let Some(error) = &trouble
        {
            info!(%error, "no fast path between containers");
        }
        self.trouble = trouble;
    }
}

/// What connections that begin here may be turned into.
fn backends(balance: &LbPlan) -> impl Iterator<Item = Backend> + '_ {
    balance.services.iter().flat_map(|(at, balance)| {
        let ips: BTreeSet<_> = balance.table.iter().copied().collect();
        ips.into_iter().map(|ip| Backend {
            ip,
            proto: at.proto,
            port: balance.target,
        })
    })
}
