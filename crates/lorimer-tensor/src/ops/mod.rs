//! The operations that a model and its adapters are made of: on a [`Tape`] they are recorded, without one they build candle's graph.

pub mod attention;
pub mod bases;
pub mod block_affine;
mod columns;
mod dense;
pub mod gated;
pub mod layer_norm;
pub mod loss;
pub mod low_rank;
pub mod norm;
pub mod project;
pub mod ring;
pub mod rotary;
pub mod segmented;
pub mod sparse;
mod subgraph;

use std::sync::Arc;

use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Result, Tensor};

use crate::kernels::real::Real;
use crate::storage::FrozenWeight;
use crate::tape::Tape;
use attention::along::Along;
use attention::causal::{CheckedGradient, LowRankAttention};
use attention::edges::{EdgeRule, Edges, find_edges};
use attention::{Attention, AttentionForm, Segment};
use gated::{Activate, Activation, GatedUnit};
use layer_norm::LayerNorm;
use loss::head_loss_and_gradient;
use low_rank::Part;
use norm::RmsNorm;
use project::frozen_linear;
use rotary::{Rotary, RotaryTable};
use sparse::SparseIndex;

/// The operations of a model: on a tape they are recorded, without one they build candle's graph.
#[derive(Clone, Copy)]
pub struct Ops<'a>(Option<&'a Tape>);

impl<'a> Ops<'a> {
    /// On a tape.
    pub fn recorded(tape: &'a Tape) -> Self {
        Self(Some(tape))
    }

    /// In candle's graph.
    pub fn plain() -> Self {
        Self(None)
    }

    /// Whether operations are recorded on a tape.
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// The tape, if it is to record something about these inputs on the CPU.
    fn tape(&self, inputs: &[&Tensor]) -> Option<&'a Tape> {
        self.0.filter(|tape| inputs.iter().any(|t| tape.tracks(t)))
    }

    fn two(&self, a: &Tensor, b: &Tensor, op: impl CustomOp2 + Send + Sync + 'static) -> Result<Tensor> {
        let y = a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &op)?;
        if let Some(tape) = self.tape(&[a, b]) {
            let (wants_a, wants_b) = (tape.tracks(a), tape.tracks(b));
            let ids = (a.id(), b.id());
            let (a, b, op) = (a.contiguous()?, b.contiguous()?, Arc::new(op));
            let recompute = {
                let (a, b, op) = (a.clone(), b.clone(), op.clone());
                move || a.apply_op2_no_bwd(&b, op.as_ref())
            };
            tape.keep_recompute(&y, Arc::new(recompute));
            let (a_id, b_id) = ids;
            tape.record(&y, move |g, gradients| {
                // Neither of the operations looks at its output, which is not kept for them.
                let (da, db) = op.bwd(&a, &b, &a, g)?;
                if let Some(da) = da.filter(|_| wants_a) {
                    gradients.add(a_id, da)?;
                }
                if let Some(db) = db.filter(|_| wants_b) {
                    gradients.add(b_id, db)?;
                }
                Ok(())
            });
        }
        Ok(y)
    }

    /// [`crate::rms_norm`].
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        match self.on_cpu(x) {
            true => self.two(x, weight, RmsNorm { eps }),
            false => self.fallback(&[x, weight], |t| crate::rms_norm(&t[0], &t[1], eps)),
        }
    }

    /// [`crate::rotary()`].
    pub fn rotary(&self, x: &Tensor, table: &RotaryTable) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x], |t| crate::rotary(&t[0], table));
        }
        let op = Rotary::new(x, table)?;
        let y = x.contiguous()?.apply_op1_no_bwd(&op)?;
        if let Some(tape) = self.tape(&[x]) {
            // Nothing but the angles is kept.
            let id = x.id();
            tape.record(&y, move |g, gradients| gradients.add(id, op.gradient(g)?));
        }
        Ok(y)
    }

    /// [`crate::gated`].
    pub fn gated(&self, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self.on_cpu(gate) {
            true => self.two(gate, up, GatedUnit(activation)),
            false => self.fallback(&[gate, up], |t| crate::gated(activation, &t[0], &t[1])),
        }
    }

    /// [`crate::silu_mul`].
    pub fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.gated(Activation::Silu, gate, up)
    }

    /// [`crate::activate`].
    pub fn activate(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x], |t| crate::activate(activation, &t[0]));
        }
        let op = Activate(activation);
        let y = x.contiguous()?.apply_op1_no_bwd(&op)?;
        if let Some(tape) = self.tape(&[x]) {
            let (id, x) = (x.id(), x.contiguous()?);
            let again = x.clone();
            tape.keep_recompute(&y, Arc::new(move || again.apply_op1_no_bwd(&Activate(activation))));
            tape.record(&y, move |g, gradients| match op.bwd(&x, &x, g)? {
                Some(dx) => gradients.add(id, dx),
                None => Ok(()),
            });
        }
        Ok(y)
    }

    /// [`crate::layer_norm`].
    pub fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x, weight, bias], |t| crate::layer_norm(&t[0], &t[1], &t[2], eps));
        }
        let op = LayerNorm { eps };
        let inputs = [x, weight, bias];
        let [x, weight, bias] = [x.contiguous()?, weight.contiguous()?, bias.contiguous()?];
        let y = x.apply_op3_no_bwd(&weight, &bias, &op)?;
        if let Some(tape) = self.tape(&inputs) {
            let ids = inputs.map(|t| tape.tracks(t).then(|| t.id()));
            let again = (x.clone(), weight.clone(), bias);
            let recompute = move || again.0.apply_op3_no_bwd(&again.1, &again.2, &LayerNorm { eps });
            tape.keep_recompute(&y, Arc::new(recompute));
            tape.record(&y, move |g, gradients| {
                // It does not look at its output.
                let (dx, dw, db) = op.bwd(&x, &weight, &weight, &x, g)?;
                for (id, gradient) in ids.into_iter().zip([dx, dw, db]) {
                    if let (Some(id), Some(gradient)) = (id, gradient) {
                        gradients.add(id, gradient)?;
                    }
                }
                Ok(())
            });
        }
        Ok(y)
    }

    /// [`crate::attention()`].
    pub fn attention(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        segments: &[Segment],
        form: &AttentionForm,
    ) -> Result<Tensor> {
        let (true, Some(tape)) = (self.on_cpu(q), self.tape(&[q, k, v])) else {
            return self.fallback(&[q, k, v], |t| crate::attention((&t[0], &t[1], &t[2]), segments, form));
        };
        let op = Attention::new((q, k, v), segments, form)?;
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        let y = q.apply_op3_no_bwd(&k, &v, &op)?;
        let kept = y.clone();
        tape.record(&y, move |g, gradients| {
            let (dq, dk, dv) = op.bwd(&q, &k, &v, &kept, &g.contiguous()?)?;
            for (t, d) in [(&q, dq), (&k, dk), (&v, dv)] {
                if let Some(d) = d {
                    gradients.add(t.id(), d)?;
                }
            }
            Ok(())
        });
        Ok(y)
    }

    /// [`crate::attention()`] whose backward on a tape is low-rank where that is within a tolerance: see [`attention::causal`]. Without a tape
    /// gradients are exact. `layer` is named in errors.
    pub fn attention_low_rank(
        &self,
        inputs: (&Tensor, &Tensor, &Tensor),
        (segments, form): (&[Segment], &AttentionForm),
        how: &CheckedGradient,
        layer: usize,
    ) -> Result<Tensor> {
        let op = LowRankAttention::new(inputs, (segments, form), how.rule, layer)?;
        let (q, k, v) = inputs;
        let Some(tape) = self.tape(&[q, k, v]) else { return self.attention(inputs, segments, form) };
        if !q.device().is_cpu() {
            candle_core::bail!("the low-rank gradient of attention is computed on the CPU only");
        }
        let ids = [q, k, v].map(|t| tape.tracks(t).then(|| t.id()));
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        let y = q.apply_op3_no_bwd(&k, &v, op.exact())?;
        let (kept, meter) = (y.clone(), how.meter.clone());
        tape.record(&y, move |g, gradients| {
            let found = op.bwd([&q, &k, &v, &kept, &g.contiguous()?], &meter)?;
            ids.into_iter().zip(found).try_for_each(|(id, d)| id.map_or(Ok(()), |id| gradients.add(id, d)))
        });
        Ok(y)
    }

    /// [`crate::attention_edges`].
    pub fn attention_edges(
        &self,
        (q, k): (&Tensor, &Tensor),
        segments: &[Segment],
        form: &AttentionForm,
        rule: EdgeRule,
    ) -> Result<Edges> {
        if !self.on_cpu(q) {
            return crate::attention_edges((q, k), segments, form, rule);
        }
        let (op, edges) = find_edges((q, k), segments, form, rule)?;
        if let Some(tape) = self.tape(&[q, k]) {
            let ids = [q, k].map(|t| tape.tracks(t).then(|| t.id()));
            let (q, k) = (q.contiguous()?, k.contiguous()?);
            tape.record(&edges.sums, move |g, gradients| {
                let (dq, dk) = op.bwd(&q, &k, &q, &g.contiguous()?)?;
                for (id, gradient) in ids.into_iter().zip([dq, dk]) {
                    if let (Some(id), Some(gradient)) = (id, gradient) {
                        gradients.add(id, gradient)?;
                    }
                }
                Ok(())
            });
        }
        Ok(edges)
    }

    /// [`crate::along_edges`].
    pub fn along_edges(&self, edges: &Edges, weights: &Tensor, x: &Tensor) -> Result<Tensor> {
        match self.on_cpu(x) {
            true => self.two(weights, x, Along::new(edges, weights, x)?),
            false => crate::along_edges(edges, weights, x),
        }
    }

    /// [`crate::smoothed_cross_entropy`] of every row, summed.
    pub fn cross_entropy(&self, logits: &Tensor, targets: &[u32], smoothing: f64) -> Result<Tensor> {
        self.fallback(&[logits], |t| crate::smoothed_cross_entropy(&t[0], targets, smoothing)?.sum_all())
    }

    /// [`frozen_linear`].
    pub fn linear(&self, x: &Tensor, weight: &FrozenWeight) -> Result<Tensor> {
        one(self.project(x, &[Part { weight: Some(weight), low_rank: None }])?)
    }

    /// T x for every row of `x` (rows, n₁ n₂), with the tensor-ring matrix T of two cores (n, n, r, r): see [`ring`].
    pub fn ring_transform(&self, x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x, first, second], |t| t[0].matmul(&ring::ring_matrix(&t[1], &t[2])?.t()?));
        }
        let y = ring::apply(x, first, second)?;
        if let Some(tape) = self.tape(&[x, first, second]) {
            let ids = [x, first, second].map(|t| tape.tracks(t).then(|| t.id()));
            let (values, first, second) = (tape.recompute(x), first.clone(), second.clone());
            tape.record(&y, move |g, gradients| {
                for (id, gradient) in ids.into_iter().zip(ring::gradients(g, &values()?, &first, &second)?) {
                    if let Some(id) = id {
                        gradients.add(id, gradient)?;
                    }
                }
                Ok(())
            });
        }
        Ok(y)
    }

    /// `x Sᵀ` with a sparse matrix of trainable entries: see [`sparse`].
    pub fn sparse(&self, x: &Tensor, values: &Tensor, index: &Arc<SparseIndex>) -> Result<Tensor> {
        if !self.on_cpu(x) || self.0.is_none() {
            return self.fallback(&[x, values], |t| t[0].matmul(&index.matrix(&t[1])?.t()?));
        }
        fn run<T: Real>(tape: Option<&Tape>, x: &Tensor, values: &Tensor, index: &Arc<SparseIndex>) -> Result<Tensor> {
            let y = sparse::forward::<T>(x, values, index)?;
            if let Some(tape) = tape {
                let id = |t: &Tensor| tape.tracks(t).then(|| t.id());
                let (ids, recompute, values, index) =
                    ((id(x), id(values)), tape.recompute(x), values.clone(), index.clone());
                tape.record(&y, move |g, gradients| {
                    let (dx, dv) = sparse::backward::<T>(g, &recompute()?, &values, &index, ids.0.is_some())?;
                    if let (Some(id), Some(dx)) = (ids.0, dx) {
                        gradients.add(id, dx)?;
                    }
                    ids.1.map_or(Ok(()), |id| gradients.add(id, dv))
                });
            }
            Ok(y)
        }
        let tape = self.tape(&[x, values]);
        match x.dtype() {
            DType::F64 => run::<f64>(tape, x, values, index),
            _ => run::<f32>(tape, x, values, index),
        }
    }

    /// `x Wᵀ` with a weight (outputs, inputs) that may have a gradient too.
    pub fn dense(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x, weight], |t| t[0].matmul(&t[1].t()?));
        }
        fn run<T: Real>(tape: Option<&Tape>, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
            let y = dense::forward::<T>(x, weight)?;
            if let Some(tape) = tape {
                let id = |t: &Tensor| tape.tracks(t).then(|| t.id());
                let (x_id, w_id, weight) = (id(x), id(weight), weight.clone());
                let values = w_id.map(|_| tape.recompute(x));
                tape.record(&y, move |g, gradients| {
                    dense::backward::<T>(g, (x_id, values.as_ref()), (w_id, &weight), gradients)
                });
            }
            Ok(y)
        }
        let tape = self.tape(&[x, weight]);
        match x.dtype() {
            DType::F64 => run::<f64>(tape, x, weight),
            _ => run::<f32>(tape, x, weight),
        }
    }

    /// Frozen projections of one input, each with or without a low-rank change beside it: see [`low_rank`].
    pub fn project(&self, x: &Tensor, parts: &[Part<'_>]) -> Result<Vec<Tensor>> {
        let trainable = parts.iter().filter_map(|p| p.low_rank.as_ref()).flat_map(|l| [&l.a, &l.b]);
        let followed: Vec<&Tensor> = std::iter::once(x).chain(trainable).collect();
        if !self.on_cpu(x) {
            return parts.iter().map(|part| self.fallback(&followed, |t| part.reference(&t[0]))).collect();
        }
        match x.dtype() {
            DType::F64 => self.project_typed::<f64>(x, parts, &followed),
            _ => self.project_typed::<f32>(x, parts, &followed),
        }
    }

    fn project_typed<T: Real>(&self, x: &Tensor, parts: &[Part<'_>], followed: &[&Tensor]) -> Result<Vec<Tensor>> {
        let (outputs, down) = low_rank::forward::<T>(x, parts)?;
        if let Some(tape) = self.tape(followed) {
            let parts: Vec<_> = parts.iter().map(|p| p.kept(tape)).collect();
            let input = low_rank::Input {
                id: tape.tracks(x).then(|| x.id()),
                shape: x.dims2()?,
                // Without an A to be trained, a projection's backward does without its input.
                values: parts.iter().any(low_rank::Kept::needs_input).then(|| tape.recompute(x)),
            };
            tape.record_all(&outputs, move |found, gradients| {
                low_rank::backward::<T>(found, &input, &parts, &down, gradients)
            });
        }
        Ok(outputs)
    }

    /// Σ −log p of each row's target under softmax(x Wᵀ), with a frozen head `W` (vocabulary,
    /// width): logits exist for some rows at a time only, and the gradient of `x` is formed beside them. `x` (rows, width) → a scalar in x's type.
    pub fn head_loss(&self, x: &Tensor, head: &FrozenWeight, targets: &[u32], smoothing: f64) -> Result<Tensor> {
        let (true, Some(tape)) = (self.on_cpu(x), self.tape(&[x])) else {
            return self.fallback(&[x], |t| {
                crate::smoothed_cross_entropy(&frozen_linear(&t[0], head)?, targets, smoothing)?.sum_all()
            });
        };
        let (loss, gradient) = head_loss_and_gradient(x, head, targets, smoothing)?;
        let id = x.id();
        tape.record(&loss, move |g, gradients| {
            let scale = g.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            gradients.add(id, (gradient * scale)?)
        });
        Ok(loss)
    }

    fn on_cpu(&self, x: &Tensor) -> bool {
        self.0.is_some() && x.device().is_cpu()
    }
}

/// The only one of a list.
fn one(mut list: Vec<Tensor>) -> Result<Tensor> {
    list.pop().ok_or_else(|| candle_core::Error::Msg("an operation gave nothing".into()))
}

#[cfg(test)]
mod tests;
