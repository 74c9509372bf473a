//! The graph layer on one block.

use candle_core::{Result as TensorResult, Tensor, Var, bail};
use lorimer_model::BlockScope;
use lorimer_tensor::{EdgeKeys, EdgeRule, Ops};

use crate::block::BlockDelta;
use crate::dropout::Dropout;
use crate::parameter::{Parameter, Role};
use crate::step::Step;

const EPS: f64 = 1e-5;

/// A linear layer (outputs, inputs).
#[derive(Debug)]
pub(super) struct Linear {
    pub weight: Var,
    pub bias: Var,
    pub keys: [&'static str; 2],
}

impl Linear {
    fn forward(&self, ops: Ops<'_>, x: &Tensor) -> TensorResult<Tensor> {
        ops.add_bias(&ops.dense(x, self.weight.as_tensor())?, self.bias.as_tensor())
    }
}

/// The layer on one block.
#[derive(Debug)]
pub(super) struct SparseGin {
    /// W_in, W₁, W₂ and W_out.
    pub linears: [Linear; 4],
    pub act: Var,
    pub eps: Var,
    pub gain: Var,
    pub scale: Var,
    pub rule: EdgeRule,
    pub sharpness: f64,
    pub threshold: f64,
    /// The gain of the input's norm, where the input is normed.
    pub ones: Option<Tensor>,
    pub dropout: Dropout,
}

impl SparseGin {
    /// The PReLU.
    fn activate(&self, ops: Ops<'_>, x: &Tensor) -> TensorResult<Tensor> {
        let act = self.act.as_tensor();
        ops.subgraph(&[x], &[act], |t| t[0].gt(0.0)?.where_cond(&t[0], &t[0].broadcast_mul(act)?))
    }

    /// Σ_j w_ij p_j for every row of `p` (rows, d).
    fn brought(&self, ops: Ops<'_>, p: &Tensor, block: &mut BlockScope<'_>) -> TensorResult<Tensor> {
        let Some(mut edges) = block.edges.take() else { bail!("a graph layer has not seen the attention before it") };
        let all = match self.rule.keys {
            // The only key is the row's own.
            EdgeKeys::Own => {
                let own = edges.offsets.windows(2).enumerate();
                let own: Vec<usize> = own.flat_map(|(row, span)| vec![row; span[1] - span[0]]).collect();
                edges = edges.with_columns(own.into_iter());
                p.clone()
            }
            _ => block.keep(p.clone())?,
        };
        let weights = ops.subgraph(&[&edges.sums], &[], |t| {
            (((&t[0] - self.threshold)? * -self.sharpness)?.exp()? + 1.0)?.recip()
        })?;
        ops.along_edges(&edges, &weights, &all)
    }
}

impl BlockDelta for SparseGin {
    fn edges(&self) -> Option<EdgeRule> {
        Some(self.rule)
    }

    fn attended(&self, ops: Ops<'_>, h: &Tensor, block: &mut BlockScope<'_>, step: &Step) -> TensorResult<Tensor> {
        let [into, first, second, out] = &self.linears;
        let x = self.ones.as_ref().map_or_else(|| Ok(h.clone()), |ones| ops.rms_norm(h, ones, EPS))?;
        let p = into.forward(ops, &x)?;
        let brought = self.brought(ops, &p, block)?;
        let eps = self.eps.as_tensor();
        let u = ops.subgraph(&[&p, &brought], &[eps], |t| t[0].broadcast_mul(eps)? + &t[1])?;
        let inner = second.forward(ops, &self.activate(ops, &first.forward(ops, &u)?)?)?;
        let mut z = self.activate(ops, &ops.add(&inner, &u)?)?;
        if let Some(mask) = self.dropout.mask(&z, step)? {
            z = ops.subgraph(&[&z], &[], |t| &t[0] * &mask)?;
        }
        let g = ops.rms_norm(&out.forward(ops, &z)?, self.gain.as_tensor(), EPS)?;
        let scale = self.scale.as_tensor();
        ops.add(h, &ops.subgraph(&[&g], &[scale], |t| t[0].broadcast_mul(scale))?)
    }

    fn kept_width(&self) -> usize {
        if self.reads_other_rows() { self.linears[0].bias.elem_count() } else { 0 }
    }

    fn reads_other_rows(&self) -> bool {
        self.rule.keys != EdgeKeys::Own
    }

    /// A mask goes by the element, and so by what else is in the batch.
    fn rows_are_independent(&self, step: &Step) -> bool {
        self.dropout.is_off(step)
    }

    fn has_effect(&self) -> TensorResult<bool> {
        Ok(crate::delta::largest(&self.scale)? > 0.0 && crate::delta::largest(&self.gain)? > 0.0)
    }

    fn parameters(&self) -> Vec<Parameter<'_>> {
        let linears = self.linears.iter().flat_map(|l| [(l.keys[0], &l.weight), (l.keys[1], &l.bias)]);
        let rest = [("norm.weight", &self.gain), ("act", &self.act), ("eps", &self.eps), ("scale", &self.scale)];
        linears.chain(rest).map(|(key, var)| Parameter::new(key, var, Role::Core)).collect()
    }
}
