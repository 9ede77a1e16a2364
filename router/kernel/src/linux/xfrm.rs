//! The kernel's IPsec tables by netlink: keys ("states") and policies. Layouts are the crate's; the key itself is laid by
//! hand, so that it stands in memory that is wiped.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_xfrm::constants::{
    AF_INET, AF_INET6, UDP_ENCAP_ESPINUDP, XFRM_MODE_TRANSPORT, XFRM_MSG_DELPOLICY, XFRM_MSG_DELSA,
    XFRM_MSG_GETPOLICY, XFRM_MSG_GETSA, XFRM_MSG_MAPPING, XFRM_MSG_NEWSA, XFRM_MSG_UPDPOLICY,
    XFRM_MSG_UPDSA, XFRM_POLICY_ALLOW, XFRM_POLICY_IN, XFRM_POLICY_OUT, XFRM_STATE_ESN,
    XFRMA_ALG_AEAD, XFRMA_ENCAP, XFRMA_REPLAY_ESN_VAL, XFRMA_TMPL, XFRMNLGRP_MAPPING,
};
use netlink_packet_xfrm::{
    Address, EncapTmpl, ReplayEsn, Selector, UserMapping, UserPolicyId, UserPolicyInfo, UserSaId,
    UserSaInfo, UserTemplate, XFRM_USER_POLICY_INFO_LEN, XFRM_USER_SA_INFO_LEN,
    XFRM_USER_TEMPLATE_LEN,
};
use weft_core::layout::VXLAN_PORT;
use weft_core::view::PeerNumber;
use zeroize::{Zeroize, Zeroizing};

use super::raw::{ACK, DUMP, Message, RawSocket, attribute, push};
use crate::esp::{Observed, Policy, Ports, Sa, SaKey, Standing, peer_of, request_id};

const ESP: u8 = libc::IPPROTO_ESP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
/// RFC 4106: AES-GCM whose nonce is four octets of salt, behind the key, and eight that are sent.
const ALGORITHM: &[u8] = b"rfc4106(gcm(aes))";
/// `struct xfrm_algo_aead`: the name's room, and the longest integrity check there is, bits.
const NAME_ROOM: usize = 64;
const TAG_BITS: u32 = 128;
/// Packets that may overtake each other: as many as the kernel takes.
const REPLAY_WINDOW: u32 = 4096;
/// A key whose daemon died ends by itself after this long: sessions are renewed in half of it at the latest.
const KEY_LIFE: Duration = Duration::from_secs(3600);

/// A socket to the tables of the calling thread's namespace.
pub(crate) struct Xfrm(RawSocket);

impl Xfrm {
    pub(crate) fn open() -> io::Result<Self> {
        socket(0).map(Self)
    }

    /// Puts a key.
    pub(crate) fn add_key(&self, at: &SaKey, sa: &Sa) -> io::Result<()> {
        self.lay_key(XFRM_MSG_NEWSA, at, sa)
    }

    /// Has a key that stands inside UDP go by other ports. Its counter goes on: of what is told once more the kernel takes
    /// the ports and limits alone, and where there is no such key it makes none.
    pub(crate) fn redirect_key(&self, at: &SaKey, sa: &Sa) -> io::Result<()> {
        self.lay_key(XFRM_MSG_UPDSA, at, sa)
    }

    fn lay_key(&self, message: u16, at: &SaKey, sa: &Sa) -> io::Result<()> {
        let mut info = UserSaInfo {
            selector: selector(at.from, at.to),
            saddr: address(at.from),
            reqid: request_id(at.peer),
            family: family(at.to),
            mode: XFRM_MODE_TRANSPORT,
            flags: XFRM_STATE_ESN,
            ..UserSaInfo::default()
        };
        info.id.daddr = address(at.to);
        info.id.spi = at.spi;
        info.id.proto = ESP;
        info.lifetime_cfg.hard_packet_limit = sa.last_packet;
        info.lifetime_cfg.hard_add_expires_seconds = KEY_LIFE.as_secs();
        let window = ReplayEsn {
            bmp_len: REPLAY_WINDOW / 32,
            replay_window: REPLAY_WINDOW,
            bmp: vec![0; (REPLAY_WINDOW / 32) as usize],
            ..ReplayEsn::default()
        };
        // Room for all of it: where the vector grew, the key would stay behind.
        let mut body = Zeroizing::new(Vec::with_capacity(2048));
        body.extend_from_slice(&emitted(&info));
        push(&mut body, XFRMA_ALG_AEAD, &algorithm(sa.key.expose()));
        push(&mut body, XFRMA_REPLAY_ESN_VAL, &emitted(&window));
        if let Some(ports) = sa.udp {
            push(&mut body, XFRMA_ENCAP, &emitted(&encapsulation(ports)));
        }
        self.0.request(message, ACK, &body).map(drop)
    }

    /// Deletes a key; that it is gone already is no error.
    pub(crate) fn delete_key(&self, at: &SaKey) -> io::Result<()> {
        let id = UserSaId {
            daddr: address(at.to),
            spi: at.spi,
            family: family(at.to),
            proto: ESP,
        };
        gone_is_fine(self.0.request(XFRM_MSG_DELSA, ACK, &emitted(&id)))
    }

    /// Puts or replaces a policy, in one step.
    pub(crate) fn put_policy(&self, policy: &Policy) -> io::Result<()> {
        let info = UserPolicyInfo {
            selector: selector(policy.from, policy.to),
            direction: direction(policy),
            action: XFRM_POLICY_ALLOW,
            ..UserPolicyInfo::default()
        };
        let mut body = emitted(&info);
        push(&mut body, XFRMA_TMPL, &emitted(&template(policy)));
        self.0.request(XFRM_MSG_UPDPOLICY, ACK, &body).map(drop)
    }

    /// Deletes a policy; that it is gone already is no error.
    pub(crate) fn delete_policy(&self, policy: &Policy) -> io::Result<()> {
        let id = UserPolicyId {
            selector: selector(policy.from, policy.to),
            direction: direction(policy),
            ..UserPolicyId::default()
        };
        gone_is_fine(self.0.request(XFRM_MSG_DELPOLICY, ACK, &emitted(&id)))
    }

    /// What is there of weft's.
    pub(crate) fn observe(&self) -> io::Result<Observed> {
        let mut observed = Observed::default();
        let id = emitted(&UserSaId::default());
        for mut message in self.0.request(XFRM_MSG_GETSA, DUMP, &id)? {
            observed.keys.extend(read_key(&message.body));
            // The kernel tells the keys, too.
            message.body.zeroize();
        }
        let id = emitted(&UserPolicyId::default());
        for message in self.0.request(XFRM_MSG_GETPOLICY, DUMP, &id)? {
            observed.policies.extend(read_policy(&message.body));
        }
        Ok(observed)
    }
}

/// Hears of packets that came inside UDP by another port than was known ([`read_mapping`]).
pub(crate) fn mappings() -> io::Result<RawSocket> {
    socket(1 << (XFRMNLGRP_MAPPING - 1))
}

fn socket(groups: u32) -> io::Result<RawSocket> {
    let socket = socket2::Socket::new(
        socket2::Domain::from(libc::AF_NETLINK),
        socket2::Type::RAW,
        Some(socket2::Protocol::from(libc::NETLINK_XFRM)),
    )?;
    RawSocket::over(socket.into(), groups)
}

fn emitted(value: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; value.buffer_len()];
    value.emit(&mut bytes);
    bytes
}

fn gone_is_fine<T>(result: io::Result<T>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(()),
        other => other.map(drop),
    }
}

fn address(ip: IpAddr) -> Address {
    Address::from_ip(&ip)
}

fn family(ip: IpAddr) -> u16 {
    match ip {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// An address of this family.
fn ip(family: u16, address: &Address) -> Option<IpAddr> {
    match family {
        AF_INET => Some(address.to_ipv4().into()),
        AF_INET6 => Some(address.to_ipv6().into()),
        _ => None,
    }
}

/// VXLAN from one address to another. In transport mode nothing else ties a key to addresses (CVE-2018-16758).
fn selector(from: IpAddr, to: IpAddr) -> Selector {
    let mut selector = Selector {
        dport: VXLAN_PORT,
        dport_mask: u16::MAX,
        proto: UDP,
        ..Selector::default()
    };
    selector.source_prefix(&from, IpNet::from(from).prefix_len());
    selector.destination_prefix(&to, IpNet::from(to).prefix_len());
    selector
}

fn direction(policy: &Policy) -> u8 {
    match policy.outbound {
        true => XFRM_POLICY_OUT,
        false => XFRM_POLICY_IN,
    }
}

/// Required, between the two hosts themselves.
fn template(policy: &Policy) -> UserTemplate {
    let mut template = UserTemplate {
        family: family(policy.to),
        saddr: address(policy.from),
        reqid: request_id(policy.peer),
        mode: XFRM_MODE_TRANSPORT,
        ..UserTemplate::default()
    };
    template.id.daddr = address(policy.to);
    template.id.proto = ESP;
    template
}

/// RFC 3948 §2.1.
fn encapsulation(ports: Ports) -> EncapTmpl {
    EncapTmpl {
        encap_type: UDP_ENCAP_ESPINUDP,
        encap_sport: ports.from,
        encap_dport: ports.to,
        ..EncapTmpl::default()
    }
}

/// `struct xfrm_algo_aead`.
fn algorithm(key: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(NAME_ROOM + 8 + key.len()));
    bytes.extend_from_slice(ALGORITHM);
    bytes.resize(NAME_ROOM, 0);
    let bits = u32::try_from(key.len() * 8).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&bits.to_ne_bytes());
    bytes.extend_from_slice(&TAG_BITS.to_ne_bytes());
    bytes.extend_from_slice(key);
    bytes
}

/// A key of weft's that is there. One that the kernel made as a placeholder has no number.
fn read_key(body: &[u8]) -> Option<(SaKey, Standing)> {
    let info = UserSaInfo::parse(body).ok()?;
    let is_ours = info.id.proto == ESP && info.id.spi != 0;
    let peer = peer_of(info.reqid).filter(|_| is_ours)?;
    let key = SaKey {
        peer,
        from: ip(info.family, &info.saddr)?,
        to: ip(info.family, &info.id.daddr)?,
        spi: info.id.spi,
    };
    let encapsulation = attribute(body.get(XFRM_USER_SA_INFO_LEN..)?, XFRMA_ENCAP);
    let encapsulation = encapsulation.and_then(|found| EncapTmpl::parse(found).ok());
    let standing = Standing {
        packets: info.lifetime_cur.packets,
        udp: encapsulation.map(|found| Ports {
            from: found.encap_sport,
            to: found.encap_dport,
        }),
    };
    Some((key, standing))
}

/// What the kernel tells when it opened something of a peer's that came from another port than it knew: who, and from
/// where.
pub(crate) fn read_mapping(message: &Message) -> Option<(PeerNumber, (IpAddr, u16))> {
    if message.kind != XFRM_MSG_MAPPING {
        return None;
    }
    let mapping = UserMapping::parse(&message.body).ok()?;
    let peer = peer_of(mapping.reqid).filter(|_| mapping.id.proto == ESP)?;
    let from = ip(mapping.id.family, &mapping.new_saddr)?;
    Some((peer, (from, mapping.new_sport)))
}

/// A policy of weft's, if it is exactly as weft would make it. Another one in its place is replaced.
fn read_policy(body: &[u8]) -> Option<Policy> {
    let info = UserPolicyInfo::parse(body).ok()?;
    let found = attribute(body.get(XFRM_USER_POLICY_INFO_LEN..)?, XFRMA_TMPL)?;
    if found.len() != XFRM_USER_TEMPLATE_LEN {
        return None;
    }
    let found = UserTemplate::parse(found).ok()?;
    let policy = Policy {
        peer: peer_of(found.reqid)?,
        from: ip(info.selector.family, &info.selector.saddr)?,
        to: ip(info.selector.family, &info.selector.daddr)?,
        outbound: info.direction == XFRM_POLICY_OUT,
    };
    let same = info.selector == selector(policy.from, policy.to)
        && info.direction == direction(&policy)
        && info.action == XFRM_POLICY_ALLOW
        && found == template(&policy);
    same.then_some(policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies() -> [Policy; 2] {
        let policy = |from: &str, to: &str| Policy {
            peer: PeerNumber(9),
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            outbound: true,
        };
        [
            policy("192.0.2.1", "192.0.2.2"),
            policy("2001:db8::1", "2001:db8::2"),
        ]
    }

    fn laid(policy: &Policy, change: impl FnOnce(&mut UserTemplate)) -> Vec<u8> {
        let info = UserPolicyInfo {
            selector: selector(policy.from, policy.to),
            direction: direction(policy),
            ..UserPolicyInfo::default()
        };
        let mut body = emitted(&info);
        let mut template = template(policy);
        change(&mut template);
        push(&mut body, XFRMA_TMPL, &emitted(&template));
        body
    }

    #[test]
    fn a_policy_is_read_back_and_a_changed_one_is_not_taken_for_it() {
        for policy in policies() {
            assert_eq!(read_policy(&laid(&policy, |_| {})), Some(policy));
            assert_eq!(read_policy(&laid(&policy, |t| t.optional = 1)), None);
            assert_eq!(read_policy(&laid(&policy, |t| t.reqid = 5)), None);
        }
        assert_eq!(read_policy(&[0; 20]), None);
    }

    #[test]
    fn a_key_is_laid_as_the_kernel_wants_it() {
        let bytes = algorithm(&[7; 36]);
        assert_eq!(bytes.len(), 64 + 4 + 4 + 36);
        assert_eq!(bytes[64..68], 288u32.to_ne_bytes());
        assert_eq!(bytes[68..72], 128u32.to_ne_bytes());
    }
}
