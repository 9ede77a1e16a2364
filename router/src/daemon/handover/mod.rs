//! From one daemon to the next, in place: the successor takes the descriptors over, so that next hops, queues and
//! listeners live on, and the two never read one descriptor, nor write one store, at the same time.
//!
//! ```text
//! successor (weft restart)                      predecessor (the daemon that runs)
//!   POST /v1/handover, upgrade ───────────────▶   begin: nobody is served any more, clients wait at the door;
//!                                                 core, kernel thread and disk end in order; packets flow on
//!   ◀── descriptors, released ─────────────────   the state directory is free
//!   locks the state, opens the store
//!   ─── take ──────────────────────────────────▶  the packet threads, the name server and the listeners' tasks end
//!   ◀── stopped ───────────────────────────────   what comes now waits in the kernel's queues
//!   reads them, makes its sessions anew, is up
//!   ─── up ────────────────────────────────────▶  ends, and takes nothing down
//! ```
//!
//! Until `up` the predecessor keeps the descriptors. When the line breaks before it - the successor failed, or was killed -
//! it begins a new life with them, as if it had been started again. So it does when the successor hangs; that is killed first,
//! or it would keep the state directory.

mod channel;
mod handing;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{CONNECTION, HOST, UPGRADE};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tracing::warn;
use weft_carrier::Descriptors;
use weft_core::control::{ErrorBody, SOCKET};

use self::channel::{Channel, Word};
pub(super) use self::handing::{Handing, Outcome};
use super::publish::Place;
use super::relays::Relays;

/// The protocol by which the control socket's connection is upgraded.
pub(crate) const PROTOCOL: &str = "weft-handover";

/// The other end answers at once, unless its machine is very busy.
const PROMPT: Duration = Duration::from_secs(10);
/// Ending in order waits for what is being attached and for the disk.
const RELEASE: Duration = Duration::from_secs(30);
/// The successor opens the store, which was closed in order: a matter of milliseconds. Until it is done gossip hears nothing
/// of this node, and members take it for dead after a few seconds.
const PREPARE: Duration = Duration::from_secs(5);
/// A start takes no longer.
const START: Duration = Duration::from_secs(90);

const TAP: &str = "tap";
const UDP4: &str = "udp4";
const UDP6: &str = "udp6";
const TCP: &str = "tcp";
const CONTROL: &str = "control";
const DNS_UDP: &str = "dns-udp";
const DNS_TCP: &str = "dns-tcp";
const PLACEHOLDER: &str = "placeholder";
const SHIELD: &str = "shield";

/// Descriptors that outlive a daemon.
#[derive(Debug, Default)]
pub(super) struct Inheritance {
    /// TAP and underlay.
    pub(super) carrier: Descriptors,
    /// The control socket's listener: clients wait at it and are not turned away.
    pub(super) control: Option<OwnedFd>,
    /// The name server's sockets.
    pub(super) dns_udp: Vec<OwnedFd>,
    pub(super) dns_tcp: Vec<OwnedFd>,
    /// Listeners of published ports.
    pub(super) placeholders: BTreeMap<Place, OwnedFd>,
    /// What guards the `vxlan` carrier while nobody else does.
    pub(super) shield: Option<OwnedFd>,
    /// What this process carries itself stays with it.
    pub(super) relays: Relays,
}

impl Inheritance {
    /// The sockets of a name server, taken out.
    pub(super) fn name_server(&mut self) -> weft_dns::Sockets {
        let udp = std::mem::take(&mut self.dns_udp).into_iter();
        let tcp = std::mem::take(&mut self.dns_tcp).into_iter();
        weft_dns::Sockets {
            udp: udp.map(Into::into).collect(),
            tcp: tcp.map(Into::into).collect(),
        }
    }

    /// Each with its name.
    fn parts(&self) -> impl Iterator<Item = (&'static str, Option<Place>, &OwnedFd)> {
        let Descriptors { tap, v4, v6, tcp } = &self.carrier;
        let single = [
            (TAP, tap),
            (UDP4, v4),
            (UDP6, v6),
            (CONTROL, &self.control),
            (SHIELD, &self.shield),
        ];
        let single = single
            .into_iter()
            .flat_map(|(name, fd)| Some((name, None, fd.as_ref()?)));
        let tcp = tcp.iter().map(|fd| (TCP, None, fd));
        let dns_udp = self.dns_udp.iter().map(|fd| (DNS_UDP, None, fd));
        let dns_tcp = self.dns_tcp.iter().map(|fd| (DNS_TCP, None, fd));
        let placeholders = self.placeholders.iter();
        single
            .chain(tcp)
            .chain(dns_udp)
            .chain(dns_tcp)
            .chain(placeholders.map(|(place, fd)| (PLACEHOLDER, Some(*place), fd)))
    }

    /// Puts one where it belongs; what this version knows nothing of is closed.
    fn add(&mut self, name: &str, place: Option<Place>, fd: OwnedFd) {
        match (name, place) {
            (TAP, _) => self.carrier.tap = Some(fd),
            (UDP4, _) => self.carrier.v4 = Some(fd),
            (UDP6, _) => self.carrier.v6 = Some(fd),
            (TCP, _) => self.carrier.tcp.push(fd),
            (CONTROL, _) => self.control = Some(fd),
            (SHIELD, _) => self.shield = Some(fd),
            (DNS_UDP, _) => self.dns_udp.push(fd),
            (DNS_TCP, _) => self.dns_tcp.push(fd),
            (PLACEHOLDER, Some(place)) => drop(self.placeholders.insert(place, fd)),
            _ => warn!(
                name,
                "the daemon before this one handed over something unknown"
            ),
        }
    }
}

/// The daemon that ran before, as its successor sees it. Dropped before [`Predecessor::end`], it goes on.
pub(super) struct Predecessor(Channel);

impl Predecessor {
    /// Asks the daemon of this run directory to make room.
    pub(super) async fn call(run_dir: &Path) -> Result<Self> {
        let stream = UnixStream::connect(run_dir.join(SOCKET))
            .await
            .context("the daemon that is to be replaced does not answer")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection.with_upgrades());
        let request = Request::post("/v1/handover")
            .header(HOST, "weft")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, PROTOCOL)
            .body(Empty::<Bytes>::new())?;
        let answer = tokio::time::timeout(PROMPT, sender.send_request(request))
            .await
            .context("the daemon that is to be replaced does not answer")??;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            let body = answer.into_body().collect().await?.to_bytes();
            match serde_json::from_slice::<ErrorBody>(&body) {
                Ok(error) => bail!("{}", error.error),
                Err(_) => bail!("the daemon that runs can't be replaced in place"),
            }
        }
        let channel = into_channel(hyper::upgrade::on(answer).await?)?;
        channel.say(&Word::Begin, None).await?;
        Ok(Self(channel))
    }

    /// Takes the descriptors; afterwards the state directory is free.
    pub(super) async fn inherit(&mut self) -> Result<Inheritance> {
        let mut inheritance = Inheritance::default();
        loop {
            match self.0.hear(RELEASE).await.context(LOST)? {
                (Word::Descriptor { name, place }, Some(fd)) => inheritance.add(&name, place, fd),
                (Word::Released, _) => return Ok(inheritance),
                (word, _) => bail!("the daemon that is to be replaced said {word:?} too early"),
            }
        }
    }

    /// Returns once nobody else reads the descriptors.
    pub(super) async fn take(&mut self) -> Result<()> {
        self.0.say(&Word::Take, None).await.context(LOST)?;
        self.0.expect(Word::Stopped, PROMPT).await.context(LOST)
    }

    /// All is in place here: it may go.
    pub(super) async fn end(self) {
        // One that is gone already needs no telling.
        let _ = self.0.say(&Word::Up, None).await;
    }
}

const LOST: &str = "the daemon that is to be replaced broke the handover off";

/// The daemon that is to take over, as its predecessor sees it.
pub(crate) struct Successor(Channel);

impl Successor {
    /// The client of an upgraded connection, once it has said the first word.
    pub(crate) async fn welcome(upgrade: OnUpgrade) -> Result<Self> {
        let upgraded = tokio::time::timeout(PROMPT, upgrade).await??;
        let mut channel = into_channel(upgraded)?;
        channel.expect(Word::Begin, PROMPT).await?;
        Ok(Self(channel))
    }

    /// Hands the descriptors over, keeping them here, and waits until the successor is ready to read them.
    pub(super) async fn give(&mut self, inheritance: &Inheritance) -> io::Result<()> {
        for (name, place, fd) in inheritance.parts() {
            let name = name.to_owned();
            let word = Word::Descriptor { name, place };
            self.0.say(&word, Some(fd.as_fd())).await?;
        }
        self.0.say(&Word::Released, None).await?;
        let ready = self.0.expect(Word::Take, PREPARE).await;
        self.or_end(ready)
    }

    /// Nobody reads here any more; waits until the successor is up.
    pub(super) async fn leave_to_it(mut self) -> io::Result<()> {
        self.0.say(&Word::Stopped, None).await?;
        let up = self.0.expect(Word::Up, START).await;
        self.or_end(up)
    }

    /// One that says nothing for too long must not wake up later, when the predecessor has its place again.
    fn or_end(&self, outcome: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &outcome
            && error.kind() == io::ErrorKind::TimedOut
        {
            self.0.end_other()?;
        }
        outcome
    }
}

fn into_channel(upgraded: Upgraded) -> Result<Channel> {
    let Ok(parts) = upgraded.downcast::<TokioIo<UnixStream>>() else {
        bail!("the control socket's connection is of an unknown kind");
    };
    Ok(Channel::new(parts.io.into_inner(), parts.read_buf.to_vec()))
}
