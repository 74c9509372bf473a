//! The operations that a model and its adapters are made of: on a [`Tape`] they are recorded, without one they build candle's graph.

pub mod attention;
pub mod bases;
pub mod block_affine;
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

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, TensorId, Var};
use rayon::prelude::*;

use crate::kernels::real::Real;
use crate::kernels::slices::with_slices;
use crate::storage::FrozenWeight;
use crate::tape::{Gradients, SERIAL, Tape, add};
use attention::along::Along;
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

/// Where gradients of a subgraph belong, and the tensors of its graph that they are found of.
type Leaves = Vec<(TensorId, Tensor)>;

/// The inputs as leaves of a graph of its own where the tape follows them, and the leaves with the parameters.
fn leaves(tape: &Tape, inputs: &[&Tensor], parameters: &[&Tensor]) -> Result<(Vec<Tensor>, Leaves)> {
    let (mut leaves, mut given) = (Vec::new(), Vec::new());
    for &input in inputs {
        if tape.tracks(input) {
            let leaf = Var::from_tensor(&input.detach())?;
            given.push(leaf.as_tensor().clone());
            leaves.push((input.id(), leaf.as_tensor().clone()));
        } else {
            given.push(input.clone());
        }
    }
    leaves.extend(parameters.iter().filter(|p| tape.tracks(p)).map(|&p| (p.id(), p.clone())));
    Ok((given, leaves))
}

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

    /// A subgraph recorded by autograd: any function of candle tensors, recorded whole. Its own graph is made in the forward and walked in the backward.
    /// `parameters` are the trainable tensors that `f` uses besides its inputs.
    pub fn subgraph(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        one(self.subgraph_all(inputs, parameters, |t| Ok(vec![f(t)?]))?)
    }

    /// [`Self::subgraph`] with several outputs. An output that is a parameter as it is, or depends on none, is passed on.
    pub fn subgraph_all(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<Tensor>> {
        let both: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
        let Some(tape) = self.tape(&both) else {
            let outputs = f(&inputs.iter().map(|&t| t.clone()).collect::<Vec<_>>())?;
            // On a tape that does not follow it, nobody will ask for its graph.
            return Ok(match self.0 {
                Some(_) => outputs.iter().map(Tensor::detach).collect(),
                None => outputs,
            });
        };
        let (given, leaves) = leaves(tape, inputs, parameters)?;
        let graphs = f(&given)?;
        let passed = |t: &Tensor| !t.track_op() || parameters.iter().any(|p| p.id() == t.id());
        let outputs: Vec<Tensor> = graphs.iter().map(|t| if passed(t) { t.clone() } else { t.detach() }).collect();
        let (ids, graphs): (Vec<Tensor>, Vec<Tensor>) =
            outputs.iter().cloned().zip(graphs).filter(|(_, t)| !passed(t)).unzip();
        if graphs.is_empty() {
            return Ok(outputs);
        }
        tape.record_all(&ids, move |found, gradients| {
            let mut total: Option<Tensor> = None;
            for (graph, g) in graphs.iter().zip(found) {
                let Some(g) = g else { continue };
                let sum = graph.contiguous()?.apply_op1(Seed(g.clone()))?;
                total = Some(match total {
                    Some(total) => (total + sum)?,
                    None => sum,
                });
            }
            let Some(total) = total else { return Ok(()) };
            let mut found = total.backward()?;
            for (id, leaf) in leaves {
                if let Some(gradient) = found.remove(&leaf) {
                    gradients.add(id, gradient.contiguous()?)?;
                }
            }
            Ok(())
        });
        Ok(outputs)
    }

    /// [`Self::subgraph`] of a scalar whose gradients are found at once, so that its graph is gone when this returns; the backward
    /// only multiplies them. For a part of a large sum.
    pub fn subgraph_eager(
        &self,
        inputs: &[&Tensor],
        parameters: &[&Tensor],
        f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let both: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
        let Some(tape) = self.tape(&both) else { return self.subgraph(inputs, parameters, f) };
        let (given, leaves) = leaves(tape, inputs, parameters)?;
        let graph = f(&given)?;
        let value = graph.detach();
        if !graph.track_op() {
            return Ok(value);
        }
        let mut found = graph.backward()?;
        let gradients: Vec<(TensorId, Tensor)> =
            leaves.into_iter().filter_map(|(id, leaf)| Some((id, found.remove(&leaf)?.detach()))).collect();
        tape.record(&value, move |g, sums| {
            for (id, gradient) in &gradients {
                sums.add(*id, gradient.broadcast_mul(g)?.contiguous()?)?;
            }
            Ok(())
        });
        Ok(value)
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

    /// `a + b`, of one shape.
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if self.0.is_none() {
            return a + b;
        }
        let y = add(a, b)?;
        if let Some(tape) = self.tape(&[a, b]) {
            let ids: Vec<TensorId> = [a, b].into_iter().filter(|t| tape.tracks(t)).map(Tensor::id).collect();
            tape.record(&y, move |g, gradients| ids.iter().try_for_each(|&id| gradients.share(id, g)));
        }
        Ok(y)
    }

    /// `x` (rows, n) times a number a column, `scale` (n).
    pub fn scale_columns(&self, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x, scale], |t| t[0].broadcast_mul(&t[1]));
        }
        let tape = self.tape(&[x, scale]);
        match x.dtype() {
            DType::F64 => scale_columns::<f64>(tape, x, scale),
            _ => scale_columns::<f32>(tape, x, scale),
        }
    }

    /// `x + bias` with a bias a column.
    pub fn add_bias(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        if !self.on_cpu(x) {
            return self.fallback(&[x, bias], |t| t[0].broadcast_add(&t[1]));
        }
        let y = x.detach().broadcast_add(&bias.detach())?;
        if let Some(tape) = self.tape(&[x, bias]) {
            // Nothing is kept.
            let ids = [x, bias].map(|t| tape.tracks(t).then(|| t.id()));
            tape.record(&y, move |g, gradients| {
                if let Some(id) = ids[1] {
                    gradients.add(id, g.sum(0)?)?;
                }
                ids[0].map_or(Ok(()), |id| gradients.share(id, g))
            });
        }
        Ok(y)
    }

    /// Another shape for the same elements.
    pub fn reshape(&self, x: &Tensor, shape: (usize, usize)) -> Result<Tensor> {
        let (y, before) = (x.reshape(shape)?, x.dims2()?);
        if let Some(tape) = self.tape(&[x]) {
            let id = x.id();
            // A new tensor even where nothing is to be done, so that each has a gradient of its own.
            let y = y.detach();
            tape.record(&y, move |g, gradients| gradients.share(id, &g.reshape(before)?));
            return Ok(y);
        }
        Ok(y)
    }

    /// The columns of `x` (rows, Σ widths) in parts of these widths.
    pub fn split<const N: usize>(&self, x: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
        let wrong = |_| candle_core::Error::Msg("an operation gave nothing".into());
        self.split_all(x, &widths)?.try_into().map_err(wrong)
    }

    /// [`Self::split`] into any number of parts.
    pub fn split_all(&self, x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
        let (rows, width) = x.dims2()?;
        if widths.iter().sum::<usize>() != width {
            candle_core::bail!("{width} columns do not divide into {widths:?}");
        }
        let (true, Some(tape)) = (self.on_cpu(x), self.tape(&[x])) else {
            return self.subgraph_all(&[x], &[], |t| columns(&t[0], widths));
        };
        let (id, dtype, parts) = (x.id(), x.dtype(), columns(&x.detach(), widths)?);
        let widths = widths.to_vec();
        tape.record_all(&parts, move |found, gradients| {
            let part = |(g, n): (&Option<Tensor>, usize)| match g {
                Some(g) => Ok(g.clone()),
                None => Tensor::zeros((rows, n), dtype, &candle_core::Device::Cpu),
            };
            let all = found.iter().zip(widths).map(part).collect::<Result<Vec<_>>>()?;
            gradients.add(id, Tensor::cat(&all, 1)?.contiguous()?)
        });
        Ok(parts)
    }

    /// Rows `index` of `x` (rows, width).
    pub fn rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        let select = |x: &Tensor| x.index_select(&Tensor::from_slice(index, index.len(), x.device())?, 0);
        let (true, Some(tape)) = (self.on_cpu(x), self.tape(&[x])) else {
            return self.fallback(&[x], |t| select(&t[0]));
        };
        let y = select(&x.detach())?;
        let (id, shape, index) = (x.id(), x.dims2()?, index.to_vec());
        tape.record(&y, move |g, gradients| match g.dtype() {
            DType::F64 => scatter::<f64>(g, &index, id, shape, gradients),
            _ => scatter::<f32>(g, &index, id, shape, gradients),
        });
        Ok(y)
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
        let (outputs, thin) = low_rank::forward::<T>(x, parts)?;
        if let Some(tape) = self.tape(followed) {
            let parts: Vec<_> = parts.iter().map(|p| p.kept(tape)).collect();
            let input = low_rank::Input {
                id: tape.tracks(x).then(|| x.id()),
                shape: x.dims2()?,
                // Without an A to be trained, a projection's backward does without its input.
                values: parts.iter().any(low_rank::Kept::needs_input).then(|| tape.recompute(x)),
            };
            tape.record_all(&outputs, move |found, gradients| {
                low_rank::backward::<T>(found, &input, &parts, &thin, gradients)
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

    /// Without a tape, `f` in candle's graph; with one, a subgraph.
    fn fallback(&self, inputs: &[&Tensor], f: impl FnOnce(&[Tensor]) -> Result<Tensor>) -> Result<Tensor> {
        self.subgraph(inputs, &[], f)
    }
}

/// `x ∘ scale`, column by column.
fn scaled<T: Real>(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let n = scale.elem_count().max(1);
    with_slices([x, scale], |[x, scale]: [&[T]; 2]| {
        let mut y = vec![T::zero(); x.len()];
        let rows = SERIAL.div_ceil(n) * n;
        y.par_chunks_mut(rows).zip(x.par_chunks(rows)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                y.iter_mut().zip(x.iter().zip(scale)).for_each(|(y, (&x, &s))| *y = x * s);
            }
        });
        Ok(y)
    })
    .and_then(|y| Tensor::from_vec(y, x.shape(), x.device()))
}

fn scale_columns<T: Real>(tape: Option<&Tape>, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let y = scaled::<T>(x, scale)?;
    if let Some(tape) = tape {
        let (x_id, s_id) = (tape.tracks(x).then(|| x.id()), tape.tracks(scale).then(|| scale.id()));
        // The scale's gradient alone needs x.
        let scaled_by = s_id.map(|id| (id, tape.recompute(x)));
        let scale = scale.clone();
        tape.record(&y, move |g, gradients| {
            if let Some((id, values)) = scaled_by {
                let n = scale.elem_count().max(1);
                let sum = with_slices([g, &values()?], |[g, x]: [&[T]; 2]| {
                    let mut sum = vec![T::zero(); n];
                    for (g, x) in g.chunks_exact(n).zip(x.chunks_exact(n)) {
                        sum.iter_mut().zip(g.iter().zip(x)).for_each(|(sum, (&g, &x))| *sum += g * x);
                    }
                    Ok(sum)
                })?;
                gradients.add(id, Tensor::from_vec(sum, scale.shape(), scale.device())?)?;
            }
            match x_id {
                Some(id) => gradients.add(id, scaled::<T>(g, &scale)?),
                None => Ok(()),
            }
        });
    }
    Ok(y)
}

/// The begin of a backward: a number of no meaning whose gradient, in what it is made of, is the given one.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let zero = match storage {
            CpuStorage::F64(_) => CpuStorage::F64(vec![0.0]),
            _ => CpuStorage::F32(vec![0.0]),
        };
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// The columns of a matrix in parts of some widths.
fn columns(x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let part = |i: usize| x.narrow(1, widths[..i].iter().sum(), widths[i])?.contiguous();
    (0..widths.len()).map(part).collect()
}

/// The only one of a list.
fn one(mut list: Vec<Tensor>) -> Result<Tensor> {
    list.pop().ok_or_else(|| candle_core::Error::Msg("an operation gave nothing".into()))
}

/// Adds the rows of `g` to the rows `index` of the gradient of `x`.
fn scatter<T: Real>(
    g: &Tensor,
    index: &[u32],
    x: TensorId,
    shape: (usize, usize),
    gradients: &mut Gradients,
) -> Result<()> {
    let width = shape.1;
    with_slices([g], |[g]: [&[T]; 1]| {
        gradients.accumulate(x, shape, |dx: &mut [T], keep| {
            if !keep {
                dx.fill(T::zero());
            }
            for (&row, g) in index.iter().zip(g.chunks_exact(width.max(1))) {
                dx[row as usize * width..][..width].iter_mut().zip(g).for_each(|(dx, &g)| *dx += g);
            }
            Ok(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{assert_close, random};
    use candle_core::Device;

    /// Σ f(x)·s on a tape: the gradient of x, and the value.
    fn on_tape(x: &Tensor, f: impl Fn(Ops<'_>, &Tensor) -> Result<Tensor>) -> Result<(Tensor, f64)> {
        let tape = Tape::new([x]);
        let ops = Ops::recorded(&tape);
        let y = f(ops, x)?;
        let seed = random(y.shape().clone(), 77, DType::F64)?;
        let total = ops.subgraph(&[&y], &[], |t| (&t[0] * &seed)?.sum_all())?;
        let mut gradients = Gradients::default();
        tape.backward(&total, Tensor::ones((), DType::F64, &Device::Cpu)?, &mut gradients)?;
        let gradient = gradients.remove(x).ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?;
        Ok((gradient, total.to_scalar()?))
    }

    /// The recorded form against candle's graph of the same operations, and against central differences, in f64.
    fn holds(x: Tensor, f: impl Fn(Ops<'_>, &Tensor) -> Result<Tensor>) -> Result<()> {
        let (gradient, value) = on_tape(&x, &f)?;
        let var = Var::from_tensor(&x)?;
        let y = f(Ops::plain(), var.as_tensor())?;
        let seed = random(y.shape().clone(), 77, DType::F64)?;
        let total = (y * seed)?.sum_all()?;
        assert!((total.to_scalar::<f64>()? - value).abs() < 1e-9 * (1.0 + value.abs()));
        let plain = total.backward()?;
        assert_close(&gradient, plain.get(&var).expect("a gradient"), 1e-9)?;
        let direction = random(x.shape().clone(), 5, DType::F64)?;
        let at = |h: f64| -> Result<f64> { Ok(on_tape(&(&x + (&direction * h)?)?, &f)?.1) };
        let numeric = (at(1e-5)? - at(-1e-5)?) / 2e-5;
        let along: f64 = (&gradient * &direction)?.sum_all()?.to_scalar()?;
        assert!((numeric - along).abs() < 1e-6 * (1.0 + along.abs()), "{numeric} against {along}");
        Ok(())
    }

    #[test]
    fn recorded_operations_equal_plain_ones() -> Result<()> {
        let x = || random((7, 12), 1, DType::F64);
        let weight = FrozenWeight::Dense(random((9, 12), 2, DType::F64)?);
        let head = FrozenWeight::Dense(random((30, 12), 3, DType::F64)?);
        let (norm, other) = (random(12, 4, DType::F64)?, x()?);
        holds(x()?, |ops, x| ops.rms_norm(x, &norm, 1e-6))?;
        holds(x()?, |ops, x| ops.silu_mul(x, &other))?;
        holds(x()?, |ops, x| ops.silu_mul(&other, x))?;
        holds(x()?, |ops, x| ops.gated(Activation::GeluTanh, x, &ops.activate(Activation::Gelu, x)?))?;
        let shift = random(12, 8, DType::F64)?;
        holds(x()?, |ops, x| ops.layer_norm(x, &norm, &shift, 1e-6))?;
        holds(norm.clone(), |ops, w| ops.layer_norm(&other, w, &shift, 1e-6))?;
        holds(shift.clone(), |ops, b| ops.layer_norm(&other, &norm, b, 1e-6))?;
        let table = RotaryTable::new(&[0, 1, 2, 3, 0, 1, 9], &[1.0, 0.1], 1.0);
        holds(x()?, |ops, x| ops.rotary(x, &table))?;
        holds(x()?, |ops, x| ops.linear(x, &weight))?;
        holds(x()?, |ops, x| ops.rows(x, &[0, 2, 2, 6]))?;
        holds(x()?, |ops, x| ops.reshape(x, (14, 6)))?;
        holds(x()?, |ops, x| ops.add_bias(x, &shift))?;
        holds(shift.clone(), |ops, b| ops.add_bias(&other, b))?;
        holds(x()?, |ops, x| {
            let [a, _, b] = ops.split(x, [5, 2, 5])?;
            ops.silu_mul(&a, &b)
        })?;
        for smoothing in [0.0, 0.2] {
            holds(x()?, |ops, x| ops.head_loss(x, &head, &[0, 29, 3, 3, 7, 1, 2], smoothing))?;
        }
        // A tensor that is used twice gets both gradients.
        holds(x()?, |ops, x| ops.add(x, &ops.silu_mul(x, x)?))?;
        let segments = [
            Segment { q_start: 0, q_len: 4, keys: vec![(0, 4)] },
            Segment { q_start: 4, q_len: 3, keys: vec![(0, 2), (4, 3)] },
        ];
        let narrow = random((7, 4), 6, DType::F64)?;
        holds(x()?, |ops, x| ops.attention((x, &narrow, &narrow), &segments, &AttentionForm::causal(4, 0.5)))?;
        holds(random((7, 4), 6, DType::F64)?, |ops, k| {
            ops.attention((&other, k, k), &segments, &AttentionForm::causal(4, 0.5))
        })
    }
}
