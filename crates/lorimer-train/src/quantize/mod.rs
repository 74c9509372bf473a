//! `lorimer quantize`: a model in few bits, and an adapter that begins as the best repair.
//!
//! LQ-LoRA (Guo et al. 2024, arXiv:2311.12023): every projection is decomposed under each configuration of a grid ([`decompose`]), the configurations are
//! shared out under one budget of bits ([`allocate`]), the error perhaps weighted by Fisher information. LoftQ (Li et al. 2024, arXiv:2310.08659) is
//! the same with one configuration for all, and plain NormalFloat without the low-rank change.
//!
//! Scales and zero points of groups are what GPTQ's and AWQ's checkpoints have: each weight rounded to the nearest, or as GPTQ does ([`gptq`],
//! Frantar et al. 2023, arXiv:2210.17323).
//!
//! What is found of a matrix is kept in a folder beside the output (`<output>.partial`), so that an interrupted run goes on; the output gets its name when
//! it is whole.

pub mod allocate;
pub mod decompose;
mod fisher;
pub mod gptq;
mod grouped;
mod job;
mod output;
mod run;
mod sequential;
mod settings;

pub use job::{CalibrationData, GroupedModule, ModuleConfig, ModuleReport, Quantize, Report, Stage};
pub use settings::{Format, Grid, Groups, Method, QuantizeSettings};
