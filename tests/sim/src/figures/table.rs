//! Figures as Markdown.

use std::fmt;

/// One table with what a reader must know to make it again.
pub(super) struct Table {
    pub(super) title: &'static str,
    /// What was done, with which seeds.
    pub(super) how: String,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(
        title: &'static str,
        how: impl Into<String>,
        columns: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            title,
            how: how.into(),
            columns: columns.into_iter().map(Into::into).collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        super::progress(&format!("  {}", cells.join(" | ")));
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## {}\n\n{}\n", self.title, self.how)?;
        writeln!(f, "| {} |", self.columns.join(" | "))?;
        writeln!(f, "|{}", "---|".repeat(self.columns.len()))?;
        for row in &self.rows {
            writeln!(f, "| {} |", row.join(" | "))?;
        }
        Ok(())
    }
}

/// Trials of one kind: how long each took, and how many never came to their end.
#[derive(Clone, Debug, Default)]
pub struct Times {
    sorted: Vec<f64>,
    /// Trials that were given up.
    pub never: usize,
}

impl FromIterator<Option<f64>> for Times {
    fn from_iter<I: IntoIterator<Item = Option<f64>>>(trials: I) -> Self {
        let mut times = Self::default();
        for trial in trials {
            match trial {
                Some(time) => times.sorted.push(time),
                None => times.never += 1,
            }
        }
        times.sorted.sort_by(f64::total_cmp);
        times
    }
}

impl Times {
    /// How many came to their end.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The time within which this share of all trials came to its end; infinite for one that didn't.
    pub fn within(&self, share: f64) -> f64 {
        let all = self.len() + self.never;
        let index = ((all as f64 * share).ceil() as usize).saturating_sub(1);
        self.sorted.get(index).copied().unwrap_or(f64::INFINITY)
    }

    pub(super) fn median_and_p99(&self, digits: usize) -> String {
        format!(
            "{:.digits$} / {:.digits$}",
            self.within(0.5),
            self.within(0.99)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_without_an_end_is_the_longest() {
        let times: Times = [Some(2.0), None, Some(1.0), Some(3.0)]
            .into_iter()
            .collect();
        assert_eq!(times.within(0.5), 2.0);
        assert_eq!(times.within(0.75), 3.0);
        assert!(times.within(0.99).is_infinite());
    }
}
