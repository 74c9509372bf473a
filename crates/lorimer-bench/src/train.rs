//! `lorimer bench train`

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use candle_core::{Tensor, Var};
use clap::{Args, ValueEnum};
use lorimer_adapter::training::AdamWConfig;
use lorimer_adapter::{Adapter, Attached, Step};
use lorimer_model::{BaseModel, Prepared};
use lorimer_tensor::Gradients;
use lorimer_train::run::optimize;
use lorimer_train::run::optimize::clip;
use lorimer_train::run::plan::Work;
use lorimer_train::run::step::{StepLoss, StepOptions, accumulate_gradients, batch_loss};
use lorimer_train::{EncodeOptions, Example, TrainSettings};
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::measure::{answer, median_of, sgemm_rate, short_name};

use lorimer_cli::Global;
use lorimer_cli::common::{self, ModelArgs};
use lorimer_cli::flags::{AdapterArgs, Planned, StepArgs};

/// Each measurement runs in a process of its own, so that its peak memory is its own; measurements and peers alternate
#[derive(Args)]
pub struct BenchTrain {
    #[command(flatten)]
    model: ModelArgs,
    /// What to train on: `dense` (4 rows of 256 random tokens, all supervised) or a file of rows; repeatable
    #[arg(long, default_value = "dense")]
    work: Vec<String>,
    /// Optimiser steps of a measurement; the first is not counted in the speed
    #[arg(long, default_value_t = 12)]
    steps: usize,
    /// Measurements of each; medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Rows in a step
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    step: StepArgs,
    /// Measure the reference form too: candle's own graph, every row whole, nothing in parts
    #[arg(long)]
    reference: bool,
    /// A command that does the same work: it is given WORK, STEPS and BATCH and prints one JSON object with `name`,
    /// `examples_per_second`, `tokens_per_second`, `peak_bytes`; repeatable
    #[arg(long, value_name = "COMMAND")]
    peer: Vec<String>,
    /// Measure once, in this process
    #[arg(long, hide = true)]
    once: bool,
}

/// The first of some measurements, its figures the medians of all.
fn medians(ours: &[Value]) -> Value {
    let mut row = ours[0].clone();
    let fields = [
        "examples_per_second",
        "tokens_per_second",
        "gflops",
        "sgemm_gflops",
        "share_of_sgemm",
        "peak_bytes",
        "forward_seconds",
        "backward_seconds",
        "optimizer_seconds",
    ];
    for field in fields {
        row[field] = json!(median_of(ours, field));
    }
    row
}

/// Medians of a peer, and ours against them.
fn against(work: &str, ours: &[Value], theirs: &[Value]) -> Value {
    let mut peer = json!({ "work": work, "name": theirs[0]["name"] });
    for field in ["examples_per_second", "tokens_per_second", "peak_bytes"] {
        peer[field] = json!(median_of(theirs, field));
    }
    let ratio = |field| median_of(ours, field) / median_of(theirs, field);
    peer["speed_ratio"] = json!(ratio("examples_per_second"));
    peer["memory_ratio"] = json!(ratio("peak_bytes"));
    let losses = |of: &[Value]| of[0]["losses"].as_array().cloned().unwrap_or_default();
    let differences = losses(ours).into_iter().zip(losses(theirs));
    peer["largest_loss_difference"] =
        json!(differences.filter_map(|(a, b)| Some((a.as_f64()? - b.as_f64()?).abs())).fold(0.0, f64::max));
    peer
}

fn shown(rows: &[Value], peers: &[Value]) -> String {
    let mut out = format!(
        "{:<34} {:>10} {:>9} {:>8} {:>8} {:>9}\n",
        "work", "examples/s", "tokens/s", "GFLOP/s", "of sgemm", "peak MB"
    );
    let number = |v: &Value, field: &str| v[field].as_f64().unwrap_or(f64::NAN);
    for row in rows {
        out += &format!(
            "{:<34} {:>10.2} {:>9.0} {:>8.0} {:>7.0}% {:>9.0}\n  forward {:.3} s, backward {:.3} s, optimiser {:.3} s a step; {:.0} of {:.0} token rows computed\n",
            short_name(row["work"].as_str().unwrap_or_default()),
            number(row, "examples_per_second"),
            number(row, "tokens_per_second"),
            number(row, "gflops"),
            100.0 * number(row, "share_of_sgemm"),
            number(row, "peak_bytes") / 1e6,
            number(row, "forward_seconds"),
            number(row, "backward_seconds"),
            number(row, "optimizer_seconds"),
            number(row, "computed_tokens"),
            number(row, "tokens"),
        );
        for peer in peers.iter().filter(|p| p["work"] == row["work"]) {
            out += &format!(
                "  {:<32} {:>10.2} {:>9.0} {:>8} {:>8} {:>9.0}   ours is {:.2} times as fast in {:.2} times the memory; \
                 losses differ by at most {:.1e}\n",
                peer["name"].as_str().unwrap_or("peer"),
                number(peer, "examples_per_second"),
                number(peer, "tokens_per_second"),
                "",
                "",
                number(peer, "peak_bytes") / 1e6,
                number(peer, "speed_ratio"),
                number(peer, "memory_ratio"),
                number(peer, "largest_loss_difference"),
            );
        }
    }
    out.trim_end().to_string()
}

/// What the steps of a measurement come to. The first is not counted but for its loss and its time.
#[derive(Default)]
struct Steps {
    losses: Vec<f64>,
    seconds: Vec<f64>,
    /// Seconds, and rows of data, of those that count.
    counted: f64,
    examples: usize,
    tokens: usize,
    computed: usize,
    supervised: usize,
    forward: f64,
    backward: f64,
    optimizing: f64,
}

impl Steps {
    fn add(&mut self, found: &StepLoss, scale: f64, examples: usize, (step, optimizer): (Instant, Instant)) {
        let counts = !self.losses.is_empty();
        self.losses.push(found.sum * scale);
        self.seconds.push(step.elapsed().as_secs_f64());
        if counts {
            self.counted += step.elapsed().as_secs_f64();
            self.optimizing += optimizer.elapsed().as_secs_f64();
            self.forward += found.forward_seconds;
            self.backward += found.backward_seconds;
            self.tokens += found.tokens;
            self.computed += found.computed;
            self.supervised += found.supervised;
            self.examples += examples;
        }
    }
}

impl BenchTrain {
    /// Measures and prints.
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.steps < 2 || self.rounds == 0 || self.batch_size == 0 {
            bail!("--steps should be at least 2, --rounds and --batch-size at least 1");
        }
        if self.steps > 10_000 || self.rounds > 1000 || self.batch_size > 1 << 16 {
            bail!("--steps should be at most 10000, --rounds at most 1000, --batch-size at most 65536");
        }
        if self.once {
            println!("{}", self.measure(&self.work[0], global)?);
            return Ok(ExitCode::SUCCESS);
        }
        let (mut rows, mut peers) = (Vec::new(), Vec::new());
        for work in &self.work {
            let (ours, theirs) = self.measurements(work)?;
            rows.push(medians(&ours));
            peers.extend(theirs.iter().map(|theirs| against(work, &ours, theirs)));
        }
        let machine = json!({ "threads": rayon::current_num_threads(), "os": std::env::consts::OS, "arch": std::env::consts::ARCH });
        let result = json!({ "rows": rows, "machine": machine, "peers": peers });
        common::print(global, &result, || shown(&rows, &peers))
    }

    /// All measurements of one piece of work, ours and in turn those of each peer and of the reference form.
    fn measurements(&self, work: &str) -> Result<(Vec<Value>, Vec<Vec<Value>>)> {
        let (mut ours, mut theirs) = (Vec::new(), vec![Vec::new(); self.peer.len() + usize::from(self.reference)]);
        for round in 1..=self.rounds {
            tracing::info!("{work}: round {round} of {}", self.rounds);
            ours.push(self.child(work, false)?);
            for (peer, results) in self.peer.iter().zip(&mut theirs) {
                results.push(self.ask(peer, work)?);
            }
            if let Some(results) = theirs.last_mut().filter(|_| self.reference) {
                results.push(self.child(work, true)?);
            }
        }
        Ok((ours, theirs))
    }

    /// This measurement in a process of its own.
    fn child(&self, work: &str, reference: bool) -> Result<Value> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "train", "--once", "-q", "--work", work, "--model"]);
        command.arg(&self.model.model).arg("--dtype");
        command.args(self.model.dtype.to_possible_value().map(|v| v.get_name().to_string()));
        for (flag, value) in [("--steps", self.steps), ("--batch-size", self.batch_size)] {
            command.args([flag, &value.to_string()]);
        }
        if let Some(tokenizer) = &self.model.tokenizer {
            command.arg("--tokenizer").arg(tokenizer);
        }
        command.args(self.adapter.to_flags()).args(self.step.to_flags()).args(reference.then_some("--reference"));
        answer(command, "the measurement")
    }

    fn ask(&self, peer: &str, work: &str) -> Result<Value> {
        let mut words = peer.split_whitespace();
        let mut command = Command::new(words.next().ok_or_else(|| anyhow!("--peer is empty; give a command"))?);
        command.args(words).arg(work).arg(self.steps.to_string()).arg(self.batch_size.to_string());
        answer(command, peer)
    }

    fn rows(&self, work: &str, base: &Prepared) -> Result<(Vec<Example>, usize)> {
        if work == "dense" {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
            let vocabulary = base.config.shape().vocabulary as u32;
            let row = |_| Example {
                tokens: (0..256).map(|_| rng.random_range(3.min(vocabulary - 1)..vocabulary)).collect(),
                supervised: vec![true; 256],
                answer: None,
            };
            return Ok(((0..4 * self.steps).map(row).collect(), 4));
        }
        let options = EncodeOptions { limit: Some(self.batch_size * self.steps), ..Default::default() };
        Ok((common::load_data(Path::new(work), &base.text, &options)?.0, self.batch_size))
    }

    fn measure(&self, work: &str, global: Global) -> Result<Value> {
        let (prepared, pulled) = common::prepare_base(&self.model, global)?;
        let clock = Instant::now();
        let (rows, size) = self.rows(work, &prepared)?;
        let encode_seconds = clock.elapsed().as_secs_f64();
        let method = self.adapter.build(None)?;
        let longest = rows.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
        let independent = method.rows_are_independent() && prepared.config.shape().prefixes_stand(longest);
        let settings = |batch_size| TrainSettings {
            batch_size,
            shuffle: false,
            step: self.step.options(false),
            ..Default::default()
        };
        let planned = Planned {
            prepared: &prepared,
            method: method.as_ref(),
            batch_size: size,
            objective: false,
            attention_gradient: Default::default(),
            work: Box::new(|batch_size| Work::of_rows(&rows, &settings(batch_size), independent)),
        };
        let (plan, checkpointing) = self.step.decide(&planned, self.step.memory_limit)?;
        drop(planned);
        let clock = Instant::now();
        let base = common::load_base(prepared, &pulled)?;
        let load_seconds = clock.elapsed().as_secs_f64();
        let adapter = Adapter::attach(base.model(), method, 0)?;
        let attached = Attached::one(&adapter);
        let parameters = adapter.trainable();
        let options = self.step.options(checkpointing);
        let kind = self.step.optimizer_of(adapter.method.as_ref());
        let mut optimizer = optimize::build(&kind, AdamWConfig::default(), base.model(), &adapter)?;
        let mut sums = Steps::default();
        let steps = rows.len().div_ceil(size);
        for (step, batch) in rows.chunks(size).enumerate() {
            let clock = Instant::now();
            let batch: Vec<&Example> = batch.iter().collect();
            let targets: usize = batch.iter().map(|e| e.targets().count()).sum();
            let on = attached.at(Step::training(step as u64));
            let scale = 1.0 / targets.max(1) as f64;
            let (found, mut gradients) = match self.reference {
                true => reference_step(base.model(), &on, &parameters, &batch, scale)?,
                false => recorded_step(base.model(), &on, &parameters, &batch, scale, options)?,
            };
            let optimizer_clock = Instant::now();
            clip(&mut gradients, 1.0)?;
            optimizer.step(&parameters, &gradients, 5e-4 * (1.0 - step as f64 / self.steps as f64))?;
            sums.add(&found, scale, batch.len(), (clock, optimizer_clock));
        }
        let peak_bytes = common::peak_bytes();
        let rate = sgemm_rate()?;
        // Products with frozen weights, forward and for the inputs' gradients: what every method pays.
        let sizes = |head: bool| -> usize {
            let sites = base.model().projections().into_iter().map(|(site, _)| site);
            sites.filter(|s| s.is_head == head).map(|s| s.inputs * s.outputs).sum()
        };
        let flops = 4.0 * (sums.computed as f64 * sizes(false) as f64 + sums.supervised as f64 * sizes(true) as f64);
        let gflops = flops / sums.counted / 1e9;
        let each = (steps - 1).max(1) as f64;
        Ok(json!({
            "name": if self.reference { "reference form" } else { "lorimer" }, "work": work, "method": self.adapter.method, "rank": self.adapter.rank, "batch_size": size, "steps": steps,
            "storage": base.model().projections().first().map(|(_, p)| p.weight.storage_name()),
            "examples_per_second": sums.examples as f64 / sums.counted, "tokens_per_second": sums.tokens as f64 / sums.counted,
            "tokens": sums.tokens, "computed_tokens": sums.computed, "supervised_tokens": sums.supervised,
            "gflops": gflops, "sgemm_gflops": rate, "share_of_sgemm": gflops / rate, "peak_bytes": peak_bytes,
            "planned_peak_bytes": plan.peak_bytes,
            "load_seconds": load_seconds, "encode_seconds": encode_seconds, "forward_seconds": sums.forward / each,
            "backward_seconds": sums.backward / each, "optimizer_seconds": sums.optimizing / each, "losses": sums.losses,
            "step_seconds": sums.seconds,
        }))
    }
}

/// One step as it is trained.
fn recorded_step(
    model: &dyn BaseModel,
    on: &Attached<'_>,
    parameters: &[(String, &Var)],
    rows: &[&Example],
    scale: f64,
    options: StepOptions,
) -> Result<(StepLoss, Vec<Option<Tensor>>)> {
    let mut sums = Gradients::default();
    let found = accumulate_gradients(model, on, parameters, rows, scale, options, None, &mut sums)?;
    Ok((found, parameters.iter().map(|(_, v)| sums.remove(v.as_tensor())).collect()))
}

/// One step in candle's own graph.
fn reference_step(
    model: &dyn BaseModel,
    on: &Attached<'_>,
    parameters: &[(String, &Var)],
    rows: &[&Example],
    scale: f64,
) -> Result<(StepLoss, Vec<Option<Tensor>>)> {
    let clock = Instant::now();
    let (sum, supervised, tokens) = batch_loss(model, on, rows)?;
    let forward_seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let mut found = (&sum * scale)?.backward()?;
    let gradients = parameters.iter().map(|(_, v)| found.remove(v.as_tensor())).collect();
    let sum = f64::from(sum.to_scalar::<f32>()?);
    let backward_seconds = clock.elapsed().as_secs_f64();
    Ok((
        StepLoss { sum, auxiliary: 0.0, supervised, tokens, computed: tokens, forward_seconds, backward_seconds },
        gradients,
    ))
}
