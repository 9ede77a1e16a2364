//! Why the carrier does not start.

use std::io;

/// A start that failed. Nothing runs then; a TAP that was made stays (it is persistent, and the next start adopts it).
#[derive(Debug, thiserror::Error)]
pub enum CarrierError {
    /// Somebody else has the port.
    #[error("UDP port {port} is taken by another program; choose another with --port")]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// The underlay socket could not be made.
    #[error("can't open UDP port {port}")]
    Bind {
        /// The port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has the TCP port.
    #[error("TCP port {port} is taken by another program; choose another with --tcp-port")]
    TcpPortTaken {
        /// The port.
        port: u16,
    },
    /// The listener could not be made.
    #[error("can't listen on TCP port {port}")]
    Listen {
        /// The port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The domain's namespace could not be entered.
    #[error("can't enter the domain's network namespace")]
    Domain(#[source] io::Error),
    /// The kernel has no TUN/TAP, or this process may not use it.
    #[error(
        "can't open /dev/net/tun: the kernel needs CONFIG_TUN, and weft the right CAP_NET_ADMIN"
    )]
    NoTun(#[source] io::Error),
    /// The TAP could not be made, adopted or set up.
    #[error("can't set up the TAP {name} ({step})")]
    Tap {
        /// Its name.
        name: String,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No thread, or no event counter for it.
    #[error("can't start the packet threads")]
    Threads(#[source] io::Error),
}
