//! Reading nf_tables without running nft: a dump of chains and rules costs microseconds, and never lists a map.

use std::io;

use nix::sys::socket::SockProtocol;

use super::raw::{
    ACK, DUMP, Message, RawSocket, Request, attribute, attributes, be32, push, terminated, text,
};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_EXPR: u16 = 7;
/// `NFTA_SET_ELEM_KEY`, `_DATA`, `_FLAGS`, `_KEY_END`.
const NFTA_SET_ELEM_LASTING: [u16; 4] = [1, 2, 3, 10];
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
/// libnftnl's number for a rule's comment.
const COMMENT: u8 = 0;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
const NF_DROP: u32 = 0;
/// `struct nfgenmsg`: family, version, resource id.
const HEADER: usize = 4;

/// A table's family, as nft writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TableFamily {
    Inet,
    Ip,
    Ip6,
    Netdev,
    Other(u8),
}

impl TableFamily {
    fn number(self) -> u8 {
        match self {
            TableFamily::Inet => 1,
            TableFamily::Ip => 2,
            TableFamily::Ip6 => 10,
            TableFamily::Netdev => 5,
            TableFamily::Other(n) => n,
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            1 => TableFamily::Inet,
            2 => TableFamily::Ip,
            10 => TableFamily::Ip6,
            5 => TableFamily::Netdev,
            n => TableFamily::Other(n),
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            TableFamily::Inet => "inet",
            TableFamily::Ip => "ip",
            TableFamily::Ip6 => "ip6",
            TableFamily::Netdev => "netdev",
            TableFamily::Other(_) => "other",
        }
    }
}

/// Where a base chain stands, as far as weft cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Forward,
    NatPostrouting,
    Elsewhere,
}

/// One chain.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) family: TableFamily,
    pub(crate) table: String,
    pub(crate) name: String,
    /// `None` for a chain that others jump to.
    pub(crate) hook: Option<Hook>,
    pub(crate) drops: bool,
}

/// One rule.
pub(crate) struct Rule {
    pub(crate) handle: u64,
    pub(crate) comment: Option<String>,
}

/// A transaction: all of it is done, or none.
pub(crate) struct Batch {
    family: TableFamily,
    requests: Vec<Request>,
}

impl Batch {
    pub(crate) fn new(family: TableFamily) -> Self {
        Self {
            family,
            requests: vec![border(NFNL_MSG_BATCH_BEGIN)],
        }
    }

    /// Adds a message whose attributes `lay` appends.
    pub(crate) fn add(&mut self, kind: u16, flags: u16, lay: impl FnOnce(&mut Vec<u8>)) {
        let mut body = vec![self.family.number(), 0, 0, 0];
        lay(&mut body);
        self.requests.push(Request { kind, flags, body });
    }

    /// What to send.
    pub(crate) fn finish(mut self) -> Vec<Request> {
        if let Some(last) = self.requests.last_mut() {
            last.flags |= ACK;
        }
        self.requests.push(border(NFNL_MSG_BATCH_END));
        self.requests
    }
}

fn border(kind: u16) -> Request {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    Request {
        kind,
        flags: 0,
        body: vec![0, 0, high, low],
    }
}

pub(crate) fn open() -> io::Result<RawSocket> {
    RawSocket::open(SockProtocol::NetlinkNetFilter)
}

pub(crate) fn kind(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// All chains of the calling thread's namespace.
pub(crate) fn chains() -> io::Result<Vec<Chain>> {
    let answers = open()?.request(kind(NFT_MSG_GETCHAIN), DUMP, &[0; HEADER])?;
    Ok(answers.iter().filter_map(|m| read_chain(&m.body)).collect())
}

fn read_chain(body: &[u8]) -> Option<Chain> {
    let family = TableFamily::from_number(*body.first()?);
    let attributes = body.get(HEADER..)?;
    let word = |kind| attribute(attributes, kind).map(text);
    let nat = word(NFTA_CHAIN_TYPE).as_deref() == Some("nat");
    let number = attribute(attributes, NFTA_CHAIN_HOOK)
        .map(|hook| attribute(hook, NFTA_HOOK_HOOKNUM).and_then(be32));
    let hook = number.map(|number| match number {
        Some(NF_INET_FORWARD) => Hook::Forward,
        Some(NF_INET_POST_ROUTING) if nat => Hook::NatPostrouting,
        _ => Hook::Elsewhere,
    });
    Some(Chain {
        family,
        table: word(NFTA_CHAIN_TABLE)?,
        name: word(NFTA_CHAIN_NAME)?,
        hook,
        drops: attribute(attributes, NFTA_CHAIN_POLICY).and_then(be32) == Some(NF_DROP),
    })
}

/// The rules of one chain, or of all in the table; none if it is not there.
pub(crate) fn rules(
    family: TableFamily,
    table: &str,
    chain: Option<&str>,
) -> io::Result<Vec<Rule>> {
    let mut body = vec![family.number(), 0, 0, 0];
    push(&mut body, NFTA_RULE_TABLE, &terminated(table));
    if let Some(chain) = chain {
        push(&mut body, NFTA_RULE_CHAIN, &terminated(chain));
    }
    match open()?.request(kind(NFT_MSG_GETRULE), DUMP, &body) {
        Ok(answers) => Ok(answers.iter().filter_map(|m| read_rule(&m.body)).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The handles of all rules in a table, in order; none if it is not there. The kernel never gives one twice: who takes a
/// rule away, or puts another in its place, shows.
pub(crate) fn handles(family: TableFamily, table: &str) -> io::Result<Vec<u64>> {
    let rules = rules(family, table, None)?.into_iter();
    let mut handles: Vec<u64> = rules.map(|rule| rule.handle).collect();
    handles.sort_unstable();
    Ok(handles)
}

/// What an element of a set has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) packets: u64,
    pub(crate) octets: u64,
}

/// The elements of a set that counts: each key and what it met. None if the set is not there.
pub(crate) fn counted(
    family: TableFamily,
    table: &str,
    set: &str,
) -> io::Result<Vec<(Vec<u8>, Counted)>> {
    let answers = list_elements(family, table, set)?;
    Ok(each_element(&answers).filter_map(read_element).collect())
}

/// The elements of a set or map: all that makes each of them, and nothing that it counts. None if the set is not there.
pub(crate) fn elements(family: TableFamily, table: &str, set: &str) -> io::Result<Vec<Vec<u8>>> {
    let answers = list_elements(family, table, set)?;
    let lasting = |element| {
        let is_lasting = |(kind, _): &(u16, &[u8])| NFTA_SET_ELEM_LASTING.contains(kind);
        let parts = attributes(element).filter(is_lasting);
        parts
            .flat_map(|(kind, value)| [&kind.to_ne_bytes(), value].concat())
            .collect()
    };
    Ok(each_element(&answers).map(lasting).collect())
}

/// The keys of a set. None if the set is not there.
pub(crate) fn keys(family: TableFamily, table: &str, set: &str) -> io::Result<Vec<Vec<u8>>> {
    let answers = list_elements(family, table, set)?;
    Ok(each_element(&answers)
        .filter_map(key_of)
        .map(<[u8]>::to_vec)
        .collect())
}

fn key_of(element: &[u8]) -> Option<&[u8]> {
    attribute(attribute(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)
}

fn list_elements(family: TableFamily, table: &str, set: &str) -> io::Result<Vec<Message>> {
    let mut body = vec![family.number(), 0, 0, 0];
    push(&mut body, NFTA_SET_ELEM_LIST_TABLE, &terminated(table));
    push(&mut body, NFTA_SET_ELEM_LIST_SET, &terminated(set));
    match open()?.request(kind(NFT_MSG_GETSETELEM), DUMP, &body) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn each_element(answers: &[Message]) -> impl Iterator<Item = &[u8]> {
    let lists = answers
        .iter()
        .filter_map(|message| attribute(message.body.get(HEADER..)?, NFTA_SET_ELEM_LIST_ELEMENTS));
    lists.flat_map(attributes).map(|(_, element)| element)
}

fn read_element(element: &[u8]) -> Option<(Vec<u8>, Counted)> {
    let key = key_of(element)?;
    let counter = attribute(attribute(element, NFTA_SET_ELEM_EXPR)?, NFTA_EXPR_DATA)?;
    let number = |kind| {
        Some(u64::from_be_bytes(
            attribute(counter, kind)?.try_into().ok()?,
        ))
    };
    let counted = Counted {
        packets: number(NFTA_COUNTER_PACKETS)?,
        octets: number(NFTA_COUNTER_BYTES)?,
    };
    Some((key.to_vec(), counted))
}

fn read_rule(body: &[u8]) -> Option<Rule> {
    let attributes = body.get(HEADER..)?;
    let handle = attribute(attributes, NFTA_RULE_HANDLE)?;
    Some(Rule {
        handle: u64::from_be_bytes(handle.try_into().ok()?),
        comment: attribute(attributes, NFTA_RULE_USERDATA).and_then(comment),
    })
}

/// Userdata is a run of (type, length, value).
fn comment(mut data: &[u8]) -> Option<String> {
    loop {
        let (kind, length) = (*data.first()?, usize::from(*data.get(1)?));
        let value = data.get(2..2 + length)?;
        if kind == COMMENT {
            return Some(text(value));
        }
        data = &data[2 + length..];
    }
}
