//! What Lorimer exists for, made fast: each operation is a candle custom op with its own backward,
//! next to its *reference form* out of plain candle operations, which is the oracle in tests and
//! the path on devices other than the CPU.
//!
//! Every operation works on *packed rows*: a batch of sequences is one matrix `(rows, width)`
//! without padding, and [`Segment`]s say which rows belong together.
//!
//! This is the only crate of the workspace that contains `unsafe` code.

pub mod kernels;
pub mod linalg;
pub mod memory;
mod not_finite;
pub mod ops;
pub mod storage;
pub mod tape;

pub use kernels::simd::exp_f32;
pub use not_finite::NotFinite;
pub use ops::Ops;
pub use ops::attention::along::along_edges;
pub use ops::attention::causal::{CheckedGradient, Comparison, GradientMeter, GradientTotals, LowRankGradient};
pub use ops::attention::edges::{EdgeKeys, EdgeRule, Edges, attention_edges, edges_in_pool};
pub use ops::attention::eight_bits::store_rows_in_8_bits;
pub use ops::attention::pool::{KeyDtype, KeyPool};
pub use ops::attention::{AttentionForm, Mask, Segment, attention, attention_in_pool};
pub use ops::bases::scaled_bases;
pub use ops::block_affine::block_affine;
pub use ops::gated::{Activation, activate, gated, silu_mul};
pub use ops::layer_norm::layer_norm;
pub use ops::loss::{cross_entropy, smoothed_cross_entropy};
pub use ops::low_rank::{LowRankTerm, Part};
pub use ops::norm::rms_norm;
pub use ops::project::{frozen_left, frozen_linear};
pub use ops::rotary::{RotaryTable, rotary};
pub use ops::segmented::{Addition, Group, Paged, RankGate, Segmented, project_segmented, store_rows};
pub use ops::sparse::SparseIndex;
pub use storage::FrozenWeight;
pub use tape::{Gradients, Tape};

#[cfg(test)]
mod check;
