//! Reverse names: which of them lie in the cluster's own space, and what they stand for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use weft_core::model::AddressPlan;

/// A reverse name inside the cluster's space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reverse {
    /// The zone it is in: the part of the name that belongs to the cluster as a whole.
    pub(crate) apex: String,
    /// What it names there.
    pub(crate) spot: Spot,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Spot {
    /// The zone itself.
    Apex,
    /// A prefix: something lies below it, nothing at it (RFC 8020).
    Prefix,
    /// One whole address.
    Address(IpAddr),
    /// Nothing a reverse zone could hold.
    Nothing,
}

/// Finds the place of a name (labels in lower case, the leftmost first). `None` when it isn't ours.
pub(crate) fn locate(labels: &[String], plan: &AddressPlan) -> Option<Reverse> {
    let (rest, family) = match labels {
        [rest @ .., inner, arpa] if arpa == "arpa" => (rest, inner.as_str()),
        _ => return None,
    };
    match family {
        "in-addr" => locate4(rest, plan),
        "ip6" => locate6(rest, plan),
        _ => None,
    }
}

fn locate4(rest: &[String], plan: &AddressPlan) -> Option<Reverse> {
    let mut octets = [0u8; 4];
    let parsed = digits(rest, 4, octet, &mut octets);
    let ours = usize::from(plan.range.prefix_len()).div_ceil(8);
    let ip = Ipv4Addr::from(octets);
    if parsed < ours || !plan.range.contains(&ip) {
        return None;
    }
    Some(Reverse {
        apex: format!("{}.in-addr.arpa", rest[rest.len() - ours..].join(".")),
        spot: spot(rest.len(), parsed, ours, 4, ip.into()),
    })
}

fn locate6(rest: &[String], plan: &AddressPlan) -> Option<Reverse> {
    let mut nibbles = [0u8; 32];
    let parsed = digits(rest, 32, nibble, &mut nibbles);
    let ours = usize::from(plan.range6().prefix_len()) / 4;
    let mut octets = [0u8; 16];
    for (octet, pair) in octets.iter_mut().zip(nibbles.chunks_exact(2)) {
        *octet = pair[0] << 4 | pair[1];
    }
    let ip = Ipv6Addr::from(octets);
    if parsed < ours || !plan.range6().contains(&ip) {
        return None;
    }
    Some(Reverse {
        apex: format!("{}.ip6.arpa", rest[rest.len() - ours..].join(".")),
        spot: spot(rest.len(), parsed, ours, 32, ip.into()),
    })
}

fn spot(labels: usize, parsed: usize, apex: usize, whole: usize, ip: IpAddr) -> Spot {
    if labels > parsed {
        Spot::Nothing
    } else if parsed == whole {
        Spot::Address(ip)
    } else if parsed == apex {
        Spot::Apex
    } else {
        Spot::Prefix
    }
}

/// Reads labels from the right as long as they are digits of the address; says how many were.
fn digits(rest: &[String], most: usize, digit: fn(&str) -> Option<u8>, into: &mut [u8]) -> usize {
    let mut parsed = 0;
    for label in rest.iter().rev().take(most) {
        let Some(value) = digit(label) else { break };
        into[parsed] = value;
        parsed += 1;
    }
    parsed
}

fn octet(label: &str) -> Option<u8> {
    let value: u8 = label.parse().ok()?;
    (value.to_string() == label).then_some(value)
}

fn nibble(label: &str) -> Option<u8> {
    match label.as_bytes() {
        [one] => char::from(*one).to_digit(16).map(|d| d as u8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use weft_core::model::ClusterId;

    use super::*;

    fn at(name: &str) -> Option<Reverse> {
        let labels: Vec<String> = name.split('.').map(str::to_owned).collect();
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0xab; 16])).unwrap();
        locate(&labels, &plan)
    }

    fn spot_of(name: &str) -> Option<Spot> {
        at(name).map(|r| r.spot)
    }

    #[test]
    fn only_what_lies_in_the_range_is_ours() {
        for name in [
            "arpa",
            "in-addr.arpa",
            "10.in-addr.arpa",
            "31.10.in-addr.arpa",
            "1.0.48.10.in-addr.arpa",
            "1.0.0.127.in-addr.arpa",
            "8.b.d.0.1.0.0.2.ip6.arpa",
            "b.a.d.f.ip6.arpa",
            "example.com",
        ] {
            assert_eq!(at(name), None, "{name}");
        }
    }

    #[test]
    fn addresses_prefixes_and_nonsense_are_told_apart() {
        let ip = IpAddr::from([10, 33, 2, 1]);
        let address = at("1.2.33.10.in-addr.arpa").unwrap();
        assert_eq!(address.spot, Spot::Address(ip));
        assert_eq!(address.apex, "33.10.in-addr.arpa");
        assert_eq!(spot_of("33.10.in-addr.arpa"), Some(Spot::Apex));
        assert_eq!(spot_of("2.33.10.in-addr.arpa"), Some(Spot::Prefix));
        assert_eq!(spot_of("01.2.33.10.in-addr.arpa"), Some(Spot::Nothing));
        assert_eq!(
            spot_of("lb._dns-sd._udp.2.33.10.in-addr.arpa"),
            Some(Spot::Nothing)
        );
        assert_eq!(spot_of("0.1.2.33.10.in-addr.arpa"), Some(Spot::Nothing));
    }

    #[test]
    fn the_derived_ipv6_addresses_are_ours_too() {
        let plan = AddressPlan::new(AddressPlan::DEFAULT_RANGE, &ClusterId([0xab; 16])).unwrap();
        let ip = plan.v6(Ipv4Addr::new(10, 47, 0, 1));
        let name: String = ip
            .octets()
            .iter()
            .rev()
            .map(|o| format!("{:x}.{:x}.", o & 15, o >> 4))
            .collect();
        let found = at(&format!("{name}ip6.arpa")).unwrap();
        assert_eq!(found.spot, Spot::Address(ip.into()));
        assert_eq!(found.apex, "b.a.b.a.b.a.b.a.b.a.d.f.ip6.arpa");
        assert_eq!(
            spot_of("0.b.a.b.a.b.a.b.a.b.a.d.f.ip6.arpa"),
            Some(Spot::Prefix)
        );
        assert_eq!(
            spot_of("b.a.b.a.b.a.b.a.b.a.d.f.ip6.arpa"),
            Some(Spot::Apex)
        );
    }
}
