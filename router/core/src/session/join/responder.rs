//! The side that lets in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{
    BURST, CHUNK, JoinAnswer, JoinMessage, JoinPayload, MAX_REASON, MAX_WELCOME, Verdict, claim,
    is_join_index, prologue, ready,
};
use crate::crypto::{Cipher, Random, Secret, is_sound_noise_key, verify};
use crate::identity::Identity;
use crate::model::{ClusterId, Generation, NodeId, NodeName, Now};
use crate::session::cookie::{self, Gate, MacKeys, index_at};
use crate::session::desk::JOIN_BIT;
use crate::session::drops::{DropReason, Drops};
use crate::session::handshake::Capabilities;
use crate::session::noise::{Noise, Terms};
use crate::session::transport::Transport;
use crate::token::{TokenBody, read_body, secret_of};
use crate::underlay::UnderlayAddr;
use crate::wire::{self, DataHeader, DatagramType, FrameKind, MAX_DATAGRAM};

/// Joiners under way at once.
const MAX_JOINERS: usize = 64;
/// A joiner that says nothing for this long is forgotten. It may come again.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Answered handshakes of one joiner.
const SESSIONS: usize = 4;

/// Names one joiner between [`JoinEvent::Request`] and [`JoinEvent::Done`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JoinHandle(u64);

/// A host with a right secret asks to come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinRequest {
    /// What to answer under.
    pub handle: JoinHandle,
    /// Its id; that the key is its own is shown, but for replays, by a signature; beyond doubt only when
    /// [`JoinEvent::Confirmed`] comes.
    pub id: NodeId,
    /// Its X25519 key, not a low-order one.
    pub noise_key: [u8; 32],
    /// The name it would like.
    pub name: NodeName,
    /// Of its start.
    pub generation: Generation,
    /// Its invitation: signed by `token.issuer`, of whom nothing else is known here, and not expired.
    pub token: TokenBody,
}

/// What a [`JoinResponder`] wants done, or tells.
#[derive(Debug)]
pub enum JoinEvent {
    /// Send this datagram.
    Send {
        /// To there.
        to: UnderlayAddr,
        /// The bytes.
        datagram: Vec<u8>,
    },
    /// Somebody asks. Answer with [`JoinResponder::answer`], now or later; told once per joiner.
    Request(JoinRequest),
    /// Datagrams for this transport's index may come.
    Accepting {
        /// What opens them.
        transport: Arc<Transport>,
    },
    /// The joiner showed that it holds its keys: admit it, persist that, then [`JoinResponder::welcome`] it. Told once.
    Confirmed(JoinRequest),
    /// It has its welcome.
    Done {
        /// Which.
        handle: JoinHandle,
    },
    /// Nothing comes for this index any more.
    Retired {
        /// Our index.
        local_index: u32,
    },
}

struct Session {
    transport: Arc<Transport>,
    hash: Vec<u8>,
}

/// One use of one invitation: the joiner, and the invitation's id.
type Key = (NodeId, [u8; 16]);

/// A first message that waits for the verdict.
struct Waiting {
    noise: Noise,
    remote_index: u32,
    from: UnderlayAddr,
    theirs: Capabilities,
}

struct Applicant {
    request: JoinRequest,
    secret: Secret<32>,
    verdict: Option<Verdict>,
    waiting: Option<Waiting>,
    sessions: Vec<Session>,
    /// The index of the session in use, and where the joiner is.
    confirmed: Option<(u32, UnderlayAddr)>,
    welcome: Vec<Vec<u8>>,
    is_asked: bool,
    is_done: bool,
    touched: Now,
}

/// Hears joiners out. Holds no more than their handshakes: who may come in is the caller's decision.
pub struct JoinResponder {
    identity: Identity,
    cluster: ClusterId,
    capabilities: Capabilities,
    random: Random,
    gate: Gate,
    drops: Drops,
    applicants: BTreeMap<Key, Applicant>,
    serial: u64,
}

impl JoinResponder {
    /// Nobody has asked yet.
    pub fn new(
        identity: Identity,
        cluster: ClusterId,
        cipher: Cipher,
        mut random: Random,
        now: Now,
    ) -> Self {
        Self {
            identity,
            cluster,
            capabilities: Capabilities::new(cipher),
            gate: Gate::new(&mut random, now),
            random,
            drops: Drops::default(),
            applicants: BTreeMap::new(),
            serial: 0,
        }
    }

    /// A join-init, or a data datagram with a joiner's index, came. `wall` is Unix seconds.
    pub fn handle(
        &mut self,
        now: Now,
        wall: u64,
        from: UnderlayAddr,
        bytes: &mut [u8],
        cluster_secret: &Secret<32>,
        out: &mut Vec<JoinEvent>,
    ) {
        let result = match DatagramType::of(bytes) {
            Some(DatagramType::JoinInit) => {
                self.on_init((now, wall), from, bytes, cluster_secret, out)
            }
            Some(DatagramType::Data) => self.on_data(now, from, bytes, out),
            _ => Err(DropReason::Malformed),
        };
        if let Err(reason) = result {
            self.drops.count(reason);
        }
    }

    /// The carrier opened a control frame that came for a joiner's index.
    pub fn handle_opened(
        &mut self,
        now: Now,
        local_index: u32,
        from: UnderlayAddr,
        frame: (u8, &[u8]),
        out: &mut Vec<JoinEvent>,
    ) {
        if let Err(reason) = self.on_frame(now, local_index, from, frame, out) {
            self.drops.count(reason);
        }
    }

    /// Tells a joiner the verdict. It hears the same each time it asks again, but for a refusal: that is forgotten, and
    /// leads to a new [`JoinEvent::Request`].
    pub fn answer(&mut self, handle: JoinHandle, verdict: Verdict, out: &mut Vec<JoinEvent>) {
        let verdict = match verdict {
            Verdict::Refused(reason) => Verdict::Refused(shorten(reason)),
            other => other,
        };
        if let Some(key) = self.key(handle) {
            if let Some(applicant) = self.applicants.get_mut(&key) {
                applicant.verdict.get_or_insert(verdict);
            }
            self.respond(&key, out);
        }
    }

    /// Sends a confirmed joiner its welcome. `None` when it is too long or the joiner is gone.
    pub fn welcome(
        &mut self,
        handle: JoinHandle,
        bytes: &[u8],
        out: &mut Vec<JoinEvent>,
    ) -> Option<()> {
        let key = self.key(handle)?;
        let applicant = self.applicants.get_mut(&key)?;
        if bytes.len() > MAX_WELCOME || bytes.is_empty() {
            return None;
        }
        applicant.confirmed?;
        applicant.welcome = bytes.chunks(CHUNK).map(<[u8]>::to_vec).collect();
        applicant.send_first(out);
        Some(())
    }

    /// Forgets who went silent.
    pub fn expire(&mut self, now: Now, out: &mut Vec<JoinEvent>) {
        self.applicants.retain(|_, applicant| {
            let keep = now.since(applicant.touched) < FORGET_AFTER;
            if !keep {
                applicant.sessions.iter().for_each(|s| s.retire(out));
            }
            keep
        });
    }

    /// When to call [`Self::expire`] next.
    pub fn deadline(&self) -> Option<Now> {
        let touched = self.applicants.values().map(|a| a.touched);
        Some(touched.min()?.plus(FORGET_AFTER))
    }

    /// The indices of joiners' sessions: what data datagrams may come for.
    pub fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        let sessions = self.applicants.values().flat_map(|a| &a.sessions);
        sessions.map(|session| session.transport.local_index())
    }

    /// What was dropped, by reason.
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    fn key(&self, handle: JoinHandle) -> Option<Key> {
        self.applicants
            .iter()
            .find(|(_, applicant)| applicant.request.handle == handle)
            .map(|(key, _)| *key)
    }

    fn on_init(
        &mut self,
        (now, wall): (Now, u64),
        from: UnderlayAddr,
        bytes: &[u8],
        cluster_secret: &Secret<32>,
        out: &mut Vec<JoinEvent>,
    ) -> Result<(), DropReason> {
        if bytes.len() > MAX_DATAGRAM {
            return Err(DropReason::Malformed);
        }
        let (signed, message) = split_init(bytes).ok_or(DropReason::Malformed)?;
        let secret = secret_of(cluster_secret, signed);
        let macs = MacKeys::new(&secret);
        let checked = macs.check(bytes)?;
        match self.gate.ask(now, from.into(), &checked, &mut self.random) {
            cookie::Verdict::Pass => {}
            cookie::Verdict::Refuse(reason) => return Err(reason),
            cookie::Verdict::Ask(cookie) => {
                let datagram = macs.seal_cookie(&checked, &cookie, &mut self.random);
                out.push(JoinEvent::Send { to: from, datagram });
                return Err(DropReason::CookieAsked);
            }
        }
        // Only a holder of the secret gets so far, and the secret goes with this very body.
        let token = read_body(signed).ok_or(DropReason::BadHandshake)?;
        if token.cluster != self.cluster {
            return Err(DropReason::Stranger);
        }
        let (noise, payload) = self.read(message, &secret)?;
        let noise_key = self.check_claim(&noise, &payload, &token)?;
        let waiting = Waiting {
            noise,
            remote_index: index_at(bytes, 4).ok_or(DropReason::Malformed)?,
            from,
            theirs: payload.capabilities,
        };
        let is_expired = wall >= token.expires_at;
        let key = (payload.node, token.id);
        let request = JoinRequest {
            handle: JoinHandle(self.serial),
            id: payload.node,
            noise_key,
            name: payload.name,
            generation: payload.generation,
            token,
        };
        self.note(now, key, request, secret, waiting, out)?;
        if is_expired && let Some(applicant) = self.applicants.get_mut(&key) {
            // One that was accepted in time may finish.
            applicant.verdict.get_or_insert(Verdict::Expired);
        }
        self.respond(&key, out);
        self.request(&key, out);
        Ok(())
    }

    fn read(
        &mut self,
        message: &[u8],
        secret: &Secret<32>,
    ) -> Result<(Noise, JoinPayload), DropReason> {
        let terms = Terms {
            identity: &self.identity,
            prologue: &prologue(&self.cluster),
            psk: Some(secret),
        };
        let bad = |_| DropReason::BadHandshake;
        let mut noise = Noise::responder(&terms, &mut self.random).map_err(bad)?;
        let inside = noise.read(message).map_err(bad)?;
        let payload = wire::decode(&inside).map_err(|_| DropReason::BadHandshake)?;
        Ok((noise, payload))
    }

    fn check_claim(
        &self,
        noise: &Noise,
        payload: &JoinPayload,
        token: &TokenBody,
    ) -> Result<[u8; 32], DropReason> {
        let noise_key = noise.remote_static().ok_or(DropReason::BadHandshake)?;
        let ours = self.identity.noise_public();
        let claim = claim(&self.cluster, &token.id, &noise_key, &ours);
        let is_own = verify(&payload.node, &claim, &payload.signature);
        match is_own && is_sound_noise_key(&noise_key) && payload.node != self.identity.id() {
            true => Ok(noise_key),
            false => Err(DropReason::Stranger),
        }
    }

    fn note(
        &mut self,
        now: Now,
        key: Key,
        request: JoinRequest,
        secret: Secret<32>,
        waiting: Waiting,
        out: &mut Vec<JoinEvent>,
    ) -> Result<(), DropReason> {
        if let Some(applicant) = self.applicants.get_mut(&key)
            && applicant.request.noise_key == request.noise_key
        {
            applicant.touched = now;
            applicant.waiting = Some(waiting);
            return Ok(());
        }
        // Ask again under another X25519 key: a fresh start, as after a lost disk.
        if let Some(former) = self.applicants.remove(&key) {
            former.sessions.iter().for_each(|s| s.retire(out));
        }
        if self.applicants.len() >= MAX_JOINERS {
            return Err(DropReason::Full);
        }
        self.serial += 1;
        let applicant = Applicant {
            request,
            secret,
            verdict: None,
            waiting: Some(waiting),
            sessions: Vec::new(),
            confirmed: None,
            welcome: Vec::new(),
            is_asked: false,
            is_done: false,
            touched: now,
        };
        self.applicants.insert(key, applicant);
        Ok(())
    }

    /// Tells the caller of a new joiner, once.
    fn request(&mut self, key: &Key, out: &mut Vec<JoinEvent>) {
        if let Some(applicant) = self.applicants.get_mut(key)
            && applicant.verdict.is_none()
            && !std::mem::replace(&mut applicant.is_asked, true)
        {
            out.push(JoinEvent::Request(applicant.request.clone()));
        }
    }

    /// Answers the joiner's latest first message, once there is a verdict.
    fn respond(&mut self, key: &Key, out: &mut Vec<JoinEvent>) {
        let index = self.draw();
        let capabilities = self.capabilities;
        let Some(applicant) = self.applicants.get_mut(key) else {
            return;
        };
        let Some(verdict) = applicant.verdict.clone() else {
            return;
        };
        let Some(mut waiting) = applicant.waiting.take() else {
            return;
        };
        let is_accepted = verdict == Verdict::Accepted;
        let is_final = !matches!(verdict, Verdict::Refused(_));
        let answer = JoinAnswer {
            verdict,
            capabilities,
            extra: Vec::new(),
        };
        let Ok(message) = waiting.noise.write(&wire::encode(&answer)) else {
            return;
        };
        let mut datagram = DatagramType::JoinResponse.head().to_vec();
        datagram.extend_from_slice(&index.to_le_bytes());
        datagram.extend_from_slice(&waiting.remote_index.to_le_bytes());
        datagram.extend_from_slice(&message);
        MacKeys::new(&applicant.secret).finish(&mut datagram, None);
        if is_accepted {
            let hash = waiting.noise.hash();
            let keys = waiting.noise.into_keys(capabilities.agree(&waiting.theirs));
            let peer = applicant.request.id;
            let transport = Arc::new(Transport::new(peer, index, waiting.remote_index, &keys));
            applicant.add_session(Session { transport, hash }, out);
        }
        let to = waiting.from;
        out.push(JoinEvent::Send { to, datagram });
        // What stood in the way may be gone when it comes again.
        if !is_final {
            self.applicants.remove(key);
        }
    }

    fn draw(&mut self) -> u32 {
        loop {
            let index = self.random.u64() as u32 | JOIN_BIT;
            if self.find(index).is_none() {
                return index;
            }
        }
    }

    fn find(&self, index: u32) -> Option<(Key, Arc<Transport>)> {
        self.applicants.iter().find_map(|(key, applicant)| {
            let session = applicant.session(index)?;
            Some((*key, session.transport.clone()))
        })
    }

    fn on_data(
        &mut self,
        now: Now,
        from: UnderlayAddr,
        bytes: &mut [u8],
        out: &mut Vec<JoinEvent>,
    ) -> Result<(), DropReason> {
        let header = DataHeader::parse(bytes).ok_or(DropReason::Malformed)?;
        let (_, transport) = self
            .find(header.receiver)
            .ok_or(DropReason::UnknownSession)?;
        let (kind, body) = transport.open(bytes)?;
        self.on_frame(now, header.receiver, from, (kind, body), out)
    }

    fn on_frame(
        &mut self,
        now: Now,
        local_index: u32,
        from: UnderlayAddr,
        (kind, body): (u8, &[u8]),
        out: &mut Vec<JoinEvent>,
    ) -> Result<(), DropReason> {
        if !is_join_index(local_index) {
            return Err(DropReason::UnknownSession);
        }
        let (key, _) = self.find(local_index).ok_or(DropReason::UnknownSession)?;
        if FrameKind::of(kind) != Some(FrameKind::Control) {
            return Err(DropReason::UnknownKind);
        }
        let message = wire::decode(body).map_err(|_| DropReason::BadFrame)?;
        let applicant = self
            .applicants
            .get_mut(&key)
            .ok_or(DropReason::UnknownSession)?;
        applicant.touched = now;
        applicant.on_message(local_index, from, message, out)
    }
}

impl Applicant {
    fn session(&self, index: u32) -> Option<&Session> {
        self.sessions
            .iter()
            .find(|session| session.transport.local_index() == index)
    }

    fn add_session(&mut self, session: Session, out: &mut Vec<JoinEvent>) {
        // The one in use stays, whatever is replayed.
        if self.sessions.len() >= SESSIONS {
            let in_use = self.confirmed.map(|(index, _)| index);
            let oldest = self
                .sessions
                .iter()
                .position(|s| Some(s.transport.local_index()) != in_use);
            if let Some(oldest) = oldest {
                self.sessions.remove(oldest).retire(out);
            }
        }
        let transport = session.transport.clone();
        self.sessions.push(session);
        out.push(JoinEvent::Accepting { transport });
    }

    fn on_message(
        &mut self,
        index: u32,
        from: UnderlayAddr,
        message: JoinMessage,
        out: &mut Vec<JoinEvent>,
    ) -> Result<(), DropReason> {
        match message {
            JoinMessage::Ready { signature } => {
                let session = self.session(index).ok_or(DropReason::UnknownSession)?;
                if !verify(&self.request.id, &ready(&session.hash), &signature) {
                    return Err(DropReason::Forged);
                }
                let is_first = self.confirmed.is_none();
                self.confirmed = Some((index, from));
                if is_first {
                    out.push(JoinEvent::Confirmed(self.request.clone()));
                }
                self.send_first(out);
                Ok(())
            }
            // All else only from one that has shown who it is.
            _ if self.confirmed.is_none_or(|(used, _)| used != index) => Err(DropReason::Stranger),
            JoinMessage::Missing { indices } => {
                self.confirmed = Some((index, from));
                for index in indices.into_iter().take(BURST) {
                    self.send_chunk(usize::from(index), out);
                }
                Ok(())
            }
            JoinMessage::Done => {
                let handle = self.request.handle;
                if !std::mem::replace(&mut self.is_done, true) {
                    out.push(JoinEvent::Done { handle });
                }
                Ok(())
            }
            JoinMessage::Chunk { .. } => Err(DropReason::BadFrame),
        }
    }

    fn send_first(&self, out: &mut Vec<JoinEvent>) {
        for index in 0..self.welcome.len().min(BURST) {
            self.send_chunk(index, out);
        }
    }

    fn send_chunk(&self, index: usize, out: &mut Vec<JoinEvent>) {
        let (Some(bytes), Some((used, to))) = (self.welcome.get(index), self.confirmed) else {
            return;
        };
        let Some(session) = self.session(used) else {
            return;
        };
        let chunk = JoinMessage::Chunk {
            index: index as u16,
            total: self.welcome.len() as u16,
            bytes: bytes.clone(),
        };
        let (body, mut datagram) = (wire::encode(&chunk), Vec::new());
        let sealed = session
            .transport
            .seal(FrameKind::Control, &body, &mut datagram);
        if sealed.is_ok() {
            out.push(JoinEvent::Send { to, datagram });
        }
    }
}

impl Session {
    fn retire(&self, out: &mut Vec<JoinEvent>) {
        let local_index = self.transport.local_index();
        out.push(JoinEvent::Retired { local_index });
    }
}

/// The signed body and the Noise message of a join-init whose macs are not checked yet.
pub(in crate::session) fn split_init(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let body = bytes.get(..bytes.len().checked_sub(cookie::MACS)?)?;
    let len = u16::from_le_bytes(*body.get(8..)?.first_chunk()?);
    body.get(10..)?.split_at_checked(usize::from(len))
}

fn shorten(mut reason: String) -> String {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.truncate(end);
    reason
}
