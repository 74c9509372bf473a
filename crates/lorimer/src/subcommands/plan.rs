//! `lorimer plan`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use lorimer::adapter::Method;
use lorimer::adapter::algebra::slice::pruned_shapes;
use lorimer::model::base::open_weights;
use lorimer::model::files::{MAX_JSON_BYTES, read_json};
use lorimer::model::pull::{PullOptions, pull};
use lorimer::model::{Config, DecoderConfig, LoadDtype};
use lorimer::train::run::attention::AttentionGradient;
use lorimer::train::run::plan::{Plan, Request, Work, plan};
use lorimer::train::{EncodeOptions, TrainSettings};
use serde_json::{Value, json};

use lorimer_bench::measure::sgemm_rate;
use lorimer_cli::Global;
use lorimer_cli::common::{self, DtypeFlag, ModelArgs};
use lorimer_cli::flags::{AdapterArgs, Planned, StepArgs, free_memory, show_bytes};

/// Share of the machine's rate in large products that a whole step reaches: measured by `lorimer bench train`.
const EFFICIENCY: f64 = 0.65;

/// Predict peak memory and time of a training run, and propose settings that fit
#[derive(Args)]
pub struct PlanRun {
    #[command(flatten)]
    model: ModelArgs,
    /// Training rows: the plan then counts what they really need. Without them every row is full and supervised throughout
    #[arg(long, help_heading = "Data")]
    data: Option<PathBuf>,
    /// Longest sequence in tokens
    #[arg(long, default_value_t = 1024, help_heading = "Data", visible_aliases = ["length", "cutoff-len", "sequence-len", "max-seq-length"])]
    max_length: usize,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Rows in one forward and backward
    #[arg(long, default_value_t = 8, help_heading = "Training", visible_aliases = ["per-device-train-batch-size", "micro-batch-size"])]
    batch_size: usize,
    /// Optimiser steps [default: one epoch of --data, else 100]
    #[arg(long, help_heading = "Training")]
    max_steps: Option<usize>,
    /// Passes over --data
    #[arg(
        long,
        default_value_t = 1.0,
        requires = "data",
        help_heading = "Training",
        visible_alias = "num-train-epochs"
    )]
    epochs: f64,
    /// Gradients of attention, as in `lorimer train`
    #[arg(long, value_name = "NAME[:KEY=VALUE,…]", default_value = "exact", help_heading = "Training")]
    attention_grad: AttentionGradient,
    #[command(flatten)]
    step: StepArgs,
    #[command(flatten)]
    pruned: PrunedArgs,
}

/// A pruned model of the base, planned beside it from its config.json alone.
#[derive(Args)]
struct PrunedArgs {
    /// Plan the model that `lorimer prune` would make with this ratio, beside the whole one; config.json is enough
    #[arg(long, help_heading = "Pruned model", value_name = "RATIO")]
    prune_ratio: Option<f64>,
    /// First layers that stay whole
    #[arg(long, default_value_t = 4, help_heading = "Pruned model", requires = "prune_ratio")]
    keep_first: usize,
    /// Last layers that stay whole
    #[arg(long, default_value_t = 2, help_heading = "Pruned model", requires = "prune_ratio")]
    keep_last: usize,
}

impl PlanRun {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.batch_size == 0 || self.batch_size > 1 << 16 || self.max_length == 0 || self.max_length > 1 << 24 {
            bail!("--batch-size should be 1 to 65536 and --max-length 1 to 16777216");
        }
        let method = self.adapter.build(None)?;
        if let Some(ratio) = self.pruned.prune_ratio {
            return self.run_pruned(ratio, method.as_ref(), global);
        }
        let (prepared, pulled) = common::prepare_base(&self.model, global)?;
        self.attention_grad.check_model(prepared.config.decoder("`lorimer plan`")?)?;
        let rows = match &self.data {
            Some(path) => {
                let options = EncodeOptions { max_length: self.max_length, ..Default::default() };
                Some(common::load_data(path, &prepared.text, &options)?.0)
            }
            None => None,
        };
        let settings = |batch_size| TrainSettings {
            batch_size,
            max_steps: self.max_steps,
            epochs: self.epochs,
            step: self.step.options(false),
            ..Default::default()
        };
        settings(self.batch_size).check()?;
        let longest = rows.iter().flatten().map(|e| e.tokens.len()).max().unwrap_or(0);
        let independent = method.rows_are_independent() && prepared.config.shape().prefixes_stand(longest);
        let work = |batch: usize| match &rows {
            Some(rows) => Work::of_rows(rows, &settings(batch), independent),
            None => Work::worst(batch, self.max_length, self.max_steps.unwrap_or(100)),
        };
        let planned = Planned {
            prepared: &prepared,
            objective: method.training().objective.is_some(),
            method: method.as_ref(),
            batch_size: self.batch_size,
            attention_gradient: self.attention_grad,
            work: Box::new(work),
        };
        let limit = self.step.memory_limit.or_else(free_memory);
        let (plan, checkpointing) = self.step.decide(&planned, limit)?;
        let fits = limit.map(|limit| plan.peak_bytes <= limit);
        let proposals = match (fits, limit) {
            (Some(false), Some(limit)) => self.step.proposals(&planned, limit)?,
            _ => Vec::new(),
        };
        let rate = sgemm_rate()?;
        let seconds = plan.flops / (rate * 1e9 * EFFICIENCY);
        let json = json!({
            "peak_bytes": plan.peak_bytes, "seconds": seconds, "breakdown": plan.breakdown, "flops": plan.flops,
            "sgemm_gflops": rate, "trainable_parameters": plan.trainable_parameters, "checkpointing": checkpointing,
            "memory_limit": limit, "fits": fits, "rows": planned_rows(&planned),
            "proposals": proposals.iter().map(|p| json!({ "flags": p.flags, "peak_bytes": p.plan.peak_bytes })).collect::<Vec<_>>(),
        });
        common::print(global, &json, || {
            let mut out = format!(
                "{}, {} trainable parameters, at most {} token rows in a batch\n\n",
                pulled.name,
                common::short(plan.trainable_parameters as usize),
                planned_rows(&planned)
            );
            out += &shown(&plan, checkpointing, seconds);
            match (fits, limit) {
                (Some(true), Some(limit)) => out += &format!("\nfits into {}", show_bytes(limit)),
                (Some(false), Some(limit)) => {
                    out += &format!("\ndoes not fit into {}; smaller:\n", show_bytes(limit));
                    for p in &proposals {
                        out += &format!("  {:>10}  {}\n", show_bytes(p.plan.peak_bytes), p.flags);
                    }
                }
                _ => {}
            }
            out.trim_end().to_string()
        })
    }
}

/// The parts of the memory, and the time.
fn shown(plan: &Plan, checkpointing: bool, seconds: f64) -> String {
    let mut out = String::new();
    for (name, bytes) in plan.breakdown.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
        out += &format!("  {name:<16}{:>10}\n", show_bytes(bytes));
    }
    out += &format!("  {:<16}{:>10}\n", "peak", show_bytes(plan.peak_bytes));
    if checkpointing {
        out += "  (layers are computed again in the backward: --checkpointing)\n";
    }
    out + &format!("  {:<16}{:>10}\n", "time", show_seconds(seconds))
}

/// Bytes a weight of a layer takes, and one of embedding and head.
fn weight_bytes(dtype: DtypeFlag) -> Result<(f64, f64)> {
    Ok(match dtype {
        DtypeFlag::F32 => (4.0, 4.0),
        DtypeFlag::F16 | DtypeFlag::Bf16 => (2.0, 2.0),
        // Half a byte, a byte for each 64 weights and four for each 256 of those.
        DtypeFlag::Nf4 => (0.5 + 1.0 / 64.0 + 4.0 / (64.0 * 256.0), 2.0),
        DtypeFlag::Stored | DtypeFlag::Int8 => {
            bail!("without weights --dtype stored and int8 have no size; choose f32, f16, bf16 or nf4")
        }
    })
}

/// What is planned of one model.
struct Side {
    parameters: u64,
    base_bytes: u64,
    peak_bytes: u64,
    trainable_parameters: u64,
    checkpointing: bool,
}

impl Side {
    fn json(&self, limit: Option<u64>) -> Value {
        json!({
            "parameters": self.parameters, "base_bytes": self.base_bytes, "peak_bytes": self.peak_bytes,
            "trainable_parameters": self.trainable_parameters, "checkpointing": self.checkpointing,
            "fits": limit.map(|limit| self.peak_bytes <= limit),
        })
    }
}

impl PlanRun {
    /// The whole base and the model that is left of it, from the configuration alone.
    fn run_pruned(&self, ratio: f64, method: &dyn Method, global: Global) -> Result<ExitCode> {
        if self.data.is_some() {
            bail!("--prune-ratio plans full rows, from config.json alone; leave --data out");
        }
        let pulled = pull(&self.model.model, PullOptions { refresh: false, progress: common::draws(global) })?;
        let path = pulled.path.join("config.json");
        let config = match pulled.path.is_dir() && path.is_file() {
            true => Config::from_json(&read_json(&path, MAX_JSON_BYTES)?, &path)?,
            false => open_weights(&pulled.path, LoadDtype::F32)?.0,
        };
        let whole = config.decoder("`lorimer plan`")?.clone();
        self.attention_grad.check_model(&whole)?;
        let layers = pruned_shapes(&whole.layers, ratio, (self.pruned.keep_first, self.pruned.keep_last))?;
        let (bytes, head_bytes) = weight_bytes(self.model.dtype)?;
        let limit = self.step.memory_limit;
        let side = |config: DecoderConfig| -> Result<Side> {
            let parameters = config.parameter_count();
            let table = (config.vocab_size as u64) * (config.hidden_size as u64) * if config.tied { 1 } else { 2 };
            let base_bytes = ((parameters - table) as f64 * bytes + table as f64 * head_bytes) as u64;
            let config = Config::Decoder(config);
            let with = |checkpointing| {
                plan(&Request {
                    config: &config,
                    base_bytes: base_bytes as usize,
                    file_bytes: 0,
                    method,
                    work: Work::worst(self.batch_size, self.max_length, self.max_steps.unwrap_or(100)),
                    checkpointing,
                    optimizer: self.step.optimizer_of(method),
                    objective: method.training().objective.is_some(),
                    frozen_cache: self.step.frozen_cache(),
                    attention_gradient: self.attention_grad,
                })
            };
            let (mut plan, mut checkpointing) = (with(self.step.checkpoints())?, self.step.checkpoints());
            if self.step.may_checkpoint() && limit.is_some_and(|limit| plan.peak_bytes > limit) {
                (plan, checkpointing) = (with(true)?, true);
            }
            let trainable_parameters = plan.trainable_parameters;
            Ok(Side { parameters, base_bytes, peak_bytes: plan.peak_bytes, trainable_parameters, checkpointing })
        };
        let pruned = side(DecoderConfig { layers, ..whole.clone() })?;
        let whole = side(whole)?;
        let json = json!({
            "ratio": ratio, "memory_limit": limit, "whole": whole.json(limit), "pruned": pruned.json(limit),
        });
        common::print(global, &json, || {
            let line = |name: &str, a: String, b: String| format!("  {name:<22}{a:>18}{b:>18}\n");
            let bytes = |f: fn(&Side) -> u64| (show_bytes(f(&whole)), show_bytes(f(&pruned)));
            let (base, peak) = (bytes(|s| s.base_bytes), bytes(|s| s.peak_bytes));
            let numbers = |f: fn(&Side) -> u64| (f(&whole).to_string(), f(&pruned).to_string());
            let (all, own) = (numbers(|s| s.parameters), numbers(|s| s.trainable_parameters));
            line("", "whole".into(), "pruned".into())
                + &line("parameters", all.0, all.1)
                + &line("base weights", base.0, base.1)
                + &line("trainable", own.0, own.1)
                + &line("peak of training", peak.0, peak.1)
                + &limit.map_or_else(String::new, |limit| {
                    let fits = |side: &Side| {
                        let again = if side.checkpointing { ", checkpointing" } else { "" };
                        if side.peak_bytes <= limit { format!("yes{again}") } else { format!("no{again}") }
                    };
                    line(&format!("fits into {}", show_bytes(limit)), fits(&whole), fits(&pruned))
                })
        })
    }
}

fn planned_rows(planned: &Planned<'_>) -> usize {
    (planned.work)(planned.batch_size).rows
}

fn show_seconds(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
