//! Numbers for `status` and tests: one per fate of a query, never a log line that a flood could fill the disk with.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters that only grow.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Reads them all.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Queries that could be read.
    queries,
    /// Answered from the cluster's own names, negative answers included.
    local,
    /// Answered by one of the host's resolvers.
    forwarded,
    /// No resolver of the host answered: SERVFAIL.
    upstream_failed,
    /// Refused because too many queries wait for the host's resolvers: SERVFAIL.
    busy,
    /// Dropped because the client asks too often.
    rate_dropped,
    /// Not a question we answer: FORMERR, NOTIMP, REFUSED or BADVERS.
    rejected,
    /// Records dropped from resolvers' answers because they point into the cluster or to loopback.
    rebinding_dropped,
    /// TCP connections closed at once because there are too many.
    tcp_refused,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}
