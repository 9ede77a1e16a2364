//! Restarts, polite and not: identity, addresses, attachments and connections go on.

use std::time::Duration;

use weft_lab::{Host, Lab, Spawned, answers};

/// The connection still carries questions and answers, with nothing lost in between.
fn goes_on(lab: &Lab, hold: &mut Spawned, what: &str) {
    let before = answers(hold);
    lab.wait(&format!("the connection goes on {what}"), 60, || {
        assert_eq!(
            hold.ended(),
            None,
            "{what}: the connection broke: {}",
            hold.stderr()
        );
        answers(hold) > before + 5
    });
}

fn identity(host: &Host) -> [serde_json::Value; 5] {
    let status = host.status();
    ["node", "cluster", "host_ip", "netns", "range"].map(|key| status[key].clone())
}

#[test]
fn connections_and_attachments_survive_kill_9_and_restart() {
    let lab = Lab::new("restart");
    let [h1, h2] = lab.pair();
    let (a, b) = (h1.serve("a", &[]), h2.serve("b", &["web"]));
    h1.publish_web();
    lab.wait("containers talk", 20, || {
        a.ask("tcp", &format!("{}:80", b.ip())).is_ok()
    });
    let vip = h1.weft(&["service", "ls", "--json"]).json()[0]["vip"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut direct = a.spawn_tool(&h1, "direct", &["hold", &format!("{}:80", b.ip())]);
    let mut balanced = a.spawn_tool(&h1, "balanced", &["hold", &format!("{vip}:80")]);
    direct.wait_for("ok 5 ", Duration::from_secs(15));
    balanced.wait_for("ok 5 ", Duration::from_secs(15));
    let before = [identity(&h1), identity(&h2)];
    let rows = |h: &Host| h.weft(&["ps", "--json"]).json();
    let (ps1, count) = (rows(&h1), rows(&h1).as_array().map(Vec::len));

    for (host, other) in [(&h1, &h2), (&h2, &h1)] {
        host.kill9();
        host.up(&[]);
        lab.wait_members(&[host.clone(), other.clone()]);
        goes_on(
            &lab,
            &mut direct,
            &format!("after {} was killed", host.name()),
        );
        goes_on(
            &lab,
            &mut balanced,
            &format!("through the VIP after {} was killed", host.name()),
        );
    }
    assert_eq!(before, [identity(&h1), identity(&h2)]);
    lab.wait("all endpoints are listed again", 20, || {
        rows(&h1) == ps1 && rows(&h2).as_array().map(Vec::len) == count
    });
    lab.wait("and named", 20, || {
        a.run(&["dig", "+short", "b.weft.internal"]).stdout.trim() == b.ip().to_string()
    });

    // Both at once.
    h1.kill9();
    h2.kill9();
    h1.up(&[]);
    h2.up(&[]);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    goes_on(&lab, &mut direct, "after both were killed");
    // The published port is there again, held by nobody of the past.
    lab.wait("the published port answers", 20, || {
        h1.tool(&["ask", "tcp", "127.0.0.1:8080", "--wait", "2"])
            .is_ok()
    });
}

#[test]
fn a_dead_daemon_s_containers_on_one_host_still_talk() {
    let lab = Lab::new("local");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let (a, b) = (host.serve("a", &[]), host.serve("b", &[]));
    host.kill9();
    assert!(
        a.pings(&b.ip().to_string()),
        "local traffic needs no daemon"
    );
    host.up(&[]);
    assert!(a.pings(&b.ip().to_string()));
}

#[test]
fn what_ended_while_the_daemon_was_dead_is_forgotten() {
    let lab = Lab::new("ended");
    let host = lab.host("h1", &lab.subnet("a"));
    host.up(&[]);
    let (mut a, b) = (host.serve("a", &[]), host.serve("b", &[]));
    host.kill9();
    a.weft_run().signal(nix::sys::signal::Signal::SIGKILL);
    host.up(&[]);
    lab.wait("a is gone, b is there", 20, || {
        let text = host.weft(&["ps", "--json"]).json().to_string();
        !text.contains("\"a\"") && text.contains("\"b\"")
    });
    assert!(b.run(&["dig", "+short", "a.weft.internal"]).ok().is_empty());
}

#[test]
fn a_killed_founder_is_not_needed_by_the_others() {
    let lab = Lab::new("founder");
    let [h1, h2, h3] = lab.trio();
    h1.kill9();
    lab.wait("the others know", 30, || h2.alive() == 2 && h3.alive() == 2);
    let (a, b) = (h2.serve("a", &[]), h3.serve("b", &[]));
    lab.wait("new containers talk", 20, || a.pings(&b.ip().to_string()));
    h2.weft(&["service", "create", "late", "--port", "80"]).ok();
    h1.up(&[]);
    lab.wait_members(&[h1.clone(), h2, h3]);
    lab.wait("the founder learns what it missed", 20, || {
        h1.weft(&["service", "ls", "--json"])
            .json()
            .to_string()
            .contains("late")
    });
}

#[test]
fn a_host_out_of_a_backup_lets_go_of_what_others_remember() {
    let lab = Lab::new("backup");
    let [h1, h2] = lab.pair();
    let kept = h1.serve("kept", &[]);
    let backup = h1.dir().join("backup").display().to_string();
    let state = h1.state_dir().display().to_string();
    h1.kill9();
    h1.run(&["cp", "-a", &state, &backup]).ok();
    h1.up(&[]);
    lab.wait_members(&[h1.clone(), h2.clone()]);
    let lists = |host: &Host, name: &str| {
        let text = host.weft(&["ps", "--json"]).json().to_string();
        text.contains(&format!("\"{name}\""))
    };
    let mut lost = h1.serve("lost", &[]);
    lab.wait("the other host knows both", 20, || {
        lists(&h2, "kept") && lists(&h2, "lost")
    });

    h1.kill9();
    lost.weft_run().signal(nix::sys::signal::Signal::SIGKILL);
    h1.run(&["rm", "-rf", &state]).ok();
    h1.run(&["cp", "-a", &backup, &state]).ok();
    // It hears what it has forgotten only when it has long begun.
    h1.isolate();
    h1.up(&[]);
    assert!(lists(&h1, "kept") && !lists(&h1, "lost"));
    h1.reconnect();
    lab.wait_members(&[h1.clone(), h2.clone()]);
    lab.wait("what is not there is released", 30, || {
        h1.log().contains("not there; released") && !lists(&h1, "lost") && !lists(&h2, "lost")
    });
    assert!(lists(&h2, "kept") && kept.run(&["true"]).is_ok());
}
