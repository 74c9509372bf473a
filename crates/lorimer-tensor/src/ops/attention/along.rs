//! Sums along the edges of an attention map: a product with a sparse matrix of trainable weights.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::edges::Edges;
use crate::kernels::real::Real;
use crate::kernels::simd::sum2;
use crate::kernels::slices::{slice, with_slices};
use crate::kernels::wide::wide;

/// y_i = Σ over the edges e of query i of w_e · x_(key of e): `weights` (edges), `x` (key rows, width) → (rows, width).
pub fn along_edges(edges: &Edges, weights: &Tensor, x: &Tensor) -> Result<Tensor> {
    weights.contiguous()?.apply_op2(&x.contiguous()?, Along::new(edges, weights, x)?)
}

/// The sum along edges, as an operation on their weights and on what they bring.
pub(crate) struct Along {
    offsets: Arc<[usize]>,
    columns: Arc<[usize]>,
    width: usize,
}

impl Along {
    pub(crate) fn new(edges: &Edges, weights: &Tensor, x: &Tensor) -> Result<Self> {
        let ((rows, width), count) = (x.dims2()?, weights.dims1()?);
        if count != edges.columns.len() || edges.columns.iter().any(|&column| column >= rows) {
            candle_core::bail!("{count} weights of {} edges do not fit {rows} rows", edges.columns.len());
        }
        Ok(Self { offsets: edges.offsets.clone(), columns: edges.columns.clone(), width })
    }

    fn forward<T: Real>(&self, weights: &[T], x: &[T]) -> Vec<T> {
        let width = self.width;
        let mut y = vec![T::zero(); (self.offsets.len() - 1) * width];
        let rows = y.par_chunks_mut(width.max(1)).zip(self.offsets.par_windows(2)).with_min_len(16);
        rows.for_each(|(y, span)| {
            for e in span[0]..span[1] {
                let (w, x) = (weights[e], &x[self.columns[e] * width..][..width]);
                y.iter_mut().zip(x).for_each(|(y, &x)| *y += w * x);
            }
        });
        y
    }

    fn backward<T: Real>(&self, weights: &[T], x: &[T], g: &[T]) -> [Vec<T>; 2] {
        let width = self.width;
        let (mut dw, mut dx) = (vec![T::zero(); weights.len()], vec![T::zero(); x.len()]);
        for (row, span) in self.offsets.windows(2).enumerate() {
            let g = &g[row * width..][..width];
            for e in span[0]..span[1] {
                let at = self.columns[e] * width;
                dw[e] = wide!(sum2(g, &x[at..at + width], |a, b| a * b));
                dx[at..at + width].iter_mut().zip(g).for_each(|(dx, &g)| *dx += weights[e] * g);
            }
        }
        [dw, dx]
    }
}

impl CustomOp2 for Along {
    fn name(&self) -> &'static str {
        "sum along edges"
    }

    fn cpu_fwd(&self, w: &CpuStorage, lw: &Layout, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let storage = match x {
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(slice::<f64>(w, lw)?, slice(x, lx)?)),
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(slice::<f32>(w, lw)?, slice(x, lx)?)),
            _ => candle_core::bail!("sum along edges: inputs must be f32 or f64"),
        };
        Ok((storage, Shape::from((self.offsets.len() - 1, self.width))))
    }

    fn bwd(&self, w: &Tensor, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn run<T: Real>(op: &Along, w: &Tensor, x: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let [dw, dx] = with_slices([w, x, g], |[w, x, g]: [&[T]; 3]| Ok(op.backward(w, x, g)))?;
            Ok((Some(Tensor::from_vec(dw, w.shape(), w.device())?), Some(Tensor::from_vec(dx, x.shape(), x.device())?)))
        }
        match x.dtype() {
            DType::F64 => run::<f64>(self, w, x, g),
            _ => run::<f32>(self, w, x, g),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::edges::{EdgeKeys, EdgeRule, attention_edges};
    use super::super::{AttentionForm, Segment};
    use super::*;
    use crate::check::{assert_close, gradient_matches, random};

    #[test]
    fn a_sum_along_edges_is_the_masked_product() -> Result<()> {
        let form = AttentionForm::causal(4, 0.5);
        let (q, k) = ((random((81, 24), 1, DType::F64)? * 3.0)?, (random((81, 8), 2, DType::F64)? * 3.0)?);
        let rule = EdgeRule { above: 0.08, keys: EdgeKeys::All };
        let edges = attention_edges((&q, &k), &[Segment::plain(0, 81)], &form, rule)?;
        let (x, w) = (random((81, 5), 7, DType::F64)?, random(edges.columns.len(), 8, DType::F64)?);
        let mut dense = vec![0.0; 81 * 81];
        for (row, span) in edges.offsets.windows(2).enumerate() {
            for e in span[0]..span[1] {
                dense[row * 81 + edges.columns[e]] = w.get(e)?.to_scalar::<f64>()?;
            }
        }
        let dense = Tensor::from_vec(dense, (81, 81), q.device())?;
        assert_close(&along_edges(&edges, &w, &x)?, &dense.matmul(&x)?, 1e-12)?;
        let few = [Segment { q_start: 0, q_len: 4, keys: vec![(1, 4)] }];
        let edges = attention_edges((&q.narrow(0, 0, 4)?, &k), &few, &form, rule)?;
        let (x, w) = (random((6, 3), 7, DType::F64)?, random(edges.columns.len(), 8, DType::F64)?);
        gradient_matches(&x, |x| along_edges(&edges, &w, x))?;
        gradient_matches(&w, |w| along_edges(&edges, w, &x))?;
        assert!(along_edges(&edges, &w, &x.narrow(0, 0, 2)?).is_err());
        Ok(())
    }
}
