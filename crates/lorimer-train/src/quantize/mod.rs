//! `lorimer quantize`: a model in few bits, and an adapter that begins as the best repair.
//!
//! LQ-LoRA (Guo et al. 2024, arXiv:2311.12023): every projection is decomposed under each configuration of a grid ([`decompose`]), the configurations are
//! shared out under one budget of bits ([`allocate`]), the error perhaps weighted by Fisher information. LoftQ (Li et al. 2024, arXiv:2310.08659) is
//! the same with one configuration for all, and plain NormalFloat without the low-rank change.
//!
//! What is found of a matrix is kept in a folder beside the output (`<output>.partial`), so that an interrupted run goes on; the output gets its name when
//! it is whole.

pub mod allocate;
pub mod decompose;
mod fisher;
mod job;
mod output;
mod run;
mod settings;

pub use job::{FisherData, ModuleReport, Quantize, Report, Stage};
pub use settings::{Format, Grid, Method, QuantizeSettings};
