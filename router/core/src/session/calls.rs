//! How a session comes to be, from either side: the call, its answer, and the cookie that a busy peer asks for between them.

use std::sync::Arc;

use super::cookie::{Verdict, index_at};
use super::drops::DropReason;
use super::handshake::{Arrived, Capabilities, InitPayload, Refusal, ResponsePayload, read_answer};
use super::link::{Attempt, Live, Pending};
use super::timers::{COOKIE_USE, INSIST_FOR, retry_after};
use super::transport::Transport;
use super::{MAX_HALF_OPEN, SessionEvent, Sessions, Trust, link_at};
use crate::model::{NodeId, Now};
use crate::path::Path;
use crate::wire::{MAX_DATAGRAM, MAX_RELAYED};

impl Sessions {
    pub(super) fn dial(
        &mut self,
        now: Now,
        peer: &NodeId,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        let Some(link) = self.links.get_mut(peer) else {
            return;
        };
        link.start_dial(now);
        if link.dial.is_some_and(|dial| dial.next <= now) {
            self.call(now, peer, None, trust, out);
        }
    }

    /// Sends a first message: along `path` where given, else along the next one.
    pub(super) fn call(
        &mut self,
        now: Now,
        peer: &NodeId,
        path: Option<Path>,
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) {
        let is_full = self.half_open() >= MAX_HALF_OPEN;
        let capabilities = self.capabilities();
        let Some(link) = self.links.get_mut(peer) else {
            return;
        };
        let noise_key = trust.noise_key(peer).filter(|_| trust.is_member(peer));
        let (Some(noise_key), Some(dial)) = (noise_key, &mut link.dial) else {
            if link.close(&mut self.desk, out) {
                out.push(SessionEvent::Lost { peer: *peer });
            }
            return;
        };
        let paths = link.paths.to_call();
        let count = paths.len().max(1);
        let tries = dial.tries as usize;
        let rounds = (tries / count) as u32;
        dial.next = now.plus(retry_after(rounds, &mut self.desk.random));
        let next = paths.get(tries % count).copied();
        let Some(to) = path.or(next).filter(|_| !is_full) else {
            return;
        };
        if let Some(dial) = &mut link.dial {
            dial.tries = dial.tries.saturating_add(1);
        }
        let cookie = link
            .cookie
            .filter(|(_, at, when)| *at == to && now.since(*when) < COOKIE_USE)
            .map(|(cookie, _, _)| cookie);
        self.counter += 1;
        let mut payload = InitPayload {
            node: self.desk.me,
            generation: self.config.generation,
            counter: self.counter,
            instance: self.instance,
            capabilities,
            chain: trust.admit_chain(&self.desk.me),
            extra: Vec::new(),
        };
        let index = self.desk.draw(*peer);
        let most = match to {
            Path::Direct(_) => MAX_DATAGRAM,
            Path::Relayed(_) => MAX_RELAYED,
        };
        let called = self.context.call(
            &noise_key,
            (index, most),
            &mut payload,
            cookie.as_ref(),
            &mut self.desk.random,
        );
        let Some(called) = called else {
            self.desk.release(index);
            return;
        };
        let attempt = Attempt {
            index,
            noise: called.noise,
            mac1: called.mac1,
            to,
            sent: now,
        };
        link.paths.on_called(to);
        link.add_attempt(attempt, &mut self.desk);
        out.push(SessionEvent::send(to, *peer, called.datagram));
    }

    pub(super) fn on_init(
        &mut self,
        now: Now,
        from: Path,
        bytes: &[u8],
        trust: &mut impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let checked = self.context.macs.check(bytes)?;
        let verdict = self.gate.ask(now, from, &checked, &mut self.desk.random);
        match (verdict, from) {
            (Verdict::Pass, _) => {}
            (Verdict::Refuse(reason), _) => return Err(reason),
            (Verdict::Ask(cookie), Path::Direct(to)) => {
                let random = &mut self.desk.random;
                let datagram = self.context.macs.seal_cookie(&checked, &cookie, random);
                out.push(SessionEvent::Send { to, datagram });
                return Err(DropReason::CookieAsked);
            }
            // Nobody knows yet whom it is from, and a member's word that it passes it on is no proof of an address.
            (Verdict::Ask(_), Path::Relayed(_)) => return Err(DropReason::TooMany),
        }
        let arrived = self
            .context
            .read_call(checked.body, &mut self.desk.random)?;
        let peer = arrived.payload.node;
        if let Err(reason) = self.check_caller(&arrived, trust) {
            let caller = (&peer, &arrived.noise_key);
            let record = trust.why_no_member(caller, &arrived.payload.chain);
            if let Some(record) = record {
                self.refuse(now, from, arrived, Refusal::NoMember(record), out);
            }
            return Err(reason);
        }
        let is_full = self.half_open() >= MAX_HALF_OPEN;
        let me = self.desk.me;
        let link = self.link(now, peer).ok_or(DropReason::Full)?;
        let fresh = (arrived.payload.generation, arrived.payload.counter);
        if link.starts.is_old(fresh) {
            if link.starts.note_old(now, fresh) {
                out.push(SessionEvent::CloneSuspected { peer });
            }
            let latest = link.starts.latest();
            if fresh.0 < latest {
                self.refuse(now, from, arrived, Refusal::Outdated(latest), out);
            }
            return Err(DropReason::Stale);
        }
        if link.starts.note(now, fresh, arrived.payload.instance) {
            out.push(SessionEvent::CloneSuspected { peer });
        }
        let insists = me < peer
            && link
                .dial
                .is_some_and(|dial| now.since(dial.since) < INSIST_FOR);
        if insists && !link.attempts.is_empty() {
            // It is alive and calls from there: that is where our own call should go.
            if link.attempts.iter().all(|attempt| attempt.to != from) {
                self.call(now, &peer, Some(from), trust, out);
            }
            return Err(DropReason::Yielded);
        }
        if is_full {
            return Err(DropReason::Full);
        }
        self.answer(now, from, arrived, out)
    }

    fn check_caller(&self, arrived: &Arrived, trust: &mut impl Trust) -> Result<(), DropReason> {
        let node = arrived.payload.node;
        if node == self.desk.me {
            return Err(DropReason::Stranger);
        }
        if trust.noise_key(&node).is_none()
            && trust.learn_chain(&arrived.payload.chain) != Some(node)
        {
            return Err(DropReason::Stranger);
        }
        let is_it = trust.noise_key(&node) == Some(arrived.noise_key);
        match is_it && trust.is_member(&node) {
            true => Ok(()),
            false => Err(DropReason::Stranger),
        }
    }

    fn answer(
        &mut self,
        now: Now,
        from: Path,
        arrived: Arrived,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let peer = arrived.payload.node;
        let (remote_index, theirs) = (arrived.index, arrived.payload.capabilities);
        let generation = arrived.payload.generation;
        let payload = self.response(None);
        let index = self.desk.draw(peer);
        let Some((datagram, keys)) = self.context.answer(arrived, index, &payload) else {
            self.desk.release(index);
            return Err(DropReason::BadHandshake);
        };
        let link = self.links.get_mut(&peer).ok_or(DropReason::Full)?;
        let transport = Arc::new(Transport::new(peer, index, remote_index, &keys));
        let live = Live::new(transport.clone(), false, now, generation, theirs);
        link.yield_dial(now);
        link.add_pending(Pending { live, from }, &mut self.desk, out);
        out.push(SessionEvent::Accepting { peer, transport });
        out.push(SessionEvent::send(from, peer, datagram));
        Ok(())
    }

    /// What this node answers a first message with.
    pub(super) fn response(&self, refusal: Option<Refusal>) -> ResponsePayload {
        ResponsePayload {
            generation: self.config.generation,
            instance: self.instance,
            capabilities: self.capabilities(),
            refusal,
            extra: Vec::new(),
        }
    }

    pub(super) fn on_response(
        &mut self,
        now: Now,
        from: Path,
        bytes: &[u8],
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        let checked = self.context.macs.check(bytes)?;
        let index = index_at(checked.body, 8).ok_or(DropReason::Malformed)?;
        let link = link_at(&mut self.links, &self.desk, index)?;
        let peer = link.peer;
        let position = link
            .attempts
            .iter()
            .position(|attempt| attempt.index == index)
            .ok_or(DropReason::UnknownSession)?;
        let (remote_index, payload) =
            read_answer(&mut link.attempts[position].noise, checked.body)?;
        let attempt = link.attempts.remove(position);
        if !trust.is_member(&peer) {
            self.desk.release(index);
            return Err(DropReason::Stranger);
        }
        if let Some(refusal) = payload.refusal {
            self.desk.release(index);
            out.push(SessionEvent::Refused { peer, refusal });
            return Ok(());
        }
        if payload.generation < link.starts.latest() {
            self.desk.release(index);
            return Err(DropReason::Stale);
        }
        let start = (payload.generation, 0);
        if link.starts.note(now, start, payload.instance) {
            out.push(SessionEvent::CloneSuspected { peer });
        }
        let theirs = payload.capabilities;
        let cipher = Capabilities::new(self.config.cipher).agree(&theirs);
        let keys = attempt.noise.into_keys(cipher);
        let transport = Arc::new(Transport::new(peer, index, remote_index, &keys));
        let live = Live::new(transport, true, now, payload.generation, theirs);
        link.adopt(now, live, attempt.to, &mut self.desk, out);
        link.challenge(now, from, &mut self.desk, out);
        Ok(())
    }

    pub(super) fn on_cookie(
        &mut self,
        now: Now,
        bytes: &[u8],
        trust: &impl Trust,
        out: &mut Vec<SessionEvent>,
    ) -> Result<(), DropReason> {
        if bytes.len() > MAX_DATAGRAM {
            return Err(DropReason::Malformed);
        }
        let index = index_at(bytes, 4).ok_or(DropReason::Malformed)?;
        let link = link_at(&mut self.links, &self.desk, index)?;
        let peer = link.peer;
        let attempt = link
            .attempts
            .iter()
            .find(|attempt| attempt.index == index)
            .ok_or(DropReason::UnknownSession)?;
        let cookie = self
            .context
            .macs
            .open_cookie(bytes, &attempt.mac1)
            .ok_or(DropReason::Forged)?;
        let to = attempt.to;
        // One call per fresh cookie: a replayed one is the same again.
        let is_new = link.cookie.is_none_or(|(old, _, _)| old != cookie);
        link.cookie = Some((cookie, to, now));
        if is_new && link.dial.is_some() {
            self.call(now, &peer, Some(to), trust, out);
        }
        Ok(())
    }
}
