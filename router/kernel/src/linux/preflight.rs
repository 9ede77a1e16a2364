//! What weft needs of this machine, tried out before anything is changed.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use weft_core::layout::{DEVICE_MTU, GATEWAY_MAC, HOST_LEG_MAC};

use super::apply::Namespace;
use super::nft;
use super::rtnl::VethEnd;
use super::sysctl;
use crate::state::{Kernel, NextHop, Route, RouteKey, Via};

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub what: &'static str,
    /// What was found instead.
    pub found: String,
    /// What to do.
    pub remedy: &'static str,
}

const OLDEST: (u32, u32) = (5, 10);
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Every kind of expression that weft's rules are made of.
const PROBE: &str = r#"
table inet weft {
  set legs { type ifname . ipv4_addr . ether_addr; elements = { "wv0" . 10.32.0.1 . 02:78:00:00:00:01 }; }
  set ports { type ipv4_addr . inet_proto . inet_service; }
  chain probe_raw { type filter hook prerouting priority raw; policy accept;
    iifname "wv*" iifname . ip saddr . ether saddr @legs ct original zone set 7
  }
  chain probe_mark { type filter hook prerouting priority mangle; policy accept;
    ct direction reply meta mark set ct mark and 0xfff
    ip daddr . meta l4proto . th dport @ports accept
  }
  chain probe_dnat { type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local tcp dport 1 dnat ip to 10.32.0.1:1
    tcp dport 2 meta mark set jhash ip saddr . tcp sport mod 31
  }
  chain probe_mss { type filter hook forward priority mangle; policy accept;
    tcp flags syn tcp option maxseg size set rt mtu
    ct status dnat ct state established,related counter accept
  }
  chain probe_refuse { type filter hook input priority filter; policy accept;
    meta l4proto tcp reject with tcp reset
  }
  chain probe_snat { type nat hook postrouting priority srcnat; policy accept;
    oifname "x" masquerade
    ip saddr 10.32.0.1 snat ip to 10.47.0.1
  }
}
"#;

/// Tries everything that weft needs of the kernel, in a namespace of its own that goes with the thread. Empty when all
/// is there.
pub fn preflight() -> Vec<Missing> {
    let mut missing = Vec::new();
    kernel_version(&mut missing);
    rights(&mut missing);
    tun(&mut missing);
    if nft::binary().is_none() {
        missing.push(Missing {
            what: "the nft binary",
            found: "not in /usr/sbin, /sbin or /usr/bin".into(),
            remedy: "install the package nftables",
        });
    }
    let found_nft = nft::binary().is_some();
    let tried = std::thread::scope(|scope| {
        let worker = scope.spawn(|| in_scratch_namespace(found_nft));
        worker.join().unwrap_or_default()
    });
    missing.extend(tried);
    missing
}

fn kernel_version(missing: &mut Vec<Missing>) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST {
        missing.push(Missing {
            what: "Linux 5.10 or later",
            found: format!("this is {}", release.trim_end()),
            remedy: "boot a newer kernel",
        });
    }
}

fn rights(missing: &mut Vec<Missing>) {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    for (bit, what) in [
        (CAP_NET_ADMIN, "the right CAP_NET_ADMIN"),
        (CAP_SYS_ADMIN, "the right CAP_SYS_ADMIN"),
    ] {
        if effective & (1 << bit) == 0 {
            missing.push(Missing {
                what,
                found: "this process has it not".into(),
                remedy: "run weft as root (in a container: with --privileged)",
            });
        }
    }
}

fn tun(missing: &mut Vec<Missing>) {
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    if let Err(error) = opened {
        missing.push(Missing {
            what: "/dev/net/tun",
            found: error.to_string(),
            remedy: "modprobe tun (in a container: --device /dev/net/tun)",
        });
    }
}

fn in_scratch_namespace(found_nft: bool) -> Vec<Missing> {
    let mut missing = Vec::new();
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        missing.push(Missing {
            what: "network namespaces",
            found: error.to_string(),
            remedy: "a kernel with CONFIG_NET_NS, and the right to make namespaces",
        });
        return missing;
    }
    match Namespace::open() {
        Ok(namespace) => devices(&namespace, &mut missing),
        Err(error) => missing.push(Missing {
            what: "netlink",
            found: error.to_string(),
            remedy: "a kernel with CONFIG_NETLINK, and no filter on AF_NETLINK sockets",
        }),
    }
    if let (true, Err(error)) = (found_nft, nft::feed(PROBE)) {
        missing.push(Missing {
            what: "nf_tables with NAT, connection tracking, fib, hash and reject",
            found: error.to_string(),
            remedy: "a kernel with CONFIG_NF_TABLES_INET and the nft_* modules (modprobe nf_tables nft_ct nft_nat nft_masq nft_fib_inet nft_hash nft_reject_inet)",
        });
    }
    missing
}

fn devices(namespace: &Namespace, missing: &mut Vec<Missing>) {
    if let Err(error) = veth(namespace) {
        missing.push(Missing {
            what: "veth devices",
            found: error.to_string(),
            remedy: "modprobe veth",
        });
        return;
    }
    if let Err(error) = namespace.put(&next_hop()) {
        missing.push(Missing {
            what: "next-hop objects",
            found: error.to_string(),
            remedy: "Linux 5.10 or later",
        });
    }
}

fn veth(namespace: &Namespace) -> io::Result<()> {
    let end = |name, mac| VethEnd {
        name,
        mac,
        namespace: None,
    };
    let rtnl = &namespace.rtnl;
    rtnl.add_veth(
        &end("probe0", HOST_LEG_MAC),
        &end("probe1", GATEWAY_MAC),
        DEVICE_MTU,
    )?;
    for link in rtnl.links()? {
        rtnl.set_up(link.index)?;
    }
    Ok(())
}

/// An IPv4 route by a next-hop object, whose gateway is an IPv6 one where there is IPv6.
fn next_hop() -> Kernel {
    let gateway = if sysctl::ipv6_available() {
        "fe80::2"
    } else {
        "169.254.1.2"
    };
    let mut kernel = Kernel::default();
    let (Ok(gateway), Ok(to)) = (gateway.parse(), "10.32.0.0/12".parse()) else {
        return kernel;
    };
    let device = "probe0".to_owned();
    kernel.next_hops.insert(1, NextHop { device, gateway });
    let key = RouteKey {
        table: crate::state::MAIN_TABLE,
        to,
        metric: 1024,
    };
    let via = Via::NextHop(1);
    let (mtu, source) = (Some(1400), None);
    kernel.routes.insert(key, Route { via, mtu, source });
    kernel
}
