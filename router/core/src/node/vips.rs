//! One virtual address, one service. Two can come to have the same one where the removal of a service was void (who said
//! it was removed itself, and its last words don't count), where space was taken by force on both sides of a split, or
//! where a node ran twice. Whoever owns the address settles it: nobody else decides about that part of the range.
//!
//! A service at an address that none may have, such as that of the name servers, is a member's lie and shown nowhere.

use std::collections::BTreeSet;

use super::asks::Purpose;
use super::cluster::Cluster;
use super::io::Output;
use crate::model::{NodeId, Now};
use crate::value::Object;
use crate::view::Service;

impl Cluster {
    /// All services that there are.
    pub(super) fn services(&self) -> Vec<Service> {
        let mut services = self.catalog.services(self.wall_now());
        services.retain(|service| self.plan.is_vip(service.vip));
        services
    }

    fn tell_impossible(&mut self, now: Now, out: &mut Vec<Output>) {
        let mut services = self.catalog.services(self.wall.micros(now));
        services.retain(|service| !self.plan.is_vip(service.vip));
        for Service { name, vip, .. } in services {
            let text = format!(
                "service \"{name}\" is ignored: a member says that its virtual address is {vip}, which no service can have; \
                 remove it and create it anew"
            );
            self.tell_once(text, out);
        }
    }

    /// Is it known that no two services have one address, whoever owns it?
    pub(super) fn are_services_apart(&self, now: Now) -> bool {
        let wall = self.wall.micros(now);
        self.services_apart && self.next_due.is_none_or(|due| wall < due)
    }

    /// Of services that share an address of this node's all but the first born get another one.
    pub(super) fn part_services(&mut self, now: Now, out: &mut Vec<Output>) {
        self.services_apart = false;
        if !self.ready || self.leaving || !self.is_member() {
            return;
        }
        self.tell_impossible(now, out);
        let in_common = self.catalog.services_in_common(self.wall.micros(now));
        self.services_apart = in_common.is_empty();
        for (first, service) in in_common {
            if self.ring.owner(service.vip) != Some(self.me) {
                continue;
            }
            let Ok(vip) = self.allocator.allocate_vip() else {
                let is_this = |purpose: &Purpose| matches!(purpose, Purpose::PartServices { .. });
                if !self.asks.wait_for(is_this) {
                    self.ask_to_part(now, BTreeSet::new());
                }
                return;
            };
            let (old, name) = (service.vip, service.name.clone());
            let moved = Object::Service(Service { vip, ..service });
            if self.put(now, &moved, Vec::new(), out).is_ok() {
                out.push(Output::Alarm(format!(
                    "services \"{first}\" and \"{name}\" had one virtual address, {old}: \"{name}\" has {vip} from now on"
                )));
            }
        }
    }

    /// This node has no virtual address left for a service that shares one. Where nobody has any, or too many questions
    /// wait, it stays so: this is looked at again from time to time.
    pub(super) fn ask_to_part(&mut self, now: Now, tried: BTreeSet<NodeId>) {
        self.ask_for_vips(now, tried, |tried| Purpose::PartServices { tried });
    }
}
