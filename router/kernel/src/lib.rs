//! The kernel's side of weft: namespaces, links, routes, switches and the base filter of domain and host.
//!
//! A pure half plans ([`plan_domain`], [`plan_host`], [`filter`]) and compares ([`diff`]); an adapter half reads what the
//! kernel has and makes the steps between. All is meant to be called again: on every change, on kernel events
//! ([`watch`]) and every few seconds. A restart adopts what is there and breaks no connection.
//!
//! It never decides who may talk to whom in the cluster, holds no secret, opens no socket to another host, and runs one
//! program alone: `nft`, with rules on its standard input.
//!
//! ```text
//! preflight()                      what is missing, before anything is changed
//! Host::current()                  the namespace of the calling thread plays the host
//! Domain::open_or_create(name)     adopts or makes /run/netns/weft-<id>
//! domain.ensure_host_leg(&host)    weft0 <-> wh0
//! domain.reconcile(&plan_domain(&view, &local))
//! host.guard(..) -> rules.keep(Where::Host(&host), [&host_filter(..), lb]) -> host.reconcile(&plan_host(..), ..)
//! rules.keep(Where::Domain(&domain), [&domain_filter(..), lb])      before a leg can send anything
//! domain.attach(&LegSpec) / detach / check / legs / forget_connections
//! host.teardown(name, &mut state)  all of it away again
//! ```
//!
//! Calls block (milliseconds) and enter namespaces on threads of their own: from async code use `spawn_blocking`.

mod bpf;
pub mod diff;
mod error;
mod esp;
pub mod filter;
mod gathering;
mod linux;
mod plan;
pub mod state;
mod table;

pub use error::{KernelError, NftError, Refusal};
pub use esp::{EspMemory, EspPlan, plan_esp};
pub use filter::Guard;
pub use filter::fastpath::{Backend, FastMemory, FastPath, plan_fast_path};
pub use filter::vxlan::CarrierTraffic;
pub use linux::apply::Report;
pub use linux::domain::{Domain, Origin};
pub use linux::esp::esp_available;
pub use linux::esp_port::EspPort;
pub use linux::fastpath::FastTable;
pub use linux::forwarding::HostState;
pub use linux::gather::Gatherer;
pub use linux::ground::{CABLE_MTU, End, Ground};
pub use linux::host::{Host, HostReport};
pub use linux::leg::{AttachedLeg, LegSeen, LegSpec};
pub use linux::netns::{NETNS_DIR, inside, open_netns};
pub use linux::nft;
pub use linux::preflight::{Missing, preflight};
pub use linux::ranges::Overlap;
pub use linux::rules::Rules;
pub use linux::sysctl::ipv6_available;
pub use linux::watch::{KernelEvent, Watch, watch};
pub use plan::{DomainPlan, HostPlan, LocalFacts, LocalLeg, leg_name, plan_domain, plan_host};
