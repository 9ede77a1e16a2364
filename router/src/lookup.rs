//! `weft dns lookup`: asks the name server that containers ask, in the way they ask it (RFC 1035, RFC 6891).

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::Serialize;

const TIMEOUT: Duration = Duration::from_secs(2);
const TRIES: u32 = 2;
const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;
const NXDOMAIN: u8 = 3;
const TRUNCATED: u8 = 0x02;
/// RFC 1035 §4.1.4: pointers only lead backwards, so a name never needs more jumps than labels.
const MAX_JUMPS: usize = 127;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Found {
    /// The name as it was asked for.
    pub(crate) name: String,
    /// Addresses of a name.
    pub(crate) addresses: Vec<IpAddr>,
    /// Names of an address.
    pub(crate) names: Vec<String>,
}

/// Asks `server` about a name (both families) or an address (its names). `None` if there is no such name.
pub(crate) fn ask(server: IpAddr, text: &str) -> anyhow::Result<Option<Found>> {
    let server = SocketAddr::new(server, 53);
    if let Ok(ip) = text.parse::<IpAddr>() {
        let name = reverse_name(ip);
        let reply = query(server, &name, PTR)?;
        let known = reply.code != NXDOMAIN && !reply.names.is_empty();
        return Ok(known.then_some(Found {
            name,
            addresses: Vec::new(),
            names: reply.names,
        }));
    }
    let name = full_name(text)?;
    let v4 = query(server, &name, A)?;
    if v4.code == NXDOMAIN {
        return Ok(None);
    }
    let v6 = query(server, &name, AAAA)?;
    let mut addresses = v4.addresses;
    addresses.extend(v6.addresses);
    Ok(Some(Found {
        name,
        addresses,
        names: Vec::new(),
    }))
}

/// A name of one label is meant in weft.internal, as the containers' search domain makes it.
pub(crate) fn full_name(text: &str) -> anyhow::Result<String> {
    let name = text.trim_end_matches('.');
    let fine = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_graphic())
        });
    ensure!(fine, "\"{text}\" can't be a name in DNS");
    if name.contains('.') {
        Ok(name.to_owned())
    } else {
        Ok(format!("{name}.weft.internal"))
    }
}

fn reverse_name(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let nibbles = ip.octets().into_iter().rev();
            let text: String = nibbles
                .map(|o| format!("{:x}.{:x}.", o & 15, o >> 4))
                .collect();
            format!("{text}ip6.arpa")
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    code: u8,
    addresses: Vec<IpAddr>,
    names: Vec<String>,
}

fn query(server: SocketAddr, name: &str, kind: u16) -> anyhow::Result<Reply> {
    let question = question(random_id()?, name, kind);
    let mut answer = by_udp(server, &question)?;
    if answer.get(2).is_some_and(|flags| flags & TRUNCATED != 0) {
        answer = by_tcp(server, &question)?;
    }
    let reply = parse(&answer, &question).context("the name server's answer is broken")?;
    if reply.code != 0 && reply.code != NXDOMAIN {
        bail!(
            "the name server could not answer for {name} (code {})",
            reply.code
        );
    }
    Ok(reply)
}

fn random_id() -> anyhow::Result<[u8; 2]> {
    let mut id = [0; 2];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut id))
        .context("can't read /dev/urandom")?;
    Ok(id)
}

fn by_udp(server: SocketAddr, question: &[u8]) -> anyhow::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).context("can't open a socket")?;
    // Connected, so the kernel drops what comes from anybody else.
    socket
        .connect(server)
        .with_context(|| format!("can't reach weft's name server at {server}"))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let mut buffer = [0; 4096];
    for _ in 0..TRIES {
        socket
            .send(question)
            .with_context(|| format!("can't reach weft's name server at {server}"))?;
        if let Ok(length) = socket.recv(&mut buffer)
            && buffer[..length].starts_with(&question[..2])
        {
            return Ok(buffer[..length].to_vec());
        }
    }
    bail!("weft's name server at {server} does not answer; see: weft status")
}

fn by_tcp(server: SocketAddr, question: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT)
        .with_context(|| format!("can't reach weft's name server at {server} by TCP"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let length = u16::try_from(question.len()).context("the name is too long")?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// One question with recursion desired and an OPT record that admits 1,232 octets.
fn question(id: [u8; 2], name: &str, kind: u16) -> Vec<u8> {
    let mut out = id.to_vec();
    out.extend([0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 1]);
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out.extend(kind.to_be_bytes());
    out.extend([0, 1]);
    out.extend([0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    out
}

fn parse(answer: &[u8], question: &[u8]) -> Option<Reply> {
    let mut reader = Reader {
        bytes: answer,
        at: 0,
    };
    if reader.take(2)? != question.get(..2)? {
        return None;
    }
    let flags = reader.take(2)?;
    let code = flags[1] & 15;
    if flags[0] & 0x80 == 0 {
        return None;
    }
    let (questions, answers) = (reader.number()?, reader.number()?);
    reader.take(4)?;
    for _ in 0..questions {
        reader.name()?;
        reader.take(4)?;
    }
    let mut reply = Reply {
        code,
        addresses: Vec::new(),
        names: Vec::new(),
    };
    for _ in 0..answers {
        reader.name()?;
        let kind = reader.number()?;
        reader.take(6)?;
        let length = usize::from(reader.number()?);
        let start = reader.at;
        let data = reader.take(length)?;
        match kind {
            A => reply
                .addresses
                .push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?).into()),
            AAAA => reply
                .addresses
                .push(Ipv6Addr::from(<[u8; 16]>::try_from(data).ok()?).into()),
            PTR => reply.names.push(
                Reader {
                    bytes: answer,
                    at: start,
                }
                .name()?,
            ),
            _ => {}
        }
    }
    Some(reply)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn number(&mut self) -> Option<u16> {
        let bytes = self.take(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn name(&mut self) -> Option<String> {
        let mut labels = Vec::new();
        let mut cursor = Reader {
            bytes: self.bytes,
            at: self.at,
        };
        let mut jumps = 0;
        loop {
            let length = cursor.take(1)?[0];
            if length & 0xc0 == 0xc0 {
                let low = cursor.take(1)?[0];
                if jumps == 0 {
                    self.at = cursor.at;
                }
                jumps += 1;
                if jumps > MAX_JUMPS {
                    return None;
                }
                cursor.at = usize::from(length & 0x3f) << 8 | usize::from(low);
            } else if length == 0 {
                if jumps == 0 {
                    self.at = cursor.at;
                }
                return Some(labels.join("."));
            } else if length <= 63 && labels.len() < 128 {
                labels.push(printable(cursor.take(usize::from(length))?));
            } else {
                return None;
            }
        }
    }
}

/// A name from the wire goes to a terminal.
fn printable(label: &[u8]) -> String {
    label
        .iter()
        .map(|b| {
            if b.is_ascii_graphic() {
                char::from(*b)
            } else {
                '?'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: [u8; 2], records: &[u8], count: u8) -> Vec<u8> {
        let mut bytes = id.to_vec();
        bytes.extend([0x85, 0x80, 0, 1, 0, count, 0, 0, 0, 0]);
        bytes.extend(b"\x03web\x04weft\x08internal\x00\x00\x01\x00\x01");
        bytes.extend(records);
        bytes
    }

    #[test]
    fn addresses_and_compressed_names_are_read() {
        let asked = question([1, 2], "web.weft.internal", A);
        let record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\x0a\x20\x00\x07";
        let reply = parse(&answer([1, 2], record, 1), &asked).unwrap();
        assert_eq!(reply.addresses, ["10.32.0.7".parse::<IpAddr>().unwrap()]);

        let record = b"\xc0\x0c\x00\x0c\x00\x01\x00\x00\x00\x05\x00\x05\x02db\xc0\x10";
        let reply = parse(&answer([1, 2], record, 1), &asked).unwrap();
        assert_eq!(reply.names, ["db.weft.internal"]);
    }

    #[test]
    fn broken_answers_are_refused_and_never_panic() {
        let asked = question([1, 2], "web.weft.internal", A);
        // Another id, a pointer to itself, a record that promises more than there is.
        assert_eq!(parse(&answer([1, 3], b"", 0), &asked), None);
        let looped = b"\xc0\x23\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\x0a\x20\x00\x07";
        assert_eq!(parse(&answer([1, 2], looped, 1), &asked), None);
        let whole = answer([1, 2], looped, 200);
        for cut in 0..whole.len() {
            let _ = parse(&whole[..cut], &asked);
        }
        for bit in 0..whole.len() * 8 {
            let mut mutant = whole.clone();
            mutant[bit / 8] ^= 1 << (bit % 8);
            let _ = parse(&mutant, &asked);
        }
    }

    #[test]
    fn names_are_completed_and_addresses_reversed() {
        assert_eq!(full_name("web").unwrap(), "web.weft.internal");
        assert_eq!(full_name("debian.org.").unwrap(), "debian.org");
        for bad in ["", ".", "a..b", "a b", &"x".repeat(64)] {
            assert!(full_name(bad).is_err(), "{bad}");
        }
        let v4 = reverse_name("10.32.0.7".parse().unwrap());
        assert_eq!(v4, "7.0.32.10.in-addr.arpa");
        let v6 = reverse_name("fd00::7".parse().unwrap());
        assert!(v6.starts_with("7.0.0.0.") && v6.ends_with("0.0.d.f.ip6.arpa"));
    }
}
