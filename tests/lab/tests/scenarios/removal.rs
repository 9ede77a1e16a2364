//! Hosts that go for good: removed with `weft node rm`, by force, on both sides of a split, and leaving by `weft reset`.

use std::net::Ipv4Addr;

use serde_json::Value;
use weft_lab::{Host, Lab};

/// Addresses that no node owns, as `host` sees it, of the range without its last sixteenth.
fn unowned(host: &Host) -> u64 {
    let size = |cidr: &str| {
        let len: u32 = cidr.split_once('/').unwrap().1.parse().unwrap();
        1u64 << (32 - len)
    };
    let rows = host.weft(&["node", "ls", "--json"]).json();
    let owned: u64 = rows
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row["prefixes"].as_array().unwrap())
        .map(|cidr| size(cidr.as_str().unwrap()))
        .sum();
    let all = size(host.status()["range"].as_str().unwrap());
    all - all / 16 - owned
}

fn nodes(host: &Host) -> Vec<String> {
    let rows = host.weft(&["node", "ls", "--json"]).json();
    let name = |row: &Value| row["name"].as_str().unwrap().to_owned();
    let mut names: Vec<String> = rows.as_array().unwrap().iter().map(name).collect();
    names.sort();
    names
}

/// The first address of a host's first part.
fn part_of(host: &Host, whose: &str) -> Ipv4Addr {
    let rows = host.weft(&["node", "ls", "--json"]).json();
    let row = rows.as_array().unwrap().iter();
    let row = row.into_iter().find(|row| row["name"] == whose).unwrap();
    let first = row["prefixes"][0].as_str().unwrap();
    first.split_once('/').unwrap().0.parse().unwrap()
}

#[test]
fn a_dead_host_is_removed_in_one_command_and_its_addresses_come_back() {
    let lab = Lab::new("removed");
    let [h1, h2, h3] = lab.trio();
    let x = h3.serve("x", &[]);
    let old = x.ip();
    h3.isolate();
    lab.wait("it is down everywhere", 20, || {
        h1.alive() == 2 && h2.alive() == 2
    });
    let said = h1.weft(&["node", "rm", "h3"]).ok();
    assert!(said.contains("h3") && said.contains("back"), "{said}");
    lab.wait("the others agree", 10, || {
        [&h1, &h2]
            .iter()
            .all(|h| nodes(h) == ["h1", "h2"] && unowned(h) == 0)
    });
    // Its addresses can be had again, from whoever has them now.
    let y = h2.serve_with("y", &["--ip", &old.to_string()]);
    assert_eq!(y.ip(), old);
    let z = h1.serve("z", &[]);
    assert!(z.pings(&old.to_string()));
    // Its key is void: it comes back to a network that does not know it, and is told so.
    h3.reconnect();
    lab.wait("it says so", 30, || {
        let status = h3.weft(&["status"]).stdout;
        status.contains("removed from the cluster by h1")
    });
    let error = h1.weft(&["node", "rm", "h3"]).fails_with(1);
    assert!(error.contains("no node \"h3\""), "{error}");
    assert!(!x.pings(&z.ip().to_string()));
    assert_eq!(nodes(&h1), ["h1", "h2"]);
}

#[test]
fn a_host_that_is_removed_while_it_runs_is_off_at_once_and_says_so() {
    let lab = Lab::new("evicted");
    let [h1, h2, h3] = lab.trio();
    let (x, y) = (h3.serve("x", &[]), h1.serve("y", &[]));
    assert!(x.pings(&y.ip().to_string()));
    h2.weft(&["node", "rm", "h3"]).ok();
    lab.wait("it says so", 10, || {
        h3.weft(&["status"])
            .stdout
            .contains("removed from the cluster")
    });
    assert!(!x.pings(&y.ip().to_string()));
    let error = h3.weft(&["token"]).fails_with(1);
    assert!(error.contains("weft reset"), "{error}");
    h3.weft(&["reset"]).ok();
    h3.join(&h1);
    lab.wait("it is back under a new key", 20, || {
        nodes(&h1).len() == 3 && h1.alive() == 3
    });
}

#[test]
fn of_two_hosts_one_takes_the_other_s_addresses_only_by_force() {
    let lab = Lab::new("force");
    let [h1, h2] = lab.pair();
    h1.kill9();
    h1.isolate();
    lab.wait("it is down", 20, || h2.alive() == 1);
    let error = h2.weft(&["node", "rm", "h1"]).fails_with(1);
    assert!(error.contains("weft node rm h1 --force"), "{error}");
    assert_ne!(unowned(&h2), 0);
    let status = h2.weft(&["status"]).stdout;
    assert!(status.contains("h1 was removed, and 10."), "{status}");
    h2.weft(&["node", "rm", "h1", "--force"]).ok();
    assert_eq!(unowned(&h2), 0);
    assert_eq!(nodes(&h2), ["h2"]);
}

#[test]
fn reset_gives_a_host_s_addresses_to_the_others() {
    let lab = Lab::new("leaves");
    let [h1, h2, h3] = lab.trio();
    let out = h1.weft(&["reset"]);
    assert!(
        out.is_ok() && out.stderr.contains("left the cluster"),
        "{}",
        out.stderr
    );
    lab.wait("the others have all of it", 15, || {
        [&h2, &h3]
            .iter()
            .all(|h| nodes(h) == ["h2", "h3"] && unowned(h) == 0)
    });
    h1.join(&h2);
    lab.wait("it may come back as a new node", 20, || {
        nodes(&h3).len() == 3
    });
}

#[test]
fn what_both_sides_of_a_split_took_by_force_one_keeps_and_the_other_s_containers_move() {
    let lab = Lab::new("bothforce");
    let [h1, h2, h3] = lab.trio();
    let part = part_of(&h1, "h3");
    let wanted = Ipv4Addr::from(u32::from(part) + 77).to_string();
    h3.isolate();
    h1.cut(&h2);
    lab.wait("all are alone", 20, || h1.alive() == 1 && h2.alive() == 1);
    for host in [&h1, &h2] {
        host.weft(&["node", "rm", "h3", "--force"]).ok();
        assert_eq!(unowned(host), 0);
    }
    let (x, y) = (
        h1.serve_with("x", &["--ip", &wanted]),
        h2.serve_with("y", &["--ip", &wanted]),
    );
    h1.heal(&h2);
    let address = |name: &str| -> Option<String> {
        let rows = h1.weft(&["ps", "--json"]).json();
        let row = rows.as_array().into_iter().flatten();
        let mut row = row.filter(|row| row["names"][0] == name);
        row.next()?["ip"].as_str().map(str::to_owned)
    };
    lab.wait("one of them has moved", 40, || {
        let both = (address("x"), address("y"));
        both.0.is_some() && both.1.is_some() && both.0 != both.1
    });
    let (ax, ay) = (address("x").unwrap(), address("y").unwrap());
    assert!(ax == wanted || ay == wanted, "{ax} {ay}");
    lab.wait("they reach each other", 20, || x.pings(&ay) && y.pings(&ax));
    let loser = if ax == wanted { &h2 } else { &h1 };
    let status = loser.weft(&["status"]).stdout;
    assert!(status.contains("from now on"), "{status}");
    for host in [&h1, &h2] {
        assert_eq!(unowned(host), 0);
    }
}
