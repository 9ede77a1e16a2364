//! Datagrams that a container sends one by one, gathered before they are routed.
//!
//! TCP comes out of a container in super-packets; UDP mostly one datagram at a time, and each would walk through the
//! domain's rules and out of the TAP alone, on the processor of who sends it. So a busy leg has a kernel thread of its
//! own, and that joins what piled up of one flow (GRO) before it routes: measured with datagrams of 64 and of 1,400 octets,
//! more than twice as many arrive (`docs/performance.md`). Which legs are busy one thread of the daemon sees to, that
//! lives in the domain.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::SockProtocol;
use weft_core::layout::{HOST_LEG_FAR, LEG_PREFIX};

use super::domain::Domain;
use super::raw::{ACK, RawSocket, attribute, push, terminated};
use crate::error::{Doing, Result};
use crate::gathering::{Gathering, Order, Received, read};

/// `GENL_ID_CTRL`, and what asks it for a family's number by name (linux/genetlink.h).
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `struct genlmsghdr`: command, version, two octets reserved.
const HEADER: usize = 4;
/// linux/ethtool_netlink.h.
const FEATURES_SET: u8 = 12;
const FEATURES_HEADER: u16 = 1;
const FEATURES_WANTED: u16 = 3;
const HEADER_DEV_NAME: u16 = 2;
const BITSET_BITS: u16 = 3;
const BITS_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;
/// `NLA_F_NESTED`: it holds attributes itself.
const NESTED: u16 = 1 << 15;

/// Joining at all, and for packets that go on elsewhere.
const FEATURES: [&str; 2] = ["rx-gro", "rx-udp-gro-forwarding"];

/// How often the counters of the legs are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// The thread that gives busy legs a kernel thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Gatherer {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Domain {
    /// From now on the datagrams of busy legs are gathered. A kernel that can't (before 5.12) is slower, and that is all.
    pub fn gather(&self) -> Result<Gatherer> {
        let namespace = self.fd()?;
        let (stop, stopped) = channel();
        let work = move || {
            let switches = setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(io::Error::from)
                .and_then(|()| Switches::open());
            match switches {
                Ok(switches) => switches.serve(&stopped),
                Err(error) => tracing::debug!(%error, "datagrams are not gathered"),
            }
        };
        let thread = std::thread::Builder::new()
            .name("weft-gather".to_owned())
            .spawn(work)
            .doing(|| "start a thread".into())?;
        Ok(Gatherer {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Gatherer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It can't be helped, and only gathers.
            let _ = thread.join();
        }
    }
}

/// What the thread reads and sets, in the namespace that it lives in.
struct Switches {
    netlink: RawSocket,
    ethtool: u16,
    counters: File,
}

impl Switches {
    /// A thread per device is a switch in sysfs alone, and what sysfs shows of the network is the namespace's in which it
    /// was mounted: it is mounted where only the calling thread sees that.
    fn open() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("sysfs"), "/sys", Some("sysfs"), flags, none)?;
        let netlink = RawSocket::open(SockProtocol::NetlinkGeneric)?;
        Ok(Self {
            ethtool: family(&netlink, "ethtool")?,
            netlink,
            counters: File::open("/proc/thread-self/net/dev")?,
        })
    }

    fn serve(mut self, stopped: &Receiver<()>) {
        let mut gathering = Gathering::default();
        let mut text = String::new();
        let mut last = Instant::now();
        loop {
            let now = Instant::now();
            let legs = self.read_counters(&mut text);
            for order in gathering.look(now.duration_since(last), &legs) {
                self.carry_out(&order);
            }
            last = now;
            if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    fn read_counters(&mut self, text: &mut String) -> BTreeMap<String, Received> {
        text.clear();
        let is_leg = |name: &str| name.starts_with(LEG_PREFIX) || name == HOST_LEG_FAR;
        match self
            .counters
            .rewind()
            .and_then(|()| self.counters.read_to_string(text))
        {
            Ok(_) => read(text, is_leg),
            Err(_) => BTreeMap::new(),
        }
    }

    /// A leg may vanish at any time; an older kernel lacks a switch.
    fn carry_out(&self, order: &Order) {
        let (leg, done) = match order {
            Order::Prepare(leg) => {
                let ready = set_features(&self.netlink, self.ethtool, leg);
                (leg, ready.and_then(|()| set_threaded(leg, false)))
            }
            Order::Thread(leg, on) => (leg, set_threaded(leg, *on)),
        };
        if let Err(error) = done {
            tracing::debug!(leg, ?order, %error, "datagrams of this leg are not gathered");
        }
    }
}

fn set_features(socket: &RawSocket, family: u16, leg: &str) -> io::Result<()> {
    let mut bits = Vec::new();
    for name in FEATURES {
        let mut bit = Vec::new();
        push(&mut bit, BIT_NAME, &terminated(name));
        push(&mut bit, BIT_VALUE, &[]);
        push(&mut bits, BITS_BIT | NESTED, &bit);
    }
    let mut wanted = Vec::new();
    push(&mut wanted, BITSET_BITS | NESTED, &bits);
    let mut header = Vec::new();
    push(&mut header, HEADER_DEV_NAME, &terminated(leg));
    let mut body = generic(FEATURES_SET);
    push(&mut body, FEATURES_HEADER | NESTED, &header);
    push(&mut body, FEATURES_WANTED | NESTED, &wanted);
    socket.request(family, ACK, &body).map(drop)
}

/// The number by which generic netlink knows a family here.
fn family(socket: &RawSocket, name: &str) -> io::Result<u16> {
    let mut body = generic(CTRL_CMD_GETFAMILY);
    push(&mut body, CTRL_ATTR_FAMILY_NAME, &terminated(name));
    let answers = socket.request(CONTROL, ACK, &body)?;
    let attributes = answers
        .iter()
        .filter_map(|answer| answer.body.get(HEADER..));
    let number = attributes
        .filter_map(|attributes| attribute(attributes, CTRL_ATTR_FAMILY_ID)?.first_chunk())
        .next();
    number
        .map(|number| u16::from_ne_bytes(*number))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
}

fn generic(command: u8) -> Vec<u8> {
    vec![command, 1, 0, 0]
}

fn set_threaded(leg: &str, on: bool) -> io::Result<()> {
    fs::write(
        format!("/sys/class/net/{leg}/threaded"),
        if on { "1" } else { "0" },
    )
}
