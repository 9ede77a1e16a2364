//! How the story is printed.

use std::io::IsTerminal;

use crate::demo::story::Figures;

/// Prints to standard output, or to standard error when that is kept for JSON.
pub(crate) struct Teller {
    to_stderr: bool,
    colour: bool,
}

impl Teller {
    pub(crate) fn new(to_stderr: bool) -> Self {
        let colour = if to_stderr {
            std::io::stderr().is_terminal()
        } else {
            std::io::stdout().is_terminal()
        };
        Self { to_stderr, colour }
    }

    pub(crate) fn line(&self, text: &str) {
        if self.to_stderr {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }

    /// The beginning of a chapter.
    pub(crate) fn chapter(&self, title: &str) {
        self.line("");
        self.line(&self.paint("1;36", title));
    }

    /// A command as a person would type it.
    pub(crate) fn typed(&self, host: &str, command: &str) {
        self.line(&format!(
            "  {} {command}",
            self.paint("1", &format!("{host}#"))
        ));
    }

    /// Something that holds, and was checked.
    pub(crate) fn good(&self, text: &str) {
        self.line(&format!("  {} {text}", self.paint("32", "ok")));
    }

    /// A plain remark.
    pub(crate) fn note(&self, text: &str) {
        self.line(&format!("     {text}"));
    }

    /// The last words.
    pub(crate) fn end(&self, figures: &Figures) {
        self.chapter("In short");
        for line in figures.lines() {
            self.note(&line);
        }
        self.line("");
        self.line("To do the same on real hosts: `weft up` on the first, `weft token`, `weft up --join TOKEN` on the others.");
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
