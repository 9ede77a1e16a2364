//! Scenarios that need a kernel with what not every machine's has, in the virtual machine of `tests/vm/run`. Anywhere else
//! they fail.

// All of this is a test; the lint only knows functions that are marked as one.
#![allow(clippy::unwrap_used)]

mod esp;
mod pair;
mod sealed;
