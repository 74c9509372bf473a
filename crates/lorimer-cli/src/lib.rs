//! What the subcommands of the program share: flags, opening models, adapters and rows, progress, and how a result is printed.

use clap::Args;

pub mod common;
pub mod flags;
pub mod host;
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
    /// Threads for arithmetic [default: RAYON_NUM_THREADS, else as many as the machine has processors]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}
