use super::*;

fn file(text: &str) -> FileConfig {
    FileConfig::parse(text).unwrap()
}

fn check(raw: RawUp, toml: &str) -> anyhow::Result<UpConfig> {
    raw.check(file(toml), "alpha.example.org\n")
}

#[test]
fn with_nothing_said_the_contract_s_defaults_hold() {
    let config = check(RawUp::default(), "").unwrap();
    assert_eq!(config.port, 6783);
    assert_eq!(config.tcp_port, None);
    assert_eq!(config.hostname.as_str(), "alpha");
    assert_eq!(config.name, None);
    assert_eq!(config.founding_range().to_string(), "10.32.0.0/12");
    assert_eq!(config.state_dir, Path::new("/var/lib/weft"));
    assert_eq!(config.run_dir, Path::new("/run/weft"));
    assert_eq!(config.dscp, Dscp::Clear);
    assert_eq!(config.esp, EspUse::Auto);
    assert!(config.no_offload.is_empty());
    assert_eq!(config.source_ports, 1);
    assert!(config.join.is_none() && !config.foreground && !config.rebind);
}

#[test]
fn the_file_is_over_defaults_and_flags_are_over_the_file() {
    let toml = "name = \"filed\"\nport = 7000\ntcp-port = 443\nadvertise = [\"192.0.2.1\"]\nrange = \"10.64.0.0/12\"\nrun-dir = \"/run/x\"\ndscp = \"copy\"\nno-offload = [\"gso\", \"uso\"]\nsource-ports = 3\n";
    let config = check(RawUp::default(), toml).unwrap();
    assert_eq!(
        config.name.as_ref().map(ToString::to_string),
        Some("filed".to_owned())
    );
    assert_eq!((config.port, config.tcp_port), (7000, Some(443)));
    assert_eq!(config.advertise, ["192.0.2.1:7000".parse().unwrap()]);
    assert_eq!(config.run_dir, Path::new("/run/x"));
    assert_eq!(config.dscp, Dscp::Copy);
    assert_eq!(config.no_offload, [Offload::Gso, Offload::Uso]);
    assert_eq!(config.source_ports, 3);

    let flags = RawUp {
        name: Some(Label::parse("flagged").unwrap()),
        port: Some(7001),
        tcp_port: Some(8443),
        advertise: vec!["[2001:db8::1]:9".to_owned()],
        run_dir: Some("/run/y".into()),
        dscp: Some(Dscp::Clear),
        no_offload: vec![Offload::Gro],
        source_ports: Some(2),
        ..RawUp::default()
    };
    let config = check(flags, toml).unwrap();
    assert_eq!(
        config.name.as_ref().map(ToString::to_string),
        Some("flagged".to_owned())
    );
    assert_eq!((config.port, config.tcp_port), (7001, Some(8443)));
    assert!(check(RawUp::default(), "tcp-port = 0").is_err());
    assert_eq!(config.advertise, ["[2001:db8::1]:9".parse().unwrap()]);
    assert_eq!(config.founding_range().to_string(), "10.64.0.0/12");
    assert_eq!(config.run_dir, Path::new("/run/y"));
    assert_eq!(config.dscp, Dscp::Clear);
    assert_eq!(config.no_offload, [Offload::Gro]);
    assert_eq!(config.source_ports, 2);
}

#[test]
fn what_can_t_be_meant_is_refused_in_one_line() {
    for (toml, want) in [
        ("port = 0", "1 to 65535"),
        ("range = \"10.0.0.1/12\"", "did you mean"),
        ("range = \"10.0.0.0/24\"", "between /8 and /22"),
        ("trusted-subnets = [\"10.0.0.1/8\"]", "did you mean"),
        ("source-ports = 0", "1 to 4"),
        ("source-ports = 5", "1 to 4"),
        ("advertise = [\"nowhere\"]", "give an IP address"),
        ("advertise = [\"0.0.0.0\"]", "could not reach it"),
        ("advertise = [\"127.0.0.1:1\"]", "could not reach it"),
        ("name = \"a_b\"", "letters, digits and hyphens"),
    ] {
        let error = format!("{:#}", check(RawUp::default(), toml).unwrap_err());
        assert!(error.contains(want), "{toml}: {error}");
        assert!(!error.contains('\n'), "{toml}: {error}");
    }
}

#[test]
fn a_bad_file_is_told_by_its_line_and_no_secret_has_a_place_in_it() {
    for bad in [
        "port = \"x\"",
        "join = \"weft1_secret\"",
        "port",
        "colour = 1",
    ] {
        let error = FileConfig::parse(&format!("# first\n{bad}\n")).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.starts_with("line 2: "), "{text}");
        assert!(!text.contains("weft1_secret"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
    let missing = FileConfig::load(Some(Path::new("/nonexistent/weft.toml"))).unwrap_err();
    assert!(format!("{missing:#}").contains("/nonexistent/weft.toml"));
}

#[test]
fn a_token_comes_from_the_line_or_a_file_and_is_never_shown() {
    let token = resolve_token(" weft1_abc \n").unwrap();
    assert_eq!(token.expose(), "weft1_abc");
    assert_eq!(format!("{token:?}"), "Token(***)");

    let path = std::env::temp_dir().join(format!("weft-token-{}", std::process::id()));
    std::fs::write(&path, "weft1_filed\n").unwrap();
    let read = resolve_token(&format!("@{}", path.display()));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(read.unwrap().expose(), "weft1_filed");

    for bad in ["", "two words secret", "@/nonexistent/token"] {
        let error = format!("{:#}", resolve_token(bad).unwrap_err());
        assert!(
            !error.contains("secret") && !error.contains('\n'),
            "{error}"
        );
    }
    let config = UpConfig {
        join: Some(token),
        ..check(RawUp::default(), "").unwrap()
    };
    assert!(!format!("{config:?}").contains("weft1_abc"));
}

#[test]
fn who_starts_it_again_asks_for_the_same_and_reads_the_file_as_it_is_then() {
    let flags = RawUp {
        join: Some("weft1_secret".to_owned()),
        name: Some(Label::parse("flagged").unwrap()),
        state_dir: Some("state".into()),
        rebind: true,
        log_json: true,
        ..RawUp::default()
    };
    let first = check(flags, "port = 7000\nrun-dir = \"/run/x\"\n").unwrap();
    let told = serde_json::to_string(&first.asked).unwrap();
    assert!(!told.contains("secret"), "{told}");
    // A later version knows of more.
    let told = told.replacen('{', "{\"brighter\":true,", 1);
    let asked: RawUp = serde_json::from_str(&told).unwrap();
    let again = check(asked, "port = 7001\nrun-dir = \"/run/y\"\n").unwrap();
    assert_eq!(again.port, 7001);
    assert_eq!((again.name, again.log_json), (first.name, true));
    assert_eq!(
        (again.state_dir, again.run_dir),
        (first.state_dir, first.run_dir)
    );
    assert!(again.join.is_none() && !again.rebind);
}

#[test]
fn any_hostname_becomes_a_node_name() {
    for (host, name) in [
        ("web-1", "web-1"),
        ("Web_1.example", "web-1"),
        ("localhost", "node"),
        ("", "node"),
        ("---", "node"),
        ("(none)", "none"),
    ] {
        assert_eq!(node_name_from(host).as_str(), name, "{host}");
    }
}
