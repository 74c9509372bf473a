//! Pools of keys and values, as attention reads them.

use candle_core::Result;

/// How keys and values lie in the rows of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyDtype {
    /// As they are.
    #[default]
    F32,
    /// In 8 bits with a scale for each token and head.
    Int8,
}

impl KeyDtype {
    /// Its name: `f32`, `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }

    /// Numbers of the pool that a row of `heads` keys or values of a width takes.
    pub fn row(self, heads: usize, head_dim: usize) -> usize {
        match self {
            Self::F32 => heads * head_dim,
            Self::Int8 => heads + (heads * head_dim).div_ceil(4),
        }
    }
}

/// Keys and values in the rows of a pool.
#[derive(Clone, Copy)]
pub struct KeyPool<'a> {
    /// The pool: (rows, stride).
    pub numbers: &'a [f32],
    /// Numbers from one row to the next.
    pub stride: usize,
    /// Numbers of a key: kv_heads·d. A row of `stride` has room for them.
    pub width: usize,
    /// A key's value is so many rows further on.
    pub values_at: usize,
    /// How they lie in a row.
    pub dtype: KeyDtype,
}

impl KeyPool<'_> {
    /// Number of rows.
    ///
    /// # Errors
    ///
    /// Fails unless the pool has rows of its stride, with room for keys of heads of a width.
    pub(super) fn rows(&self, head_dim: usize) -> Result<usize> {
        let Self { numbers, stride, width, dtype, .. } = *self;
        let heads = width.checked_div(head_dim).unwrap_or(0);
        if stride == 0
            || heads * head_dim != width
            || dtype.row(heads, head_dim) > stride
            || numbers.len() % stride != 0
        {
            candle_core::bail!(
                "attention: a pool of {} numbers has no rows of {stride} with keys of {width} in {}",
                numbers.len(),
                dtype.name()
            );
        }
        Ok(numbers.len() / stride)
    }
}
