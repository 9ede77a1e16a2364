//! A plain netlink socket for what rtnetlink has no messages for: next-hop objects, nf_tables, connection tracking, and
//! notifications. Requests are laid by hand; answers are cut into attributes without trusting their lengths.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname,
    recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const REPLACE: u16 = 0x100;
pub(crate) const CREATE: u16 = 0x400;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// The kernel's largest datagram for a dump is 32 KiB.
const BUFFER: usize = 64 << 10;

/// One message: its type and what follows the netlink header.
pub(crate) struct Message {
    pub(crate) kind: u16,
    pub(crate) body: Vec<u8>,
}

/// One message of several.
pub(crate) struct Request {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) body: Vec<u8>,
}

/// A socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct RawSocket {
    fd: OwnedFd,
    sequence: Cell<u32>,
}

impl RawSocket {
    /// Opens one that asks questions.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        Self::subscribe(protocol, 0)
    }

    /// Opens one that asks, and hears notifications of these groups (a bit mask).
    pub(crate) fn subscribe(protocol: SockProtocol, groups: u32) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        Self::over(fd, groups)
    }

    /// The same for a protocol that has no name here.
    pub(crate) fn over(fd: OwnedFd, groups: u32) -> io::Result<Self> {
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        // A kernel that does not answer is a bug of ours (a malformed request); better an error than a stuck thread.
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(5))?;
        let sequence = Cell::new(0);
        Ok(Self { fd, sequence })
    }

    /// Sends a request and collects the answers until the kernel says that it is done.
    pub(crate) fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        let mut message = Vec::with_capacity(HEADER + body.len());
        let sequence = self.lay(&mut message, kind, flags, body)?;
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        self.answers(sequence)
    }

    /// Sends all requests at once. The first refusal of any is the outcome; that all is done says the answer to the one with
    /// [`ACK`], which must be the last that is answered.
    pub(crate) fn transact(&self, requests: &[Request]) -> io::Result<()> {
        let mut octets = Vec::new();
        let mut waits_for = None;
        for Request { kind, flags, body } in requests {
            let sequence = self.lay(&mut octets, *kind, *flags, body)?;
            if flags & ACK != 0 {
                waits_for = Some(sequence);
            }
        }
        send(self.fd.as_raw_fd(), &octets, MsgFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        let first = self.sequence.get().wrapping_sub(requests.len() as u32);
        while waits_for.is_some() {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (seen, message) in messages(&buffer[..length]) {
                let is_ours = (1..=requests.len() as u32).contains(&seen.wrapping_sub(first));
                if is_ours && message.kind == NLMSG_ERROR {
                    code(&message.body)?;
                    waits_for = waits_for.filter(|last| *last != seen);
                }
            }
        }
        Ok(())
    }

    /// Appends a message; its number.
    fn lay(&self, octets: &mut Vec<u8>, kind: u16, flags: u16, body: &[u8]) -> io::Result<u32> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let length = u32::try_from(HEADER + body.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        octets.extend_from_slice(&length.to_ne_bytes());
        octets.extend_from_slice(&kind.to_ne_bytes());
        octets.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        octets.extend_from_slice(&sequence.to_ne_bytes());
        octets.extend_from_slice(&0u32.to_ne_bytes());
        octets.extend_from_slice(body);
        octets.resize(aligned(octets.len()), 0);
        Ok(sequence)
    }

    /// The number by which the kernel knows this socket in its namespace.
    pub(crate) fn port(&self) -> io::Result<u32> {
        Ok(getsockname::<NetlinkAddr>(self.fd.as_raw_fd())?.pid())
    }

    fn answers(&self, sequence: u32) -> io::Result<Vec<Message>> {
        let mut buffer = vec![0; BUFFER];
        let mut answers = Vec::new();
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (seen, message) in messages(&buffer[..length]) {
                if seen != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => return code(&message.body).map(|()| answers),
                    _ => answers.push(message),
                }
            }
        }
    }

    /// Takes what has been notified, without waiting. An overflow of the socket's buffer is reported as [`Overflow`].
    pub(crate) fn notified(&self) -> io::Result<Notified> {
        let mut buffer = vec![0; BUFFER];
        let mut seen = Vec::new();
        loop {
            match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => seen.extend(messages(&buffer[..length]).map(|(_, m)| m)),
                Err(nix::errno::Errno::EAGAIN) => return Ok(Notified::Messages(seen)),
                Err(nix::errno::Errno::ENOBUFS) => return Ok(Notified::Overflow),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for RawSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a subscription heard.
pub(crate) enum Notified {
    /// These.
    Messages(Vec<Message>),
    /// More than the buffer held: anything may have happened.
    Overflow,
}

fn code(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).map_or(-libc::EBADMSG, |b| {
        i32::from_ne_bytes([b[0], b[1], b[2], b[3]])
    });
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(code.saturating_abs()))
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u32, Message)> + '_ {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER)?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (length, sequence) = (word(0) as usize, word(8));
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = bytes.get(HEADER..length)?.to_vec();
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((sequence, Message { kind, body }))
    })
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// The attributes in `bytes`, as (type without flags, value).
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this type.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

/// A text as the kernel reads it: with a NUL behind it.
pub(crate) fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// A NUL-terminated text.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A number of four octets in network order.
pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// Appends an attribute.
pub(crate) fn push(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // All values here are a few octets, or copied from an attribute that the kernel sent.
    let length = u16::try_from(4 + value.len()).unwrap_or(4);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(&value[..usize::from(length) - 4]);
    body.resize(aligned(body.len()), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_back_as_they_were_laid() {
        let mut body = Vec::new();
        push(&mut body, 1, &[7]);
        push(&mut body, 2, b"weft\0");
        let found: Vec<_> = attributes(&body).collect();
        assert_eq!(found, vec![(1, &[7u8][..]), (2, &b"weft\0"[..])]);
        assert_eq!(text(found[1].1), "weft");
    }

    #[test]
    fn cut_off_and_lying_lengths_end_the_reading() {
        assert_eq!(attributes(&[1, 0, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 9]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0);
        let endless = [0u8; 64];
        assert_eq!(attributes(&endless).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
    }
}
