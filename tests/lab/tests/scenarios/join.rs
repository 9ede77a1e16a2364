//! Founding, inviting, joining.

use weft_lab::{Lab, words};

#[test]
fn three_hosts_join_and_see_each_other() {
    let lab = Lab::new("join");
    let hosts = lab.trio();
    for host in &hosts {
        let status = host.status();
        assert_eq!(status["name"], host.name());
        assert_eq!(status["port"], 6783);
        assert_eq!(status["range"], "10.32.0.0/12");
        assert_eq!(status["dns"], "10.47.0.1");
        assert_eq!(status["cluster"], hosts[0].status()["cluster"]);
        let nodes = host.weft(&["node", "ls", "--json"]).json();
        assert_eq!(nodes.as_array().map(Vec::len), Some(3), "{nodes}");
    }
    lab.wait("every host has a tunnel to every other", 20, || {
        hosts.iter().all(|host| {
            let peers = host.peers();
            peers.len() == 2 && peers.iter().all(|p| p["liveness"] == "alive")
        })
    });
}

#[test]
fn up_goes_to_the_background_and_says_what_is_next() {
    let lab = Lab::new("background");
    let host = lab.host("h1", &lab.subnet("a"));
    let out = host.up_with(&[], &[]);
    assert!(out.is_ok(), "{out}");
    assert!(
        out.stdout.contains("h1"),
        "the summary should name the node: {out}"
    );
    assert!(host.socket().exists());
    let again = host.up_with(&[], &[]);
    assert!(
        again.to_string().contains("already"),
        "a second `up` should say so: {again}"
    );
    host.weft(&["down"]).ok();
    assert!(!host.weft(&["status"]).is_ok());
}

#[test]
fn foreground_up_ends_cleanly_on_sigterm() {
    let lab = Lab::new("foreground");
    let host = lab.host("h1", &lab.subnet("a"));
    let weft = weft_lab::Host::binary("weft");
    let mut daemon = host.spawn("foreground", &[&weft, "up", "--name", "h1", "--foreground"]);
    lab.wait("the daemon answers", 20, || host.alive() == 1);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(
        daemon.wait(std::time::Duration::from_secs(20)),
        0,
        "{}",
        daemon.stderr()
    );
}

#[test]
fn hosts_join_over_an_ipv6_underlay() {
    let lab = Lab::new("join6");
    let [h1, h2] = lab.two();
    h1.up(&["--advertise", &h1.v6().to_string()]);
    let token = h1.token(&[]);
    h2.up_with(
        &["--advertise", &h2.v6().to_string(), "--join", "-"],
        token.as_bytes(),
    )
    .ok();
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("containers talk", 20, || {
        a.ask("tcp", &format!("{}:80", b.ip())).is_ok()
    });
    a.ask("tcp", &format!("[{}]:80", b.ip6())).ok();
    let peer = h1.only_peer();
    let path = peer["path"].as_str().unwrap_or_default();
    assert!(path.starts_with("[2001:db8:"), "{peer}");
}

#[test]
fn a_host_behind_nat_joins() {
    let lab = Lab::new("joinnat");
    let a = lab.subnet("a");
    let home = lab.nat("home", &a);
    let (open, hidden) = (lab.host("open", &a), lab.host("hidden", &home));
    lab.cluster(&[open.clone(), hidden.clone()]);
    let (x, y) = (open.serve("x", &[]), hidden.serve("y", &[]));
    lab.wait("the hidden one reaches out", 20, || {
        y.pings(&x.ip().to_string())
    });
    lab.wait("and is reached through its own hole", 20, || {
        x.pings(&y.ip().to_string())
    });
}

#[test]
fn tokens_count_their_uses_and_say_when_they_are_spent() {
    let lab = Lab::new("uses");
    let a = lab.subnet("a");
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|n| lab.host(n, &a));
    h1.up(&[]);
    let token = h1.token(&[]);
    assert_eq!(token.lines().count(), 1, "the token alone");
    h2.join_with(&token).ok();
    let error = h3.join_with(&token).fails_with(1);
    assert!(error.contains("used"), "{error}");
    assert!(
        !error.contains(&token),
        "an error must not repeat the token"
    );
    let reusable = h1.token(&["--reusable"]);
    h3.join_with(&reusable).ok();
    lab.wait_members(&[h1, h2, h3]);
}

#[test]
fn an_invitation_from_one_member_is_good_at_another() {
    let lab = Lab::new("via");
    let a = lab.subnet("a");
    let [h1, h2, h3] = ["h1", "h2", "h3"].map(|n| lab.host(n, &a));
    lab.cluster(&[h1.clone(), h2.clone()]);
    let token = h1.token(&[]);
    h3.cut(&h1);
    h3.join_with(&token).ok();
    h3.heal(&h1);
    lab.wait_members(&[h1, h2, h3]);
}

#[test]
fn an_expired_token_says_so() {
    let lab = Lab::new("expired");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    let token = h1.token(&["--ttl", "1s"]);
    // Nothing to wait for but the time itself.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let error = h2.join_with(&token).fails_with(1);
    assert!(error.contains("expired"), "{error}");
}

#[test]
fn a_garbled_token_is_refused_before_any_packet() {
    let lab = Lab::new("garbled");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    let token = h1.token(&[]);
    let capture = h2.capture("garbled");
    let middle = token.len() / 2;
    let other = if token.as_bytes()[middle] == b'a' {
        'b'
    } else {
        'a'
    };
    let flipped = format!("{}{other}{}", &token[..middle], &token[middle + 1..]);
    for bad in [flipped.as_str(), &token[..middle], "nonsense", ""] {
        let error = h2.up_with(&["--join", "-"], format!("{bad}\n").as_bytes());
        assert!(matches!(error.code, 1 | 2), "{error}");
        let line = error.stderr.trim();
        assert!(
            !line.is_empty() && !line.contains(&token[..middle]),
            "{line}"
        );
    }
    assert!(
        !capture.stop().iter().any(|f| f.is_udp(6783)),
        "a bad token went on the wire"
    );
}

#[test]
fn a_host_of_another_cluster_finds_out_locally() {
    let lab = Lab::new("other");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    h2.up(&[]);
    h2.weft(&["down"]).ok();
    let capture = h2.capture("other");
    let error = h2.join_with(&h1.token(&[])).fails_with(1);
    assert!(
        error.contains("another cluster") && error.contains("reset"),
        "{error}"
    );
    assert!(
        !capture.stop().iter().any(|f| f.is_udp(6783)),
        "it asked the network"
    );
    h2.weft(&["reset"]).ok();
    h2.join(&h1);
    lab.wait_members(&[h1, h2]);
}

#[test]
fn a_joiner_that_hears_nothing_is_told_why_that_may_be() {
    let lab = Lab::new("silent");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    let token = h1.token(&[]);
    h1.isolate();
    let error = h2.join_with(&token).fails_with(1);
    let address = h1.v4().to_string();
    for cause in words([&address, "6783", "firewall"]) {
        assert!(error.contains(&cause), "\"{cause}\" is missing in: {error}");
    }
}

#[test]
fn a_stranger_gets_no_byte_back() {
    let lab = Lab::new("stranger");
    let a = lab.subnet("a");
    let (h1, stranger) = (lab.host("h1", &a), lab.host("stranger", &a));
    h1.up(&[]);
    let capture = stranger.capture("stranger");
    for (addr, seed) in [
        (format!("{}:6783", h1.v4()), "1"),
        (format!("[{}]:6783", h1.v6()), "2"),
    ] {
        let heard = stranger.tool(&["garbage", &addr, "3000", seed]).ok();
        assert_eq!(heard, "0", "{addr} answered a stranger");
    }
    let back = capture
        .stop()
        .into_iter()
        .filter(|f| h1.addrs().iter().any(|a| f.src == Some(*a)) && f.proto == Some(17));
    assert_eq!(back.count(), 0, "datagrams came back");
    assert_eq!(h1.alive(), 1, "the daemon is still there");
}
