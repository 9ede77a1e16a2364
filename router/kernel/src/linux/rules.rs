//! The table `inet weft` as it should be: whole, and touched no more than must be.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;

use weft_core::layout::NFT_TABLE;

use super::nfnetlink::{self, TableFamily};
use super::nft::{Where, feed, put};
use crate::error::{Doing, Result};
use crate::table::Table;

/// Keeps the table `inet weft` of one namespace.
#[derive(Debug, Default)]
pub struct Rules {
    last: Option<Laid>,
}

/// What was put, and what it is known by.
#[derive(Debug)]
struct Laid {
    text: String,
    print: Print,
}

/// What the kernel has, but for what it counts.
#[derive(Debug, PartialEq, Eq)]
struct Print {
    /// Of all rules ([`nfnetlink::handles`]).
    handles: Vec<u64>,
    /// A hash of each set's elements, by its name.
    sets: Vec<(String, u64)>,
}

impl Rules {
    /// Brings the table to these fragments in one transaction: nothing where they stand, what differs where others stand
    /// that were put before, all of them where somebody else changed a rule or a set, or nobody knows. What was not changed
    /// goes on counting.
    ///
    /// # Errors
    /// nft can't be run or refuses the text: what stood before stands.
    pub fn keep(&mut self, place: Where<'_>, fragments: &[&str]) -> Result<()> {
        let text = fragments.join("\n");
        // Forgotten until all is done: after a failure nobody knows, and all is put the next time.
        let last = self.last.take().filter(|last| last.stands(place));
        let is_put = match last {
            Some(last) if last.text == text => {
                self.last = Some(last);
                return Ok(());
            }
            Some(last) => change(place, &last.text, &text)?,
            None => false,
        };
        if !is_put {
            put(place, &text)?;
        }
        let print = Print::take(place, &Table::read(&text).unwrap_or_default().collections())?;
        self.last = Some(Laid { text, print });
        Ok(())
    }

    /// Does everything stand that was put last? False after somebody flushed the ruleset.
    pub fn stand(&self, place: Where<'_>) -> bool {
        self.last.as_ref().is_some_and(|last| last.stands(place))
    }
}

impl Laid {
    fn stands(&self, place: Where<'_>) -> bool {
        // A list that is read while somebody changes something else may lack what stands before and after: look twice.
        let sets: Vec<&str> = self.print.sets.iter().map(|(name, _)| &**name).collect();
        let look = || Print::take(place, &sets).is_ok_and(|print| print == self.print);
        !self.print.handles.is_empty() && (look() || look())
    }
}

impl Print {
    /// Reads it, with these sets.
    fn take(place: Where<'_>, sets: &[&str]) -> Result<Self> {
        let read = || -> io::Result<Self> {
            let handles = nfnetlink::handles(TableFamily::Inet, NFT_TABLE)?;
            let sets = sets.iter().map(|name| {
                let elements = nfnetlink::elements(TableFamily::Inet, NFT_TABLE, name)?;
                Ok(((*name).to_owned(), hash(elements)))
            });
            let sets = sets.collect::<io::Result<_>>()?;
            Ok(Self { handles, sets })
        };
        place
            .run(read)?
            .doing(|| "read the nft table inet weft".into())
    }
}

/// The kernel lists them in any order.
fn hash(mut elements: Vec<Vec<u8>>) -> u64 {
    elements.sort_unstable();
    let mut hasher = DefaultHasher::new();
    elements.hash(&mut hasher);
    hasher.finish()
}

/// True if it is done: false where only the whole can be put, or what differs is refused because a set is not what it was.
fn change(place: Where<'_>, from: &str, to: &str) -> Result<bool> {
    let (Ok(old), Ok(new)) = (Table::read(from), Table::read(to)) else {
        return Ok(false);
    };
    let Some(commands) = old.commands_to(&new) else {
        return Ok(false);
    };
    Ok(commands.is_empty() || place.run(|| feed(&commands))?.is_ok())
}
