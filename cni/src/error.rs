//! Errors as CNI numbers them (spec, "Error").

use serde_json::{Value, json};

use crate::config::Version;

/// CNI's well-known codes, and ours from 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// Incompatible CNI version.
    Version = 1,
    /// Container unknown or gone.
    UnknownContainer = 3,
    /// Invalid environment variables (CNI_COMMAND, CNI_CONTAINERID, …).
    Environment = 4,
    /// I/O failure; here also the kernel's refusals.
    Io = 5,
    /// Content that can't be decoded.
    Decode = 6,
    /// Invalid network configuration.
    Config = 7,
    /// A transient condition: the runtime should try again.
    TryAgainLater = 11,
    /// STATUS: can't serve ADD.
    NotAvailable = 50,
    /// Ours: taken, in use, or not as it was made.
    Conflict = 100,
    /// Ours: the daemon and this plugin do not understand each other.
    Daemon = 101,
}

/// One error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CniError {
    /// Its number.
    pub(crate) code: Code,
    /// One line for people.
    pub(crate) text: String,
}

impl CniError {
    /// With a code and a line.
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    /// As the runtime reads it.
    pub(crate) fn json(&self, version: Version) -> Value {
        json!({ "cniVersion": version.name(), "code": self.code as u32, "msg": self.text })
    }
}
