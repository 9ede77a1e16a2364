//! `weft-cni`: a CNI plugin (1.1.0, and 1.0.0, 0.4.0, 0.3.1) that attaches containers to weft.
//!
//! It turns what a runtime says into one request to the daemon of this host, and the answer into CNI's JSON. It keeps
//! no state, touches no network interface and makes no decision that the daemon could make.

#![forbid(unsafe_code)]

mod config;
mod daemon;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod result;
mod verbs;

use std::io::{Read, Write};
use std::process::ExitCode;

use config::{Environment, NetConf, Version};
use error::{CniError, Code};

/// No network configuration comes near it, prevResult included.
const MAX_STDIN: u64 = 1 << 20;

/// What a runtime starts.
pub fn main() -> ExitCode {
    let Some(command) = std::env::var_os("CNI_COMMAND") else {
        eprintln!(
            "weft-cni {} is a CNI plugin: container runtimes start it. Put it in /opt/cni/bin (or /usr/lib/cni) and \
             {{\"cniVersion\":\"1.0.0\",\"name\":\"weft\",\"plugins\":[{{\"type\":\"weft-cni\",\"network\":\"default\"}}]}} \
             in /etc/cni/net.d/weft.conflist. It speaks CNI {}.",
            env!("CARGO_PKG_VERSION"),
            Version::names().join(", ")
        );
        return ExitCode::SUCCESS;
    };
    let mut version = Version::NEWEST;
    match serve(&command.to_string_lossy(), &mut version) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(output)) => print(&output),
        Err(error) => {
            print(&error.json(version));
            ExitCode::FAILURE
        }
    }
}

/// Errors go to standard output too: libcni reads them there, whatever the specification once said.
fn print(output: &serde_json::Value) -> ExitCode {
    let mut text = output.to_string();
    text.push('\n');
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody heard the result, so it must not count as one.
        Err(_) => ExitCode::FAILURE,
    }
}

/// `version` becomes the configuration's as soon as that is known: errors are told in it.
fn serve(command: &str, version: &mut Version) -> Result<Option<serde_json::Value>, CniError> {
    let mut input = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_STDIN + 1)
        .read_to_end(&mut input)
        .map_err(|e| CniError::new(Code::Io, format!("can't read standard input: {e}")))?;
    if input.len() as u64 > MAX_STDIN {
        return Err(CniError::new(
            Code::Decode,
            "the network configuration is larger than 1 MiB",
        ));
    }
    if command == "VERSION" {
        return Ok(Some(verbs::version(&input)));
    }
    let conf = NetConf::parse(&input, version)?;
    let environment = Environment::from_process();
    verbs::run(command, &conf, &environment)
}
