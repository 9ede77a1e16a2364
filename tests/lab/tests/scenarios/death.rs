//! A node dies: what it held is hidden everywhere, and comes back with it.

use weft_lab::{Container, Host, Lab};

fn addresses(from: &Container, name: &str) -> Vec<String> {
    let out = from.run(&["dig", "+short", "+tries=1", "+time=2", name]);
    let mut all: Vec<String> = out.stdout.lines().map(str::to_owned).collect();
    all.sort();
    all
}

fn backends(host: &Host, service: &str) -> usize {
    let rows = host.weft(&["service", "ls", "--json"]).json();
    let row = rows
        .as_array()
        .into_iter()
        .flatten()
        .find(|r| r["name"] == service)
        .cloned()
        .unwrap_or_default();
    row["backends"].as_array().map_or(0, Vec::len)
}

#[test]
fn names_and_backends_vanish_with_a_node_and_return_with_it() {
    let lab = Lab::new("vanish");
    let [h1, h2, h3] = lab.trio();
    let (x, y) = (h1.serve("x", &["web"]), h2.serve("y", &["web"]));
    let client = h3.serve("client", &[]);
    h1.weft(&["service", "create", "web", "--port", "80"]).ok();
    lab.wait("two backends everywhere", 20, || {
        [&h1, &h2, &h3].iter().all(|h| backends(h, "web") == 2)
    });
    let vip = addresses(&client, "web.weft.internal");
    assert_eq!(
        vip.len(),
        1,
        "the service's name is its virtual address: {vip:?}"
    );

    h2.isolate();
    lab.wait("the name is gone at both survivors", 20, || {
        addresses(&client, "y.weft.internal").is_empty()
            && addresses(&x, "y.weft.internal").is_empty()
    });
    lab.wait("so is the backend", 5, || {
        backends(&h1, "web") == 1 && backends(&h3, "web") == 1
    });
    for _ in 0..20 {
        let answer = client.ask("tcp", &format!("{}:80", vip[0])).ok();
        assert!(answer.starts_with("x "), "{answer}");
    }
    assert_eq!(h1.alive(), 2);

    h2.reconnect();
    lab.wait("the name is back", 30, || {
        addresses(&client, "y.weft.internal") == [y.ip().to_string()]
    });
    lab.wait("and the backend", 10, || backends(&h3, "web") == 2);
    let mut seen = std::collections::BTreeSet::new();
    lab.wait("both answer again", 20, || {
        let answer = client.ask("tcp", &format!("{}:80", vip[0])).stdout;
        seen.extend(answer.split(' ').next().map(str::to_owned));
        seen.contains("x") && seen.contains("y")
    });
}

#[test]
fn new_connections_avoid_a_silent_host_before_gossip_agrees() {
    let lab = Lab::new("soft");
    let [h1, h2, h3] = lab.trio();
    let (_x, _y) = (h1.serve("x", &["web"]), h2.serve("y", &["web"]));
    let client = h3.serve("client", &[]);
    h1.weft(&["service", "create", "web", "--port", "80"]).ok();
    lab.wait("two backends", 20, || backends(&h3, "web") == 2);
    let vip = addresses(&client, "web.weft.internal").remove(0);
    h2.isolate();
    let start = std::time::Instant::now();
    let mut row = 0;
    lab.wait("ten answers in a row", 15, || {
        let good = client
            .tool(&["ask", "tcp", &format!("{vip}:80"), "--wait", "1"])
            .is_ok();
        row = if good { row + 1 } else { 0 };
        row == 10
    });
    assert!(
        start.elapsed().as_secs() < 12,
        "only after {:?}",
        start.elapsed()
    );
}

#[test]
fn both_halves_of_a_split_go_on_and_become_one_again() {
    let lab = Lab::new("split");
    let [h1, h2, h3] = lab.trio();
    h1.cut(&h3);
    h2.cut(&h3);
    lab.wait("two and one", 30, || {
        h1.alive() == 2 && h2.alive() == 2 && h3.alive() == 1
    });
    // Each side attaches, from its own part of the range, and creates a service.
    let left = h1.serve("left", &[]);
    let right = h3.serve("right", &[]);
    assert_ne!(left.ip(), right.ip());
    h1.weft(&["service", "create", "left-service", "--port", "80"])
        .ok();
    h3.weft(&["service", "create", "right-service", "--port", "80"])
        .ok();
    h1.heal(&h3);
    h2.heal(&h3);
    lab.wait_members(&[h1.clone(), h2.clone(), h3.clone()]);
    lab.wait("each knows the other's name", 20, || {
        addresses(&left, "right.weft.internal") == [right.ip().to_string()]
            && addresses(&right, "left.weft.internal") == [left.ip().to_string()]
    });
    lab.wait("and its service", 20, || {
        [&h1, &h2, &h3].iter().all(|h| {
            h.weft(&["service", "ls", "--json"])
                .json()
                .as_array()
                .map(Vec::len)
                == Some(2)
        })
    });
    lab.wait("and they talk", 20, || left.pings(&right.ip().to_string()));
}

#[test]
fn a_node_that_leaves_politely_is_gone_at_once() {
    let lab = Lab::new("leave");
    let [h1, h2] = lab.pair();
    h2.weft(&["down"]).ok();
    lab.wait("h1 knows", 3, || h1.alive() == 1);
    h2.up(&[]);
    lab.wait_members(&[h1, h2]);
}
