//! What `sendmsg` is told besides the octets (`cmsg(3)`): how to cut them, and what stands in the outer headers.

use std::net::SocketAddr;

/// Octets before each value: its length, which counts them, and two numbers that say what it is.
const HEAD: usize = size_of::<libc::cmsghdr>();
/// Two values of at most four octets, each padded to a word.
const ROOM: usize = 2 * (HEAD + 8);

/// Ancillary data, ready for the kernel.
#[derive(Debug)]
pub(crate) struct Control {
    octets: [u8; ROOM],
    len: usize,
}

impl Control {
    /// For datagrams to `to` with `tos` in their outer headers, to be cut to `segment` octets each if there are several.
    pub(crate) fn new(to: SocketAddr, tos: u8, segment: Option<u16>) -> Self {
        let mut control = Self {
            octets: [0; ROOM],
            len: 0,
        };
        if tos != 0 {
            let (level, kind) = match to {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            control.push(level, kind, &libc::c_int::from(tos).to_ne_bytes());
        }
        if let Some(segment) = segment {
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
        }
        control
    }

    fn push(&mut self, level: libc::c_int, kind: libc::c_int, value: &[u8]) {
        let out = &mut self.octets[self.len..];
        let (length, rest) = out.split_at_mut(HEAD - 8);
        length.copy_from_slice(&(HEAD + value.len()).to_ne_bytes());
        rest[..4].copy_from_slice(&level.to_ne_bytes());
        rest[4..8].copy_from_slice(&kind.to_ne_bytes());
        rest[8..8 + value.len()].copy_from_slice(value);
        self.len += (HEAD + value.len()).next_multiple_of(size_of::<usize>());
    }

    /// The octets; none where the kernel's own ways will do.
    pub(crate) fn octets(&self) -> &[u8] {
        &self.octets[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_no_saying_is_not_said() {
        let to = "192.0.2.1:9".parse().unwrap();
        assert!(Control::new(to, 0, None).octets().is_empty());
        let one = Control::new(to, 2, None).octets().len();
        let two = Control::new(to, 2, Some(1400)).octets().len();
        assert_eq!((one, two), (HEAD + 8, ROOM));
    }
}
