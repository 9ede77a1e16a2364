//! Doors for the fuzz targets in `tests/fuzz`, and for nothing else: all that happens to a runtime's words but for the
//! talk with the daemon.

use serde_json::Value;
use weft_core::control::{AttachRequest, Attached};

use crate::config::{Environment, NetConf, Version};
use crate::{result, verbs};

/// What the plugin would ask of the daemon, and would print when it got `attached`.
#[derive(Debug)]
pub struct Added {
    /// To the daemon.
    pub request: AttachRequest,
    /// To the runtime.
    pub result: Value,
    /// Lines for the runtime's log.
    pub left_out: Vec<String>,
    /// Does the result, given back for CHECK, name the addresses?
    pub checks: bool,
}

/// ADD, with standard input and CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS as a runtime gives them. The error is
/// what would be printed.
pub fn add(stdin: &[u8], variables: [&str; 4], attached: &Attached) -> Result<Added, Value> {
    let mut version = Version::NEWEST;
    let mut added = || {
        let conf = NetConf::parse(stdin, &mut version)?;
        let environment = Environment::new(variables);
        let (request, left_out) = verbs::request(&conf, &environment)?;
        let netns = environment.netns()?;
        let result = result::render(attached, netns, conf.version, conf.previous.as_ref());
        Ok(Added {
            checks: result::names_addresses(&result, attached),
            request,
            left_out,
            result,
        })
    };
    let outcome: Result<Added, crate::error::CniError> = added();
    outcome.map_err(|error| error.json(version))
}

/// VERSION.
pub fn version(stdin: &[u8]) -> Value {
    verbs::version(stdin)
}
