//! Packets larger than the way takes: whoever sent them is told, or they are cut, and what was meant arrives.

use std::net::IpAddr;

use weft_lab::{Container, Host, Lab};

/// The largest packet that a peer's path takes, as `weft peers` has it.
fn mtu(host: &Host) -> u64 {
    host.only_peer()["mtu"].as_u64().unwrap_or_default()
}

fn ping(from: &Container, to: IpAddr, flags: &[&str]) -> weft_lab::Out {
    let to = to.to_string();
    let all = [&["ping", "-c2", "-i0.2", "-w5"], flags, &[&to]].concat();
    from.run(&all)
}

#[test]
fn what_may_not_be_cut_is_refused_with_the_size_that_fits() {
    let lab = Lab::new("toobig");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("the way's size is known", 20, || mtu(&h1) > 1400);
    let mtu = mtu(&h1);
    // ICMP's header and IP's, 28 octets or 48, beside the payload.
    let (v4, v6) = (IpAddr::from(b.ip()), IpAddr::from(b.ip6()));
    // Who says so is the container's gateway, and its name server where a link-local address could not.
    for (to, head, who) in [(v4, 28, "From 169.254.1.1 "), (v6, 48, ":f0::a2f:1 ")] {
        let fits = (mtu - head).to_string();
        ping(&a, to, &["-M", "do", "-s", &fits]).ok();
        let refused = ping(&a, to, &["-M", "do", "-s", "4000"]);
        assert!(!refused.is_ok(), "{refused}");
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(said.contains(who), "{said}");
        assert!(
            said.contains(&format!("mtu = {mtu}")) || said.contains(&format!("mtu={mtu}")),
            "{said}"
        );
    }
}

#[test]
fn what_may_be_cut_arrives_whole() {
    let lab = Lab::new("cut");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let text = "0123456789".repeat(600);
    for to in [IpAddr::from(b.ip()), IpAddr::from(b.ip6())] {
        // Routers cut IPv4; with IPv6 the sender does, once a router has told it (RFC 8200 §5).
        lab.wait("a large ping is answered", 10, || {
            ping(&a, to, &["-M", "dont", "-s", "4000"]).is_ok()
        });
        let to = std::net::SocketAddr::new(to, 80).to_string();
        let answer = a.tool(&["ask", "udp", &to, "--text", &text]).ok();
        assert!(answer.ends_with(&text), "{}", answer.len());
    }
    // The host's own processes, through their leg.
    h1.run(&[
        "ping",
        "-c2",
        "-i0.2",
        "-w5",
        "-M",
        "dont",
        "-s",
        "4000",
        &b.ip().to_string(),
    ])
    .ok();
}

#[test]
fn a_way_that_becomes_narrower_is_noticed_by_what_crosses_it() {
    let lab = Lab::new("narrow");
    let [h1, h2] = lab.pair();
    let a = h1.serve("a", &[]);
    let b = Container::drain(&h2, "b", &[]);
    let pour = |to: IpAddr| a.pours(to, 2);
    pour(b.ip().into());
    let before = mtu(&h1);
    h2.narrow(1400);
    pour(b.ip().into());
    pour(b.ip6().into());
    assert!(mtu(&h1) < before.min(1400), "{} of {before}", mtu(&h1));
}
