//! The name server: its sockets are made inside the domain, its questions to the host's resolvers leave from the host.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use anyhow::{Context, Result};
use weft_core::model::AddressPlan;
use weft_core::view::View;
use weft_dns::{Config, Handle, Limits, Sockets, Upstreams};
use weft_kernel::Domain;

use super::core_thread::Core;

const PORT: u16 = 53;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The name server's sockets, made on the domain's DNS addresses, which must be there; or those of a predecessor, if they
/// are just these: questions that came meanwhile wait in them.
pub(super) fn sockets(domain: &Domain, plan: &AddressPlan, given: Sockets) -> Result<Sockets> {
    let mut addrs = vec![IpAddr::V4(plan.dns4())];
    if weft_kernel::ipv6_available() {
        addrs.push(IpAddr::V6(plan.dns6()));
    }
    let wanted: Vec<SocketAddr> = addrs.iter().map(|ip| (*ip, PORT).into()).collect();
    let udp: Vec<_> = given.udp.iter().flat_map(UdpSocket::local_addr).collect();
    let tcp: Vec<_> = given.tcp.iter().flat_map(TcpListener::local_addr).collect();
    if udp == wanted && tcp == wanted {
        return Ok(given);
    }
    drop(given);
    Ok(domain
        .run(move || Sockets::bind(&addrs, PORT))
        .context("can't enter the domain")??)
}

/// The same once more.
pub(super) fn again(sockets: &Sockets) -> io::Result<Sockets> {
    let udp = sockets.udp.iter().map(UdpSocket::try_clone);
    let tcp = sockets.tcp.iter().map(TcpListener::try_clone);
    Ok(Sockets {
        udp: udp.collect::<io::Result<_>>()?,
        tcp: tcp.collect::<io::Result<_>>()?,
    })
}

/// Begins to serve.
fn serve(
    ipv6: bool,
    view: impl Fn() -> Arc<View> + Send + Sync + 'static,
    upstreams: Upstreams,
    sockets: Sockets,
) -> Result<Handle> {
    let limits = Limits::default();
    Ok(weft_dns::serve(Config {
        sockets,
        view: Arc::new(view),
        upstreams,
        limits,
        ipv6,
    })?)
}

/// Serves what the core's newest view says.
pub(super) fn follow(
    sockets: Sockets,
    core: &Core,
    view: &Arc<View>,
    upstreams: &Upstreams,
) -> Result<weft_dns::Handle> {
    let (core, first) = (core.clone(), view.clone());
    let newest = move || core.view().unwrap_or_else(|| first.clone());
    serve(
        weft_kernel::ipv6_available(),
        newest,
        upstreams.clone(),
        sockets,
    )
}

/// The host's resolvers, without weft's own address.
pub(crate) fn resolvers(plan: &AddressPlan) -> Vec<SocketAddr> {
    let text = fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    let own = |ip: IpAddr| ip == IpAddr::V4(plan.dns4()) || ip == IpAddr::V6(plan.dns6());
    weft_dns::parse_resolv_conf(&text)
        .into_iter()
        .filter(|addr| !own(addr.ip()))
        .collect()
}
