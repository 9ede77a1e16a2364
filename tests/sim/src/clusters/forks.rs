//! The people who see that a member's chain of the roster was forked: they remove that member, and all agree again.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_core::model::NodeId;

use super::{AGREE_WITHIN, Cluster};
use crate::faults::Action;
use crate::nodes::Shell;

/// Whoever was removed joins again after this.
const BEGUN_ANEW: Duration = Duration::from_secs(5);

impl Cluster {
    /// Members that forked their chains, according to anybody: as long as they are there the cluster may be divided.
    pub(super) fn forgers(&self) -> BTreeSet<NodeId> {
        let rosters = self
            .world
            .running()
            .filter(|(host, _)| !self.ledger.evicted.contains(host))
            .filter_map(|(_, shell)| shell.node().roster());
        rosters
            .flat_map(|roster| roster.forks().iter().map(move |fork| (roster, fork.issuer)))
            .filter(|(roster, issuer)| roster.is_member(issuer))
            .map(|(_, issuer)| issuer)
            .collect()
    }

    pub(super) fn is_fork_seen(&self) -> bool {
        self.world.running().any(|(_, shell)| sees(shell))
    }

    /// Who has not heard of any fork.
    pub(super) fn blind_to_forks(&self) -> Vec<String> {
        let blind = self.world.running().filter(|(_, shell)| !sees(shell));
        let blind: Vec<usize> = blind.map(|(host, _)| host).collect();
        (!blind.is_empty())
            .then(|| format!("hosts {blind:?} have not seen that a chain was forked"))
            .into_iter()
            .collect()
    }

    /// Whoever hangs by too many admissions to show them in a handshake can't be told why nobody answers; people see that.
    fn see_who_is_alone(&mut self) {
        for host in 0..self.hosts {
            let shell = self.world.hosts[host].machine.as_ref();
            let roster = shell.and_then(|shell| Some((shell.id(), shell.node().roster()?)));
            let is_deep = roster.is_some_and(|(me, roster)| {
                roster.founder() != me && roster.chain_of(&me).is_empty()
            });
            if is_deep && !self.ledger.evicted.contains(&host) {
                self.is_told_to_begin_anew(host);
            }
        }
    }

    /// People remove all who forked their chains; they come back as somebody else.
    pub(super) fn remove_forgers(&mut self) {
        let forgers = self.forgers();
        // Somebody must be left to remove the others.
        let mut others = self.able().into_iter();
        if forgers.is_empty() || !others.any(|host| !forgers.contains(&self.id_of(host))) {
            return;
        }
        self.ledger.divided = true;
        let anew = self.world.now.plus(BEGUN_ANEW);
        for host in 0..self.hosts {
            if forgers.contains(&self.id_of(host)) {
                self.on_removal(host, 1, false);
                self.world.schedule(anew, Action::Wipe(host));
                self.world.schedule(anew, Action::Boot(host));
            }
        }
        // Some begin anew on the wrong side first, and then once more.
        let whole = self.step_until(AGREE_WITHIN * 2, |cluster| {
            cluster.see_who_is_alone();
            cluster.is_settled() && cluster.forgers().is_empty() && cluster.broken().is_empty()
        });
        if whole.is_none() {
            for line in self.broken() {
                self.violation(format!("after the forgers went: {line}"));
            }
        }
    }
}

fn sees(shell: &Shell) -> bool {
    let roster = shell.node().roster();
    roster.is_some_and(|roster| !roster.forks().is_empty())
}
