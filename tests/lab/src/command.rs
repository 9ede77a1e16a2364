//! Running commands: with a limit on their time, with all they said kept for the failure text.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// What a command said and how it ended.
#[derive(Debug, Clone)]
pub struct Out {
    /// Exit status; 128 + n after signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    what: String,
}

impl Out {
    /// Standard output, trimmed; panics unless the command succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "{self}");
        self.stdout.trim().to_owned()
    }

    /// Standard error, trimmed; panics unless the command ended with `code`.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> String {
        assert!(self.code == code, "expected exit status {code}: {self}");
        self.stderr.trim().to_owned()
    }

    /// Standard output as JSON; panics unless the command succeeded.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.clone().ok();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("not JSON ({e}): {self}"))
    }

    /// Did it succeed?
    pub fn is_ok(&self) -> bool {
        self.code == 0
    }
}

impl std::fmt::Display for Out {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ended with {}\n--- stdout\n{}\n--- stderr\n{}",
            self.what,
            self.code,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// Runs `argv` (with `env` added, `input` on its standard input) and waits for it, at most `limit`.
///
/// Output goes through files, not pipes: a daemon that wrongly keeps our descriptors open must not make us wait for it.
pub fn run_command(
    argv: &[String],
    env: &[(String, String)],
    input: &[u8],
    limit: Duration,
) -> Out {
    let (mut stdout, mut stderr) = (scratch(), scratch());
    let mut child = command(argv, env)
        .stdin(input_file(input))
        .stdout(share(&stdout))
        .stderr(share(&stderr))
        .spawn()
        .unwrap_or_else(|e| panic!("can't start {argv:?}: {e}"));
    let code = match wait(&mut child, limit) {
        Some(code) => code,
        None => {
            signal(child.id(), Signal::SIGKILL);
            let _ = child.wait();
            let (out, err) = (contents(&mut stdout), contents(&mut stderr));
            panic!(
                "`{}` did not end within {limit:?}\n--- stdout\n{out}\n--- stderr\n{err}",
                argv.join(" ")
            );
        }
    };
    Out {
        code,
        stdout: contents(&mut stdout),
        stderr: contents(&mut stderr),
        what: argv.join(" "),
    }
}

/// A process in the background; killed when dropped.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    what: String,
}

impl Spawned {
    /// Starts `argv`; its output goes to `<log>.out` and `<log>.err`.
    pub fn start(argv: &[String], env: &[(String, String)], log: &Path) -> Self {
        let (stdout, stderr) = (log.with_extension("out"), log.with_extension("err"));
        let file = |p: &Path| {
            File::create(p).unwrap_or_else(|e| panic!("can't create {}: {e}", p.display()))
        };
        let child = command(argv, env)
            .stdin(Stdio::null())
            .stdout(file(&stdout))
            .stderr(file(&stderr))
            .spawn()
            .unwrap_or_else(|e| panic!("can't start {argv:?}: {e}"));
        Self {
            child,
            stdout,
            stderr,
            what: argv.join(" "),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote so far.
    pub fn stdout(&self) -> String {
        lossy(&self.stdout)
    }

    /// What it complained of so far.
    pub fn stderr(&self) -> String {
        lossy(&self.stderr)
    }

    /// Has it ended, and how?
    pub fn ended(&mut self) -> Option<i32> {
        match self.child.try_wait() {
            Ok(status) => status.map(exit_code),
            Err(e) => panic!("can't wait for `{}`: {e}", self.what),
        }
    }

    /// Waits until a line with `text` stands in its output.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return;
            }
            let ended = self.ended();
            if ended.is_some() || Instant::now() > end {
                panic!(
                    "`{}` did not say \"{text}\" within {limit:?} ({})\n{}",
                    self.what,
                    state(ended),
                    self.said()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self::signal(self.pid(), signal);
    }

    /// Asks it to end and gives it `limit` for that.
    pub fn terminate(&mut self, limit: Duration) {
        self.signal(Signal::SIGTERM);
        let _ = wait(&mut self.child, limit);
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> i32 {
        match wait(&mut self.child, limit) {
            Some(code) => code,
            None => panic!(
                "`{}` did not end within {limit:?}\n{}",
                self.what,
                self.said()
            ),
        }
    }

    fn said(&self) -> String {
        format!(
            "--- stdout\n{}\n--- stderr\n{}",
            self.stdout(),
            self.stderr()
        )
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Signals a process that may be gone by now.
pub fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn command(argv: &[String], env: &[(String, String)]) -> Command {
    let (program, args) = argv.split_first().expect("a command has a name");
    let mut command = Command::new(program);
    command.args(args);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEFT_") {
            command.env_remove(name);
        }
    }
    command.envs(env.iter().map(|(k, v)| (k, v)));
    command
}

fn wait(child: &mut Child, limit: Duration) -> Option<i32> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(exit_code(status)),
            Ok(None) if Instant::now() > end => return None,
            Ok(None) => std::thread::sleep(pause),
            Err(e) => panic!("can't wait for a child: {e}"),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn state(ended: Option<i32>) -> String {
    ended.map_or("it runs".to_owned(), |code| format!("it ended with {code}"))
}

fn scratch() -> File {
    tempfile::tempfile().expect("a scratch file for a command's output")
}

fn share(file: &File) -> File {
    file.try_clone()
        .expect("a second descriptor of a scratch file")
}

fn input_file(input: &[u8]) -> Stdio {
    if input.is_empty() {
        return Stdio::null();
    }
    let mut file = scratch();
    file.write_all(input).expect("writing a command's input");
    file.seek(SeekFrom::Start(0))
        .expect("rewinding a command's input");
    Stdio::from(file)
}

fn contents(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .expect("rewinding a command's output");
    file.read_to_end(&mut bytes)
        .expect("reading a command's output");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
