//! The life of a daemon, from the first descriptor to the last; and the next one of the same process, when a successor took
//! over and then failed.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tracing::warn;
use weft_core::control::SOCKET;
use weft_kernel::{Host, HostState};

use super::handover::{Inheritance, Outcome, Predecessor};
use super::serve::{self, End};
use super::service_manager;
use super::start::{bring_up, prepare};
use super::state::StateDir;
use super::stop::{self, Signals, Underway};
use crate::background::Ready;
use crate::config::UpConfig;

/// Runs a daemon until it is asked to stop.
pub(crate) fn run(config: UpConfig, ready: Ready) -> Result<()> {
    keep_memory_private()?;
    let missing = weft_kernel::preflight();
    if !missing.is_empty() {
        let lines: Vec<String> = missing
            .iter()
            .map(|m| format!("{} ({}): {}", m.what, m.found, m.remedy))
            .collect();
        bail!("this host lacks what weft needs: {}", lines.join("; "));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("weft")
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let outcome = runtime.block_on(live(config, ready));
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

/// Keys are in this process's memory: it must not end in a core file, and no other process may look into it.
fn keep_memory_private() -> Result<()> {
    nix::sys::prctl::set_dumpable(false)
        .context("can't keep other processes out of the daemon's memory")?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)
        .context("can't switch core files off")
}

/// One life; and another one with the same descriptors for as long as successors take over and then fail.
async fn live(config: UpConfig, ready: Ready) -> Result<()> {
    // Before anything is made: a signal ends a start in order too, instead of killing it half-way.
    let mut signals = Signals::listen()?;
    // Outlives what is begun here: a predecessor goes on once the line to it is gone.
    let mut predecessor = None;
    let inheritance = if config.take_over {
        let mut called = Predecessor::call(&config.run_dir).await?;
        let inheritance = called.inherit().await?;
        predecessor = Some(called);
        inheritance
    } else {
        service_manager::kept()
    };
    let mut end = one_life(&config, &ready, &mut signals, inheritance, &mut predecessor).await?;
    while let End::HandedOver(handing) = end {
        let domain = Path::new(weft_kernel::NETNS_DIR).join(&handing.netns);
        let back = match handing.finish().await {
            Outcome::Returned(back) => back,
            Outcome::TakenOver(relays) => {
                relays.outlast(&mut signals, &domain).await;
                return Ok(());
            }
        };
        end = one_life(&config, &ready, &mut signals, back, &mut predecessor)
            .await
            .context("weft can't go on after a handover that failed; start it with: weft up")?;
    }
    Ok(())
}

async fn one_life(
    config: &UpConfig,
    ready: &Ready,
    signals: &mut Signals,
    inheritance: Inheritance,
    predecessor: &mut Option<Predecessor>,
) -> Result<End> {
    let host = Arc::new(Host::current()?);
    // Locked until all is taken back: who starts next must not find half of it.
    let state = StateDir::open(&config.state_dir)?;
    let begun = prepare(config, &state, &host)?;
    let (name, fresh) = (begun.domain_name.clone(), begun.fresh);
    let mut underway = Underway::default();
    let before = (inheritance, predecessor.as_mut());
    let outcome = tokio::select! {
        outcome = bring_up(config, ready, host.clone(), begun, before, &mut underway) => outcome,
        () = signals.heard() => Err(anyhow!("interrupted while it was starting; nothing of it is left running")),
    };
    match outcome {
        Ok(running) => {
            if let Some(predecessor) = predecessor.take() {
                predecessor.end().await;
            }
            underway.socket = Some(config.run_dir.join(SOCKET));
            serve::serve(running, underway, signals, ready).await
        }
        Err(error) => {
            let known = underway.end().await;
            if fresh {
                take_back(config, &host, &name, known);
            }
            Err(error)
        }
    }
}

fn take_back(config: &UpConfig, host: &Host, name: &str, known: Option<HostState>) {
    let mut state = stop::known_host_state(known, &config.state_dir);
    let troubles = host.teardown(name, &mut state);
    for trouble in &troubles {
        warn!(%trouble, "could not take back what was begun");
    }
    // `weft down` needs it for what is left.
    if troubles.is_empty() {
        let _ = fs::remove_file(config.state_dir.join(stop::HOST_STATE));
    }
}
