//! `lorimer prune`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use lorimer::adapter::Pruning;
use lorimer::adapter::algebra::slice::{identity_of, keep_important, pruned_shapes, slice_to_folder};
use lorimer::adapter::step::site_seed;
use lorimer::model::{LayerShape, LoadDtype};
use lorimer::train::EncodeOptions;
use lorimer::train::calibrate::units::unit_importance;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use lorimer_cli::common::{DtypeFlag, ModelArgs};
use lorimer_cli::{Global, common};

/// How units are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// By lot, from the seed
    Rand,
    /// By their importance to the loss of --data: weights times gradients (LLM-Pruner)
    Stru,
}

/// Take heads and channels out of a base: a smaller model to train adapters on, which `recover` brings to the whole base (LoRAM)
#[derive(Args)]
pub struct Prune {
    #[command(flatten)]
    model: ModelArgs,
    /// How units are chosen
    #[arg(long, value_enum)]
    method: By,
    /// Share of key-value heads (with their query heads, rounded down) and of channels (rounded up) that every pruned layer loses
    #[arg(long)]
    ratio: f64,
    /// First layers that stay whole
    #[arg(long, default_value_t = 4)]
    keep_first: usize,
    /// Last layers that stay whole
    #[arg(long, default_value_t = 2)]
    keep_last: usize,
    /// Seed of the lot (rand) [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Rows that importance is measured on (stru)
    #[arg(long)]
    data: Option<PathBuf>,
    /// How many of them (stru) [default: 64]
    #[arg(long)]
    samples: Option<usize>,
    /// New folder for the smaller model and its pruning.json
    #[arg(long, short)]
    output: PathBuf,
}

impl Prune {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.output.exists() {
            bail!("`{}` exists; choose another --output", self.output.display());
        }
        match (self.method, &self.data) {
            (By::Rand, Some(_)) => bail!("--method rand looks at no --data; leave it out"),
            (By::Stru, None) => bail!("--method stru measures importance on rows; give them with --data"),
            _ => {}
        }
        match (self.method, self.seed, self.samples) {
            (By::Rand, _, Some(_)) => bail!("--samples is for --method stru; --method rand looks at no rows"),
            (By::Stru, Some(_), _) => bail!("--seed is for --method rand; --method stru draws nothing"),
            (_, _, Some(0)) => bail!("--samples should be at least 1"),
            _ => {}
        }
        if matches!(self.model.dtype, DtypeFlag::Nf4 | DtypeFlag::Int8) {
            bail!(
                "a pruned model is not written in nf4 or int8; choose f32, f16, bf16 or stored, and --dtype when it is used"
            );
        }
        let (prepared, pulled) = common::prepare_base(&self.model, global)?;
        let config = prepared.config.decoder("`lorimer prune`")?.clone();
        let shapes = pruned_shapes(&config.layers, self.ratio, (self.keep_first, self.keep_last))?;
        let identity = identity_of(&config, &prepared.weights, &pulled.name)?;
        let mut settings = json!({ "ratio": self.ratio, "keep_first": self.keep_first, "keep_last": self.keep_last });
        let kept = match &self.data {
            None => {
                settings["seed"] = self.seed.unwrap_or(0).into();
                keep_important(&config.layers, &shapes, |i| Ok(self.lot(i, &config.layers[i])))?
            }
            Some(path) => {
                let samples = self.samples.unwrap_or(64);
                settings["samples"] = samples.into();
                settings["data"] = path.file_name().map(|n| n.to_string_lossy().into_owned()).into();
                let options = EncodeOptions { limit: Some(samples), ..Default::default() };
                let (rows, _) = common::load_data(path, &prepared.text, &options)?;
                let base = common::load_base(prepared, &pulled)?;
                let rows: Vec<_> = rows.iter().collect();
                let bar = common::bar(config.layers.len() as u64, "{bar:24} looking at the data", global);
                let found = unit_importance(base.model(), &rows, 4, |done, _| bar.set_position(done as u64))?;
                bar.finish_and_clear();
                keep_important(&config.layers, &shapes, |i| Ok(found[i].clone()))?
            }
        };
        let method = if self.method == By::Rand { "rand" } else { "stru" };
        let pruning = Pruning::new(&config, identity, (method, settings), kept)?;
        let bar = common::bar(0, "{spinner} {msg}", global);
        let dtype: LoadDtype = self.model.dtype.into();
        let progress = |name: &str| bar.set_message(name.to_string());
        let sliced = slice_to_folder(&pulled.path, &[], &pruning, (&self.output, dtype), progress)?;
        bar.finish_and_clear();
        common::print(global, &sliced, || super::merge::show_sliced(&sliced))
    }

    /// Importance of a layer's heads and channels by lot.
    fn lot(&self, i: usize, layer: &LayerShape) -> (Vec<f64>, Vec<f64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(site_seed(self.seed.unwrap_or(0), &format!("units of layer {i}")));
        let mut draw = |count: usize| (0..count).map(|_| rng.random_range(0.0..1.0)).collect();
        (draw(layer.kv_heads), draw(layer.inner))
    }
}
