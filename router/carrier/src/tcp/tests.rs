use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::unused_port::unused_port;

const LOOPBACK: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);

fn nobody_listens() -> Streams {
    Streams::open(None, LOOPBACK, Vec::new()).unwrap().0
}

fn until(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
}

#[test]
fn what_the_core_sends_waits_for_the_connection_and_goes_whole() {
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = far.local_addr().unwrap();
    let streams = nobody_listens();
    let lost = streams.send(to, Run::of_one(b"packets"));
    assert_eq!(lost.unwrap_err().kind(), io::ErrorKind::NotConnected);
    streams.send_or_dial(to, Run::of_one(b"hello")).unwrap();
    streams.send_or_dial(to, Run::of_one(b"again")).unwrap();
    let (mut come, _) = far.accept().unwrap();
    let connection = streams.with(to).unwrap();
    until(|| connection.on_writable().is_ok() && connection.is_connected());
    let mut octets = [0; 14];
    come.read_exact(&mut octets).unwrap();
    assert_eq!(&octets, b"\0\x05hello\0\x05again");
    let run = Run {
        octets: b"aaabbb",
        stride: 3,
        tos: 0,
    };
    assert!(matches!(streams.send(to, run), Ok(Sent::Whole)));
    let mut octets = [0; 10];
    come.read_exact(&mut octets).unwrap();
    assert_eq!(&octets, b"\0\x03aaa\0\x03bbb");
}

#[test]
fn nobody_waits_for_a_far_end_that_does_not_read() {
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = far.local_addr().unwrap();
    let streams = nobody_listens();
    streams.send_or_dial(to, Run::of_one(b"hello")).unwrap();
    let (_come, _) = far.accept().unwrap();
    let connection = streams.with(to).unwrap();
    until(|| connection.on_writable().is_ok() && connection.is_connected());
    let datagrams = [7; 64 * 1000];
    let run = Run {
        octets: &datagrams,
        stride: 1000,
        tos: 0,
    };
    let refused = (0..2000)
        .map(|_| streams.send(to, run))
        .find(Result::is_err);
    assert_eq!(
        refused.unwrap().unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    let large = [0; weft_core::wire::MAX_STREAMED + 1];
    let refused = streams.send(to, Run::of_one(&large)).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EMSGSIZE));
}

#[test]
fn who_can_not_be_reached_is_left_alone_for_a_while() {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, unused_port()));
    let streams = nobody_listens();
    let call = || streams.send_or_dial(to, Run::of_one(b"hello"));
    if call().is_ok() {
        let connection = streams.with(to).unwrap();
        until(|| connection.on_writable().is_err());
        streams.close(connection.token).unwrap();
    }
    assert_eq!(call().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(streams.is_empty());
}

#[test]
fn strangers_are_bounded_and_closed_ones_leave_nothing() {
    let port = unused_port();
    let (streams, _poll) = Streams::open(Some(port), LOOPBACK, Vec::new()).unwrap();
    let listener: TcpListener = streams.listeners().unwrap().remove(0).into();
    let mut theirs = Vec::new();
    for _ in 0..100 {
        theirs.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
        let mut accepted = listener.accept();
        while accepted.is_err() {
            accepted = listener.accept();
        }
        let (stream, far) = accepted.unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = mio::net::TcpStream::from_std(stream);
        streams.accept(stream, far).unwrap();
        assert!(streams.all().len() <= 16, "of one source");
    }
    let mut first = theirs.remove(0);
    let gone = first.read(&mut [0; 1]);
    assert!(gone.is_err() || gone.is_ok_and(|read| read == 0));
    assert!(first.write_all(b"x").is_err() || first.read(&mut [0; 1]).is_err());
    for connection in streams.all() {
        streams.close(connection.token);
    }
    assert!(streams.is_empty());
}

#[test]
fn listeners_of_a_predecessor_go_on_with_who_waits_at_them() {
    let port = unused_port();
    let (first, _) = Streams::open(Some(port), LOOPBACK, Vec::new()).unwrap();
    let taken = Streams::open(Some(port), LOOPBACK, Vec::new());
    assert!(matches!(taken, Err(CarrierError::TcpPortTaken { port: p }) if p == port));
    let _waits = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let given = first.listeners().unwrap();
    drop(first);
    let (next, _) = Streams::open(Some(port), LOOPBACK, given).unwrap();
    let listener: TcpListener = next.listeners().unwrap().remove(0).into();
    assert!(listener.accept().is_ok());
}
