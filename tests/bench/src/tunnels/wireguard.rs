//! WireGuard in user space: wireguard-go as Debian has it, and boringtun.

use std::path::{Path, PathBuf};
use std::time::Duration;

use weft_lab::{Host, Spawned};

use crate::pair::{Ground, Pair};

const PORT: &str = "51820";

/// One end: its device (the control sockets of all lie in one directory) and its keys.
struct Side<'a> {
    host: &'a Host,
    device: String,
    prefix: String,
    private: PathBuf,
    public: String,
}

pub(super) fn make_go(_: Option<&Path>) -> Pair {
    make("wgo", |device| {
        vec![
            "wireguard-go".to_owned(),
            "--foreground".to_owned(),
            device.to_owned(),
        ]
    })
}

pub(super) fn make_boringtun(tools: Option<&Path>) -> Pair {
    let program = tools
        .map(|dir| dir.join("boringtun-cli"))
        .filter(|path| path.exists());
    let program = program.map_or("boringtun-cli".to_owned(), |path| {
        path.display().to_string()
    });
    make("wbt", move |device| {
        let flags = ["--foreground", "--disable-drop-privileges", device];
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        std::iter::once(program.clone()).chain(flags).collect()
    })
}

fn make(short: &str, command: impl Fn(&str) -> Vec<String>) -> Pair {
    let ground = Ground::new(short);
    let sides: Vec<Side<'_>> = ground
        .sides()
        .into_iter()
        .map(|(host, _, prefix)| side(short, host, prefix))
        .collect();
    let mut daemons = Vec::new();
    for (own, other) in [(&sides[0], &sides[1]), (&sides[1], &sides[0])] {
        let argv = command(&own.device);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        daemons.push(own.host.spawn("wireguard", &argv));
        let socket = PathBuf::from(format!("/var/run/wireguard/{}.sock", own.device));
        ground
            .lab
            .wait("the device is there", 10, || socket.exists());
        connect(own, other);
    }
    let parts = daemons
        .into_iter()
        .map(|daemon| Box::new(Ended(daemon)) as _);
    let parts = parts.collect();
    drop(sides);
    ground.finish(parts)
}

fn side<'a>(short: &str, host: &'a Host, prefix: String) -> Side<'a> {
    let private = host.dir().join("private");
    let key = host.run(&["wg", "genkey"]).ok();
    let public = host.run_with(&["wg", "pubkey"], key.as_bytes()).ok();
    std::fs::write(&private, key).expect("writing a key");
    Side {
        host,
        device: format!("{short}{}-{}", std::process::id(), host.name()),
        prefix,
        private,
        public,
    }
}

fn connect(own: &Side<'_>, other: &Side<'_>) {
    let private = own.private.to_str().expect("the lab's paths are text");
    let endpoint = format!("{}:{PORT}", other.host.v4());
    let listen = [
        "wg",
        "set",
        &own.device,
        "listen-port",
        PORT,
        "private-key",
        private,
    ];
    let peer = [
        "peer",
        &other.public,
        "endpoint",
        &endpoint,
        "allowed-ips",
        "0.0.0.0/0",
    ];
    own.host.run(&[&listen[..], &peer[..]].concat()).ok();
    let space = own.host.space();
    space
        .ip(&["link", "set", &own.device, "mtu", "1420", "up"])
        .ok();
    space
        .ip(&["route", "add", &own.prefix, "dev", &own.device])
        .ok();
}

/// A daemon that takes its control socket along when it is told to end, as it does not when it is killed.
struct Ended(Spawned);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.terminate(Duration::from_secs(5));
    }
}
