//! What Lorimer exists for, made fast: each operation is a candle custom op with its own backward,
//! next to its *reference form* out of plain candle operations, which is the oracle in tests and
//! the path on devices other than the CPU.
//!
//! Every operation works on *packed rows*: a batch of sequences is one matrix `(rows, width)`
//! without padding, and [`attention::Segment`]s say which rows belong together.
//!
//! This is the only crate of the workspace that contains `unsafe` code.

pub mod attention;
pub mod bases;
pub mod block_affine;
pub mod blockwise;
pub mod cpu;
mod dense;
pub mod gated;
pub mod linalg;
pub mod loss;
pub mod low_rank;
pub mod mapped;
pub mod memory;
pub mod nf4;
pub mod norm;
pub mod ops;
pub mod panels;
mod products;
pub mod project;
mod raw;
pub mod ring;
pub mod rotary;
pub mod segmented;
pub mod sparse;
pub mod storage;
pub mod tape;
mod wide;

pub use attention::{Segment, attention, attention_in_pool};
pub use bases::scaled_bases;
pub use block_affine::block_affine;
pub use gated::silu_mul;
pub use loss::{cross_entropy, smoothed_cross_entropy};
pub use low_rank::{LowRankTerm, Part};
pub use norm::rms_norm;
pub use ops::Ops;
pub use project::{frozen_left, frozen_linear};
pub use rotary::{RotaryTable, rotary};
pub use segmented::{Addition, Group, Paged, Segmented, project_segmented, store_rows};
pub use sparse::SparseIndex;
pub use storage::FrozenWeight;
pub use tape::{Gradients, Tape};

#[cfg(test)]
mod check;
