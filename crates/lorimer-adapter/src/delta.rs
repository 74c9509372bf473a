//! What a method put on one projection: a form of change, from which the forward, the fast form in training, the merged weight, batched
//! serving and the export follow.

use std::sync::Arc;

use candle_core::{DType, Result as TensorResult, Tensor, Var};
use lorimer_model::Projection;
use lorimer_tensor::{Ops, RankGate, SparseIndex, frozen_linear};

use crate::dropout::Dropout;
use crate::parameter::{Parameter, Role};
use crate::step::Step;

/// Why an adapter has no plain weight that gives the same output.
#[derive(Debug, Clone)]
pub struct NotMergeable(pub String);

/// A product of two low-rank factors: ΔW = scaling · B A.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// α/r, or what the method has in its place.
    pub scaling: f64,
}

impl LowRank {
    /// Δy = scaling · (x aᵀ) bᵀ of rows `x` (rows, inputs): (rows, outputs).
    pub fn apply(&self, x: &Tensor) -> TensorResult<Tensor> {
        // The scaling goes onto the low-rank factor, where it costs next to nothing.
        (x.matmul(&self.a.t()?)? * self.scaling)?.matmul(&self.b.t()?)
    }

    /// scaling · b a (outputs, inputs).
    pub fn weight(&self) -> TensorResult<Tensor> {
        self.b.matmul(&self.a)? * self.scaling
    }
}

/// A low-rank change whose ranks are gated, row by row: Δy = scaling · b (g ∘ (a x)), with gates g (rank) that [`Delta::gates`] computes from
/// the row's input. No fixed weight gives the same.
#[derive(Clone, Debug)]
pub struct GatedLowRank {
    /// The factors.
    pub factors: LowRank,
    /// Whether gradients go through the change to its input.
    pub input_gradient: bool,
}

/// The form of a change of a projection y = W x, as a function of the trainable parameters in candle's graph.
pub enum Change {
    /// ΔW = scaling · b a.
    LowRank(LowRank),
    /// The same, and the gradient that reaches the change's output is multiplied by a factor an output (outputs); the forward knows nothing
    /// of it.
    RowRate(LowRank, Tensor),
    /// y = o ∘ (W x + scaling · b a x), with a factor o an output (outputs).
    RowScaled(LowRank, Tensor),
    /// A low-rank change with gates that depend on the input.
    Gated(GatedLowRank),
    /// ΔW has these entries and no others.
    Sparse(Arc<SparseIndex>, Tensor),
    /// The whole weight W' (outputs, inputs).
    Weight(Tensor),
    /// None of these: the method computes the output itself ([`Delta::output`]).
    Free,
}

impl Change {
    /// ΔW = scaling · b a.
    pub fn low_rank(a: Tensor, b: Tensor, scaling: f64) -> Self {
        Self::LowRank(LowRank { a, b, scaling })
    }

    /// The factors of a change that is ΔW = scaling · b a in the forward.
    pub fn factors(&self) -> Option<&LowRank> {
        match self {
            Self::LowRank(low) | Self::RowRate(low, _) => Some(low),
            _ => None,
        }
    }
}

impl Change {
    /// The tensors that it is made of.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        match self {
            Self::LowRank(low) | Self::Gated(GatedLowRank { factors: low, .. }) => vec![low.a.clone(), low.b.clone()],
            Self::RowRate(low, t) | Self::RowScaled(low, t) => vec![low.a.clone(), low.b.clone(), t.clone()],
            Self::Sparse(_, t) | Self::Weight(t) => vec![t.clone()],
            Self::Free => Vec::new(),
        }
    }

    /// The same form of others, in the order of [`Self::tensors`].
    pub(crate) fn with_tensors(self, tensors: Vec<Tensor>) -> TensorResult<Self> {
        let mut tensors = tensors.into_iter();
        let mut next =
            || tensors.next().ok_or_else(|| candle_core::Error::Msg("a tensor of the change is missing".into()));
        let mut factors = |low: LowRank| -> TensorResult<LowRank> { Ok(LowRank { a: next()?, b: next()?, ..low }) };
        Ok(match self {
            Self::LowRank(low) => Self::LowRank(factors(low)?),
            Self::RowRate(low, _) => Self::RowRate(factors(low)?, next()?),
            Self::RowScaled(low, _) => Self::RowScaled(factors(low)?, next()?),
            Self::Gated(gated) => Self::Gated(GatedLowRank { factors: factors(gated.factors)?, ..gated }),
            Self::Sparse(index, _) => Self::Sparse(index, next()?),
            Self::Weight(_) => Self::Weight(next()?),
            Self::Free => Self::Free,
        })
    }
}

/// What a method put on one projection.
///
/// A method says in [`Self::change`] what form its change has, as a function of its trainable parameters, and has everything else from the
/// form: the forward, the fast form in training, the merged weight or the reason why there is none, batched serving, the LoRA that `convert`
/// writes.
pub trait Delta: Send + Sync {
    /// The change of `base`. `rows`: of the input, for methods that choose their form by arithmetic; 0 where the form itself is wanted.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn change(&self, base: &Projection, rows: usize, step: &Step) -> TensorResult<Change>;
    /// Its parameters, in a fixed order.
    fn parameters(&self) -> Vec<Parameter<'_>>;
    /// What drops elements of the change's input in training; with [`Change::RowScaled`], of the projection's.
    fn dropout(&self) -> Option<&Dropout> {
        None
    }
    /// With [`Change::Gated`]: the gates (rows, rank) of rows with input `x` (rows, inputs) and u = x aᵀ (rows, rank), as a function of these
    /// and of the trainable parameters. In training it also counts what moves buffers ([`Self::after_step`]): computing the same rows of a
    /// step again counts nothing twice.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn gates(&self, _x: &Tensor, _u: &Tensor, _step: &Step) -> TensorResult<Tensor> {
        candle_core::bail!("a method with gates has to compute them")
    }
    /// With [`Change::Gated`] of an adapter that has a [`crate::Router`] or [`Self::experts`]: the gates (rows, rank) from the projection's route (rows, n).
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn route_gates(&self, _route: &Tensor) -> TensorResult<Tensor> {
        candle_core::bail!("a method with a router has to say what its routes do")
    }
    /// With [`Change::Gated`] in a block's gated unit that a router routes ([`crate::UnitRouter`]): the low-rank changes that a row goes to. They are
    /// the change's ranks, one expert's after another's, and [`Self::route_gates`] makes gates of the factors of each.
    fn experts(&self) -> Vec<LowRank> {
        Vec::new()
    }
    /// With [`Change::Gated`]: the gates as they are served.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn rank_gate(&self) -> TensorResult<Option<Arc<dyn RankGate>>> {
        Ok(None)
    }
    /// With [`Change::Free`]: the whole output without bias of rows `x` (rows, inputs), in recorded operations.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn output(&self, _ops: Ops<'_>, _base: &Projection, _x: &Tensor, _step: &Step) -> TensorResult<Tensor> {
        candle_core::bail!("a method without a form has to compute its output")
    }
    /// With [`Change::Free`]: the plain weight (outputs, inputs) that gives the same output, if any does.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn free_weight(&self, _base: &Projection) -> TensorResult<Result<Tensor, NotMergeable>> {
        Ok(Err(NotMergeable("the method has no plain weight".into())))
    }
    /// What the change adds to the output of every row (outputs), where the method works on W x + b.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn bias_change(&self, _base: &Projection) -> TensorResult<Option<Tensor>> {
        Ok(None)
    }
    /// Whether the change of a row depends on that row alone. Dropout's mask goes by the element, so that rows which sequences share cannot be
    /// computed once for all under it.
    fn rows_are_independent(&self, step: &Step) -> bool {
        self.dropout().is_none_or(|dropout| dropout.is_off(step))
    }
    /// After the optimiser's step: moves the buffers by what the step's forwards counted.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn after_step(&self) -> TensorResult<()> {
        Ok(())
    }
    /// What is not trained but found from the base, from a seed or from data when the adapter is made, by key. Its hash stands in
    /// `lorimer.json`, so that a file without it is not used on another base.
    fn frozen(&self) -> Vec<(&'static str, &Tensor)> {
        Vec::new()
    }
    /// What the file holds for this module, by key below the module's path, for the base as it is on disk.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn stored(&self) -> TensorResult<Vec<(&'static str, Tensor)>> {
        Ok(Parameter::stored(self.parameters()))
    }
    /// Whether the output changes at all.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn has_effect(&self, base: &Projection) -> TensorResult<bool> {
        let Ok(merged) = self.merged(base)? else { return Ok(true) };
        let dense = base.dense(merged.dtype())?;
        // What rounding alone can do to a decomposed weight is no effect.
        Ok(largest(&(&merged - &dense)?)? > 1e-6 * largest(&dense)?)
    }

    /// The change Δy of the projection's output. `x` (rows, inputs), `y` = x Wᵀ (rows, outputs) without bias, which an adapter may have
    /// replaced.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn forward(&self, base: &Projection, x: &Tensor, y: &Tensor, step: &Step) -> TensorResult<Tensor> {
        let dropped = self.mask(x, step)?.map(|mask| x * mask).transpose()?;
        let input = dropped.as_ref().unwrap_or(x);
        match self.change(base, x.dim(0)?, step)? {
            Change::LowRank(low) => low.apply(input),
            Change::RowRate(low, scale) => {
                let change = low.apply(input)?;
                // The same numbers with another gradient.
                change.broadcast_mul(&scale)? + change.broadcast_mul(&(1.0 - scale)?)?.detach()
            }
            Change::RowScaled(low, scale) => {
                let change = low.apply(input)?;
                let plain = dropped.as_ref().map(|x| frozen_linear(x, &base.weight)).transpose()?;
                plain.as_ref().unwrap_or(y).broadcast_mul(&(&scale - 1.0)?)? + change.broadcast_mul(&scale)?
            }
            Change::Gated(GatedLowRank { factors: LowRank { a, b, scaling }, input_gradient }) => {
                let input = if input_gradient { input.clone() } else { input.detach() };
                let u = input.matmul(&a.t()?)?;
                let gates = self.gates(&input, &u, step)?;
                ((u * gates)? * scaling)?.matmul(&b.t()?)
            }
            Change::Sparse(index, values) => x.matmul(&index.matrix(&values)?.t()?),
            Change::Weight(weight) => x.matmul(&weight.t()?)? - y,
            Change::Free => self.output(Ops::plain(), base, x, step)? - y,
        }
    }
    /// What multiplies the change's input `x` elementwise in this step, if anything does.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn mask(&self, x: &Tensor, step: &Step) -> TensorResult<Option<Tensor>> {
        match self.dropout() {
            Some(dropout) => dropout.mask(x, step),
            None => Ok(None),
        }
    }
    /// The plain weight (outputs, inputs) that gives the same output, in f32 (f64 for f64 adapters), or why none does.
    ///
    /// # Errors
    ///
    /// Fails if a tensor operation fails.
    fn merged(&self, base: &Projection) -> TensorResult<Result<Tensor, NotMergeable>> {
        let added = |change: Tensor| base.dense(change.dtype())? + change;
        let merged = match self.change(base, 0, &Step::default())? {
            Change::LowRank(low) | Change::RowRate(low, _) => added(low.weight()?)?,
            Change::RowScaled(low, scale) => added(low.weight()?)?.broadcast_mul(&scale.unsqueeze(1)?)?,
            Change::Sparse(index, values) => added(index.matrix(&values)?)?,
            Change::Weight(weight) => weight,
            Change::Gated(_) => {
                return Ok(Err(NotMergeable("its gates depend on the input, which no fixed weight does".into())));
            }
            Change::Free => return Ok(self.free_weight(base)?.map(|weight| weight.detach())),
        };
        Ok(Ok(merged.detach()))
    }
    /// The parameters that gradients move, by key.
    fn trainable(&self) -> Vec<(&'static str, &Var)> {
        Parameter::trained(self.parameters())
    }
    /// The parameters that a rule moves after the step, by key.
    fn buffers(&self) -> Vec<(&'static str, &Var)> {
        self.parameters().into_iter().filter(|p| p.role == Role::Buffer).map(|p| (p.key, p.var)).collect()
    }
}

/// The largest absolute value.
pub(crate) fn largest(t: &Tensor) -> TensorResult<f64> {
    t.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()
}
