//! Operations on rows and columns: sums, scales, parts, and rows taken by index.

use super::Ops;
use crate::kernels::real::Real;
use crate::kernels::slices::with_slices;
use crate::tape::{Gradients, SERIAL, Tape, add};
use candle_core::{DType, Result, Tensor, TensorId};
use rayon::prelude::*;

/// `x ∘ scale`, column by column.
pub(super) fn scaled<T: Real>(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
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

/// The columns of a matrix in parts of some widths.
pub(super) fn columns(x: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let part = |i: usize| x.narrow(1, widths[..i].iter().sum(), widths[i])?.contiguous();
    (0..widths.len()).map(part).collect()
}

/// Adds the rows of `g` to the rows `index` of the gradient of `x`.
pub(super) fn scatter<T: Real>(
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

impl Ops<'_> {
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
}
