//! Containers on different hosts, by address and by name.

use weft_lab::{Container, Lab};

/// A program that resolves as musl does, built where the lab lies.
fn musl_resolver(lab: &Lab) -> String {
    let program = lab
        .dir()
        .join("resolve-musl")
        .to_string_lossy()
        .into_owned();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/c/resolve.c");
    let argv = ["musl-gcc", "-static", "-O1", "-o", &program, source].map(str::to_owned);
    weft_lab::run_command(&argv, &[], &[], std::time::Duration::from_secs(60)).ok();
    program
}

fn dig(from: &Container, args: &[&str]) -> Vec<String> {
    let all: Vec<&str> = ["dig", "+short", "+tries=2", "+time=2"]
        .iter()
        .chain(args)
        .copied()
        .collect();
    let mut lines: Vec<String> = from.run(&all).ok().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

fn status_of(from: &Container, args: &[&str]) -> String {
    let all: Vec<&str> = ["dig", "+tries=2", "+time=2"]
        .iter()
        .chain(args)
        .copied()
        .collect();
    let out = from.run(&all).ok();
    let status = out
        .split_once("status: ")
        .map(|(_, rest)| rest.split(',').next().unwrap_or_default().to_owned());
    status.unwrap_or_else(|| panic!("no status in {out}"))
}

#[test]
fn containers_on_three_hosts_talk_by_address_and_by_name() {
    let lab = Lab::new("talk");
    let hosts = lab.trio();
    let all = ["one", "two", "three"].map(|n| n.to_owned());
    let boxes: Vec<Container> = hosts
        .iter()
        .zip(&all)
        .map(|(h, n)| h.serve(n, &[]))
        .collect();
    let musl = musl_resolver(&lab);
    for from in &boxes {
        for to in &boxes {
            lab.wait("the name is known", 20, || {
                dig(from, &[&format!("{}.weft.internal", to.name())]) == [to.ip().to_string()]
            });
            assert_eq!(
                dig(from, &["AAAA", &format!("{}.weft.internal", to.name())]),
                [to.ip6().to_string()]
            );
            assert_eq!(dig(from, &["+search", to.name()]), [to.ip().to_string()]);
            assert_eq!(
                dig(from, &["-x", &to.ip().to_string()]),
                [format!("{}.weft.internal.", to.name())]
            );
            assert_eq!(
                dig(from, &["-x", &to.ip6().to_string()]),
                [format!("{}.weft.internal.", to.name())]
            );
            lab.wait("IPv4 ping", 10, || from.pings(&to.ip().to_string()));
            lab.wait("IPv6 ping", 10, || from.pings(&to.ip6().to_string()));
            let glibc = from.run(&["getent", "ahosts", to.name()]).ok();
            let musl = from.run(&[&musl, to.name()]).ok();
            for (library, found) in [("glibc", &glibc), ("musl", &musl)] {
                assert!(
                    found.contains(&to.ip().to_string()),
                    "{library} has no A: {found}"
                );
                assert!(
                    found.contains(&to.ip6().to_string()),
                    "{library} has no AAAA: {found}"
                );
            }
            let page = from
                .run(&[
                    "curl",
                    "-sS",
                    "--max-time",
                    "10",
                    &format!("http://{}/", to.name()),
                ])
                .ok();
            assert!(page.starts_with(&format!("{} ", to.name())), "{page}");
        }
    }
}

#[test]
fn a_name_with_several_holders_answers_with_all_of_them_shuffled() {
    let lab = Lab::new("shuffle");
    let [h1, h2] = lab.pair();
    let (a, b, c) = (
        h1.serve("a", &["web"]),
        h2.serve("b", &["web"]),
        h2.serve("c", &["web"]),
    );
    let mut want = [a.ip(), b.ip(), c.ip()].map(|ip| ip.to_string());
    want.sort();
    lab.wait("all three are known", 20, || {
        dig(&a, &["web.weft.internal"]) == want
    });
    let mut firsts = std::collections::BTreeSet::new();
    lab.wait("more than one comes first", 20, || {
        let out = a.run(&["dig", "+short", "web.weft.internal"]).ok();
        firsts.extend(out.lines().next().map(str::to_owned));
        firsts.len() > 1
    });
}

#[test]
fn what_does_not_exist_is_said_so_and_never_forwarded() {
    let lab = Lab::new("nx");
    let host = lab.host("h1", &lab.subnet("a"));
    let gateway = host.subnet_gateway();
    let mut resolver = lab.spawn_on_router(
        "dns",
        &[
            &weft_lab::Host::binary("lab-tool"),
            "dns",
            &format!("{gateway}:53"),
        ],
    );
    resolver.wait_for("ready", std::time::Duration::from_secs(5));
    host.up(&[]);
    let a = host.serve("a", &[]);
    assert_eq!(status_of(&a, &["nobody.weft.internal"]), "NXDOMAIN");
    assert_eq!(status_of(&a, &["a.weft.internal", "MX"]), "NOERROR");
    assert!(dig(&a, &["a.weft.internal", "MX"]).is_empty());
    assert_eq!(status_of(&a, &["-x", "10.32.250.250"]), "NXDOMAIN");
    assert_eq!(status_of(&a, &["weft.internal", "SOA"]), "NOERROR");
    assert_eq!(
        dig(&a, &["outside.example"]),
        ["198.18.0.1"],
        "names of the outside are asked of the host's resolver"
    );
    assert_eq!(dig(&a, &["+tcp", "a.weft.internal"]), [a.ip().to_string()]);
    assert_eq!(
        dig(&a, &["+noedns", "a.weft.internal"]),
        [a.ip().to_string()]
    );
    assert_eq!(status_of(&a, &["nx.example"]), "NXDOMAIN");
    let asked = resolver.stdout();
    assert!(
        asked.contains("asked outside.example.") && !asked.contains("weft.internal"),
        "{asked}"
    );
    assert!(
        !asked.contains("in-addr.arpa"),
        "PTR of the range must stay: {asked}"
    );
}

#[test]
fn names_bound_by_hand_resolve_everywhere() {
    let lab = Lab::new("manual");
    let [h1, h2] = lab.pair();
    h1.weft(&["dns", "add", "printer", "192.0.2.200"]).ok();
    let b = h2.serve("b", &[]);
    lab.wait("the other host knows it", 20, || {
        dig(&b, &["printer.weft.internal"]) == ["192.0.2.200"]
    });
    let found = h2.weft(&["dns", "lookup", "printer"]).ok();
    assert!(found.contains("192.0.2.200"), "{found}");
    h2.weft(&["dns", "rm", "printer"]).ok();
    lab.wait("it is gone everywhere", 20, || {
        h1.weft(&["dns", "lookup", "printer"]).code != 0
    });
    assert_eq!(status_of(&b, &["printer.weft.internal"]), "NXDOMAIN");
}

#[test]
fn much_data_goes_through_a_narrow_path() {
    let lab = Lab::new("narrow");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("the two talk", 20, || a.pings(&b.ip().to_string()));
    assert!(a.fetches(&b, 20_000_000), "20 MB over an ordinary path");
    h2.narrow(1300);
    lab.wait("20 MB over a path of 1300 octets", 60, || {
        a.fetches(&b, 20_000_000)
    });
}

#[test]
fn the_mesh_works_under_loss() {
    let lab = Lab::new("lossy");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    h1.lose(10);
    h2.lose(10);
    lab.wait("names are known", 30, || {
        dig(&a, &["b.weft.internal"]) == [b.ip().to_string()]
    });
    for _ in 0..10 {
        lab.wait("an answer", 30, || {
            a.ask("tcp", &format!("{}:80", b.ip())).is_ok()
        });
    }
    assert_eq!(
        (h1.alive(), h2.alive()),
        (2, 2),
        "10 % loss must not cost a member"
    );
}

#[test]
fn strict_hosts_and_hosts_without_ipv6_take_part() {
    let lab = Lab::new("strict");
    let [h1, h2] = lab.two();
    let outside = lab.host("outside", &lab.subnet("o"));
    for key in ["all", "default", "eth0"] {
        h1.space()
            .sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "1");
        h2.space()
            .sysctl(&format!("net.ipv6.conf.{key}.disable_ipv6"), "1");
    }
    lab.cluster(&[h1.clone(), h2.clone()]);
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &["web"]));
    for (from, to) in [(&a, &b), (&b, &a)] {
        lab.wait("IPv4 between containers", 20, || {
            from.pings(&to.ip().to_string())
        });
        lab.wait("and IPv6, which the host has not", 20, || {
            from.pings(&to.ip6().to_string())
        });
    }
    h1.publish_web();
    for host in [&h1, &h2] {
        let to = format!("{}:8080", host.v4());
        lab.wait(&format!("{to} answers"), 20, || {
            outside.tool(&["ask", "tcp", &to, "--wait", "2"]).is_ok()
        });
    }
}
