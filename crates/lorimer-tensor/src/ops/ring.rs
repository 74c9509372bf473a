//! A tensor-ring matrix of two cores applied to rows: T x with T[(i₁, i₂), (j₁, j₂)] = Σ_ab C¹[i₁, j₁, a, b] C²[i₂, j₂, b, a] (TLoRA,
//! arXiv 2501.08727), without forming T.
//!
//! Two products with the cores as right sides, (rows·n₁, n₂) · (n₂, n₂ r²) and (rows·n₂, n₁ r²) · (n₁ r², n₁), and between them an exchange
//! of places, for as many rows at a time as the second-level cache holds. The backward computes what lies between them again in place of
//! keeping it.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::kernels::products::{Out, Product, Right, Term, run};
use crate::kernels::real::Real;
use crate::kernels::slices::with_slices;

/// The reference form: T as a matrix (n₁ n₂, n₁ n₂).
pub fn ring_matrix(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let ((n1, _, r, _), (n2, ..)) = (first.dims4()?, second.dims4()?);
    // Σ_ab over the flattened ring places, the second core's transposed.
    let left = first.reshape((n1 * n1, r * r))?;
    let right = second.transpose(2, 3)?.reshape((n2 * n2, r * r))?;
    let t = left.matmul(&right.t()?)?.reshape((n1, n1, n2, n2))?.permute((0, 2, 1, 3))?;
    t.reshape((n1 * n2, n1 * n2))
}

/// Sizes of x (rows, n₁ n₂) and the cores.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    rows: usize,
    n1: usize,
    n2: usize,
    /// r².
    ring: usize,
}

impl Sizes {
    pub(crate) fn of(x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Self> {
        let ((rows, width), (n1, m1, r1, q1), (n2, m2, r2, q2)) = (x.dims2()?, first.dims4()?, second.dims4()?);
        let square = n1 == m1 && n2 == m2 && [q1, r2, q2].iter().all(|r| *r == r1);
        if !square || n1 * n2 != width {
            candle_core::bail!(
                "tensor ring: x is ({rows}, {width}), the cores {:?} and {:?}; expected (n, n, r, r) with widths that multiply to x's",
                first.dims(),
                second.dims()
            );
        }
        Ok(Self { rows, n1, n2, ring: r1 * r1 })
    }
}

/// C² as (j₂, (i₂, a, b)) and C¹ as ((j₁, a, b), i₁).
fn matrices(first: &Tensor, second: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((n1, _, r, _), (n2, ..)) = (first.dims4()?, second.dims4()?);
    let second = second.permute((1, 0, 3, 2))?.contiguous()?.reshape((n2, n2 * r * r))?;
    let first = first.permute((1, 2, 3, 0))?.contiguous()?.reshape((n1 * r * r, n1))?;
    Ok((first, second))
}

/// (rows, p, q, c) → (rows, q, p, c).
fn exchange<T: Real>(values: &[T], (p, q, c): (usize, usize, usize)) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for values in values.chunks_exact((p * q * c).max(1)) {
        for j in 0..q {
            for i in 0..p {
                out.extend_from_slice(&values[(i * q + j) * c..][..c]);
            }
        }
    }
    out
}

fn product<T: Real>(shape: (usize, usize), term: Term<'_, T>) -> Result<Vec<T>> {
    Ok(run(vec![Product::new(shape, vec![term])])?.pop().unwrap_or_default())
}

/// Numbers between the two products that are alive at a time: half of a second-level cache. The cut into blocks of rows follows from it,
/// not from the number of threads, and neither does the result.
const BLOCK: usize = 1 << 15;

impl Sizes {
    fn block(&self) -> usize {
        (BLOCK / (self.n1 * self.n2 * self.ring).max(1)).max(1)
    }

    /// What lies between the products: (rows·n₂, n₁ r²) for some rows of x.
    fn between<T: Real>(&self, x: &[T], second: &[T]) -> Result<Vec<T>> {
        let (rows, width) = (x.len() / self.n2, self.n2 * self.ring);
        let z = product((rows, width), Term::backward(x, self.n2, Right::Slice(second, width)))?;
        Ok(exchange(&z, (self.n1, self.n2, self.ring)))
    }
}

pub(crate) fn forward<T: Real>(x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(x, first, second)?;
    let Sizes { rows, n1, n2, ring } = sizes;
    let (first, second) = matrices(first, second)?;
    with_slices([x, &first, &second], |[x, first, second]: [&[T]; 3]| {
        let mut out = vec![T::zero(); x.len()];
        let block = (sizes.block() * n1 * n2).max(1);
        out.par_chunks_mut(block).zip(x.par_chunks(block)).try_for_each(|(out, x)| {
            let z = sizes.between(x, second)?;
            let y = product((x.len() / n1, n1), Term::backward(&z, n1 * ring, Right::Slice(first, n1)))?;
            out.copy_from_slice(&exchange(&y, (n2, n1, 1)));
            Result::Ok(())
        })?;
        Tensor::from_vec(out, (rows, n1 * n2), &Device::Cpu)
    })
}

/// Gradients of x, C¹ and C².
pub(crate) fn backward<T: Real>(g: &Tensor, x: &Tensor, first: &Tensor, second: &Tensor) -> Result<[Tensor; 3]> {
    let sizes = Sizes::of(x, first, second)?;
    let Sizes { rows, n1, n2, ring } = sizes;
    let (depth, width, r) = (n1 * ring, n2 * ring, first.dim(2)?);
    let (m1, m2) = matrices(first, second)?;
    with_slices([g, x, &m1, &m2], |[g, x, m1, m2]: [&[T]; 4]| {
        let mut dx = vec![T::zero(); x.len()];
        let block = (sizes.block() * n1 * n2).max(1);
        let blocks = dx.par_chunks_mut(block).zip(x.par_chunks(block)).zip(g.par_chunks(block));
        let parts = blocks.map(|((dx, x), g)| {
            let (outer, inner) = (x.len() / n1, x.len() / n2);
            let z = sizes.between(x, m2)?;
            let g = exchange(g, (n1, n2, 1));
            let dz = product((outer, depth), Term::forward(&g, n1, Right::Slice(m1, n1)))?;
            let dz = exchange(&dz, (n2, n1, ring));
            let into = Out::Into(dx, false);
            let found = run(vec![
                Product::new((depth, n1), vec![Term::outer(&z, (outer, depth), Right::Slice(&g, n1))]),
                Product::new((n2, width), vec![Term::outer(x, (inner, n2), Right::Slice(&dz, width))]),
                Product {
                    out: into,
                    rows: inner,
                    columns: n2,
                    terms: vec![Term::forward(&dz, width, Right::Slice(m2, width))],
                },
            ])?;
            Ok(found)
        });
        let mut sums = [vec![T::zero(); depth * n1], vec![T::zero(); n2 * width]];
        for part in parts.collect::<Result<Vec<_>>>()? {
            for (sum, part) in sums.iter_mut().zip(part) {
                sum.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
        }
        let [dm1, dm2] = sums;
        let tensor = |values: Vec<T>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok([
            tensor(dx, &[rows, n1 * n2])?,
            tensor(dm1, &[n1, r, r, n1])?.permute((3, 0, 1, 2))?.contiguous()?,
            tensor(dm2, &[n2, n2, r, r])?.permute((1, 0, 3, 2))?.contiguous()?,
        ])
    })
}

/// [`forward`] by type.
pub(crate) fn apply(x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => forward::<f64>(x, first, second),
        _ => forward::<f32>(x, first, second),
    }
}

/// [`backward`] by type.
pub(crate) fn gradients(g: &Tensor, x: &Tensor, first: &Tensor, second: &Tensor) -> Result<[Tensor; 3]> {
    match x.dtype() {
        DType::F64 => backward::<f64>(g, x, first, second),
        _ => backward::<f32>(g, x, first, second),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::check::{assert_close, random};
    use crate::ops::Ops;
    use crate::tape::{Gradients, Tape};

    #[test]
    fn outputs_and_gradients_equal_those_of_the_matrix() -> Result<()> {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let x = Var::from_tensor(&random((7, 12), 1, dtype)?)?;
            let first = Var::from_tensor(&random((3, 3, 2, 2), 2, dtype)?)?;
            let second = Var::from_tensor(&random((4, 4, 2, 2), 3, dtype)?)?;
            let seed = random((7, 12), 4, dtype)?;
            let expected_y = x.matmul(&ring_matrix(&first, &second)?.t()?)?;
            let expected = (&expected_y * &seed)?.sum_all()?.backward()?;
            let tape = Tape::new([x.as_tensor(), first.as_tensor(), second.as_tensor()]);
            let y = Ops::recorded(&tape).ring_transform(&x, &first, &second)?;
            assert_close(&y, &expected_y, tolerance)?;
            let mut found = Gradients::default();
            tape.backward(&y, seed, &mut found)?;
            for var in [&x, &first, &second] {
                let (a, b) = (found.get(var), expected.get(var));
                assert_close(a.expect("a gradient"), b.expect("a gradient"), tolerance)?;
            }
        }
        Ok(())
    }
}
