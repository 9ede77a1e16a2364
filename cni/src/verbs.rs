//! ADD, DEL, CHECK, STATUS, GC and VERSION.

use serde_json::{Value, json};
use weft_core::control::{
    AttachRequest, Attached, CheckRequest, DetachRequest, Detached, Status, Target, Which,
};

use crate::config::{Environment, NetConf, Version};
use crate::daemon;
use crate::error::{CniError, Code};
use crate::result;

/// VERSION. It must answer whatever it is given: it is how a runtime finds out what to give.
pub(crate) fn version(input: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(input).ok();
    let version = asked
        .as_ref()
        .and_then(|conf| conf.get("cniVersion"))
        .and_then(Value::as_str)
        .and_then(Version::parse)
        .unwrap_or(Version::NEWEST);
    json!({ "cniVersion": version.name(), "supportedVersions": Version::names() })
}

/// All others. Only ADD has something to print.
pub(crate) fn run(
    command: &str,
    conf: &NetConf,
    environment: &Environment,
) -> Result<Option<Value>, CniError> {
    match command {
        "ADD" => add(conf, environment).map(Some),
        "DEL" => del(conf, environment).map(|()| None),
        "CHECK" => since(conf, Version::V040, command)
            .and_then(|()| check(conf, environment))
            .map(|()| None),
        "STATUS" => since(conf, Version::V110, command)
            .and_then(|()| status(conf))
            .map(|()| None),
        "GC" => since(conf, Version::V110, command)
            .and_then(|()| collect_garbage(conf))
            .map(|()| None),
        _ => Err(CniError::new(
            Code::Environment,
            format!(
                "CNI_COMMAND \"{command:.20}\" is not one of ADD, DEL, CHECK, STATUS, GC, VERSION"
            ),
        )),
    }
}

fn since(conf: &NetConf, first: Version, command: &str) -> Result<(), CniError> {
    if conf.version >= first {
        return Ok(());
    }
    Err(CniError::new(
        Code::Version,
        format!(
            "{command} came with CNI {}; the configuration says {}",
            first.name(),
            conf.version.name()
        ),
    ))
}

fn add(conf: &NetConf, environment: &Environment) -> Result<Value, CniError> {
    let (request, left_out) = request(conf, environment)?;
    for line in left_out {
        eprintln!("weft-cni: {line}");
    }
    let attached: Attached = daemon::post(&conf.socket, "/v1/attach", &request)?;
    Ok(result::render(
        &attached,
        environment.netns()?,
        conf.version,
        conf.previous.as_ref(),
    ))
}

/// What ADD asks of the daemon, and what of the runtime's words it leaves out.
pub(crate) fn request(
    conf: &NetConf,
    environment: &Environment,
) -> Result<(AttachRequest, Vec<String>), CniError> {
    let args = environment.args()?;
    conf.check_wishes(&args)?;
    let (names, left_out) = conf.names(&args);
    let request = AttachRequest {
        target: Target::Netns(environment.netns()?.to_owned()),
        names,
        network: conf.network.clone(),
        ip: conf.address(&args)?,
        ifname: environment.ifname()?.to_owned(),
        labels: Default::default(),
        container_id: Some(conf.key(environment.container()?)),
    };
    Ok((request, left_out))
}

fn del(conf: &NetConf, environment: &Environment) -> Result<(), CniError> {
    let which = which(conf, environment)?;
    let done = daemon::post::<Detached>(&conf.socket, "/v1/detach", &DetachRequest { which });
    match done {
        Ok(_) => Ok(()),
        // The namespace took the interface with it, and a daemon that starts lets go of attachments that are gone.
        Err(error) if error.code == Code::TryAgainLater && !environment.netns_exists() => Ok(()),
        Err(error) => Err(error),
    }
}

fn check(conf: &NetConf, environment: &Environment) -> Result<(), CniError> {
    environment.netns()?;
    let which = which(conf, environment)?;
    let Some(previous) = &conf.previous else {
        return Err(CniError::new(
            Code::Config,
            "CHECK needs the result of ADD in prevResult",
        ));
    };
    let attached: Attached = daemon::post(&conf.socket, "/v1/check", &CheckRequest { which })?;
    if result::names_addresses(previous, &attached) {
        return Ok(());
    }
    Err(CniError::new(
        Code::Conflict,
        format!(
            "prevResult does not name the addresses that the container has ({}, {})",
            attached.ip, attached.ip6
        ),
    ))
}

fn which(conf: &NetConf, environment: &Environment) -> Result<Which, CniError> {
    let container = conf.key(environment.container()?);
    Ok(Which::Container(
        container,
        environment.ifname()?.to_owned(),
    ))
}

fn status(conf: &NetConf) -> Result<(), CniError> {
    match daemon::get::<Status>(&conf.socket, "/v1/status") {
        Ok(_) => Ok(()),
        Err(error) if error.code == Code::TryAgainLater => {
            Err(CniError::new(Code::NotAvailable, error.text))
        }
        Err(error) => Err(error),
    }
}

fn collect_garbage(conf: &NetConf) -> Result<(), CniError> {
    // Without the list everything would be garbage, and a mistake would take the whole host off the network.
    let Some(valid) = &conf.valid else {
        return Err(CniError::new(
            Code::Config,
            "GC needs the list cni.dev/valid-attachments",
        ));
    };
    let valid = valid
        .iter()
        .map(|(container, ifname)| (conf.key(container), ifname.clone()))
        .collect();
    let request = DetachRequest {
        which: Which::AllContainersBut(conf.key(""), valid),
    };
    daemon::post::<Detached>(&conf.socket, "/v1/detach", &request).map(drop)
}
