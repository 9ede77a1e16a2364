//! What people and programs write: invitations, API bodies, CNI, small texts.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use weft_core::control::{
    AttachRequest, Attached, CheckRequest, DetachRequest, ErrorBody, NameSpec, NetworkSpec,
    RemoveRequest, ServiceSpec, Status, TokenRequest, parse_port, parse_publish,
};
use weft_core::model::{EndpointId, Label, Now};
use weft_core::node::{Command, Input, Start};
use weft_core::store::Stored;
use weft_core::token::{MAX_ADDRESSES, MAX_MEMBERS, Token};
use weft_core::view::EndpointKind;
use weft_core::wire;

use super::Seen;
use super::doors::{signed, token_text};
use crate::pieces::{cut, join, marked};
use crate::scene::{Host, SCENE, label};

/// Mark 0: text. Mark 1: the body of an invitation, signed and with its checksum.
pub(super) fn token(data: &[u8]) -> Seen {
    let Some((mark, rest)) = data.split_first() else {
        return Seen::Refused;
    };
    let text = match mark & 1 {
        0 => String::from_utf8_lossy(rest).into_owned(),
        _ => token_text(&signed(rest), &SCENE.secret),
    };
    let Ok(token) = Token::parse(&text) else {
        return Seen::Refused;
    };
    let body = token.body();
    assert!(body.members.len() <= MAX_MEMBERS);
    assert!(
        body.members
            .iter()
            .all(|m| m.addresses.len() <= MAX_ADDRESSES)
    );
    let bare: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    assert_eq!(token.text(), bare, "printed as it was read");
    assert!(
        !format!("{token:?}").contains(&bare),
        "a secret is not printed"
    );
    Seen::Taken
}

pub(super) fn token_seeds() -> Vec<Vec<u8>> {
    let text = SCENE.token.text();
    let (head, tail) = text.split_at(70);
    vec![
        marked(0, text.as_bytes()),
        marked(0, format!(" {head}\r\n{tail}\n").as_bytes()),
        marked(1, &wire::encode(SCENE.token.body())),
    ]
}

/// A body of the API: the first octet says which, the rest is JSON. What is read goes on to a node.
pub(super) fn api(data: &[u8]) -> Seen {
    let Some((which, body)) = data.split_first() else {
        return Seen::Refused;
    };
    let command = match which % 10 {
        0 => read::<AttachRequest>(body).map(attach),
        1 => read::<TokenRequest>(body).map(|request| Some(Command::MintToken(request))),
        2 => read::<ServiceSpec>(body).map(|spec| Some(Command::CreateService(spec))),
        3 => read::<ServiceSpec>(body).map(|spec| Some(Command::UpdateService(spec))),
        4 => read::<NameSpec>(body).map(|spec| Some(Command::AddName(spec))),
        5 => read::<DetachRequest>(body).map(|_| None),
        6 => read::<CheckRequest>(body).map(|_| None),
        8 => read::<NetworkSpec>(body).map(|spec| Some(Command::CreateNetwork(spec))),
        9 => read::<RemoveRequest>(body).map(|request| {
            Some(Command::RemoveNode {
                node: request.node,
                force: request.force,
            })
        }),
        // What the command line and the plugin read.
        _ => read::<Attached>(body)
            .map(drop)
            .or_else(|| read::<ErrorBody>(body).map(drop))
            .or_else(|| read::<Status>(body).map(drop))
            .map(|()| None),
    };
    let Some(command) = command else {
        return Seen::Refused;
    };
    if let Some(command) = command {
        obey(command);
    }
    Seen::Taken
}

fn read<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(body: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(body).ok()?;
    let text = serde_json::to_vec(&read).expect("plain data");
    let again: T = serde_json::from_slice(&text).expect("our own words");
    assert_eq!(again, read);
    Some(read)
}

fn attach(request: AttachRequest) -> Option<Command> {
    Some(Command::Attach {
        kind: EndpointKind::Container,
        names: request.names,
        network: request.network.unwrap_or_else(|| label("default")),
        ip: request.ip,
        labels: request.labels,
    })
}

/// A node alone does as it is told, and says so or why not; either way it comes up again.
fn obey(command: Command) {
    let range = weft_core::model::AddressPlan::DEFAULT_RANGE;
    let mut host = Host::begin(1, Start::Found { range }, Stored::default(), Now::default());
    host.pass(std::time::Duration::from_millis(50));
    assert!(host.ready, "nobody else knows more");
    host.input(Input::Command(1, command));
    host.look();
    assert_eq!(host.replies.len(), 1, "one answer to one command");
    super::frames::restarts(&host);
}

pub(super) fn api_seeds() -> Vec<Vec<u8>> {
    let service = json!({"name": "web", "ports": [{"proto": "tcp", "port": 80, "target": 8080,
        "publish": [{"addr": "192.0.2.1", "port": 8080}, {"addr": null, "port": 81}]}],
        "selector": {"tier": "front"}, "method": "maglev"});
    let attach = json!({"target": {"netns": "/run/netns/blue"}, "names": ["web", "db"], "network": "default",
        "ip": "10.32.0.77", "ifname": "eth1", "labels": {"tier": "front"}, "container_id": "abc"});
    let but = json!({"which": {"all-containers-but": ["weft/", [["weft/a", "eth0"]]]}});
    let attached = serde_json::to_value(attached()).expect("plain data");
    let bodies = [
        (0, attach),
        (0, json!({"target": {"pid": 7}})),
        (1, json!({"ttl_secs": 3600, "uses": 1, "reusable": false})),
        (2, service.clone()),
        (
            2,
            json!({"name": "db", "ports": [{"proto": "udp", "port": 53, "target": 53, "publish": []}]}),
        ),
        (3, service),
        (4, json!({"name": "printer", "ip": "198.51.100.7"})),
        (4, json!({"name": "printer", "ip": "2001:db8::7"})),
        (5, json!({"which": {"id": "0102030405060708"}})),
        (
            5,
            json!({"which": {"target": [{"netns": "/run/netns/blue"}, "eth0"]}}),
        ),
        (5, but),
        (6, json!({"which": {"container": ["weft/abc", "eth0"]}})),
        (7, attached),
        (8, json!({"name": "blue", "prefix_len": 24})),
        (8, json!({"name": "green", "subnet": "10.40.0.0/20"})),
        (9, json!({"node": "host-2", "force": true})),
        (7, json!({"error": "no", "kind": "not-found"})),
    ];
    bodies
        .iter()
        .map(|(which, body)| marked(*which, body.to_string().as_bytes()))
        .collect()
}

/// What the daemon tells the plugin.
fn attached() -> Attached {
    Attached {
        id: EndpointId([1, 2, 3, 4, 5, 6, 7, 8]),
        ip: Ipv4Addr::new(10, 32, 0, 7),
        ip6: Ipv6Addr::new(0xfd00, 1, 2, 3, 0, 0, 0x0a20, 7),
        gateway: Ipv4Addr::new(169, 254, 1, 1),
        gateway6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        ifname: "eth0".to_owned(),
        mac: "02:77:00:00:00:07".to_owned(),
        leg: "wv0102030405".to_owned(),
        mtu: 9000,
        dns: Ipv4Addr::new(10, 47, 0, 1),
        domain: "weft.internal".to_owned(),
        names: vec![label("web")],
        network: label("default"),
    }
}

/// What a runtime gives the plugin: standard input, then the four variables.
pub(super) fn cni(data: &[u8]) -> Seen {
    let pieces = cut(data, 5);
    let mut texts = pieces.iter().map(|piece| String::from_utf8_lossy(piece));
    let stdin = pieces.first().copied().unwrap_or_default();
    let _ = texts.next();
    let texts: Vec<_> = texts.collect();
    let variable = |at: usize, or: &'static str| texts.get(at).map_or(or, |text| text.as_ref());
    let variables = [
        variable(0, "abc"),
        variable(1, "/run/netns/blue"),
        variable(2, "eth0"),
        variable(3, ""),
    ];
    let said = weft_cni::fuzz::version(stdin);
    assert!(is_spoken(&said["cniVersion"]));
    match weft_cni::fuzz::add(stdin, variables, &attached()) {
        Ok(added) => {
            assert!(added.checks, "CHECK knows what ADD said");
            assert!(is_spoken(&added.result["cniVersion"]));
            assert!(added.request.names.len() <= 16);
            assert!(
                !added.left_out.concat().contains(char::is_control),
                "a log is no terminal"
            );
            assert!(
                added
                    .request
                    .container_id
                    .is_some_and(|id| id.contains('/'))
            );
            let ifname = added.request.ifname;
            assert!(ifname.len() <= 15 && !ifname.contains('/'));
            Seen::Taken
        }
        Err(error) => {
            let text = error["msg"].as_str().unwrap_or_default();
            assert!(error["code"].as_u64().is_some_and(|code| code > 0));
            assert!(!text.is_empty() && text.len() < 4096, "one line: {text}");
            assert!(is_spoken(&error["cniVersion"]));
            Seen::Refused
        }
    }
}

fn is_spoken(version: &Value) -> bool {
    ["0.3.1", "0.4.0", "1.0.0", "1.1.0"].contains(&version.as_str().unwrap_or_default())
}

pub(super) fn cni_seeds() -> Vec<Vec<u8>> {
    let plain =
        json!({"cniVersion": "1.0.0", "name": "weft", "type": "weft-cni", "network": "default"});
    let rich = json!({"cniVersion": "1.1.0", "name": "pods", "socket": "/run/weft/weft.sock",
        "runtimeConfig": {"aliases": {"pods": ["db", "store"]}, "ips": ["10.32.0.9/16"], "mac": "", "portMappings": []},
        "args": {"cni": {"ips": null, "K8S_POD_NAME": "shop-0"}},
        "cni.dev/valid-attachments": [{"containerID": "abc", "ifname": "eth0"}],
        "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "lo"}], "ips": [], "routes": [],
            "dns": {"search": ["a.b"]}}});
    let old = json!({"cniVersion": "0.3.1", "name": "weft", "runtimeConfig": null, "args": null, "prevResult": null});
    let args = "IgnoreUnknown=1;K8S_POD_NAME=shop-1;IP=10.32.0.9;FOO=BAR";
    let call = |conf: &Value, args: &str| {
        join([
            conf.to_string().as_bytes(),
            b"abc",
            b"/run/netns/blue",
            b"eth0",
            args.as_bytes(),
        ])
    };
    vec![call(&plain, ""), call(&rich, args), call(&old, args)]
}

/// Small texts: ports, names, a host's resolv.conf.
pub(super) fn text(data: &[u8]) -> Seen {
    let text = String::from_utf8_lossy(data);
    let ports = parse_port(&text);
    let publish = parse_publish(&text);
    if let Ok((port, target, _)) = &ports {
        assert!(*port > 0 && *target > 0);
    }
    if let Ok((_, host, port, _)) = &publish {
        assert!(*host > 0 && *port > 0);
    }
    let name = Label::parse(&text);
    if let Err(error) = &name {
        assert!(
            !error.to_string().contains(char::is_control),
            "for terminals too"
        );
    }
    if let Ok(name) = &name {
        let bytes = name.as_str().as_bytes();
        assert!((1..=63).contains(&bytes.len()));
        assert!(
            bytes
                .iter()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        );
        assert_eq!(Label::parse(name.as_str()).as_ref(), Ok(name));
    }
    let resolvers = weft_dns::parse_resolv_conf(&text);
    assert!(resolvers.len() <= 4);
    let taken = ports.is_ok() || publish.is_ok() || name.is_ok() || !resolvers.is_empty();
    Seen::when(taken)
}

pub(super) fn text_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "80:8080/udp",
        "[2001:db8::1]:8080:80/tcp",
        "192.0.2.1:53:53/udp",
        "web-1",
        "WEB",
        "search a.b\nnameserver 192.0.2.1\nnameserver  2001:db8::1 # c\nnameserver fe80::1%eth0\n",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::identity;

    #[test]
    fn an_invitation_signed_here_is_the_nodes_own() {
        let body = wire::encode(SCENE.token.body());
        let made = signed(&body);
        assert_eq!(SCENE.token.body().issuer, identity(1).id());
        assert!(token_text(&made, &SCENE.secret).starts_with("weft1_"));
    }
}
