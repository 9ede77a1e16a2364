//! Text for `nft -f` (1.0.6 or later). Every construct here was loaded by the real program; what its JSON interface
//! can't say (concatenated data, hashes) its text can.

pub(crate) mod domain;
pub(crate) mod host;

use std::fmt::Write;

/// Appends one line; writing to a `String` can't fail.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {{
        let _ = writeln!($out, $($arg)*);
    }};
}

/// A set or map with its elements; one without any must not have an `elements` line at all.
pub(crate) fn collection(out: &mut String, head: &str, kind: &str, elements: &[String]) {
    line!(out, "  {head} {{");
    line!(out, "    {kind}");
    if !elements.is_empty() {
        line!(out, "    elements = {{ {} }}", elements.join(", "));
    }
    line!(out, "  }}");
}

/// A base chain with its rules.
pub(crate) fn base_chain(out: &mut String, name: &str, hook: &str, rules: &[String]) {
    line!(out, "  chain {name} {{");
    line!(out, "    type {hook}; policy accept;");
    for rule in rules {
        line!(out, "    {rule}");
    }
    line!(out, "  }}");
}

/// A chain that others go to.
pub(crate) fn chain(out: &mut String, name: &str, rules: &[String]) {
    line!(out, "  chain {name} {{");
    for rule in rules {
        line!(out, "    {rule}");
    }
    line!(out, "  }}");
}
