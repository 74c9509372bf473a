//! Products of tiles that lie in a cache, in registers of 512 bits or of 256: nothing is packed but what many tiles read.

use std::arch::x86_64::*;
use std::ops::Range;

use super::cpu::{Level, level};
use super::shared::Strides;

/// Most rows of a block.
const ROWS: usize = 6;

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

/// Whether the processor can: AVX2 or more.
pub(crate) fn available() -> bool {
    level() >= Level::Avx2
}

impl TileProduct<'_> {
    /// Computes it into `out`, whose rows are `stride` numbers apart, where the processor can ([`available`]).
    pub(crate) fn run(&self, out: &mut [f32], stride: usize) {
        self.run_at(level(), out, stride);
    }

    /// As [`Self::run`], in the registers of a level that the processor has.
    fn run_at(&self, wanted: Level, out: &mut [f32], stride: usize) {
        let (m, n, k) = self.shape;
        if m == 0 || n == 0 {
            return;
        }
        let (left, Strides(rows, columns)) = self.left;
        assert!(k == 0 || (m - 1) * rows + (k - 1) * columns < left.len(), "tile: left side too short");
        assert!(k == 0 || (k - 1) * self.right.1 + n <= self.right.0.len(), "tile: right side too short");
        assert!((m - 1) * stride + n <= out.len(), "tile: destination too short");
        assert!(wanted >= Level::Avx2 && wanted <= level(), "tile: not on this processor");
        // SAFETY: the assertions bound every access, and the processor has the instructions.
        unsafe {
            match wanted >= Level::Avx512 {
                true => self.in_512(out.as_mut_ptr(), stride),
                false => self.in_256(out.as_mut_ptr(), stride),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn in_512(&self, out: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { self.blocks::<__m512>(out, stride) }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn in_256(&self, out: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { self.blocks::<__m256>(out, stride) }
    }

    #[inline(always)]
    unsafe fn blocks<R: Register>(&self, out: *mut f32, stride: usize) {
        let (m, n, _) = self.shape;
        for column in (0..n).step_by(R::BLOCK * R::LANES) {
            let columns = column..n.min(column + R::BLOCK * R::LANES);
            for row in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - row);
                let (registers, whole) = (columns.len().div_ceil(R::LANES), columns.len() == R::BLOCK * R::LANES);
                macro_rules! cases {
                    ($($r:literal),*) => {
                        match (rows, registers, R::BLOCK, whole) {
                            $(
                                // SAFETY: the caller's bounds.
                                ($r, 2, 2, true) => unsafe { self.block::<R, $r, 2, true>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 1, _, _) => unsafe { self.block::<R, $r, 1, false>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 2, _, _) => unsafe { self.block::<R, $r, 2, false>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 3, 4, _) => unsafe { self.block::<R, $r, 3, false>(out, stride, row, columns.clone()) },
                                // SAFETY: the caller's bounds.
                                ($r, 4, 4, _) => unsafe { self.block::<R, $r, 4, false>(out, stride, row, columns.clone()) },
                            )*
                            _ => {}
                        }
                    };
                }
                cases!(1, 2, 3, 4, 5, 6);
            }
        }
    }

    /// M rows and V registers of columns; WHOLE: all of the last one too.
    #[inline(always)]
    unsafe fn block<R: Register, const M: usize, const V: usize, const WHOLE: bool>(
        &self,
        out: *mut f32,
        stride: usize,
        row: usize,
        columns: Range<usize>,
    ) {
        let (left, Strides(row_stride, step)) = (self.left.0.as_ptr(), self.left.1);
        // SAFETY: `run_at` has checked that all of these lie inside, and the processor; lanes beyond the last column are not read or written.
        unsafe {
            let last = R::mask(columns.len() - (V - 1) * R::LANES);
            let load = |v: usize, from: *const f32| match WHOLE || v + 1 < V {
                true => R::load(from),
                false => R::load_part(from, last),
            };
            let mut sums = [[R::zero(); V]; M];
            let (mut a, mut b) = (left.add(row * row_stride), self.right.0.as_ptr().add(columns.start));
            for _ in 0..self.shape.2 {
                let right: [R; V] = std::array::from_fn(|v| load(v, b.wrapping_add(v * R::LANES)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let own = R::splat(*a.add(r * row_stride));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = own.times_plus(right, *sum);
                    }
                }
                a = a.wrapping_add(step);
                b = b.wrapping_add(self.right.1);
            }
            let scale = R::splat(self.scale);
            for (r, sums) in sums.iter().enumerate() {
                let out = out.add((row + r) * stride + columns.start);
                for (v, sum) in sums.iter().enumerate() {
                    let place = out.wrapping_add(v * R::LANES);
                    let before = if self.keep { load(v, place) } else { R::zero() };
                    let sum = sum.times_plus(scale, before);
                    match WHOLE || v + 1 < V {
                        true => sum.store(place),
                        false => sum.store_part(place, last),
                    }
                }
            }
        }
    }
}

/// A register of f32. All its functions ask for the processor's instructions.
trait Register: Copy {
    /// Numbers of a register.
    const LANES: usize;
    /// Most registers of columns of a block: with [`ROWS`] rows, the sums, the right side and one number of the left fill the processor's.
    const BLOCK: usize;
    /// Which lanes count.
    type Mask: Copy;

    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    /// The first `count` lanes.
    unsafe fn mask(count: usize) -> Self::Mask;
    unsafe fn load(from: *const f32) -> Self;
    /// Zero where the mask is not.
    unsafe fn load_part(from: *const f32, mask: Self::Mask) -> Self;
    /// self · factor + sum.
    unsafe fn times_plus(self, factor: Self, sum: Self) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn store_part(self, to: *mut f32, mask: Self::Mask);
}

macro_rules! register {
    (
        $register:ty, $lanes:literal, $block:literal, $mask:ty, $zero:ident, $splat:ident, $load:ident, $fma:ident, $store:ident,
        |$count:ident| $of:expr, |$from:ident, $part:ident| $load_part:expr, |$to:ident, $kept:ident, $value:ident| $store_part:expr
    ) => {
        impl Register for $register {
            const LANES: usize = $lanes;
            const BLOCK: usize = $block;
            type Mask = $mask;

            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: the caller's processor.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn splat(value: f32) -> Self {
                // SAFETY: the caller's processor.
                unsafe { $splat(value) }
            }
            #[inline(always)]
            unsafe fn mask($count: usize) -> $mask {
                // SAFETY: the caller's processor.
                #[allow(unused_unsafe)]
                unsafe {
                    $of
                }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller's pointer.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn load_part($from: *const f32, $part: $mask) -> Self {
                // SAFETY: the caller's pointer.
                unsafe { $load_part }
            }
            #[inline(always)]
            unsafe fn times_plus(self, factor: Self, sum: Self) -> Self {
                // SAFETY: the caller's processor.
                unsafe { $fma(self, factor, sum) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller's pointer.
                unsafe { $store(to, self) }
            }
            #[inline(always)]
            unsafe fn store_part(self, $to: *mut f32, $kept: $mask) {
                let $value = self;
                // SAFETY: the caller's pointer.
                unsafe { $store_part }
            }
        }
    };
}

register!(
    __m512,
    16,
    4,
    __mmask16,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    _mm512_storeu_ps,
    |count| ((1u32 << count) - 1) as __mmask16,
    |from, mask| _mm512_maskz_loadu_ps(mask, from),
    |to, mask, value| _mm512_mask_storeu_ps(to, mask, value)
);
register!(
    __m256,
    8,
    2,
    __m256i,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    _mm256_storeu_ps,
    |count| _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
    |from, mask| _mm256_maskload_ps(from, mask),
    |to, mask, value| _mm256_maskstore_ps(to, mask, value)
);

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn tiles_equal_the_plain_sums() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        for case in 0..300 {
            let (m, n, k) = (rng.random_range(1..20), rng.random_range(1..150), rng.random_range(0..70));
            let (turned, keep) = (case % 2 == 0, case % 3 == 0);
            let mut some = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
            let (left, right, out) = (some(m * k + 3), some(k * (n + 5)), some(m * (n + 2)));
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
            for own in [Level::Avx2, Level::Avx512].into_iter().filter(|own| *own <= level()) {
                let mut out = out.clone();
                product.run_at(own, &mut out, n + 2);
                for (found, expected) in out.iter().zip(&expected) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-5,
                        "case {case}, {}: {found} and {expected}",
                        own.name()
                    );
                }
            }
        }
    }
}
