//! What decoders allocate for hostile octets: never more than a small constant and a small multiple of what came.
//!
//! A counting allocator measures the peak of one decoding, the result and its drop included, on its own thread. Growth
//! is counted at its worst: the old allocation lives until the new one is filled.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::panic::{AssertUnwindSafe, catch_unwind};

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use serde::de::DeserializeOwned;

use weft_core::crypto::{Random, Secret, sha256};
use weft_core::hlc::Stamp;
use weft_core::identity::Identity;
use weft_core::model::{ClusterId, EndpointId, Generation, Label, NodeId, Proto};
use weft_core::record::{Draft, Record};
use weft_core::token::{Token, TokenBody, TokenMember};
use weft_core::value::{Kind, NodeInfo};
use weft_core::view::{Endpoint, EndpointKind, Method, Publish, Service, ServicePort};
use weft_core::wire::{self, MAX_BODY, MAX_DECODE, Message};

/// What may be allocated however little came: the first node of a map (room for eleven pairs of texts, 544 octets) or
/// the first four elements of a vector (352 at most, of an invitation's members), and an error's text.
const SMALL: usize = 1024;
/// A vector doubles, and while it does the old half lives beside the new: three times its elements at worst.
const GROWTH: usize = 3;
/// Inputs drawn at random for each subject, beside those at every position of its samples.
const DRAWN: usize = 10_000;

#[path = "../../../tests/fuzz/src/memory.rs"]
mod memory;

use memory::peak_of;

/// One decoder, valid inputs for it, and what an octet can become at most.
struct Subject {
    name: &'static str,
    samples: Vec<Vec<u8>>,
    /// Makes what the decoder gets from a bent sample; not measured.
    prepare: fn(Vec<u8>) -> Vec<u8>,
    /// Whether the decoder took it.
    decode: fn(&[u8]) -> bool,
    /// Octets of memory that one octet of input can stand for.
    per_octet: usize,
}

impl Subject {
    fn encoded<T: serde::Serialize + DeserializeOwned>(
        name: &'static str,
        per_octet: usize,
        samples: &[T],
    ) -> Self {
        Self {
            name,
            samples: samples.iter().map(wire::encode).collect(),
            prepare: |bytes| bytes,
            decode: |bytes| wire::decode::<T>(bytes).is_ok(),
            per_octet,
        }
    }

    /// Runs the decoder on a bent sample, and holds what it allocates against the bound.
    fn check(&self, bent: Vec<u8>) {
        let input = (self.prepare)(bent);
        let shown = || HEXLOWER.encode(&input[..input.len().min(400)]);
        let decode = AssertUnwindSafe(|| {
            (self.decode)(&input);
        });
        let mut panicked = false;
        let peak = peak_of(|| panicked = catch_unwind(decode).is_err());
        assert!(!panicked, "{} panics at {}", self.name, shown());
        let bound = SMALL + GROWTH * self.per_octet * input.len();
        assert!(
            peak <= bound,
            "{}: {peak} octets for {} that came, at most {bound} expected: {}",
            self.name,
            input.len(),
            shown()
        );
    }

    /// All the ways to harm it; how many there were.
    fn harm(&self, random: &mut Random) -> usize {
        let mut count = 0;
        let mut check = |bent| {
            self.check(bent);
            count += 1;
        };
        for sample in &self.samples {
            let taken = (self.decode)(&(self.prepare)(sample.clone()));
            assert!(taken, "{}: a sample is not valid", self.name);
            (0..=sample.len()).for_each(|end| check(sample[..end].to_vec()));
            for at in 0..sample.len() {
                hostile_lengths(sample, at).for_each(&mut check);
                (0..8).for_each(|bit| check(flipped(sample, at, bit)));
            }
        }
        for round in 0..DRAWN {
            let at = random.range(self.samples.len() as u64) as usize;
            check(match round % 4 {
                0 => noise(random),
                1 => small_noise(random),
                _ => bent_twice(&self.samples[at], random),
            });
        }
        count
    }
}

/// An integer as each of the widths that a length can have on the wire.
fn widths(number: u64) -> [Vec<u8>; 4] {
    let wide = |mark: u8, octets: &[u8]| [&[mark], octets].concat();
    [
        vec![number.min(250) as u8],
        wide(251, &(number.min(0xffff) as u16).to_le_bytes()),
        wide(252, &(number.min(0xffff_ffff) as u32).to_le_bytes()),
        wide(253, &number.to_le_bytes()),
    ]
}

/// Lengths from a little too long to absurd, in every width, in place of the octet at `at`: with the rest behind it and
/// with nothing.
fn hostile_lengths(sample: &[u8], at: usize) -> impl Iterator<Item = Vec<u8>> {
    let left = (sample.len() - at) as u64;
    let limit = MAX_DECODE as u64;
    [
        left,
        left + 1,
        limit - 64,
        limit,
        1 << 20,
        u64::MAX >> 1,
        u64::MAX,
    ]
    .into_iter()
    .flat_map(widths)
    .flat_map(move |length| {
        let cut = [&sample[..at], &length].concat();
        let whole = [&cut, &sample[at + 1..]].concat();
        [cut, whole]
    })
}

fn flipped(sample: &[u8], at: usize, bit: u32) -> Vec<u8> {
    let mut bent = sample.to_vec();
    bent[at] ^= 1 << bit;
    bent
}

fn noise(random: &mut Random) -> Vec<u8> {
    let most = 1 + random.range(1200);
    let mut bytes = vec![0; random.range(most) as usize];
    random.fill(&mut bytes);
    bytes
}

/// Small numbers are variants, tags and lengths: they get deeper into a decoder.
fn small_noise(random: &mut Random) -> Vec<u8> {
    let most = 1 + random.range(8) as u8;
    let mut bytes = noise(random);
    bytes.iter_mut().for_each(|octet| *octet %= most);
    bytes
}

fn bent_twice(sample: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bent = sample.to_vec();
    for _ in 0..2 {
        let at = random.range(bent.len() as u64) as usize;
        let length = widths(random.u64() >> random.range(64));
        let width = &length[random.range(4) as usize];
        bent.splice(at..=at, width.iter().copied());
    }
    bent.truncate(bent.len() - random.range(8).min(bent.len() as u64 - 1) as usize);
    bent
}

fn label(text: &str) -> Label {
    Label::parse(text).expect("a label")
}

fn texts(count: usize) -> BTreeMap<String, String> {
    (0..count)
        .map(|i| (format!("key-{i}"), "value".repeat(i % 5)))
        .collect()
}

fn messages() -> Subject {
    let body = |len| vec![7; len];
    let samples = [
        Message::Membership(body(40)),
        Message::Sync(body(300)),
        Message::Ask {
            id: 1,
            body: body(0),
        },
        Message::Answer {
            id: u64::MAX,
            body: body(MAX_BODY),
        },
        Message::Bye,
        Message::Carrier(body(20)),
    ];
    Subject::encoded("wire::Message", 1, &samples)
}

fn endpoints() -> Subject {
    let endpoint = |names, labels| Endpoint {
        id: EndpointId([1; 8]),
        node: NodeId([2; 32]),
        kind: EndpointKind::Container,
        names: vec![label("web"); names],
        network: label("default"),
        ip: Ipv4Addr::new(10, 32, 0, 1),
        labels: texts(labels),
    };
    let samples = [endpoint(0, 0), endpoint(3, 3), endpoint(20, 12)];
    Subject::encoded("view::Endpoint", size_of::<String>(), &samples)
}

fn services() -> Subject {
    let port = |publish: usize| ServicePort {
        proto: Proto::Tcp,
        port: 80,
        target: 8080,
        publish: (0..publish)
            .map(|i| Publish {
                addr: (i % 2 == 0).then_some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
                port: 8080,
            })
            .collect(),
    };
    let service = |ports: usize, labels| Service {
        name: label("web"),
        vip: Ipv4Addr::new(10, 47, 0, 2),
        ports: (0..ports).map(port).collect(),
        selector: texts(labels),
        method: Method::Maglev,
    };
    // A list of one publish reserves four: 80 octets and more for the three that it takes.
    let samples = [service(1, 0), service(4, 3), service(7, 9)];
    Subject::encoded("view::Service", size_of::<Publish>() * 4 / 3, &samples)
}

fn nodes() -> Subject {
    let node = |addresses| NodeInfo {
        name: label("alpha"),
        host_addrs: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)); addresses],
        underlay: vec![SocketAddr::from(([192, 0, 2, 1], 6783)); addresses],
        tcp_port: NonZeroU16::new(443),
        caps: 5,
    };
    // An IPv4 address and a port are seven octets of input.
    let per_octet = size_of::<SocketAddr>() / 6;
    Subject::encoded("value::NodeInfo", per_octet, &[node(0), node(2), node(30)])
}

fn plain() -> [Subject; 3] {
    let bytes = [vec![], vec![vec![1; 5], vec![]], vec![vec![]; 200]];
    let strings = ["".to_owned(), "weft".repeat(3), "ö".repeat(300)];
    let nothings = [(String::new(), String::new())].into();
    let maps = [texts(0), nothings, texts(3), texts(30)];
    [
        // An empty one is one octet here and three words there.
        Subject::encoded("Vec<Vec<u8>>", size_of::<Vec<u8>>(), &bytes),
        Subject::encoded("String", 1, &strings),
        // Two octets at least for two texts, in nodes that are half empty at worst.
        Subject::encoded("BTreeMap<String, String>", size_of::<String>(), &maps),
    ]
}

fn records() -> Subject {
    let identity = Identity::generate(&mut Random::from_seed([3; 32]));
    let record = |key, value| {
        let draft = Draft {
            generation: Generation(7),
            sequence: 12,
            stamp: Stamp(99),
            network: 3,
            kind: Kind::SERVICE,
            key,
            value,
        };
        let record = Record::sign(&ClusterId([9; 16]), &identity, &draft);
        record.expect("it fits").bytes().to_vec()
    };
    Subject {
        name: "record::Record",
        samples: vec![
            record(b"web", None),
            record(b"web", Some(b"hello")),
            record(&[1; 80], Some(&[2; 700])),
        ],
        prepare: |bytes| bytes,
        decode: |bytes| Record::parse(bytes).is_ok(),
        per_octet: 1,
    }
}

const PREFIX: &str = "weft1_";
const CHECKSUM: usize = 4;

fn token_texts() -> Vec<String> {
    let issuer = Identity::generate(&mut Random::from_seed([1; 32]));
    let token = |members, addresses| {
        let member = TokenMember {
            id: NodeId([2; 32]),
            noise_key: [3; 32],
            addresses: vec![SocketAddr::from((Ipv6Addr::LOCALHOST, 6783)); addresses],
            tcp_port: NonZeroU16::new(443),
        };
        let body = TokenBody {
            cluster: ClusterId([1; 16]),
            id: [9; 16],
            issuer: NodeId([0; 32]),
            issued_at: 1_800_000_000,
            expires_at: 1_800_003_600,
            uses: 1,
            members: vec![member; members],
        };
        let token = Token::issue(&issuer, &Secret::new([5; 32]), body);
        token.expect("it fits").text()
    };
    vec![token(1, 0), token(2, 2)]
}

fn parse_token(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| Token::parse(text).is_ok())
}

/// Text as a person may garble it.
fn tokens() -> Subject {
    Subject {
        name: "Token::parse, bent text",
        samples: token_texts().into_iter().map(String::into_bytes).collect(),
        prepare: |bytes| String::from_utf8_lossy(&bytes).into_owned().into_bytes(),
        decode: parse_token,
        // The text without its blanks, the octets in it, the decoded body, what its signature is checked over.
        per_octet: 2,
    }
}

/// Text as an enemy makes it: its checksum is right, so what is inside is decoded.
fn token_bodies() -> Subject {
    let body = |text: String| {
        let encoded = text.strip_prefix(PREFIX).expect("an invitation's prefix");
        let bytes = BASE64URL_NOPAD.decode(encoded.as_bytes());
        let mut bytes = bytes.expect("an invitation's letters");
        bytes.truncate(bytes.len() - CHECKSUM);
        bytes
    };
    let summed = |mut bytes: Vec<u8>| {
        let sum = sha256(&bytes);
        bytes.extend_from_slice(&sum[..CHECKSUM]);
        [PREFIX, &BASE64URL_NOPAD.encode(&bytes)]
            .concat()
            .into_bytes()
    };
    Subject {
        name: "Token::parse, bent body",
        samples: token_texts().into_iter().map(body).collect(),
        prepare: summed,
        ..tokens()
    }
}

#[test]
fn no_decoder_allocates_much_more_than_it_received() {
    let mut subjects = vec![messages(), endpoints(), services(), nodes()];
    subjects.extend([records(), tokens(), token_bodies()]);
    subjects.extend(plain());
    let mut random = Random::from_seed([6; 32]);
    let count: usize = subjects.iter().map(|s| s.harm(&mut random)).sum();
    assert!(count >= 100_000, "only {count} inputs");
}

#[test]
fn what_would_have_cost_a_mebibyte_costs_nothing() {
    let claims: Vec<u8> = [[253].as_slice(), &(u64::MAX >> 1).to_le_bytes()].concat();
    let claims_limit = widths(MAX_DECODE as u64 - 64)[2].clone();
    for bytes in [claims, claims_limit] {
        let peaks = [
            peak_of(|| assert!(wire::decode::<Vec<Vec<u8>>>(&bytes).is_err())),
            peak_of(|| assert!(wire::decode::<Vec<u64>>(&bytes).is_err())),
            peak_of(|| assert!(wire::decode::<BTreeMap<String, String>>(&bytes).is_err())),
            peak_of(|| assert!(wire::decode::<String>(&bytes).is_err())),
        ];
        // An error's text at most.
        assert!(peaks.iter().all(|peak| *peak < 64), "{peaks:?}");
    }
}

#[test]
fn the_allocator_counts_peaks() {
    let peak = peak_of(|| {
        drop(vec![0u8; 3000]);
        drop(vec![0u8; 2000]);
    });
    assert_eq!(peak, 3000);
    let grown = peak_of(|| {
        let mut bytes = Vec::<u8>::with_capacity(1000);
        bytes.resize(1000, 1);
        bytes.reserve_exact(1000);
    });
    assert_eq!(grown, 3000);
}
