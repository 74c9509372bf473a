//! `lorimer compare`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use lorimer::adapter::methods;
use lorimer::model::files::{create_folder, read_bounded, read_json, write_atomic, write_json};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::compare_report::{Report, html, markdown};
use crate::{Global, common};

/// Most runs of one comparison.
const MAX_RUNS: usize = 10_000;

/// Compare methods on tasks: one run for each method, task and seed, learning rates swept first, then tables, plots and rank correlations.
/// Runs that are done are not done again
#[derive(Args)]
pub struct Compare {
    /// YAML file of methods, tasks and seeds (bench/compare.yaml is one)
    file: PathBuf,
    /// Folder for runs, table.md, report.html and results.json
    #[arg(long, short, default_value = "results")]
    output: PathBuf,
    /// Do at most so many runs now
    #[arg(long)]
    max_runs: Option<usize>,
    /// Runs at a time, which share the machine's threads. More than one is quicker over all (up to a fifth on two cores), but
    /// then the table's seconds are those of runs that disturb each other. No other figure depends on it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: u16,
}

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

impl RunSpec {
    /// A file name that tells what it is.
    fn name(&self, line: &str) -> String {
        let kind = if self.held_out.is_some() { "sweep" } else { "run" };
        let name = format!("{kind}-{}-{line}-lr{:e}-s{}", self.task.name, self.lr, self.seed);
        name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' }).collect()
    }
}

fn read_spec(path: &Path) -> Result<Spec> {
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
        methods::build(m.method(), &m.set).with_context(|| format!("method `{}`", m.name))?;
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
    fn run(&self, task: &Task, method: Option<&MethodSpec>, lr: f64, seed: u64) -> RunSpec {
        let mut set = method.map(|m| m.set.clone()).unwrap_or_default();
        if let Some(method) = method {
            set.entry("target_modules").or_insert_with(|| self.target_modules.clone());
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
        }
    }

    /// Steps of the warm-up of a run of so many steps.
    fn warmup(&self, steps: usize) -> usize {
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
    fn sweep_run(&self, method: &MethodSpec, lr: f64) -> Option<RunSpec> {
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

    /// Sweeps the rates of every method: first its grid, then beyond that while the best stands at an edge of what was tried.
    fn sweep<'a>(&'a self, runner: &Runner<'_>) -> Result<Vec<(Job<'a>, Option<RunResult>)>> {
        let of = |m: &'a MethodSpec, lr: f64| Some((m.name.as_str(), self.sweep_run(m, lr)?));
        let mut jobs: Vec<Job<'_>> =
            self.methods.iter().flat_map(|m| self.grid(m).iter().filter_map(move |&lr| of(m, lr))).collect();
        let mut all: Vec<(Job<'_>, Option<RunResult>)> = Vec::new();
        for further in (0..=self.sweep.as_ref().map_or(0, |s| s.extensions)).rev() {
            runner.progress.lock().expect("no run panics").total += jobs.len();
            let found = runner.results(&jobs)?;
            all.extend(jobs.into_iter().zip(found));
            let next = |m: &'a MethodSpec| -> Option<Job<'a>> {
                let mine = all.iter().filter(|((line, _), _)| *line == m.name);
                // Nothing is decided while runs of the method are missing.
                let tried: Option<Vec<_>> =
                    mine.map(|((_, run), found)| Some((run.lr, found.as_ref()?.loss))).collect();
                of(m, beyond(&tried?)?)
            };
            jobs = if further > 0 { self.methods.iter().filter_map(next).collect() } else { Vec::new() };
            if jobs.is_empty() {
                break;
            }
            for (line, run) in &jobs {
                tracing::info!(
                    "the best rate of `{line}` stands at the edge of what was tried; trying {:e} too",
                    run.lr
                );
            }
        }
        Ok(all)
    }
}

/// A run and the line of the table that it is for.
type Job<'a> = (&'a str, RunSpec);

/// Does runs that are not done, each in a process of its own.
struct Runner<'a> {
    folder: &'a Path,
    jobs: usize,
    stop: std::sync::Arc<AtomicBool>,
    global: Global,
    clock: Instant,
    progress: Mutex<Progress>,
}

/// How far a comparison is.
struct Progress {
    /// Runs that may still be begun now.
    left: Option<usize>,
    done: usize,
    made: usize,
    total: usize,
}

impl Runner<'_> {
    /// The results of the runs, in their order; None for those that are not to be made now.
    fn results(&self, jobs: &[Job<'_>]) -> Result<Vec<Option<RunResult>>> {
        let mut found: Vec<Option<RunResult>> = jobs.iter().map(|job| self.kept(job)).collect();
        let to_do: Vec<usize> = (0..jobs.len()).filter(|&i| found[i].is_none()).collect();
        self.progress.lock().expect("no run panics").done += jobs.len() - to_do.len();
        let next = Mutex::new(to_do.into_iter());
        let made = Mutex::new(Vec::new());
        let work = || -> Result<()> {
            while !self.stop.load(Ordering::Relaxed) {
                let Some(i) = next.lock().expect("no run panics").next() else { break };
                {
                    let mut progress = self.progress.lock().expect("no run panics");
                    match &mut progress.left {
                        Some(0) => break,
                        Some(left) => *left -= 1,
                        None => (),
                    }
                }
                if let Some(result) = self.make(&jobs[i])? {
                    made.lock().expect("no run panics").push((i, result));
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.jobs).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        for (i, result) in made.into_inner().expect("no run panics") {
            found[i] = Some(result);
        }
        Ok(found)
    }

    fn path(&self, (line, spec): &Job<'_>, end: &str) -> PathBuf {
        self.folder.join(format!("{}.{end}", spec.name(line)))
    }

    /// What was found before.
    fn kept(&self, job: &Job<'_>) -> Option<RunResult> {
        let path = self.path(job, "json");
        let found = path.is_file().then(|| read_json::<RunResult>(&path, 16 << 20).ok()).flatten()?;
        (found.spec == job.1).then_some(found)
    }

    /// Makes a run. None where it was interrupted.
    fn make(&self, job: &Job<'_>) -> Result<Option<RunResult>> {
        let (given, work, path) = (self.path(job, "spec"), self.path(job, "work"), self.path(job, "json"));
        let name = job.1.name(job.0);
        write_json(&given, &job.1)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("compare-run").arg(&given).arg("--work").arg(&work).arg("--result").arg(&path);
        if !self.global.verbose {
            command.arg("--quiet");
        }
        if self.jobs > 1 {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
            command.env("RAYON_NUM_THREADS", (threads / self.jobs).max(1).to_string());
        }
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot start a run")?;
        if self.stop.load(Ordering::Relaxed) || status.code() == Some(130) {
            self.stop.store(true, Ordering::Relaxed);
            return Ok(None);
        }
        if !status.success() || !path.is_file() {
            // The others end what they are at, and begin nothing new.
            self.progress.lock().expect("no run panics").left = Some(0);
            bail!("the run `{name}` failed ({status}); its error stands above");
        }
        let _ = std::fs::remove_file(&given);
        let _ = std::fs::remove_dir_all(&work);
        let found: RunResult = read_json(&path, 16 << 20)?;
        let mut progress = self.progress.lock().expect("no run panics");
        (progress.done, progress.made) = (progress.done + 1, progress.made + 1);
        let (done, total) = (progress.done, progress.total);
        let each = self.clock.elapsed().as_secs_f64() / progress.made as f64;
        let rest = each * total.saturating_sub(done) as f64 / 60.0;
        let figure = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.4}"));
        match &found.error {
            Some(error) => tracing::info!("{done}/{total} {name}: {error}; {rest:.0} min left"),
            None => {
                let (loss, accuracy) = (figure(found.loss), figure(found.accuracy));
                tracing::info!("{done}/{total} {name}: loss {loss}, accuracy {accuracy}; {rest:.0} min left");
            }
        }
        Ok(Some(found))
    }
}

impl Compare {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let spec = read_spec(&self.file)?;
        let folder = self.output.join("runs");
        create_folder(&folder)?;
        let total = spec.tasks.len() + spec.methods.len() * spec.tasks.len() * spec.seeds.len();
        let runner = Runner {
            folder: &folder,
            jobs: self.jobs.into(),
            stop: common::stop_flag(),
            global,
            clock: Instant::now(),
            progress: Mutex::new(Progress { left: self.max_runs, done: 0, made: 0, total }),
        };
        let bases: Vec<Job<'_>> = spec.tasks.iter().map(|task| ("base", spec.run(task, None, 1.0, 0))).collect();
        let mut report = Report::default();
        report.base = runner.results(&bases)?.into_iter().flatten().collect();
        let sweeps = spec.sweep(&runner)?;
        let mut rates: BTreeMap<&str, f64> = BTreeMap::new();
        for method in &spec.methods {
            let mine = || sweeps.iter().filter(|((line, _), _)| *line == method.name);
            if mine().any(|(_, found)| found.is_none()) {
                continue;
            }
            let losses = mine().filter_map(|((_, run), found)| Some((run.lr, found.as_ref()?.loss?)));
            let best = losses.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(lr, _)| lr);
            let shipped = methods::learning_rate(method.method(), &method.set)?;
            rates.insert(&method.name, method.lr.or(best).unwrap_or(shipped));
        }
        report.sweeps = sweeps.into_iter().filter_map(|((line, _), run)| Some((line.to_string(), run?))).collect();
        // Seeds outside, so that an unfinished comparison has every method at least once.
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for &seed in &spec.seeds {
            for task in &spec.tasks {
                let known = spec.methods.iter().filter_map(|m| Some((m, *rates.get(m.name.as_str())?)));
                jobs.extend(known.map(|(m, lr)| (m.name.as_str(), spec.run(task, Some(m), lr, seed))));
            }
        }
        let found = runner.results(&jobs)?;
        report.runs = jobs.iter().zip(found).filter_map(|((line, _), run)| Some((line.to_string(), run?))).collect();
        let total = runner.progress.lock().expect("no run panics").total;
        let missing = total - report.base.len() - report.sweeps.len() - report.runs.len();
        report.finish(&spec, &rates);
        let text = markdown(&spec, &report);
        write_json(&self.output.join("results.json"), &report.json())?;
        write_atomic(&self.output.join("table.md"), text.as_bytes())?;
        write_atomic(&self.output.join("report.html"), html(&spec, &report)?.as_bytes())?;
        let mut json = report.json();
        json["missing_runs"] = missing.into();
        let output = self.output.display();
        common::print(global, &json, || {
            let rest = match missing {
                0 => String::new(),
                n => format!("\n{n} runs are missing; the same command goes on with them.\n"),
            };
            format!("{text}{rest}\nTables, plots and results: {output}/table.md, report.html, results.json")
        })?;
        Ok(if runner.stop.load(Ordering::Relaxed) { ExitCode::from(130) } else { ExitCode::SUCCESS })
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
