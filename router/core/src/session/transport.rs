//! The two directions of one established session: seals and opens datagrams, in place, without a clock. The core and the
//! carrier's threads share one; nothing in it blocks for longer than it takes to look at a bitmap.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::drops::DropReason;
use super::replay::ReplayWindow;
use crate::crypto::{AeadKey, Cipher, Secret, TAG_LEN};
use crate::model::NodeId;
use crate::wire::{DATA_HEADER, DataHeader, FrameKind};

/// Datagrams after which the initiator makes new keys.
pub const REKEY_AFTER_DATAGRAMS: u64 = 1 << 26;
/// Datagrams after which nothing more is sealed: RFC 9001 §B.1.1 allows AES-GCM 2^28 of up to 2 KiB.
pub const STOP_AFTER_DATAGRAMS: u64 = 1 << 28;
/// The same once a datagram was longer than [`LARGE`].
const REKEY_AFTER_LARGE: u64 = 1 << 22;
const STOP_AFTER_LARGE: u64 = 1 << 23;
/// Beyond this many octets fewer datagrams are safe under one key.
const LARGE: usize = 2048;

/// Why nothing was sealed. The buffer is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// This key has sealed all that is safe; wait for the next session.
    #[error("the session's key is used up")]
    Exhausted,
    /// The buffer lacks room for header, frame and tag, or the frame is empty.
    #[error("no room for header, frame and tag")]
    NoRoom,
}

/// What went through a session. Packets and bytes are of frames that carry inner packets; datagrams are all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames with inner packets, sent.
    pub tx_packets: u64,
    /// Their bodies' octets.
    pub tx_bytes: u64,
    /// Frames with inner packets, received.
    pub rx_packets: u64,
    /// Their bodies' octets.
    pub rx_bytes: u64,
    /// All datagrams sealed.
    pub tx_datagrams: u64,
    /// All datagrams opened.
    pub rx_datagrams: u64,
}

/// What a [`Transport`] is made of.
pub struct TransportKeys {
    /// Which AEAD.
    pub cipher: Cipher,
    /// Seals what we send.
    pub send: Secret<32>,
    /// Opens what we receive.
    pub receive: Secret<32>,
    /// For the kernel, should both ends want that.
    pub esp: Option<EspKeys>,
}

/// The same session's keys for ESP, made for that alone: AES-256-GCM's key and behind it the salt (RFC 4106 §8.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EspKeys {
    /// Seals what we send.
    pub send: Secret<36>,
    /// Opens what we receive.
    pub receive: Secret<36>,
}

/// One session's keys, counter and window.
pub struct Transport {
    peer: NodeId,
    local_index: u32,
    remote_index: u32,
    cipher: Cipher,
    send: AeadKey,
    receive: AeadKey,
    counter: AtomicU64,
    large: AtomicBool,
    window: Mutex<ReplayWindow>,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    rx_datagrams: AtomicU64,
    esp: Option<EspKeys>,
}

impl Transport {
    /// A session with `peer`, who sends to `local_index` and receives on `remote_index`.
    pub fn new(peer: NodeId, local_index: u32, remote_index: u32, keys: &TransportKeys) -> Self {
        Self {
            peer,
            local_index,
            remote_index,
            cipher: keys.cipher,
            send: AeadKey::new(keys.cipher, &keys.send),
            receive: AeadKey::new(keys.cipher, &keys.receive),
            counter: AtomicU64::new(0),
            large: AtomicBool::new(false),
            window: Mutex::new(ReplayWindow::new()),
            tx_packets: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            rx_packets: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            rx_datagrams: AtomicU64::new(0),
            esp: keys.esp.clone(),
        }
    }

    /// Its keys for ESP. The receiver's index is the SPI.
    pub fn esp(&self) -> Option<&EspKeys> {
        self.esp.as_ref()
    }

    /// Who is at the other end.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// The index in datagrams that come to us.
    pub fn local_index(&self) -> u32 {
        self.local_index
    }

    /// The index in datagrams that we send.
    pub fn remote_index(&self) -> u32 {
        self.remote_index
    }

    /// The AEAD both ends agreed on.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// Seals one frame and appends the datagram to `out`.
    pub fn seal(&self, kind: FrameKind, body: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        let start = out.len();
        out.resize(start + DATA_HEADER, 0);
        out.push(kind as u8);
        out.extend_from_slice(body);
        out.resize(out.len() + TAG_LEN, 0);
        self.seal_in_place(&mut out[start..], 1 + body.len())
            .map(drop)
            .inspect_err(|_| out.truncate(start))
    }

    /// Seals the frame (kind and body, `frame_len` octets) that stands in `buf` behind [`DATA_HEADER`] octets of room and
    /// before [`TAG_LEN`] more. Gives the datagram's length.
    pub fn seal_in_place(&self, buf: &mut [u8], frame_len: usize) -> Result<usize, SealError> {
        let end = DATA_HEADER + frame_len;
        if frame_len == 0 || buf.len() < end + TAG_LEN {
            return Err(SealError::NoRoom);
        }
        let counter = self.next_counter(frame_len)?;
        let header = DataHeader {
            receiver: self.remote_index,
            counter,
        }
        .to_bytes();
        let is_packet = carries_packets(buf[DATA_HEADER]);
        buf[..DATA_HEADER].copy_from_slice(&header);
        let tag = self
            .send
            .seal(counter, &header, &mut buf[DATA_HEADER..end])
            .ok_or(SealError::NoRoom)?;
        buf[end..end + TAG_LEN].copy_from_slice(&tag);
        if is_packet {
            self.tx_packets.fetch_add(1, Ordering::Relaxed);
            self.tx_bytes
                .fetch_add(frame_len as u64 - 1, Ordering::Relaxed);
        }
        Ok(end + TAG_LEN)
    }

    // INVARIANT: every value is given out once, whatever the thread: the add is one atomic step, and it can't wrap because
    // the limit is met 2^36 times earlier.
    fn next_counter(&self, frame_len: usize) -> Result<u64, SealError> {
        if frame_len > LARGE {
            self.large.store(true, Ordering::Relaxed);
        }
        let stop = self.by_size(STOP_AFTER_DATAGRAMS, STOP_AFTER_LARGE);
        if self.counter.load(Ordering::Relaxed) >= stop {
            return Err(SealError::Exhausted);
        }
        match self.counter.fetch_add(1, Ordering::Relaxed) {
            counter if counter < stop => Ok(counter),
            _ => Err(SealError::Exhausted),
        }
    }

    fn by_size(&self, usual: u64, large: u64) -> u64 {
        match self.large.load(Ordering::Relaxed) {
            true => large,
            false => usual,
        }
    }

    /// Opens a datagram in place and gives the frame's kind and body. The window is asked after the seal was found good and
    /// before anything changes.
    pub fn open<'a>(&self, datagram: &'a mut [u8]) -> Result<(u8, &'a mut [u8]), DropReason> {
        let header = DataHeader::parse(datagram).ok_or(DropReason::Malformed)?;
        if header.receiver != self.local_index {
            return Err(DropReason::UnknownSession);
        }
        let (aad, sealed) = datagram.split_at_mut(DATA_HEADER);
        let frame = self
            .receive
            .open(header.counter, aad, sealed)
            .ok_or(DropReason::Forged)?;
        let fresh = self
            .window
            .lock()
            .is_ok_and(|mut window| window.accept(header.counter));
        if !fresh {
            return Err(DropReason::Replayed);
        }
        let (kind, body) = frame.split_first_mut().ok_or(DropReason::BadFrame)?;
        self.rx_datagrams.fetch_add(1, Ordering::Relaxed);
        if carries_packets(*kind) {
            self.rx_packets.fetch_add(1, Ordering::Relaxed);
            self.rx_bytes
                .fetch_add(body.len() as u64, Ordering::Relaxed);
        }
        Ok((*kind, body))
    }

    /// What went through.
    pub fn counters(&self) -> Counters {
        Counters {
            tx_packets: self.tx_packets.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            rx_packets: self.rx_packets.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            tx_datagrams: self.counter.load(Ordering::Relaxed),
            rx_datagrams: self.rx_datagrams.load(Ordering::Relaxed),
        }
    }

    /// Has this key sealed so much that a new one is due?
    pub fn is_worn(&self) -> bool {
        let limit = self.by_size(REKEY_AFTER_DATAGRAMS, REKEY_AFTER_LARGE);
        self.counter.load(Ordering::Relaxed) >= limit
    }

    #[cfg(test)]
    pub(super) fn skip_to(&self, counter: u64) {
        self.counter.store(counter, Ordering::Relaxed);
    }
}

/// Kinds below 16 carry inner packets, known to this version or not.
fn carries_packets(kind: u8) -> bool {
    kind < FrameKind::Control as u8
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("peer", &self.peer)
            .field("local_index", &self.local_index)
            .field("remote_index", &self.remote_index)
            .field("cipher", &self.cipher)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Random;
    use crate::wire::OVERHEAD;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    fn pair(cipher: Cipher) -> (Transport, Transport) {
        let keys = |send, receive| TransportKeys {
            cipher,
            send: Secret::new([send; 32]),
            receive: Secret::new([receive; 32]),
            esp: None,
        };
        (
            Transport::new(NodeId([2; 32]), 11, 22, &keys(1, 2)),
            Transport::new(NodeId([1; 32]), 22, 11, &keys(2, 1)),
        )
    }

    fn sealed(from: &Transport, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        from.seal(FrameKind::Packet, body, &mut out).unwrap();
        out
    }

    #[test]
    fn what_one_end_seals_the_other_opens_once() {
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let (a, b) = pair(cipher);
            let datagram = sealed(&a, b"inner packet");
            assert_eq!(datagram.len(), OVERHEAD + 12);
            assert!(!datagram.windows(5).any(|part| part == b"inner"));
            let mut copy = datagram.clone();
            let (kind, body) = b.open(&mut copy).unwrap();
            assert_eq!((kind, &*body), (1, &b"inner packet"[..]));
            assert_eq!(b.open(&mut datagram.clone()), Err(DropReason::Replayed));
            assert_eq!(
                a.open(&mut datagram.clone()),
                Err(DropReason::UnknownSession)
            );
            let counters = b.counters();
            assert_eq!((counters.rx_packets, counters.rx_bytes), (1, 12));
            assert_eq!(a.counters().tx_bytes, 12);
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_a_forgery_and_spoils_nothing() {
        let (a, b) = pair(Cipher::Aes256Gcm);
        let datagram = sealed(&a, b"x");
        for bit in 0..datagram.len() * 8 {
            let mut forged = datagram.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            assert!(b.open(&mut forged).is_err());
        }
        assert!(b.open(&mut datagram.clone()).is_ok());
    }

    #[test]
    fn datagrams_may_come_in_any_order_within_the_window() {
        let (a, b) = pair(Cipher::Aes256Gcm);
        let mut datagrams: Vec<_> = (0..9000).map(|_| sealed(&a, b"x")).collect();
        datagrams.reverse();
        let opened = datagrams
            .iter_mut()
            .map(|d| b.open(d).is_ok())
            .filter(|ok| *ok)
            .count();
        assert_eq!(opened, 8192);
    }

    #[test]
    fn eight_threads_never_share_a_counter() {
        let (a, _) = pair(Cipher::Aes256Gcm);
        let a = Arc::new(a);
        let counters: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut buf = [0; OVERHEAD];
                        (0..20_000)
                            .map(|_| {
                                let len = a.seal_in_place(&mut buf, 1).unwrap();
                                DataHeader::parse(&buf[..len]).unwrap().counter
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(counters.len(), 160_000);
        assert_eq!(counters.iter().collect::<BTreeSet<_>>().len(), 160_000);
    }

    #[test]
    fn a_used_up_key_seals_nothing_more() {
        let (a, _) = pair(Cipher::Aes256Gcm);
        a.skip_to(REKEY_AFTER_DATAGRAMS);
        assert!(a.is_worn());
        a.skip_to(STOP_AFTER_DATAGRAMS - 1);
        let mut out = Vec::new();
        assert_eq!(a.seal(FrameKind::Packet, b"x", &mut out), Ok(()));
        let before = out.len();
        for _ in 0..3 {
            let result = a.seal(FrameKind::Packet, b"x", &mut out);
            assert_eq!(result, Err(SealError::Exhausted));
            assert_eq!(out.len(), before);
        }
    }

    #[test]
    fn long_datagrams_wear_a_key_out_sooner() {
        let (a, _) = pair(Cipher::Aes256Gcm);
        a.skip_to(STOP_AFTER_LARGE);
        assert!(!a.is_worn());
        let mut out = Vec::new();
        let result = a.seal(FrameKind::Packet, &[0; 3000], &mut out);
        assert_eq!(result, Err(SealError::Exhausted));
        assert!(a.is_worn());
    }

    #[test]
    fn a_buffer_without_room_is_refused() {
        let (a, _) = pair(Cipher::Aes256Gcm);
        assert_eq!(a.seal_in_place(&mut [0; 40], 9), Err(SealError::NoRoom));
        assert_eq!(a.seal_in_place(&mut [0; 40], 0), Err(SealError::NoRoom));
        assert_eq!(a.counters().tx_datagrams, 0);
    }

    #[test]
    fn random_datagrams_never_get_through() {
        let (_, b) = pair(Cipher::ChaCha20Poly1305);
        let mut random = Random::from_seed([4; 32]);
        for round in 0..100_000 {
            let mut datagram = vec![0; random.range(80) as usize];
            random.fill(&mut datagram);
            if round % 2 == 0 && datagram.len() >= DATA_HEADER {
                let header = DataHeader {
                    receiver: 22,
                    counter: random.u64(),
                };
                datagram[..DATA_HEADER].copy_from_slice(&header.to_bytes());
            }
            assert!(b.open(&mut datagram).is_err());
        }
        assert_eq!(b.counters(), Counters::default());
    }
}
