//! What a task packs and expands into.

/// Columns of a panel: two registers, or one of AVX-512's.
pub(super) const PANEL: usize = 16;

#[derive(Default)]
pub(super) struct Scratch {
    pub(super) packed: Vec<f32>,
    pub(super) expanded: Vec<f32>,
}
