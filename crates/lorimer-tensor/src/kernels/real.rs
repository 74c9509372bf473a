//! What kernels need of a type of numbers.

use candle_core::{CpuStorage, Result, WithDType};

use crate::kernels::products::terms::Product;
use crate::kernels::shared::{Shared, Strides};
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
    /// Whether there is a kernel for [`Self::tile_product`], so that it pays to lay out what it reads.
    fn has_tiles() -> bool {
        false
    }
    /// (m, n) += or = scale · (m, k) (k, n) on one thread, of tiles that lie in a cache, where there is a kernel for it; else `false`, and nothing is done.
    /// Rows of the right side and of the result have no gaps, and are so many numbers apart.
    fn tile_product(
        _shape: (usize, usize, usize),
        _out: (&mut [Self], usize),
        _keep: bool,
        _left: (&[Self], Strides),
        _right: (&[Self], usize),
        _scale: Self,
    ) -> bool {
        false
    }
    /// A product on all threads: see [`crate::kernels::slices::product_raw`].
    ///
    /// # Safety
    /// As [`crate::kernels::slices::product_raw`].
    unsafe fn product_parallel(
        shape: (usize, usize, usize),
        dst: (*mut Self, Strides),
        keep: bool,
        lhs: (*const Self, Strides),
        rhs: (*const Self, Strides),
        scale: Self,
    );
}
