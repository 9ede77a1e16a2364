//! weft-sim
fn main() {}
