//! A tensor-ring matrix of two cores applied to rows: T x with T[(i₁, i₂), (j₁, j₂)] = Σ_ab C¹[i₁, j₁, a, b] C²[i₂, j₂, b, a] (TLoRA,
//! arXiv 2501.08727), without forming T.
//!
//! Two products with the cores as right sides, (rows·n₁, n₂) · (n₂, n₂ r²) and (rows·n₂, n₁ r²) · (n₁ r², n₁), and between them an exchange
//! of places. The backward computes what lies between them again in place of keeping it.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::products::{Product, Right, Term, run};
use crate::raw::{Real, with_slices};

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

/// (rows, p, q, c) → (rows, q, p, c) on all threads.
fn exchange<T: Real>(values: &[T], (p, q, c): (usize, usize, usize)) -> Vec<T> {
    let mut out = vec![T::zero(); values.len()];
    let row = (p * q * c).max(1);
    out.par_chunks_mut(row).zip(values.par_chunks(row)).for_each(|(out, values)| {
        for i in 0..p {
            for j in 0..q {
                let (from, to) = ((i * q + j) * c, (j * p + i) * c);
                out[to..to + c].copy_from_slice(&values[from..from + c]);
            }
        }
    });
    out
}

fn product<T: Real>(shape: (usize, usize), term: Term<'_, T>) -> Result<Vec<T>> {
    Ok(run(vec![Product::new(shape, vec![term])])?.pop().unwrap_or_default())
}

/// Pieces that a long sum is cut into, so that there is work for all threads. Their number does not depend on that of the threads.
const PIECES: usize = 8;

/// `leftᵀ · right` for `left` (depth, m) and `right` (depth, n) with many more rows than columns.
fn long_outer<T: Real>(left: &[T], right: &[T], (depth, m, n): (usize, usize, usize)) -> Result<Vec<T>> {
    let rows = depth.div_ceil(PIECES).max(1);
    let pieces = left.chunks(rows * m).zip(right.chunks(rows * n)).map(|(left, right)| {
        Product::new((m, n), vec![Term::outer(left, (left.len() / m, m), Right::Slice(right, n))])
    });
    let mut found = run(pieces.collect())?.into_iter();
    let mut sum = found.next().unwrap_or_else(|| vec![T::zero(); m * n]);
    for piece in found {
        sum.iter_mut().zip(piece).for_each(|(sum, v)| *sum += v);
    }
    Ok(sum)
}

impl Sizes {
    /// What lies between the products: (rows·n₂, n₁ r²).
    fn between<T: Real>(&self, x: &[T], second: &[T]) -> Result<Vec<T>> {
        let Self { rows, n1, n2, ring } = *self;
        let width = n2 * ring;
        let z = product((rows * n1, width), Term::backward(x, n2, Right::Slice(second, width)))?;
        Ok(exchange(&z, (n1, n2, ring)))
    }
}

pub(crate) fn forward<T: Real>(x: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(x, first, second)?;
    let Sizes { rows, n1, n2, ring } = sizes;
    let (first, second) = matrices(first, second)?;
    with_slices([x, &first, &second], |[x, first, second]: [&[T]; 3]| {
        let z = sizes.between(x, second)?;
        let y = product((rows * n2, n1), Term::backward(&z, n1 * ring, Right::Slice(first, n1)))?;
        Tensor::from_vec(exchange(&y, (n2, n1, 1)), (rows, n1 * n2), &Device::Cpu)
    })
}

/// Gradients of x, C¹ and C².
pub(crate) fn backward<T: Real>(g: &Tensor, x: &Tensor, first: &Tensor, second: &Tensor) -> Result<[Tensor; 3]> {
    let sizes = Sizes::of(x, first, second)?;
    let Sizes { rows, n1, n2, ring } = sizes;
    let (depth, width, r) = (n1 * ring, n2 * ring, first.dim(2)?);
    let (m1, m2) = matrices(first, second)?;
    with_slices([g, x, &m1, &m2], |[g, x, m1, m2]: [&[T]; 4]| {
        let z = sizes.between(x, m2)?;
        let g = exchange(g, (n1, n2, 1));
        let dm1 = long_outer(&z, &g, (rows * n2, depth, n1))?;
        let dz = product((rows * n2, depth), Term::forward(&g, n1, Right::Slice(m1, n1)))?;
        let dz = exchange(&dz, (n2, n1, ring));
        let dm2 = long_outer(x, &dz, (rows * n1, n2, width))?;
        let dx = product((rows * n1, n2), Term::forward(&dz, width, Right::Slice(m2, width)))?;
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
