//! weft: one encrypted network with names, virtual addresses and published ports for containers on several hosts.

mod background;
mod cli;
mod client;
mod config;
mod daemon;
mod demo;
mod esp;
mod logfile;
mod lookup;
mod run;
mod show;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output and are a success.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match cli::commands::execute(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weft: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, on one line whatever they contain.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.split(['\n', '\r'])
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}
