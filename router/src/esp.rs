//! Whether this host lets the kernel seal what goes to peers (`weft up --esp`).

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use weft_core::carriers::Esp;

/// What a person asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EspUse {
    /// weft itself seals.
    #[default]
    Never,
    /// The kernel does, wherever both ends ask for that and can.
    Always,
}

/// Neither of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is neither never nor always")]
pub(crate) struct UnknownEspUse(String);

impl FromStr for EspUse {
    type Err = UnknownEspUse;

    fn from_str(text: &str) -> Result<Self, UnknownEspUse> {
        match text {
            "never" => Ok(EspUse::Never),
            "always" => Ok(EspUse::Always),
            other => Err(UnknownEspUse(other.to_owned())),
        }
    }
}

/// What this host can do of what was asked. The kernel is tried where it matters alone.
pub(crate) fn ability(wanted: EspUse) -> Esp {
    match wanted {
        EspUse::Never => Esp::Unasked,
        EspUse::Always => match weft_kernel::esp_available() {
            Ok(()) => Esp::Ready,
            Err(error) => Esp::Lacking(error.to_string()),
        },
    }
}
