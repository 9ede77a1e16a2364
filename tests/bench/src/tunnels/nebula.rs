//! Nebula as Debian has it, without a lighthouse: both hosts know each other's address.

use std::path::Path;

use weft_lab::Host;

use crate::pair::{Ground, Pair};

pub(super) fn make(_: Option<&Path>) -> Pair {
    let ground = Ground::new("nebula");
    let sides = ground.sides();
    let (one, _, _) = &sides[0];
    let authority = ground.lab.dir().join("ca");
    std::fs::create_dir_all(&authority).expect("a directory for the authority");
    let authority = authority.to_str().expect("the lab's paths are text");
    let (certificate, key) = (format!("{authority}/ca.crt"), format!("{authority}/ca.key"));
    one.run(&[
        "nebula-cert",
        "ca",
        "-name",
        "bench",
        "-out-crt",
        &certificate,
        "-out-key",
        &key,
    ])
    .ok();
    let mut daemons = Vec::new();
    for (place, (own, peer, towards)) in sides.iter().enumerate() {
        let (_, _, behind) = &sides[1 - place];
        let file = |name: &str| own.dir().join(name).display().to_string();
        own.run(&[
            "nebula-cert",
            "sign",
            "-ca-crt",
            &certificate,
            "-ca-key",
            &key,
            "-name",
            own.name(),
            "-ip",
            &format!("10.98.0.{}/24", 1 + place),
            "-subnets",
            behind,
            "-out-crt",
            &file("own.crt"),
            "-out-key",
            &file("own.key"),
        ])
        .ok();
        let text = config(own, peer, place, towards, &certificate);
        std::fs::write(file("nebula.yml"), text).expect("writing a configuration");
        daemons
            .push(Box::new(own.spawn("nebula", &["nebula", "-config", &file("nebula.yml")])) as _);
    }
    ground.finish(daemons)
}

fn config(own: &Host, peer: &Host, place: usize, towards: &str, certificate: &str) -> String {
    let dir = own.dir().display();
    let (name, address, other) = (own.name(), peer.v4(), 2 - place);
    format!(
        "pki: {{ ca: {certificate}, cert: {dir}/own.crt, key: {dir}/own.key }}
static_host_map: {{ '10.98.0.{other}': ['{address}:4242'] }}
lighthouse: {{ am_lighthouse: false, hosts: [] }}
listen: {{ host: 0.0.0.0, port: 4242 }}
punchy: {{ punch: true }}
tun:
  dev: nb-{name}
  mtu: 1420
  unsafe_routes: [{{ route: {towards}, via: 10.98.0.{other} }}]
logging: {{ level: warning, format: text }}
firewall:
  outbound: [{{ port: any, proto: any, host: any }}]
  inbound: [{{ port: any, proto: any, host: any }}]
"
    )
}
