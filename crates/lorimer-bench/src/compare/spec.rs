//! What is compared, and the runs that follow from it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use lorimer_adapter::methods;
use lorimer_model::files::read_bounded;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most runs of one comparison.
const MAX_RUNS: usize = 10_000;

/// What is compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Alias, hub id, folder or .gguf file.
    #[serde(default = "default_model")]
    pub model: String,
    /// The tasks.
    pub tasks: Vec<Task>,
    /// Rows of plain text whose loss shows what is forgotten.
    pub general: Option<PathBuf>,
    /// The methods.
    pub methods: Vec<MethodSpec>,
    /// Seeds of the runs.
    pub seeds: Vec<u64>,
    /// Optimiser steps of a run.
    pub steps: usize,
    /// Rows of a step.
    #[serde(default = "default_batch")]
    pub batch_size: usize,
    /// `all-linear`, a list or a pattern.
    #[serde(default = "default_targets")]
    pub target_modules: Value,
    /// Steps over which the rate rises, as a share of all steps, rounded up [default: a twentieth of the steps, rounded down].
    pub warmup_ratio: Option<f64>,
    /// Label smoothing in training, as `train --label-smoothing`.
    #[serde(default)]
    pub label_smoothing: f64,
    /// How learning rates are chosen.
    pub sweep: Option<Sweep>,
}

fn default_model() -> String {
    "smollm2-135m".into()
}
fn default_batch() -> usize {
    8
}
fn default_targets() -> Value {
    "all-linear".into()
}
fn default_extensions() -> usize {
    4
}

/// The next number above or below in the series …, 1, 2, 5, 10, …
fn next_rate(rate: f64, up: bool) -> Option<f64> {
    let exponent = rate.log10().floor() as i32;
    let near = (exponent - 1..=exponent + 1).flat_map(|e| [1, 2, 5].map(|m| format!("{m}e{e}")));
    let mut near = near.filter_map(|text| text.parse::<f64>().ok()).filter(|r| r.is_finite() && *r > 0.0);
    // Rates that only rounding tells apart are the same.
    if up { near.find(|r| *r > rate * 1.001) } else { near.take_while(|r| *r < rate * 0.999).last() }
}

/// The rate to try next where the best of those tried (rate and loss, none for one that diverged) is the lowest or the highest of them.
pub fn beyond(tried: &[(f64, Option<f64>)]) -> Option<f64> {
    let mut tried = tried.to_vec();
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (lowest, highest) = (tried.first()?.0, tried.last()?.0);
    let known = tried.iter().filter_map(|(rate, loss)| Some((*rate, (*loss)?)));
    match known.min_by(|a, b| a.1.total_cmp(&b.1)) {
        Some((best, _)) if best == highest => next_rate(highest, true),
        Some((best, _)) if best != lowest => None,
        _ => next_rate(lowest, false),
    }
}

/// Rows to learn from and rows to measure on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Short name.
    pub name: String,
    /// Training rows.
    pub data: PathBuf,
    /// Rows that are measured.
    pub eval: PathBuf,
    /// Only the first of them.
    pub eval_limit: Option<usize>,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MethodSpec {
    /// Name of the line.
    pub name: String,
    /// The method's name in the registry [default: the line's].
    pub method: Option<String>,
    /// Its settings.
    #[serde(default)]
    pub set: Map<String, Value>,
    /// The learning rate, if it is not swept.
    pub lr: Option<f64>,
    /// Rates to sweep over, in place of the sweep's.
    pub rates: Option<Vec<f64>>,
    /// What it mixes, if it is a mixture (`xlora`).
    pub experts: Option<Experts>,
}

/// The experts of a mixture: LoRAs trained first, one a task, with the seed of the run that mixes them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// The tasks by name, in the experts' order.
    pub tasks: Vec<String>,
    /// Settings of the LoRAs.
    #[serde(default)]
    pub set: Map<String, Value>,
    /// Their learning rate [default: LoRA's].
    pub lr: Option<f64>,
    /// Their steps [default: the comparison's].
    pub steps: Option<usize>,
}

impl MethodSpec {
    /// The registry's name.
    pub fn method(&self) -> &str {
        self.method.as_deref().unwrap_or(&self.name)
    }
}

/// How learning rates are chosen: the lowest loss on rows of the training file that the sweep does not train on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// The task of the sweep.
    pub task: String,
    /// Optimiser steps of each run.
    pub steps: usize,
    /// The rates.
    pub rates: Vec<f64>,
    /// Last rows of the training file, measured and not trained on.
    pub held_out: usize,
    /// While a method's best rate is the lowest or the highest that was tried, the next one beyond it is tried too, at most so often.
    #[serde(default = "default_extensions")]
    pub extensions: usize,
}

/// One run, as a process of its own does it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// The base.
    pub model: String,
    /// The task.
    pub task: Task,
    /// With a sweep: rows held out at the end of the training file and measured in place of `task.eval`.
    pub held_out: Option<usize>,
    /// Text for forgetting.
    pub general: Option<PathBuf>,
    /// The registry's name; none for the base alone.
    pub method: Option<String>,
    /// Settings of the method.
    pub set: Map<String, Value>,
    /// Learning rate.
    pub lr: f64,
    /// Seed.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: usize,
    /// Rows of a step.
    pub batch_size: usize,
    /// Steps over which the rate rises [default: a twentieth of the steps].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
    /// Label smoothing in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label_smoothing: Option<f64>,
    /// Folders, beside the run's, of the adapters that it mixes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<String>,
    /// Whether others mix it, so that its adapter stays.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_expert: bool,
}

/// What a run gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunResult {
    /// What was run.
    pub spec: RunSpec,
    /// Why there are no figures, if it failed.
    pub error: Option<String>,
    /// Loss on the measured rows.
    pub loss: Option<f64>,
    /// Choice accuracy, or exact matches where the rows have no few answers.
    pub accuracy: Option<f64>,
    /// Loss on the general text.
    pub general_loss: Option<f64>,
    /// Mean training loss of the last ten steps.
    pub train_loss: Option<f64>,
    /// Training loss of each step.
    #[serde(default)]
    pub losses: Vec<f64>,
    /// Seconds of the steps.
    pub seconds: Option<f64>,
    /// Seconds from the loaded base to the first step: calibration and start.
    pub start_seconds: Option<f64>,
    /// Peak resident bytes until the last step.
    pub peak_bytes: Option<u64>,
    /// Trainable parameters.
    pub trainable_parameters: Option<usize>,
    /// Bytes of adapter_model.safetensors.
    pub file_bytes: Option<u64>,
}

impl RunResult {
    /// Of a run that has not been measured yet.
    pub fn of(spec: RunSpec) -> Self {
        Self {
            spec,
            error: None,
            loss: None,
            accuracy: None,
            general_loss: None,
            train_loss: None,
            losses: Vec::new(),
            seconds: None,
            start_seconds: None,
            peak_bytes: None,
            trainable_parameters: None,
            file_bytes: None,
        }
    }
}

impl RunSpec {
    /// Folder of its adapter where that stays.
    pub fn adapter(&self, line: &str) -> String {
        format!("{}.adapter", self.name(line))
    }

    /// A file name that tells what it is.
    pub fn name(&self, line: &str) -> String {
        let kind = match self.held_out {
            _ if self.is_expert => "expert",
            Some(_) => "sweep",
            None => "run",
        };
        let name = format!("{kind}-{}-{line}-lr{:e}-s{}", self.task.name, self.lr, self.seed);
        name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' }).collect()
    }
}

/// Reads and checks what is to be compared.
pub fn read_spec(path: &Path) -> Result<Spec> {
    let bytes = read_bounded(path, 1 << 20)?;
    let text = String::from_utf8(bytes).map_err(|_| anyhow!("`{}` is not UTF-8 text", path.display()))?;
    let spec: Spec = serde_saphyr::from_str(&text).map_err(|e| {
        let reason = e.to_string();
        anyhow!("`{}` is no comparison: {}", path.display(), reason.lines().next().unwrap_or_default())
    })?;
    let fail = |text: String| Err(anyhow!("`{}`: {text}", path.display()));
    if spec.tasks.is_empty() || spec.methods.is_empty() || spec.seeds.is_empty() {
        return fail("a comparison needs tasks, methods and seeds".into());
    }
    if spec.steps == 0 || spec.batch_size == 0 {
        return fail("`steps` and `batch_size` should be at least 1".into());
    }
    if spec.warmup_ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
        return fail("`warmup_ratio` should be between 0 and 1".into());
    }
    if !(0.0..1.0).contains(&spec.label_smoothing) {
        return fail("`label_smoothing` should be at least 0 and below 1".into());
    }
    let mut names: Vec<&str> = spec.methods.iter().map(|m| m.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
        return fail(format!("two methods are called `{}`", twice[0]));
    }
    for m in &spec.methods {
        let built = methods::build(m.method(), &m.set).with_context(|| format!("method `{}`", m.name))?;
        match &m.experts {
            Some(_) if !built.mixes() => return fail(format!("`{}` mixes no adapters; leave `experts` out", m.name)),
            None if built.mixes() => {
                return fail(format!("`{}` mixes adapters; name their tasks in `experts`", m.name));
            }
            None => {}
            Some(experts) => spec.check_experts(experts).with_context(|| format!("experts of `{}`", m.name))?,
        }
        let rates = m.rates.iter().flatten().chain(&m.lr);
        if let Some(rate) = rates.into_iter().find(|r| !(r.is_finite() && **r > 0.0)) {
            return fail(format!("the rate {rate} of `{}` should be above 0", m.name));
        }
    }
    if let Some(sweep) = &spec.sweep {
        if !spec.tasks.iter().any(|t| t.name == sweep.task) {
            return fail(format!("the sweep's task `{}` is none of the tasks", sweep.task));
        }
        if sweep.rates.is_empty() || sweep.steps == 0 || sweep.held_out == 0 {
            return fail("a sweep needs rates, steps and held_out rows".into());
        }
    }
    let runs = spec.methods.len().saturating_mul(spec.tasks.len()).saturating_mul(spec.seeds.len());
    if runs > MAX_RUNS {
        return fail(format!("{runs} runs, at most {MAX_RUNS} are made"));
    }
    Ok(spec)
}

impl Spec {
    /// A run of a method (or of the base alone) on a task.
    pub fn run(&self, task: &Task, method: Option<&MethodSpec>, lr: f64, seed: u64) -> RunSpec {
        let mut set = method.map(|m| m.set.clone()).unwrap_or_default();
        if let Some(method) = method {
            // What changes blocks, or mixes adapters, has no projections to name.
            if method.experts.is_none() && methods::entry(method.method()).is_ok_and(|entry| entry.kind != "block") {
                set.entry("target_modules").or_insert_with(|| self.target_modules.clone());
            }
            set.extend(self.start_rate(method).filter(|(key, _)| !method.set.contains_key(key)));
        }
        RunSpec {
            model: self.model.clone(),
            task: task.clone(),
            held_out: None,
            general: self.general.clone(),
            method: method.map(|m| m.method().to_string()),
            set,
            lr,
            seed,
            steps: self.steps,
            batch_size: self.batch_size,
            warmup_steps: self.warmup_ratio.map(|_| self.warmup(self.steps)),
            label_smoothing: Some(self.label_smoothing).filter(|smoothing| *smoothing > 0.0),
            experts: self.expert_runs(method, seed).iter().map(|(line, run)| run.adapter(line)).collect(),
            is_expert: false,
        }
    }

    /// The runs whose adapters a run of the method with that seed mixes, and their lines. Mixtures whose experts are alike share them.
    pub fn expert_runs(&self, method: Option<&MethodSpec>, seed: u64) -> Vec<(String, RunSpec)> {
        let Some(experts) = method.and_then(|m| m.experts.as_ref()) else { return Vec::new() };
        let task = |name: &String| self.tasks.iter().find(|task| task.name == *name);
        let lora = MethodSpec {
            name: "lora".into(),
            method: None,
            set: experts.set.clone(),
            lr: experts.lr,
            rates: None,
            experts: None,
        };
        let (lr, steps) = (experts.lr.unwrap_or(methods::lora::ENTRY.lr), experts.steps.unwrap_or(self.steps));
        let settings: String = experts.set.iter().map(|(key, value)| format!("-{key}{value}")).collect();
        let line = format!("lora{settings}-{steps}");
        let of = |task| RunSpec {
            general: None,
            steps,
            warmup_steps: self.warmup_ratio.map(|_| self.warmup(steps)),
            is_expert: true,
            ..self.run(task, Some(&lora), lr, seed)
        };
        experts.tasks.iter().filter_map(task).map(|task| (line.clone(), of(task))).collect()
    }

    fn check_experts(&self, experts: &Experts) -> Result<()> {
        methods::build("lora", &experts.set)?;
        if experts.tasks.is_empty() || experts.steps == Some(0) {
            bail!("a mixture needs at least one task and one step");
        }
        if let Some(name) = experts.tasks.iter().find(|name| !self.tasks.iter().any(|t| t.name == **name)) {
            bail!("`{name}` is none of the tasks");
        }
        match experts.lr.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            Some(rate) => bail!("the rate {rate} should be above 0"),
            None => Ok(()),
        }
    }

    /// Steps of the warm-up of a run of so many steps.
    pub fn warmup(&self, steps: usize) -> usize {
        self.warmup_ratio.map_or(steps / 20, |ratio| (steps as f64 * ratio).ceil() as usize)
    }

    /// The setting of a start that depends on the learning rate (LoRA-SB's). All runs of a line have the same, so that a sweep over
    /// rates does not move the start: the rate of the first step of the comparison's runs at the line's own or the method's shipped rate.
    fn start_rate(&self, method: &MethodSpec) -> Option<(String, Value)> {
        let entry = methods::entry(method.method()).ok()?;
        let (_, key) = entry.flags.iter().find(|(flag, _)| *flag == "lr")?;
        let rate = method.lr.unwrap_or(entry.lr) / self.warmup(self.steps).max(1) as f64;
        Some((key.to_string(), rate.into()))
    }

    /// The rates that a method's sweep begins with; none where its rate is given.
    pub fn grid<'a>(&'a self, method: &'a MethodSpec) -> &'a [f64] {
        match &self.sweep {
            Some(sweep) if method.lr.is_none() => method.rates.as_ref().unwrap_or(&sweep.rates),
            _ => &[],
        }
    }

    /// A run of a method's sweep.
    pub fn sweep_run(&self, method: &MethodSpec, lr: f64) -> Option<RunSpec> {
        let sweep = self.sweep.as_ref()?;
        let task = self.tasks.iter().find(|t| t.name == sweep.task)?;
        Some(RunSpec {
            held_out: Some(sweep.held_out),
            general: None,
            steps: sweep.steps,
            warmup_steps: self.warmup_ratio.map(|_| self.warmup(sweep.steps)),
            ..self.run(task, Some(method), lr, self.seeds[0])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_goes_on_where_its_best_stands_at_an_edge() {
        assert_eq!(next_rate(1e-3, true), Some(2e-3));
        assert_eq!(next_rate(1e-3, false), Some(5e-4));
        assert_eq!(next_rate(3e-3, true), Some(5e-3));
        assert_eq!(next_rate(5e-6, true), Some(1e-5));
        assert_eq!(next_rate(5e-324, false), None);
        let losses = |l: [Option<f64>; 3]| [(1e-3, l[0]), (2e-3, l[1]), (5e-3, l[2])];
        assert_eq!(beyond(&losses([Some(3.0), Some(1.0), Some(2.0)])), None);
        assert_eq!(beyond(&losses([Some(1.0), Some(2.0), Some(3.0)])), Some(5e-4));
        assert_eq!(beyond(&losses([Some(3.0), Some(2.0), Some(1.0)])), Some(1e-2));
        // A rate that diverged is worse than any other, so that 2e-3 lies within.
        assert_eq!(beyond(&losses([Some(3.0), Some(2.0), None])), None);
        assert_eq!(beyond(&losses([Some(3.0), None, None])), Some(5e-4));
        assert_eq!(beyond(&losses([None, None, None])), Some(5e-4));
        // One rate alone is an edge on both sides.
        assert_eq!(beyond(&[(1e-3, Some(1.0))]), Some(2e-3));
        assert_eq!(beyond(&[(1e-3, Some(1.0)), (2e-3, Some(2.0))]), Some(5e-4));
        assert_eq!(beyond(&[]), None);
    }
}
