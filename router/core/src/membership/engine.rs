//! foca's rim: what goes into it, and what it wants sent, timed and told.

use std::collections::BTreeSet;

use foca::{AccumulatingRuntime, Codec, Foca, Header, Incarnation, Member, Message};
use foca::{OwnedNotification, State, Timer};

use crate::model::{NodeId, Now};

use super::hello::digest_of;
use super::ident::{Ident, Plain};
use super::wire::{Body, Datagram};
use super::{
    DropReason, Engine, Membership, MembershipEvent, PAUSED, RENEWAL_BURST, RENEWAL_GAP,
    RENEWALS_AHEAD,
};

/// News waits this long for more news before it is told on.
const NEWS: std::time::Duration = std::time::Duration::from_millis(25);

/// What a timer does. One ordered map holds all of them, foca's too: it relies on their order.
#[derive(Clone, Debug)]
pub(super) enum Task {
    /// One of foca's own.
    Foca(Timer<Ident>),
    /// The probe with this number asks again.
    AskAgain(u64),
    /// The check of this node with this number goes on.
    Check(NodeId, u64),
    /// Gossip what was learnt.
    News,
    /// Greet one of the lost.
    Hello,
}

/// foca's present probe.
pub(super) struct Probe {
    target: Ident,
    number: u8,
    /// Which one of all, for [`Task::AskAgain`].
    serial: u64,
    started: Now,
    bytes: Vec<u8>,
    answered: bool,
}

type Effects = AccumulatingRuntime<Ident>;

impl Membership {
    pub(super) fn arm(&mut self, at: Now, task: Task) {
        self.sequence += 1;
        self.timers.insert((at, self.sequence), task);
    }

    pub(super) fn run(&mut self, now: Now, task: Task, out: &mut Vec<MembershipEvent>) {
        match task {
            Task::Foca(timer) => self.drive(now, &[], out, |foca, rt| foca.handle_timer(timer, rt)),
            Task::AskAgain(serial) => self.ask_again(now, serial, out),
            Task::Check(id, serial) => self.go_on_checking(now, id, serial, out),
            Task::News => {
                self.news_waits = false;
                self.drive(now, &[], out, |foca, rt| foca.gossip(rt));
            }
            Task::Hello => self.greet_the_lost(now, out),
        }
    }

    /// Sends `body` to a peer.
    pub(super) fn send(&mut self, to: NodeId, body: Body, out: &mut Vec<MembershipEvent>) {
        let datagram = Datagram {
            digest: self.digest,
            life: self.me.life,
            incarnation: self.incarnation,
            body,
        };
        out.push(MembershipEvent::Send {
            to,
            bytes: datagram.encode(),
        });
    }

    /// Hands members to foca, which tells them on.
    pub(super) fn apply(
        &mut self,
        now: Now,
        members: Vec<Member<Ident>>,
        out: &mut Vec<MembershipEvent>,
    ) {
        if !members.is_empty() {
            let touched: Vec<NodeId> = members.iter().map(|member| member.id().id).collect();
            self.drive(now, &touched, out, |foca, rt| {
                foca.apply_many(members.into_iter(), true, rt)
            });
        }
    }

    /// A message of foca from a member, its news already taken.
    pub(super) fn take_message(
        &mut self,
        now: Now,
        source: Ident,
        src_incarnation: Incarnation,
        message: Message<Ident>,
        out: &mut Vec<MembershipEvent>,
    ) {
        match message {
            Message::TurnUndead => {
                self.renew(now, self.me.life.renewals, out);
            }
            Message::PingReq { target, .. } if self.active(&target.id).is_none() => {
                self.dropped(DropReason::UnknownSubject);
            }
            Message::IndirectAck { target, .. } if self.active(&target.id).is_none() => {
                self.dropped(DropReason::UnknownSubject);
            }
            message => self.feed(now, source, src_incarnation, message, out),
        }
    }

    fn feed(
        &mut self,
        now: Now,
        src: Ident,
        src_incarnation: Incarnation,
        message: Message<Ident>,
        out: &mut Vec<MembershipEvent>,
    ) {
        let header = Header {
            src,
            src_incarnation,
            dst: self.me,
            message,
        };
        let mut bytes = Vec::with_capacity(160);
        Plain
            .encode_header(&header, &mut bytes)
            .expect("a vector has room for a header");
        self.drive(now, &[src.id], out, |foca, rt| foca.handle_data(&bytes, rt));
    }

    /// One call into foca, and all that comes of it. `touched` are the members that it may change; those whose probe it
    /// gives up it names itself.
    fn drive(
        &mut self,
        now: Now,
        touched: &[NodeId],
        out: &mut Vec<MembershipEvent>,
        call: impl FnOnce(&mut Engine, &mut Effects) -> Result<(), foca::Error>,
    ) {
        let mut effects = Effects::new();
        if call(&mut self.foca, &mut effects).is_err() {
            self.dropped(DropReason::Refused);
        }
        let mut defunct = false;
        while let Some(notification) = effects.to_notify() {
            defunct |= matches!(notification, OwnedNotification::Defunct);
        }
        let mut suspects = Vec::new();
        while let Some((after, timer)) = effects.to_schedule() {
            match timer {
                Timer::ChangeSuspectToDown {
                    member_id,
                    incarnation,
                    ..
                } => suspects.push((member_id, incarnation)),
                timer => self.arm(now.plus(after), Task::Foca(timer)),
            }
        }
        let given_up = suspects.iter().map(|(suspect, _)| suspect.id);
        let touched: BTreeSet<NodeId> = touched.iter().copied().chain(given_up).collect();
        self.refresh(now, &touched, out);
        for (suspect, incarnation) in suspects {
            self.suspect(now, suspect, incarnation);
        }
        while let Some((to, bytes)) = effects.to_send() {
            self.post(now, to, &bytes, out);
        }
        if defunct {
            // Only an incarnation that ran out leads here: all else that could is taken before foca sees it.
            self.take_next_name(now, self.me.life.renewals, out);
        }
    }

    /// Puts what foca wrote into a datagram of ours.
    fn post(&mut self, now: Now, to: Ident, mut bytes: &[u8], out: &mut Vec<MembershipEvent>) {
        let header = Plain
            .decode_header(&mut bytes)
            .expect("foca wrote it with the same codec");
        let members = members_of(&mut bytes);
        self.incarnation = header.src_incarnation;
        let ping = match header.message {
            Message::Ping(number) => Some(number),
            _ => None,
        };
        let body = Body::Gossip {
            to: to.life,
            message: header.message,
            members,
        };
        self.send(to.id, body, out);
        if let (Some(number), Some(MembershipEvent::Send { bytes, .. })) = (ping, out.last()) {
            let bytes = bytes.clone();
            self.begin_probe(now, to, number, bytes);
        }
    }

    fn begin_probe(&mut self, now: Now, target: Ident, number: u8, bytes: Vec<u8>) {
        let serial = self.sequence;
        self.probe = Some(Probe {
            target,
            number,
            serial,
            started: now,
            bytes,
            answered: false,
        });
        self.arm(now.plus(self.pace.ask_again()), Task::AskAgain(serial));
    }

    /// One lost datagram must not look like a dead node: the ping goes out again until the target is heard.
    fn ask_again(&mut self, now: Now, serial: u64, out: &mut Vec<MembershipEvent>) {
        let next = now.plus(self.pace.ask_again());
        let Some(probe) = &self.probe else { return };
        let over = now.since(probe.started) >= self.pace.probe_period();
        if probe.serial != serial || probe.answered || over {
            return;
        }
        out.push(MembershipEvent::Send {
            to: probe.target.id,
            bytes: probe.bytes.clone(),
        });
        self.arm(next, Task::AskAgain(serial));
    }

    /// `from` was heard: when it is being probed, that is the answer.
    pub(super) fn answer_probe(&mut self, now: Now, from: NodeId, out: &mut Vec<MembershipEvent>) {
        let Some(probe) = self.probe.as_mut() else {
            return;
        };
        if probe.target.id != from || probe.answered {
            return;
        }
        probe.answered = true;
        let (target, number) = (probe.target, probe.number);
        if let Some(held) = self.active(&from).filter(|held| *held.id() == target) {
            self.feed(now, target, held.incarnation(), Message::Ack(number), out);
        }
    }

    /// A timer of our own is late: we were paused, so nobody's silence since then means anything.
    pub(super) fn notice_pause(&mut self, now: Now, out: &mut Vec<MembershipEvent>) {
        let late = self.deadline().is_some_and(|at| now.since(at) > PAUSED);
        if !late {
            return;
        }
        self.restart_checks(now);
        if let Some(target) = self.probe.as_ref().map(|probe| probe.target.id) {
            self.answer_probe(now, target, out);
        }
    }

    /// Brings what is known of `touched` up to what foca holds, and tells the difference.
    fn refresh(&mut self, now: Now, touched: &BTreeSet<NodeId>, out: &mut Vec<MembershipEvent>) {
        if touched.is_empty() {
            return;
        }
        let fresh: Vec<Member<Ident>> = self
            .foca
            .iter_membership_state()
            .filter(|member| touched.contains(&member.id().id))
            .cloned()
            .collect();
        let mut changed = false;
        for member in fresh {
            let active = (member.state() != State::Down).then_some(*member.id());
            changed |= self.show(member.id().id, active, out);
            self.members.insert(member.id().id, member);
        }
        if changed {
            self.arm_news(now);
        }
    }

    /// Shows a member as foca holds it, if active. Did that change anything?
    fn show(&mut self, id: NodeId, active: Option<Ident>, out: &mut Vec<MembershipEvent>) -> bool {
        let life = active.map(|ident| ident.life);
        let before = match life {
            Some(life) => self.visible.insert(id, life),
            None => self.visible.remove(&id),
        };
        if before == life {
            return false;
        }
        for life in before.into_iter().chain(life) {
            self.digest ^= digest_of(&Ident { id, life });
        }
        match (before, life) {
            (before, Some(life)) if before.map(|b| b.generation) != Some(life.generation) => {
                out.push(MembershipEvent::Up {
                    id,
                    generation: life.generation,
                });
            }
            (Some(_), None) => out.push(MembershipEvent::Down { id }),
            _ => {}
        }
        true
    }

    /// Gossips soon, together with what else is learnt until then.
    pub(super) fn arm_news(&mut self, now: Now) {
        if !self.news_waits {
            self.news_waits = true;
            self.arm(now.plus(NEWS), Task::News);
        }
    }

    /// Somebody suspects this node: it says that it is alive under the next incarnation.
    pub(super) fn refute(
        &mut self,
        now: Now,
        suspected: Incarnation,
        out: &mut Vec<MembershipEvent>,
    ) {
        // foca does the same sum, but shows it only in what it sends.
        if suspected >= self.incarnation && suspected < Incarnation::MAX {
            self.incarnation = suspected + 1;
        }
        self.apply(
            now,
            vec![Member::new(self.me, suspected, State::Suspect)],
            out,
        );
    }

    /// Takes a name younger than the one with `renewals`, since that was declared dead. Says whether it did: not too
    /// often, and not when the number is beyond all reason.
    pub(super) fn renew(
        &mut self,
        now: Now,
        renewals: u64,
        out: &mut Vec<MembershipEvent>,
    ) -> bool {
        let ours = self.me.life.renewals;
        if renewals > ours.saturating_add(RENEWALS_AHEAD) {
            self.dropped(DropReason::Implausible);
            return false;
        }
        let paid_until = self.renewals_paid.max(now).plus(RENEWAL_GAP);
        if renewals < ours || paid_until.since(now) > RENEWAL_GAP * RENEWAL_BURST {
            return false;
        }
        self.renewals_paid = paid_until;
        self.take_next_name(now, renewals, out);
        true
    }

    fn take_next_name(&mut self, now: Now, after: u64, out: &mut Vec<MembershipEvent>) {
        self.digest ^= digest_of(&self.me);
        self.me.life.renewals = after.saturating_add(1);
        self.digest ^= digest_of(&self.me);
        self.incarnation = 0;
        self.rebuild(now, out);
    }

    /// A fresh foca that knows the live members and nothing else: no queued rumours, no old timers.
    pub(super) fn rebuild(&mut self, now: Now, out: &mut Vec<MembershipEvent>) {
        let members: Vec<Member<Ident>> = self.foca.iter_members().cloned().collect();
        self.foca = Foca::new(self.me, self.pace.config(), self.random.fork(), Plain);
        self.members.clear();
        self.timers
            .retain(|_, task| !matches!(task, Task::Foca(_) | Task::AskAgain(_)));
        self.probe = None;
        let touched: Vec<NodeId> = members.iter().map(|member| member.id().id).collect();
        self.drive(now, &touched, out, |foca, rt| {
            foca.apply_many(members.into_iter(), false, rt)
        });
        if self.incarnation > 0 {
            self.refute(now, self.incarnation - 1, out);
        }
        self.arm_news(now);
        self.drive(now, &[], out, |foca, rt| foca.gossip(rt));
    }
}

fn members_of(bytes: &mut &[u8]) -> Vec<Member<Ident>> {
    let Some((count, rest)) = bytes.split_first_chunk::<2>() else {
        return Vec::new();
    };
    *bytes = rest;
    (0..u16::from_be_bytes(*count))
        .map(|_| {
            Plain
                .decode_member(&mut *bytes)
                .expect("foca wrote it with the same codec")
        })
        .collect()
}
