//! Adapters at work: their changes of a model's projections, several at once with weights.

use std::sync::Arc;

use candle_core::{Result as TensorResult, Tensor, Var};
use lorimer_model::{Adaptation, AttentionCall, BlockScope, PassDone, Point, Projection, Site};
use lorimer_tensor::{CheckedGradient, Gradients, LowRankTerm, Ops, Part, Tape};

use crate::adapter::Adapter;
use crate::block::BlockDelta;
use crate::delta::{Change, Delta, GatedLowRank, LowRank};
use crate::error::{Error, Result};
use crate::method::Method;
use crate::router::{Router, Routes};
use crate::step::Step;
use crate::unit::{RouteMeter, UnitRoute, UnitRouter};

/// Refuses to sum or scale what is not additive.
pub(crate) fn refuse_sum(method: &dyn Method, adapters: usize, weight: f64) -> Result<()> {
    match method.not_additive() {
        Some(why) if adapters > 1 || weight != 1.0 => {
            Err(Error::Refused(format!("a `{}` adapter can only be used alone and at weight 1: {why}", method.name())))
        }
        _ => Ok(()),
    }
}

/// Adapters at work on a model: their changes add up, each times its weight.
#[derive(Clone)]
pub struct Attached<'a> {
    adapters: Vec<(&'a Adapter, f64)>,
    step: Step,
    tape: Option<&'a Tape>,
    /// In a pass of an adapter with a router: the routes of its projections.
    routes: Option<Arc<Routes>>,
    /// In a block's gated unit that a router routes: where its rows go.
    unit: Option<Arc<UnitRoute>>,
    /// In training: what watches the routes of units.
    meter: Option<&'a RouteMeter>,
    /// On a tape: how attentions come by low-rank gradients.
    low_rank: Option<&'a CheckedGradient>,
}

impl<'a> Attached<'a> {
    /// One adapter at full weight.
    pub fn one(adapter: &'a Adapter) -> Self {
        Self::of(vec![(adapter, 1.0)])
    }

    fn of(adapters: Vec<(&'a Adapter, f64)>) -> Self {
        Self { adapters, step: Step::default(), tape: None, routes: None, unit: None, meter: None, low_rank: None }
    }

    /// Several adapters with weights. Whole parameters cannot be mixed, so at most one adapter may bring any of a name,
    /// and at weight 1.
    pub fn weighted(adapters: Vec<(&'a Adapter, f64)>) -> Result<Self> {
        for (adapter, weight) in &adapters {
            refuse_sum(adapter.method.as_ref(), adapters.len(), *weight)?;
        }
        let mut seen = std::collections::HashSet::new();
        for (adapter, weight) in &adapters {
            for path in adapter.parameters.keys() {
                if !seen.insert(path) {
                    return Err(Error::Refused(format!("two adapters each bring their own `{path}`; use one of them")));
                }
                if *weight != 1.0 {
                    return Err(Error::Refused(format!(
                        "an adapter that brings its own `{path}` can only be used at weight 1"
                    )));
                }
            }
        }
        Ok(Self::of(adapters))
    }

    /// The same adapters in a forward of another kind.
    pub fn at(&self, step: Step) -> Self {
        Self { step, ..self.clone() }
    }

    /// The same adapters with their forward recorded on a tape.
    pub fn recorded<'b>(&'b self, tape: &'b Tape) -> Attached<'b> {
        Attached { tape: Some(tape), ..self.clone() }
    }

    /// The same adapters with routes of units watched.
    pub fn watched<'b>(&'b self, meter: &'b RouteMeter) -> Attached<'b> {
        Attached { meter: Some(meter), ..self.clone() }
    }

    /// The same adapters with gradients of attention on a tape that are low-rank where that is within a tolerance.
    pub fn with_low_rank_attention<'b>(&'b self, how: &'b CheckedGradient) -> Attached<'b> {
        Attached { low_rank: Some(how), ..self.clone() }
    }

    /// Whether the output of a row depends on that row alone, so that what sequences share may be computed once.
    pub fn rows_are_independent(&self) -> bool {
        let mut deltas = self.adapters.iter().flat_map(|(a, _)| a.deltas.values());
        let mut blocks = self.adapters.iter().flat_map(|(a, _)| a.blocks());
        let router = self.router().filter(|_| self.step.training.is_some());
        deltas.all(|d| d.rows_are_independent(&self.step))
            && blocks.all(|(_, d)| d.rows_are_independent(&self.step))
            && router.is_none_or(Router::rows_are_independent)
    }

    /// Whether what follows the attention of a block reads other rows, so that the last block has to give them all.
    pub fn reads_other_rows(&self) -> bool {
        self.adapters.iter().flat_map(|(a, _)| a.blocks()).any(|(_, d)| d.reads_other_rows())
    }

    /// Whether the rows of some block's gated unit go to experts, so that parts of the adapter may have no row.
    pub fn routes_units(&self) -> bool {
        self.adapters.iter().flat_map(|(a, _)| a.blocks()).any(|(_, d)| d.unit_router().is_some())
    }

    /// The first block that has a layer of an adapter's.
    pub fn first_block(&self) -> Option<usize> {
        self.adapters.iter().flat_map(|(a, _)| a.blocks()).map(|(block, _)| block.layer).min()
    }

    /// These adapters in the last of several passes, after what the pass before left; as they are where a forward takes one.
    pub fn after(&self, done: Option<&PassDone<'_>>) -> TensorResult<Self> {
        let routes = match (self.router(), done) {
            (Some(router), Some(done)) => {
                let routes = router.routes(self.ops(), done.hidden, self.step.training)?;
                Some(Arc::new(routes.with_needed(done.needed)))
            }
            _ => self.routes.clone(),
        };
        Ok(Self { routes, ..self.clone() })
    }

    /// What this pass was given for its projections.
    pub fn route_tensors(&self) -> Vec<&Tensor> {
        self.routes.iter().flat_map(|routes| routes.tensors()).collect()
    }

    /// The router of the adapter, which is the only one where it has one.
    fn router(&self) -> Option<&'a dyn Router> {
        self.adapters.iter().find_map(|(adapter, _)| adapter.router.as_deref())
    }
}

impl Attached<'_> {
    /// The layer after a block's attention: an adapter that has one is alone ([`Method::not_additive`]).
    fn block(&self, layer: usize) -> Option<&dyn BlockDelta> {
        let mut all = self.adapters.iter().flat_map(|(a, _)| a.blocks());
        all.find(|(block, _)| block.layer == layer).map(|(_, delta)| delta.as_ref())
    }

    /// What the adapters put on a site, with their weights.
    fn here(&self, site: &Site) -> impl Iterator<Item = (&Adapter, &dyn Delta, f64)> {
        self.adapters.iter().filter_map(|(a, weight)| Some((*a, a.deltas.get(&site.path)?.as_ref(), *weight)))
    }

    /// A projection without its bias, operation by operation.
    fn project_plain(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let ops = self.ops();
        let own = self.parameter(&site.weight_path());
        let plain = match own {
            Some(weight) => ops.subgraph(&[x], &[weight], |t| t[0].matmul(&weight.t()?))?,
            None => ops.linear(x, &base.weight)?,
        };
        let mut y = plain.clone();
        for (adapter, delta, weight) in self.here(site).filter(|_| !self.is_routed()) {
            // Another adapter's weight takes the place of the base's; what this one changes is still the base's.
            let from = match own.is_some() && !adapter.parameters.contains_key(&site.weight_path()) {
                true => ops.linear(x, &base.weight)?,
                false => plain.clone(),
            };
            let change = ops.subgraph(&[x, &from], &parameters(delta), |t| {
                let change = delta.forward(adapter.own(site, base), &t[0], &t[1], &self.step)?;
                if weight == 1.0 { Ok(change) } else { change * weight }
            })?;
            y = ops.add(&y, &change)?;
        }
        Ok(y)
    }

    /// The form of the only adapter's change on a site, recorded as a function of its parameters.
    fn form(&self, delta: &dyn Delta, base: &Projection, x: &Tensor) -> TensorResult<Change> {
        let rows = x.dim(0)?;
        // The form with its tensors taken out: the tape gives back those that it follows.
        let mut form = Change::Free;
        let found = self.ops().subgraph_all(&[], &parameters(delta), |_| {
            form = delta.change(base, rows, &self.step)?;
            Ok(form.tensors())
        })?;
        form.with_tensors(found)
    }

    /// How the output of a projection comes about, in a recorded forward.
    fn projected(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Projected> {
        if self.parameter(&site.weight_path()).is_some() {
            return Ok(Projected::Plain);
        }
        let delta = match self.here(site).collect::<Vec<_>>()[..] {
            [] => return Ok(Projected::Together(None, Rest::Nothing)),
            _ if self.is_routed() => return Ok(Projected::Together(None, Rest::Nothing)),
            [(_, delta, 1.0)] => delta,
            _ => return Ok(Projected::Plain),
        };
        let (ops, mask) = (self.ops(), delta.mask(x, &self.step)?);
        Ok(match self.form(delta, base, x)? {
            Change::LowRank(low) => Projected::Together(Some(term(low, mask)), Rest::Nothing),
            Change::RowRate(low, scale) => {
                let term = LowRankTerm { gradient_scale: Some(scale), ..term(low, mask) };
                Projected::Together(Some(term), Rest::Nothing)
            }
            Change::RowScaled(low, scale) if mask.is_none() => {
                Projected::Together(Some(term(low, None)), Rest::Scale(scale))
            }
            Change::RowScaled(..) => Projected::Plain,
            Change::Sparse(index, values) => Projected::Together(None, Rest::Add(ops.sparse(x, &values, &index)?)),
            Change::Weight(weight) => Projected::Alone(ops.dense(x, &weight)?),
            Change::Gated(change) => Projected::Alone(self.project_gated((delta, base), x, mask, &change)?),
            Change::Free => Projected::Alone(delta.output(ops, base, x, &self.step)?),
        })
    }

    /// x Wᵀ + scaling · (g ∘ (x aᵀ)) bᵀ, recorded: the products by themselves, the gates as a subgraph.
    fn project_gated(
        &self,
        (delta, base): (&dyn Delta, &Projection),
        x: &Tensor,
        mask: Option<Tensor>,
        change: &GatedLowRank,
    ) -> TensorResult<Tensor> {
        let (ops, LowRank { a, b, scaling }) = (self.ops(), &change.factors);
        let own = masked(ops, x, mask)?;
        let own = if change.input_gradient { own } else { own.detach() };
        let u = ops.dense(&own, a)?;
        let gated = ops.subgraph(&[&own, &u], &parameters(delta), |t| {
            (&t[1] * delta.gates(&t[0], &t[1], &self.step)?)? * *scaling
        })?;
        ops.add(&ops.linear(x, &base.weight)?, &ops.dense(&gated, b)?)
    }

    /// With routes: the output and what they let through, scaling · (g ∘ (x aᵀ)) bᵀ.
    fn with_routes(&self, site: &Site, base: &Projection, y: Tensor, x: &Tensor) -> TensorResult<Tensor> {
        let (Some(routes), Some((_, delta, _))) = (&self.routes, self.here(site).next()) else { return Ok(y) };
        let (ops, rows) = (self.ops(), x.dim(0)?);
        let Change::Gated(GatedLowRank { factors: LowRank { a, b, scaling }, .. }) =
            delta.change(base, rows, &self.step)?
        else {
            candle_core::bail!("`{}` has a route and no gates", site.path)
        };
        let (route, u) = (routes.at(ops, &site.path, rows)?, ops.dense(x, &a)?);
        let gated = ops.subgraph(&[&u, &route], &[], |t| (&t[0] * delta.route_gates(&t[1])?)? * scaling)?;
        ops.add(&y, &ops.dense(&gated, &b)?)
    }

    /// In a unit with a route: the output and the change of the experts that each row goes to.
    fn with_experts(&self, site: &Site, y: Tensor, x: &Tensor) -> TensorResult<Tensor> {
        let (Some(route), Some((_, delta, _))) = (&self.unit, self.here(site).next()) else { return Ok(y) };
        let ops = self.ops();
        let own = masked(ops, x, delta.mask(x, &self.step)?)?;
        ops.add(&y, &route.change(ops, &own, &delta.experts())?)
    }

    /// Whether routes made before decide what is added to an output, and how.
    fn is_routed(&self) -> bool {
        self.routes.is_some() || self.unit.is_some()
    }

    /// What routes a block's gated unit.
    fn unit_router(&self, layer: usize) -> Option<&dyn UnitRouter> {
        self.block(layer)?.unit_router()
    }

    /// The output with all biases, from the one without.
    fn with_biases(&self, site: &Site, base: &Projection, mut y: Tensor) -> TensorResult<Tensor> {
        let ops = self.ops();
        if let Some(bias) = self.parameter(&site.bias_path()).or(base.bias.as_ref()) {
            y = ops.add_bias(&y, bias)?;
        }
        for (_, delta, weight) in self.here(site) {
            let change =
                ops.subgraph_all(&[], &parameters(delta), |_| Ok(delta.bias_change(base)?.into_iter().collect()))?;
            if let Some(change) = change.first() {
                y = ops.add_bias(&y, &if weight == 1.0 { change.clone() } else { (change * weight)? })?;
            }
        }
        Ok(y)
    }
}

/// How the output of a projection comes about.
enum Projected {
    /// As a product with a low-rank change, where there is one, together with the other projections of the input, and what is still to be done to it.
    Together(Option<LowRankTerm>, Rest),
    /// This is it.
    Alone(Tensor),
    /// Operation by operation ([`Attached::project_plain`]).
    Plain,
}

/// What is still to be done to the product of a projection with its low-rank change.
enum Rest {
    Nothing,
    /// A factor an output.
    Scale(Tensor),
    /// Another change.
    Add(Tensor),
}

fn term(LowRank { a, b, scaling }: LowRank, mask: Option<Tensor>) -> LowRankTerm {
    LowRankTerm { mask, ..LowRankTerm::new(a, b, scaling) }
}

/// The input of a change, where elements of it are dropped.
fn masked(ops: Ops<'_>, x: &Tensor, mask: Option<Tensor>) -> TensorResult<Tensor> {
    match mask {
        Some(mask) => ops.subgraph(&[x], &[], |t| &t[0] * &mask),
        None => Ok(x.clone()),
    }
}

/// The tensors that a delta trains.
fn parameters(delta: &dyn Delta) -> Vec<&Tensor> {
    delta.trainable().into_iter().map(|(_, v)| v.as_tensor()).collect()
}

impl Adaptation for Attached<'_> {
    fn passes(&self) -> usize {
        if self.routes.is_none() && self.router().is_some() { 2 } else { 1 }
    }

    fn pass<'s>(&'s self, number: usize, before: Option<&PassDone<'_>>) -> TensorResult<Box<dyn Adaptation + 's>> {
        let Some(router) = self.router() else { candle_core::bail!("pass {number} of an adapter that takes one") };
        if before.is_some() {
            return Ok(Box::new(self.after(before)?));
        }
        let routes = router.first_pass()?.map(|numbers| Arc::new(Routes::constant(numbers)));
        let adapters = if routes.is_some() { self.adapters.clone() } else { Vec::new() };
        Ok(Box::new(Attached { adapters, routes, ..self.clone() }))
    }

    fn ops(&self) -> Ops<'_> {
        self.tape.map_or(Ops::plain(), Ops::recorded)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> TensorResult<Tensor> {
        let mut found = self.project_all(&[(site, base)], x)?;
        found.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> TensorResult<Vec<Tensor>> {
        let ops = self.ops();
        let touched = || targets.iter().any(|(site, _)| self.here(site).next().is_some());
        if self.routes.is_none() && self.router().is_some() && touched() {
            candle_core::bail!("an adapter with a router takes two passes over the rows, of which there was none");
        }
        let mut parts = Vec::new();
        let mut places = Vec::new();
        let mut outputs: Vec<Option<Tensor>> = vec![None; targets.len()];
        // Without a tape the plain form runs, so that it is what the fast one is held against.
        for (place, (site, base)) in targets.iter().enumerate().filter(|_| self.tape.is_some()) {
            match self.projected(site, base, x)? {
                Projected::Together(low_rank, rest) => {
                    parts.push(Part { weight: Some(&base.weight), low_rank });
                    places.push((place, rest));
                }
                Projected::Alone(y) => outputs[place] = Some(y),
                Projected::Plain => {}
            }
        }
        for ((place, rest), y) in places.into_iter().zip(ops.project(x, &parts)?) {
            outputs[place] = Some(match rest {
                Rest::Nothing => y,
                Rest::Scale(scale) => ops.scale_columns(&y, &scale)?,
                Rest::Add(change) => ops.add(&y, &change)?,
            });
        }
        let all = targets.iter().zip(outputs).map(|((site, base), y)| {
            let y = y.map_or_else(|| self.project_plain(site, base, x), Ok)?;
            let y = self.with_experts(site, self.with_routes(site, base, y, x)?, x)?;
            self.with_biases(site, base, y)
        });
        all.collect()
    }

    fn attend(&self, _: Point, call: AttentionCall<'_>, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        if let Some(rule) = self.block(block.layer()).and_then(BlockDelta::edges) {
            let edges = self.ops().attention_edges((&call.q, &call.k), call.segments, &call.form, rule)?;
            block.edges = Some(edges);
        }
        match self.low_rank.filter(|_| self.tape.is_some()) {
            Some(how) => call.run_low_rank(self.ops(), how, block.layer()),
            None => call.run(self.ops()),
        }
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        match self.block(block.layer()) {
            Some(delta) => delta.attended(self.ops(), &h, block, &self.step),
            None => Ok(h),
        }
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> TensorResult<Option<Box<dyn Adaptation + 's>>> {
        let Some(router) = self.unit_router(layer) else { return Ok(None) };
        let shares = router.shares(self.ops(), x)?;
        let route = router.route(self.ops(), &shares)?;
        if let Some(meter) = self.meter {
            meter.note(layer, &shares);
        }
        Ok(Some(Box::new(Attached { unit: Some(Arc::new(route)), ..self.clone() })))
    }

    fn unit_gradients(&self, layer: usize, gradients: &mut Gradients) -> TensorResult<()> {
        match (self.meter, self.tape) {
            (Some(meter), Some(tape)) => meter.add_gradient(layer, |p| tape.tracks(p), gradients),
            _ => Ok(()),
        }
    }

    fn touches(&self, site: &Site) -> bool {
        self.adapters.iter().any(|(a, _)| a.deltas.contains_key(&site.path))
            || self.parameter(&site.weight_path()).is_some()
            || self.parameter(&site.bias_path()).is_some()
    }

    fn parameter(&self, path: &str) -> Option<&Tensor> {
        self.adapters.iter().find_map(|(a, _)| a.parameters.get(path)).map(Var::as_tensor)
    }
}
