//! The kernel alone, without encryption: how fast it could be.

use std::path::Path;

use crate::pair::{Ground, Pair};

/// No tunnel: the hosts route.
pub(super) fn make_routed(_: Option<&Path>) -> Pair {
    let ground = Ground::new("routed");
    for (host, other, prefix) in ground.sides() {
        let via = other.v4().to_string();
        host.space()
            .ip(&["route", "add", &prefix, "via", &via])
            .ok();
    }
    ground.finish(Vec::new())
}

/// VXLAN with static forwarding, as by hand.
pub(super) fn make_vxlan(_: Option<&Path>) -> Pair {
    let ground = Ground::new("vxlan");
    for (place, (host, other, prefix)) in ground.sides().into_iter().enumerate() {
        let (own, peer) = (1 + place, 2 - place);
        let local = host.v4().to_string();
        let remote = other.v4().to_string();
        let space = host.space();
        let add = [
            "link", "add", "vx0", "type", "vxlan", "id", "42", "dstport", "4789",
        ];
        let ends = ["local", &local, "remote", &remote, "dev", "eth0"];
        space.ip(&[&add[..], &ends[..]].concat()).ok();
        space
            .ip(&["addr", "add", &format!("10.98.0.{own}/24"), "dev", "vx0"])
            .ok();
        space.ip(&["link", "set", "vx0", "up"]).ok();
        let via = format!("10.98.0.{peer}");
        space.ip(&["route", "add", &prefix, "via", &via]).ok();
    }
    ground.finish(Vec::new())
}
