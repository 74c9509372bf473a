//! Products of tiles that lie in a cache, in AVX-512 registers: nothing is packed but what many tiles read.

use std::arch::x86_64::*;
use std::ops::Range;

use super::shared::Strides;

/// Most rows and registers of columns of a block: 24 sums, four registers of the right side and one number of the left.
const BLOCK: (usize, usize) = (6, 4);
/// Numbers of a register.
const LANES: usize = 16;

/// A product of tiles: (m, n) += or = scale · (m, k) (k, n).
pub(crate) struct TileProduct<'a> {
    /// m, n and k.
    pub shape: (usize, usize, usize),
    /// The left side, with its strides.
    pub left: (&'a [f32], Strides),
    /// The right side, whose rows are so many numbers apart and each without gaps.
    pub right: (&'a [f32], usize),
    /// Multiplies the product.
    pub scale: f32,
    /// Whether it is added to what is there.
    pub keep: bool,
}

impl TileProduct<'_> {
    /// Computes it into `out`, whose rows are `stride` numbers apart. The processor has AVX-512.
    pub(crate) fn run(&self, out: &mut [f32], stride: usize) {
        let (m, n, k) = self.shape;
        if m == 0 || n == 0 {
            return;
        }
        let (left, Strides(rows, columns)) = self.left;
        assert!(k == 0 || (m - 1) * rows + (k - 1) * columns < left.len(), "tile: left side too short");
        assert!(k == 0 || (k - 1) * self.right.1 + n <= self.right.0.len(), "tile: right side too short");
        assert!((m - 1) * stride + n <= out.len(), "tile: destination too short");
        assert!(crate::kernels::cpu::level() >= crate::kernels::cpu::Level::Avx512);
        // SAFETY: the assertions bound every access, and the processor has the instructions.
        unsafe { self.blocks(out.as_mut_ptr(), stride) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn blocks(&self, out: *mut f32, stride: usize) {
        let (m, n, _) = self.shape;
        for column in (0..n).step_by(BLOCK.1 * LANES) {
            let columns = column..n.min(column + BLOCK.1 * LANES);
            for row in (0..m).step_by(BLOCK.0) {
                let rows = BLOCK.0.min(m - row);
                let registers = columns.len().div_ceil(LANES);
                macro_rules! cases {
                    ($($r:literal),*) => {
                        match (rows, registers) {
                            $(
                                // SAFETY: the caller's bounds.
                                ($r, 1) => unsafe { self.block::<$r, 1>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 2) => unsafe { self.block::<$r, 2>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 3) => unsafe { self.block::<$r, 3>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 4) => unsafe { self.block::<$r, 4>(out, stride, row, columns.clone()) },
                            )*
                            _ => {}
                        }
                    };
                }
                cases!(1, 2, 3, 4, 5, 6);
            }
        }
    }

    /// R rows and V registers of columns.
    #[target_feature(enable = "avx512f")]
    unsafe fn block<const R: usize, const V: usize>(
        &self,
        out: *mut f32,
        stride: usize,
        row: usize,
        columns: Range<usize>,
    ) {
        let (left, Strides(row_stride, step)) = (self.left.0.as_ptr(), self.left.1);
        let rest = columns.len() - (V - 1) * LANES;
        let last = if rest >= LANES { !0 } else { (1 << rest) - 1 };
        let mask = |v: usize| if v + 1 == V { last } else { !0 };
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        // SAFETY: `run` has checked that all of these lie inside; masked lanes are not read or written.
        unsafe {
            let (mut a, mut b) = (left.add(row * row_stride), self.right.0.as_ptr().add(columns.start));
            for _ in 0..self.shape.2 {
                let right: [__m512; V] =
                    std::array::from_fn(|v| _mm512_maskz_loadu_ps(mask(v), b.wrapping_add(v * LANES)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let own = _mm512_set1_ps(*a.add(r * row_stride));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_fmadd_ps(own, right, *sum);
                    }
                }
                a = a.wrapping_add(step);
                b = b.wrapping_add(self.right.1);
            }
            let scale = _mm512_set1_ps(self.scale);
            for (r, sums) in sums.iter().enumerate() {
                let out = out.add((row + r) * stride + columns.start);
                for (v, sum) in sums.iter().enumerate() {
                    let place = out.wrapping_add(v * LANES);
                    let sum = match self.keep {
                        true => _mm512_fmadd_ps(*sum, scale, _mm512_maskz_loadu_ps(mask(v), place)),
                        false => _mm512_mul_ps(*sum, scale),
                    };
                    _mm512_mask_storeu_ps(place, mask(v), sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::{Level, level};
    use rand::{Rng, SeedableRng};

    #[test]
    fn tiles_equal_the_plain_sums() {
        if level() < Level::Avx512 {
            return;
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        for case in 0..300 {
            let (m, n, k) = (rng.random_range(1..20), rng.random_range(1..150), rng.random_range(0..70));
            let (turned, keep) = (case % 2 == 0, case % 3 == 0);
            let mut some = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
            let (left, right, mut out) = (some(m * k + 3), some(k * (n + 5)), some(m * (n + 2)));
            let strides = if turned { Strides(1, m) } else { Strides(k, 1) };
            let expected: Vec<f64> = (0..m * (n + 2))
                .map(|at| {
                    let (i, j) = (at / (n + 2), at % (n + 2));
                    let before = f64::from(out[at]);
                    if j >= n {
                        return before;
                    }
                    let product =
                        |l: usize| f64::from(left[i * strides.0 + l * strides.1]) * f64::from(right[l * (n + 5) + j]);
                    (if keep { before } else { 0.0 }) + 0.5 * (0..k).map(product).sum::<f64>()
                })
                .collect();
            let product =
                TileProduct { shape: (m, n, k), left: (&left, strides), right: (&right, n + 5), scale: 0.5, keep };
            product.run(&mut out, n + 2);
            for (found, expected) in out.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "case {case}: {found} and {expected}");
            }
        }
    }
}
