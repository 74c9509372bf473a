//! `lorimer merge`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::algebra::merge::{merge_to_folder, merge_to_gguf};
use lorimer::adapter::algebra::slice::{Sliced, identity_of, kept_by_masks, slice_to_folder};
use lorimer::adapter::{Pruning, StoredAdapter};
use lorimer::model::LoadDtype;
use lorimer::model::base::open_weights;
use lorimer::model::pull::{PullOptions, Pulled, pull};
use serde_json::json;

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
    /// Take the heads and channels out that the adapter's masks prune (--method loraprune): a smaller dense model with its pruning.json
    #[arg(long)]
    slice: bool,
}

/// What slicing gave, for people.
pub fn show_sliced(s: &Sliced) -> String {
    let kind = if s.uniform { "all layers alike" } else { "layers differ: config.json has layer_shapes" };
    format!(
        "wrote {} with {} of {} parameters ({:.1} %); {:.1} % of the key-value heads and {:.1} % of the channels are gone, {kind}",
        s.output,
        common::short(s.parameters as usize),
        common::short(s.whole_parameters as usize),
        100.0 * s.parameters as f64 / s.whole_parameters as f64,
        100.0 * s.heads_pruned,
        100.0 * s.channels_pruned
    )
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
        if self.slice {
            let sliced = self.sliced(&pulled, &adapters, progress)?;
            bar.finish_and_clear();
            return common::print(global, &sliced, || show_sliced(&sliced));
        }
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
    /// Merges and takes out what the masks prune.
    fn sliced(&self, pulled: &Pulled, adapters: &[(StoredAdapter, f64)], progress: impl FnMut(&str)) -> Result<Sliced> {
        let [(adapter, _)] = adapters else {
            bail!("--slice goes by the masks of one adapter, {} are given", adapters.len())
        };
        if self.output.extension().is_some_and(|e| e == "gguf") {
            bail!("--slice writes a folder, not a .gguf file");
        }
        let (config, weights) = open_weights(&pulled.path, LoadDtype::F32)?;
        let config = config.decoder("--slice")?;
        let identity = identity_of(config, &weights, &pulled.name)?;
        let kept = kept_by_masks(adapter, config)?;
        let settings = json!({ "adapter": adapter.content_id()? });
        let pruning = Pruning::new(config, identity, ("loraprune", settings), kept)?;
        Ok(slice_to_folder(&pulled.path, adapters, &pruning, (&self.output, self.dtype.into()), progress)?)
    }
}
