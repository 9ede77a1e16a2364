//! Handshakes: what stands under their seals is the input, the seals are right.

use std::time::Duration;

use weft_core::crypto::{Cipher, Random, Secret};
use weft_core::fuzz::{Between, Half, JoinMessage, Through};
use weft_core::identity::Identity;
use weft_core::model::{Generation, Label, Now};
use weft_core::node::Start;
use weft_core::session::handshake::{Capabilities, Refusal};
use weft_core::session::join::Verdict;
use weft_core::store::Stored;
use weft_core::token::{Token, TokenBody};
use weft_core::wire::{self, DatagramType, FrameKind};

use super::Seen;
use super::frames::{removed, response, restarts, verdict, welcome};
use crate::pieces::{cut, join as joined, marked};
use crate::scene::{Host, SCENE, address, identity, label};

const CIPHER: Cipher = Cipher::ChaCha20Poly1305;

fn last(host: &Host, kind: DatagramType) -> Option<Vec<u8>> {
    let sent = host.sent.iter().rev();
    let mut sent = sent.map(|(_, bytes)| bytes);
    sent.find(|bytes| DatagramType::of(bytes) == Some(kind))
        .cloned()
}

/// Datagrams for a member from somebody who holds the cluster's secret. A piece is a whole datagram, a first message
/// with these octets inside, or the answer to the host's own call with these inside.
pub(super) fn handshake(data: &[u8]) -> Seen {
    let mut host = Host::resumed();
    host.pass(Duration::from_millis(10));
    let mut random = Random::from_seed([3; 32]);
    let mut taken = false;
    for piece in cut(data, 8) {
        let Some((mark, inside)) = piece.split_first() else {
            continue;
        };
        let before = host.sent.len();
        // Host 3 has the secret and is nobody.
        let caller = identity(2 + (mark >> 4 & 1));
        match mark & 3 {
            0 => host.datagram(address(2), inside),
            1 => {
                let to = identity(1).noise_public();
                let call = Half::call(&SCENE.between(), &caller, &to, 5, inside, &mut random);
                if let Some((_, datagram)) = call {
                    host.datagram(address(2), &datagram);
                    let answers = host.sent[before..].iter().filter(|(_, bytes)| {
                        DatagramType::of(bytes) == Some(DatagramType::Response)
                    });
                    taken |= answers.count() > 0;
                }
            }
            2 => taken |= answer_call(&mut host, inside, &mut random),
            _ => host.pass(Duration::from_millis(u64::from(mark >> 4) * 100)),
        }
    }
    host.look();
    host.pass(Duration::from_millis(300));
    host.look();
    restarts(&host);
    Seen::when(taken)
}

fn answer_call(host: &mut Host, inside: &[u8], random: &mut Random) -> bool {
    let Some(call) = last(host, DatagramType::Init) else {
        return false;
    };
    let Some((half, _)) = Half::hear(&SCENE.between(), &identity(2), &call, random) else {
        return false;
    };
    let Some((datagram, _)) = half.answer(identity(1).id(), 6, inside, CIPHER) else {
        return false;
    };
    let before = host.sent.len();
    host.datagram(address(2), &datagram);
    // Who takes an answer speaks at once.
    host.sent[before..]
        .iter()
        .any(|(_, bytes)| DatagramType::of(bytes) == Some(DatagramType::Data))
}

pub(super) fn handshake_seeds() -> Vec<Vec<u8>> {
    let call = marked(1, &SCENE.init());
    let answer = marked(2, &response(None));
    vec![
        joined([&call]),
        joined([&answer]),
        joined([&answer, &call, &marked(0x73, &[])]),
        joined([&call, &call]),
        joined([&marked(2, &response(Some(removed()))), &call]),
        joined([
            &marked(2, &response(Some(Refusal::Outdated(Generation(9))))),
            &call,
        ]),
    ]
}

/// What a joiner says of itself when it calls host 1, but for the signature.
pub(super) fn join_payload() -> Vec<u8> {
    let who = identity(3);
    let capabilities = Capabilities::new(CIPHER);
    let name: Label = label("newcomer");
    wire::encode(&(
        who.id(),
        vec![0u8; 64],
        name,
        Generation(8),
        capabilities,
        Vec::<u8>::new(),
    ))
}

/// The id and the signature that a joiner's payload must have, in their places if there is room.
fn claimed(inside: &[u8], body: &TokenBody, joiner: &Identity) -> Vec<u8> {
    let mut inside = inside.to_vec();
    if inside.len() > 97 && inside[32] == 64 {
        let claim = [
            b"weft join claim 1",
            &body.cluster.0[..],
            &body.id,
            &joiner.noise_public(),
            &identity(1).noise_public(),
        ]
        .concat();
        inside[..32].copy_from_slice(&joiner.id().0);
        inside[33..97].copy_from_slice(&joiner.sign(&claim));
    }
    inside
}

/// The signed body of an invitation by host 1 around these octets.
pub(super) fn signed(body: &[u8]) -> Vec<u8> {
    let mut signed = [&[1], body].concat();
    if signed.len() >= 65 {
        let issuer = identity(1).id().0;
        signed[33..65].copy_from_slice(&issuer);
    }
    let tag = [b"weft invitation 1", signed.as_slice()].concat();
    signed.extend_from_slice(&identity(1).sign(&tag));
    signed
}

/// A member's door: the first piece is the invitation's body, none = a good one; the second what the joiner says of
/// itself; the others are frames in its session, if it got one.
pub(super) fn join(data: &[u8]) -> Seen {
    let mut host = Host::resumed();
    // A host without an answering peer writes after half a minute.
    host.pass(Duration::from_secs(31));
    assert!(host.ready, "nobody else knows more");
    let pieces = cut(data, 10);
    let [body, inside, frames @ ..] = &pieces[..] else {
        return Seen::Refused;
    };
    let joiner = identity(3);
    let forged = signed(body);
    let between = match body.is_empty() {
        true => Between::Joiner(&SCENE.token),
        false => Between::Forged(SCENE.cluster, &SCENE.secret, &forged),
    };
    let told: Option<TokenBody> = wire::decode(body).ok();
    let inside = claimed(inside, told.as_ref().unwrap_or(SCENE.token.body()), &joiner);
    let to = identity(1).noise_public();
    let mut random = Random::from_seed([4; 32]);
    let called = Half::call(&between, &joiner, &to, 0x8000_0005, &inside, &mut random);
    let Some((half, datagram)) = called else {
        return Seen::Refused;
    };
    let before = host.sent.len();
    host.datagram(address(3), &datagram);
    let answer = host.sent[before..]
        .iter()
        .find(|(_, bytes)| DatagramType::of(bytes) == Some(DatagramType::JoinResponse));
    let answer = answer.map(|(_, bytes)| bytes.clone());
    let through = answer.and_then(|bytes| half.finish(identity(1).id(), &bytes, CIPHER));
    if let Some(through) = &through {
        assert_eq!(told.is_none(), body.is_empty(), "an unreadable invitation");
        for frame in frames {
            in_session(&mut host, through, &joiner, frame);
        }
    }
    host.look();
    host.pass(Duration::from_secs(1));
    host.look();
    restarts(&host);
    Seen::when(through.is_some())
}

/// A frame of the joiner: with mark 1 the signature that makes it ready.
fn in_session(host: &mut Host, through: &Through, joiner: &Identity, frame: &[u8]) {
    let Some((mark, body)) = frame.split_first() else {
        return;
    };
    let body = match mark & 1 {
        0 => body.to_vec(),
        _ => {
            let hash = [b"weft join ready 1", through.hash.as_slice()].concat();
            let signature = joiner.sign(&hash).to_vec();
            wire::encode(&JoinMessage::Ready { signature })
        }
    };
    let kind = match mark & 2 {
        0 => FrameKind::Control,
        _ => FrameKind::Probe,
    };
    let mut datagram = Vec::new();
    if through.transport.seal(kind, &body, &mut datagram).is_ok() {
        host.datagram(address(3), &datagram);
    }
}

pub(super) fn join_seeds() -> Vec<Vec<u8>> {
    let body = wire::encode(SCENE.token.body());
    let once = TokenBody {
        uses: 1,
        ..SCENE.token.body().clone()
    };
    let missing = JoinMessage::Missing {
        indices: vec![0, 1, 40],
    };
    let (ready, missing) = (marked(1, &[]), marked(0, &wire::encode(&missing)));
    let done = marked(0, &wire::encode(&JoinMessage::Done));
    let inside = join_payload();
    let late = TokenBody {
        expires_at: 5,
        ..SCENE.token.body().clone()
    };
    vec![
        joined([&[], &inside[..], &ready, &missing, &done]),
        joined([&body[..], &inside, &ready, &ready, &missing]),
        joined([&wire::encode(&once)[..], &inside, &ready, &done]),
        joined([&wire::encode(&late)[..], &inside]),
    ]
}

/// A host on its way in: the first piece is what the member has sealed in its answer, the others are frames in the
/// session; with mark 1 a piece is a welcome, and comes in one part.
pub(super) fn joiner(data: &[u8]) -> Seen {
    let token = Token::parse(&SCENE.token.text()).expect("an invitation");
    let start = Start::Join {
        token: Box::new(token),
    };
    let mut host = Host::begin(2, start, Stored::default(), Now::default());
    let call = last(&host, DatagramType::JoinInit).expect("it calls at once");
    let mut random = Random::from_seed([6; 32]);
    let between = Between::Joiner(&SCENE.token);
    let (half, _) =
        Half::hear(&between, &identity(1), &call, &mut random).expect("it calls host 1");
    let pieces = cut(data, 8);
    let Some((inside, frames)) = pieces.split_first() else {
        return Seen::Refused;
    };
    let answered = half.answer(identity(2).id(), 0x8000_0007, inside, CIPHER);
    let Some((datagram, through)) = answered else {
        return Seen::Refused;
    };
    let before = host.sent.len();
    host.datagram(address(1), &datagram);
    let taken = host.failed || host.sent.len() > before;
    for frame in frames {
        let Some((mark, body)) = frame.split_first() else {
            continue;
        };
        let body = match mark & 1 {
            0 => body.to_vec(),
            _ => wire::encode(&JoinMessage::Chunk {
                index: 0,
                total: 1,
                bytes: body.to_vec(),
            }),
        };
        let mut datagram = Vec::new();
        let sealed = through
            .transport
            .seal(FrameKind::Control, &body, &mut datagram);
        if sealed.is_ok() {
            host.datagram(address(1), &datagram);
        }
    }
    host.look();
    host.pass(Duration::from_secs(2));
    host.look();
    if host.node.cluster().is_some() {
        assert_eq!(host.node.cluster(), Some(SCENE.cluster), "the invitation's");
    }
    Seen::when(taken)
}

pub(super) fn joiner_seeds() -> Vec<Vec<u8>> {
    let yes = verdict(Verdict::Accepted);
    let chunk = |index, total, bytes: &[u8]| {
        marked(
            0,
            &wire::encode(&JoinMessage::Chunk {
                index,
                total,
                bytes: bytes.to_vec(),
            }),
        )
    };
    let whole = welcome();
    let (first, second) = whole.split_at(whole.len().min(1000));
    vec![
        joined([&yes[..], &marked(1, &whole)]),
        joined([&yes[..], &chunk(0, 2, first), &chunk(1, 2, second)]),
        joined([&verdict(Verdict::Expired)]),
        joined([&verdict(Verdict::UsedUp)]),
        joined([&verdict(Verdict::Refused("not today".to_owned()))]),
    ]
}

/// The text of an invitation around any signed body and secret.
pub(super) fn token_text(signed: &[u8], secret: &Secret<32>) -> String {
    let mut bytes = [signed, secret.expose()].concat();
    let checksum = weft_core::crypto::sha256(&bytes);
    bytes.extend_from_slice(&checksum[..4]);
    let text = data_encoding::BASE64URL_NOPAD.encode(&bytes);
    format!("weft1_{text}")
}
