//! `lorimer merge`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use lorimer::adapter::StoredAdapter;
use lorimer::adapter::algebra::merge::{merge_to_folder, merge_to_gguf};
use lorimer::model::pull::{PullOptions, pull};

use lorimer_cli::common::{DtypeFlag, parse_adapter};
use lorimer_cli::{Global, common};

/// Merge adapters into the base's weights, tensor by tensor; the base itself stays as it is
#[derive(Args)]
pub struct Merge {
    /// Base model: an alias (smollm2-135m), a Hugging Face hub id, a folder or a .gguf file
    #[arg(long, short, default_value = "smollm2-135m")]
    model: String,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable
    #[arg(long, value_parser = parse_adapter, required = true)]
    adapter: Vec<(PathBuf, f64)>,
    /// Folder for safetensors that transformers loads; or a .gguf file, quantised anew like the base with the error printed
    #[arg(long, short)]
    output: PathBuf,
    /// Type of the written weights when a GGUF base is expanded into a folder
    #[arg(long, value_enum, default_value_t)]
    dtype: DtypeFlag,
}

impl Merge {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let pulled = pull(&self.model, PullOptions { refresh: false, progress: common::draws(global) })?;
        let read = |(path, weight): &(PathBuf, f64)| -> Result<_> { Ok((StoredAdapter::read(path)?, *weight)) };
        let adapters = self.adapter.iter().map(read).collect::<Result<Vec<_>>>()?;
        let bar = common::bar(0, "{spinner} merged {pos} tensors, now {msg}", global);
        let progress = |name: &str| {
            bar.set_message(name.to_string());
            bar.inc(1);
        };
        let merged = match self.output.extension().is_some_and(|e| e == "gguf") {
            true => merge_to_gguf(&pulled.path, &adapters, &self.output, progress)?,
            false => merge_to_folder(&pulled.path, &adapters, &self.output, self.dtype.into(), progress)?,
        };
        bar.finish_and_clear();
        common::print(global, &merged, || {
            format!(
                "merged {} tensors into {} as {}; rounding blurs {:.2e} of the weights and {:.2} % of the change",
                merged.merged_tensors,
                merged.output,
                merged.dtype,
                merged.error,
                100.0 * merged.error_of_change
            )
        })
    }
}
