//! Questions between members: who asked what of whom, and what follows from the answers. Every question has a deadline;
//! what is asked of several members ends with the first refusal, the last answer, or the deadline.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::Ipv4Net;

use super::cluster::Cluster;
use super::commands::AttachRequest;
use super::durable::Then;
use super::io::{Answer, Ask, CommandError, Output, Reply};
use super::networks::{NetworkWish, no_network};
use crate::control::ErrorKind;
use crate::ipam::ExactError;
use crate::model::{NodeId, Now};
use crate::session::join::{JoinHandle, Verdict};
use crate::view::{Liveness, Service};
use crate::wire::{self, Message};

/// Questions of this node that wait for answers at the same time.
pub(super) const MAX_WAITING: usize = 256;
/// Questions of others that wait for this host at the same time.
pub(super) const MAX_CHECKS: usize = 64;
/// What was granted comes as records; they take a moment longer than the answer.
const GRANT_PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(2);
/// After a refusal the next member is asked for a first part.
const ASK_AGAIN: Duration = Duration::from_millis(300);

/// What an answer is for.
pub(super) enum Purpose {
    /// An attachment waits for an address of its own part.
    Attach {
        command: u64,
        request: AttachRequest,
        tried: BTreeSet<NodeId>,
    },
    /// A service waits for a VIP.
    Vip {
        command: u64,
        service: Box<Service>,
        tried: BTreeSet<NodeId>,
    },
    /// A service waits for all nodes' word on its published ports.
    Publish { command: u64, service: Box<Service> },
    /// A newcomer waits for the issuer's count.
    CountUse { handle: JoinHandle },
    /// Services that share a virtual address of this node's wait for a free one.
    PartServices { tried: BTreeSet<NodeId> },
    /// This node waits for its first part of the range.
    FirstSpace,
    /// Somebody must hear that this node leaves.
    Farewell { command: u64 },
    /// A network waits for its block.
    Network {
        command: u64,
        wish: NetworkWish,
        net: Ipv4Net,
    },
}

impl Purpose {
    /// Does it wait for records rather than for the answer?
    fn waits_for_records(&self) -> bool {
        matches!(
            self,
            Purpose::Attach { .. }
                | Purpose::Vip { .. }
                | Purpose::PartServices { .. }
                | Purpose::FirstSpace
                | Purpose::Network { .. }
        )
    }
}

struct Waiting {
    purpose: Purpose,
    peers: BTreeSet<NodeId>,
    deadline: Now,
}

/// All open questions.
#[derive(Default)]
pub(super) struct Asks {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// Others' questions that the shell is looking into: (who, their number).
    checks: BTreeMap<u64, (NodeId, u64)>,
}

impl Asks {
    pub(super) fn deadline(&self) -> Option<Now> {
        self.waiting.values().map(|waiting| waiting.deadline).min()
    }

    /// Questions of this node that wait, and others' that wait for the shell.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.waiting.len(), self.checks.len())
    }

    /// Blocks that are asked for.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Ipv4Net> {
        self.waiting.values().filter_map(|w| match w.purpose {
            Purpose::Network { net, .. } => Some(net),
            _ => None,
        })
    }

    /// Does anything wait for such a purpose?
    pub(super) fn wait_for(&self, is_it: impl Fn(&Purpose) -> bool) -> bool {
        self.waiting.values().any(|waiting| is_it(&waiting.purpose))
    }
}

impl Cluster {
    /// Asks `peers` and keeps `purpose` until they answered; gives it back when nothing can be asked now.
    pub(super) fn ask(
        &mut self,
        now: Now,
        peers: BTreeSet<NodeId>,
        ask: &Ask,
        purpose: Purpose,
    ) -> Result<(), Purpose> {
        if peers.is_empty() || self.asks.waiting.len() >= MAX_WAITING {
            return Err(purpose);
        }
        self.asks.next += 1;
        let id = self.asks.next;
        let patience = match ask {
            Ask::Address(_) | Ask::Space { .. } | Ask::SpaceIn(_) | Ask::Block(_) => GRANT_PATIENCE,
            Ask::CountUse { .. } | Ask::Publish(_) | Ask::Farewell(_) => PATIENCE,
        };
        for peer in &peers {
            self.send(
                now,
                peer,
                &Message::Ask {
                    id,
                    body: wire::encode(ask),
                },
            );
        }
        self.asks.waiting.insert(
            id,
            Waiting {
                purpose,
                peers,
                deadline: now.plus(patience),
            },
        );
        Ok(())
    }

    pub(super) fn on_ask(
        &mut self,
        now: Now,
        from: NodeId,
        id: u64,
        body: &[u8],
        out: &mut Vec<Output>,
    ) {
        let Ok(ask) = wire::decode::<Ask>(body) else {
            return;
        };
        if let Ask::Farewell(record) = &ask {
            return self.on_farewell(now, from, id, record);
        }
        if !self.ready {
            return self.answer(
                now,
                &from,
                id,
                &Answer::No("it is still starting".to_owned()),
            );
        }
        match ask {
            Ask::Address(_) | Ask::Space { .. } | Ask::SpaceIn(_) | Ask::Block(_) => {
                self.on_space_ask(now, from, id, ask, out);
            }
            Ask::CountUse {
                token,
                expiry,
                joiner,
                uses,
            } => match self.count_use(now, token, expiry, uses, joiner) {
                Ok(batch) => self.persist(
                    now,
                    batch,
                    vec![Then::Answer(from, id, Answer::Granted)],
                    out,
                ),
                Err(why) => self.answer(now, &from, id, &Answer::No(why.to_owned())),
            },
            // Taken above, in every state.
            Ask::Farewell(_) => {}
            Ask::Publish(ports) => {
                if self.asks.checks.len() < MAX_CHECKS {
                    self.asks.next += 1;
                    self.asks.checks.insert(self.asks.next, (from, id));
                    out.push(Output::CheckPublish {
                        ask: self.asks.next,
                        ports,
                    });
                }
            }
        }
    }

    pub(super) fn on_publish_checked(&mut self, now: Now, ask: u64, owner: Option<String>) {
        if let Some((from, id)) = self.asks.checks.remove(&ask) {
            let answer = owner.map_or(Answer::Granted, |owner| {
                Answer::Held(owner.chars().take(120).collect())
            });
            self.answer(now, &from, id, &answer);
        }
    }

    pub(super) fn answer(&mut self, now: Now, to: &NodeId, id: u64, answer: &Answer) {
        self.send(
            now,
            to,
            &Message::Answer {
                id,
                body: wire::encode(answer),
            },
        );
    }

    pub(super) fn on_answer(
        &mut self,
        now: Now,
        from: NodeId,
        id: u64,
        body: &[u8],
        out: &mut Vec<Output>,
    ) {
        let Ok(answer) = wire::decode::<Answer>(body) else {
            return;
        };
        let Some(waiting) = self.asks.waiting.get_mut(&id) else {
            return;
        };
        if !waiting.peers.remove(&from) {
            return;
        }
        let all_answered = waiting.peers.is_empty();
        let waits_for_records = waiting.purpose.waits_for_records();
        let one_is_enough = matches!(waiting.purpose, Purpose::Farewell { .. });
        let goes_on =
            answer == Answer::Granted && (waits_for_records || !all_answered) && !one_is_enough;
        if goes_on {
            return;
        }
        if let Some(waiting) = self.asks.waiting.remove(&id) {
            self.conclude(now, waiting.purpose, Some((from, answer)), out);
        }
    }

    pub(super) fn expire_asks(&mut self, now: Now, out: &mut Vec<Output>) {
        let due: Vec<u64> = self
            .asks
            .waiting
            .iter()
            .filter(|(_, w)| w.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            if let Some(waiting) = self.asks.waiting.remove(&id) {
                self.conclude(now, waiting.purpose, None, out);
            }
        }
    }

    /// Records came: what waited for them is tried again.
    pub(super) fn retry_waiting(&mut self, now: Now, out: &mut Vec<Output>) {
        let ids: Vec<u64> = self
            .asks
            .waiting
            .iter()
            .filter(|(_, w)| w.purpose.waits_for_records())
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(waiting) = self.asks.waiting.remove(&id) else {
                continue;
            };
            match self.try_again(now, waiting.purpose, out) {
                Ok(()) => {}
                Err(purpose) => {
                    self.asks.waiting.insert(id, Waiting { purpose, ..waiting });
                }
            }
        }
    }

    /// The first part of the range did not come with the welcome: whoever has most is asked for some.
    pub(super) fn ask_for_first_space(&mut self, now: Now) {
        let is_first = |purpose: &Purpose| matches!(purpose, Purpose::FirstSpace);
        if self.asks.wait_for(is_first) {
            return;
        }
        if now < self.space.ask_again {
            return self.space.wake(self.space.ask_again);
        }
        let net = self.plan.default_network();
        let donor = self.richest(net, &self.space.refused_by).or_else(|| {
            self.space.refused_by.clear();
            self.richest(net, &BTreeSet::new())
        });
        let Some(donor) = donor else {
            // Nobody to ask yet.
            return self.space.wake(now.plus(ASK_AGAIN));
        };
        self.space.refused_by.insert(donor);
        let richest = BTreeSet::from([donor]);
        let _ = self.ask(
            now,
            richest,
            &Ask::Space { vips: false },
            Purpose::FirstSpace,
        );
    }

    /// The live member, not among `but`, that has most of `net` to give, as far as is known here.
    pub(super) fn richest(&self, net: Ipv4Net, but: &BTreeSet<NodeId>) -> Option<NodeId> {
        self.alive_peers()
            .into_iter()
            .filter(|id| !but.contains(id))
            .map(|id| (self.allocator.free_of(&id, &net), id))
            .filter(|(size, _)| *size > 0)
            .max()
            .map(|(_, id)| id)
    }

    pub(super) fn alive_peers(&self) -> BTreeSet<NodeId> {
        self.membership
            .alive()
            .map(|(id, _)| id)
            .filter(|id| self.liveness(id) != Liveness::Down)
            .collect()
    }

    fn conclude(
        &mut self,
        now: Now,
        purpose: Purpose,
        last: Option<(NodeId, Answer)>,
        out: &mut Vec<Output>,
    ) {
        match (purpose, last) {
            (Purpose::Publish { command, service }, Some((node, Answer::Held(owner)))) => {
                // Another host's words: nothing that could steer a terminal.
                let owner: String = owner
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(120)
                    .collect();
                let text = format!(
                    "can't publish {}: held on node {} by {owner}; choose another port or stop it there",
                    super::commands::published_text(&service),
                    self.name_of(&node)
                );
                fail(command, ErrorKind::Conflict, text, out);
            }
            // Nodes that did not answer in time find out by themselves and say so in their conflicts.
            (Purpose::Publish { command, service }, _) => {
                self.store_service(now, command, *service, out)
            }
            (Purpose::CountUse { handle }, Some((_, Answer::Granted))) => {
                self.let_in(now, handle, Verdict::Accepted)
            }
            (Purpose::CountUse { handle }, Some(_)) => self.let_in(now, handle, Verdict::UsedUp),
            (Purpose::CountUse { handle }, None) => {
                let why = "the member that made this token does not answer, and only it can count its uses; \
                           make one on a host that is up, or a --reusable one";
                self.let_in(now, handle, Verdict::Refused(why.to_owned()));
            }
            (
                Purpose::Attach {
                    command,
                    request,
                    tried,
                },
                answer,
            ) => {
                self.attach_failed(now, command, request, tried, answer, out);
            }
            (
                Purpose::Vip {
                    command,
                    service,
                    tried,
                },
                answer,
            ) => {
                self.vip_failed(now, command, service, tried, answer, out);
            }
            (Purpose::Network { command, wish, net }, answer) => {
                self.block_failed(now, command, wish, net, answer, out);
            }
            (Purpose::PartServices { tried }, _) => self.ask_to_part(now, tried),
            (Purpose::FirstSpace, _) => self.space.ask_again = now.plus(ASK_AGAIN),
            (Purpose::Farewell { command }, Some((_, Answer::Granted))) => {
                out.push(Output::Reply(command, Ok(Reply::Done)));
            }
            (Purpose::Farewell { command }, _) => self.unheard_farewell(command, out),
        }
    }

    fn try_again(
        &mut self,
        now: Now,
        purpose: Purpose,
        out: &mut Vec<Output>,
    ) -> Result<(), Purpose> {
        match purpose {
            Purpose::Attach {
                command,
                request,
                tried,
            } => match self.find_address(&request) {
                Ok(ip) => {
                    self.store_endpoint(now, command, request, ip, out);
                    Ok(())
                }
                Err(_) => Err(Purpose::Attach {
                    command,
                    request,
                    tried,
                }),
            },
            Purpose::Vip {
                command,
                mut service,
                tried,
            } => match self.allocator.allocate_vip() {
                Ok(vip) => {
                    service.vip = vip;
                    self.check_everywhere(now, command, *service, out);
                    Ok(())
                }
                Err(_) => Err(Purpose::Vip {
                    command,
                    service,
                    tried,
                }),
            },
            Purpose::Network { command, wish, net } if self.allocator.is_own_block(&net) => {
                self.store_network(now, command, wish.name, net, out);
                Ok(())
            }
            Purpose::PartServices { .. } if self.allocator.free(&self.plan.vips()) > 0 => {
                self.part_services(now, out);
                Ok(())
            }
            Purpose::FirstSpace if self.has_default_space() => Ok(()),
            other => Err(other),
        }
    }

    /// This node has no address left for an attachment: whoever has most is asked for some.
    pub(super) fn ask_for_space(
        &mut self,
        now: Now,
        command: u64,
        request: AttachRequest,
        net: Ipv4Net,
        out: &mut Vec<Output>,
    ) {
        self.ask_next(now, command, request, net, (BTreeSet::new(), None), out);
    }

    fn attach_failed(
        &mut self,
        now: Now,
        command: u64,
        request: AttachRequest,
        tried: BTreeSet<NodeId>,
        answer: Option<(NodeId, Answer)>,
        out: &mut Vec<Output>,
    ) {
        let why = match answer {
            Some((node, Answer::No(why))) => self.says(&node, &why),
            _ => "its owner did not answer in time".to_owned(),
        };
        if let Some(ip) = request.ip {
            let text = format!("can't get {ip}: {why}");
            return fail(command, ErrorKind::Unavailable, text, out);
        }
        match self.network(&request.network) {
            Some(net) => self.ask_next(now, command, request, net, (tried, Some(why)), out),
            None => fail(
                command,
                ErrorKind::NotFound,
                no_network(&request.network),
                out,
            ),
        }
    }

    /// Asks the richest node that was not asked yet for addresses of `net`.
    fn ask_next(
        &mut self,
        now: Now,
        command: u64,
        request: AttachRequest,
        net: Ipv4Net,
        (mut tried, why): (BTreeSet<NodeId>, Option<String>),
        out: &mut Vec<Output>,
    ) {
        let asked = self.names_of(&tried);
        let next = self.richest(net, &tried);
        tried.extend(next);
        let question = match net == self.plan.default_network() {
            true => Ask::Space { vips: false },
            false => Ask::SpaceIn(net),
        };
        let name = request.network.clone();
        let purpose = Purpose::Attach {
            command,
            request,
            tried,
        };
        let peers = next.into_iter().collect();
        if self.ask(now, peers, &question, purpose).is_err() {
            let text = self.exhausted(&name, net, &asked, why);
            fail(command, ErrorKind::Unavailable, text, out);
        }
    }

    fn vip_failed(
        &mut self,
        now: Now,
        command: u64,
        service: Box<Service>,
        tried: BTreeSet<NodeId>,
        answer: Option<(NodeId, Answer)>,
        out: &mut Vec<Output>,
    ) {
        let purpose = |tried| Purpose::Vip {
            command,
            service,
            tried,
        };
        if self.ask_for_vips(now, tried, purpose) {
            return;
        }
        let why = match answer {
            Some((_, Answer::No(why))) => why,
            _ => "nobody answered".to_owned(),
        };
        fail(
            command,
            ErrorKind::Unavailable,
            format!("no virtual address left on this host ({why})"),
            out,
        );
    }

    /// Asks whoever has most virtual addresses to give, and is not among `tried`, for some; false if there is nobody, or no
    /// question can be asked now.
    pub(super) fn ask_for_vips(
        &mut self,
        now: Now,
        mut tried: BTreeSet<NodeId>,
        purpose: impl FnOnce(BTreeSet<NodeId>) -> Purpose,
    ) -> bool {
        let Some(next) = self.richest(self.plan.vips(), &tried) else {
            return false;
        };
        tried.insert(next);
        let peers = BTreeSet::from([next]);
        self.ask(now, peers, &Ask::Space { vips: true }, purpose(tried))
            .is_ok()
    }

    /// What to do about an address that this node does not own: ask its owner.
    pub(super) fn ask_owner(
        &mut self,
        now: Now,
        command: u64,
        request: AttachRequest,
        error: ExactError,
        out: &mut Vec<Output>,
    ) {
        let ExactError::NotOurs { ip, owner } = error else {
            return fail(command, ErrorKind::Conflict, error.to_string(), out);
        };
        if self.liveness(&owner) == Liveness::Down {
            let text = format!(
                "{ip} belongs to node {}, which is away: only it can give the address; start it, or choose another address",
                self.name_of(&owner)
            );
            return fail(command, ErrorKind::Unavailable, text, out);
        }
        let purpose = Purpose::Attach {
            command,
            request,
            tried: BTreeSet::from([owner]),
        };
        if self
            .ask(now, BTreeSet::from([owner]), &Ask::Address(ip), purpose)
            .is_err()
        {
            fail(
                command,
                ErrorKind::Unavailable,
                "too many requests wait already; try again".to_owned(),
                out,
            );
        }
    }

    /// Another host's words, without what could steer a terminal.
    pub(super) fn says(&self, node: &NodeId, words: &str) -> String {
        let words: String = words
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        format!("node {} says: {words}", self.name_of(node))
    }

    pub(super) fn names_of(&self, nodes: &BTreeSet<NodeId>) -> String {
        let names: Vec<String> = nodes.iter().map(|id| self.name_of(id)).collect();
        names.join(", ")
    }

    pub(super) fn name_of(&self, id: &NodeId) -> String {
        self.catalog
            .nodes()
            .get(id)
            .map_or_else(|| id.short(), |info| info.name.to_string())
    }
}

pub(super) fn fail(command: u64, kind: ErrorKind, text: String, out: &mut Vec<Output>) {
    out.push(Output::Reply(command, Err(CommandError::new(kind, text))));
}
