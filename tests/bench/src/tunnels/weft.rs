//! weft: with everything as it comes, and between hosts that trust the network between them.

use std::path::Path;

use weft_lab::{Container, Host, Lab};

use crate::pair::{End, Pair};

/// A process that stays.
const IDLE: [&str; 3] = ["sh", "-c", "echo ready; exec sleep infinity"];

pub(super) fn make(_: Option<&Path>) -> Pair {
    let (lab, hosts) = ground("weft");
    lab.cluster(&hosts);
    between(lab, hosts)
}

/// Its plain carrier: the kernel's VXLAN, beside the one made by hand.
pub(super) fn make_vxlan(_: Option<&Path>) -> Pair {
    let (lab, hosts) = ground("weft-vxlan");
    let trusted = ["--trusted-subnet", "192.0.2.0/24"];
    hosts[0].up(&trusted);
    let join = [&["--join", "-"], &trusted[..]].concat();
    let token = hosts[0].token(&[]);
    hosts[1].up_with(&join, token.as_bytes()).ok();
    lab.wait("the hosts use VXLAN", 30, || {
        hosts.iter().all(|host| {
            let rows = host.weft(&["peers", "--json"]).json();
            rows[0]["carrier"] == "vxlan"
        })
    });
    between(lab, hosts)
}

fn ground(name: &str) -> (Lab, [Host; 2]) {
    let lab = Lab::new(name);
    let wire = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &wire));
    (lab, hosts)
}

fn between(lab: Lab, hosts: [Host; 2]) -> Pair {
    let start = |host: &Host, name| Container::start(host, name, &[], &IDLE);
    let (near, far) = (start(&hosts[0], "near"), start(&hosts[1], "far"));
    let ends = [&near, &far].map(|container| End::of_process(container.pid()));
    let address = far.ip().to_string();
    Pair::new(lab, hosts, ends, address, vec![Box::new((near, far))])
}
