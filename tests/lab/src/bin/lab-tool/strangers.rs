//! Many connections to one port by somebody who has nothing to say there.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::{Result, say};

/// Between two octets of one that takes its time.
const PACE: Duration = Duration::from_millis(200);

/// Opens `count` connections that are `manner`: idle, junk or slow; says `N connected`, and `N closed` once they are.
pub(super) fn strangers(to: SocketAddr, count: usize, manner: &str) -> Result<()> {
    let mut open = Vec::new();
    for _ in 0..count {
        let mut stream = match TcpStream::connect(to) {
            Ok(stream) => stream,
            // Taken and closed before this side had noticed that it was taken.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => continue,
            Err(error) => return Err(error.into()),
        };
        stream.set_nonblocking(true)?;
        if manner == "junk" {
            // It may be closed already: there are many of us.
            let _ = stream.write_all(&[0x5a; 700]);
        }
        open.push(stream);
    }
    say(&format!("{count} connected"));
    let mut octets = [0x04, 0x4c, 1, 1, 0, 0].iter().cycle();
    while !open.is_empty() {
        let octet = *octets.next().unwrap_or(&0);
        if manner == "slow" {
            open.iter_mut()
                .for_each(|stream| drop(stream.write(&[octet])));
        }
        open.retain_mut(is_open);
        std::thread::sleep(PACE);
    }
    say(&format!("{count} closed"));
    Ok(())
}

fn is_open(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(length) => length > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}
