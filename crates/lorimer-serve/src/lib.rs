//! Generation with adapters: sampling, stop conditions, streaming, over the same model code that trains.

pub mod generate;
pub mod sampling;

pub use generate::{FinishReason, Generation, generate};
pub use sampling::Sampling;
