//! `lorimer train`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use lorimer::adapter::Adapter;
use lorimer::adapter::methods::ObjectiveChoice;
use lorimer::adapter::training::AdamWConfig;
use lorimer::train::data::Format;
use lorimer::train::run::attention::AttentionGradient;
use lorimer::train::run::beneath::Beneath;
use lorimer::train::run::plan::Work;
use lorimer::train::run::schedule::Shape;
use lorimer::train::{EncodeOptions, Event, Outcome, Session, TooLong, TrainSettings};
use serde_json::{Value, json};

use lorimer_cli::common::{ModelArgs, parse_adapter};
use lorimer_cli::flags::{AdapterArgs, Planned, StepArgs, file_name, show_bytes};
use lorimer_cli::{Global, common, host};

#[derive(Clone, Copy, ValueEnum)]
enum ScheduleFlag {
    /// Straight to zero
    Linear,
    /// Half a cosine to zero
    Cosine,
    /// Stays
    Constant,
}

#[derive(Clone, Copy, ValueEnum)]
enum TooLongFlag {
    /// Cut at the end
    Cut,
    /// Leave the row out
    Drop,
}

/// Fine-tune an adapter. The output is a folder that Python's PEFT loads
#[derive(Args)]
pub struct Train {
    /// YAML or JSON file with these flags as keys; flags given here win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,

    /// Training rows: .jsonl, .json, .csv or .parquet
    #[arg(long, help_heading = "Data")]
    data: PathBuf,
    /// Rows to evaluate on
    #[arg(long, help_heading = "Data")]
    eval_data: Option<PathBuf>,
    /// Form of the rows: messages, alpaca, sharegpt, prompt-completion, text [default: told by the keys]
    #[arg(long, help_heading = "Data")]
    format: Option<Format>,
    /// Only the first rows
    #[arg(long, help_heading = "Data")]
    limit: Option<usize>,
    /// Longest sequence in tokens
    #[arg(long, default_value_t = 1024, help_heading = "Data", visible_aliases = ["cutoff-len", "sequence-len", "max-seq-length"])]
    max_length: usize,
    /// What happens to longer rows
    #[arg(long, value_enum, default_value = "cut", help_heading = "Data")]
    too_long: TooLongFlag,
    /// Learn the prompts too, not only the answers
    #[arg(long, help_heading = "Data")]
    train_on_prompt: bool,
    /// Count bad rows instead of stopping at the first
    #[arg(long, help_heading = "Data")]
    skip_bad_rows: bool,

    #[command(flatten)]
    adapter: AdapterArgs,
    /// Adapter folder, with an optional weight (FOLDER=0.5), that is at work and stays as it is while the new one is trained on top of it; repeatable
    #[arg(long, value_name = "FOLDER[=WEIGHT]", value_parser = parse_adapter, help_heading = "Adapter")]
    beneath: Vec<(PathBuf, f64)>,

    /// Highest learning rate [default: the method's own; `lorimer methods` shows it]
    #[arg(long, help_heading = "Training", visible_alias = "learning-rate")]
    lr: Option<f64>,
    /// Passes over the data
    #[arg(long, default_value_t = 1.0, help_heading = "Training", visible_alias = "num-train-epochs")]
    epochs: f64,
    /// Optimiser steps, in place of --epochs
    #[arg(long, help_heading = "Training")]
    max_steps: Option<usize>,
    /// Rows in one forward and backward
    #[arg(long, default_value_t = 8, help_heading = "Training", visible_aliases = ["per-device-train-batch-size", "micro-batch-size"])]
    batch_size: usize,
    /// Forwards and backwards in one step
    #[arg(long, default_value_t = 1, help_heading = "Training", visible_alias = "gradient-accumulation-steps")]
    gradient_accumulation: usize,
    /// Steps over which the rate rises
    #[arg(long, default_value_t = 0, help_heading = "Training")]
    warmup_steps: usize,
    /// The same as a share of all steps, rounded up
    #[arg(long, default_value_t = 0.0, help_heading = "Training")]
    warmup_ratio: f64,
    /// Shape of the rate after that
    #[arg(long, value_enum, default_value = "linear", help_heading = "Training", visible_alias = "lr-scheduler-type")]
    schedule: ScheduleFlag,
    /// Label smoothing as in transformers: so much of the loss is the mean over the vocabulary
    #[arg(long, default_value_t = 0.0, help_heading = "Training", visible_alias = "label-smoothing-factor")]
    label_smoothing: f64,
    /// AdamW's decoupled weight decay; biases and norms have none
    #[arg(long, default_value_t = 0.0, help_heading = "Training")]
    weight_decay: f64,
    /// LoRA+: what the rate of B is multiplied by (16 in the paper)
    #[arg(long, value_name = "RATIO", help_heading = "Training")]
    loraplus_lr_ratio: Option<f64>,
    /// Further terms of the loss: ba-lora, with settings behind it (ba-lora:lambda1=1e-4,task=nlu) [default: the method's own]
    #[arg(long, value_name = "NAME[:KEY=VALUE,…]", help_heading = "Training")]
    objective: Option<ObjectiveChoice>,
    /// Gradients of attention: exact, or lowrank (experimental) where a bound of the scores allows it, with settings behind it
    /// (lowrank:degree=2,tolerance=0.01,tile=64,check_steps=100)
    #[arg(long, value_name = "NAME[:KEY=VALUE,…]", default_value = "exact", help_heading = "Training")]
    attention_grad: AttentionGradient,
    /// Limit on the gradient's norm; 0 for none
    #[arg(long, default_value_t = 1.0, help_heading = "Training")]
    max_grad_norm: f64,
    /// Seed of start, data order and dropout; the same seed gives the same bytes
    #[arg(long, default_value_t = 0, help_heading = "Training")]
    seed: u64,
    /// Take rows in the file's order
    #[arg(long, help_heading = "Training")]
    no_shuffle: bool,
    /// Evaluate every so many steps (always at the end)
    #[arg(long, help_heading = "Training")]
    eval_steps: Option<usize>,
    /// Keep the adapter of the lowest evaluation loss, not the last
    #[arg(long, help_heading = "Training", requires = "eval_data")]
    keep_best: bool,

    #[command(flatten)]
    step: StepArgs,

    /// Folder for adapter, log, plots and checkpoints
    #[arg(long, short, default_value = "runs/train", help_heading = "Output", visible_alias = "output-dir")]
    output: PathBuf,
    /// Write a checkpoint every so many steps (always on Ctrl-C)
    #[arg(long, help_heading = "Output")]
    save_steps: Option<usize>,
    /// Checkpoints kept
    #[arg(long, default_value_t = 2, help_heading = "Output")]
    save_limit: usize,
    /// Go on where an interrupted run in --output stopped, to the same bytes
    #[arg(long, help_heading = "Output", visible_alias = "resume-from-checkpoint")]
    resume: bool,
    /// Begin anew though --output holds a run
    #[arg(long, help_heading = "Output", conflicts_with = "resume")]
    overwrite: bool,
}

impl Train {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        let own = self.step.optimizer().and_then(|optimizer| optimizer.0.learning_rate());
        let lr = match self.lr.or(own) {
            Some(lr) => lr,
            None => self.adapter.learning_rate()?,
        };
        // What is wrong with the settings is told before anything is read.
        self.adapter.build(Some(lr))?;
        let mut settings = self.settings(lr);
        settings.check()?;
        let (prepared, pulled) = common::prepare_base(&self.model, global)?;
        self.attention_grad.check_model(prepared.config.decoder("`lorimer train`")?)?;
        let options = self.encoding();
        let (train, _) = common::load_data(&self.data, &prepared.text, &options)?;
        let eval = match &self.eval_data {
            Some(path) => common::load_data(path, &prepared.text, &EncodeOptions { limit: None, ..options })?.0,
            None => Vec::new(),
        };
        let method = self.adapter.build(Some(settings.first_rate(train.len())))?;
        let start = self.adapter.start()?.map(|stored| stored.path);
        let with = |batch_size| TrainSettings { batch_size, ..settings.clone() };
        let longest = train.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
        let independent = method.rows_are_independent() && prepared.config.shape().prefixes_stand(longest);
        let (plan, checkpointing) = self.step.check(&Planned {
            prepared: &prepared,
            method: method.as_ref(),
            batch_size: settings.batch_size,
            objective: settings.objective.is_some() || method.training().objective.is_some(),
            attention_gradient: settings.attention_gradient,
            work: Box::new(|batch_size| Work::of_rows(&train, &with(batch_size), independent)),
        })?;
        let how = if checkpointing { ", computing layers again in the backward" } else { "" };
        tracing::info!("the run is expected to take {} of memory{how}", show_bytes(plan.peak_bytes));
        settings.step = self.step.options(checkpointing);
        let base = common::shared_base(prepared, &pulled)?;
        let session = Session {
            base: &base,
            base_name: &pulled.name,
            train: &train,
            eval: &eval,
            settings,
            start: start.as_deref(),
            output: self.output.clone(),
            save_steps: self.save_steps,
            save_limit: self.save_limit,
            resume: self.resume,
            overwrite: self.overwrite,
            data_names: [Some(&self.data), self.eval_data.as_ref()]
                .into_iter()
                .flatten()
                .filter_map(|path| file_name(path))
                .collect(),
            stop: &common::stop_flag(),
        };
        let below = |(folder, weight): &(PathBuf, f64)| Beneath::read(&base, folder, *weight);
        let beneath = self.beneath.iter().map(below).collect::<Result<Vec<_>, _>>()?;
        let (outcome, adapter) = session.run_over(method, &beneath, progress(global))?;
        if outcome.interrupted {
            let step = outcome.steps;
            let text = format!("interrupted after step {step}; the same command with --resume goes on from there");
            return Ok(common::interrupted(&text));
        }
        let json = result(&session, &outcome, &adapter);
        common::print(global, &json, || shown(&session, &outcome, &adapter))
    }

    /// What the flags say of the run; whether layers are computed again is decided later.
    fn settings(&self, learning_rate: f64) -> TrainSettings {
        TrainSettings {
            learning_rate,
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_size: self.batch_size,
            gradient_accumulation: self.gradient_accumulation,
            warmup_steps: self.warmup_steps,
            warmup_ratio: self.warmup_ratio,
            schedule: match self.schedule {
                ScheduleFlag::Linear => Shape::Linear,
                ScheduleFlag::Cosine => Shape::Cosine,
                ScheduleFlag::Constant => Shape::Constant,
            },
            optimizer: self.step.optimizer(),
            objective: self.objective.clone(),
            loraplus_lr_ratio: self.loraplus_lr_ratio,
            adamw: AdamWConfig { weight_decay: self.weight_decay, ..Default::default() },
            max_grad_norm: self.max_grad_norm,
            label_smoothing: self.label_smoothing,
            attention_gradient: self.attention_grad,
            seed: self.seed,
            shuffle: !self.no_shuffle,
            eval_steps: self.eval_steps,
            keep_best: self.keep_best,
            step: self.step.options(self.step.checkpoints()),
        }
    }

    /// How rows become tokens.
    fn encoding(&self) -> EncodeOptions {
        EncodeOptions {
            format: self.format,
            max_length: self.max_length,
            too_long: match self.too_long {
                TooLongFlag::Cut => TooLong::Cut,
                TooLongFlag::Drop => TooLong::Drop,
            },
            train_on_prompt: self.train_on_prompt,
            skip_bad_rows: self.skip_bad_rows,
            limit: self.limit,
        }
    }
}

/// The same as [`result`], for people.
fn shown(session: &Session<'_>, outcome: &Outcome, adapter: &Adapter) -> String {
    let mut out = format!(
        "adapter    {} ({} trainable parameters)\nsteps      {}, last loss {:.4}\nspeed      {:.1} examples/s, {:.0} tokens/s\n",
        session.output.display(),
        common::short(adapter.parameter_count()),
        outcome.steps,
        outcome.losses.last().unwrap_or(&f64::NAN),
        outcome.examples as f64 / outcome.seconds,
        outcome.tokens as f64 / outcome.seconds,
    );
    if let Some(e) = &outcome.evaluation {
        out += &format!("evaluation loss {:.4}, exact match {:.1} %", e.loss, 100.0 * e.exact_match);
        if let Some(a) = e.choice_accuracy {
            out += &format!(", choice accuracy {:.1} %", 100.0 * a);
        }
    }
    out
}

/// The documented fields of `train --json`.
pub fn result(session: &Session<'_>, outcome: &Outcome, adapter: &Adapter) -> Value {
    let rate = |n: usize| if outcome.seconds > 0.0 { n as f64 / outcome.seconds } else { 0.0 };
    json!({
        "adapter": session.output, "rows": session.train.len(), "steps": outcome.steps, "examples": outcome.examples, "tokens": outcome.tokens,
        "computed_tokens": outcome.computed_tokens,
        "supervised_tokens": outcome.supervised_tokens, "seconds": outcome.seconds,
        "examples_per_second": rate(outcome.examples), "tokens_per_second": rate(outcome.tokens),
        "peak_bytes": common::peak_bytes(), "trainable_parameters": adapter.parameter_count(),
        "loss": outcome.losses.last(), "losses": outcome.losses, "best": outcome.best, "evaluation": outcome.evaluation,
    })
}

/// Shows a run: a bar on a terminal, else a line now and then.
pub fn progress(global: Global) -> impl FnMut(Event<'_>) {
    let template = "{bar:24} {pos}/{len} steps  loss {msg}  {eta} left";
    let bar = common::bar(0, template, global);
    let (mut clock, mut tokens, mut total) = (std::time::Instant::now(), 0usize, 0usize);
    move |event| {
        host::tell(|| told(&event, total));
        match event {
            Event::Calibrating { done, total } => {
                bar.set_length(total as u64);
                bar.set_message("looking at the data");
                bar.set_position(done as u64);
                if bar.is_hidden() && done == total {
                    tracing::info!("looked at the data: {total} of {total}");
                }
            }
            Event::Preparing { done, total } => {
                bar.set_length(total as u64);
                bar.set_message("computing the frozen layers once");
                bar.set_position(done as u64);
            }
            Event::Begin { step, total: all } => {
                total = all;
                clock = std::time::Instant::now();
                if step > 0 {
                    tracing::info!("resuming after step {step} of {all}");
                }
                bar.set_length(all as u64);
                bar.set_position(step as u64);
                bar.reset_eta();
            }
            Event::Step { record, tokens: n } => {
                tokens += n;
                let rate = tokens as f64 / clock.elapsed().as_secs_f64().max(1e-9);
                bar.set_message(format!("{:.4}  {rate:.0} tokens/s", record.loss.unwrap_or_default()));
                bar.set_position(record.step as u64);
                if let (Some(heads), Some(error), Some(bound)) =
                    (record.low_rank_heads, record.low_rank_error, record.low_rank_bound)
                {
                    bar.suspend(|| {
                    tracing::info!(
                        "step {}: low-rank attention gradients in {:.0} % of heads; one of each block held against the exact one: relative error up to {error:.1e}, {:.0} % of its bound",
                        record.step,
                        100.0 * heads,
                        100.0 * bound
                    );
                });
                }
                if bar.is_hidden() && (record.step % (total / 20).max(1) == 0 || record.step == total) {
                    tracing::info!(
                        "step {}/{total}: loss {:.4}, {rate:.0} tokens/s",
                        record.step,
                        record.loss.unwrap_or_default()
                    );
                }
            }
            Event::Evaluated { step, evaluation } => {
                let accuracy = evaluation
                    .choice_accuracy
                    .map_or(String::new(), |a| format!(", choice accuracy {:.1} %", 100.0 * a));
                bar.suspend(|| {
                    tracing::info!(
                        "evaluation after step {step}: loss {:.4}, exact match {:.1} %{accuracy}",
                        evaluation.loss,
                        100.0 * evaluation.exact_match
                    );
                });
            }
        }
    }
}

/// An event as a program around hears it.
fn told(event: &Event<'_>, all: usize) -> Value {
    let of = |kind: &str, step: usize, total: usize| json!({ "kind": kind, "step": step, "total": total });
    match event {
        Event::Calibrating { done, total } => of("calibrating", *done, *total),
        Event::Preparing { done, total } => of("preparing", *done, *total),
        Event::Begin { step, total } => of("begin", *step, *total),
        Event::Step { record, .. } => {
            let mut value = of("step", record.step, all);
            if let Ok(Value::Object(record)) = serde_json::to_value(record) {
                value.as_object_mut().into_iter().for_each(|map| map.extend(record.clone()));
            }
            value
        }
        Event::Evaluated { step, evaluation } => {
            let mut value = of("evaluation", *step, all);
            value["loss"] = evaluation.loss.into();
            value["exact_match"] = evaluation.exact_match.into();
            value["choice_accuracy"] = json!(evaluation.choice_accuracy);
            value
        }
    }
}
