//! Ports for tests that bind a certain one, or that need one at which nobody is.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Below what Linux hands out to whoever asks for any port (32768 to 60999, `ip_local_port_range`): a port that was just
/// let go would soon be another test's.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port of UDP and TCP that nobody has, and that no other test of this process is given.
pub(crate) fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(step < COUNT, "no port is free");
        let port = FIRST + (start + step) % COUNT;
        if is_unused(port) {
            return port;
        }
    }
}

/// The kernel's lists say it without a socket of our own: one of those lives on for a moment in each child that another
/// test has just forked.
fn is_unused(port: u16) -> bool {
    let local = format!(":{port:04X}");
    let stands_in = |list: &str| {
        let list = std::fs::read_to_string(format!("/proc/thread-self/net/{list}"));
        let list = list.unwrap_or_default();
        let mut ends = list
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1));
        ends.any(|end| end.ends_with(&local))
    };
    !["udp", "udp6", "tcp", "tcp6"].into_iter().any(stands_in)
}

/// Waits until nobody has it any more.
pub(crate) fn wait_until_unused(port: u16) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_unused(port) {
        assert!(Instant::now() < end, "{port} is held");
        std::thread::yield_now();
    }
}
