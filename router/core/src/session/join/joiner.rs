//! The side that wants in.

use std::sync::Arc;
use std::time::Duration;

use super::{
    BURST, CHUNK, JoinAnswer, JoinMessage, JoinPayload, JoinRefusal, MAX_WELCOME, Verdict, claim,
    prologue, ready,
};
use crate::crypto::{Cipher, Random};
use crate::identity::Identity;
use crate::model::{Generation, NodeId, NodeName, Now};
use crate::session::cookie::{Cookie, MacKeys, index_at};
use crate::session::desk::JOIN_BIT;
use crate::session::handshake::Capabilities;
use crate::session::noise::{Noise, Terms};
use crate::session::transport::Transport;
use crate::token::{Token, TokenMember};
use crate::underlay::UnderlayAddr;
use crate::wire::{self, DataHeader, DatagramType, FrameKind};

/// No answer for this long, or no progress: given up.
const TIMEOUT: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(1);
/// First messages whose answers are still waited for.
const ATTEMPTS: usize = 16;

/// What a joiner is made with.
#[derive(Clone, Debug)]
pub struct JoinConfig {
    /// The node's name for people.
    pub name: NodeName,
    /// Of this start.
    pub generation: Generation,
    /// The AEAD this host is fast with.
    pub cipher: Cipher,
}

/// What a [`Joiner`] wants done, or tells.
#[derive(Debug, PartialEq, Eq)]
pub enum JoinerEvent {
    /// Send this datagram.
    Send {
        /// To there.
        to: UnderlayAddr,
        /// The bytes.
        datagram: Vec<u8>,
    },
    /// In. What the member sent is whole. Nothing more will come.
    Welcome {
        /// The member that let us in.
        member: NodeId,
        /// Where it is.
        addr: UnderlayAddr,
        /// What it sent.
        bytes: Vec<u8>,
    },
    /// Not in, and why. Nothing more will come.
    Refused(JoinRefusal),
    /// No member answered, or the one that did went silent. Nothing more will come.
    TimedOut {
        /// The addresses that were tried.
        tried: Vec<UnderlayAddr>,
    },
}

struct Target {
    member: TokenMember,
    addr: UnderlayAddr,
}

struct Attempt {
    index: u32,
    noise: Noise,
    mac1: [u8; 16],
    member: TokenMember,
    to: UnderlayAddr,
}

struct Session {
    transport: Arc<Transport>,
    member: NodeId,
    addr: UnderlayAddr,
    hash: Vec<u8>,
    chunks: Vec<Option<Vec<u8>>>,
    /// Parts asked for and not come; at zero the next are asked for at once.
    awaited: usize,
}

enum Phase {
    Calling(Vec<Attempt>),
    Answered(Session),
    Over,
}

/// Calls the members that the invitation names, one address after the other, until one answers.
pub struct Joiner {
    identity: Identity,
    token: Token,
    config: JoinConfig,
    macs: MacKeys,
    random: Random,
    targets: Vec<Target>,
    cookie: Option<(Cookie, UnderlayAddr)>,
    tries: usize,
    next: Now,
    give_up: Now,
    refusal: Option<JoinRefusal>,
    phase: Phase,
}

impl Joiner {
    /// Begins at the next [`Self::expire`].
    pub fn new(
        identity: Identity,
        token: Token,
        config: JoinConfig,
        random: Random,
        now: Now,
    ) -> Self {
        let targets = targets(&token.body().members);
        Self {
            macs: MacKeys::new(token.secret()),
            identity,
            token,
            config,
            random,
            targets,
            cookie: None,
            tries: 0,
            next: now,
            give_up: now.plus(TIMEOUT),
            refusal: None,
            phase: Phase::Calling(Vec::new()),
        }
    }

    /// A datagram came.
    pub fn handle(
        &mut self,
        now: Now,
        from: UnderlayAddr,
        bytes: &mut [u8],
        out: &mut Vec<JoinerEvent>,
    ) {
        // What does not fit is dropped in silence: anybody may send anything.
        let _ = match DatagramType::of(bytes) {
            Some(DatagramType::JoinResponse) => self.on_response(now, bytes, out),
            Some(DatagramType::Cookie) => self.on_cookie(now, bytes, out),
            Some(DatagramType::Data) => self.on_data(now, from, bytes, out),
            _ => None,
        };
    }

    /// Time passed.
    pub fn expire(&mut self, now: Now, out: &mut Vec<JoinerEvent>) {
        if matches!(self.phase, Phase::Over) {
            return;
        }
        if now >= self.give_up || self.targets.is_empty() {
            self.fail(out);
            return;
        }
        if now < self.next {
            return;
        }
        match self.phase {
            Phase::Calling(_) => self.call(now, out),
            _ => self.ask(now, out),
        }
    }

    /// When to call [`Self::expire`] next; `None` when all is over.
    pub fn deadline(&self) -> Option<Now> {
        match self.phase {
            Phase::Over => None,
            _ => Some(self.next.min(self.give_up)),
        }
    }

    fn fail(&mut self, out: &mut Vec<JoinerEvent>) {
        self.phase = Phase::Over;
        out.push(match self.refusal.take() {
            Some(refusal) => JoinerEvent::Refused(refusal),
            None => JoinerEvent::TimedOut {
                tried: self.targets.iter().map(|target| target.addr).collect(),
            },
        });
    }

    fn call(&mut self, now: Now, out: &mut Vec<JoinerEvent>) {
        let count = self.targets.len();
        let round = (self.tries / count) as u32 + 1;
        self.next = now.plus((RETRY * round).min(RETRY_LAST));
        let target = &self.targets[self.tries % count];
        let (member, to) = (target.member.clone(), target.addr);
        self.tries += 1;
        self.call_at(member, to, out);
    }

    fn call_at(&mut self, member: TokenMember, to: UnderlayAddr, out: &mut Vec<JoinerEvent>) {
        let index = self.random.u64() as u32 | JOIN_BIT;
        let Some((noise, datagram, mac1)) = self.first_message(&member, to, index) else {
            return;
        };
        let Phase::Calling(attempts) = &mut self.phase else {
            return;
        };
        if attempts.len() >= ATTEMPTS {
            attempts.remove(0);
        }
        attempts.push(Attempt {
            index,
            noise,
            mac1,
            member,
            to,
        });
        out.push(JoinerEvent::Send { to, datagram });
    }

    fn first_message(
        &mut self,
        member: &TokenMember,
        to: UnderlayAddr,
        index: u32,
    ) -> Option<(Noise, Vec<u8>, [u8; 16])> {
        let body = self.token.body();
        let noise_public = self.identity.noise_public();
        let claim = claim(&body.cluster, &body.id, &noise_public, &member.noise_key);
        let payload = JoinPayload {
            node: self.identity.id(),
            signature: self.identity.sign(&claim).to_vec(),
            name: self.config.name.clone(),
            generation: self.config.generation,
            capabilities: Capabilities::new(self.config.cipher),
            extra: Vec::new(),
        };
        let terms = Terms {
            identity: &self.identity,
            prologue: &prologue(&body.cluster),
            psk: Some(self.token.secret()),
        };
        let mut noise = Noise::initiator(&terms, &member.noise_key, &mut self.random).ok()?;
        let message = noise.write(&wire::encode(&payload)).ok()?;
        let signed = self.token.signed();
        let mut datagram = DatagramType::JoinInit.head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        datagram.extend_from_slice(&u16::try_from(signed.len()).ok()?.to_le_bytes());
        datagram.extend_from_slice(signed);
        datagram.extend_from_slice(&message);
        let cookie = self.cookie.filter(|(_, at)| *at == to).map(|(c, _)| c);
        let mac1 = self.macs.finish(&mut datagram, cookie.as_ref());
        Some((noise, datagram, mac1))
    }

    fn on_response(&mut self, now: Now, bytes: &[u8], out: &mut Vec<JoinerEvent>) -> Option<()> {
        let checked = self.macs.check(bytes).ok()?;
        let Phase::Calling(attempts) = &mut self.phase else {
            return None;
        };
        let index = index_at(checked.body, 8)?;
        let position = attempts.iter().position(|a| a.index == index)?;
        let inside = attempts[position]
            .noise
            .read(checked.body.get(12..)?)
            .ok()?;
        let answer: JoinAnswer = wire::decode(&inside).ok()?;
        let attempt = attempts.remove(position);
        match answer.verdict {
            Verdict::Accepted => {
                let remote = index_at(checked.body, 4)?;
                self.on_accepted(now, attempt, remote, &answer.capabilities, out);
            }
            Verdict::Expired => self.refuse(JoinRefusal::Expired, out),
            Verdict::UsedUp => self.refuse(JoinRefusal::UsedUp, out),
            // This member can't; another one may.
            Verdict::Refused(reason) => {
                self.refusal = Some(JoinRefusal::Refused(reason));
                let refused = attempt.member.id;
                self.targets.retain(|target| target.member.id != refused);
                self.expire(now, out);
            }
        }
        Some(())
    }

    fn refuse(&mut self, refusal: JoinRefusal, out: &mut Vec<JoinerEvent>) {
        self.refusal = Some(refusal);
        self.fail(out);
    }

    fn on_accepted(
        &mut self,
        now: Now,
        attempt: Attempt,
        remote: u32,
        theirs: &Capabilities,
        out: &mut Vec<JoinerEvent>,
    ) {
        let hash = attempt.noise.hash();
        let cipher = Capabilities::new(self.config.cipher).agree(theirs);
        let keys = attempt.noise.into_keys(cipher);
        let member = attempt.member.id;
        self.phase = Phase::Answered(Session {
            transport: Arc::new(Transport::new(member, attempt.index, remote, &keys)),
            member,
            addr: attempt.to,
            hash,
            chunks: Vec::new(),
            awaited: 0,
        });
        self.give_up = now.plus(TIMEOUT);
        self.ask(now, out);
    }

    /// Says Ready until the first part comes, then asks for what is missing.
    fn ask(&mut self, now: Now, out: &mut Vec<JoinerEvent>) {
        let Phase::Answered(session) = &mut self.phase else {
            return;
        };
        self.next = now.plus(RETRY);
        let missing = session.missing();
        session.awaited = missing.len();
        let message = match session.chunks.is_empty() {
            true => JoinMessage::Ready {
                signature: self.identity.sign(&ready(&session.hash)).to_vec(),
            },
            false => JoinMessage::Missing { indices: missing },
        };
        session.say(&message, out);
    }

    fn on_cookie(&mut self, now: Now, bytes: &[u8], out: &mut Vec<JoinerEvent>) -> Option<()> {
        let Phase::Calling(attempts) = &self.phase else {
            return None;
        };
        let index = index_at(bytes, 4)?;
        let attempt = attempts.iter().find(|a| a.index == index)?;
        let cookie = self.macs.open_cookie(bytes, &attempt.mac1)?;
        let (member, to) = (attempt.member.clone(), attempt.to);
        if self.cookie.replace((cookie, to)) != Some((cookie, to)) {
            self.next = now.plus(RETRY);
            self.call_at(member, to, out);
        }
        Some(())
    }

    fn on_data(
        &mut self,
        now: Now,
        from: UnderlayAddr,
        bytes: &mut [u8],
        out: &mut Vec<JoinerEvent>,
    ) -> Option<()> {
        let Phase::Answered(session) = &mut self.phase else {
            return None;
        };
        DataHeader::parse(bytes).filter(|h| h.receiver == session.transport.local_index())?;
        let (kind, body) = session.transport.open(bytes).ok()?;
        if FrameKind::of(kind) != Some(FrameKind::Control) {
            return None;
        }
        let JoinMessage::Chunk {
            index,
            total,
            bytes,
        } = wire::decode(body).ok()?
        else {
            return None;
        };
        if session.put(index, total, bytes)? {
            self.give_up = now.plus(TIMEOUT);
        }
        if session.chunks.iter().all(Option::is_some) {
            session.say(&JoinMessage::Done, out);
            let bytes = session.chunks.iter().flatten().flatten().copied().collect();
            let member = session.member;
            out.push(JoinerEvent::Welcome {
                member,
                addr: from,
                bytes,
            });
            self.phase = Phase::Over;
        } else if session.awaited == 0 {
            self.ask(now, out);
        }
        Some(())
    }
}

/// Every member's best address first, then every member's second best; and only then those that listen for connections: a
/// stateful firewall that lets UDP through should not see any.
fn targets(members: &[TokenMember]) -> Vec<Target> {
    let by = |of: fn(&TokenMember) -> Vec<UnderlayAddr>| {
        let rounds = 0..crate::token::MAX_ADDRESSES;
        rounds.flat_map(move |round| {
            members.iter().filter_map(move |member| {
                Some(Target {
                    addr: *of(member).get(round)?,
                    member: member.clone(),
                })
            })
        })
    };
    by(TokenMember::udp).chain(by(TokenMember::tcp)).collect()
}

impl Session {
    fn say(&self, message: &JoinMessage, out: &mut Vec<JoinerEvent>) {
        let mut datagram = Vec::new();
        let body = wire::encode(message);
        if self
            .transport
            .seal(FrameKind::Control, &body, &mut datagram)
            .is_ok()
        {
            let to = self.addr;
            out.push(JoinerEvent::Send { to, datagram });
        }
    }

    fn missing(&self) -> Vec<u16> {
        let missing = self.chunks.iter().enumerate().filter(|(_, c)| c.is_none());
        missing.map(|(i, _)| i as u16).take(BURST).collect()
    }

    /// Keeps a part. True when it is a new one; `None` when it can't be one.
    fn put(&mut self, index: u16, total: u16, bytes: Vec<u8>) -> Option<bool> {
        let total = usize::from(total);
        if total == 0 || total > MAX_WELCOME.div_ceil(CHUNK) || bytes.len() > CHUNK {
            return None;
        }
        if self.chunks.is_empty() {
            self.chunks.resize(total, None);
            // The member sends the first parts unasked.
            self.awaited = total.min(BURST);
        }
        if self.chunks.len() != total {
            return None;
        }
        let slot = self.chunks.get_mut(usize::from(index))?;
        let is_new = slot.is_none();
        if is_new {
            *slot = Some(bytes);
            self.awaited = self.awaited.saturating_sub(1);
        }
        Some(is_new)
    }
}
