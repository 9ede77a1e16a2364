//! Blocks for networks: which could be one, whose they are, and how they come into one hand.
//!
//! A network is a block that one node owned whole, with nothing in it, when it made the network. So two nodes that do
//! not hear of each other can't make networks that overlap.

use std::collections::BTreeSet;

use ipnet::Ipv4Net;

use super::{Allocator, NoGift, addresses};
use crate::model::NodeId;
use crate::value::Grant;

/// A block that may become a network once its owners have given it to one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its addresses.
    pub net: Ipv4Net,
    /// Who owns parts of it.
    pub owners: BTreeSet<NodeId>,
}

/// Why a block can't become a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Too large, too small, or not in the range.
    #[error("{0} can't be a network of this cluster")]
    NotOne(Ipv4Net),
    /// Another network, or the VIPs, is there.
    #[error("{0} overlaps {1}")]
    Overlaps(Ipv4Net, Ipv4Net),
    /// Something still has an address there, or had one a moment ago.
    #[error("an address in {0} is in use, or was a moment ago")]
    InUse(Ipv4Net),
    /// This node owns nothing of it.
    #[error("it owns nothing of {0} any more")]
    NotOurs(Ipv4Net),
}

impl Allocator {
    /// Could `net` become a network, whoever owns it?
    pub fn check_block(&self, net: &Ipv4Net) -> Result<(), BlockError> {
        if !self.plan.is_network(net) {
            return match self.fixed().into_iter().find(|n| overlap(n, net)) {
                Some(other) => Err(BlockError::Overlaps(*net, other)),
                None => Err(BlockError::NotOne(*net)),
            };
        }
        if let Some(other) = self.networks.iter().find(|n| overlap(n, net)) {
            return Err(BlockError::Overlaps(*net, *other));
        }
        let own = self.reserved.range(addresses(net)).next().is_some()
            || self.resting.range(addresses(net)).next().is_some();
        if own || self.used(net) > 0 {
            return Err(BlockError::InUse(*net));
        }
        Ok(())
    }

    /// Who owns `net`.
    pub fn block(&self, net: &Ipv4Net) -> Block {
        let owners = self.ring.owners().into_iter();
        Block {
            net: *net,
            owners: owners
                .filter(|owner| !self.ring.parts_in(owner, net).is_empty())
                .collect(),
        }
    }

    /// Blocks of one size that may become networks, the easiest to get first: own ones, those of one other node, those of
    /// several.
    pub fn blocks(&self, prefix_len: u8) -> Vec<Block> {
        let Ok(nets) = self.plan.range.subnets(prefix_len) else {
            return Vec::new();
        };
        let mut blocks: Vec<Block> = nets
            .filter(|net| self.check_block(net).is_ok())
            .map(|net| self.block(&net))
            .collect();
        blocks.sort_by_key(|block| (self.others(block), block.net));
        blocks
    }

    /// Is all of `net` this node's own, and nothing in it?
    pub fn is_own_block(&self, net: &Ipv4Net) -> bool {
        self.check_block(net).is_ok()
            && self.ring.parts_in(&self.me, net) == [addresses(net).into_inner()]
    }

    /// This block is a network from now on; the catalog will say so.
    pub fn hold_block(&mut self, net: Ipv4Net) {
        self.networks.push(net);
    }

    /// It could not be written: it is none.
    pub fn drop_block(&mut self, net: &Ipv4Net) {
        self.networks.retain(|held| held != net);
    }

    /// All that this node owns of a block, for one that makes a network of it.
    pub fn donate_block(&mut self, net: &Ipv4Net, to: NodeId) -> Result<Vec<Grant>, NoGift> {
        self.check_block(net)?;
        let parts = self.ring.parts_in(&self.me, net);
        if parts.is_empty() {
            return Err(BlockError::NotOurs(*net).into());
        }
        if parts.iter().any(|part| self.is_locked(*part)) {
            // All of it, or what was freed of guards for one part would be guarded again for the next.
            let (start, last) = addresses(net).into_inner();
            return Err(NoGift::Guarded(start, last));
        }
        let parts = parts.into_iter();
        Ok(parts
            .map(|(start, last)| self.give(start, last, to))
            .collect())
    }

    fn others(&self, block: &Block) -> usize {
        block.owners.iter().filter(|id| **id != self.me).count()
    }

    fn fixed(&self) -> [Ipv4Net; 2] {
        [self.plan.default_network(), self.plan.vips()]
    }
}

/// Blocks are aligned: two that overlap lie one within the other.
fn overlap(one: &Ipv4Net, other: &Ipv4Net) -> bool {
    one.contains(other) || other.contains(one)
}
