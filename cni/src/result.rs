//! CNI's success result, in the version that was asked for.

use serde_json::{Map, Value, json};
use weft_core::control::Attached;

use crate::config::Version;

/// Ours, after that of the plugins before us if there were any.
pub(crate) fn render(
    attached: &Attached,
    netns: &str,
    version: Version,
    previous: Option<&Value>,
) -> Value {
    let mut result = match previous {
        Some(Value::Object(before)) => before.clone(),
        _ => Map::new(),
    };
    result.insert("cniVersion".to_owned(), json!(version.name()));
    let index = append(
        &mut result,
        "interfaces",
        vec![interface(attached, netns, version)],
    );
    append(&mut result, "ips", ips(attached, version, index));
    append(&mut result, "routes", routes(attached));
    result.insert("dns".to_owned(), dns(attached, previous));
    Value::Object(result)
}

/// Adds to the list and returns how many there were. What is no list is no result of CNI's and gives way.
fn append(result: &mut Map<String, Value>, key: &str, new: Vec<Value>) -> usize {
    let list = result.entry(key).or_insert_with(|| json!([]));
    if !list.is_array() {
        *list = json!([]);
    }
    let Value::Array(list) = list else {
        return 0;
    };
    let before = list.len();
    list.extend(new);
    before
}

fn interface(attached: &Attached, netns: &str, version: Version) -> Value {
    let mut interface = json!({ "name": attached.ifname, "mac": attached.mac, "sandbox": netns });
    if version >= Version::V110 {
        interface["mtu"] = json!(attached.mtu);
    }
    interface
}

fn ips(attached: &Attached, version: Version, interface: usize) -> Vec<Value> {
    let mut ips = vec![
        json!({ "address": format!("{}/32", attached.ip), "gateway": attached.gateway, "interface": interface }),
        json!({ "address": format!("{}/128", attached.ip6), "gateway": attached.gateway6, "interface": interface }),
    ];
    // Up to 0.4.0 the family was told in words.
    if version < Version::V100 {
        ips[0]["version"] = json!("4");
        ips[1]["version"] = json!("6");
    }
    ips
}

fn routes(attached: &Attached) -> Vec<Value> {
    vec![
        json!({ "dst": "0.0.0.0/0", "gw": attached.gateway }),
        json!({ "dst": "::/0", "gw": attached.gateway6 }),
    ]
}

/// weft's server alone: it forwards what is not its own, and musl takes the first NXDOMAIN of all it is given.
fn dns(attached: &Attached, previous: Option<&Value>) -> Value {
    let mut search = vec![json!(attached.domain)];
    let before = previous
        .and_then(|p| p.pointer("/dns/search"))
        .and_then(Value::as_array);
    search.extend(before.into_iter().flatten().cloned());
    search.dedup();
    json!({ "nameservers": [attached.dns], "domain": attached.domain, "search": search })
}

/// CHECK: does the result of ADD still name the attachment's addresses?
pub(crate) fn names_addresses(previous: &Value, attached: &Attached) -> bool {
    let Some(ips) = previous.get("ips").and_then(Value::as_array) else {
        return false;
    };
    let has = |wanted: String| {
        ips.iter()
            .any(|ip| ip.get("address").and_then(Value::as_str) == Some(wanted.as_str()))
    };
    has(format!("{}/32", attached.ip)) && has(format!("{}/128", attached.ip6))
}
