//! Virtual addresses and published ports of weft, as text for `nft`: computes, renders, and never runs anything.
//!
//! ```text
//! View + LocalFacts --plan()--> LbPlan --domain_fragment()--> inside `table inet weft { … }` of the domain
//!                                      \--host_fragment()---> inside `table inet weft { … }` of the host
//! ```
//!
//! Both fragments stand beside the base filter in one table, so every chain, map and set here begins with `lb_`, but
//! for [`PUBLISHED4`] and [`PUBLISHED6`], which that filter refers to. No name that a person chose ever gets into the
//! text: only numbers and addresses do.

#![forbid(unsafe_code)]

pub mod maglev;
mod plan;
mod render;

pub use plan::{
    Balance, Frontend, LbPlan, LocalFacts, Published, Target, is_reserved, plan, wanted,
};
pub use render::domain::{PUBLISHED4, PUBLISHED6, domain_fragment};
pub use render::host::host_fragment;
