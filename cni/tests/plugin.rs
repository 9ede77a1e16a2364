//! The plugin as a runtime starts it: variables, standard input, JSON and exit status. The daemon's part is played by a
//! socket that notes each request and gives a prepared answer; the real daemon is behind it in the lab.

// Helpers of tests may fail like tests do; clippy's own exception sees only `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};

const ID: &str = "dd89f32ec006";

struct Plugin {
    dir: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Plugin {
    fn new(command: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut plugin = Self {
            dir,
            variables: Vec::new(),
        };
        plugin.set(
            "WEFT_RUN_DIR",
            plugin.dir.path().to_str().unwrap().to_owned(),
        );
        for (name, value) in [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", ID),
            ("CNI_NETNS", "/proc/self/ns/net"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ] {
            plugin.set(name, value.to_owned());
        }
        plugin
    }

    fn set(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.into()));
        self
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("weft.sock")
    }

    fn run(&self, input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_weft-cni"))
            .env_clear()
            .envs(self.variables.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may refuse before it has read all.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    fn conf(&self, conf: &Value) -> Output {
        self.run(conf.to_string().as_bytes())
    }

    /// Runs it against a daemon that gives `answer`, and returns the one request too.
    fn asking(&self, conf: &Value, status: u16, answer: &Value) -> (Output, Request) {
        let daemon = serve_once(&self.socket(), status, answer.to_string());
        let output = self.conf(conf);
        (output, daemon.join().unwrap())
    }
}

struct Request {
    line: String,
    body: Value,
}

fn serve_once(socket: &Path, status: u16, answer: String) -> JoinHandle<Request> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
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
        write!(
            stream,
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{answer}",
            answer.len()
        )
        .unwrap();
        Request {
            line: line.trim_end().trim_end_matches(" HTTP/1.1").to_owned(),
            body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        }
    })
}

fn conf(version: &str) -> Value {
    json!({ "cniVersion": version, "name": "weft", "type": "weft-cni", "network": "default" })
}

fn attached() -> Value {
    json!({
        "id": "0011223344556677", "ip": "10.32.0.7", "ip6": "fd00::a20:7",
        "gateway": "169.254.1.1", "gateway6": "fe80::1", "ifname": "eth0",
        "mac": "02:78:0a:20:00:07", "leg": "wv0011223344", "mtu": 9000,
        "dns": "10.47.0.1", "domain": "weft.internal", "names": ["web"], "network": "default"
    })
}

fn printed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

fn fails_with(output: &Output, code: u32, words: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = printed(output);
    assert_eq!(error["code"], code, "{error}");
    assert!(error["cniVersion"].is_string(), "{error}");
    let text = error["msg"].as_str().unwrap();
    assert!(text.contains(words), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

fn succeeds_silently(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

#[test]
fn version_answers_whatever_it_is_given() {
    // As podman 4.3.1 asks.
    let mut plugin = Plugin::new("VERSION");
    plugin.set("CNI_NETNS", "dummy").set("CNI_IFNAME", "dummy");
    let output = plugin.run(br#"{"cniVersion":"1.0.0"}"#);
    assert_eq!(output.status.code(), Some(0));
    let said = printed(&output);
    assert_eq!(said["cniVersion"], "1.0.0");
    assert_eq!(
        said["supportedVersions"],
        json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    );
    for input in [&b""[..], b"nonsense", br#"{"cniVersion":"9.9.9"}"#] {
        let output = plugin.run(input);
        assert_eq!(printed(&output)["cniVersion"], "1.1.0");
    }
}

#[test]
fn add_as_podman_asks_attaches_with_names_and_address() {
    let mut plugin = Plugin::new("ADD");
    plugin.set(
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=p1;K8S_POD_NAME=Web_1;IP=10.32.77.9;ODD=1",
    );
    let conf = json!({
        "capabilities": { "aliases": true }, "cniVersion": "1.0.0", "custom": { "a": 1 }, "name": "weft",
        "runtimeConfig": { "aliases": { "weft": ["db", "db", ID] }, "portMappings": null },
        "type": "weft-cni", "network": "default", "prevResult": null
    });
    let (output, request) = plugin.asking(&conf, 200, &attached());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(request.line, "POST /v1/attach");
    assert_eq!(
        request.body,
        json!({
            "target": { "netns": "/proc/self/ns/net" }, "names": ["db", ID], "network": "default",
            "ip": "10.32.77.9", "ifname": "eth0", "labels": {}, "container_id": format!("weft/{ID}")
        })
    );
    assert_eq!(
        printed(&output),
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "eth0", "mac": "02:78:0a:20:00:07", "sandbox": "/proc/self/ns/net" }],
            "ips": [
                { "address": "10.32.0.7/32", "gateway": "169.254.1.1", "interface": 0 },
                { "address": "fd00::a20:7/128", "gateway": "fe80::1", "interface": 0 }
            ],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }, { "dst": "::/0", "gw": "fe80::1" }],
            "dns": { "nameservers": ["10.47.0.1"], "domain": "weft.internal", "search": ["weft.internal"] }
        })
    );
    // The name that can't be one in DNS is told where runtimes log it.
    assert!(String::from_utf8_lossy(&output.stderr).contains("Web_1"));
}

#[test]
fn results_are_written_in_the_version_asked_for_and_after_those_of_a_chain() {
    let (output, _) = Plugin::new("ADD").asking(&conf("0.3.1"), 200, &attached());
    let result = printed(&output);
    assert_eq!(result["ips"][0]["version"], "4");
    assert_eq!(result["ips"][1]["version"], "6");

    let mut chained = conf("1.1.0");
    chained["prevResult"] = json!({
        "cniVersion": "1.1.0", "interfaces": [{ "name": "lo" }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }], "dns": { "search": ["corp.example"] }
    });
    let (output, _) = Plugin::new("ADD").asking(&chained, 200, &attached());
    let result = printed(&output);
    assert_eq!(result["interfaces"][0]["name"], "lo");
    assert_eq!(result["interfaces"][1]["mtu"], 9000);
    assert_eq!(result["ips"][1]["interface"], 1);
    assert_eq!(
        result["dns"]["search"],
        json!(["weft.internal", "corp.example"])
    );
}

#[test]
fn wishes_that_can_t_be_met_are_refused_before_the_daemon_is_asked() {
    for (key, value, words) in [
        (
            "runtimeConfig",
            json!({ "mac": "02:00:00:00:00:01" }),
            "MAC",
        ),
        (
            "args",
            json!({ "cni": { "mac": "02:00:00:00:00:01" } }),
            "MAC",
        ),
        (
            "runtimeConfig",
            json!({ "portMappings": [{ "hostPort": 1, "containerPort": 2 }] }),
            "weft service create",
        ),
        (
            "runtimeConfig",
            json!({ "ips": ["fd00::1/64"] }),
            "derives the IPv6",
        ),
        (
            "runtimeConfig",
            json!({ "ips": ["10.32.0.1", "10.32.0.2"] }),
            "one address",
        ),
        (
            "args",
            json!({ "cni": { "ips": ["x"] } }),
            "not an IPv4 address",
        ),
        ("name", json!(""), "\"name\""),
        ("name", json!("../x"), "\"name\""),
        ("network", json!("a_b"), "letters, digits and hyphens"),
        ("socket", json!("weft.sock"), "absolute"),
    ] {
        let mut conf = conf("1.1.0");
        conf[key] = value;
        fails_with(&Plugin::new("ADD").conf(&conf), 7, words);
    }
    let mut plugin = Plugin::new("ADD");
    plugin.set("CNI_ARGS", "MAC=44:33:22:11:00:99");
    fails_with(&plugin.conf(&conf("1.0.0")), 7, "MAC");
}

#[test]
fn bad_variables_are_code_four() {
    for (name, value, words) in [
        ("CNI_CONTAINERID", "", "CNI_CONTAINERID"),
        ("CNI_CONTAINERID", "../x", "CNI_CONTAINERID"),
        ("CNI_CONTAINERID", "a/b", "CNI_CONTAINERID"),
        ("CNI_IFNAME", "", "CNI_IFNAME"),
        ("CNI_IFNAME", "sixteencharacter", "CNI_IFNAME"),
        ("CNI_IFNAME", "a/b", "CNI_IFNAME"),
        ("CNI_IFNAME", "..", "CNI_IFNAME"),
        ("CNI_NETNS", "", "CNI_NETNS"),
        ("CNI_NETNS", "relative", "CNI_NETNS"),
        ("CNI_ARGS", "novalue", "KEY=VALUE"),
        ("CNI_ARGS", "ODD=1", "knows no ODD"),
        ("CNI_COMMAND", "FROB", "FROB"),
    ] {
        let mut plugin = Plugin::new("ADD");
        plugin.set(name, value);
        fails_with(&plugin.conf(&conf("1.1.0")), 4, words);
    }
}

#[test]
fn bad_input_is_told_by_its_code() {
    let plugin = Plugin::new("ADD");
    fails_with(&plugin.run(b""), 6, "decoded");
    fails_with(&plugin.run(b"{"), 6, "decoded");
    fails_with(&plugin.run(br#"{"cniVersion":1}"#), 6, "decoded");
    fails_with(&plugin.run(&vec![b' '; (1 << 20) + 1]), 6, "1 MiB");
    fails_with(&plugin.conf(&json!({ "name": "weft" })), 1, "0.1.0");
    fails_with(&plugin.conf(&conf("2.0.0")), 1, "2.0.0");
    fails_with(&Plugin::new("CHECK").conf(&conf("0.3.1")), 1, "0.4.0");
    fails_with(&Plugin::new("STATUS").conf(&conf("1.0.0")), 1, "1.1.0");
    fails_with(&Plugin::new("GC").conf(&conf("1.0.0")), 1, "1.1.0");
}

#[test]
fn without_a_daemon_the_runtime_is_told_to_come_again() {
    fails_with(&Plugin::new("ADD").conf(&conf("1.1.0")), 11, "weft up");
    fails_with(&Plugin::new("STATUS").conf(&conf("1.1.0")), 50, "weft up");
    fails_with(&Plugin::new("DEL").conf(&conf("1.1.0")), 11, "weft up");
    // Nothing is left to detach: no reason to keep the container.
    for gone in ["", "/run/netns/no-such-namespace"] {
        let mut plugin = Plugin::new("DEL");
        plugin.set("CNI_NETNS", gone);
        succeeds_silently(&plugin.conf(&conf("1.1.0")));
    }
}

#[test]
fn del_names_the_container_and_needs_no_namespace_nor_result() {
    let mut plugin = Plugin::new("DEL");
    plugin.set("CNI_NETNS", "");
    let (output, request) = plugin.asking(&conf("1.0.0"), 200, &json!({ "ids": [] }));
    succeeds_silently(&output);
    assert_eq!(request.line, "POST /v1/detach");
    assert_eq!(
        request.body,
        json!({ "which": { "container": [format!("weft/{ID}"), "eth0"] } })
    );
}

#[test]
fn check_compares_with_what_add_told() {
    fails_with(&Plugin::new("CHECK").conf(&conf("1.1.0")), 7, "prevResult");
    let mut good = conf("1.1.0");
    good["prevResult"] =
        json!({ "ips": [{ "address": "10.32.0.7/32" }, { "address": "fd00::a20:7/128" }] });
    let (output, request) = Plugin::new("CHECK").asking(&good, 200, &attached());
    succeeds_silently(&output);
    assert_eq!(request.line, "POST /v1/check");

    let mut other = good.clone();
    other["prevResult"] = json!({ "ips": [{ "address": "10.32.0.8/32" }] });
    let (output, _) = Plugin::new("CHECK").asking(&other, 200, &attached());
    fails_with(&output, 100, "10.32.0.7");

    let gone = json!({ "error": "no such attachment", "kind": "not-found" });
    let (output, _) = Plugin::new("CHECK").asking(&good, 404, &gone);
    fails_with(&output, 3, "no such attachment");
}

#[test]
fn garbage_is_collected_within_one_configuration_only() {
    fails_with(
        &Plugin::new("GC").conf(&conf("1.1.0")),
        7,
        "valid-attachments",
    );
    let mut conf = conf("1.1.0");
    conf["cni.dev/valid-attachments"] = json!([{ "containerID": ID, "ifname": "eth0" }]);
    let (output, request) = Plugin::new("GC").asking(&conf, 200, &json!({ "ids": [] }));
    succeeds_silently(&output);
    assert_eq!(
        request.body,
        json!({ "which": { "all-containers-but": ["weft/", [[format!("weft/{ID}"), "eth0"]]] } })
    );
}

#[test]
fn the_daemon_s_errors_keep_their_meaning() {
    for (kind, status, code) in [
        ("invalid", 400, 7),
        ("not-found", 404, 3),
        ("conflict", 409, 100),
        ("unavailable", 503, 11),
        ("internal", 500, 5),
    ] {
        let error = json!({ "error": format!("it is {kind}"), "kind": kind });
        let (output, _) = Plugin::new("ADD").asking(&conf("1.1.0"), status, &error);
        fails_with(&output, code, kind);
    }
    let (output, _) = Plugin::new("ADD").asking(&conf("1.1.0"), 200, &json!({ "odd": 1 }));
    fails_with(&output, 101, "no sense");
}

#[test]
fn a_person_who_starts_it_is_told_what_it_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_weft-cni"))
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/etc/cni/net.d"));
}
