//! A node that says what it should not: what a later version of weft might say, and what a member may say that lies. It
//! has nothing but its own key and its own sessions for it, as any member has. For the simulator.

use std::time::Duration;

use super::Node;
use super::Phase;
use super::cluster::Cluster;
use super::io::Output;
use crate::crypto::x25519_public;
use crate::model::{Label, NodeId, Now, WallMicros};
use crate::roster::Rights;
use crate::value::{Kind, Object};
use crate::wire::Message;

/// Something that an honest node of this version never says.
#[derive(Clone, Debug)]
pub enum Deviation {
    /// A record as it is, stamped so far ahead of the own clock.
    Record {
        /// Any kind that there may be.
        kind: u8,
        /// Its key.
        key: Vec<u8>,
        /// Its value; `None`: the object is gone.
        value: Option<Vec<u8>>,
        /// By so much its stamp is ahead.
        ahead: Duration,
    },
    /// A record of this kind of object, true or not.
    Object(Box<Object>, Duration),
    /// Two different records with one sequence, each to half of the peers.
    Twins,
    /// Two different roster records with one index, each to half of the peers.
    Fork,
    /// A message as it is, to every live member.
    Say(Message),
}

impl Node {
    /// Deviates, once it is a member.
    pub fn deviate(&mut self, now: Now, what: Deviation, out: &mut Vec<Output>) {
        if let Phase::Member(cluster) = &mut self.phase {
            cluster.deviate(now, what, out);
        }
    }
}

impl Cluster {
    fn deviate(&mut self, now: Now, what: Deviation, out: &mut Vec<Output>) {
        if !self.ready {
            return;
        }
        match what {
            Deviation::Record {
                kind,
                key,
                value,
                ahead,
            } => self.write_as_is(now, (Kind(kind), key), value, ahead, out),
            Deviation::Object(object, ahead) => {
                let slot = (object.kind(), object.key());
                let value = object.encode(self.catalog.lineage_of(&slot, self.wall.micros(now)));
                self.write_as_is(now, slot, Some(value), ahead, out);
            }
            Deviation::Twins => self.write_twins(now, out),
            Deviation::Fork => self.fork_roster(now, out),
            Deviation::Say(message) => {
                for peer in self.alive_peers() {
                    self.send(now, &peer, &message);
                }
            }
        }
        self.pump(now, out);
    }

    fn write_as_is(
        &mut self,
        now: Now,
        slot: (Kind, Vec<u8>),
        value: Option<Vec<u8>>,
        ahead: Duration,
        out: &mut Vec<Output>,
    ) {
        let wall = self.wall.micros(now);
        let wall = WallMicros(wall.0.saturating_add(ahead.as_micros() as u64));
        let written = self
            .catalog
            .write_as_is(&slot, value.as_deref(), &self.identity, wall);
        if let Ok(written) = written {
            self.publish(now, written, Vec::new(), out);
        }
    }

    /// Signed by a copy of this node, as it were: the catalog here knows one of the two.
    fn write_twins(&mut self, now: Now, out: &mut Vec<Output>) {
        let wall = self.wall.micros(now);
        let mut copy = self.catalog.clone();
        let slot = (Kind(0xe0), b"twin".to_vec());
        let other = copy.write_as_is(&slot, Some(b"one"), &self.identity, wall);
        self.write_as_is(now, slot, Some(b"other".to_vec()), Duration::ZERO, out);
        let Some(other) = other
            .ok()
            .and_then(|written| written.records.into_iter().next())
        else {
            return;
        };
        self.say_to_half(now, 7, other.bytes());
    }

    fn fork_roster(&mut self, now: Now, out: &mut Vec<Output>) {
        let mut copy = self.meta.roster.clone();
        let admit = |roster: &mut crate::roster::Roster, number: u8| {
            let name = Label::parse("nobody").ok()?;
            let id = NodeId([number; 32]);
            let noise = x25519_public(&[number; 32]);
            let issued = roster
                .admit(&self.identity, id, noise, name, Rights(0))
                .ok()?;
            Some(issued)
        };
        let (one, other) = (admit(&mut copy, 0xd1), admit(&mut self.meta.roster, 0xd2));
        if let (Some(one), Some(other)) = (one, other) {
            // Its own disk it does not lie to: a record that was never said to be synced would be told to nobody.
            self.publish_roster(now, other, Vec::new(), out);
            self.say_to_half(now, 5, &one.bytes);
        }
    }

    /// A list of one record in a frame of sync, to every second live member.
    fn say_to_half(&mut self, now: Now, frame: u8, record: &[u8]) {
        let mut bytes = vec![frame];
        bytes.extend_from_slice(&(record.len() as u16).to_be_bytes());
        bytes.extend_from_slice(record);
        for peer in self.alive_peers().into_iter().step_by(2) {
            self.send(now, &peer, &Message::Sync(bytes.clone()));
        }
    }
}
