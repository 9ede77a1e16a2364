//! One nft table as its chains, sets and maps, so that of a change only what differs is put. A table of 1,000 services takes
//! nft and the kernel most of a second to lay; what one more of them adds, some milliseconds.
//!
//! Only what weft's own fragments hold is read: blocks `chain`, `set` and `map`, in a chain one statement a line, in a
//! set what it is and then `elements = { … }`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use weft_core::layout::NFT_TABLE;

/// The parts of a table, borrowed from its text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Table<'a> {
    chains: BTreeMap<&'a str, Chain<'a>>,
    collections: BTreeMap<&'a str, Collection<'a>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Chain<'a> {
    /// Type, hook and policy of a base chain.
    head: Vec<&'a str>,
    rules: Vec<&'a str>,
}

/// A set or a map.
#[derive(Debug, PartialEq, Eq)]
struct Collection<'a> {
    /// `set` or `map`.
    kind: &'a str,
    /// What it holds.
    head: &'a str,
    elements: BTreeSet<&'a str>,
}

impl Collection<'_> {
    /// Ranges that are taken away and put in one transaction are more than every kernel does right.
    fn has_ranges(&self) -> bool {
        self.head.contains("interval")
    }
}

/// The text is no run of blocks; where it stops being one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NotBlocks(pub(crate) String);

impl<'a> Table<'a> {
    /// Reads fragments that stand one behind the other in one table.
    pub(crate) fn read(text: &'a str) -> Result<Self, NotBlocks> {
        let mut table = Self::default();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let refuse = || NotBlocks(rest.chars().take(60).collect());
            let (title, body, behind) = block(rest).ok_or_else(refuse)?;
            let (kind, name) = title.split_once(' ').ok_or_else(refuse)?;
            let is_new = match kind {
                "chain" => table.chains.insert(name, chain(body)).is_none(),
                "set" | "map" => {
                    let read = collection(kind, body).ok_or_else(refuse)?;
                    table.collections.insert(name, read).is_none()
                }
                _ => false,
            };
            if !is_new {
                return Err(refuse());
            }
            rest = behind.trim_start();
        }
        Ok(table)
    }

    /// Commands that make of this table, as it stands, the other; `None` where only the whole of it can be put.
    pub(crate) fn commands_to(&self, wanted: &Self) -> Option<String> {
        let is_possible = common(&self.chains, &wanted.chains)
            .all(|(old, new)| old.head == new.head)
            && common(&self.collections, &wanted.collections).all(|(old, new)| {
                (old.kind, old.head) == (new.kind, new.head)
                    && (old.elements == new.elements || !new.has_ranges())
            });
        is_possible.then(|| {
            let mut out = String::new();
            // What is referred to comes before who refers to it, and goes after.
            wanted.declare_new(self, &mut out);
            wanted.fill(self, &mut out);
            wanted.put_elements(self, &mut out);
            self.delete_strays(wanted, &mut out);
            out
        })
    }

    /// The names of its sets and maps.
    pub(crate) fn collections(&self) -> Vec<&'a str> {
        self.collections.keys().copied().collect()
    }

    fn declare_new(&self, old: &Self, out: &mut String) {
        for (name, Collection { kind, head, .. }) in &self.collections {
            if !old.collections.contains_key(name) {
                let _ = writeln!(out, "add {kind} inet {NFT_TABLE} {name} {{ {head}; }}");
            }
        }
        for (name, chain) in &self.chains {
            if old.chains.contains_key(name) {
                continue;
            }
            let _ = write!(out, "add chain inet {NFT_TABLE} {name}");
            if !chain.head.is_empty() {
                let _ = write!(out, " {{ {}; }}", chain.head.join("; "));
            }
            out.push('\n');
        }
    }

    fn fill(&self, old: &Self, out: &mut String) {
        for (name, chain) in &self.chains {
            let rules = old.chains.get(name).map(|old| &old.rules);
            if rules == Some(&chain.rules) {
                continue;
            }
            if rules.is_some() {
                let _ = writeln!(out, "flush chain inet {NFT_TABLE} {name}");
            }
            for rule in &chain.rules {
                let _ = writeln!(out, "add rule inet {NFT_TABLE} {name} {rule}");
            }
        }
    }

    fn put_elements(&self, old: &Self, out: &mut String) {
        let none = BTreeSet::new();
        for (name, Collection { elements, .. }) in &self.collections {
            let before = old.collections.get(name).map_or(&none, |old| &old.elements);
            // First: an element of a map may have got another value.
            change(out, "delete", name, before.difference(elements));
            change(out, "add", name, elements.difference(before));
        }
    }

    fn delete_strays(&self, wanted: &Self, out: &mut String) {
        let strays = || {
            let names = self.chains.keys();
            names.filter(|name| !wanted.chains.contains_key(*name))
        };
        // They may lead to each other, and maps that go to them.
        for name in strays() {
            let _ = writeln!(out, "flush chain inet {NFT_TABLE} {name}");
        }
        for (name, Collection { kind, .. }) in &self.collections {
            if !wanted.collections.contains_key(name) {
                let _ = writeln!(out, "delete {kind} inet {NFT_TABLE} {name}");
            }
        }
        for name in strays() {
            let _ = writeln!(out, "delete chain inet {NFT_TABLE} {name}");
        }
    }
}

/// What has one name in both.
fn common<'a, T>(
    one: &'a BTreeMap<&str, T>,
    other: &'a BTreeMap<&str, T>,
) -> impl Iterator<Item = (&'a T, &'a T)> {
    one.iter()
        .filter_map(|(name, own)| Some((own, other.get(name)?)))
}

fn change<'a>(
    out: &mut String,
    verb: &str,
    name: &str,
    elements: impl Iterator<Item = &'a &'a str>,
) {
    let elements: Vec<&str> = elements.copied().collect();
    if !elements.is_empty() {
        let elements = elements.join(", ");
        let _ = writeln!(
            out,
            "{verb} element inet {NFT_TABLE} {name} {{ {elements} }}"
        );
    }
}

/// The first block: its title, what is between its braces, and what is behind it.
fn block(text: &str) -> Option<(&str, &str, &str)> {
    let (title, rest) = text.split_once('{')?;
    let mut depth = 1_usize;
    let end = rest.find(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0
    })?;
    Some((title.trim(), &rest[..end], &rest[end + 1..]))
}

fn chain(body: &str) -> Chain<'_> {
    let statements = body.split(['\n', ';']).map(str::trim);
    let (head, rules) = statements
        .filter(|statement| !statement.is_empty())
        .partition(|s| s.starts_with("type ") || s.starts_with("policy "));
    Chain { head, rules }
}

fn collection<'a>(kind: &'a str, body: &'a str) -> Option<Collection<'a>> {
    let (head, elements) = match body.split_once("elements =") {
        None => (body, ""),
        Some((head, elements)) => (head, block(elements)?.1),
    };
    let elements = elements.split(',').map(str::trim);
    Some(Collection {
        kind,
        head: head.trim().trim_end_matches(';'),
        elements: elements.filter(|element| !element.is_empty()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "set hosts { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
  map to {
    type inet_service : verdict
    elements = { 80 : goto web }
  }
chain base_in { type filter hook input priority filter; policy drop;
  iifname { \"lo\", \"wl*\" } accept
  tcp dport vmap @to
}
chain web {
  accept
}";

    fn commands(to: &str) -> Option<String> {
        let (old, new) = (Table::read(TEXT).unwrap(), Table::read(to).unwrap());
        old.commands_to(&new)
    }

    #[test]
    fn a_table_is_read_as_its_parts() {
        let table = Table::read(TEXT).unwrap();
        let input = &table.chains["base_in"];
        assert_eq!(
            input.head,
            ["type filter hook input priority filter", "policy drop"]
        );
        assert_eq!(
            input.rules,
            ["iifname { \"lo\", \"wl*\" } accept", "tcp dport vmap @to"]
        );
        assert_eq!(table.chains["web"].rules, ["accept"]);
        let to = &table.collections["to"];
        assert_eq!((to.kind, to.head), ("map", "type inet_service : verdict"));
        assert_eq!(to.elements, ["80 : goto web"].into());
        assert_eq!(table.collections["hosts"].elements.len(), 2);
        assert_eq!(table.collections["hosts"].head, "type ipv4_addr");
    }

    #[test]
    fn what_is_no_table_is_refused() {
        for text in ["chain", "chain x { {", "flush ruleset", "table x { }", "{}"] {
            assert!(Table::read(text).is_err(), "{text}");
        }
        let twice = "chain x { accept }\nchain x { drop }";
        assert_eq!(
            Table::read(twice),
            Err(NotBlocks("chain x { drop }".into()))
        );
    }

    #[test]
    fn what_is_the_same_is_left_alone() {
        assert_eq!(commands(TEXT).as_deref(), Some(""));
        let other_order = TEXT.replace("192.0.2.1, 192.0.2.2", "192.0.2.2, 192.0.2.1");
        assert_eq!(commands(&other_order).as_deref(), Some(""));
    }

    #[test]
    fn elements_and_chains_come_and_go_in_an_order_that_the_kernel_accepts() {
        let moved = TEXT
            .replace("192.0.2.2", "192.0.2.3")
            .replace("80 : goto web", "80 : goto new, 81 : goto new")
            .replace("chain web", "chain new");
        assert_eq!(
            commands(&moved).unwrap(),
            "add chain inet weft new
add rule inet weft new accept
delete element inet weft hosts { 192.0.2.2 }
add element inet weft hosts { 192.0.2.3 }
delete element inet weft to { 80 : goto web }
add element inet weft to { 80 : goto new, 81 : goto new }
flush chain inet weft web
delete chain inet weft web
"
        );
    }

    #[test]
    fn a_chain_whose_rules_differ_is_filled_anew() {
        let other = TEXT.replace("tcp dport vmap @to", "tcp dport 80 drop");
        assert_eq!(
            commands(&other).unwrap(),
            "flush chain inet weft base_in
add rule inet weft base_in iifname { \"lo\", \"wl*\" } accept
add rule inet weft base_in tcp dport 80 drop
"
        );
    }

    #[test]
    fn what_can_not_be_changed_wants_the_whole_table() {
        assert_eq!(
            commands(&TEXT.replace("policy drop", "policy accept")),
            None
        );
        assert_eq!(
            commands(&TEXT.replace("type ipv4_addr", "type ipv6_addr")),
            None
        );
        let ranges = "set nets { type ipv4_addr; flags interval; elements = { 192.0.2.0/25 }; }";
        let (old, wider) = (ranges, ranges.replace("/25", "/24"));
        let (old, wider) = (Table::read(old).unwrap(), Table::read(&wider).unwrap());
        assert_eq!(old.commands_to(&wider), None);
        assert_eq!(old.commands_to(&old).as_deref(), Some(""));
    }
}
