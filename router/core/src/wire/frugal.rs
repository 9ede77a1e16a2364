//! Decoding that believes no length before its octets are there.
//!
//! bincode bounds what a string claims by its limit and tells serde how many elements a sequence claims; serde then
//! reserves room for up to a mebibyte of them before the first one is read. [`Frugal`] stands between the two:
//!
//! - Sequences and maps keep their `size_hint` to themselves, at every depth, so collections grow only with elements
//!   that were decoded.
//! - Strings and byte buffers are borrowed from the input and copied, so they are as long as the octets that came.
//! - All sequences and maps together have at most as many elements as there are octets: an element holds an octet, or
//!   at least a length of its own. What claims more is refused at once, also where elements would have no octets and
//!   so nothing else would end the loop. (Which means that such sequences can't be decoded; nothing here has any.)
//!
//! What is left is the growth that serde and the collections themselves have: a value's own size, and while a vector
//! doubles, the old one beside the new.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use bincode::config::Config;
use bincode::error::DecodeError;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

/// Decodes a value from the front of `bytes`, and says how many octets it took.
pub(super) fn decode<T: DeserializeOwned>(
    bytes: &[u8],
    config: impl Config,
) -> Result<(T, usize), DecodeError> {
    let elements = Cell::new(bytes.len());
    let seed = Frugal::new(PhantomData, &elements);
    bincode::serde::seed_decode_from_slice(seed, bytes, config)
}

/// Any of serde's parties, made frugal, with the number of elements that may still come.
///
/// Only for bincode's decoder: its methods for compound types call nothing but the visits for compound types, so the
/// other visits need no wrapping.
struct Frugal<'c, P> {
    party: P,
    elements: &'c Cell<usize>,
}

impl<'c, P> Frugal<'c, P> {
    fn new(party: P, elements: &'c Cell<usize>) -> Self {
        Self { party, elements }
    }

    fn with<Q>(&self, party: Q) -> Frugal<'c, Q> {
        Frugal::new(party, self.elements)
    }

    fn counted<V>(&self, visitor: V) -> Frugal<'c, Counted<V>> {
        self.with(Counted(visitor))
    }
}

/// A visitor of a sequence or map whose length is in the input, not in the type.
struct Counted<V>(V);

/// Takes the elements that somebody claims to have from those that may still come.
fn claim<E: Error>(elements: &Cell<usize>, claimed: Option<usize>) -> Result<(), E> {
    let left = claimed.and_then(|claimed| elements.get().checked_sub(claimed));
    elements.set(left.ok_or_else(|| E::custom("more elements than octets"))?);
    Ok(())
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Frugal<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, decoder: D) -> Result<S::Value, D::Error> {
        let decoder = self.with(decoder);
        self.party.deserialize(decoder)
    }
}

macro_rules! forward {
    ($($method:ident as $inner:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.party.$inner(visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Frugal<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_any as deserialize_any
        deserialize_ignored_any as deserialize_ignored_any
        deserialize_identifier as deserialize_identifier
        deserialize_bool as deserialize_bool
        deserialize_i8 as deserialize_i8
        deserialize_i16 as deserialize_i16
        deserialize_i32 as deserialize_i32
        deserialize_i64 as deserialize_i64
        deserialize_i128 as deserialize_i128
        deserialize_u8 as deserialize_u8
        deserialize_u16 as deserialize_u16
        deserialize_u32 as deserialize_u32
        deserialize_u64 as deserialize_u64
        deserialize_u128 as deserialize_u128
        deserialize_f32 as deserialize_f32
        deserialize_f64 as deserialize_f64
        deserialize_char as deserialize_char
        deserialize_unit as deserialize_unit
        // Owned ones are made from borrowed ones: bincode would make room for the length that is claimed.
        deserialize_str as deserialize_str
        deserialize_string as deserialize_str
        deserialize_bytes as deserialize_bytes
        deserialize_byte_buf as deserialize_bytes
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.party.deserialize_unit_struct(name, visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_option(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_newtype_struct(name, visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.counted(visitor);
        self.party.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.counted(visitor);
        self.party.deserialize_map(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_tuple(len, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_tuple_struct(name, len, visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_struct(name, fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.with(visitor);
        self.party.deserialize_enum(name, variants, visitor)
    }

    fn is_human_readable(&self) -> bool {
        self.party.is_human_readable()
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Frugal<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.party.expecting(f)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.party.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, decoder: D) -> Result<V::Value, D::Error> {
        let decoder = self.with(decoder);
        self.party.visit_some(decoder)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, decoder: D) -> Result<V::Value, D::Error> {
        let decoder = self.with(decoder);
        self.party.visit_newtype_struct(decoder)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.with(access);
        self.party.visit_seq(access)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let access = self.with(access);
        self.party.visit_enum(access)
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Frugal<'_, Counted<V>> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.party.0.expecting(f)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        claim(self.elements, access.size_hint())?;
        let access = self.with(access);
        self.party.0.visit_seq(access)
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        claim(self.elements, access.size_hint())?;
        let access = self.with(access);
        self.party.0.visit_map(access)
    }
}

// Neither access tells a `size_hint`: the trait's own says `None`.
impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Frugal<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let seed = self.with(seed);
        self.party.next_element_seed(seed)
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Frugal<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let seed = self.with(seed);
        self.party.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.with(seed);
        self.party.next_value_seed(seed)
    }
}

impl<'c, 'de, A: EnumAccess<'de>> EnumAccess<'de> for Frugal<'c, A> {
    type Error = A::Error;
    type Variant = Frugal<'c, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        // The variant itself is a number.
        let (value, variant) = self.party.variant_seed(seed)?;
        Ok((value, Frugal::new(variant, self.elements)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Frugal<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.party.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = self.with(seed);
        self.party.newtype_variant_seed(seed)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.with(visitor);
        self.party.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.with(visitor);
        self.party.struct_variant(fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Wrapped(String);

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Variant {
        Unit,
        Newtype(Wrapped),
        Tuple(i16, Vec<u8>),
        Struct { a: Option<Box<str>>, b: [u32; 2] },
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Shapes {
        numbers: (u8, i8, u64, i128, f64, bool, char),
        map: BTreeMap<String, Vec<Variant>>,
        unit: (),
        deep: Option<Vec<Option<Vec<Wrapped>>>>,
    }

    fn shapes() -> Shapes {
        let variants = vec![
            Variant::Unit,
            Variant::Newtype(Wrapped("frugal".to_owned())),
            Variant::Tuple(-300, vec![1, 2, 3]),
            Variant::Struct {
                a: Some("some".into()),
                b: [7, u32::MAX],
            },
        ];
        Shapes {
            numbers: (255, -1, u64::MAX, i128::MIN, 0.5, true, 'ß'),
            map: [("a".to_owned(), variants), (String::new(), vec![])].into(),
            unit: (),
            deep: Some(vec![None, Some(vec![Wrapped("x".repeat(300))])]),
        }
    }

    fn both<T: DeserializeOwned>(bytes: &[u8]) -> [Option<(T, usize)>; 2] {
        let config = bincode::config::standard().with_limit::<65536>();
        [
            decode(bytes, config).ok(),
            bincode::serde::decode_from_slice(bytes, config).ok(),
        ]
    }

    fn encode<T: Serialize>(value: &T) -> Vec<u8> {
        bincode::serde::encode_to_vec(value, bincode::config::standard()).unwrap()
    }

    #[test]
    fn every_shape_comes_back() {
        let bytes = encode(&shapes());
        let [ours, plain] = both::<Shapes>(&bytes);
        assert_eq!(ours, Some((shapes(), bytes.len())));
        assert_eq!(ours, plain);
    }

    #[test]
    fn elements_without_octets_end_too() {
        let claims_most: Vec<u8> = [[253].as_slice(), &[0xff; 8]].concat();
        let decoded = decode::<Vec<()>>(&claims_most, bincode::config::standard());
        assert!(decoded.is_err());
    }

    #[test]
    fn as_many_elements_as_octets_allow_are_decoded() {
        let nested = vec![vec![0u8; 250], vec![], vec![0; 251]];
        let [ours, _] = both::<Vec<Vec<u8>>>(&encode(&nested));
        assert_eq!(ours.map(|(value, _)| value), Some(nested));
    }

    proptest! {
        #[test]
        fn frugal_and_plain_agree_about_any_octets(
            bytes in proptest::collection::vec(prop_oneof![0u8..6, any::<u8>()], 0..60),
        ) {
            let [ours, plain] = both::<(Vec<Variant>, BTreeMap<u16, String>)>(&bytes);
            prop_assert_eq!(ours, plain);
        }

        #[test]
        fn frugal_and_plain_agree_about_bent_octets(at in 0usize..400, to in any::<u8>()) {
            let mut bytes = encode(&shapes());
            let at = at % bytes.len();
            bytes[at] = to;
            let [ours, plain] = both::<Shapes>(&bytes);
            // A NaN is not equal to itself, its text is.
            prop_assert_eq!(format!("{ours:?}"), format!("{plain:?}"));
        }
    }
}
