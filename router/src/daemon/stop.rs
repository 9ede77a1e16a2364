//! Stopping: with everything removed (`weft down`), or with everything left for the next start to take over.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use weft_kernel::{Host, HostState};

use super::state::StateDir;

/// The row of the host's state as it was before weft changed it.
pub(crate) const HOST_STATE: &str = "host-state.json";
/// Peers are told before we go; this long at most.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// Removes what a daemon that is not there any more left: after `kill -9`, `weft down` still cleans up.
pub(crate) fn remove_leftovers(state_dir: &Path, run_dir: &Path) -> Result<bool> {
    if !state_dir.join("identity.key").exists() {
        return Ok(false);
    }
    let state = StateDir::open(state_dir)?;
    let _ = fs::remove_file(run_dir.join(weft_core::control::SOCKET));
    let id = state.identity_id()?;
    let name = domain_name(&id);
    let found = Path::new(weft_kernel::NETNS_DIR).join(&name).exists()
        || state_dir.join(HOST_STATE).exists();
    let mut host_state = load_host_state(state_dir)?;
    let errors = Host::current()?.teardown(&name, &mut host_state);
    if errors.is_empty() {
        let _ = fs::remove_file(state_dir.join(HOST_STATE));
        return Ok(found);
    }
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    bail!("not everything could be removed: {}", lines.join("; "))
}

/// Forgets identity, cluster and all records.
pub(crate) fn forget(state_dir: &Path) -> Result<()> {
    if !state_dir.exists() {
        return Ok(());
    }
    let _lock = StateDir::open(state_dir)?;
    for name in [
        "identity.key",
        "identity.new",
        "machine",
        "machine.new",
        "weft.redb",
        HOST_STATE,
    ] {
        match fs::remove_file(state_dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("can't remove {}", state_dir.join(name).display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The domain's namespace name.
pub(crate) fn domain_name(node: &weft_core::model::NodeId) -> String {
    format!("weft-{}", node.short())
}

/// As it was kept; nothing was changed yet when there is none.
pub(crate) fn load_host_state(state_dir: &Path) -> Result<HostState> {
    match fs::read(state_dir.join(HOST_STATE)) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).context("the record of the host's state is damaged")
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(HostState::default()),
        Err(error) => Err(error).context("can't read the record of the host's state"),
    }
}
