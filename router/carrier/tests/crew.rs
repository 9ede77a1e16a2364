//! While little is to be done, one thread of a carrier does it all; when there is much, the others help. Alone in its
//! process: it looks at that process's threads.

#![allow(clippy::unwrap_used)]

mod pair;

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use pair::{Pair, Under};

/// How often each receiver of this process has given up its processor so far.
fn pauses() -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let receiver = |path: std::path::PathBuf| {
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        let (_, counts) = status.split_once("\nvoluntary_ctxt_switches:")?;
        let counts = counts
            .split_whitespace()
            .filter_map(|n| n.parse::<u64>().ok());
        let is_receiver = name.starts_with("weft-receive");
        is_receiver.then(|| (path.display().to_string(), counts.sum()))
    };
    let tasks = tasks.flatten().map(|task| task.path());
    tasks.filter_map(receiver).collect()
}

/// The `n`th datagram there and back.
fn ask(from: &UdpSocket, to: &UdpSocket, n: u32) {
    let mut buffer = [0; 2048];
    from.send_to(&n.to_be_bytes(), to.local_addr().unwrap())
        .unwrap();
    let (len, asker) = to.recv_from(&mut buffer).unwrap();
    to.send_to(&buffer[..len], asker).unwrap();
    assert_eq!(from.recv(&mut buffer).unwrap(), 4);
    assert_eq!(buffer[..4], n.to_be_bytes());
}

/// Throws datagrams both ways for as long as the receivers sleep all the same.
fn flood_until_they_help(from: &UdpSocket, to: &UdpSocket, before: &BTreeMap<String, u64>) {
    let end = Instant::now() + Duration::from_secs(20);
    let mut paused = 0;
    // One pause, and it knows that it shall help; more, and it does.
    while paused < 5 {
        assert!(Instant::now() < end, "nobody helps the sender");
        for _ in 0..1000 {
            // What is too much is lost, as it should be.
            let _ = from.send_to(&[7; 1000], to.local_addr().unwrap());
            let _ = to.send_to(&[7; 1000], from.local_addr().unwrap());
        }
        let now = pauses();
        paused = now.iter().map(|(task, n)| n - before[task]).max().unwrap();
    }
}

/// Takes what is left of the flood.
fn swallow(socket: &UdpSocket) {
    let patience = Some(Duration::from_millis(200));
    socket.set_read_timeout(patience).unwrap();
    while socket.recv(&mut [0; 2048]).is_ok() {}
    socket.set_read_timeout(Some(pair::PATIENCE)).unwrap();
}

/// Exchanges a datagram now and then until no receiver wakes up for it.
fn ask_until_they_sleep(from: &UdpSocket, to: &UdpSocket) -> BTreeMap<String, u64> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let before = pauses();
        for n in 0..10 {
            // Not a wait for something: traffic of which there is little.
            std::thread::sleep(Duration::from_millis(10));
            ask(from, to, n);
        }
        if pauses() == before {
            return before;
        }
        assert!(Instant::now() < end, "the receivers do not rest");
    }
}

#[test]
fn receivers_rest_while_there_is_little_and_help_when_there_is_much() {
    for under in [Under::V4, Under::V6] {
        let mut pair = Pair::new(under);
        pair.connect();
        let from = pair.a.domain.udp(&format!("{}:0", pair.a.overlay));
        let to = pair.b.domain.udp(&format!("{}:7000", pair.b.overlay));
        for _ in 0..2 {
            let resting = ask_until_they_sleep(&from, &to);
            assert_eq!(resting.len(), 4, "two hosts, two sockets each");
            flood_until_they_help(&from, &to, &resting);
            swallow(&from);
            swallow(&to);
        }
    }
}
