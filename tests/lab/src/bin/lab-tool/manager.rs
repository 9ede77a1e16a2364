//! A service manager's side of sd_notify(3) with `FDSTORE=1`, and of sd_listen_fds(3): what systemd does for a unit with
//! `Type=notify`, `FileDescriptorStoreMax=` and `Restart=on-failure`, where no systemd runs.

use std::io::{ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{Result, say};

/// How often the service is looked after.
const TICK: Duration = Duration::from_millis(5);
/// `sd_listen_fds`: descriptors begin at 3 and `LISTEN_PID` is the process itself. bash, because it can name descriptors
/// above 9.
const BECOME: &str = r#"
n=3; for fd in $STORED; do eval "exec $n<&$fd $fd<&-"; n=$((n + 1)); done
unset STORED; export LISTEN_PID=$$; exec "$@"
"#;

/// Far above what a small program has open.
const FIRST_PASSED: i32 = 100;

struct Manager {
    socket: UnixDatagram,
    path: String,
    command: Vec<String>,
    store: Vec<(String, OwnedFd)>,
}

/// Runs `command` as a service, told and telling at `path`. A datagram `RESTART` there is `systemctl restart`.
pub(super) fn manage(path: &str, command: &[&str]) -> Result<()> {
    let socket = UnixDatagram::bind(path)?;
    socket.set_read_timeout(Some(TICK))?;
    let mut manager = Manager {
        socket,
        path: path.to_owned(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        store: Vec::new(),
    };
    let mut service = manager.start()?;
    loop {
        if let Some(status) = service.try_wait()? {
            say(&format!("ended {status}"));
            // What it said last is still to be read.
            while manager.hear()?.is_some() {}
            if status.signal().is_none() {
                say(&format!("kept {}", manager.names()));
                return Ok(());
            }
            service = manager.start()?;
        }
        if manager.hear()?.as_deref() == Some("RESTART") {
            kill(Pid::from_raw(i32::try_from(service.id())?), Signal::SIGTERM)?;
            service.wait()?;
            service = manager.start()?;
        }
    }
}

impl Manager {
    fn names(&self) -> String {
        let names: Vec<&str> = self.store.iter().map(|(name, _)| name.as_str()).collect();
        names.join(":")
    }

    fn start(&self) -> Result<Child> {
        // By numbers that are in nobody's way, for the moment of the start.
        let passed: Vec<OwnedFd> = { self.store.iter() }
            .map(|(_, fd)| fcntl_dupfd_cloexec(fd, FIRST_PASSED))
            .collect::<std::result::Result<_, _>>()?;
        for fd in &passed {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        let numbers: Vec<String> = passed.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let child = Command::new("bash")
            .args(["-c", BECOME, "bash"])
            .args(&self.command)
            .env("NOTIFY_SOCKET", &self.path)
            .env("STORED", numbers.join(" "))
            .env("LISTEN_FDS", self.store.len().to_string())
            .env("LISTEN_FDNAMES", self.names())
            .spawn()?;
        say(&format!("started {} with {}", child.id(), self.names()));
        Ok(child)
    }

    /// Takes one datagram, if there is one, and does what it says.
    fn hear(&mut self) -> Result<Option<String>> {
        let mut octets = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut octets)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let length = match recvmsg(self.socket.as_fd(), &mut parts, &mut control, flags) {
            Ok(got) => got.bytes,
            Err(error) => match std::io::Error::from(error).kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => return Ok(None),
                _ => return Err(error.into()),
            },
        };
        let come = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(come) => Some(come.collect::<Vec<_>>()),
            _ => None,
        });
        let come: Vec<OwnedFd> = come.flatten().collect();
        let text = String::from_utf8_lossy(&octets[..length]).into_owned();
        self.obey(&text, come);
        Ok(Some(text))
    }

    fn obey(&mut self, text: &str, come: Vec<OwnedFd>) {
        let has = |line: &str| text.lines().any(|l| l == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.unwrap_or("stored");
        if has("FDSTORE=1") {
            say(&format!("stores {name}"));
            // systemd would watch it otherwise, and drop it at the first error.
            assert!(has("FDPOLL=0"), "{text}");
            self.store
                .extend(come.into_iter().map(|fd| (name.to_owned(), fd)));
        }
        if has("FDSTOREREMOVE=1") {
            self.store.retain(|(stored, _)| stored != name);
        }
        if has("READY=1") {
            say("ready");
        }
    }
}
