//! Sums of matrix products, several at a time in one parallel part: `out = keep·out + Σ left · right`.
//!
//! A training step of a small model is some hundreds of products of a few hundred rows. Done one after the other, each packs
//! both its sides, wakes the threads and waits for the slowest; a low-rank change beside a frozen weight is two more, of
//! inner or outer size r. Here what can run together does: several results out of one input (query, key and value; gate and up), and
//! several terms into one result (`g W + dU A`). The right side is packed where it is used, out of whatever it is stored in, so that
//! a weight in fewer bits is expanded for some columns at a time and never whole; the left side is read where it lies.
//!
//! On x86-64 with AVX2 and FMA an own kernel does this in f32: tiles of 6 × 16 numbers in registers (14 × 32 with AVX-512) over panels of
//! 16 columns (Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). Elsewhere few rows are dot products ([`portable`])
//! and faer multiplies more, and f64, term by term. The cut into tasks does not depend on the number of threads, and neither does the result.

#[cfg(target_arch = "x86_64")]
pub(crate) mod kernel;
mod portable;
mod right;
pub(crate) mod terms;

use candle_core::Result;
use rayon::prelude::*;

use crate::kernels::portable::FUSED;
use crate::kernels::real::Real;
use crate::kernels::shared::{Shared, Strides};
use crate::kernels::slices::product;
pub(crate) use terms::{Out, Product, Right, Term};

/// Rows of a weight that are expanded at a time where the kernel does not run.
const TILE_ROWS: usize = 128;

impl<'a, T: Real> Term<'a, T> {
    /// `left · weightᵀ`, the forward of a projection: `left` (rows, depth) row-major, `weight` (columns, depth).
    pub(crate) fn forward(left: &'a [T], depth: usize, right: Right<'a, T>) -> Self {
        Self { left, strides: Strides(depth, 1), depth, right, transposed: true }
    }

    /// `left · right`: `left` (rows, depth) row-major, `right` (depth, columns).
    pub(crate) fn backward(left: &'a [T], depth: usize, right: Right<'a, T>) -> Self {
        Self { left, strides: Strides(depth, 1), depth, right, transposed: false }
    }

    /// `leftᵀ · right`: `left` (depth, rows) row-major, `right` (depth, columns).
    pub(crate) fn outer(left: &'a [T], (depth, rows): (usize, usize), right: Right<'a, T>) -> Self {
        Self { left, strides: Strides(1, rows), depth, right, transposed: false }
    }
}

impl<'a, T: Real> Product<'a, T> {
    /// A new result.
    pub(crate) fn new((rows, columns): (usize, usize), terms: Vec<Term<'a, T>>) -> Self {
        Self { out: Out::New, rows, columns, terms }
    }

    fn check(&self) {
        if let Out::Into(out, _) = &self.out {
            assert_eq!(out.len(), self.rows * self.columns, "product: destination");
        }
        assert!(!self.terms.is_empty(), "product: no term");
        for term in &self.terms {
            let Strides(row, depth) = term.strides;
            let last = self.rows.saturating_sub(1) * row + term.depth.saturating_sub(1) * depth;
            assert!(self.rows * term.depth == 0 || last < term.left.len(), "product: left side too short");
            let wanted = if term.transposed { (self.columns, term.depth) } else { (term.depth, self.columns) };
            match term.right {
                Right::Slice(values, length) => {
                    assert!(wanted.1 <= length && wanted.0 * length <= values.len(), "product: right side too short");
                }
                Right::Weight(view) => assert_eq!(view.shape(), wanted, "product: weight"),
            }
        }
    }

    fn keep(&self) -> bool {
        matches!(self.out, Out::Into(_, true))
    }
}

/// Computes all the products; gives the new results in order.
pub(crate) fn run<T: Real>(mut products: Vec<Product<'_, T>>) -> Result<Vec<Vec<T>>> {
    products.iter().for_each(Product::check);
    let mut new: Vec<Vec<T>> = Vec::new();
    for p in products.iter().filter(|p| matches!(p.out, Out::New)) {
        new.push(Vec::with_capacity(p.rows * p.columns));
    }
    let mut vectors = new.iter_mut();
    let mut outs = Vec::with_capacity(products.len());
    for p in &mut products {
        outs.push(match &mut p.out {
            Out::Into(out, _) => Shared(out.as_mut_ptr()),
            Out::New => Shared(vectors.next().map_or(std::ptr::null_mut(), Vec::as_mut_ptr)),
        });
    }
    if !T::run_products(&products, &outs) {
        for (p, out) in products.iter().zip(&outs) {
            let length = p.rows * p.columns;
            // SAFETY: the destination has room for so many numbers, which are written before they are seen as such.
            let out = unsafe {
                if !p.keep() {
                    out.at(0).write_bytes(0, length);
                }
                std::slice::from_raw_parts_mut(out.at(0), length)
            };
            plain(p, out);
        }
    }
    for (vector, p) in new.iter_mut().zip(products.iter().filter(|p| matches!(p.out, Out::New))) {
        // SAFETY: the capacity is that, and the kernel (or the plain form) has written every number.
        unsafe { vector.set_len(p.rows * p.columns) };
    }
    Ok(new)
}

/// Computes checked products of few rows together into `outs` by the kernel for every processor; else `false`, and nothing is done.
pub(crate) fn run_few(products: &[Product<'_, f32>], outs: &[Shared<f32>]) -> bool {
    portable::run::<FUSED>(products, outs)
}

/// One product, term by term.
fn plain<T: Real>(p: &Product<'_, T>, out: &mut [T]) {
    let (m, n, one) = (p.rows, p.columns, T::one());
    let mut keep = p.keep();
    if out.is_empty() {
        return;
    }
    for term in &p.terms {
        let k = term.depth;
        let whole = match term.right {
            Right::Slice(values, length) => Some((values, length)),
            Right::Weight(view) => T::of_view(view),
        };
        if let Some((values, length)) = whole {
            let strides = if term.transposed { Strides(1, length) } else { Strides(length, 1) };
            product((m, n, k), out, Strides(n, 1), keep, term.left, term.strides, values, strides, one, true);
            keep = true;
        } else if let Right::Weight(view) = term.right {
            let (outputs, inputs) = view.shape();
            let mut all = vec![T::zero(); TILE_ROWS.min(outputs) * inputs];
            for start in (0..outputs).step_by(TILE_ROWS) {
                let tile_rows = TILE_ROWS.min(outputs - start);
                let tile = &mut all[..tile_rows * inputs];
                tile.par_chunks_mut(inputs).enumerate().for_each_init(
                    || vec![0f32; inputs],
                    |narrow, (row, tile)| {
                        view.expand(start + row, 0..inputs, narrow);
                        tile.iter_mut().zip(narrow).for_each(|(to, v)| *to = T::from_f64(f64::from(*v)));
                    },
                );
                let strides = Strides(inputs, 1);
                if term.transposed {
                    let out = &mut out[start..];
                    let (shape, tile_strides) = ((m, tile_rows, k), Strides(1, inputs));
                    product(shape, out, Strides(n, 1), keep, term.left, term.strides, tile, tile_strides, one, true);
                } else {
                    let left = &term.left[(start * term.strides.1).min(term.left.len())..];
                    let keep = keep || start > 0;
                    product((m, n, tile_rows), out, Strides(n, 1), keep, left, term.strides, tile, strides, one, true);
                }
            }
            keep = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Tensor};

    use super::terms::FEW_ROWS;
    use super::*;
    use crate::check::random;
    use crate::storage::FrozenWeight;

    /// Computes products where it can.
    type Kernel = fn(&[Product<'_, f32>], &[Shared<f32>]) -> bool;

    fn values(shape: (usize, usize), seed: u64) -> Vec<f32> {
        random(shape, seed, DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("numbers")
    }

    fn assert_same(a: &[f32], b: &[f32], what: &str) {
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{what}: {a} against {b}");
        }
    }

    const BLOCKS: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    /// Every storage, both directions, awkward shapes, against the plain form; several products in one call.
    #[test]
    fn the_kernel_equals_the_plain_form() -> Result<()> {
        for (rows, outputs, inputs) in
            [(1, 40, 64), (3, 17, 128), (7, 33, 576), (100, 70, 256), (13, 300, 1024), (31, 34, 512)]
        {
            let w = Tensor::from_vec(values((outputs, inputs), 1), (outputs, inputs), &candle_core::Device::Cpu)?;
            let mut weights = vec![
                FrozenWeight::Dense(w.clone()),
                FrozenWeight::Dense(w.to_dtype(DType::BF16)?),
                FrozenWeight::Dense(w.to_dtype(DType::F16)?),
                FrozenWeight::Dense(w.to_dtype(DType::F64)?),
                FrozenWeight::Dense(w.clone()).to_nf4()?,
            ];
            for kind in BLOCKS {
                if inputs.is_multiple_of(kind.block_size()) {
                    let quantised = QTensor::quantize(&w, kind)?;
                    weights.push(FrozenWeight::from_ggml(kind, &quantised.data()?, (outputs, inputs))?);
                }
            }
            let (x, g) = (values((rows, inputs), 2), values((rows, outputs), 3));
            let (u, a) = (values((rows, 5), 4), values((5, inputs), 5));
            for weight in &weights {
                let guard = weight.guard();
                let right = Right::Weight(guard.view()?);
                let mut results = Vec::new();
                for fast in [true, false] {
                    let mut dx = vec![2f32; rows * inputs];
                    let slice = Right::Slice(a.as_slice(), inputs);
                    let outer = Term::outer(&u, (rows, 5), Right::Slice(&g, outputs));
                    let products = vec![
                        Product::new((rows, outputs), vec![Term::forward(&x, inputs, right)]),
                        Product {
                            out: Out::Into(&mut dx, true),
                            rows,
                            columns: inputs,
                            terms: vec![Term::backward(&g, outputs, right), Term::backward(&u, 5, slice)],
                        },
                        Product::new((5, outputs), vec![outer]),
                    ];
                    let mut new = match fast {
                        true => run(products)?,
                        false => {
                            let of = |p: &Product<'_, f32>| vec![if p.keep() { 2f32 } else { 9.0 }; p.rows * p.columns];
                            let mut all: Vec<Vec<f32>> = products.iter().map(of).collect();
                            products.iter().zip(&mut all).for_each(|(p, out)| plain(p, out));
                            dx = all.remove(1);
                            all
                        }
                    };
                    let outer = new.pop().unwrap_or_default();
                    results.push((new.pop().unwrap_or_default(), dx, outer));
                }
                let what = format!("{rows} x {outputs} x {inputs} in {}", weight.storage_name());
                assert_same(&results[0].0, &results[1].0, &what);
                assert_same(&results[0].1, &results[1].1, &what);
                assert_same(&results[0].2, &results[1].2, &what);
            }
        }
        Ok(())
    }

    /// Dot products of few rows for every processor, rounded once and twice, against the plain form: every storage, awkward shapes, two terms and a
    /// result that is added to. To be seen to fail: the rest that fills no register left out, or a repeated column written.
    #[test]
    fn few_rows_equal_the_plain_form_on_every_processor() -> Result<()> {
        for (rows, outputs, inputs) in [(1, 40, 64), (3, 37, 96), (6, 33, 576), (64, 70, 256), (9, 5, 7), (5, 1, 3)] {
            let w = Tensor::from_vec(values((outputs, inputs), 1), (outputs, inputs), &candle_core::Device::Cpu)?;
            let dense = FrozenWeight::Dense(w.clone());
            let mut weights = vec![dense.clone(), dense.to_nf4()?, dense.to_panels()?];
            for kind in [DType::BF16, DType::F16, DType::F64] {
                weights.push(FrozenWeight::Dense(w.to_dtype(kind)?));
            }
            for kind in
                [GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q4K, GgmlDType::Q6K]
            {
                if inputs.is_multiple_of(kind.block_size()) {
                    let quantised = QTensor::quantize(&w, kind)?;
                    weights.push(FrozenWeight::from_ggml(kind, &quantised.data()?, (outputs, inputs))?);
                }
            }
            let (x, u, b) = (values((rows, inputs), 2), values((rows, 5), 3), values((outputs, 5), 4));
            for weight in &weights {
                let guard = weight.guard();
                let right = Right::Weight(guard.view()?);
                let what = format!("{rows} x {outputs} x {inputs} in {}", weight.storage_name());
                for keep in [false, true] {
                    let of = |kernel: Option<Kernel>| {
                        let mut y = vec![2f32; rows * outputs];
                        let mut z = vec![if keep { 2f32 } else { 0.0 }; rows * outputs];
                        let slice = Right::Slice(b.as_slice(), 5);
                        let terms = vec![Term::forward(&x, inputs, right), Term::forward(&u, 5, slice)];
                        let out = Shared(y.as_mut_ptr());
                        let product = Product { out: Out::Into(&mut y, keep), rows, columns: outputs, terms };
                        let Some(kernel) = kernel else {
                            plain(&product, &mut z);
                            return z;
                        };
                        assert!(kernel(&[product], &[out]), "{what}");
                        y
                    };
                    let wanted = of(None);
                    assert_same(&of(Some(portable::run::<false>)), &wanted, &what);
                    assert_same(&of(Some(portable::run::<true>)), &wanted, &what);
                }
            }
        }
        Ok(())
    }

    /// The tiles of AVX2, which a processor with AVX-512 does not use otherwise, give what those of AVX-512 give.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn narrow_registers_give_what_wide_ones_give() {
        if !kernel::available() || !kernel::has_512() {
            return;
        }
        for (rows, columns, depth) in [(5, 1, 9), (6, 33, 40), (29, 47, 100), (16, 576, 576), (31, 64, 1)] {
            let (x, w) = (values((rows, depth), 1), values((columns, depth), 2));
            for keep in [false, true] {
                let one = |use_512: bool| {
                    let mut y = vec![1f32; rows * columns];
                    let terms = vec![Term::forward(&x, depth, Right::Slice(w.as_slice(), depth))];
                    let out = Shared(y.as_mut_ptr());
                    let product = Product { out: Out::Into(&mut y, keep), rows, columns, terms };
                    kernel::run(&[product], &[out], use_512);
                    y
                };
                assert_same(&one(true), &one(false), &format!("{rows} x {columns} x {depth}"));
            }
        }
    }

    /// A row's result is the same to the bit alone and among others, while all of them are few: of numbers and of blocks. To be seen to fail: a sum over
    /// 16 inputs that is taken from the next row's.
    #[test]
    fn few_rows_do_not_show_in_each_other() -> Result<()> {
        for (outputs, inputs, kind) in
            std::iter::once((70, 100, None)).chain(BLOCKS.into_iter().map(|kind| (35, 256, Some(kind))))
        {
            let (x, w) = (values((64, inputs), 1), values((outputs, inputs), 2));
            let dense = Tensor::from_slice(&w, (outputs, inputs), &candle_core::Device::Cpu)?;
            let weight = match kind {
                None => FrozenWeight::Dense(dense),
                Some(kind) => {
                    let blocks = QTensor::quantize(&dense, kind)?;
                    FrozenWeight::from_ggml(kind, &blocks.data()?, (outputs, inputs))?
                }
            };
            let guard = weight.guard();
            let right = Right::Weight(guard.view()?);
            let of = |x: &[f32], rows: usize| {
                let terms = vec![Term::forward(x, inputs, right)];
                Ok::<_, candle_core::Error>(run(vec![Product::new((rows, outputs), terms)])?.remove(0))
            };
            for many in [FEW_ROWS, FEW_ROWS / 2, 7, 1] {
                let together = of(&x[..many * inputs], many)?;
                for row in 0..many {
                    assert_eq!(
                        of(&x[row * inputs..][..inputs], 1)?,
                        together[row * outputs..][..outputs],
                        "row {row} of {many} in {}",
                        weight.storage_name()
                    );
                }
            }
        }
        Ok(())
    }

    /// On one thread and on three the bits are the same.
    #[test]
    fn the_number_of_threads_does_not_show() -> Result<()> {
        let (rows, outputs, inputs) = (101, 200, 576);
        let (x, w) = (values((rows, inputs), 1), values((outputs, inputs), 2));
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let terms = vec![Term::forward(&x, inputs, Right::Slice(&w, inputs))];
            pool.install(|| run(vec![Product::new((rows, outputs), terms)]))
        };
        assert_eq!(on(1)?, on(3)?);
        Ok(())
    }
}
