//! weft: with everything as it comes, and between hosts that trust the network between them.

use std::path::Path;

use serde_json::Value as Json;
use weft_lab::{Container, Host, Lab};

use crate::pair::{End, Pair};

/// What services choose their backends by.
const FAR: &str = "end=far";
/// So many services stand beside what is measured, where it is about them.
const SERVICES: usize = 1000;
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

/// The same with services for which the far container answers, each of them published on both hosts.
pub(super) fn make_services(_: Option<&Path>) -> Pair {
    let pair = make_vxlan(None);
    let [host, other] = &pair.hosts;
    for n in 0..SERVICES {
        let (name, published) = (format!("s{n}"), format!("{}:80", 20_000 + n));
        let create = ["service", "create", &name, "--port", "80"];
        let of = ["--publish", &published, "--select", FAR];
        host.weft(&[&create[..], &of[..]].concat()).ok();
    }
    // Balanced on the host where a connection begins: there all of them must be known.
    pair.lab.wait("both hosts know the services", 60, || {
        [host, other].iter().all(|host| {
            let rows = host.weft(&["service", "ls", "--json"]).json();
            let rows = rows.as_array().map_or(&[][..], Vec::as_slice);
            let served = |row: &&Json| row["backends"].as_array().is_some_and(|b| !b.is_empty());
            rows.iter().filter(served).count() == SERVICES
        })
    });
    pair
}

fn ground(name: &str) -> (Lab, [Host; 2]) {
    let lab = Lab::new(name);
    let wire = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &wire));
    (lab, hosts)
}

fn between(lab: Lab, hosts: [Host; 2]) -> Pair {
    let start = |host: &Host, name, flags: &[&str]| Container::start(host, name, flags, &IDLE);
    let near = start(&hosts[0], "near", &[]);
    let far = start(&hosts[1], "far", &["--label", FAR]);
    let ends = [&near, &far].map(|container| End::of_process(container.pid()));
    let address = far.ip().to_string();
    Pair::new(lab, hosts, ends, address, vec![Box::new((near, far))])
}
