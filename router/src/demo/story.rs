//! The story: every claim in it is checked while it is told, and the demo fails where one does not hold.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use weft_core::control::{ServiceRow, Status};

use crate::demo::part::Answer;
use crate::demo::stage::Stage;
use crate::demo::tell::Teller;
use crate::demo::wire::{Count, Wire};

const HOSTS: [&str; 3] = ["alpha", "beta", "gamma"];
/// Questions to the virtual address: enough that two backends both get some (missing one has odds of 2 in 2^24).
const QUESTIONS: u32 = 24;
const PUBLISHED: u16 = 8080;

/// What was measured; printed with `--json`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Figures {
    /// Seconds until each host was up, in the order they came.
    pub(crate) up_secs: Vec<f64>,
    /// Answers from the virtual address, by node.
    pub(crate) vip: BTreeMap<String, usize>,
    /// Answers from the published port of each host, by the host asked.
    pub(crate) published: BTreeMap<String, usize>,
    /// What passed the router.
    pub(crate) wire: Count,
    /// Median of a request and its answer between containers on two hosts, microseconds.
    pub(crate) round_trip_micros: u64,
    /// One download between containers on two hosts, Mbit/s.
    pub(crate) mbit_per_second: f64,
    /// Seconds from the death of a host until its name was gone everywhere.
    pub(crate) death_secs: f64,
    /// Seconds from the death until the virtual address answered each of a series of questions again.
    pub(crate) recovery_secs: f64,
    /// What could not be removed.
    pub(crate) leftovers: Vec<String>,
}

impl Figures {
    /// For people.
    pub(crate) fn lines(&self) -> Vec<String> {
        let ups: Vec<String> = self.up_secs.iter().map(|s| format!("{s:.1}")).collect();
        vec![
            format!("hosts up after               {} s", ups.join(", ")),
            format!(
                "request and answer           {} us (median, one connection, host to host, encrypted)",
                self.round_trip_micros
            ),
            format!(
                "one download                 {:.1} Gbit/s (both ends and the router share this machine)",
                self.mbit_per_second / 1000.0
            ),
            format!(
                "sealed, on the wire          {} in {} packets or bursts, readable: {}",
                size(self.wire.octets),
                self.wire.datagrams,
                self.wire.readable
            ),
            format!(
                "death of a host              forgotten after {:.1} s, service whole after {:.1} s",
                self.death_secs, self.recovery_secs
            ),
        ]
    }
}

/// Tells it.
pub(crate) fn tell(stage: &mut Stage, teller: &Teller, keep: bool) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    introduce(stage, teller);
    bring_up(stage, teller, &mut figures)?;
    let laptop = stage.site("laptop").addr.clone();
    let wire = Wire::watch(&stage.net.router, &laptop)?;
    serve(stage, teller)?;
    resolve(stage, teller)?;
    ask_the_vip(stage, teller, &mut figures)?;
    ask_published_ports(stage, teller, &mut figures)?;
    measure(stage, teller, &mut figures)?;
    look_at_the_wire(teller, &wire, &mut figures)?;
    lose_a_host(stage, teller, &mut figures)?;
    if keep {
        wait_for_ctrl_c(stage, teller);
    }
    Ok(figures)
}

fn introduce(stage: &Stage, teller: &Teller) {
    teller.chapter("weft demo: three hosts on this machine, made of network namespaces");
    for site in &stage.net.sites {
        let role = if site.name == "laptop" {
            "no weft: a client from outside"
        } else {
            "will run weft"
        };
        teller.note(&format!("{:<7} {:<15} {role}", site.name, site.addr));
    }
    teller.note(
        "A router namespace forwards between them; there is no other way from one to another.",
    );
}

fn bring_up(stage: &mut Stage, teller: &Teller, figures: &mut Figures) -> anyhow::Result<()> {
    teller.chapter("1. One command per host");
    for (nth, host) in HOSTS.into_iter().enumerate() {
        let token = if nth == 0 {
            None
        } else {
            Some(invite(stage, teller)?)
        };
        let command = if nth == 0 {
            "weft up"
        } else {
            "weft up --join weft1_..."
        };
        teller.typed(host, command);
        let start = Instant::now();
        stage.start_daemon(host, token.as_deref())?;
        figures.up_secs.push(start.elapsed().as_secs_f64());
    }
    stage.until("all three see each other", |stage| {
        for host in HOSTS {
            if stage.ask::<Status>(host, &["status"])?.nodes_alive != HOSTS.len() {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let status: Status = stage.ask("alpha", &["status"])?;
    teller.good(&format!(
        "cluster {}: three nodes, no leader, containers get addresses from {}",
        status.cluster, status.range
    ));
    Ok(())
}

fn invite(stage: &Stage, teller: &Teller) -> anyhow::Result<String> {
    teller.typed("alpha", "weft token");
    stage.weft("alpha", &["token"])
}

fn serve(stage: &mut Stage, teller: &Teller) -> anyhow::Result<()> {
    teller.chapter("2. Two web servers, each in a network namespace of its own, on two hosts");
    for host in ["alpha", "beta"] {
        let name = format!("web-{host}");
        teller.typed(
            host,
            &format!("weft run --name {name} --name web -- SERVER"),
        );
        stage.start_server(host, &name, "web")?;
    }
    teller.typed(
        "gamma",
        "weft service create web --port 80 --publish 8080:80",
    );
    stage.weft(
        "gamma",
        &[
            "service",
            "create",
            "web",
            "--port",
            "80",
            "--publish",
            "8080:80",
        ],
    )?;
    stage.until("every host knows both backends", |stage| {
        for host in HOSTS {
            let services: Vec<ServiceRow> = stage.ask(host, &["service", "ls"])?;
            if services.first().is_none_or(|s| s.backends.len() != 2) {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    teller.good(
        "the service \"web\" has a virtual address of its own and two backends, on every host",
    );
    Ok(())
}

fn resolve(stage: &mut Stage, teller: &Teller) -> anyhow::Result<()> {
    teller.chapter("3. Names, asked for by a container on gamma with its ordinary C library");
    for name in ["web-alpha", "web-beta", "web"] {
        let mut found = String::new();
        stage.until(&format!("{name} resolves"), |stage| {
            found = stage.part("gamma", &["resolve", name]).unwrap_or_default();
            Ok(!found.is_empty())
        })?;
        let what = if name == "web" {
            "the virtual address"
        } else {
            "the container"
        };
        teller.good(&format!("{:<10} {found}   ({what})", name));
    }
    Ok(())
}

fn ask_the_vip(stage: &mut Stage, teller: &Teller, figures: &mut Figures) -> anyhow::Result<()> {
    teller.chapter("4. The virtual address, balanced");
    teller.typed(
        "gamma",
        &format!("weft run -- GET http://web/      ({QUESTIONS} times)"),
    );
    let answers = stage.get("gamma", "web", 80, QUESTIONS)?;
    figures.vip = by_node(&answers)?;
    for (node, count) in &figures.vip {
        teller.good(&format!("{count:>2} answers from {node}"));
    }
    ensure!(figures.vip.len() == 2, "all answers came from one backend");
    if let Some(client) = answers.first().and_then(Answer::client) {
        teller.note(&format!(
            "The servers saw the container itself as their client: {client}"
        ));
    }
    Ok(())
}

fn ask_published_ports(
    stage: &mut Stage,
    teller: &Teller,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    teller.chapter("5. Port 8080 of every host, asked from outside (gamma has no server at all)");
    let laptop = stage.site("laptop").addr.clone();
    for host in HOSTS {
        let addr = stage.site(host).addr.clone();
        let answers = stage.get_from_host("laptop", &addr, PUBLISHED, 8)?;
        let nodes = by_node(&answers)?;
        let seen = answers.iter().all(|a| a.client() == Some(laptop.as_str()));
        ensure!(
            seen,
            "a server did not see the client's own address {laptop}: {:?}",
            answers.first()
        );
        figures.published.insert(host.to_owned(), answers.len());
        let from: Vec<String> = nodes
            .iter()
            .map(|(node, count)| format!("{count} from {node}"))
            .collect();
        teller.good(&format!(
            "http://{addr}:8080/  {}; client seen as {laptop}",
            from.join(", ")
        ));
    }
    let answers = stage.get_from_host("gamma", "127.0.0.1", PUBLISHED, 4)?;
    by_node(&answers)?;
    teller.good("http://127.0.0.1:8080/ on gamma itself answers too");
    Ok(())
}

fn measure(stage: &mut Stage, teller: &Teller, figures: &mut Figures) -> anyhow::Result<()> {
    teller.chapter("6. Figures, from a container on gamma to one on alpha");
    figures.round_trip_micros = stage
        .part("gamma", &["latency", "web-alpha", "80", "500"])?
        .parse()?;
    let load = stage.part("gamma", &["load", "web-alpha", "80", "2"])?;
    let (octets, secs) = load
        .split_once(' ')
        .context("a measurement without two numbers")?;
    figures.mbit_per_second = octets.parse::<f64>()? * 8.0 / secs.parse::<f64>()? / 1e6;
    teller.good(&format!(
        "an HTTP request and its answer: {} us (median)",
        figures.round_trip_micros
    ));
    teller.good(&format!(
        "one download: {:.1} Gbit/s, encrypted",
        figures.mbit_per_second / 1000.0
    ));
    Ok(())
}

fn look_at_the_wire(teller: &Teller, wire: &Wire, figures: &mut Figures) -> anyhow::Result<()> {
    teller.chapter("7. What the router saw of all this");
    let count = wire.count();
    figures.wire = count;
    ensure!(count.datagrams > 0, "nothing went over the wire");
    ensure!(
        count.readable == 0,
        "{} datagrams could be read on the wire",
        count.readable
    );
    ensure!(
        count.others == 0,
        "{} packets between the hosts were not weft's sealed datagrams",
        count.others
    );
    teller.good(&format!(
        "{} packets to UDP port 6783, {} (a burst is seen as one)",
        count.datagrams,
        size(count.octets)
    ));
    teller.good("none holds a word of the requests, answers or names");
    teller.good("and the hosts sent each other nothing else");
    teller.note("Keys come from a Noise handshake between the hosts' own identities; the laptop's plain HTTP is not counted.");
    Ok(())
}

fn lose_a_host(stage: &mut Stage, teller: &Teller, figures: &mut Figures) -> anyhow::Result<()> {
    teller.chapter("8. beta loses its power");
    teller.typed("beta", "kill -9 of the daemon, and the cable is cut");
    stage.crash("beta")?;
    let start = Instant::now();
    let mut whole = None;
    let mut forgotten = None;
    stage.until(
        "the others have forgotten beta, and the service answers every time",
        |stage| {
            if whole.is_none() && stage.is_whole("gamma", "web", 80)? {
                whole = Some(start.elapsed());
            }
            if forgotten.is_none() && is_forgotten(stage)? {
                forgotten = Some(start.elapsed());
            }
            Ok(whole.is_some() && forgotten.is_some())
        },
    )?;
    figures.recovery_secs = whole.map_or(0.0, |d: Duration| d.as_secs_f64());
    figures.death_secs = forgotten.map_or(0.0, |d: Duration| d.as_secs_f64());
    let answers = stage.get("gamma", "web", 80, QUESTIONS)?;
    let nodes = by_node(&answers)?;
    ensure!(
        nodes.keys().eq(["alpha"]),
        "a dead backend still answers: {nodes:?}"
    );
    teller.good(&format!(
        "http://web/ answers {QUESTIONS} of {QUESTIONS} times, from alpha; whole after {:.1} s",
        figures.recovery_secs
    ));
    teller.good(&format!(
        "the name web-beta is gone after {:.1} s; it will be back when beta is",
        figures.death_secs
    ));
    for host in ["alpha", "gamma"] {
        let addr = stage.site(host).addr.clone();
        by_node(&stage.get_from_host("laptop", &addr, PUBLISHED, 4)?)?;
        teller.good(&format!("http://{addr}:8080/ still answers"));
    }
    Ok(())
}

fn is_forgotten(stage: &Stage) -> anyhow::Result<bool> {
    for host in ["alpha", "gamma"] {
        if stage.ask::<Status>(host, &["status"])?.nodes_alive != 2 {
            return Ok(false);
        }
    }
    Ok(stage.part("gamma", &["resolve", "web-beta"]).is_err())
}

fn wait_for_ctrl_c(stage: &Stage, teller: &Teller) {
    teller.chapter("Left running (--keep). Look around, then press ctrl-C:");
    for host in ["alpha", "gamma"] {
        teller.note(&format!(
            "WEFT_RUN_DIR={} weft status",
            stage.run_dir(host).display()
        ));
    }
    teller.note(&format!(
        "ip netns exec {} ip route",
        stage.site("alpha").netns
    ));
    while !stage.is_stopped() {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How many answers each node gave; fails where one question was not answered.
fn by_node(answers: &[Answer]) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut nodes = BTreeMap::new();
    for answer in answers {
        ensure!(answer.ok, "a question was not answered: {}", answer.text);
        let node = answer
            .node()
            .with_context(|| format!("an answer without a node: {}", answer.text))?;
        *nodes.entry(node.to_owned()).or_insert(0) += 1;
    }
    Ok(nodes)
}

fn size(octets: u64) -> String {
    match octets {
        0..10_000 => format!("{octets} octets"),
        10_000..10_000_000 => format!("{} kB", octets / 1000),
        _ => format!("{} MB", octets / 1_000_000),
    }
}
