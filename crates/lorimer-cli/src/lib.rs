//! What the subcommands of the program share: flags, opening models, adapters and rows, progress, and how a result is printed.

use clap::Args;

pub mod common;
pub mod flags;
pub mod pooling;

/// Flags of every subcommand.
#[derive(Args, Clone, Copy)]
pub struct Global {
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Say less on stderr
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Say more on stderr
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
}
