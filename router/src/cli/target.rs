//! From `--netns`, `--pid` and `--container` to what the daemon attaches.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;
use weft_core::control::Target;
use weft_core::model::Label;

use super::TargetArgs;

/// What was pointed at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its namespace.
    pub(crate) target: Target,
    /// The container's name, if it can be one in DNS.
    pub(crate) name: Option<Label>,
}

impl TargetArgs {
    /// Looks up what the flags mean; `None` when none is given.
    pub(crate) fn find(&self) -> anyhow::Result<Option<Found>> {
        let plain = |target| Found { target, name: None };
        if let Some(netns) = &self.netns {
            return Ok(Some(plain(Target::Netns(netns_path(netns)?))));
        }
        if let Some(pid) = self.pid {
            return Ok(Some(plain(Target::Pid(pid))));
        }
        self.container.as_deref().map(container).transpose()
    }
}

/// A bare word is a name as `ip netns` knows it; anything else a path, made absolute because the daemon's working
/// directory is not ours.
fn netns_path(text: &str) -> anyhow::Result<String> {
    if text.is_empty() {
        bail!("--netns needs a path or a name in /run/netns");
    }
    let path = if text.contains('/') {
        std::path::absolute(text).with_context(|| format!("\"{text}\" is no path"))?
    } else {
        Path::new("/run/netns").join(text)
    };
    if !path.exists() {
        bail!(
            "there is no network namespace {}; `ip netns` lists those with names",
            path.display()
        );
    }
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("the path {} is not UTF-8", path.display()))
}

#[derive(Debug, Deserialize)]
struct Inspected {
    #[serde(rename = "Name", default)]
    name: String,
    #[serde(rename = "State")]
    state: InspectedState,
}

#[derive(Debug, Deserialize)]
struct InspectedState {
    #[serde(rename = "Pid", default)]
    pid: u32,
}

/// Asks docker, then podman, whichever is there.
fn container(id: &str) -> anyhow::Result<Found> {
    // The runtimes' own rule for ids and names; it also keeps a flag from being smuggled in.
    let fine = !id.is_empty()
        && id.len() <= 128
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if !fine {
        bail!("\"{id}\" is neither a container's id nor its name");
    }
    let mut refusals = Vec::new();
    for runtime in ["docker", "podman"] {
        match inspect(runtime, id) {
            Ok(Some(inspected)) => return found(id, inspected),
            Ok(None) => {}
            Err(error) => refusals.push(format!("{runtime}: {error:#}")),
        }
    }
    if refusals.is_empty() {
        bail!(
            "neither docker nor podman is installed here; point at the container with --pid or --netns"
        );
    }
    bail!(
        "can't look up container {id} ({}); is it running? Otherwise point at it with --pid or --netns",
        refusals.join("; ")
    )
}

/// `None` when the runtime is not installed.
fn inspect(runtime: &str, id: &str) -> anyhow::Result<Option<Inspected>> {
    let output = Command::new(runtime)
        .args(["container", "inspect", id])
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{}", said.lines().next().unwrap_or("it failed").trim());
    }
    let mut all: Vec<Inspected> =
        serde_json::from_slice(&output.stdout).context("its answer can't be understood")?;
    all.pop().map(Some).context("it knows none")
}

fn found(id: &str, inspected: Inspected) -> anyhow::Result<Found> {
    if inspected.state.pid == 0 {
        bail!("container {id} is not running; start it first");
    }
    Ok(Found {
        target: Target::Pid(inspected.state.pid),
        name: Label::parse(inspected.name.trim_start_matches('/')).ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_or_container_is_refused_before_anybody_is_asked() {
        for bad in ["", "no-such-namespace-here", "/nonexistent/ns"] {
            assert!(netns_path(bad).is_err(), "{bad}");
        }
        for bad in ["", "-v", "a b", "a;b", "../x", &"x".repeat(200)] {
            let error = container(bad).unwrap_err().to_string();
            assert!(error.contains("neither a container's id"), "{bad}: {error}");
        }
        assert_eq!(
            netns_path("/proc/self/ns/net").unwrap(),
            "/proc/self/ns/net"
        );
    }

    #[test]
    fn an_inspected_container_gives_its_process_and_name() {
        let inspected = |pid| Inspected {
            name: "/web-1".to_owned(),
            state: InspectedState { pid },
        };
        let got = found("abc", inspected(42)).unwrap();
        assert_eq!(got.target, Target::Pid(42));
        assert_eq!(got.name.unwrap().as_str(), "web-1");
        assert!(
            found("abc", inspected(0))
                .unwrap_err()
                .to_string()
                .contains("not running")
        );
    }
}
