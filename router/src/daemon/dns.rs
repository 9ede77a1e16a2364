//! The name server: its sockets are made inside the domain, its questions to the host's resolvers leave from the host.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use weft_core::model::AddressPlan;
use weft_core::view::View;
use weft_dns::{Config, Handle, Limits, Sockets, Upstreams};
use weft_kernel::Domain;

use super::core_thread::Core;

const PORT: u16 = 53;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Begins to serve on the domain's DNS addresses, which must be there.
fn serve(
    domain: &Domain,
    plan: AddressPlan,
    ipv6: bool,
    view: impl Fn() -> Arc<View> + Send + Sync + 'static,
    upstreams: Upstreams,
) -> Result<Handle> {
    let mut addrs = vec![IpAddr::V4(plan.dns4())];
    if ipv6 {
        addrs.push(IpAddr::V6(plan.dns6()));
    }
    let sockets = domain
        .run(move || Sockets::bind(&addrs, PORT))
        .context("can't enter the domain")??;
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
    domain: &Domain,
    core: &Core,
    view: &Arc<View>,
    upstreams: &Upstreams,
) -> Result<weft_dns::Handle> {
    let (core, first) = (core.clone(), view.clone());
    let newest = move || core.view().unwrap_or_else(|| first.clone());
    serve(
        domain,
        view.plan,
        weft_kernel::ipv6_available(),
        newest,
        upstreams.clone(),
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
