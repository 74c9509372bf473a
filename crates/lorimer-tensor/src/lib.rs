//! What Lorimer exists for, made fast: each operation is a candle custom op with its own backward,
//! next to its *reference form* out of plain candle operations, which is the oracle in tests and
//! the path on devices other than the CPU.
//!
//! Every operation works on *packed rows*: a batch of sequences is one matrix `(rows, width)`
//! without padding, and [`attention::Segment`]s say which rows belong together.
//!
//! This is the only crate of the workspace that contains `unsafe` code.

pub mod attention;
pub mod gated;
pub mod linalg;
pub mod loss;
pub mod mapped;
pub mod memory;
pub mod norm;
pub mod project;
mod raw;
pub mod rotary;
pub mod tape;
mod wide;

pub use attention::{Segment, attention};
pub use gated::silu_mul;
pub use loss::cross_entropy;
pub use norm::rms_norm;
pub use project::{FrozenWeight, frozen_linear};
pub use rotary::{RotaryTable, rotary};
pub use tape::{Gradients, Ops, Tape};

#[cfg(test)]
mod check;
