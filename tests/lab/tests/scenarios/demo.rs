//! `weft demo` runs to its end, keeps its word and leaves nothing.

use std::time::Duration;

use weft_lab::{Host, Names, run_command};

#[test]
fn the_demo_runs_to_its_end() {
    let argv = [Host::binary("weft"), "demo".to_owned(), "--json".to_owned()];
    let out = run_command(&argv, &[], &[], Duration::from_secs(180));
    assert!(out.is_ok(), "{out}");
    let figures = out.json();
    assert_eq!(figures["wire"]["readable"], 0, "{figures}");
    assert_eq!(
        figures["leftovers"].as_array().map(Vec::len),
        Some(0),
        "{figures}"
    );
    assert_eq!(
        figures["published"].as_object().map(serde_json::Map::len),
        Some(3),
        "{figures}"
    );
}

#[test]
fn an_interrupted_demo_takes_everything_down() {
    let dir = tempfile::tempdir().unwrap();
    let names = Names::new();
    let argv = names.with(&[&Host::binary("weft"), "demo"]);
    let mut demo = weft_lab::Spawned::start(&argv, &[], &dir.path().join("demo"));
    demo.wait_for("weft up --join", Duration::from_secs(60));
    let pid = demo.pid();
    demo.signal(nix::sys::signal::Signal::SIGINT);
    assert_ne!(
        demo.wait(Duration::from_secs(60)),
        0,
        "an interrupted demo is no success"
    );
    // Its hosts, and the domains of their daemons, also of one that was still starting.
    assert_eq!(names.list(), Vec::<String>::new(), "left behind");
    assert!(
        !std::env::temp_dir()
            .join(format!("weft-demo-{pid}"))
            .exists()
    );
}
