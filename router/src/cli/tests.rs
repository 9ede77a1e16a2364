use clap::CommandFactory;

use super::service::{created, updated};
use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn create_args(line: &str) -> ServiceArgs {
    match parse(&format!("weft service create {line}"))
        .unwrap()
        .command
    {
        Command::Service(ServiceCommand::Create(args)) => args,
        other => panic!("{other:?}"),
    }
}

fn update_args(line: &str) -> ServiceUpdateArgs {
    match parse(&format!("weft service update {line}"))
        .unwrap()
        .command
    {
        Command::Service(ServiceCommand::Update(args)) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_of_the_contract_is_taken_as_the_contract_writes_it() {
    for line in [
        "up --join weft1_x --name a --port 7000 --tcp-port 443 --advertise 192.0.2.1 --advertise 2001:db8::1 --range 10.64.0.0/12 --trusted-subnet 10.0.0.0/8 --state-dir /s --run-dir /r --foreground",
        "up",
        "restart --json",
        "down",
        "reset",
        "token --ttl 1h --uses 3",
        "token --reusable",
        "status --json",
        "peers --json",
        "ps --json",
        "attach --netns /run/netns/x --name a --name b --network n --ip 10.32.0.9 --ifname eth1",
        "attach --pid 1",
        "attach --container abc",
        "detach 0011223344556677",
        "detach --pid 1",
        "run --name web --network n -e A=b=c -- python3 -m http.server 80",
        "exec -- tcpdump -ni wu0",
        "service create web --port 80:8000 --port 53/udp --publish 8080:80 --publish [::1]:5353:53/udp --select a=b",
        "service ls",
        "service inspect web --json",
        "service update web --port 81",
        "service rm web",
        "network create blue",
        "network create blue --size 18 --json",
        "network create blue --size /20",
        "network create blue --subnet 10.40.0.0/20",
        "network ls --json",
        "network rm blue",
        "dns add db 10.32.0.7",
        "dns add db.weft.internal fd00::1",
        "dns rm db",
        "dns lookup db",
        "node ls",
        "node rm x --force",
        "demo",
        "completions bash",
    ] {
        if let Err(error) = parse(&format!("weft {line}")) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn what_can_t_be_meant_is_wrong_usage() {
    for line in [
        "",
        "nonsense",
        "up --port 0",
        "up --port 70000",
        "up --name a_b",
        "up --name localhost",
        "up --range 10.32.0.0",
        "up --trusted-subnet x",
        "token --ttl 0s",
        "token --ttl 5",
        "token --ttl 400days",
        "token --uses 0",
        "token --uses 2 --reusable",
        "attach --pid 0",
        "attach --pid 1 --netns x",
        "attach --pid 1 --ifname lo",
        "attach --pid 1 --ifname a/b",
        "attach --pid 1 --ifname sixteencharacter",
        "attach --pid 1 --ip 1.2.3",
        "attach --pid 1 --label x",
        "attach --pid 1 --label a=b;c",
        "detach zz",
        "detach 0011223344556677 --pid 1",
        "run --name web",
        "run -e =x -- true",
        "exec",
        "service create web",
        "service create web --port 0",
        "service create web --port 80/sctp",
        "service create web --port 80 --publish 80",
        "service create weft --port 80",
        "service update web --publish 1:2 --no-publish",
        "dns add a.b 10.0.0.1",
        "dns add a 10.0.0",
        "network create",
        "network create a_b",
        "network create x --size 4000",
        "network create x --size 20 --subnet 10.40.0.0/20",
        "network create x --subnet 10.40.0.0",
        "network rm",
        "why a b",
        "doctor",
        "report",
        "bench x",
    ] {
        let error = match parse(&format!("weft {line}")) {
            Err(error) => error,
            Ok(cli) => panic!("{line}: {cli:?}"),
        };
        assert!(error.use_stderr() || line.is_empty(), "{line}");
    }
}

#[test]
fn a_service_is_what_its_flags_say() {
    let spec = created(&create_args(
        "web --port 80:8000 --port 53/udp --publish 8080:80 --publish 192.0.2.1:53:53/udp --select tier=front",
    ))
    .unwrap();
    assert_eq!(spec.ports.len(), 2);
    assert_eq!((spec.ports[0].port, spec.ports[0].target), (80, 8000));
    assert_eq!(spec.ports[0].publish[0].port, 8080);
    assert_eq!(
        spec.ports[1].publish[0].addr,
        Some("192.0.2.1".parse().unwrap())
    );
    assert_eq!(spec.selector["tier"], "front");
    for (line, want) in [
        ("web --port 80 --publish 8080:81", "add --port 81/tcp"),
        ("web --port 80 --publish 8080:80/udp", "add --port 80/udp"),
        ("web --port 80 --port 80:81", "given twice"),
        (
            "web --port 80 --publish 1:80 --publish 1:80",
            "takes port 1/tcp twice",
        ),
        (
            "web --port 80 --publish 1:80 --publish 192.0.2.1:1:80",
            "takes port 1/tcp twice",
        ),
        ("web --port 80 --select a=b --select a=c", "both b and c"),
    ] {
        let error = created(&create_args(line)).unwrap_err().to_string();
        assert!(error.contains(want), "{line}: {error}");
    }
    let both = "web --port 80 --publish 192.0.2.1:1:80 --publish 192.0.2.2:1:80";
    assert!(created(&create_args(both)).is_ok());
}

#[test]
fn an_update_replaces_what_is_given_and_keeps_the_rest() {
    let before = created(&create_args(
        "web --port 80 --port 443 --publish 8080:80 --select a=b",
    ))
    .unwrap();
    let update = |line: &str| updated(before.clone(), &update_args(line));

    let next = update("web --port 80:9000").unwrap();
    assert_eq!(next.ports.len(), 1);
    assert_eq!(next.ports[0].target, 9000);
    assert_eq!(next.ports[0].publish[0].port, 8080);
    assert_eq!(next.selector, before.selector);

    let next = update("web --publish 9090:443").unwrap();
    assert!(next.ports[0].publish.is_empty());
    assert_eq!(next.ports[1].publish[0].port, 9090);

    assert!(
        update("web --no-publish")
            .unwrap()
            .ports
            .iter()
            .all(|p| p.publish.is_empty())
    );
    assert!(update("web --no-select").unwrap().selector.is_empty());
    assert!(
        update("web --port 81")
            .unwrap_err()
            .to_string()
            .contains("80/tcp is published")
    );
    assert!(update("web --port 81 --no-publish").is_ok());
    assert!(
        update("web")
            .unwrap_err()
            .to_string()
            .contains("nothing to change")
    );
}
