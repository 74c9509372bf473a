//! `lorimer recover`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::Pruning;
use lorimer::adapter::algebra::recover::recover;

use lorimer_cli::{Global, common};

/// Make an adapter of a pruned model (`prune`) one of its whole base, by files alone
#[derive(Args)]
pub struct Recover {
    /// Adapter folder, trained on the pruned model
    #[arg(long)]
    adapter: PathBuf,
    /// The pruned model's pruning.json
    #[arg(long)]
    pruning: PathBuf,
    /// Where to write
    #[arg(long, short)]
    output: PathBuf,
    /// Take an adapter that has no lorimer.json by its shapes alone, which do not tell one pruned model from another
    #[arg(long)]
    unverified: bool,
}

impl Recover {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let pruning = Pruning::read(&self.pruning)?;
        let recovered = recover(&self.adapter, &pruning, self.unverified, &self.output)?;
        common::print(global, &recovered, || {
            format!(
                "wrote {} tensors to {}: {} numbers for {}, {} of them trained",
                recovered.tensors,
                recovered.output,
                common::short(recovered.parameters),
                recovered.base,
                common::short(recovered.trained_parameters)
            )
        })
    }
}
