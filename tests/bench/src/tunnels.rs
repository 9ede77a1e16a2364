//! The candidates.

mod kernel;
mod nebula;
mod weft;
mod wireguard;

use std::path::Path;

use crate::pair::Pair;

/// Something that carries packets between two hosts.
#[derive(Clone, Copy)]
pub(crate) struct Tunnel {
    pub(crate) name: &'static str,
    /// May weft's figures be measured by it: is it a program that a user gets as a package and that encrypts?
    pub(crate) is_peer: bool,
    /// Brings it up on two hosts of a lab of its own. Programs may be in that directory.
    pub(crate) make: fn(Option<&Path>) -> Pair,
}

/// All of them; weft first.
pub(crate) const TUNNELS: [Tunnel; 8] = [
    Tunnel {
        name: "weft",
        is_peer: false,
        make: weft::make,
    },
    Tunnel {
        name: "weft-vxlan",
        is_peer: false,
        make: weft::make_vxlan,
    },
    Tunnel {
        name: "weft-services",
        is_peer: false,
        make: weft::make_services,
    },
    Tunnel {
        name: "wireguard-go",
        is_peer: true,
        make: wireguard::make_go,
    },
    Tunnel {
        name: "boringtun",
        is_peer: true,
        make: wireguard::make_boringtun,
    },
    Tunnel {
        name: "nebula",
        is_peer: true,
        make: nebula::make,
    },
    Tunnel {
        name: "vxlan",
        is_peer: false,
        make: kernel::make_vxlan,
    },
    Tunnel {
        name: "routed",
        is_peer: false,
        make: kernel::make_routed,
    },
];
