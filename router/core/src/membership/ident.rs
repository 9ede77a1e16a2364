//! Who foca thinks its members are, and how it writes them into its own buffers. Nothing of this leaves the node: what
//! goes on the wire is laid out in [`super::wire`].

use bytes::{Buf, BufMut};
use foca::{Codec, Header, Identity, Member, Message, State};

use crate::model::{Generation, NodeId};

/// One life of one node: a start of it, and how often it had to take a new name within that start because somebody
/// had declared it dead. Only the start is on disk; a higher one always beats all names of the starts before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ident {
    pub(super) id: NodeId,
    pub(super) life: Life,
}

/// The part of [`Ident`] that decides which of two is younger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Life {
    pub(super) generation: Generation,
    pub(super) renewals: u64,
}

impl Identity for Ident {
    type Addr = NodeId;

    /// Never by itself: foca's way leaves it deaf until a packet comes and keeps rumours about the old name
    /// (foca 2.0 lib.rs:1097, member.rs:114). `super::engine` builds a fresh one instead.
    fn renew(&self) -> Option<Self> {
        None
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.life > adversary.life
    }
}

/// Octets of an [`Ident`] in foca's buffers.
const IDENT: usize = 48;

/// The codec of foca's own buffers.
pub(super) struct Plain;

/// A buffer was too short or held a value that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a membership message")]
pub(super) struct Garbled;

impl Codec<Ident> for Plain {
    type Error = Garbled;

    fn encode_header(
        &mut self,
        header: &Header<Ident>,
        mut buf: impl BufMut,
    ) -> Result<(), Garbled> {
        // Two identities, an incarnation and the longest message.
        if buf.remaining_mut() < 2 * IDENT + 2 + 2 + IDENT {
            return Err(Garbled);
        }
        put_ident(&header.src, &mut buf);
        buf.put_u16(header.src_incarnation);
        put_ident(&header.dst, &mut buf);
        put_message(&header.message, &mut buf);
        Ok(())
    }

    fn decode_header(&mut self, mut buf: impl Buf) -> Result<Header<Ident>, Garbled> {
        Ok(Header {
            src: take_ident(&mut buf)?,
            src_incarnation: buf.try_get_u16().map_err(|_| Garbled)?,
            dst: take_ident(&mut buf)?,
            message: take_message(&mut buf)?,
        })
    }

    fn encode_member(
        &mut self,
        member: &Member<Ident>,
        mut buf: impl BufMut,
    ) -> Result<(), Garbled> {
        if buf.remaining_mut() < IDENT + 3 {
            return Err(Garbled);
        }
        put_ident(member.id(), &mut buf);
        buf.put_u16(member.incarnation());
        buf.put_u8(state_tag(member.state()));
        Ok(())
    }

    fn decode_member(&mut self, mut buf: impl Buf) -> Result<Member<Ident>, Garbled> {
        let id = take_ident(&mut buf)?;
        let incarnation = buf.try_get_u16().map_err(|_| Garbled)?;
        let state = state_of(buf.try_get_u8().map_err(|_| Garbled)?)?;
        Ok(Member::new(id, incarnation, state))
    }
}

pub(super) fn put_ident(ident: &Ident, buf: &mut impl BufMut) {
    buf.put_slice(&ident.id.0);
    put_life(&ident.life, buf);
}

pub(super) fn put_life(life: &Life, buf: &mut impl BufMut) {
    buf.put_u64(life.generation.0);
    buf.put_u64(life.renewals);
}

pub(super) fn take_ident(buf: &mut impl Buf) -> Result<Ident, Garbled> {
    let mut id = NodeId([0; 32]);
    buf.try_copy_to_slice(&mut id.0).map_err(|_| Garbled)?;
    Ok(Ident {
        id,
        life: take_life(buf)?,
    })
}

pub(super) fn take_life(buf: &mut impl Buf) -> Result<Life, Garbled> {
    Ok(Life {
        generation: Generation(buf.try_get_u64().map_err(|_| Garbled)?),
        renewals: buf.try_get_u64().map_err(|_| Garbled)?,
    })
}

pub(super) fn state_tag(state: State) -> u8 {
    match state {
        State::Alive => 1,
        State::Suspect => 2,
        State::Down => 3,
    }
}

pub(super) fn state_of(tag: u8) -> Result<State, Garbled> {
    match tag {
        1 => Ok(State::Alive),
        2 => Ok(State::Suspect),
        3 => Ok(State::Down),
        _ => Err(Garbled),
    }
}

/// Writes a message. foca also has Announce, Feed, Broadcast and TurnUndead: of these weft only ever lets it send the
/// last, the rest is done by hellos and lists of our own.
pub(super) fn put_message(message: &Message<Ident>, buf: &mut impl BufMut) {
    let (tag, node, number) = match message {
        Message::Ping(number) => (1, None, *number),
        Message::Ack(number) => (2, None, *number),
        Message::PingReq {
            target,
            probe_number,
        } => (3, Some(target), *probe_number),
        Message::IndirectPing {
            origin,
            probe_number,
        } => (4, Some(origin), *probe_number),
        Message::IndirectAck {
            target,
            probe_number,
        } => (5, Some(target), *probe_number),
        Message::ForwardedAck {
            origin,
            probe_number,
        } => (6, Some(origin), *probe_number),
        Message::Gossip => (7, None, 0),
        Message::TurnUndead => (8, None, 0),
        Message::Announce => (9, None, 0),
        Message::Feed => (10, None, 0),
        Message::Broadcast => (11, None, 0),
    };
    buf.put_u8(tag);
    buf.put_u8(number);
    if let Some(node) = node {
        put_ident(node, buf);
    }
}

pub(super) fn take_message(buf: &mut impl Buf) -> Result<Message<Ident>, Garbled> {
    let tag = buf.try_get_u8().map_err(|_| Garbled)?;
    let probe_number = buf.try_get_u8().map_err(|_| Garbled)?;
    Ok(match tag {
        1 => Message::Ping(probe_number),
        2 => Message::Ack(probe_number),
        3 => Message::PingReq {
            target: take_ident(buf)?,
            probe_number,
        },
        4 => Message::IndirectPing {
            origin: take_ident(buf)?,
            probe_number,
        },
        5 => Message::IndirectAck {
            target: take_ident(buf)?,
            probe_number,
        },
        6 => Message::ForwardedAck {
            origin: take_ident(buf)?,
            probe_number,
        },
        7 => Message::Gossip,
        8 => Message::TurnUndead,
        _ => return Err(Garbled),
    })
}
