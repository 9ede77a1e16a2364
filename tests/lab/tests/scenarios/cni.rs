//! `weft-cni`, driven as CNI 1.1.0 says, and by a real runtime: Debian's podman with its CNI backend.

use serde_json::{Value, json};
use weft_lab::{Host, Lab, Out};

/// A runtime as small as the specification allows: one container in one namespace.
struct Runtime<'a> {
    host: &'a Host,
    version: &'a str,
    id: String,
    netns: String,
}

impl<'a> Runtime<'a> {
    fn new(host: &'a Host, version: &'a str, id: &str) -> Self {
        let netns = format!("{}-{id}", host.space().name());
        host.run(&["ip", "netns", "add", &netns]).ok();
        Self {
            host,
            version,
            id: id.to_owned(),
            netns,
        }
    }

    fn call(&self, verb: &str, more: Value) -> Out {
        self.call_in(verb, &format!("/run/netns/{}", self.netns), more)
    }

    fn call_in(&self, verb: &str, netns: &str, more: Value) -> Out {
        let mut config = json!({"cniVersion": self.version, "name": "weft", "type": "weft-cni", "network": "default"});
        config
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().cloned().unwrap_or_default());
        let env = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &self.id),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/nowhere"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=pod-one"),
        ];
        self.host.run_env(
            &env,
            &[&Host::binary("weft-cni")],
            config.to_string().as_bytes(),
        )
    }

    fn inside(&self, args: &[&str]) -> Out {
        self.host
            .run(&[&["ip", "netns", "exec", &self.netns], args].concat())
    }
}

/// Errors are JSON on standard output, and the exit status tells.
fn error(out: &Out) -> (u64, String) {
    assert!(!out.is_ok(), "{out}");
    let error: Value = serde_json::from_str(&out.stdout)
        .unwrap_or_else(|e| panic!("no error object ({e}): {out}"));
    (
        error["code"]
            .as_u64()
            .unwrap_or_else(|| panic!("no code: {out}")),
        error["msg"].to_string(),
    )
}

fn endpoints(host: &Host) -> String {
    host.weft(&["ps", "--local", "--json"]).json().to_string()
}

#[test]
fn a_container_lives_through_all_verbs() {
    let lab = Lab::new("cni");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    for version in ["1.1.0", "1.0.0", "0.4.0", "0.3.1"] {
        let runtime = Runtime::new(&host, version, &format!("c{}", version.replace('.', "")));
        let result = runtime
            .call(
                "ADD",
                json!({"runtimeConfig": {"aliases": {"weft": ["db"]}}}),
            )
            .json();
        assert_eq!(result["cniVersion"], version, "{result}");
        let ips: Vec<&str> = result["ips"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["address"].as_str().unwrap())
            .collect();
        assert!(
            ips.iter()
                .any(|ip| ip.starts_with("10.32.") && ip.ends_with("/32")),
            "{result}"
        );
        assert!(
            ips.iter()
                .any(|ip| ip.starts_with("fd") && ip.ends_with("/128")),
            "{result}"
        );
        assert_eq!(
            result["dns"]["nameservers"],
            json!(["10.47.0.1"]),
            "{result}"
        );
        assert!(
            result["interfaces"]
                .as_array()
                .is_some_and(|i| i.iter().any(|i| i["name"] == "eth0")),
            "{result}"
        );
        let ip = ips
            .iter()
            .find(|ip| ip.starts_with("10."))
            .unwrap()
            .trim_end_matches("/32");
        assert!(
            host.run(&["ping", "-c1", "-W2", ip]).is_ok(),
            "it is in place when ADD returns"
        );
        for name in ["pod-one", "db"] {
            let found = runtime
                .inside(&[
                    "dig",
                    "+short",
                    "@10.47.0.1",
                    &format!("{name}.weft.internal"),
                ])
                .ok();
            assert_eq!(found, ip, "{name}");
        }
        let (_, twice) = error(&runtime.call("ADD", json!({})));
        assert!(!twice.is_empty());
        let previous = json!({"prevResult": result});
        if version != "0.3.1" {
            runtime.call("CHECK", previous.clone()).ok();
            runtime.inside(&["ip", "addr", "flush", "dev", "eth0"]).ok();
            error(&runtime.call("CHECK", previous.clone()));
        }
        runtime.call("DEL", previous).ok();
        assert!(
            !runtime.inside(&["ip", "link", "show", "eth0"]).is_ok(),
            "the interface is still there"
        );
        runtime.call("DEL", json!({})).ok();
        runtime.call_in("DEL", "", json!({})).ok();
        assert!(
            !endpoints(&host).contains(ip),
            "the endpoint is still there"
        );
        host.run(&["ip", "netns", "del", &runtime.netns]).ok();
    }
}

#[test]
fn version_status_and_gc() {
    let lab = Lab::new("cnigc");
    let host = lab.host("h1", &lab.subnet("a"));
    let runtime = Runtime::new(&host, "1.1.0", "keep");
    let versions = runtime.call("VERSION", json!({})).json();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(
            versions["supportedVersions"]
                .as_array()
                .is_some_and(|v| v.contains(&json!(version))),
            "{versions}"
        );
    }
    let (code, _) = error(&runtime.call("STATUS", json!({})));
    assert_eq!(code, 50, "no daemon: the plugin can't serve ADD");
    let (code, message) = error(&runtime.call("ADD", json!({})));
    assert_eq!(code, 11, "try again later: {message}");
    host.up(&[]);
    runtime.call("STATUS", json!({})).ok();
    runtime.call("ADD", json!({})).ok();
    let gone = Runtime::new(&host, "1.1.0", "gone");
    gone.call("ADD", json!({})).ok();
    let by_hand = host.serve("by-hand", &[]);
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "keep", "ifname": "eth0"}]});
    runtime.call("GC", valid).ok();
    assert!(
        !gone.inside(&["ip", "link", "show", "eth0"]).is_ok(),
        "GC left what is not valid"
    );
    assert!(
        runtime.inside(&["ip", "link", "show", "eth0"]).is_ok(),
        "GC took what is valid"
    );
    assert!(
        endpoints(&host).contains(&by_hand.ip().to_string()),
        "GC took what is not CNI's"
    );
    host.run(&["ip", "netns", "del", &runtime.netns]).ok();
    host.run(&["ip", "netns", "del", &gone.netns]).ok();
}

#[test]
fn bad_cni_input_gets_an_error_object() {
    let lab = Lab::new("cnibad");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let runtime = Runtime::new(&host, "1.1.0", "bad");
    let plugin = Host::binary("weft-cni");
    let netns = format!("/run/netns/{}", runtime.netns);
    let good = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "bad"),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/x"),
    ];
    let config = json!({"cniVersion": "1.1.0", "name": "weft", "type": "weft-cni"}).to_string();
    let huge = format!("{{\"x\":\"{}\"}}", "a".repeat(3 << 20));
    for input in [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "{\"cniVersion\":\"9.9.9\",\"name\":\"weft\",\"type\":\"weft-cni\"}",
        &huge,
    ] {
        error(&host.run_env(&good, &[&plugin], input.as_bytes()));
    }
    for (name, value) in [
        ("CNI_COMMAND", "EXPLODE"),
        ("CNI_CONTAINERID", "../../etc"),
        ("CNI_CONTAINERID", ""),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "far-too-long-a-name"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "/etc/passwd"),
        ("CNI_NETNS", "/run/netns/nobody"),
        ("CNI_ARGS", "IP=not-an-ip"),
    ] {
        let mut env = good.to_vec();
        env.retain(|(k, _)| *k != name);
        env.push((name, value));
        error(&host.run_env(&env, &[&plugin], config.as_bytes()));
    }
    assert!(
        !endpoints(&host).contains("container\""),
        "something was attached"
    );
    assert_eq!(host.alive(), 1);
    host.run(&["ip", "netns", "del", &runtime.netns]).ok();
}

/// podman with everything of its own in the lab's directory.
struct Podman<'a> {
    host: &'a Host,
    containers: String,
    storage: String,
}

impl<'a> Podman<'a> {
    fn new(lab: &Lab, host: &'a Host) -> Self {
        let dir = host.dir().join("podman");
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        for sub in ["net.d", "bin", "root/bin", "tmp"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        std::fs::copy(Host::binary("weft-cni"), dir.join("bin/weft-cni")).unwrap();
        let example = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../examples/cni/10-weft.conflist"
        );
        std::fs::copy(example, dir.join("net.d/10-weft.conflist")).unwrap();
        std::fs::write(
            path("containers.conf"),
            format!(
                "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=4096:4096\"]\n\
                 [engine]\nruntime=\"runc\"\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\ntmp_dir=\"{}\"\n\
                 [network]\nnetwork_backend=\"cni\"\ncni_plugin_dirs=[\"{}\",\"/usr/lib/cni\"]\nnetwork_config_dir=\"{}\"\n",
                path("tmp"), path("bin"), path("net.d")
            ),
        )
        .unwrap();
        std::fs::write(
            path("storage.conf"),
            format!(
                "[storage]\ndriver=\"vfs\"\nrunroot=\"{}\"\ngraphroot=\"{}\"\n",
                path("run"),
                path("graph")
            ),
        )
        .unwrap();
        let podman = Self {
            host,
            containers: path("containers.conf"),
            storage: path("storage.conf"),
        };
        podman.make_image(lab, &path("root"), &path("image.tar"));
        podman
    }

    /// An image of nothing but a static busybox.
    fn make_image(&self, _lab: &Lab, root: &str, archive: &str) {
        std::fs::copy("/bin/busybox", format!("{root}/bin/busybox")).unwrap();
        std::os::unix::fs::symlink("busybox", format!("{root}/bin/sh")).unwrap();
        self.host
            .run(&["tar", "-C", root, "-cf", archive, "."])
            .ok();
        self.run(&["import", archive, "busybox"]).ok();
    }

    fn run(&self, args: &[&str]) -> Out {
        let env = [
            ("CONTAINERS_CONF", self.containers.as_str()),
            ("CONTAINERS_STORAGE_CONF", self.storage.as_str()),
        ];
        self.host.run_env(&env, &[&["podman"], args].concat(), &[])
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // conmon and its containers are no children of ours.
        let env = [
            ("CONTAINERS_CONF", self.containers.as_str()),
            ("CONTAINERS_STORAGE_CONF", self.storage.as_str()),
        ];
        self.host
            .run_env(&env, &["podman", "rm", "-af", "-t", "0"], &[]);
    }
}

#[test]
fn podman_containers_join_the_mesh() {
    let lab = Lab::new("podman");
    let [h1, h2] = lab.pair();
    let podman = Podman::new(&lab, &h1);
    let b = h2.serve("b", &[]);
    podman
        .run(&[
            "run",
            "-d",
            "--network",
            "weft",
            "--name",
            "web",
            "busybox",
            "/bin/busybox",
            "httpd",
            "-f",
            "-p",
            "80",
        ])
        .ok();
    lab.wait("its name is known on the other host", 20, || {
        !b.run(&["dig", "+short", "web.weft.internal"])
            .ok()
            .is_empty()
    });
    lab.wait("and it answers", 20, || {
        b.run(&[
            "curl",
            "-sS",
            "-o",
            "/dev/null",
            "--max-time",
            "3",
            "http://web/",
        ])
        .is_ok()
    });
    let resolved = podman.run(&["exec", "web", "/bin/busybox", "nslookup", "b.weft.internal"]);
    assert!(resolved.stdout.contains(&b.ip().to_string()), "{resolved}");
    podman
        .run(&[
            "exec",
            "web",
            "/bin/busybox",
            "ping",
            "-c1",
            "-W3",
            &b.ip().to_string(),
        ])
        .ok();
    let fixed = podman.run(&[
        "run",
        "--rm",
        "--network",
        "weft",
        "--ip",
        "10.32.0.99",
        "busybox",
        "/bin/busybox",
        "ip",
        "addr",
        "show",
        "eth0",
    ]);
    assert!(fixed.stdout.contains("10.32.0.99"), "{fixed}");
    podman.run(&["stop", "-t", "1", "web"]).ok();
    lab.wait("its name is gone", 20, || {
        b.run(&["dig", "+short", "web.weft.internal"])
            .ok()
            .is_empty()
    });
}
