//! Why datagrams are dropped, counted. Nothing is logged per datagram: a log line is a thing to flood.

use std::collections::BTreeMap;

/// Why a datagram, or what was inside, went no further. The state of the session is unchanged by all of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// Too short, too long, of another version or of no known type.
    Malformed,
    /// mac1 does not fit: whoever sent it does not hold the cluster's secret.
    NoSecret,
    /// More handshakes from one address than it may send.
    TooMany,
    /// A cookie was asked for instead of an answer.
    CookieAsked,
    /// The handshake does not decrypt, or what is inside makes no sense.
    BadHandshake,
    /// The sender is no member, or not the one it says it is.
    Stranger,
    /// A handshake seen before, or older than one seen before.
    Stale,
    /// Both sides called each other, and ours goes first.
    Yielded,
    /// No session or half-open handshake under this index.
    UnknownSession,
    /// The seal does not fit.
    Forged,
    /// This counter was received before, or is too old to tell.
    Replayed,
    /// A kind of frame that this version does not know.
    UnknownKind,
    /// The frame's body is not what its kind says.
    BadFrame,
    /// A table is full.
    Full,
    /// Something to pass on for somebody whom we don't reach, or though we pass nothing on.
    NotRelayed,
    /// Our own message, too long to send.
    Oversized,
    /// Our own message, pushed out of the queue or without a peer to go to.
    Unsendable,
}

/// Drops by reason.
#[derive(Clone, Debug, Default)]
pub struct Drops(BTreeMap<DropReason, u64>);

impl Drops {
    /// Counts one.
    pub fn count(&mut self, reason: DropReason) {
        *self.0.entry(reason).or_default() += 1;
    }

    /// How often.
    pub fn of(&self, reason: DropReason) -> u64 {
        self.0.get(&reason).copied().unwrap_or_default()
    }

    /// All that happened at least once.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        self.0.iter().map(|(reason, count)| (*reason, *count))
    }
}
