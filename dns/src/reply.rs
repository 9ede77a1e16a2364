//! Messages: reading queries with care, writing replies that fit.

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Message, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::zone::{Answer, DOMAIN, Data, Kind, TTL};

/// Largest UDP reply, whatever the client says: nothing larger gets through every network unfragmented (DNS flag day 2020).
pub(crate) const MAX_UDP: u16 = 1232;
/// Largest UDP reply to a client without EDNS (RFC 1035 §4.2.1).
const PLAIN_UDP: u16 = 512;
/// Octets of a header.
pub(crate) const HEADER: usize = 12;

/// Reads a query. `None` when it has not exactly one question or can't be read at all; looking at the count first keeps
/// the decoder from making room for 65,535 questions that aren't there.
pub(crate) fn read(bytes: &[u8]) -> Option<Message> {
    if questions(bytes)? != 1 || !is_written_out(bytes.get(HEADER..)?) {
        return None;
    }
    Message::from_vec(bytes).ok()
}

/// Does a name of labels alone stand here? Before the question there is only the header for a pointer to lead into, and
/// a reply, which repeats the question as it came, has another one.
fn is_written_out(mut bytes: &[u8]) -> bool {
    while let Some((length, rest)) = bytes.split_first() {
        match length {
            0 => return true,
            1..=63 => bytes = rest.get(usize::from(*length)..).unwrap_or_default(),
            _ => return false,
        }
    }
    false
}

/// How many questions the header announces.
pub(crate) fn questions(bytes: &[u8]) -> Option<u16> {
    let count = bytes.get(..HEADER)?.get(4..6)?;
    Some(u16::from_be_bytes([count[0], count[1]]))
}

/// The type of a question, as far as the zone cares.
pub(crate) fn kind(query: &Query) -> Kind {
    match query.query_type() {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::PTR => Kind::Ptr,
        RecordType::SOA => Kind::Soa,
        RecordType::NS => Kind::Ns,
        RecordType::DS | RecordType::DNSKEY => Kind::Delegation,
        RecordType::ANY => Kind::Any,
        _ => Kind::Other,
    }
}

/// What is wrong with a query before its name is looked at.
pub(crate) fn objection(request: &Message) -> Option<ResponseCode> {
    let query = request.queries.first();
    if request.metadata.op_code != OpCode::Query {
        Some(ResponseCode::NotImp)
    } else if request.version() != 0 {
        Some(ResponseCode::BADVERS)
    } else if request.queries.len() != 1 {
        Some(ResponseCode::FormErr)
    } else if query.is_some_and(is_refused) {
        Some(ResponseCode::Refused)
    } else {
        None
    }
}

/// Other classes than IN, and zone transfers.
fn is_refused(query: &Query) -> bool {
    query.query_class() != DNSClass::IN
        || matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR)
}

/// An empty reply with this code.
pub(crate) fn bare(request: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(request.metadata.id, request.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&request.metadata);
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.queries.clone_from(&request.queries);
    reply.edns = request.edns.as_ref().map(edns);
    reply
}

/// The reply's own EDNS: the client's size within our bounds, its DO bit, none of its options.
fn edns(asked: &Edns) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(asked.max_payload().clamp(PLAIN_UDP, MAX_UDP));
    edns.set_dnssec_ok(asked.flags().dnssec_ok);
    edns
}

/// The largest UDP reply for this request.
pub(crate) fn udp_limit(reply: &Message) -> usize {
    usize::from(reply.edns.as_ref().map_or(PLAIN_UDP, Edns::max_payload))
}

/// The zone's answer as a message; `None` when it has none and the query is to be forwarded.
pub(crate) fn from_zone(request: &Message, answer: Answer, revision: u64) -> Option<Message> {
    let query = request.queries.first()?;
    let mut reply = bare(request, ResponseCode::NoError);
    reply.metadata.authoritative = true;
    match answer {
        Answer::Forward => return None,
        Answer::Found(data) => {
            let records = data.into_iter().filter_map(|d| rdata(d, revision));
            reply.answers = records
                .map(|d| Record::from_rdata(query.name().clone(), TTL, d))
                .collect();
        }
        Answer::NoData(apex) => reply.authorities.extend(soa_of(apex, revision)),
        Answer::NoName(apex) => {
            reply.metadata.response_code = ResponseCode::NXDomain;
            reply.authorities.extend(soa_of(apex, revision));
        }
    }
    Some(reply)
}

fn rdata(data: Data, revision: u64) -> Option<RData> {
    Some(match data {
        Data::A(ip) => RData::A(A(ip)),
        Data::Aaaa(ip) => RData::AAAA(AAAA(ip)),
        Data::Ptr(name) => RData::PTR(PTR(absolute(&name)?)),
        Data::Ns => RData::NS(NS(server_name()?)),
        Data::Soa => RData::SOA(soa(revision)?),
    })
}

fn absolute(name: &str) -> Option<Name> {
    Name::from_ascii(format!("{name}.")).ok()
}

fn server_name() -> Option<Name> {
    absolute(&format!("dns.{DOMAIN}"))
}

/// RFC 2308: its minimum is how long a negative answer may be kept.
fn soa(revision: u64) -> Option<SOA> {
    let mailbox = absolute(&format!("hostmaster.{DOMAIN}"))?;
    let ttl = TTL as i32;
    // A serial number is 32 bits and wraps by design (RFC 1982).
    let serial = revision as u32;
    Some(SOA::new(
        server_name()?,
        mailbox,
        serial,
        ttl,
        ttl,
        3600,
        TTL,
    ))
}

fn soa_of(apex: Option<String>, revision: u64) -> Option<Record> {
    let zone = absolute(&apex?)?;
    Some(Record::from_rdata(zone, TTL, RData::SOA(soa(revision)?)))
}

/// Makes a reply fit: sets TC and keeps as many answers as there is room for, and the OPT record always. Resolvers
/// that know no TCP (old musl) live on what is left.
pub(crate) fn fit(mut reply: Message, limit: usize) -> Result<Message, ProtoError> {
    if reply.to_vec()?.len() <= limit {
        return Ok(reply);
    }
    reply.additionals.clear();
    if reply.to_vec()?.len() <= limit {
        // RFC 2181 §9: leaving out additional data is no truncation.
        return Ok(reply);
    }
    reply.metadata.truncation = true;
    reply.authorities.clear();
    while !reply.answers.is_empty() {
        let length = reply.to_vec()?.len();
        if length <= limit {
            break;
        }
        let keep = (reply.answers.len() * limit / length).min(reply.answers.len() - 1);
        reply.answers.truncate(keep);
    }
    Ok(reply)
}

/// The header of a FORMERR reply to something that isn't a readable query; `None` for what must get none: fragments of
/// a header, and replies.
pub(crate) fn form_error(bytes: &[u8]) -> Option<Vec<u8>> {
    let header = bytes.get(..HEADER)?;
    let is_reply = header[2] & 0x80 != 0;
    let op_code = header[2] & 0x78;
    let code = ResponseCode::FormErr.low();
    (!is_reply).then(|| {
        let flags = [0x80 | op_code, code];
        [&header[..2], &flags, &[0; 8]].concat()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(edns: Option<u16>) -> Message {
        let mut request = Message::query();
        let name = Name::from_ascii("web.weft.internal.").unwrap();
        request.add_query(Query::query(name, RecordType::A));
        if let Some(size) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            request.set_edns(edns);
        }
        request
    }

    fn large(request: &Message) -> Message {
        let data = (0..100u32).map(|n| Data::A(n.into())).collect();
        from_zone(request, Answer::Found(data), 7).unwrap()
    }

    #[test]
    fn a_reply_that_is_too_large_says_so_and_keeps_its_opt_record() {
        for (asked, limit) in [
            (None, 512),
            (Some(100), 512),
            (Some(800), 800),
            (Some(4096), 1232),
        ] {
            let request = request(asked);
            let reply = large(&request);
            assert_eq!(udp_limit(&reply), limit);
            let fitted = fit(reply, limit).unwrap();
            let bytes = fitted.to_vec().unwrap();
            assert!(
                bytes.len() <= limit && bytes.len() + 40 > limit,
                "{}",
                bytes.len()
            );
            let read = Message::from_vec(&bytes).unwrap();
            assert!(read.metadata.truncation);
            assert_eq!(read.edns.is_some(), asked.is_some());
            assert_eq!(read.queries, request.queries);
        }
        let whole = fit(large(&request(None)), 65_535).unwrap();
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 100);
    }

    #[test]
    fn garbage_is_a_form_error_or_silence() {
        assert!(read(&[]).is_none());
        assert!(form_error(&[0; 11]).is_none());
        assert!(form_error(&[0xff; 12]).is_none(), "a reply gets no reply");
        let mut many_questions = [0u8; 12];
        many_questions[4..6].copy_from_slice(&[0xff, 0xff]);
        assert!(read(&many_questions).is_none());
        assert_eq!(form_error(&many_questions).unwrap()[3], 1);
    }

    #[test]
    fn a_question_that_leads_into_the_header_is_not_read() {
        let plain = request(None).to_vec().unwrap();
        assert!(read(&plain).is_some());
        // The flags, as a label of one octet and the root.
        let pointer = [&plain[..HEADER], &[1, b'a', 0xc0, 2, 0, 1, 0, 1]].concat();
        assert!(Message::from_vec(&pointer).is_ok(), "hickory follows it");
        assert!(read(&pointer).is_none());
        for end in 0..plain.len() {
            assert!(read(&plain[..end]).is_none());
        }
    }
}
