//! `lorimer merge`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::algebra::combine::{COMBINATIONS, Combined, Request, combine};
use lorimer::adapter::algebra::merge::{merge_to_folder, merge_to_gguf};
use lorimer::adapter::algebra::slice::{Sliced, identity_of, kept_by_masks, slice_to_folder};
use lorimer::adapter::{Pruning, StoredAdapter};
use lorimer::model::LoadDtype;
use lorimer::model::base::open_weights;
use lorimer::model::pull::{PullOptions, Pulled, pull};
use serde_json::{Map, Value, json};

use lorimer_cli::common::{DtypeFlag, parse_adapter};
use lorimer_cli::{Global, common};

/// Merge adapters into the base's weights (`--adapter a/ --output merged/`), or combine adapters into one without a base
/// (`a/ b/ --method ties --density 0.5 --output c/`); what was there stays as it is
#[derive(Args)]
#[command(after_help = combinations())]
pub struct Merge {
    /// Adapter folders to combine into one adapter, each with an optional weight (FOLDER=-1)
    #[arg(value_name = "FOLDER[=WEIGHT]", value_parser = parse_weighted, help_heading = "Into one adapter")]
    adapters: Vec<(PathBuf, Option<f64>)>,
    /// How they are combined; the list is below
    #[arg(long, value_name = "NAME", help_heading = "Into one adapter")]
    method: Option<String>,
    /// Weights of the adapters in their order [default: 1 each; one over their number for dense and tensors]
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true, help_heading = "Into one adapter")]
    weights: Vec<f64>,
    /// Share of values that is kept, above 0 and at most 1
    #[arg(long, allow_hyphen_values = true, help_heading = "Into one adapter")]
    density: Option<f64>,
    /// Whose sign wins: total or frequency
    #[arg(long, value_name = "NAME", help_heading = "Into one adapter")]
    majority_sign_method: Option<String>,
    /// Largest rank of the result; of lego its rank
    #[arg(long, visible_alias = "svd-rank", help_heading = "Into one adapter")]
    rank: Option<usize>,
    /// Seed of random masks (torch's, projection by projection) and of clusters
    #[arg(long, help_heading = "Into one adapter")]
    seed: Option<u64>,
    /// What lego clusters by: raw units, or halves of length 1
    #[arg(long, value_name = "NAME", help_heading = "Into one adapter")]
    features: Option<String>,
    /// A setting of the method: KEY=VALUE; repeatable
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Into one adapter")]
    set: Vec<String>,
    /// Replace the adapter that --output holds
    #[arg(long, help_heading = "Into one adapter")]
    overwrite: bool,
    /// Base model: an alias, a Hugging Face hub id, a folder or a .gguf file [default: smollm2-135m]
    #[arg(long, short, help_heading = "Into a base")]
    model: Option<String>,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable
    #[arg(long, value_parser = parse_adapter, help_heading = "Into a base")]
    adapter: Vec<(PathBuf, f64)>,
    /// Type of the written weights when a GGUF base is expanded into a folder [default: f32]
    #[arg(long, value_enum, help_heading = "Into a base")]
    dtype: Option<DtypeFlag>,
    /// Folder for the adapter; into a base: folder for safetensors that transformers loads, or a .gguf file, quantised anew like the base with
    /// the error printed
    #[arg(long, short)]
    output: PathBuf,
    /// Take the heads and channels out that the adapter's masks prune (--method loraprune): a smaller dense model with its pruning.json
    #[arg(long, help_heading = "Into a base")]
    slice: bool,
}

/// The list of combinations for the help.
fn combinations() -> String {
    let mut out = String::from("What --method takes:\n");
    for c in COMBINATIONS {
        let takes = if c.takes.is_empty() { String::new() } else { format!(" [{}]", c.takes.join(", ")) };
        out += &format!("  {:<20} {}{takes} ({})\n", c.name, c.help, c.source);
    }
    out
}

/// `FOLDER` or `FOLDER=WEIGHT`.
fn parse_weighted(text: &str) -> Result<(PathBuf, Option<f64>), String> {
    match text.contains('=') && !Path::new(text).exists() {
        true => parse_adapter(text).map(|(path, weight)| (path, Some(weight))),
        false => Ok((PathBuf::from(text), None)),
    }
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
        match self.adapters.is_empty() {
            true => self.into_base(global),
            false => self.into_one(global),
        }
    }

    /// Names of the flags of the other form that were given.
    fn strangers(&self, into_base: bool) -> Vec<&'static str> {
        let of_base = [
            ("--model", self.model.is_some()),
            ("--adapter", !self.adapter.is_empty()),
            ("--dtype", self.dtype.is_some()),
            ("--slice", self.slice),
        ];
        let of_one = [
            ("--method", self.method.is_some()),
            ("--weights", !self.weights.is_empty()),
            ("--density", self.density.is_some()),
            ("--majority-sign-method", self.majority_sign_method.is_some()),
            ("--rank", self.rank.is_some()),
            ("--seed", self.seed.is_some()),
            ("--features", self.features.is_some()),
            ("--set", !self.set.is_empty()),
            ("--overwrite", self.overwrite),
        ];
        let flags = if into_base { of_one.to_vec() } else { of_base.to_vec() };
        flags.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    fn into_base(self, global: Global) -> Result<ExitCode> {
        if let Some(flag) = self.strangers(true).first() {
            bail!(
                "{flag} is for combining adapters into one (`lorimer merge a/ b/ --method NAME --output c/`), and no adapter folders are given"
            );
        }
        if self.adapter.is_empty() {
            bail!(
                "nothing to merge: give --adapter FOLDER to merge into a base, or folders and --method NAME to combine adapters into one"
            );
        }
        let model = self.model.as_deref().unwrap_or("smollm2-135m");
        let pulled = pull(model, PullOptions { refresh: false, progress: common::draws(global) })?;
        let read = |(path, weight): &(PathBuf, f64)| -> Result<_> { Ok((StoredAdapter::read(path)?, *weight)) };
        let adapters = self.adapter.iter().map(read).collect::<Result<Vec<_>>>()?;
        let bar = common::bar(0, "{spinner} merged {pos} tensors, now {msg}", global);
        let progress = |name: &str| {
            bar.set_message(name.to_string());
            bar.inc(1);
        };
        let dtype = self.dtype.unwrap_or_default();
        if self.slice {
            let sliced = self.sliced(&pulled, &adapters, progress)?;
            bar.finish_and_clear();
            return common::print(global, &sliced, || show_sliced(&sliced));
        }
        let merged = match self.output.extension().is_some_and(|e| e == "gguf") {
            true => merge_to_gguf(&pulled.path, &adapters, &self.output, progress)?,
            false => merge_to_folder(&pulled.path, &adapters, &self.output, dtype.into(), progress)?,
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
        let dtype = self.dtype.unwrap_or_default();
        Ok(slice_to_folder(&pulled.path, adapters, &pruning, (&self.output, dtype.into()), progress)?)
    }

    /// The flags as the method's settings.
    fn settings(&self) -> Result<Map<String, Value>> {
        let mut map = Map::new();
        for pair in &self.set {
            let Some((key, value)) = pair.split_once('=') else { bail!("--set {pair} should be KEY=VALUE") };
            map.insert(key.to_string(), serde_json::from_str(value).unwrap_or_else(|_| json!(value)));
        }
        let flags = [
            ("density", self.density.map(|v| json!(v))),
            ("majority_sign_method", self.majority_sign_method.as_ref().map(|v| json!(v))),
            ("rank", self.rank.map(|v| json!(v))),
            ("seed", self.seed.map(|v| json!(v))),
            ("features", self.features.as_ref().map(|v| json!(v))),
        ];
        for (key, value) in flags.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            if map.insert(key.into(), value).is_some() {
                bail!("`{key}` is given by a flag and by --set; give it once");
            }
        }
        Ok(map)
    }

    fn into_one(self, global: Global) -> Result<ExitCode> {
        if let Some(flag) = self.strangers(false).first() {
            bail!(
                "{flag} is for merging into a base, and folders are given, which are combined into one adapter; leave out one of both"
            );
        }
        let Some(method) = &self.method else {
            let names: Vec<&str> = COMBINATIONS.iter().map(|c| c.name).collect();
            bail!("--method says how adapters are combined: {}", names.join(", "));
        };
        let settings = self.settings()?;
        let mut adapters = self.adapters.clone();
        if !self.weights.is_empty() {
            if adapters.iter().any(|(_, weight)| weight.is_some()) {
                bail!("weights are given by --weights and by FOLDER=WEIGHT; give them once");
            }
            if self.weights.len() != adapters.len() {
                bail!("{} weights for {} adapters; give one for each", self.weights.len(), adapters.len());
            }
            adapters.iter_mut().zip(&self.weights).for_each(|((_, weight), given)| *weight = Some(*given));
        }
        let bar = common::bar(0, "{spinner} {pos} of {len}: {msg}", global);
        let request = Request {
            adapters: &adapters,
            method,
            settings: &settings,
            output: &self.output,
            overwrite: self.overwrite,
        };
        let combined = combine(&request, |done, all, name| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(name.to_string());
        })?;
        bar.finish_and_clear();
        common::print(global, &combined, || show_combined(&combined))
    }
}

fn show_combined(c: &Combined) -> String {
    let what = if c.rank > 0 {
        format!("{} modules of rank up to {}", c.modules, c.rank)
    } else {
        format!("{} tensors", c.modules)
    };
    let mut out = format!("wrote {what} to {}", c.output);
    match (c.error, &c.worst) {
        (Some(error), Some((module, worst))) if error > 1e-6 => {
            out += &format!(
                "; {} is {:.2} % of the weighted sum away from it, at most {:.2} % ({module})",
                c.method,
                100.0 * error,
                100.0 * worst
            );
        }
        (Some(error), _) => out += &format!("; equal to the weighted sum up to rounding ({error:.0e})"),
        (None, _) if c.rank > 0 => out += "; the weighted sum is 0",
        (None, _) => {}
    }
    for parent in &c.parents {
        out += &format!("\n  {:+} × {} ({})", parent.weight, parent.name, parent.content_id);
        if parent.missing > 0 {
            out += &format!(", which lacks {} of the modules", parent.missing);
        }
    }
    out
}
