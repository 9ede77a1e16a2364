//! From `--port`, `--publish` and `--select` to a service, and from a service and changes to the next one.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, bail};
use weft_core::control::{ServiceSpec, parse_port, parse_publish};
use weft_core::model::Proto;
use weft_core::view::{Method, Publish, ServicePort};

use super::{ServiceArgs, ServiceUpdateArgs};

/// One `--port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    port: u16,
    target: u16,
    proto: Proto,
}

/// One `--publish`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    addr: Option<IpAddr>,
    host_port: u16,
    port: u16,
    proto: Proto,
}

/// For clap.
pub(crate) fn port(text: &str) -> Result<Port, String> {
    let (port, target, proto) = parse_port(text)?;
    Ok(Port {
        port,
        target,
        proto,
    })
}

/// For clap.
pub(crate) fn publication(text: &str) -> Result<Publication, String> {
    let (addr, host_port, port, proto) = parse_publish(text)?;
    Ok(Publication {
        addr,
        host_port,
        port,
        proto,
    })
}

/// The service that `weft service create` describes.
pub(crate) fn created(args: &ServiceArgs) -> anyhow::Result<ServiceSpec> {
    let mut ports = service_ports(&args.ports)?;
    publish(&mut ports, &args.publish)?;
    Ok(ServiceSpec {
        name: args.name.clone(),
        ports,
        selector: selector(&args.select)?,
        method: Method::default(),
    })
}

/// What `present` becomes by `weft service update`.
pub(crate) fn updated(
    present: ServiceSpec,
    args: &ServiceUpdateArgs,
) -> anyhow::Result<ServiceSpec> {
    let untouched = args.ports.is_empty()
        && args.publish.is_empty()
        && args.select.is_empty()
        && !args.no_publish
        && !args.no_select;
    if untouched {
        bail!("nothing to change; give --port, --publish, --no-publish, --select or --no-select");
    }
    let mut next = present;
    if !args.ports.is_empty() {
        let keep = args.publish.is_empty() && !args.no_publish;
        next.ports = replaced_ports(&next.ports, service_ports(&args.ports)?, keep)?;
    }
    if args.no_publish || !args.publish.is_empty() {
        for port in &mut next.ports {
            port.publish.clear();
        }
        publish(&mut next.ports, &args.publish)?;
    }
    if args.no_select || !args.select.is_empty() {
        next.selector = selector(&args.select)?;
    }
    Ok(next)
}

/// Publications go with the port they belong to; one whose port is gone would silently stop answering, so it is told.
fn replaced_ports(
    old: &[ServicePort],
    mut new: Vec<ServicePort>,
    keep: bool,
) -> anyhow::Result<Vec<ServicePort>> {
    if !keep {
        return Ok(new);
    }
    for before in old.iter().filter(|p| !p.publish.is_empty()) {
        let after = new
            .iter_mut()
            .find(|p| (p.port, p.proto) == (before.port, before.proto))
            .with_context(|| {
                format!(
                    "port {}/{} is published; say with --publish or --no-publish what becomes of that",
                    before.port, before.proto
                )
            })?;
        after.publish.clone_from(&before.publish);
    }
    Ok(new)
}

fn service_ports(ports: &[Port]) -> anyhow::Result<Vec<ServicePort>> {
    let mut made: Vec<ServicePort> = Vec::new();
    for port in ports {
        if made
            .iter()
            .any(|p| (p.port, p.proto) == (port.port, port.proto))
        {
            bail!("--port {}/{} is given twice", port.port, port.proto);
        }
        made.push(ServicePort {
            proto: port.proto,
            port: port.port,
            target: port.target,
            publish: Vec::new(),
        });
    }
    Ok(made)
}

fn publish(ports: &mut [ServicePort], publications: &[Publication]) -> anyhow::Result<()> {
    let mut seen: Vec<(Option<IpAddr>, u16, Proto)> = Vec::new();
    for publication in publications {
        let Publication {
            addr,
            host_port,
            port,
            proto,
        } = *publication;
        let clash = seen.iter().any(|(a, h, p)| {
            (*h, *p) == (host_port, proto) && (a.is_none() || addr.is_none() || *a == addr)
        });
        if clash {
            bail!("--publish takes port {host_port}/{proto} twice");
        }
        seen.push((addr, host_port, proto));
        let Some(target) = ports
            .iter_mut()
            .find(|p| (p.port, p.proto) == (port, proto))
        else {
            bail!(
                "--publish {host_port}:{port}/{proto} names no port of the service; add --port {port}/{proto}"
            );
        };
        target.publish.push(Publish {
            addr,
            port: host_port,
        });
    }
    Ok(())
}

/// A map of `K=V`; the same key with two values can't be meant.
pub(crate) fn selector(pairs: &[(String, String)]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if let Some(other) = map.insert(key.clone(), value.clone())
            && other != *value
        {
            bail!("{key} can't be both {other} and {value}");
        }
    }
    Ok(map)
}
