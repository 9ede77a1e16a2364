//! Fuzz targets for every decoder of weft: plain functions from octets, so that libFuzzer drives them (`src/bin`), and
//! `cargo test` runs them over the kept corpus and bent inputs on any toolchain.
//!
//! A target panics when a promise is broken, and it has four of them: no octets make a decoder panic; none make it
//! allocate beyond the target's bound; what was read and written again is read as the same; and what is accepted is what
//! the signature, the seal or the limits allow. Where octets alone never get past a signature or a seal, the target makes
//! it over what it was given, with keys of its own.

pub mod bend;
mod memory;
pub mod pieces;
pub mod scene;
pub mod targets;

use std::sync::LazyLock;

use weft_core::crypto::memo;

pub use targets::{Seen, TARGETS, Target};

thread_local! {
    /// Made once: signatures and products of keys that were computed for an earlier input are not computed again. They
    /// are what they would be, so an input does the same alone as after others.
    static COMPUTED: () = memo::enable_for_this_thread();
}

impl Target {
    /// The target of that name.
    pub fn named(name: &str) -> Option<&'static Target> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Runs it on `data`.
    ///
    /// # Panics
    /// When a promise is broken.
    pub fn run(&self, data: &[u8]) -> Seen {
        COMPUTED.with(|()| ());
        // Played once, and not on this input's account.
        LazyLock::force(&scene::SCENE);
        let data = &data[..data.len().min(self.longest)];
        let mut seen = Seen::Refused;
        let peak = memory::peak_of(|| seen = (self.body)(data));
        assert!(
            peak <= self.memory,
            "{}: {peak} octets allocated for {} that came, {} at most",
            self.name,
            data.len(),
            self.memory
        );
        seen
    }
}
