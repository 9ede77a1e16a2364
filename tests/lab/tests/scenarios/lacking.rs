//! A host that lacks something: weft says at once what, by name, and leaves nothing behind.

use weft_lab::{Host, Lab};

/// `weft up` in a mount namespace of its own that `prepare` has taken something from.
fn up_after(host: &Host, prepare: &str) -> String {
    let weft = Host::binary("weft");
    let (run, state) = (host.run_dir(), host.state_dir());
    let script = format!(
        "{prepare} && WEFT_RUN_DIR={} WEFT_STATE_DIR={} exec {weft} up",
        run.display(),
        state.display()
    );
    host.run(&["unshare", "--mount", "sh", "-c", &script])
        .fails_with(1)
}

fn one(name: &str) -> (Lab, Host) {
    let lab = Lab::new(name);
    let host = lab.host("h1", &lab.subnet("a"));
    (lab, host)
}

#[test]
fn a_missing_nft_is_named_with_its_package() {
    let (_lab, host) = one("nonft");
    let error = up_after(
        &host,
        "for f in /usr/sbin/nft /sbin/nft /usr/bin/nft /usr/local/sbin/nft; do \
         [ -e $f ] && d=$(dirname $f) && mount -t tmpfs none $d; done; true",
    );
    assert!(
        error.contains("nft binary") && error.contains("nftables"),
        "{error}"
    );
}

#[test]
fn a_missing_tun_device_is_named() {
    let (_lab, host) = one("notun");
    let error = up_after(&host, "mount -t tmpfs none /dev/net");
    assert!(error.contains("/dev/net/tun"), "{error}");
}

#[test]
fn a_missing_right_is_named() {
    let (_lab, host) = one("nocap");
    let weft = Host::binary("weft");
    let env = [
        ("WEFT_RUN_DIR", host.run_dir().display().to_string()),
        ("WEFT_STATE_DIR", host.state_dir().display().to_string()),
    ];
    let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let without = [
        "setpriv",
        "--bounding-set",
        "-net_admin",
        "--inh-caps",
        "-net_admin",
    ];
    let error = host
        .run_env(&env, &[&without[..], &[&weft, "up"]].concat(), b"")
        .fails_with(1);
    assert!(error.to_lowercase().contains("net_admin"), "{error}");
}

/// The rights that the systemd unit leaves are enough for all that a daemon does.
#[test]
fn the_unit_s_rights_suffice() {
    let unit = include_str!("../../../../examples/weft.service");
    let caps = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .expect("the unit bounds its rights");
    let keep: String = caps
        .split_whitespace()
        .map(|cap| format!(",+{}", cap.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let (_lab, host) = one("unit");
    let (run, state) = (host.run_dir(), host.state_dir());
    let script = format!(
        "WEFT_RUN_DIR={} WEFT_STATE_DIR={} exec setpriv --no-new-privs --bounding-set=-all{keep} {} up",
        run.display(),
        state.display(),
        Host::binary("weft")
    );
    host.run(&["sh", "-c", &script]).ok();
    let _web = host.serve("web", &[]);
    host.publish_web();
    host.tool(&["ask", "tcp", "127.0.0.1:8080"]).ok();
    let mut other = host.spawn_tool("other", &["serve", "--name", "other", "--port", "9001"]);
    other.wait_for("ready", std::time::Duration::from_secs(5));
    let taken = [
        "service",
        "create",
        "other",
        "--port",
        "80",
        "--publish",
        "9001:80",
    ];
    let error = host.weft(&taken).fails_with(1);
    assert!(error.contains("lab-tool"), "{error}");
    host.weft(&["down"]).ok();
}
