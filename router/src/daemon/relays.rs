//! Connections of the host's own processes to published ports: the daemon carries them itself, so they end with it. One
//! that was replaced stays for those that it has, and for nothing else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use super::stop::Signals;

/// How often it is looked whether the mesh was taken down meanwhile.
const LOOK: Duration = Duration::from_secs(1);

/// How many there are. Clones count together.
#[derive(Clone, Debug)]
pub(super) struct Relays(Arc<watch::Sender<usize>>);

impl Default for Relays {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

/// One of them, as long as it lives.
pub(super) struct Relayed(Relays);

impl Relays {
    /// One more.
    pub(super) fn begin(&self) -> Relayed {
        self.0.send_modify(|count| *count += 1);
        Relayed(self.clone())
    }

    /// Returns when none is left, a signal asks to end, or the domain is gone and with it where they lead.
    pub(super) async fn outlast(&self, signals: &mut Signals, domain: &Path) {
        let mut counted = self.0.subscribe();
        let count = *counted.borrow_and_update();
        if count == 0 {
            return;
        }
        info!(count, "stays for the connections that it carries");
        let gone = async {
            while domain.exists() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            _ = counted.wait_for(|count| *count == 0) => {}
            () = signals.heard() => {}
            () = gone => {}
        }
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}
