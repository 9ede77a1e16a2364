//! When the datagrams of a leg are gathered: a decision from what the kernel has counted.
//!
//! A kernel thread that joins what has piled up lets more than twice as many datagrams through, and costs each lone
//! packet a wake-up. So a leg gets its thread while it is busy with small packets, and loses it when it is not.

use std::collections::BTreeMap;
use std::time::Duration;

/// From so many packets a second on a leg is busy: a quarter of what one processor routes one by one.
const BUSY: u64 = 20_000;
/// Below so many it is not.
const QUIET: u64 = 5_000;
/// For so long, so that nothing goes back and forth with every pause of a sender.
const PATIENCE: Duration = Duration::from_secs(2);
/// Packets of this mean length, in octets, have been joined already: TCP leaves a container in super-packets.
const JOINED: u64 = 2_000;

/// What a device has received since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) packets: u64,
    pub(crate) octets: u64,
}

/// What is to be done to a leg.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// It is new: what joins datagrams is made ready.
    Prepare(String),
    /// Its kernel thread begins or ends.
    Thread(String, bool),
}

/// All legs.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    legs: BTreeMap<String, Leg>,
}

#[derive(Debug)]
struct Leg {
    before: Received,
    has_thread: bool,
    quiet: Duration,
}

impl Gathering {
    /// What the devices have received by now, `elapsed` after the last look; what follows from that. A leg that is not
    /// among them is gone.
    pub(crate) fn look(
        &mut self,
        elapsed: Duration,
        now: &BTreeMap<String, Received>,
    ) -> Vec<Order> {
        self.legs.retain(|name, _| now.contains_key(name));
        let mut orders = Vec::new();
        for (name, received) in now {
            let Some(leg) = self.legs.get_mut(name) else {
                self.legs.insert(name.clone(), Leg::new(*received));
                orders.push(Order::Prepare(name.clone()));
                continue;
            };
            let wants = leg.wants_thread(elapsed, *received);
            if wants != leg.has_thread {
                leg.has_thread = wants;
                orders.push(Order::Thread(name.clone(), wants));
            }
        }
        orders
    }
}

impl Leg {
    fn new(received: Received) -> Self {
        Self {
            before: received,
            has_thread: false,
            quiet: Duration::ZERO,
        }
    }

    fn wants_thread(&mut self, elapsed: Duration, received: Received) -> bool {
        // Another leg of the same name begins anew.
        let packets = received.packets.saturating_sub(self.before.packets);
        let octets = received.octets.saturating_sub(self.before.octets);
        self.before = received;
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let rate = packets.saturating_mul(1000) / millis.max(1);
        let small = octets < packets.saturating_mul(JOINED);
        if rate >= BUSY && small {
            self.quiet = Duration::ZERO;
            return true;
        }
        if rate >= QUIET && small {
            self.quiet = Duration::ZERO;
        } else {
            self.quiet = self.quiet.saturating_add(elapsed);
        }
        self.has_thread && self.quiet < PATIENCE
    }
}

/// The devices of `/proc/net/dev` whose names `is_leg` takes.
pub(crate) fn read(text: &str, is_leg: impl Fn(&str) -> bool) -> BTreeMap<String, Received> {
    let device = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let name = name.trim();
        let mut numbers = numbers.split_ascii_whitespace().map(str::parse);
        let (octets, packets) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        is_leg(name).then(|| (name.to_owned(), Received { packets, octets }))
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(250);

    fn after(gathering: &mut Gathering, packets: u64, length: u64) -> Vec<Order> {
        let octets = packets * length;
        gathering.look(
            LOOK,
            &BTreeMap::from([("wv1".to_owned(), Received { packets, octets })]),
        )
    }

    fn thread(on: bool) -> Vec<Order> {
        vec![Order::Thread("wv1".to_owned(), on)]
    }

    #[test]
    fn a_busy_leg_gets_a_thread_and_a_quiet_one_loses_it_after_a_while() {
        let mut gathering = Gathering::default();
        assert_eq!(
            after(&mut gathering, 0, 64),
            [Order::Prepare("wv1".to_owned())]
        );
        assert_eq!(after(&mut gathering, 100, 64), []);
        assert_eq!(after(&mut gathering, 20_100, 64), thread(true));
        // Neither busy nor quiet: as it is.
        for n in 1..20 {
            assert_eq!(after(&mut gathering, 20_100 + n * 2_000, 64), []);
        }
        for _ in 0..7 {
            assert_eq!(after(&mut gathering, 58_100, 64), []);
        }
        assert_eq!(after(&mut gathering, 58_100, 64), thread(false));
        assert_eq!(after(&mut gathering, 60_100, 64), []);
    }

    #[test]
    fn super_packets_need_no_thread_however_many_there_are() {
        let mut gathering = Gathering::default();
        after(&mut gathering, 0, 0);
        assert_eq!(after(&mut gathering, 20_000, 40_000), []);
    }

    #[test]
    fn a_leg_that_is_made_anew_is_prepared_anew() {
        let mut gathering = Gathering::default();
        after(&mut gathering, 0, 0);
        assert_eq!(after(&mut gathering, 20_000, 64), thread(true));
        assert_eq!(gathering.look(LOOK, &BTreeMap::new()), []);
        assert_eq!(
            after(&mut gathering, 0, 0),
            [Order::Prepare("wv1".to_owned())]
        );
    }

    #[test]
    fn the_kernels_table_is_read() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    \
                    packets errs drop fifo frame compressed multicast|bytes    packets errs\n    lo:       0       0    0\n \
                    wv12ab: 1234567  890    0    0    0     0          0         0\nwh0:12 1 0\n";
        let legs = read(text, |name| name.starts_with("wv"));
        let received = Received {
            packets: 890,
            octets: 1_234_567,
        };
        assert_eq!(legs, BTreeMap::from([("wv12ab".to_owned(), received)]));
    }
}
