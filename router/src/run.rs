//! `weft run` and `weft exec`.
//!
//! ```text
//! weft run                              weft run-inside (this program again)
//!   │ spawns ──────────────────────────▶ dies with its parent; new network and mount namespace
//!   │ ◀── "ready" ─── status pipe ──────
//!   │ attaches it by its pid (API)
//!   │ ─── resolv.conf's path ── orders ▶ mounts it over /etc/resolv.conf, becomes CMD
//!   │ ◀── end of file, or an error ─────
//!   │ forwards signals until it ends; detaches; passes its status on
//! ```

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use weft_core::control::{AttachRequest, Attached, DetachRequest, Detached, Status, Target, Which};

use crate::cli::RunArgs;
use crate::cli::service::selector;
use crate::client::Client;

/// The hidden command that the half inside the new namespace is.
pub(crate) const INSIDE: &str = "run-inside";
/// Attaching may wait for another node to give an address away.
pub(crate) const ATTACH_PATIENCE: Duration = Duration::from_secs(30);
/// What shells answer for a command that is not there, or can't be executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
const READY: &[u8] = b"ready\n";
/// Resolvers that would be asked instead of resolv.conf's server: they speak for the host's namespace.
const HOST_RESOLVERS: &[&str] = &["/run/systemd/resolve", "/run/nscd"];
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Passed on to the command. From a terminal the kernel sends them to the whole foreground group, the command included.
const FORWARDED: &[Signal] = &[
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGWINCH,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// What `weft run` tells its other half.
#[derive(Debug, Args)]
pub(crate) struct InsideArgs {
    #[arg(long)]
    status_fd: RawFd,
    #[arg(long)]
    orders_fd: RawFd,
    #[arg(long)]
    parent: i32,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// `weft run`.
pub(crate) fn run(args: &RunArgs, client: &Client, run_dir: &Path) -> anyhow::Result<ExitCode> {
    // Ask first: a typing error in the run directory should not cost a namespace.
    let _: Status = client.get("/v1/status")?;
    let signals = take_signals()?;
    let mut inside = Inside::spawn(args)?;
    let attached = match attach(args, client, inside.child.id()) {
        Ok(attached) => attached,
        Err(error) => {
            inside.abandon();
            return Err(error);
        }
    };
    let result = inside
        .proceed(&attached, run_dir)
        .and_then(|started| match started {
            Started::Running => wait_forwarding(&mut inside.child, &signals),
            Started::Refused(code, text) => {
                eprintln!("weft: {text}");
                let _ = inside.child.wait();
                Ok(ExitCode::from(code))
            }
        });
    if result.is_err() {
        inside.abandon();
    }
    detach(client, &attached);
    result
}

fn attach(args: &RunArgs, client: &Client, pid: u32) -> anyhow::Result<Attached> {
    let endpoint = &args.endpoint;
    let request = AttachRequest {
        target: Target::Pid(pid),
        names: endpoint.names.clone(),
        network: endpoint.network.clone(),
        ip: endpoint.ip,
        ifname: "eth0".to_owned(),
        labels: selector(&endpoint.labels)?,
        container_id: None,
    };
    Ok(client
        .patient(ATTACH_PATIENCE)
        .post("/v1/attach", &request)?)
}

/// The command's own end is what counts; a daemon that is gone by now finds the leg missing by itself.
fn detach(client: &Client, attached: &Attached) {
    let request = DetachRequest {
        which: Which::Id(attached.id),
    };
    if let Err(error) = client.post::<Detached>("/v1/detach", &request)
        && !error.is_not_running()
    {
        eprintln!("weft: can't detach {}: {error}", attached.id);
    }
}

/// Signals wait in the descriptor from now on, so none is lost between here and the command's start.
fn take_signals() -> anyhow::Result<SignalFd> {
    let set = taken();
    set.thread_block().context("can't take over signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("can't read signals")
}

fn taken() -> SigSet {
    let mut set: SigSet = FORWARDED.iter().copied().collect();
    set.add(Signal::SIGCHLD);
    set
}

/// The half inside, and the pipes to it.
struct Inside {
    child: Child,
    status: File,
    /// Closed with the order: its end tells the half inside that the order is whole.
    orders: Option<File>,
}

enum Started {
    Running,
    Refused(u8, String),
}

impl Inside {
    /// Returns once its namespace exists.
    fn spawn(args: &RunArgs) -> anyhow::Result<Self> {
        let (status, its_status) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).context("can't make a pipe")?;
        let (its_orders, orders) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC).context("can't make a pipe")?;
        keep_over_exec(&its_status)?;
        keep_over_exec(&its_orders)?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("weft")
            .arg(INSIDE)
            .args(["--status-fd", &its_status.as_raw_fd().to_string()])
            .args(["--orders-fd", &its_orders.as_raw_fd().to_string()])
            .args(["--parent", &std::process::id().to_string()])
            .arg("--")
            .args(&args.command)
            .envs(args.env.iter().map(|(k, v)| (k, v)));
        let child = command.spawn().context("can't start the command")?;
        let mut inside = Self {
            child,
            status: File::from(status),
            orders: Some(File::from(orders)),
        };
        drop((its_status, its_orders));
        let mut word = [0; READY.len()];
        let heard = inside.status.read_exact(&mut word);
        if heard.is_err() || word != READY {
            let mut text = String::from_utf8_lossy(&word).into_owned();
            let _ = inside.status.read_to_string(&mut text);
            inside.abandon();
            bail!(
                "can't make a namespace for the command: {}",
                text.trim_matches(['\0', '\n'])
            );
        }
        Ok(inside)
    }

    /// Lets it become the command, and hears whether it did.
    fn proceed(&mut self, attached: &Attached, run_dir: &Path) -> anyhow::Result<Started> {
        let path = run_dir.join(format!("resolv-{}.conf", self.child.id()));
        let written = write_resolv_conf(&path, attached);
        let started = written.and_then(|()| self.order(&path));
        // Mounted by now, the file lives on without a name.
        let _ = std::fs::remove_file(&path);
        started
    }

    fn order(&mut self, resolv_conf: &Path) -> anyhow::Result<Started> {
        use std::os::unix::ffi::OsStrExt;
        self.orders
            .take()
            .context("the order was given already")?
            .write_all(&[resolv_conf.as_os_str().as_bytes(), b"\n"].concat())
            .context("the command's namespace is gone")?;
        let mut said = String::new();
        self.status.read_to_string(&mut said)?;
        // Nothing at all: the descriptor was closed because the command took over.
        let Some((code, text)) = said.split_once(' ') else {
            return Ok(Started::Running);
        };
        Ok(Started::Refused(code.parse().unwrap_or(1), text.to_owned()))
    }

    fn abandon(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep_over_exec(fd: &OwnedFd) -> anyhow::Result<()> {
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).context("can't hand a pipe over")?;
    Ok(())
}

/// Readable for all, because the command may drop its rights.
fn write_resolv_conf(path: &Path, attached: &Attached) -> anyhow::Result<()> {
    let text = format!("nameserver {}\nsearch {}\n", attached.dns, attached.domain);
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("can't write {}", path.display()))
}

/// Waits for the command and passes on what is sent to us.
fn wait_forwarding(child: &mut Child, signals: &SignalFd) -> anyhow::Result<ExitCode> {
    let pid = Pid::from_raw(i32::try_from(child.id()).context("impossible process id")?);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(exit_code(status));
        }
        let Some(info) = signals.read_signal()? else {
            continue;
        };
        let from_terminal = info.ssi_code == libc::SI_KERNEL;
        let signal = i32::try_from(info.ssi_signo)
            .ok()
            .and_then(|number| Signal::try_from(number).ok());
        if let Some(signal) = signal
            && signal != Signal::SIGCHLD
            && !from_terminal
        {
            // It may have ended in this very moment.
            let _ = kill(pid, signal);
        }
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let number = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    ExitCode::from(u8::try_from(number & 0xff).unwrap_or(1))
}

/// The half inside. It returns only if the command could not be started.
pub(crate) fn inside(args: &InsideArgs) -> anyhow::Result<ExitCode> {
    // A new process inherits what its parent has blocked.
    taken()
        .thread_unblock()
        .context("can't give signals back")?;
    // Reopened, they are ours to close on exec; the inherited numbers must not leak into the command.
    let mut status = take_over(args.status_fd, File::options().write(true))?;
    let mut orders = take_over(args.orders_fd, File::options().read(true))?;
    let ended = enter_namespaces(args.parent).and_then(|()| {
        status.write_all(READY)?;
        let mut path = String::new();
        (&mut orders).take(4096).read_to_string(&mut path)?;
        // Without orders the other half gave up; it has said why.
        let path = path.strip_suffix('\n').context("no orders came")?;
        point_resolvers_at(Path::new(path))
    });
    let refusal = match ended {
        Err(error) => (1, crate::one_line(&error)),
        Ok(()) => {
            let (program, rest) = split(&args.command)?;
            let error = Command::new(program).args(rest).exec();
            cant_execute(program, &error)
        }
    };
    let _ = status.write_all(format!("{} {}", refusal.0, refusal.1).as_bytes());
    Ok(ExitCode::from(refusal.0))
}

fn take_over(fd: RawFd, options: &std::fs::OpenOptions) -> anyhow::Result<File> {
    let file = options
        .open(format!("/proc/self/fd/{fd}"))
        .context("this command is for weft itself; use: weft run")?;
    nix::unistd::close(fd).context("can't close a pipe")?;
    Ok(file)
}

fn enter_namespaces(parent: i32) -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("can't tie the command to weft run")?;
    if nix::unistd::getppid().as_raw() != parent {
        bail!("weft run is gone");
    }
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("can't make a network namespace (is this root, with CAP_SYS_ADMIN?)")?;
    // Nothing mounted in here may show outside; what is mounted outside may still come in.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .context("can't separate the mounts")
}

fn point_resolvers_at(resolv_conf: &Path) -> anyhow::Result<()> {
    let text = std::fs::read(resolv_conf)
        .with_context(|| format!("can't read {}", resolv_conf.display()))?;
    // Before the hiding: afterwards a link into a hidden directory leads nowhere.
    let target = std::fs::canonicalize(RESOLV_CONF).or_else(|_| link_target())?;
    for hidden in HOST_RESOLVERS.iter().filter(|dir| Path::new(dir).is_dir()) {
        mount(
            Some("tmpfs"),
            *hidden,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some("size=64k,mode=755"),
        )
        .with_context(|| format!("can't hide {hidden}"))?;
        if target.starts_with(hidden) {
            return std::fs::write(&target, &text)
                .with_context(|| format!("can't write {}", target.display()));
        }
    }
    mount(
        Some(resolv_conf),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("can't mount over {}", target.display()))
}

/// For a link whose end does not exist (a resolver that is not running).
fn link_target() -> anyhow::Result<PathBuf> {
    let link = std::fs::read_link(RESOLV_CONF).with_context(|| {
        format!(
            "there is no {RESOLV_CONF} to replace; an empty file is enough: touch {RESOLV_CONF}"
        )
    })?;
    let joined = Path::new("/etc").join(link);
    let mut whole = PathBuf::from("/");
    for part in joined.components().skip(1) {
        match part {
            std::path::Component::ParentDir => drop(whole.pop()),
            part => whole.push(part),
        }
    }
    Ok(whole)
}

/// `weft exec`: becomes the command, inside the domain.
pub(crate) fn exec(command: &[OsString], client: &Client) -> anyhow::Result<ExitCode> {
    let status: Status = client.get("/v1/status")?;
    let path = Path::new("/run/netns").join(&status.netns);
    let netns = File::open(&path)
        .with_context(|| format!("can't open weft's namespace {}", path.display()))?;
    setns(netns, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("can't enter weft's namespace {}", path.display()))?;
    let (program, rest) = split(command)?;
    let error = Command::new(program).args(rest).exec();
    let (code, text) = cant_execute(program, &error);
    eprintln!("weft: {text}");
    Ok(ExitCode::from(code))
}

fn split(command: &[OsString]) -> anyhow::Result<(&OsStr, &[OsString])> {
    let (program, rest) = command.split_first().context("give a command after --")?;
    Ok((program, rest))
}

fn cant_execute(program: &OsStr, error: &std::io::Error) -> (u8, String) {
    let code = match error.kind() {
        ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    (
        code,
        format!("can't execute {}: {error}", program.to_string_lossy()),
    )
}
