//! weft, with everything as it comes.

use std::path::Path;

use weft_lab::{Container, Host, Lab};

use crate::pair::{End, Pair};

/// A process that stays.
const IDLE: [&str; 3] = ["sh", "-c", "echo ready; exec sleep infinity"];

pub(super) fn make(_: Option<&Path>) -> Pair {
    let lab = Lab::new("weft");
    let wire = lab.subnet("a");
    let hosts = ["h1", "h2"].map(|name| lab.host(name, &wire));
    lab.cluster(&hosts);
    let start = |host: &Host, name| Container::start(host, name, &[], &IDLE);
    let (near, far) = (start(&hosts[0], "near"), start(&hosts[1], "far"));
    let ends = [&near, &far].map(|container| End::of_process(container.pid()));
    let address = far.ip().to_string();
    Pair::new(lab, hosts, ends, address, vec![Box::new((near, far))])
}
