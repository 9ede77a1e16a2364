//! Addresses: asked for, given back, rested, never twice.

use std::collections::BTreeSet;

use weft_lab::{Container, Lab};

#[test]
fn an_address_asked_for_is_given_and_not_twice() {
    let lab = Lab::new("static");
    let [h1, h2] = lab.pair();
    let a = h1.serve_with("a", &["--ip", "10.32.0.77"]);
    assert_eq!(a.ip().to_string(), "10.32.0.77");
    for host in [&h1, &h2] {
        let error = host
            .weft(&["run", "--ip", "10.32.0.77", "--", "true"])
            .fails_with(1);
        assert!(error.contains("10.32.0.77"), "{error}");
    }
    for outside in ["10.47.0.9", "10.31.0.1", "192.0.2.1", "10.47.0.1"] {
        let error = h1
            .weft(&["run", "--ip", outside, "--", "true"])
            .fails_with(1);
        assert!(error.contains(outside), "{error}");
    }
    // Asked of the other host, wherever that part of the range lies.
    let b = h2.serve_with("b", &["--ip", "10.32.0.78"]);
    lab.wait("it is reached there", 20, || a.pings(&b.ip().to_string()));
}

#[test]
fn freed_addresses_rest() {
    let lab = Lab::new("rest");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let mut seen = BTreeSet::new();
    for n in 0..10 {
        let container = host.serve(&format!("c{n}"), &[]);
        assert!(
            seen.insert(container.ip()),
            "{} again at once",
            container.ip()
        );
        container.stop();
    }
    let rows = host.weft(&["ps", "--json"]).json();
    let left = rows
        .as_array()
        .into_iter()
        .flatten()
        .filter(|r| r["kind"] == "container")
        .count();
    assert_eq!(left, 0, "{rows}");
}

#[test]
fn many_attachments_at_once_get_an_address_each_also_across_kill_9() {
    let lab = Lab::new("many");
    let [h1, h2] = lab.pair();
    let start = |round: usize| -> Vec<Container> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|n| {
                    let host = if n % 2 == 0 { &h1 } else { &h2 };
                    scope.spawn(move || host.serve(&format!("c{round}-{n}"), &[]))
                })
                .collect();
            workers.into_iter().map(|w| w.join().unwrap()).collect()
        })
    };
    let first = start(0);
    h1.kill9();
    h1.up(&[]);
    let second = start(1);
    let all: BTreeSet<_> = first.iter().chain(&second).map(Container::ip).collect();
    assert_eq!(all.len(), 16, "an address was given twice: {all:?}");
    let v6: BTreeSet<_> = first.iter().chain(&second).map(Container::ip6).collect();
    assert_eq!(v6.len(), 16);
}

#[test]
fn a_range_of_one_s_own_is_laid_out_alike() {
    let lab = Lab::new("range");
    let [h1, h2] = lab.two();
    h1.up(&["--range", "172.20.0.0/14"]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    assert_eq!(h2.status()["dns"], "172.23.192.1");
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    assert!(a.ip().to_string().starts_with("172.20."), "{}", a.ip());
    lab.wait("by name", 20, || {
        a.run(&["dig", "+short", "b.weft.internal"]).stdout.trim() == b.ip().to_string()
    });
    lab.wait("and by address", 20, || a.pings(&b.ip().to_string()));
}

#[test]
fn ranges_that_would_cut_the_host_off_are_refused() {
    let lab = Lab::new("overlap");
    let host = lab.host("h1", &lab.subnet("a"));
    for (range, why) in [
        ("192.0.0.0/10", "192.0.2"),
        ("10.32.0.1/12", "10.32.0.0/12"),
        ("127.0.0.0/8", "127.0.0.0/8"),
    ] {
        let out = host.up_with(&["--range", range], &[]);
        assert!(matches!(out.code, 1 | 2), "{out}");
        assert!(out.stderr.contains(why), "{out}");
    }
    host.resolver("10.40.0.53".parse().unwrap());
    let error = host.up_with(&[], &[]).fails_with(1);
    assert!(error.contains("10.40.0.53"), "{error}");
}
