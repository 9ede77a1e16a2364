//! What attackers on the way see and can do.

use std::net::IpAddr;
use std::time::Duration;

use weft_lab::{Container, Frame, Host, Lab};

const WEFT: u16 = 6783;
/// Words that stand in the conversations below.
const MARKER: &str = "a-secret-of-the-containers";

fn talking_pair(lab: &Lab) -> ([Host; 2], Container, Container) {
    talking(lab, lab.pair())
}

fn talking(lab: &Lab, [h1, h2]: [Host; 2]) -> ([Host; 2], Container, Container) {
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    lab.wait("containers talk", 20, || {
        a.ask("udp", &format!("{}:80", b.ip())).is_ok()
    });
    ([h1, h2], a, b)
}

/// Is it an address of the overlay?
fn is_overlay(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(ip) => ip.octets()[0] == 10 && (32..48).contains(&ip.octets()[1]),
        IpAddr::V6(ip) => ip.octets()[0] == 0xfd,
    }
}

fn touches_overlay(frame: &Frame) -> bool {
    [frame.src, frame.dst].into_iter().flatten().any(is_overlay)
}

/// Every datagram's packet behind its length, as `lab-tool replay` reads them.
fn recording(lab: &Lab, name: &str, frames: &[Frame], to: &Host) -> String {
    let mut bytes = Vec::new();
    for frame in frames
        .iter()
        .filter(|f| f.is_udp(WEFT) && f.dst == Some(to.v4().into()))
    {
        // Ethernet pads short frames: the packet's own length counts.
        let packet = frame.packet();
        let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
        bytes.extend(&packet[..length]);
    }
    let path = lab.dir().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_string_lossy().into_owned()
}

fn replay(lab: &Lab, file: &str, flags: &[&str]) -> u32 {
    let tool = Host::binary("lab-tool");
    let args: Vec<&str> = [tool.as_str(), "replay", file]
        .iter()
        .chain(flags)
        .copied()
        .collect();
    lab.router().run(&args).ok().parse().unwrap()
}

/// UDP datagrams that the host's sockets were given so far.
fn datagrams_in(host: &Host) -> u64 {
    let table = host.run(&["cat", "/proc/net/snmp"]).ok();
    let mut rows = table.lines().filter_map(|l| l.strip_prefix("Udp: "));
    let (names, values) = (rows.next().unwrap(), rows.next().unwrap());
    let at = names.split(' ').position(|n| n == "InDatagrams").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

fn times(heard: &str, text: &str) -> usize {
    heard
        .lines()
        .filter(|l| l.ends_with(&format!(" {text}")))
        .count()
}

#[test]
fn a_capture_on_the_way_shows_no_plaintext() {
    let lab = Lab::new("plain");
    let ([h1, _h2], a, b) = talking_pair(&lab);
    let capture = h1.capture("wire");
    for to in [format!("{}:80", b.ip()), format!("[{}]:80", b.ip6())] {
        for proto in ["tcp", "udp"] {
            let answer = a.tool(&["ask", proto, &to, "--text", MARKER]).ok();
            assert!(answer.ends_with(MARKER), "{answer}");
        }
    }
    a.run(&["dig", "+short", "b.weft.internal"]).ok();
    let frames = capture.stop();
    assert!(
        frames.iter().filter(|f| f.is_udp(WEFT)).count() > 8,
        "the conversation was not on this wire"
    );
    for frame in &frames {
        assert!(!frame.contains(MARKER.as_bytes()), "readable: {frame:?}");
        assert!(
            !frame.contains(b"internal"),
            "a name in the clear: {frame:?}"
        );
        assert!(
            !touches_overlay(frame),
            "an overlay address outside of a tunnel: {frame:?}"
        );
    }
    let other = frames
        .iter()
        .find(|f| matches!(f.proto, Some(6 | 17)) && !f.is_udp(WEFT));
    assert!(
        other.is_none(),
        "something else than weft's datagrams: {other:?}"
    );
}

#[test]
fn replayed_and_forged_datagrams_get_nothing_through() {
    let lab = Lab::new("replay");
    // A train that the kernel cuts is captured whole on a veth, longer than anything that could be sent again.
    let single: &[&str] = &["--no-offload", "gso"];
    let hosts = lab.pair_with(&lab.subnet("a"), [single, single]);
    let ([_h1, h2], a, b) = talking(&lab, hosts);
    let capture = h2.capture("wire");
    a.tool(&["count", &format!("{}:80", b.ip()), "100", "--text", "once"])
        .ok();
    lab.wait("the last one arrived", 10, || {
        times(&b.heard(), "once-99") == 1
    });
    let file = recording(&lab, "recorded", &capture.stop(), &h2);
    let before = b.heard();
    let arrived = datagrams_in(&h2);
    let mut sent = 0;
    for _ in 0..3 {
        sent += replay(&lab, &file, &[]);
        sent += replay(&lab, &file, &["--flip"]);
    }
    assert!(sent >= 60, "too little was replayed: {sent}");
    lab.wait("what was replayed reached the daemon's socket", 10, || {
        datagrams_in(&h2) >= arrived + u64::from(sent)
    });
    // What comes after them in the same tunnel shows that they were dealt with.
    a.tool(&[
        "ask",
        "udp",
        &format!("{}:80", b.ip()),
        "--text",
        "afterwards",
    ])
    .ok();
    let heard = b.heard();
    for n in 0..100 {
        let count = times(&heard, &format!("once-{n}"));
        assert!(count <= 1, "datagram {n} arrived {count} times");
    }
    let news = heard.lines().count() - before.lines().count();
    let own = times(&heard, "afterwards");
    assert_eq!(
        news,
        own,
        "something else came through:\n{}",
        &heard[before.len()..]
    );
    assert_eq!(h2.alive(), 2);
}

#[test]
fn with_the_daemon_dead_nothing_of_the_mesh_leaves_by_the_default_route() {
    let lab = Lab::new("dead");
    let ([h1, _h2], a, b) = talking_pair(&lab);
    let host_ip = h1.overlay_ip();
    h1.kill9();
    let capture = h1.capture("wire");
    for to in [
        format!("{}:80", b.ip()),
        format!("[{}]:80", b.ip6()),
        "10.32.200.200:80".to_owned(),
        "10.47.0.77:80".to_owned(),
    ] {
        a.tool(&["ask", "udp", &to, "--text", MARKER, "--wait", "2"]);
        a.tool(&["ask", "tcp", &to, "--text", MARKER, "--wait", "2"]);
        h1.tool(&["ask", "udp", &to, "--text", MARKER, "--wait", "2"]);
    }
    // The capture does see what leaves.
    h1.run(&["ping", "-c1", "-W2", &h1.subnet_gateway().to_string()])
        .ok();
    let frames = capture.stop();
    assert!(
        frames
            .iter()
            .any(|f| f.src == Some(h1.v4().into()) && f.proto == Some(1))
    );
    let leak = frames
        .iter()
        .find(|f| touches_overlay(f) || f.contains(MARKER.as_bytes()));
    assert!(leak.is_none(), "it left the host ({host_ip}): {leak:?}");
}

#[test]
fn packets_for_a_dead_host_stay_inside() {
    let lab = Lab::new("deadpeer");
    let ([h1, h2], a, b) = talking_pair(&lab);
    h2.isolate();
    lab.wait("h1 knows that h2 is gone", 30, || h1.alive() == 1);
    let capture = h1.capture("wire");
    let refused = a.tool(&["ask", "tcp", &format!("{}:80", b.ip()), "--wait", "3"]);
    assert!(!refused.is_ok());
    let leak = capture.stop().into_iter().find(touches_overlay);
    assert!(leak.is_none(), "it left the host: {leak:?}");
}

#[test]
fn a_token_s_secret_is_nowhere_to_be_read() {
    let lab = Lab::new("secret");
    let a = lab.subnet("a");
    let (h1, h2) = (lab.host("h1", &a), lab.host("h2", &a));
    h1.up(&[]);
    let token = h1.token(&[]);
    h2.join_with(&token).ok();
    lab.wait_members(&[h1.clone(), h2.clone()]);
    for host in [&h1, &h2] {
        assert!(!host.log().contains(&token), "in {}'s log", host.name());
        let pid = host.daemon_pid();
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(
                !String::from_utf8_lossy(&bytes).contains(&token),
                "in the {file} of {}'s daemon",
                host.name()
            );
        }
    }
    for (path, mode) in [(h1.state_dir(), 0o700), (h1.socket(), 0o600)] {
        use std::os::unix::fs::PermissionsExt;
        let found = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{} is {found:o}", path.display());
    }
}

#[test]
fn a_container_sends_only_from_its_own_addresses() {
    let lab = Lab::new("spoof");
    let ([h1, _h2], a, b) = talking_pair(&lab);
    let stranger6 = a
        .ip6()
        .to_string()
        .replace(&a.ip6().to_string(), "fd00:bad::1");
    a.run(&["ip", "addr", "add", "10.32.77.77/32", "dev", "eth0"])
        .ok();
    a.run(&[
        "ip",
        "addr",
        "add",
        &format!("{stranger6}/128"),
        "dev",
        "eth0",
        "nodad",
    ])
    .ok();
    let before = b.heard().lines().count();
    for _ in 0..5 {
        a.tool(&[
            "ask",
            "udp",
            &format!("{}:80", b.ip()),
            "--from",
            "10.32.77.77:0",
            "--text",
            "spoofed",
            "--wait",
            "1",
        ]);
    }
    a.tool(&[
        "ask",
        "udp",
        &format!("[{}]:80", b.ip6()),
        "--from",
        &format!("[{stranger6}]:0"),
        "--text",
        "spoofed",
        "--wait",
        "1",
    ]);
    a.run(&["ip", "link", "set", "eth0", "address", "02:00:00:00:00:99"])
        .ok();
    a.tool(&[
        "ask",
        "udp",
        &format!("{}:80", b.ip()),
        "--text",
        "spoofed",
        "--wait",
        "1",
    ]);
    let heard = b.heard();
    assert_eq!(
        times(&heard, "spoofed"),
        0,
        "{}",
        heard.lines().skip(before).collect::<Vec<_>>().join("\n")
    );
    // A neighbour on the same host is not reached either.
    let c = h1.serve("c", &[]);
    a.tool(&[
        "ask",
        "udp",
        &format!("{}:80", c.ip()),
        "--from",
        "10.32.77.77:0",
        "--text",
        "spoofed",
        "--wait",
        "1",
    ]);
    assert_eq!(times(&c.heard(), "spoofed"), 0);
}

#[test]
fn a_container_reaches_nothing_of_its_host_but_names() {
    let lab = Lab::new("tohost");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let mut server = host.spawn_tool("server", &["serve", "--name", "private", "--port", "7777"]);
    server.wait_for("ready", Duration::from_secs(5));
    let a = host.serve("a", &[]);
    for target in [
        host.overlay_ip().to_string(),
        "10.47.0.1".to_owned(),
        "169.254.1.1".to_owned(),
    ] {
        let out = a.tool(&["ask", "tcp", &format!("{target}:7777"), "--wait", "2"]);
        assert!(!out.is_ok(), "{out}");
    }
    assert!(!server.stdout().contains("tcp "), "{}", server.stdout());
    for port in ["6783", "6784"] {
        assert!(
            !a.tool(&["ask", "udp", &format!("10.47.0.1:{port}"), "--wait", "1"])
                .is_ok()
        );
    }
    a.run(&["dig", "+short", "a.weft.internal"]).ok();
}

/// Datagrams are gathered, bundled, joined and parted again on the way, and their checksums left to the last kernel.
#[test]
fn datagrams_keep_their_boundaries_their_octets_and_their_order() {
    const COUNT: u32 = 5000;
    let lab = Lab::new("datagrams");
    let [h1, h2] = lab.pair();
    let thrower = h1.serve("thrower", &[]);
    let tool = Host::binary("lab-tool");
    for family in ["v4", "v6"] {
        let name = format!("catcher-{family}");
        let command = [tool.as_str(), "catch", "4000", &COUNT.to_string()];
        let catcher = Container::start(&h2, &name, &[], &command);
        let to = match family {
            "v4" => format!("{}:4000", catcher.ip()),
            _ => format!("[{}]:4000", catcher.ip6()),
        };
        thrower.tool(&["throw", &to, &COUNT.to_string()]).ok();
        let all = format!("{COUNT} whole, 0 broken, late: [], lost: []");
        lab.wait("all datagrams are there", 20, || {
            catcher.heard().contains("whole")
        });
        assert!(catcher.heard().contains(&all), "{}", catcher.heard());
    }
}
