//! Slices out of candle storages, and matrix products straight into slices.

use std::cell::RefCell;

use candle_core::{CpuStorage, Error, InplaceOp1, Layout, Result, Storage, Tensor, WithDType};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::kernels::products::Product;
use crate::storage::View;

/// The two floating-point types that a CPU kernel computes in.
pub(crate) trait Real: WithDType + num_traits::Float + std::iter::Sum {
    /// The elements of a CPU storage of this type.
    fn mut_slice(storage: &mut CpuStorage) -> Result<&mut [Self]>;
    /// eˣ, to within rounding.
    fn exp_fast(self) -> Self;
    /// The error function, to within rounding of numbers about 1.
    fn erf_fast(self) -> Self;
    /// The numbers of a frozen weight that is stored in this type, with the length of a row.
    fn of_view(view: View<'_>) -> Option<(&[Self], usize)>;
    /// Computes checked products together into `outs`, where there is a kernel for it; else `false`, and nothing is done.
    fn run_products(_products: &[Product<'_, Self>], _outs: &[Shared<Self>]) -> bool {
        false
    }
    /// Attention of one query, `q` and `out` (heads, d), in heads that share the keys and values at `places`, where there is a kernel for it;
    /// else `false`, and nothing is done.
    fn attend_one(_q: (&[Self], usize), _keys: (&[Self], &[Self], &[usize]), _scale: Self, _out: &mut [Self]) -> bool {
        false
    }
    /// A product on all threads: see [`product_raw`].
    ///
    /// # Safety
    /// As [`product_raw`].
    unsafe fn product_parallel(
        shape: (usize, usize, usize),
        dst: (*mut Self, Strides),
        keep: bool,
        lhs: (*const Self, Strides),
        rhs: (*const Self, Strides),
        scale: Self,
    );
}

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
    #[cfg(target_arch = "x86_64")]
    fn run_products(products: &[Product<'_, f32>], outs: &[Shared<f32>]) -> bool {
        let available = crate::kernels::products::kernel::available();
        if available {
            crate::kernels::products::kernel::run(products, outs, crate::kernels::products::kernel::has_512());
        }
        available
    }
    #[cfg(target_arch = "x86_64")]
    fn attend_one((q, d): (&[f32], usize), keys: (&[f32], &[f32], &[usize]), scale: f32, out: &mut [f32]) -> bool {
        let fits = crate::kernels::products::kernel::has_512() && d > 0 && d.is_multiple_of(16) && q.len() == out.len();
        if fits {
            for (q, out) in q.chunks(d * 6).zip(out.chunks_mut(d * 6)) {
                // SAFETY: the processor can.
                unsafe { crate::kernels::products::kernel::attend_one((q, d), keys, scale, out) };
            }
        }
        fits
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

/// The elements of a contiguous CPU storage.
pub(crate) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let data = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => Err(Error::RequiresContiguous { op: "lorimer kernel" }.bt()),
    }
}

/// Calls `f` with the elements of CPU tensors, in order.
pub(crate) fn with_slices<T: Real, R, const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> Result<R>,
) -> Result<R> {
    with_slice_list(&tensors, |list| {
        let mut slices: [&[T]; N] = [&[]; N];
        slices.copy_from_slice(list);
        f(slices)
    })
}

/// [`with_slices`] of any number of tensors.
pub(crate) fn with_slice_list<T: Real, R>(tensors: &[&Tensor], f: impl FnOnce(&[&[T]]) -> Result<R>) -> Result<R> {
    let tensors: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<Result<_>>()?;
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let slices = guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => candle_core::bail!("lorimer kernel: the tensor is not on the CPU"),
    });
    f(&slices.collect::<Result<Vec<_>>>()?)
}

/// Calls `f` with the elements of a contiguous CPU tensor, to be changed in place. Whoever shares the storage sees it.
pub(crate) fn with_mut_slice<T: Real>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> Result<()>) -> Result<()> {
    struct Write<F>(RefCell<Option<F>>);
    impl<F: FnOnce(&mut CpuStorage, &Layout) -> Result<()>> InplaceOp1 for Write<F> {
        fn name(&self) -> &'static str {
            "lorimer write"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            self.0.borrow_mut().take().map_or(Ok(()), |f| f(storage, layout))
        }
    }
    if tensor.elem_count() == 0 {
        return f(&mut []);
    }
    let write = |storage: &mut CpuStorage, layout: &Layout| match layout.contiguous_offsets() {
        Some((start, end)) => f(&mut T::mut_slice(storage)?[start..end]),
        None => Err(Error::RequiresContiguous { op: "lorimer kernel" }.bt()),
    };
    tensor.inplace_op1(&Write(RefCell::new(Some(write))))
}

/// A strided view of a matrix for [`product`]: `(row stride, column stride)` in elements.
#[derive(Clone, Copy)]
pub(crate) struct Strides(pub usize, pub usize);

/// `dst = keep·dst + scale·lhs·rhs` with `dst` (m, n), `lhs` (m, k), `rhs` (k, n); `keep` is 0 or 1.
///
/// # Safety
/// The three pointers must be valid for their shapes and strides, and `dst` must not overlap the others.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn product_raw<T: Real>(
    (m, n, k): (usize, usize, usize),
    dst: *mut T,
    dst_strides: Strides,
    keep: bool,
    lhs: *const T,
    lhs_strides: Strides,
    rhs: *const T,
    rhs_strides: Strides,
    scale: T,
    parallel: bool,
) {
    if parallel {
        // SAFETY: the caller's contract is the same.
        return unsafe {
            T::product_parallel((m, n, k), (dst, dst_strides), keep, (lhs, lhs_strides), (rhs, rhs_strides), scale)
        };
    }
    // SAFETY: the caller's contract is gemm's.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst,
            dst_strides.1 as isize,
            dst_strides.0 as isize,
            keep,
            lhs,
            lhs_strides.1 as isize,
            lhs_strides.0 as isize,
            rhs,
            rhs_strides.1 as isize,
            rhs_strides.0 as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

fn last_index(rows: usize, columns: usize, strides: Strides) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * strides.0 + (columns - 1) * strides.1 + 1 }
}

/// Checked form of [`product_raw`] over slices.
#[allow(clippy::too_many_arguments)]
pub(crate) fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    dst: &mut [T],
    dst_strides: Strides,
    keep: bool,
    lhs: &[T],
    lhs_strides: Strides,
    rhs: &[T],
    rhs_strides: Strides,
    scale: T,
    parallel: bool,
) {
    assert!(last_index(m, n, dst_strides) <= dst.len(), "product: destination too short");
    assert!(last_index(m, k, lhs_strides) <= lhs.len(), "product: left side too short");
    assert!(last_index(k, n, rhs_strides) <= rhs.len(), "product: right side too short");
    // SAFETY: the assertions above bound every access; `dst` is borrowed exclusively.
    unsafe {
        product_raw(
            (m, n, k),
            dst.as_mut_ptr(),
            dst_strides,
            keep,
            lhs.as_ptr(),
            lhs_strides,
            rhs.as_ptr(),
            rhs_strides,
            scale,
            parallel,
        )
    }
}

/// A pointer that parallel tasks may share because they write to disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);
// SAFETY: the holder promises disjoint writes; see each use.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}
impl<T> Shared<T> {
    /// # Safety
    /// `offset` must be inside the allocation and not be written by another task.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's contract.
        unsafe { self.0.add(offset) }
    }
}

/// Chunk length for splitting `elements` rows of work over the thread pool.
pub(crate) fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads() * 4).max(1)
}
