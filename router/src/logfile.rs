//! Where log lines go: standard error in the foreground, a bounded file in the background.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Context;
use tracing_subscriber::EnvFilter;

/// A file grows to this and is then put aside; one old file is kept.
const MAX_BYTES: u64 = 10 << 20;

/// The log of the daemon with this run directory.
pub(crate) fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("weft.log")
}

/// Sets up tracing: into the run directory's file, or on standard error when there is none.
pub(crate) fn init(run_dir: Option<&Path>, filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|_| {
        anyhow::anyhow!("\"{filter}\" is no log filter; try: info, or weft=debug,info")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(true);
    let installed = match run_dir {
        Some(dir) => {
            let log = Mutex::new(LogFile::open(path(dir))?);
            let builder = builder.with_ansi(false).with_writer(log);
            if json {
                builder.json().try_init()
            } else {
                builder.try_init()
            }
        }
        None => {
            let builder = builder
                .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
                .with_writer(io::stderr);
            if json {
                builder.json().try_init()
            } else {
                builder.try_init()
            }
        }
    };
    installed.map_err(|e| anyhow::anyhow!("can't begin the log: {e}"))
}

/// An appended file that never outgrows [`MAX_BYTES`] by more than a line. Standard error follows it, so that a
/// panic's last words are there too.
struct LogFile {
    path: PathBuf,
    file: File,
    written: u64,
}

impl LogFile {
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let (file, written) =
            open(&path).with_context(|| format!("can't open the log {}", path.display()))?;
        nix::unistd::dup2_stderr(&file).context("can't redirect standard error to the log")?;
        Ok(Self {
            path,
            file,
            written,
        })
    }

    fn rotate(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
        let (file, written) = open(&self.path)?;
        nix::unistd::dup2_stderr(&file)?;
        self.file = file;
        self.written = written;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // A log that can't be put aside is written on: a full disk must not silence the daemon.
        if self.written >= MAX_BYTES {
            let _ = self.rotate();
        }
        let count = self.file.write(line)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
