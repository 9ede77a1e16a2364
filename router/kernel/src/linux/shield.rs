//! The filter of the `vxlan` carrier once more, in a table that nobody else can flush, change or delete: the kernel knows
//! the socket that made it (`NFT_TABLE_F_OWNER`, since Linux 5.12), and removes it with that socket. So what flushes the
//! host's rules opens nothing while the daemon lives; when it dies, the same filter in `inet weft` is still there.
//!
//! Laid by hand, because nft(8) has a socket of its own, with which the table would end.
//!
//! | chain | hook, priority | rules |
//! |---|---|---|
//! | `in` | prerouting, raw + 1 | from a peer's address and inner MAC, out of ESP where that was agreed: accept; other VXLAN: drop |
//! | `out` | output, raw + 1 | VXLAN of a socket of the host: drop |
//! | `through` | forward, filter - 9 | VXLAN: drop |

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use weft_core::layout::VXLAN_PORT;
use weft_core::view::{Seal, VxlanView};

use super::nfnetlink::{Batch, TableFamily, kind, open};
use super::raw::{CREATE, RawSocket, push, terminated};

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
const APPEND: u16 = 0x800;
const NFT_TABLE_F_OWNER: u32 = 2;
const PRE_ROUTING: u32 = 0;
const FORWARD: u32 = 2;
const LOCAL_OUT: u32 = 3;
/// Each behind its twin in `inet weft`, which counts what it drops.
const AFTER_RAW: i32 = -300 + 1;
const BEFORE_FILTER: i32 = -10 + 1;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// `NFTA_LIST_ELEM`.
const ITEM: u16 = 1;
/// `NFTA_DATA_VALUE`.
const VALUE: u16 = 1;
/// `NFTA_DATA_VERDICT`.
const VERDICT: u16 = 2;
const META_SKUID: u32 = 10;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const META_SECPATH: u32 = 25;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// `NFT_REG_VERDICT`, `NFT_REG_1`, and the first of the registers of four octets.
const REG_VERDICT: u32 = 0;
const REG: u32 = 1;
const REG32: u32 = 8;
/// A MAC in a key, and two octets of zero: registers are filled in words.
const MAC: usize = 8;
/// Elements in one message: an attribute is not longer than 64 KiB.
const ELEMENTS: usize = 1024;

/// A version of the outer header: its number, where the sender's address is in it and how long that is, and nft(8)'s type
/// for such addresses.
#[derive(Clone, Copy)]
struct Version {
    nfproto: u8,
    source: u32,
    length: usize,
    shown_as: u32,
}

const V4: Version = Version {
    nfproto: NFPROTO_IPV4,
    source: 12,
    length: 4,
    shown_as: 7,
};
const V6: Version = Version {
    nfproto: NFPROTO_IPV6,
    source: 8,
    length: 16,
    shown_as: 8,
};
/// nft(8)'s type for MACs.
const ETHER_ADDR: u32 = 9;

impl Version {
    /// An address and a MAC.
    fn key(self) -> usize {
        self.length + MAC
    }
}

/// Peers whose packets come alike. Rules of the same transaction call a set by its number.
#[derive(Clone, Copy)]
struct Set {
    name: &'static str,
    id: u32,
    seal: Seal,
    version: Version,
}

const SETS: [Set; 4] = [
    set("peers", 1, Seal::Plain, V4),
    set("sealed", 2, Seal::Esp, V4),
    set("peers6", 3, Seal::Plain, V6),
    set("sealed6", 4, Seal::Esp, V6),
];

const fn set(name: &'static str, id: u32, seal: Seal, version: Version) -> Set {
    Set {
        name,
        id,
        seal,
        version,
    }
}

/// The outer addresses of peers and their MACs, and whether ESP is around what they send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Senders(BTreeSet<(bool, IpAddr, [u8; 6])>);

impl Senders {
    /// Those with which VXLAN is agreed.
    pub(crate) fn of(vxlan: &VxlanView) -> Self {
        let peers = vxlan.peers.iter();
        let senders = peers.map(|peer| (peer.seal == Seal::Esp, peer.addr, peer.mac));
        Self(senders.collect())
    }

    /// The keys of one set.
    fn keys(&self, set: Set) -> impl Iterator<Item = Vec<u8>> {
        let is_sealed = set.seal == Seal::Esp;
        let own = self.0.iter().filter(move |sender| sender.0 == is_sealed);
        own.filter_map(move |(_, address, mac)| {
            let mut key = match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            let is_of_set = key.len() == set.version.length;
            key.extend(mac);
            key.resize(set.version.key(), 0);
            is_of_set.then_some(key)
        })
    }
}

/// The table, which stands while this is there.
#[derive(Debug)]
pub(crate) struct Shield {
    socket: RawSocket,
    table: String,
    senders: Senders,
}

impl Shield {
    /// Makes the table in the calling thread's namespace.
    pub(crate) fn raise(senders: &Senders) -> io::Result<Self> {
        let socket = open()?;
        // Of its own name: while one daemon follows another, both have one.
        let table = format!("weft_vxlan_{}", socket.port()?);
        let mut batch = Batch::new(TableFamily::Inet);
        batch.add(kind(NFT_MSG_NEWTABLE), CREATE, |body| {
            push(body, 1, &terminated(&table));
            push(body, 2, &NFT_TABLE_F_OWNER.to_be_bytes());
        });
        for set in SETS {
            batch.add(kind(NFT_MSG_NEWSET), CREATE, |body| {
                new_set(body, &table, set);
            });
        }
        fill(&mut batch, &table, senders);
        for (name, hook, priority) in [
            ("in", PRE_ROUTING, AFTER_RAW),
            ("out", LOCAL_OUT, AFTER_RAW),
            ("through", FORWARD, BEFORE_FILTER),
        ] {
            batch.add(kind(NFT_MSG_NEWCHAIN), CREATE, |body| {
                new_chain(body, &table, (name, hook, priority));
            });
        }
        for (chain, rule) in rules() {
            batch.add(kind(NFT_MSG_NEWRULE), CREATE | APPEND, |body| {
                push(body, 1, &terminated(&table));
                push(body, 2, &terminated(chain));
                push(body, 4, &rule);
            });
        }
        socket.transact(&batch.finish())?;
        Ok(Self {
            socket,
            table,
            senders: senders.clone(),
        })
    }

    /// The table stands while this is open.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Lets in what these send, and nothing else: packets meet the old list or the new.
    pub(crate) fn let_in(&mut self, senders: &Senders) -> io::Result<()> {
        if self.senders == *senders {
            return Ok(());
        }
        let mut batch = Batch::new(TableFamily::Inet);
        for set in SETS {
            batch.add(kind(NFT_MSG_DELSETELEM), 0, |body| {
                push(body, 1, &terminated(&self.table));
                push(body, 2, &terminated(set.name));
            });
        }
        fill(&mut batch, &self.table, senders);
        self.socket.transact(&batch.finish())?;
        self.senders.clone_from(senders);
        Ok(())
    }
}

fn new_set(body: &mut Vec<u8>, table: &str, set: Set) {
    push(body, 1, &terminated(table));
    push(body, 2, &terminated(set.name));
    push(body, 3, &0u32.to_be_bytes());
    let shown_as = set.version.shown_as << 6 | ETHER_ADDR;
    push(body, 4, &shown_as.to_be_bytes());
    push(body, 5, &(set.version.key() as u32).to_be_bytes());
    push(body, 10, &set.id.to_be_bytes());
}

fn fill(batch: &mut Batch, table: &str, senders: &Senders) {
    for set in SETS {
        let keys: Vec<Vec<u8>> = senders.keys(set).collect();
        for some in keys.chunks(ELEMENTS) {
            let elements: Vec<u8> = some.iter().flat_map(|key| element(key)).collect();
            batch.add(kind(NFT_MSG_NEWSETELEM), CREATE, |body| {
                push(body, 1, &terminated(table));
                push(body, 2, &terminated(set.name));
                push(body, 4, &set.id.to_be_bytes());
                push(body, 3, &elements);
            });
        }
    }
}

fn element(key: &[u8]) -> Vec<u8> {
    nested(ITEM, &nested(1, &nested(VALUE, key)))
}

fn new_chain(body: &mut Vec<u8>, table: &str, (name, hook, priority): (&str, u32, i32)) {
    let mut place = Vec::new();
    push(&mut place, 1, &hook.to_be_bytes());
    push(&mut place, 2, &priority.to_be_bytes());
    push(body, 1, &terminated(table));
    push(body, 3, &terminated(name));
    push(body, 4, &place);
    push(body, 5, &ACCEPT.to_be_bytes());
    push(body, 7, &terminated("filter"));
}

/// Which chain, and what a packet goes through there. A fragment that ends before the inner header does not get past the
/// first rules of `in`, and the last drops it; those behind it are nothing without it.
fn rules() -> Vec<(&'static str, Vec<u8>)> {
    let vxlan = || [is_meta(META_L4PROTO, &[17]), is_to_port()].concat();
    let drop = || [expression("counter", &[]), verdict(DROP)].concat();
    let accepting = SETS.map(|set| {
        let out_of_esp = match set.seal {
            Seal::Plain => Vec::new(),
            Seal::Esp => is_meta(META_SECPATH, &[1]),
        };
        let Version {
            nfproto,
            source,
            length,
            ..
        } = set.version;
        let rule = [
            vxlan(),
            out_of_esp,
            is_meta(META_NFPROTO, &[nfproto]),
            payload(NETWORK_HEADER, source, length as u32, REG32),
            // Behind the headers of UDP and VXLAN and the inner destination.
            payload(TRANSPORT_HEADER, 8 + 8 + 6, 6, REG32 + length as u32 / 4),
            is_listed(REG32, set),
            verdict(ACCEPT),
        ];
        ("in", rule.concat())
    });
    let others = [
        ("in", [vxlan(), drop()].concat()),
        // A packet without a socket has no user, and goes on.
        ("out", [vxlan(), meta(META_SKUID), drop()].concat()),
        ("through", [vxlan(), drop()].concat()),
    ];
    accepting.into_iter().chain(others).collect()
}

fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    push(&mut body, kind, value);
    body
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    let mut body = nested(1, &terminated(name));
    push(&mut body, 2, data);
    nested(ITEM, &body)
}

fn numbers(of: &[(u16, u32)]) -> Vec<u8> {
    of.iter()
        .flat_map(|(kind, number)| nested(*kind, &number.to_be_bytes()))
        .collect()
}

fn meta(key: u32) -> Vec<u8> {
    expression("meta", &numbers(&[(2, key), (1, REG)]))
}

fn is_meta(key: u32, value: &[u8]) -> Vec<u8> {
    [meta(key), is_equal(value)].concat()
}

fn is_to_port() -> Vec<u8> {
    let port = payload(TRANSPORT_HEADER, 2, 2, REG);
    [port, is_equal(&VXLAN_PORT.to_be_bytes())].concat()
}

fn is_equal(value: &[u8]) -> Vec<u8> {
    let mut data = numbers(&[(1, REG), (2, 0)]);
    push(&mut data, 3, &nested(VALUE, value));
    expression("cmp", &data)
}

fn payload(base: u32, offset: u32, length: u32, to: u32) -> Vec<u8> {
    let data = [(1, to), (2, base), (3, offset), (4, length)];
    expression("payload", &numbers(&data))
}

fn is_listed(register: u32, set: Set) -> Vec<u8> {
    let mut data = nested(1, &terminated(set.name));
    data.extend(numbers(&[(2, register), (4, set.id)]));
    expression("lookup", &data)
}

fn verdict(code: u32) -> Vec<u8> {
    let mut data = numbers(&[(1, REG_VERDICT)]);
    push(&mut data, 2, &nested(VERDICT, &numbers(&[(1, code)])));
    expression("immediate", &data)
}
