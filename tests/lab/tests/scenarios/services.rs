//! Virtual addresses and published ports.

use std::collections::BTreeSet;
use std::time::Duration;

use weft_lab::{Container, Host, Lab};

const PROTOS: [&str; 2] = ["tcp", "udp"];

/// Three hosts, `x` on h1 and `y` on h2 behind the service `web` (TCP and UDP 80 published as 8080), and a client outside.
struct Scene {
    lab: Lab,
    hosts: [Host; 3],
    outside: Host,
    boxes: Vec<Container>,
    vip: String,
    vip6: String,
}

fn scene(name: &str) -> Scene {
    let lab = Lab::new(name);
    let hosts = lab.trio();
    let outside = lab.host("outside", &lab.subnet("o"));
    let boxes = vec![hosts[0].serve("x", &["web"]), hosts[1].serve("y", &["web"])];
    let created = hosts[2].weft(&[
        "service",
        "create",
        "web",
        "--port",
        "80",
        "--port",
        "80/udp",
        "--publish",
        "8080:80",
        "--publish",
        "8080:80/udp",
        "--json",
    ]);
    let row = created.json();
    let vip = row["vip"].as_str().unwrap().to_owned();
    let vip6 = row["vip6"].as_str().unwrap().to_owned();
    let scene = Scene {
        lab,
        hosts,
        outside,
        boxes,
        vip,
        vip6,
    };
    scene.lab.wait("two backends on every host", 20, || {
        scene.hosts.iter().all(|h| backends(h) == 2)
    });
    scene
}

fn backends(host: &Host) -> usize {
    let rows = host.weft(&["service", "ls", "--json"]).json();
    rows[0]["backends"].as_array().map_or(0, Vec::len)
}

fn word(answer: &str, nth: usize) -> String {
    answer.split(' ').nth(nth).unwrap_or_default().to_owned()
}

/// Asks until both backends answered; every answer must have seen `client`.
fn both_answer(
    lab: &Lab,
    what: &str,
    client: Option<&str>,
    mut ask: impl FnMut() -> weft_lab::Out,
) {
    let mut seen = BTreeSet::new();
    lab.wait(&format!("both backends answer {what}"), 30, || {
        let out = ask();
        if !out.is_ok() {
            return false;
        }
        let answer = out.ok();
        if let Some(client) = client {
            assert_eq!(
                word(&answer, 1),
                client,
                "{what}: the server saw somebody else: {answer}"
            );
        }
        seen.insert(word(&answer, 0));
        seen.len() == 2
    });
}

#[test]
fn the_vip_is_balanced_over_hosts_and_the_server_sees_the_container() {
    let s = scene("vip");
    let client = s.hosts[2].serve("client", &[]);
    let (ip, ip6) = (client.ip().to_string(), client.ip6().to_string());
    for proto in PROTOS {
        both_answer(&s.lab, &format!("{proto} v4"), Some(&ip), || {
            client.ask(proto, &format!("{}:80", s.vip))
        });
        both_answer(&s.lab, &format!("{proto} v6"), Some(&ip6), || {
            client.ask(proto, &format!("[{}]:80", s.vip6))
        });
    }
    let name = client.run(&["dig", "+short", "web.weft.internal"]).ok();
    assert_eq!(name, s.vip);
    // Twenty in a row, none fails.
    for _ in 0..20 {
        client.ask("tcp", &format!("{}:80", s.vip)).ok();
    }
    // The host's own processes reach it too.
    s.hosts[2]
        .tool(&["ask", "tcp", &format!("{}:80", s.vip)])
        .ok();
    s.hosts[2]
        .tool(&["ask", "udp", &format!("[{}]:80", s.vip6)])
        .ok();
}

#[test]
fn a_backend_reaches_itself_through_its_own_vip() {
    let s = scene("hairpin");
    for backend in &s.boxes {
        for to in [format!("{}:80", s.vip), format!("[{}]:80", s.vip6)] {
            let mut seen = BTreeSet::new();
            s.lab.wait(
                "a backend gets answers of both, itself included",
                30,
                || {
                    let out = backend.ask("tcp", &to);
                    seen.insert(word(&out.ok(), 0));
                    seen.len() == 2
                },
            );
        }
    }
}

#[test]
fn published_ports_answer_on_every_host_and_the_server_sees_the_client() {
    let s = scene("publish");
    let (v4, v6) = (s.outside.v4().to_string(), s.outside.v6().to_string());
    for host in &s.hosts {
        for proto in PROTOS {
            let to = format!("{}:8080", host.v4());
            both_answer(&s.lab, &format!("{proto} {to}"), Some(&v4), || {
                s.outside.tool(&["ask", proto, &to])
            });
            let to = format!("[{}]:8080", host.v6());
            both_answer(&s.lab, &format!("{proto} {to}"), Some(&v6), || {
                s.outside.tool(&["ask", proto, &to])
            });
        }
    }
}

#[test]
fn one_client_port_through_two_hosts_to_one_backend() {
    let mut s = scene("ingress");
    // One backend only, y on h2, so that all ways end there: two through other hosts, one directly.
    drop(s.boxes.remove(0));
    s.lab.wait("one backend left", 20, || {
        s.hosts.iter().all(|h| backends(h) == 1)
    });
    for (v, from) in [
        (4, format!("{}:40404", s.outside.v4())),
        (6, format!("[{}]:40404", s.outside.v6())),
    ] {
        let to = |h: &Host| {
            if v == 4 {
                format!("{}:8080", h.v4())
            } else {
                format!("[{}]:8080", h.v6())
            }
        };
        let mut held: Vec<_> = s
            .hosts
            .iter()
            .enumerate()
            .map(|(n, h)| {
                s.outside
                    .spawn_tool(&format!("hold-{v}-{n}"), &["hold", &to(h), "--from", &from])
            })
            .collect();
        for one in &mut held {
            one.wait_for("ok 10 ", Duration::from_secs(15));
        }
        for one in &held {
            assert_eq!(
                word(one.stdout().lines().next().unwrap(), 3),
                from.rsplit_once(':').unwrap().0.trim_matches(['[', ']'])
            );
        }
        for host in s.hosts.iter().chain(&s.hosts) {
            let from = from.replace("40404", "40405");
            s.outside
                .tool(&["ask", "udp", &to(host), "--from", &from])
                .ok();
        }
    }
}

#[test]
fn the_host_itself_reaches_published_ports_by_loopback_and_its_own_address() {
    let s = scene("loopback");
    for host in &s.hosts {
        for to in [
            "127.0.0.1:8080".to_owned(),
            "[::1]:8080".to_owned(),
            format!("{}:8080", host.v4()),
            format!("[{}]:8080", host.v6()),
        ] {
            both_answer(&s.lab, &format!("{to} on {}", host.name()), None, || {
                host.tool(&["ask", "tcp", &to])
            });
        }
    }
}

#[test]
fn a_container_reaches_a_published_port_of_its_own_host_and_of_others() {
    let s = scene("inside");
    let client = s.hosts[0].serve("client", &[]);
    for host in &s.hosts {
        for proto in PROTOS {
            let to = format!("{}:8080", host.v4());
            s.lab
                .wait(&format!("{proto} {to} from a container of h1"), 20, || {
                    client.ask(proto, &to).is_ok()
                });
        }
    }
}

#[test]
fn a_taken_port_is_refused_with_its_owner_s_name() {
    let lab = Lab::new("taken");
    let [h1, h2] = lab.pair();
    let mut here = h1.spawn_tool("here", &["serve", "--name", "here", "--port", "9001"]);
    let mut there = h2.spawn_tool("there", &["serve", "--name", "there", "--port", "9002"]);
    here.wait_for("ready", Duration::from_secs(5));
    there.wait_for("ready", Duration::from_secs(5));
    for (port, node) in [("9001", "on this host"), ("9002", "h2")] {
        let error = h1
            .weft(&[
                "service",
                "create",
                "web",
                "--port",
                "80",
                "--publish",
                &format!("{port}:80"),
            ])
            .fails_with(1);
        assert!(
            error.contains(port) && error.contains("lab-tool") && error.contains(node),
            "{error}"
        );
        let left = h1.weft(&["service", "ls", "--json"]).json();
        assert_eq!(
            left.as_array().map(Vec::len),
            Some(0),
            "nothing of it may stay: {left}"
        );
    }
    for port in ["22", "6783", "6784"] {
        let publish = format!("{port}:80/udp");
        let error = h1
            .weft(&[
                "service",
                "create",
                "web",
                "--port",
                "80/udp",
                "--publish",
                &publish,
            ])
            .fails_with(1);
        assert!(error.contains(port), "{error}");
    }
    // The owner goes: the port is free.
    drop(here);
    lab.wait("the port can be published now", 10, || {
        h1.weft(&[
            "service",
            "create",
            "web",
            "--port",
            "80",
            "--publish",
            "9001:80",
        ])
        .is_ok()
    });
    // And nobody else can take it while it is.
    let late = h2.spawn_tool("late", &["serve", "--name", "late", "--port", "9001"]);
    lab.wait("the late one is refused by the kernel", 10, || {
        late.stderr().contains("in use")
    });
}

#[test]
fn a_conflict_that_comes_later_is_shown() {
    let lab = Lab::new("conflict");
    let a = lab.subnet("a");
    let [h1, h2] = ["h1", "h2"].map(|n| lab.host(n, &a));
    h1.up(&[]);
    h1.weft(&[
        "service",
        "create",
        "web",
        "--port",
        "80",
        "--publish",
        "9001:80",
    ])
    .ok();
    let mut owner = h2.spawn_tool("owner", &["serve", "--name", "owner", "--port", "9001"]);
    owner.wait_for("ready", Duration::from_secs(5));
    h2.join(&h1);
    lab.wait("every node's `service ls` names the conflict", 20, || {
        [&h1, &h2].iter().all(|h| {
            let text = h.weft(&["service", "ls", "--json"]).json()[0]["conflicts"].to_string();
            text.contains("h2") && text.contains("9001") && text.contains("lab-tool")
        })
    });
}

#[test]
fn services_are_updated_and_removed_everywhere() {
    let s = scene("update");
    s.hosts[0]
        .weft(&["service", "update", "web", "--publish", "8081:80"])
        .ok();
    let (old, new) = (
        format!("{}:8080", s.hosts[1].v4()),
        format!("{}:8081", s.hosts[1].v4()),
    );
    s.lab.wait("the new port answers", 20, || {
        s.outside.tool(&["ask", "tcp", &new, "--wait", "2"]).is_ok()
    });
    s.lab.wait("the old one is closed", 20, || {
        !s.outside.tool(&["ask", "tcp", &old, "--wait", "1"]).is_ok()
    });
    s.hosts[1].weft(&["service", "rm", "web"]).ok();
    s.lab.wait("no host has it", 20, || {
        s.hosts.iter().all(|h| {
            h.weft(&["service", "ls", "--json"])
                .json()
                .as_array()
                .is_some_and(Vec::is_empty)
        })
    });
    s.lab.wait("the new one is closed too", 20, || {
        !s.outside.tool(&["ask", "tcp", &new, "--wait", "1"]).is_ok()
    });
}

#[test]
fn labels_select_backends() {
    let lab = Lab::new("select");
    let [h1, h2] = lab.pair();
    let _blue = h1.serve_with("blue", &["--label", "tier=front"]);
    let _green = h2.serve_with("green", &["--label", "tier=back"]);
    let row = h1
        .weft(&[
            "service",
            "create",
            "front",
            "--port",
            "80",
            "--select",
            "tier=front",
            "--json",
        ])
        .json();
    let vip = format!("{}:80", row["vip"].as_str().unwrap());
    let client = h2.serve("client", &[]);
    lab.wait("the selected one answers", 20, || {
        client.ask("tcp", &vip).is_ok()
    });
    for _ in 0..10 {
        let answer = client.ask("tcp", &vip).ok();
        assert!(answer.starts_with("blue "), "{answer}");
    }
}

#[test]
fn rules_are_one_transaction_and_the_host_holds_one_table() {
    let s = scene("rules");
    let host = &s.hosts[0];
    let tables = host.run(&["nft", "list", "tables"]).ok();
    assert_eq!(tables, "table inet weft", "the host has other tables");
    // A flushed ruleset is put back, and traffic between containers never notices.
    let to = format!("{}:80", s.boxes[1].ip());
    host.run(&["nft", "flush", "ruleset"]).ok();
    s.boxes[0].ask("tcp", &to).ok();
    s.lab.wait("the table is back", 10, || {
        host.run(&["nft", "list", "tables"])
            .stdout
            .contains("inet weft")
    });
    let ingress = format!("{}:8080", host.v4());
    s.lab.wait("and the published port", 10, || {
        s.outside
            .tool(&["ask", "tcp", &ingress, "--wait", "2"])
            .is_ok()
    });
}
