//! Space for members that ask for some. What voters guard is given once they agreed to new guards.

use ipnet::Ipv4Net;

use super::cluster::Cluster;
use super::durable::Then;
use super::io::{Answer, Ask, Output};
use crate::ipam::NoGift;
use crate::model::{NodeId, Now};
use crate::store::Batch;
use crate::value::{Grant, Object};

/// Who asks waits five seconds; an answer after that is of no use.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(4);
/// Members whose wishes wait at the same time.
const MAX_WAITING: usize = 64;

/// A member's wish that waits for this node's voters.
#[derive(Debug)]
pub(super) struct Wish {
    from: NodeId,
    id: u64,
    ask: Ask,
    deadline: Now,
}

impl Cluster {
    /// A member asks for space.
    pub(super) fn on_space_ask(
        &mut self,
        now: Now,
        from: NodeId,
        id: u64,
        ask: Ask,
        out: &mut Vec<Output>,
    ) {
        let wish = Wish {
            from,
            id,
            ask,
            deadline: now.plus(PATIENCE),
        };
        if let Some(wish) = self.give_or_keep(now, wish, out) {
            if self.space.wishes.len() >= MAX_WAITING {
                let why = "too many nodes ask for space at once".to_owned();
                return self.answer(now, &from, id, &Answer::No(why));
            }
            self.space.wake(now);
            self.space.wishes.push(wish);
        }
    }

    /// Guards may have changed: what waited for that is tried again.
    pub(super) fn give_what_waited(&mut self, now: Now, out: &mut Vec<Output>) {
        if self.space.wishes.is_empty() {
            return;
        }
        self.space.wanted.clear();
        for wish in std::mem::take(&mut self.space.wishes) {
            if !self.roster().is_member(&wish.from) {
                continue;
            }
            if wish.deadline <= now {
                let why = "its voters, which must agree first, did not answer";
                self.answer(now, &wish.from, wish.id, &Answer::No(why.to_owned()));
            } else if let Some(wish) = self.give_or_keep(now, wish, out) {
                self.space.wishes.push(wish);
            }
        }
        if let Some(deadline) = self.space.wishes.iter().map(|wish| wish.deadline).min() {
            self.space.wake(deadline);
        }
    }

    fn give_or_keep(&mut self, now: Now, wish: Wish, out: &mut Vec<Output>) -> Option<Wish> {
        let gift = match &wish.ask {
            Ask::Address(ip) => self.allocator.donate_exact(*ip, wish.from).map(one),
            Ask::Space { vips: true } => self.donate(self.plan.vips(), wish.from),
            Ask::Space { vips: false } => self.donate(self.plan.default_network(), wish.from),
            Ask::SpaceIn(net) if self.network_blocks().contains(net) => {
                self.donate(*net, wish.from)
            }
            Ask::SpaceIn(net) => {
                let why = format!("it knows no network with the addresses {net}");
                self.answer(now, &wish.from, wish.id, &Answer::No(why));
                return None;
            }
            Ask::Block(net) => match self.wanted_here(net) {
                None => self.allocator.donate_block(net, wish.from),
                Some(own) => {
                    let why = format!("it makes a network of {own} itself");
                    self.answer(now, &wish.from, wish.id, &Answer::No(why));
                    return None;
                }
            },
            _ => return None,
        };
        match gift {
            Ok(grants) => self.grant(now, wish.from, wish.id, grants, out),
            Err(NoGift::Guarded(start, last)) => {
                self.space.wanted.insert((start, last));
                return Some(wish);
            }
            Err(error) => {
                self.answer(now, &wish.from, wish.id, &Answer::No(error.to_string()));
            }
        }
        None
    }

    fn donate(&mut self, net: Ipv4Net, to: NodeId) -> Result<Vec<Grant>, NoGift> {
        self.allocator.donate(&net, to).map(one)
    }

    fn grant(&mut self, now: Now, to: NodeId, id: u64, grants: Vec<Grant>, out: &mut Vec<Output>) {
        for grant in grants {
            if let Err(error) = self.put(now, &Object::Grant(grant), Vec::new(), out) {
                return self.answer(now, &to, id, &Answer::No(error.text));
            }
        }
        // After what was queued before.
        let then = vec![Then::Answer(to, id, Answer::Granted)];
        self.persist(now, Batch::new(), then, out);
    }
}

fn one(grant: Grant) -> Vec<Grant> {
    vec![grant]
}
