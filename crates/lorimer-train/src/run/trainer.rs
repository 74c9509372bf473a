//! The training loop.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use lorimer_adapter::training::Optimizer;
use lorimer_adapter::{Adapter, Attached, Named};
use lorimer_model::{BaseModel, TextModel};
use serde::Serialize;

use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::run::beneath::{Beneath, over};
use crate::run::checkpoint::{Checkpoint, State};
use crate::run::evaluate::{Evaluation, evaluate};
use crate::run::frozen::FrozenLower;
use crate::run::log::{Log, Record, plot};
pub use crate::run::settings::TrainSettings;
use crate::run::update::{StepRows, Taken, Updater};

/// What a run works on and where it writes.
pub struct Run<'a> {
    /// The frozen model.
    pub model: &'a dyn BaseModel,
    /// Its tokenizer (for evaluation).
    pub text: &'a TextModel,
    /// Hub id or path of the base, for adapters that are saved on the way.
    pub base_name: &'a str,
    /// The adapter that is trained, freshly attached.
    pub adapter: &'a Adapter,
    /// Adapters at work that stay as they are.
    pub beneath: &'a [Beneath],
    /// Training rows.
    pub train: &'a [Example],
    /// Evaluation rows; may be empty.
    pub eval: &'a [Example],
    /// Label words for choice accuracy; may be empty.
    pub choices: &'a [String],
    /// Settings.
    pub settings: &'a TrainSettings,
    /// Everything that decides the result, to be the same on resumption.
    pub identity: serde_json::Value,
    /// Folder for checkpoints and logs.
    pub folder: &'a Path,
    /// Write a checkpoint every so many steps.
    pub save_steps: Option<usize>,
    /// Checkpoints kept.
    pub save_limit: usize,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Set from outside to stop after the step.
    pub stop: &'a AtomicBool,
}

/// What the loop tells while it runs.
pub enum Event<'a> {
    /// The data are looked at before the adapter is attached.
    Calibrating {
        /// How much is done.
        done: usize,
        /// Of how much.
        total: usize,
    },
    /// Rows whose frozen lower layers have been computed, before the run begins.
    Preparing {
        /// Rows done.
        done: usize,
        /// All rows.
        total: usize,
    },
    /// The run begins at a step of so many.
    Begin {
        /// Steps taken before (resumed).
        step: usize,
        /// All steps.
        total: usize,
    },
    /// A step was taken.
    Step {
        /// Its log record.
        record: &'a Record,
        /// Tokens of the step.
        tokens: usize,
    },
    /// An evaluation was made.
    Evaluated {
        /// Steps taken.
        step: usize,
        /// Its figures.
        evaluation: &'a Evaluation,
    },
}

/// How a run ended.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Steps taken in all, resumed ones included.
    pub steps: usize,
    /// Whether it was stopped from outside before its last step.
    pub interrupted: bool,
    /// Examples seen in this process.
    pub examples: usize,
    /// Tokens seen in this process.
    pub tokens: usize,
    /// Token rows computed in this process; less than the tokens where prefixes were shared.
    pub computed_tokens: usize,
    /// Supervised tokens seen in this process.
    pub supervised_tokens: usize,
    /// Seconds of this process's training steps (evaluation and saving apart).
    pub seconds: f64,
    /// Loss of every step.
    pub losses: Vec<f64>,
    /// Step and loss of the best evaluation.
    pub best: Option<(usize, f64)>,
    /// The last evaluation.
    pub evaluation: Option<Evaluation>,
    /// All log records.
    #[serde(skip)]
    pub history: Vec<Record>,
}

impl Outcome {
    /// Counts a step of this process.
    fn add(&mut self, taken: &Taken, time: Duration) {
        self.examples += taken.examples;
        self.tokens += taken.tokens;
        self.computed_tokens += taken.computed_tokens;
        self.supervised_tokens += taken.supervised_tokens;
        self.seconds += time.as_secs_f64();
    }
}

fn snapshot(adapter: &Adapter) -> Result<BTreeMap<String, Tensor>> {
    adapter.named().into_iter().map(|p| Ok((p.name, p.var.as_tensor().copy()?.detach()))).collect()
}

fn restore(adapter: &Adapter, parameters: &BTreeMap<String, Tensor>) -> Result<()> {
    for Named { name, var, .. } in adapter.named() {
        match parameters.get(&name) {
            Some(t) if t.dims() == var.dims() => var.set(t)?,
            _ => {
                return Err(Error::Settings(format!(
                    "the checkpoint has no fitting `{name}`; was it made with other settings?"
                )));
            }
        }
    }
    Ok(())
}

/// The first setting in which two descriptions of a run differ.
fn difference(a: &serde_json::Value, b: &serde_json::Value) -> Option<String> {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return (a != b).then(|| "settings".into()) };
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let differing = keys.into_iter().find(|k| a.get(*k) != b.get(*k))?;
    let show =
        |v: Option<&serde_json::Value>| v.map_or("nothing".to_string(), |v| v.to_string().chars().take(60).collect());
    Some(format!("`{differing}` was {} and is {}", show(a.get(differing)), show(b.get(differing))))
}

impl Run<'_> {
    /// Runs to the end, to an interruption or to an error. The adapter then holds the result.
    pub fn train(&self, mut progress: impl FnMut(Event<'_>)) -> Result<Outcome> {
        self.settings.check()?;
        let (s, total) = (self.settings, self.settings.total_steps(self.train.len()));
        let mut updater = Updater::new(self.model, (self.adapter, self.beneath), s, self.train.len())?;
        let (mut state, mut best) = self.resumed(updater.optimizer())?;
        if state.step == 0 {
            let micro = s.rows(0, self.train.len(), &mut None);
            updater.check_low_rank(StepRows { train: self.train, micro: &micro, lower: None })?;
        }
        let mut log = Log::open(self.folder, &state.history)?;
        let mut outcome = Outcome { steps: state.step, ..Default::default() };
        let attached = over(self.adapter, self.beneath)?;
        let lower = match s.repeats(self.train.len()) {
            true => {
                let (cache, all) = (s.step.frozen_cache, self.train.len());
                let progress = |done| progress(Event::Preparing { done, total: all });
                FrozenLower::build(self.model, &attached, self.train, s.batch_size, cache, self.folder, progress)?
            }
            false => None,
        };
        progress(Event::Begin { step: state.step, total });
        let mut order = None;
        while state.step < total {
            let clock = Instant::now();
            let micro = s.rows(state.step, self.train.len(), &mut order);
            let rows = StepRows { train: self.train, micro: &micro, lower: lower.as_ref() };
            let last_norm = state.history.iter().rev().find_map(|r| r.gradient_norm).unwrap_or(0.0);
            let taken = updater.step(state.step, rows, last_norm)?;
            let stage = updater.stage_ended(state.step);
            state.step += 1;
            outcome.add(&taken, clock.elapsed());
            let (record, tokens) = (updater.record(state.step, &taken)?, taken.tokens);
            log.write(&record)?;
            progress(Event::Step { record: &record, tokens });
            state.history.push(record);
            if let Some(stage) = stage {
                let folder = self.folder.join("stages").join(stage.to_string());
                self.adapter.to_stored(self.base_name)?.write(&folder, None)?;
            }
            let stopping = self.stop.load(Ordering::Relaxed) && state.step < total;
            let due = |every: Option<usize>| every.is_some_and(|n| state.step.is_multiple_of(n));
            if !self.eval.is_empty() && !stopping && (due(s.eval_steps) || state.step == total) {
                let (record, evaluation) = self.evaluated(&attached, state.step)?;
                log.write(&record)?;
                progress(Event::Evaluated { step: state.step, evaluation: &evaluation });
                if state.best.is_none_or(|(_, loss)| evaluation.loss < loss) {
                    state.best = Some((state.step, evaluation.loss));
                    if s.keep_best {
                        best = snapshot(self.adapter)?;
                    }
                }
                state.history.push(record);
                outcome.evaluation = Some(evaluation);
            }
            if (due(self.save_steps) || stopping) && state.step < total {
                self.save(&state, updater.optimizer(), &best)?;
            }
            if stopping {
                outcome.interrupted = true;
                break;
            }
        }
        if !outcome.interrupted && s.keep_best && !best.is_empty() {
            restore(self.adapter, &best)?;
        }
        plot(self.folder, &state.history, "Training loss")?;
        outcome.steps = state.step;
        outcome.losses = state.history.iter().filter_map(|r| r.loss).collect();
        outcome.best = state.best;
        outcome.history = state.history;
        Ok(outcome)
    }

    /// Where the run begins: at the newest checkpoint, which the adapter and the optimiser then hold, or at step 0. With the best parameters so far.
    fn resumed(&self, optimizer: &mut dyn Optimizer) -> Result<(State, BTreeMap<String, Tensor>)> {
        let found = if self.resume { Checkpoint::newest(self.folder)? } else { None };
        let Some(found) = found else {
            return Ok((State { settings: self.identity.clone(), ..Default::default() }, BTreeMap::new()));
        };
        if let Some(what) = difference(&found.state.settings, &self.identity) {
            return Err(Error::Settings(format!(
                "`{}` was begun with other settings ({what}); resume with the same, or choose another --output",
                self.folder.display()
            )));
        }
        restore(self.adapter, &found.parameters)?;
        optimizer.restore(&found.optimizer)?;
        Ok((found.state, found.best))
    }

    /// What the evaluation rows say after a step, and its record.
    fn evaluated(&self, attached: &Attached<'_>, step: usize) -> Result<(Record, Evaluation)> {
        let evaluation = evaluate(self.model, self.text, attached, self.eval, self.choices, |_| {})?;
        let record = Record {
            step,
            eval_loss: Some(evaluation.loss),
            eval_exact_match: Some(evaluation.exact_match),
            eval_choice_accuracy: evaluation.choice_accuracy,
            ..Default::default()
        };
        Ok((record, evaluation))
    }

    fn save(&self, state: &State, optimizer: &dyn Optimizer, best: &BTreeMap<String, Tensor>) -> Result<()> {
        let checkpoint = Checkpoint {
            state: state.clone(),
            parameters: snapshot(self.adapter)?,
            optimizer: optimizer.state()?.into_iter().collect(),
            best: best.clone(),
        };
        checkpoint.write(self.folder, self.save_limit)?;
        Ok(())
    }
}
