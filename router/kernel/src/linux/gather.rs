//! Datagrams that a container sends one by one, gathered before they are routed.
//!
//! TCP comes out of a container in super-packets; UDP mostly one datagram at a time, and each would walk through the
//! domain's rules and out of the TAP alone, on the processor of who sends it. So the leg has a kernel thread of its own,
//! and that joins what piled up of one flow (GRO) before it routes: measured with datagrams of 64 and of 1,400 octets, more
//! than twice as many arrive (`docs/performance.md`).

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::SockProtocol;

use super::netns::alone;
use super::raw::{ACK, RawSocket, attribute, push, terminated};

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

/// Lets what comes out of `leg`, a device of the calling thread's namespace that is up, be gathered (one that is down has
/// nothing yet that a thread could run). A kernel that can't (before 5.12) is slower, and that is all.
pub(super) fn gather(leg: &str) {
    if let Err(error) = set_features(leg).and_then(|()| set_threaded(leg)) {
        tracing::debug!(leg, %error, "datagrams of this leg are not gathered");
    }
}

fn set_features(leg: &str) -> io::Result<()> {
    let socket = RawSocket::open(SockProtocol::NetlinkGeneric)?;
    let family = family(&socket, "ethtool")?;
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

/// A thread per device is a switch in sysfs alone, and what sysfs shows of the network is the namespace's in which it was
/// mounted: it is mounted where only a thread that ends with it sees that.
fn set_threaded(leg: &str) -> io::Result<()> {
    alone(|| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("sysfs"), "/sys", Some("sysfs"), flags, none)?;
        fs::write(format!("/sys/class/net/{leg}/threaded"), "1")
    })
}
