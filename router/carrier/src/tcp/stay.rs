//! Who may stay: how long a connection is open that shows nothing, and who makes room when there are too many.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::connection::Origin;

/// Connections in all: descriptors are a process's most limited good, and others of the daemon need some.
pub(super) const MAX_CONNECTIONS: usize = 640;
/// Those along which nothing authentic has come yet, of all sources together.
const MAX_STRANGERS: usize = 128;
/// The same from one IPv4 address or IPv6 /64: hosts behind one NAT that come back together are a few.
const MAX_OF_SOURCE: usize = 16;

/// Time for somebody who came to show something: its first datagram is under way with the connection's last handshake.
const PATIENCE_MS: u64 = 4_000;
/// Time for whoever was answered, or is called by us, to go on.
const ANSWERED_MS: u64 = 15_000;
/// A connection is kept for so long behind the last that came along it, unless it is somebody's path.
const IDLE_MS: u64 = 30_000;
/// Datagrams that are looked at before something authentic came, or was answered.
const ALLOWANCE: u32 = 64;

/// What decides how long a connection stays. Times are milliseconds since the start.
#[derive(Debug)]
pub(super) struct Stay {
    pub(super) origin: Origin,
    until: AtomicU64,
    is_proven: AtomicBool,
    allowance: AtomicU32,
}

impl Stay {
    fn new(origin: Origin, until: u64) -> Self {
        Self {
            origin,
            until: until.into(),
            is_proven: false.into(),
            allowance: ALLOWANCE.into(),
        }
    }

    pub(super) fn accepted(now: u64) -> Self {
        Self::new(Origin::Accepted, now + PATIENCE_MS)
    }

    pub(super) fn dialled(now: u64) -> Self {
        Self::new(Origin::Dialled, now + PATIENCE_MS)
    }

    /// The core sent something along it.
    pub(super) fn on_answered(&self, now: u64) {
        self.until.fetch_max(now + ANSWERED_MS, Ordering::Relaxed);
        self.allowance.store(ALLOWANCE, Ordering::Relaxed);
    }

    /// Something authentic came along it.
    pub(super) fn on_authentic(&self, now: u64) {
        self.until.fetch_max(now + IDLE_MS, Ordering::Relaxed);
        self.is_proven.store(true, Ordering::Relaxed);
    }

    /// May one more datagram be looked at?
    pub(super) fn takes_one(&self) -> bool {
        if self.is_proven() {
            return true;
        }
        let one_less = |left: u32| left.checked_sub(1);
        let relaxed = Ordering::Relaxed;
        let taken = self.allowance.fetch_update(relaxed, relaxed, one_less);
        taken.is_ok()
    }

    pub(super) fn is_proven(&self) -> bool {
        self.is_proven.load(Ordering::Relaxed)
    }

    /// Somebody came and has shown nothing yet.
    pub(super) fn is_stranger(&self) -> bool {
        self.origin == Origin::Accepted && !self.is_proven()
    }

    /// Is its time over, unless it is somebody's path?
    pub(super) fn is_over(&self, now: u64) -> bool {
        now >= self.until.load(Ordering::Relaxed)
    }
}

/// Which stranger has to go when one more comes from `from`. They are in the order in which they came.
pub(super) fn makes_room(strangers: &[(usize, IpAddr)], from: IpAddr) -> Option<usize> {
    let source = source(from);
    let mut of_source = strangers
        .iter()
        .filter(|(_, ip)| self::source(*ip) == source);
    let oldest = of_source.next();
    if oldest.is_some() && of_source.count() + 1 >= MAX_OF_SOURCE {
        return oldest.map(|(token, _)| *token);
    }
    let is_full = strangers.len() >= MAX_STRANGERS;
    strangers
        .first()
        .filter(|_| is_full)
        .map(|(token, _)| *token)
}

fn source(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip) >> 64 | 1 << 127,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_has_seconds_and_a_member_its_time() {
        let stay = Stay::accepted(1000);
        assert!(!stay.is_over(1000) && stay.is_stranger());
        assert!(stay.is_over(1000 + PATIENCE_MS));
        stay.on_answered(2000);
        assert!(!stay.is_over(1000 + PATIENCE_MS) && stay.is_stranger());
        assert!(stay.is_over(2000 + ANSWERED_MS));
        stay.on_authentic(3000);
        assert!(!stay.is_stranger() && !stay.is_over(2000 + ANSWERED_MS));
        assert!(stay.is_over(3000 + IDLE_MS));
    }

    #[test]
    fn who_shows_nothing_is_heard_out_for_a_while_only() {
        let stay = Stay::accepted(0);
        assert!((0..ALLOWANCE).all(|_| stay.takes_one()));
        assert!(!stay.takes_one());
        stay.on_answered(0);
        assert!(stay.takes_one());
        stay.on_authentic(0);
        assert!((0..1000).all(|_| stay.takes_one()));
    }

    #[test]
    fn one_source_makes_room_for_itself_and_all_together_for_anybody() {
        let ip = |n: u32| IpAddr::V4((0xc000_0200 + n).into());
        let mut strangers = vec![(1, ip(1)), (2, ip(2))];
        assert_eq!(makes_room(&strangers, ip(3)), None);
        strangers.extend((0..MAX_OF_SOURCE).map(|n| (10 + n, ip(9))));
        assert_eq!(makes_room(&strangers, ip(3)), None);
        assert_eq!(makes_room(&strangers, ip(9)), Some(10));
        let others = (strangers.len()..MAX_STRANGERS).map(|n| (100 + n, ip(100 + n as u32)));
        strangers.extend(others.collect::<Vec<_>>());
        assert_eq!(makes_room(&strangers, ip(3)), Some(1));
        let v6 = |text: &str| text.parse::<IpAddr>().unwrap();
        let crowd: Vec<_> = (0..MAX_OF_SOURCE)
            .map(|n| (n, v6(&format!("2001:db8::{n:x}"))))
            .collect();
        assert_eq!(makes_room(&crowd, v6("2001:db8::ffff")), Some(0));
        assert_eq!(makes_room(&crowd, v6("2001:db8:0:1::1")), None);
    }
}
