//! The nouns of weft: parsed once at the border, valid ever after.

use std::cmp::Ordering;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Time since an epoch the caller chose; it never goes backwards. Only the daemon and the simulator make one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now(pub Duration);

impl Now {
    /// The instant `after` later than this one.
    pub fn plus(self, after: Duration) -> Now {
        Now(self.0 + after)
    }

    /// How long ago `earlier` was; zero when it lies in the future.
    pub fn since(self, earlier: Now) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Wall clock time in microseconds since the Unix epoch. It may jump; only the hybrid logical clock and expiry dates use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WallMicros(pub u64);

/// A node's identity: its Ed25519 public key. An address is never an identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 32]);

impl Ord for NodeId {
    /// The order of the octets. Keys differ within the first eight: that is one comparison of numbers, no call, and nearly
    /// every map is by these.
    fn cmp(&self, other: &Self) -> Ordering {
        self.head()
            .cmp(&other.head())
            .then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for NodeId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl NodeId {
    fn head(&self) -> u64 {
        u64::from_be_bytes(self.prefix())
    }

    /// Its first eight octets, by which datagrams that are passed on name it.
    pub fn prefix(&self) -> [u8; 8] {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        [a, b, c, d, e, f, g, h]
    }

    /// The eight characters people see: base32 of the first five bytes, in lower case.
    pub fn short(&self) -> String {
        BASE32_NOPAD.encode(&self.0[..5]).to_ascii_lowercase()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.short())
    }
}

/// A cluster: the first 16 bytes of SHA-256 over its founding record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0[..6]))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

/// Counts the starts of one node: `max(stored + 1, unix seconds)`, synced to disk before use.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

/// One attachment, unique in the cluster: drawn at random by the node that made it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub [u8; 8]);

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EndpointId({self})")
    }
}

impl FromStr for EndpointId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = HEXLOWER
            .decode(text.as_bytes())
            .map_err(|_| NameError::EndpointId)?;
        Ok(Self(bytes.try_into().map_err(|_| NameError::EndpointId)?))
    }
}

// Text in JSON, eight bytes on the wire.
impl Serialize for EndpointId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            s.collect_str(self)
        } else {
            self.0.serialize(s)
        }
    }
}

impl<'de> Deserialize<'de> for EndpointId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            let text = String::deserialize(d)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            Ok(Self(<[u8; 8]>::deserialize(d)?))
        }
    }
}

/// Why a text is not the name it should be. Said without what could steer a terminal: the text may be anybody's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing between the dots.
    #[error("a name can't be empty")]
    Empty,
    /// RFC 1035 §2.3.4: a label has at most 63 octets.
    #[error("{0:?} is longer than 63 characters")]
    TooLong(String),
    /// RFC 1123 §2.1: letters, digits and hyphens.
    #[error("{0:?} may hold only letters, digits and hyphens, and no hyphen at either end")]
    NotLdh(String),
    /// The name means something in weft itself.
    #[error("\"{0}\" is a reserved name")]
    Reserved(String),
    /// Not sixteen hexadecimal digits.
    #[error("an endpoint id is sixteen hexadecimal digits")]
    EndpointId,
}

const RESERVED: &[&str] = &["localhost", "weft", "internal", "dns", "gateway"];

/// A DNS label in lower case, letters, digits and hyphens (RFC 1123), at most 63 octets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Label(String);

impl Label {
    /// Checks and lower-cases `text`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > 63 {
            return Err(NameError::TooLong(text.chars().take(64).collect()));
        }
        let lower = text.to_ascii_lowercase();
        let ldh = lower
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !ldh || lower.starts_with('-') || lower.ends_with('-') {
            return Err(NameError::NotLdh(text.to_owned()));
        }
        if RESERVED.contains(&lower.as_str()) {
            return Err(NameError::Reserved(lower));
        }
        Ok(Self(lower))
    }

    /// The label in lower case.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Label {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A node's name for people; two nodes may share one, their keys tell them apart.
pub type NodeName = Label;
/// The name of an endpoint; several endpoints may share one (that is what a service balances over).
pub type EndpointName = Label;
/// The name of a service; it owns one VIP.
pub type ServiceName = Label;
/// The name of a network (an aligned part of the range).
pub type NetworkName = Label;

/// Transport protocols weft balances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        })
    }
}

/// Why a range can't be the cluster's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Outside /8 to /22.
    #[error("the range {0} must be between /8 and /22")]
    Size(Ipv4Net),
    /// Host bits set.
    #[error("{0} has host bits set; did you mean {1}?")]
    HostBits(Ipv4Net, Ipv4Net),
    /// Loopback, multicast, link-local or other addresses that can't be routed.
    #[error("{0} can't be routed between hosts; use a private range such as 10.32.0.0/12")]
    NotUnicast(Ipv4Net),
}

/// How the cluster's range is laid out: networks, VIPs, the DNS address, and the derived IPv6 of each.
///
/// ```text
/// range        10.32.0.0/12   cut into 256 blocks of 1/256 (/20); a network's number is its first block
/// default      10.32.0.0/16   the first 1/16, network number 0
/// VIPs         10.47.0.0/16   the last 1/16, network number 240
/// IPv6         fdxx:xxxx:xxxx:NNNN:0:0:AABB:CCDD   ULA /48 of the cluster, network number, IPv4 address
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPlan {
    /// The whole range.
    pub range: Ipv4Net,
    /// RFC 4193 prefix of 48 bits, from the cluster id.
    pub ula: [u8; 6],
}

impl AddressPlan {
    /// The range users get when they ask for none.
    pub const DEFAULT_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 12);

    /// Lays out `range` for `cluster`.
    pub fn new(range: Ipv4Net, cluster: &ClusterId) -> Result<Self, RangeError> {
        check_range(range)?;
        let mut ula = [0xfd, 0, 0, 0, 0, 0];
        ula[1..].copy_from_slice(&cluster.0[..5]);
        Ok(Self { range, ula })
    }

    /// Network `default`: the first 1/16.
    pub fn default_network(&self) -> Ipv4Net {
        self.sixteenth(0)
    }

    /// The part that VIPs come from: the last 1/16.
    pub fn vips(&self) -> Ipv4Net {
        self.sixteenth(15)
    }

    /// May a service have this address?
    pub fn is_vip(&self, ip: Ipv4Addr) -> bool {
        let vips = self.vips();
        vips.contains(&ip) && self.is_usable(ip, &vips)
    }

    /// May anybody have this address of `net`?
    pub fn is_usable(&self, ip: Ipv4Addr, net: &Ipv4Net) -> bool {
        ![net.network(), net.broadcast(), self.dns4()].contains(&ip)
    }

    /// Where every domain's DNS server listens, also the address a container sees when it reaches itself through a VIP.
    pub fn dns4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.vips().network()) + 1)
    }

    /// The derived IPv6 address of [`Self::dns4`].
    pub fn dns6(&self) -> Ipv6Addr {
        self.v6(self.dns4())
    }

    /// The cluster's ULA /48.
    pub fn range6(&self) -> Ipv6Net {
        let mut octets = [0u8; 16];
        octets[..6].copy_from_slice(&self.ula);
        Ipv6Net::new_assert(Ipv6Addr::from(octets), 48)
    }

    /// The number of the network that `ip` lies in: its block of 1/256, or 0 within `default`, 240 within the VIPs.
    pub fn network_number(&self, ip: Ipv4Addr) -> u16 {
        if self.default_network().contains(&ip) {
            return 0;
        }
        if self.vips().contains(&ip) {
            return 240;
        }
        let offset = u32::from(ip).wrapping_sub(u32::from(self.range.network()));
        let block = offset >> (32 - u32::from(self.range.prefix_len()) - 8);
        (block & 0xff) as u16
    }

    /// The IPv6 address that goes with `ip`.
    pub fn v6(&self, ip: Ipv4Addr) -> Ipv6Addr {
        let mut octets = [0u8; 16];
        octets[..6].copy_from_slice(&self.ula);
        octets[6..8].copy_from_slice(&self.network_number(ip).to_be_bytes());
        octets[12..].copy_from_slice(&ip.octets());
        Ipv6Addr::from(octets)
    }

    /// The IPv6 prefix that goes with an IPv4 prefix inside one network.
    pub fn v6_net(&self, net: Ipv4Net) -> Ipv6Net {
        Ipv6Net::new_assert(self.v6(net.network()), 96 + net.prefix_len())
    }

    /// The IPv6 prefix that holds the twins of all addresses in `net`, also when `net` spans several networks.
    ///
    /// Networks lie at multiples of 1/256 of the range and their number is the index of the first such block, so `2^k`
    /// aligned blocks are the `2^k` network numbers that begin with the same bits: a prefix of `64 - k`. `default` and the
    /// VIPs take a sixteenth each under their first block's number, which an enclosing prefix covers as well.
    pub fn v6_cover(&self, net: Ipv4Net) -> Ipv6Net {
        let block = self.range.prefix_len() + 8;
        let in_one_network = self.default_network().contains(&net)
            || self.vips().contains(&net)
            || net.prefix_len() >= block;
        if in_one_network {
            return self.v6_net(net);
        }
        let bits = block - net.prefix_len();
        let mut octets = self.range6().network().octets();
        let number = self.network_number(net.network());
        octets[6..8].copy_from_slice(&number.to_be_bytes());
        Ipv6Net::new_assert(octets.into(), 64 - bits).trunc()
    }

    /// The IPv4 address inside a derived IPv6 one; `None` if `ip` is not one of this cluster's.
    pub fn v4_of(&self, ip: Ipv6Addr) -> Option<Ipv4Addr> {
        let o = ip.octets();
        let v4 = Ipv4Addr::new(o[12], o[13], o[14], o[15]);
        (self.range.contains(&v4) && self.v6(v4) == ip).then_some(v4)
    }

    /// The prefix lengths that networks may have, the largest network first: a sixteenth to a 256th of the range.
    pub fn network_sizes(&self) -> std::ops::RangeInclusive<u8> {
        self.range.prefix_len() + 4..=self.range.prefix_len() + 8
    }

    /// May `net` be a network besides `default`? It has one of the sizes and lies between `default` and the VIPs.
    pub fn is_network(&self, net: &Ipv4Net) -> bool {
        let sound = net.addr() == net.network() && self.range.contains(net);
        let fixed = [self.default_network(), self.vips()];
        sound
            && self.network_sizes().contains(&net.prefix_len())
            && !fixed.iter().any(|fixed| fixed.contains(net))
    }

    fn sixteenth(&self, index: u32) -> Ipv4Net {
        let prefix = self.range.prefix_len() + 4;
        let start = u32::from(self.range.network()) + (index << (32 - u32::from(prefix)));
        Ipv4Net::new_assert(Ipv4Addr::from(start), prefix)
    }
}

fn check_range(range: Ipv4Net) -> Result<(), RangeError> {
    if range.addr() != range.network() {
        return Err(RangeError::HostBits(range, range.trunc()));
    }
    if !(8..=22).contains(&range.prefix_len()) {
        return Err(RangeError::Size(range));
    }
    let ip = range.network();
    let unusable =
        ip.is_loopback() || ip.is_link_local() || ip.octets()[0] == 0 || ip.octets()[0] >= 224;
    if unusable {
        Err(RangeError::NotUnicast(range))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> AddressPlan {
        AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([7; 16])).unwrap()
    }

    #[test]
    fn nodes_are_in_the_order_of_their_octets() {
        let with = |at: usize, octet: u8| {
            let mut id = [0x80; 32];
            id[at] = octet;
            NodeId(id)
        };
        let ids: Vec<NodeId> = (0..32)
            .flat_map(|at| [with(at, 0), with(at, 0x7f), with(at, 0x80), with(at, 0xff)])
            .collect();
        for (a, b) in ids.iter().flat_map(|a| ids.iter().map(move |b| (a, b))) {
            assert_eq!(a.cmp(b), a.0.cmp(&b.0));
        }
    }

    #[test]
    fn the_default_range_is_laid_out_as_the_contract_says() {
        let plan = plan();
        assert_eq!(plan.default_network().to_string(), "10.32.0.0/16");
        assert_eq!(plan.vips().to_string(), "10.47.0.0/16");
        assert_eq!(plan.dns4().to_string(), "10.47.0.1");
    }

    #[test]
    fn derived_ipv6_addresses_lead_back_to_their_ipv4() {
        let plan = plan();
        for ip in ["10.32.0.1", "10.33.7.9", "10.47.0.1"] {
            let v4: Ipv4Addr = ip.parse().unwrap();
            assert_eq!(plan.v4_of(plan.v6(v4)), Some(v4));
            assert!(plan.range6().contains(&plan.v6(v4)));
        }
        assert_eq!(plan.v4_of("fe80::1".parse().unwrap()), None);
    }

    #[test]
    fn a_prefix_and_its_ipv6_twin_hold_the_same_addresses() {
        let plan = plan();
        let net: Ipv4Net = "10.32.4.0/22".parse().unwrap();
        assert!(
            plan.v6_net(net)
                .contains(&plan.v6("10.32.7.255".parse().unwrap()))
        );
        assert!(
            !plan
                .v6_net(net)
                .contains(&plan.v6("10.32.8.0".parse().unwrap()))
        );
    }

    #[test]
    fn networks_have_their_sizes_and_their_place() {
        let plan = plan();
        for net in [
            "10.33.0.0/16",
            "10.33.0.0/20",
            "10.46.240.0/20",
            "10.40.128.0/17",
        ] {
            assert!(plan.is_network(&net.parse().unwrap()), "{net}");
        }
        for net in [
            "10.32.0.0/16",
            "10.32.16.0/20",
            "10.47.0.0/20",
            "10.33.0.0/21",
            "10.36.0.0/15",
            "10.48.0.0/20",
            "10.33.0.1/20",
        ] {
            assert!(!plan.is_network(&net.parse().unwrap()), "{net}");
        }
    }

    #[test]
    fn bad_ranges_and_names_are_refused() {
        for range in [
            "10.32.0.1/12",
            "10.0.0.0/24",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "169.254.0.0/16",
        ] {
            assert!(
                AddressPlan::new(range.parse().unwrap(), &ClusterId([0; 16])).is_err(),
                "{range}"
            );
        }
        for name in [
            "",
            "-a",
            "a-",
            "a.b",
            "a_b",
            "ä",
            "localhost",
            &"x".repeat(64),
        ] {
            assert!(Label::parse(name).is_err(), "{name}");
        }
        assert_eq!(Label::parse("Web-1").unwrap().as_str(), "web-1");
    }
}
