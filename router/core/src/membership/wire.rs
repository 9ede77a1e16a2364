//! The bytes of membership, as they travel inside a sealed session. All numbers are big endian.
//!
//! ```text
//! kind 1 | digest 8 | generation 8 | renewals 8 | incarnation 2 | body
//!
//! 1 gossip   generation 8, renewals 8 (whom it is meant for) | message 2 or 50 | count 2 | member 51 ...
//! 2 hello    how the sender stands to the receiver: 1 | generation 8 | renewals 8
//! 3 answer   the same
//! 4 list     1 = "send me yours", 0 = not | count 2 | member 51 ...
//! 5 check    generation 8, renewals 8, incarnation 2: the receiver's, as suspected
//! 6 leave    -
//!
//! member     node id 32 | generation 8 | renewals 8 | incarnation 2 | state 1 (1 alive, 2 suspect, 3 down)
//! message    tag 1 | probe number 1 | [node id 32, generation 8, renewals 8]
//! ```
//!
//! Who sent it and whom it is for is not in there: the session says so, hence nobody can speak in another's name.

use bytes::{Buf, BufMut};
use foca::{Incarnation, Member, Message};

use super::ident::{Garbled, Ident, Life};
use super::ident::{put_ident, put_life, put_message, state_of, state_tag};
use super::ident::{take_ident, take_life, take_message};

/// Octets of the largest datagram: with the seals and headers around it it fits the least underlay MTU there is.
pub const MAX_DATAGRAM: usize = 1100;
/// Octets of one member in a datagram.
const MEMBER: usize = 51;
/// Members that fit a list.
pub(super) const LIST: usize = (MAX_DATAGRAM - 27 - 3) / MEMBER;

/// One datagram, without the two ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Datagram {
    /// Digest of the sender's view of who is alive.
    pub(super) digest: u64,
    /// The sender's present life.
    pub(super) life: Life,
    pub(super) incarnation: Incarnation,
    pub(super) body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Gossip {
        to: Life,
        message: Message<Ident>,
        members: Vec<Member<Ident>>,
    },
    Hello(Standing),
    Answer(Standing),
    List {
        want: bool,
        members: Vec<Member<Ident>>,
    },
    Check {
        to: Life,
        incarnation: Incarnation,
    },
    Leave,
}

/// How a node is held by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Never heard of, or long ago.
    Unknown,
    /// A member.
    Active(Life),
    /// Dead.
    Down(Life),
    /// A member for the sender, but dead for somebody else: time to take a new name.
    Contested(Life),
}

impl Datagram {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.put_u8(self.body.kind());
        out.put_u64(self.digest);
        put_life(&self.life, &mut out);
        out.put_u16(self.incarnation);
        match &self.body {
            Body::Gossip {
                to,
                message,
                members,
            } => {
                put_life(to, &mut out);
                put_message(message, &mut out);
                put_members(members, &mut out);
            }
            Body::Hello(standing) | Body::Answer(standing) => put_standing(*standing, &mut out),
            Body::List { want, members } => {
                out.put_u8(u8::from(*want));
                put_members(members, &mut out);
            }
            Body::Check { to, incarnation } => {
                put_life(to, &mut out);
                out.put_u16(*incarnation);
            }
            Body::Leave => {}
        }
        out
    }

    /// Never allocates more than a small multiple of what it was given.
    pub(super) fn decode(mut bytes: &[u8]) -> Result<Self, Garbled> {
        if bytes.len() > MAX_DATAGRAM {
            return Err(Garbled);
        }
        let buf = &mut bytes;
        let kind = buf.try_get_u8().map_err(|_| Garbled)?;
        let digest = buf.try_get_u64().map_err(|_| Garbled)?;
        let life = take_life(buf)?;
        let incarnation = buf.try_get_u16().map_err(|_| Garbled)?;
        let body = match kind {
            1 => Body::Gossip {
                to: take_life(buf)?,
                message: take_message(buf)?,
                members: take_members(buf)?,
            },
            2 => Body::Hello(take_standing(buf)?),
            3 => Body::Answer(take_standing(buf)?),
            4 => Body::List {
                want: take_flag(buf)?,
                members: take_members(buf)?,
            },
            5 => Body::Check {
                to: take_life(buf)?,
                incarnation: buf.try_get_u16().map_err(|_| Garbled)?,
            },
            6 => Body::Leave,
            _ => return Err(Garbled),
        };
        if buf.has_remaining() {
            return Err(Garbled);
        }
        Ok(Self {
            digest,
            life,
            incarnation,
            body,
        })
    }
}

/// Decodes a datagram and encodes what it said.
pub(crate) fn reencode(bytes: &[u8]) -> Option<Vec<u8>> {
    Datagram::decode(bytes)
        .ok()
        .map(|datagram| datagram.encode())
}

impl Body {
    fn kind(&self) -> u8 {
        match self {
            Body::Gossip { .. } => 1,
            Body::Hello(_) => 2,
            Body::Answer(_) => 3,
            Body::List { .. } => 4,
            Body::Check { .. } => 5,
            Body::Leave => 6,
        }
    }
}

fn put_members(members: &[Member<Ident>], out: &mut Vec<u8>) {
    let count = u16::try_from(members.len()).expect("no caller has more than fit a datagram");
    out.put_u16(count);
    for member in members {
        put_ident(member.id(), out);
        out.put_u16(member.incarnation());
        out.put_u8(state_tag(member.state()));
    }
}

fn take_members(buf: &mut &[u8]) -> Result<Vec<Member<Ident>>, Garbled> {
    let count = usize::from(buf.try_get_u16().map_err(|_| Garbled)?);
    if buf.remaining() != count * MEMBER {
        return Err(Garbled);
    }
    (0..count).map(|_| take_member(buf)).collect()
}

fn take_member(buf: &mut &[u8]) -> Result<Member<Ident>, Garbled> {
    let ident = take_ident(buf)?;
    let incarnation = buf.try_get_u16().map_err(|_| Garbled)?;
    let state = state_of(buf.try_get_u8().map_err(|_| Garbled)?)?;
    Ok(Member::new(ident, incarnation, state))
}

fn put_standing(standing: Standing, out: &mut Vec<u8>) {
    let (tag, life) = match standing {
        Standing::Unknown => (0, Life::default()),
        Standing::Active(life) => (1, life),
        Standing::Down(life) => (2, life),
        Standing::Contested(life) => (3, life),
    };
    out.put_u8(tag);
    put_life(&life, out);
}

fn take_standing(buf: &mut &[u8]) -> Result<Standing, Garbled> {
    let tag = buf.try_get_u8().map_err(|_| Garbled)?;
    let life = take_life(buf)?;
    match tag {
        0 => Ok(Standing::Unknown),
        1 => Ok(Standing::Active(life)),
        2 => Ok(Standing::Down(life)),
        3 => Ok(Standing::Contested(life)),
        _ => Err(Garbled),
    }
}

fn take_flag(buf: &mut &[u8]) -> Result<bool, Garbled> {
    match buf.try_get_u8().map_err(|_| Garbled)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Garbled),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Generation, NodeId};

    fn life() -> impl Strategy<Value = Life> {
        (any::<u64>(), any::<u64>()).prop_map(|(generation, renewals)| Life {
            generation: Generation(generation),
            renewals,
        })
    }

    fn ident() -> impl Strategy<Value = Ident> {
        (any::<[u8; 32]>(), life()).prop_map(|(id, life)| Ident {
            id: NodeId(id),
            life,
        })
    }

    fn members() -> impl Strategy<Value = Vec<Member<Ident>>> {
        let one = (ident(), any::<u16>(), 1u8..4)
            .prop_map(|(id, inc, state)| Member::new(id, inc, state_of(state).unwrap()));
        prop::collection::vec(one, 0..=LIST - 2)
    }

    fn message() -> impl Strategy<Value = Message<Ident>> {
        prop_oneof![
            any::<u8>().prop_map(Message::Ping),
            any::<u8>().prop_map(Message::Ack),
            (ident(), any::<u8>()).prop_map(|(target, probe_number)| Message::PingReq {
                target,
                probe_number
            }),
            (ident(), any::<u8>()).prop_map(|(origin, probe_number)| Message::ForwardedAck {
                origin,
                probe_number
            }),
            Just(Message::Gossip),
            Just(Message::TurnUndead),
        ]
    }

    fn standing() -> impl Strategy<Value = Standing> {
        prop_oneof![
            Just(Standing::Unknown),
            life().prop_map(Standing::Active),
            life().prop_map(Standing::Down),
            life().prop_map(Standing::Contested),
        ]
    }

    fn body() -> impl Strategy<Value = Body> {
        prop_oneof![
            (life(), message(), members()).prop_map(|(to, message, members)| Body::Gossip {
                to,
                message,
                members
            }),
            standing().prop_map(Body::Hello),
            standing().prop_map(Body::Answer),
            (any::<bool>(), members()).prop_map(|(want, members)| Body::List { want, members }),
            (life(), any::<u16>()).prop_map(|(to, incarnation)| Body::Check { to, incarnation }),
            Just(Body::Leave),
        ]
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(
            digest in any::<u64>(), life in life(), incarnation in any::<u16>(), body in body()
        ) {
            let datagram = Datagram { digest, life, incarnation, body };
            let bytes = datagram.encode();
            prop_assert!(bytes.len() <= MAX_DATAGRAM);
            prop_assert_eq!(Datagram::decode(&bytes), Ok(datagram));
        }

        #[test]
        fn a_cut_datagram_is_garbled(life in life(), body in body(), cut in 1usize..60) {
            let bytes = Datagram { digest: 0, life, incarnation: 0, body }.encode();
            let end = bytes.len().saturating_sub(cut);
            prop_assert!(Datagram::decode(&bytes[..end]).is_err());
        }

        #[test]
        fn garbage_never_panics(kind in 0u8..8, rest in prop::collection::vec(any::<u8>(), 0..1200)) {
            let mut bytes = vec![kind];
            bytes.extend(rest);
            let _ = Datagram::decode(&bytes);
        }
    }
}
