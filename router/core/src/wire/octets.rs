//! Octets as one piece: the same on the wire as a sequence of numbers below 256, which is how serde by itself takes them,
//! one call for each.

use std::fmt;

use serde::de::{Deserializer, Error, Visitor};
use serde::ser::Serializer;

pub(super) fn serialize<S: Serializer>(octets: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bytes(octets)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    // Borrowed ones are there already: nothing is believed of a length.
    from.deserialize_bytes(Octets)
}

struct Octets;

impl Visitor<'_> for Octets {
    type Value = Vec<u8>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("octets")
    }

    fn visit_bytes<E: Error>(self, octets: &[u8]) -> Result<Vec<u8>, E> {
        Ok(octets.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::super::{Message, decode, encode};

    /// As [`Message`] would be without this module.
    #[derive(Serialize, Deserialize)]
    enum Plain {
        Membership(Vec<u8>),
        Sync(Vec<u8>),
        Ask { id: u64, body: Vec<u8> },
        Answer { id: u64, body: Vec<u8> },
    }

    #[test]
    fn octets_are_on_the_wire_what_a_sequence_of_them_is() {
        for length in [0, 1, 250, 251, 1100] {
            let body: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let id = 77;
            let pairs = [
                (
                    encode(&Plain::Membership(body.clone())),
                    Message::Membership(body.clone()),
                ),
                (
                    encode(&Plain::Sync(body.clone())),
                    Message::Sync(body.clone()),
                ),
                (
                    encode(&Plain::Ask {
                        id,
                        body: body.clone(),
                    }),
                    Message::Ask {
                        id,
                        body: body.clone(),
                    },
                ),
                (
                    encode(&Plain::Answer {
                        id,
                        body: body.clone(),
                    }),
                    Message::Answer { id, body },
                ),
            ];
            for (plain, message) in pairs {
                assert_eq!(plain, encode(&message));
                assert_eq!(decode::<Message>(&plain), Ok(message));
                assert!(decode::<Message>(&plain[..plain.len() - 1]).is_err());
            }
        }
    }
}
