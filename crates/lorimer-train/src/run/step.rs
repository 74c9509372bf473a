//! One forward and backward over a few rows: the plain form, and the fast form that equals it.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use lorimer_adapter::training::objective::{BLOCK_ROWS, Moment, Objective};
use lorimer_adapter::{Attached, RouteMeter, RouteTotals};
use lorimer_model::{
    Adaptation, BaseModel, Batch, Frozen, Inference, Layout, PassDone, Recompute, earlier_passes, last_pass, run_blocks,
};
use lorimer_tensor::{Gradients, Ops, Tape};
use serde::{Deserialize, Serialize};

use crate::data::encode::Example;
use crate::error::Result;
use crate::run::frozen::{FrozenCache, FrozenLower};

/// How the fast form goes about it. None of these changes the result beyond rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepOptions {
    /// Compute what rows of a batch begin with in common only once, where the adapter allows it.
    pub share_prefixes: bool,
    /// Keep only the inputs of the layers in the forward, and compute each layer again in the backward: about half the
    /// memory of activations or less, for up to half more time.
    pub checkpointing: bool,
    /// Where only upper layers are adapted and rows are seen more than once, what becomes of the frozen lower layers' output.
    pub frozen_cache: FrozenCache,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self { share_prefixes: true, checkpointing: false, frozen_cache: FrozenCache::Auto }
    }
}

/// What one forward and backward found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepLoss {
    /// Σ −log p over supervised tokens.
    pub sum: f64,
    /// The objective's auxiliary loss, where there is one.
    pub auxiliary: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Tokens of the rows.
    pub tokens: usize,
    /// Token rows that were computed, which is less where prefixes are shared.
    pub computed: usize,
    /// Seconds of the forward.
    pub forward_seconds: f64,
    /// Seconds of the backward (with checkpointing, of computing layers again too).
    pub backward_seconds: f64,
}

/// Rows of a batch that predict a supervised token, with the token.
fn targets(batch: &Batch, rows: &[&Example]) -> (Vec<u32>, Vec<u32>) {
    let pairs = rows.iter().zip(&batch.rows);
    pairs.flat_map(|(e, at)| e.targets().map(|i| (at[i - 1], e.tokens[i]))).unzip()
}

/// Σ −log p over supervised tokens of the rows, their number and the number of all tokens, in candle's own graph: nothing is
/// shared, nothing computed in parts. The oracle of [`accumulate_gradients`].
pub fn batch_loss(model: &dyn BaseModel, attached: &Attached<'_>, rows: &[&Example]) -> Result<(Tensor, usize, usize)> {
    let batch = Batch::pack(rows.iter().map(|e| e.tokens.as_slice()));
    let hidden = model.hidden(&batch, attached)?;
    let (index, targets) = targets(&batch, rows);
    let index = Tensor::from_vec(index, targets.len(), hidden.device())?;
    let logits = model.logits(&hidden.index_select(&index, 0)?, attached)?;
    Ok((lorimer_tensor::cross_entropy(&logits, &targets)?.sum_all()?, targets.len(), batch.tokens.len()))
}

/// What hears of the gradients when a layer's are there.
pub type LayerDone<'a> = &'a mut (dyn FnMut(&mut Gradients) -> Result<()> + Send);

/// What a step may have beside the loss of the task.
#[derive(Default)]
pub struct StepInputs<'a> {
    /// The frozen lower layers' output, and the rows' places in the training set.
    pub lower: Option<(&'a FrozenLower, &'a [usize])>,
    /// An auxiliary loss, as a mean over the micro-batch's supervised positions, and what it is multiplied by.
    pub objective: Option<(&'a dyn Objective, f64, Moment)>,
    /// Label smoothing: the share of the loss that is the mean over the vocabulary.
    pub smoothing: f64,
    /// Where a step's routes of blocks' units are added up, and what the sum of their balance over samples is multiplied by in the loss.
    pub routes: Option<(&'a mut RouteTotals, f64)>,
    /// Called after each layer's backward; layers are then computed again in the backward.
    pub layer_done: Option<LayerDone<'a>>,
}

/// Adds the gradients of `scale` · Σ −log p over supervised tokens of the rows to `gradients`. With `lower`, the output of the
/// frozen lower layers is taken from there, by the rows' places in the training set.
#[allow(clippy::too_many_arguments)]
pub fn accumulate_gradients(
    model: &dyn BaseModel,
    attached: &Attached<'_>,
    parameters: &[(String, &Var)],
    rows: &[&Example],
    scale: f64,
    options: StepOptions,
    lower: Option<(&FrozenLower, &[usize])>,
    gradients: &mut Gradients,
) -> Result<StepLoss> {
    let inputs = StepInputs { lower, ..Default::default() };
    accumulate(model, attached, parameters, rows, scale, options, inputs, gradients)
}

/// [`accumulate_gradients`] with more.
#[allow(clippy::too_many_arguments)]
pub fn accumulate(
    model: &dyn BaseModel,
    attached: &Attached<'_>,
    parameters: &[(String, &Var)],
    rows: &[&Example],
    scale: f64,
    options: StepOptions,
    inputs: StepInputs<'_>,
    gradients: &mut Gradients,
) -> Result<StepLoss> {
    let longest = rows.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
    let independent = attached.rows_are_independent() && model.shape().prefixes_stand(longest);
    let sequences = rows.iter().map(|e| e.seen(independent));
    let batch = match options.share_prefixes && independent {
        true => Batch::share(sequences),
        false => Batch::pack(sequences),
    };
    let (predicting, targets) = targets(&batch, rows);
    let mut loss = StepLoss {
        sum: 0.0,
        supervised: targets.len(),
        tokens: rows.iter().map(|e| e.tokens.len()).sum(),
        computed: batch.tokens.len(),
        ..Default::default()
    };
    if targets.is_empty() {
        return Ok(loss);
    }
    let (needed, place) = match independent && !attached.reads_other_rows() {
        true => among_needed(&predicting),
        false => (None, predicting),
    };
    let meter = inputs.routes.as_ref().map(|(_, weight)| RouteMeter::new(batch.rows.clone(), *weight));
    let watched = meter.as_ref().map(|meter| attached.watched(meter));
    let attached = watched.as_ref().unwrap_or(attached);
    let layout = model.layout(&batch.positions, &batch.segments, needed.as_deref());
    let start = match inputs.lower {
        Some((lower, places)) => Some((lower.layers(), lower.assemble(places, &batch)?)),
        None => None,
    };
    let (objective, smoothing) = (inputs.objective, inputs.smoothing);
    let mut pass = Pass {
        model,
        attached,
        parameters,
        batch: &batch,
        start,
        layout,
        place,
        targets,
        scale,
        smoothing,
        objective: None,
    };
    if let Some((objective, weight, at)) = objective {
        pass.objective = Some(AuxiliaryLoss { objective, weight, at, base: pass.base_hidden()? });
    }
    let clock = Instant::now();
    let forward;
    // In the pool itself: each parallel part then starts without waking a sleeping thread to carry it there.
    let layer_done = inputs.layer_done;
    ((loss.sum, loss.auxiliary), forward) = rayon::scope(|_| match options.checkpointing || layer_done.is_some() {
        false => pass.whole(gradients),
        true => pass.layer_by_layer(gradients, layer_done),
    })?;
    if let (Some((totals, _)), Some(meter)) = (inputs.routes, &meter) {
        meter.add_to(totals)?;
    }
    if attached.routes_units() {
        // An expert that no row went to has a gradient, of zeros.
        for (_, var) in parameters.iter().filter(|(_, var)| gradients.get(var).is_none()).collect::<Vec<_>>() {
            gradients.add(var.id(), var.zeros_like()?)?;
        }
    }
    loss.forward_seconds = forward.duration_since(clock).as_secs_f64();
    loss.backward_seconds = forward.elapsed().as_secs_f64();
    Ok(loss)
}

/// The rows that the last layer gives, where it gives the predicting ones only, and the place of each among them.
fn among_needed(predicting: &[u32]) -> (Option<Vec<u32>>, Vec<u32>) {
    let mut needed = predicting.to_vec();
    needed.sort_unstable();
    needed.dedup();
    let place = predicting.iter().map(|row| needed.partition_point(|n| n < row) as u32).collect();
    (Some(needed), place)
}

struct Pass<'a> {
    model: &'a dyn BaseModel,
    attached: &'a Attached<'a>,
    parameters: &'a [(String, &'a Var)],
    batch: &'a Batch,
    /// The first layer to compute and its input, where that is known.
    start: Option<(usize, Tensor)>,
    layout: Layout,
    place: Vec<u32>,
    targets: Vec<u32>,
    scale: f64,
    smoothing: f64,
    objective: Option<AuxiliaryLoss<'a>>,
}

/// An auxiliary loss.
struct AuxiliaryLoss<'a> {
    objective: &'a dyn Objective,
    weight: f64,
    at: Moment,
    /// The frozen base's hidden states, of which `place` finds those of the supervised positions.
    base: Tensor,
}

impl Pass<'_> {
    fn tape(&self) -> Tape {
        Tape::new(self.parameters.iter().map(|(_, v)| v.as_tensor()))
    }

    fn embed(&self, on: &dyn Adaptation) -> candle_core::Result<Tensor> {
        self.model.embed(&self.batch.tokens, &self.batch.positions, on)
    }

    /// The first layer to compute, and its input.
    fn bottom(&self, on: &dyn Adaptation) -> candle_core::Result<(usize, Tensor)> {
        self.start.clone().map_or_else(|| Ok((0, self.embed(on)?)), Ok)
    }

    /// The output of the last layer.
    fn through(&self, on: &dyn Adaptation) -> candle_core::Result<Tensor> {
        let (first, h) = self.bottom(on)?;
        run_blocks(self.model, h, first..self.model.shape().layers.len(), &self.layout, on, None, |_, _| {})
    }

    /// What the passes before the last leave for it, where the forward takes several.
    fn earlier(&self) -> candle_core::Result<Option<Tensor>> {
        let blank = Tape::new([]);
        let on = self.attached.recorded(&blank);
        let rows = (self.batch.positions.as_slice(), self.batch.segments.as_slice());
        earlier_passes(self.model, &on, rows, &mut |on| self.bottom(on), None)
    }

    /// The rows that the last layer gives, where these are not all.
    fn needed(&self) -> Option<&[u32]> {
        self.layout.last.as_ref().map(|last| last.needed.as_slice())
    }

    /// Hidden states of the frozen base, before its head.
    fn base_hidden(&self) -> candle_core::Result<Tensor> {
        let on = Inference::of(&Frozen);
        let h = self.through(&on)?;
        Ok(self.model.end(&h, &on)?.detach())
    }

    /// The auxiliary loss over all supervised positions: the mean of its values for blocks of them, each of which is done with before the next one's
    /// logits are made.
    fn auxiliary(
        &self,
        auxiliary: &AuxiliaryLoss<'_>,
        hidden: &Tensor,
        on: &dyn Adaptation,
    ) -> candle_core::Result<Tensor> {
        let parameters: Vec<&Tensor> = self.parameters.iter().map(|(_, v)| v.as_tensor()).collect();
        let frozen = Inference::of(&Frozen);
        let mut sum: Option<Tensor> = None;
        for block in self.place.chunks(BLOCK_ROWS) {
            let share = block.len() as f64 / self.place.len() as f64;
            let rows = on.ops().rows(hidden, block)?;
            let base = self.model.logits(&Ops::plain().rows(&auxiliary.base, block)?, &frozen)?.detach();
            let value = on.ops().subgraph_eager(&[&rows], &parameters, |t| {
                auxiliary.objective.value(&self.model.logits(&t[0], self.attached)?, &base, &auxiliary.at)? * share
            })?;
            sum = Some(match sum {
                Some(sum) => on.ops().subgraph(&[&sum, &value], &[], |t| &t[0] + &t[1])?,
                None => value,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("no position is supervised".into()))
    }

    /// From the last layer's output to the loss: the task's, the auxiliary loss, and what is differentiated.
    fn loss(&self, h: &Tensor, on: &dyn Adaptation) -> candle_core::Result<(Tensor, Option<Tensor>, Tensor)> {
        let hidden = self.model.end(h, on)?;
        let predicting = on.ops().rows(&hidden, &self.place)?;
        let task = self.model.smoothed_loss(&predicting, &self.targets, self.smoothing, on)?;
        let Some(auxiliary) = &self.objective else { return Ok((task.clone(), None, task)) };
        let value = self.auxiliary(auxiliary, &hidden, on)?;
        // The sum is multiplied by the scale, the auxiliary loss by its weight.
        let all = on.ops().subgraph(&[&task, &value], &[], |t| &t[0] + (&t[1] * (auxiliary.weight / self.scale))?)?;
        Ok((task, Some(value), all))
    }

    fn numbers(task: &Tensor, auxiliary: Option<Tensor>) -> candle_core::Result<(f64, f64)> {
        let number = |t: &Tensor| t.to_dtype(DType::F64)?.to_scalar::<f64>();
        Ok((number(task)?, auxiliary.as_ref().map_or(Ok(0.0), number)?))
    }

    fn seed(&self, loss: &Tensor) -> candle_core::Result<Tensor> {
        Tensor::new(self.scale, &Device::Cpu)?.to_dtype(loss.dtype())
    }

    /// The loss, and when the forward was done.
    fn whole(&self, gradients: &mut Gradients) -> Result<((f64, f64), Instant)> {
        let before = self.earlier()?;
        let tape = self.tape();
        let recorded = self.attached.recorded(&tape);
        let on = &*last_pass(&recorded, before.as_ref(), self.needed())?;
        let h = self.through(on)?;
        let (task, auxiliary, loss) = self.loss(&h, on)?;
        drop(h);
        let forward = Instant::now();
        let seed = self.seed(&loss)?;
        (0..self.model.shape().layers.len()).try_for_each(|i| on.unit_gradients(i, gradients))?;
        tape.backward(&loss, seed, gradients)?;
        Ok((Self::numbers(&task, auxiliary)?, forward))
    }

    /// As [`Self::whole`], with each layer computed again in the backward.
    fn layer_by_layer(
        &self,
        gradients: &mut Gradients,
        mut layer_done: Option<LayerDone<'_>>,
    ) -> Result<((f64, f64), Instant)> {
        let mut done = |gradients: &mut Gradients| layer_done.as_mut().map_or(Ok(()), |done| done(gradients));
        let before = self.earlier()?;
        let needed = self.needed();
        let left = before.as_ref().map(|hidden| PassDone { hidden, needed });
        // What the last pass has from the earlier ones is computed once, and its gradients are gathered from all layers.
        let routing = self.tape();
        let recorded = self.attached.recorded(&routing);
        let routed = recorded.after(left.as_ref())?;
        let blank = Tape::new([]);
        let on = routed.recorded(&blank);
        let (first, h) = self.bottom(&on)?;
        let blocks = first..self.model.shape().layers.len();
        let (mut again, last) = Recompute::forward(self.model, h, (blocks, first), &self.layout, &on)?;
        let tape = self.tape();
        tape.track(&last);
        let (task, auxiliary, loss) = self.loss(&last, &self.attached.recorded(&tape))?;
        let forward = Instant::now();
        let seed = self.seed(&loss)?;
        tape.backward(&loss, seed, gradients)?;
        drop(loss);
        done(gradients)?;
        let mut gradient = gradients.remove(&last);
        // Below the first layer only a trained embedding wants a gradient.
        let stem_learns = self.model.stem_parameters().iter().any(|path| self.attached.parameter(path).is_some());
        while let (Some(i), Some(g)) = (again.next(), gradient.take()) {
            let tape = self.tape();
            routed.route_tensors().into_iter().for_each(|route| tape.track(route));
            let on = routed.recorded(&tape);
            let follow = i > first || stem_learns;
            gradient = again.backward(self.model, &self.layout, (&tape, &on), g, follow, gradients)?;
            done(gradients)?;
        }
        let route = routed.route_tensors().into_iter().find_map(|t| Some((t, gradients.remove(t)?)));
        if let Some((route, g)) = route {
            routing.backward(route, g, gradients)?;
        }
        if let Some(g) = gradient {
            let tape = self.tape();
            let output = self.embed(&self.attached.recorded(&tape))?;
            if tape.tracks(&output) {
                tape.backward(&output, g, gradients)?;
            }
        }
        Ok((Self::numbers(&task, auxiliary)?, forward))
    }
}
