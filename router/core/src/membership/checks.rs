//! Our own verdict on silence.
//!
//! A check begins when foca's probe of a node failed (a *suspicion*: the verdict is ours, foca's timer is dropped), when
//! another node says that somebody is dead (a *charge*), or already when another only suspects somebody (a *watch*), so
//! that the answer is at hand when the charge comes: news of a death then travels as fast as gossip does, though each
//! node judges for itself. While it runs, the node is asked directly over and over, with the incarnation that is
//! suspected, so that it refutes by answering.
//!
//! | the node | suspicion | charge | watch |
//! |---|---|---|---|
//! | is heard | dropped | dropped, and the node told that it is held for dead somewhere | dropped |
//! | refuted it elsewhere (younger incarnation or life) | dropped | dropped | dropped |
//! | stays silent | declared dead after `Pace::silence` | believed after `Pace::charge` and enough questions | dropped in the end |

use std::time::Duration;

use foca::{Incarnation, Member, State};

use crate::model::{NodeId, Now};

use super::engine::Task;
use super::ident::Ident;
use super::wire::{Body, Standing};
use super::{Membership, MembershipEvent};

/// Up to so many nodes a watch asks as often as a suspicion does. In larger ones, where a suspect is watched by a crowd,
/// less often: by the time of the charge it has still asked enough.
const ALL_ASK: usize = 16;
/// Questions that must have stayed without any answer before a charge is believed: at a fifth of all datagrams lost one of
/// 160 such series fails, and it takes a false charge besides.
const QUESTIONS: u32 = 5;

/// One node under examination.
#[derive(Debug)]
pub(super) struct Check {
    subject: Ident,
    incarnation: Incarnation,
    /// Since when it has been asked in vain.
    since: Now,
    /// How often it was asked since then.
    asked: u32,
    /// Since when our own probe has been a failure.
    suspected: Option<Now>,
    /// Does another say that it is dead?
    charged: bool,
    /// Which one of all, for [`Task::Check`].
    serial: u64,
}

enum Verdict {
    Dead,
    /// Refuted, or nobody said more.
    Dropped,
    /// Ask again then.
    Open(Now),
}

impl Membership {
    /// Our own probe failed.
    pub(super) fn suspect(&mut self, now: Now, subject: Ident, incarnation: Incarnation) {
        let Some(check) = self.begin_check(now, subject, incarnation) else {
            return;
        };
        if check.suspected.is_none() {
            check.suspected = Some(now);
            self.hurry(now, subject.id);
            // The sooner it hears of it, by whatever way, the sooner it can refute; the sooner others hear of it, the
            // further their own checks are when the verdict falls.
            self.arm_news(now);
        }
    }

    /// Another suspects a node.
    pub(super) fn note_suspicion(&mut self, now: Now, member: &Member<Ident>) {
        let held = self.active(&member.id().id);
        let news = held.is_some_and(|held| {
            held.id() == member.id() && held.incarnation() <= member.incarnation()
        });
        if member.state() == State::Suspect && news {
            self.begin_check(now, *member.id(), member.incarnation());
        }
    }

    /// Another says that a node is dead.
    pub(super) fn charge(
        &mut self,
        now: Now,
        member: &Member<Ident>,
        out: &mut Vec<MembershipEvent>,
    ) {
        let Some(held) = self.active(&member.id().id) else {
            return;
        };
        if held.id().life < member.id().life {
            // A life of it that we have not even met: gone with the one that we know.
            self.hello_if_due(now, member.id().id, out);
        }
        if held.id() != member.id() {
            return;
        }
        if let Some(check) = self.begin_check(now, *held.id(), held.incarnation())
            && !check.charged
        {
            check.charged = true;
            self.hurry(now, held.id().id);
        }
    }

    /// The check of `subject`, begun now unless one is under way.
    fn begin_check(
        &mut self,
        now: Now,
        subject: Ident,
        incarnation: Incarnation,
    ) -> Option<&mut Check> {
        let peer = self.peers.get(&subject.id)?;
        let running = peer
            .check
            .as_ref()
            .is_some_and(|check| check.subject == subject);
        if !running {
            let serial = self.sequence;
            self.arm(now, Task::Check(subject.id, serial));
            self.peers.get_mut(&subject.id)?.check = Some(Check {
                subject,
                incarnation,
                since: now,
                asked: 0,
                suspected: None,
                charged: false,
                serial,
            });
        }
        let check = self.peers.get_mut(&subject.id)?.check.as_mut()?;
        check.incarnation = check.incarnation.max(incarnation);
        Some(check)
    }

    /// What was only watched is now pursued: the next look is now, and not when the watch would have asked again.
    fn hurry(&mut self, now: Now, id: NodeId) {
        let serial = self.sequence;
        let check = self.peers.get_mut(&id).and_then(|peer| peer.check.as_mut());
        if let Some(check) = check {
            check.serial = serial;
            self.arm(now, Task::Check(id, serial));
        }
    }

    /// The node was heard.
    pub(super) fn acquit(&mut self, now: Now, id: NodeId, out: &mut Vec<MembershipEvent>) {
        let check = self.peers.get_mut(&id).and_then(|peer| peer.check.take());
        let contested = check.filter(|check| check.charged);
        let Some(contested) = contested else { return };
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if now >= peer.next_hello {
            peer.next_hello = now.plus(super::hello::HELLO_GAP);
            let standing = Standing::Contested(contested.subject.life);
            self.send(id, Body::Hello(standing), out);
        }
    }

    pub(super) fn go_on_checking(
        &mut self,
        now: Now,
        id: NodeId,
        serial: u64,
        out: &mut Vec<MembershipEvent>,
    ) {
        let held = self.active(&id);
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(mut check) = peer.check.take_if(|check| check.serial == serial) else {
            return;
        };
        let Some(held) = held.filter(|held| *held.id() == check.subject) else {
            return;
        };
        match self.verdict(now, &check, held.incarnation()) {
            Verdict::Dead => self.declare_dead(now, &held, out),
            Verdict::Dropped => {}
            Verdict::Open(again) => {
                let body = Body::Check {
                    to: check.subject.life,
                    incarnation: check.incarnation,
                };
                check.asked = check.asked.saturating_add(1);
                if let Some(peer) = self.peers.get_mut(&id) {
                    peer.check = Some(check);
                }
                self.send(id, body, out);
                self.arm(again, Task::Check(id, serial));
            }
        }
    }

    fn verdict(&self, now: Now, check: &Check, incarnation: Incarnation) -> Verdict {
        let silence = self.pace.silence(self.visible.len() + 1);
        let charge = self.pace.charge();
        let silent_for = now.since(check.since);
        if check.charged && silent_for >= charge && check.asked >= QUESTIONS {
            return Verdict::Dead;
        }
        if incarnation > check.incarnation && !check.charged {
            return Verdict::Dropped;
        }
        let due = check
            .suspected
            .map(|since| since.max(check.since).plus(silence));
        if due.is_some_and(|due| due <= now) {
            return Verdict::Dead;
        }
        // A check that only waits for a charge outlasts the other's verdict and the way of the news.
        if silent_for >= silence + 2 * charge {
            return Verdict::Dropped;
        }
        let again = now.plus(self.question_gap(check));
        Verdict::Open(due.map_or(again, |due| again.min(due)))
    }

    fn question_gap(&self, check: &Check) -> Duration {
        let pursued = check.suspected.is_some() || check.charged;
        match pursued || self.visible.len() < ALL_ASK {
            true => self.pace.ask_again(),
            false => self.pace.watch_again(),
        }
    }

    /// Declares a node dead, and tells it so: if that reaches it, it takes a new name at once.
    fn declare_dead(&mut self, now: Now, held: &Member<Ident>, out: &mut Vec<MembershipEvent>) {
        let dead = Member::new(*held.id(), held.incarnation(), State::Down);
        self.apply(now, vec![dead], out);
        self.hello_if_due(now, held.id().id, out);
    }

    /// We were paused: all silence counts from now.
    pub(super) fn restart_checks(&mut self, now: Now) {
        for check in self
            .peers
            .values_mut()
            .filter_map(|peer| peer.check.as_mut())
        {
            check.since = now;
            check.asked = 0;
        }
    }
}
