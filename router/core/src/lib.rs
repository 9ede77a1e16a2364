//! The cluster core of weft, sans-IO: plain state machines that take (now, input) and give outputs.
//!
//! It never opens a socket, reads a clock, touches a file or the environment, or draws randomness but from the seed
//! it was given. `clippy.toml` beside this crate and `tests/run` keep it so.

#![forbid(unsafe_code)]

pub mod carriers;
pub mod catalog;
pub mod control;
pub mod crypto;
#[doc(hidden)]
pub mod fuzz;
pub mod hlc;
pub mod identity;
pub mod ipam;
pub mod layout;
pub mod membership;
pub mod model;
pub mod mutation;
pub mod node;
pub mod path;
pub mod record;
pub mod roster;
pub mod session;
pub mod store;
pub mod sync;
pub mod token;
pub mod underlay;
pub mod value;
pub mod view;
pub mod voters;
pub mod wire;
