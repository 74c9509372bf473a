//! `lorimer limits`: on which side of the theory's border the attention heads of a model are (arXiv 2406.03136).

#[cfg(test)]
mod curve;
mod meter;
mod picture;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer_cli::common::{ModelArgs, parse_adapter};
use lorimer_cli::{Global, common};
use lorimer_model::files::write_atomic;
use lorimer_model::{Adaptation, BaseModel, Batch, Frozen, Inference};
use lorimer_tensor::ops::attention::chained::{feature_count, least_degree, operations};
use lorimer_train::EncodeOptions;
use lorimer_train::data::Format;

use self::meter::{Found, HeadNorms, Meter};
use self::report::{HeadReport, LayerReport, LengthReport, Report};

/// Measure the norms of attention heads that decide what their gradient may cost, at several lengths
#[derive(Args)]
pub struct Limits {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, with an optional weight (FOLDER=0.5); repeatable
    #[arg(long, value_parser = parse_adapter)]
    adapter: Vec<(PathBuf, f64)>,
    /// Data file (.jsonl, .json, .csv or .parquet), whose rows are read one after the other
    #[arg(long)]
    data: PathBuf,
    /// Form of the rows: messages, alpaca, sharegpt, prompt-completion, text [default: told by the keys]
    #[arg(long)]
    format: Option<Format>,
    /// Lengths of the sequence in tokens, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    lengths: Vec<usize>,
    /// Largest error of an attention weight, as a share of it, that the degree is chosen for
    #[arg(long, default_value_t = 1e-3)]
    tolerance: f64,
    /// Draw Γ/√ln L of every layer into this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Degrees that are looked at; above, a head is said to have none.
const MOST: usize = 256;

fn of_head(head: usize, n: &HeadNorms, (length, width, tolerance): (usize, usize, f64)) -> HeadReport {
    let degree = least_degree(n.tau_centred, tolerance, MOST);
    let features = degree.and_then(|g| feature_count(width, g));
    let (exact, chained) = operations(length, width, features.unwrap_or(1), true);
    HeadReport {
        head,
        q: n.q,
        k: n.k,
        v: n.v,
        q_change: n.q_change,
        k_change: n.k_change,
        gamma_over_root: n.q.max(n.k) / (length as f64).ln().sqrt(),
        tau: n.tau,
        tau_centred: n.tau_centred,
        degree,
        features,
        exact_operations: exact,
        chained_operations: features.map(|_| chained),
    }
}

/// All heads of a forward over `tokens`.
fn measured(model: &dyn BaseModel, on: &dyn Adaptation, tokens: &[u32], tolerance: f64) -> Result<Vec<LayerReport>> {
    let found = Found::default();
    model.hidden(&Batch::pack([tokens]), &Inference::of(&Meter::new(on, &found)))?;
    let of_layer = |(layer, heads): (usize, Vec<HeadNorms>)| {
        let width = model.shape().layers[layer].head_dim;
        let of = |(head, norms)| of_head(head, norms, (tokens.len(), width, tolerance));
        LayerReport { layer, heads: heads.iter().enumerate().map(of).collect() }
    };
    Ok(found.take().into_iter().map(of_layer).collect())
}

impl Limits {
    fn check(&self) -> Result<()> {
        if let Some(bad) = self.lengths.iter().find(|&&length| !(2..=1 << 20).contains(&length)) {
            bail!("--lengths {bad} should be between 2 and {} tokens", 1 << 20);
        }
        if !(self.tolerance > 0.0 && self.tolerance < 1.0) {
            bail!("--tolerance {} should be above 0 and below 1", self.tolerance);
        }
        match &self.plot {
            Some(path) if path.extension().is_none_or(|end| end != "svg") => {
                bail!("--plot {} should end with .svg", path.display())
            }
            _ => Ok(()),
        }
    }

    /// Does what was asked for and prints it.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        self.check()?;
        let (base, pulled) = common::open_base(&self.model, global)?;
        let decoder = base.config.decoder("`lorimer limits`")?;
        if decoder.attention_cap.is_some() {
            bail!("`lorimer limits` measures products of queries and keys, and this model bounds its scores by a cap");
        }
        let longest = self.lengths.iter().copied().max().unwrap_or_default();
        base.model().check_length(longest).map_err(|e| anyhow::anyhow!("--lengths: {e}"))?;
        let options = EncodeOptions { format: self.format, max_length: 1 << 24, ..Default::default() };
        let (examples, _) = common::load_data(&self.data, &base.text, &options)?;
        let tokens: Vec<u32> = examples.iter().flat_map(|e| e.tokens.iter().copied()).take(longest).collect();
        if tokens.len() < longest {
            bail!(
                "`{}` has {} tokens, and --lengths asks for {longest}; give more rows or a smaller length",
                self.data.display(),
                tokens.len()
            );
        }
        let adapters = common::open_adapters(&base, &self.adapter)?;
        let attached = common::attached(&adapters)?;
        let mut lengths = Vec::new();
        for &length in &self.lengths {
            let tokens = &tokens[..length];
            let adapted = match adapters.is_empty() {
                true => None,
                false => Some(measured(base.model(), &attached, tokens, self.tolerance)?),
            };
            let plain = measured(base.model(), &Frozen, tokens, self.tolerance)?;
            lengths.push(LengthReport { length, root: (length as f64).ln().sqrt(), base: plain, adapted });
        }
        let names = self.adapter.iter().map(|(path, _)| path.display().to_string()).collect();
        let report = Report { model: pulled.name, adapters: names, tolerance: self.tolerance, lengths };
        if let Some(path) = &self.plot {
            let picture = picture::draw(&picture::lines(&report))
                .map_err(|e| anyhow::anyhow!("the plot cannot be drawn: {e}"))?;
            write_atomic(path, picture.as_bytes())?;
        }
        common::print(global, &report, || text(&report))
    }
}

/// A line for each layer: its head with the largest centred τ.
fn text(report: &Report) -> String {
    let mut out = String::new();
    for own in &report.lengths {
        for (name, layers) in [("base", Some(&own.base)), ("with the adapter", own.adapted.as_ref())] {
            let Some(layers) = layers else { continue };
            out += &format!("length {}, √ln L {:.2}, {name}\n", own.length, own.root);
            out += &format!(
                "{:>5}{:>6}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}{:>5}{:>10}{:>10}\n",
                "layer", "head", "|Q|", "|K|", "|V|", "|sXBA|", "Γ/√lnL", "τ", "τ centred", "g", "k", "cost"
            );
            for layer in layers {
                let worst = layer.heads.iter().max_by(|a, b| a.tau_centred.total_cmp(&b.tau_centred));
                let Some(h) = worst else { continue };
                let number = |n: Option<f64>| n.map_or("none".to_string(), |n| format!("{n:.1e}"));
                let degree = h.degree.map_or("none".to_string(), |g| g.to_string());
                out += &format!(
                    "{:>5}{:>6}{:>9.2}{:>9.2}{:>9.2}{:>9.3}{:>9.2}{:>9.2}{:>11.2}{degree:>5}{:>10}{:>10}\n",
                    layer.layer,
                    h.head,
                    h.q,
                    h.k,
                    h.v,
                    h.q_change.max(h.k_change),
                    h.gamma_over_root,
                    h.tau,
                    h.tau_centred,
                    number(h.features.map(|k| k as f64)),
                    number(h.chained_operations.map(|c| c / h.exact_operations)),
                );
            }
        }
    }
    out + "each line is the layer's head with the largest τ of centred keys; cost: multiplications of the chained backward over the exact one's\n"
}
