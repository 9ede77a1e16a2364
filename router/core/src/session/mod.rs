//! One encrypted link to each peer.

pub mod drops;
mod noise;
pub mod replay;
pub mod transport;
