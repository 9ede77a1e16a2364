//! Going to the background, and telling whoever started weft how it went.
//!
//! ```text
//! weft up ──spawns──▶ weft background      configuration and token by stdin, never in argv or the environment
//!    ▲                     │
//!    └──── stdout: one ────┘  {"progress":…}*  then {"up":…} or {"failed":…}; then it is closed
//! ```
//! The child is this very program, started anew, so nothing is forked half-way and no thread has to be considered.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use weft_core::model::NodeName;

use crate::config::UpConfig;
use crate::logfile;

/// The hidden command that the child is.
pub(crate) const COMMAND: &str = "background";
/// Largest configuration the child takes from its standard input.
const MAX_CONFIG: u64 = 1 << 20;

/// How this node came to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Origin {
    /// It founded it just now.
    Founded,
    /// It joined it just now.
    Joined,
    /// It has been a member and is back.
    Returned,
}

/// What `weft up` tells once all is in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// The node's name.
    pub(crate) name: NodeName,
    /// Its short id.
    pub(crate) node: String,
    /// The cluster's id.
    pub(crate) cluster: String,
    /// How it came to it.
    pub(crate) origin: Origin,
    /// The host's own overlay address.
    pub(crate) host_ip: Option<Ipv4Addr>,
    /// Underlay port.
    pub(crate) port: u16,
    /// The port where TCP connections are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tcp_port: Option<u16>,
    /// The cluster's range.
    pub(crate) range: Ipv4Net,
    /// Name server.
    pub(crate) dns: Ipv4Addr,
    /// Name of the domain's namespace.
    pub(crate) netns: String,
    /// The daemon's process.
    pub(crate) pid: u32,
    /// What a person should know, one line each.
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum News {
    Progress(String),
    Up(Summary),
    Failed(String),
}

/// The daemon's end: what it calls while it starts. Clones speak for the same start; the first verdict counts and
/// whatever comes after it is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    to: Arc<Mutex<Teller>>,
}

#[derive(Debug)]
enum Teller {
    /// To the waiting parent.
    Parent(File),
    /// To the terminal, with the summary as JSON or in words.
    Terminal { json: bool },
    /// The verdict is given.
    Done,
}

impl Ready {
    /// For `--foreground`.
    pub(crate) fn terminal(json: bool) -> Self {
        Self::with(Teller::Terminal { json })
    }

    fn with(teller: Teller) -> Self {
        Self {
            to: Arc::new(Mutex::new(teller)),
        }
    }

    /// A step that may take a moment begins.
    pub(crate) fn progress(&self, text: &str) {
        let mut to = self.lock();
        match &mut *to {
            Teller::Parent(pipe) => tell(pipe, &News::Progress(text.to_owned())),
            Teller::Terminal { .. } => eprintln!("{text}"),
            Teller::Done => {}
        }
    }

    /// All is in place. From here on the start can't fail any more.
    pub(crate) fn up(&self, summary: Summary) {
        let mut to = self.lock();
        match &mut *to {
            Teller::Parent(pipe) => {
                // Only now: until here ctrl-C at the terminal still reached the daemon. It fails only for the leader
                // of a process group, which a spawned child is not.
                let _ = nix::unistd::setsid();
                tell(pipe, &News::Up(summary));
            }
            Teller::Terminal { json } => crate::show::up(&summary, *json),
            Teller::Done => {}
        }
        *to = Teller::Done;
    }

    /// The start failed. Returns whether anybody was still waiting to hear it.
    fn failed(&self, text: &str) -> bool {
        let mut to = self.lock();
        let heard = match &mut *to {
            Teller::Parent(pipe) => {
                tell(pipe, &News::Failed(text.to_owned()));
                true
            }
            Teller::Terminal { .. } | Teller::Done => false,
        };
        *to = Teller::Done;
        heard
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Teller> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody may be there any more; that is no reason for the daemon to stop.
fn tell(pipe: &mut File, news: &News) {
    let mut line = serde_json::to_vec(news).expect("plain structs with string keys");
    line.push(b'\n');
    let _ = pipe.write_all(&line);
}

/// The parent's half: starts the daemon and waits until it is up.
pub(crate) fn start(config: &UpConfig, on_progress: impl FnMut(&str)) -> anyhow::Result<Summary> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("weft")
        .arg(COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .context("can't start the daemon")?;
    let mut stdin = child.stdin.take().expect("stdin was asked to be a pipe");
    let body = serde_json::to_vec(config).context("can't hand the configuration over")?;
    // A child that died already is told by its silence below.
    let _ = stdin.write_all(&body);
    drop(stdin);
    let stdout = child.stdout.take().expect("stdout was asked to be a pipe");
    let verdict = listen(BufReader::new(stdout), on_progress);
    match verdict {
        Some(Ok(summary)) => Ok(summary),
        Some(Err(text)) => {
            let _ = child.wait();
            bail!("{text}")
        }
        None => {
            let status = child.wait().context("the daemon vanished")?;
            bail!(
                "weft ended while it was starting ({status}); its log is {}",
                logfile::path(&config.run_dir).display()
            )
        }
    }
}

fn listen(
    from: impl BufRead,
    mut on_progress: impl FnMut(&str),
) -> Option<Result<Summary, String>> {
    for line in from.lines() {
        match serde_json::from_str(&line.ok()?).ok()? {
            News::Progress(text) => on_progress(&text),
            News::Up(summary) => return Some(Ok(summary)),
            News::Failed(text) => return Some(Err(text)),
        }
    }
    None
}

/// The child's half: `daemon` runs until it is told to stop. Returns whether it ended well.
pub(crate) fn become_daemon(
    daemon: impl FnOnce(UpConfig, Ready) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let mut text = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_CONFIG)
        .read_to_end(&mut text)
        .context("can't read the configuration")?;
    let config: UpConfig =
        serde_json::from_slice(&text).context("this command is for weft itself; use: weft up")?;
    drop(text);
    let parent = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .context("can't keep the pipe to the parent")?;
    let ready = Ready::with(Teller::Parent(File::from(parent)));
    let result = detach(&config).and_then(|()| daemon(config, ready.clone()));
    let Err(error) = result else {
        return Ok(true);
    };
    let text = crate::one_line(&error);
    if !ready.failed(&text) {
        tracing::error!(error = %text, "weft stops");
    }
    Ok(false)
}

/// No terminal, and the log instead of standard error (panics go there). The session of its own comes with
/// [`Ready::up`].
fn detach(config: &UpConfig) -> anyhow::Result<()> {
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("can't open /dev/null")?;
    nix::unistd::dup2_stdin(&null).context("can't leave standard input")?;
    nix::unistd::dup2_stdout(&null).context("can't leave standard output")?;
    prepare_run_dir(&config.run_dir)?;
    logfile::init(Some(&config.run_dir), &config.log, config.log_json)
}

/// The run directory is root's alone: the socket and the log are in it.
pub(crate) fn prepare_run_dir(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("can't make the run directory {}", dir.display()))?;
    let meta = std::fs::metadata(dir)
        .with_context(|| format!("can't look at the run directory {}", dir.display()))?;
    if meta.uid() != nix::unistd::geteuid().as_raw() || meta.permissions().mode() & 0o022 != 0 {
        bail!(
            "the run directory {} can be written by others; weft needs one that is root's alone: chown root {0} && chmod 700 {0}",
            dir.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            name: NodeName::parse("alpha").unwrap(),
            node: "abcdefgh".to_owned(),
            cluster: "0123456789ab".to_owned(),
            origin: Origin::Founded,
            host_ip: Some(Ipv4Addr::new(10, 32, 0, 1)),
            port: 6783,
            tcp_port: Some(443),
            range: "10.32.0.0/12".parse().unwrap(),
            dns: Ipv4Addr::new(10, 47, 0, 1),
            netns: "weft-abcdefgh".to_owned(),
            pid: 1,
            warnings: vec![],
        }
    }

    fn said(tell: impl FnOnce(&Ready)) -> (Vec<String>, Option<Result<Summary, String>>) {
        let (reader, writer) = std::io::pipe().unwrap();
        let ready = Ready::with(Teller::Parent(File::from(std::os::fd::OwnedFd::from(
            writer,
        ))));
        tell(&ready);
        drop(ready);
        let mut progress = Vec::new();
        let verdict = listen(BufReader::new(reader), |text| {
            progress.push(text.to_owned())
        });
        (progress, verdict)
    }

    #[test]
    fn the_parent_hears_progress_and_then_one_verdict() {
        let (progress, verdict) = said(|ready| {
            ready.progress("one");
            ready.progress("two");
            ready.up(summary());
            ready.progress("never heard");
            assert!(!ready.failed("too late"));
        });
        assert_eq!(progress, ["one", "two"]);
        assert_eq!(verdict, Some(Ok(summary())));
    }

    #[test]
    fn the_parent_hears_of_failure_and_of_silent_death() {
        let (_, verdict) = said(|ready| assert!(ready.failed("no tun device")));
        assert_eq!(verdict, Some(Err("no tun device".to_owned())));
        let (_, verdict) = said(|ready| ready.progress("begun"));
        assert_eq!(verdict, None);
    }
}
