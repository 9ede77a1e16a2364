//! Strangers who send handshakes, ten thousand a second: what runs goes on running, and who belongs here gets in.

use std::time::{Duration, Instant};

use weft_lab::{Container, Host, Lab, Spawned};

/// Datagrams of strangers a second.
const RATE: u64 = 10_000;
/// Of one source, and of as many as there may be.
const FEW: &str = "10.66.0.1";
const MANY: &str = "10.66.0.0/16";
/// A stream is watched for so long beside each, and again as long, so many times, if the machine's other work blurs it.
const MILLIS: u64 = 12_000;
const LOOKS: usize = 4;
const PORT: u16 = 6783;
/// Nobody listens there, and the kernel drops what comes before it looks.
const ASIDE: u16 = 9;

/// Two hosts, a stream between containers on them, and a stranger beside the second host.
struct Scene {
    lab: Lab,
    hosts: [Host; 2],
    a: Container,
    b: Container,
    stranger: Host,
}

fn scene(name: &str) -> Scene {
    let lab = Lab::new(name);
    let hosts = lab.pair();
    let a = hosts[0].serve("a", &[]);
    let b = Container::start(
        &hosts[1],
        "b",
        &[],
        &[&Host::binary("lab-tool"), "gulp", "80"],
    );
    let stranger = lab.host("stranger", hosts[1].network());
    hosts[1].space().nft(&format!(
        "table ip lab {{ chain aside {{ type filter hook prerouting priority -400; udp dport {ASIDE} drop; }}; }}\n"
    ));
    let ping = ["ping", "-c1", "-w3", &hosts[1].v4().to_string()];
    stranger.run(&ping).ok();
    Scene {
        lab,
        hosts,
        a,
        b,
        stranger,
    }
}

/// Lines of `at MICROS WHAT N`.
fn marks(text: &str, what: &str) -> Vec<(f64, f64)> {
    let word = |line: &str, at| line.split(' ').nth(at).and_then(|w| w.parse().ok());
    let lines = text.lines().filter(|line| line.contains(what));
    lines
        .filter_map(|line| Some((word(line, 1)?, word(line, 3)?)))
        .collect()
}

/// How much had come by then.
fn octets_by(heard: &[(f64, f64)], micros: f64) -> f64 {
    let at = heard.partition_point(|(when, _)| *when <= micros);
    let (Some(before), Some(after)) = (heard.get(at.wrapping_sub(1)), heard.get(at)) else {
        return f64::NAN;
    };
    let part = (micros - before.0) / (after.0 - before.0);
    before.1 + part * (after.1 - before.1)
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Processor time of a process so far, seconds: its own and the kernel's for it (`proc_pid_stat(5)`).
fn cpu(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split(' ').collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(12) + ticks(13)) / 100.0
}

impl Scene {
    fn flood(&self, kind: &str, from: &str, millis: u64, aside: &[&str]) -> Spawned {
        let to = format!("{}:{PORT}", self.hosts[1].v4());
        let (rate, millis) = (RATE.to_string(), millis.to_string());
        let args = [&["flood", &to, kind, from, &rate, &millis], aside].concat();
        let mut flood = self.stranger.spawn_tool("flood", &args);
        flood.wait_for("at ", Duration::from_secs(5));
        flood
    }

    /// What is left of a stream beside a flood, of what it is beside one that the kernel drops: of each turn.
    fn left(&self, kind: &str, from: &str) -> Vec<f64> {
        let to = format!("{}:80", self.b.ip());
        let gush = ["gush", &to, &(MILLIS + 1000).to_string()];
        let _gush = self.a.spawn_tool(&self.hosts[0], "gush", &gush);
        let aside = ["--aside", &ASIDE.to_string()];
        let mut flood = self.flood(kind, from, MILLIS, &aside);
        assert_eq!(flood.wait(Duration::from_millis(2 * MILLIS)), 0);
        let said = flood.stdout();
        let sent: u64 = said.lines().last().unwrap().parse().unwrap();
        assert!(sent * 1000 > RATE * MILLIS * 9 / 10, "{sent} were sent");
        let heard = marks(&self.b.heard(), "octets");
        let turns = marks(&said, "port");
        let rates: Vec<(f64, f64)> = turns
            .windows(2)
            .map(|turn| {
                let came = octets_by(&heard, turn[1].0) - octets_by(&heard, turn[0].0);
                (turn[0].1, came / (turn[1].0 - turn[0].0))
            })
            .collect();
        // Beside the flood, and the mean of just before and just after.
        let beside = rates.windows(3).filter(|w| w[1].0 == f64::from(PORT));
        let ratios = beside.map(|w| 2.0 * w[1].1 / (w[0].1 + w[2].1));
        let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        assert!(ratios.len() > 15, "{} turns", ratios.len());
        ratios
    }

    /// Processor time that the daemon spends on a second of it while nothing else goes on, in hundredths.
    fn costs(&self, kind: &str, from: &str) -> f64 {
        let pid = self.hosts[1].daemon_pid();
        let (millis, begun) = (3000, cpu(pid));
        let mut flood = self.flood(kind, from, millis, &[]);
        assert_eq!(flood.wait(Duration::from_secs(10)), 0);
        (cpu(pid) - begun) * 100_000.0 / millis as f64
    }
}

/// The sender of a flood and the kernel's way of its packets cost the stream something, too: here they share the processors,
/// and in the world they don't. So the same flood goes in turn to weft's port and to one whose packets the kernel drops at
/// once, three times a second, and what is compared is what weft makes of it: 0.92 to 0.96 on a machine that does nothing
/// else. One that does has shown 0.89, so what fails here is what no such work explains.
#[test]
fn strangers_handshakes_leave_a_stream_alone() {
    let s = scene("hsflood");
    for (kind, from) in [("init", FEW), ("join", MANY), ("all", MANY)] {
        let mut turns = s.left(kind, from);
        for _ in 1..LOOKS {
            if median(turns.clone()) >= 0.9 {
                break;
            }
            turns.extend(s.left(kind, from));
        }
        let (left, costs) = (median(turns), s.costs(kind, from));
        eprintln!(
            "{kind} from {from}: {left:.3} is left of the stream; {costs:.1} % of a processor"
        );
        assert!(left >= 0.8, "{kind} from {from}: {left:.3}");
        assert!(
            costs < 20.0,
            "{kind} from {from}: {costs:.1} % of a processor"
        );
    }
    assert_eq!((s.hosts[0].alive(), s.hosts[1].alive()), (2, 2));
    let drops = s.hosts[1].status()["drops"].clone();
    assert!(
        drops["stranger"].as_u64().unwrap_or_default() > 50_000,
        "{drops}"
    );
}

/// The flood goes on all the time, to the host that begins anew and is asked by a newcomer.
#[test]
fn amid_a_flood_a_host_that_begins_anew_and_a_newcomer_get_in() {
    let s = scene("hsrestart");
    let [h1, h2] = &s.hosts;
    let mut flood = s.flood("all", MANY, 60_000, &[]);
    let b = s.b.ip().to_string();
    for _ in 0..3 {
        h2.kill9();
        h2.up(&[]);
        let begun = Instant::now();
        s.lab
            .wait("its containers are reached again", 5, || s.a.pings(&b));
        eprintln!("reached {:?} after it was up", begun.elapsed());
    }
    let token = h2.token(&[]);
    let h3 = s.lab.host("h3", h1.network());
    let begun = Instant::now();
    h3.join_with(&token).ok();
    eprintln!("joined within {:?}", begun.elapsed());
    s.lab.wait_members(&[h1.clone(), h2.clone(), h3]);
    assert!(flood.ended().is_none(), "the flood was over too early");
}
