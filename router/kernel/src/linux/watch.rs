//! What changes in the kernel behind weft's back, as events: reconciling every few seconds finds everything in the end,
//! events make it prompt.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use nix::sys::socket::SockProtocol;
use weft_core::layout::LEG_PREFIX;
use weft_core::view::PeerNumber;

use super::domain::Domain;
use super::host::Host;
use super::raw::{Message, Notified, RawSocket, attribute, text};
use super::{sys, xfrm};
use crate::error::{Doing, Result};

const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const IFLA_IFNAME: u16 = 3;
/// `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

const fn group(number: u32) -> u32 {
    1 << (number - 1)
}
const LINK: u32 = group(1);
const NEIGHBOUR: u32 = group(3);
const ADDRESS4: u32 = group(5);
const ROUTE4: u32 = group(7);
const RULE4: u32 = group(8);
const ADDRESS6: u32 = group(9);
const ROUTE6: u32 = group(11);
const RULE6: u32 = group(19);
const NEXT_HOP: u32 = group(32);
const NFTABLES: u32 = group(7);

/// Something changed. Weft's own changes are reported too: reconcile, and when nothing was to do, nothing follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelEvent {
    /// A leg is gone: its container ended, or somebody deleted it. The name is [`crate::leg_name`] of its endpoint.
    LegGone(String),
    /// Links, routes, rules, neighbours or next hops of the domain changed.
    Domain,
    /// The domain's nft tables changed.
    DomainRules,
    /// Links, addresses, routes or rules of the host changed.
    Host,
    /// The host has got or lost an address.
    HostAddresses,
    /// The host's nft tables changed, weft's or another's.
    HostRules,
    /// The kernel opened ESP of this peer's that came inside UDP by another port than it was told: from there.
    EspPort(PeerNumber, (IpAddr, u16)),
}

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watch {
    /// The thread ends when this side of the pair closes.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

struct Source {
    socket: RawSocket,
    subject: Subject,
}

/// What a source tells of.
enum Subject {
    /// That something changed; and what some messages tell besides.
    Changes {
        event: KernelEvent,
        besides: fn(&Message) -> Option<KernelEvent>,
    },
    /// Ports that NATs chose.
    EspPorts,
}

/// Watches both namespaces on a thread of its own; one call of `heard` per burst and kind. `heard` must not block for
/// long and must not drop the [`Watch`].
pub fn watch(
    host: &Host,
    domain: &Domain,
    heard: impl Fn(KernelEvent) + Send + 'static,
) -> Result<Watch> {
    let doing = || "watch the kernel's notifications".to_owned();
    let domain_groups =
        LINK | NEIGHBOUR | ADDRESS4 | ROUTE4 | RULE4 | ADDRESS6 | ROUTE6 | RULE6 | NEXT_HOP;
    let host_groups = LINK | ADDRESS4 | ROUTE4 | RULE4 | ADDRESS6 | ROUTE6 | RULE6;
    let subscribe = |groups, event, besides, protocol| -> io::Result<Source> {
        let socket = RawSocket::subscribe(protocol, groups)?;
        let subject = Subject::Changes { event, besides };
        Ok(Source { socket, subject })
    };
    let nothing: fn(&Message) -> Option<KernelEvent> = |_| None;
    let route = SockProtocol::NetlinkRoute;
    let filter = SockProtocol::NetlinkNetFilter;
    let mut sources = domain
        .run(|| {
            Ok(vec![
                subscribe(domain_groups, KernelEvent::Domain, leg_gone, route)?,
                subscribe(NFTABLES, KernelEvent::DomainRules, nothing, filter)?,
            ])
        })?
        .map_err(|e: io::Error| e)
        .doing(doing)?;
    let on_host = host
        .run(|| {
            Ok(vec![
                subscribe(host_groups, KernelEvent::Host, address_changed, route)?,
                subscribe(NFTABLES, KernelEvent::HostRules, nothing, filter)?,
            ])
        })?
        .map_err(|e: io::Error| e)
        .doing(doing)?;
    sources.extend(on_host);
    // A kernel without IPsec has none of its news either.
    let ports = host.run(xfrm::mappings)?.map(|socket| Source {
        socket,
        subject: Subject::EspPorts,
    });
    sources.extend(ports);
    let (stop, stopped) = UnixStream::pair().doing(doing)?;
    let thread = std::thread::Builder::new()
        .name("weft-watch".into())
        .spawn(move || listen(&sources, &stopped, &heard))
        .doing(doing)?;
    Ok(Watch {
        stop: Some(stop),
        thread: Some(thread),
    })
}

fn listen(sources: &[Source], stopped: &UnixStream, heard: &impl Fn(KernelEvent)) {
    let mut fds = vec![stopped.as_fd()];
    fds.extend(sources.iter().map(|s| s.socket.as_fd()));
    loop {
        let Ok(ready) = sys::readable(&fds, None) else {
            return;
        };
        if ready[0] {
            return;
        }
        for (source, _) in sources.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            tell(source, heard);
        }
    }
}

fn tell(source: &Source, heard: &impl Fn(KernelEvent)) {
    let notified = match source.socket.notified() {
        Ok(notified) => notified,
        Err(error) => return tracing::warn!(%error, "a netlink notification can't be read"),
    };
    match (&source.subject, notified) {
        (Subject::Changes { event, besides }, Notified::Messages(messages)) => {
            let mut more: Vec<_> = messages.iter().filter_map(besides).collect();
            more.dedup();
            more.into_iter().for_each(heard);
            if !messages.is_empty() {
                heard(event.clone());
            }
        }
        (Subject::Changes { event, .. }, Notified::Overflow) => heard(event.clone()),
        (Subject::EspPorts, Notified::Messages(messages)) => {
            // One for each packet: the last counts.
            let ports: BTreeMap<_, _> = messages.iter().filter_map(xfrm::read_mapping).collect();
            let ports = ports.into_iter();
            ports.for_each(|(peer, from)| heard(KernelEvent::EspPort(peer, from)));
        }
        // The next packet says it again.
        (Subject::EspPorts, Notified::Overflow) => {}
    }
}

fn leg_gone(message: &Message) -> Option<KernelEvent> {
    if message.kind != RTM_DELLINK {
        return None;
    }
    let name = text(attribute(message.body.get(LINK_HEADER..)?, IFLA_IFNAME)?);
    let is_leg = name.starts_with(LEG_PREFIX);
    is_leg.then_some(KernelEvent::LegGone(name))
}

fn address_changed(message: &Message) -> Option<KernelEvent> {
    let changed = matches!(message.kind, RTM_NEWADDR | RTM_DELADDR);
    changed.then_some(KernelEvent::HostAddresses)
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
