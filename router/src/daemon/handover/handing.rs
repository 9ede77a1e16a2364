//! The predecessor's side, once it has ended all but what moves packets and answers names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info};
use weft_carrier::Carrier;

use super::{Inheritance, Successor};
use crate::daemon::publish::Placeholders;
use crate::daemon::relays::Relays;

/// Somebody may be reading its counters this very moment.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);

/// A daemon that serves nobody any more, with what goes on until the successor takes it.
pub(in crate::daemon) struct Handing {
    /// The domain's name.
    pub(in crate::daemon) netns: String,
    pub(in crate::daemon) successor: Successor,
    pub(in crate::daemon) inheritance: Inheritance,
    pub(in crate::daemon) carrier: Option<Arc<Carrier>>,
    pub(in crate::daemon) name_server: weft_dns::Handle,
    pub(in crate::daemon) placeholders: Placeholders,
}

/// How it ended.
pub(in crate::daemon) enum Outcome {
    /// The successor is up; what is still carried here.
    TakenOver(Relays),
    /// It is not, and nothing has come of it: the descriptors for a new life.
    Returned(Inheritance),
}

impl Handing {
    /// Hands everything over. Whatever becomes of it, nothing of this daemon reads a descriptor afterwards.
    pub(in crate::daemon) async fn finish(self) -> Outcome {
        let Self {
            mut successor,
            inheritance,
            carrier,
            name_server,
            placeholders,
            netns: _,
        } = self;
        let wanted = successor.give(&inheritance).await;
        // Its tasks end with it, the listeners stay open in the inheritance.
        drop(placeholders);
        name_server.shutdown().await;
        stop(carrier).await;
        let taken = match wanted {
            Ok(()) => successor.leave_to_it().await,
            Err(error) => Err(error),
        };
        match taken {
            Ok(()) => {
                info!("another daemon has taken over");
                Outcome::TakenOver(inheritance.relays)
            }
            Err(error) => {
                error!(%error, "the daemon that was to take over did not come up; this one goes on");
                Outcome::Returned(inheritance)
            }
        }
    }
}

/// Returns when its threads have ended: two readers would each get a part of the packets.
async fn stop(carrier: Option<Arc<Carrier>>) {
    let begun = Instant::now();
    let mut left = carrier;
    while let Some(carrier) = left.take() {
        match Arc::try_unwrap(carrier) {
            Ok(carrier) => {
                // It joins threads, and does so in a moment.
                let _ = tokio::task::spawn_blocking(move || carrier.stop()).await;
            }
            Err(shared) if begun.elapsed() < CARRIER_PATIENCE => {
                left = Some(shared);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(_) => error!("the packet threads can't be stopped: somebody still uses them"),
        }
    }
}
