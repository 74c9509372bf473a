//! `lorimer recover`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::algebra::recover::recover;
use lorimer::adapter::{Pruning, StoredAdapter};
use serde_json::json;

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
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        let pruning = Pruning::read(&self.pruning)?;
        let stored = StoredAdapter::read(&self.adapter)?;
        let recovered = recover(&stored, &pruning, self.unverified)?;
        recovered.write(&self.output, None)?;
        let count = |s: &StoredAdapter| s.tensors.values().map(candle_core::Tensor::elem_count).sum::<usize>();
        let (before, after) = (count(&stored), count(&recovered));
        let json = json!({
            "output": self.output, "base": pruning.base.name, "tensors": recovered.tensors.len(),
            "parameters": after, "trained_parameters": before,
        });
        common::print(global, &json, || {
            format!(
                "wrote {} tensors to {}: {} numbers for {}, {} of them trained",
                recovered.tensors.len(),
                self.output.display(),
                common::short(after),
                pruning.base.name,
                common::short(before)
            )
        })
    }
}
