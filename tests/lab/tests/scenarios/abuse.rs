//! Bad input at every door: a clear error, nothing lost, the daemon alive.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use weft_lab::{Host, Lab};

fn one(name: &str) -> (Lab, Host) {
    let lab = Lab::new(name);
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    (lab, host)
}

/// Sends raw octets to the control socket; what came back.
fn talk(host: &Host, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(host.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    // The daemon may hang up in the middle: that is an answer too.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: weft\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn bad_requests_on_the_socket_get_an_error_and_no_more() {
    let (_lab, host) = one("api");
    let pid = host.daemon_pid();
    let deep = "[".repeat(50_000);
    let long = format!("{{\"names\":[\"{}\"]}}", "a".repeat(500_000));
    for body in [
        "",
        "{",
        "null",
        "[]",
        "{\"target\":1}",
        "{\"target\":{\"netns\":\"\\u0000\"}}",
        "\u{feff}{}",
        &deep,
        &long,
    ] {
        for (method, path) in [
            ("POST", "/v1/attach"),
            ("POST", "/v1/detach"),
            ("POST", "/v1/check"),
            ("POST", "/v1/token"),
            ("POST", "/v1/services"),
            ("PUT", "/v1/services/web"),
            ("POST", "/v1/names"),
        ] {
            let answer = talk(&host, request(method, path, body).as_bytes());
            let status = answer.split(' ').nth(1).unwrap_or_default().to_owned();
            assert!(
                status.starts_with('4'),
                "{method} {path} with {:.40}: {answer:.300}",
                body
            );
        }
    }
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/v2/status"),
        ("DELETE", "/v1/status"),
        ("GET", "/v1/../../etc/passwd"),
        ("DELETE", "/v1/services/%00"),
        ("DELETE", "/v1/names/nobody"),
    ] {
        let answer = talk(&host, request(method, path, "").as_bytes());
        assert!(
            answer.split(' ').nth(1).is_some_and(|s| s.starts_with('4')),
            "{method} {path}: {answer:.300}"
        );
    }
    assert_eq!(host.daemon_pid(), pid, "the daemon was restarted");
}

#[test]
fn noise_on_the_socket_does_not_stop_the_daemon() {
    let (lab, host) = one("noise");
    let pid = host.daemon_pid();
    let mut seed = 0x9e37_79b9_u64;
    for _ in 0..300 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let length = usize::try_from(seed % 3000).unwrap();
        let bytes: Vec<u8> = (0..length)
            .map(|i| (seed.rotate_left(u32::try_from(i % 64).unwrap()) ^ i as u64) as u8)
            .collect();
        talk(&host, &bytes);
    }
    talk(
        &host,
        format!("GET /v1/status HTTP/1.1\r\n{}", "X: y\r\n".repeat(20_000)).as_bytes(),
    );
    talk(&host, &[b'G'; 3_000_000]);
    let body = "x".repeat(3 << 20);
    talk(&host, request("POST", "/v1/attach", &body).as_bytes());
    // Many that say nothing: the next one is still served.
    let idle: Vec<_> = (0..200)
        .map_while(|_| UnixStream::connect(host.socket()).ok())
        .collect();
    lab.wait("the daemon still answers", 15, || host.alive() == 1);
    drop(idle);
    assert_eq!(host.daemon_pid(), pid);
}

#[test]
fn the_socket_is_for_root_alone() {
    let (_lab, host) = one("perm");
    let weft = Host::binary("weft");
    let out = host.run(&[
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        &weft,
        "status",
    ]);
    assert_ne!(out.code, 0, "{out}");
}

#[test]
fn bad_command_lines_are_told_so() {
    let (_lab, host) = one("cli");
    let usage: &[&[&str]] = &[
        &[],
        &["nonsense"],
        &["up", "--nonsense"],
        &["up", "--port", "0"],
        &["up", "--port", "70000"],
        &["up", "--range", "x"],
        &["up", "--advertise", "not an address"],
        &["token", "--ttl", "never"],
        &["token", "--uses", "0"],
        &["token", "--uses", "-1"],
        &["attach"],
        &["attach", "--netns", "/x", "--pid", "1"],
        &["attach", "--pid", "0"],
        &["attach", "--netns", "/x", "--name", "bad_name"],
        &["attach", "--netns", "/x", "--name", "localhost"],
        &[
            "attach",
            "--netns",
            "/x",
            "--ifname",
            "much-too-long-for-linux",
        ],
        &["attach", "--netns", "/x", "--ip", "10.32.0.999"],
        &["run"],
        &["run", "--"],
        &["exec"],
        &["service", "create", "web"],
        &["service", "create", "web", "--port", "0"],
        &["service", "create", "web", "--port", "80/sctp"],
        &["service", "create", "bad name", "--port", "80"],
        &[
            "service",
            "create",
            "web",
            "--port",
            "80",
            "--publish",
            "80",
        ],
        &["dns", "add", "x", "not-an-ip"],
        &["dns", "add", "-x", "10.0.0.1"],
    ];
    for args in usage {
        let out = host.weft(args);
        assert!(matches!(out.code, 1 | 2), "{out}");
        assert!(!out.stderr.trim().is_empty(), "silent: {out}");
    }
    let failures: &[&[&str]] = &[
        &[
            "service",
            "create",
            "web",
            "--port",
            "80",
            "--publish",
            "8080:81",
        ],
        &["service", "inspect", "nobody"],
        &["service", "update", "nobody", "--port", "80"],
        &["service", "rm", "nobody"],
        &["dns", "rm", "nobody"],
        &["dns", "lookup", "nobody"],
        &["detach", "0000000000000000"],
    ];
    for args in failures {
        let out = host.weft(args);
        // Detaching what is gone succeeds: that is the contract of its kind.
        if args[0] != "detach" {
            assert!(matches!(out.code, 1 | 2), "{out}");
            assert_eq!(
                out.stderr.trim().lines().count(),
                1,
                "one clear line: {out}"
            );
        }
    }
    assert_eq!(host.alive(), 1);
}

#[test]
fn a_taken_name_is_refused() {
    let (_lab, host) = one("dup");
    host.weft(&["service", "create", "web", "--port", "80"])
        .ok();
    let error = host
        .weft(&["service", "create", "web", "--port", "81"])
        .fails_with(1);
    assert!(error.contains("web"), "{error}");
    host.weft(&["dns", "add", "printer", "192.0.2.9"]).ok();
    let again = host.weft(&["dns", "add", "printer", "192.0.2.10"]);
    assert!(!again.is_ok(), "{again}");
}

#[test]
fn without_a_daemon_every_command_says_what_to_do() {
    let lab = Lab::new("nodaemon");
    let host = lab.host("h1", &lab.subnet("a"));
    for args in [
        &["status"] as &[&str],
        &["peers"],
        &["ps"],
        &["token"],
        &["service", "ls"],
        &["node", "ls"],
        &["run", "--", "true"],
    ] {
        let error = host.weft(args).fails_with(1);
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("weft up"), "{error}");
    }
}

#[test]
fn a_flood_of_garbage_leaves_names_and_tunnels_working() {
    let lab = Lab::new("flood");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("containers talk", 20, || a.pings(&b.ip().to_string()));
    a.tool(&["garbage", "10.47.0.1:53", "5000", "3"]).ok();
    h2.tool(&["garbage", &format!("{}:6783", h1.v4()), "20000", "4"])
        .ok();
    h2.tool(&["garbage", &format!("[{}]:6783", h1.v6()), "20000", "5"])
        .ok();
    lab.wait("a name is answered", 10, || {
        a.run(&["dig", "+short", "+time=1", "b.weft.internal"])
            .stdout
            .trim()
            == b.ip().to_string()
    });
    assert!(a.pings(&b.ip().to_string()));
    assert_eq!((h1.alive(), h2.alive()), (2, 2));
}

#[test]
fn a_port_that_is_taken_is_named_at_start() {
    let lab = Lab::new("port");
    let host = lab.host("h1", &lab.subnet("a"));
    let mut other = host.spawn_tool("other", &["serve", "--name", "other", "--port", "6783"]);
    other.wait_for("ready", Duration::from_secs(5));
    let error = host.up_with(&[], &[]).fails_with(1);
    assert!(error.contains("6783"), "{error}");
    drop(other);
    host.up(&["--port", "7000"]);
    assert_eq!(host.status()["port"], 7000);
}
