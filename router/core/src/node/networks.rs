//! Networks: made of a block that this node owns whole, or that its owners hand over for it; removed when nothing is in
//! them; and people are told before one is full.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;

use super::asks::{Purpose, fail};
use super::cluster::Cluster;
use super::durable::Then;
use super::io::{Answer, Ask, Output, Reply};
use crate::control::{ErrorKind, NetworkSpec};
use crate::ipam::{Block, BlockError};
use crate::model::{Label, NetworkName, NodeId, Now};
use crate::value::{Kind, Network, Object, label_key};
use crate::view::{Endpoint, Liveness, NetworkView};

/// The network that is always there.
pub(super) const DEFAULT: &str = "default";
/// Blocks that are tried for one network before a person hears that it can't be.
const MAX_TRIED: usize = 4;
/// Endpoints named when a network can't be removed.
const MAX_NAMED: usize = 5;

/// A network that somebody wants.
pub(super) struct NetworkWish {
    pub(super) name: NetworkName,
    block: WishedBlock,
    tried: BTreeSet<Ipv4Net>,
    /// Why the last block could not be had.
    why: Option<String>,
}

#[derive(Clone, Copy)]
enum WishedBlock {
    /// Any of this prefix length.
    Size(u8),
    /// This one.
    Exact(Ipv4Net),
}

impl Cluster {
    pub(super) fn create_network(
        &mut self,
        now: Now,
        command: u64,
        spec: NetworkSpec,
        out: &mut Vec<Output>,
    ) {
        if let Err(why) = self.check_free_name(&spec.name) {
            return fail(command, ErrorKind::Conflict, why, out);
        }
        let block = match self.wished_block(&spec) {
            Ok(block) => block,
            Err((kind, why)) => return fail(command, kind, why, out),
        };
        let wish = NetworkWish {
            name: spec.name,
            block,
            tried: BTreeSet::new(),
            why: None,
        };
        self.try_next_block(now, command, wish, out);
    }

    pub(super) fn remove_network(
        &mut self,
        now: Now,
        command: u64,
        name: &NetworkName,
        out: &mut Vec<Output>,
    ) {
        if name.as_str() == DEFAULT {
            let text = "the network \"default\" can't be removed: hosts and whatever names no other network are in it";
            return fail(command, ErrorKind::Conflict, text.to_owned(), out);
        }
        let endpoints = self.catalog.endpoints(&self.removed());
        let inside: Vec<&Endpoint> = endpoints.iter().filter(|e| e.network == *name).collect();
        if !inside.is_empty() && self.network(name).is_some() {
            let text = format!(
                "network \"{name}\" is in use by {}; detach what is in it first",
                self.endpoints_text(&inside)
            );
            return fail(command, ErrorKind::Conflict, text, out);
        }
        self.remove_shared(now, command, Kind::NETWORK, "network", name, out);
    }

    /// The addresses of the network by this name.
    pub(super) fn network(&self, name: &NetworkName) -> Option<Ipv4Net> {
        if name.as_str() == DEFAULT {
            return Some(self.plan.default_network());
        }
        let wall = self.wall_now();
        match self
            .catalog
            .shared_object(Kind::NETWORK, &label_key(name), wall)?
        {
            // A record that no honest node writes means nothing.
            Object::Network(network) => Some(network.net).filter(|net| self.plan.is_network(net)),
            _ => None,
        }
    }

    /// All networks with what is known of them, `default` first.
    pub(super) fn networks(&self) -> Vec<NetworkView> {
        let wall = self.wall_now();
        let lost = self.catalog.lost_networks(wall);
        let others = self.catalog.networks(wall).into_iter();
        let default = Label::parse(DEFAULT).ok().map(|name| Network {
            name,
            net: self.plan.default_network(),
        });
        default
            .into_iter()
            .chain(others.filter(|n| self.plan.is_network(&n.net)))
            .map(|network| {
                let also = lost.iter().filter(|lost| lost.name == network.name);
                let also = also.map(|lost| lost.net);
                let also = also.filter(|net| self.plan.is_network(net) && *net != network.net);
                let also = also.collect();
                self.network_view(network.name, network.net, also)
            })
            .collect()
    }

    /// All blocks that are, or were meant to be, networks besides `default`.
    pub(super) fn network_blocks(&self) -> Vec<Ipv4Net> {
        let wall = self.wall_now();
        let lost = self.catalog.lost_networks(wall).into_iter();
        let lost = lost.map(|network| network.net);
        let networks = self.catalog.networks(wall).into_iter().map(|n| n.net);
        networks
            .chain(lost)
            .filter(|net| self.plan.is_network(net))
            .collect()
    }

    fn network_view(&self, name: NetworkName, net: Ipv4Net, also: Vec<Ipv4Net>) -> NetworkView {
        NetworkView {
            low: self.low.contains(&name),
            size: usable(&net),
            used: self.allocator.used(&net),
            free_here: self.allocator.free(&net),
            name,
            net,
            also,
        }
    }

    /// A block that this node asks others for, and that a wished one overlaps.
    pub(super) fn wanted_here(&self, net: &Ipv4Net) -> Option<Ipv4Net> {
        self.asks.blocks().find(|own| overlap(own, net))
    }

    pub(super) fn store_network(
        &mut self,
        now: Now,
        command: u64,
        name: NetworkName,
        net: Ipv4Net,
        out: &mut Vec<Output>,
    ) {
        if let Err(why) = self.check_free_name(&name) {
            return fail(command, ErrorKind::Conflict, why, out);
        }
        self.allocator.hold_block(net);
        let view = self.network_view(name.clone(), net, Vec::new());
        let then = vec![Then::Reply(command, Reply::Network(view))];
        if let Err(error) = self.put(now, &Object::Network(Network { name, net }), then, out) {
            self.allocator.drop_block(&net);
            out.push(Output::Reply(command, Err(error)));
        }
    }

    /// A block did not come.
    pub(super) fn block_failed(
        &mut self,
        now: Now,
        command: u64,
        mut wish: NetworkWish,
        net: Ipv4Net,
        answer: Option<(NodeId, Answer)>,
        out: &mut Vec<Output>,
    ) {
        wish.tried.insert(net);
        wish.why = Some(match answer {
            Some((node, Answer::No(why))) => self.says(&node, &why),
            _ => format!("the owner of {net} did not answer in time"),
        });
        self.try_next_block(now, command, wish, out);
    }

    /// Makes the network of the next block that can be had, or asks for it.
    fn try_next_block(&mut self, now: Now, command: u64, wish: NetworkWish, out: &mut Vec<Output>) {
        let Some(block) = self.next_block(&wish) else {
            let text = self.no_block(&wish);
            return fail(command, ErrorKind::Unavailable, text, out);
        };
        let net = block.net;
        if self.allocator.is_own_block(&net) {
            return self.store_network(now, command, wish.name, net, out);
        }
        let owners = self.others(&block);
        let purpose = Purpose::Network { command, wish, net };
        if self.ask(now, owners, &Ask::Block(net), purpose).is_err() {
            let text = "too many requests wait already; try again".to_owned();
            fail(command, ErrorKind::Unavailable, text, out);
        }
    }

    fn next_block(&self, wish: &NetworkWish) -> Option<Block> {
        if wish.tried.len() >= MAX_TRIED {
            return None;
        }
        let blocks = match wish.block {
            WishedBlock::Size(prefix_len) => self.allocator.blocks(prefix_len),
            WishedBlock::Exact(net) => vec![self.allocator.block(&net)],
        };
        let alive = self.alive_peers();
        let to_be_had = blocks.into_iter().filter(|block| {
            !wish.tried.contains(&block.net)
                && self.wanted_here(&block.net).is_none()
                && self.others(block).is_subset(&alive)
        });
        // What the owners' voters guard takes longer, and a majority of them.
        to_be_had.min_by_key(|block| (self.others(block).len(), self.is_guarded(block), block.net))
    }

    fn is_guarded(&self, block: &Block) -> bool {
        let (first, end) = (
            u32::from(block.net.network()),
            u32::from(block.net.broadcast()),
        );
        self.others(block).iter().any(|owner| {
            let Some(electorate) = self.electorate(owner) else {
                return false;
            };
            let locked = electorate.locked(self.vote_on(*owner));
            locked
                .iter()
                .any(|(start, last)| *start <= end && *last >= first)
        })
    }

    fn others(&self, block: &Block) -> BTreeSet<NodeId> {
        let mut owners = block.owners.clone();
        owners.remove(&self.me);
        owners
    }

    /// Why there is no block, and what to do.
    fn no_block(&self, wish: &NetworkWish) -> String {
        match (wish.block, &wish.why) {
            (WishedBlock::Exact(net), Some(why)) => format!("can't get {net}: {why}"),
            (WishedBlock::Exact(net), None) => {
                let owners = self.others(&self.allocator.block(&net));
                let mut away = owners.clone();
                away.retain(|id| self.liveness(id) == Liveness::Down);
                let owners = if away.is_empty() { owners } else { away };
                format!(
                    "{net} belongs to {}, which can't be asked now: only the owner can give the space; start it, or \
                     choose another subnet",
                    self.names_of(&owners)
                )
            }
            (WishedBlock::Size(size), why) => {
                let why = why
                    .as_ref()
                    .map_or(String::new(), |why| format!(" ({why})"));
                format!(
                    "no free block of a /{size} is left with the nodes that are up{why}; take a smaller one with \
                     --size, or remove a network: weft network ls"
                )
            }
        }
    }

    fn wished_block(&self, spec: &NetworkSpec) -> Result<WishedBlock, (ErrorKind, String)> {
        let sizes = self.plan.network_sizes();
        let range = self.plan.range;
        let invalid = |text| Err((ErrorKind::Invalid, text));
        let size = match (spec.prefix_len, spec.subnet) {
            (Some(_), Some(_)) => {
                return invalid("a network has a size or a subnet, not both".to_owned());
            }
            (size, subnet) => size.or(subnet.map(|net| net.prefix_len())),
        };
        if let Some(net) = spec.subnet {
            if net.trunc() != net {
                let text = format!("{net} has host bits set; did you mean {}?", net.trunc());
                return invalid(text);
            }
            if !range.contains(&net) {
                return invalid(format!("{net} is not in this cluster's range, {range}"));
            }
        }
        let size = size.unwrap_or(*sizes.end());
        if !sizes.contains(&size) {
            return invalid(format!(
                "a network in the range {range} is a /{} to a /{}, not a /{size}",
                sizes.start(),
                sizes.end()
            ));
        }
        let Some(net) = spec.subnet else {
            return Ok(WishedBlock::Size(size));
        };
        match self.allocator.check_block(&net) {
            Ok(()) => Ok(WishedBlock::Exact(net)),
            Err(error) => Err((ErrorKind::Conflict, self.block_text(error))),
        }
    }

    fn block_text(&self, error: BlockError) -> String {
        let hint = "choose another subnet, or leave --subnet out and weft finds one";
        match error {
            BlockError::Overlaps(net, other) if other == self.plan.vips() => {
                format!("{net} overlaps the services' virtual addresses, {other}; {hint}")
            }
            BlockError::Overlaps(net, other) => {
                let networks = self.networks();
                let named = networks
                    .iter()
                    .find(|n| n.blocks().any(|block| block == other));
                let name = named.map_or(String::new(), |n| format!(" \"{}\"", n.name));
                format!("{net} overlaps network{name}, {other}; {hint}")
            }
            BlockError::InUse(net) => {
                let endpoints = self.catalog.endpoints(&self.removed());
                let inside: Vec<&Endpoint> =
                    endpoints.iter().filter(|e| net.contains(&e.ip)).collect();
                match inside.is_empty() {
                    true => format!("{error}; try again in a minute, or {hint}"),
                    false => format!(
                        "{net} is in use by {}; {hint}",
                        self.endpoints_text(&inside)
                    ),
                }
            }
            other => format!("{other}; {hint}"),
        }
    }

    fn check_free_name(&self, name: &NetworkName) -> Result<(), String> {
        match self.network(name) {
            Some(net) => Err(format!(
                "there is a network \"{name}\" already, {net}; choose another name, or see: weft network ls"
            )),
            None => Ok(()),
        }
    }

    fn endpoints_text(&self, endpoints: &[&Endpoint]) -> String {
        let mut texts: Vec<String> = endpoints
            .iter()
            .take(MAX_NAMED)
            .map(|e| {
                let name = e
                    .names
                    .first()
                    .map_or(e.id.to_string(), ToString::to_string);
                format!("{name} ({}, on {})", e.ip, self.name_of(&e.node))
            })
            .collect();
        if endpoints.len() > MAX_NAMED {
            texts.push(format!("{} more", endpoints.len() - MAX_NAMED));
        }
        texts.join(", ")
    }

    /// What somebody hears whose attachment gets no address.
    pub(super) fn exhausted(
        &self,
        name: &NetworkName,
        net: Ipv4Net,
        asked: &str,
        why: Option<String>,
    ) -> String {
        let (size, used) = (usable(&net), self.allocator.used(&net));
        let what_to_do = "detach what is not needed (an address rests for a minute before it is used again), or make \
                          another network: weft network create NAME --size N";
        if used >= size {
            return format!(
                "network \"{name}\" ({net}) is full: all its {size} addresses are in use; {what_to_do}"
            );
        }
        let asked = match (asked, why) {
            ("", _) => "and no node that is up has any to give".to_owned(),
            (asked, Some(why)) => format!("and none was to be had from {asked} ({why})"),
            (asked, None) => format!("and none was to be had from {asked}"),
        };
        format!(
            "no free address left in network \"{name}\" ({net}) on this host, {asked}; {used} of {size} are in use: \
             {what_to_do}"
        )
    }

    /// Tells people of networks that are nearly full, once each, and of endpoints that lost theirs.
    pub(super) fn count_space(&mut self, out: &mut Vec<Output>) {
        let networks = self.networks();
        let mut low = BTreeSet::new();
        for network in &networks {
            let free = network.size.saturating_sub(network.used);
            if free <= low_mark(network.size, network.low) {
                low.insert(network.name.clone());
                if !network.low {
                    out.push(Output::Alarm(network.warning()));
                }
            }
        }
        if low != self.low {
            self.low = low;
            self.view_changed = true;
        }
        self.tell_homeless(&networks, out);
    }

    /// Tells people of this node's endpoints that lost their network, where that, or the endpoints, may have changed.
    fn tell_homeless(&mut self, networks: &[NetworkView], out: &mut Vec<Output>) {
        let blocks = networks.iter().flat_map(|network| {
            let blocks = network.blocks();
            blocks.map(|block| (network.name.clone(), block))
        });
        let blocks = Some(blocks.collect());
        let changed = std::mem::take(&mut self.to_house);
        let mine: Vec<&Endpoint> = match self.housed == blocks {
            true => {
                let of_key = |key: &Vec<u8>| self.catalog.endpoint(&self.me, key);
                changed.iter().filter_map(of_key).collect()
            }
            false => self.catalog.endpoints_of(&self.me).collect(),
        };
        self.housed = blocks;
        // A network of the same name may have been made since, of other addresses.
        let inside = |e: &Endpoint| {
            let mut networks = networks.iter().filter(|n| n.name == e.network);
            networks.any(|n| n.blocks().any(|block| block.contains(&e.ip)))
        };
        let texts: Vec<String> = mine
            .into_iter()
            .filter(|endpoint| !inside(endpoint))
            .map(|endpoint| {
                format!(
                    "{} is in network \"{}\", which was removed while this host did not hear of it: nobody reaches it \
                     but through services; detach it and attach it anew",
                    self.endpoints_text(&[endpoint]),
                    endpoint.network
                )
            })
            .collect();
        texts.into_iter().for_each(|text| self.tell_once(text, out));
    }
}

/// How few free addresses are a warning: a tenth, and once warned of, a little more, so that it doesn't come and go.
fn low_mark(size: u64, warned: bool) -> u64 {
    let tenth = (size / 10).max(1);
    match warned {
        false => tenth,
        true => (tenth + tenth.div_ceil(2)).min(size - 1),
    }
}

/// All addresses but the first and the last.
fn usable(net: &Ipv4Net) -> u64 {
    (1u64 << (32 - net.prefix_len())).saturating_sub(2)
}

fn overlap(one: &Ipv4Net, other: &Ipv4Net) -> bool {
    one.contains(other) || other.contains(one)
}

pub(super) fn no_network(name: &NetworkName) -> String {
    format!(
        "there is no network \"{name}\"; see weft network ls, or make it: weft network create {name}"
    )
}
