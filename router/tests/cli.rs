//! The command line as people meet it: exit status, messages, tables. Where a daemon has to answer, a socket plays its
//! part with prepared answers; the real one is behind these commands in the lab.

// Helpers of tests may fail like tests do; clippy's own exception sees only `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use weft_core::crypto::{Random, Secret};
use weft_core::identity::Identity;
use weft_core::model::ClusterId;
use weft_core::token::{Token, TokenBody};

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A clean environment whose directories are all this test's own.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        command
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("WEFT_RUN_DIR", self.dir.path())
            .env("WEFT_STATE_DIR", self.path("state"))
            .stdin(Stdio::null());
        command
    }

    fn weft(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(&self.path("weft.sock"))
    }
}

/// Plays the daemon: notes requests, gives the answers prepared below.
struct Daemon {
    requests: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Daemon {
    fn start(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let notes = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer_one(stream.unwrap(), &notes);
            }
        });
        Self { requests }
    }

    fn body_of(&self, line: &str) -> Value {
        let requests = self.requests.lock().unwrap();
        let found = requests.iter().rev().find(|(l, _)| l == line);
        found
            .unwrap_or_else(|| panic!("no {line} among {requests:?}"))
            .1
            .clone()
    }
}

fn answer_one(mut stream: UnixStream, notes: &Mutex<Vec<(String, Value)>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header == "\r\n" {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    notes.lock().unwrap().push((line.clone(), body));
    let (status, answer) = prepared(&line);
    let text = answer.to_string();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    )
    .unwrap();
}

fn service(published: Value) -> Value {
    json!({
        "name": "web", "selector": {}, "method": "maglev", "vip": "10.47.0.2", "vip6": "fd00::2",
        "ports": [{ "proto": "tcp", "port": 80, "target": 8000, "publish": published }],
        "backends": ["10.32.0.7"], "conflicts": ["beta: 8080/tcp is held by nginx (pid 812)"]
    })
}

fn network(name: &str, used: u64) -> Value {
    json!({
        "name": name, "net": "10.33.0.0/20", "also": [], "size": 4094, "used": used, "free_here": 17,
        "low": used > 3684, "net6": "fd00:0:0:10::/108", "endpoints": used
    })
}

fn prepared(line: &str) -> (u16, Value) {
    let answer = match line {
        "GET /v1/status" => json!({
            "version": "0.1.0", "node": "abcdefgh", "name": "alpha", "cluster": "0123456789ab", "pid": 1,
            "uptime_secs": 3700, "port": 6783, "range": "10.32.0.0/12", "host_ip": "10.32.0.1",
            "dns": "127.0.0.1", "netns": "weft-no-such-domain", "nodes_alive": 2, "nodes": 3,
            "endpoints_local": 1, "endpoints": 4, "services": 1, "cipher": "AES-256-GCM",
            "host_changes": ["accepts in DOCKER-USER"], "warnings": ["the clock is off"]
        }),
        "GET /v1/peers" | "GET /v1/names" | "GET /v1/nodes" => json!([]),
        "GET /v1/endpoints" => json!([{
            "id": "0011223344556677", "names": ["web", "www"], "kind": "container", "ip": "10.32.0.7",
            "ip6": "fd00::7", "network": "default", "node": "alpha", "node_id": "abcdefgh", "local": true,
            "labels": { "tier": "front" }
        }]),
        "GET /v1/services" => json!([service(json!([{ "addr": null, "port": 8080 }]))]),
        "PUT /v1/services/web" => service(json!([])),
        "GET /v1/networks" => json!([network("default", 0), network("blue", 4000)]),
        "POST /v1/networks" => network("blue", 0),
        "POST /v1/token" => json!({ "token": "weft1_thetoken" }),
        "POST /v1/attach" => json!({
            "id": "0011223344556677", "ip": "10.32.0.7", "ip6": "fd00::7", "gateway": "169.254.1.1",
            "gateway6": "fe80::1", "ifname": "eth0", "mac": "02:78:0a:20:00:07", "leg": "wv0011223344",
            "mtu": 9000, "dns": "10.47.0.1", "domain": "weft.internal", "names": ["web"], "network": "default"
        }),
        "POST /v1/detach" => json!({ "ids": ["0011223344556677"] }),
        _ => {
            let error = json!({ "error": "it is\ntaken; choose another", "kind": "conflict" });
            return (409, error);
        }
    };
    (200, answer)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Failed with `code` and exactly one line on standard error.
fn one_line(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert!(text.starts_with("weft: "), "{text}");
    text
}

fn succeeds(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    stdout(output)
}

#[test]
fn without_a_daemon_every_command_says_what_to_do() {
    let host = Host::new();
    for line in [
        "token",
        "status",
        "peers",
        "ps",
        "attach --pid 1",
        "detach 0011223344556677",
        "run -- true",
        "exec -- true",
        "service ls",
        "service inspect web",
        "service create web --port 80",
        "service update web --port 81",
        "service rm web",
        "network create blue",
        "network ls",
        "network rm blue",
        "dns add a 10.0.0.1",
        "dns ls",
        "dns rm a",
        "dns lookup a",
        "node ls",
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let text = one_line(&host.weft(&args), 1);
        assert!(text.contains("start it with: weft up"), "{line}: {text}");
        assert!(text.contains("weft.sock"), "{line}: {text}");
    }
}

#[test]
fn down_with_nothing_there_succeeds_and_says_so() {
    let host = Host::new();
    assert!(succeeds(&host.weft(&["down"])).contains("nothing to remove"));
}

#[test]
fn wrong_usage_is_status_two_and_help_is_none() {
    let host = Host::new();
    for line in [
        "nonsense",
        "up --port 0",
        "service create web",
        "doctor",
        "attach --pid 1 --netns x",
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let output = host.weft(&args);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{line}"
        );
    }
    let help = succeeds(&host.weft(&["--help"]));
    for word in [
        "up",
        "token",
        "run",
        "service",
        "completions",
        "Getting started",
    ] {
        assert!(help.contains(word), "{word}");
    }
    for hidden in ["background", "run-inside", "demo-part"] {
        assert!(!help.contains(hidden), "{hidden}");
    }
    assert!(succeeds(&host.weft(&["up", "--help"])).contains("Examples:"));
    assert!(succeeds(&host.weft(&["--version"])).starts_with("weft "));
    assert!(succeeds(&host.weft(&["completions", "bash"])).contains("_weft"));
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let host = Host::new();
    let file = host.path("weft.toml");
    std::fs::write(&file, "run-dir = \"/nonexistent/from-file\"\n").unwrap();
    let status = |flag: &[&str], env: bool| {
        let mut args = vec!["status", "--config", file.to_str().unwrap()];
        args.extend(flag);
        let mut command = host.command(&args);
        if !env {
            command.env_remove("WEFT_RUN_DIR");
        }
        one_line(&command.output().unwrap(), 1)
    };
    assert!(status(&[], false).contains("/nonexistent/from-file/weft.sock"));
    assert!(status(&[], true).contains(host.dir.path().to_str().unwrap()));
    assert!(
        status(&["--run-dir", "/nonexistent/flag"], true).contains("/nonexistent/flag/weft.sock")
    );

    let wrong_port = host
        .command(&["up", "--range", "10.0.0.1/8"])
        .env("WEFT_PORT", "abc")
        .output();
    assert_eq!(wrong_port.unwrap().status.code(), Some(2));
    let covered = host
        .command(&["up", "--port", "7000", "--range", "10.0.0.1/8"])
        .env("WEFT_PORT", "abc")
        .output();
    assert!(one_line(&covered.unwrap(), 1).contains("did you mean 10.0.0.0/8"));
}

#[test]
fn what_does_not_run_can_t_be_restarted() {
    let host = Host::new();
    let text = one_line(&host.weft(&["restart"]), 1);
    assert!(
        text.contains("not running") && text.contains("weft up"),
        "{text}"
    );
}

#[test]
fn a_bad_configuration_file_is_told_by_name_and_line() {
    let host = Host::new();
    let file = host.path("weft.toml");
    std::fs::write(&file, "port = 7000\ncolour = \"blue\"\n").unwrap();
    let text = one_line(&host.weft(&["up", "--config", file.to_str().unwrap()]), 1);
    assert!(text.contains("weft.toml: line 2"), "{text}");
    let text = one_line(
        &host.weft(&["status", "--config", "/nonexistent/x.toml"]),
        1,
    );
    assert!(text.contains("/nonexistent/x.toml"), "{text}");
}

#[test]
fn tokens_are_never_repeated() {
    let host = Host::new();
    let text = one_line(&host.weft(&["up", "--join", "weft1_a secret one"]), 1);
    assert!(!text.contains("secret"), "{text}");
    let text = one_line(&host.weft(&["up", "--join", "@/nonexistent/token"]), 1);
    assert!(text.contains("/nonexistent/token"), "{text}");
    let text = one_line(&host.weft(&["up", "--join", "-"]), 1);
    assert!(text.contains("weft token"), "{text}");
}

#[test]
fn what_is_up_stays_up() {
    let host = Host::new();
    let _daemon = host.daemon();
    let text = succeeds(&host.weft(&["up"]));
    assert!(
        text.contains("already up") && text.contains("0123456789ab"),
        "{text}"
    );
    let json: Value = serde_json::from_str(&succeeds(&host.weft(&["up", "--json"]))).unwrap();
    assert_eq!(json["cluster"], "0123456789ab");
    // Joining again where it is: what provisioning tools do on every run.
    let mine = token_for([0x01, 0x23, 0x45, 0x67, 0x89, 0xab]);
    let text = succeeds(&host.weft(&["up", "--join", &mine]));
    assert!(text.contains("already up"), "{text}");
    let other = token_for([0xff; 6]);
    let text = one_line(&host.weft(&["up", "--join", &other]), 1);
    assert!(
        text.contains("ffffffffffff") && text.contains("weft reset"),
        "{text}"
    );
    assert!(!text.contains(&other), "{text}");
    let text = one_line(&host.weft(&["up", "--join", "weft1_x"]), 1);
    assert!(
        text.contains("garbled") && !text.contains("weft1_x"),
        "{text}"
    );
}

fn token_for(cluster: [u8; 6]) -> String {
    let mut random = Random::from_seed([1; 32]);
    let identity = Identity::generate(&mut random);
    let mut id = [0; 16];
    id[..6].copy_from_slice(&cluster);
    let body = TokenBody {
        cluster: ClusterId(id),
        id: [0; 16],
        issuer: identity.id(),
        issued_at: 0,
        expires_at: 1,
        uses: 1,
        members: vec![],
    };
    Token::issue(&identity, &Secret::generate(&mut random), body)
        .unwrap()
        .text()
}

#[test]
fn answers_are_shown_in_words_or_as_json() {
    let host = Host::new();
    let daemon = host.daemon();
    let text = succeeds(&host.weft(&["status"]));
    for part in [
        "alpha (abcdefgh)",
        "2 alive of 3",
        "warning: the clock is off",
        "DOCKER-USER",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json: Value = serde_json::from_str(&succeeds(&host.weft(&["status", "--json"]))).unwrap();
    assert_eq!(json["nodes"], 3);

    assert!(succeeds(&host.weft(&["peers"])).contains("weft token"));
    assert_eq!(succeeds(&host.weft(&["peers", "--json"])).trim(), "[]");
    let ps = succeeds(&host.weft(&["ps"]));
    assert!(
        ps.starts_with("ENDPOINT") && ps.contains("web,www") && ps.contains("tier=front"),
        "{ps}"
    );
    let services = succeeds(&host.weft(&["service", "ls"]));
    assert!(
        services.contains("80:8000/tcp") && services.contains("8080:80/tcp"),
        "{services}"
    );
    assert!(services.contains("held by nginx"), "{services}");
    let text = one_line(&host.weft(&["service", "inspect", "nosuch"]), 1);
    assert!(text.contains("no service nosuch"), "{text}");

    assert_eq!(
        succeeds(&host.weft(&["token", "--ttl", "90m", "--uses", "3"])),
        "weft1_thetoken\n"
    );
    assert_eq!(
        daemon.body_of("POST /v1/token"),
        json!({ "ttl_secs": 5400, "uses": 3, "reusable": false })
    );
    succeeds(&host.weft(&["service", "update", "web", "--no-publish"]));
    let body = daemon.body_of("PUT /v1/services/web");
    assert_eq!(body["ports"][0]["publish"], json!([]));
    assert_eq!(body["ports"][0]["target"], 8000);
}

#[test]
fn the_daemon_s_refusal_is_one_line() {
    let host = Host::new();
    let _daemon = host.daemon();
    let text = one_line(&host.weft(&["service", "create", "web", "--port", "80"]), 1);
    assert_eq!(text, "weft: it is; taken; choose another\n");
}

#[test]
fn attach_and_detach_say_which_namespace() {
    let host = Host::new();
    let daemon = host.daemon();
    let text = one_line(&host.weft(&["attach"]), 1);
    assert!(text.contains("--netns, --pid or --container"), "{text}");
    let text = one_line(&host.weft(&["attach", "--netns", "no-such-netns"]), 1);
    assert!(text.contains("/run/netns/no-such-netns"), "{text}");
    let line =
        "attach --pid 1 --name web --name www --ip 10.32.0.7 --ifname eth3 --label a=b --json";
    let args: Vec<&str> = line.split(' ').collect();
    let attached: Value = serde_json::from_str(&succeeds(&host.weft(&args))).unwrap();
    assert_eq!(attached["leg"], "wv0011223344");
    assert_eq!(
        daemon.body_of("POST /v1/attach"),
        json!({
            "target": { "pid": 1 }, "names": ["web", "www"], "network": null, "ip": "10.32.0.7",
            "ifname": "eth3", "labels": { "a": "b" }, "container_id": null
        })
    );
    let text = succeeds(&host.weft(&["detach", "0011223344556677"]));
    assert!(text.contains("detached 0011223344556677"), "{text}");
    succeeds(&host.weft(&["detach", "--pid", "1"]));
    assert_eq!(
        daemon.body_of("POST /v1/detach"),
        json!({ "which": { "target": [{ "pid": 1 }, "eth0"] } })
    );
}

#[test]
fn run_gives_the_command_its_own_namespace_and_name_server() {
    let host = Host::new();
    let daemon = host.daemon();
    let script = "cat /etc/resolv.conf; echo $GREETING; readlink /proc/self/ns/net; ls -1 /proc/self/fd | wc -l";
    let args = [
        "run",
        "--name",
        "web",
        "-e",
        "GREETING=a=b",
        "--",
        "sh",
        "-c",
        script,
    ];
    let text = succeeds(&host.weft(&args));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..3],
        ["nameserver 10.47.0.1", "search weft.internal", "a=b"]
    );
    let ours = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(Path::new(lines[3]), ours);
    assert_eq!(
        lines[4],
        open_files(),
        "a pipe of weft run leaked into the command"
    );
    let body = daemon.body_of("POST /v1/attach");
    assert_eq!(body["names"], json!(["web"]));
    assert!(body["target"]["pid"].is_number());
    assert_eq!(
        daemon.body_of("POST /v1/detach"),
        json!({ "which": { "id": "0011223344556677" } })
    );
    let left: Vec<_> = std::fs::read_dir(host.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(
        left,
        ["weft.sock"],
        "only the socket is left in the run directory"
    );
}

/// How many files a command has that this test starts: its own three, and what the test itself was given.
fn open_files() -> String {
    let output = Command::new("sh")
        .args(["-c", "ls -1 /proc/self/fd | wc -l"])
        .output()
        .unwrap();
    stdout(&output).trim().to_owned()
}

#[test]
fn run_passes_the_command_s_end_on() {
    let host = Host::new();
    let daemon = host.daemon();
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ] {
        let output = host.weft(&["run", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(code), "{script}: {output:?}");
    }
    assert!(
        one_line(&host.weft(&["run", "--", "/nonexistent/cmd"]), 127).contains("/nonexistent/cmd")
    );
    assert!(one_line(&host.weft(&["run", "--", "/etc"]), 126).contains("/etc"));
    let requests = daemon.requests.lock().unwrap();
    let count = |line: &str| requests.iter().filter(|(l, _)| l == line).count();
    assert_eq!(count("POST /v1/attach"), 6);
    assert_eq!(
        count("POST /v1/detach"),
        6,
        "also when the command could not be started"
    );
}

fn spawn_reading_first_line(host: &Host, script: &str) -> (Child, String) {
    // Whoever started the tests may ignore signals (`nohup`, `&`), and a shell traps none that it was born to ignore.
    let shell = ["env", "--default-signal", "sh", "-c", script];
    let mut child = host
        .command(&[&["run", "--"], &shell[..]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    (child, line.trim().to_owned())
}

#[test]
fn run_forwards_signals() {
    let host = Host::new();
    let _daemon = host.daemon();
    for (signal, name) in [
        (Signal::SIGTERM, "TERM"),
        (Signal::SIGINT, "INT"),
        (Signal::SIGHUP, "HUP"),
        (Signal::SIGUSR1, "USR1"),
    ] {
        let script = format!("trap 'exit 42' {name}; echo ready; read line");
        let (mut child, line) = spawn_reading_first_line(&host, &script);
        assert_eq!(line, "ready");
        // Held open: the end of its input would end the command, too.
        let stdin = child.stdin.take();
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(42), "{name}");
        drop(stdin);
    }
}

#[test]
fn run_takes_the_command_with_it_when_killed() {
    let host = Host::new();
    let _daemon = host.daemon();
    let (mut child, pid) = spawn_reading_first_line(&host, "echo $$; read line");
    // Held open: it is not the end of its input that ends the command.
    let stdin = child.stdin.take();
    child.kill().unwrap();
    child.wait().unwrap();
    let begun = Instant::now();
    while is_running(&pid) {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "the command outlived weft run"
        );
        std::thread::yield_now();
    }
    drop(stdin);
}

fn is_running(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z')
    })
}

#[test]
fn exec_says_when_there_is_no_domain() {
    let host = Host::new();
    let _daemon = host.daemon();
    let text = one_line(&host.weft(&["exec", "--", "true"]), 1);
    assert!(text.contains("/run/netns/weft-no-such-domain"), "{text}");
}

#[test]
fn hidden_halves_refuse_strangers() {
    let host = Host::new();
    let text = one_line(&host.weft(&["background"]), 1);
    assert!(text.contains("weft up"), "{text}");
    let args = [
        "run-inside",
        "--status-fd",
        "200",
        "--orders-fd",
        "201",
        "--parent",
        "1",
        "--",
        "true",
    ];
    assert!(one_line(&host.weft(&args), 1).contains("weft run"));
}

#[test]
fn networks_are_made_listed_and_those_that_fill_up_are_marked() {
    let host = Host::new();
    let daemon = host.daemon();
    let made = succeeds(&host.weft(&["network", "create", "blue", "--size", "/18"]));
    assert!(
        made.contains("10.33.0.0/20, fd00:0:0:10::/108") && made.contains("4094 endpoints"),
        "{made}"
    );
    let body = daemon.body_of("POST /v1/networks");
    assert_eq!(
        body,
        json!({ "name": "blue", "prefix_len": 18, "subnet": null })
    );
    let list = succeeds(&host.weft(&["network", "ls"]));
    assert!(list.contains("4000 of 4094"), "{list}");
    assert_eq!(list.matches("nearly full").count(), 1, "{list}");
    let rows: Value =
        serde_json::from_str(&succeeds(&host.weft(&["network", "ls", "--json"]))).unwrap();
    assert_eq!(rows[1]["name"], "blue");
    assert_eq!(rows[1]["free_here"], 17);
    let text = one_line(&host.weft(&["network", "rm", "blue"]), 1);
    assert!(text.contains("taken; choose another"), "{text}");
}
