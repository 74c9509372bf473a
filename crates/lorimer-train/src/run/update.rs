//! One optimiser step of a run: from the gradients of its micro-batches to moved parameters.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Tensor, TensorId, Var};
use lorimer_adapter::methods::OptimizerChoice;
use lorimer_adapter::step::site_seed;
use lorimer_adapter::training::callback::{self, Callback, Idle, RunShape};
use lorimer_adapter::training::objective::Objective;
use lorimer_adapter::training::optimizer::Module;
use lorimer_adapter::training::{Moment, Optimizer, ParamGroup};
use lorimer_adapter::{Adapter, Attached, Named, Role, RouteTotals, Step};
use lorimer_model::BaseModel;
use lorimer_model::decoder::EMBEDDING;
use lorimer_tensor::{CheckedGradient, Gradients};

use crate::data::encode::Example;
use crate::error::{Error, Result};
use crate::run::attention;
use crate::run::beneath::{Beneath, over};
use crate::run::frozen::FrozenLower;
use crate::run::log::Record;
use crate::run::optimize;
use crate::run::schedule::Schedule;
use crate::run::settings::TrainSettings;
use crate::run::step::{StepInputs, accumulate};

/// The rows of a step.
#[derive(Clone, Copy)]
pub(crate) struct StepRows<'a> {
    /// All training rows.
    pub train: &'a [Example],
    /// Places among them, micro-batch by micro-batch.
    pub micro: &'a [Vec<usize>],
    /// The frozen lower layers' output for them, where it is kept.
    pub lower: Option<&'a FrozenLower>,
}

/// What came of a step.
#[derive(Default)]
pub(crate) struct Taken {
    /// Mean −log p over its supervised tokens.
    pub loss: f64,
    /// The auxiliary loss.
    pub auxiliary: f64,
    /// Norm of the whole gradient before clipping.
    pub gradient_norm: f64,
    /// Its learning rate.
    pub rate: f64,
    /// Its rank, where one is sampled.
    pub rank: Option<usize>,
    /// Low-rank gradients of attention, where they are asked for.
    pub low_rank: Option<CheckedGradient>,
    /// Routes of blocks' units.
    pub routes: Option<RouteTotals>,
    /// Rows of data.
    pub examples: usize,
    /// Tokens of them.
    pub tokens: usize,
    /// Token rows computed.
    pub computed_tokens: usize,
    /// Supervised tokens.
    pub supervised_tokens: usize,
}

/// How each parameter is stepped.
struct ParamGroups<'a> {
    callback: Box<dyn Callback>,
    parameters: BTreeMap<String, (Role, &'a Var)>,
    /// LoRA+: what the rate of B is multiplied by.
    loraplus_lr_ratio: Option<f64>,
}

impl ParamGroups<'_> {
    fn of(&self, step: usize, name: &str) -> lorimer_adapter::Result<ParamGroup> {
        let missing = || lorimer_adapter::Error::Config(format!("`{name}` is no parameter of the adapter"));
        let &(role, var) = self.parameters.get(name).ok_or_else(missing)?;
        // As the reference groups them: B, and every vector (biases, magnitudes, norms), but not SoRA's gates.
        let faster = role == Role::B || (var.dims().len() == 1 && role != Role::Gate);
        let plus = self.loraplus_lr_ratio.filter(|_| faster).unwrap_or(1.0);
        Ok(ParamGroup {
            rate: self.callback.rate(role) * plus,
            decay: self.callback.decays(role) && optimize::decays(name),
            rows: self.callback.rows(step, role),
            row_scale: self.callback.row_scale(role, var)?,
            projected: role != Role::Whole,
            // As in bitsandbytes under transformers.
            eight_bit: name != EMBEDDING,
        })
    }
}

/// Steps an adapter's parameters: holds the optimiser, the callback and the auxiliary loss of a run from its first step to its last.
pub(crate) struct Updater<'a> {
    model: &'a dyn BaseModel,
    adapter: &'a Adapter,
    settings: &'a TrainSettings,
    attached: Attached<'a>,
    /// Trained parameters, in the adapter's order.
    named: Vec<Named<'a>>,
    /// The same by name, as the optimiser takes them.
    parameters: Vec<(String, &'a Var)>,
    modules: Vec<Module<'a>>,
    schedule: Schedule,
    optimizer: Box<dyn Optimizer>,
    /// Whether the optimiser steps each layer as soon as its gradients are there.
    per_layer: bool,
    groups: ParamGroups<'a>,
    objective: Option<Box<dyn Objective>>,
    /// What the balance of routes is multiplied by in the loss; None: no unit is routed.
    router_balance: Option<f64>,
}

impl<'a> Updater<'a> {
    /// The parts that the settings choose, else the method's own, for a run over `examples` rows. Refuses parts that do not go together.
    pub fn new(
        model: &'a dyn BaseModel,
        (adapter, beneath): (&'a Adapter, &'a [Beneath]),
        settings: &'a TrainSettings,
        examples: usize,
    ) -> Result<Self> {
        let s = settings;
        let named: Vec<Named<'_>> = adapter.named().into_iter().filter(|p| p.role.is_trained()).collect();
        let total = s.total_steps(examples);
        let schedule = Schedule { peak: s.learning_rate, warmup: s.warmup(examples), total, shape: s.schedule };
        let own = adapter.method.training();
        let choice = s.optimizer.clone().or(own.optimizer.map(OptimizerChoice)).unwrap_or_default();
        let optimizer = optimize::build(&choice, s.adamw, model, adapter)?;
        let shape = RunShape { seed: s.seed, steps: total, peak: s.learning_rate };
        let callback =
            own.callback.map_or_else(|| Box::new(Idle) as Box<dyn Callback>, |kind| kind.build(shape, &named));
        check_parts(s, adapter, &choice, callback.as_ref(), &named)?;
        let modules = adapter.sites(model);
        callback.check(&modules)?;
        let objective = s.objective.as_ref().map(|o| &o.0).or(own.objective.as_ref()).map(|kind| kind.build());
        let has_units = adapter.blocks().any(|(_, delta)| delta.unit_router().is_some());
        let groups = ParamGroups {
            callback,
            parameters: named.iter().map(|p| (p.name.clone(), (p.role, p.var))).collect(),
            loraplus_lr_ratio: s.loraplus_lr_ratio,
        };
        Ok(Self {
            model,
            adapter,
            settings,
            attached: over(adapter, beneath)?,
            parameters: named.iter().map(|p| (p.name.clone(), p.var)).collect(),
            named,
            modules,
            schedule,
            optimizer,
            per_layer: choice.0.per_layer(),
            groups,
            objective,
            router_balance: has_units.then_some(own.router_balance),
        })
    }

    /// The optimiser, to be saved with a checkpoint and restored from one.
    pub fn optimizer(&mut self) -> &mut dyn Optimizer {
        self.optimizer.as_mut()
    }

    /// The stage that ends with step `step` (from 0), counted from 1.
    pub fn stage_ended(&self, step: usize) -> Option<usize> {
        self.groups.callback.stage_ended(step)
    }

    /// Takes step `step` (from 0). `last_norm` is the norm of the last step's gradient: an optimiser that goes layer by layer clips by it,
    /// since the norm of this step's whole gradient is not known yet.
    pub fn step(&mut self, step: usize, rows: StepRows<'_>, last_norm: f64) -> Result<Taken> {
        let mut sums = Gradients::default();
        let (mut taken, layers) = self.accumulated(step, rows, last_norm, &mut sums)?;
        if !taken.loss.is_finite() {
            return Err(Error::Diverged(format!(
                "the loss became {} at step {}; lower --lr, or look for damaged data",
                taken.loss,
                step + 1
            )));
        }
        let (callback, limit) = (self.groups.callback.as_ref(), self.settings.max_grad_norm);
        let mut gradients = Vec::new();
        for Named { var, role, .. } in &self.named {
            let g = sums.remove(var.as_tensor());
            gradients.push(g.map(|g| callback.gradient(*role, var, g)).transpose()?);
        }
        taken.gradient_norm = optimize::check_norm((layers + optimize::squares(&gradients)?).sqrt())?;
        optimize::shrink(&mut gradients, if self.per_layer { last_norm } else { taken.gradient_norm }, limit)?;
        if callback.prunes() {
            let of = self.named.iter().zip(&gradients).filter_map(|(p, g)| Some((p.var.id(), g.as_ref()?)));
            let of: HashMap<TensorId, &Tensor> = of.collect();
            callback.before(step, &self.modules, &|var: &Var| of.get(&var.id()).copied())?;
        }
        let how = |name: &str| self.groups.of(step, name);
        self.optimizer.step_with(&self.parameters, &gradients, &how, taken.rate)?;
        callback.after(step, taken.rate / self.settings.learning_rate, &self.named)?;
        self.adapter.after_step()?;
        Ok(taken)
    }

    /// Adds up the gradients of a step's micro-batches. An optimiser that goes layer by layer has then stepped the layers, whose gradients are gone;
    /// what is returned beside is the sum of their squares.
    fn accumulated(
        &mut self,
        step: usize,
        StepRows { train, micro, lower }: StepRows<'_>,
        last_norm: f64,
        sums: &mut Gradients,
    ) -> Result<(Taken, f64)> {
        let (s, adapter, parameters, groups) = (self.settings, self.adapter, &self.parameters, &self.groups);
        let supervised: usize = micro.iter().flatten().map(|&i| train[i].targets().count()).sum();
        let examples: usize = micro.iter().map(Vec::len).sum();
        let moment = Moment::new(step, self.schedule.total, supervised as f64 / examples.max(1) as f64);
        let scale = 1.0 / supervised.max(1) as f64;
        let (rate, rank) = (self.schedule.rate(step), groups.callback.rank(step));
        let mut routes = self.router_balance.map(|weight| (RouteTotals::default(), weight / examples.max(1) as f64));
        let mut taken =
            Taken { rate, rank: rank.map(|r| r.rank), examples, supervised_tokens: supervised, ..Default::default() };
        let low_rank = s.attention_gradient.low_rank();
        let low_rank = low_rank.map(|own| own.at_step(step, site_seed(s.seed, &format!("check {step}"))));
        let how = |name: &str| groups.of(step, name);
        let (optimizer, mut layers) = (self.optimizer.as_mut(), 0.0);
        let mut layer_done = |sums: &mut Gradients| -> Result<()> {
            let (some, mut gradients): (Vec<_>, Vec<_>) = parameters
                .iter()
                .filter(|(name, _)| !adapter.parameters().contains_key(name))
                .filter_map(|(name, var)| Some(((name.clone(), *var), Some(sums.remove(var.as_tensor())?))))
                .unzip();
            layers += optimize::squares(&gradients)?;
            optimize::shrink(&mut gradients, last_norm, s.max_grad_norm)?;
            Ok(optimizer.step_with(&some, &gradients, &how, rate)?)
        };
        for (m, places) in micro.iter().enumerate() {
            let rows: Vec<&Example> = places.iter().map(|&i| &train[i]).collect();
            let seed = site_seed(s.seed, &format!("step {step} micro {m}"));
            let on = self.attached.at(Step { training: Some(seed), rank });
            let on = low_rank.as_ref().map_or_else(|| on.clone(), |how| on.with_low_rank_attention(how));
            let own: usize = rows.iter().map(|e| e.targets().count()).sum();
            let inputs = StepInputs {
                lower: lower.map(|lower| (lower, places.as_slice())),
                objective: self.objective.as_deref().map(|o| (o, own as f64 * scale, moment)),
                smoothing: s.label_smoothing,
                routes: routes.as_mut().map(|(totals, weight)| (totals, *weight)),
                layer_done: if self.per_layer { Some(&mut layer_done) } else { None },
            };
            let found = accumulate(self.model, &on, parameters, &rows, scale, s.step, inputs, sums)?;
            taken.loss += found.sum * scale;
            taken.auxiliary += found.auxiliary * own as f64 * scale;
            taken.tokens += found.tokens;
            taken.computed_tokens += found.computed;
        }
        taken.routes = routes.map(|(totals, _)| totals);
        taken.low_rank = low_rank;
        Ok((taken, layers))
    }

    /// The log's record of the step after which `step` steps are taken.
    pub fn record(&self, step: usize, taken: &Taken) -> Result<Record> {
        let mut record = Record {
            step,
            loss: Some(taken.loss),
            regularizer: self.objective.is_some().then_some(taken.auxiliary),
            router_balance: taken.routes.as_ref().map(|r| r.balance / r.samples.max(1) as f64),
            expert_shares: taken.routes.as_ref().map(RouteTotals::shares),
            open_gates: callback::open_gates(&self.named)?.map(|(open, all)| open as f64 / all as f64),
            rank: taken.rank,
            learning_rate: Some(taken.rate),
            gradient_norm: Some(taken.gradient_norm),
            ..Default::default()
        };
        if let Some(how) = &taken.low_rank {
            attention::record(&how.meter.totals(), &mut record);
        }
        Ok(record)
    }

    /// Refuses low-rank gradients of attention that no head would take, by forwards and backwards of the first step's rows, before anything is
    /// written.
    pub fn check_low_rank(&self, StepRows { train, micro, .. }: StepRows<'_>) -> Result<()> {
        let s = self.settings;
        let Some(own) = s.attention_gradient.low_rank() else { return Ok(()) };
        let how = own.at_step(0, s.seed);
        // Not as in training: what is counted there does not hear of it.
        let on = self.attached.with_low_rank_attention(&how);
        for places in micro {
            let rows: Vec<&Example> = places.iter().map(|&i| &train[i]).collect();
            let (inputs, mut sums) = (StepInputs::default(), Gradients::default());
            accumulate(self.model, &on, &self.parameters, &rows, 1.0, s.step, inputs, &mut sums)?;
            if how.meter.totals().low_rank > 0 {
                break;
            }
        }
        own.check_use(&how.meter.totals(), self.model.dtype())
    }
}

/// Refuses parts that do not go together.
fn check_parts(
    settings: &TrainSettings,
    adapter: &Adapter,
    choice: &OptimizerChoice,
    callback: &dyn Callback,
    parameters: &[Named<'_>],
) -> Result<()> {
    let (s, method) = (settings, adapter.method.name());
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
    if adapter.router().is_some() && !choice.0.takes_any_parameter() {
        return fail(format!(
            "`{method}` trains a head that belongs to no projection, which --optimizer {} cannot; use adamw",
            choice.0.name()
        ));
    }
    if choice.0.per_layer() && s.gradient_accumulation > 1 {
        return fail("galore with per_layer drops each layer's gradient at once; use --gradient-accumulation 1".into());
    }
    Ok(())
}
