//! The stage: the network, the directories and the processes of one demo, and taking all of it away again.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use crate::daemon;
use crate::demo::net::{self, Net, Site, sweep};
use crate::demo::part::Answer;

/// The name of the hidden command that the demo's small programs hang under.
pub(crate) const PART: &str = "demo-part";
/// Nothing in the demo takes longer when all is well.
const LIMIT: Duration = Duration::from_secs(60);
/// The directory of a demo begins so; its process id follows.
const DIRECTORY: &str = "weft-demo-";
const PAUSE: Duration = Duration::from_millis(20);

/// All that the demo made.
pub(crate) struct Stage {
    pub(crate) net: Net,
    dir: PathBuf,
    program: PathBuf,
    actors: Vec<Actor>,
    stop: Arc<AtomicBool>,
    struck: bool,
}

/// A process that stays: a daemon, or a server under `weft run`.
struct Actor {
    name: String,
    child: Child,
}

impl Stage {
    /// Builds the network.
    pub(crate) fn new(stop: Arc<AtomicBool>) -> anyhow::Result<Self> {
        sweep();
        let program = std::env::current_exe().context("can't find this program's own file")?;
        sweep_directories();
        let dir = std::env::temp_dir().join(format!("{DIRECTORY}{}", std::process::id()));
        let stage = Self {
            net: Net::plan(["alpha", "beta", "gamma", "laptop"]),
            dir,
            program,
            actors: Vec::new(),
            stop,
            struck: false,
        };
        stage.make_directories()?;
        stage.net.build()?;
        Ok(stage)
    }

    fn make_directories(&self) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        // Not `recursive`: somebody else's directory of that name must not become ours.
        builder.mode(0o700);
        let make = |dir: &Path| {
            builder
                .create(dir)
                .with_context(|| format!("can't make {}", dir.display()))
        };
        make(&self.dir)?;
        self.net
            .sites
            .iter()
            .try_for_each(|site| make(&self.dir.join(site.name)))
    }

    /// The site of that name.
    pub(crate) fn site(&self, name: &str) -> &Site {
        self.net
            .sites
            .iter()
            .find(|s| s.name == name)
            .expect("the story names only its own sites")
    }

    /// Where a site's daemon has its socket.
    pub(crate) fn run_dir(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("run")
    }

    /// Has somebody pressed ctrl-C?
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// `weft ARGS` on a site; its standard output.
    pub(crate) fn weft(&self, site: &str, args: &[&str]) -> anyhow::Result<String> {
        let log = self.dir.join(site).join("command");
        let mut child = self.start(site, args, &log)?;
        let status = self.wait(&mut child, &format!("weft {}", args.join(" ")))?;
        let said = std::fs::read_to_string(log.with_extension("out")).unwrap_or_default();
        if !status.success() {
            let error = std::fs::read_to_string(log.with_extension("err")).unwrap_or_default();
            bail!(
                "on {site}, `weft {}` failed: {}",
                args.join(" "),
                error.trim()
            );
        }
        Ok(said.trim().to_owned())
    }

    /// `weft ARGS --json` on a site.
    pub(crate) fn ask<T: DeserializeOwned>(&self, site: &str, args: &[&str]) -> anyhow::Result<T> {
        let said = self.weft(site, &[args, &["--json"]].concat())?;
        serde_json::from_str(&said)
            .with_context(|| format!("`weft {}` did not print what it should", args.join(" ")))
    }

    /// One of the demo's small programs in a fresh container on a site.
    pub(crate) fn part(&self, site: &str, args: &[&str]) -> anyhow::Result<String> {
        let program = self.program_text()?;
        self.weft(site, &[&["run", "--", program, PART], args].concat())
    }

    /// Answers of `get` in a fresh container on a site.
    pub(crate) fn get(
        &self,
        site: &str,
        host: &str,
        port: u16,
        times: u32,
    ) -> anyhow::Result<Vec<Answer>> {
        answers(&self.part(site, &["get", host, &port.to_string(), &times.to_string()])?)
    }

    /// Does every one of a series of questions get its answer at once? Asked impatiently, so that the asking itself
    /// does not blur when that began.
    pub(crate) fn is_whole(&self, site: &str, host: &str, port: u16) -> anyhow::Result<bool> {
        let port = port.to_string();
        let args = ["get", "--patience-ms", "250", host, &port, "8"];
        Ok(answers(&self.part(site, &args)?)?.iter().all(|a| a.ok))
    }

    /// Answers of `get` on a site itself, outside of any container.
    pub(crate) fn get_from_host(
        &self,
        site: &str,
        host: &str,
        port: u16,
        times: u32,
    ) -> anyhow::Result<Vec<Answer>> {
        answers(&self.weft(
            site,
            &[PART, "get", host, &port.to_string(), &times.to_string()],
        )?)
    }

    /// A daemon, in the foreground as under a service manager; returns once it answers.
    pub(crate) fn start_daemon(
        &mut self,
        site: &'static str,
        token: Option<&str>,
    ) -> anyhow::Result<()> {
        let mut args = vec![
            "up".to_owned(),
            "--foreground".into(),
            "--name".into(),
            site.into(),
            // All three run on one machine: what is faster there says nothing.
            "--esp".into(),
            "never".into(),
        ];
        if let Some(token) = token {
            // By file: a token on a command line can be read by everybody on the machine.
            let file = self.dir.join(site).join("token");
            write_private(&file, token)?;
            args.extend(["--join".to_owned(), format!("@{}", file.display())]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let log = self.dir.join(site).join("daemon");
        let child = self.start(site, &args, &log)?;
        self.actors.push(Actor {
            name: site.to_owned(),
            child,
        });
        self.until(&format!("the daemon on {site} answers"), |stage| {
            stage.check_alive(site, &log)?;
            Ok(stage.run_dir(site).join("weft.sock").exists()
                && stage.weft(site, &["status"]).is_ok())
        })
    }

    /// A server in a container of its own, with two names: its own and one that it shares.
    pub(crate) fn start_server(
        &mut self,
        site: &'static str,
        name: &str,
        shared: &str,
    ) -> anyhow::Result<()> {
        let program = self.program_text()?.to_owned();
        let args = [
            "run", "--name", name, "--name", shared, "--", &program, PART, "serve", name, site,
            "80",
        ];
        let log = self.dir.join(site).join(name);
        let child = self.start(site, &args, &log)?;
        self.actors.push(Actor {
            name: name.to_owned(),
            child,
        });
        let said = log.with_extension("out");
        self.until(&format!("{name} serves"), |stage| {
            stage.check_alive(name, &log)?;
            Ok(std::fs::read_to_string(&said)
                .unwrap_or_default()
                .contains("ready"))
        })
    }

    /// Kills a daemon as a power cut would: SIGKILL, and the cable is dead.
    pub(crate) fn crash(&mut self, site: &str) -> anyhow::Result<()> {
        self.net.cut(self.site(site))?;
        let at = self
            .actors
            .iter()
            .position(|a| a.name == site)
            .context("no such daemon")?;
        let mut actor = self.actors.remove(at);
        actor.child.kill()?;
        actor.child.wait()?;
        Ok(())
    }

    /// Polls until `condition` holds; what it fails with ends the wait.
    pub(crate) fn until(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&mut Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let end = Instant::now() + LIMIT;
        while !condition(self)? {
            ensure!(!self.is_stopped(), "interrupted");
            ensure!(
                Instant::now() < end,
                "not within {} s: {what}",
                LIMIT.as_secs()
            );
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Removes everything; says what is left.
    pub(crate) fn strike(&mut self) -> Vec<String> {
        self.struck = true;
        for site in ["alpha", "beta", "gamma"] {
            if self.actors.iter().any(|a| a.name == site) && !self.is_stopped() {
                // The polite way first. What it leaves, the next lines take.
                let _ = self.weft(site, &["down"]);
            }
        }
        let mut left = Vec::new();
        for mut actor in self.actors.drain(..) {
            if !end(&mut actor.child) {
                left.push(format!("process {} ({})", actor.child.id(), actor.name));
            }
        }
        let mut spaces = self.net.remove();
        // A daemon that died before its host had a leg: nothing in the host leads to its domain.
        spaces.extend(remove_domains_of(&self.dir));
        left.extend(spaces.into_iter().map(|n| format!("namespace {n}")));
        if std::fs::remove_dir_all(&self.dir).is_err() && self.dir.exists() {
            left.push(self.dir.display().to_string());
        }
        left
    }

    fn check_alive(&mut self, name: &str, log: &Path) -> anyhow::Result<()> {
        let actor = self
            .actors
            .iter_mut()
            .find(|a| a.name == name)
            .context("no such process")?;
        if let Some(status) = actor.child.try_wait()? {
            let said = std::fs::read_to_string(log.with_extension("err")).unwrap_or_default();
            let lines: Vec<&str> = said.lines().collect();
            let tail = lines[lines.len().saturating_sub(8)..].join("\n");
            bail!("{name} ended ({status}):\n{tail}");
        }
        Ok(())
    }

    fn start(&self, site: &str, args: &[&str], log: &Path) -> anyhow::Result<Child> {
        let netns = &self.site(site).netns;
        let file = |ext| {
            File::create(log.with_extension(ext)).context("can't write in the demo's directory")
        };
        let mut command = Command::new(&self.program);
        command
            .args([PART, "enter", netns, "--"])
            .arg(&self.program)
            .args(args);
        // A daemon of this machine may have set them: the demo's hosts are their own.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("WEFT_") {
                command.env_remove(name);
            }
        }
        command
            .env("WEFT_RUN_DIR", self.run_dir(site))
            .env("WEFT_STATE_DIR", self.dir.join(site).join("state"));
        // A group of their own: ctrl-C is for the demo, which then ends them in order.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file("out")?)
            .stderr(file("err")?);
        command.spawn().context("can't start this program again")
    }

    fn wait(&self, child: &mut Child, what: &str) -> anyhow::Result<ExitStatus> {
        let limit = Instant::now() + LIMIT;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            // On the way out nobody waits for a person's second ctrl-C.
            let interrupted = self.is_stopped() && !self.struck;
            if interrupted || Instant::now() > limit {
                end(child);
                ensure!(!interrupted, "interrupted");
                bail!("`{what}` did not end within {} s", LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn program_text(&self) -> anyhow::Result<&str> {
        self.program
            .to_str()
            .context("this program's path is not text")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.struck {
            self.strike();
        }
    }
}

/// Asks a process to end, then insists.
fn end(child: &mut Child) -> bool {
    let pid = i32::try_from(child.id()).map(Pid::from_raw);
    if let Ok(pid) = pid {
        // Gone by itself is as good.
        let _ = kill(pid, Signal::SIGTERM);
    }
    let limit = Instant::now() + Duration::from_secs(3);
    while Instant::now() < limit {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    child.kill().and_then(|()| child.wait()).is_ok()
}

/// Removes the domains of the nodes whose states are below `dir`; says which would not go.
fn remove_domains_of(dir: &Path) -> Vec<String> {
    let sites = std::fs::read_dir(dir).into_iter().flatten().flatten();
    sites
        .filter_map(|site| daemon::domain_of(&site.path().join("state")))
        .filter(|domain| !net::remove(domain))
        .collect()
}

/// Removes the directories of killed demos, with what only their states lead to.
fn sweep_directories() {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(std::env::temp_dir());
    for entry in entries.into_iter().flatten().flatten() {
        let ours = entry
            .metadata()
            .is_ok_and(|meta| meta.is_dir() && meta.uid() == nix::unistd::geteuid().as_raw());
        let name = entry.file_name();
        if ours && name.to_str().is_some_and(|n| net::is_orphan(n, DIRECTORY)) {
            remove_domains_of(&entry.path());
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn answers(text: &str) -> anyhow::Result<Vec<Answer>> {
    text.lines()
        .map(|line| serde_json::from_str(line).context("an answer that is none"))
        .collect()
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
