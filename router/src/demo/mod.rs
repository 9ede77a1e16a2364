//! The demo.

/// What `weft demo` was asked for.
pub(crate) struct DemoOptions {
    /// Leave it running at the end.
    pub(crate) keep: bool,
    /// JSON at the end.
    pub(crate) json: bool,
}

/// Runs it.
pub(crate) fn run(_opts: &DemoOptions) -> anyhow::Result<()> {
    anyhow::bail!("this build has no demo yet")
}
