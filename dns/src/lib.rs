//! Names of the overlay: answers for `weft.internal`, short names and the reverse zones of the cluster's addresses come
//! from the [`View`](weft_core::view::View) in memory; everything else is asked of the host's own resolvers.
//!
//! ```text
//! query -> limits -> zone (pure) -> records | none of that type | no such name
//!                       \-> not ours -> forward -> rebinding filter -> the upstream's answer, its RCODE unchanged
//! ```
//!
//! It never forwards a name under `weft.internal`, a short name, or a reverse name inside the cluster's range, and it
//! never opens a listening socket itself: the caller makes them inside the domain ([`Sockets::bind`] there).

#![forbid(unsafe_code)]

mod arpa;
mod counters;
mod forward;
#[doc(hidden)]
pub mod fuzz;
mod limits;
mod reply;
mod resolve;
mod server;
mod tcp;
pub mod zone;

pub use counters::{Counters, Snapshot};
pub use forward::{Upstreams, parse_resolv_conf};
pub use limits::Limits;
pub use resolve::ViewSource;
pub use server::{Config, Handle, ServeError, Sockets, serve};
