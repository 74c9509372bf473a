//! f32 and f64 as numbers of kernels.

use candle_core::{CpuStorage, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

#[cfg(target_arch = "x86_64")]
use crate::kernels::products::kernel;
use crate::kernels::products::run_few;
use crate::kernels::products::terms::Product;
use crate::kernels::real::Real;
use crate::kernels::shared::{Shared, Strides};
use crate::storage::View;

/// [`Real::product_parallel`] on faer, whose products are up to a quarter faster than gemm's at training shapes (`lorimer bench
/// train` prints the machine's rate).
macro_rules! product_parallel {
    ($real:ty) => {
        unsafe fn product_parallel(
            (m, n, k): (usize, usize, usize),
            (dst, d): (*mut $real, Strides),
            keep: bool,
            (lhs, l): (*const $real, Strides),
            (rhs, r): (*const $real, Strides),
            scale: $real,
        ) {
            // SAFETY: the caller's pointers are valid for these shapes and strides, and `dst` overlaps neither.
            let (dst, lhs, rhs) = unsafe {
                (
                    MatMut::from_raw_parts_mut(dst, m, n, d.0 as isize, d.1 as isize),
                    MatRef::from_raw_parts(lhs, m, k, l.0 as isize, l.1 as isize),
                    MatRef::from_raw_parts(rhs, k, n, r.0 as isize, r.1 as isize),
                )
            };
            let accum = if keep { Accum::Add } else { Accum::Replace };
            matmul(dst, accum, lhs, rhs, scale, Par::rayon(0));
        }
    };
}

impl Real for f32 {
    fn mut_slice(storage: &mut CpuStorage) -> Result<&mut [f32]> {
        match storage {
            CpuStorage::F32(values) => Ok(values),
            _ => candle_core::bail!("lorimer kernel: f32 expected"),
        }
    }
    #[inline(always)]
    fn exp_fast(self) -> f32 {
        crate::kernels::simd::exp_f32(self)
    }
    #[inline(always)]
    fn erf_fast(self) -> f32 {
        crate::kernels::simd::erf_f32(self)
    }
    fn of_view(view: View<'_>) -> Option<(&[f32], usize)> {
        match view {
            View::F32(values, length) => Some((values, length)),
            _ => None,
        }
    }
    fn run_products(products: &[Product<'_, f32>], outs: &[Shared<f32>]) -> bool {
        #[cfg(target_arch = "x86_64")]
        if kernel::available() {
            kernel::run(products, outs, kernel::has_512());
            return true;
        }
        run_few(products, outs)
    }
    #[cfg(target_arch = "x86_64")]
    fn attend_one((q, d): (&[f32], usize), keys: (&[f32], &[f32], &[usize]), scale: f32, out: &mut [f32]) -> bool {
        let fits = kernel::has_512() && d > 0 && d.is_multiple_of(16) && q.len() == out.len();
        if fits {
            for (q, out) in q.chunks(d * 6).zip(out.chunks_mut(d * 6)) {
                // SAFETY: the processor can.
                unsafe { kernel::attend_one((q, d), keys, scale, out) };
            }
        }
        fits
    }
    #[cfg(target_arch = "x86_64")]
    fn has_tiles() -> bool {
        crate::kernels::tile::available()
    }
    #[cfg(target_arch = "x86_64")]
    fn tile_product(
        shape: (usize, usize, usize),
        (out, stride): (&mut [f32], usize),
        keep: bool,
        left: (&[f32], Strides),
        right: (&[f32], usize),
        scale: f32,
    ) -> bool {
        let has = Self::has_tiles();
        if has {
            crate::kernels::tile::TileProduct { shape, left, right, scale, keep }.run(out, stride);
        }
        has
    }
    product_parallel!(f32);
}

impl Real for f64 {
    fn mut_slice(storage: &mut CpuStorage) -> Result<&mut [f64]> {
        match storage {
            CpuStorage::F64(values) => Ok(values),
            _ => candle_core::bail!("lorimer kernel: f64 expected"),
        }
    }
    #[inline(always)]
    fn exp_fast(self) -> f64 {
        self.exp()
    }
    #[inline(always)]
    fn erf_fast(self) -> f64 {
        libm::erf(self)
    }
    fn of_view(view: View<'_>) -> Option<(&[f64], usize)> {
        match view {
            View::F64(values, length) => Some((values, length)),
            _ => None,
        }
    }
    product_parallel!(f64);
}
