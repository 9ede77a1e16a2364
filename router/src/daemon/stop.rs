//! Stopping: with everything removed (`weft down`), or with everything left for the next start to take over.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use weft_kernel::{Host, HostState};

use super::core_thread::{Core, Message};
use super::kernel_thread::Kernel;
use super::state::StateDir;

/// The row of the host's state as it was before weft changed it.
pub(crate) const HOST_STATE: &str = "host-state.json";
/// Peers are told before we go; this long at most.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);

/// The signals that ask a daemon to end.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on they no longer kill.
    pub(super) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("can't listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one. Cancel safety: one that came stays to be heard.
    pub(super) async fn heard(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What of a daemon runs by itself, and goes on until it is told to end.
#[derive(Default)]
pub(super) struct Underway {
    pub(super) core: Option<(Core, JoinHandle<()>)>,
    pub(super) kernel: Option<(Kernel, JoinHandle<HostState>)>,
    pub(super) socket: Option<PathBuf>,
}

impl Underway {
    /// Nobody is let in any more.
    pub(super) fn close_door(&mut self) {
        if let Some(socket) = self.socket.take() {
            let _ = fs::remove_file(socket);
        }
    }

    /// Ends it, and waits until nothing of it touches the kernel any more; how the host was before, if it was changed.
    pub(super) async fn end(mut self) -> Option<HostState> {
        self.close_door();
        if let Some((kernel, _)) = &self.kernel {
            kernel.stop();
        }
        if let Some((core, _)) = &self.core {
            core.tell(Message::Stop);
        }
        let wait = tokio::task::spawn_blocking(move || {
            if let Some((_, thread)) = self.core {
                let _ = thread.join();
            }
            self.kernel.and_then(|(_, thread)| thread.join().ok())
        });
        wait.await.ok().flatten()
    }
}

/// Removes what a daemon that is not there any more left: after `kill -9`, `weft down` still cleans up.
pub(crate) fn remove_leftovers(state_dir: &Path, run_dir: &Path) -> Result<bool> {
    if !has_identity(state_dir) {
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

/// Opening a state makes one where there is none.
fn has_identity(state_dir: &Path) -> bool {
    state_dir.join("identity.key").exists()
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

/// The domain of the node whose state is here, whether or not its daemon got so far as to make one.
pub(crate) fn domain_of(state_dir: &Path) -> Option<String> {
    if !has_identity(state_dir) {
        return None;
    }
    let id = StateDir::open(state_dir).ok()?.identity_id().ok()?;
    Some(domain_name(&id))
}

/// The domain's namespace name.
pub(crate) fn domain_name(node: &weft_core::model::NodeId) -> String {
    format!("weft-{}", node.short())
}

/// What is at hand, or else what was kept, if that can be read: enough to take back what was changed.
pub(crate) fn known_host_state(known: Option<HostState>, state_dir: &Path) -> HostState {
    known
        .or_else(|| load_host_state(state_dir).ok())
        .unwrap_or_default()
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
