//! A tensor as it lies in a file.

/// Type, dimensions (outermost first) and bytes of a tensor in a mapped file.
pub type RawTensor<'a, D> = (D, Vec<usize>, &'a [u8]);
