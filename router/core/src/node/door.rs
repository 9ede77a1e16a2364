//! Letting newcomers in: their invitation is counted, their admission written down, and only then are they welcomed.

use std::collections::BTreeSet;

use super::asks::Purpose;
use super::cluster::Cluster;
use super::durable::Then;
use super::io::{Ask, Output};
use super::meta::Welcome;
use super::tokens::Count;
use crate::model::{NodeId, Now};
use crate::mutation::{self, Mutation};
use crate::roster::Rights;
use crate::session::join::{JoinEvent, JoinHandle, JoinRequest, MAX_WELCOME, Verdict};
use crate::store::Batch;
use crate::underlay::UnderlayAddr;
use crate::value::{Object, reached_at};
use crate::wire;

/// Members whose addresses a welcome names.
const SEEDS: usize = 64;
/// The most octets of roster records that leave a welcome room for all else, and for those who come in meanwhile.
const MAX_ROSTER: usize = MAX_WELCOME - (64 << 10);

impl Cluster {
    pub(super) fn on_door(&mut self, now: Now, event: JoinEvent, out: &mut Vec<Output>) {
        match event {
            JoinEvent::Send { to, datagram } => out.push(Output::Send { to, datagram }),
            JoinEvent::Request(request) => self.on_request(now, &request, out),
            JoinEvent::Confirmed(request) => self.admit(now, request, out),
            // Joiners' datagrams come here unopened; but the carrier must know whose they are.
            JoinEvent::Accepting { .. } | JoinEvent::Retired { .. } => out.push(Output::Tunnels),
            JoinEvent::Done { .. } => {}
        }
    }

    fn on_request(&mut self, now: Now, request: &JoinRequest, out: &mut Vec<Output>) {
        let token = &request.token;
        if self.leaving() || !self.ready {
            let why = "the asked member is just starting or stopping; try again in a moment";
            return self.let_in(now, request.handle, Verdict::Refused(why.to_owned()));
        }
        if !self.roster().is_member(&token.issuer) {
            let why = "the node that made this invitation is no member any more; make a new one";
            return self.let_in(now, request.handle, Verdict::Refused(why.to_owned()));
        }
        if self.roster().revoked().contains_key(&request.id) {
            let why = "this node was removed from the cluster; to come back under a new identity run: weft reset";
            return self.let_in(now, request.handle, Verdict::Refused(why.to_owned()));
        }
        let told: usize = self.roster().records().iter().map(|r| r.len()).sum();
        if told > MAX_ROSTER {
            let why = "the roster is full: it remembers all hosts that ever came, also those that were removed; a new \
                       cluster has room again";
            return self.let_in(now, request.handle, Verdict::Refused(why.to_owned()));
        }
        if token.is_reusable() {
            return self.let_in(now, request.handle, Verdict::Accepted);
        }
        if token.issuer == self.me {
            return match self.count_use(now, token.id, token.expires_at, token.uses, request.id) {
                Ok(_) if mutation::is_on(Mutation::ForgetTokenUses) => {
                    self.let_in(now, request.handle, Verdict::Accepted);
                }
                Ok(batch) => self.persist(now, batch, vec![Then::LetIn(request.handle)], out),
                Err(_) => self.let_in(now, request.handle, Verdict::UsedUp),
            };
        }
        let ask = Ask::CountUse {
            token: token.id,
            expiry: token.expires_at,
            joiner: request.id,
            uses: token.uses,
        };
        let purpose = Purpose::CountUse {
            handle: request.handle,
        };
        if self
            .ask(now, BTreeSet::from([token.issuer]), &ask, purpose)
            .is_err()
        {
            let why = "too many hosts join at once; try again in a moment";
            self.let_in(now, request.handle, Verdict::Refused(why.to_owned()));
        }
    }

    /// Counts a use of one of this node's own invitations; the batch comes before anybody hears of it.
    pub(super) fn count_use(
        &mut self,
        now: Now,
        token: [u8; 16],
        expires_at: u64,
        uses: u32,
        joiner: NodeId,
    ) -> Result<Batch, &'static str> {
        if expires_at <= self.wall.seconds(now) {
            return Err("it has expired");
        }
        match self.tokens.count(token, expires_at, uses, joiner) {
            Count::Counted(batch) => Ok(batch.unwrap_or_default()),
            Count::UsedUp => Err("it is used up"),
        }
    }

    pub(super) fn let_in(&mut self, _now: Now, handle: JoinHandle, verdict: Verdict) {
        self.door.answer(handle, verdict, &mut self.buffers.door);
    }

    fn admit(&mut self, now: Now, request: JoinRequest, out: &mut Vec<Output>) {
        if self.roster().is_member(&request.id) {
            return self.persist(now, Batch::new(), vec![Then::Welcome(request.handle)], out);
        }
        let issued = self.meta.roster.admit(
            &self.identity,
            request.id,
            request.noise_key,
            request.name.clone(),
            Rights::ALL,
        );
        let issued = match issued {
            Ok(issued) => issued,
            Err(error) => {
                let why = format!("the roster does not take it: {error}");
                return self.let_in(now, request.handle, Verdict::Refused(why));
            }
        };
        // A full log leaves the newcomer without a part of its own; it asks for one by itself.
        let gifts = self.allocator.donation_for_newcomer(request.id);
        let gifts = gifts.into_iter().map(Object::Grant);
        let gifts = gifts
            .filter_map(|gift| self.write(now, &gift).ok())
            .collect();
        self.publish_admission(now, issued, gifts, Then::Welcome(request.handle), out);
        self.on_roster(now, out);
    }

    pub(super) fn welcome(&mut self, handle: JoinHandle) {
        let welcome = Welcome {
            cluster: self.meta.cluster,
            secret: *self.meta.secret.expose(),
            range: self.meta.range,
            roster: self
                .roster()
                .records()
                .into_iter()
                .map(<[u8]>::to_vec)
                .collect(),
            seeds: self.seeds(),
        };
        // Too long for nobody who was let in: see `MAX_ROSTER`.
        let _ = self
            .door
            .welcome(handle, &wire::encode(&welcome), &mut self.buffers.door);
    }

    fn seeds(&self) -> Vec<(NodeId, Vec<UnderlayAddr>)> {
        let mut seeds: Vec<_> = self
            .catalog
            .nodes()
            .into_iter()
            .map(|(id, info)| (id, info.reached_at()))
            .take(SEEDS)
            .collect();
        if !seeds.iter().any(|(id, _)| *id == self.me) {
            let own = reached_at(&self.config.underlay, self.config.tcp_port);
            seeds.push((self.me, own));
        }
        seeds
    }
}
