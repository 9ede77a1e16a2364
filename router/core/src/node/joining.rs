//! A node on its way in: drives the joiner's handshake until a member's welcome is whole.

use super::io::{CommandError, Input, JoinFailure, NodeConfig, Output};
use super::meta::{Meta, Welcome};
use crate::control::ErrorKind;
use crate::crypto::Random;
use crate::identity::Identity;
use crate::model::{Generation, NodeId, Now};
use crate::path::Path;
use crate::session::join::{JoinConfig, Joiner, JoinerEvent};
use crate::token::Token;
use crate::underlay::UnderlayAddr;
use crate::wire;

/// See the module's documentation.
pub(super) struct Joining {
    me: NodeId,
    joiner: Joiner,
    began: Now,
    outcome: Option<Result<Meta, JoinFailure>>,
}

impl Joining {
    pub(super) fn new(
        identity: &Identity,
        config: &NodeConfig,
        token: Token,
        generation: Generation,
        random: Random,
        now: Now,
    ) -> Self {
        let join = JoinConfig {
            name: config.name.clone(),
            generation,
            cipher: config.cipher,
        };
        let joiner = Joiner::new(identity.clone(), token, join, random, now);
        Self {
            me: identity.id(),
            joiner,
            began: now,
            outcome: None,
        }
    }

    pub(super) fn handle(&mut self, now: Now, input: Input<'_>, out: &mut Vec<Output>) {
        match input {
            Input::Datagram {
                from: Path::Direct(from),
                bytes,
            } => {
                let mut events = Vec::new();
                self.joiner.handle(now, from, bytes, &mut events);
                self.apply(now, events, out);
            }
            Input::Command(id, _) => {
                let text = "this host is still joining; try again once `weft status` shows it";
                out.push(Output::Reply(
                    id,
                    Err(CommandError::new(ErrorKind::Unavailable, text)),
                ));
            }
            Input::Leave => out.push(Output::Left),
            _ => {}
        }
    }

    pub(super) fn expire(&mut self, now: Now, out: &mut Vec<Output>) {
        let mut events = Vec::new();
        self.joiner.expire(now, &mut events);
        self.apply(now, events, out);
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        self.joiner.deadline()
    }

    /// How it ended, once it has.
    pub(super) fn take_outcome(&mut self) -> Option<Result<Meta, JoinFailure>> {
        self.outcome.take()
    }

    fn apply(&mut self, now: Now, events: Vec<JoinerEvent>, out: &mut Vec<Output>) {
        for event in events {
            match event {
                JoinerEvent::Send { to, datagram } => out.push(Output::Send { to, datagram }),
                JoinerEvent::Refused(why) => {
                    self.outcome = Some(Err(JoinFailure::Refused(why.to_string())))
                }
                JoinerEvent::TimedOut { tried } => {
                    self.outcome = Some(Err(JoinFailure::NoAnswer {
                        tried,
                        after: now.since(self.began),
                    }));
                }
                JoinerEvent::Welcome {
                    member,
                    addr,
                    bytes,
                } => {
                    self.outcome = Some(self.welcome(&bytes, member, addr));
                }
            }
        }
    }

    fn welcome(
        &self,
        bytes: &[u8],
        member: NodeId,
        addr: UnderlayAddr,
    ) -> Result<Meta, JoinFailure> {
        let refused = |why: String| {
            JoinFailure::Refused(format!("the member's welcome can't be used: {why}"))
        };
        let mut welcome: Welcome =
            wire::decode_long(bytes).map_err(|error| refused(error.to_string()))?;
        // Where the member was just reached is better than where it thinks it is.
        match welcome.seeds.iter_mut().find(|(id, _)| *id == member) {
            Some((_, addresses)) => addresses.insert(0, addr),
            None => welcome.seeds.push((member, vec![addr])),
        }
        Meta::welcomed(welcome, &self.me).map_err(|error| refused(error.to_string()))
    }
}
