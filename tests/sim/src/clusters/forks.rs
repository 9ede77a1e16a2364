//! The people who see that a member's chain of the roster was forked: they remove that member, and all agree again.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_core::model::NodeId;

use super::{AGREE_WITHIN, Cluster};
use crate::faults::Action;
use crate::nodes::{Shell, identity_of};

/// Whoever was removed joins again after this.
const BEGUN_ANEW: Duration = Duration::from_secs(5);

/// That a host is alone is seen after this.
const SEEN_ALONE: Duration = Duration::from_secs(20);

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

    /// Whom the others have no place for is told so, unless it shows too long a chain of admissions to be believed, or does
    /// not believe who removed the forger, whom the other branch let in, or knows none of them and they know nothing of it,
    /// as a host out of a backup and whom it let in. People see that it is alone.
    fn see_who_is_alone(&mut self) {
        let now = self.world.now;
        for host in 0..self.hosts {
            if !self.is_alone(host) {
                self.alone.remove(&host);
            } else if now.since(*self.alone.entry(host).or_insert(now)) >= SEEN_ALONE {
                self.alone.remove(&host);
                self.world.schedule(now, Action::Wipe(host));
                self.world.schedule(now, Action::Boot(host));
            }
        }
    }

    fn is_alone(&mut self, host: usize) -> bool {
        let shell = self.world.hosts[host].machine.as_ref();
        let known = shell.and_then(|shell| Some((shell.id(), shell.node().roster()?)));
        let hears_nothing = known.is_some_and(|(me, roster)| roster.is_member(&me));
        if hears_nothing {
            self.look_who_let_in(host);
        }
        // The last one of a cluster is no less a member of it.
        let has_others = || self.able().iter().any(|other| *other != host);
        hears_nothing && self.ledger.evicted.contains(&host) && has_others()
    }

    /// Who was let in by one branch may have removed the forger, and the other side has not heard of that.
    fn remove_on_each_side(&mut self) {
        if !self.removals.is_empty() {
            return;
        }
        let forgers = self.forgers();
        if !self.is_anybody_left(&forgers) {
            return;
        }
        self.send_away(&forgers);
        let gone: BTreeSet<NodeId> = forgers.into_iter().chain(self.lost_members()).collect();
        for id in gone {
            if (0..self.hosts).all(|host| self.id_of(host) != id) {
                self.remove_soon(id);
            }
        }
    }

    /// Who hosts were before they lost their disks, where somebody still lists them: a forger may have been told to remove
    /// them, and nobody else have heard of it.
    fn lost_members(&self) -> Vec<NodeId> {
        let able = self.able();
        let rosters = able.iter().filter_map(|host| {
            let shell = self.world.hosts[*host].machine.as_ref();
            shell.and_then(|shell| shell.node().roster())
        });
        let rosters: Vec<_> = rosters.collect();
        let former = (0..self.hosts).flat_map(|host| {
            let (of, lost) = self.world.hosts[host].key();
            (0..lost).map(move |earlier| identity_of(self.seed, (of, earlier)).id())
        });
        former
            .filter(|id| rosters.iter().any(|roster| roster.is_member(id)))
            .collect()
    }

    /// Somebody must be left to remove the others.
    fn is_anybody_left(&self, forgers: &BTreeSet<NodeId>) -> bool {
        let mut others = self.able().into_iter();
        others.any(|host| !forgers.contains(&self.id_of(host)))
    }

    /// Removes those of them that are hosts, who then join again.
    fn send_away(&mut self, forgers: &BTreeSet<NodeId>) {
        let anew = self.world.now.plus(BEGUN_ANEW);
        for host in 0..self.hosts {
            if forgers.contains(&self.id_of(host)) {
                self.on_removal(host, 1, false);
                self.world.schedule(anew, Action::Wipe(host));
                self.world.schedule(anew, Action::Boot(host));
            }
        }
    }

    /// People remove all who forked their chains; they come back as somebody else.
    pub(super) fn remove_forgers(&mut self) {
        let forgers = self.forgers();
        if forgers.is_empty() || !self.is_anybody_left(&forgers) {
            return;
        }
        self.ledger.divided = true;
        self.send_away(&forgers);
        // Some begin anew on the wrong side first, and then once more.
        let whole = self.step_until(AGREE_WITHIN * 2, |cluster| {
            cluster.see_who_is_alone();
            cluster.remove_on_each_side();
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
