//! One daemon takes another's place under traffic that never stops: what it costs, and that nothing breaks or leaks.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_lab::{Container, Host, Lab, Out, Spawned, signal};

/// Datagrams both ways, one every 10 ms, and a TCP stream both ways, between two containers.
struct Traffic {
    /// What counts at the far end: `tally`, `follow`.
    tallies: [Spawned; 2],
    followers: [Spawned; 2],
    _senders: [Spawned; 4],
}

/// The last number after `word` in what it said.
fn last(said: &Spawned, word: &str) -> u64 {
    let text = said.stdout();
    let line = text.lines().rfind(|line| line.contains(word));
    let mut words = line.unwrap_or_default().split_whitespace();
    words
        .find(|w| *w == word)
        .and_then(|_| words.next()?.parse().ok())
        .unwrap_or(0)
}

impl Traffic {
    fn between(lab: &Lab, (h1, a): (&Host, &Container), (h2, b): (&Host, &Container)) -> Self {
        let ends = [(h1, a, b), (h2, b, a)];
        let catchers = |name: &str, tool: [&str; 2]| {
            ends.map(|(host, at, _)| {
                let mut tool = at.spawn_tool(host, &format!("{name}-{}", at.name()), &tool);
                tool.wait_for("ready", Duration::from_secs(10));
                tool
            })
        };
        let tallies = catchers("tally", ["tally", "7001"]);
        let followers = catchers("follow", ["follow", "7002"]);
        let [a1, b1] = ends.map(|(host, at, to)| {
            let to = format!("{}:7001", to.ip());
            at.spawn_tool(host, &format!("tick-{}", at.name()), &["tick", &to, "10"])
        });
        let [a2, b2] = ends.map(|(host, at, to)| {
            let to = format!("{}:7002", to.ip());
            at.spawn_tool(host, &format!("flow-{}", at.name()), &["flow", &to])
        });
        let traffic = Self {
            tallies,
            followers,
            _senders: [a1, b1, a2, b2],
        };
        traffic.flows(lab, "before anything happens");
        traffic
    }

    /// Both streams are alive and get on, and datagrams arrive on both sides.
    fn flows(&self, lab: &Lab, when: &str) {
        let counted = |s: &Self| {
            let octets = s
                .followers
                .each_ref()
                .map(|follower| last(follower, "octets"));
            (octets, s.tallies.each_ref().map(|t| last(t, "number")))
        };
        let before = counted(self);
        lab.wait(&format!("all traffic flows {when}"), 60, || {
            for follower in &self.followers {
                assert_eq!(follower.stderr(), "", "a stream broke {when}");
            }
            let (octets, numbers) = counted(self);
            let more = |now: [u64; 2], then: [u64; 2], by| {
                now.iter().zip(then).all(|(now, then)| *now > then + by)
            };
            more(octets, before.0, 100_000) && more(numbers, before.1, 30)
        });
    }

    /// Datagrams lost so far, each way.
    fn lost(&self) -> [u64; 2] {
        self.tallies.each_ref().map(|tally| last(tally, "missing"))
    }
}

fn since(now: [u64; 2], before: [u64; 2]) -> [u64; 2] {
    [now[0] - before[0], now[1] - before[1]]
}

/// Of a hundred packets a second each way, round by round: a restart loses less than a second of them. The machine's other
/// work may lengthen one; so it is the better half of the rounds that counts, and what nothing explains.
fn lost_less_than_a_second(rounds: &[[u64; 2]]) {
    let mut worst: Vec<u64> = rounds.iter().map(|[one, other]| *one.max(other)).collect();
    worst.sort_unstable();
    let median = worst[(worst.len() - 1) / 2];
    let is_fine = median < 100 && worst.iter().all(|lost| *lost < 300);
    assert!(is_fine, "lost {rounds:?} of 100 a second");
}

/// What `ip monitor` says of the domain while something happens: next hops that are deleted take their routes with them.
struct Watch(Spawned);

impl Watch {
    fn over(host: &Host, name: &str) -> Self {
        let domain = host.status()["netns"].as_str().unwrap().to_owned();
        let monitor = [
            "stdbuf", "-oL", "ip", "-n", &domain, "monitor", "nexthop", "link",
        ];
        let mut watch = host.spawn(&format!("monitor-{name}"), &monitor);
        // It has begun to listen once it tells of something.
        let mut toggles = 0;
        while watch.stdout().is_empty() {
            assert_eq!(watch.ended(), None, "{}", watch.stderr());
            let state = ["up", "down"][toggles % 2];
            host.run(&[
                "ip", "-n", &domain, "link", "add", "probe0", "type", "bridge",
            ]);
            host.run(&["ip", "-n", &domain, "link", "set", "probe0", state]);
            toggles += 1;
        }
        host.run(&["ip", "-n", &domain, "link", "del", "probe0"])
            .ok();
        Self(watch)
    }

    fn lost_next_hops(mut self) -> Vec<String> {
        self.0.terminate(Duration::from_secs(5));
        let text = self.0.stdout();
        let lines = text
            .lines()
            .filter(|l| l.starts_with("Deleted id") || l.contains("NO-CARRIER"));
        lines.map(str::to_owned).collect()
    }
}

/// Asks the daemon to end as a service manager does, and waits until it has.
fn terminate(host: &Host) {
    let pid = host.daemon_pid();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
    while is_there(pid) {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Does it still hold descriptors?
fn is_there(pid: u32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut fds| fds.next().is_some())
}

/// What a daemon has open, by kind: numbers of sockets and inodes differ from one process to the next.
fn descriptors(host: &Host) -> Vec<String> {
    let links = std::fs::read_dir(format!("/proc/{}/fd", host.daemon_pid())).unwrap();
    let links = links.flatten().flat_map(|fd| std::fs::read_link(fd.path()));
    // One that was made in another mount namespace has another path here.
    let kind = |link: &str| {
        let name = link.rsplit('/').next().unwrap_or_default();
        name.split('[').next().unwrap_or_default().to_owned()
    };
    let mut kinds: Vec<String> = links.map(|link| kind(&link.to_string_lossy())).collect();
    kinds.sort();
    kinds
}

#[test]
fn one_daemon_takes_the_place_of_another_and_nothing_breaks() {
    let lab = Lab::new("upgrade");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &["web"]));
    h1.publish_web();
    let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));
    let identity = |host: &Host| {
        let status = host.status();
        ["node", "cluster", "host_ip", "netns"].map(|key| status[key].clone())
    };
    let (before, rows) = (identity(&h1), h1.weft(&["ps", "--json"]).json());
    let open = descriptors(&h1);
    // A process of the host, on a published port: the daemon itself carries its connection.
    let first = h1.daemon_pid();
    let mut hold = h1.spawn_tool("hold", &["hold", "127.0.0.1:8080"]);
    hold.wait_for("ok 5 ", Duration::from_secs(15));
    let mut rounds = Vec::new();
    for round in 1..=4 {
        let (old, lost) = (h1.daemon_pid(), traffic.lost());
        let watch = Watch::over(&h1, &round.to_string());
        let said = h1.weft(&["restart", "--json"]).json();
        assert_eq!(said["pid"], h1.daemon_pid());
        assert_ne!(h1.daemon_pid(), old);
        traffic.flows(&lab, &format!("after handover {round}"));
        assert_eq!(watch.lost_next_hops(), [""; 0]);
        rounds.push(since(traffic.lost(), lost));
        if old != first {
            lab.wait("the old daemon is gone", 10, || !is_there(old));
        }
    }
    lost_less_than_a_second(&rounds);
    let answers = last(&hold, "ok");
    lab.wait("the host's own connection goes on", 10, || {
        assert_eq!(hold.ended(), None, "{}", hold.stderr());
        last(&hold, "ok") > answers + 5
    });
    assert!(is_there(first), "it carries a connection");
    drop(hold);
    lab.wait("and ends with it", 10, || !is_there(first));
    lab.wait_members(&[h1.clone(), h2.clone()]);
    assert_eq!(identity(&h1), before);
    assert_eq!(h1.weft(&["ps", "--json"]).json(), rows);
    // The client that asks has a socket of its own in the daemon.
    lab.wait("it has open what the first one had", 10, || {
        descriptors(&h1) == open
    });
    let published = h1.tool(&["ask", "tcp", "127.0.0.1:8080"]).ok();
    assert!(published.starts_with("b "), "{published}");
    let name = a.run(&["dig", "+short", "b.weft.internal"]).ok();
    assert_eq!(name, b.ip().to_string());
    h1.weft(&["down"]).ok();
    assert!(h1.weft(&["status"]).fails_with(1).contains("not running"));
}

/// What went wrong, if it did.
type Ask<'a> = dyn Fn() -> Result<(), String> + Sync + 'a;

/// Does `ask` again and again while `restart` is done, three times and until it was asked as often; what went wrong.
fn meanwhile(restart: impl Fn(), ask: &Ask<'_>) -> String {
    let (asked, over) = (AtomicU32::new(0), AtomicBool::new(false));
    let wrong = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut wrong = String::new();
            while !over.load(Ordering::Relaxed) {
                ask().unwrap_or_else(|error| wrong += &error);
                asked.fetch_add(1, Ordering::Relaxed);
            }
            wrong
        });
        let mut restarts = 0;
        // A question that is put twice takes longer than a restart.
        while restarts < 3 || asked.load(Ordering::Relaxed) < 4 && restarts < 20 {
            restart();
            restarts += 1;
        }
        over.store(true, Ordering::Relaxed);
        asking.join().unwrap()
    });
    let asked = asked.into_inner();
    assert!(asked > 3, "asked {asked} times: {wrong}");
    wrong
}

#[test]
fn nobody_is_turned_away_while_one_daemon_follows_another() {
    let lab = Lab::new("door");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &["web"]));
    h1.publish_web();
    let tool = Host::binary("lab-tool");
    let published = format!("{}:8080", h1.v4());
    let outside = || lab.router().run(&[&tool, "ask", "tcp", &published]);
    lab.wait("the port answers", 20, || outside().is_ok());
    let client = format!("b {} ", h1.subnet_gateway());
    let said = |out: Out, wanted: &str| match out.is_ok() && out.stdout.contains(wanted) {
        true => Ok(()),
        false => Err(out.to_string()),
    };
    let restart = || drop(h1.weft(&["restart"]).ok());
    let doors: [(&str, &Ask<'_>); 4] = [
        ("commands", &|| said(h1.weft(&["status"]), "2 alive of 2")),
        ("the host itself", &|| {
            said(h1.tool(&["ask", "tcp", "127.0.0.1:8080"]), "b ")
        }),
        ("outside clients", &|| said(outside(), &client)),
        // One that was read and not answered yet is asked again, as resolvers do.
        ("questions for names", &|| {
            said(
                a.run(&["dig", "+short", "+time=1", "b.weft.internal"]),
                &b.ip().to_string(),
            )
        }),
    ];
    for (who, ask) in doors {
        let wrong = meanwhile(restart, ask);
        assert!(wrong.is_empty(), "{who}: {wrong}");
    }
}

#[test]
fn a_successor_that_fails_leaves_the_old_daemon_at_work() {
    let lab = Lab::new("failed");
    let [h1, h2] = lab.two();
    let file = h1.dir().join("weft.toml");
    let config = file.to_str().unwrap();
    std::fs::write(&file, "").unwrap();
    h1.up(&["--config", config]);
    h2.join(&h1);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));

    let open = descriptors(&h1);
    // It can't have the port that the file asks for by now, and finds that out when the old one has stopped to read.
    let mut taken = h1.spawn_tool("taken", &["catch", "7777", "1"]);
    taken.wait_for("ready", Duration::from_secs(5));
    std::fs::write(&file, "port = 7777\n").unwrap();
    let old = h1.daemon_pid();
    let said = h1.weft(&["restart"]).fails_with(1);
    let goes_on = format!("the daemon that ran goes on (process {old})");
    assert!(said.contains("7777") && said.contains(&goes_on), "{said}");
    traffic.flows(&lab, "after a failed handover");
    assert_eq!(h1.daemon_pid(), old);

    // A client that asks and does not begin, and one that does not ask in earnest.
    let socket = h1.socket();
    let ask = |headers: &[&str]| {
        let mut curl = vec!["curl", "-s", "-m", "1", "-w", "%{http_code}", "-X", "POST"];
        headers
            .iter()
            .for_each(|header| curl.extend(["-H", header]));
        curl.extend(["--unix-socket", socket.to_str().unwrap()]);
        curl.push("http://weft/v1/handover");
        h1.run(&curl).stdout
    };
    assert!(ask(&["Connection: upgrade", "Upgrade: weft-handover"]).ends_with("101"));
    assert!(ask(&[]).ends_with("400"));
    assert_eq!(h1.daemon_pid(), old);

    // Killed at any moment.
    std::fs::write(&file, "").unwrap();
    for millis in [1, 5, 10, 20, 40, 60, 80, 120] {
        let overs = || h1.log().matches("another daemon has taken over").count();
        let before = overs();
        let mut restart = h1.spawn("restart", &[&Host::binary("weft"), "restart"]);
        std::thread::sleep(Duration::from_millis(millis));
        let successor = children(restart.pid());
        for pid in successor.iter().copied().chain([restart.pid()]) {
            let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
        }
        restart.wait(Duration::from_secs(10));
        // It may have been up by then: the old one is rightly gone.
        lab.wait("one daemon answers", 30, || {
            h1.alive() > 0 || overs() > before && h1.up_with(&["--config", config], b"").is_ok()
        });
        traffic.flows(
            &lab,
            &format!("after a successor was killed within {millis} ms"),
        );
        lab.wait("it knows the other", 30, || h1.alive() == 2);
    }
    lab.wait("nothing is left open of it", 10, || {
        descriptors(&h1) == open
    });
    h1.weft(&["restart"]).ok();
    traffic.flows(&lab, "after all that");
}

/// Has it got the TAP's queue?
fn has_queue(pid: u32) -> bool {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let mut open = open.into_iter().flatten().flatten();
    open.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("net/tun")))
}

/// Does it still read packets? Its threads say so by their names.
fn reads_packets(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut tasks = tasks.into_iter().flatten().flatten();
    tasks.any(|task| {
        let name = std::fs::read_to_string(task.path().join("comm"));
        name.is_ok_and(|name| name.starts_with("weft-receive"))
    })
}

/// Begins a restart and stops the successor for good as soon as it has a descriptor: it and the restart.
pub(crate) fn hang_a_successor(host: &Host) -> (u32, Spawned) {
    let restart = host.spawn("restart", &[&Host::binary("weft"), "restart"]);
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        assert!(Instant::now() < until, "no successor");
        let successors = children(restart.pid());
        if let Some(pid) = successors.into_iter().find(|pid| has_queue(*pid)) {
            signal(pid, Signal::SIGSTOP);
            return (pid, restart);
        }
    }
}

#[test]
fn a_successor_that_hangs_before_it_takes_over_is_not_waited_for() {
    let lab = Lab::new("hangs");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));
    let old = h1.daemon_pid();
    let mut tries = 0;
    let (begun, successor, mut restart) = loop {
        let (begun, (successor, restart)) = (Instant::now(), hang_a_successor(&h1));
        // What it had said before it was stopped is heard by then.
        std::thread::sleep(Duration::from_millis(500));
        if reads_packets(old) {
            break (begun, successor, restart);
        }
        // It was too quick: it had taken over. Another one.
        tries += 1;
        assert!(tries < 10, "all were too quick");
        signal(successor, Signal::SIGKILL);
        lab.wait("the old daemon answers", 20, || h1.alive() > 0);
    };
    lab.wait("the old daemon answers", 15, || h1.alive() > 0);
    eprintln!("nobody answered for {:?}", begun.elapsed());
    assert_eq!(h1.daemon_pid(), old);
    assert!(!is_there(successor), "it would wake up one day");
    assert_ne!(restart.wait(Duration::from_secs(10)), 0);
    traffic.flows(&lab, "after a successor that hung");
    lab.wait("both are there", 30, || (h1.alive(), h2.alive()) == (2, 2));
    h1.weft(&["restart"]).ok();
    traffic.flows(&lab, "after one that did not");
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace().flat_map(str::parse).collect()
}

#[test]
fn streams_live_through_stop_and_start_though_a_member_is_away() {
    let lab = Lab::new("stop");
    let [h1, h2, h3] = lab.trio();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    // Whoever starts waits some seconds for its word before it speaks for itself.
    h3.kill9();
    let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));
    for (round, stop) in [terminate, Host::kill9, terminate, Host::kill9]
        .iter()
        .enumerate()
    {
        stop(&h1);
        let before = traffic
            .tallies
            .each_ref()
            .map(|tally| last(tally, "number"));
        let weft = Host::binary("weft");
        let mut up = h1.spawn(&format!("up-{round}"), &[&weft, "up", "--name", "h1"]);
        lab.wait("packets pass again", 30, || {
            let now = traffic
                .tallies
                .each_ref()
                .map(|tally| last(tally, "number"));
            now[0] > before[0] + 10 && now[1] > before[1] + 10
        });
        assert_eq!(up.ended(), None, "only then, and that is too late");
        assert_eq!(up.wait(Duration::from_secs(30)), 0, "{}", up.stderr());
        traffic.flows(&lab, "after the start");
    }
}

#[test]
fn a_service_manager_keeps_the_descriptors_from_one_daemon_to_the_next() {
    let lab = Lab::new("manager");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
    terminate(&h1);
    let path = h1.dir().join("notify");
    let notify = path.to_str().unwrap();
    let weft = Host::binary("weft");
    let service = [
        "manage",
        notify,
        &weft,
        "up",
        "--foreground",
        "--name",
        "h1",
    ];
    let mut manager = h1.spawn_tool("manager", &service);
    let starts = |manager: &Spawned| {
        let text = manager.stdout();
        text.lines().filter(|line| *line == "ready").count()
    };
    manager.wait_for("ready", Duration::from_secs(30));
    for name in ["weft-tap", "weft-udp4", "weft-udp6"] {
        assert!(
            manager.stdout().contains(&format!("stores {name}\n")),
            "{}",
            manager.stdout()
        );
    }
    let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));
    let refused = h1.weft(&["restart"]).fails_with(1);
    assert!(refused.contains("systemctl restart weft"), "{refused}");

    let restart = || {
        let line = std::os::unix::net::UnixDatagram::unbound().unwrap();
        line.send_to(b"RESTART", &path).unwrap();
    };
    let open = descriptors(&h1);
    let mut rounds = Vec::new();
    for round in 0..4 {
        let (done, lost) = (starts(&manager), traffic.lost());
        let watch = Watch::over(&h1, &round.to_string());
        match round % 2 {
            0 => restart(),
            _ => h1.kill9(),
        }
        lab.wait("it is up again", 30, || starts(&manager) > done);
        traffic.flows(&lab, &format!("after restart {round} by the manager"));
        assert_eq!(watch.lost_next_hops(), [""; 0]);
        rounds.push(since(traffic.lost(), lost));
        assert!(
            manager
                .stdout()
                .contains("with weft-tap:weft-udp4:weft-udp6")
        );
    }
    lost_less_than_a_second(&rounds);
    lab.wait("it has open what the first one had", 10, || {
        descriptors(&h1) == open
    });

    // Nothing is kept of what was taken down, or the domain would live on in it.
    h1.weft(&["down"]).ok();
    manager.wait_for("kept \n", Duration::from_secs(10));
    assert_eq!(
        manager.wait(Duration::from_secs(10)),
        0,
        "{}",
        manager.stderr()
    );
}

#[test]
fn peers_that_only_send_are_called_by_the_successor() {
    let lab = Lab::new("oneway");
    let subnet = lab.subnet("a");
    let hosts: Vec<Host> = (1..=4)
        .map(|n| lab.host(&format!("h{n}"), &subnet))
        .collect();
    lab.cluster(&hosts);
    let (h1, others) = hosts.split_first().unwrap();
    let to = h1.serve("to", &[]);
    let senders: Vec<(Container, Spawned, Spawned)> = (7001..)
        .zip(others)
        .map(|(port, host)| {
            let from = host.serve(&format!("from{port}"), &[]);
            let tally = ["tally", &port.to_string()];
            let mut tally = to.spawn_tool(h1, &format!("tally{port}"), &tally);
            tally.wait_for("ready", Duration::from_secs(10));
            let tick = ["tick", &format!("{}:{port}", to.ip()), "10"];
            let tick = from.spawn_tool(host, "tick", &tick);
            (from, tally, tick)
        })
        .collect();
    let counts = |word: &str| -> Vec<u64> {
        let tallies = senders.iter().map(|(_, tally, _)| tally);
        tallies.map(|tally| last(tally, word)).collect()
    };
    let arrive = |when: &str| {
        let before = counts("number");
        lab.wait(when, 20, || {
            let now = counts("number");
            now.iter().zip(&before).all(|(now, then)| *now > then + 50)
        });
    };
    arrive("all arrive");
    let before = counts("missing");
    h1.weft(&["restart"]).ok();
    arrive("all arrive after a handover");
    let now = counts("missing");
    let lost: Vec<u64> = now.iter().zip(&before).map(|(n, b)| n - b).collect();
    // They would find out by themselves after three seconds.
    assert!(lost.iter().all(|lost| *lost < 200), "{lost:?} of 100/s");
}

/// What docs/architecture.md says of it; run by hand with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_restarts_cost() {
    for away in [false, true] {
        let lab = Lab::new("cost");
        let [h1, h2, h3] = lab.trio();
        let (a, b) = (h1.serve("a", &[]), h2.serve("b", &[]));
        if away {
            h3.kill9();
        }
        let traffic = Traffic::between(&lab, (&h1, &a), (&h2, &b));
        let measure = |what: &str, restart: &dyn Fn()| {
            let before = traffic.lost();
            restart();
            traffic.flows(&lab, what);
            lab.wait("all is quiet again", 30, || h1.alive() == h2.alive());
            traffic.flows(&lab, what);
            let lost = since(traffic.lost(), before);
            println!("{what}, a member away: {away}: {lost:?} of 100/s lost");
        };
        for _ in 0..3 {
            measure("SIGTERM and weft up", &|| {
                terminate(&h1);
                h1.up(&[]);
            });
            measure("kill -9 and weft up", &|| {
                h1.kill9();
                h1.up(&[]);
            });
            measure("weft restart", &|| drop(h1.weft(&["restart"]).ok()));
        }
    }
}
