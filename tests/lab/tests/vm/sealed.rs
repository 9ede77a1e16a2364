//! The `udp` carrier: on this kernel as on any, and where the network delays and loses.

use weft_lab::{Lab, converse, has_marker};

use crate::pair::{containers, hosts, overheard};

const SEALED: u16 = 6783;

#[test]
fn containers_on_two_hosts_talk_and_nobody_on_the_wire_understands() {
    let lab = Lab::new("vmudp");
    let hosts = hosts(&lab, [&[], &[]]);
    let pair = containers(&lab, &hosts);
    let frames = overheard(&lab, &hosts[0], &pair, |f| f.is_udp(SEALED));
    assert!(!frames.iter().any(has_marker));
    // This kernel, too, gives the peer a socket of its own beside the one for everybody.
    for host in &hosts {
        let one = host.run(&["ss", "-Hun", "state", "established", "sport = :6783"]);
        assert_eq!(one.ok().lines().count(), 1);
    }
}

/// 20 ms on the way to the second host, and one packet of a hundred lost, each way.
#[test]
fn on_a_network_that_loses_and_delays_a_stream_is_whole_and_the_round_trip_shown() {
    let lab = Lab::new("vmnetem");
    let hosts = hosts(&lab, [&[], &[]]);
    let pair = containers(&lab, &hosts);
    let port = hosts[1].port();
    let netem = ["netem", "delay", "20ms", "loss", "1%"];
    let add = ["tc", "qdisc", "add", "dev"];
    lab.router()
        .run(&[&add[..], &[&port, "root"], &netem].concat())
        .ok();
    hosts[1]
        .run(&[&add[..], &["eth0", "root"], &netem].concat())
        .ok();
    assert!(pair[0].fetches(&pair[1], 3_000_000));
    converse(pair.each_ref());
    lab.wait("weft peers shows the round trip", 30, || {
        let rtt = hosts[0].only_peer()["rtt_ms"].as_f64();
        rtt.is_some_and(|ms| (40.0..400.0).contains(&ms))
    });
    let said = lab.router().run(&["tc", "-s", "qdisc", "show"]).ok();
    assert!(said.contains("loss 1%"), "{said}");
}
