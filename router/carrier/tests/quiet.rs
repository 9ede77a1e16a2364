//! A carrier without traffic costs nothing. Alone in its process: it measures that process.

#![allow(clippy::unwrap_used)]

mod pair;

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use pair::{Pair, Under};

fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let of =
        |t: nix::sys::time::TimeVal| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000);
    of(usage.user_time()) + of(usage.system_time())
}

#[test]
fn an_idle_carrier_sleeps() {
    let mut pair = Pair::new(Under::V4);
    pair.connect();
    pair.connect();
    let before = cpu_time();
    // Not a wait for something: the time over which it is measured.
    std::thread::sleep(Duration::from_secs(1));
    let used = cpu_time() - before;
    assert!(used < Duration::from_millis(100), "{used:?} in one second");
}
