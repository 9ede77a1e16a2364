//! The line between two daemons of one host: words with at most one descriptor each, over a Unix stream.
//!
//! A word is two octets of length, network order, and that much JSON. Its descriptor travels with its first octet.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::daemon::publish::Place;

/// No word comes near it.
const MAX_WORD: usize = 4096;
/// The kernel gives no more descriptors with one read than one word has; room to spare.
const MAX_DESCRIPTORS: usize = 4;

/// What the two say to each other, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Word {
    /// Successor: I am here.
    Begin,
    /// Predecessor: this descriptor is what `name` says. One of an unknown name is closed by whoever gets it.
    Descriptor {
        name: String,
        #[serde(default)]
        place: Option<Place>,
    },
    /// Predecessor: those were all, and the state directory is free.
    Released,
    /// Successor: all is prepared; stop reading.
    Take,
    /// Predecessor: nobody reads any more.
    Stopped,
    /// Successor: all is in place; end.
    Up,
}

/// One end.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// Read and not yet understood.
    octets: Vec<u8>,
    /// Come, and their words not yet understood.
    descriptors: VecDeque<OwnedFd>,
}

impl Channel {
    /// Takes over a stream of which `octets` were read already.
    pub(super) fn new(stream: UnixStream, octets: Vec<u8>) -> Self {
        Self {
            stream,
            octets,
            descriptors: VecDeque::new(),
        }
    }

    /// Sends a word, with its descriptor if it has one.
    pub(super) async fn say(&self, word: &Word, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let body = serde_json::to_vec(word)?;
        let length = u16::try_from(body.len()).map_err(io::Error::other)?;
        let octets = [&length.to_be_bytes()[..], &body].concat();
        let mut sent = 0;
        while sent < octets.len() {
            let descriptor = with.filter(|_| sent == 0);
            let rest = &octets[sent..];
            sent += self
                .stream
                .async_io(Interest::WRITABLE, || send(&self.stream, rest, descriptor))
                .await?;
        }
        Ok(())
    }

    /// The next word and its descriptor; an error when the other end is gone, or silent for `patience`.
    pub(super) async fn hear(&mut self, patience: Duration) -> io::Result<(Word, Option<OwnedFd>)> {
        tokio::time::timeout(patience, self.next())
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The same where just one word makes sense.
    pub(super) async fn expect(&mut self, wanted: Word, patience: Duration) -> io::Result<()> {
        let (word, _) = self.hear(patience).await?;
        if word == wanted {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "waited for {wanted:?} and heard {word:?}"
        )))
    }

    /// Kills the process at the other end.
    pub(super) fn end_other(&self) -> io::Result<()> {
        // Without one that this process could name there is none to be killed; 0 would be this very group of processes.
        let pid = self.stream.peer_cred()?.pid().filter(|pid| *pid > 1);
        let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
    }

    async fn next(&mut self) -> io::Result<(Word, Option<OwnedFd>)> {
        loop {
            if let Some(word) = take_word(&mut self.octets)? {
                let has_one = matches!(word, Word::Descriptor { .. });
                let descriptor = has_one.then(|| self.descriptors.pop_front()).flatten();
                if has_one && descriptor.is_none() {
                    return Err(io::Error::other("a descriptor did not arrive"));
                }
                return Ok((word, descriptor));
            }
            let mut buffer = [0; MAX_WORD];
            let (length, descriptors) = self
                .stream
                .async_io(Interest::READABLE, || receive(&self.stream, &mut buffer))
                .await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.octets.extend_from_slice(&buffer[..length]);
            self.descriptors.extend(descriptors);
        }
    }
}

/// Cuts the first word off, if it is whole.
fn take_word(octets: &mut Vec<u8>) -> io::Result<Option<Word>> {
    let Some(head) = octets.first_chunk::<2>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes(*head));
    if length > MAX_WORD {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let Some(body) = octets.get(2..2 + length) else {
        return Ok(None);
    };
    let word = serde_json::from_slice(body)?;
    octets.drain(..2 + length);
    Ok(Some(word))
}

fn send(to: &UnixStream, octets: &[u8], with: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = with.as_slice();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(
        to.as_fd(),
        &[IoSlice::new(octets)],
        &mut control,
        flags,
    )?)
}

fn receive(from: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = recvmsg(
        from.as_fd(),
        &mut [IoSliceMut::new(into)],
        &mut control,
        flags,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(come) = message {
            descriptors.extend(come);
        }
    }
    Ok((got.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a, Vec::new()), Channel::new(b, Vec::new()))
    }

    fn pipe_word(name: &str) -> Word {
        Word::Descriptor {
            name: name.to_owned(),
            place: None,
        }
    }

    #[tokio::test]
    async fn each_descriptor_comes_with_its_own_word() {
        let (a, mut b) = pair();
        let pipes: Vec<_> = (0..20).map(|_| std::io::pipe().unwrap()).collect();
        a.say(&Word::Begin, None).await.unwrap();
        for (n, (_, writer)) in pipes.iter().enumerate() {
            a.say(&pipe_word(&n.to_string()), Some(writer.as_fd()))
                .await
                .unwrap();
        }
        a.say(&Word::Released, None).await.unwrap();
        b.expect(Word::Begin, PATIENCE).await.unwrap();
        for (n, (mut reader, writer)) in pipes.into_iter().enumerate() {
            let (word, come) = b.hear(PATIENCE).await.unwrap();
            assert_eq!(word, pipe_word(&n.to_string()));
            drop(writer);
            std::fs::File::from(come.unwrap())
                .write_all(&[n as u8])
                .unwrap();
            let mut said = Vec::new();
            reader.read_to_end(&mut said).unwrap();
            assert_eq!(said, [n as u8]);
        }
        b.expect(Word::Released, PATIENCE).await.unwrap();
    }

    #[tokio::test]
    async fn an_end_that_is_gone_or_babbles_is_an_error() {
        let (a, mut b) = pair();
        drop(a);
        let gone = b.expect(Word::Up, PATIENCE).await.unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);

        let (a, mut b) = pair();
        a.say(&pipe_word("tap"), None).await.unwrap();
        assert!(
            b.hear(PATIENCE).await.is_err(),
            "a word without its descriptor"
        );

        for nonsense in [&b"\xff\xff{"[..], b"\x00\x03{{{"] {
            let (_other, stream) = UnixStream::pair().unwrap();
            let mut babbled = Channel::new(stream, nonsense.to_vec());
            assert!(babbled.hear(PATIENCE).await.is_err());
        }
    }
}
