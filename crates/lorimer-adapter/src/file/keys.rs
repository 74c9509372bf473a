//! The names that a method gives its tensors in a file.

/// The names that a method gives its tensors. A name that ends with a dot stands for all names that begin so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileKeys {
    /// Of a projection's tensors, below the projection's path: `lora_A.weight`.
    pub module: &'static [&'static str],
    /// Of a block's tensors that belong to none of its projections, below the block's path (`model.layers.3`).
    pub block: &'static [&'static str],
    /// Of the tensors that belong to the whole adapter: full names.
    pub adapter: &'static [&'static str],
}

impl FileKeys {
    /// Of a method whose tensors all belong to projections.
    pub const fn of_modules(module: &'static [&'static str]) -> Self {
        Self { module, block: &[], adapter: &[] }
    }
}
