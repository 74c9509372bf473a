//! Pointers and strides of matrices.

/// A strided view of a matrix for a product: `(row stride, column stride)` in elements.
#[derive(Clone, Copy)]
pub(crate) struct Strides(pub usize, pub usize);

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
