//! What goes wrong on the way between hosts: cut pairs, lost packets, isolated hosts. All of it is one nft table per
//! host on the router's port (netdev ingress, so it holds inside a subnet too), replaced whole on every change.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use crate::host::Host;

/// The faults on packets that one host sends.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    cut: BTreeMap<String, Vec<IpAddr>>,
    loss_percent: u8,
    isolated: bool,
    blocks_udp: bool,
    only_tcp_to: Option<u16>,
}

impl Faults {
    fn rules(&self, table: &str, port: &str) -> String {
        let mut text =
            format!("table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n");
        let _ = writeln!(
            text,
            "chain in {{\ntype filter hook ingress device \"{port}\" priority 0; policy accept;"
        );
        if self.isolated {
            text.push_str("drop\n");
        }
        for addr in self.cut.values().flatten() {
            let family = if addr.is_ipv4() { "ip" } else { "ip6" };
            let _ = writeln!(text, "{family} daddr {addr} drop");
        }
        if self.blocks_udp || self.only_tcp_to.is_some() {
            text.push_str("meta protocol { ip, ip6 } meta l4proto udp drop\n");
        }
        if let Some(port) = self.only_tcp_to {
            text.push_str("meta protocol ip meta l4proto icmp drop\n");
            let _ = writeln!(
                text,
                "meta protocol {{ ip, ip6 }} meta l4proto tcp tcp dport != {port} drop"
            );
        }
        if self.loss_percent > 0 {
            let _ = writeln!(
                text,
                "meta protocol {{ ip, ip6 }} numgen random mod 100 < {} drop",
                self.loss_percent
            );
        }
        text.push_str("}\n}\n");
        text
    }
}

impl Host {
    /// Drops every packet between the two hosts, both ways.
    pub fn cut(&self, other: &Host) {
        self.change_faults(|f| drop(f.cut.insert(other.name().to_owned(), other.addrs())));
        other.change_faults(|f| drop(f.cut.insert(self.name().to_owned(), self.addrs())));
    }

    /// Ends a [`Host::cut`].
    pub fn heal(&self, other: &Host) {
        self.change_faults(|f| drop(f.cut.remove(other.name())));
        other.change_faults(|f| drop(f.cut.remove(self.name())));
    }

    /// Drops this share of what the host sends.
    pub fn lose(&self, percent: u8) {
        self.change_faults(|f| f.loss_percent = percent);
    }

    /// Drops every UDP datagram that the host sends, or no more.
    pub fn block_udp(&self, blocks: bool) {
        self.change_faults(|f| f.blocks_udp = blocks);
    }

    /// Lets out nothing but TCP to this port.
    pub fn only_tcp_to(&self, port: u16) {
        self.change_faults(|f| f.only_tcp_to = Some(port));
    }

    /// Nothing in, nothing out: the cable is cut, and the host's own interface does not notice.
    pub fn isolate(&self) {
        self.change_faults(|f| f.isolated = true);
        self.network()
            .space
            .ip(&["link", "set", &self.port(), "nomaster"])
            .ok();
    }

    /// Ends [`Host::isolate`].
    pub fn reconnect(&self) {
        let subnet = self.network();
        subnet
            .space
            .ip(&["link", "set", &self.port(), "master", &subnet.bridge])
            .ok();
        self.change_faults(|f| f.isolated = false);
    }

    /// Makes the way to this host narrower: its port's MTU on the router's side, so that the router must answer
    /// "packet too big" and only path MTU search notices.
    pub fn narrow(&self, mtu: u16) {
        self.network()
            .space
            .ip(&["link", "set", &self.port(), "mtu", &mtu.to_string()])
            .ok();
        self.space()
            .ip(&["link", "set", "eth0", "mtu", &mtu.to_string()])
            .ok();
    }

    /// Nothing of the underlay's goes by IPv6.
    pub fn use_ipv4_alone(&self) {
        self.space().sysctl("net.ipv6.conf.eth0.disable_ipv6", "1");
    }

    /// No IPv4 on its card from now on.
    pub fn use_ipv6_alone(&self) {
        let flush = ["-4", "addr", "flush", "dev", "eth0"];
        self.space().ip(&flush).ok();
    }

    /// A black hole: what is longer is not sent on to this host's subnet, and nobody is told ("packet too big" messages
    /// don't leave the router).
    pub fn swallow(&self, longer_than: u16) {
        let router = &self.network().space;
        let mtu = longer_than.to_string();
        let bridge = &self.network().bridge;
        router.ip(&["link", "set", bridge, "mtu", &mtu]).ok();
        router.nft(
            "table inet lab-silent
            delete table inet lab-silent
            table inet lab-silent {
                chain out {
                    type filter hook output priority 0;
                    icmp type destination-unreachable drop
                    icmpv6 type packet-too-big drop
                }
            }
            ",
        );
    }

    /// Frames of this length, everywhere between these hosts.
    pub fn widen(&self, mtu: u16) {
        let mtu = mtu.to_string();
        let router = &self.network().space;
        for device in [&self.port(), &self.network().bridge] {
            router.ip(&["link", "set", device, "mtu", &mtu]).ok();
        }
        self.space().ip(&["link", "set", "eth0", "mtu", &mtu]).ok();
    }

    fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        let mut faults = self.faults();
        change(&mut faults);
        let port = self.port();
        self.network()
            .space
            .nft(&faults.rules(&format!("lab-{}", self.name()), &port));
    }
}
