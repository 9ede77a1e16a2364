//! `weft demo`: three hosts on one machine, made of network namespaces, and a story told on them.
//!
//! ```text
//!              router (forwards; the hosts have no other way to each other)
//!   alpha ── 192.0.2.0/24 ──┤├── 198.51.100.0/24 ── beta
//!   gamma ─ 203.0.113.0/24 ─┤├── 198.18.7.0/24 ──── laptop (no weft: a client from outside)
//! ```
//!
//! Real daemons (this very program, `up --foreground`) run in them; nothing is simulated. Everything made is removed at
//! the end, after a failure and after ctrl-C too; what a killed demo left behind, the next one removes.

mod net;
mod part;
mod stage;
mod story;
mod tell;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

pub(crate) use part::Part;
pub(crate) use part::run as run_part;
pub(crate) use stage::PART;

/// What `weft demo` was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DemoOptions {
    /// Leave it running at the end, until ctrl-C.
    pub(crate) keep: bool,
    /// JSON at the end; the story goes to standard error then.
    pub(crate) json: bool,
}

/// Runs the demo to its end, and removes what it made however that went.
pub(crate) fn run(options: &DemoOptions) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    watch_signals(Arc::clone(&stop))?;
    let teller = tell::Teller::new(options.json);
    let mut stage = stage::Stage::new(Arc::clone(&stop))?;
    let told = story::tell(&mut stage, &teller, options.keep);
    teller.line("");
    teller.line("Taking everything down.");
    let left = stage.strike();
    let mut figures = told?;
    figures.leftovers = left;
    if figures.leftovers.is_empty() {
        teller.good("nothing is left: no namespace, no process, no file");
    } else {
        teller.line(&format!("left behind: {}", figures.leftovers.join(", ")));
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        teller.end(&figures);
    }
    Ok(())
}

/// Ctrl-C and its kin only set a flag: every wait of the demo looks at it, and the way out is the ordinary one.
fn watch_signals(stop: Arc<AtomicBool>) -> anyhow::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    // Before any other thread is started, so that all inherit it. Children do too: weft's own
    // commands take it off again, and the others end by themselves.
    signals.thread_block()?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            stop.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}
