//! Whether this host lets the kernel seal what goes to peers (`weft up --esp`).

mod race;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};
use weft_core::carriers::Esp;
use weft_core::crypto::Cipher;

/// What was measured is kept there, in the state's directory.
const MEASURED: &str = "esp.json";
/// The kernel must be so much faster, in hundredths: less is chance, and a second carrier is more to go wrong.
const WORTH_IT: u64 = 110;

/// What a person asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EspUse {
    /// weft itself seals.
    Never,
    /// The kernel does, wherever both ends ask for that and can, if it is faster on this host.
    #[default]
    Auto,
    /// The kernel does, wherever both ends ask for that and can.
    Always,
}

/// Neither of these.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is neither never nor auto nor always")]
pub(crate) struct UnknownEspUse(String);

impl FromStr for EspUse {
    type Err = UnknownEspUse;

    fn from_str(text: &str) -> Result<Self, UnknownEspUse> {
        match text {
            "never" => Ok(EspUse::Never),
            "auto" => Ok(EspUse::Auto),
            "always" => Ok(EspUse::Always),
            other => Err(UnknownEspUse(other.to_owned())),
        }
    }
}

/// What one TCP connection between two namespaces of this machine carried, octets a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Speeds {
    /// Sealed by the kernel.
    kernel: u64,
    /// Sealed by weft.
    own: u64,
}

impl Speeds {
    fn kernel_is_faster(self) -> bool {
        self.kernel.saturating_mul(100) > self.own.saturating_mul(WORTH_IT)
    }
}

/// Speeds, and what they hold for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Measured {
    /// The kernel's release.
    kernel: String,
    /// weft's version.
    weft: String,
    /// `None` where they could not be measured.
    speeds: Option<Speeds>,
}

impl Measured {
    fn holds_for(&self, kernel: &str, weft: &str) -> bool {
        self.kernel == kernel && self.weft == weft
    }
}

/// What this host can do of what was asked. The kernel is tried where it matters alone, anew at each start, as modules come
/// and go with kernels; how fast it is, once for each kernel and version of weft. `progress` is told before what takes a
/// second. Blocks.
pub(crate) fn ability(
    wanted: EspUse,
    cipher: Cipher,
    state_dir: &Path,
    progress: impl FnOnce(&str),
) -> Esp {
    if wanted == EspUse::Never {
        return Esp::Unasked;
    }
    if let Err(error) = weft_kernel::esp_available() {
        return lacking(wanted, &error);
    }
    if wanted == EspUse::Always {
        return Esp::Ready;
    }
    match speeds(cipher, state_dir, progress) {
        Some(speeds) if speeds.kernel_is_faster() => {
            info!(kernel = %shown(speeds.kernel), weft = %shown(speeds.own), "the kernel seals faster: it is offered to peers");
            Esp::Ready
        }
        Some(speeds) => {
            info!(kernel = %shown(speeds.kernel), weft = %shown(speeds.own), "the kernel seals no faster: weft itself does");
            Esp::Unasked
        }
        None => {
            debug!("whether the kernel seals faster could not be measured: weft itself does");
            Esp::Unasked
        }
    }
}

/// Who insisted on it is warned, and peers' status says why.
fn lacking(wanted: EspUse, error: &dyn std::error::Error) -> Esp {
    if wanted == EspUse::Always {
        warn!(%error, "this kernel has no ESP: weft itself seals");
        return Esp::Lacking(error.to_string());
    }
    debug!(%error, "this kernel has no ESP: weft itself seals");
    Esp::Unasked
}

fn shown(octets: u64) -> String {
    format!("{:.2} Gbit/s", octets as f64 * 8.0 / 1e9)
}

/// As they were measured, now or before.
fn speeds(cipher: Cipher, state_dir: &Path, progress: impl FnOnce(&str)) -> Option<Speeds> {
    let path = state_dir.join(MEASURED);
    let kernel = release();
    let weft = env!("CARGO_PKG_VERSION").to_owned();
    if let Some(known) = load(&path).filter(|known| known.holds_for(&kernel, &weft)) {
        return known.speeds;
    }
    progress("measuring whether the kernel seals faster than weft (once)");
    let speeds = race::run(cipher)
        .inspect_err(|error| {
            let error = format!("{error:#}");
            info!(%error, "whether the kernel seals faster can't be measured: weft itself does");
        })
        .ok();
    let measured = Measured {
        kernel,
        weft,
        speeds,
    };
    if let Err(error) = save(&path, &measured) {
        warn!(%error, "can't keep what was measured: the next start measures again");
    }
    speeds
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// What is not there or not whole is measured again.
fn load(path: &Path) -> Option<Measured> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn save(path: &Path, measured: &Measured) -> io::Result<()> {
    let bytes = serde_json::to_vec(measured).map_err(io::Error::other)?;
    let new: PathBuf = path.with_extension("new");
    fs::write(&new, bytes)?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_faster_is_not_faster() {
        let speeds = |kernel, own| Speeds { kernel, own };
        assert!(!speeds(100, 100).kernel_is_faster());
        assert!(!speeds(110, 100).kernel_is_faster());
        assert!(speeds(111, 100).kernel_is_faster());
        assert!(!speeds(0, 0).kernel_is_faster());
    }

    #[test]
    fn what_was_measured_holds_for_its_kernel_and_version_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MEASURED);
        assert_eq!(load(&path), None);
        let measured = Measured {
            kernel: release(),
            weft: env!("CARGO_PKG_VERSION").to_owned(),
            speeds: Some(Speeds { kernel: 2, own: 1 }),
        };
        save(&path, &measured).unwrap();
        let never = |_: &str| panic!("it was measured already");
        let known = || speeds(Cipher::Aes256Gcm, dir.path(), never);
        assert_eq!(known(), measured.speeds);
        assert!(!measured.holds_for("another kernel", &measured.weft));
        assert!(!measured.holds_for(&measured.kernel, "another version"));
        // That it can't be measured is not found out at each start, either.
        let speeds = None;
        save(&path, &Measured { speeds, ..measured }).unwrap();
        assert_eq!(known(), None);
        fs::write(&path, "{").unwrap();
        assert_eq!(load(&path), None);
    }
}
