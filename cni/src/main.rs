//! `weft-cni`, the CNI plugin: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_cni::main()
}
