//! The training loop.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{Tensor, TensorId, Var};
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::step::site_seed;
use lorimer_adapter::training::callback::{self, Callback, Idle, RunShape};
use lorimer_adapter::training::{Moment, Optimizer, ParamGroup};
use lorimer_adapter::{Adapter, Attached, Named, Role, RouteTotals, Step};
use lorimer_model::decoder::EMBEDDING;
use lorimer_model::{BaseModel, TextModel};
use lorimer_tensor::Gradients;
use serde::Serialize;

use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::run::attention;
use crate::run::checkpoint::{Checkpoint, State};
use crate::run::evaluate::{Evaluation, evaluate};
use crate::run::frozen::FrozenLower;
use crate::run::log::{Log, Record, plot};
use crate::run::optimize;
use crate::run::schedule::Schedule;
pub use crate::run::settings::TrainSettings;
use crate::run::step::{StepInputs, accumulate};

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
        let parameters = self.adapter.trainable();
        let named = self.adapter.named();
        let named: Vec<Named<'_>> = named.into_iter().filter(|p| p.role.is_trained()).collect();
        let roles: BTreeMap<&str, (Role, &Var)> = named.iter().map(|p| (p.name.as_str(), (p.role, p.var))).collect();
        let total = self.settings.total_steps(self.train.len());
        let s = self.settings;
        let warmup = s.warmup(self.train.len());
        let schedule = Schedule { peak: s.learning_rate, warmup, total, shape: s.schedule };
        let own = self.adapter.method.training();
        let own_balance = own.router_balance;
        let choice = s.optimizer.clone().or(own.optimizer.map(OptimizerChoice)).unwrap_or_default();
        let mut optimizer = optimize::build(&choice, s.adamw, self.model, self.adapter)?;
        let shape = RunShape { seed: s.seed, steps: total, peak: s.learning_rate };
        let callback =
            own.callback.map_or_else(|| Box::new(Idle) as Box<dyn Callback>, |kind| kind.build(shape, &named));
        self.check_parts(&choice, callback.as_ref(), &named)?;
        let objective = s.objective.as_ref().map(|o| &o.0).or(own.objective.as_ref()).map(|kind| kind.build());
        let per_layer = choice.0.per_layer();
        let modules = self.adapter.sites(self.model);
        let has_units = self.adapter.blocks().any(|(_, delta)| delta.unit_router().is_some());
        let (mut state, mut best) = self.resumed(optimizer.as_mut())?;
        let attached = Attached::one(self.adapter);
        if state.step == 0 {
            self.check_low_rank(&attached, &parameters)?;
        }
        let mut log = Log::open(self.folder, &state.history)?;
        let mut outcome = Outcome { steps: state.step, ..Default::default() };
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
            let supervised: usize = micro.iter().flatten().map(|&i| self.train[i].targets().count()).sum();
            let rows_of_data: usize = micro.iter().map(Vec::len).sum();
            let moment = Moment::new(state.step, total, supervised as f64 / rows_of_data.max(1) as f64);
            let mut sums = Gradients::default();
            let (mut loss, mut auxiliary, mut tokens) = (0.0, 0.0, 0);
            let rate = schedule.rate(state.step);
            let rank = callback.rank(state.step);
            let how = |name: &str| self.param_group(callback.as_ref(), state.step, name, roles.get(name).copied());
            // Stepping layer by layer, nobody knows the whole gradient's norm yet; the last step's has to do.
            let last_norm = state.history.iter().rev().find_map(|r| r.gradient_norm).unwrap_or(0.0);
            let mut layers = 0.0;
            let mut routes = has_units.then(RouteTotals::default);
            let low_rank = s.attention_gradient.low_rank();
            let low_rank =
                low_rank.map(|own| own.at_step(state.step, site_seed(s.seed, &format!("check {}", state.step))));
            for (m, places) in micro.iter().enumerate() {
                let rows: Vec<&Example> = places.iter().map(|&i| &self.train[i]).collect();
                let seed = site_seed(s.seed, &format!("step {} micro {m}", state.step));
                let on = attached.at(Step { training: Some(seed), rank });
                let on = low_rank.as_ref().map_or_else(|| on.clone(), |how| on.with_low_rank_attention(how));
                let scale = 1.0 / supervised.max(1) as f64;
                let own: usize = rows.iter().map(|e| e.targets().count()).sum();
                let mut layer_done = |sums: &mut Gradients| -> Result<()> {
                    let (some, mut gradients): (Vec<_>, Vec<_>) = parameters
                        .iter()
                        .filter(|(name, _)| !self.adapter.parameters().contains_key(name))
                        .filter_map(|(name, var)| Some(((name.clone(), *var), Some(sums.remove(var.as_tensor())?))))
                        .unzip();
                    layers += optimize::squares(&gradients)?;
                    optimize::shrink(&mut gradients, last_norm, s.max_grad_norm)?;
                    Ok(optimizer.step_with(&some, &gradients, &how, rate)?)
                };
                let inputs = StepInputs {
                    lower: lower.as_ref().map(|lower| (lower, places.as_slice())),
                    objective: objective.as_deref().map(|o| (o, own as f64 * scale, moment)),
                    smoothing: s.label_smoothing,
                    routes: routes.as_mut().map(|totals| (totals, own_balance / rows_of_data.max(1) as f64)),
                    layer_done: if per_layer { Some(&mut layer_done) } else { None },
                };
                let found = accumulate(self.model, &on, &parameters, &rows, scale, s.step, inputs, &mut sums)?;
                loss += found.sum * scale;
                auxiliary += found.auxiliary * own as f64 * scale;
                tokens += found.tokens;
                outcome.examples += rows.len();
                outcome.computed_tokens += found.computed;
            }
            if !loss.is_finite() {
                return Err(Error::Diverged(format!(
                    "the loss became {loss} at step {}; lower --lr, or look for damaged data",
                    state.step + 1
                )));
            }
            let mut gradients = Vec::new();
            for Named { var, role, .. } in &named {
                let g = sums.remove(var.as_tensor());
                gradients.push(g.map(|g| callback.gradient(*role, var, g)).transpose()?);
            }
            let norm = optimize::check_norm((layers + optimize::squares(&gradients)?).sqrt())?;
            optimize::shrink(&mut gradients, if per_layer { last_norm } else { norm }, s.max_grad_norm)?;
            if callback.prunes() {
                let of = named.iter().zip(&gradients).filter_map(|(p, g)| Some((p.var.id(), g.as_ref()?)));
                let of: HashMap<TensorId, &Tensor> = of.collect();
                callback.before(state.step, &modules, &|var: &Var| of.get(&var.id()).copied())?;
            }
            optimizer.step_with(&parameters, &gradients, &how, rate)?;
            callback.after(state.step, rate / s.learning_rate, &named)?;
            self.adapter.after_step()?;
            let stage = callback.stage_ended(state.step);
            state.step += 1;
            outcome.tokens += tokens;
            outcome.supervised_tokens += supervised;
            outcome.seconds += clock.elapsed().as_secs_f64();
            let mut record = Record {
                step: state.step,
                loss: Some(loss),
                regularizer: objective.is_some().then_some(auxiliary),
                router_balance: routes.as_ref().map(|r| r.balance / r.samples.max(1) as f64),
                expert_shares: routes.as_ref().map(RouteTotals::shares),
                open_gates: callback::open_gates(&named)?.map(|(open, all)| open as f64 / all as f64),
                rank: rank.map(|r| r.rank),
                learning_rate: Some(rate),
                gradient_norm: Some(norm),
                ..Default::default()
            };
            if let Some(how) = &low_rank {
                attention::record(&how.meter.totals(), &mut record);
            }
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
                self.save(&state, optimizer.as_ref(), &best)?;
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

    /// Refuses low-rank gradients of attention that no head would take, by forwards and backwards of the first step's rows, before anything is written.
    fn check_low_rank(&self, attached: &Attached<'_>, parameters: &[(String, &Var)]) -> Result<()> {
        let s = self.settings;
        let Some(own) = s.attention_gradient.low_rank() else { return Ok(()) };
        let how = own.at_step(0, s.seed);
        // Not as in training: what is counted there does not hear of it.
        let on = attached.with_low_rank_attention(&how);
        for places in s.rows(0, self.train.len(), &mut None) {
            let rows: Vec<&Example> = places.iter().map(|&i| &self.train[i]).collect();
            let (inputs, mut sums) = (StepInputs::default(), Gradients::default());
            accumulate(self.model, &on, parameters, &rows, 1.0, s.step, inputs, &mut sums)?;
            if how.meter.totals().low_rank > 0 {
                break;
            }
        }
        own.check_use(&how.meter.totals(), self.model.dtype())
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

    /// Refuses parts that do not go together.
    fn check_parts(&self, choice: &OptimizerChoice, callback: &dyn Callback, parameters: &[Named<'_>]) -> Result<()> {
        let (s, method) = (self.settings, self.adapter.method.name());
        let fail = |text: String| Err(Error::Settings(text));
        if s.loraplus_lr_ratio.is_some() && !parameters.iter().any(|p| p.role == Role::B) {
            return fail(format!("--loraplus-lr-ratio is for methods that train LoRA's B, and `{method}` does not"));
        }
        if callback.steps_rows_apart() && !choice.is_adamw() {
            return fail(format!(
                "`{method}` steps rows of A and B apart, which --optimizer {} cannot; use adamw",
                choice.0.name()
            ));
        }
        if callback.prunes() && (choice.0.per_layer() || s.keep_best) {
            let what = if s.keep_best { "--keep-best would take an earlier one" } else { "per_layer drops gradients" };
            return fail(format!("`{method}` prunes by whole gradients until its end, and {what}; leave it out"));
        }
        if self.adapter.router().is_some() && !choice.0.takes_any_parameter() {
            return fail(format!(
                "`{method}` trains a head that belongs to no projection, which --optimizer {} cannot; use adamw",
                choice.0.name()
            ));
        }
        if choice.0.per_layer() && s.gradient_accumulation > 1 {
            return fail(
                "galore with per_layer drops each layer's gradient at once; use --gradient-accumulation 1".into(),
            );
        }
        Ok(())
    }

    /// How a parameter is stepped.
    fn param_group(
        &self,
        callback: &dyn Callback,
        step: usize,
        name: &str,
        parameter: Option<(Role, &Var)>,
    ) -> lorimer_adapter::Result<ParamGroup> {
        let missing = || lorimer_adapter::Error::Config(format!("`{name}` is no parameter of the adapter"));
        let (role, var) = parameter.ok_or_else(missing)?;
        // As the reference groups them: B, and every vector (biases, magnitudes, norms), but not SoRA's gates.
        let faster = role == Role::B || (var.dims().len() == 1 && role != Role::Gate);
        let plus = self.settings.loraplus_lr_ratio.filter(|_| faster).unwrap_or(1.0);
        Ok(ParamGroup {
            rate: callback.rate(role) * plus,
            decay: callback.decays(role) && optimize::decays(name),
            rows: callback.rows(step, role),
            row_scale: callback.row_scale(role, var)?,
            projected: role != Role::Whole,
            // As in bitsandbytes under transformers.
            eight_bit: name != EMBEDDING,
        })
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
