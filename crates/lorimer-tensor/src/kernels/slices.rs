//! Slices out of candle storages, and matrix products straight into slices.

use std::cell::RefCell;

use candle_core::{CpuStorage, Error, InplaceOp1, Layout, Result, Storage, Tensor};

use crate::kernels::real::Real;
use crate::kernels::shared::Strides;

/// The elements of a contiguous CPU storage.
pub(crate) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let data = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        // Columns of a tensor without rows begin beyond its end.
        Some((start, end)) if start == end => Ok(&[]),
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

/// Chunk length for splitting `elements` rows of work over the thread pool.
pub(crate) fn rows_per_task(rows: usize) -> usize {
    rows.div_ceil(rayon::current_num_threads() * 4).max(1)
}
