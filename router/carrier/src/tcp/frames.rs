//! Datagrams one behind the other, each with its length before it.

use weft_core::wire::{MAX_STREAMED, STREAM_HEAD};

use crate::batch::Run;

/// A length that no datagram has: this is no stream of datagrams, or its reader has lost its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoLength;

/// The length of the datagram that `octets` begin with, behind its head; `None` while it is not whole.
pub(super) fn first(octets: &[u8]) -> Result<Option<usize>, NoLength> {
    let Some(head) = octets.first_chunk::<STREAM_HEAD>() else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes(*head));
    match len {
        0 => Err(NoLength),
        1..=MAX_STREAMED => Ok((octets.len() - STREAM_HEAD >= len).then_some(len)),
        _ => Err(NoLength),
    }
}

/// The datagrams of a run with their heads; `None` when they are too long.
pub(super) fn with_heads(run: Run<'_>) -> Option<impl Iterator<Item = ([u8; STREAM_HEAD], &[u8])>> {
    let fits = run.stride <= MAX_STREAMED && run.stride > 0;
    fits.then(|| {
        run.octets
            .chunks(run.stride)
            .map(|datagram| ((datagram.len() as u16).to_be_bytes(), datagram))
    })
}

/// Octets of a run with its heads.
pub(super) fn length(run: Run<'_>) -> usize {
    run.octets.len() + run.octets.len().div_ceil(run.stride.max(1)) * STREAM_HEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(octets: &[u8], stride: usize) -> Run<'_> {
        Run {
            octets,
            stride,
            tos: 0,
        }
    }

    fn framed(run: Run<'_>) -> Vec<u8> {
        let heads = with_heads(run).unwrap();
        heads
            .flat_map(|(head, d)| [&head[..], d].concat())
            .collect()
    }

    #[test]
    fn what_is_framed_is_found_again_wherever_it_is_cut() {
        let octets: Vec<u8> = (0..=250).collect();
        let stream = framed(run_of(&octets, 100));
        assert_eq!(stream.len(), length(run_of(&octets, 100)));
        for cut in 0..stream.len() {
            let (mut at, mut found) = (0, Vec::new());
            for end in [cut, stream.len()] {
                while let Some(len) = first(&stream[at..end]).unwrap() {
                    found.push(stream[at + STREAM_HEAD..at + STREAM_HEAD + len].to_vec());
                    at += STREAM_HEAD + len;
                }
            }
            let sent: Vec<_> = octets.chunks(100).map(<[u8]>::to_vec).collect();
            assert_eq!(found, sent, "cut at {cut}");
        }
    }

    #[test]
    fn lengths_that_no_datagram_has_are_refused_at_once() {
        assert_eq!(first(&[0, 0]), Err(NoLength));
        let most = (MAX_STREAMED as u16).to_be_bytes();
        assert_eq!(first(&most), Ok(None));
        let more = (MAX_STREAMED as u16 + 1).to_be_bytes();
        assert_eq!(first(&more), Err(NoLength));
        // Whoever speaks something else there begins with letters, or with a TLS record.
        assert_eq!(first(b"GET / HTTP/1.1\r\n"), Err(NoLength));
        assert_eq!(first(b"HTTP/1.1 400"), Err(NoLength));
        assert!(with_heads(run_of(&[0; MAX_STREAMED + 1], MAX_STREAMED + 1)).is_none());
    }
}
