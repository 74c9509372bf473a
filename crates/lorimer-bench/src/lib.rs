//! Measurements of Lorimer: `lorimer bench` and `lorimer compare`, as arguments and what they do.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use lorimer_cli::Global;

pub mod compare;
pub mod embed;
pub mod kernels;
pub mod limits;
pub mod measure;
pub mod plan;
pub mod serve;
pub mod switch;
pub mod train;

use embed::BenchEmbed;
use kernels::BenchKernels;
use plan::BenchPlan;
use serve::BenchServe;
use switch::BenchSwitch;
use train::BenchTrain;

/// Measure speed and memory, alone or against a peer
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Training: tokens/s, GFLOP/s, share of the machine's own rate, peak memory, time by stage
    Train(Box<BenchTrain>),
    /// How near `lorimer plan` comes to the measured peak memory, for twelve settings
    Plan(BenchPlan),
    /// Switching sparse adapters under one base, against fusing LoRAs
    Switch(BenchSwitch),
    /// Embedding: texts/s
    Embed(BenchEmbed),
    /// Projections from each way of storage, beside what memory and arithmetic allow
    Kernels(BenchKernels),
    /// Serving: requests/s, tokens/s and latency, for any number of adapters
    Serve(Box<BenchServe>),
}

impl Bench {
    /// Does what was asked for and prints it.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        match self.what {
            What::Train(bench) => bench.run(global),
            What::Plan(bench) => bench.run(global),
            What::Switch(bench) => bench.run(global),
            What::Embed(v) => v.run(global),
            What::Kernels(v) => v.run(global),
            What::Serve(v) => v.run(global),
        }
    }
}
