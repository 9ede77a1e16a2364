//! What each command does.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::CommandFactory;
use nix::sys::signal::SigSet;
use weft_core::control::{
    AttachRequest, Attached, DetachRequest, Detached, EndpointRow, NameRow, NameSpec, NetworkRow,
    NetworkSpec, NodeRow, PeerRow, RemoveRequest, Removed, ServiceRow, Status, TokenReply,
    TokenRequest, Which,
};
use weft_core::model::ServiceName;
use weft_core::token;

use super::{
    AttachArgs, Cli, Command, DetachArgs, DnsCommand, NetworkCommand, NodeCommand, NodeRmArgs,
    PsArgs, RestartArgs, ServiceCommand, StateArgs, TokenArgs, UpArgs, service,
};
use crate::background::{self, Origin, Ready, Summary};
use crate::client::{Client, ClientError};
use crate::config::{
    DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, FileConfig, RawUp, UpConfig, directory, kernel_hostname,
};
use crate::run::ATTACH_PATIENCE;
use crate::{daemon, demo, logfile, lookup, run, show};

/// Taking all down waits for the kernel to let go of devices.
const DOWN_PATIENCE: Duration = Duration::from_secs(60);
/// The voters of a removed node get ten seconds.
const REMOVE_PATIENCE: Duration = Duration::from_secs(20);
/// After its answer the daemon has only itself to end.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);

/// Where things are, as flags, environment and file say.
struct Place {
    file: FileConfig,
    file_flag: Option<PathBuf>,
    run_dir_flag: Option<PathBuf>,
}

impl Place {
    fn run_dir(&self) -> anyhow::Result<PathBuf> {
        let asked = self.run_dir_flag.clone().or(self.file.run_dir.clone());
        directory(asked, DEFAULT_RUN_DIR)
    }

    fn state_dir(&self, args: &StateArgs) -> anyhow::Result<PathBuf> {
        let asked = args.state_dir.clone().or(self.file.state_dir.clone());
        directory(asked, DEFAULT_STATE_DIR)
    }

    fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.run_dir()?))
    }
}

/// Does what was asked.
pub(crate) fn execute(cli: Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        // None reads the configuration: they got it handed over, or need none.
        Command::Background => return background_half(),
        Command::RunInside(args) => return run::inside(args),
        Command::DemoPart(part) => return demo::run_part(part).map(done),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "weft", &mut script);
            show::line(String::from_utf8_lossy(&script).trim_end());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let place = Place {
        file: FileConfig::load(cli.config.as_deref())?,
        file_flag: cli.config.map(std::path::absolute).transpose()?,
        run_dir_flag: cli.run_dir,
    };
    match cli.command {
        Command::Up(args) => up(*args, place),
        Command::Restart(args) => restart(&args, &place).map(done),
        Command::Down(args) => down(&place, &args).map(done),
        Command::Reset(args) => reset(&place, &args).map(done),
        Command::Run(args) => {
            need_root("weft run")?;
            run::run(&args, &place.client()?, &place.run_dir()?)
        }
        Command::Exec(args) => {
            need_root("weft exec")?;
            run::exec(&args.command, &place.client()?)
        }
        Command::Demo(args) => {
            need_root("weft demo")?;
            let options = demo::DemoOptions {
                keep: args.keep,
                json: args.json.json,
            };
            demo::run(&options).map(done)
        }
        other => ask(other, &place.client()?).map(done),
    }
}

/// Commands that are one question to the daemon, or two.
fn ask(command: Command, client: &Client) -> anyhow::Result<()> {
    match command {
        Command::Token(args) => invite(&args, client),
        Command::Status(json) => {
            show::data(
                json.json,
                &client.get::<Status>("/v1/status")?,
                show::status,
            );
            Ok(())
        }
        Command::Peers(json) => {
            let rows: Vec<PeerRow> = client.get("/v1/peers")?;
            show::data(json.json, &rows, |rows| show::peers(rows));
            Ok(())
        }
        Command::Ps(args) => ps(&args, client),
        Command::Attach(args) => attach(&args, client),
        Command::Detach(args) => detach(&args, client),
        Command::Service(command) => service_command(command, client),
        Command::Network(command) => network(command, client),
        Command::Dns(command) => dns(command, client),
        Command::Node(NodeCommand::Ls(json)) => {
            let rows: Vec<NodeRow> = client.get("/v1/nodes")?;
            show::data(json.json, &rows, |rows| show::nodes(rows));
            Ok(())
        }
        Command::Node(NodeCommand::Rm(args)) => remove_node(&args, client),
        _ => bail!("this command does not speak to the daemon"),
    }
}

fn done(_: ()) -> ExitCode {
    ExitCode::SUCCESS
}

fn need_root(what: &str) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("{what} must be run as root, for example with sudo")
}

fn background_half() -> anyhow::Result<ExitCode> {
    match background::become_daemon(daemon::run)? {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(ExitCode::FAILURE),
    }
}

fn up(args: UpArgs, place: Place) -> anyhow::Result<ExitCode> {
    let json = args.json.json;
    let raw = RawUp {
        file: place.file_flag,
        join: args.join,
        name: args.name,
        port: args.port,
        tcp_port: args.tcp_port,
        advertise: args.advertise,
        range: args.range,
        no_relay: args.no_relay,
        trusted_subnets: args.trusted_subnets,
        esp: args.esp,
        dscp: args.dscp,
        no_offload: args.no_offload,
        source_ports: args.source_ports,
        rebind: args.rebind,
        state_dir: args.state.state_dir,
        run_dir: place.run_dir_flag,
        foreground: args.foreground,
        log: args.log,
        log_json: args.log_json,
    };
    let config = raw.check(place.file, &kernel_hostname())?;
    need_root("weft up")?;
    if let Some(summary) = already_up(&config)? {
        show::data(json, &summary, |summary| {
            format!(
                "weft is already up on this host: {} in cluster {}; see: weft status, or weft restart",
                summary.name, summary.cluster
            )
        });
        return Ok(ExitCode::SUCCESS);
    }
    // Blocked signals are inherited, and a daemon that never hears SIGTERM can't be stopped.
    SigSet::all()
        .thread_unblock()
        .context("can't unblock signals")?;
    if config.foreground {
        background::prepare_run_dir(&config.run_dir)?;
        logfile::init(None, &config.log, config.log_json)?;
        daemon::run(config, Ready::terminal(json))?;
    } else {
        let summary = background::start(&config, |step| eprintln!("{step}"))?;
        show::up(&summary, json);
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts a daemon that takes the running one's place.
fn restart(args: &RestartArgs, place: &Place) -> anyhow::Result<()> {
    need_root("weft restart")?;
    let client = place.client()?;
    let mut asked: RawUp = client.get("/v1/asked")?;
    if asked.foreground {
        bail!(
            "weft runs in the foreground on this host, for a service manager or a terminal: restart it there, for \
             example with systemctl restart weft"
        );
    }
    asked.run_dir = Some(place.run_dir()?);
    let file = FileConfig::load(place.file_flag.as_deref().or(asked.file.as_deref()))?;
    let mut config = asked.check(file, &kernel_hostname())?;
    config.take_over = true;
    SigSet::all()
        .thread_unblock()
        .context("can't unblock signals")?;
    match background::start(&config, |step| eprintln!("{step}")) {
        Ok(summary) => {
            show::up(&summary, args.json.json);
            Ok(())
        }
        Err(error) => {
            let now = match daemon_status(&client) {
                Ok(Some(old)) => format!("the daemon that ran goes on (process {})", old.pid),
                _ => "weft does not run any more; start it with: weft up".to_owned(),
            };
            bail!("{error:#}; {now}")
        }
    }
}

/// What to say when a daemon is there already; an error when something else was asked of it.
fn already_up(config: &UpConfig) -> anyhow::Result<Option<Summary>> {
    let Some(status) = daemon_status(&Client::new(&config.run_dir))? else {
        return Ok(None);
    };
    if let Some(token) = &config.join {
        let token = token::Token::parse(token.expose())?;
        // Joining again where it already is: what provisioning tools do on every run.
        if token.body().cluster.to_string() != status.cluster {
            bail!(
                "weft is already up on this host, in cluster {}, and the token is for cluster {}; to change over: \
                 weft reset, then weft up --join",
                status.cluster,
                token.body().cluster
            );
        }
    }
    Ok(Some(Summary {
        name: status.name,
        node: status.node,
        cluster: status.cluster,
        origin: Origin::Returned,
        host_ip: status.host_ip,
        port: status.port,
        tcp_port: status.tcp_port,
        range: status.range,
        dns: status.dns,
        netns: status.netns,
        pid: status.pid,
        warnings: status.warnings,
    }))
}

/// What the daemon says of itself; `None` when there is none. One that was killed this very moment still accepts and
/// then breaks off, so a broken connection is tried again until nobody answers.
fn daemon_status(client: &Client) -> anyhow::Result<Option<Status>> {
    let begun = Instant::now();
    loop {
        match client.get("/v1/status") {
            Ok(status) => return Ok(Some(status)),
            Err(error) if error.is_not_running() => return Ok(None),
            Err(ClientError::Lost { .. }) if begun.elapsed() < EXIT_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn down(place: &Place, args: &StateArgs) -> anyhow::Result<()> {
    need_root("weft down")?;
    let state_dir = place.state_dir(args)?;
    let run_dir = place.run_dir()?;
    take_down(&state_dir, &run_dir)
}

fn take_down(state_dir: &Path, run_dir: &Path) -> anyhow::Result<()> {
    let client = Client::new(run_dir);
    let status = match daemon_status(&client)? {
        Some(status) => status,
        None => {
            let found = daemon::remove_leftovers(state_dir, run_dir)?;
            show::line(if found {
                "weft was not running; what an earlier one left in the kernel is removed"
            } else {
                "weft is not running; there is nothing to remove"
            });
            return Ok(());
        }
    };
    let empty = serde_json::json!({});
    match client
        .patient(DOWN_PATIENCE)
        .post::<serde_json::Value>("/v1/down", &empty)
    {
        Ok(_) => wait_for_end(status.pid)?,
        // It ended while it answered, or was killed meanwhile: see for ourselves.
        Err(ClientError::Lost { .. }) => {
            wait_for_end(status.pid)?;
            daemon::remove_leftovers(state_dir, run_dir)?;
        }
        Err(error) => return Err(error.into()),
    }
    show::line("weft is down; everything it made in the kernel is removed, its state is kept");
    Ok(())
}

/// Until the process is gone, its locks are taken and the next `weft up` would be refused.
fn wait_for_end(pid: u32) -> anyhow::Result<()> {
    let begun = Instant::now();
    while is_alive(pid) {
        if begun.elapsed() > EXIT_PATIENCE {
            bail!(
                "the daemon (pid {pid}) removed everything but does not end; end it with: kill {pid}"
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A zombie has let go of everything; only its parent has not looked yet.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // proc(5): the state follows the command's name in parentheses, which may itself hold parentheses.
    let state = stat.rsplit(')').next().map(str::trim_start);
    !state.is_some_and(|s| s.starts_with(['Z', 'X']))
}

fn reset(place: &Place, args: &StateArgs) -> anyhow::Result<()> {
    need_root("weft reset")?;
    let (state_dir, run_dir) = (place.state_dir(args)?, place.run_dir()?);
    say_farewell(&Client::new(&run_dir))?;
    take_down(&state_dir, &run_dir)?;
    daemon::forget(&state_dir)
        .with_context(|| format!("can't forget the state in {}", state_dir.display()))?;
    show::line("this host has forgotten its cluster");
    Ok(())
}

/// Tells the other nodes that this one leaves for good. Whatever comes of it, this host is reset; the others can be told
/// later.
fn say_farewell(client: &Client) -> anyhow::Result<()> {
    let Some(status) = daemon_status(client)? else {
        eprintln!(
            "weft: note: weft is not running, so the other nodes, if there are any, can't be told; run there: weft node rm"
        );
        return Ok(());
    };
    let left = client
        .patient(REMOVE_PATIENCE)
        .post::<serde_json::Value>("/v1/leave", &serde_json::json!({}));
    match left {
        Ok(_) if status.nodes > 1 => {
            eprintln!("weft: left the cluster; its addresses go to the other nodes");
        }
        Ok(_) => {}
        Err(error) => eprintln!("weft: note: {error}"),
    }
    Ok(())
}

fn invite(args: &TokenArgs, client: &Client) -> anyhow::Result<()> {
    let request = TokenRequest {
        ttl_secs: args.ttl.as_secs(),
        uses: args.uses,
        reusable: args.reusable,
    };
    let reply: TokenReply = client.post("/v1/token", &request)?;
    show::data(args.json.json, &reply, |reply| reply.token.clone());
    Ok(())
}

fn remove_node(args: &NodeRmArgs, client: &Client) -> anyhow::Result<()> {
    let request = RemoveRequest {
        node: args.node.clone(),
        force: args.force,
    };
    let removed: Removed = client
        .patient(REMOVE_PATIENCE)
        .post("/v1/nodes/remove", &request)?;
    show::data(args.json.json, &removed, |removed| {
        format!(
            "{} ({}) is removed; its addresses are back",
            removed.name, removed.node
        )
    });
    Ok(())
}

fn ps(args: &PsArgs, client: &Client) -> anyhow::Result<()> {
    let mut rows: Vec<EndpointRow> = client.get("/v1/endpoints")?;
    rows.retain(|row| row.local || !args.local);
    show::data(args.json.json, &rows, |rows| show::endpoints(rows));
    Ok(())
}

fn attach(args: &AttachArgs, client: &Client) -> anyhow::Result<()> {
    let found = args
        .target
        .find()?
        .context("say what to attach with --netns, --pid or --container")?;
    let mut names = args.endpoint.names.clone();
    if names.is_empty() {
        names.extend(found.name);
    }
    let request = AttachRequest {
        target: found.target,
        names,
        network: args.endpoint.network.clone(),
        ip: args.endpoint.ip,
        ifname: args.ifname.clone(),
        labels: service::selector(&args.endpoint.labels)?,
        container_id: None,
    };
    let attached: Attached = client
        .patient(ATTACH_PATIENCE)
        .post("/v1/attach", &request)?;
    show::data(args.json.json, &attached, show::attached);
    Ok(())
}

fn detach(args: &DetachArgs, client: &Client) -> anyhow::Result<()> {
    let which = match (args.id, args.target.find()?) {
        (Some(id), _) => Which::Id(id),
        (None, Some(found)) => Which::Target(found.target, args.ifname.clone()),
        (None, None) => bail!(
            "say what to detach: an endpoint's id from `weft ps`, or --netns, --pid or --container"
        ),
    };
    let detached: Detached = client
        .patient(ATTACH_PATIENCE)
        .post("/v1/detach", &DetachRequest { which })?;
    show::data(args.json.json, &detached, |detached| {
        if detached.ids.is_empty() {
            return "nothing of that was attached".to_owned();
        }
        let lines = detached.ids.iter().map(|id| format!("detached {id}\n"));
        lines.collect()
    });
    Ok(())
}

fn service_command(command: ServiceCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        ServiceCommand::Create(args) => {
            let spec = service::created(&args)?;
            let row: ServiceRow = client.post("/v1/services", &spec)?;
            show::data(args.json.json, &row, show::service);
        }
        ServiceCommand::Ls(json) => {
            let rows: Vec<ServiceRow> = client.get("/v1/services")?;
            show::data(json.json, &rows, |rows| show::services(rows));
        }
        ServiceCommand::Inspect { name, json } => {
            show::data(json.json, &find_service(client, &name)?, show::service);
        }
        ServiceCommand::Update(args) => {
            let present = find_service(client, &args.name)?;
            let next = service::updated(present.spec, &args)?;
            let row: ServiceRow = client.put(&format!("/v1/services/{}", args.name), &next)?;
            show::data(args.json.json, &row, show::service);
        }
        ServiceCommand::Rm { name } => client.delete(&format!("/v1/services/{name}"))?,
    }
    Ok(())
}

fn find_service(client: &Client, name: &ServiceName) -> anyhow::Result<ServiceRow> {
    let rows: Vec<ServiceRow> = client.get("/v1/services")?;
    rows.into_iter()
        .find(|row| row.spec.name == *name)
        .with_context(|| format!("there is no service {name}; see: weft service ls"))
}

fn network(command: NetworkCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        NetworkCommand::Create(args) => {
            let spec = NetworkSpec {
                name: args.name,
                prefix_len: args.size,
                subnet: args.subnet,
            };
            // Others may have to hand over space for it.
            let row: NetworkRow = client
                .patient(ATTACH_PATIENCE)
                .post("/v1/networks", &spec)?;
            show::data(args.json.json, &row, show::network);
        }
        NetworkCommand::Ls(json) => {
            let rows: Vec<NetworkRow> = client.get("/v1/networks")?;
            show::data(json.json, &rows, |rows| show::networks(rows));
        }
        NetworkCommand::Rm { name } => client.delete(&format!("/v1/networks/{name}"))?,
    }
    Ok(())
}

fn dns(command: DnsCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        DnsCommand::Add { name, ip, json } => {
            let row: NameRow = client.post("/v1/names", &NameSpec { name, ip })?;
            show::data(json.json, &row, show::name);
        }
        DnsCommand::Ls(json) => {
            let rows: Vec<NameRow> = client.get("/v1/names")?;
            show::data(json.json, &rows, |rows| show::names(rows));
        }
        DnsCommand::Rm { name } => client.delete(&format!("/v1/names/{name}"))?,
        DnsCommand::Lookup { name, json } => {
            let status: Status = client.get("/v1/status")?;
            let found = lookup::ask(status.dns.into(), &name)?.with_context(|| {
                format!("weft's name server knows no {name}; see: weft ps, weft dns ls")
            })?;
            show::data(json.json, &found, show::looked_up);
        }
    }
    Ok(())
}
